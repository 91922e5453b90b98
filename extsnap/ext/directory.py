"""Directories, linear and hashed: finding, adding and removing names.

A hash tree has its root in block 0, at most one level of nodes below it (two with large_dir), then leaves, which are
ordinary directory blocks.  A full leaf is split by hash, a full node too, a full root gets a level, as the kernel does.

A directory with casefold hashes and compares names with their case folded.  Of ASCII that is lower case; what it is of
other characters depends on the Unicode tables of whoever folds them, so that here such names are never hashed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from extsnap.arrays import Ints, expand
from extsnap.errors import ExtsnapError, FormatError, UnsupportedFeature
from extsnap.ext import inline
from extsnap.ondisk.checksum import inode_seed
from extsnap.ondisk.directory import (
    HEADER,
    NAME_MAX,
    NODE_ENTRIES_AT,
    ROOT_ENTRIES_AT,
    ROOT_INFO_AT,
    TAIL,
    DxRootInfo,
    dx_with_checksum,
    entry_size,
    leaf_with_checksum,
)
from extsnap.ondisk.hashes import TEA, UNSIGNED, directory_hash
from extsnap.ondisk.inode import InodeFlags
from extsnap.ondisk.superblock import Incompat

if TYPE_CHECKING:
    from extsnap.ext.filesystem import Filesystem

_UNSIGNED_HASH = 2
_BLOCK_MASK = 0x0FFFFFFF
FT_DIRECTORY = 2
#: Bytes of a directory that is read: as the kernel has it without large_dir.
SIZE_MAX = (1 << 31) - 1
#: Hash, name, inode, file type.
_Item = tuple[int, bytes, int, int]


@dataclass(frozen=True)
class Entry:
    """One entry of a directory block.

    Attributes:
        at: Byte offset within the block.
        length: rec_len.
    """

    at: int
    inode: int
    length: int
    name: bytes
    file_type: int


def parse_block(block: bytes, has_tail: bool) -> list[Entry]:
    """All entries of a leaf, unused ones included, the checksum tail left out.

    Raises:
        FormatError: A length leads out of the block or nowhere.
    """
    end = len(block) - (TAIL if has_tail else 0)
    entries = []
    at = 0
    while at < end:
        inode = int.from_bytes(block[at : at + 4], "little")
        length = int.from_bytes(block[at + 4 : at + 6], "little")
        name_length = block[at + 6] if at + 6 < end else 0
        if length in (0, 0xFFFF) and len(block) == 65536:
            length = 65536
        if length < entry_size(name_length if inode else 0) or length % 4 or at + length > end:
            raise FormatError(f"rec_len {length} at byte {at} is impossible", structure="directory block")
        name = block[at + HEADER : at + HEADER + name_length]
        entries.append(Entry(at, inode, length, name, block[at + 7]))
        at += length
    return entries


def _write_entry(block: bytearray, at: int, inode: int, length: int, name: bytes, file_type: int) -> None:
    block[at : at + 4] = inode.to_bytes(4, "little")
    block[at + 4 : at + 6] = (length & 0xFFFF).to_bytes(2, "little")
    block[at + 6] = len(name)
    block[at + 7] = file_type
    block[at + HEADER : at + HEADER + len(name)] = name


class _Directory:
    """One directory while it is worked on."""

    def __init__(self, fs: Filesystem, ino: int) -> None:
        self.fs = fs
        self.ino = ino
        self.inode: Any = fs.inode(ino)
        if inline.is_inline(self.inode):
            raise UnsupportedFeature(f"directory {ino} lies in its inode", hint="this release cannot read it")
        self.map = fs.file_map(ino)
        geometry = fs.geometry
        self.size = geometry.block_size
        self.has_tail = geometry.has_metadata_csum
        self.seed = inode_seed(geometry.checksum_seed, ino, self.inode.i_generation)
        if int(self.map.data[:, 2].sum()) > SIZE_MAX // self.size:
            raise FormatError(f"directory {ino} has more than {SIZE_MAX} bytes", structure="directory")
        self.blocks: Ints = expand(self.map.data[:, 1], self.map.data[:, 2])
        logical = expand(self.map.data[:, 0], self.map.data[:, 2])
        if not len(logical) or logical[-1] != len(logical) - 1:
            raise FormatError(f"directory {ino} has holes or no block", structure="directory")

    @property
    def indexed(self) -> bool:
        return bool(self.inode.i_flags & InodeFlags.INDEX)

    @property
    def folds(self) -> bool:
        return bool(self.inode.i_flags & InodeFlags.CASEFOLD)

    def same(self, one: bytes, other: bytes) -> bool:
        """Whether the two are one name here."""
        return one == other or (self.folds and one.isascii() and one.lower() == other.lower())

    def read(self, logical: int) -> bytes:
        if not 0 <= logical < len(self.blocks):
            raise FormatError(f"block {logical} of directory {self.ino} does not exist", structure="dx_entry")
        return self.fs.read_block(int(self.blocks[logical]))

    def read_leaf(self, logical: int) -> bytes:
        """A leaf that is about to be changed: a wrong checksum must not be made right by writing a new one."""
        block = self.read(logical)
        if self.has_tail and leaf_with_checksum(self.seed, block) != block:
            self._bad_checksum(logical, "directory block", "det_checksum")
        return block

    def read_node(self, logical: int) -> bytes:
        """A hash-tree root or node that is about to be changed; see `read_leaf`."""
        block = self.read(logical)
        if self.has_tail and dx_with_checksum(self.seed, block, _entries_at(logical)) != block:
            self._bad_checksum(logical, "dx_tail", "dt_checksum")
        return block

    def _bad_checksum(self, logical: int, structure: str, field: str) -> NoReturn:
        raise FormatError(
            f"checksum of block {logical} of directory {self.ino} is wrong or missing",
            structure=structure,
            field=field,
            offset=int(self.blocks[logical]) * self.size,
        )

    def limit(self, logical: int) -> int:
        """Entries that a hash-tree root or node has room for; the kernel takes no other number."""
        return (self.size - _entries_at(logical)) // 8 - (1 if self.has_tail else 0)

    def write_leaf(self, logical: int, block: bytes) -> None:
        if self.has_tail:
            block = leaf_with_checksum(self.seed, block)
        self.fs.write_block(int(self.blocks[logical]), block)

    def write_node(self, logical: int, block: bytes) -> None:
        if self.has_tail:
            block = dx_with_checksum(self.seed, block, _entries_at(logical))
        self.fs.write_block(int(self.blocks[logical]), block)

    def append(self) -> tuple[int, int]:
        """Add one block at the end; returns (logical, physical)."""
        fs = self.fs
        logical = len(self.blocks)
        room = logical % fs.geometry.cluster_blocks  # in the cluster of the last block
        physical = int(self.blocks[-1]) + 1 if room else int(fs.allocate_blocks(1)[0])
        data = np.concatenate([self.map.data, [[logical, physical, 1]]])
        data = _joined(data)
        mapping = self.map.mapping
        needed = fs.mapping_blocks_needed(data)
        if needed > len(mapping):
            mapping = np.concatenate([mapping, fs.allocate_blocks(needed - len(mapping))])
        elif needed < len(mapping):
            surplus = mapping[needed:]
            fs.set_blocks(np.stack([surplus, np.ones_like(surplus)], axis=1), False)
            mapping = mapping[:needed]
        fs.set_file_map(self.ino, data, mapping, (logical + 1) * self.size)
        self.inode = fs.inode(self.ino)
        self.map = fs.file_map(self.ino)
        self.blocks = np.append(self.blocks, physical)
        return logical, physical

    def hash(self, name: bytes, version: int) -> int:
        sb = self.fs.superblock
        if version > TEA:
            raise UnsupportedFeature(f"directory {self.ino}: hash version {version} is unknown")
        if sb.s_flags & _UNSIGNED_HASH:
            version += UNSIGNED
        if self.folds:
            if not name.isascii():
                raise UnsupportedFeature(
                    f"directory {self.ino} ignores case, and its tree must be split among names that are not ASCII",
                    hint="e2fsck -fyD on the volume makes room in the tree",
                )
            name = name.lower()
        return directory_hash(version, name, list(sb.s_hash_seed))


def _joined(data: Ints) -> Ints:
    last, before = data[-1], data[-2] if len(data) > 1 else None
    if before is not None and before[0] + before[2] == last[0] and before[1] + before[2] == last[1]:
        data = data[:-1].copy()
        data[-1, 2] += last[2]
    return data


def _entries_at(logical: int) -> int:
    return ROOT_ENTRIES_AT if logical == 0 else NODE_ENTRIES_AT


def _dx_entries(block: bytes, at: int, room: int) -> tuple[int, list[tuple[int, int]]]:
    """(limit, [(hash, logical block)]) of a hash-tree root or node with room for ``room`` entries.

    Raises:
        FormatError: The count is above the limit, or the limit is not the room.
    """
    limit = int.from_bytes(block[at : at + 2], "little")
    count = int.from_bytes(block[at + 2 : at + 4], "little")
    if not 1 <= count <= limit or limit != room:
        raise FormatError(f"count {count} or limit {limit} is impossible", structure="dx_countlimit")
    words = np.frombuffer(block, "<u4", 2 * count, at).reshape(-1, 2)
    entries = [(int(value), int(target) & _BLOCK_MASK) for value, target in words]
    entries[0] = (0, entries[0][1])
    return limit, entries


def _put_dx_entries(block: bytes, at: int, entries: list[tuple[int, int]]) -> bytes:
    """The block with these entries; limit and everything behind the old entries' room stay."""
    limit = block[at : at + 2]
    room = int.from_bytes(limit, "little") * 8
    words = np.array(entries, "<u4").tobytes()
    head = limit + len(entries).to_bytes(2, "little")
    body = head + words[4:]
    return block[:at] + body + bytes(room - len(body)) + block[at + room :]


