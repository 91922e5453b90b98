"""Devices for tests: in memory, one that records what is written, one that fails, and power cuts from a record.

The fault model of a power cut: **any unsynced 512-byte sector of any write may persist or not, in any order between
barriers; the 1,024 bytes of a superblock are written atomically.**  From it follows what `crash_state` does:

* Everything before the last `flush` that had returned is on the medium.
* Of what was issued after it, a sector has its content from before, or from after any one of the operations that
  touched it.  Each operation decides for each of its sectors by itself, so that a later write may be there
  without an earlier one, and half a block without the other half.
* An operation that touches part of a sector puts the whole sector on the medium as it was when the operation was
  issued, for a medium knows no parts of sectors.
* Both sectors of a superblock share one decision.

A state is named by the number of operations issued and a seed: the same two numbers give the same bytes again, so a
failing test needs to print nothing else.  Two seeds are not random: `EVERYTHING` and `NOTHING` of the unsynced
operations persist.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from extsnap.blockdev.base import Buffer, CloningDevice

SECTOR = 512
SUPERBLOCK_BYTES = 1024
#: Seeds of the two states that are no matter of chance: all that was issued is there; only what was flushed is.
EVERYTHING, NOTHING = -1, -2
#: What stands in a buffer behind a short read: neither zeros nor what is on the device.
NEVER_READ = b"\xa5"
#: Offsets of the superblocks that a volume surely has: the primary.
PRIMARY = (1024,)

OperationKind = Literal["read", "write", "punch", "flush"]
FaultKind = Literal["EIO", "ENOSPC", "short", "gone", "lost"]


class MemoryDevice:
    """A device over a bytearray.

    Args:
        content: The bytes, which are copied, or a size in bytes for a device of zeros.

    Attributes:
        content: What the device holds.
        size: Bytes.
    """

    def __init__(self, content: Buffer | int) -> None:
        self.content = bytearray(content)
        self.size = len(self.content)

    def _range(self, offset: int, length: int) -> slice:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} leave the device of {self.size}")
        return slice(offset, offset + length)

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; ValueError past the end."""
        return bytes(self.content[self._range(offset, length)])

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; ValueError past the end."""
        buffer[:] = self.content[self._range(offset, len(buffer))]

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``; ValueError past the end."""
        self.content[self._range(offset, len(data))] = data

    def punch(self, offset: int, length: int) -> None:
        """Zeros."""
        self.content[self._range(offset, length)] = bytes(length)

    #: As a host that shares blocks, and small enough for the tests' volumes.
    clone_least = 2048

    def clone(self, source: int, target: int, length: int) -> bool:
        """Copy."""
        self.content[self._range(target, length)] = self.content[self._range(source, length)]
        return True

    def flush(self) -> None:
        """Nothing to do: what is written is there."""


@dataclass(frozen=True)
class Operation:
    """One entry of a record.

    Attributes:
        kind: "write", "punch" or "flush".
        offset: First byte; 0 for a flush.
        length: Bytes; 0 for a flush.
        data: What was written; empty for the others.
    """

    kind: OperationKind
    offset: int = 0
    length: int = 0
    data: bytes = b""


class RecordingDevice:
    """Passes everything on, and keeps every write, punch and flush that the device below took.

    Attributes:
        initial: What the device below held when recording began.
        log: The operations, in the order in which they returned.
        size: Bytes.
    """

    def __init__(self, device: CloningDevice) -> None:
        self._device = device
        self.size = device.size
        self.initial = device.pread(0, device.size)
        self.log: list[Operation] = []

    def pread(self, offset: int, length: int) -> bytes:
        """Read from the device below."""
        return self._device.pread(offset, length)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read from the device below."""
        self._device.readinto(offset, buffer)

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write to the device below, and record it."""
        self._device.pwrite(offset, data)
        self.log.append(Operation("write", offset, len(data), bytes(data)))

    def punch(self, offset: int, length: int) -> None:
        """Punch the device below, and record it."""
        self._device.punch(offset, length)
        self.log.append(Operation("punch", offset, length))

    @property
    def clone_least(self) -> int:
        """As the device below."""
        return self._device.clone_least

    def clone(self, source: int, target: int, length: int) -> bool:
        """Clone on the device below, and record it as a write: any of its sectors may be lost before the barrier."""
        if not self._device.clone(source, target, length):
            return False
        self.log.append(Operation("write", target, length, self._device.pread(target, length)))
        return True

    def flush(self) -> None:
        """Flush the device below, and record the barrier."""
        self._device.flush()
        self.log.append(Operation("flush"))

    def crash_states(
        self,
        rng: random.Random,
        *,
        superblocks: Iterable[int] = PRIMARY,
        points: Iterable[int] | None = None,
        variants: int = 1,
    ) -> Iterator[CrashState]:
        """`crash_states` of this record."""
        return crash_states(self.initial, self.log, rng, superblocks=superblocks, points=points, variants=variants)


