"""The commands: one function each, from arguments to the dict that ``--json`` prints.

The command line and the control socket call these by name through `Volume.verb`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from extsnap.arrays import bitmap_runs
from extsnap.errors import ExtsnapError
from extsnap.snapshot import format as fmt
from extsnap.snapshot.full import Fill, fill, growth, warning
from extsnap.snapshot.later import Later
from extsnap.snapshot.moment import how_to_repair, left_undone, require_clean

if TYPE_CHECKING:
    from extsnap.snapshot import check as checks
    from extsnap.snapshot import checksums, edit, recovery, settings, taking
    from extsnap.snapshot.volume import Volume
else:
    checks, checksums, edit = map(Later, ("check", "checksums", "edit"))
    recovery, settings, taking = map(Later, ("recovery", "settings", "taking"))

JSON_VERSION = 1
_CHECK_SECONDS = 0.1  # for which a server does nothing else


def _iso(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _fill(volume: Volume) -> Fill | None:
    """How full the store of a volume with snapshots is; of what is left to preserve it knows at least the most."""
    engine = volume.engine
    if engine is None or not engine.snapshots:
        return None
    recorded = np.zeros(engine.masks.count, np.int64)
    for level in engine.index.levels:
        for part in level.parts():
            recorded += np.bincount(level.mask[part], weights=level.length[part], minlength=len(recorded)).astype(int)
    left = (entry.used_blocks - int(recorded[engine.masks.has(entry.bit)].sum()) for entry in engine.snapshots)
    return fill(volume, max(left))


def _usage(volume: Volume) -> dict[int, tuple[int, int, int]]:
    """By snapshot id: (copied bytes, exclusive bytes, records)."""
    engine = volume.engine
    if engine is None or not engine.masks.count:
        return {}
    count = engine.masks.count
    blocks = np.zeros(count, np.int64)
    records = np.zeros(count, np.int64)
    for level in engine.index.levels:
        for part in level.parts():
            copied = level.length[part] * (level.copy[part] != fmt.ZERO_COPY)
            blocks += np.bincount(level.mask[part], weights=copied, minlength=count).astype(np.int64)
            records += np.bincount(level.mask[part], minlength=count)
    alive = engine.masks.rows & engine.alive
    alone = np.bitwise_count(alive).sum(axis=1) == 1
    usage = {}
    for entry in engine.snapshots:
        has = engine.masks.has(entry.bit)
        size = volume.block_size
        usage[entry.id] = (
            int(blocks[has].sum()) * size,
            int(blocks[has & alone].sum()) * size,
            int(records[has].sum()),
        )
    return usage


def _describe(
    volume: Volume, entry: fmt.Snapshot, usage: dict[int, tuple[int, int, int]], damaged: Collection[str]
) -> dict[str, Any]:
    copied, exclusive, _ = usage.get(entry.id, (0, 0, 0))
    return {
        "name": entry.name,
        "id": entry.id,
        "created": _iso(entry.created_ns),
        "message": entry.message,
        "kind": entry.kind.name.lower(),
        "consistency": entry.consistency.name.lower(),
        "state": (fmt.State.DAMAGED if entry.name in damaged else entry.state).name.lower(),
        "used_bytes": min(entry.used_blocks * volume.block_size, entry.volume_bytes),
        "copied_bytes": copied,
        "exclusive_bytes": exclusive,
        "shared_bytes": copied - exclusive,
        "filesystem_errors": bool(entry.flags & fmt.SnapshotFlags.FILESYSTEM_ERRORS),
    }


def run(volume: Volume, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Carry out a command by name; what opening the volume has mended is a notice of every one."""
    volume.recall()
    result = VERBS[name](volume, **arguments)
    if volume.mended and name != "note_check":
        mended = [f"{volume.name}: {what}; it was written again" for what in volume.mended]
        result["notices"] = mended + list(result.get("notices") or ())
    return result


def _warnings(volume: Volume) -> list[str]:
    """The one thing that is to be done next."""
    if volume.outside_write:
        names = ", ".join(volume.snapshot_names())
        return [f"{volume.name} was written outside extsnap; snapshots at risk: {names}"]
    if volume.serving:
        return []
    fs = volume.filesystem()
    undone = left_undone(fs)
    if undone:
        return [f"{volume.name} {undone}; {how_to_repair(volume.name)}"]
    if volume.store is not None and volume.medium.state.mark:
        return [f"{volume.name} was not closed; the next command that writes, or extsnap run, completes it"]
    return [_errors_notice(volume)] if fs.has_errors else []