@dataclass
class _Frame:
    """One node on the way down: which block, its entries, and which of them was taken."""

    logical: int
    limit: int
    entries: list[tuple[int, int]]
    taken: int


def _deepest(directory: _Directory) -> int:
    """Levels of nodes that there can be below a root."""
    return 2 if directory.fs.superblock.s_feature_incompat & Incompat.large_dir else 1


def _root_info(directory: _Directory) -> Any:
    info = DxRootInfo.parse(directory.read(0)[ROOT_INFO_AT : ROOT_INFO_AT + DxRootInfo.sizeof()])
    if info.info_length != 8 or info.indirect_levels > _deepest(directory):
        raise FormatError(
            f"directory {directory.ino} has {info.indirect_levels} levels", structure="dx_root", field="indirect_levels"
        )
    return info


def _descend(directory: _Directory, value: int) -> tuple[list[_Frame], int]:
    """(frames from the root down, logical block of the leaf) for a hash."""
    info = _root_info(directory)
    frames: list[_Frame] = []
    logical = 0
    for _ in range(info.indirect_levels + 1):
        limit, entries = _dx_entries(directory.read(logical), _entries_at(logical), directory.limit(logical))
        taken = int(np.searchsorted(np.array([entry[0] for entry in entries], np.int64), value, "right")) - 1
        frames.append(_Frame(logical, limit, entries, max(taken, 0)))
        logical = entries[max(taken, 0)][1]
        if any(frame.logical == logical for frame in frames):
            raise FormatError(f"the hash tree of directory {directory.ino} has a loop", structure="dx_entry")
    return frames, logical


