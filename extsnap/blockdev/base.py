"""What every layer above reads and writes through.

A device is a fixed run of bytes with positioned reads and writes.  There is no file position and no
buffering: the durability contract is the one of a disk with a volatile write cache.

* ``pwrite`` and ``punch`` may be durable at any time after the call, in any order, 512-byte sector
  by sector, until ``flush`` returns.
* ``flush`` returns when everything written before it is durable (a barrier).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints

Buffer = bytes | bytearray | memoryview


class ReadableDevice(Protocol):
    """Positioned reads over ``size`` bytes."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes; a read past the end raises ``ValueError``."""
        ...

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``: the same as pread, without a copy."""
        ...


@dataclass(frozen=True)
class Pieces:
    """Pieces of a device, in their order, each with its place in a buffer: what is read, or written, in many places.

    Attributes:
        offsets: int64[n], bytes on the device.
        lengths: int64[n], bytes, none of them 0.
        at: int64[n], where in the buffer each begins.
        buffer: Of bytes.
    """

    offsets: Ints
    lengths: Ints
    at: Ints
    buffer: memoryview

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        """(offset, part of the buffer)."""
        for offset, length, at in zip(self.offsets.tolist(), self.lengths.tolist(), self.at.tolist(), strict=True):
            yield offset, self.buffer[at : at + length]

    def gather(self, buffer: memoryview) -> None:
        """Copy them into another buffer, one behind the other."""
        count, length = len(self), int(self.lengths[0])
        step = int(self.at[1] - self.at[0]) if count > 1 else 0
        if step > 0 and (self.lengths == length).all() and (self.at[1:] - self.at[:-1] == step).all():
            rows = np.ndarray((count, length), np.uint8, self.buffer, int(self.at[0]), (step, 1))
            np.ndarray((count, length), np.uint8, buffer)[:] = rows
            return
        end = 0
        for _, data in self:
            buffer[end : end + len(data)] = data
            end += len(data)

    def some(self, which: npt.NDArray[np.bool_]) -> Pieces:
        """Those for which ``which`` is true."""
        return Pieces(self.offsets[which], self.lengths[which], self.at[which], self.buffer)


def read_pieces(device: ReadableDevice, pieces: Pieces) -> None:
    """Fill pieces from all over a device: by its own ``read_pieces``, if it has one, else one by one."""
    own: Any = getattr(device, "read_pieces", None)
    if own is not None:
        own(pieces)
        return
    for offset, buffer in pieces:
        device.readinto(offset, buffer)


def write_pieces(device: Device, pieces: Pieces) -> None:
    """Write pieces all over a device: by its own ``write_pieces``, if it has one, else one by one."""
    own: Any = getattr(device, "write_pieces", None)
    if own is not None:
        own(pieces)
        return
    for offset, data in pieces:
        device.pwrite(offset, data)


def where(device: ReadableDevice, offset: int, length: int) -> tuple[int, int] | None:
    """The descriptor of a file that has just these bytes of a device, and where in it; None if no file has.

    That is what the device's own ``where`` says, if it has one.
    """
    own: Any = getattr(device, "where", None)
    found: tuple[int, int] | None = own(offset, length) if own is not None else None
    return found


def flush_while(device: Device, work: Callable[[], None] | None) -> None:
    """A barrier for everything written before; meanwhile ``work``, which only reads and raises nothing.

    At the same time where the device has a ``flush_while`` of its own, else one after the other.
    """
    own: Any = getattr(device, "flush_while", None)
    if work is not None and own is not None:
        own(work)
        return
    device.flush()
    if work is not None:
        work()


class Device(ReadableDevice, Protocol):
    """A readable device that can be written."""

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of ``data`` at ``offset``.  Not durable before ``flush``."""
        ...

    def punch(self, offset: int, length: int) -> None:
        """Make the range read as zeros, giving the space back where the host can."""
        ...

    def flush(self) -> None:
        """Barrier: everything written before is durable when this returns."""
        ...


class CloningDevice(Device, Protocol):
    """A device at the bottom, which may share blocks instead of copying them (reflink)."""

    @property
    def clone_least(self) -> int:
        """From how many bytes on `clone` is worth its call; 0 where the device cannot do it."""
        ...

    def clone(self, source: int, target: int, length: int) -> bool:
        """Give ``target`` the content of ``source`` without moving bytes; independent of the source ever after.

        Not durable before ``flush``, as if it had been written.

        Returns:
            False if that cannot be done here: the target then holds anything, and is to be written.
        """
        ...
