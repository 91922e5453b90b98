"""Graft: make a filesystem say what the store's header says.

Each function edits a `Filesystem` that stands on an `Overlay`: nothing reaches the medium here.  The blocks
that come out of the overlay are committed as redo blocks by `edit`, or written by a restore.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from extsnap.arrays import ByteWindows, Ints, distinct, expand, overlap, runs_of
from extsnap.errors import FormatError, RestoreRefused, StoreDamaged, StoreProtected, VolumeFull
from extsnap.ext.bitmaps import whole_clusters
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.quota import charge
from extsnap.snapshot.root import Extents, Root
from extsnap.sparsebits import SparseBits

ROOT_INODE = 2
DIRECTORY_NAME = b".extsnap"
FILE_NAME = b"store"
DIRECTORY_PATH = "/.extsnap"
PATH = DIRECTORY_PATH + "/store"
FT_REGULAR, FT_DIRECTORY = 1, 2
S_IFMT, S_IFDIR, S_IFREG = 0o170000, 0o040000, 0o100000
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


def whole_units(runs: Ints, unit: int) -> Ints:
    """Of runs (start, length) the parts that are whole clusters of ``unit`` blocks."""
    start, end = -(-runs[:, 0] // unit) * unit, runs.sum(axis=1) // unit * unit
    return np.asarray(np.stack([start, end - start], axis=1)[end > start])


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
    if fs.lookup(DIRECTORY_PATH) is not None:
        raise StoreDamaged("the volume has a /.extsnap without a readable store", hint="rename or remove it first")
    data = free_runs(fs, blocks)
    fs.set_blocks(data, True)
    extents = join(map_runs(np.array([[0, blocks]], np.int64), data))
    mapping = fs.allocate_blocks(fs.mapping_blocks_needed(extents))
    directory_block = int(fs.allocate_blocks(1)[0])
    directory = fs.allocate_inode(directory=True)
    store = fs.allocate_inode(directory=False)
    _make_directory(fs, directory, directory_block, now)
    _make_file(fs, directory, store, extents, mapping, now)
    return Place(directory, store, directory_block), extents, mapping


def _new_inode(fs: Filesystem, number: int, mode: int, links: int, flags: int, now: int) -> None:
    inode = fs.new_inode(number)
    inode.i_mode = mode
    inode.i_links_count = links
    inode.i_flags = flags
    inode.i_atime = inode.i_ctime = inode.i_mtime = now
    fs.write_inode(number, inode)
    charge(fs, inode, 0, 1)


def verify(fs: Filesystem, root: Root) -> None:
    """Check that the filesystem's store has the data blocks and the name that the header says.

    Raises:
        StoreProtected: It has not; says what is wrong.
        FormatError: An inode or a node cannot be read.
    """
    store, directory = fs.inode(root.store_inode), fs.inode(root.directory_inode)
    if store.i_mode & S_IFMT != S_IFREG or not store.i_links_count or store.i_dtime:
        raise StoreProtected("its inode is no file")
    if directory.i_mode & S_IFMT != S_IFDIR or not directory.i_links_count:
        raise StoreProtected("the inode of its directory is no directory")
    if not np.array_equal(join(fs.file_map(root.store_inode).data), join(root.extents)):
        raise StoreProtected("its blocks are others")
    if fs.lookup_in(root.directory_inode, FILE_NAME) != root.store_inode:
        raise StoreProtected("it has no name")


def is_whole(fs: Filesystem, root: Root) -> bool:
    """Whether `verify` passes."""
    try:
        verify(fs, root)
    except (StoreProtected, FormatError):
        return False
    return True


def has_metadata(fs: Filesystem, root: Root) -> bool:
    """Whether the header claims a block twice, or one that holds metadata of the filesystem.

    Raises:
        FormatError: A descriptor is damaged.
    """
    sound = fs.groups.sound() if fs.has_errors else np.ones(fs.geometry.groups, np.bool_)
    metadata = whole_clusters(fs.groups.metadata_runs(sound), 1)
    return overlap(np.concatenate([root.allocation_runs(), metadata]))


def has_all(data: Extents, extents: Extents) -> bool:
    """Whether a file's blocks ``data`` hold all of ``extents``, logical block by logical block; more does no harm.

    While the kernel grows the store it is the filesystem that has the new blocks first, and the header that lets go
    of given-back ones first: then there is a surplus, until both agree again.
    """
    return np.array_equal(keep_logical(join(data), extents[:, [0, 2]]), join(extents))


def is_left_by_kernel(fs: Filesystem, root: Root) -> bool:
    """Whether the store is as a kernel mount left it: a surplus, blocks marked unwritten, or no longer immutable.

    Raises:
        FormatError: An inode or a node cannot be read.
    """
    found, inode = fs.file_map(root.store_inode), fs.inode(root.store_inode)
    is_file = inode.i_mode & S_IFMT == S_IFREG and inode.i_links_count and not inode.i_dtime
    if not is_file or not has_all(found.data, root.extents):
        return False
    surplus = not np.array_equal(join(found.data), join(root.extents))
    return surplus or found.unwritten or not inode.i_flags & IMMUTABLE


def is_marked_used(fs: Filesystem, root: Root) -> bool:
    """Whether both bitmaps of the filesystem call the store's inodes and blocks used; the store is whole."""
    if not (fs.inode_in_use(root.store_inode) and fs.inode_in_use(root.directory_inode)):
        return False
    nodes = fs.file_map(root.store_inode).mapping
    return not len(_free_of(fs, _runs(root.extents, nodes, root.directory_block)))