@dataclass(frozen=True)
class CrashState:
    """What a medium may hold after a power cut.

    Attributes:
        point: Operations of the record that had been issued.
        seed: What decided about the unsynced ones.
        content: The medium.
    """

    point: int
    seed: int
    content: bytearray

    def __repr__(self) -> str:
        return f"CrashState(point={self.point}, seed={self.seed})"


def crash_states(
    initial: Buffer,
    log: Sequence[Operation],
    rng: random.Random,
    *,
    superblocks: Iterable[int] = PRIMARY,
    points: Iterable[int] | None = None,
    variants: int = 1,
) -> Iterator[CrashState]:
    """Media after power cuts, in the order of the record.

    Args:
        initial: The medium when recording began.
        log: The record.
        rng: Source of the seeds.
        superblocks: Byte offsets of all superblocks, primary and backups.
        points: Where to cut, as numbers of issued operations; by default everywhere, 0 and the whole record included.
        variants: States for each point.
    """
    medium = _Medium(initial, superblocks)
    wanted = sorted(set(range(len(log) + 1) if points is None else points))
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= len(log):
        raise ValueError(f"a cut at {wanted[0]} or {wanted[-1]} in a record of {len(log)} operations")
    issued = 0
    for point in wanted:
        for operation in log[issued:point]:
            medium.issue(operation)
        issued = point
        for _ in range(variants):
            seed = rng.getrandbits(32)
            yield CrashState(point, seed, medium.cut(seed))


def crash_state(
    initial: Buffer, log: Sequence[Operation], point: int, seed: int, *, superblocks: Iterable[int] = PRIMARY
) -> CrashState:
    """One state again, by its point and seed; see `crash_states`."""
    return Cuts(initial, log, superblocks=superblocks).state(point, seed)


class Cuts:
    """Any states of one record, by their points and seeds, quickest in the order of the points; see `crash_states`.

    Args:
        initial: The medium when recording began.
        log: The record, which may still grow.
        superblocks: Byte offsets of all superblocks, primary and backups.
    """

    def __init__(self, initial: Buffer, log: Sequence[Operation], *, superblocks: Iterable[int] = PRIMARY) -> None:
        self._initial = initial
        self._log = log
        self._superblocks = list(superblocks)
        self._begin()

    def _begin(self) -> None:
        self._medium = _Medium(self._initial, self._superblocks)
        self._issued = 0

    def state(self, point: int, seed: int) -> CrashState:
        """The state of a cut after ``point`` operations."""
        if point < self._issued:
            self._begin()
        for operation in self._log[self._issued : point]:
            self._medium.issue(operation)
        self._issued = max(self._issued, point)
        return CrashState(point, seed, self._medium.cut(seed))


@dataclass(frozen=True)
class _Unsynced:
    """Whole sectors, as they were right after one operation: first byte and content."""

    start: int
    content: bytes


