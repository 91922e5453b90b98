"""A volume that is written from above: what is made ready for that, what watches it, and how it comes to rest again."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from extsnap.blockdev.deferred import Deferred
from extsnap.errors import ExtsnapError, FormatError, NeedsRecovery, VolumeFull
from extsnap.snapshot import edit, recovery, taking
from extsnap.snapshot.full import ALWAYS, NEVER, make_room
from extsnap.snapshot.growth import Growth, Reserve
from extsnap.snapshot.medium import Medium
from extsnap.snapshot.moment import how_to_repair, left_undone, require_clean
from extsnap.snapshot.vital import Vital
from extsnap.snapshot.warden import Warden

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: Room that a repair leaves for new masks and for what its records are rounded up to.
REPAIR_MARGIN = 8


def begin(volume: Volume, *, grow: bool = True, set_up: bool = False, repair: bool = False, live: bool = False) -> None:
    """Get ready for writes from above: the store grows first, then mark and header say open.

    The store takes the smaller of the bytes still to preserve and half of the free space.  With ``live`` it takes
    no more than it needs until it can grow further through a kernel mount (`growth`).  What is written to a
    filesystem with snapshots that needs recovery, or may be repaired, waits until `end_serving`.

    Args:
        grow: False serves the volume as it is: for a replay.
        set_up: Give a volume without snapshots its store now, with room as if one had just been taken.
        repair: The command above may be the repair: serve a filesystem that needs one.
        live: The kernel will mount it.  A volume that has no room for a store is served all the same.

    Raises:
        NeedsRecovery, VolumeDirty: It needs recovery, and this is no repair.
        ExtsnapError, OSError: It is not served, and at rest as before.
    """
    volume.require_inside()
    try:
        _begin(volume, grow=grow, set_up=set_up, repair=repair, live=live)
    except BaseException:
        volume.drop_repair()
        volume.serving = False
        volume.back_to_rest()
        raise


def _begin(volume: Volume, *, grow: bool, set_up: bool, repair: bool, live: bool) -> None:
    fs = volume.filesystem()
    undone = bool(left_undone(fs))
    if grow and not volume.needs_replay and not (repair and undone):
        fs.require_supported()
        require_clean(fs, volume.name)
        if volume.store is None and set_up:
            with contextlib.suppress(*[VolumeFull] if live else []):
                edit.set_up(volume)
        if volume.store is not None:
            grow_ahead(volume, live=live)
    volume.serving = True
    volume.warned.clear()
    if volume.engine is not None:
        volume.engine.spared = edit.MINIMUM_ROOM if grow and not volume.needs_replay else 0  # a replay may need it all
        volume.copied_before = volume.require_store().available
        if volume.engine.snapshots:
            volume.open_header()
            if volume.needs_replay or (repair and (undone or fs.has_errors)):
                volume.deferred = Deferred(volume.engine, volume.block_size)
                # A replay may bring superblocks with guard and pointer, which a kernel had mounted.
                volume.repair = Medium(volume.deferred)
                volume.repair.set_offsets(volume.medium.offsets)
    watch(volume)


def grow_ahead(volume: Volume, *, live: bool = False) -> None:
    """Grow the store to what the session ahead may need, and bring a volume without snapshots to rest."""
    engine, store = volume.require_engine(), volume.require_store()
    fs = volume.filesystem()
    half = max(0, fs.free_blocks - fs.geometry.reserved_blocks) // 2
    needed = engine.blocks_to_preserve() if engine.snapshots else taking.preserved_now(volume).total()
    if live:
        reserve = Reserve.of(fs, volume.size)
        needed = min(needed, reserve.in_flight + reserve.chunk)
    edit.grow(volume, min(engine.blocks_for(needed) + edit.MINIMUM_ROOM + engine.reserve() - store.available, half))
    if not engine.snapshots:
        volume.settle()


def end(volume: Volume) -> bool:
    """Bring the image to rest after serving.

    Returns:
        True if it is clean and carries no mark; False if its filesystem needs recovery, which leaves the mark.

    Raises:
        VolumeFull: A repair needs more copies than there is room for; nothing of it was done, the mark stays.
    """
    volume.finish_restore()
    volume.base.flush()
    volume.serving = False
    volume.growth = None
    watch(volume)
    if volume.engine is not None:
        volume.engine.spared = 0
    try:
        _let_repair_through(volume)
    except ExtsnapError:
        if not volume.needs_replay:
            volume.settle()  # only marked with errors: at rest as before
        raise
    if volume.engine is None:
        return True
    fs = volume.filesystem()
    # An e2fsck that gives up after a crash sets the flag of errors; without a journal no bitmap is right then.
    if left_undone(fs) or (volume.needs_replay and not fs.is_clean):
        return not volume.medium.state.mark
    volume.needs_replay = False
    if volume.forget_stale():
        return True
    try:
        recovery.reconcile(volume, fs)
    except FormatError as error:
        raise NeedsRecovery(
            f"{volume.name}: its filesystem was left damaged: {error.message}",
            hint=f"{how_to_repair(volume.name)}, or extsnap restore --no-safety {volume.name} SNAPSHOT",
        ) from error
    volume.reveal()
    store = volume.require_store()
    used = max(0, volume.copied_before - store.available)
    spare = volume.engine.room() - edit.MINIMUM_ROOM
    if spare > 4 * used + 2 * edit.MINIMUM_ROOM:
        edit.shrink(volume, spare - 2 * used)
    volume.settle()
    return not volume.medium.state.mark


def _let_repair_through(volume: Volume) -> None:
    """Write what a repair wrote, if all of its copies have room; else drop it.

    Raises:
        VolumeFull: They have not; names the bytes.  Nothing was changed.
    """
    deferred, volume.deferred, volume.repair = volume.deferred, None, None
    if deferred is None:
        return
    engine = volume.require_engine()
    try:
        engine.commit()
        while True:
            copies = engine.copies_for(engine.needed_of(deferred.written, deferred.blocks()))
            room = max(0, engine.room() - REPAIR_MARGIN)
            if copies <= room:
                break
            size = volume.block_size
            refusal = VolumeFull(
                f"the repair of {volume.name} needs {copies * size} bytes for copies of what snapshots need, and the "
                f"store has {room * size}; nothing was changed",
                hint="delete a snapshot and run it again; extsnap export saves the snapshot elsewhere first",
            )
            make_room(volume, refusal, engine.needed_of(deferred.written, deferred.blocks()), REPAIR_MARGIN)
        deferred.let_through()
    finally:
        deferred.close()


def watch(volume: Volume) -> None:
    """While writes come from above and there are snapshots, a warden judges them; a replay is exempt.

    Where the kernel has mounted it and the store cannot grow any more, room is kept for metadata.
    """
    if volume.is_lost:
        return  # nobody writes; `Volume.recall` asks again
    is_final = not volume.needs_replay and volume.deferred is None  # the store cannot have what may yet be dropped
    if volume.growth is None and volume.serving and is_final and volume.engine is not None:
        volume.growth = Growth(volume)
    watched = volume.serving and not volume.needs_replay and volume.engine is not None and bool(volume.engine.snapshots)
    volume.look_at = ALWAYS if watched else NEVER
    if not watched:
        volume.warden = volume.vital = None
    else:
        if volume.warden is None:
            volume.warden = Warden(volume)
        elif volume.warden.moved or not volume.in_use:  # what they above change it sees itself, what we do it does not
            volume.warden.locate()
        engine = volume.require_engine()
        if volume.growth is None or not volume.growth.exhausted:
            volume.vital = None
        elif volume.vital is None:
            with contextlib.suppress(ExtsnapError, OSError):  # a filesystem that a repair is about to mend
                fs = volume.filesystem(lenient=True)
                volume.vital = Vital(fs, engine.rows, engine.row_bytes, engine.shift)
        if volume.vital is not None:
            volume.vital.count_again(engine.rows)
    if volume.engine is not None:
        volume.engine.vital = volume.vital
