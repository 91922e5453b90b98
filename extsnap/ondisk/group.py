"""Group descriptors: 32 bytes, or 64 with the 64bit feature.

Source: the kernel's Documentation/filesystems/ext4/group_descr.rst.
"""

from __future__ import annotations

import enum

import construct as c

from extsnap.ondisk.codec import Flags


class GroupFlags(enum.IntFlag):
    """bg_flags; valid only if descriptors have checksums."""

    INODE_UNINIT = 1
    BLOCK_UNINIT = 2
    INODE_ZEROED = 4


_LOW = (
    "bg_block_bitmap_lo" / c.Int32ul,
    "bg_inode_bitmap_lo" / c.Int32ul,
    "bg_inode_table_lo" / c.Int32ul,
    "bg_free_blocks_count_lo" / c.Int16ul,
    "bg_free_inodes_count_lo" / c.Int16ul,
    "bg_used_dirs_count_lo" / c.Int16ul,
    "bg_flags" / Flags(c.Int16ul, GroupFlags),
    "bg_exclude_bitmap_lo" / c.Int32ul,
    "bg_block_bitmap_csum_lo" / c.Int16ul,
    "bg_inode_bitmap_csum_lo" / c.Int16ul,
    "bg_itable_unused_lo" / c.Int16ul,
    "bg_checksum" / c.Int16ul,
)

GroupDescriptor32 = c.Struct(*_LOW)

GroupDescriptor64 = c.Struct(
    *_LOW,
    "bg_block_bitmap_hi" / c.Int32ul,
    "bg_inode_bitmap_hi" / c.Int32ul,
    "bg_inode_table_hi" / c.Int32ul,
    "bg_free_blocks_count_hi" / c.Int16ul,
    "bg_free_inodes_count_hi" / c.Int16ul,
    "bg_used_dirs_count_hi" / c.Int16ul,
    "bg_itable_unused_hi" / c.Int16ul,
    "bg_exclude_bitmap_hi" / c.Int32ul,
    "bg_block_bitmap_csum_hi" / c.Int16ul,
    "bg_inode_bitmap_csum_hi" / c.Int16ul,
    "bg_reserved" / c.Int32ul,
)
