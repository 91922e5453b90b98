"""Directories that lie in their inode (inline_data): reading them, and giving them a block of their own.

The first four bytes of i_block name the parent; entries follow, first there, then in the value of the attribute
system.data in the inode's own attribute area.  There is no "." and no "..".

Source: the kernel's Documentation/filesystems/ext4/inlinedata.rst and attributes.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extsnap.errors import FormatError
from extsnap.ondisk import codec
from extsnap.ondisk.inode import BASE_SIZE, InodeFlags, inode_struct
from extsnap.ondisk.xattr import ENTRY_SIZE, IBODY_MAGIC, SYSTEM_INDEX, XattrEntry

if TYPE_CHECKING:
    from extsnap.ext.filesystem import Filesystem

_IN_BLOCK = 60
_PARENT = 4


@dataclass(frozen=True)
class _Attribute:
    """One attribute of the inode's own area; its value is there, or in an inode of its own."""

    entry: Any
    name: bytes
    value: bytes


def _area(inode: Any, size: int) -> tuple[bytes, int]:
    """(raw inode, where its attributes begin); at the end where it has none."""
    raw = codec.build(inode_struct(size), inode, "inode")
    start = BASE_SIZE + inode.get("i_extra_isize", 0) if size > BASE_SIZE else size
    if start + 4 > size or int.from_bytes(raw[start : start + 4], "little") != IBODY_MAGIC:
        return raw, size
    return raw, start + 4


def _attributes(inode: Any, size: int) -> list[_Attribute]:
    """The attributes in an inode.

    Raises:
        FormatError: Lengths lead out of the inode.
    """
    raw, first = _area(inode, size)
    found = []
    at = first
    while at + 4 <= size and any(raw[at : at + 4]):
        entry = codec.parse(XattrEntry, raw[at : at + ENTRY_SIZE], "attribute in an inode")
        name = raw[at + ENTRY_SIZE : at + ENTRY_SIZE + entry.e_name_len]
        start = first + entry.e_value_offs
        inside = 0 if entry.e_value_inum else entry.e_value_size
        if len(name) != entry.e_name_len or (inside and start + inside > size):
            raise FormatError("a length leads out of the inode", structure="attribute in an inode")
        found.append(_Attribute(entry, name, raw[start : start + inside]))
        at += (ENTRY_SIZE + entry.e_name_len + 3) // 4 * 4
    return found


def _is_data(attribute: _Attribute) -> bool:
    return attribute.entry.e_name_index == SYSTEM_INDEX and attribute.name == b"data"


def pieces(inode: Any, size: int) -> tuple[int, list[bytes]]:
    """(parent's inode, the runs of directory entries) of a directory that lies in its inode of ``size`` bytes."""
    body = bytes(inode.i_block)
    data = [attribute.value for attribute in _attributes(inode, size) if _is_data(attribute)]
    return int.from_bytes(body[:_PARENT], "little"), [body[_PARENT:_IN_BLOCK], *filter(None, data)]


def without_data(inode: Any, size: int) -> Any:
    """The inode without inline data: flag, i_block and system.data gone, all other attributes as they were."""
    attributes = [attribute for attribute in _attributes(inode, size) if not _is_data(attribute)]
    raw, first = _area(inode, size)
    area = bytearray(size - first)
    at, end = 0, len(area)
    for attribute in attributes:
        entry = attribute.entry
        if attribute.value:
            end -= (len(attribute.value) + 3) // 4 * 4
            area[end : end + len(attribute.value)] = attribute.value
            entry.e_value_offs = end
        area[at : at + ENTRY_SIZE] = codec.build(XattrEntry, entry, "attribute in an inode")
        area[at + ENTRY_SIZE : at + ENTRY_SIZE + len(attribute.name)] = attribute.name
        at += (ENTRY_SIZE + len(attribute.name) + 3) // 4 * 4
    if not attributes and first < size:
        raw = raw[: first - 4] + bytes(4) + raw[first:]
    fresh = codec.parse(inode_struct(size), raw[:first] + bytes(area), "inode")
    fresh.i_flags &= ~InodeFlags.INLINE_DATA
    fresh.i_block = bytes(_IN_BLOCK)
    return fresh


def is_inline(inode: Any) -> bool:
    """Whether the content of a file lies in its inode."""
    return bool(inode.i_flags & InodeFlags.INLINE_DATA)


def clear(fs: Filesystem, ino: int) -> None:
    """Take the inline data of an inode away; the caller gives it blocks."""
    fs.write_inode(ino, without_data(fs.inode(ino), fs.geometry.inode_size))
