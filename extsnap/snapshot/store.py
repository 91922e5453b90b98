"""The store: header, logical blocks, blobs and the log.

What is durable when
--------------------
* ``write_blocks`` and ``write_blob`` fill blocks that no committed header refers to.
* ``commit`` first makes them durable (barrier), then writes a new root chain and slot A, barrier, then a second
  root chain and slot B, barrier.  A crash before slot A is durable leaves the old state, whole; after it, the
  new one.  A slot that is durable without its chain fails the root's checksum, and the other slot is taken.
  After a crash between the two, the next commit begins with the slot that stayed behind: the other one is the
  only whole state, for blocks that the older state needs may have been reused since.
  At rest both slots say the same, each with a chain of its own, so one damaged block of either is survived.
* Blocks given to ``release`` are reused only after the commit that no longer refers to them is durable.
* ``append_batch`` writes into the log in place, never over a sector of a committed batch.  The batch counts
  once the caller's barrier returned; its checksum is salted with the epoch, which every fold moves on.
* Blobs and the log have a twin: a second copy elsewhere, written before the same barrier.  Whoever reads takes the
  first that has its checksum, so any single damaged block is survived; `twins` finds the other one and mends it.
  After a crash a batch that is whole in either copy of the log counts, as it would with one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from extsnap.arrays import (
    Bits,
    Ints,
    bitmap_runs,
    bits_of,
    breaks_to_runs,
    distinct,
    expand,
    jumps,
    runs_of,
    set_runs,
    test_bits,
)
from extsnap.blockdev.base import Buffer, CloningDevice, Device, Pieces, read_pieces
from extsnap.errors import StoreDamaged, UnsupportedFeature, VolumeFull
from extsnap.snapshot import format as fmt
from extsnap.snapshot import limits
from extsnap.snapshot.root import NO_BLOCKS, NO_EXTENTS, NO_RUNS, SLOT_BLOCKS, Blob, Extents, Root

T = TypeVar("T")
#: Content that moves is copied in pieces of this many bytes.
CARRY_BYTES = 4 << 20
#: Distance of two copies, where there is room.
APART_BYTES = 1 << 20
#: About as many bytes of a blob are read at once.
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Batch:
    """One batch of the log, parsed."""

    sequence: int
    masks: npt.NDArray[np.uint64]
    records: np.ndarray[Any, Any]
    crcs: npt.NDArray[np.uint32]
    hides: Ints
    shows: Ints


class Store:
    """The committed root, the state of the logical blocks, and the ways to write both.

    Attributes:
        worn: A structure was read from its second copy, because the first one is damaged.
        commit_due: A commit failed, or a fold is not committed yet: nobody knows which root the medium has.  Nothing
            goes into the log before it has been done again.
    """

    def __init__(self, device: CloningDevice, root: Root) -> None:
        self.device = device
        self.root = root
        self.block_size = root.block_size
        self._map: Extents = NO_EXTENTS
        self._available: Bits = np.zeros(0, np.uint8)
        self.available = 0
        self._cursor = 0
        self._released: list[Ints] = []
        self._in_vain: list[Ints] = []  # chains of commits that failed: a slot may name one until both name others
        self._chains: list[Ints] = [NO_BLOCKS, NO_BLOCKS]
        self._order = tuple(range(SLOT_BLOCKS))
        self._unsynced = False
        self._pending_batch = 0
        self._unwanted: tuple[int, int] | None = None  # epoch and position of a batch whose barrier has not returned
        self.commit_due = False
        self.log_position = 0
        self.log_sequence = 0
        self.worn = False
        self.set_extents(root.extents)

    # -- logical blocks ---------------------------------------------------------------------------------

    def set_extents(self, extents: Extents) -> None:
        """Take over new extents; blocks that are new are available at once, dropped ones no longer."""
        old = self._map
        size = int((extents[:, 0] + extents[:, 2]).max()) if len(extents) else 0
        before = bits_of(old[:, [0, 2]], max(size, len(self._available) * 8))
        after = bits_of(extents[:, [0, 2]], len(before) * 8)
        available = np.zeros(len(before), np.uint8)
        available[: len(self._available)] = self._available
        self._available = (available | (after & ~before)) & after
        self.available = int(np.bitwise_count(self._available).sum())
        self._map = extents

    def physical(self, logical: Ints) -> Ints:
        """Physical blocks of ``logical`` ones.

        Raises:
            StoreDamaged: One is not mapped.
        """
        which = np.searchsorted(self._map[:, 0], logical, "right") - 1
        if not len(self._map) or (which < 0).any():
            raise StoreDamaged("a logical block of the store is not mapped")
        rows = self._map[which]
        shift = logical - rows[:, 0]
        if (shift >= rows[:, 2]).any():
            raise StoreDamaged("a logical block of the store is not mapped")
        return np.asarray(rows[:, 1] + shift)

    def logical(self, physical: Ints) -> Ints:
        """Logical blocks of ``physical`` ones; -1 where the store does not own it."""
        order = np.argsort(self._map[:, 1])
        rows = self._map[order]
        which = np.searchsorted(rows[:, 1], physical, "right") - 1
        row = rows[np.maximum(which, 0)]
        shift = physical - row[:, 1]
        return np.where((which >= 0) & (shift < row[:, 2]), row[:, 0] + shift, -1)

    def mark_used(self, logical: Ints) -> None:
        """While opening: these blocks are in use.

        Raises:
            StoreDamaged: One is not the store's, or is in use twice.
        """
        if not len(logical):
            return
        if logical.min() < 0 or logical.max() >= len(self._available) * 8:
            raise StoreDamaged("a block in use lies outside the store")
        unique = distinct(logical)
        before = self.available
        set_runs(self._available, runs_of(unique), False)
        self.available = int(np.bitwise_count(self._available).sum())
        if before - self.available != len(logical):
            raise StoreDamaged("a block of the store is in use twice or not mapped")

    def allocate(self, count: int) -> Ints:
        """``count`` available logical blocks, sorted, next fit so that they tend to be consecutive.

        Raises:
            VolumeFull: There are not enough; nothing is taken.
        """
        if count > self.available:
            raise VolumeFull(
                f"the store has {self.available} free blocks and needs {count}",
                hint="delete a snapshot or free space in the volume",
            )
        found: list[Ints] = []
        missing = count
        total = len(self._available)
        low = self._cursor
        window = max(64, count // 4)  # bytes; where little is free it soon gets larger
        while missing:
            high = min(low + window, total)
            piece = np.flatnonzero(np.unpackbits(self._available[low:high], bitorder="little"))[:missing] + low * 8
            if len(piece):
                found.append(piece.astype(np.int64))
                missing -= len(piece)
                set_runs(self._available, runs_of(piece), False)
                self._cursor = int(piece[-1]) // 8
            low = high if high < total else 0
            window = min(2 * window, 1 << 20)
        self.available -= count
        return np.sort(np.concatenate(found)) if found else NO_BLOCKS

    def allocate_pair(self, count: int) -> tuple[Ints, Ints]:
        """Blocks for two copies of something, sorted, and apart: what damages one seldom reaches the other.

        Raises:
            VolumeFull: There are not enough for both; nothing is taken.
        """
        if 2 * count > self.available:
            self.allocate(2 * count)  # says how many there are
        first = self.allocate(count)
        here, total = self._cursor, len(self._available)
        self._cursor = (here + min(total // 2, APART_BYTES // self.block_size // 8)) % max(1, total)
        second = self.allocate(count)
        self._cursor = here
        return first, second

    def unallocate(self, logical: Ints) -> None:
        """Give back blocks that were allocated and never committed."""
        set_runs(self._available, runs_of(np.sort(logical)))
        self.available += len(logical)

    def release(self, logical: Ints) -> None:
        """Free committed blocks; they can be allocated after the next `commit`."""
        if len(logical):
            self._released.append(logical)

    def is_available(self, logical: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: which logical blocks are free."""
        return test_bits(self._available, logical)

    def available_runs(self) -> Ints:
        """All logical blocks that are free, as runs (start, length), sorted."""
        return bitmap_runs(self._available, len(self._available) * 8)

    def withdraw(self, runs: Ints) -> None:
        """Take free blocks (runs of logical ones) out of service for good: a shrink is going to unmap them."""
        if not self.is_available(expand(runs[:, 0], runs[:, 1])).all():
            raise ValueError("blocks in use were to be taken out of service")
        set_runs(self._available, runs, False)
        self.available -= int(runs[:, 1].sum())

    def withdraw_all_but(self, extents: Extents) -> None:
        """Take free blocks out of service that ``extents``, of a change that is pending, does not have any more."""
        kept = bits_of(extents[:, [0, 2]], max(len(self._available) * 8, int((extents[:, 0] + extents[:, 2]).max())))
        self._available &= kept[: len(self._available)]
        self.available = int(np.bitwise_count(self._available).sum())

    def put_back(self, runs: Ints) -> None:
        """The shrink did not happen: the blocks are free again."""
        set_runs(self._available, runs)
        self.available += int(runs[:, 1].sum())

    def write_blocks(self, logical: Ints, data: Buffer, source: Ints | None = None) -> None:
        """Fill blocks (sorted) from ``data``, in few large writes.  Not durable before a barrier.

        Args:
            logical: The blocks.
            data: Their content.
            source: Blocks of the device that have this content as well, -1 where none has: the host may share them.
        """
        self._unsynced = True
        physical = self.physical(logical)
        view = memoryview(data).cast("B")
        size = self.block_size
        breaks = jumps(physical)
        which = np.arange(len(physical))
        if source is not None and self.device.clone_least:
            which = np.flatnonzero(~self._cloned(physical, source))
            breaks = breaks[which] | jumps(which)
        first, length = breaks_to_runs(breaks, 1 << 62)
        for index, count in zip(which[first].tolist(), length.tolist(), strict=True):
            piece = view[index * size : (index + count) * size]
            if len(piece):
                self.device.pwrite(int(physical[index]) * size, piece)

    def _cloned(self, physical: Ints, source: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: the blocks that the host was made to share with their sources; only long runs are tried."""
        done = np.zeros(len(physical), np.bool_)
        size = self.block_size
        breaks = jumps(physical) | jumps(source)
        first, length = breaks_to_runs(breaks, 1 << 62)
        long = (length * size >= self.device.clone_least) & (source[first] >= 0)
        for index, count in zip(first[long].tolist(), length[long].tolist(), strict=True):
            if not self.device.clone(int(source[index]) * size, int(physical[index]) * size, count * size):
                break
            done[index : index + count] = True
        return done

    def write_padded(self, logical: Ints, rows: npt.NDArray[np.uint8]) -> None:
        """Fill blocks (sorted) with one row of ``rows`` each (uint8[n, at most a block]), zeros behind it."""
        padded = np.zeros((len(rows), self.block_size), np.uint8)
        padded[:, : rows.shape[1]] = rows
        self.write_blocks(logical, padded.reshape(-1).data)

    def read_blocks(self, logical: Ints, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """Content of blocks, in the order given: uint8[n, block_size], ``out`` if that is given."""
        size = self.block_size
        if out is None:
            out = np.empty((len(logical), size), np.uint8)
        physical = self.physical(logical) if len(logical) else NO_BLOCKS
        first, length = breaks_to_runs(jumps(physical), 1 << 62)
        read_pieces(self.device, Pieces(physical[first] * size, length * size, first * size, out.reshape(-1).data))
        return out

    def carry(self, extents: Extents) -> None:
        """Copy the content of logical blocks that ``extents`` has elsewhere to there; durable at the next commit."""
        old = self._map
        both = np.concatenate([old, extents])
        cuts = distinct(np.concatenate([both[:, 0], both[:, 0] + both[:, 2]]))
        starts, lengths = cuts[:-1], np.diff(cuts)
        places = []
        for rows in (old, extents):
            which = np.maximum(np.searchsorted(rows[:, 0], starts, "right") - 1, 0)
            shift = starts - rows[which, 0]
            places.append(np.where((shift >= 0) & (shift < rows[which, 2]), rows[which, 1] + shift, -1))
        moved = (places[0] >= 0) & (places[1] >= 0) & (places[0] != places[1])
        size = self.block_size
        for source, target, count in np.stack([*places, lengths], axis=1)[moved].tolist():
            for done in range(0, count, CARRY_BYTES // size):
                length = min(CARRY_BYTES // size, count - done) * size
                self.device.pwrite((target + done) * size, self.device.pread((source + done) * size, length))
        self._unsynced = True

    # -- blobs ------------------------------------------------------------------------------------------

    def write_blob(self, kind: fmt.BlobKind, key: int, data: bytes) -> None:
        """Put a byte string into the store under (kind, key); part of the next commit.

        Raises:
            VolumeFull: No room; the root is as before.
        """
        self.write_pieces(kind, key, len(data), [data])

    def write_pieces(
        self, kind: fmt.BlobKind, key: int, length: int, pieces: Iterable[bytes], *, twin: bool = True
    ) -> None:
        """`write_blob` of ``length`` bytes that come in pieces, all but the last of whole blocks.

        Args:
            twin: Write it twice.

        Raises:
            VolumeFull: No room; the root is as before.
        """
        limits.table_limit(kind, length)
        each = -(-length // self.block_size)
        copies: tuple[Ints, ...] = self.allocate_pair(each) if twin else (self.allocate(each),)
        crc = at = 0
        for piece in pieces:
            count = -(-len(piece) // self.block_size)
            for blocks in copies:
                self.write_blocks(blocks[at : at + count], piece)
            crc = fmt.crc(piece, crc)
            at += count
        self.drop_blob(kind, key)
        self.root.blobs[kind, key] = Blob(length, crc, runs_of(copies[0]))
        if twin:
            self.root.twins[kind, key] = runs_of(copies[1])

    def drop_blob(self, kind: fmt.BlobKind, key: int) -> None:
        """Remove a blob, if there is one; its blocks are free after the next commit."""
        old = self.root.blobs.pop((kind, key), None)
        if old is not None:
            self.release(expand(old.runs[:, 0], old.runs[:, 1]))
        twin = self.root.twins.pop((kind, key), None)
        if twin is not None:
            self.release(expand(twin[:, 0], twin[:, 1]))

    def read_blob(self, kind: fmt.BlobKind, key: int) -> bytes:
        """The byte string under (kind, key).

        Raises:
            StoreDamaged: It is missing, or no copy of it has its checksum.
        """
        return self.first_whole(kind, key, lambda copy: b"".join(self.blob_pieces(kind, key, copy)))

    def first_whole(self, kind: fmt.BlobKind, key: int, read: Callable[[int], T]) -> T:
        """What ``read`` returns of the first copy of a blob (it gets its number) that is not damaged.

        Raises:
            StoreDamaged: All are.
        """
        twins = (kind, key) in self.root.twins
        try:
            return read(0)
        except StoreDamaged:
            if not twins:
                raise
        self.worn = True
        return read(1)

    def blob_length(self, kind: fmt.BlobKind, key: int) -> int:
        """Bytes of the blob under (kind, key).

        Raises:
            StoreDamaged: It is missing, or longer than its blocks.
        """
        blob = self.root.blobs.get((kind, key))
        if blob is None:
            raise StoreDamaged(f"store: {fmt.name_of_blob(kind)} {key} is missing")
        room = int(blob.runs[:, 1].sum()) * self.block_size if len(blob.runs) else 0
        if blob.length > room or room > self.device.size:
            raise StoreDamaged(f"store: {fmt.name_of_blob(kind)} {key} is longer than its blocks")
        return blob.length

    def read_table(
        self, kind: fmt.BlobKind, key: int, dtype: np.dtype[Any], copy: int = 0
    ) -> Iterator[np.ndarray[Any, Any]]:
        """The entries of a copy of a blob, some at a time: a large one is never in memory whole.

        Raises:
            StoreDamaged: It is; a wrong checksum shows at the end only, so nothing of it counts before.
        """
        for piece in self.blob_pieces(kind, key, copy, dtype.itemsize):
            yield fmt.parse_table(piece, dtype, f"{fmt.name_of_blob(kind)} {key}")

    def blob_blocks(self, kind: fmt.BlobKind, key: int, copy: int = 0) -> Ints:
        """The logical blocks of a copy of a blob (0: the first, 1: the twin), in order."""
        runs = self.root.twins[kind, key] if copy else self.root.blobs[kind, key].runs
        return expand(runs[:, 0], runs[:, 1])

    def blob_pieces(self, kind: fmt.BlobKind, key: int, copy: int = 0, entry_bytes: int = 1) -> Iterator[bytes]:
        """The bytes of a copy of a blob in pieces of whole entries.

        Raises:
            StoreDamaged: As `read_table`.
        """
        left = self.blob_length(kind, key)
        blob = self.root.blobs[kind, key]
        blocks = self.blob_blocks(kind, key, copy)
        step = entry_bytes * max(1, PIECE_BYTES // (entry_bytes * self.block_size))
        crc = 0
        for low in range(0, len(blocks), step):
            piece = self.read_blocks(blocks[low : low + step]).tobytes()[:left]
            crc = fmt.crc(piece, crc)
            left -= len(piece)
            yield piece
        if crc != blob.crc:
            raise StoreDamaged(f"store: {fmt.name_of_blob(kind)} {key} fails its checksum")

    # -- header -----------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make the root true: everything written before is durable first, then both slots.

        Raises:
            VolumeFull: No room for the root's chains; the committed state is as before.
        """
        payload_room = self.block_size - fmt.SEGMENT_HEADER
        self.root.generation += 1
        self.root.log_batches = self.log_sequence
        kinds = {kind for kind, _ in self.root.blobs}
        compat = fmt.COMPAT_CHECKSUMS if fmt.BlobKind.CHECKSUMS in kinds else 0
        compat |= fmt.COMPAT_PARTS if fmt.BlobKind.INDEX_PARTS in kinds else 0
        twins = fmt.RO_COMPAT_TWINS if self.root.twins or self.root.log_twin else 0
        self.root.ro_compat = self.root.ro_compat & ~fmt.RO_COMPAT_TWINS | twins
        raw = self.root.build()
        count = -(-len(raw) // payload_room)
        try:
            limits.root_limit(self.root, len(raw))
        except VolumeFull:
            self.root.generation -= 1
            raise
        if self.available < 2 * count:
            self.root.generation -= 1
            raise VolumeFull(
                f"the store has {self.available} free blocks and its header needs {2 * count}",
                hint="delete a snapshot or free space in the volume",
            )
        self.commit_due = True
        self._retract()
        if self._unsynced:
            self.device.flush()
            self._unsynced = False
        fresh = list(self.allocate_pair(count))
        try:
            for slot in self._order:
                first = self._write_chain(fresh[0], raw)
                head = fmt.build_slot(
                    compat=compat,
                    ro_compat=self.root.ro_compat,
                    incompat=self.root.incompat,
                    generation=self.root.generation,
                    store_uuid=self.root.store_uuid,
                    fs_uuid=self.root.fs_uuid,
                    block_size=self.block_size,
                    flags=self.root.flags,
                    root_block=first[0],
                    root_blocks=first[1],
                    root_crc=fmt.crc(raw),
                    root_bytes=len(raw),
                )
                self.device.pwrite(self.slot_block(slot) * self.block_size, head)
                self.device.flush()
                self.release(self._chains[slot])
                self._chains[slot] = fresh.pop(0)
        except BaseException:
            self._in_vain += fresh
            raise
        self._unsynced = self.commit_due = False
        self._unwanted = None
        for blocks in [*self._released, *self._in_vain]:
            self.unallocate(blocks)
        self._released, self._in_vain = [], []

    def _retract(self) -> None:
        """Take a batch whose barrier failed out of the log; one of an epoch that is over counts no more anyway."""
        if self._unwanted is not None and self._unwanted[0] == self.root.log_epoch:
            self._unsynced = True
            for start in self.log_copies():
                self.write_log(start, self._unwanted[1], bytes(fmt.SECTOR))

    @property
    def is_batch_unsure(self) -> bool:
        """Whether the log may have a batch whose barrier has not returned."""
        return self._unwanted is not None

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """What is done inside to root and blocks is undone in memory if it fails; nothing may be committed in it."""
        root = replace(
            self.root, blobs=dict(self.root.blobs), twins=dict(self.root.twins), properties=dict(self.root.properties)
        )
        available, count, cursor, released = self._available.copy(), self.available, self._cursor, len(self._released)
        try:
            yield
        except BaseException:
            vars(self.root).update(vars(root))
            self._available, self.available, self._cursor = available, count, cursor
            del self._released[released:]
            raise

    def slot_block(self, slot: int) -> int:
        """Physical block of slot 0 or 1."""
        return int(self.physical(np.array([slot], np.int64))[0])

    def _write_chain(self, chain: Ints, raw: bytes) -> tuple[int, int]:
        size = self.block_size
        runs = runs_of(self.physical(chain)) if len(chain) == 1 else _runs_unsorted(self.physical(chain))
        offset = 0
        for index, (start, length) in enumerate(runs.tolist()):
            payload = raw[offset : offset + length * size - fmt.SEGMENT_HEADER]
            offset += len(payload)
            following = runs[index + 1].tolist() if index + 1 < len(runs) else [0, 0]
            head = fmt.Segment.build(
                {
                    "magic": fmt.SEGMENT_MAGIC,
                    "crc": 0,
                    "generation": self.root.generation,
                    "next_block": following[0],
                    "next_blocks": following[1],
                    "payload_bytes": len(payload),
                }
            )
            body = bytes(head)[8:] + payload
            self.device.pwrite(start * size, fmt.SEGMENT_MAGIC + fmt.crc(body).to_bytes(4, "little") + body)
        return int(runs[0][0]), int(runs[0][1])

    @classmethod
    def load(cls, device: CloningDevice, slots: tuple[int, int], block_size: int, *, writable: bool = True) -> Store:
        """Open the store whose slots are at the given physical blocks.

        Args:
            writable: Whether it may be written: then features that only readers may ignore count as well.

        Raises:
            StoreDamaged: Neither slot leads to a valid root.
            UnsupportedFeature: The store has a feature that this version does not know.
        """
        device_blocks = device.size // block_size
        best: tuple[Any, bytes, int] | None = None
        chains: list[Ints] = [NO_BLOCKS, NO_BLOCKS]
        reasons = []
        for index, block in enumerate(slots):
            try:
                slot, raw, chains[index] = read_slot(device, block, block_size, device_blocks)
            except StoreDamaged as error:
                reasons.append(f"slot {'AB'[index]}: {error.message}")
                continue
            if best is None or slot.generation > best[0].generation:
                best = (slot, raw, index)
        if best is None:
            raise StoreDamaged(
                "store header: " + "; ".join(reasons),
                hint="the snapshots cannot be read; the base volume is not affected",
            )
        slot, raw, chosen = best
        unknown = slot.incompat & ~fmt.KNOWN_INCOMPAT
        if unknown:
            raise UnsupportedFeature(f"the store has unknown features {unknown:#x}", hint="use a newer extsnap")
        unknown = slot.ro_compat & ~fmt.KNOWN_RO_COMPAT
        if unknown and writable:
            raise UnsupportedFeature(
                f"the store has unknown features {unknown:#x}: it can be read only", hint="use a newer extsnap to write"
            )
        root = Root.parse(slot, raw, device_blocks)
        store = cls(device, root)
        if tuple(store.slot_block(index) for index in range(SLOT_BLOCKS)) != slots:
            raise StoreDamaged("store header: the slots are not where the store's own extents put them")
        store.mark_used(np.arange(SLOT_BLOCKS))
        store.mark_used(np.arange(root.log_start, root.log_start + root.log_blocks))
        if root.log_twin:
            store.mark_used(np.arange(root.log_twin, root.log_twin + root.log_blocks))
        for runs in [*(blob.runs for blob in root.blobs.values()), *root.twins.values()]:
            store.mark_used(expand(runs[:, 0], runs[:, 1]))
        store.worn = bool(reasons)
        for index, chain in enumerate(chains):
            # The chain of the slot that lost may hold blocks that the winner uses or does not own: it is free.
            if index == chosen or (len(chain) and _same_generation(device, slots, index, block_size, slot.generation)):
                store._chains[index] = store.logical(chain)
                store.mark_used(store._chains[index])
            else:
                store._order = (index, chosen)
        return store

    # -- log --------------------------------------------------------------------------------------------

    @property
    def log_bytes(self) -> int:
        """Capacity of the log."""
        return self.root.log_blocks * self.block_size

    @property
    def log_left(self) -> int:
        """Bytes of it that no batch has yet."""
        return self.log_bytes - self.log_position

    def batch_bytes(self, masks: int, words: int, records: int, crcs: int, runs: int = 0) -> int:
        """Space that a batch takes in the log: whole sectors."""
        raw = int(fmt.BATCH_HEADER) + masks * words * 8 + records * fmt.RECORD_DTYPE.itemsize + crcs * 4
        raw += runs * fmt.RUN_DTYPE.itemsize
        return -(-raw // fmt.SECTOR) * fmt.SECTOR

    def append_batch(
        self,
        masks: npt.NDArray[np.uint64],
        records: bytes,
        crcs: npt.NDArray[np.uint32],
        hides: Ints = NO_RUNS,
        shows: Ints = NO_RUNS,
    ) -> None:
        """Write the next batch into the log.  It counts once the caller's barrier returned (`log_advance`).

        If the barrier fails, the batch may count after a crash all the same: then nothing that it names has changed.
        Before its blocks get another use, the next commit takes it away.

        Raises:
            VolumeFull: It does not fit behind the others; nothing was written.
        """
        if self.commit_due:
            self.commit()
        payload = masks.astype("<u8").tobytes() + records + crcs.astype("<u4").tobytes()
        payload += fmt.build_runs(hides) + fmt.build_runs(shows)
        head = fmt.BatchHeader.build(
            {
                "magic": fmt.BATCH_MAGIC,
                "crc": 0,
                "epoch": self.root.log_epoch,
                "sequence": self.log_sequence,
                "masks": len(masks),
                "mask_words": masks.shape[1],
                "records": len(records) // fmt.RECORD_DTYPE.itemsize,
                "crcs": len(crcs),
                "hides": len(hides),
                "shows": len(shows),
                "reserved": bytes(16),
            }
        )
        body = bytes(head)[8:] + payload
        raw = fmt.BATCH_MAGIC + fmt.crc(body).to_bytes(4, "little") + body
        self._pending_batch = -(-len(raw) // fmt.SECTOR) * fmt.SECTOR
        if self._pending_batch > self.log_left:
            raise VolumeFull(
                f"the log has {self.log_left} bytes left and a batch needs {self._pending_batch}",
                hint="write less at once",
            )
        self._unwanted = self.root.log_epoch, self.log_position
        for start in self.log_copies():
            self.write_log(start, self.log_position, raw)

    def log_copies(self) -> list[int]:
        """First logical blocks of the log and of its twin."""
        return [self.root.log_start, *([self.root.log_twin] if self.root.log_twin else [])]

    def write_log(self, log: int, position: int, raw: bytes) -> None:
        """Write into a copy of the log, which begins at logical block ``log``.  Not durable before a barrier."""
        size = self.block_size
        at = 0
        first = position // size
        blocks = np.arange(first, (position + len(raw) + size - 1) // size, dtype=np.int64) + log
        physical = self.physical(blocks)
        start, length = breaks_to_runs(jumps(physical), 1 << 62)
        for index, count in zip(start.tolist(), length.tolist(), strict=True):
            skip = position % size if index == 0 else 0
            piece = raw[at : at + count * size - skip]
            self.device.pwrite(int(physical[index]) * size + skip, piece)
            at += len(piece)

    def log_advance(self) -> None:
        """The batch written last is durable: the next one goes behind it."""
        self._unwanted = None
        self.log_position += self._pending_batch
        self.log_sequence += 1

    def new_epoch(self) -> None:
        """The log is folded into blobs: it starts empty with the next commit."""
        self.root.log_epoch += 1
        self.commit_due = True
        self.log_position = 0
        self.log_sequence = 0

    def replay_log(self) -> list[Batch]:
        """All batches of this epoch, in order; the log is positioned behind the last.

        Raises:
            StoreDamaged: A valid batch stands behind an invalid one, or there were more at the last commit.
        """
        copies = [self.read_log(start) for start in self.log_copies()]
        batches: list[Batch] = []
        position = 0
        while True:
            found = [self.parse_batch(raw, position, len(batches)) for raw in copies]
            batch = next((one for one in found if one is not None), None)
            if batch is None:
                break
            self.worn |= None in found
            batches.append(batch[0])
            position += batch[1]
        for raw in copies:
            heads = np.flatnonzero(
                np.frombuffer(raw, np.uint8).reshape(-1, fmt.SECTOR)[:, :4].copy().view("<u4").ravel()
                == int.from_bytes(fmt.BATCH_MAGIC, "little")
            )
            for sector in heads[heads * fmt.SECTOR > position].tolist():
                later = self.parse_batch(raw, sector * fmt.SECTOR, None)
                if later is not None and later[0].sequence > len(batches):
                    raise StoreDamaged(
                        f"log: batch {len(batches)} at byte {position} is damaged, but batch {later[0].sequence} is not"
                    )
        if len(batches) < self.root.log_batches:
            raise StoreDamaged(f"log: batch {len(batches)} of {self.root.log_batches} at byte {position} is damaged")
        self.log_position, self.log_sequence = position, len(batches)
        return batches

    def read_log(self, start: int) -> bytes:
        """A copy of the log, by its first logical block."""
        return self.read_blocks(np.arange(start, start + self.root.log_blocks, dtype=np.int64)).tobytes()

    def parse_batch(self, raw: bytes, position: int, sequence: int | None) -> tuple[Batch, int] | None:
        """The batch at a byte of a copy of the log, and its length there in bytes; None where there is none."""
        head_raw = raw[position : position + fmt.BATCH_HEADER]
        if len(head_raw) < fmt.BATCH_HEADER or head_raw[:4] != fmt.BATCH_MAGIC:
            return None
        head = fmt.BatchHeader.parse(head_raw)
        if head.epoch != self.root.log_epoch or (sequence is not None and head.sequence != sequence):
            return None
        mask_bytes = head.masks * head.mask_words * 8
        record_bytes = head.records * fmt.RECORD_DTYPE.itemsize
        crc_bytes, run_bytes = head.crcs * 4, (head.hides + head.shows) * fmt.RUN_DTYPE.itemsize
        end = position + fmt.BATCH_HEADER + mask_bytes + record_bytes + crc_bytes + run_bytes
        if end > len(raw) or fmt.crc(raw[position + 8 : end]) != head.crc:
            return None
        at = position + fmt.BATCH_HEADER
        masks = np.frombuffer(raw[at : at + mask_bytes], "<u8").reshape(head.masks, head.mask_words)
        at += mask_bytes
        records = np.frombuffer(raw[at : at + record_bytes], fmt.RECORD_DTYPE)
        crcs = np.frombuffer(raw[at + record_bytes : end - run_bytes], "<u4")
        runs = fmt.parse_runs(raw[end - run_bytes : end], "log")
        size = -(-(end - position) // fmt.SECTOR) * fmt.SECTOR
        sequence = int(head.sequence)
        hides, shows = runs[: head.hides], runs[head.hides :]
        return Batch(sequence, masks.astype(np.uint64), records, crcs.astype(np.uint32), hides, shows), size


def _runs_unsorted(blocks: Ints) -> Ints:
    first, length = breaks_to_runs(jumps(blocks), 1 << 62)
    return np.stack([blocks[first], length], axis=1)


def read_slot(device: Device, block: int, block_size: int, device_blocks: int) -> tuple[Any, bytes, Ints]:
    """(slot, root bytes, physical blocks of the chain), every checksum verified."""
    if not 0 < block < device_blocks:
        raise StoreDamaged(f"block {block} lies outside the volume")
    slot = fmt.parse_slot(device.pread(block * block_size, fmt.SLOT_BYTES))
    if slot is None or slot.block_size != block_size:
        raise StoreDamaged(f"block {block} holds no valid slot")
    parts, chain = [], []
    start, length, total = slot.root_block, slot.root_blocks, 0
    while start:
        total += length
        if not 0 < start < device_blocks or not 0 < length <= device_blocks - start or total > device_blocks:
            raise StoreDamaged("the root's chain leaves the volume")
        limits.require_slot(slot.root_bytes, total, block_size)
        raw = device.pread(start * block_size, length * block_size)
        head = fmt.Segment.parse(raw[: fmt.SEGMENT_HEADER])
        end = fmt.SEGMENT_HEADER + head.payload_bytes
        valid = head.magic == fmt.SEGMENT_MAGIC and head.generation == slot.generation and end <= len(raw)
        if not valid or fmt.crc(raw[8:end]) != head.crc:
            raise StoreDamaged(f"the root's segment at block {start} is damaged")
        parts.append(raw[fmt.SEGMENT_HEADER : end])
        chain.append(np.arange(start, start + length))
        start, length = head.next_block, head.next_blocks
    root = b"".join(parts)
    if len(root) != slot.root_bytes or fmt.crc(root) != slot.root_crc:
        raise StoreDamaged("the root fails its checksum")
    return slot, root, np.concatenate(chain) if chain else NO_BLOCKS


def _same_generation(device: Device, slots: tuple[int, int], index: int, block_size: int, generation: int) -> bool:
    slot = fmt.parse_slot(device.pread(slots[index] * block_size, fmt.SLOT_BYTES))
    return slot is not None and slot.generation == generation
