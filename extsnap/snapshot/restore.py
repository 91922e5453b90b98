"""Restore: the base volume becomes a snapshot, and every other snapshot stays.

It is an exchange.  The target's old content goes home to the base volume, what stood there is copied for the
snapshots that need it (the safety snapshot among them), and the records whose copies now equal the base are
dropped.

What is durable when:
 1. room for every copy is made or the restore is refused; nothing changed but the size of the store
 2. mark on; one header commit makes the safety snapshot and the restore intent true together
 3. the target is written through the write path, data first, the grafted metadata last; barrier
 4. one header commit drops the records that are equal now, takes over the mapping blocks, ends the intent
 5. the mark comes off
A crash between 2 and 4 leaves the mark, so nobody mounts a half-restored volume, and the next command repeats 3:
the target's view does not change meanwhile, because the write path preserves it like every other snapshot.
An error between them is the same: what is in memory is read anew, and whoever goes on with the volume (a server)
serves nothing of it and takes no other command before 3 and 4 are done (`finish`).  Where they cannot be, a copy being
damaged, the restore of another snapshot takes its place (`_supersede`).
"""

from __future__ import annotations

import shlex
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from extsnap.arrays import Bits, Ints, distinct, expand, runs_of, without
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import ExtsnapError, NeedsRecovery, RestoreRefused, SnapshotNotFound, VolumeFull
from extsnap.ext import log
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.journal import SEQUENCES, later
from extsnap.ext.orphans import waiting
from extsnap.ext.owners import used_by_inodes
from extsnap.ondisk.superblock import State
from extsnap.snapshot import edit, graft, hidden, taking
from extsnap.snapshot import format as fmt
from extsnap.snapshot.index import Level
from extsnap.snapshot.root import RestoreIntent
from extsnap.snapshot.view import View
from extsnap.sparsebits import SparseBits

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: How much is exchanged with one barrier.
EXCHANGE_BYTES = 32 << 20
#: Blocks of metadata written at once, and blocks that are decided on together.
PIECE_BLOCKS = 1024
#: More transactions than any volume sees between a snapshot and its restore.
FAR = 1 << 30


def restore(volume: Volume, name: str, *, safety: bool = True) -> fmt.Snapshot | None:
    """Restore ``name``; returns the safety snapshot that goes back, if any.

    A restore to another snapshot that was begun is finished first.  If it cannot be, this one takes its place.

    Raises:
        SnapshotNotFound: No such snapshot.
        RestoreRefused, VolumeFull: It cannot be done; nothing was changed.
        NeedsRecovery: It was begun and is not finished; the next command finishes it.  Or the volume is under repair.
    """
    standing = None
    try:
        if safety:
            volume.require_trusted()
        else:
            volume.require_inside()  # what is not kept need not be whole
    except (ExtsnapError, OSError):
        standing = volume.standing
        if standing is None or standing.target_id == volume.find(name).id:
            raise
    volume.require_unused()
    target = volume.find(name)
    if standing is not None:
        return _supersede(volume, target, standing)
    engine, store = volume.require_engine(), volume.require_store()
    created = volume.now_ns()
    staged = None
    grown = 0
    try:
        _reveal(volume, everything=not safety and volume.needs_replay)
        if not safety:
            _require_readable(volume, target)
        avoid, offsets = _move_out(volume, target)
        for _ in range(4):
            engine.flush()
            changes, mapping, sequence = _target_metadata(volume, target, None, None)
            copies = _copies_needed(volume, _written(volume, target, changes), everything=safety)
            needed = engine.blocks_for(copies) + (taking.table_blocks(volume) if safety else 0)
            missing = needed + engine.reserve() + edit.MINIMUM_ROOM - store.available
            if missing <= 0:
                break
            more = edit.grow(volume, missing + 32, avoid)
            grown += more
            if not more:
                break
        if missing > 0:
            raise VolumeFull(
                f"the restore needs {copies * volume.block_size} bytes for copies, {missing * volume.block_size} more "
                f"than the volume has; nothing was changed",
                hint="delete a snapshot, delete files, or use --no-safety",
            )
        volume.set_mark(True)
        if safety:
            staged = taking.stage(
                volume,
                _safety_name(volume, target, created),
                f"before restoring {name}",
                fmt.Kind.SAFETY,
                created,
                restored_from=name,
            )
        # The superblocks of then and now: elsewhere a snapshot's file may have what looks like one.
        volume.retarget(sorted(set(store.root.superblocks) & set(offsets)))
        store.root.restore = RestoreIntent(target.id, staged.entry.id if staged else 0, sequence, mapping)
        if staged is not None:
            taking.commit(volume, staged)
        else:
            store.commit()
    except Exception as error:
        volume.back_to_rest()
        # A barrier that failed may still have made the intent durable: then it is begun.
        if volume.standing is not None and isinstance(error, (ExtsnapError, OSError)):
            raise _unfinished(volume, target, error) from error
        if grown and not volume.serving and volume.standing is None:
            edit.shrink(volume, grown)
            volume.settle()
        raise
    finish(volume)
    return staged.entry if staged is not None else None


