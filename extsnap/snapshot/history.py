"""Which blocks every snapshot preserves, group by group, through time.

The preserved bitmap of a snapshot is cut into *group rows*: one row for each block group of the filesystem,
and one before the first group where `s_first_data_block` is not 0.  A table says for each row from which
snapshot on it has which bitmap; a row that did not change since the snapshot before has no entry, and a row
of all zeros or all ones has no bitmap in the store.  So a snapshot costs what changed.

A *position* is a block number plus `shift`, so that every ext group starts at a multiple of the row length.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Bits, Ints, distinct, test_bits
from extsnap.errors import StoreDamaged
from extsnap.snapshot import format as fmt
from extsnap.snapshot.format import ALL_CLEAR, ALL_SET
from extsnap.snapshot.masks import Words, mask_of
from extsnap.sparsebits import SparseBits, parts

Write = Callable[[Ints, Bits], None]

#: Group rows kept unpacked for the write path, at most this many bytes.
CACHE_BYTES = 64 << 20
#: Bitmaps kept for reading views in order.
LAST_BITMAPS = 16


class History:
    """The preserved bitmaps of all snapshots.

    Args:
        rows: Number of group rows.
        row_bytes: Bytes of one row's bitmap (blocks per group / 8).
        table: HISTORY_DTYPE entries, in any order.
        read: Reads logical blocks of the store: (int64[n]) -> uint8[n, block_size].
        twins: Logical blocks of the second copies of the bitmaps, one an entry; -1: there is none.
    """

    def __init__(
        self,
        rows: int,
        row_bytes: int,
        table: npt.NDArray[np.void],
        read: Callable[[Ints], npt.NDArray[np.uint8]],
        twins: Ints | None = None,
    ) -> None:
        self.rows = rows
        self.row_bytes = row_bytes
        self._read = read
        self._cache: OrderedDict[int, tuple[Bits, Words]] = OrderedDict()
        self._last: dict[int, Bits] = {}  # by entry: the bitmaps that views were read by last
        self._alive: list[tuple[int, int]] = []
        self._words = 1
        if len(table) and int(table["row"].max()) >= rows:
            raise StoreDamaged("history: an entry names a group that the volume does not have")
        self.worn = False
        self._set_table(np.array(table, fmt.HISTORY_DTYPE), np.full(len(table), -1) if twins is None else twins)

    def _set_table(self, table: npt.NDArray[np.void], twins: Ints) -> None:
        if len(twins) != len(table) or (table["ref"][twins >= 0] < 0).any():
            raise StoreDamaged("history: the second copies are not those of its entries")
        order = np.lexsort((table["id"], table["row"]))
        self.table = table[order]
        self.twins = twins[order]
        self._row = self.table["row"].astype(np.int64)
        self._id = self.table["id"].astype(np.int64)
        self._ref = self.table["ref"].astype(np.int64)
        self._crc = self.table["crc"].astype(np.int64)
        self._bounds = np.searchsorted(self._row, np.arange(self.rows + 1))
        self._cache.clear()
        self._last.clear()

    def reaches(self, rows: int) -> bool:
        """Whether an entry lies behind the first ``rows`` rows."""
        return bool(len(self._row)) and int(self._row.max()) >= rows

    def resize(self, rows: int) -> None:
        """The volume has ``rows`` group rows now; no snapshot preserves anything in those that come or go."""
        self.rows = rows
        self._set_table(self.table, self.twins)

    def set_alive(self, alive: list[tuple[int, int]], words: int) -> None:
        """Name the snapshots that count, as (id, bit), and the width of masks."""
        self._alive, self._words = sorted(alive), words
        self._cache.clear()

    def refs_in_use(self) -> Ints:
        """Logical blocks that hold bitmaps, second copies included: int64[n], sorted, each once."""
        return distinct(np.concatenate([self._ref[self._ref >= 0], self.twins[self.twins >= 0]]))

    def stored(self) -> Ints:
        """The entries whose bitmap stands in the store."""
        return np.flatnonzero(self._ref >= 0)

    def are_whole(self, entries: Ints, blocks: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: whether logical ``blocks`` hold the bitmaps of ``entries``."""
        found = self._read(blocks)[:, : self.row_bytes]
        crcs = np.array([fmt.crc(bitmap.tobytes()) for bitmap in found], np.int64)
        return np.asarray(crcs == self._crc[entries])

    def ids_of(self, entries: Ints, ids: list[int]) -> list[int]:
        """Those of the snapshots ``ids`` that one of ``entries`` is in force for."""
        return [number for number in ids if np.isin(entries, self._entries_at(number)[1]).any()]

    # -- reading ----------------------------------------------------------------------------------------

    def _entries_at(self, snapshot_id: int) -> tuple[Ints, Ints]:
        """(rows, entries): of each row that has one, the entry in force at ``snapshot_id``."""
        known = np.flatnonzero(self._id <= snapshot_id)
        if not len(known):
            return known, known
        rows = self._row[known]
        last = np.append(np.diff(rows) != 0, True)
        return rows[last], known[last]

    def _load(self, entries: Ints, out: Bits) -> None:
        """Fill ``out`` (uint8[n, row_bytes]) with the bitmaps of ``entries``, checksums verified."""
        refs = self._ref[entries]
        out[refs == ALL_SET] = 0xFF
        out[refs == ALL_CLEAR] = 0
        stored = np.flatnonzero(refs >= 0)
        for start in range(0, len(stored), 4096):  # bounded memory: a batch of blocks at a time
            which = stored[start : start + 4096]
            blocks = self._read(refs[which])[:, : self.row_bytes]
            crcs = np.array([fmt.crc(bitmap.tobytes()) for bitmap in blocks], np.int64)
            bad = np.flatnonzero(crcs != self._crc[entries[which]])
            if len(bad):
                blocks[bad] = self._second(entries[which[bad]])
            out[which] = blocks

    def _second(self, entries: Ints) -> Bits:
        """The bitmaps of ``entries`` from their second copies."""
        whole = self.twins[entries] >= 0
        whole[whole] = self.are_whole(entries[whole], self.twins[entries[whole]])
        if not whole.all():
            lost = entries[~whole][0]
            raise StoreDamaged(
                f"the preserved bitmap of group row {self._row[lost]} (snapshot id {self._id[lost]}) fails its checksum"
            )
        self.worn = True
        return self._read(self.twins[entries])[:, : self.row_bytes]

    def assemble(self, snapshot_id: int) -> SparseBits:
        """The whole preserved bitmap of one snapshot."""
        return self._together(self._entries_at(snapshot_id)[1])

    def union(self) -> SparseBits:
        """Blocks that any living snapshot preserves."""
        used = np.zeros(len(self._row), np.bool_)
        for snapshot_id, _ in self._alive:
            used[self._entries_at(snapshot_id)[1]] = True
        return self._together(np.flatnonzero(used))

    def _together(self, entries: Ints) -> SparseBits:
        """Blocks that any of ``entries``, sorted, preserves."""
        per_row = self.row_bytes * 8
        whole = self._row[entries[self._ref[entries] == ALL_SET]]
        out = SparseBits(self.rows, self.row_bytes)
        out.set(np.stack([whole * per_row, np.full_like(whole, per_row)], axis=1))
        for part in parts(entries[self._ref[entries] >= 0]):
            loaded = np.zeros((len(part), self.row_bytes), np.uint8)
            self._load(part, loaded)
            rows = self._row[part]
            # A row may have several bitmaps, which stand side by side: the first of each row, the second, ...
            first = np.flatnonzero(np.diff(rows, prepend=-1))
            rank = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))
            for number in range(int(rank.max()) + 1):
                which = rank == number
                out.add(rows[which], loaded[which])
        return out

    def _group(self, row: int) -> tuple[Bits, Words]:
        """(bitmaps uint8[d, row_bytes], masks uint64[d, words]): the distinct bitmaps of a row and who has them."""
        cached = self._cache.get(row)
        if cached is not None:
            self._cache.move_to_end(row)
            return cached
        low, high = int(self._bounds[row]), int(self._bounds[row + 1])
        ids = self._id[low:high]
        users: dict[int, list[int]] = {}
        for snapshot_id, bit in self._alive:
            entry = int(np.searchsorted(ids, snapshot_id, "right")) - 1
            if entry >= 0 and self._ref[low + entry] != ALL_CLEAR:
                users.setdefault(low + entry, []).append(bit)
        entries = np.array(list(users), np.int64)
        bitmaps = np.zeros((len(entries), self.row_bytes), np.uint8)
        self._load(entries, bitmaps)
        masks = np.zeros((len(entries), self._words), np.uint64)
        for index, bits in enumerate(users.values()):
            masks[index] = mask_of(bits, self._words)
        self._cache[row] = (bitmaps, masks)
        limit = max(16, CACHE_BYTES // max(1, self.row_bytes * max(1, len(self._alive))))
        while len(self._cache) > limit:
            self._cache.popitem(last=False)
        return bitmaps, masks

    def masks_at(self, positions: Ints) -> Words:
        """For sorted positions, which living snapshots preserve them: uint64[n, words]."""
        out = np.zeros((len(positions), self._words), np.uint64)
        if not len(positions) or not self._alive:
            return out
        per_row = self.row_bytes * 8
        rows = positions // per_row
        first = np.flatnonzero(np.diff(rows, prepend=-1))
        ends = np.append(first[1:], len(positions))
        for start, end in zip(first.tolist(), ends.tolist(), strict=True):  # rows touched by one batch
            row = int(rows[start])
            bitmaps, masks = self._group(row)
            within = positions[start:end] - row * per_row
            for bitmap, mask in zip(bitmaps, masks, strict=True):
                out[start:end][test_bits(bitmap, within)] |= mask
        return out

    def preserved_at(self, snapshot_id: int, positions: Ints) -> npt.NDArray[np.bool_]:
        """For sorted positions, which of them a snapshot preserves: bool[n]."""
        per_row = self.row_bytes * 8
        out = np.zeros(len(positions), np.bool_)
        rows = positions // per_row
        first = np.flatnonzero(rows[1:] != rows[:-1]) + 1
        bounds = [0, *first.tolist(), len(positions)]
        for start, end in pairwise(bounds):  # rows touched by one request: one, seldom two
            row = int(rows[start])
            low, high = int(self._bounds[row]), int(self._bounds[row + 1])
            entry = low + int(self._id[low:high].searchsorted(snapshot_id, "right")) - 1
            if entry >= low:
                out[start:end] = test_bits(self._bitmap(entry), positions[start:end] - row * per_row)
        return out

    def _bitmap(self, entry: int) -> Bits:
        """uint8[row_bytes]: one bitmap.  A view is read in order: its next piece is in the same row."""
        found = self._last.get(entry)
        if found is None:
            loaded = np.zeros((1, self.row_bytes), np.uint8)
            self._load(np.array([entry]), loaded)
            while len(self._last) >= LAST_BITMAPS:
                self._last.pop(next(iter(self._last)))
            found = self._last[entry] = loaded[0]
        return found

    # -- writing ----------------------------------------------------------------------------------------

    def changed_rows(self, latest_id: int, bits: SparseBits) -> tuple[Ints, Ints]:
        """Rows in which ``bits`` (tidy) differ from those of ``latest_id``, and which of these need a block."""
        rows = self.assemble(latest_id).differing_rows(bits)
        return rows, np.intersect1d(rows, bits.mixed_rows(), assume_unique=True)

    def add(self, snapshot_id: int, rows: Ints, bits: SparseBits, refs: Ints, write: Write) -> None:
        """From ``snapshot_id`` on, ``rows`` are as in ``bits`` (tidy).

        Args:
            refs: Logical blocks for the rows that are mixed, in order: first all bitmaps, then all second copies.
            write: Fills logical blocks: (int64[n], uint8[n, row_bytes]).
        """
        new = np.zeros(len(rows), fmt.HISTORY_DTYPE)
        new["id"], new["row"] = snapshot_id, rows
        new["ref"] = np.where(np.isin(rows, bits.set_rows()), ALL_SET, ALL_CLEAR)
        stored = np.flatnonzero(np.isin(rows, bits.mixed_rows()))
        first, second = refs[: len(stored)], refs[len(stored) :]
        twins = np.full(len(rows), -1)
        new["ref"][stored], twins[stored] = first, second
        for some in parts(np.arange(len(stored))):
            bitmaps = bits.take(rows[stored[some]])
            write(first[some], bitmaps)
            write(second[some], bitmaps)
            new["crc"][stored[some]] = [fmt.crc(bitmap.data) for bitmap in bitmaps]
        self._set_table(np.concatenate([self.table, new]), np.concatenate([self.twins, twins]))

    def collect(self) -> Ints:
        """Drop the entries that no living snapshot sees; returns the logical blocks that nobody refers to now."""
        before = self.refs_in_use()
        keep = np.zeros(len(self._row), np.bool_)
        for snapshot_id, _ in self._alive:
            keep[self._entries_at(snapshot_id)[1]] = True
        self._set_table(self.table[keep], self.twins[keep])
        return np.setdiff1d(before, self.refs_in_use())
