"""Inodes: 128 bytes, then an extra area of i_extra_isize bytes and in-inode attributes up to s_inode_size.

Source: the kernel's Documentation/filesystems/ext4/inodes.rst.
"""

from __future__ import annotations

import enum
from functools import cache
from typing import Any

import construct as c

from extsnap.ondisk.codec import Flags

BASE_SIZE = 128
#: Extra area that this definition names; what follows is in-inode attributes.
EXTRA_SIZE = 32


class InodeFlags(enum.IntFlag):
    """i_flags."""

    SECRM = 0x1
    UNRM = 0x2
    COMPR = 0x4
    SYNC = 0x8
    IMMUTABLE = 0x10
    APPEND = 0x20
    NODUMP = 0x40
    NOATIME = 0x80
    ENCRYPT = 0x800
    INDEX = 0x1000
    JOURNAL_DATA = 0x4000
    TOPDIR = 0x20000
    HUGE_FILE = 0x40000
    EXTENTS = 0x80000
    VERITY = 0x100000
    EA_INODE = 0x200000
    INLINE_DATA = 0x10000000
    PROJINHERIT = 0x20000000
    CASEFOLD = 0x40000000


_BASE = (
    "i_mode" / c.Int16ul,
    "i_uid" / c.Int16ul,
    "i_size_lo" / c.Int32ul,
    "i_atime" / c.Int32ul,
    "i_ctime" / c.Int32ul,
    "i_mtime" / c.Int32ul,
    "i_dtime" / c.Int32ul,
    "i_gid" / c.Int16ul,
    "i_links_count" / c.Int16ul,
    "i_blocks_lo" / c.Int32ul,  # in 512-byte sectors, or blocks if HUGE_FILE is set
    "i_flags" / Flags(c.Int32ul, InodeFlags),
    "i_version" / c.Int32ul,
    "i_block" / c.Bytes(60),  # extent root, block pointers, or inline data
    "i_generation" / c.Int32ul,
    "i_file_acl_lo" / c.Int32ul,
    "i_size_high" / c.Int32ul,
    "i_obso_faddr" / c.Int32ul,
    "i_blocks_high" / c.Int16ul,
    "i_file_acl_high" / c.Int16ul,
    "i_uid_high" / c.Int16ul,
    "i_gid_high" / c.Int16ul,
    "i_checksum_lo" / c.Int16ul,
    "i_reserved" / c.Int16ul,
)

_EXTRA = (
    "i_extra_isize" / c.Int16ul,
    "i_checksum_hi" / c.Int16ul,  # valid only if i_extra_isize >= 4
    "i_ctime_extra" / c.Int32ul,
    "i_mtime_extra" / c.Int32ul,
    "i_atime_extra" / c.Int32ul,
    "i_crtime" / c.Int32ul,
    "i_crtime_extra" / c.Int32ul,
    "i_version_hi" / c.Int32ul,
    "i_projid" / c.Int32ul,
)


@cache
def inode_struct(size: int) -> Any:
    """The definition of an inode of ``size`` bytes (s_inode_size)."""
    if size < BASE_SIZE + EXTRA_SIZE:
        return c.Struct(*_BASE, "i_rest" / c.Bytes(size - BASE_SIZE))
    return c.Struct(*_BASE, *_EXTRA, "i_rest" / c.Bytes(size - BASE_SIZE - EXTRA_SIZE))
