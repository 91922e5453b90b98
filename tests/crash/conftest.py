"""Options of the power-cut tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from extsnap.snapshot import engine

_SHORT, _LONG = 100, 4000


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many media to judge, from which seed, or one of them again."""
    group = parser.getgroup("power cuts")
    group.addoption("--crash-states", type=int, help="media with sampled unsynced sectors to judge, for each volume")
    group.addoption("--crash-seed", type=int, default=0, help="what the samples are drawn from")
    group.addoption("--crash-replay", metavar="KIND:POINT:SEED", help="judge this one medium again")


@pytest.fixture(scope="session")
def crash_states(request: pytest.FixtureRequest) -> int:
    """How many sampled media each volume gets: option, EXTSNAP_CRASH_STATES, or by EXTSNAP_LONG."""
    option = request.config.getoption("--crash-states", default=None)
    default = _LONG if os.environ.get("EXTSNAP_LONG") else _SHORT
    return int(option if option is not None else os.environ.get("EXTSNAP_CRASH_STATES", default))


@pytest.fixture(scope="module", autouse=True)
def _small_hold() -> Iterator[None]:
    """A hold that fills up within a session of these tests: more batches, and thousands of opens are faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "HOLD_BYTES", 32 << 10)
        patch.setattr(engine, "PIECE_BYTES", 64 << 10)
        yield