def entries(fs: Filesystem, directory_ino: int) -> Iterator[Entry]:
    """All names of a directory but unused entries; hash-tree nodes look like unused space and are passed over."""
    directory = _Directory(fs, directory_ino)
    for logical in range(len(directory.blocks)):
        yield from _live(directory, logical)


def _live(directory: _Directory, logical: int) -> list[Entry]:
    block = directory.read(logical)
    if directory.indexed and logical == 0:
        return [entry for entry in parse_block(block, False)[:2] if entry.inode]
    # A hash-tree node begins with one unused entry over the whole block, and has no such tail.
    spans_block = int.from_bytes(block[4:6], "little") in ((0, 0xFFFF) if len(block) == 65536 else (len(block),))
    has_tail = directory.has_tail and not spans_block
    return [entry for entry in parse_block(block, has_tail) if entry.inode]


def _find(directory: _Directory, name: bytes) -> tuple[int, Entry] | None:
    """(logical block, entry) of a name, or None."""
    if not directory.indexed or name in (b".", b".."):
        candidates: list[int] = list(range(len(directory.blocks)))
    else:
        value = directory.hash(name, _root_info(directory).hash_version)
        frames, leaf = _descend(directory, value)
        # Equal hashes may go on in the following leaves, which their lowest bit says.
        bottom = frames[-1]
        candidates = [leaf]
        for next_hash, next_leaf in bottom.entries[bottom.taken + 1 :]:
            if next_hash != value | 1:
                break
            candidates.append(next_leaf)
        else:
            if len(frames) > 1:
                candidates = list(range(1, len(directory.blocks)))
    for logical in candidates:
        for entry in _live(directory, logical):
            if directory.same(entry.name, name):
                return logical, entry
    return None


