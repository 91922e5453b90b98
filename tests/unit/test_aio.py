"""Many calls in one: what each returns, and what becomes of errors."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from extsnap.serve import aio
from extsnap.serve.aio import PWRITE, Batch
from extsnap.serve.slots import Slots

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(5)
        theirs.setblocking(False)
        yield ours, theirs


def writing(descriptor: int, lines: np.ndarray) -> Batch:  # type: ignore[type-arg]
    width = lines.dtype.itemsize
    return Batch(descriptor, PWRITE, lines.ctypes.data + np.arange(len(lines)) * width, np.full(len(lines), width))


def test_each_call_has_its_result(pair: Pair) -> None:
    ours, theirs = pair
    lines = np.array([b"one..", b"two..", b"three"])
    batch = writing(theirs.fileno(), lines)
    assert batch.run(2).tolist() == [5, 5]
    assert batch.run(2, 1).tolist() == [5, 5]
    assert [ours.recv(100) for _ in range(4)] == [b"one..", b"two..", b"two..", b"three"]
    lines[0] = b"other"
    assert batch.run(1).tolist() == [5]
    assert ours.recv(100) == b"other"
    ours.close()
    assert batch.run(3).tolist() == [-errno.EPIPE] * 3
    batch.close()
    with pytest.raises(OSError):
        batch.run(1)


def test_results_that_come_in_parts_and_between_signals(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = np.array([b"123456"] * 5)
    batch = Batch(pair[1].fileno(), PWRITE, np.full(5, lines.ctypes.data), np.arange(1, 6))
    really, interrupted = batch._call, [True]

    def call(number: object, *arguments: object) -> int:
        if number is not batch._get:
            return really(number, *arguments)  # type: ignore[arg-type]
        interrupted[0] = not interrupted[0]
        if not interrupted[0]:
            raise InterruptedError
        two = ctypes.c_long(min(2, arguments[1].value))  # type: ignore[attr-defined]
        return really(batch._get, arguments[0], two, two, *arguments[3:])

    monkeypatch.setattr(batch, "_call", call)
    assert batch.run(5).tolist() == [1, 2, 3, 4, 5]
    assert batch.run(2, 3).tolist() == [4, 5]
    batch.close()


def test_none_is_made_on_a_descriptor_that_is_none() -> None:
    lines = np.array([b"one"])
    batch = writing(1 << 20, lines)
    with pytest.raises(OSError) as caught:
        batch.run(1)
    assert caught.value.errno == errno.EBADF
    batch.close()


@pytest.mark.parametrize("why", ["machine", "setup", "get", "submit"])
def test_where_it_cannot_be_had_slots_do_without(pair: Pair, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair
    if why == "machine":
        monkeypatch.setattr(aio, "_NUMBERS", {})
    else:  # as a filter of system calls has it
        names = ("setup", "destroy", "get", "submit")
        numbers = zip(names, aio._NUMBERS[os.uname().machine], strict=True)
        refused = tuple(9999 if name == why else number for name, number in numbers)
        monkeypatch.setattr(aio, "_NUMBERS", {os.uname().machine: refused})
    with pytest.raises(OSError):
        writing(theirs.fileno(), np.array([b"one"]))
    slots = Slots(theirs.fileno(), 16, 4096)
    for number in range(3):
        ours.send(bytes([number]) * 20)
    assert slots.take(32) == [20] * 3
    assert [bytes(slots.heads[slot]) for slot in range(3)] == [bytes([number]) * 16 for number in range(3)]
    assert len(slots.written(np.arange(3, dtype=np.uint64), np.zeros(3, np.int64))) == 0
    slots.close()


class Scripted:
    """A batch some of whose calls find nothing, end early, or are interrupted, as told."""

    def __init__(self, batch: Batch | None, script: list[int | None]) -> None:
        assert batch is not None
        self.batch, self.script, self.asked = batch, script, list[tuple[int, int]]()

    def run(self, count: int, first: int = 0) -> np.ndarray:  # type: ignore[type-arg]
        """What the script has for each call; None: what it really comes to.  Behind its end nothing is made."""
        self.asked.append((first, count))
        results = []
        for number in range(first, min(first + count, len(self.script))):
            told = self.script[number]
            results.append(self.batch.run(1, number)[0] if told is None else told)
        if not results:
            raise OSError(errno.ENOMEM, "no memory")
        return np.array(results)

    def close(self) -> None:
        self.batch.close()


@pytest.mark.parametrize(
    ("script", "lengths"),
    [
        ([None, -errno.EAGAIN, None, -errno.EAGAIN], [20, 0, 20]),
        ([-errno.ENOENT, None, -errno.EINTR], [0, 20, 0]),
        ([None, None, -errno.ENODEV], [20, 20, 0]),
        ([None, 0], [20, 0]),
        ([None, None], [20, 20]),
        ([-errno.EAGAIN] * 4, []),
        ([-errno.ENOENT], [0]),
    ],
)
def test_what_is_taken_lies_where_it_says(pair: Pair, script: list[int | None], lengths: list[int]) -> None:
    ours, theirs = pair
    slots = Slots(theirs.fileno(), 16, 4096)
    slots._taking = Scripted(slots._taking, script)  # type: ignore[assignment]
    slots._came = 16
    for number in range(4):
        ours.send(bytes([number]) * 20)
    assert slots.take(32) == lengths
    found = [bytes(slots.heads[slot])[:1] for slot, length in enumerate(lengths) if length]
    assert found == [bytes([number]) for number in range(len(found))]
    slots.close()


@pytest.mark.parametrize(("told", "code"), [(-errno.ENODEV, errno.ENODEV), (0, errno.ENODEV), (-errno.EIO, errno.EIO)])
def test_the_end_of_a_connection(pair: Pair, told: int, code: int) -> None:
    slots = Slots(pair[1].fileno(), 16, 4096)
    slots._taking = Scripted(slots._taking, [-errno.EAGAIN, told, -errno.ENOENT])  # type: ignore[assignment]
    slots._came = 16
    with pytest.raises(OSError) as caught:
        slots.take(32)
    assert caught.value.errno == code
    slots.close()


def test_where_none_can_be_asked_for_at_once_each_is(pair: Pair) -> None:
    ours, theirs = pair
    slots = Slots(theirs.fileno(), 16, 4096)
    slots._taking = Scripted(slots._taking, [])  # type: ignore[assignment]
    ours.send(b"x" * 20)
    assert slots.take(32) == [20]
    slots.close()


def test_as_many_as_came_are_asked_for_first(pair: Pair) -> None:
    """To ask for one that does not wait is not free; all that wait are taken nevertheless."""
    ours, theirs = pair
    slots = Slots(theirs.fileno(), 16, 4096)
    watched = Scripted(slots._taking, [None] * 32)
    slots._taking = watched  # type: ignore[assignment]
    for waiting in (1, 20, 3):
        for number in range(waiting):
            ours.send(bytes([number]) * 20)
        assert slots.take(32) == [20] * waiting
    assert watched.asked == [(0, 2), (0, 2), (2, 30), (0, 32)]
    answering = slots._answering
    slots.close()
    for batch in (watched.batch, answering):
        assert batch is not None
        with pytest.raises(OSError):  # nothing of it is left
            batch.run(1)