class _Medium:
    """A medium with a volatile write cache: what is durable, and what is not yet."""

    def __init__(self, initial: Buffer, superblocks: Iterable[int]) -> None:
        self._durable = bytearray(initial)
        self._issued = bytearray(initial)
        self._unsynced: list[_Unsynced] = []
        self._superblocks = np.unique(np.fromiter(superblocks, np.int64))
        if (self._superblocks % SECTOR).any():
            raise ValueError("a superblock begins at a sector")

    def issue(self, operation: Operation) -> None:
        """Take the next operation of the record."""
        if operation.kind == "flush":
            for unsynced in self._unsynced:
                self._durable[unsynced.start : unsynced.start + len(unsynced.content)] = unsynced.content
            self._unsynced.clear()
            return
        start, end = operation.offset, operation.offset + operation.length
        if start < 0 or end > len(self._issued):
            raise ValueError(f"{operation.length} bytes at {start} leave the medium of {len(self._issued)}")
        if start == end:
            return
        self._issued[start:end] = operation.data if operation.kind == "write" else bytes(operation.length)
        start, end = start // SECTOR * SECTOR, min(-(-end // SECTOR) * SECTOR, len(self._issued))
        # A write into one half of a superblock is one of the whole.
        for touched in self._superblocks_in(start, end):
            start, end = min(start, touched), max(end, min(touched + SUPERBLOCK_BYTES, len(self._issued)))
        self._unsynced.append(_Unsynced(start, bytes(self._issued[start:end])))

    def _superblocks_in(self, start: int, end: int) -> list[int]:
        low, high = np.searchsorted(self._superblocks, [start - SUPERBLOCK_BYTES + 1, end])
        return [int(offset) for offset in self._superblocks[low:high]]

    def cut(self, seed: int) -> bytearray:
        """The medium if the power fails now."""
        if seed == EVERYTHING:
            return bytearray(self._issued)
        if seed == NOTHING:
            return bytearray(self._durable)
        rng = np.random.default_rng(seed)
        content = bytearray(self._durable)
        target = np.frombuffer(content, np.uint8)
        # Even odds alone would leave long runs of writes that are all there, or all lost, to chance.
        share = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], p=[0.1, 0.2, 0.4, 0.2, 0.1])
        whole = bool(rng.integers(2))
        for unsynced in self._unsynced:
            length = len(unsynced.content)
            sectors = -(-length // SECTOR)
            persists: npt.NDArray[np.bool_] = rng.random(sectors) < share
            if whole and share not in (0.0, 1.0):
                persists[:] = persists[0]
            for superblock in self._superblocks_in(unsynced.start, unsynced.start + length):
                first = (superblock - unsynced.start) // SECTOR
                persists[first + 1 : first + 2] = persists[first]
            bytes_persist = np.repeat(persists, SECTOR)[:length]
            part = target[unsynced.start : unsynced.start + length]
            part[bytes_persist] = np.frombuffer(unsynced.content, np.uint8)[bytes_persist]
        return content


class FaultyDevice:
    """Passes everything on but the Nth operation, which fails.

    Args:
        device: The device below.
        fail_at: Which operation fails, counted from 1; 0 for none, which is how to count them.
        kind: "EIO" or "ENOSPC": nothing is done.  "short": a write or punch does its first half, then EIO; a read
            fills its first half, and what is behind it is not to be used.
            "gone": EIO, for this and every later operation, reads included: a cable pulled.
            "lost": of flushes: EIO, and what was written since the last one stays in the host's cache, where it is
            read, but by chance never reaches the medium, although later flushes succeed: what Linux does.
        operations: What is counted, and may fail.
        superblocks: Byte offsets of superblocks, which no short write tears.
        rng: Decides what is lost.

    Attributes:
        count: Operations so far that may fail.
        counts: Operations so far of every kind.
        failures: How many of them failed.
        size: Bytes.
    """

    def __init__(
        self,
        device: CloningDevice,
        *,
        fail_at: int,
        kind: FaultKind = "EIO",
        operations: Iterable[OperationKind] = ("write", "punch", "flush"),
        superblocks: Iterable[int] = (),
        rng: random.Random | None = None,
    ) -> None:
        self._rng = rng or random.Random(0)
        self._unsynced: dict[int, bytes] = {}  # sectors written since the last flush, as they were at it
        self._never_written: dict[int, bytes] = {}
        self._device = device
        self._fail_at = fail_at
        self._kind = kind
        self._operations = frozenset(operations)
        self._superblocks = sorted(superblocks)
        self.count = 0
        self.counts: Counter[OperationKind] = Counter()
        self.failures = 0
        self.size = device.size

    def _touch(self, offset: int, length: int) -> None:
        """Remember what the medium has of sectors that are about to be written."""
        if self._kind != "lost" or not length:
            return
        start, end = offset // SECTOR * SECTOR, min(-(-(offset + length) // SECTOR) * SECTOR, self.size)
        for superblock in self._superblocks:
            if superblock < end and start < superblock + SUPERBLOCK_BYTES:
                start, end = min(start, superblock), max(end, superblock + SUPERBLOCK_BYTES)
        old = self._device.pread(start, end - start)
        for at in range(start, end, SECTOR):
            content = self._never_written.pop(at, None)
            self._unsynced.setdefault(at, old[at - start : at - start + SECTOR] if content is None else content)

    def medium_after_power_cut(self) -> bytes:
        """What is on the medium if the power fails after the last flush: without what was lost."""
        content = bytearray(self._device.pread(0, self.size))
        for at, old in self._never_written.items():
            content[at : at + len(old)] = old
        return bytes(content)

    def _lose(self) -> None:
        """Of what was written since the last flush, some never reaches the medium; a superblock is lost whole."""
        halves = {at + SECTOR: at for at in self._superblocks}
        lost: dict[int, bool] = {}
        for at in sorted(self._unsynced):
            lost[at] = lost[halves[at]] if halves.get(at) in lost else self._rng.random() < 0.5
        self._never_written |= {at: self._unsynced[at] for at, gone in lost.items() if gone}
        self._unsynced.clear()

    def _fails(self, operation: OperationKind) -> bool:
        """Count one operation; true if it is to fail."""
        gone = self._kind == "gone" and self.failures > 0
        self.counts[operation] += 1
        if operation in self._operations:
            self.count += 1
            gone = gone or self.count == self._fail_at
        self.failures += gone
        return gone

    def _half(self, offset: int, length: int) -> int:
        """How much of an operation a short one does."""
        end = offset + length // 2
        for superblock in self._superblocks:
            if superblock < end < superblock + SUPERBLOCK_BYTES:
                end = max(offset, superblock)
        return end - offset

    def _error(self, operation: OperationKind, offset: int, length: int) -> OSError:
        number = errno.ENOSPC if self._kind == "ENOSPC" else errno.EIO
        return OSError(number, f"{operation} of {length} bytes at byte {offset} failed: {os.strerror(number)}")

    def pread(self, offset: int, length: int) -> bytes:
        """Read from the device below, or fail."""
        if self._fails("read"):
            raise self._error("read", offset, length)
        return self._device.pread(offset, length)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read from the device below, or fail."""
        if self._fails("read"):
            if self._kind == "short":
                half = len(buffer) // 2
                self._device.readinto(offset, buffer[:half])
                buffer[half:] = NEVER_READ * (len(buffer) - half)
            raise self._error("read", offset, len(buffer))
        self._device.readinto(offset, buffer)

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write to the device below, or fail."""
        if self._fails("write"):
            if self._kind == "short":
                self._device.pwrite(offset, memoryview(data)[: self._half(offset, len(data))])
            raise self._error("write", offset, len(data))
        self._touch(offset, len(data))
        self._device.pwrite(offset, data)

    def punch(self, offset: int, length: int) -> None:
        """Punch the device below, or fail."""
        if self._fails("punch"):
            if self._kind == "short":
                self._device.punch(offset, self._half(offset, length))
            raise self._error("punch", offset, length)
        self._touch(offset, length)
        self._device.punch(offset, length)

    @property
    def clone_least(self) -> int:
        """As the device below."""
        return self._device.clone_least

    def clone(self, source: int, target: int, length: int) -> bool:
        """Clone on the device below, or refuse, and then the write that comes instead fails."""
        if self._fails("write"):
            self.failures -= self._kind != "gone"
            self._fail_at = self.count + 1
            return False
        self._touch(target, length)
        return self._device.clone(source, target, length)

    def reread(self) -> None:
        """Flush, and read from the medium: what was lost is no longer there."""
        self.flush()
        for at, old in self._never_written.items():
            self._device.pwrite(at, old)
        self._never_written.clear()

    def flush(self) -> None:
        """Flush the device below, or fail: then nothing is promised of what came before."""
        if self._fails("flush"):
            if self._kind == "lost":
                self._lose()
            raise self._error("flush", 0, 0)
        self._unsynced.clear()
        self._device.flush()
