"""A device whose flush means what it says after one that failed.

Where the host could not write something back, Linux tells it once, at the flush, and then calls the pages clean: they
are still read from the cache, a later flush succeeds, and the medium never gets them.  So after a flush that failed,
the next one writes again what was written since the last good one, and only then asks the host.

What a process that ended after a failed flush left in the cache is out of reach: nobody knows what it had written.
So who opens a volume that was not closed has it read from the medium (`Durable.reread`) before anything of it is
believed: what never got there is then not there, as after a power cut.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from extsnap.arrays import expand
from extsnap.blockdev.base import Buffer, CloningDevice, Pieces, flush_while, read_pieces, where, write_pieces

#: What is written again is remembered in pieces of this size.
PIECE_BYTES = 64 << 10
_BITS = PIECE_BYTES.bit_length() - 1


class Durable:
    """Passes everything on to the device below; see the module.

    Attributes:
        below: That device.
    """

    def __init__(self, device: CloningDevice) -> None:
        self.below = device
        self._written: set[int] = set()
        self._failed = False

    @property
    def size(self) -> int:
        """Bytes of the device below."""
        return self.below.size

    @property
    def clone_least(self) -> int:
        """As the device below."""
        return self.below.clone_least

    def pread(self, offset: int, length: int) -> bytes:
        """Read from the device below."""
        return self.below.pread(offset, length)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read from the device below."""
        self.below.readinto(offset, buffer)

    def where(self, offset: int, length: int) -> tuple[int, int] | None:
        """As the device below."""
        return where(self.below, offset, length)

    def read_pieces(self, pieces: Pieces) -> None:
        """Read from the device below."""
        read_pieces(self.below, pieces)

    def _touch(self, offset: int, length: int) -> None:
        first, last = offset >> _BITS, (offset + length - 1) >> _BITS
        if first == last:
            self._written.add(first)
        else:
            self._written.update(range(first, last + 1))

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write to the device below."""
        self._touch(offset, len(data))
        self.below.pwrite(offset, data)

    def write_pieces(self, pieces: Pieces) -> None:
        """Write to the device below."""
        first = pieces.offsets >> _BITS
        self._written.update(expand(first, ((pieces.offsets + pieces.lengths - 1) >> _BITS) - first + 1).tolist())
        write_pieces(self.below, pieces)

    def punch(self, offset: int, length: int) -> None:
        """Punch the device below."""
        self._touch(offset, length)
        self.below.punch(offset, length)

    def clone(self, source: int, target: int, length: int) -> bool:
        """Clone on the device below."""
        self._touch(target, length)
        return self.below.clone(source, target, length)

    def resize(self, size: int) -> None:
        """Make the image below ``size`` bytes long.

        Raises:
            OSError: ENOSPC: its size is fixed; or what the host says.
        """
        resize = getattr(self.below, "resize", None)
        if resize is None:
            raise OSError(errno.ENOSPC, "the size of this device is fixed")
        resize(size)
        self._written = {piece for piece in self._written if piece << _BITS < size}

    def reread(self) -> None:
        """Have the host forget what it remembers of the medium, where it has something to forget.

        Raises:
            OSError: It could not write out what it has.
        """
        reread = getattr(self.below, "reread", None)
        if reread is not None:
            reread()

    def flush(self) -> None:
        """Barrier; after one that failed, what was written since the last good one is written again first.

        Raises:
            OSError: It could not be made durable; whoever asks again has it tried again.
        """
        self.flush_while(None)

    def flush_while(self, work: Callable[[], None] | None) -> None:
        """The same, and ``work``, see `extsnap.blockdev.base`."""
        if self._failed:
            for piece in sorted(self._written):
                offset = piece << _BITS
                length = min(PIECE_BYTES, self.size - offset)
                if length > 0:
                    self.below.pwrite(offset, self.below.pread(offset, length))
        self._failed = True
        flush_while(self.below, work)
        self._failed = False
        self._written.clear()

    def close(self) -> None:
        """Close the device below, if it can be closed."""
        close = getattr(self.below, "close", None)
        if close is not None:
            close()
