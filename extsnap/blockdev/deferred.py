"""A device whose writes wait in scratch files until all of them are let through, in their order, or dropped.

For commands that must happen whole or not at all, like the repair of a filesystem: how many blocks it writes is
known when it has ended.  The latest content is a `Scratch`; a second file without a name, the log, has every write,
punch and barrier in order, for `let_through`.

The order is kept, barriers included, because what stands above relies on it: a journal is replayed, made durable,
and only then emptied.  Nothing here lasts longer than the process: a flush is acknowledged and becomes true later.
"""

from __future__ import annotations

import os
import struct
import tempfile
import weakref
from collections.abc import Iterator
from typing import BinaryIO

from extsnap.blockdev.base import Buffer, Device
from extsnap.blockdev.scratch import Scratch
from extsnap.errors import ExtsnapError

_ENTRY = struct.Struct("<BQQ")  # what, offset, length; the data follows a write
_WRITE, _PUNCH, _FLUSH = range(3)
#: Data of one logged write that is read back at once.
_PIECE_BYTES = 1 << 20


class Deferred(Scratch):
    """See the module.

    Args:
        device: What is read below; written by `let_through` only.
        block_size: Unit of ``written``, in bytes.

    Raises:
        ExtsnapError: The scratch files cannot be made.
    """

    def __init__(self, device: Device, block_size: int) -> None:
        super().__init__(device, block_size)
        self._target = device
        self._blocks = (self.size + block_size - 1) // block_size
        self._log: BinaryIO = tempfile.TemporaryFile(prefix="extsnap-deferred-")  # noqa: SIM115
        weakref.finalize(self, self._log.close)  # a volume that is given up after an error is not always closed
        self._barrier = True  # a barrier would add nothing
        self._broken = False  # a write is missing here: nothing may be let through

    #: What waits here is never shared with anything.
    clone_least = 0

    def clone(self, source: int, target: int, length: int) -> bool:
        """Not possible."""
        return False

    def close(self) -> None:
        """Drop what was not let through."""
        super().close()
        self._log.close()

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Keep ``data``; nothing reaches the device below.

        Raises:
            OSError: The scratch files have no room.
        """
        self._require_inside(offset, len(data))
        if len(data):
            self._record(_WRITE, offset, len(data), data)

    def punch(self, offset: int, length: int) -> None:
        """Zeros."""
        length = min(length, self.size - offset)
        if length > 0:
            self._record(_PUNCH, offset, length)

    def flush(self) -> None:
        """A barrier in the log; nothing is durable."""
        if not self._barrier:
            self._record(_FLUSH, 0, 0)

    def _record(self, what: int, offset: int, length: int, data: Buffer = b"") -> None:
        broken, self._broken = self._broken, True
        self._log.write(_ENTRY.pack(what, offset, length))
        self._log.write(data)
        if what == _WRITE:
            super().pwrite(offset, data)
        elif what == _PUNCH:
            super().punch(offset, length)
        self._barrier, self._broken = what == _FLUSH, broken

    # -- the end ----------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of blocks (first, past the last) that cover all of ``written``, without long empty ones."""
        bytes_each = 1 << 10
        for low in range(0, len(self.written), bytes_each):
            if self.written[low : low + bytes_each].any():
                yield low * 8, min((low + bytes_each) * 8, self._blocks)

    def let_through(self) -> None:
        """Do to the device below what was done here, barriers included; durable on return.

        A crash on the way leaves what a crash of the writer itself would have left.

        Raises:
            ExtsnapError: A write found no room in the scratch files; the device below was not touched.
        """
        try:
            self._log.flush()
        except OSError:
            self._broken = True
        if self._broken:
            raise ExtsnapError(
                f"what was written does not fit into {tempfile.gettempdir()}; nothing was changed",
                hint="set TMPDIR to a directory with more room",
            )
        self._log.seek(0)
        while head := self._log.read(_ENTRY.size):
            what, offset, length = _ENTRY.unpack(head)
            if what == _FLUSH:
                self._target.flush()
            elif what == _PUNCH:
                self._target.punch(offset, length)
            else:
                for low in range(0, length, _PIECE_BYTES):
                    piece = self._log.read(min(_PIECE_BYTES, length - low))
                    self._target.pwrite(offset + low, piece)
        self._log.seek(0, os.SEEK_END)
        self._target.flush()
