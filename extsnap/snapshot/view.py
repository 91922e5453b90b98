"""Views: a snapshot read as a whole volume, block for block."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Bits, Ints, bitmap_runs, runs_of
from extsnap.blockdev.base import Pieces
from extsnap.errors import DamagedCopy, ExtsnapError
from extsnap.snapshot import format as fmt
from extsnap.snapshot import limits
from extsnap.snapshot.engine import Engine

#: What is put together at once: of a long read, and for shorter ones in order.
WINDOW_BYTES = 4 << 20
#: Reads that are shorter than this are taken for random ones.
IN_ORDER_BYTES = 64 << 10
_NO_WINDOW = -2
_BASE = -2
#: Parts of a view with less than this between them are read as one.
GAP_BYTES = 64 << 10
#: Blocks that are looked at together for records that may be lost.
SPAN_BLOCKS = 8192


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
        self._window = memoryview(bytearray(0))
        self._filled = self._asked = _NO_WINDOW

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
        done = 0
        while done < len(buffer):
            at, left = offset + done, len(buffer) - done
            step = min(left, WINDOW_BYTES - at % WINDOW_BYTES)
            piece = buffer[done : done + step]
            if step == WINDOW_BYTES or not self._from_window(at, piece):
                self._read(at, piece)
            done += step

    def _from_window(self, offset: int, buffer: memoryview) -> bool:
        """Answer a part of a window, if it was put together already or reads in order will probably want all of it.

        Finding records takes as long for 128 KiB, which is what loop devices ask for, as for all of a window.  What a
        view shows never changes.
        """
        number, at = divmod(offset, WINDOW_BYTES)
        if number != self._filled:
            in_order = len(buffer) >= IN_ORDER_BYTES and number in (self._filled + 1, self._asked)
            self._asked = number
            if not in_order or not self._fill_window(number):
                return False
        buffer[:] = self._window[at : at + len(buffer)]
        return True

    def _fill_window(self, number: int) -> bool:
        start = number * WINDOW_BYTES
        if not len(self._window):
            self._window = memoryview(bytearray(WINDOW_BYTES))
        self._filled = _NO_WINDOW
        with contextlib.suppress(ExtsnapError, OSError):  # whoever asks for that very block hears of it
            self._read(start, self._window[: min(WINDOW_BYTES, self.size - start)])
            self._filled = number
        return self._filled == number

    def _read(self, offset: int, buffer: memoryview) -> None:
        """Put ``buffer`` together from the blocks that it covers."""
        size = self.engine.block_size
        first, skip = divmod(offset, size)
        blocks = np.arange(first, -(-(offset + len(buffer)) // size))
        if not skip and not len(buffer) % size:
            self.read_blocks(blocks, np.frombuffer(buffer, np.uint8).reshape(-1, size))
            return
        content = np.empty((len(blocks), size), np.uint8)
        self.read_blocks(blocks, content)
        buffer[:] = content.reshape(-1).data[skip : skip + len(buffer)]

    def read_blocks(self, blocks: Ints, content: Bits) -> None:
        """Fill ``content`` (uint8[n, block_size]) with ``blocks`` (sorted, at least one), zeros behind the end.

        Raises:
            DamagedCopy: A copy block fails its checksum.
        """
        if self.engine.lost:
            raise DamagedCopy(f"snapshot {self.snapshot.name!r} cannot be read: {self.engine.lost}")
        source, crcs = self._sources(blocks)
        base = np.flatnonzero(source == _BASE)
        if len(base):
            if self.engine.lost_parts:
                self._require_records(blocks[base])
            self._read_base(blocks, base, content)
        zero = np.flatnonzero(source == fmt.ZERO_COPY)
        if len(zero):
            content[zero] = 0
        copied = np.flatnonzero(source >= 0)
        if len(copied):
            self._read_copies(blocks, copied, source, crcs, content)

    def _require_records(self, blocks: Ints) -> None:
        """Refuse blocks (sorted) that seem to have no record because it may be lost."""
        lost = self.engine.lost_parts
        unknown = blocks[lost.covered(self.snapshot.bit, blocks)]
        if len(unknown):
            text = lost.texts[int(np.flatnonzero(lost.of(self.snapshot.bit))[0])]
            raise DamagedCopy(
                f"snapshot {self.snapshot.name!r}: whether block {int(unknown[0])} has a copy is lost: {text}",
                hint="run extsnap check to see what is affected",
            )

    def unknown_runs(self) -> Ints:
        """Runs (start block, length) of what cannot be read because its records may be lost: int64[n, 2]."""
        lost, end = self.engine.lost_parts, -(-self.size // self.engine.block_size)
        mine = lost.of(self.snapshot.bit)
        found = [np.zeros((0, 2), np.int64)]
        if not mine.any():
            return found[0]
        end = min(end, int(lost.end[mine].max()))
        for first in range(int(lost.first[mine].min()), end, SPAN_BLOCKS):
            blocks = np.arange(first, min(end, first + SPAN_BLOCKS))
            unknown = lost.covered(self.snapshot.bit, blocks)
            if unknown.any():
                unknown &= self._sources(blocks)[0] == _BASE
            found.append(runs_of(blocks[unknown]))
        return np.concatenate(found)

    def _sources(self, blocks: Ints) -> tuple[Ints, npt.NDArray[np.uint32]]:
        """Where the content of sorted blocks is.

        Returns:
            (int64[n]: logical block of the copy, or ZERO_COPY, or _BASE; uint32[n]: checksums of the copies).
        """
        engine = self.engine
        preserved = engine.history.preserved_at(self.id, blocks + engine.shift)
        source = np.where(preserved, _BASE, fmt.ZERO_COPY)
        crcs = np.zeros(len(blocks), np.uint32)
        mine = engine.masks.has(self.snapshot.bit)
        found = []
        for level, which, record in engine.index.pairs(blocks):
            named = mine[level.mask[record]]
            found.append(which[named])
            named &= preserved[which]
            which, record = which[named], record[named]
            copy, at = level.copy[record], blocks[which] - level.block[record]
            copied = copy >= 0
            source[which] = np.where(copied, copy + at, fmt.ZERO_COPY)
            crcs[which[copied]] = level.crcs[level.crc_at[record[copied]] + at[copied]]
        if found:
            limits.require_once(blocks[np.sort(np.concatenate(found))], self.snapshot.name)
        return source, crcs

    def _read_base(self, blocks: Ints, base: Ints, content: Bits) -> None:
        """Read the blocks at ``base`` from the medium, what is between two that are near as well: it is overwritten."""
        engine, size = self.engine, self.engine.block_size
        gap = np.diff(base)
        cuts = np.flatnonzero((gap > GAP_BYTES // size) | (np.diff(blocks[base]) != gap)) + 1
        first, last = base[np.append(0, cuts)], base[np.append(cuts - 1, -1)]
        offsets = blocks[first] * size
        lengths = np.minimum((last + 1 - first) * size, engine.size - offsets)
        end = engine.size // size
        if blocks[base[-1]] >= end:  # the rest of a ragged last block
            content[base[blocks[base] >= end]] = 0
        engine.medium.read_pieces(Pieces(offsets, lengths, first * size, content.reshape(-1).data))

    def _read_copies(
        self, blocks: Ints, copied: Ints, source: Ints, crcs: npt.NDArray[np.uint32], content: Bits
    ) -> None:
        """Read the blocks at ``copied`` from their copies, and verify them."""
        logical = source[copied]
        in_order = copied[-1] - copied[0] == len(copied) - 1 and bool((logical[1:] > logical[:-1]).all())
        if not in_order:
            copied = copied[np.argsort(logical, kind="stable")]
        place = content[copied[0] : copied[-1] + 1] if in_order else None
        copies = self.engine.store.read_blocks(source[copied], place)
        bad = np.flatnonzero(fmt.crcs(copies) != crcs[copied])
        if len(bad):
            raise DamagedCopy(
                f"snapshot {self.snapshot.name!r}: the copy of block {int(blocks[copied[bad[0]]])} fails its checksum",
                hint="run extsnap check to see what is affected",
            )
        if not in_order:
            content[copied] = copies

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