def lookup(fs: Filesystem, directory_ino: int, name: bytes) -> int | None:
    """Inode number of a name, or None.

    Raises:
        FormatError: The directory is damaged.
    """
    inode = fs.inode(directory_ino)
    if inode.i_mode & 0o170000 != 0o040000:
        return None
    if inline.is_inline(inode):
        return next((entry.inode for entry in _inline_entries(fs, inode) if entry.name == name), None)
    found = _find(_Directory(fs, directory_ino), name)
    return found[1].inode if found else None


def _inline_entries(fs: Filesystem, inode: Any) -> list[Entry]:
    _, parts = inline.pieces(inode, fs.geometry.inode_size)
    return [entry for part in parts for entry in parse_block(part, False) if entry.inode]


def _move_out_of_inode(fs: Filesystem, ino: int) -> None:
    """Give a directory that lies in its inode a block, as the kernel does when it gets too big.

    Raises:
        VolumeFull: There is no free block.
        FormatError: It is damaged.
    """
    inode = fs.inode(ino)
    parent, _ = inline.pieces(inode, fs.geometry.inode_size)
    found = _inline_entries(fs, inode)
    block = new_directory_block(fs, ino, parent)
    for entry in found:
        grown = _insert(block, fs.geometry.has_metadata_csum, entry.name, entry.inode, entry.file_type)
        if grown is None:
            raise FormatError("it has more entries than a block", structure=f"inline directory {ino}")
        block = grown
    if fs.geometry.has_metadata_csum:
        block = leaf_with_checksum(inode_seed(fs.geometry.checksum_seed, ino, inode.i_generation), block)
    inline.clear(fs, ino)
    place = int(fs.allocate_blocks(1)[0])
    fs.write_block(place, block)
    fs.set_file_map(ino, np.array([[0, place, 1]], np.int64), np.zeros(0, np.int64), fs.geometry.block_size)


def new_directory_block(fs: Filesystem, ino: int, parent: int) -> bytes:
    """The first block of an empty directory: "." and "..", checksum tail right."""
    size = fs.geometry.block_size
    has_tail = fs.geometry.has_metadata_csum
    end = size - (TAIL if has_tail else 0)
    file_type = FT_DIRECTORY if fs.superblock.s_feature_incompat & Incompat.filetype else 0
    block = bytearray(size)
    _write_entry(block, 0, ino, 12, b".", file_type)
    _write_entry(block, 12, parent, end - 12, b"..", file_type)
    if not has_tail:
        return bytes(block)
    seed = inode_seed(fs.geometry.checksum_seed, ino, fs.inode(ino).i_generation)
    return leaf_with_checksum(seed, bytes(block))