def _watermark(volume: Volume, filled: Fill | None) -> list[str]:
    return [warning(volume, filled)] if filled is not None and filled.watermark is not None else []


def _errors_notice(volume: Volume, more: str = "") -> str:
    return f"{volume.name} is marked as having errors{more}; {how_to_repair(volume.name)}"


def _state(volume: Volume) -> str:
    """The filesystem's state in a word or two."""
    fs = volume.filesystem()
    if fs.needs_recovery:
        return "needs recovery"
    if fs.has_errors:
        return "errors"
    return "clean" if fs.is_clean else "not cleanly unmounted"


def create(
    volume: Volume,
    name: str | None = None,
    message: str = "",
    freeze: bool = True,
    quiesced: bool = False,
    kind: str = "manual",
) -> dict[str, Any]:
    """Take a snapshot.

    Whoever freezes the volume first says so with ``quiesced``; ``freeze`` is his.  One at rest is clean anyway.
    """
    first = not volume.snapshot_list()
    handle = volume.create(name, message, kind=fmt.Kind[kind.upper()], quiesced=quiesced)
    notices = []
    if quiesced and handle.info.consistency == fmt.Consistency.CRASH:
        notices.append(f"{volume.name} was not at rest: its journal has work left, and the snapshot is one of a crash")
    if handle.info.flags & fmt.SnapshotFlags.FILESYSTEM_ERRORS:
        notices.append(_errors_notice(volume, ", and the snapshot is recorded as such"))
    if first:
        more, largest = growth(volume)
        more = 0 if volume.in_use else more
        room = (volume.require_engine().room() + more) * volume.block_size
        if volume.guard_wanted:
            notices.append(
                f"plain mounts of {volume.name} are read-only from now on; write through extsnap mount, "
                f"take a copy with extsnap export, or run extsnap guard {volume.name} off to lift this"
            )
        text = f"{room / 2**20:.0f} MiB can be overwritten before space for copies runs out"
        if more == largest:
            text += (
                f", because the store is a file and this filesystem has none larger than "
                f"{volume.filesystem().largest_file * volume.block_size / 2**30:.0f} GiB"
            )
        elif room < volume.size // 20:
            text += f"; grow the volume with extsnap run {volume.name} -- resize2fs {{}} SIZE"
        notices.append(text)
    consistency = handle.info.consistency.name.lower()
    return {
        "version": JSON_VERSION,
        "name": handle.name,
        "id": handle.id,
        "consistency": consistency,
        "notices": notices,
    }


def checksum(volume: Volume, name: str) -> dict[str, Any]:
    """Store a checksum of every block that a snapshot preserves."""
    return {"version": JSON_VERSION, "name": name, "blocks": checksums.add(volume, name)}


def list_snapshots(volume: Volume) -> dict[str, Any]:
    """All snapshots, oldest first."""
    usage, damaged = _usage(volume), set(volume.damaged_names())
    entries = [_describe(volume, entry, usage, damaged) for entry in volume.snapshot_list()]
    filled = _fill(volume)
    return {
        "version": JSON_VERSION,
        "snapshots": entries,
        "watermark": filled.watermark if filled else None,
        "notices": _warnings(volume) + _watermark(volume, filled),
    }


def show(volume: Volume, name: str) -> dict[str, Any]:
    """Everything about one snapshot."""
    entry = volume.find(name)
    usage = _usage(volume)
    result = {"version": JSON_VERSION, **_describe(volume, entry, usage, volume.damaged_names())}
    result["records"] = usage.get(entry.id, (0, 0, 0))[2]
    result["volume_bytes"] = entry.volume_bytes
    result["block_size"] = volume.block_size
    if entry.restored_from:
        result["restored_from"] = entry.restored_from
    result["notices"] = _warnings(volume)
    return result


