"""The server's turns while the store grows, and what the end of a mount means: with everything else played here."""

from __future__ import annotations

import errno
import json
import socket
from types import SimpleNamespace

import pytest

from extsnap.errors import VolumeFull
from extsnap.serve import control, growing
from extsnap.serve.grower import _Process
from extsnap.serve.growing import Growing
from extsnap.serve.server import Server


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
        self.is_coming, self.pieces, self.looked, self.pauses = False, 0, 0, 0
        self.failure: Exception | None = None
        self.reserve = SimpleNamespace(dirty_bytes=1, cached_bytes=1)

    @property
    def at_work(self) -> bool:
        return self.pieces > 0

    def take(self, answer: dict[str, object]) -> str:
        if self.failure is not None:
            raise self.failure
        return ""

    def pause(self) -> None:
        self.pauses += 1

    def step(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.pieces -= 1
        self.is_coming = self.pieces > 0

    def due(self) -> dict[str, object] | None:
        self.is_coming = self.is_coming or bool(self.wishes)
        return self.wishes.pop() if self.wishes else None

    def note_mount(self, mounted: bool) -> None:
        self.mounted = mounted
        if self.failure is not None:
            raise self.failure

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


FAILURES = (OSError(errno.EIO, "the disk fails"), VolumeFull("no room"))


@pytest.mark.parametrize("failure", FAILURES)
def test_an_answer_that_cannot_be_taken_in_ends_nothing(failure: Exception) -> None:
    growth, said = Growth(), []
    volume = SimpleNamespace(growth=growth)
    served = Growing(SimpleNamespace(volume=volume, log=said.append))  # type: ignore[arg-type]
    served._grower = SimpleNamespace(receive=lambda: [{"do": "grow"}])  # type: ignore[assignment]
    growth.failure = failure
    served.hear()
    assert growth.pauses == 1, "it is asked for the same at once"
    assert said == [f"the store did not grow: {failure}"]


@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_failure_it_waits_a_little(turn, failure: Exception) -> None:
    take_turn, _, growth = turn
    take_turn.__self__._server.log = lambda message: None
    growth.failure, growth.pieces = failure, 1
    take_turn()
    assert growth.pauses == 1


class Dropping:
    """A growth of which an answer is awaited, or given blocks are not taken in yet."""

    def __init__(self, awaited: bool, at_work: bool = False) -> None:
        self.awaited, self.at_work = awaited, at_work

    @property
    def under_way(self) -> bool:
        return self.awaited or self.at_work

    def drop(self) -> None:
        self.at_work = False


def server(growing: Dropping, *, used: bool = False) -> SimpleNamespace:
    """As much of one as is asked whether a command may be carried out."""
    return SimpleNamespace(
        config=SimpleNamespace(image="/disk.img"),
        in_use=lambda: used,
        _volume=SimpleNamespace(),
        _files=SimpleNamespace(volume_opens=0, open_views=list),
        _growing=growing,
    )


@pytest.mark.parametrize("verb", ["create", "checksum", "restore", "strip"])
def test_what_edits_the_filesystem_waits_for_the_end_of_a_growth(verb: str) -> None:
    with pytest.raises(control.StillClosing, match="was unmounted a moment ago"):
        Server._permit(server(Dropping(awaited=True)), verb, {})  # type: ignore[arg-type]
    given = Dropping(awaited=False, at_work=True)
    Server._permit(server(given), verb, {})  # type: ignore[arg-type]
    assert not given.at_work, "what was given is not waited for"


def test_what_edits_nothing_and_what_happens_in_a_mount_waits_for_no_growth() -> None:
    growing = Dropping(awaited=True, at_work=True)
    Server._permit(server(growing, used=True), "create", {})  # type: ignore[arg-type]
    Server._permit(server(growing), "list", {})  # type: ignore[arg-type]
    assert growing.at_work


def test_the_first_who_opens_the_volume_again_ends_what_the_one_before_was_given() -> None:
    dropped = []
    growth = SimpleNamespace(drop=lambda: dropped.append(True))
    for used in (True, False):
        fake = SimpleNamespace(in_use=lambda used=used: used, volume=SimpleNamespace(growth=growth), _begin=list)
        fake._growing = Growing(fake)  # type: ignore[arg-type]
        fake._growing._grower = SimpleNamespace()
        Server._before_write(fake)  # type: ignore[arg-type]
        assert dropped == ([] if used else [True])


def test_without_a_mount_every_request_is_answered(monkeypatch) -> None:
    """Until then the volume cannot be edited by anybody."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = _Process(theirs)
        monkeypatch.setattr(process, "_mount", lambda: None)
        for number, what in enumerate(("grow", "free")):
            process._carry_out({"do": what, "number": number})
        answers = [json.loads(line) for line in ours.recv(1 << 16).splitlines()]
    assert [(answer["do"], answer["number"]) for answer in answers] == [("grow", 0), ("free", 1)]
    assert all("not mounted any more" in answer["error"] for answer in answers)
