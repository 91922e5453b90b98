"""Checking the store against itself, against the filesystem, and every copy against its checksum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from extsnap.arrays import expand
from extsnap.errors import ExtsnapError
from extsnap.snapshot import format as fmt
from extsnap.snapshot import graft
from extsnap.sparsebits import SparseBits

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: Copy blocks verified at once.
PIECE_BLOCKS = 4096
#: Damaged copies named one by one; the rest is counted.
NAMED = 20


def check_store(volume: Volume) -> tuple[list[str], dict[str, list[str]]]:
    """(errors of the store, errors by snapshot name); both empty for a sound store.

    Copies are read in bounded pieces; nothing is written.
    """
    errors: list[str] = []
    by_snapshot: dict[str, list[str]] = {}
    if volume.store is None:
        return errors, by_snapshot
    for step in (_check_bitmaps, _check_records, _check_blobs):
        try:
            errors += step(volume)
        except ExtsnapError as error:
            errors.append(str(error))
    try:
        _check_copies(volume, errors, by_snapshot)
    except ExtsnapError as error:
        errors.append(str(error))
    if volume.outside_write:
        for name in volume.snapshot_names():
            by_snapshot.setdefault(name, []).append("the volume was written outside extsnap since this snapshot")
    return errors, by_snapshot


def _check_bitmaps(volume: Volume) -> list[str]:
    """Header, inode and the two bitmaps say the same."""
    store = volume.require_store()
    root = store.root
    if root.pending is not None or root.restore is not None:
        return ["an interrupted operation is waiting: the next extsnap command that writes completes it"]
    errors = []
    fs = volume.filesystem()
    found = fs.file_map(root.store_inode)
    if not np.array_equal(graft.join(found.data), graft.join(root.extents)):
        errors.append("the store's header and its inode name different data blocks")
    if not np.array_equal(np.sort(found.mapping), np.sort(root.mapping)):
        errors.append("the store's header and its inode name different mapping blocks")
    geometry = fs.geometry
    mine = SparseBits.of(
        root.allocation_runs() - np.array([geometry.first_data_block, 0]),
        geometry.groups,
        geometry.blocks_per_group // 8,
    )
    mine -= fs.block_bitmaps()
    free = mine.total()
    if free:
        errors.append(f"{free} blocks of the snapshot allocation bitmap are free in the block allocation bitmap")
    return errors


def _check_records(volume: Volume) -> list[str]:
    """No block has two records for one snapshot."""
    engine = volume.require_engine()
    seen_blocks, seen_masks = [], []
    for level in engine.index.levels:
        seen_blocks.append(expand(level.block, level.length))
        seen_masks.append(np.repeat(level.mask, level.length))
    if not seen_blocks:
        return []
    blocks, masks = np.concatenate(seen_blocks), np.concatenate(seen_masks)
    order = np.argsort(blocks, kind="stable")
    blocks, masks = blocks[order], masks[order]
    rows = engine.masks.rows & engine.alive
    errors = 0
    distance = 1
    while distance < len(blocks):  # as many rounds as one block has records
        same = np.flatnonzero(blocks[distance:] == blocks[:-distance])
        if not len(same):
            break
        errors += int((rows[masks[same]] & rows[masks[same + distance]]).any(axis=1).sum())
        distance += 1
    return [f"{errors} pairs of records name the same block and the same snapshot"] if errors else []


def _check_blobs(volume: Volume) -> list[str]:
    """Every blob and every preserved bitmap has the right checksum."""
    engine, store = volume.require_engine(), volume.require_store()
    for kind, key in store.root.blobs:
        store.read_blob(fmt.BlobKind(kind), key)
    engine.history.union()
    return []


def _check_copies(volume: Volume, errors: list[str], by_snapshot: dict[str, list[str]]) -> None:
    """Every copy has its checksum; damage is charged to the snapshots that read it."""
    engine, store = volume.require_engine(), volume.require_store()
    bits = engine.masks.bits()
    damaged = 0
    for level in engine.index.levels:
        which = np.flatnonzero(level.copy >= 0)
        logical = expand(level.copy[which], level.length[which])
        blocks = expand(level.block[which], level.length[which])
        owner = np.repeat(which, level.length[which])
        for low in range(0, len(logical), PIECE_BLOCKS):
            part = slice(low, low + PIECE_BLOCKS)
            found = np.array([fmt.crc(copy) for copy in store.read_blocks(logical[part])], np.uint32)
            for index in np.flatnonzero(found != level.crcs[part]).tolist():
                damaged += 1
                row = bits[level.mask[owner[part][index]]]
                names = [entry.name for entry in volume.snapshot_list() if row[entry.bit]]
                if damaged <= NAMED and names:
                    errors.append(f"the copy of block {blocks[part][index]} fails its checksum")
                for name in names:
                    mine = by_snapshot.setdefault(name, [])
                    if len(mine) < NAMED:
                        mine.append(f"block {blocks[part][index]} cannot be read: its copy fails its checksum")
    if damaged > NAMED:
        errors.append(f"{damaged} copies fail their checksum")