def _require_readable(volume: Volume, target: fmt.Snapshot) -> None:
    """Without a safety snapshot there is no way back: a copy that cannot be read is met before anything is begun.

    Raises:
        DamagedCopy, OSError: There is one.
    """
    ahead = _Ahead(View(volume.require_engine(), target), _recorded_blocks(volume, target))
    while ahead.take() is not None:
        pass


def _supersede(volume: Volume, target: fmt.Snapshot, standing: RestoreIntent) -> fmt.Snapshot | None:
    """Restore a snapshot in the place of another one, whose restore was begun and cannot be finished.

    The base volume is partly that one and partly what it was before: nothing that a safety snapshot could keep, and no
    filesystem in which the store could grow or move.  The safety snapshot of before stays, and it can always be
    restored: the store is where it was then.  One header commit puts the new intent in the place of the old one; a
    crash before it leaves that.

    Returns:
        The safety snapshot of the first restore, if there is one and it is not the target.

    Raises:
        RestoreRefused, VolumeFull: It cannot be done; nothing was changed.
        NeedsRecovery: It was begun and is not finished.
    """
    engine, store = volume.require_engine(), volume.require_store()
    safety = next((entry for entry in volume.snapshot_list() if entry.id == standing.safety_id), None)
    try:
        changes, mapping, sequence = _target_metadata(volume, target, None, None)
        # What was copied for the first restore is not copied again, and no room is left for an edit to come.
        positions = _written(volume, target, changes) + engine.shift
        copies = engine.copies_for(positions[at : at + PIECE_BLOCKS] for at in range(0, len(positions), PIECE_BLOCKS))
        missing = engine.blocks_for(copies) + engine.reserve() - store.available
        if missing > 0:
            raise VolumeFull(
                f"the restore needs {missing * volume.block_size} bytes more than the store has, and it cannot grow in "
                f"a volume that is half restored; nothing was changed",
                hint=f"restore {safety.name} first" if safety else "export the snapshot instead",
            )
        offsets = volume.superblock_offsets(Filesystem.open(_as_restored(volume, target)))
        volume.retarget(sorted(set(store.root.superblocks) & set(offsets)))
        store.root.restore = RestoreIntent(target.id, standing.safety_id, sequence, mapping)
        store.commit()
    except BaseException:
        volume.back_to_rest()
        raise
    finish(volume)
    return safety if safety is not target else None


def finish(volume: Volume) -> None:
    """Do what is left of a restore that was begun, if there is one, and bring the volume to rest.

    What opening the volume has just failed to do is not tried again, only told: the command that comes then may be the
    restore of another snapshot.

    Raises:
        NeedsRecovery: It is not done, and nothing of it is in memory; or it is done and the volume not at rest.  The
            message tells which, and the next call goes on.
    """
    standing = volume.standing
    if standing is not None:
        volume.restoring = next(entry for entry in volume.snapshot_list() if entry.id == standing.target_id)
    target = volume.restoring
    if target is None:
        return
    hindrance, volume.hindrance = volume.hindrance, None
    try:
        if hindrance is not None:
            raise hindrance
        if standing is not None:
            complete(volume)
        volume.restoring = None
        volume.vital = None  # metadata may be elsewhere
        volume.needs_replay = False
        volume.settle()
        volume.cut(target.volume_bytes)  # with a safety snapshot of a longer volume it stays as long
    except (ExtsnapError, OSError) as error:
        volume.restoring = target
        raise _unfinished(volume, target, error) from error