def delete(volume: Volume, names: list[str], kind: str | None = None) -> dict[str, Any]:
    """Delete snapshots by name, and all of one kind."""
    chosen = list(names)
    if kind is not None:
        wanted = fmt.Kind[kind.upper()]
        chosen += [entry.name for entry in volume.snapshot_list() if entry.kind == wanted and entry.name not in chosen]
    for name in chosen:
        volume.find(name)
    if not chosen:
        return {"version": JSON_VERSION, "deleted": [], "freed_bytes": 0}
    freed = volume.delete(chosen)
    return {"version": JSON_VERSION, "deleted": list(dict.fromkeys(chosen)), "freed_bytes": freed}


def restore(volume: Volume, name: str | None = None, undo: bool = False, safety: bool = True) -> dict[str, Any]:
    """Make the base volume a snapshot."""
    from extsnap.snapshot import restore as restoring

    if undo == (name is not None):
        raise ExtsnapError("a restore takes a snapshot's name or --undo", hint="see extsnap list")
    target = restoring.newest_safety(volume).name if name is None else name
    taken = restoring.restore(volume, target, safety=safety)
    return {
        "version": JSON_VERSION,
        "restored": target,
        "safety": taken.name if taken else None,
        "work_left": restoring.has_work_left(volume, target),
    }


def export(volume: Volume, name: str, out: str, force: bool = False) -> dict[str, Any]:
    """Write a snapshot to a file of its own."""
    from extsnap.snapshot import export as exporting

    size = exporting.export(volume, name, out, force=force)
    return {"version": JSON_VERSION, "name": name, "out": out, "bytes": size}


def layout(volume: Volume, name: str) -> dict[str, Any]:
    """What one who reads a snapshot's served file must know to export it; ``runs`` are [block, length]."""
    entry = volume.find(name)
    return {
        "version": JSON_VERSION,
        "id": entry.id,
        "volume_bytes": entry.volume_bytes,
        "block_size": volume.block_size,
        "created_seconds": entry.created_ns // 10**9,
        "runs": volume.open_view(name).preserved_runs().tolist(),
    }


def strip(volume: Volume) -> dict[str, Any]:
    """Remove all snapshots, the store and the guard."""
    if volume.engine is not None and (volume.engine.lost or volume.engine.lost_parts):
        count = len(volume.snapshot_list())
        taking.give_up_all(volume)
        edit.remove(volume)
        return {"version": JSON_VERSION, "snapshots": count}
    volume.require_trusted()
    if volume.stale is not None:
        edit.set_up(volume)  # puts one in its place that is known to the last block, and is removed like any
    count = len(volume.snapshot_list())
    if volume.store is not None:
        require_clean(volume.filesystem(), volume.name)
        if count:
            volume.delete(volume.snapshot_names())
        edit.remove(volume)
    return {"version": JSON_VERSION, "snapshots": count}


def accept(volume: Volume) -> dict[str, Any]:
    """Go on after an outside write: the snapshots at risk are marked tainted."""
    names = recovery.accept_outside_write(volume)
    return {"version": JSON_VERSION, "tainted": names, "notices": _warnings(volume)}


def set_properties(volume: Volume, values: dict[str, str] | None = None) -> dict[str, Any]:
    """Change properties of the volume; returns all of them."""
    if values:
        settings.set_properties(volume, values)
    root = volume.store.root if volume.store is not None else None
    return {"version": JSON_VERSION, "properties": settings.properties(root)}


def guard(volume: Volume, wanted: bool) -> dict[str, Any]:
    """Guard the image at rest against plain writable mounts, or do not; remembered."""
    settings.set_guard(volume, wanted)
    notices = []
    if not wanted and volume.snapshot_list():
        notices.append(
            f"plain mounts of {volume.name} can write from now on, and what they overwrite is not copied: "
            f"the snapshots are at risk then; extsnap mount keeps them"
        )
    return {"version": JSON_VERSION, "guard": wanted, "notices": notices}


