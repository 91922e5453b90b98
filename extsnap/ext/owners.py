"""Whose are these blocks?  Files by inode, and the filesystem's own structures, in bulk.

The inode tables are walked once, whatever the number of blocks; mappings are followed level by level for many inodes
at a time.  What cannot be read, or is damaged, owns nothing: the question is asked of volumes that are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints, expand
from extsnap.errors import ExtsnapError
from extsnap.ext.filesystem import Filesystem
from extsnap.ondisk.extent import DEPTH_MAX, ENTRY_SIZE, HEADER_SIZE, INDEX_DTYPE, LEAF_DTYPE, LENGTH_MAX, MAGIC
from extsnap.ondisk.inode import InodeFlags
from extsnap.sparsebits import SparseBits

Rows = npt.NDArray[np.uint8]
#: Bytes of inode tables, or of mapping blocks, worked on at once.
_PIECE_BYTES = 4 << 20
_FAST_SYMLINK_BYTES = 60
_TYPE, _REGULAR, _DIRECTORY, _SYMLINK = 0xF000, 0x8000, 0x4000, 0xA000
_DIRECT = 12


@dataclass(frozen=True)
class Owners:
    """Whose blocks are.

    Attributes:
        inodes: int64[n], files that have one of the blocks as content, mapping or attributes, sorted.
        tables: int64[n, 2], runs (first, count) of inodes that stand in one of the blocks.
        structures: Structures of the filesystem that do, as words.
    """

    inodes: Ints
    tables: Ints
    structures: list[str]


def owners_of(fs: Filesystem, blocks: Ints) -> Owners:
    """Owners of ``blocks`` (sorted, each once)."""
    tables, structures = _structures(fs, blocks)
    found = [np.zeros(0, np.int64)]
    for numbers, raw in _inodes(fs):
        found.append(np.unique(_among(fs, blocks, numbers, raw)))
    return Owners(np.unique(np.concatenate(found)), tables, structures)


def used_by_inodes(fs: Filesystem) -> SparseBits:
    """The blocks that inodes with a name have, in rows as `Filesystem.block_bitmaps` has them.

    Without a journal they are what a recovery goes by: after a crash the bitmaps may say otherwise.
    """
    geometry = fs.geometry
    used = SparseBits(geometry.groups, geometry.blocks_per_group // 8)

    def look(owner: Ints, start: Ints, length: Ints) -> None:
        inside = (start >= geometry.first_data_block) & (start + length <= geometry.blocks_count)
        used.set(np.stack([start - geometry.first_data_block, length], axis=1)[inside])

    for numbers, raw in _inodes(fs, whole=True):
        _look_at_all(fs, numbers, raw, look)
    return used


def _structures(fs: Filesystem, blocks: Ints) -> tuple[Ints, list[str]]:
    """What of the filesystem's own structures stands in ``blocks``: (runs of inodes, words)."""
    geometry, groups = fs.geometry, fs.groups
    names = []
    superblocks = geometry.superblock_blocks[np.isin(geometry.superblock_blocks, blocks)]
    names += [f"superblock in block {block}" for block in superblocks.tolist()]
    if np.isin(geometry.descriptor_blocks, blocks).any():
        names.append("group descriptors")
    for field, name in (("bg_block_bitmap", "block bitmap"), ("bg_inode_bitmap", "inode bitmap")):
        which = np.flatnonzero(np.isin(groups.column(field), blocks))
        names += [f"{name} of group {group}" for group in which.tolist()]
    first = groups.column("bg_inode_table").astype(np.int64)
    low = np.searchsorted(blocks, first)
    count = np.searchsorted(blocks, first + geometry.inode_table_blocks) - low
    group = np.repeat(np.arange(geometry.groups), count)
    names += [f"inode table of group {number}" for number in np.unique(group).tolist()]
    per_block = geometry.block_size // geometry.inode_size
    within = (blocks[expand(low, count)] - first[group]) * per_block
    length = np.minimum(per_block, geometry.inodes_per_group - within)
    return np.stack([group * geometry.inodes_per_group + within + 1, length], axis=1), names


