"""Directory blocks: entries, checksum tails, hash-tree roots and nodes.

Source: the kernel's Documentation/filesystems/ext4/directory.rst.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import construct as c

from extsnap.ondisk.checksum import crc32c_raw

#: Header of an entry; the name follows, padded so that rec_len is a multiple of 4.
DirEntry = c.Struct(
    "inode" / c.Int32ul,  # 0: unused
    "rec_len" / c.Int16ul,
    "name_len" / c.Int8ul,
    "file_type" / c.Int8ul,  # valid only if filetype
)

#: The last 12 bytes of a leaf with metadata_csum: looks like an unused entry.
DirTail = c.Struct(
    "det_reserved_zero1" / c.Int32ul,
    "det_rec_len" / c.Int16ul,  # 12
    "det_reserved_zero2" / c.Int8ul,
    "det_reserved_ft" / c.Int8ul,  # 0xde
    "det_checksum" / c.Int32ul,
)

#: Behind the entries "." and ".." of a hash-tree root.
DxRootInfo = c.Struct(
    "reserved_zero" / c.Int32ul,
    "hash_version" / c.Int8ul,
    "info_length" / c.Int8ul,  # 8
    "indirect_levels" / c.Int8ul,
    "unused_flags" / c.Int8ul,
)

DxCountLimit = c.Struct("limit" / c.Int16ul, "count" / c.Int16ul)
DxEntry = c.Struct("hash" / c.Int32ul, "block" / c.Int32ul)
DxTail = c.Struct("dt_reserved" / c.Int32ul, "dt_checksum" / c.Int32ul)

_ROOT_HEAD = (
    "dot" / DirEntry,
    "dot_name" / c.Bytes(4),
    "dotdot" / DirEntry,  # rec_len reaches to the end of the block: the tree looks like unused space
    "dotdot_name" / c.Bytes(4),
    "info" / DxRootInfo,
)
_NODE_HEAD = ("fake" / DirEntry,)  # unused, over the whole block

HEADER = DirEntry.sizeof()
TAIL = DirTail.sizeof()
TAIL_TYPE = 0xDE
ROOT_ENTRIES_AT: int = c.Struct(*_ROOT_HEAD).sizeof()
ROOT_INFO_AT: int = ROOT_ENTRIES_AT - DxRootInfo.sizeof()
NODE_ENTRIES_AT: int = c.Struct(*_NODE_HEAD).sizeof()
NAME_MAX = 255


@cache
def dx_root_struct(block_size: int, has_tail: bool) -> Any:
    """The definition of a hash-tree root, a whole block; with a tail where the volume has metadata_csum."""
    return c.Struct(*_ROOT_HEAD, *_dx_map(block_size - ROOT_ENTRIES_AT, has_tail))


@cache
def dx_node_struct(block_size: int, has_tail: bool) -> Any:
    """The definition of a hash-tree node, a whole block; with a tail where the volume has metadata_csum."""
    return c.Struct(*_NODE_HEAD, *_dx_map(block_size - NODE_ENTRIES_AT, has_tail))


def _dx_map(room: int, has_tail: bool) -> tuple[Any, ...]:
    slots = room // DxEntry.sizeof() - has_tail
    return (
        "countlimit" / DxCountLimit,  # both count the first block below
        "block" / c.Int32ul,  # block below for the lowest hashes
        "entries" / c.Array(slots - 1, DxEntry),  # all that there is room for; valid only if below count - 1
        *(("tail" / DxTail,) if has_tail else ()),
    )


def entry_size(name_length: int) -> int:
    """Least rec_len of an entry."""
    return (8 + name_length + 3) & ~3


def leaf_with_checksum(iseed: int, block: bytes) -> bytes:
    """A leaf with its tail's checksum set: over everything before the tail."""
    checksum = crc32c_raw(iseed, block[:-TAIL])
    tail = DirTail.build(
        {
            "det_reserved_zero1": 0,
            "det_rec_len": TAIL,
            "det_reserved_zero2": 0,
            "det_reserved_ft": TAIL_TYPE,
            "det_checksum": checksum,
        }
    )
    return block[:-TAIL] + bytes(tail)


def dx_with_checksum(iseed: int, block: bytes, entries_at: int) -> bytes:
    """A hash-tree root or node with its checksum set; the tail stands behind the last possible entry."""
    limit, count = (int.from_bytes(block[at : at + 2], "little") for at in (entries_at, entries_at + 2))
    tail = entries_at + 8 * limit
    body = block[: entries_at + 8 * count] + block[tail : tail + 4] + bytes(4)
    return block[: tail + 4] + crc32c_raw(iseed, body).to_bytes(4, "little") + block[tail + 8 :]
