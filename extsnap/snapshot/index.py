"""The record index: which blocks of the base volume have copies, where, and for which snapshots.

Records are runs.  They live in *levels*, each sorted by first block and immutable but for the write counts;
a new batch is a new level, and neighbouring levels of like size are merged, so a lookup visits a number of
levels logarithmic in the number of records and an insertion costs amortised logarithmic time.

All work is vectorised: a lookup takes a range, or a whole sorted array of blocks, at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints, breaks_to_runs, expand, jumps
from extsnap.snapshot.format import RECORD_DTYPE, ZERO_COPY

Crcs = npt.NDArray[np.uint32]

#: Longest run of one record, in blocks.  It bounds what a merge or a damaged record can cost.
RUN_MAX = 1024
#: Records, or checksums, worked on at once where all of them are; as many are whole blocks of the store.
PART_RECORDS = 1 << 18
_MOST_NOTES = 1 << 16  # writes that are noted and not counted yet
#: The write count of a record saturates here.
WRITES_MAX = 0xFFFFFFFF


@dataclass
class Level:
    """A sorted batch of records, column by column; all arrays have one element a record.

    Attributes:
        block: int64, first block of the base volume.
        length: int64, blocks.
        copy: int64, first logical block of the copies, or ZERO_COPY.
        mask: uint32, mask id.
        writes: int64, writes to the run since the record was made, this one included.
        crcs: uint32, crc32c of every copy block, in the order of the records; zero records have none.
        stored: Key of the blob that holds this level, or -1 where only the log does.
        touched: Whether write counts moved since it was stored.
    """

    block: Ints
    length: Ints
    copy: Ints
    mask: npt.NDArray[np.uint32]
    writes: Ints
    crcs: Crcs
    stored: int = -1
    touched: bool = False

    def __post_init__(self) -> None:
        self.reach = self.block + self.length
        np.maximum.accumulate(self.reach, out=self.reach)
        copied = self.length * (self.copy != ZERO_COPY)
        self.crc_at = np.cumsum(copied)
        self.crc_at -= copied

    def __len__(self) -> int:
        return len(self.block)

    @classmethod
    def empty(cls) -> Level:
        """A level without records."""
        zero = np.zeros(0, np.int64)
        return cls(zero, zero, zero, np.zeros(0, np.uint32), zero, np.zeros(0, np.uint32))

    @classmethod
    def parse(cls, table: np.ndarray[tuple[int], np.dtype[np.void]], crcs: Crcs, stored: int = -1) -> Level:
        """From the on-disk table (RECORD_DTYPE) and its checksums."""
        return cls(
            table["block"].astype(np.int64),
            table["length"].astype(np.int64),
            table["copy"].astype(np.int64),
            table["mask"].astype(np.uint32),
            table["writes"].astype(np.int64),
            crcs.astype(np.uint32),
            stored,
        )

    @classmethod
    def gather(
        cls,
        records: int,
        tables: Iterable[np.ndarray[tuple[int], np.dtype[np.void]]],
        crcs: Crcs,
        stored: int,
    ) -> Level:
        """From ``records`` entries that come in pieces, column by column, and the checksums."""
        names = ("block", "length", "copy", "mask", "writes")
        kinds = (np.int64, np.int64, np.int64, np.uint32, np.int64)
        columns: list[npt.NDArray[Any]] = [np.empty(records, kind) for kind in kinds]
        at = 0
        for table in tables:
            for name, column in zip(names, columns, strict=True):
                column[at : at + len(table)] = table[name]
            at += len(table)
        return cls(columns[0], columns[1], columns[2], columns[3], columns[4], crcs, stored)

    def parts(self) -> Iterator[slice]:
        """Slices of the records that are small enough for work that takes memory for each block."""
        for low in range(0, len(self), PART_RECORDS):
            yield slice(low, low + PART_RECORDS)

    def copies(self, part: slice = slice(None)) -> Ints:
        """Logical blocks of the copies of some records, in their order: int64[n]."""
        copied = self.copy[part] >= 0
        return expand(self.copy[part][copied], self.length[part][copied])

    def build(self, part: slice = slice(None)) -> bytes:
        """The on-disk table of some records; a record counts at least the write that made it."""
        table = np.zeros(len(self.block[part]), RECORD_DTYPE)
        table["block"], table["length"], table["copy"] = self.block[part], self.length[part], self.copy[part]
        table["mask"], table["writes"] = self.mask[part], np.clip(self.writes[part], 1, WRITES_MAX)
        return table.tobytes()

    def take(self, which: Ints) -> Level:
        """The records at the given positions, in that order."""
        copied = np.where(self.copy[which] == ZERO_COPY, 0, self.length[which])
        return Level(
            self.block[which],
            self.length[which],
            self.copy[which],
            self.mask[which],
            self.writes[which],
            self.crcs[expand(self.crc_at[which], copied)],
        )

    def without(self, blocks: Ints, which: npt.NDArray[np.bool_]) -> Level:
        """The records with ``blocks`` (sorted, at least one) cut out of those for which ``which`` (bool[n]) holds.

        A run that loses blocks in its middle becomes several.  A run that loses its head may begin behind another
        one that overlaps it (records of other snapshots do), so the level is sorted again.
        """
        owner = np.repeat(np.arange(len(self)), self.length)
        block = expand(self.block, self.length)
        drop = which[owner] & (blocks[np.minimum(np.searchsorted(blocks, block), len(blocks) - 1)] == block)
        if not drop.any():
            return self
        offset = block - self.block[owner]
        keep = ~drop
        owner, block, offset = owner[keep], block[keep], offset[keep]
        new = (np.diff(owner, prepend=-1) != 0) | jumps(block)
        first, length = breaks_to_runs(new, RUN_MAX)
        record, shift = owner[first], offset[first]
        copy = np.where(self.copy[record] == ZERO_COPY, ZERO_COPY, self.copy[record] + shift)
        copied = np.where(copy == ZERO_COPY, 0, length)
        crcs = self.crcs[expand(self.crc_at[record] + shift, copied)]
        cut = Level(self.block[record] + shift, length, copy, self.mask[record], self.writes[record], crcs)
        return cut.take(np.argsort(cut.block, kind="stable"))


def gathered(copies: int, pieces: Iterable[Crcs]) -> Crcs:
    """``copies`` checksums that come in pieces, as one array."""
    joined = np.empty(copies, np.uint32)
    at = 0
    for piece in pieces:
        joined[at : at + len(piece)] = piece
        at += len(piece)
    return joined


def merge(levels: list[Level]) -> Level:
    """One level with the records of all, sorted by block; order among equal blocks is kept."""
    filled = [level for level in levels if len(level)]
    if not filled:
        return Level.empty()
    if len(filled) == 1:
        return filled[0]
    starts = np.cumsum([0] + [len(level.crcs) for level in filled[:-1]])
    block = np.concatenate([level.block for level in filled])
    length = np.concatenate([level.length for level in filled])
    copy = np.concatenate([level.copy for level in filled])
    crc_at = np.concatenate([level.crc_at + start for level, start in zip(filled, starts, strict=True)])
    crcs = np.concatenate([level.crcs for level in filled])
    order = np.argsort(block, kind="stable")
    copied = np.where(copy == ZERO_COPY, 0, length)
    return Level(
        block[order],
        length[order],
        copy[order],
        np.concatenate([level.mask for level in filled])[order],
        np.concatenate([level.writes for level in filled])[order],
        crcs[expand(crc_at[order], copied[order])],
    )


class Index:
    """All records, as levels from the oldest and largest to the newest."""

    def __init__(self, levels: list[Level] | None = None) -> None:
        self.levels = [level for level in levels or [] if len(level)]
        self._written: list[tuple[int, int]] = []
        self._written_runs: list[Ints] = []
        self._noted_runs = 0

    def __len__(self) -> int:
        return sum(len(level) for level in self.levels)

    def extent(self, *, unfolded: int) -> tuple[int, int]:
        """(records, checksums) of all levels; those that are only in the log count ``unfolded`` times."""
        records = crcs = 0
        for level in self.levels:
            times = 1 if level.stored >= 0 else unfolded
            records += times * len(level.block)
            crcs += times * len(level.crcs)
        return records, crcs

    def add(self, level: Level) -> None:
        """Take a batch in, merging levels that live only in the log and are of like size."""
        if not len(level):
            return
        self.apply_writes()
        self.levels.append(level)
        while len(self.levels) > 1 and self.levels[-2].stored < 0 and len(self.levels[-2]) < 2 * len(self.levels[-1]):
            last = self.levels.pop()
            self.levels[-1] = merge([self.levels[-1], last])

    def replace(self, levels: list[Level]) -> None:
        """Put other levels in the place of all."""
        self.levels = [level for level in levels if len(level)]

    def in_range(self, start: int, stop: int) -> Level:
        """The records that touch [start, stop), whole."""
        found = []
        for level in self.levels:
            low = int(np.searchsorted(level.reach, start, "right"))
            high = int(np.searchsorted(level.block, stop, "left"))
            if low < high:
                which = low + np.flatnonzero(level.block[low:high] + level.length[low:high] > start)
                if len(which):
                    found.append(level.take(which))
        return merge(found)

    def next_block(self, first: int) -> int | None:
        """The first block from ``first`` on that a record touches; None if there is none."""
        found = []
        for level in self.levels:
            low = int(np.searchsorted(level.reach, first, "right"))
            if low < len(level):
                found.append(max(first, int(level.block[low])))
        return min(found, default=None)

    def pairs(self, blocks: Ints) -> list[tuple[Level, Ints, Ints]]:
        """For sorted ``blocks``: per level (level, i, record), record covering ``blocks[i]``."""
        found = []
        for level in self.levels:
            low = np.searchsorted(level.reach, blocks, "right")
            high = np.searchsorted(level.block, blocks, "right")
            count = np.maximum(high - low, 0)
            which = np.repeat(np.arange(len(blocks)), count)
            record = expand(low, count)
            hit = level.block[record] + level.length[record] > blocks[which]
            if hit.any():
                found.append((level, which[hit], record[hit]))
        return found

    def count_write(self, start: int, length: int) -> None:
        """Note that ``length`` blocks from ``start`` were written again; applied in bulk later."""
        self._written.append((start, length))
        if len(self._written) >= _MOST_NOTES:
            self.apply_writes()

    def count_writes(self, runs: Ints) -> None:
        """The same for runs of blocks: int64[n, 2], start and length."""
        self._written_runs.append(runs)
        self._noted_runs += len(runs)
        if self._noted_runs >= _MOST_NOTES:
            self.apply_writes()

    def apply_writes(self) -> None:
        """Add the noted writes to the counts of the records that they touch."""
        if not self._written and not self._written_runs:
            return
        noted = np.concatenate([np.array(self._written, np.int64).reshape(-1, 2), *self._written_runs])
        self._written, self._written_runs, self._noted_runs = [], [], 0
        for level in self.levels:
            low = np.searchsorted(level.reach, noted[:, 0], "right")
            high = np.searchsorted(level.block, noted[:, 0] + noted[:, 1], "left")
            count = np.maximum(high - low, 0)
            record = expand(low, count)
            hit = level.block[record] + level.length[record] > np.repeat(noted[:, 0], count)
            if hit.any():
                np.add.at(level.writes, record[hit], 1)
                level.touched = True