def _unfinished(volume: Volume, target: fmt.Snapshot, error: ExtsnapError | OSError) -> NeedsRecovery:
    """What is to be told of an error in the middle of a restore."""
    reason = error.message if isinstance(error, ExtsnapError) else error.strerror or str(error)
    standing = volume.standing
    hint = "the next command that writes, or extsnap run, completes it"
    if volume.store is not None and volume.store.root.restore is None:
        return NeedsRecovery(f"{volume.name} is restored to {target.name!a}, but not yet at rest: {reason}", hint=hint)
    if standing is not None:
        names = [entry.name for entry in volume.snapshot_list() if entry.id == standing.safety_id != target.id]
        others = [entry for entry in volume.snapshot_list() if entry.id != target.id]
        if names:
            hint += f"; if it cannot, extsnap restore {shlex.join([volume.name, *names])} goes back"
        elif others:
            hint += f"; if it cannot, extsnap restore {volume.name} SNAPSHOT gives it up"
    return NeedsRecovery(
        f"the restore of {volume.name} to {target.name!a} was begun and is not finished: {reason}", hint=hint
    )


def has_work_left(volume: Volume, name: str) -> bool:
    """Whether a volume that was restored to a snapshot has something that e2fsck or the next mount has to do.

    Files that were open and unlinked at the snapshot's moment; without a journal all that a crash then would have left.
    """
    if volume.find(name).consistency == fmt.Consistency.CLEAN:
        return False
    try:
        fs = volume.filesystem()
        return not fs.is_clean or bool(waiting(fs))
    except ExtsnapError:  # e2fsck decides
        return True


def _reveal(volume: Volume, *, everything: bool) -> None:
    """What is written below is what differs from the base on the medium: nothing may be hidden.

    Args:
        everything: The base is given up: all of it may show what the medium has.

    Raises:
        VolumeFull: Blocks in use find no room; nothing was changed.
    """
    engine = volume.require_engine()
    engine.flush()
    if everything:
        hidden.forget(engine)
        engine.flush()
    volume.reveal()
    if engine.hidden.some:
        raise VolumeFull(
            f"{volume.name} has zeros that were written and find no room for copies of what was there",
            hint="delete a snapshot, or use --no-safety",
        )


