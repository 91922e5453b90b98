"""Snapshots are taken and deleted: names, room, tables, and the header commits that make it true."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extsnap.arrays import Ints
from extsnap.errors import (
    ExtsnapError,
    FormatError,
    InvalidName,
    SnapshotExists,
    VolumeDirty,
    VolumeFull,
)
from extsnap.snapshot import blobs, edit, hidden, served
from extsnap.snapshot import format as fmt
from extsnap.snapshot.full import make_room
from extsnap.snapshot.moment import how_to_repair, is_at_rest, left_undone, preserved, require_clean
from extsnap.snapshot.settings import note_dropped
from extsnap.snapshot.vital import Vital
from extsnap.sparsebits import SparseBits

if TYPE_CHECKING:
    from extsnap.ext.filesystem import Filesystem
    from extsnap.snapshot.volume import Volume


def validate_name(name: str) -> str:
    """Return ``name`` if it can name a snapshot.

    Raises:
        InvalidName: It breaks a rule, which the message states.
    """
    shown = ascii(name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidName(f"snapshot name {shown} is not UTF-8", hint="choose another name") from error
    rule = fmt.fault_of_name(name)
    if rule:
        raise InvalidName(f"snapshot name {shown} {rule}", hint="choose another name")
    return name


@dataclass(frozen=True)
class Moment:
    """What a snapshot taken now would hold; of a frozen volume it is found only once.

    Attributes:
        bits: What it preserves, by position.
        rows: Rows of the history in which that differs from the latest snapshot.
        stored: Which of these need a block, twice.
    """

    bits: SparseBits
    rows: Ints
    stored: Ints


@dataclass(frozen=True)
class Staged:
    """A snapshot of which everything is written but the header commit.

    Attributes:
        entry: Of the snapshot table.
        snapshots: All that live once it is committed.
        preserved: What it preserves, by position.
    """

    entry: fmt.Snapshot
    snapshots: list[fmt.Snapshot]
    preserved: SparseBits


def create(
    volume: Volume,
    name: str | None = None,
    message: str = "",
    *,
    kind: fmt.Kind = fmt.Kind.MANUAL,
    quiesced: bool = False,
) -> fmt.Snapshot:
    """Take a snapshot of the base volume as it is.

    Durable on return.  A crash before the header commit leaves no snapshot, after it a whole one.  Of a
    filesystem marked with errors it is recorded as such; groups whose bitmaps do not verify are preserved whole.

    A volume that somebody writes to gets the consistency ``frozen`` if they were brought to rest (``quiesced``)
    and its journal agrees, else ``crash``: what a power cut would leave.  Its filesystem is not edited, so the
    store must have the room, and the mark goes on before the commit, not after it: between the two a crash
    would leave a snapshot that a stock replay could write to.

    Raises:
        SnapshotExists, InvalidName: The name cannot be used.
        NeedsRecovery, VolumeDirty, UnsupportedFeature, VolumeFull: The volume cannot take one; nothing changed.
    """
    volume.require_trusted()
    created = volume.now_ns()
    chosen = _free_name(volume, created) if name is None else validate_name(name)
    if chosen in volume.snapshot_names():
        raise SnapshotExists(f"{volume.name} has a snapshot {chosen!a} already", hint="choose another name")
    if volume.engine is not None:
        volume.engine.flush()
    in_use = volume.in_use
    fs = volume.filesystem(lenient=in_use and not quiesced)
    fs.require_supported()
    consistency = fmt.Consistency.CLEAN
    if not in_use:
        require_clean(fs, volume.name)
    elif quiesced and is_at_rest(fs):
        consistency = fmt.Consistency.FROZEN
        if volume.growth is not None:
            volume.growth.settled()
    else:
        consistency = fmt.Consistency.CRASH
        fs = volume.filesystem(lenient=True)
    before = volume.store.root.extents if volume.store is not None else None
    try:
        if volume.store is None:
            edit.set_up(volume)
            fs = volume.filesystem()  # with the store in it
        moment = make_room_for(volume, fs, consistency)
        staged = stage(volume, chosen, message, kind, created, consistency=consistency, moment=moment)
        if in_use:
            volume.set_mark(True)
            volume.require_store().root.flags |= fmt.SlotFlags.OPEN
        commit(volume, staged)
        before = volume.require_store().root.extents  # from here on it is there, whatever fails
        if volume.serving and not in_use:
            served.grow_ahead(volume)
        volume.settle()
    except (ExtsnapError, OSError) as error:
        if isinstance(error, VolumeFull):
            volume.back_to_size(before)
        else:
            volume.back_to_rest()
        if isinstance(error, VolumeFull | FormatError) and fs.has_errors:
            unsound = int((~fs.sound_groups).sum())
            reason = f"{volume.name} is marked with errors"
            if unsound:
                reason += f", and {unsound} of its {len(fs.sound_groups)} groups do not verify and are left alone"
            raise VolumeDirty(f"{reason}: {error.message}", hint=how_to_repair(volume.name)) from error
        raise
    return staged.entry


def _free_name(volume: Volume, created: int) -> str:
    base = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(created // 10**9))
    taken = set(volume.snapshot_names())
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def preserved_now(
    volume: Volume, consistency: fmt.Consistency = fmt.Consistency.CLEAN, fs: Filesystem | None = None
) -> SparseBits:
    """What a snapshot taken now would preserve, by position; ``fs``: the filesystem, opened as it is now."""
    engine, store = volume.require_engine(), volume.require_store()
    crash = consistency == fmt.Consistency.CRASH
    fs = volume.filesystem(lenient=crash) if fs is None else fs
    owned = store.root.extents[:, 1:]
    return preserved(fs, engine.rows, engine.row_bytes, engine.shift, engine.blocks, owned, crash=crash)


def moment_of(volume: Volume, bits: SparseBits) -> Moment:
    """What a snapshot that preserves ``bits`` would hold."""
    engine, store = volume.require_engine(), volume.require_store()
    return Moment(bits, *engine.history.changed_rows(store.root.next_id - 1, bits))


def table_blocks(volume: Volume, moment: Moment | None = None) -> int:
    """Blocks that the tables of a snapshot taken now would take."""
    engine = volume.require_engine()
    moment = moment_of(volume, preserved_now(volume)) if moment is None else moment
    entry = fmt.HISTORY_DTYPE.itemsize + fmt.HISTORY_TWIN_DTYPE.itemsize
    entries = len(moment.rows) * entry * 4 // volume.block_size
    return 2 * len(moment.stored) + entries + 2 * hidden.zero_blocks(engine, moment.bits)


def needs_live(volume: Volume) -> tuple[int, int]:
    """(`table_blocks`, blocks to preserve from then on) of a volume that somebody writes to.

    Its bitmaps need not agree on the medium: a group that they do not tell of may get bitmaps of its own.
    """
    engine, store = volume.require_engine(), volume.require_store()
    fs = volume.filesystem(lenient=True)
    owned = store.root.extents[:, 1:]
    found = [
        preserved(fs, engine.rows, engine.row_bytes, engine.shift, engine.blocks, owned, crash=crash)
        for crash in (False, True)
    ]
    tables = max(table_blocks(volume, moment_of(volume, bits)) for bits in found) + 2 * int((~fs.sound_groups).sum())
    return tables, engine.blocks_to_preserve(found[1])


def make_room_for(volume: Volume, fs: Filesystem, consistency: fmt.Consistency) -> Moment:
    """See that the store has room for one more snapshot, growing it where needed and possible.

    Args:
        volume: The volume, with a store.
        fs: Its filesystem, opened as it is now.
        consistency: Of the snapshot.

    Returns:
        What the snapshot holds.

    Raises:
        VolumeFull: It cannot be had.
    """
    engine, store = volume.require_engine(), volume.require_store()
    while True:
        for _ in range(4):
            engine.flush()
            moment = moment_of(volume, preserved_now(volume, consistency, fs))
            tables = table_blocks(volume, moment) + edit.MINIMUM_ROOM
            wanted = engine.reserve() + tables
            if volume.growth is not None and volume.growth.exhausted:
                # Without it the kernel would have to stop with the first write of metadata.
                wanted += engine.blocks_for(_vital_with(volume, moment.bits))
            if store.available >= wanted:
                return moment
            if volume.in_use or not edit.grow(volume, max(wanted - store.available + 32, 64)):
                break
            fs = volume.filesystem()  # with what it grew by
        limit = store_limit(volume)
        refusal = VolumeFull(
            f"the snapshot needs {wanted} free blocks in the store, which has {store.available} and cannot grow"
            + (f" past {limit} bytes, the largest file of this filesystem" if limit else ""),
            hint="delete a snapshot" if limit else "delete a snapshot, delete files, or grow the volume",
        )
        make_room(volume, refusal, blocks=tables)


def _vital_with(volume: Volume, bits: SparseBits) -> int:
    """Copies to keep for metadata once a snapshot is taken that preserves ``bits``."""
    engine = volume.require_engine()
    vital = volume.vital or Vital(volume.filesystem(lenient=True), engine.rows, engine.row_bytes, engine.shift)
    return vital.count(engine.to_preserve(bits), volume.require_store().root.owned)


def store_limit(volume: Volume) -> int:
    """Bytes that the store can have on this filesystem, where it has got so far; else 0."""
    fs, owned = volume.filesystem(), volume.require_store().root.owned
    return fs.largest_file * volume.block_size if owned + fs.geometry.cluster_blocks > fs.largest_file else 0


def stage(
    volume: Volume,
    name: str,
    message: str,
    kind: fmt.Kind,
    created: int,
    *,
    consistency: fmt.Consistency = fmt.Consistency.CLEAN,
    moment: Moment | None = None,
    restored_from: str = "",
) -> Staged:
    """Write everything of a new snapshot, which holds ``moment``, but the header commit that makes it true."""
    engine, store = volume.require_engine(), volume.require_store()
    moment = moment_of(volume, preserved_now(volume, consistency)) if moment is None else moment
    bits = moment.bits
    errors = fmt.SnapshotFlags.FILESYSTEM_ERRORS if volume.filesystem().has_errors else fmt.SnapshotFlags.NONE
    refs = np.concatenate(store.allocate_pair(len(moment.stored)))
    engine.history.add(store.root.next_id, moment.rows, bits, refs, store.write_padded)
    bit = (~store.root.counting & (store.root.counting + 1)).bit_length() - 1
    entry = fmt.Snapshot(
        id=store.root.next_id,
        bit=bit,
        name=name,
        message=message,
        kind=kind,
        consistency=consistency,
        state=fmt.State.OK,
        created_ns=created,
        volume_bytes=volume.size,
        used_blocks=bits.total(),
        restored_from=restored_from,
        flags=errors,
    )
    store.root.counting |= 1 << bit
    store.root.next_id += 1
    engine.set_snapshots(engine.snapshots)  # masks have room for its bit
    hidden.record_zeros(engine, bit, bits)
    staged = Staged(entry, [*engine.snapshots, entry], bits)
    write_tables(volume, staged.snapshots)
    return staged


def commit(volume: Volume, staged: Staged) -> None:
    """Make the staged snapshot true and let the write path know before the next write."""
    engine, store = volume.require_engine(), volume.require_store()
    store.commit()
    engine.set_snapshots(staged.snapshots)
    engine.need |= staged.preserved
    if engine.vital is not None:
        engine.vital.count_again(engine.rows)


def write_tables(volume: Volume, snapshots: list[fmt.Snapshot]) -> None:
    """Write history and snapshot table for the next header commit."""
    engine, store = volume.require_engine(), volume.require_store()
    blobs.write_history(store, engine.history)
    table = b"".join(entry.build() for entry in sorted(snapshots, key=lambda entry: entry.id))
    flags = fmt.RO_COMPAT_SNAPSHOT_FLAGS if any(entry.flags for entry in snapshots) else 0
    store.root.ro_compat = store.root.ro_compat & ~fmt.RO_COMPAT_SNAPSHOT_FLAGS | flags
    store.write_blob(fmt.BlobKind.SNAPSHOTS, 0, table)


def delete(volume: Volume, names: list[str], *, dropped: bool = False) -> int:
    """Delete snapshots, in any order; returns the bytes of copies that this freed.  ``dropped``: to make room.

    One header commit takes the bits away and drops the records that nobody needs any more; a crash
    before it leaves all of the snapshots, after it none of them.  Then freed blocks go back to the filesystem.
    A filesystem that needs recovery is not touched: this is what makes room for its recovery.
    """
    volume.require_inside(names)
    engine, store = volume.require_engine(), volume.require_store()
    gone = [volume.find(name) for name in dict.fromkeys(names)]
    ids = {entry.id for entry in gone}
    engine.commit()
    rest = [entry for entry in engine.snapshots if entry.id not in ids]
    try:
        if dropped:
            note_dropped(store.root, gone, volume.now_ns())
        for entry in gone:
            store.root.counting &= ~(1 << entry.bit)
        kept = {entry.id & 0xFFFFFFFF for entry in rest}
        for kind, key in list(store.root.blobs):
            if kind == fmt.BlobKind.CHECKSUMS and key not in kept:
                store.drop_blob(fmt.BlobKind.CHECKSUMS, key)
        engine.set_snapshots(rest)
        freed = engine.purge()
        store.release(engine.history.collect())
        write_tables(volume, rest)
        engine.fold(commit=False)
        if not rest:
            volume.set_mark(True)  # the guard goes with the last snapshot, also if this is as far as we get
        store.commit()
        hidden.release(engine)
        if not rest:
            engine.rebuild_need()
        if volume.needs_replay or (dropped and not volume.serving):
            return freed * volume.block_size  # the mark stays, or the command that needs the room goes on
        if not volume.serving and not left_undone(volume.filesystem()):
            volume.reveal()
            volume.give_back(freed, everything=not rest)
        volume.settle()
    except (ExtsnapError, OSError):
        volume.back_to_rest()
        raise
    return freed * volume.block_size


def give_up_all(volume: Volume) -> None:
    """Delete all snapshots of a store whose records are lost, with one header commit.

    A crash before the commit leaves all as it was, after it a store without snapshots.  There is no mark meanwhile: a
    marked volume without its records is opened for writing by nobody, not even for this.
    """
    require_clean(volume.filesystem(), volume.name)
    store = volume.require_store()
    store.root.counting = 0
    for kind, key in list(store.root.blobs):
        store.drop_blob(fmt.BlobKind(kind), key)
    store.new_epoch()
    store.commit()
    volume.reload()