def _insert(block: bytes, has_tail: bool, name: bytes, ino: int, file_type: int) -> bytes | None:
    """The leaf with one more entry, or None where it has no room."""
    wanted = entry_size(len(name))
    for entry in parse_block(block, has_tail):
        used = entry_size(len(entry.name)) if entry.inode else 0
        if entry.length - used < wanted:
            continue
        out = bytearray(block)
        if used:
            out[entry.at + 4 : entry.at + 6] = used.to_bytes(2, "little")
        _write_entry(out, entry.at + used, ino, entry.length - used, name, file_type)
        return bytes(out)
    return None


def add_entry(fs: Filesystem, directory_ino: int, name: bytes, ino: int, file_type: int) -> list[int]:
    """Add a name to a directory; returns the blocks that the directory grew by (marked used already).

    Raises:
        ExtsnapError: The name is there already.
        VolumeFull: No block for the directory to grow by.
    """
    if not 1 <= len(name) <= NAME_MAX:
        raise ValueError(f"a name of {len(name)} bytes")
    if inline.is_inline(fs.inode(directory_ino)):
        _move_out_of_inode(fs, directory_ino)
    directory = _Directory(fs, directory_ino)
    if _find(directory, name) is not None:
        raise ExtsnapError(f"the directory has an entry {name.decode(errors='replace')!a} already")
    if not fs.superblock.s_feature_incompat & Incompat.filetype:
        file_type = 0
    if directory.indexed:
        return _add_hashed(directory, name, ino, file_type)
    for logical in range(len(directory.blocks)):
        block = _insert(directory.read_leaf(logical), directory.has_tail, name, ino, file_type)
        if block is not None:
            directory.write_leaf(logical, block)
            return []
    logical, physical = directory.append()
    directory.write_leaf(logical, _leaf_of(directory, [(0, name, ino, file_type)]))
    return [physical]


def _leaf_of(directory: _Directory, items: list[_Item]) -> bytes:
    """A leaf with entries (hash, name, inode, file type), the last one taking the rest of the block."""
    end = directory.size - (TAIL if directory.has_tail else 0)
    block = bytearray(directory.size)
    at = 0
    for index, (_, name, ino, file_type) in enumerate(items):
        length = end - at if index == len(items) - 1 else entry_size(len(name))
        _write_entry(block, at, ino, length, name, file_type)
        at += length
    return bytes(block)


def _add_hashed(directory: _Directory, name: bytes, ino: int, file_type: int) -> list[int]:
    version = _root_info(directory).hash_version
    value = directory.hash(name, version)
    frames, leaf = _descend(directory, value)
    for frame in frames:
        directory.read_node(frame.logical)
    block = _insert(directory.read_leaf(leaf), directory.has_tail, name, ino, file_type)
    if block is not None:
        directory.write_leaf(leaf, block)
        return []
    items = _items(directory, leaf, version)
    new = (value, name, ino, file_type)
    room = directory.size - (TAIL if directory.has_tail else 0)
    if sum(entry_size(len(item[1])) for item in [*items, new]) <= room:
        # Room enough, but in pieces, each too small for the name.
        directory.write_leaf(leaf, _leaf_of(directory, [*items, new]))
        return []
    grown: list[int] = []
    while len(frames[-1].entries) == frames[-1].limit:
        grown += _make_room(directory, frames)
        frames, leaf = _descend(directory, value)
    return grown + _split_leaf(directory, frames[-1], leaf, items, new)


def _make_room(directory: _Directory, frames: list[_Frame]) -> list[int]:
    """Split the lowest node, or first the highest of the full ones above it; returns the block that this took.

    Raises:
        UnsupportedFeature: All are full and there can be no more levels; nothing was changed.
    """
    depth = len(frames) - 1
    while depth and len(frames[depth - 1].entries) == frames[depth - 1].limit:
        depth -= 1
    if not depth:
        return _add_level(directory, frames)
    above, full = frames[depth - 1 : depth + 1]
    logical, physical = directory.append()
    half = len(full.entries) // 2
    directory.write_node(logical, _new_node(directory, full.entries[half:]))
    directory.write_node(
        full.logical, _put_dx_entries(directory.read_node(full.logical), NODE_ENTRIES_AT, full.entries[:half])
    )
    upper = full.entries[half][0], logical
    changed = [*above.entries[: above.taken + 1], upper, *above.entries[above.taken + 1 :]]
    block = _put_dx_entries(directory.read_node(above.logical), _entries_at(above.logical), changed)
    directory.write_node(above.logical, block)
    return [physical]


