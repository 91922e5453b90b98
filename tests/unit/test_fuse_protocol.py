"""The FUSE protocol without a kernel: this file plays the kernel on the other end of a socket pair."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from extsnap.blockdev.base import Pieces
from extsnap.errors import DamagedCopy, StoreProtected, VolumeBusy, VolumeFull
from extsnap.serve import fuse
from extsnap.serve.fuse import FuseFiles, Unmounted
from extsnap.serve.slots import SLOTS

SIZE = 1 << 20


class View:
    def __init__(self, data: bytes, number: int) -> None:
        self.data, self.id, self.size, self.closed = data, number, len(data), False

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if self.data[:6] == b"broken":
            raise DamagedCopy("a copy is damaged")
        buffer[:] = self.data[offset : offset + len(buffer)]

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass
class Volume:
    data: bytearray = field(default_factory=lambda: bytearray(SIZE))
    views: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    opened: list[View] = field(default_factory=list)
    flushes: int = 0
    flush_error: Exception | None = None
    error: Exception | None = None

    @property
    def size(self) -> int:
        return len(self.data)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if self.error:
            raise self.error
        buffer[:] = self.data[offset : offset + len(buffer)]

    place: tuple[int, int] | None = None

    def where(self, offset: int, length: int) -> tuple[int, int] | None:
        return self.place

    def write(self, offset: int, data: memoryview) -> None:
        if self.error:
            raise self.error
        self.data[offset : offset + len(data)] = data

    at_once: int = 0
    one_by_one: bool = False
    holds: bool = True
    let_out_at: list[bytes] = field(default_factory=list)

    def write_many(self, writes: Pieces) -> bool:
        if self.error:
            raise self.error
        if self.one_by_one:
            return False
        for offset, data in writes:
            self.data[offset : offset + len(data)] = data
        self.at_once += len(writes)
        return True

    def let_out(self) -> None:
        self.let_out_at.append(bytes(self.data[:1]))
        if self.error:
            raise self.error

    def punch(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def grow(self, size: int) -> None:
        if size > 2 * SIZE:
            raise OSError(errno.ENOSPC, "fixed")
        self.data.extend(bytes(size - self.size))

    def flush(self) -> None:
        self.flushes += 1
        if self.flush_error:
            raise self.flush_error

    def snapshot_names(self) -> list[str]:
        return list(self.views)

    def open_view(self, name: str) -> View:
        number, data = self.views[name]
        self.opened.append(View(data, number))
        return self.opened[-1]


class Kernel:
    """Sends requests and reads answers."""

    def __init__(self, volume: Volume, **options: object) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)
        self.ours.settimeout(5)
        self.log: list[str] = []
        self.volume = volume
        self.files = FuseFiles(self.theirs.fileno(), volume, log=self.log.append, **{"max_write": 1 << 16, **options})
        self.unique = 0

    def raw(self, packet: bytes) -> None:
        self.ours.send(packet)
        assert self.files.serve_one()

    def send(self, opcode: int, node: int, body: bytes = b"") -> int:
        """Without serving it; returns its number."""
        self.ours.send(self.packet(opcode, node, body))
        return self.unique

    def send_write(self, offset: int, data: bytes, node: int = fuse.VOLUME_NODE) -> int:
        return self.send(fuse.WRITE, node, fuse.IO_IN.pack(0, offset, len(data), 0, 0, 0, 0) + data)

    def packet(self, opcode: int, node: int, body: bytes = b"", length: int | None = None) -> bytes:
        self.unique += 2
        size = fuse.IN_HEADER.size + len(body) if length is None else length
        return fuse.IN_HEADER.pack(size, opcode, self.unique, node, 0, 0, 4711, 0, 0) + body

    def answer(self) -> tuple[int, bytes]:
        reply = self.ours.recv(1 << 20)
        length, error, unique = fuse.OUT_HEADER.unpack_from(reply)
        assert length == len(reply)
        assert unique == self.unique
        return -error, reply[fuse.OUT_HEADER.size :]

    def ask(self, opcode: int, node: int, body: bytes = b"") -> tuple[int, bytes]:
        self.raw(self.packet(opcode, node, body))
        return self.answer()

    def good(self, opcode: int, node: int, body: bytes = b"") -> bytes:
        code, payload = self.ask(opcode, node, body)
        assert code == 0, os.strerror(code)
        return payload

    def answers(self) -> list[tuple[int, int]]:
        """(unique, errno) of the answers that are there."""
        found = []
        self.ours.setblocking(False)
        try:
            while True:
                _, error, unique = fuse.OUT_HEADER.unpack_from(self.ours.recv(1 << 18))
                found.append((unique, -error))
        except BlockingIOError:
            return found
        finally:
            self.ours.settimeout(5)

    def silent(self) -> bool:
        self.ours.setblocking(False)
        try:
            self.ours.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.ours.settimeout(5)
        return False

    # shorthands

    def lookup(self, parent: int, name: str) -> tuple[int, int]:
        """(node, size)"""
        payload = self.good(fuse.LOOKUP, parent, name.encode() + b"\0")
        assert len(payload) == 128
        node, _, entry_valid, attr_valid, _, _ = fuse.ENTRY_OUT.unpack_from(payload)
        assert entry_valid == attr_valid == 0
        return node, fuse.ATTR.unpack_from(payload, fuse.ENTRY_OUT.size)[1]

    def open(self, node: int, flags: int = os.O_RDONLY) -> tuple[int, int]:
        """(errno, open flags)"""
        code, payload = self.ask(fuse.OPEN, node, fuse.OPEN_IN.pack(flags, 0))
        return code, fuse.OPEN_OUT.unpack(payload)[1] if not code else 0

    def release(self, node: int, flags: int = os.O_RDONLY) -> int:
        return self.ask(fuse.RELEASE, node, fuse.RELEASE_IN.pack(0, flags, 0, 0))[0]

    def write(self, node: int, offset: int, data: bytes) -> tuple[int, int]:
        """(errno, bytes written)"""
        code, payload = self.ask(fuse.WRITE, node, fuse.IO_IN.pack(0, offset, len(data), 0, 0, 0, 0) + data)
        return code, fuse.WRITE_OUT.unpack(payload)[0] if not code else 0

    def read(self, node: int, offset: int, size: int) -> tuple[int, bytes]:
        return self.ask(fuse.READ, node, fuse.IO_IN.pack(0, offset, size, 0, 0, 0, 0))


@pytest.fixture
def volume() -> Volume:
    return Volume(views={"one": (1, b"1" * 8192), "zwei ü": (2, b"2" * 4096)})


@pytest.fixture
def kernel(volume: Volume) -> Iterator[Kernel]:
    kernel = Kernel(volume)
    yield kernel
    kernel.files.close()
    kernel.ours.close()
    kernel.theirs.close()


def test_structure_sizes_are_those_of_the_kernel_header() -> None:
    sizes = {
        fuse.IN_HEADER: 40, fuse.OUT_HEADER: 16, fuse.INIT_OUT: 64, fuse.ATTR: 88, fuse.ENTRY_OUT: 40,
        fuse.ATTR_OUT: 16, fuse.SETATTR_IN: 88, fuse.OPEN_OUT: 16, fuse.IO_IN: 40, fuse.WRITE_OUT: 8,
        fuse.RELEASE_IN: 24, fuse.FALLOCATE_IN: 32, fuse.STATFS_OUT: 80, fuse.DIRENT: 24,
    }  # fmt: skip
    assert {structure.format: structure.size for structure in sizes} == {
        structure.format: size for structure, size in sizes.items()
    }


@pytest.mark.parametrize("writeback", [False, True])
def test_init_negotiates_large_requests(volume: Volume, writeback: bool) -> None:
    kernel = Kernel(volume, writeback_cache=writeback)
    payload = kernel.good(fuse.INIT, 0, fuse.INIT_IN.pack(7, 45, 1 << 17, 0xFFFFFFFF) + bytes(48))
    fields = fuse.INIT_OUT.unpack(payload)
    major, minor, readahead, flags = fields[:4]
    assert (major, minor, readahead) == (7, 31, 1 << 16)
    assert flags & fuse.BIG_WRITES
    assert flags & fuse.MAX_PAGES
    assert bool(flags & fuse.WRITEBACK_CACHE) is writeback
    assert fields[6] == 1 << 16
    assert fields[8] == (1 << 16) // os.sysconf("SC_PAGESIZE")
    kernel.ours.close()
    kernel.theirs.close()


def test_acknowledgements_that_are_late(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large writes wait for each other, what may be metadata does not; without a reason to wait all are told."""
    now = [100.0]
    monkeypatch.setattr(fuse, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    files = kernel.files
    files.lag = lambda: 0.5
    node, _ = kernel.lookup(fuse.ROOT_NODE, "volume")
    assert kernel.open(node, os.O_RDWR)[0] == 0
    unique = {}
    for name, size in (("first", 65536), ("second", 65536), ("small", 4096), ("third", 65536)):
        body = fuse.IO_IN.pack(0, 0, size, 0, 0, 0, 0)
        kernel.raw(kernel.packet(fuse.WRITE, node, body + b"x" * size))
        unique[kernel.unique] = name
    assert kernel.volume.data[:65536] == b"x" * 65536, "it is done, only its acknowledgement is late"

    def told() -> list[str]:
        return [unique[number] for number, _ in kernel.answers()]

    assert files.acknowledge_late(lambda: True) == pytest.approx(0.05)
    assert told() == []
    now[0] += 0.06
    assert files.acknowledge_late(lambda: True) == pytest.approx(0.44)
    assert told() == ["small"]
    now[0] += 0.5
    assert files.acknowledge_late(lambda: True) == pytest.approx(0.44)
    assert told() == ["first"]
    assert files.acknowledge_late(lambda: False) is None
    assert told() == ["second", "third"]


def test_requests_that_find_no_room_wait_while_more_may_come(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, whole, and not for ever; what needs no room does not wait for them."""
    volume, files, hope, room, now = kernel.volume, kernel.files, [True], [0], [100.0]
    monkeypatch.setattr(fuse, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    write, punch = volume.write, volume.punch

    def spend(size: int) -> None:
        if size > room[0]:
            raise VolumeFull("no room")
        room[0] -= size

    monkeypatch.setattr(volume, "write", lambda offset, data: (spend(len(data)), write(offset, data)))
    monkeypatch.setattr(volume, "punch", lambda offset, length: (spend(length), punch(offset, length)))
    files.hope = lambda waited: hope[0] and waited < 5
    node, _ = kernel.lookup(fuse.ROOT_NODE, "volume")
    assert kernel.open(node, os.O_RDWR)[0] == 0
    volume.data[:] = b"o" * SIZE
    asked = []
    for offset, letter in ((0, b"a"), (8192, b"b")):
        body = fuse.IO_IN.pack(0, offset, 8192, 0, 0, 0, 0) + letter * 8192
        kernel.raw(kernel.packet(fuse.WRITE, node, body))
        asked.append(kernel.unique)
    kernel.raw(kernel.packet(fuse.FALLOCATE, node, fuse.FALLOCATE_IN.pack(0, 16384, 4096, 3, 0)))
    asked.append(kernel.unique)
    assert files.parked_seconds is not None
    assert kernel.read(node, 0, 4) == (0, b"oooo")
    assert kernel.good(fuse.FSYNC, node, struct.pack("=QII", 0, 0, 0)) == b""
    files.try_parked()
    assert kernel.answers() == []
    room[0] = 12288
    files.try_parked()
    assert kernel.answers() == [(asked[0], 0)], "the second one waits, and the third one behind it"
    assert volume.data[:24576] == b"a" * 8192 + b"o" * 16384
    now[0] += 6
    kernel.raw(kernel.packet(fuse.WRITE, node, fuse.IO_IN.pack(0, 40960, 8192, 0, 0, 0, 0) + b"c" * 8192))
    asked.append(kernel.unique)
    files.try_parked()
    assert kernel.answers() == [(asked[1], errno.ENOSPC), (asked[2], 0)], "the last one has only just come"
    hope[0] = False
    files.try_parked()
    assert kernel.answers() == [(asked[3], errno.ENOSPC)]
    assert volume.data[:24576] == b"a" * 8192 + b"o" * 8192 + bytes(4096) + b"o" * 4096
    assert files.parked_seconds is None
    assert kernel.write(node, 0, b"x" * 4096) == (errno.ENOSPC, 0), "without hope nothing waits"


@pytest.mark.parametrize("comes", [True, False])
def test_the_rest_of_a_write_that_waits_for_room(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, comes: bool) -> None:
    """Only one that is refused in the end fails the next fsync, and that one does, whatever was written meanwhile."""
    volume, files, hope, room = kernel.volume, kernel.files, [True], [True]
    write = volume.write

    def spend(offset: int, data: memoryview) -> None:
        if not room[0] and offset == 1 << 16:
            raise VolumeFull("no room")
        write(offset, data)

    monkeypatch.setattr(volume, "write", spend)
    files.hope = lambda waited: hope[0]
    node, _ = kernel.lookup(fuse.ROOT_NODE, "volume")
    assert kernel.open(node, os.O_RDWR)[0] == 0
    sync = struct.pack("=QII", 0, 0, 0)
    assert kernel.write(node, 0, b"a" * (1 << 16)) == (0, 1 << 16)
    room[0] = False
    kernel.raw(kernel.packet(fuse.WRITE, node, fuse.IO_IN.pack(0, 1 << 16, 4096, 0, 0, 0, 0) + b"b" * 4096))
    waits = kernel.unique
    assert kernel.ask(fuse.FSYNC, node, sync)[0] == 0
    for number in range(100):
        assert kernel.write(node, 300_000 + 5000 * number, b"x" * 4096)[0] == 0
    room[0], hope[0] = comes, False
    files.try_parked()
    assert kernel.answers() == [(waits, 0 if comes else errno.ENOSPC)]
    assert kernel.ask(fuse.FSYNC, node, sync)[0] == (0 if comes else errno.ENOSPC)


@pytest.fixture(params=["in one call", "call by call"])
def busy(kernel: Kernel, request: pytest.FixtureRequest) -> Kernel:
    """One whose last request was a small write: from here on many are taken at once."""
    if request.param == "call by call":
        kernel.files._slots._taking = kernel.files._slots._answering = None
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == 0
    assert kernel.write(fuse.VOLUME_NODE, SIZE - 4096, b"z" * 4096) == (0, 4096)
    return kernel


def test_small_writes_that_wait_are_taken_at_once(busy: Kernel, volume: Volume) -> None:
    """With what is between them, in their order; each has its own answer."""
    first = [busy.send_write(4096 * block, bytes([block]) * 4096) for block in range(5)]
    read = busy.send(fuse.READ, fuse.VOLUME_NODE, fuse.IO_IN.pack(0, 3 * 4096, 1, 0, 0, 0, 0))
    then = [busy.send_write(3 * 4096, b"n" * 4096), busy.send_write(3 * 4096 + 512, b"m" * 512)]
    end = busy.send(fuse.FSYNC, fuse.VOLUME_NODE, struct.pack("=QII", 0, 0, 0))
    assert busy.files.serve_some() == 9
    assert volume.at_once == 7
    replies = [busy.ours.recv(1 << 16) for _ in range(9)]
    assert [fuse.OUT_HEADER.unpack_from(reply) for reply in replies] == [
        *((24, 0, number) for number in first), (17, 0, read), *((24, 0, number) for number in then), (16, 0, end),
    ]  # fmt: skip
    assert [fuse.WRITE_OUT.unpack_from(reply, 16)[0] for reply in replies if len(reply) == 24] == [4096] * 6 + [512]
    assert replies[5][16:] == b"\3", "as it was when the read came"
    content = b"".join(bytes([block]) * 4096 for block in range(5))
    assert volume.data[:20480] == content[:12288] + b"n" * 512 + b"m" * 512 + b"n" * 3072 + content[16384:]
    assert volume.flushes == 1
    assert busy.files.serve_some() == 0


@pytest.mark.parametrize("made", [0, 1, 4, 5])
def test_every_write_is_answered_once_however_many_are_at_once(
    kernel: Kernel, volume: Volume, monkeypatch: pytest.MonkeyPatch, made: int
) -> None:
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == 0
    kernel.write(fuse.VOLUME_NODE, SIZE - 4096, b"z" * 4096)
    slots = kernel.files._slots
    really = slots.written
    monkeypatch.setattr(slots, "written", lambda uniques, sizes: really(uniques[:made], sizes[:made]))
    asked = [kernel.send_write(4096 * block, b"x" * 4096) for block in range(5)]
    assert kernel.files.serve_some() == 5
    assert volume.at_once == 5
    assert kernel.answers() == [(number, 0) for number in asked]


def test_a_request_that_comes_while_others_are_asked_for(
    kernel: Kernel, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between it and those before it, one was asked for that did not wait yet."""
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == 0
    kernel.write(fuse.VOLUME_NODE, SIZE - 4096, b"z" * 4096)
    taking = kernel.files._slots._taking
    assert taking is not None
    really = taking.run
    asked = [kernel.send_write(4096 * block, bytes([65 + block]) * 4096) for block in range(5)]
    monkeypatch.setattr(
        taking, "run", lambda count, first: np.array([*really(2, 0), -errno.EAGAIN, *really(3, 3), -errno.EAGAIN])
    )
    kernel.files.serve_some()
    assert kernel.answers() == [(number, 0) for number in asked]
    assert volume.data[: 5 * 4096 : 4096] == b"ABCDE"


@pytest.mark.parametrize(("code", "logged"), [(errno.ENOENT, []), (errno.EIO, ["Input/output error"])])
def test_an_answer_of_many_that_is_not_taken(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, code: int, logged: list[str]
) -> None:
    """The asker is gone, or something is wrong: the others have theirs."""
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == 0
    kernel.write(fuse.VOLUME_NODE, SIZE - 4096, b"z" * 4096)
    answering = kernel.files._slots._answering
    assert answering is not None
    monkeypatch.setattr(answering, "run", lambda count: np.array([-code, *[24] * (count - 1)]))
    asked = [kernel.send_write(4096 * block, b"x" * 4096) for block in range(3)]
    assert kernel.files.serve_some() == 3
    assert kernel.answers() == []
    assert kernel.log == [f"answer to request {asked[0]} was not taken: {what}" for what in logged]
    monkeypatch.setattr(answering, "run", lambda count: np.array([-errno.ENODEV] * count))
    kernel.send_write(0, b"x" * 4096)
    kernel.send_write(0, b"x" * 4096)
    with pytest.raises(Unmounted):
        kernel.files.serve_some()


def test_more_small_writes_than_are_taken_at_once(busy: Kernel, volume: Volume) -> None:
    asked = [busy.send_write(512 * sector, b"x" * 512) for sector in range(SLOTS + 5)]
    assert busy.files.serve_some() == SLOTS
    assert busy.files.serve_some() == 5
    assert busy.answers() == [(number, 0) for number in asked]
    assert volume.data[: 512 * (SLOTS + 5)] == b"x" * 512 * (SLOTS + 5)


def test_writes_that_are_not_held_are_taken_one_by_one(busy: Kernel, volume: Volume) -> None:
    """So that the disk has something to do while more come."""
    volume.holds = False
    asked = [busy.send_write(512 * sector, b"x" * 512) for sector in range(4)]
    assert busy.files.serve_some() == 4, "the last one was held"
    asked += [busy.send_write(512 * sector, b"x" * 512) for sector in range(4, 7)]
    assert [busy.files.serve_some() for _ in range(4)] == [1, 1, 1, 0]
    assert busy.answers() == [(number, 0) for number in asked]


@pytest.mark.parametrize("why", ["elsewhere", "error", "late"])
def test_small_writes_that_go_one_by_one(busy: Kernel, volume: Volume, why: str) -> None:
    volume.one_by_one, volume.error = why == "elsewhere", StoreProtected("mine") if why == "error" else None
    busy.files.lag = (lambda: 0.01) if why == "late" else None
    asked = [busy.send_write(4096 * block, b"x" * 4096) for block in range(3)]
    assert busy.files.serve_some() == 3
    assert volume.at_once == (3 if why == "late" else 0)
    expected = {"elsewhere": [(number, 0) for number in asked], "error": [(number, errno.EIO) for number in asked]}
    assert busy.answers() == expected.get(why, [])
    assert busy.files.refused == (3 if why == "error" else 0)
    busy.files.acknowledge_late(lambda: False)
    assert busy.answers() == ([(number, 0) for number in asked] if why == "late" else [])


@pytest.mark.parametrize("size", [4096, 17408])
def test_many_writes_are_as_late_as_they_would_be_one_by_one(
    busy: Kernel, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Asked once what all of them together have used up; an answer that fails makes nobody wait."""
    monkeypatch.setattr(fuse, "time", SimpleNamespace(monotonic=lambda: 100.0, time=time.time))
    files, seen = busy.files, [0]

    def lag() -> float:
        """A millisecond for each kibibyte since it was last asked."""
        new, seen[0] = bytes(busy.volume.data).count(b"x") - seen[0], bytes(busy.volume.data).count(b"x")
        return new / 1024 / 1000

    files.lag = lag
    late = {}
    for how, first in (("alone", 0), ("at once", 3)):
        for number in range(first, first + 3):
            busy.send_write(number * size, b"x" * size)
            if how == "alone":
                files.serve_one()
        if how == "at once":
            assert files.serve_some() == 3
        late[how] = [due - 100.0 for due, _, _ in sorted(files._late)]
        files.acknowledge_late(lambda: False)
        assert busy.answers()[-1][1] == 0
    assert late["alone"] == pytest.approx(late["at once"])

    files.lag = lambda: 1 / 0
    asked = [busy.send_write(number * size, b"x" * size) for number in range(3)]
    assert files.serve_some() == 3
    assert busy.answers() == [(number, 0) for number in asked]
    assert "write failed: ZeroDivisionError" in busy.log[-1]


def test_what_is_no_write_to_the_volume_is_not_taken_for_one(busy: Kernel, volume: Volume) -> None:
    """Lies about lengths, places behind the end, other files: each gets the answer that it gets alone."""
    cases = [
        (fuse.IO_IN.pack(0, 0, 100, 0, 0, 0, 0) + b"x", fuse.VOLUME_NODE, errno.EINVAL),
        (fuse.IO_IN.pack(0, 0, 0, 0, 0, 0, 0), fuse.VOLUME_NODE, 0),
        (fuse.IO_IN.pack(0, 1 << 63, 4, 0, 0, 0, 0) + b"abcd", fuse.VOLUME_NODE, errno.ENOSPC),
        *[(fuse.IO_IN.pack(0, (1 << 64) - 2, 4, 0, 0, 0, 0) + b"abcd", fuse.VOLUME_NODE, errno.ENOSPC)] * 2,
        (fuse.IO_IN.pack(0, 0, 4, 0, 0, 0, 0) + b"abcd", 99, errno.EBADF),
        (fuse.IO_IN.pack(0, 0, 4, 0, 0, 0, 0) + b"abcd", fuse.ROOT_NODE, errno.EBADF),
    ]
    for case in (cases, cases[::-1]):
        asked = [(busy.send(fuse.WRITE, node, body), code) for body, node, code in case]
        assert busy.files.serve_some() == len(case)
        assert busy.answers() == asked
        busy.write(fuse.VOLUME_NODE, SIZE - 4096, b"z" * 4096)
    assert volume.at_once == 0
    assert not any(volume.data[:4096])
    busy.ours.close()
    with pytest.raises(Unmounted):
        busy.files.serve_some()


def test_what_is_held_back_is_let_out_in_a_quiet_moment(
    busy: Kernel, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, a while after the last write; what fails is tried again by the next flush, and said in the log."""
    now = [100.0]
    monkeypatch.setattr(fuse, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    files = busy.files

    def rest() -> int:
        now[0] += 0.6
        files.rest(1.0)
        return len(volume.let_out_at)

    assert [files.is_at_rest, rest(), rest(), rest(), rest()] == [False, 0, 0, 1, 1]
    assert files.is_at_rest
    busy.send_write(0, b"a")
    busy.send_write(4096, b"b")
    assert files.serve_some() == 2
    assert [files.is_at_rest, rest(), rest()] == [False, 1, 1]
    assert busy.answers()
    busy.good(fuse.FALLOCATE, fuse.VOLUME_NODE, fuse.FALLOCATE_IN.pack(0, 100, 50, 3, 0))
    assert [files.is_at_rest, rest(), rest(), rest()] == [False, 1, 1, 2]
    assert busy.write(fuse.VOLUME_NODE, 0, b"c") == (0, 1)
    volume.error = OSError(errno.EIO, "the disk")
    assert [rest(), rest(), rest(), rest()] == [2, 2, 3, 3]
    assert volume.let_out_at[-1] == b"c"
    assert any("write failed: OSError" in line for line in busy.log)


def test_one_who_has_the_volume_for_himself(kernel: Kernel) -> None:
    """Nobody else opens it, for reading neither; what is open stays so, and snapshots are for all."""
    node, _ = kernel.lookup(fuse.ROOT_NODE, "volume")
    kernel.files.only = lambda pid: pid == 4711
    assert kernel.open(node, os.O_RDWR)[0] == 0
    kernel.files.only = lambda pid: pid == 12
    assert kernel.open(node, os.O_RDONLY)[0] == errno.EBUSY
    assert kernel.files.volume_opens == 1
    assert kernel.write(node, 0, b"x" * 4096) == (0, 4096)
    one, _ = kernel.lookup(fuse.SNAPSHOTS_NODE, "one")
    assert kernel.open(one)[0] == 0


def test_the_kernel_keeps_attributes_only_of_what_it_writes_late(volume: Volume) -> None:
    """With delayed writes it would ask for them before every single write; a snapshot must still vanish at once."""
    kernel = Kernel(volume, writeback_cache=True)
    for parent, name, kept in ((fuse.ROOT_NODE, "volume", True), (fuse.SNAPSHOTS_NODE, "one", False)):
        payload = kernel.good(fuse.LOOKUP, parent, name.encode() + b"\0")
        node, _, entry_valid, attr_valid, _, _ = fuse.ENTRY_OUT.unpack_from(payload)
        assert entry_valid == 0
        assert bool(attr_valid) is kept
        assert bool(fuse.ATTR_OUT.unpack_from(kernel.good(fuse.GETATTR, node, bytes(16)))[0]) is kept
    kernel.files.close()
    kernel.ours.close()
    kernel.theirs.close()


def test_init_refuses_an_old_kernel(kernel: Kernel) -> None:
    assert kernel.ask(fuse.INIT, 0, fuse.INIT_IN.pack(7, 19, 0, 0))[0] == errno.EPROTO
    assert "7.19" in kernel.log[0]


def test_write_read_fsync_and_close(kernel: Kernel, volume: Volume) -> None:
    node, size = kernel.lookup(fuse.ROOT_NODE, "volume")
    assert size == SIZE
    assert kernel.open(node, os.O_RDWR) == (0, 0)
    assert (kernel.files.volume_opens, kernel.files.volume_write_opens) == (1, 1)
    assert kernel.write(node, 12345, b"abc" * 1000) == (0, 3000)
    assert kernel.read(node, 12345, 3000) == (0, b"abc" * 1000)
    assert bytes(volume.data[12345:15345]) == b"abc" * 1000
    assert kernel.good(fuse.FSYNC, node, struct.pack("=QII", 0, 0, 0)) == b""
    assert volume.flushes == 1
    kernel.good(fuse.FLUSH, node, struct.pack("=QIIQ", 0, 0, 0, 0))
    assert volume.flushes == 1, "nothing was written since"
    kernel.write(node, 0, b"x")
    kernel.good(fuse.FLUSH, node, struct.pack("=QIIQ", 0, 0, 0, 0))
    assert volume.flushes == 2, "closing is a barrier"
    assert kernel.release(node, os.O_RDWR) == 0
    assert kernel.files.total_opens == 0
    assert kernel.files.last_pid == 4711


def test_reads_and_writes_at_the_end(kernel: Kernel) -> None:
    assert kernel.read(fuse.VOLUME_NODE, SIZE - 10, 4096) == (0, bytes(10))
    assert kernel.read(fuse.VOLUME_NODE, SIZE, 4096) == (0, b"")
    assert kernel.read(fuse.VOLUME_NODE, SIZE + 5000, 4096) == (0, b"")
    assert kernel.write(fuse.VOLUME_NODE, SIZE - 2, b"abcd") == (0, 4), "a write past the end makes the volume longer"
    assert kernel.read(fuse.VOLUME_NODE, SIZE - 2, 4096) == (0, b"abcd")
    assert kernel.write(fuse.VOLUME_NODE, 3 * SIZE, b"a") == (errno.ENOSPC, 0), "this one has a fixed size"
    assert kernel.read(fuse.VOLUME_NODE, SIZE - 2, 4096) == (0, b"abcd")


def test_a_close_that_cannot_flush_leaves_it_to_the_next(kernel: Kernel, volume: Volume) -> None:
    """What was written is still not durable: no later close may take it for done."""
    closing = struct.pack("=QIIQ", 0, 0, 0, 0)
    kernel.write(fuse.VOLUME_NODE, 0, b"x")
    volume.flush_error = VolumeFull("full")
    assert kernel.ask(fuse.FLUSH, fuse.VOLUME_NODE, closing)[0] == errno.ENOSPC
    assert kernel.ask(fuse.FLUSH, fuse.VOLUME_NODE, closing)[0] == errno.ENOSPC
    volume.flush_error = None
    kernel.good(fuse.FLUSH, fuse.VOLUME_NODE, closing)
    assert volume.flushes == 3
    kernel.good(fuse.FLUSH, fuse.VOLUME_NODE, closing)
    assert volume.flushes == 3


def test_a_release_that_cannot_flush_is_remembered(kernel: Kernel, volume: Volume) -> None:
    kernel.open(fuse.VOLUME_NODE, os.O_WRONLY)
    kernel.write(fuse.VOLUME_NODE, 0, b"x")
    volume.flush_error = VolumeFull("full")
    assert kernel.release(fuse.VOLUME_NODE, os.O_WRONLY) == errno.ENOSPC
    assert kernel.files.failure is volume.flush_error
    assert kernel.files.volume_opens == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreProtected("no"), errno.EIO),
        (VolumeFull("full"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "quota"), errno.EDQUOT),
        (ZeroDivisionError("bug"), errno.EIO),
    ],
)
def test_errors_become_errnos_and_a_line_in_the_log(
    kernel: Kernel, volume: Volume, error: Exception, code: int
) -> None:
    volume.error = error
    assert kernel.write(fuse.VOLUME_NODE, 0, b"x")[0] == code
    assert kernel.write(fuse.VOLUME_NODE, 0, b"x")[0] == code
    assert len(kernel.log) == 1, "the same line is not repeated at once"
    assert str(error) in kernel.log[0]
    volume.error = None
    assert kernel.write(fuse.VOLUME_NODE, 0, b"x") == (0, 1)


def test_punch_hole_and_zero_range(kernel: Kernel, volume: Volume) -> None:
    volume.data[:] = b"\xff" * SIZE

    def fallocate(offset: int, length: int, mode: int) -> int:
        return kernel.ask(fuse.FALLOCATE, fuse.VOLUME_NODE, fuse.FALLOCATE_IN.pack(0, offset, length, mode, 0))[0]

    assert fallocate(4096, 8192, 3) == 0
    assert fallocate(65536, 4096, 0x10) == 0
    assert fallocate(SIZE - 4096, 8192, 0x11) == 0
    assert volume.data.count(0) == 8192 + 4096 + 4096
    assert len(volume.data) == SIZE, "keep size"
    assert fallocate(SIZE - 4096, 8192, 0x10) == 0
    assert len(volume.data) == SIZE + 4096
    assert fallocate(4 * SIZE, 8192, 0x10) == errno.ENOSPC
    for mode in (0, 1, 2 | 0x08, 0x08, 0x20):
        assert fallocate(0, 4096, mode) == errno.EOPNOTSUPP


def test_only_the_size_changes_and_only_upwards(kernel: Kernel, volume: Volume) -> None:
    def setattr_(valid: int, size: int = 0, node: int = fuse.VOLUME_NODE) -> int:
        return kernel.ask(fuse.SETATTR, node, fuse.SETATTR_IN.pack(valid, 0, 0, size, *[0] * 12))[0]

    assert setattr_(fuse.FATTR_SIZE, SIZE) == 0
    assert setattr_(fuse.FATTR_SIZE, 0) == errno.EPERM
    assert setattr_(fuse.FATTR_SIZE, SIZE * 3) == errno.ENOSPC
    assert len(volume.data) == SIZE
    assert setattr_(fuse.FATTR_SIZE, SIZE * 2) == 0
    assert len(volume.data) == SIZE * 2
    assert setattr_(fuse.FATTR_SIZE, SIZE) == errno.EPERM
    assert setattr_(fuse.FATTR_MODE) == errno.EPERM
    assert setattr_(1 << 7) == 0, "touch"
    assert setattr_(1 << 7, node=fuse.ROOT_NODE) == errno.EROFS


def test_snapshots_are_read_only_files(kernel: Kernel, volume: Volume) -> None:
    node, size = kernel.lookup(fuse.SNAPSHOTS_NODE, "zwei ü")
    assert size == 4096
    assert kernel.open(node, os.O_RDWR)[0] == errno.EROFS
    assert kernel.open(node) == (0, fuse.FOPEN_KEEP_CACHE)
    assert kernel.open(node) == (0, fuse.FOPEN_KEEP_CACHE)
    assert kernel.files.open_views() == ["zwei ü"]
    assert kernel.files.opens_of("snapshots/zwei ü") == 2
    assert kernel.read(node, 4000, 4096) == (0, b"2" * 96)
    assert kernel.write(node, 0, b"x")[0] == errno.EBADF
    kernel.release(node)
    assert kernel.read(node, 0, 1) == (0, b"2")
    kernel.release(node)
    assert kernel.files.open_views() == []
    assert all(view.closed for view in volume.opened)
    assert kernel.ask(fuse.LOOKUP, fuse.SNAPSHOTS_NODE, b"none\0")[0] == errno.ENOENT
    assert kernel.ask(fuse.LOOKUP, fuse.SNAPSHOTS_NODE, b"\xff\xfe\0")[0] == errno.ENOENT
    assert kernel.ask(fuse.LOOKUP, fuse.ROOT_NODE, b"other\0")[0] == errno.ENOENT


def test_a_name_used_again_is_another_node(kernel: Kernel, volume: Volume) -> None:
    old, _ = kernel.lookup(fuse.SNAPSHOTS_NODE, "one")
    del volume.views["one"]
    assert kernel.ask(fuse.LOOKUP, fuse.SNAPSHOTS_NODE, b"one\0")[0] == errno.ENOENT
    volume.views["one"] = (7, b"7" * 100)
    kernel.files.snapshots_changed()
    new, size = kernel.lookup(fuse.SNAPSHOTS_NODE, "one")
    assert new != old
    assert size == 100
    assert kernel.open(old)[0] == errno.ESTALE
    kernel.open(new)
    assert kernel.read(new, 0, 100) == (0, b"7" * 100)


def test_a_command_between_lookup_and_open(kernel: Kernel) -> None:
    node, _ = kernel.lookup(fuse.SNAPSHOTS_NODE, "one")
    kernel.files.snapshots_changed()
    assert kernel.open(node) == (0, fuse.FOPEN_KEEP_CACHE)
    assert kernel.files.open_views() == ["one"]


def test_damaged_copies_fail_the_read(kernel: Kernel, volume: Volume) -> None:
    volume.views["bad"] = (9, b"broken" + bytes(4090))
    node, _ = kernel.lookup(fuse.SNAPSHOTS_NODE, "bad")
    kernel.open(node)
    assert kernel.read(node, 0, 4096)[0] == errno.EIO
    assert "damaged" in kernel.log[0]


def test_forgotten_nodes_are_dropped(kernel: Kernel) -> None:
    node, _ = kernel.lookup(fuse.SNAPSHOTS_NODE, "one")
    kernel.lookup(fuse.SNAPSHOTS_NODE, "one")
    kernel.raw(kernel.packet(fuse.FORGET, node, fuse.FORGET_IN.pack(1)))
    kernel.good(fuse.GETATTR, node, bytes(16))
    batch = struct.pack("=II", 2, 0) + fuse.FORGET_ONE.pack(99, 1) + fuse.FORGET_ONE.pack(node, 1)
    kernel.raw(kernel.packet(fuse.BATCH_FORGET, 0, batch))
    assert kernel.ask(fuse.GETATTR, node, bytes(16))[0] == errno.ESTALE


def test_listing(kernel: Kernel, volume: Volume) -> None:
    volume.views = {f"snapshot-{index:04}": (index, b"") for index in range(1000)}
    handle = fuse.OPEN_OUT.unpack(kernel.good(fuse.OPENDIR, fuse.SNAPSHOTS_NODE, bytes(8)))[0]
    names: list[str] = []
    offset = 0
    while True:
        payload = kernel.good(fuse.READDIR, fuse.SNAPSHOTS_NODE, fuse.IO_IN.pack(handle, offset, 4096, 0, 0, 0, 0))
        if not payload:
            break
        assert len(payload) <= 4096
        while payload:
            _, offset, length, _ = fuse.DIRENT.unpack_from(payload)
            names.append(payload[24 : 24 + length].decode())
            payload = payload[24 + -(-length // 8) * 8 :]
    assert names == [".", "..", *volume.views]
    kernel.good(fuse.RELEASEDIR, fuse.SNAPSHOTS_NODE, fuse.RELEASE_IN.pack(handle, 0, 0, 0))
    again = kernel.ask(fuse.READDIR, fuse.SNAPSHOTS_NODE, fuse.IO_IN.pack(handle, 0, 4096, 0, 0, 0, 0))
    assert again[0] == errno.EBADF
    assert kernel.ask(fuse.OPENDIR, fuse.VOLUME_NODE, bytes(8))[0] == errno.ENOTDIR


def test_read_only_volume(volume: Volume) -> None:
    kernel = Kernel(volume, writable=False)
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == errno.EROFS
    assert kernel.open(fuse.VOLUME_NODE)[0] == 0
    assert kernel.write(fuse.VOLUME_NODE, 0, b"x")[0] == errno.EROFS
    fallocate = fuse.FALLOCATE_IN.pack(0, 0, 4096, 3, 0)
    assert kernel.ask(fuse.FALLOCATE, fuse.VOLUME_NODE, fallocate)[0] == errno.EROFS
    kernel.ours.close()
    kernel.theirs.close()


def test_before_write_may_refuse(volume: Volume) -> None:
    def refuse() -> None:
        raise VolumeFull("no room to serve")

    kernel = Kernel(volume, before_write=refuse)
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == errno.ENOSPC
    assert kernel.files.total_opens == 0
    assert kernel.open(fuse.VOLUME_NODE)[0] == 0
    kernel.ours.close()
    kernel.theirs.close()


def test_unknown_requests_are_refused_for_good(kernel: Kernel) -> None:
    for opcode in (fuse.LSEEK, 22, 39, 44, 47, fuse.INTERRUPT, 9999):
        assert kernel.ask(opcode, fuse.VOLUME_NODE, bytes(64))[0] == errno.ENOSYS
    for opcode in (fuse.CREATE, fuse.MKDIR, fuse.UNLINK, fuse.RENAME):
        assert kernel.ask(opcode, fuse.ROOT_NODE, bytes(64))[0] == errno.EPERM
    assert len(kernel.good(fuse.STATFS, fuse.ROOT_NODE)) == 80


def test_malformed_requests_never_end_the_others(kernel: Kernel) -> None:
    kernel.raw(b"short")
    assert kernel.silent()
    kernel.raw(kernel.packet(fuse.GETATTR, fuse.ROOT_NODE, bytes(16), length=4711))
    assert kernel.answer()[0] == errno.EINVAL
    for opcode in (fuse.OPEN, fuse.READ, fuse.WRITE, fuse.SETATTR, fuse.FALLOCATE, fuse.READDIR, fuse.RELEASE):
        assert kernel.ask(opcode, fuse.VOLUME_NODE)[0] == errno.EINVAL, opcode
        assert kernel.ask(opcode, fuse.VOLUME_NODE, bytes(3))[0] == errno.EINVAL, opcode
    assert kernel.ask(fuse.INIT, 0, b"x")[0] == errno.EINVAL
    # a write whose data is not as long as it says
    assert kernel.ask(fuse.WRITE, fuse.VOLUME_NODE, fuse.IO_IN.pack(0, 0, 100, 0, 0, 0, 0) + b"x")[0] == errno.EINVAL
    kernel.raw(kernel.packet(fuse.FORGET, 16, b"x"))
    kernel.raw(kernel.packet(fuse.BATCH_FORGET, 16, struct.pack("=II", 0xFFFFFFFF, 0)))
    assert kernel.silent()
    assert kernel.read(99, 0, 4096)[0] == errno.EBADF
    assert kernel.read(fuse.VOLUME_NODE, 0, 10) == (0, bytes(10))


def test_nothing_waiting_and_the_end(kernel: Kernel) -> None:
    assert kernel.files.serve_one() is False
    kernel.ours.close()
    with pytest.raises(Unmounted):
        kernel.files.serve_one()


def test_a_throw_away_layer(kernel: Kernel, volume: Volume) -> None:
    file = kernel.files.make_scratch("one", 1024)
    other = kernel.files.make_scratch("one", 1024)
    assert (file, other) == ("scratch/1", "scratch/2")
    assert kernel.files.files_of("one") == ["snapshots/one", file, other]
    assert kernel.files.open_views() == ["one"]  # it may not be deleted
    directory, _ = kernel.lookup(fuse.ROOT_NODE, "scratch")
    node, size = kernel.lookup(directory, "1")
    beside, _ = kernel.lookup(directory, "2")
    assert size == 8192
    assert kernel.open(node, os.O_RDWR)[0] == 0
    assert kernel.write(node, 1000, b"new" * 100) == (0, 300)
    assert kernel.read(node, 990, 400) == (0, b"1" * 10 + b"new" * 100 + b"1" * 90)
    assert kernel.read(beside, 990, 400) == (0, b"1" * 400)
    assert kernel.write(node, 8192, b"past the end")[0] == errno.ENOSPC
    assert kernel.ask(fuse.FALLOCATE, node, fuse.FALLOCATE_IN.pack(0, 0, 1100, 3, 0))[0] == 0
    assert kernel.read(node, 0, 1103) == (0, bytes(1100) + b"ewn")
    assert kernel.ask(fuse.FSYNC, node, fuse.RELEASE_IN.pack(0, 0, 0, 0))[0] == 0
    assert volume.flushes == 0
    assert not any(volume.data)

    assert kernel.files.total_opens == kernel.files.opens_of(file) == 1
    kernel.files.drop_scratch(file)
    assert kernel.read(node, 0, 4) == (0, bytes(4)), "whoever has it open keeps it"
    assert kernel.release(node, os.O_RDWR) == 0
    assert kernel.read(node, 0, 4)[0] == errno.EBADF
    assert kernel.ask(fuse.LOOKUP, directory, b"1\0")[0] == errno.ENOENT
    assert [view.closed for view in volume.opened] == [True, False]
    kernel.files.drop_scratch(other)
    assert kernel.ask(fuse.LOOKUP, fuse.ROOT_NODE, b"scratch\0")[0] == errno.ENOENT
    assert kernel.files.open_views() == []
    assert all(view.closed for view in volume.opened)


def test_the_base_volume_under_a_layer_is_not_written(kernel: Kernel, volume: Volume) -> None:
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == 0
    with pytest.raises(VolumeBusy, match="volume is open for writing"):
        kernel.files.make_scratch("", 1024)
    assert kernel.release(fuse.VOLUME_NODE, os.O_RDWR) == 0
    file = kernel.files.make_scratch("", 1024)
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == errno.EBUSY
    assert kernel.open(fuse.VOLUME_NODE)[0] == 0
    assert kernel.release(fuse.VOLUME_NODE) == 0
    kernel.files.drop_scratch(file)
    assert kernel.open(fuse.VOLUME_NODE, os.O_RDWR)[0] == 0


class FakeSplice:
    """Takes what it is given, or says why not."""

    def __init__(self, result: bool | OSError) -> None:
        self.result, self.most, self.sent = result, 1 << 20, []

    def send(self, head: bytearray, descriptor: int, offset: int, size: int) -> bool:
        self.sent.append((fuse.OUT_HEADER.unpack(head), descriptor, offset, size))
        if isinstance(self.result, OSError):
            raise self.result
        return self.result

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def spliced(volume: Volume, result: bool | OSError) -> Iterator[tuple[Kernel, FakeSplice]]:
    volume.data[:] = random.Random(1).randbytes(SIZE)
    kernel = Kernel(volume, max_write=1 << 20)
    kernel.files._splice = fake = FakeSplice(result)
    try:
        with mock.patch.object(fuse, "_LARGE", 65536):  # a socket takes no more than 200 KiB at once
            yield kernel, fake
    finally:
        kernel.files.close()
        kernel.ours.close()
        kernel.theirs.close()


def test_a_large_read_is_sent_from_where_it_stands(volume: Volume) -> None:
    volume.place = (77, 12_345)
    with spliced(volume, True) as (kernel, fake):
        kernel.raw(kernel.packet(fuse.READ, fuse.VOLUME_NODE, fuse.IO_IN.pack(0, 4096, 100_000, 0, 0, 0, 0)))
        assert kernel.silent()
        assert fake.sent == [((100_016, 0, kernel.unique), 77, 12_345, 100_000)]


@pytest.mark.parametrize("why", ["refused", "nowhere", "small", "too large"])
def test_what_cannot_be_spliced_is_copied(volume: Volume, why: str) -> None:
    volume.place = None if why == "nowhere" else (77, 12_345)
    with spliced(volume, False) as (kernel, fake):
        size = 4096 if why == "small" else 100_000
        fake.most = size - 1 if why == "too large" else 1 << 20
        assert kernel.read(fuse.VOLUME_NODE, 4096, size) == (0, bytes(volume.data[4096 : 4096 + size]))
        assert len(fake.sent) == (why == "refused")


@pytest.mark.parametrize(("code", "said"), [(errno.ENOENT, 0), (errno.EIO, 1)])
def test_a_spliced_answer_that_is_not_taken(volume: Volume, code: int, said: int) -> None:
    """Whoever asked may be gone; else he still waits, and gets a copy."""
    volume.place = (77, 0)
    with spliced(volume, OSError(code, "not taken")) as (kernel, _):
        kernel.raw(kernel.packet(fuse.READ, fuse.VOLUME_NODE, fuse.IO_IN.pack(0, 0, 100_000, 0, 0, 0, 0)))
        if said:
            status, data = kernel.answer()
            assert (status, data) == (0, bytes(volume.data[: len(data)]))
            assert data
        assert kernel.silent()
        assert len(kernel.log) == said


def test_the_connection_ends_with_a_spliced_answer(volume: Volume) -> None:
    volume.place = (77, 0)
    with spliced(volume, OSError(errno.ENODEV, "gone")) as (kernel, _), pytest.raises(fuse.Unmounted):
        kernel.raw(kernel.packet(fuse.READ, fuse.VOLUME_NODE, fuse.IO_IN.pack(0, 0, 100_000, 0, 0, 0, 0)))
