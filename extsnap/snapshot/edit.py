"""Edits of the filesystem by extsnap itself: set-up, growth, shrinking, removal.

One idempotent operation, and what is durable when:

 1. the edit is made on an overlay in memory; nothing is written
 2. dirty mark on (durable)
 3. the changed blocks go into the store as REDO, and one header commit says: pending
 4. the blocks are written to the base volume through the write path (snapshots may need the old ones); barrier;
    of blocks that move the content is copied to the new place, which nobody else has; barrier
 5. one header commit says: the store's extents are the new ones, nothing is pending
 6. the mark comes off when the command ends

A crash before 3 changed nothing but the mark; between 3 and 5 the next command repeats 4 from the redo blocks,
which are absolute images; after 5 there is nothing to do.  Until 5 copies go only into blocks that the old and
the new extents share: what a shrink gives away is withdrawn before 3, what a growth adds counts after 5.
At set-up there is no header to find before the pointer is in the superblock, so 2 and the pointer are one write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from extsnap.arrays import (
    ByteWindows,
    Ints,
    bitmap_runs,
    bits_of,
    breaks_to_runs,
    distinct,
    expand,
    jumps,
    runs_of,
    set_runs,
)
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import RestoreRefused, StoreDamaged, VolumeFull
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import format as fmt
from extsnap.snapshot import graft
from extsnap.snapshot.engine import Engine
from extsnap.snapshot.root import SLOT_BLOCKS, Extents, Pending, Root
from extsnap.snapshot.store import Store

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: Room for copies that a volume with snapshots always has, in blocks: the next edit's own metadata needs it.
MINIMUM_ROOM = 96
#: Blocks by which what a change needs may be off while its copies are made, their records being rounded up.
ROUNDING = 2
NO_RUNS: Ints = np.zeros((0, 2), np.int64)
LOG_BYTES_MINIMUM = 64 << 10
LOG_BYTES_MAXIMUM = 4 << 20


def initial_sizes(volume_bytes: int, block_size: int) -> tuple[int, int]:
    """(store blocks, log blocks) for a new store, by the size of the volume."""
    log = min(max(volume_bytes // 256, LOG_BYTES_MINIMUM), LOG_BYTES_MAXIMUM) // block_size
    return 2 * log + (128 << 10) // block_size + 2 * MINIMUM_ROOM, log


def set_up(volume: Volume) -> None:
    """Give a plain volume its store.  On return the dirty mark is on and nothing is pending.

    Raises:
        VolumeFull: No room; nothing was written.
        FormatError: The filesystem is damaged; nothing was written.
    """
    volume.require_unused()
    overlay = Overlay(volume.medium, volume.block_size)
    fs = Filesystem.open(overlay, writable=True)
    _ = fs.journal  # a snapshot and the fingerprint need it: what cannot be read is refused before the first write
    if volume.stale is not None:
        graft.remove_stale(fs, volume.stale, volume.now_seconds())
    blocks, log_blocks = initial_sizes(volume.size, volume.block_size)
    geometry = fs.geometry
    blocks = -(-blocks // geometry.cluster_blocks) * geometry.cluster_blocks
    free = max(0, fs.free_blocks - geometry.reserved_blocks)
    if free < blocks + 8 * geometry.cluster_blocks:
        raise VolumeFull(
            f"the store needs {blocks} free blocks and the volume has {free} beyond those reserved for root",
            hint="delete files or grow the volume",
        )
    place, extents, mapping = graft.set_up(fs, blocks, volume.now_seconds())
    fs.flush()
    root = Root(
        store_uuid=volume.random_bytes(16),
        fs_uuid=fs.uuid,
        block_size=volume.block_size,
        flags=fmt.SlotFlags.GUARD,
        extents=extents,
        mapping=mapping,
        directory_inode=place.directory_inode,
        store_inode=place.store_inode,
        directory_block=place.directory_block,
        size_blocks=blocks,
        log_blocks=log_blocks,
        log_twin=SLOT_BLOCKS + log_blocks,
        # A random start: batches of an earlier store that stood in these blocks never look like ours.
        log_epoch=int.from_bytes(volume.random_bytes(7), "little") + 1,
        superblocks=volume.superblock_offsets(fs),
        pending=Pending(fmt.PendingKind.SET_UP, extents, mapping, blocks),
    )
    store = Store(volume.medium.device, root)
    store.mark_used(np.arange(SLOT_BLOCKS + 2 * log_blocks))
    store.write_blob(fmt.BlobKind.REDO, 0, _build_redo(overlay.changes()))
    store.commit()
    volume.adopt(store)
    volume.stale = None
    try:
        volume.set_mark(True)
        finish(volume)
    except BaseException:
        volume.reload()
        raise


def resize(volume: Volume, wanted: Extents, kind: fmt.PendingKind = fmt.PendingKind.RESIZE) -> None:
    """Make the store's extents ``wanted``.  The mark goes on and stays on.

    Raises:
        VolumeFull: No room for the edit's own copies; nothing was changed.
    """
    engine, store = volume.require_engine(), volume.require_store()
    overlay = Overlay(engine, volume.block_size)
    fs = Filesystem.open(overlay, writable=True)
    mapping = graft.resize(fs, store.root.store_inode, store.root.extents, wanted, volume.needed_groups())
    fs.flush()
    size = int((wanted[:, 0] + wanted[:, 2]).max())
    _carry_out(volume, Pending(kind, wanted, mapping, size), overlay.changes())


def reassert(volume: Volume) -> None:
    """Make the filesystem say of the store what the header says.  The mark goes on and stays on.

    Raises:
        StoreDamaged: Files have blocks or inodes of the store now; nothing was changed.
        VolumeFull: No room for the edit's own copies; nothing was changed.
    """
    root = volume.require_store().root
    overlay = Overlay(volume.require_engine(), volume.block_size)
    fs = Filesystem.open(overlay, writable=True)
    mapping = graft.reassert(fs, root, volume.now_seconds())
    fs.flush()
    _carry_out(volume, Pending(fmt.PendingKind.RESIZE, root.extents, mapping, root.size_blocks), overlay.changes())


def grow(volume: Volume, blocks: int, *avoid: ByteWindows) -> int:
    """Add up to ``blocks`` blocks to the store, in steps that its room pays for; returns how many were added.

    Blocks that a living snapshot preserves, the reserved blocks of the filesystem, and those in ``avoid``
    (bits in group rows) are left alone.
    """
    added = 0
    step = blocks
    while added < blocks and step >= 1:
        store = volume.require_store()
        fs = Filesystem.open(volume.require_engine())
        geometry = fs.geometry
        free = fs.free_blocks - geometry.reserved_blocks
        # Mapping blocks come out of the same free space: keep some of it for them.
        # Holes of the store are filled first, so that its length is never more than its blocks.
        largest = fs.largest_file // geometry.cluster_blocks * geometry.cluster_blocks
        limit = largest - store.root.owned
        ask = min(step, blocks - added, free - free // 64 - 8 * geometry.cluster_blocks, limit)
        if ask < 1:
            break
        runs = fs.find_free(ask, avoid=[volume.needed_groups(), *avoid])
        found = int(runs[:, 1].sum())
        if not found:
            break
        extents = store.root.extents
        new = graft.map_runs(graft.logical_runs(extents, found), runs)
        try:
            resize(volume, graft.join(np.concatenate([extents, new])))
        except VolumeFull:
            if is_begun(store, extents):
                raise
            step = found // 2
            continue
        added += found
        if found < ask:
            break
        step = 4 * found  # the room that was gained pays for a larger step
    return added


def shrink(volume: Volume, blocks: int) -> int:
    """Give up to ``blocks`` unused blocks of the store back to the filesystem; returns how many."""
    store = volume.require_store()
    unit = Filesystem.open(volume.require_engine()).geometry.cluster_blocks
    withdrawn = unused_runs(store, blocks, unit)
    if not len(withdrawn):
        return 0
    extents = store.root.extents
    try:
        with _withdrawn(store, withdrawn):
            resize(volume, without(store.root, withdrawn))
    except VolumeFull:
        if is_begun(store, extents):
            raise
        return 0
    return int(withdrawn[:, 1].sum())


def give_back_growth(volume: Volume, before: Extents) -> None:
    """Give back what the store grew by since it had the extents ``before``, as far as nothing in it is in use.

    The header's chains, which every commit puts somewhere else, leave it first.  The mark goes on and stays on.
    """
    store = volume.require_store()
    unit = volume.filesystem().geometry.cluster_blocks
    extents, size = store.root.extents, store.root.size_blocks

    def grown_and_free() -> Ints:
        bits = bits_of(store.available_runs(), size)
        set_runs(bits, before[:, [0, 2]], False)
        return bitmap_runs(bits, size)

    try:
        with _withdrawn(store, grown_and_free()):
            store.commit()
        whole = graft.whole_units(grown_and_free(), unit)
        if len(whole):
            with _withdrawn(store, whole):
                resize(volume, without(store.root, whole))
    except VolumeFull:
        if is_begun(store, extents):
            raise


def is_begun(store: Store, extents: Extents) -> bool:
    """Whether a change of the store's size was committed.

    If an error came after that it is to be finished, by `finish` or by the next open: nothing may be taken back, and
    nothing tried instead.

    Args:
        extents: As they were in the root before.
    """
    return store.root.pending is not None or store.root.extents is not extents


@contextlib.contextmanager
def _withdrawn(store: Store, runs: Ints) -> Iterator[None]:
    """Free blocks of the store are out of service meanwhile, and for good if a change of its size was begun."""
    extents = store.root.extents
    store.withdraw(runs)
    try:
        yield
    finally:
        if not is_begun(store, extents):
            store.put_back(runs)


def unused_runs(store: Store, blocks: int, unit: int) -> Ints:
    """Logical runs (start, length) of about ``blocks`` free blocks of the store that can be given back, sorted.

    Args:
        unit: Blocks of a cluster: only whole ones go, the store's logical clusters are physical ones.
    """
    keep = max(0, store.available - blocks)
    free = store.available_runs()
    # The first `keep` free blocks stay: the store's file ends as early as it can.
    before = np.cumsum(free[:, 1]) - free[:, 1]
    kept = np.clip(keep - before, 0, free[:, 1])
    start, end = -(-(free[:, 0] + kept) // unit) * unit, free.sum(axis=1) // unit * unit
    return np.asarray(np.stack([start, end - start], axis=1)[end > start])


def without(root: Root, runs: Ints) -> Extents:
    """The store's extents without the logical blocks in ``runs`` (start, length)."""
    bits = np.zeros((root.size_blocks + 7) // 8, np.uint8)
    set_runs(bits, root.extents[:, [0, 2]])
    set_runs(bits, runs, False)
    return graft.keep_logical(root.extents, bitmap_runs(bits, root.size_blocks))


def move(volume: Volume, blocks: Ints, *avoid: ByteWindows) -> None:
    """Move the store out of ``blocks`` (physical, sorted): content goes elsewhere, free ones are given back.

    The mark goes on and stays on.  The new blocks are needed by no snapshot, so that writing them under the engine
    hurts nobody: see `finish`.

    Args:
        avoid: Bits in group rows, blocks not to move into.

    Raises:
        VolumeFull: There is no room for them; nothing was changed.
        RestoreRefused: They hold a slot of the header, which never moves.
    """
    engine, store = volume.require_engine(), volume.require_store()
    fs = Filesystem.open(engine)
    unit = fs.geometry.cluster_blocks
    logical = np.sort(store.logical(blocks))
    if logical[0] < SLOT_BLOCKS:
        raise RestoreRefused(
            "the header of the store is in the way; nothing was changed", hint="export the snapshot instead"
        )
    free = store.is_available(logical)
    # So many free ones come along that the change itself has room.
    short = engine.reserve() + MINIMUM_ROOM - (store.available - int(free.sum()))
    free &= np.cumsum(free) > short
    moves = np.isin(logical // unit, distinct(logical[~free] // unit))  # a cluster moves whole
    count = int(moves.sum())
    runs = fs.find_free(count, avoid=[volume.needed_groups(), *avoid]) if count else NO_RUNS
    if int(runs[:, 1].sum()) < count:
        raise VolumeFull(
            f"{count} blocks of the store must move and only {int(runs[:, 1].sum())} blocks are free that no "
            f"snapshot needs; nothing was changed",
            hint="delete a snapshot, or export this one instead",
        )
    wanted = without(store.root, runs_of(logical))
    if count:
        wanted = graft.join(np.concatenate([wanted, graft.map_runs(runs_of(logical[moves]), runs)]))
    with _withdrawn(store, runs_of(logical[~moves])):
        resize(volume, wanted, fmt.PendingKind.MOVE)


def remove(volume: Volume) -> None:
    """Take ``/.extsnap``, the guard and the pointer away: a plain volume again.  There are no snapshots left."""
    store = volume.require_store()
    overlay = Overlay(volume.require_engine(), volume.block_size)
    fs = Filesystem.open(overlay, writable=True)
    graft.remove(fs, volume.now_seconds())
    fs.flush()
    pending = Pending(fmt.PendingKind.STRIP, store.root.extents, store.root.mapping, store.root.size_blocks)
    _carry_out(volume, pending, overlay.changes())


def _carry_out(volume: Volume, pending: Pending, changes: dict[int, bytes]) -> None:
    """Commit an edit and do it.

    If an error comes after it may have been committed, the state is read anew, which finishes it: until that has been
    done nobody may write, for the next open would put its blocks over theirs.
    """
    store = volume.require_store()
    try:
        _commit(volume, pending, changes)
        finish(volume)
    except BaseException:
        if store.root.pending is not None and volume.store is store:
            volume.reload()
        raise


def _commit(volume: Volume, pending: Pending, changes: dict[int, bytes]) -> None:
    """Steps 2 and 3, after making sure that step 4 cannot lack room."""
    volume.require_unused()
    engine, store = volume.require_engine(), volume.require_store()
    engine.commit()  # what is held has a claim on the room
    redo = _build_redo(changes)
    positions = np.array(sorted(changes), np.int64) + engine.shift
    if engine.owns(positions).any():
        # What is committed must be redone at every open until it is done: never commit what cannot be.
        raise StoreDamaged("a change of the store's size would write into the store", hint="run extsnap check")
    copies = int(engine.need.test(positions).sum())
    redo_blocks = 2 * -(-len(redo) // volume.block_size)
    needed = _room_for(engine, pending, redo_blocks, copies)
    if needed > store.available - engine.reserve():
        raise VolumeFull(
            f"the store has room for {max(0, store.available - engine.reserve())} blocks and the change "
            f"of its own size needs {needed}",
            hint="delete a snapshot",
        )
    volume.set_mark(True)
    store.write_blob(fmt.BlobKind.REDO, 0, redo)
    store.root.pending = pending
    try:
        store.commit()
    except VolumeFull:  # before anything was written
        store.root.pending = None
        for runs in (store.root.blobs.pop((fmt.BlobKind.REDO, 0)).runs, store.root.twins.pop((fmt.BlobKind.REDO, 0))):
            store.unallocate(expand(runs[:, 0], runs[:, 1]))
        raise


def _room_for(engine: Engine, pending: Pending, redo_blocks: int, copies: int) -> int:
    """Blocks beyond the engine's reserve that all of a change takes: what is committed must not fail for want of room.

    Besides redo blocks and copies (with their records, and masks that nobody has yet) it is the header, which has
    the new extents beside the old ones until the change is done, and then instead of them.
    """
    store, root, size = engine.store, engine.store.root, engine.block_size
    extents, mapping = len(pending.extents), len(pending.mapping)
    instead = 24 * max(0, extents - len(root.extents)) + 16 * max(0, mapping - len(root.mapping))
    needed = redo_blocks - (-4 * instead // size)
    if not copies:
        return needed  # the reserve has room for both headers, and nothing else is asked for
    beside = 24 * extents + 16 * mapping + 16 * min(redo_blocks, len(store.available_runs()) + 2) + 64
    payload, now = size - fmt.SEGMENT_HEADER, len(root.build())
    header = 2 * (-(-(now + beside) // payload) - now // payload)
    masks = -(-16 * engine.masks.words * copies // size)
    return int(needed + engine.blocks_for(copies) + header + masks + ROUNDING)


def finish(volume: Volume) -> None:
    """Steps 4 and 5 of whatever is pending; safe to repeat."""
    engine, store = volume.require_engine(), volume.require_store()
    pending = store.root.pending
    if pending is None:
        return
    if pending.kind != fmt.PendingKind.STRIP:
        store.withdraw_all_but(pending.extents)  # whoever finds it pending at open has them all
    with engine.own_edit():
        for offset, data in _parse_redo(store.read_blob(fmt.BlobKind.REDO, 0), volume.block_size, engine):
            engine.pwrite(offset, data)
        engine.flush()
    if pending.kind == fmt.PendingKind.STRIP:
        volume.forget_store()
        return
    if pending.kind == fmt.PendingKind.MOVE:
        store.carry(pending.extents)
    store.root.extents = pending.extents
    store.root.mapping = pending.mapping
    store.root.size_blocks = pending.size_blocks
    store.root.pending = None
    store.drop_blob(fmt.BlobKind.REDO, 0)
    store.set_extents(pending.extents)
    engine.set_owned(pending.extents)
    store.commit()


def _build_redo(changes: dict[int, bytes]) -> bytes:
    blocks = sorted(changes)
    head = np.array([len(blocks), *blocks], "<u8").tobytes()
    return head + b"".join(changes[block] for block in blocks)


def _parse_redo(raw: bytes, block_size: int, engine: Engine) -> list[tuple[int, bytes]]:
    """(offset, data) of the redo blocks, neighbours joined.

    Raises:
        StoreDamaged: Its size does not fit its count, or a block lies outside the volume.
    """
    count = int.from_bytes(raw[:8], "little")
    if len(raw) != 8 + count * (8 + block_size):
        raise StoreDamaged("redo: the size does not fit the count")
    blocks: Ints = np.frombuffer(raw[8 : 8 + 8 * count], "<u8").astype(np.int64)
    if count and (blocks.min() < 0 or blocks.max() >= engine.blocks):
        raise StoreDamaged("redo: a block lies outside the volume")
    first, length = breaks_to_runs(jumps(blocks), 256)
    body = 8 + 8 * count
    return [
        (int(blocks[index]) * block_size, raw[body + index * block_size : body + (index + run) * block_size])
        for index, run in zip(first.tolist(), length.tolist(), strict=True)
    ]