def _add_level(directory: _Directory, frames: list[_Frame]) -> list[int]:
    """Move the root's entries into one new node, which the root then leads to."""
    if len(frames) > _deepest(directory):
        raise UnsupportedFeature(
            f"the hash tree of directory {directory.ino} is full", hint="move some files of that directory elsewhere"
        )
    logical, physical = directory.append()
    directory.write_node(logical, _new_node(directory, frames[0].entries))
    root = bytearray(_put_dx_entries(directory.read_node(0), ROOT_ENTRIES_AT, [(0, logical)]))
    root[ROOT_INFO_AT + 6] += 1
    directory.write_node(0, bytes(root))
    return [physical]


def _new_node(directory: _Directory, content: list[tuple[int, int]]) -> bytes:
    limit = directory.limit(1)  # any block but the root
    block = bytearray(directory.size)
    _write_entry(block, 0, 0, directory.size, b"", 0)
    block[NODE_ENTRIES_AT : NODE_ENTRIES_AT + 2] = limit.to_bytes(2, "little")
    return _put_dx_entries(bytes(block), NODE_ENTRIES_AT, content)


def _items(directory: _Directory, leaf: int, version: int) -> list[_Item]:
    """The entries of a leaf, by hash."""
    items = [
        (directory.hash(entry.name, version), entry.name, entry.inode, entry.file_type)
        for entry in parse_block(directory.read(leaf), directory.has_tail)
        if entry.inode
    ]
    return sorted(items, key=lambda item: item[0])


def _split_leaf(directory: _Directory, frame: _Frame, leaf: int, items: list[_Item], new: _Item) -> list[int]:
    """Move the upper half of a full leaf, by hash, into a new one, and put the new entry where it belongs."""
    total = sum(entry_size(len(item[1])) for item in items)
    size, split = 0, len(items)
    while split > 1 and size + entry_size(len(items[split - 1][1])) // 2 <= total // 2:
        split -= 1
        size += entry_size(len(items[split][1]))
    split = min(split, len(items) - 1)
    split_hash = items[split][0]
    continued = 1 if split and items[split - 1][0] == split_hash else 0
    lower, upper = items[:split], items[split:]
    (upper if new[0] >= split_hash else lower).append(new)
    logical, physical = directory.append()
    directory.write_leaf(leaf, _leaf_of(directory, lower))
    directory.write_leaf(logical, _leaf_of(directory, upper))
    at = next(index for index, entry in enumerate(frame.entries) if entry[1] == leaf)
    changed = [*frame.entries[: at + 1], (split_hash + continued, logical), *frame.entries[at + 1 :]]
    block = _put_dx_entries(directory.read_node(frame.logical), _entries_at(frame.logical), changed)
    directory.write_node(frame.logical, block)
    return [physical]


def remove_entry(fs: Filesystem, directory_ino: int, name: bytes) -> None:
    """Remove a name; its space joins the entry before it.

    Raises:
        ExtsnapError: There is no such name.
    """
    directory = _Directory(fs, directory_ino)
    found = _find(directory, name)
    if found is None:
        raise ExtsnapError(f"the directory has no entry {name.decode(errors='replace')!a}")
    logical, entry = found
    block = bytearray(directory.read_leaf(logical))
    before = [other for other in parse_block(bytes(block), directory.has_tail) if other.at + other.length == entry.at]
    if before:
        block[before[0].at + 4 : before[0].at + 6] = (before[0].length + entry.length).to_bytes(2, "little")
        block[entry.at : entry.at + HEADER + len(entry.name)] = bytes(HEADER + len(entry.name))
    else:
        block[entry.at : entry.at + 4] = bytes(4)
    directory.write_leaf(logical, bytes(block))
