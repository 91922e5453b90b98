"""File mappings: extent trees and indirect blocks, parsed into runs and built from runs.

Nodes are numbered in preorder: a node stands before everything below it, in the order of logical blocks.  A file
that grows at its end keeps all its nodes but the last of each level, in content and in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints, breaks_to_runs, expand, jumps, overlap
from extsnap.errors import FormatError
from extsnap.ondisk.checksum import extent_checksum
from extsnap.ondisk.extent import (
    DEPTH_MAX,
    ENTRY_SIZE,
    HEADER_SIZE,
    INDEX_DTYPE,
    LEAF_DTYPE,
    LENGTH_MAX,
    MAGIC,
    ExtentHeader,
)

DIRECT = 12
ROOT_ENTRIES = 4
#: Nodes read at a time: a tree of many empty nodes must not cost their bytes in memory.
_NODES_AT_ONCE = 1024

#: Reads blocks in the order given: (int64[n]) -> uint8[n, block_size].
ReadBlocks = Callable[[Ints], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class FileMap:
    """Where a file's blocks are.

    Attributes:
        data: int64[n, 3], rows (logical, physical, length), sorted by logical.
        mapping: int64[k], blocks of extent nodes or indirect blocks, in preorder.
        unwritten: Whether a part of it reads as zeros from above whatever its blocks hold: allocated, never written.
    """

    data: Ints
    mapping: Ints
    unwritten: bool = False


def _preorder(starts: Ints, levels: Ints) -> Ints:
    """Order of nodes by first logical block they can map, the higher level first."""
    return np.lexsort((-levels, starts))


# -- extents ----------------------------------------------------------------------------------------------


def parse_extents(i_block: bytes, read: ReadBlocks, blocks_count: int, seed: int | None) -> FileMap:
    """Parse an extent tree, level by level.

    Args:
        i_block: The root, 60 bytes.
        read: Reads blocks.
        blocks_count: Of the filesystem; addresses beyond it are damage.
        seed: The inode's checksum seed, or None without metadata_csum.

    Raises:
        FormatError: A node is damaged, stands twice, or points outside.
    """
    depth = ExtentHeader.parse(i_block[:HEADER_SIZE]).eh_depth
    if depth > DEPTH_MAX:
        raise FormatError(f"depth {depth} is too large", structure="extent header", field="eh_depth")
    starts: list[Ints] = []
    levels: list[Ints] = []
    found: list[Ints] = []
    seen = 0
    entries = _entries(i_block, depth)
    for level in range(depth - 1, -1, -1):
        blocks = entries["ei_leaf_lo"].astype(np.int64) | (entries["ei_leaf_hi"].astype(np.int64) << 32)
        seen += len(blocks)
        if blocks.max() >= blocks_count or blocks.min() < 1 or seen > blocks_count:
            raise FormatError("a node lies outside the volume", structure="extent index", field="ei_leaf")
        starts.append(entries["ei_block"].astype(np.int64))
        levels.append(np.full(len(blocks), level, np.int64))
        found.append(blocks)
        if len(np.unique(np.concatenate(found))) != seen:
            raise FormatError("a node stands twice in the tree", structure="extent index", field="ei_leaf")
        tables = []
        for low in range(0, len(blocks), _NODES_AT_ONCE):
            for row in read(blocks[low : low + _NODES_AT_ONCE]):
                node = row.tobytes()
                tables.append(_entries(node, level))
                _verify_node(node, seed)
        entries = np.concatenate(tables)
    leaves = entries
    length = leaves["ee_len"].astype(np.int64)
    unwritten = bool((length > LENGTH_MAX).any())
    length = np.where(length > LENGTH_MAX, length - LENGTH_MAX, length)
    physical = leaves["ee_start_lo"].astype(np.int64) | (leaves["ee_start_hi"].astype(np.int64) << 32)
    logical = leaves["ee_block"].astype(np.int64)
    if len(leaves) and (
        (length < 1).any()
        or (physical < 1).any()
        or (physical + length > blocks_count).any()
        or (logical[1:] < logical[:-1] + length[:-1]).any()
        or length.sum() > blocks_count
    ):
        raise FormatError("an extent is out of order or outside the volume", structure="extent leaf")
    if overlap(np.stack([physical, length], axis=1)):
        raise FormatError("two extents have the same blocks", structure="extent leaf")
    mapping = np.zeros(0, np.int64)
    if found:
        order = _preorder(np.concatenate(starts), np.concatenate(levels))
        mapping = np.concatenate(found)[order]
    return FileMap(np.stack([logical, physical, length], axis=1), mapping, unwritten)


def _entries(node: bytes, depth: int) -> npt.NDArray[np.void]:
    head = ExtentHeader.parse(node[:HEADER_SIZE])
    room = (len(node) - HEADER_SIZE) // ENTRY_SIZE
    if head.eh_magic != MAGIC or head.eh_depth != depth or head.eh_entries > min(head.eh_max, room):
        raise FormatError("magic, depth or count is wrong", structure="extent header")
    if depth and not head.eh_entries:
        raise FormatError("an index without entries", structure="extent header", field="eh_entries")
    return np.frombuffer(node, INDEX_DTYPE if depth else LEAF_DTYPE, head.eh_entries, HEADER_SIZE)


def _verify_node(node: bytes, seed: int | None) -> None:
    if seed is None:
        return
    at = HEADER_SIZE + ENTRY_SIZE * int.from_bytes(node[4:6], "little")
    if at + 4 > len(node) or extent_checksum(seed, node) != int.from_bytes(node[at : at + 4], "little"):
        raise FormatError("the checksum is wrong", structure="extent block", field="et_checksum")


def _split_extents(data: Ints) -> Ints:
    """Runs no longer than an extent can be: int64[n, 3]."""
    pieces = -(-data[:, 2] // LENGTH_MAX)
    part = expand(np.zeros(len(data), np.int64), pieces) * LENGTH_MAX
    owner = np.repeat(np.arange(len(data)), pieces)
    length = np.minimum(data[owner, 2] - part, LENGTH_MAX)
    return np.stack([data[owner, 0] + part, data[owner, 1] + part, length], axis=1)


def _fanout(block_size: int) -> int:
    return (block_size - int(HEADER_SIZE)) // int(ENTRY_SIZE)


def extent_nodes(data: Ints, block_size: int) -> int:
    """Blocks outside the inode that an extent tree over ``data`` takes."""
    count = len(_split_extents(data))
    total = 0
    while count > ROOT_ENTRIES:
        count = -(-count // _fanout(block_size))
        total += count
    return total


def build_extents(data: Ints, mapping: Ints, block_size: int, seed: int | None) -> tuple[bytes, dict[int, bytes]]:
    """Build an extent tree over ``data`` in exactly the blocks ``mapping``.

    Returns:
        (i_block, node content by block).
    """
    extents = _split_extents(data)
    table = np.zeros(len(extents), LEAF_DTYPE)
    table["ee_block"], table["ee_len"] = extents[:, 0], extents[:, 2]
    table["ee_start_lo"], table["ee_start_hi"] = extents[:, 1] & 0xFFFFFFFF, extents[:, 1] >> 32
    fanout = _fanout(block_size)
    # Shape first: which node of which level begins at which logical block; then preorder gives out the blocks.
    shape: list[Ints] = []
    starts = extents[:, 0]
    while len(starts) > ROOT_ENTRIES:
        starts = starts[::fanout]
        shape.append(starts)
    places: list[Ints] = []
    if shape:
        levels = np.concatenate([np.full(len(level), number) for number, level in enumerate(shape)])
        order = _preorder(np.concatenate(shape), levels)
        blocks = np.empty(len(order), np.int64)
        blocks[order] = mapping
        places = np.split(blocks, np.cumsum([len(level) for level in shape])[:-1])
    nodes: dict[int, bytes] = {}
    entries: npt.NDArray[np.void] = table
    for depth, place in enumerate(places):
        for number, block in enumerate(place.tolist()):
            piece = entries[number * fanout : (number + 1) * fanout]
            nodes[block] = _node(piece, depth, fanout, block_size, seed)
        index = np.zeros(len(place), INDEX_DTYPE)
        index["ei_block"] = shape[depth]
        index["ei_leaf_lo"], index["ei_leaf_hi"] = place & 0xFFFFFFFF, place >> 32
        entries = index
    return _node(entries, len(places), ROOT_ENTRIES, 60, None), nodes


def _node(entries: npt.NDArray[np.void], depth: int, maximum: int, size: int, seed: int | None) -> bytes:
    head = {"eh_magic": MAGIC, "eh_entries": len(entries), "eh_max": maximum, "eh_depth": depth, "eh_generation": 0}
    raw = bytes(ExtentHeader.build(head)) + entries.tobytes()
    raw += bytes(size - len(raw))
    if seed is not None:
        at = HEADER_SIZE + ENTRY_SIZE * maximum
        raw = raw[:at] + extent_checksum(seed, raw).to_bytes(4, "little") + raw[at + 4 :]
    return raw


# -- indirect blocks --------------------------------------------------------------------------------------


def parse_indirect(i_block: bytes, read: ReadBlocks, blocks_count: int, block_size: int) -> FileMap:
    """Parse direct, indirect, double and triple indirect blocks, level by level.

    Raises:
        FormatError: A block stands twice as a node, or lies outside the volume.
    """
    roots = np.frombuffer(i_block, "<u4").astype(np.int64)
    per_block = block_size // 4
    logical, physical = [np.flatnonzero(roots[:DIRECT])], [roots[:DIRECT][roots[:DIRECT] != 0]]
    starts, levels, found = [], [], []
    base = DIRECT
    for depth in (1, 2, 3):
        blocks, at = roots[DIRECT + depth - 1 : DIRECT + depth], np.array([base], np.int64)
        at, blocks = at[blocks != 0], blocks[blocks != 0]
        for level in range(depth, 0, -1):
            if not len(blocks):
                break
            if blocks.max() >= blocks_count or blocks.min() < 1:
                raise FormatError("a node lies outside the volume", structure="indirect block")
            starts.append(at)
            levels.append(np.full(len(blocks), level, np.int64))
            found.append(blocks)
            total = np.concatenate(found)
            if len(np.unique(total)) != len(total):
                raise FormatError("a node stands twice in the tree", structure="indirect block")
            at, blocks = _pointers(at, blocks, read, per_block ** (level - 1), blocks_count)
        else:
            logical.append(at)
            physical.append(blocks)
        base += per_block**depth
    blocks, at = np.concatenate(physical), np.concatenate(logical)
    if len(blocks) and (blocks.max() >= blocks_count or blocks.min() < 1):
        raise FormatError("a block lies outside the volume", structure="indirect block")
    new = jumps(at) | jumps(blocks)
    first, length = breaks_to_runs(new, 1 << 62)
    mapping = np.zeros(0, np.int64)
    if found:
        mapping = np.concatenate(found)[_preorder(np.concatenate(starts), np.concatenate(levels))]
    return FileMap(np.stack([at[first], blocks[first], length], axis=1).reshape(-1, 3), mapping)


def _pointers(at: Ints, blocks: Ints, read: ReadBlocks, span: int, blocks_count: int) -> tuple[Ints, Ints]:
    """(logical, physical) of what the nodes ``blocks`` point at; ``at`` is where each begins to map."""
    logical, physical = [], []
    count = 0
    for low in range(0, len(blocks), _NODES_AT_ONCE):
        pointers = read(blocks[low : low + _NODES_AT_ONCE]).view("<u4")
        places = at[low : low + len(pointers), None] + np.arange(pointers.shape[1]) * span
        used = pointers != 0
        count += int(used.sum())
        if count > blocks_count:
            raise FormatError("it maps more blocks than the volume has", structure="indirect block")
        logical.append(places[used])
        physical.append(pointers[used].astype(np.int64))
    return np.concatenate(logical), np.concatenate(physical)


def _indirect_shape(data: Ints, block_size: int) -> tuple[list[Ints], list[int]]:
    """The nodes that are not all holes: for each (region, level) the logical starts, and the level.

    Vectorised over the logical blocks that are mapped; a node exists where a block below it does.
    """
    per_block = block_size // 4
    logical = expand(data[:, 0], data[:, 2])
    nodes: list[Ints] = []
    levels: list[int] = []
    base = DIRECT
    for depth in (1, 2, 3):
        end = base + per_block**depth
        inside = logical[(logical >= base) & (logical < end)] - base
        if len(inside):
            for level in range(depth, 0, -1):
                span = per_block**level
                nodes.append(np.unique(inside // span) * span + base)
                levels.append(level)
        base = end
    if len(logical) and logical.max() >= base:
        raise FormatError("the file is longer than indirect blocks can map", structure="indirect block")
    return nodes, levels


def indirect_nodes(data: Ints, block_size: int) -> int:
    """Indirect blocks that a mapping of ``data`` takes; all-zero ones are not allocated."""
    return sum(map(len, _indirect_shape(data, block_size)[0]))


def build_indirect(data: Ints, mapping: Ints, block_size: int) -> tuple[bytes, dict[int, bytes]]:
    """Build the indirect blocks over ``data`` in exactly the blocks ``mapping``.

    Returns:
        (i_block, node content by block).
    """
    per_block = block_size // 4
    shape, levels = _indirect_shape(data, block_size)
    roots = np.zeros(15, "<u4")
    logical, physical = expand(data[:, 0], data[:, 2]), expand(data[:, 1], data[:, 2])
    direct = logical < DIRECT
    roots[logical[direct]] = physical[direct]
    nodes: dict[int, bytes] = {}
    if not shape:
        return roots.tobytes(), nodes
    order = _preorder(
        np.concatenate(shape), np.concatenate([np.full(len(s), lv) for s, lv in zip(shape, levels, strict=True)])
    )
    blocks = np.empty(len(order), np.int64)
    blocks[order] = mapping
    places = np.split(blocks, np.cumsum([len(level) for level in shape])[:-1])
    base = DIRECT
    position = 0
    for depth in (1, 2, 3):
        end = base + per_block**depth
        inside = (logical >= base) & (logical < end)
        if inside.any():
            below, targets = logical[inside], physical[inside]
            for level in range(1, depth + 1):  # from the leaves up: the nodes of this level point at `targets`
                starts = shape[position + depth - level]
                place = places[position + depth - level]
                content = np.zeros((len(starts), per_block), "<u4")
                row = np.searchsorted(starts, below, "right") - 1
                content[row, (below - starts[row]) // per_block ** (level - 1)] = targets
                for block, pointers in zip(place.tolist(), content, strict=True):
                    nodes[block] = pointers.tobytes()
                below, targets = starts, place
            roots[DIRECT + depth - 1] = targets[0]
            position += depth
        base = end
    return roots.tobytes(), nodes