def _move_out(volume: Volume, target: fmt.Snapshot) -> tuple[SparseBits, list[int]]:
    """Move the store out of blocks that the restored volume uses for files, or that lie past its end.

    Returns:
        (blocks that the store must not take until the restore is done, in today's groups;
        byte offsets of the restored volume's superblocks).

    Raises:
        VolumeFull, RestoreRefused: It cannot; nothing was changed.
    """
    root = volume.require_store().root
    then = Filesystem.open(_as_restored(volume, target), writable=True)
    blocks = graft.in_the_way(then, root.store_inode, root.extents)
    now = Filesystem.open(volume.require_engine()).geometry
    avoid = then.block_bitmaps().reshaped(now.groups, now.blocks_per_group // 8)
    behind = min(now.groups, then.geometry.groups) * now.blocks_per_group
    avoid.set(np.array([[behind, now.groups * now.blocks_per_group - behind]], np.int64))
    if len(blocks):
        edit.move(volume, blocks, avoid)
    return avoid, volume.superblock_offsets(then)


def newest_safety(volume: Volume) -> fmt.Snapshot:
    """The safety snapshot that ``--undo`` goes back to.

    Raises:
        SnapshotNotFound: There is none.
    """
    found = [entry for entry in volume.snapshot_list() if entry.kind == fmt.Kind.SAFETY]
    if not found:
        raise SnapshotNotFound(f"{volume.name} has no safety snapshot to go back to", hint="see extsnap list")
    return found[-1]


def _safety_name(volume: Volume, target: fmt.Snapshot, created: int) -> str:
    """``before-restore-NAME-TIME``; going back to a safety snapshot is an undo, whose name would only grow."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(created // 10**9))
    base = f"before-undo-{stamp}"
    if target.kind != fmt.Kind.SAFETY:
        room = 255 - len(f"before-restore--{stamp}-999")
        base = f"before-restore-{target.name.encode()[:room].decode(errors='ignore')}-{stamp}"
    taken = set(volume.snapshot_names())
    number, chosen = 1, base
    while chosen in taken:
        number += 1
        chosen = f"{base}-{number}"
    return chosen


def _recorded_blocks(volume: Volume, target: fmt.Snapshot) -> Ints:
    """Blocks whose content the target keeps in a copy: all that is to be written; sorted.

    Those that are the store's data now stay that.  The target's files use none of them (see `_move_out`), so they were
    free then, and kept because nobody knew, or were the store's nodes; its view goes on reading the copies.
    """
    engine = volume.require_engine()
    named = engine.masks.has(target.bit)
    parts = [expand(level.block[named[level.mask]], level.length[named[level.mask]]) for level in engine.index.levels]
    blocks = distinct(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
    return blocks[~engine.owns(blocks + engine.shift)]


def _written(volume: Volume, target: fmt.Snapshot, changes: dict[int, bytes]) -> Ints:
    """Blocks that a restore with these ``changes`` of metadata writes, at most; sorted."""
    return distinct(np.concatenate([_recorded_blocks(volume, target), np.array(sorted(changes), np.int64)]))


def _copies_needed(volume: Volume, blocks: Ints, *, everything: bool) -> int:
    """An upper bound of the copies that writing ``blocks`` makes; with ``everything`` a safety snapshot counts too."""
    engine = volume.require_engine()
    needed = engine.need.test(blocks + engine.shift)
    if everything:
        needed |= taking.preserved_now(volume).test(blocks + engine.shift)
    return int(needed.sum())


def _as_restored(volume: Volume, target: fmt.Snapshot) -> Overlay:
    """What the target is restored to, before today's store is put into it: the same whenever it is asked for.

    Of a moment in which nothing was brought to rest that is what a recovery makes of it.  Files that were open and
    unlinked stay for e2fsck or the next mount to let go.

    Raises:
        RestoreRefused: It cannot be made.
    """
    overlay = Overlay(View(volume.require_engine(), target), volume.block_size)
    if target.consistency == fmt.Consistency.CLEAN:
        return overlay
    try:
        fs = Filesystem.open(overlay, writable=True, lenient=True)
        if fs.needs_recovery:
            log.replay(fs)
            log.recovered(Filesystem.open(overlay, writable=True))
            Filesystem.open(overlay).block_bitmaps()
        elif target.consistency == fmt.Consistency.CRASH and not fs.is_clean:
            # Stock e2fsck, which comes afterwards, goes by the inodes: what they have must not be the store's.
            fs.seal_unsound()
            unmarked = used_by_inodes(fs)
            unmarked -= fs.block_bitmaps()
            fs.set_blocks(unmarked.runs() + np.array([fs.geometry.first_data_block, 0]), True)
            fs.flush()
            Filesystem.open(overlay).block_bitmaps()
        elif target.consistency == fmt.Consistency.FROZEN and not fs.is_clean and not waiting(fs):
            # Without a journal no freeze says that it is consistent, which it is.
            fs.superblock.s_state |= State.VALID
            fs.sum_counts()
            fs.write_superblock()
    except ExtsnapError as error:
        raise RestoreRefused(
            f"snapshot {target.name} of {volume.name} needs a recovery that cannot be done here: {error.message}; "
            f"nothing was changed",
            hint=f"take files out of extsnap mount --snapshot {target.name} --scratch",
        ) from error
    return overlay


def _target_metadata(
    volume: Volume, target: fmt.Snapshot, mapping: Ints | None, sequence: int | None
) -> tuple[dict[int, bytes], Ints, int]:
    """The target's metadata with today's store in it.

    Returns:
        (blocks that differ from the target's view, mapping blocks, journal sequence).
    """
    store = volume.require_store()
    overlay = _as_restored(volume, target)
    fs = Filesystem.open(overlay, writable=True)
    mapping = graft.replace_store(fs, store.root.store_inode, store.root.extents, mapping, volume.needed_groups())
    journal = fs.journal
    if journal is not None:
        if sequence is None:
            sequence = (later(journal.sequence, _sequence_now(volume, journal.sequence)) + 1) % SEQUENCES
        fs.write_block(journal.superblock_block, journal.superblock_with(sequence=sequence))
    fs.flush()
    changes = overlay.changes()
    return _outside(changes, store.root.extents[:, 1:]), mapping, sequence or 0


def _outside(changes: dict[int, bytes], runs: Ints) -> dict[int, bytes]:
    """The changes without those in blocks of the store: a log may have content for what was free then."""
    if not len(runs):
        return changes
    starts, lengths = runs[np.argsort(runs[:, 0])].T
    blocks = np.array(list(changes), np.int64)
    at = np.searchsorted(starts, blocks, side="right") - 1
    inside = (at >= 0) & (blocks - starts[at] < lengths[at])
    return {block: changes[block] for block in blocks[~inside].tolist()}


def _sequence_now(volume: Volume, then: int) -> int:
    """Sequence past everything that the base volume's journal can hold; without one that of the target (``then``).

    Without it a stale block could look like the next transaction of the restored journal.  A filesystem too damaged
    to tell has no journal that anybody replays before the restore is done: far ahead of the target is past all of it.
    """
    standing = volume.standing
    if standing is not None:  # it was past all, and nobody has used the journal since; 0: its target has none
        return standing.journal_sequence or (then + FAR) % SEQUENCES
    try:
        fs = volume.filesystem()
        journal = fs.journal
        return log.end_sequence(fs, journal) if journal else then
    except ExtsnapError:
        return (then + FAR) % SEQUENCES


def complete(volume: Volume) -> None:
    """Steps 3 and 4 of the restore that the header intends; safe to repeat.

    Raises:
        ExtsnapError, OSError: It is not done.  The state in memory is the committed one: nothing of a commit that
            failed is there for the next one to make true by half.
    """
    try:
        with volume.require_engine().own_edit():
            _complete(volume)
    except BaseException:
        volume.reload()
        raise


def _complete(volume: Volume) -> None:
    engine, store = volume.require_engine(), volume.require_store()
    intent = store.root.restore
    if intent is None:
        return
    target = next(entry for entry in engine.snapshots if entry.id == intent.target_id)
    view = View(engine, target)
    changes, mapping, _ = _target_metadata(volume, target, intent.mapping, intent.journal_sequence)
    recorded = _recorded_blocks(volume, target)
    metadata = np.array(sorted(changes), np.int64)
    plain = without(recorded, metadata)
    size = volume.block_size
    _exchange(volume, view, plain)
    engine.commit()
    for start, count in runs_of(metadata).tolist():
        for block in range(start, start + count, PIECE_BLOCKS):
            last = min(block + PIECE_BLOCKS, start + count)
            engine.pwrite(block * size, b"".join(changes[number] for number in range(block, last)))
    engine.flush()
    _drop_equal(volume, target, plain)
    store.root.mapping = mapping
    store.root.restore = None
    engine.fold(commit=False)
    store.commit()
    engine.index.apply_writes()


class _Ahead:
    """Content of a view's blocks, piece by piece; the next piece may be read before it is asked for."""

    def __init__(self, view: View, blocks: Ints) -> None:
        """Read ``blocks`` (sorted)."""
        size = view.engine.block_size
        most = EXCHANGE_BYTES // size
        self._view = view
        self._pieces = deque(blocks[low : low + most] for low in range(0, len(blocks), most))
        self._buffers = deque(np.empty((min(most, len(blocks)), size), np.uint8) for _ in range(2))
        self._ready: tuple[Ints, Bits] | None = None
        self._error: Exception | None = None

    def read(self) -> None:
        """Read the next piece, if that was not done; an error is kept for who asks for it."""
        if self._ready is not None or self._error is not None or not self._pieces:
            return
        blocks = self._pieces.popleft()
        content = self._buffers[0][: len(blocks)]
        self._buffers.rotate()
        try:
            self._view.read_blocks(blocks, content)
        except (ExtsnapError, OSError) as error:
            self._error = error
        self._ready = blocks, content

    def take(self) -> tuple[Ints, Bits] | None:
        """The next piece (blocks, content), which is good until the next but one is read; None: that was all."""
        self.read()
        if self._error is not None:
            raise self._error
        ready, self._ready = self._ready, None
        return ready


def _exchange(volume: Volume, view: View, blocks: Ints) -> None:
    """Make the base equal to the view in ``blocks`` (sorted), writing only what differs."""
    engine, size = volume.require_engine(), volume.block_size
    whole = blocks[blocks < view.size // size]
    ahead = _Ahead(view, whole)
    while (piece := ahead.take()) is not None:
        engine.rewrite(*piece, meanwhile=ahead.read)
    for block in blocks[len(whole) :].tolist():  # a ragged last one
        engine.pwrite(block * size, view.pread(block * size, view.size - block * size))


def _drop_equal(volume: Volume, target: fmt.Snapshot, blocks: Ints) -> None:
    """Drop the records of the target in ``blocks``, where copy and base are equal and durable now.

    All snapshots of such a record read the same content, so all of them need the base block from here on.
    """
    if not len(blocks):
        return
    engine, store = volume.require_engine(), volume.require_store()
    named = engine.masks.has(target.bit)
    before: list[Ints] = []
    after: list[Ints] = []
    levels: list[Level] = []
    for level in engine.index.levels:
        cut = level.without(blocks, named[level.mask])
        levels.append(cut)
        if cut is not level:
            before.append(expand(level.copy[level.copy >= 0], level.length[level.copy >= 0]))
            after.append(expand(cut.copy[cut.copy >= 0], cut.length[cut.copy >= 0]))
    engine.index.replace(levels)
    if before:
        store.release(without(distinct(np.concatenate(before)), distinct(np.concatenate(after))))
    engine.need.set(runs_of(blocks) + np.array([engine.shift, 0]))
