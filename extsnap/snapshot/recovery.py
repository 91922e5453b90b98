"""How a volume is found: what was interrupted is finished, outside writes are seen, store and filesystem agree again.

The states are those of the table in `extsnap.snapshot.volume`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from extsnap.errors import ExtsnapError, FormatError, StoreDamaged
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import edit, graft, taking
from extsnap.snapshot import format as fmt
from extsnap.snapshot.check import note
from extsnap.snapshot.moment import detect_outside_write, fingerprint, left_undone

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume


def recover(volume: Volume) -> None:
    """Finish what an interrupted command left; see the table in `extsnap.snapshot.volume`."""
    store = volume.store
    if store is None:
        return
    is_open = bool(store.root.flags & fmt.SlotFlags.OPEN)
    marked = volume.medium.state.mark
    engine = volume.require_engine()
    if engine.lost:
        return
    if not marked:
        detect_outside_write(volume)
        if engine.lost_parts:
            return  # nothing is written but by a delete of all that are affected, or a strip
        if not volume.outside_write:
            _require_own_blocks(volume)
        if not volume.outside_write and (store.worn or engine.history.worn):
            volume.mended = note(volume, [], [])
        return
    engine.repair_last_batch()
    edit.finish(volume)
    if volume.store is None:
        return
    if store.root.restore is not None:
        from extsnap.snapshot.restore import complete

        try:
            complete(volume)
        except (ExtsnapError, OSError) as error:
            if volume.standing is None:
                raise
            volume.hindrance = error
            return
    fs = volume.filesystem()
    if left_undone(fs) or (is_open and not fs.is_clean):
        volume.needs_replay = True
        return
    try:
        reconcile(volume, fs)
        volume.reveal()
        volume.settle()
    except FormatError:
        volume.needs_replay = True


def _require_own_blocks(volume: Volume) -> None:
    """Refuse to write into a store that claims blocks of the filesystem's own, or of other files.

    Nobody wrote outside extsnap, so header and inode agree, whoever made them.

    Raises:
        StoreDamaged: They do not, or the blocks hold metadata of the filesystem.
    """
    root = volume.require_store().root
    fs = Filesystem.open(volume.medium)
    hint = "its snapshots can be read and exported; extsnap check tells more"
    try:
        taken = graft.has_metadata(fs, root)
    except FormatError:  # a damaged descriptor is not the store's fault, and found again by whoever needs it
        return
    if taken:
        raise StoreDamaged(f"{volume.name}: the store claims blocks of the filesystem's metadata", hint=hint)
    if not graft.is_whole(fs, root):
        raise StoreDamaged(f"{volume.name}: the store's header and its inode name different blocks", hint=hint)


def reconcile(volume: Volume, fs: Filesystem) -> None:
    """After writes from above or a replay: filesystem and header say the same about the store again.

    A tool may have given the store's blocks or inodes free in the bitmaps, and a replay may have brought back
    the removal that the warden refused before: all that is put back.  Nodes may be elsewhere: that is fine.

    Raises:
        StoreDamaged: Files have blocks or inodes of the store now; nothing was changed.
    """
    store = volume.require_store()
    if graft.is_left_by_kernel(fs, store.root):
        edit.resize(volume, store.root.extents)
        fs = volume.filesystem()
    if not graft.is_whole(fs, store.root) or not graft.is_marked_used(fs, store.root):
        edit.reassert(volume)
        return
    mapping = fs.file_map(store.root.store_inode).mapping
    if set(mapping.tolist()) != set(store.root.mapping.tolist()):
        store.root.mapping = mapping
        store.commit()  # whoever reads the state anew finds it


def accept_outside_write(volume: Volume) -> list[str]:
    """Go on after an outside write: every snapshot of then is marked tainted; returns their names.

    Where the filesystem needs recovery, what it leaves is an image whose server was killed: marked and OPEN, which the
    next command recovers through the write path.

    Raises:
        StoreDamaged: The outside write hit the store's own structures.
        ExtsnapError, OSError: It is not accepted, though the snapshots may be tainted; no more of it is left in memory.
    """
    if not volume.outside_write:
        return []
    try:
        return _accept(volume)
    except BaseException:
        volume.needs_replay = False
        volume.reload()
        raise


def _accept(volume: Volume) -> list[str]:
    """See `accept_outside_write`.

    What is durable when.  The mark ends the search for outside writes, so the taint is true before it.
     1. one header commit: the taint, and that nothing is hidden; at rest also that the header is not open, and the
        fingerprint of what is found, which is all of it
     2. with something to replay: dirty mark on; until then header and fingerprint are those of before
     3. one header commit: OPEN
    A crash before 1 leaves the outside write as it was found.  Between 1 and 2 the snapshots are tainted and the
    outside write is still to be accepted: extsnap replays nothing before that.  After 2 it is accepted: the mark keeps
    stock tools away, and the next command finds what is to be replayed, with or without OPEN.
    """
    engine, store = volume.require_engine(), volume.require_store()
    fs, root = volume.filesystem(), store.root
    volume.needs_replay = bool(left_undone(fs))
    if not volume.needs_replay:
        try:
            graft.verify(fs, root)
        except ExtsnapError as error:
            raise StoreDamaged(
                f"the store's header and its inode do not agree: {error.message}", hint="run extsnap check"
            ) from error
    tainted = [replace(entry, state=fmt.State.TAINTED) for entry in engine.snapshots]
    taking.write_tables(volume, tainted)
    if not volume.needs_replay:
        root.flags &= ~fmt.SlotFlags.OPEN
        root.fingerprint = fingerprint(fs)
    if engine.hidden.changed:
        engine.fold(commit=False)
    store.commit()
    engine.set_snapshots(tainted)
    if volume.needs_replay:
        volume.open_header()
    else:
        volume.set_mark(False)
    volume.outside_write = False
    return [entry.name for entry in tainted]
