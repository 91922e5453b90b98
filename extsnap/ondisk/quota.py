"""Quota files of version 2, revision 1: a radix tree of 1 KiB blocks, whose leaves hold usage and limits by ID.

Source: the kernel's fs/quota/quotaio_v2.h and quota_tree.c.
"""

from __future__ import annotations

import construct as c

BLOCK_SIZE = 1024
#: Root of the tree, and its depth: four bytes of the ID, the highest first, choose the way down.
ROOT_BLOCK = 1
DEPTH = 4
VERSION = 1

QuotaHeader = c.Struct(
    "dqh_magic" / c.Int32ul,
    "dqh_version" / c.Int32ul,
    "dqi_bgrace" / c.Int32ul,
    "dqi_igrace" / c.Int32ul,
    "dqi_flags" / c.Int32ul,
    "dqi_blocks" / c.Int32ul,
    "dqi_free_blk" / c.Int32ul,
    "dqi_free_entry" / c.Int32ul,
)

#: User, group and project quota, in the order of their superblock fields.
MAGICS = (0xD9C01F11, 0xD9C01927, 0xD9C03F14)

QuotaLeafHeader = c.Struct(
    "dqdh_next_free" / c.Int32ul,
    "dqdh_prev_free" / c.Int32ul,
    "dqdh_entries" / c.Int16ul,
    "dqdh_pad1" / c.Int16ul,
    "dqdh_pad2" / c.Int32ul,
)

QuotaEntry = c.Struct(
    "dqb_id" / c.Int32ul,
    "dqb_pad" / c.Int32ul,
    "dqb_ihardlimit" / c.Int64ul,
    "dqb_isoftlimit" / c.Int64ul,
    "dqb_curinodes" / c.Int64ul,
    "dqb_bhardlimit" / c.Int64ul,  # in 1 KiB blocks
    "dqb_bsoftlimit" / c.Int64ul,
    "dqb_curspace" / c.Int64ul,  # in bytes
    "dqb_btime" / c.Int64ul,
    "dqb_itime" / c.Int64ul,
)