def _read(fs: Filesystem, numbers: Ints) -> Rows:
    """Blocks in the order given; those that cannot be read are zeros."""
    try:
        return fs.read_blocks(numbers)
    except (OSError, ExtsnapError):
        if len(numbers) == 1:
            return np.zeros((1, fs.geometry.block_size), np.uint8)
    half = len(numbers) // 2
    return np.concatenate([_read(fs, numbers[:half]), _read(fs, numbers[half:])])


def _inodes(fs: Filesystem, *, whole: bool = False) -> Iterator[tuple[Ints, Rows]]:
    """(numbers, uint8[n, inode size]) of the inodes that are in use, some at a time.

    Args:
        whole: Look at the parts of the tables, too, that the descriptors call unused.
    """
    geometry = fs.geometry
    size = geometry.block_size
    first = fs.groups.column("bg_inode_table").astype(np.int64)
    used = np.full(geometry.groups, geometry.inodes_per_group, np.int64)
    if fs.groups.has_checksums and not whole:
        used -= fs.groups.column("bg_itable_unused").astype(np.int64)
    lengths = -(-used * geometry.inode_size // size)
    per_block = size // geometry.inode_size
    group = np.repeat(np.arange(geometry.groups), lengths)
    within = expand(np.zeros(geometry.groups, np.int64), lengths)
    step = _PIECE_BYTES // size
    for low in range(0, len(group), step):
        where, behind = group[low : low + step], within[low : low + step]
        raw = _read(fs, first[where] + behind).reshape(-1, geometry.inode_size)
        index = np.repeat(behind * per_block, per_block) + np.tile(np.arange(per_block), len(where))
        numbers = np.repeat(where, per_block) * geometry.inodes_per_group + index + 1
        mode, links = raw[:, 0:2].copy().view("<u2").ravel(), raw[:, 26:28].copy().view("<u2").ravel()
        which = np.flatnonzero((mode != 0) & (links != 0) & (index < geometry.inodes_per_group))
        yield numbers[which], raw[which]


def _among(fs: Filesystem, blocks: Ints, numbers: Ints, raw: Rows) -> Ints:
    """Those of inodes ``numbers`` that have one of ``blocks``."""
    found: list[Ints] = []

    def look(owner: Ints, start: Ints, length: Ints) -> None:
        found.append(owner[np.searchsorted(blocks, start) < np.searchsorted(blocks, start + length)])

    _look_at_all(fs, numbers, raw, look)
    return np.concatenate(found)


Look = Callable[[Ints, Ints, Ints], None]


def _look_at_all(fs: Filesystem, numbers: Ints, raw: Rows, look: Look) -> None:
    """Show every run (owner, start, length) of blocks that inodes ``numbers`` have."""
    mode = raw[:, 0:2].copy().view("<u2").ravel() & _TYPE
    size = raw[:, 4:8].copy().view("<u4").ravel()
    flags = raw[:, 32:36].copy().view("<u4").ravel()
    attributes = raw[:, 104:108].copy().view("<u4").ravel() | (
        raw[:, 118:120].copy().view("<u2").ravel().astype(np.int64) << 32
    )
    look(numbers, attributes.astype(np.int64), (attributes != 0).astype(np.int64))
    mapped = np.isin(mode, (_REGULAR, _DIRECTORY)) | ((mode == _SYMLINK) & (size >= _FAST_SYMLINK_BYTES))
    mapped &= (flags & int(InodeFlags.INLINE_DATA)) == 0
    extents = (flags & int(InodeFlags.EXTENTS)) != 0
    roots = raw[:, 40:100]
    _follow_extents(fs, numbers[mapped & extents], roots[mapped & extents], look)
    _follow_pointers(fs, numbers[mapped & ~extents], roots[mapped & ~extents], look)


def _inside(fs: Filesystem, owner: Ints, nodes: Ints) -> tuple[Ints, Ints]:
    """Without the nodes that lie outside the volume, and without those that stand twice: loops end."""
    _, which = np.unique(nodes, return_index=True)
    which = which[(nodes[which] > 0) & (nodes[which] < fs.geometry.blocks_count)]
    return owner[which], nodes[which]


def _follow_extents(fs: Filesystem, owner: Ints, nodes: Rows, look: Look) -> None:
    """Show every extent, and every node, below ``nodes`` (uint8[n, bytes of a node])."""
    step = max(1, _PIECE_BYTES // fs.geometry.block_size)
    below: list[tuple[Ints, Ints]] = [_extents_below(owner, nodes, look)]
    for _ in range(DEPTH_MAX):
        owners, blocks = _inside(fs, *(np.concatenate(part) for part in zip(*below, strict=True)))
        if not len(blocks):
            return
        look(owners, blocks, np.ones_like(blocks))
        below = [
            _extents_below(owners[low : low + step], _read(fs, blocks[low : low + step]), look)
            for low in range(0, len(blocks), step)
        ]


def _extents_below(owner: Ints, nodes: Rows, look: Look) -> tuple[Ints, Ints]:
    """Show the extents in leaves; (owner, block) of the nodes that the others name."""
    room = (nodes.shape[1] - HEADER_SIZE) // ENTRY_SIZE
    head = np.ascontiguousarray(nodes[:, :8]).view("<u2").reshape(-1, 4)
    count = np.minimum(head[:, 1].astype(np.int64), room)
    count[(head[:, 0] != MAGIC) | (head[:, 3] > DEPTH_MAX)] = 0
    body = np.ascontiguousarray(nodes[:, HEADER_SIZE : HEADER_SIZE + room * ENTRY_SIZE])
    there = np.arange(room) < count[:, None]
    leaf = head[:, 3] == 0
    row, column = np.nonzero(there & leaf[:, None])
    entries = body.view(LEAF_DTYPE).reshape(-1, room)[row, column]
    length = entries["ee_len"].astype(np.int64)
    length = np.where(length > LENGTH_MAX, length - LENGTH_MAX, length)
    look(owner[row], entries["ee_start_lo"] | (entries["ee_start_hi"].astype(np.int64) << 32), length)
    row, column = np.nonzero(there & ~leaf[:, None])
    entries = body.view(INDEX_DTYPE).reshape(-1, room)[row, column]
    return owner[row], entries["ei_leaf_lo"] | (entries["ei_leaf_hi"].astype(np.int64) << 32)


def _follow_pointers(fs: Filesystem, owner: Ints, roots: Rows, look: Look) -> None:
    """Show every block that direct and indirect pointers name."""
    step = max(1, _PIECE_BYTES // fs.geometry.block_size)
    pointers = np.ascontiguousarray(roots).view("<u4").reshape(-1, 15).astype(np.int64)
    row, column = np.nonzero(pointers[:, :_DIRECT])
    blocks = pointers[row, column]
    look(owner[row], blocks, np.ones_like(blocks))
    owners, nodes = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for depth in (3, 2, 1):
        # From the deepest on: what a level names joins the roots of the next one.
        owners = np.concatenate([owners, owner])
        nodes = np.concatenate([nodes, pointers[:, _DIRECT + depth - 1]])
        owners, nodes = _inside(fs, owners, nodes)
        look(owners, nodes, np.ones_like(nodes))
        named: list[tuple[Ints, Ints]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for low in range(0, len(nodes), step):
            content = _read(fs, nodes[low : low + step]).view("<u4")
            row, column = np.nonzero(content)
            found = content[row, column].astype(np.int64)
            if depth == 1:
                look(owners[low + row], found, np.ones_like(found))
            else:
                named.append((owners[low + row], found))
        owners, nodes = (np.concatenate(part) for part in zip(*named, strict=True))
