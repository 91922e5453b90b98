"""Views: a snapshot read as a whole volume, block for block."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Bits, Ints, bitmap_runs, expand
from extsnap.errors import DamagedCopy
from extsnap.snapshot import format as fmt
from extsnap.snapshot import limits
from extsnap.snapshot.engine import Engine
from extsnap.snapshot.index import Level

Flags = npt.NDArray[np.bool_]

#: Largest piece that is assembled at once, in blocks.
PIECE_BLOCKS = 1024
#: Parts of a view with less than this between them are read as one.
GAP_BYTES = 64 << 10


class View:
    """A read-only device with the content of one snapshot.

    A block that the snapshot preserves comes from its copy, or from the medium where there is none yet (never
    from held writes, which are newer); every other block reads as zeros.

    Attributes:
        size: Bytes; the size of the volume at that moment.
        id: The snapshot's id, never used again in this store.
    """

    def __init__(self, engine: Engine, snapshot: fmt.Snapshot) -> None:
        self.engine = engine
        self.snapshot = snapshot
        self.id = snapshot.id
        self.size = snapshot.volume_bytes

    def close(self) -> None:
        """Nothing is held; views exist for as long as their snapshot does."""

    def pread(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes at ``offset``.

        Raises:
            DamagedCopy: A copy block fails its checksum.
        """
        buffer = bytearray(length)
        if length:
            self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``.

        Raises:
            DamagedCopy: A copy block fails its checksum.
        """
        if offset < 0 or offset + len(buffer) > self.size:
            raise ValueError(f"read of {len(buffer)} bytes at {offset} leaves the view of {self.size}")
        size = self.engine.block_size
        done = 0
        while done < len(buffer):
            at = offset + done
            first = at // size
            last = min(-(-(offset + len(buffer)) // size), first + PIECE_BLOCKS)
            length = min(last * size, offset + len(buffer)) - at
            self._read_piece(first, last, at - first * size, buffer[done : done + length])
            done += length

    def _read_piece(self, first: int, last: int, skip: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``skip`` bytes into block ``first``; it ends within block ``last - 1``."""
        engine, size = self.engine, self.engine.block_size
        if engine.lost:
            raise DamagedCopy(f"snapshot {self.snapshot.name!r} cannot be read: {engine.lost}")
        preserved = engine.history.preserved_by(self.id, first + engine.shift, last + engine.shift)
        if not preserved.any():
            buffer[:] = bytes(len(buffer))
            return
        records = self.records(first, last)
        blocks = expand(records.block, records.length)
        inside = (blocks >= first) & (blocks < last)
        from_base = preserved.copy()
        from_base[blocks[inside] - first] = False
        whole = skip == 0 and len(buffer) == (last - first) * size
        content = (
            np.zeros((last - first, size), np.uint8) if not whole else np.frombuffer(buffer, np.uint8).reshape(-1, size)
        )
        if from_base.any():
            end = min(last * size, engine.size)
            engine.medium.readinto(first * size, content.reshape(-1).data[: end - first * size])
        content[~from_base] = 0
        self._paste_copies(records, blocks, inside, first, preserved, content)
        if not whole:
            buffer[:] = content.reshape(-1).data[skip : skip + len(buffer)]

    def records(self, first: int, last: int) -> Level:
        """The records of this snapshot that touch blocks [first, last)."""
        level = self.engine.index.in_range(first, last)
        mine = level.take(np.flatnonzero(self.engine.masks.has(self.snapshot.bit)[level.mask]))
        limits.require_once(mine, self.snapshot.name)
        return mine

    def _paste_copies(
        self, records: Level, blocks: Ints, inside: Flags, first: int, preserved: Flags, content: Bits
    ) -> None:
        copied = np.repeat(records.copy != fmt.ZERO_COPY, records.length)
        logical = expand(records.copy, records.length)
        which = np.flatnonzero(inside & copied)
        which = which[preserved[blocks[which] - first]]
        if not len(which):
            return
        crc_at = np.repeat(records.crc_at, records.length) + (blocks - np.repeat(records.block, records.length))
        which = which[np.argsort(logical[which], kind="stable")]
        copies = self.engine.store.read_blocks(logical[which])
        expected = records.crcs[crc_at[which]]
        for copy, block, crc in zip(copies, blocks[which].tolist(), expected.tolist(), strict=True):
            if fmt.crc(copy) != crc:
                raise DamagedCopy(
                    f"snapshot {self.snapshot.name!r}: the copy of block {block} fails its checksum",
                    hint="run extsnap check to see what is affected",
                )
        content[blocks[which] - first] = copies

    def preserved_runs(self) -> Ints:
        """Runs (start block, length) of everything that the snapshot preserves: int64[n, 2]."""
        engine = self.engine
        bits = engine.history.assemble(self.id)
        return np.asarray(bitmap_runs(bits, engine.rows * engine.row_bytes * 8) - np.array([engine.shift, 0]))

    def pieces(self, piece_bytes: int = 4 << 20) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of everything preserved, in order, in bounded pieces; the rest is zeros.

        Short gaps are read along: on a fragmented volume thousands of small pieces would take far longer.
        """
        for at, count in pieces(self.preserved_runs(), self.engine.block_size, self.size, piece_bytes):
            yield at, self.pread(at, count)


def pieces(runs: Ints, block_size: int, size: int, piece_bytes: int = 4 << 20) -> Iterator[tuple[int, int]]:
    """Bounded pieces (offset, bytes) that cover runs (start block, length) of a view of ``size`` bytes."""
    if not len(runs):
        return
    ends = runs[:, 0] + runs[:, 1]
    first = np.append(0, 1 + np.flatnonzero(runs[1:, 0] - ends[:-1] > GAP_BYTES // block_size))
    stops = np.append(ends[first[1:] - 1], ends[-1])
    for start, stop in zip(runs[first, 0].tolist(), stops.tolist(), strict=True):
        at, end = start * block_size, min(stop * block_size, size)
        while at < end:
            count = min(piece_bytes, end - at)
            yield at, count
            at += count


class ViewFile(io.RawIOBase):
    """A view as a seekable, read-only binary file."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position as files do; beyond the end reads are empty."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._view.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into ``buffer``; returns how many bytes."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._view.size - self._position))
        if count:
            self._view.readinto(self._position, view[:count])
        self._position += count
        return count
