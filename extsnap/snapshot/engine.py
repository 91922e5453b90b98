"""The write path of the base volume: copy first, record, barrier, overwrite.

    state of a block      read from        a write to it
    plain                 medium           straight to the medium
    needed                medium           held in memory; its old content is copied when the hold is committed
    held                  the hold         held too, behind the earlier one
    hidden                zeros            needed, so held; see `hidden`
    the store's data      zeros            refused (EIO)
    a superblock          medium, freed of guard, mark and pointer

What is durable when (`commit`, run by a full hold, by `flush` and by every command):
 1. old content -> copy blocks, much of it while writes still come (`extsnap.snapshot.copies`), records -> log;
    nothing else changed yet.  Long runs are shared by the host where it can (reflink): until the barrier such a copy
    may be missing after a crash like one that was written
 2. barrier                   a crash before it leaves a batch that may be valid with copies that are not;
                              then the base blocks still are what the batch's checksums say (nothing was overwritten)
 3. overwrites of the base    a crash from here on leaves any part of them, and every old block in its copy
 4. `flush` adds a barrier    now the overwrites are durable too
A held write that a crash takes was never acknowledged as durable: that is what a volatile write cache may do.

``need`` is a superset: a set bit sends a write down the slow path, which decides exactly and clears it.
Everything runs in one thread, so "suspending writes" is: another method of this object is running.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from extsnap.arrays import (
    Bits,
    Ints,
    breaks_to_runs,
    differing_rows,
    distinct,
    expand,
    filled_rows,
    jumps,
    runs_of,
    set_positions,
)
from extsnap.blockdev.base import Buffer, Pieces, where, write_pieces
from extsnap.errors import DamagedCopy, StoreDamaged, StoreProtected, VolumeFull
from extsnap.snapshot import blobs, hidden, limits
from extsnap.snapshot import format as fmt
from extsnap.snapshot.copies import Copies, records
from extsnap.snapshot.hidden import Hidden
from extsnap.snapshot.history import History
from extsnap.snapshot.index import RUN_MAX, Index, Level, merge
from extsnap.snapshot.masks import MaskTable, mask_of, words_for
from extsnap.snapshot.medium import Medium
from extsnap.snapshot.parts import BYTES_A_RECORD, Lost, table_bytes
from extsnap.snapshot.root import NO_BLOCKS
from extsnap.snapshot.store import Store
from extsnap.sparsebits import SparseBits

if TYPE_CHECKING:
    from extsnap.snapshot.vital import Vital

#: Rows of bits that are looked at after a commit, for those that are all clear by then.
_FEW_ROWS = 4
HOLD_BYTES = 32 << 20
HOLD_ENTRIES = 16384
#: What a record of one block takes in the index, its checksum included.
_RECORD_BYTES: int = fmt.RECORD_DTYPE.itemsize + 4
#: The same with the second copy that every blob has, and its share of the table of parts; and once more, because a fold
#: writes anew what is there until its commit.
_INDEX_BYTES: int = 2 * (2 * _RECORD_BYTES + math.ceil(2 * BYTES_A_RECORD))
#: So many bytes of held writes have what they need copied written at once, before the hold is committed.
EARLY_BYTES = 4 << 20
#: Largest piece of one write that is taken into the hold at once.
PIECE_BYTES = 4 << 20


class Engine:
    """Reads and writes of the base volume above its snapshots.

    Args:
        medium: The device below, superblocks translated.
        store: The opened store.
        row_blocks: Blocks of a row of bits, a multiple of 8: as many as a group has clusters.
        first_data_block: Of the filesystem.
        snapshots: The living snapshots.

    Attributes:
        spared: Blocks of the store that writes leave alone, so that its own next edit (growth) has room.
        vital: What the last of the room is kept for, if anything.
        lost: What of the records could not be read, both copies being damaged; "": nothing.  Then no view can be read.
        lost_parts: Parts of the index that could not be read: some views cannot be read in some places.
    """

    def __init__(
        self, medium: Medium, store: Store, row_blocks: int, first_data_block: int, snapshots: list[fmt.Snapshot]
    ) -> None:
        self.medium = medium
        self.store = store
        self.block_size = store.block_size
        self._bits = self.block_size.bit_length() - 1
        self.size = medium.size
        self.blocks = -(-self.size // self.block_size)
        self.shift = -first_data_block % row_blocks
        self.row_bytes = row_blocks // 8
        self.rows = -(-(self.blocks + self.shift) // row_blocks)
        self.index = Index()
        self.masks = MaskTable()
        self._masks_stored = 0
        self.history = History(self.rows, self.row_bytes, np.zeros(0, fmt.HISTORY_DTYPE), store.read_blocks)
        self.need = SparseBits(self.rows, self.row_bytes)
        self._special = SparseBits(self.rows, self.row_bytes)
        self._owned = SparseBits(self.rows, self.row_bytes)
        self.hidden = Hidden(self.rows, self.row_bytes)
        self._superblocks = np.array([], np.int64)
        self._arena = memoryview(bytearray(0))
        self._held: list[tuple[int, int, int]] = []  # (position, blocks, offset in the arena), in order of arrival
        self._held_bytes = 0
        self._held_cost = 0
        self._copied = 0  # as many of the held entries have had what they need copied written
        self._copied_bytes = 0  # up to there in the arena
        self._copies = Copies(self)
        self._overwrites_due = False
        self.recovered_batch: Level | None = None
        self.spared = 0
        self._is_own_edit = False
        self.vital: Vital | None = None
        self.lost = ""
        self.lost_parts = Lost()
        self.set_snapshots(snapshots)

    # -- state ------------------------------------------------------------------------------------------

    def set_snapshots(self, snapshots: list[fmt.Snapshot]) -> None:
        """Name the living snapshots; masks and history follow."""
        self.snapshots = snapshots
        top = max([self.store.root.counting.bit_length() - 1, 0])
        self.masks.widen(words_for(top))
        self.alive = mask_of([snapshot.bit for snapshot in snapshots], self.masks.words)
        self.lost_parts = self.lost_parts.only(self.alive)
        self.history.set_alive([(snapshot.id, snapshot.bit) for snapshot in snapshots], self.masks.words)

    def load(self) -> None:
        """Read masks, history, index and log of the store."""
        store = self.store
        self.masks = blobs.read_masks(store)
        self._masks_stored = self.masks.count
        self.index = Index(sorted(map(self._read_level, self._keys()), key=len, reverse=True))
        self.history = blobs.read_history(store, self.rows, self.row_bytes)
        hidden.load(self, blobs.read_hidden(store))
        for batch in store.replay_log():
            hidden.load(self, batch.hides, batch.shows)
            if len(batch.masks):
                self.masks.widen(batch.masks.shape[1])
                self.masks.intern_exactly(batch.masks)
            level = self._checked(Level.parse(batch.records, batch.crcs))
            self.recovered_batch = level
            self.index.add(level)
        self._masks_stored = self.masks.count
        limits.require_sparse(self.index.levels, 64 * self.masks.words)
        for level in self.index.levels:
            for part in level.parts():
                store.mark_used(level.copies(part))
        store.mark_used(self.history.refs_in_use())
        self.hidden.is_stored()
        self.set_snapshots(self.snapshots)

    def _keys(self) -> list[int]:
        """Keys of the levels of the index that the store has."""
        return sorted(key for kind, key in self.store.root.blobs if kind == fmt.BlobKind.INDEX)

    def _read_level(self, key: int) -> Level:
        level, lost = blobs.read_level(self.store, key, self.blocks, self.masks.words)
        self.lost_parts.add(lost)
        return self._checked(level)

    def _checked(self, level: Level) -> Level:
        copied = level.length[level.copy != fmt.ZERO_COPY].sum() if len(level) else 0
        if len(level) and (
            (level.length < 1).any()
            or (level.length > RUN_MAX).any()
            or (level.block < 0).any()
            or (level.block > self.blocks - level.length).any()
            or (level.copy < fmt.ZERO_COPY).any()
            or (np.diff(level.block) < 0).any()
            or int(level.mask.max()) >= self.masks.count
            or copied != len(level.crcs)
        ):
            raise StoreDamaged("index: a record is impossible")
        return level

    def pin(self) -> None:
        """Send reads and writes of superblocks and of the store's own blocks down the slow path."""
        blocks = sorted({at // self.block_size for at in self.medium.offsets})
        self._superblocks = np.array(blocks, np.int64) + self.shift
        self._special = SparseBits.of(runs_of(self._superblocks), self.rows, self.row_bytes)
        self._special |= self.hidden.bits
        self._owned = SparseBits(self.rows, self.row_bytes)
        self.set_owned(self.store.root.extents)

    def rebuild_need(self) -> None:
        """Set ``need`` from the history: a superset, see the module."""
        self.need = self.history.union()
        if len(self.snapshots):
            self._clear_recorded()
        self.need.set(runs_of(self._superblocks))
        self.need |= self._owned
        self.need |= self.hidden.bits

    def _clear_recorded(self) -> None:
        """Clear ``need`` where one record names every living snapshot: the steady state after a reopen."""
        everyone: npt.NDArray[np.bool_] = np.asarray(~(~self.masks.rows & self.alive).any(axis=1))
        for level in self.index.levels:
            for part in level.parts():
                runs = np.stack([level.block[part] + self.shift, level.length[part]], axis=1)
                self.need.set(runs[everyone[level.mask[part]]], False)

    def set_owned(self, extents: Ints) -> None:
        """The store's data blocks are now those of ``extents``; blocks that left stay needed until decided."""
        left = self._owned
        self._owned = SparseBits.of(extents[:, 1:] + np.array([self.shift, 0]), self.rows, self.row_bytes)
        left -= self._owned
        if self.hidden.some:  # of an adopted block the copy is the block itself; the store's data reads as zeros anyway
            self.hidden.show(self.hidden.overlap(self._owned))
        self._special -= left
        self._special |= self._owned
        self.need |= self._owned

    def owns(self, positions: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: which positions are data blocks of the store."""
        return self._owned.test(positions)

    def is_superblock(self, positions: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: which positions hold a superblock."""
        return np.isin(positions, self._superblocks)

    def not_special(self, runs: Ints) -> None:
        """Reads of these positions go straight to the medium from now on; nothing may be held."""
        self._special.set(runs, False)

    def rows_of(self, size: int) -> int:
        """Rows of bits of a volume of so many bytes."""
        return -(-(-(-size // self.block_size) + self.shift) // (8 * self.row_bytes))

    def resize(self, size: int) -> None:
        """The medium has ``size`` bytes now; nothing in the part that comes or goes is needed by any snapshot."""
        self.size = size
        self.blocks = -(-size // self.block_size)
        self.rows = self.rows_of(size)
        self.need, self._special, self._owned = (
            bits.reshaped(self.rows, self.row_bytes) for bits in (self.need, self._special, self._owned)
        )
        self.hidden.reshape(self.rows)
        self.history.resize(self.rows)

    # -- reading ----------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read the base volume."""
        start = (offset >> self._bits) + self.shift
        stop = ((offset + len(buffer) - 1) >> self._bits) + 1 + self.shift
        if not self._special.any(start, stop):
            self.medium.device.readinto(offset, buffer)
            return
        self.medium.readinto(offset, buffer)
        origin = offset - ((start - self.shift) << self._bits)
        for position, count in runs_of(self._owned.positions(start, stop)).tolist():
            self._paste(buffer, origin, position - start, bytes(count << self._bits))
        for position, count in runs_of(self.hidden.inside(start, stop)).tolist():
            self._paste(buffer, origin, position - start, bytes(count << self._bits))
        for position, count, at in self._held:
            if position < stop and position + count > start:
                piece = self._arena[at : at + (count << self._bits)]
                self._paste(buffer, origin, position - start, piece)

    def where(self, offset: int, length: int) -> tuple[int, int] | None:
        """Where in a file this part of the base volume stands as it is; None where nowhere."""
        start, stop = (offset >> self._bits) + self.shift, ((offset + length - 1) >> self._bits) + 1 + self.shift
        return None if self._special.any(start, stop) else where(self.medium.device, offset, length)

    def _paste(self, buffer: memoryview, origin: int, block: int, data: Buffer) -> None:
        """Put ``data``, which starts ``block`` blocks into the request, over the part of ``buffer`` it covers."""
        at = (block << self._bits) - origin
        low, high = max(0, at), min(len(buffer), at + len(data))
        if low < high:
            buffer[low:high] = memoryview(data)[low - at : high - at]

    def pread(self, offset: int, length: int) -> bytes:
        """Read the base volume."""
        buffer = bytearray(length)
        if length:
            self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    # -- writing ----------------------------------------------------------------------------------------

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write to the base volume; durable after `flush`.

        Raises:
            VolumeFull: A needed block has no room for its copy; nothing was written.
            StoreProtected: The range holds blocks of the store; nothing was written.
        """
        length = len(data)
        if not length:
            return
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"write of {length} bytes at {offset} leaves the volume of {self.size}")
        start = (offset >> self._bits) + self.shift
        stop = ((offset + length - 1) >> self._bits) + 1 + self.shift
        if not self.need.any(start, stop):
            self.medium.device.pwrite(offset, data)
            self.index.count_write(start - self.shift, stop - start)
            return
        if self._owned.any(start, stop):
            self._write_around_store(offset, memoryview(data), start, stop)
            return
        view = memoryview(data)
        if length <= PIECE_BYTES:
            self._hold(offset, view, start, stop)
            return
        # Room for all pieces is asked for first, so that a large write is refused whole.
        self._make_room(self._cost(start, stop), self.needed_from(start, stop))
        position = offset
        while position < offset + length:
            end = min(position + PIECE_BYTES - position % PIECE_BYTES, offset + length)
            first, last = (position >> self._bits) + self.shift, ((end - 1) >> self._bits) + 1 + self.shift
            self._hold(position, view[position - offset : end - offset], first, last)
            position = end

    def write_many(self, writes: Pieces) -> bool:
        """Write whole blocks in many places, as so many `pwrite` in their order would.

        Returns:
            False where they are to be written one by one, and nothing was.

        Raises:
            VolumeFull, OSError: Each may have room, or not fail, by itself; any of them was written.
        """
        start, count = (writes.offsets >> self._bits) + self.shift, writes.lengths >> self._bits
        if self._overwrites_due or int((writes.offsets + writes.lengths).max()) > self.size:
            return False
        positions = expand(start, count)
        needed = positions[self.need.test(positions)]
        if not len(needed):
            write_pieces(self.medium.device, writes)
            self.index.count_writes(np.stack([start - self.shift, count], axis=1))
            return True
        if self._owned.test(needed).any():
            return False
        if self.vital is not None and len(needed) > self.room() - self.vital.most:
            return False  # what is kept for metadata is for those of them that are
        at = self._place(len(writes), len(positions) << self._bits, len(needed), [distinct(needed)])
        # Held are all of them, needed or not: which of two to one block is the later one is then decided once.
        writes.gather(self._arena[at:])
        ends = at + np.cumsum(writes.lengths)
        self._held += zip(start.tolist(), count.tolist(), (ends - writes.lengths).tolist(), strict=True)
        self._held_bytes = int(ends[-1])
        self._held_cost += len(needed)
        self._special.mark(positions)
        self.need.mark(positions)  # as in `_hold`
        return True

    def rewrite(self, blocks: Ints, new: Bits, meanwhile: Callable[[], None] | None = None) -> None:
        """Make whole blocks (sorted, at least one) read as ``new``; durable after `flush`.

        As `pwrite` of those that differ, which are not held however: they come many at a time.  What is read to compare
        is what is copied.

        Args:
            blocks: int64[n], sorted.
            new: uint8[n, block_size].
            meanwhile: Done while a barrier is waited for, if there is one; it only reads, and raises nothing.

        Raises:
            VolumeFull: No room for the copies; nothing was written.
            StoreProtected: A block of the store would get anything but zeros; nothing was written.
        """
        self.commit()
        positions = blocks + self.shift
        old = self.content(blocks)
        differs = differing_rows(new, old)
        if self.hidden.some:  # they read as zeros
            differs |= self.hidden.bits.test(positions)
        owned = self._owned.test(positions)
        if filled_rows(new[owned]).any():
            raise StoreProtected("blocks of the store of the snapshots would be overwritten")
        differs &= ~owned
        if not differs.all():
            positions, new, old = positions[differs], new[differs], old[differs]
        needed = self.need.test(positions)
        self._make_room(int(needed.sum()), [positions[needed]])
        self.preserve(positions[needed], old if needed.all() else old[needed], meanwhile)
        data = new.reshape(-1).data
        runs, at = runs_of(positions), 0
        for position, count in runs.tolist():
            size = count << self._bits
            self.medium.pwrite((position - self.shift) << self._bits, data[at : at + size])
            self.index.count_write(position - self.shift, count)
            at += size
        if self.hidden.some:
            hidden.revealed(self, runs)

    def _write_around_store(self, offset: int, data: memoryview, start: int, stop: int) -> None:
        """Write all but the store's blocks, if those get the zeros that they read as.

        The kernel's page cache writes whole pages: with blocks smaller than a page, a write to a block of the
        volume brings the neighbours along as they were read.

        Raises:
            StoreProtected: The store's blocks would get anything else; nothing was written.
        """
        parts = []
        begin = 0
        for position, count in runs_of(self._owned.positions(start, stop)).tolist():
            low = max(0, ((position - self.shift) << self._bits) - offset)
            high = min(len(data), ((position + count - self.shift) << self._bits) - offset)
            if np.frombuffer(data[low:high], np.uint8).any():
                raise StoreProtected(
                    f"a write to {len(data)} bytes at byte {offset} hits the store of the snapshots",
                    hint="leave /.extsnap alone, or remove it with extsnap strip",
                )
            parts.append((begin, low))
            begin = high
        parts.append((begin, len(data)))
        self._make_room(self._cost(start, stop), self.needed_from(start, stop))
        for low, high in parts:
            self.pwrite(offset + low, data[low:high])

    def _cost(self, start: int, stop: int) -> int:
        return self.need.count(start, stop)

    @property
    def _batch_limit(self) -> int:
        """Copies that one batch can record in an empty log, whatever masks they have."""
        each = _RECORD_BYTES + 8 * self.masks.words
        room: int = self.store.log_bytes - fmt.BATCH_HEADER - fmt.SECTOR
        return max(1, room // each)

    def reserve(self) -> int:
        """Blocks kept back for folding and committing what is there now, so that neither ever lacks room.

        A fold may write the whole index anew while the old one counts.  What is only in the log has no blocks of its
        own yet: its place is kept back as well, or the first fold of a full store would take that of the next one.
        """
        records, crcs = self.index.extent(unfolded=2)
        folded = 2 * (records * fmt.RECORD_DTYPE.itemsize + crcs * 4 + math.ceil(records * BYTES_A_RECORD))
        history = self.history.table.nbytes + self.history.twins.nbytes
        tables = self.masks.count * self.masks.words * 8 + history + 64 * len(self.snapshots)
        tables = 2 * (tables + self.hidden.runs * fmt.RUN_DTYPE.itemsize)
        root = self.store.root
        texts = sum(len(key) + len(value) for key, value in root.properties.items())
        header = 4 * (4096 + 24 * len(root.extents) + 16 * len(root.mapping) + texts)
        return int(-(-(folded + tables + header) // self.block_size)) + 16

    def room(self) -> int:
        """Copy blocks that can still be promised to writes; each brings a record that the next fold writes."""
        # What is copied early is promised still: it is a part of what the held writes cost.
        kept = 0 if self._is_own_edit else self.reserve() + self.spared
        spare = max(0, self.store.available + self._copies.taken - kept)
        return spare * self.block_size // (self.block_size + _INDEX_BYTES) - self._held_cost

    def room_for_data(self) -> int:
        """The same for writes of data, which leave what metadata may need."""
        room = self.room()
        return room - self._kept(room)

    def _kept(self, room: int) -> int:
        return self.vital.kept(self.to_preserve, self.store.root.owned, room) if self.vital is not None else 0

    @property
    def left(self) -> int:
        """Free blocks of the store that no held write has a claim on."""
        return self.store.available + self._copies.taken - self._held_cost

    @contextlib.contextmanager
    def own_edit(self) -> Iterator[None]:
        """What is written inside is committed already: it may use all of the room, the reserve too."""
        vital, inside = self.vital, self._is_own_edit
        self.vital, self._is_own_edit = None, True
        try:
            yield
        finally:
            self.vital, self._is_own_edit = vital, inside

    def blocks_to_preserve(self, also: SparseBits | None = None) -> int:
        """How many bits `to_preserve` has."""
        return self.to_preserve(also).total()

    def to_preserve(self, also: SparseBits | None = None) -> SparseBits:
        """Blocks that would be copied if all of the volume were overwritten now: at most, see `rebuild_need`.

        Args:
            also: What a snapshot that is about to be taken preserves.
        """
        left = self.need.copy()
        if also is not None:
            left |= also
        left -= self._owned
        return left

    def blocks_for(self, copies: int) -> int:
        """Blocks that ``copies`` copy blocks take, with a record for each that the next fold writes."""
        return copies + -(-copies * _INDEX_BYTES // self.block_size)

    def _make_room(self, cost: int, needed: Iterable[Ints]) -> None:
        """Refuse a write that might not find room for its copies; decide exactly before refusing.

        Args:
            cost: As many at most.
            needed: Positions that may have to be copied, asked for if they have to be looked at.
        """
        kept, vital = 0, self.vital
        if vital is not None and cost > self.room() - vital.most:
            pieces = iter(needed)
            first = next(pieces, NO_BLOCKS)
            needed = itertools.chain([first], pieces)
            if not vital.names(first):
                kept = self._kept(self.room())
                if cost > self.room() - kept:
                    vital.count_again(self.rows)
                    kept = self._kept(self.room())
        if cost <= self.room() - kept:
            return
        self.commit()
        if cost <= self.room() - kept:
            return
        exact, room = self.copies_for(needed), max(0, self.room() - kept)
        if exact > room:
            raise VolumeFull(
                f"{exact} blocks must be copied for the snapshots and the store has room for {room}"
                + (f", besides {kept} for the filesystem's metadata" if kept else ""),
                hint="delete a snapshot or free space in the volume",
            )

    def _decide(self, positions: Ints) -> int:
        """How many of the blocks at sorted ``positions`` must be copied before they are overwritten."""
        missing = self.missing(positions).any(axis=1)
        self.clear_need(positions[~missing])
        return int(missing.sum())

    def needed_by(self, offset: int, length: int) -> Iterator[Ints]:
        """Positions in a range of bytes that may have to be copied before they are overwritten, piece by piece."""
        return self.needed_from(
            (offset >> self._bits) + self.shift, ((offset + length - 1) >> self._bits) + 1 + self.shift
        )

    def needed_from(self, start: int, stop: int) -> Iterator[Ints]:
        for low in range(start, stop, 8192):
            yield self.need.positions(low, min(low + 8192, stop))

    def needed_of(self, written: Bits, blocks: Iterable[tuple[int, int]]) -> Iterator[Ints]:
        """The same of the blocks of a bitmap.

        Args:
            written: uint8, packed: one bit a block.
            blocks: Ranges (first, past the last) to look at.
        """
        for first, last in blocks:
            positions = set_positions(written, first, last) + self.shift
            yield positions[self.need.test(positions)]

    def copies_for(self, needed: Iterable[Ints]) -> int:
        """How many copies overwriting these positions takes, decided exactly; nothing may be held."""
        return sum(map(self._decide, needed))

    def copies_by_rank(self, ranks: Ints, top: int) -> Ints:
        """Copy blocks that nobody needs once snapshots up to a rank are gone.

        Args:
            ranks: int[bits]: of each bit of the counting bitmap, in which order its snapshot goes; 0: it is gone.
            top: The highest rank.

        Returns:
            int[top]: by rank.
        """
        last = (self.masks.bits() * ranks).max(axis=1, initial=0)
        freed = np.zeros(top + 1, np.int64)
        for level in self.index.levels:
            for part in level.parts():
                copied = level.length[part] * (level.copy[part] != fmt.ZERO_COPY)
                freed += np.bincount(last[level.mask[part]], weights=copied, minlength=top + 1).astype(np.int64)
        freed[0] = 0
        return np.cumsum(freed)[:top]

    def copies_in(self, blocks: Ints) -> Ints:
        """Copies that so many blocks of the store take, with the records for them."""
        return blocks * self.block_size // (self.block_size + _INDEX_BYTES)

    def costs_by_rank(self, needed: Iterable[Ints], ranks: Ints, top: int) -> Ints:
        """Copies that overwriting these positions takes once snapshots up to a rank are gone; see `copies_by_rank`.

        Returns:
            int[top]: by rank.
        """
        last = np.zeros(top + 1, np.int64)
        for positions in needed:
            missing = self.missing(positions).astype("<u8").view(np.uint8)
            bits = np.unpackbits(missing, axis=1, bitorder="little")
            last += np.bincount((bits * ranks).max(axis=1, initial=0), minlength=top + 1)
        return np.asarray(last.sum() - np.cumsum(last)[:top])

    def _hold(self, offset: int, data: memoryview, start: int, stop: int) -> None:
        if self._overwrites_due:
            self.commit()  # an earlier overwrite failed: its turn comes first
        size = self.block_size
        count = stop - start
        cost = self._cost(start, stop)
        at = self._place(1, count * size, cost, self.needed_from(start, stop))
        piece = self._arena[at : at + count * size]
        head = offset - ((start - self.shift) << self._bits)
        if head:
            self._read_block(start, piece[:size])
        if (head + len(data)) % size and (count > 1 or not head):
            self._read_block(stop - 1, piece[-size:])
        piece[head : head + len(data)] = data
        self._held.append((start, count, at))
        self._held_bytes += count * size
        self._held_cost += cost
        self._special.set_range(start, stop)
        self.need.set_range(start, stop)  # later writes to held blocks go through the hold

    @property
    def holds(self) -> bool:
        """Whether writes wait for their copies."""
        return bool(self._held)

    def _place(self, entries: int, length: int, cost: int, needed: Iterable[Ints]) -> int:
        """Where in the arena more entries of the hold have room.

        Args:
            entries: How many.
            length: Bytes of them.
            cost: As `_make_room` has it.
            needed: As `_make_room` has it.

        Raises:
            VolumeFull, OSError: They have none.
        """
        if not len(self._arena):
            self._arena = memoryview(mmap.mmap(-1, HOLD_BYTES + PIECE_BYTES))  # takes memory as it is used
        if (
            len(self._held) + entries > HOLD_ENTRIES
            or self._held_bytes + length > len(self._arena)
            or self._held_cost + cost > self._batch_limit
        ):
            self.commit()
        elif self._held_bytes - self._copied_bytes >= EARLY_BYTES:
            self._copy_early()
        self._make_room(cost, needed)
        return self._held_bytes  # making room may have emptied it

    def _read_block(self, position: int, buffer: memoryview) -> None:
        """One block as seen from above; past the end of a ragged last block it is zeros."""
        offset = (position - self.shift) << self._bits
        length = min(self.block_size, self.size - offset)
        self.readinto(offset, buffer[:length])
        buffer[length:] = bytes(len(buffer) - length)

    def commit(self) -> None:
        """Copy what the held writes need copied, barrier, and let them out.  They are durable after `flush`."""
        if not self._held:
            return
        held = np.array(self._held, np.int64)
        runs = held[:, :2]
        positions = expand(runs[:, 0], runs[:, 1])
        try:
            if not self._overwrites_due:
                self.preserve(distinct(positions))
                self._copied = self._copied_bytes = 0
                self._held_cost = 0
                self._overwrites_due = True
            self._overwrite(held)
        except BaseException:
            self.need.set(runs)  # all of it stays held, and so does what is written to it later
            raise
        if self.hidden.some:
            hidden.revealed(self, runs)
        self._special.unmark(positions)
        self._special.mark(self._superblocks)
        self._special.tidy(distinct(runs[:, 0] // (self.row_bytes * 8)))
        self.index.count_writes(runs - np.array([self.shift, 0]))
        self._held, self._held_bytes, self._overwrites_due = [], 0, False

    def _overwrite(self, held: Ints) -> None:
        """Let the held writes out to the medium: of each block the last one, neighbours in both places joined."""
        position, count, at = held.T
        positions, places = expand(position, count), expand(at >> self._bits, count)
        order = np.argsort(positions, kind="stable")
        positions, places = positions[order], places[order]
        last = np.append(positions[1:] != positions[:-1], True)
        positions, places = positions[last], places[last]
        apart = jumps(positions) | jumps(places)
        first, length = breaks_to_runs(apart, 1 << 62)
        self.medium.write_pieces(self._pieces(positions[first] - self.shift, length, places[first], self._arena))

    def _pieces(self, block: Ints, count: Ints, place: Ints, buffer: memoryview) -> Pieces:
        """Runs of blocks, with their places in a buffer, in blocks; a ragged last block ends where it ends."""
        offsets = block << self._bits
        return Pieces(offsets, np.minimum(count << self._bits, self.size - offsets), place << self._bits, buffer)

    def missing(self, positions: Ints) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
        """uint64[n, words]: by sorted position, the snapshots that preserve it and have no record for it."""
        missing = self.history.masks_at(positions) & self.alive
        for level, which, record in self.index.pairs(positions - self.shift):
            recorded = np.zeros_like(missing)
            np.bitwise_or.at(recorded, which, self.masks.rows[level.mask[record]])
            missing &= ~recorded
        return missing

    def preserve(self, positions: Ints, old: Bits | None = None, meanwhile: Callable[[], None] | None = None) -> None:
        """Copy the blocks at sorted ``positions`` for every snapshot that still needs them; durable on return.

        Args:
            positions: int64[n].
            old: What the medium has there, if that is known: uint8[n, block_size].
            meanwhile: As `rewrite` has it.

        Raises:
            VolumeFull: No room (callers reserve it first); nothing was recorded.
        """
        for low in range(0, len(positions), self._batch_limit):
            part = slice(low, low + self._batch_limit)
            with self._copying():
                self._copies.write(positions[part], None if old is None else old[part])
                self._copies.record(meanwhile)
            self.clear_need(positions[part])

    def _copy_early(self) -> None:
        """Write what the held writes need copied; the batch that records it is their commit's."""
        held = np.array(self._held[self._copied :], np.int64)
        with self._copying():
            self._copies.write(distinct(expand(held[:, 0], held[:, 1])))
        self._copied, self._copied_bytes = len(self._held), self._held_bytes

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """If it fails, nothing is copied of what was copied early either."""
        try:
            yield
        except BaseException:
            self._copies.forget()
            self._copied = self._copied_bytes = 0
            raise

    def clear_need(self, positions: Ints) -> None:
        """No snapshot misses these sorted positions; what takes the slow path for another reason stays needed."""
        kept = self._owned.test(positions)
        if self.hidden.some:
            kept |= self.hidden.bits.test(positions)
        self.need.unmark(positions[~kept])
        self.need.mark(self._superblocks)
        rows = distinct(positions // (self.row_bytes * 8))
        if len(rows) <= _FEW_ROWS:  # as where much is written in order: what was the last of a row may be among it
            self.need.tidy(rows)

    def content(self, blocks: Ints) -> Bits:
        """What the medium has in sorted blocks, zeros behind the end of a ragged last one: uint8[n, block_size]."""
        size = self.block_size
        content = np.empty((len(blocks), size), np.uint8)
        first, length = breaks_to_runs(jumps(blocks), 1 << 62)
        if len(blocks) and blocks[-1] >= self.size >> self._bits:
            content[-1] = 0
        self.medium.read_pieces(self._pieces(blocks[first], length, first, content.reshape(-1).data))
        return content

    @property
    def new_masks(self) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
        """uint64[n, words]: masks that are neither in the store's table nor in its log."""
        return self.masks.rows[self._masks_stored :]

    def recorded(self, level: Level) -> None:
        """Records are durable in the log, and the masks that they name."""
        self._masks_stored = self.masks.count
        self.index.add(level)

    def adoptable(self, blocks: Ints) -> Ints:
        """Those of sorted ``blocks`` whose content a snapshot still needs; nothing may be held."""
        blocks = blocks[self.need.test(blocks + self.shift)]
        return blocks[self.missing(blocks + self.shift).any(axis=1)] if len(blocks) else blocks

    def own(self, extents: Ints, fresh: Ints) -> int:
        """The store has ``extents`` now, those of before and ``fresh`` blocks (sorted); returns how many were adopted.

        The filesystem has given the new blocks to the store's file already, durably.  Where one of them has content
        that a snapshot still needs, it becomes a record whose copy is that very block (adoption): nothing is copied,
        and from here on nobody else can write it.  What is durable when: before the commit nothing; after it the
        extents and the records of the adopted blocks, with all records of the log.

        Raises:
            VolumeFull, OSError: The state in memory is to be read anew.
        """
        self.commit()
        store, blocks = self.store, self.adoptable(fresh)
        missing = self.missing(blocks + self.shift)
        store.root.extents, store.root.size_blocks = extents, int((extents[:, 0] + extents[:, 2]).max())
        store.set_extents(extents)
        self.set_owned(extents)
        if len(blocks):
            copy = store.logical(blocks)
            content = store.read_blocks(copy)
            filled = filled_rows(content)
            crcs = fmt.crcs(content[filled])
            store.mark_used(copy[filled])
            copy[~filled] = fmt.ZERO_COPY
            self.index.add(records(blocks, copy, self.masks.intern(missing), crcs))
            self.fold(commit=False)
        store.commit()
        return len(blocks)

    def disown(self, extents: Ints) -> None:
        """The store has only ``extents`` now; what it loses was taken out of service.  Durable on return.

        The filesystem still gives those blocks to the store's file: it may free them from now on, not before.
        """
        self.commit()
        store = self.store
        store.root.extents, store.root.size_blocks = extents, int((extents[:, 0] + extents[:, 2]).max())
        store.set_extents(extents)
        self.set_owned(extents)
        store.commit()

    def shareable(self, blocks: Ints) -> Ints | None:
        """Where on the medium the content of blocks is as a copy has it: -1 for superblocks and a ragged last block."""
        if not self.medium.device.clone_least:
            return None
        partial = blocks >= self.size >> self._bits
        return np.where(partial | np.isin(blocks + self.shift, self._superblocks), -1, blocks)

    def flush(self) -> None:
        """Everything written before is durable when this returns."""
        self.commit()
        self.medium.flush()
        if self.store.commit_due:
            self.store.commit()
        if self.hidden.changed:
            hidden.log(self)

    def punch(self, offset: int, length: int) -> None:
        """Discard or write zeroes: the range reads as zeros afterwards, its needed blocks are copied first or hidden.

        Blocks of the store inside the range read as zeros anyway and are left alone.

        Raises:
            VolumeFull: The copies find no room; nothing was changed.
        """
        if length <= 0:
            return
        size = self.block_size
        end = min(offset + length, self.size)
        low, high = -(-offset // size) * size, end // size * size
        if low >= high:
            self.pwrite(offset, bytes(end - offset))
            return
        self.commit()
        outer = (offset >> self._bits) + self.shift, ((end - 1) >> self._bits) + 1 + self.shift
        start, stop = (low >> self._bits) + self.shift, (high >> self._bits) + self.shift
        hides = hidden.needed_runs(self, start, stop)
        # Room for everything first, the ragged ends included: a punch is refused whole or done.
        cost = self._cost(*outer)
        if hides is None:
            self._make_room(cost, self.needed_from(*outer))
        else:
            hidden.require_room(self, len(hides), cost - self._cost(start, stop))
        if offset < low:
            self.pwrite(offset, bytes(low - offset))
        if end > high:
            self.pwrite(high, bytes(end - high))
        self.commit()
        if hides is None:
            self.hidden.copied_bytes += self._cost(start, stop) * size
            for piece in range(start, stop, 4096):
                self.preserve(self.need.positions(piece, min(piece + 4096, stop)))
        else:
            inside = self._superblocks[(self._superblocks >= start) & (self._superblocks < stop)]
            self.preserve(inside[self.need.test(inside)])
        if hides is not None:
            self.hidden.hide(hides)
            self._special.set(hides)
        for first in range(start, stop, hidden.WINDOW):
            self._punch_window(first, min(first + hidden.WINDOW, stop), copied=hides is None)
        self.index.count_write(start - self.shift, stop - start)

    def _punch_window(self, start: int, stop: int, *, copied: bool) -> None:
        """Punch [start, stop) on the medium, all but the store's blocks and, unless they were copied, hidden ones."""
        kept, inside = self._owned.positions(start, stop), self.hidden.inside(start, stop)
        if not copied:
            kept = distinct(np.concatenate([kept, inside]))
        begin = start
        for position, count in [*runs_of(kept).tolist(), (stop, 0)]:
            if position > begin:
                self.medium.punch((begin - self.shift) << self._bits, (position - begin) << self._bits)
            begin = position + count
        if copied and len(inside):
            hidden.revealed(self, runs_of(inside))

    def punch_runs(self, runs: Ints) -> None:
        """Punch runs of positions on the medium."""
        for position, count in runs.tolist():
            self.medium.punch((position - self.shift) << self._bits, count << self._bits)

    # -- folding ----------------------------------------------------------------------------------------

    def purge(self) -> int:
        """Forget records that no living snapshot needs; returns the copy blocks freed by the next commit.

        Mask ids may change, so a fold must be part of that commit.
        """
        self.masks.restrict(self.alive)
        freed = 0
        levels = []
        living: npt.NDArray[np.bool_] = np.asarray(self.masks.rows.any(axis=1))
        for level in self.index.levels:
            keep = living[level.mask]
            if keep.all():
                levels.append(level)
                continue
            dead = np.flatnonzero(~keep & (level.copy >= 0))
            self.store.release(expand(level.copy[dead], level.length[dead]))
            freed += int(level.length[dead].sum())
            levels.append(level.take(np.flatnonzero(keep)))
        used = np.zeros(self.masks.count, np.bool_)
        for level in levels:
            used[level.mask] = True
        ids = self.masks.compact(used)
        if ids is not None:
            for level in levels:
                level.mask, level.stored = ids[level.mask], -1
        self.index.replace(levels)
        return freed

    def fold(self, *, commit: bool = True, counts: bool = False) -> None:
        """Write the records of the log into index blobs and start an empty log.

        The old blobs and the old log count until the header commit; the caller's with ``commit=False``.
        With ``counts``, levels whose write counts moved are written again too.

        Raises:
            VolumeFull: There is no room; the index and the root are as before.
        """
        self.index.apply_writes()
        levels = sorted(self.index.levels, key=len, reverse=True)
        fresh = [level for level in levels if level.stored < 0]
        kept = [level for level in levels if level.stored >= 0]
        while kept and len(kept[-1]) < 2 * sum(map(len, fresh)):
            fresh.append(kept.pop())
        # A large level that is only counted anew stays one of its own: a merge would hold it in memory twice.
        rewritten = [level for level in kept if counts and level.touched]
        size, table = self.block_size, 8 + self.masks.rows.nbytes
        written = [fresh, *([level] for level in rewritten)]
        sizes = [sum(map(len, levels)) * fmt.RECORD_DTYPE.itemsize for levels in written]
        sizes += [sum(len(level.crcs) for level in levels) * 4 for levels in written]
        sizes += [table_bytes(sum(map(len, levels)), self.masks.words) for levels in written]
        hides = self.hidden.blob(self.shift) if self.hidden.some else b""
        sizes.append(len(hides))
        needed = 2 * sum(-(-length // size) for length in [*sizes, table])
        if needed > self.store.available:  # asked first: whoever commits next would commit half of a fold
            raise VolumeFull(
                f"the store has {self.store.available} free blocks and its index needs {needed}",
                hint="delete a snapshot or free space in the volume",
            )
        stored, masks_stored = [(level, level.stored, level.touched) for level in levels], self._masks_stored
        try:
            with self.store.undone_on_error():
                if sum(map(len, fresh)):
                    kept.append(merge(fresh))
                    rewritten.append(kept[-1])
                keys = self._keys()
                unused = (key for key in range(len(keys) + len(rewritten)) if key not in keys)
                for level in rewritten:
                    blobs.write_level(self.store, level, self.masks, next(unused))
                blobs.drop_levels(self.store, {level.stored for level in kept})
                self.index.replace(kept)
                blobs.write_masks(self.store, self.masks)
                self._masks_stored = self.masks.count
                blobs.write_hidden(self.store, hides)
        except BaseException:
            for level, key, touched in stored:
                level.stored, level.touched = key, touched
            self._masks_stored = masks_stored
            self.index.replace(levels)
            raise
        self.hidden.is_stored()
        self.store.new_epoch()
        if commit:
            self.store.commit()

    # -- after a crash ----------------------------------------------------------------------------------

    def repair_last_batch(self) -> None:
        """Verify the copies of the log's last batch, whose barrier may not have returned.

        A copy that fails its checksum is harmless where the base block still has that content (nothing was
        overwritten before the barrier): it is copied again.

        Raises:
            DamagedCopy: The base block has changed as well.
        """
        level = self.recovered_batch
        if level is None or not len(level):
            return
        which = level.copy >= 0
        logical = expand(level.copy[which], level.length[which])
        blocks = expand(level.block[which], level.length[which])
        for low in range(0, len(logical), 4096):
            part = slice(low, low + 4096)
            copies = self.store.read_blocks(logical[part])
            expected = level.crcs[part]
            bad = np.flatnonzero(fmt.crcs(copies) != expected)
            for index in bad.tolist():
                block = int(blocks[part][index])
                offset = block << self._bits
                content = bytes(self.medium.pread(offset, min(self.block_size, self.size - offset)))
                content += bytes(self.block_size - len(content))
                if fmt.crc(content) != expected[index]:
                    raise DamagedCopy(f"the copy of block {block} is damaged and the block itself has changed")
                self.store.write_blocks(logical[part][index : index + 1], content)
        if len(logical):
            self.medium.flush()