def info(volume: Volume) -> dict[str, Any]:
    """The volume and what of it is extsnap's."""
    fs = volume.filesystem()
    geometry = fs.geometry
    store: dict[str, Any] | None = None
    filled = _fill(volume)
    root = volume.store.root if volume.store is not None else None
    if volume.store is not None and volume.engine is not None:
        total = volume.store.root.owned + len(volume.store.root.mapping)
        copies = sum(int(level.length[level.copy >= 0].sum()) for level in volume.engine.index.levels)
        free = volume.store.available
        size = volume.block_size
        store = {
            "bytes": total * size,
            "copy_bytes": copies * size,
            "metadata_bytes": (total - copies - free) * size,
            "free_bytes": free * size,
            "largest_bytes": fs.largest_file * size,
            "room_bytes": filled.room * size if filled else None,
            "watermark": filled.watermark if filled else None,
        }
    return {
        "version": JSON_VERSION,
        "type": fs.kind,
        "uuid": str(uuid.UUID(bytes=fs.uuid)),
        "label": fs.label,
        "block_size": geometry.block_size,
        "blocks": geometry.blocks_count,
        "free_blocks": geometry.free_blocks,
        "inodes": geometry.inodes_count,
        "free_inodes": geometry.free_inodes,
        "groups": geometry.groups,
        "features": fs.features,
        "state": _state(volume),
        "offset": volume.offset,
        "partition": volume.partition or None,
        "guard": volume.medium.state.guard,
        "marked": volume.medium.state.mark and not volume.serving,
        "snapshots": len(volume.snapshot_list()),
        "outside_write": volume.outside_write,
        "store": store,
        "properties": settings.properties(root),
        "dropped": [
            {"name": name, "id": number, "created": _iso(created), "dropped": _iso(when)}
            for number, name, created, when in (settings.dropped(root) if root is not None else ())
        ],
        "notices": _warnings(volume) + _watermark(volume, filled),
    }


def dump(volume: Volume, what: str) -> dict[str, Any]:
    """The store's structures, for people who debug."""
    if what not in _DUMPS:
        raise ExtsnapError(f"there is no structure {what!r}", hint=f"name one of {', '.join(_DUMPS)}")
    return {"version": JSON_VERSION, what: _DUMPS[what](volume)}


def _dump_header(volume: Volume) -> dict[str, Any]:
    store = volume.require_store()
    root = store.root
    return {
        "generation": root.generation,
        "store_uuid": root.store_uuid.hex(),
        "fs_uuid": root.fs_uuid.hex(),
        "block_size": root.block_size,
        "flags": int(root.flags),
        "slots": [store.slot_block(0), store.slot_block(1)],
        "directory_inode": root.directory_inode,
        "store_inode": root.store_inode,
        "next_id": root.next_id,
        "counting_bitmap": f"{root.counting:#x}",
        "extents": root.extents.tolist(),
        "mapping": root.mapping.tolist(),
        "size_blocks": root.size_blocks,
        "log": {"epoch": root.log_epoch, "start": root.log_start, "blocks": root.log_blocks},
        "blobs": [
            {"kind": fmt.BlobKind(kind).name.lower(), "key": key, "length": blob.length, "runs": blob.runs.tolist()}
            for (kind, key), blob in sorted(root.blobs.items())
        ],
        "pending": root.pending.kind.name.lower() if root.pending else None,
        "restore": root.restore.target_id if root.restore else None,
        "superblocks": root.superblocks,
        "hidden": _hidden(volume),
        "properties": root.properties,
        "fingerprint": root.fingerprint.hex(),
        "mark": volume.medium.state.mark,
        "guard": volume.medium.state.guard,
    }


def _hidden(volume: Volume) -> list[list[int]]:
    """Runs of blocks [first, length] that read as zeros while the medium keeps what snapshots need."""
    engine = volume.require_engine()
    runs = engine.hidden.all_runs() - np.array([engine.shift, 0])
    return [list(run) for run in runs.tolist()]


def _dump_log(volume: Volume) -> list[dict[str, Any]]:
    store = volume.require_store()
    position, sequence = store.log_position, store.log_sequence
    batches = store.replay_log()
    store.log_position, store.log_sequence = position, sequence
    return [
        {
            "sequence": batch.sequence,
            "masks": len(batch.masks),
            "records": len(batch.records),
            "copies": len(batch.crcs),
            "hides": int(batch.hides[:, 1].sum()),
            "shows": int(batch.shows[:, 1].sum()),
            "blocks": int(batch.records["length"].sum()),
        }
        for batch in batches
    ]


