"""Graft: make a filesystem say what the store's header says.

Each function edits a `Filesystem` that stands on an `Overlay`: nothing reaches the medium here.  The blocks
that come out of the overlay are committed as redo blocks by `edit`, or written by a restore.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from extsnap.arrays import ByteWindows, Ints, distinct
from extsnap.errors import RestoreRefused, StoreDamaged, VolumeFull
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.quota import charge
from extsnap.snapshot.store import Extents
from extsnap.sparsebits import SparseBits

ROOT_INODE = 2
DIRECTORY_NAME = b".extsnap"
FILE_NAME = b"store"
PATH = "/.extsnap/store"
FT_REGULAR, FT_DIRECTORY = 1, 2
S_IFDIR, S_IFREG = 0o040000, 0o100000
IMMUTABLE, NODUMP, EXTENTS_FLAG = 0x10, 0x40, 0x80000


@dataclass(frozen=True)
class Place:
    """Where the store is in the filesystem."""

    directory_inode: int
    store_inode: int
    directory_block: int


def map_runs(logical: Ints, physical: Ints) -> Extents:
    """Lay runs of physical blocks over runs of logical ones, in order: rows (logical, physical, length).

    Both are int64[n, 2] of (start, length) with equal sums of lengths.
    """
    ends = distinct(np.concatenate([np.cumsum(logical[:, 1]), np.cumsum(physical[:, 1])]))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    rows = []
    for runs in (logical, physical):
        before = np.cumsum(runs[:, 1]) - runs[:, 1]
        which = np.searchsorted(before, starts, "right") - 1
        rows.append(runs[which, 0] + starts - before[which])
    return np.stack([rows[0], rows[1], ends - starts], axis=1).astype(np.int64)


def keep_logical(extents: Extents, keep: Ints) -> Extents:
    """The part of ``extents`` whose logical blocks lie in the runs ``keep`` (start, length), sorted."""
    if not len(extents) or not len(keep):
        return np.zeros((0, 3), np.int64)
    ends = extents[:, 0] + extents[:, 2]
    cuts = distinct(np.concatenate([extents[:, 0], ends, keep[:, 0], keep.sum(axis=1)]))
    starts, lengths = cuts[:-1], np.diff(cuts)
    extent = np.searchsorted(extents[:, 0], starts, "right") - 1
    run = np.searchsorted(keep[:, 0], starts, "right") - 1
    inside = (extent >= 0) & (run >= 0)
    inside &= (starts < ends[extent]) & (starts < keep.sum(axis=1)[run])
    starts, lengths, extent = starts[inside], lengths[inside], extent[inside]
    return join(np.stack([starts, extents[extent, 1] + starts - extents[extent, 0], lengths], axis=1))


def join(extents: Extents) -> Extents:
    """Sort by logical block and merge neighbours that continue each other."""
    extents = extents[np.argsort(extents[:, 0], kind="stable")]
    if len(extents) < 2:
        return extents
    same = (extents[1:, 0] == extents[:-1, 0] + extents[:-1, 2]) & (extents[1:, 1] == extents[:-1, 1] + extents[:-1, 2])
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    lengths = np.add.reduceat(extents[:, 2], first)
    return np.stack([extents[first, 0], extents[first, 1], lengths], axis=1)


def holes(extents: Extents) -> Ints:
    """Runs (start, length) of logical blocks below the end of the store that are not mapped."""
    if not len(extents):
        return np.zeros((0, 2), np.int64)
    ends = extents[:, 0] + extents[:, 2]
    starts = np.concatenate([[0], ends[:-1]])
    gaps = np.stack([starts, extents[:, 0] - starts], axis=1)
    return gaps[gaps[:, 1] > 0]


def logical_runs(extents: Extents, count: int) -> Ints:
    """Logical runs for ``count`` new blocks: the holes first, then behind the end."""
    gaps = holes(extents)
    room = np.cumsum(gaps[:, 1])
    which = int(np.searchsorted(room, count))
    if which < len(gaps):
        taken = gaps[: which + 1].copy()
        taken[-1, 1] -= room[which] - count
        return taken
    end = int((extents[:, 0] + extents[:, 2]).max()) if len(extents) else 0
    rest = count - (int(room[-1]) if len(room) else 0)
    return np.concatenate([gaps, np.array([[end, rest]], np.int64)]) if rest else gaps


def free_runs(fs: Filesystem, count: int, *avoid: ByteWindows) -> Ints:
    """``count`` free blocks as runs, none of them in the bitmaps ``avoid``.

    Raises:
        VolumeFull: There are not that many.
    """
    runs = fs.find_free(count, avoid=avoid)
    if int(runs[:, 1].sum()) < count:
        raise VolumeFull(
            f"the volume has only {int(runs[:, 1].sum())} blocks that are free and needed by no snapshot, not {count}",
            hint="delete a snapshot, delete files, or grow the volume",
        )
    return runs


def set_up(fs: Filesystem, blocks: int, now: int) -> tuple[Place, Extents, Ints]:
    """Make ``/.extsnap/store`` with ``blocks`` data blocks.

    Returns:
        (place, extents, mapping blocks).

    Raises:
        VolumeFull: Not enough free blocks or inodes.
    """
    if fs.lookup("/" + DIRECTORY_NAME.decode()) is not None:
        raise StoreDamaged("the volume has a /.extsnap without a readable store", hint="rename or remove it first")
    data = free_runs(fs, blocks)
    fs.set_blocks(data, True)
    extents = join(map_runs(np.array([[0, blocks]], np.int64), data))
    mapping = fs.allocate_blocks(fs.mapping_blocks_needed(extents))
    directory_block = int(fs.allocate_blocks(1)[0])
    directory = fs.allocate_inode(directory=True)
    store = fs.allocate_inode(directory=False)
    none = np.zeros(0, np.int64)
    _new_inode(fs, directory, S_IFDIR | 0o700, 2, IMMUTABLE, now)
    fs.set_file_map(directory, np.array([[0, directory_block, 1]], np.int64), none, fs.geometry.block_size)
    fs.write_block(directory_block, fs.new_directory_block(directory, ROOT_INODE))
    _new_inode(fs, store, S_IFREG | 0o600, 1, IMMUTABLE | NODUMP, now)
    fs.set_file_map(store, extents, mapping, blocks * fs.geometry.block_size)
    fs.add_entry(directory, FILE_NAME, store, FT_REGULAR)
    fs.add_entry(ROOT_INODE, DIRECTORY_NAME, directory, FT_DIRECTORY)
    root = fs.inode(ROOT_INODE)
    root.i_links_count += 1
    fs.write_inode(ROOT_INODE, root)
    return Place(directory, store, directory_block), extents, mapping


def _new_inode(fs: Filesystem, number: int, mode: int, links: int, flags: int, now: int) -> None:
    inode = fs.new_inode(number)
    inode.i_mode = mode
    inode.i_links_count = links
    inode.i_flags = flags
    inode.i_atime = inode.i_ctime = inode.i_mtime = now
    fs.write_inode(number, inode)
    charge(fs, inode, 0, 1)


def resize(
    fs: Filesystem, store_inode: int, extents: Extents, mapping: Ints, wanted: Extents, avoid: ByteWindows
) -> Ints:
    """Change the store's data blocks from ``extents`` to ``wanted``; returns its mapping blocks then.

    Mapping blocks are reused in their order, so that nodes which do not change are not written.
    """
    old = fs.file_map(store_inode)
    if not np.array_equal(join(old.data), join(extents)) or not np.array_equal(np.sort(old.mapping), np.sort(mapping)):
        raise StoreDamaged("the store's header and its inode do not agree", hint="run extsnap check")
    fs.set_blocks(extents[:, 1:], False)
    fs.set_blocks(wanted[:, 1:], True)
    needed = fs.mapping_blocks_needed(wanted)
    if needed > len(mapping):
        # A block that is given back stays the store's until the change is committed, and no node can be written there.
        more = fs.allocate_blocks(needed - len(mapping), avoid, _group_bits(fs, extents))
        mapping = np.concatenate([mapping, more])
    elif needed < len(mapping):
        surplus = mapping[needed:]
        fs.set_blocks(np.stack([surplus, np.ones_like(surplus)], axis=1), False)
        mapping = mapping[:needed]
    end = int((wanted[:, 0] + wanted[:, 2]).max())
    fs.set_file_map(store_inode, wanted, mapping, end * fs.geometry.block_size)
    return mapping


def _group_bits(fs: Filesystem, extents: Extents) -> SparseBits:
    """The data blocks of ``extents`` in the rows of the block bitmaps."""
    geometry = fs.geometry
    relative = extents[:, 1:] - np.array([geometry.first_data_block, 0])
    return SparseBits.of(relative, geometry.groups, geometry.blocks_per_group // 8)


def replace_store(fs: Filesystem, store_inode: int, extents: Extents, mapping: Ints | None, avoid: ByteWindows) -> Ints:
    """In a restored filesystem, put today's store in the place of the one of then (claim 11).

    Args:
        fs: The snapshot's filesystem, on an overlay.
        extents: Today's data blocks.
        mapping: Blocks for the nodes if they were chosen before, else None.
        avoid: Blocks that other snapshots need, left alone while others are free.

    Returns:
        The mapping blocks.

    Raises:
        RestoreRefused: A block of the store is in use by the snapshot's files.
    """
    if fs.lookup(PATH) != store_inode:
        raise RestoreRefused("the snapshot has no /.extsnap/store where today's volume has it; nothing was changed")
    old = fs.file_map(store_inode)
    fs.set_blocks(old.data[:, 1:], False)
    fs.set_blocks(np.stack([old.mapping, np.ones_like(old.mapping)], axis=1), False)
    mine = _group_bits(fs, extents)
    count = mine.total()
    mine -= fs.block_bitmaps()
    clash = count - mine.total()
    if clash:
        raise RestoreRefused(
            f"{clash} blocks of the store are in use by the snapshot's files; nothing was changed",
            hint="export the snapshot instead",
        )
    fs.set_blocks(extents[:, 1:], True)
    needed = fs.mapping_blocks_needed(extents)
    if mapping is None:
        try:
            mapping = fs.allocate_blocks(needed, avoid)
        except VolumeFull:
            mapping = fs.allocate_blocks(needed)
    else:
        fs.set_blocks(np.stack([mapping, np.ones_like(mapping)], axis=1), True)
    end = int((extents[:, 0] + extents[:, 2]).max())
    fs.set_file_map(store_inode, extents, mapping, end * fs.geometry.block_size)
    return mapping


def remove(fs: Filesystem, now: int) -> None:
    """Remove ``/.extsnap`` and free everything of it."""
    directory = fs.lookup("/" + DIRECTORY_NAME.decode())
    store = fs.lookup(PATH)
    if directory is None or store is None:
        return
    fs.remove_entry(ROOT_INODE, DIRECTORY_NAME)
    for number, is_directory in ((store, False), (directory, True)):
        old = fs.file_map(number)
        fs.set_blocks(old.data[:, 1:], False)
        fs.set_blocks(np.stack([old.mapping, np.ones_like(old.mapping)], axis=1), False)
        charge(fs, fs.inode(number), -fs.allocated_bytes(number), -1)
        inode = fs.new_inode(number)
        inode.i_dtime = now
        fs.write_inode(number, inode)
        fs.free_inode(number, directory=is_directory)
    root = fs.inode(ROOT_INODE)
    root.i_links_count -= 1
    fs.write_inode(ROOT_INODE, root)
