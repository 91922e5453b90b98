"""A throw-away layer: reads through to a device that is never written, and what is written stays in a scratch file.

The file has no name, is sparse and as large as the device, and one bit a block tells what of it counts.  It takes at
most what was written, rounded to blocks; where the directory of scratch files (TMPDIR) has no room for that, the
write fails with ENOSPC, and each block of it reads as before or as written.  Nothing lasts longer than the process,
so a flush has nothing to do.
"""

from __future__ import annotations

import tempfile
from typing import Protocol

import numpy as np

from extsnap.arrays import Bits, runs_of, set_positions, set_runs
from extsnap.blockdev.base import Buffer
from extsnap.blockdev.image import ImageFile
from extsnap.errors import ExtsnapError


class Source(Protocol):
    """What is below: it must not change while the layer is there."""

    @property
    def size(self) -> int: ...

    def readinto(self, offset: int, buffer: memoryview) -> None: ...


class Scratch:
    """See the module.

    Attributes:
        size: Bytes, as below.
        written: uint8, packed: one bit a block that was written or punched.  Parts that are clear take no memory.

    Args:
        device: What is read below.
        block_size: Unit of ``written``, in bytes.

    Raises:
        ExtsnapError: The scratch file cannot be made.
    """

    def __init__(self, device: Source, block_size: int) -> None:
        self._device = device
        self._block_size = block_size
        self.size = device.size
        self.written: Bits = np.zeros((-(-self.size // block_size) + 7) // 8, np.uint8)
        try:
            with tempfile.NamedTemporaryFile(prefix="extsnap-scratch-") as file:
                file.truncate(self.size)
                self._image = ImageFile(file.name, writable=True)
        except OSError as error:
            raise ExtsnapError(
                f"no scratch file of {self.size} bytes can be made in {tempfile.gettempdir()}: {error.strerror}",
                hint="set TMPDIR to another directory",
            ) from error

    def close(self) -> None:
        """Drop what was written."""
        self._image.close()

    def pread(self, offset: int, length: int) -> bytes:
        """Read, with the writes so far."""
        buffer = bytearray(length)
        if length:
            self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read, with the writes so far."""
        size, end = self._block_size, offset + len(buffer)
        first, last = offset // size, -(-end // size)
        runs = runs_of(set_positions(self.written, first, last)).tolist()
        if runs != [[first, last - first]]:  # else what is below is not asked: it may be damaged there
            self._device.readinto(offset, buffer)
        for start, count in runs:
            low, high = max(offset, start * size), min(end, (start + count) * size)
            self._image.readinto(low, buffer[low - offset : high - offset])

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Keep ``data``; nothing reaches the device below.

        Raises:
            OSError: The scratch file has no room.
        """
        length = len(data)
        self._require_inside(offset, length)
        if length:
            self._complete(offset, length)
            self._image.pwrite(offset, data)
            self._mark(offset, length)

    def punch(self, offset: int, length: int) -> None:
        """Zeros."""
        length = min(length, self.size - offset)
        if length > 0:
            self._complete(offset, length)
            self._image.punch(offset, length)
            self._mark(offset, length)

    def flush(self) -> None:
        """Nothing to do: nothing is meant to last."""

    def _require_inside(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"write of {length} bytes at {offset} leaves the device of {self.size}")

    def _complete(self, offset: int, length: int) -> None:
        """Bring in the rest of the first and the last block, where they are written in part."""
        size, end = self._block_size, offset + length
        for block in {offset // size, (end - 1) // size}:
            whole = offset <= block * size and min((block + 1) * size, self.size) <= end
            if not whole and not self.written[block // 8] >> block % 8 & 1:
                content = bytearray(min(size, self.size - block * size))
                self._device.readinto(block * size, memoryview(content))
                self._image.pwrite(block * size, content)

    def _mark(self, offset: int, length: int) -> None:
        """What was written counts, now that all of it is there."""
        first, last = offset // self._block_size, (offset + length - 1) // self._block_size
        set_runs(self.written, np.array([[first, last + 1 - first]], np.int64))
