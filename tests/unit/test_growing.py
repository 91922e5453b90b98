"""When requests that found no room are tried again: the server's turns, with everything else played here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from extsnap.serve import growing
from extsnap.serve.growing import Growing


class Files:
    """Requests that wait; `tried` holds at each attempt whether it was the last one of the first of them."""

    def __init__(self) -> None:
        self.parked_seconds, self.lag, self.hope = 0.0, None, None
        self.tried: list[bool] = []

    def try_parked(self) -> None:
        self.tried.append(self.hope is None or not self.hope(self.parked_seconds))

    def acknowledge_late(self, reason: object) -> None:
        return None


class Growth:
    """Asks once, and what comes of it are two pieces."""

    def __init__(self) -> None:
        self.mounted = self.limited = self.hope = False
        self.wishes: list[dict[str, object]] = [{"do": "grow"}]
        self.is_coming, self.pieces, self.looked = False, 0, 0
        self.reserve = SimpleNamespace(dirty_bytes=1, cached_bytes=1)

    @property
    def at_work(self) -> bool:
        return self.pieces > 0

    def step(self) -> None:
        self.pieces -= 1
        self.is_coming = self.pieces > 0

    def due(self) -> dict[str, object] | None:
        self.is_coming = self.is_coming or bool(self.wishes)
        return self.wishes.pop() if self.wishes else None

    def note_mount(self, mounted: bool) -> None:
        self.mounted = mounted

    def look_again(self) -> None:
        self.looked += 1

    def lag(self) -> float:
        return 0.0


@pytest.fixture
def turn():
    """(a turn of the server, its files, growth)."""
    files, growth = Files(), Growth()
    config = SimpleNamespace(directory="/served", partition=0)
    served = Growing(SimpleNamespace(files=files, volume=SimpleNamespace(growth=growth), config=config))  # type: ignore[arg-type]
    served._grower = SimpleNamespace(mounted=True, limited=True, send=lambda request: True)  # type: ignore[assignment]
    return served.turn, files, growth


def test_they_are_tried_with_every_piece_and_at_the_end_once_more(turn) -> None:
    take_turn, files, growth = turn
    take_turn()
    take_turn()
    assert files.tried == [], "nothing has come yet"
    growth.pieces = 2
    take_turn()
    take_turn()
    assert files.tried == [False, False], "there may be more behind the last piece"
    take_turn()
    assert files.tried == [False, False, True]
    assert growth.hope, "the next one may wait again"


def test_they_do_not_wait_for_ever(turn) -> None:
    """What the growth waits for may be one of them."""
    take_turn, files, growth = turn
    take_turn()
    files.parked_seconds = growing._PARKED_SECONDS
    take_turn()
    assert files.tried == [True]
    assert growth.hope, "one that has just come may wait"


def test_they_are_refused_when_nothing_grows_any_more(turn) -> None:
    take_turn, files, growth = turn
    growth.wishes.clear()
    take_turn()
    assert files.tried == [True]
    take_turn()
    assert growth.looked == 1, "the filesystem is asked once more, not in each turn"
