"""What the tests of crashes share."""

from __future__ import annotations

from collections.abc import Iterator

import lab
import pytest
from campaigns.life import small_hold


@pytest.fixture(scope="module", autouse=True)
def _small_hold() -> Iterator[None]:
    with small_hold(), lab.kept_memory():
        yield