def _runs(extents: Extents, *blocks: Ints | int) -> Ints:
    """Runs (start, length) of data blocks and of single blocks."""
    single = np.concatenate([np.atleast_1d(np.asarray(block, np.int64)) for block in blocks])
    return np.concatenate([extents[:, 1:], np.stack([single, np.ones_like(single)], axis=1)])


def _free_of(fs: Filesystem, runs: Ints) -> Ints:
    """Those of the blocks in ``runs`` that the block bitmaps call free: int64[n], sorted."""
    used, first = fs.block_bitmaps(), fs.geometry.first_data_block
    inside = runs[runs[:, 0] < fs.geometry.blocks_count]
    length = np.minimum(inside[:, 1], fs.geometry.blocks_count - inside[:, 0])
    free = SparseBits.of(np.stack([inside[:, 0] - first, length], axis=1), used.rows, used.row_bytes)
    free -= used
    found = free.runs()
    return expand(found[:, 0] + first, found[:, 1])


def reassert(fs: Filesystem, root: Root, now: int) -> Ints:
    """Make the filesystem say of the store what the header says, after somebody freed or removed it.

    Returns:
        The mapping blocks.

    Raises:
        StoreDamaged: Files have blocks or inodes of the store now; says how many.
    """
    store = fs.inode(root.store_inode)
    if store.i_links_count and store.i_dtime:  # freed, but the warden kept what it is
        store.i_dtime = 0
        fs.write_inode(root.store_inode, store)
    if not is_whole(fs, root):
        _make_again(fs, root, now)
    for number in (root.directory_inode, root.store_inode):
        if not fs.inode_in_use(number):
            fs.allocate_inode(directory=number == root.directory_inode, number=number, keep=True)
    mapping = fs.file_map(root.store_inode).mapping
    fs.set_blocks(runs_of(_free_of(fs, _runs(root.extents, mapping, root.directory_block))), True)
    return mapping


def _make_again(fs: Filesystem, root: Root, now: int) -> None:
    """Make a store that was removed, in the same inodes and blocks."""
    kept = fs.inode_in_use(root.directory_inode) and fs.lookup(DIRECTORY_PATH) == root.directory_inode
    numbers = [root.store_inode] if kept else [root.directory_inode, root.store_inode]
    runs = _runs(root.extents, root.mapping, *([] if kept else [root.directory_block]))
    taken = sum(fs.inode_in_use(number) for number in numbers)
    claimed = int(runs[:, 1].sum()) - len(_free_of(fs, runs))
    if taken or claimed:
        raise StoreDamaged(
            f"the filesystem has no store any more, and {claimed} blocks and {taken} inodes of it belong to files now",
            hint="restore a snapshot: that brings the volume back and keeps the others",
        )
    fs.set_blocks(runs, True)
    for number in numbers:
        fs.allocate_inode(directory=number == root.directory_inode, number=number)
    if not kept:
        _make_directory(fs, root.directory_inode, root.directory_block, now)
    _make_file(fs, root.directory_inode, root.store_inode, root.extents, root.mapping, now)


def _make_directory(fs: Filesystem, number: int, block: int, now: int) -> None:
    """Write the directory's inode and block, and its name into the root."""
    _new_inode(fs, number, S_IFDIR | 0o700, 2, IMMUTABLE, now)
    one = np.array([[0, block, 1]], np.int64)
    fs.set_file_map(number, one, np.zeros(0, np.int64), fs.geometry.block_size)
    fs.write_block(block, fs.new_directory_block(number, ROOT_INODE))
    fs.add_entry(ROOT_INODE, DIRECTORY_NAME, number, FT_DIRECTORY)
    parent = fs.inode(ROOT_INODE)
    parent.i_links_count += 1
    fs.write_inode(ROOT_INODE, parent)


