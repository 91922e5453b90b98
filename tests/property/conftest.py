"""What the tests of random work share."""

from __future__ import annotations

from collections.abc import Iterator

import lab
import pytest


@pytest.fixture(scope="module", autouse=True)
def _kept_memory() -> Iterator[None]:
    with lab.kept_memory():
        yield