def _dump_records(volume: Volume) -> list[dict[str, Any]]:
    engine = volume.require_engine()
    engine.index.apply_writes()
    names = {entry.bit: entry.name for entry in volume.snapshot_list()}
    bits = engine.masks.bits()
    by_mask = [[names[bit] for bit in sorted(names) if bit < bits.shape[1] and row[bit]] for row in bits]
    records = []
    for level in engine.index.levels:
        columns = zip(
            level.block.tolist(),
            level.length.tolist(),
            level.copy.tolist(),
            level.mask.tolist(),
            np.clip(level.writes, 1, 0xFFFFFFFF).tolist(),
            strict=True,
        )
        for block, length, copy, mask, writes in columns:  # what was asked for: a line a record
            if by_mask[mask]:
                place = None if copy == fmt.ZERO_COPY else copy
                records.append(
                    {"block": block, "length": length, "copy": place, "snapshots": by_mask[mask], "writes": writes}
                )
    return sorted(records, key=lambda record: (record["block"], record["snapshots"]))


def _dump_snapshots(volume: Volume) -> list[dict[str, Any]]:
    usage, damaged = _usage(volume), set(volume.damaged_names())
    return [
        {**_describe(volume, entry, usage, damaged), "bit": entry.bit, "restored_from": entry.restored_from}
        for entry in volume.snapshot_list()
    ]


def _dump_bitmaps(volume: Volume) -> dict[str, Any]:
    """Ext's own bits and the snapshot allocation bitmap as runs of [first block, length]."""
    fs = volume.filesystem()
    geometry = fs.geometry
    count = geometry.blocks_count - geometry.first_data_block
    block = bitmap_runs(fs.block_bitmaps(), count) + np.array([geometry.first_data_block, 0])
    return {"block": block.tolist(), "snapshot": volume.require_store().root.allocation_runs().tolist()}


def check(volume: Volume, names: list[str] | None = None, quick: bool = False, copies: bool = True) -> dict[str, Any]:
    """Check the store, the two bitmaps and every copy; the filesystems are e2fsck's to judge.

    Without ``copies`` the records and their copies are left out: for `check_copies`.
    """
    for name in names or []:
        volume.find(name)
    findings = checks.check_store(volume, copies=copies)
    with_errors = fmt.SnapshotFlags.FILESYSTEM_ERRORS
    return {
        "version": JSON_VERSION,
        "store": {"ok": not findings.errors, "errors": findings.errors, "worn": findings.worn},
        "snapshots": [
            {
                "name": entry.name,
                "errors": findings.by_snapshot.get(entry.name, []),
                "blocks": findings.blocks.get(entry.name, []),
                "proven": entry.name in findings.proven,
                "state": entry.state.name.lower(),
                "filesystem_errors": bool(entry.flags & with_errors),
                "consistency": entry.consistency.name.lower(),
            }
            for entry in ([volume.find(name) for name in names] if names else volume.snapshot_list())
        ],
    }


def check_copies(volume: Volume, first: int = 0) -> dict[str, Any]:
    """Check records and copies from a block on, for a moment: ``next`` is where to go on, or None at the end."""
    return {"version": JSON_VERSION, **checks.check_piece(volume, first, seconds=_CHECK_SECONDS)}


def note_check(volume: Volume, damaged: list[str], sound: list[str], proven: list[str] | None = None) -> dict[str, Any]:
    """Keep what a check found as states of the snapshots, and mend what has a whole second copy."""
    found = checks.note(volume, damaged, sound, proven or [])
    return {"version": JSON_VERSION, "mended": volume.mended + found}


_DUMPS: dict[str, Callable[[Volume], Any]] = {
    "header": _dump_header,
    "log": _dump_log,
    "records": _dump_records,
    "snapshots": _dump_snapshots,
    "bitmaps": _dump_bitmaps,
}

VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "create": create,
    "checksum": checksum,
    "list": list_snapshots,
    "show": show,
    "delete": delete,
    "restore": restore,
    "export": export,
    "layout": layout,
    "strip": strip,
    "accept": accept,
    "set": set_properties,
    "guard": guard,
    "info": info,
    "dump": dump,
    "check": check,
    "check_copies": check_copies,
    "note_check": note_check,
}
