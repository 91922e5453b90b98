"""One client after the other has the turn, and what it asked for with it; server and clients are played here."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from extsnap.errors import VolumeBusy
from extsnap.serve import processes
from extsnap.serve.turns import Turns


class Client:
    def __init__(self, pid: int) -> None:
        self.pid, self.heard = pid, []

    def answer(self, result: object) -> None:
        self.heard.append(result)

    def refuse(self, error: Exception) -> None:
        self.heard.append(error)


@pytest.fixture
def place():
    """(turns, files)."""
    files = SimpleNamespace(volume_opens=0, base_name="volume", only=None)
    server = SimpleNamespace(
        files=files,
        in_use=lambda: files.volume_opens > 0,
        watch=lambda client: None,
        busy=lambda *_: VolumeBusy("busy"),
    )
    return Turns(server), files  # type: ignore[arg-type]


def test_what_was_asked_for_holds_after_waiting_too(place) -> None:
    turns, files = place
    first, second, third = Client(os.getpid()), Client(1 << 22), Client(3)
    assert turns.take(first, alone=False, only=False) == {"in_use": None}
    assert files.only is None
    assert turns.take(second, alone=True, only=True) is None
    assert turns.take(third, alone=True, only=False) is None
    turns.end(first)
    assert second.heard == [{"in_use": None}]
    assert not files.only(os.getpid()), "the second one has it for itself"
    files.volume_opens = 1
    turns.end(second)
    assert files.only is None
    assert [type(heard) for heard in third.heard] == [VolumeBusy], "it was to be alone"
    assert turns.take(first, alone=False, only=False) == {"in_use": "volume"}


def test_who_leaves_while_it_waits_has_no_turn(place) -> None:
    turns, _ = place
    first, second, third = Client(1), Client(2), Client(3)
    turns.take(first, alone=False, only=False)
    turns.take(second, alone=False, only=False)
    turns.take(third, alone=False, only=False)
    turns.end(second)
    turns.end(first)
    assert (second.heard, third.heard) == ([], [{"in_use": None}])


def test_children_and_their_children() -> None:
    program = "import os, subprocess, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    shell = f"{sys.executable} -c '{program}'; true"
    with subprocess.Popen(["sh", "-c", shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        try:
            assert grandchild != child.pid
            assert processes.is_of(grandchild, os.getpid())
            assert processes.is_of(grandchild, child.pid)
            assert not processes.is_of(os.getpid(), child.pid)
            assert not processes.is_of(1, os.getpid())
        finally:
            child.stdin.close()
    assert not processes.is_of(1 << 22, os.getpid()), "that is nobody"
    assert processes.is_of(0, os.getpid()), "who is not seen is not refused"