def _make_file(fs: Filesystem, directory: int, number: int, extents: Extents, mapping: Ints, now: int) -> None:
    """Write the store's inode and nodes, and its name into its directory."""
    _new_inode(fs, number, S_IFREG | 0o600, 1, IMMUTABLE | NODUMP, now)
    end = int((extents[:, 0] + extents[:, 2]).max())
    fs.set_file_map(number, extents, mapping, end * fs.geometry.block_size)
    if fs.lookup_in(directory, FILE_NAME) is None:
        fs.add_entry(directory, FILE_NAME, number, FT_REGULAR)


def resize(fs: Filesystem, store_inode: int, extents: Extents, wanted: Extents, avoid: ByteWindows) -> Ints:
    """Change the store's data blocks from ``extents`` to ``wanted``; returns its mapping blocks then.

    Mapping blocks are reused in their order, so that nodes which do not change are not written.  What the inode has
    beyond ``extents`` (a surplus, see `has_all`) goes back to the filesystem, and all blocks count as written.
    """
    old = fs.file_map(store_inode)
    if not has_all(old.data, extents):
        raise StoreDamaged("the store's header and its inode do not agree", hint="run extsnap check")
    mapping = old.mapping
    fs.set_blocks(old.data[:, 1:], False)
    fs.set_blocks(wanted[:, 1:], True)
    needed = fs.mapping_blocks_needed(wanted)
    if needed > len(mapping):
        # A block that is given back stays the store's until the change is committed, and no node can be written there.
        more = fs.allocate_blocks(needed - len(mapping), avoid, _group_bits(fs, old.data))
        mapping = np.concatenate([mapping, more])
    elif needed < len(mapping):
        surplus = mapping[needed:]
        fs.set_blocks(np.stack([surplus, np.ones_like(surplus)], axis=1), False)
        mapping = mapping[:needed]
    end = int((wanted[:, 0] + wanted[:, 2]).max())
    fs.set_file_map(store_inode, wanted, mapping, end * fs.geometry.block_size)
    inode = fs.inode(store_inode)
    if not inode.i_flags & IMMUTABLE:  # the growth of a kernel mount was interrupted
        inode.i_flags |= IMMUTABLE
        fs.write_inode(store_inode, inode)
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
    clash = in_the_way(fs, store_inode, extents)
    if len(clash):
        raise RestoreRefused(
            f"{len(clash)} blocks of the store are in use by the snapshot's files; nothing was changed",
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


def in_the_way(fs: Filesystem, store_inode: int, extents: Extents) -> Ints:
    """Today's store's blocks that a snapshot's files use, or that lie past the snapshot's end: int64[n], sorted.

    The store of then is freed in ``fs``, an overlay of the snapshot.

    Raises:
        RestoreRefused: The snapshot has no store where today's volume has it.
    """
    if fs.lookup(PATH) != store_inode:
        raise RestoreRefused("the snapshot has no /.extsnap/store where today's volume has it; nothing was changed")
    old = fs.file_map(store_inode)
    fs.set_blocks(old.data[:, 1:], False)
    fs.set_blocks(np.stack([old.mapping, np.ones_like(old.mapping)], axis=1), False)
    blocks = np.sort(expand(extents[:, 1], extents[:, 2]))
    inside = int(np.searchsorted(blocks, fs.geometry.blocks_count))
    used = fs.block_bitmaps().test(blocks[:inside] - fs.geometry.first_data_block)
    return np.concatenate([blocks[:inside][used], blocks[inside:]])


def remove_stale(fs: Filesystem, root: Root, now: int) -> None:
    """Remove what is left of a store without snapshots, which a tool has moved or removed."""
    if fs.lookup(DIRECTORY_PATH) != root.directory_inode:
        return
    if fs.lookup(PATH) == root.store_inode:
        remove(fs, now)
        return
    if fs.lookup_in(root.directory_inode, FILE_NAME) is None:
        _remove_inodes(fs, [(root.directory_inode, True)], now)


def remove(fs: Filesystem, now: int) -> None:
    """Remove ``/.extsnap`` and free everything of it.

    Raises:
        StoreDamaged: Somebody has renamed it.
    """
    directory, store = fs.lookup(DIRECTORY_PATH), fs.lookup(PATH)
    if directory is None or store is None:
        raise StoreDamaged("the store is not at /.extsnap/store any more", hint="rename it back first")
    _remove_inodes(fs, [(store, False), (directory, True)], now)


def _remove_inodes(fs: Filesystem, numbers: list[tuple[int, bool]], now: int) -> None:
    """Take ``/.extsnap`` out of the root and free inodes (number, whether a directory) with their blocks."""
    fs.remove_entry(ROOT_INODE, DIRECTORY_NAME)
    for number, is_directory in numbers:
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
