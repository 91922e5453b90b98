"""Bits for every block of a volume, kept row by row: rows that are all clear or all set take no memory.

A volume of 16 TiB has 2^32 blocks: half a gibibyte for each plain bit array, of which an opened volume needs several.
Almost all block groups are uniform, so a row (a block group, as a rule) is a number: `CLEAR`, `SET`, or the place of
its bitmap in a pool that holds the mixed rows only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from bitarray import bitarray

from extsnap import arrays
from extsnap.arrays import Bits, Ints, bitmap_runs, distinct, expand, merge_runs

CLEAR, SET = 0, 1
#: Mixed rows worked on at once.
PART_ROWS = 2048


def parts(rows: Ints) -> Iterator[Ints]:
    """``rows`` in pieces whose bitmaps may be in memory at once."""
    for low in range(0, len(rows), PART_ROWS):
        yield rows[low : low + PART_ROWS]


def runs_of_rows(rows: Ints, bitmaps: Bits) -> Ints:
    """Runs (start, length) of the bits that are set in sorted ``rows``, whose bitmaps are uint8[n, row_bytes]."""
    bits = bitmaps.shape[1] * 8
    found = bitmap_runs(bitmaps.reshape(-1), len(rows) * bits)
    # Here rows stand side by side that may not be neighbours: cut at the end of each, then joined where they touch.
    first, last = found[:, 0] // bits, (found.sum(axis=1) - 1) // bits
    count = last - first + 1
    row = expand(first, count)
    start = np.maximum(np.repeat(found[:, 0], count), row * bits)
    end = np.minimum(np.repeat(found.sum(axis=1), count), (row + 1) * bits)
    return merge_runs(np.stack([start + (rows[row] - row) * bits, end - start], axis=1))


class SparseBits:
    """``rows`` * ``row_bytes`` * 8 bits, all clear at first, little-endian within bytes.

    Memory: 4 bytes a row, and ``row_bytes`` for each mixed one.  A row that becomes uniform bit by bit stays mixed
    until `tidy`; one that is set or cleared whole is uniform at once.

    Positions are bit numbers; runs are int64[n, 2] of (start, length) and may overlap.

    Example:
        >>> bits = SparseBits(rows=4, row_bytes=8)
        >>> bits.set(np.array([[60, 100]]))
        >>> bits.any(0, 60), bits.count(0, 256), bits.mixed_rows().tolist()
        (False, 100, [0, 2])
    """

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.rows = rows
        self.row_bytes = row_bytes
        self._row_bits = row_bytes * 8
        # The same numbers twice: an array.array is read one at a time, at a third of what numpy takes for it.
        self._places = array("i", bytes(4 * max(1, rows)))
        self._slot: npt.NDArray[np.int32] = np.frombuffer(self._places, np.int32)[:rows]
        pool = np.zeros((2, row_bytes), np.uint8)
        pool[SET] = 0xFF
        self._set_pool(pool)
        self._used = 2
        self._free: Ints = np.zeros(0, np.int64)

    @classmethod
    def of(cls, runs: Ints, rows: int, row_bytes: int) -> SparseBits:
        """With the bits of ``runs`` set."""
        bits = cls(rows, row_bytes)
        bits.set(runs)
        return bits

    def _set_pool(self, pool: Bits) -> None:
        self._pool = pool
        self._flat = pool.reshape(-1)
        self._bits = bitarray(buffer=self._flat, endian="little")

    # -- asking -----------------------------------------------------------------------------------------

    def any(self, start: int, stop: int) -> bool:
        """Whether a bit of [start, stop) is set.  The hot path of reads and writes: one row, as a rule."""
        bits = self._row_bits
        row = start // bits
        if stop > (row + 1) * bits:
            return self.count(start, stop) > 0
        slot = self._places[row]
        if slot <= SET:
            return slot == SET and stop > start
        move = (slot - row) * bits
        return self._bits.find(1, start + move, stop + move) >= 0

    def count(self, start: int, stop: int) -> int:
        """How many bits of [start, stop) are set."""
        row, at = divmod(start, self._row_bits)
        end = at + stop - start
        if end <= self._row_bits:
            slot = self._places[row]
            if slot <= SET:
                return (stop - start) * slot
            base = slot * self._row_bits
            return self._bits.count(1, base + at, base + end)
        first, last = row + 1, stop // self._row_bits
        found = self.count(start, first * self._row_bits) + self.count_rows(np.arange(first, last))
        return found + (self.count(last * self._row_bits, stop) if stop > last * self._row_bits else 0)

    def count_rows(self, rows: Ints) -> int:
        """How many bits of some rows are set."""
        slots = self._slot[rows]
        found = int((slots == SET).sum()) * self._row_bits
        for some in parts(slots[slots > SET].astype(np.int64)):
            found += int(np.bitwise_count(self._pool[some]).sum(dtype=np.int64))
        return found

    def total(self) -> int:
        """How many bits are set."""
        return self.count_rows(np.arange(self.rows))

    def test(self, positions: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: which of the bits at ``positions`` are set."""
        row = positions // self._row_bits
        return arrays.test_bits(self._flat, self._slot[row] * np.int64(self._row_bits) + positions % self._row_bits)

    def positions(self, start: int, stop: int) -> Ints:
        """Positions of the set bits in [start, stop): int64[n], sorted."""
        low = start // 8
        return arrays.set_positions(self[low : -(-stop // 8)], start - low * 8, stop - low * 8) + low * 8

    def __getitem__(self, window: slice) -> Bits:
        """Bytes [low, high) of the bitmap, as of one plain array; zeros behind its end."""
        low, high = int(window.start), int(window.stop)
        first, last = low // self.row_bytes, -(-high // self.row_bytes)
        rows = self._pool[self._slot[first:last]].reshape(-1)
        skip = first * self.row_bytes
        out = rows[low - skip : high - skip]
        return out if len(out) == high - low else np.concatenate([out, np.zeros(high - low - len(out), np.uint8)])

    def take(self, rows: Ints) -> Bits:
        """The bitmaps of some rows: uint8[n, row_bytes]."""
        return self._pool[self._slot[rows]]

    def runs(self, rows: Ints | None = None) -> Ints:
        """Runs (start, length) of the bits that are set, or of those in some rows, sorted: int64[n, 2]."""
        found = [runs_of_rows(some, self.take(some)) for some in parts(self.filled_rows() if rows is None else rows)]
        return merge_runs(np.concatenate(found)) if found else np.zeros((0, 2), np.int64)

    def mixed_rows(self) -> Ints:
        """Rows that have a bitmap of their own: int64[n], sorted."""
        return np.flatnonzero(self._slot > SET)

    def filled_rows(self) -> Ints:
        """Rows that are not known to be all clear: int64[n], sorted."""
        return np.flatnonzero(self._slot != CLEAR)

    def set_rows(self) -> Ints:
        """Rows that are known to be all set: int64[n], sorted."""
        return np.flatnonzero(self._slot == SET)

    def differing_rows(self, other: SparseBits) -> Ints:
        """Rows in which the bits of ``other``, of the same shape, are not the same: int64[n], sorted."""
        mixed = (self._slot > SET) | (other._slot > SET)
        found = [np.flatnonzero(~mixed & (self._slot != other._slot))]
        for some in parts(np.flatnonzero(mixed)):
            found.append(some[(self.take(some) != other.take(some)).any(axis=1)])
        return np.sort(np.concatenate(found))

    # -- changing ---------------------------------------------------------------------------------------

    def set_range(self, start: int, stop: int) -> None:
        """Set [start, stop): the hot path of `set`, for one short run."""
        row, at = divmod(start, self._row_bits)
        end = at + stop - start
        if end > self._row_bits:
            self.set(np.array([[start, stop - start]], np.int64))
            return
        slot = self._places[row]
        if slot == CLEAR:
            slot = self._mix(row)
        if slot > SET:
            base = slot * self._row_bits
            self._bits[base + at : base + end] = 1

    def mark(self, positions: Ints) -> None:
        """Set the bits at ``positions``, in any order: faster than `set` for a few hundred single ones."""
        self._put_bits(positions, True)

    def unmark(self, positions: Ints) -> None:
        """Clear the bits at ``positions``, in any order: as `mark` sets them."""
        self._put_bits(positions, False)

    def _put_bits(self, positions: Ints, value: bool) -> None:
        row = positions // self._row_bits
        slot = self._slot[row]
        if (slot <= SET).any():  # a row that has them all already stays what it is
            self._make_mixed(distinct(row[slot == int(not value)]))
            slot = self._slot[row]
        at = slot * np.int64(self._row_bits) + positions % self._row_bits
        arrays.set_bits(self._flat, at >> 3, np.left_shift(1, at & 7).astype(np.uint8), value)

    def set(self, runs: Ints, value: bool = True) -> None:
        """Set or clear the bits of ``runs``."""
        runs = runs[runs[:, 1] > 0]
        if not len(runs):
            return
        bits = self._row_bits
        start, end = runs[:, 0], runs[:, 0] + runs[:, 1]
        low, high = -(-start // bits), end // bits  # rows [low, high) are whole
        self._make_uniform(distinct(expand(low, np.maximum(high - low, 0))), value)
        head = np.stack([start, np.minimum(end, low * bits) - start], axis=1)
        behind = high >= low
        tail = np.stack([high * bits, end - high * bits], axis=1)[behind]
        pieces = np.concatenate([head, tail])
        pieces = pieces[pieces[:, 1] > 0]
        row = pieces[:, 0] // bits
        changes = self._slot[row] != int(value)
        pieces, row = pieces[changes], row[changes]
        if not len(pieces):
            return
        self._make_mixed(distinct(row))
        at = self._slot[row] * np.int64(bits) + pieces[:, 0] % bits
        arrays.set_runs(self._flat, np.stack([at, pieces[:, 1]], axis=1), value)

    def put(self, rows: Ints, bitmaps: Bits) -> None:
        """Give distinct ``rows`` the bitmaps uint8[n, row_bytes]; uniform ones are told apart."""
        clear, full = ~bitmaps.any(axis=1), (bitmaps == 0xFF).all(axis=1)
        self._make_uniform(rows[clear], False)
        self._make_uniform(rows[full], True)
        mixed = ~(clear | full)
        self._make_mixed(rows[mixed])
        self._pool[self._slot[rows[mixed]]] = bitmaps[mixed]

    def add(self, rows: Ints, bitmaps: Bits) -> None:
        """Set in distinct ``rows`` the bits of the bitmaps uint8[n, row_bytes] as well."""
        self.put(rows, self.take(rows) | bitmaps)

    def __ior__(self, other: SparseBits) -> SparseBits:
        """Set what is set in ``other``, of the same shape."""
        self._make_uniform(other.set_rows(), True)
        for some in parts(np.flatnonzero((other._slot > SET) & (self._slot != SET))):
            self.add(some, other.take(some))
        return self

    def __isub__(self, other: SparseBits) -> SparseBits:
        """Clear what is set in ``other``, of the same shape."""
        self._make_uniform(other.set_rows(), False)
        for some in parts(np.flatnonzero((other._slot > SET) & (self._slot != CLEAR))):
            self.put(some, self.take(some) & ~other.take(some))
        return self

    def tidy(self, rows: Ints | None = None) -> None:
        """Free the bitmaps of mixed rows, or of some ``rows``, that have become uniform."""
        rows = self.mixed_rows() if rows is None else rows[self._slot[rows] > SET]
        for some in parts(rows):
            bitmaps = self.take(some)
            self._make_uniform(some[~bitmaps.any(axis=1)], False)
            self._make_uniform(some[(bitmaps == 0xFF).all(axis=1)], True)

    def _make_uniform(self, rows: Ints, value: bool) -> None:
        """Make distinct ``rows`` all set or all clear; their bitmaps are free."""
        old = self._slot[rows]
        freed = old[old > SET].astype(np.int64)
        if len(freed):
            self._free = np.concatenate([self._free, freed])
        self._slot[rows] = int(value)

    def _mix(self, row: int) -> int:
        """`_make_mixed` for one row that is all clear; returns its place."""
        if len(self._free):
            slot, self._free = int(self._free[-1]), self._free[:-1]
        else:
            slot = self._used
            self._reserve(1)
            self._used += 1
        self._pool[slot] = 0
        self._places[row] = slot
        return slot

    def _reserve(self, count: int) -> None:
        """Make room for ``count`` more bitmaps."""
        if self._used + count > len(self._pool):
            pool = np.empty((max(self._used + count, 2 * len(self._pool)), self.row_bytes), np.uint8)
            pool[: self._used] = self._pool[: self._used]
            self._set_pool(pool)

    def _make_mixed(self, rows: Ints) -> None:
        """Give distinct ``rows`` bitmaps of their own, with the bits that they have."""
        rows = rows[self._slot[rows] <= SET]
        if not len(rows):
            return
        reused, self._free = self._free[: len(rows)], self._free[len(rows) :]
        missing = len(rows) - len(reused)
        self._reserve(missing)
        slots = np.concatenate([reused, np.arange(self._used, self._used + missing)])
        self._used += missing
        self._pool[slots] = np.where(self._slot[rows] == SET, np.uint8(0xFF), np.uint8(0))[:, None]
        self._slot[rows] = slots

    # -- other shapes -----------------------------------------------------------------------------------

    def copy(self) -> SparseBits:
        """Another one with the same bits."""
        return self.reshaped(self.rows, self.row_bytes)

    def reshaped(self, rows: int, row_bytes: int, shift: int = 0) -> SparseBits:
        """The same bits in rows of ``row_bytes``, a divisor of today's: row 0 begins ``shift`` rows further on.

        Rows before and behind are clear; those that have no place among ``rows`` are left out.  A negative shift
        leaves out rows at the start.
        """
        ratio = self.row_bytes // row_bytes
        new = SparseBits(rows, row_bytes)
        pool = self._pool[: self._used].copy()
        slots = self._slot.astype(np.int64)
        if ratio > 1:
            pieces = pool[2:].reshape(-1, row_bytes)
            pool = np.concatenate([new._pool, pieces])
            first = np.repeat(np.where(slots > SET, 2 + (slots - 2) * ratio, slots), ratio)
            slots = first + np.where(first > SET, np.tile(np.arange(ratio), len(self._slot)), 0)
        new._set_pool(pool)
        new._used = len(pool)
        low, high = max(0, shift), min(rows, len(slots) + shift)
        new._slot[low:high] = slots[low - shift : high - shift]
        kept = np.zeros(len(pool), np.bool_)
        kept[new._slot] = True
        new._free = 2 + np.flatnonzero(~kept[2:])
        if ratio > 1:
            new.tidy()
        return new
