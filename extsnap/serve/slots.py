"""Places for many requests of one connection, which are carried out together.

A request is taken into a slot of its own: its header where `Slots.heads` has it, what follows on a page of its own.
"""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints

#: Requests taken before the first is answered: the kernel sends no more than 64 at once of what it delays.
SLOTS = 32


class Slots:
    """Slots for requests.

    Attributes:
        heads: Of each slot, the first bytes of a request.
        data: Of each slot, what follows.
    """

    def __init__(self, connection: int, head_bytes: int, data_bytes: int) -> None:
        """Take from ``connection``, which stays the caller's and does not block.

        Args:
            connection: A descriptor.
            head_bytes: Of a request; at most a page.
            data_bytes: That may follow; whole pages.
        """
        self._connection = connection
        stride = mmap.PAGESIZE + data_bytes
        self._memory = memoryview(mmap.mmap(-1, SLOTS * stride))  # takes memory as it is used
        starts = [slot * stride + mmap.PAGESIZE for slot in range(SLOTS)]
        self._starts = np.array(starts)
        self.heads = [self._memory[start - head_bytes : start] for start in starts]
        self.data = [self._memory[start : start + data_bytes] for start in starts]
        self._buffers = list(zip(self.heads, self.data, strict=True))
        self._rows = np.frombuffer(self._memory, np.uint8).reshape(SLOTS, stride)
        self._head = slice(mmap.PAGESIZE - head_bytes, mmap.PAGESIZE)

    def take(self, most: int) -> list[int]:
        """Take requests that wait, at most so many; returns the length of each, 0 for one that was withdrawn.

        Raises:
            OSError: The connection has ended.
        """
        taken: list[int] = []
        for buffers in self._buffers[:most]:
            try:
                length = os.readv(self._connection, buffers)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: aborted before we took it
                    taken.append(0)
                    continue
                if taken:  # the next call finds the end as well
                    break
                raise
            if not length:
                if taken:
                    break
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            taken.append(length)
        return taken

    def headers(self, count: int, kind: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """A copy of the headers in the first slots."""
        return np.ascontiguousarray(self._rows[:count, self._head]).view(kind)[:, 0]

    def places(self, first: int, count: int) -> tuple[Ints, memoryview]:
        """Where in a buffer the data of some slots begins, and the buffer."""
        return self._starts[first : first + count], self._memory

    def close(self) -> None:
        """Let go of the memory; nothing is taken any more."""
        self.heads, self.data, self._buffers = [], [], []
        self._rows, self._memory = np.zeros((0, 0), np.uint8), memoryview(b"")
