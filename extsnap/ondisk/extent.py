"""Extent trees: a header, then index or leaf entries; a checksum tail in blocks (not in the inode's root).

Source: the kernel's Documentation/filesystems/ext4/ifork.rst.
"""

from __future__ import annotations

import construct as c

from extsnap.ondisk.dtypes import dtype_of

MAGIC = 0xF30A
#: Longest initialised extent in blocks; ee_len above it means unwritten, with this subtracted.
LENGTH_MAX = 32768
DEPTH_MAX = 5

ExtentHeader = c.Struct(
    "eh_magic" / c.Int16ul,
    "eh_entries" / c.Int16ul,
    "eh_max" / c.Int16ul,
    "eh_depth" / c.Int16ul,  # 0: the entries are leaves
    "eh_generation" / c.Int32ul,
)

ExtentIndex = c.Struct(
    "ei_block" / c.Int32ul,  # first logical block below
    "ei_leaf_lo" / c.Int32ul,
    "ei_leaf_hi" / c.Int16ul,
    "ei_unused" / c.Int16ul,
)

ExtentLeaf = c.Struct(
    "ee_block" / c.Int32ul,
    "ee_len" / c.Int16ul,
    "ee_start_hi" / c.Int16ul,
    "ee_start_lo" / c.Int32ul,
)

ExtentTail = c.Struct("et_checksum" / c.Int32ul)

INDEX_DTYPE = dtype_of(ExtentIndex)
LEAF_DTYPE = dtype_of(ExtentLeaf)
HEADER_SIZE = ExtentHeader.sizeof()
ENTRY_SIZE = ExtentLeaf.sizeof()
