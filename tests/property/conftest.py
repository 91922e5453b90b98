"""What the tests of random work share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import lab
import pytest


@pytest.fixture(scope="module", autouse=True)
def _kept_memory() -> Iterator[None]:
    with lab.kept_memory():
        yield


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Engines are cycles of few objects and much memory: Python itself looks for them when there are gigabytes."""
    yield
    gc.collect()
