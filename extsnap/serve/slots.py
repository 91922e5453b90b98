"""Places for many requests of one connection, which are taken, carried out and answered together.

A request is taken into a slot of its own: its header where `Slots.heads` has it, what follows on a page of its own.
Where many cannot be taken, or answered, in one system call, they are one by one.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints
from extsnap.serve.aio import PREADV, PWRITE, Batch

#: Requests taken before the first is answered: the kernel sends no more than 64 at once of what it delays.
SLOTS = 32
#: Errors of taking one that was aborted before we took it.
_WITHDRAWN = (errno.EINTR, errno.ENOENT)
#: The answer to a WRITE: fuse_out_header and fuse_write_out.
_WRITTEN = np.dtype([("length", "=u4"), ("error", "=i4"), ("unique", "=u8"), ("size", "=u4"), ("padding", "=u4")])


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
        self._came = 1
        self._answers = np.zeros(SLOTS, _WRITTEN)
        self._answers["length"] = _WRITTEN.itemsize
        places = self._rows.ctypes.data + self._starts
        parts = (places - head_bytes, np.full(SLOTS, head_bytes), places, np.full(SLOTS, data_bytes))
        self._iovecs = np.column_stack(parts)
        self._taking = _batch(connection, PREADV, self._iovecs, 2)
        self._answering = _batch(connection, PWRITE, self._answers, _WRITTEN.itemsize)

    def take(self, most: int) -> list[int]:
        """Take requests that wait, at most so many; returns the length of each, 0 for one that was withdrawn.

        Raises:
            OSError: The connection has ended.
        """
        taken = self._take_at_once(most) if most > 1 else None
        if taken is None:
            taken = self._take_each(most)
        self._came = max(1, len(taken))
        return taken

    def _take_at_once(self, most: int) -> list[int] | None:
        """As `take`, in a call or two; None if that cannot be."""
        if self._taking is None:
            return None
        found = np.zeros(0, np.int64)
        while len(found) < most and (found > 0).all():
            # To ask for those that do not wait costs something, too: as many as came last, twice, are asked for first.
            wanted = most - len(found) if len(found) else min(most, 2 * self._came)
            try:
                found = np.append(found, self._taking.run(wanted, len(found)))
            except OSError:
                if not len(found):
                    return None
                break
        there = np.flatnonzero(found != -errno.EAGAIN)
        if not len(there):
            return []
        # One that comes while others are asked for leaves a gap before it.
        lengths = [max(0, length) for length in found[: there[-1] + 1].tolist()]
        ended = there[(found[there] <= 0) & ~np.isin(-found[there], _WITHDRAWN)]
        if len(ended) and not any(lengths):
            code = -int(found[ended[0]]) or errno.ENODEV
            raise OSError(code, os.strerror(code))
        return lengths

    def _take_each(self, most: int) -> list[int]:
        taken: list[int] = []
        for buffers in self._buffers[:most]:
            try:
                length = os.readv(self._connection, buffers)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _WITHDRAWN:
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

    def written(self, uniques: npt.NDArray[np.uint64], sizes: Ints) -> Ints:
        """Answer writes, by the numbers of the requests, that so many bytes of each were written.

        Returns:
            What became of the first answers: negative is an errno.  To those after them nothing was answered.
        """
        if self._answering is None:
            return np.zeros(0, np.int64)
        self._answers["unique"][: len(uniques)], self._answers["size"][: len(sizes)] = uniques, sizes
        try:
            return self._answering.run(len(uniques))
        except OSError:
            return np.zeros(0, np.int64)

    def close(self) -> None:
        """Let go of the memory; nothing is taken any more."""
        for batch in (self._taking, self._answering):
            if batch is not None:
                batch.close()
        self._taking = self._answering = None
        self.heads, self.data, self._buffers = [], [], []
        self._rows, self._memory = np.zeros((0, 0), np.uint8), memoryview(b"")


def _batch(connection: int, opcode: int, table: npt.NDArray[Any], length: int) -> Batch | None:
    """A call for each row of a table, or None if that cannot be had."""
    rows = table.ctypes.data + np.arange(len(table)) * table.strides[0]
    try:
        return Batch(connection, opcode, rows, np.full(len(table), length))
    except OSError:
        return None
