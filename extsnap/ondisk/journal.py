"""The jbd2 superblock: big-endian, the first 1,024 bytes of the journal.

Source: the kernel's Documentation/filesystems/ext4/journal.rst.
"""

from __future__ import annotations

import enum

import construct as c

from extsnap.ondisk.codec import Flags

MAGIC = 0xC03B3998
SIZE = 1024


class JournalCompat(enum.IntFlag):
    """s_feature_compat of the journal."""

    CHECKSUM = 0x1  # of whole transactions, crc32, in the commit block


class JournalIncompat(enum.IntFlag):
    """s_feature_incompat of the journal."""

    REVOKE = 0x1
    BIT64 = 0x2
    ASYNC_COMMIT = 0x4
    CSUM_V2 = 0x8
    CSUM_V3 = 0x10
    FAST_COMMIT = 0x20


JournalSuperblock = c.Struct(
    "h_magic" / c.Int32ub,
    "h_blocktype" / c.Int32ub,  # 3: version 1, 4: version 2
    "h_sequence" / c.Int32ub,
    "s_blocksize" / c.Int32ub,
    "s_maxlen" / c.Int32ub,  # blocks in the journal
    "s_first" / c.Int32ub,  # first block of the log
    "s_sequence" / c.Int32ub,  # first commit id expected
    "s_start" / c.Int32ub,  # block where the log begins; 0: empty
    "s_errno" / c.Int32ub,
    "s_feature_compat" / c.Int32ub,
    "s_feature_incompat" / Flags(c.Int32ub, JournalIncompat),
    "s_feature_ro_compat" / c.Int32ub,
    "s_uuid" / c.Bytes(16),
    "s_nr_users" / c.Int32ub,
    "s_dynsuper" / c.Int32ub,
    "s_max_transaction" / c.Int32ub,
    "s_max_trans_data" / c.Int32ub,
    "s_checksum_type" / c.Int8ub,
    "s_padding2" / c.Bytes(3),
    "s_num_fc_blks" / c.Int32ub,
    "s_head" / c.Int32ub,
    "s_padding" / c.Bytes(160),
    "s_checksum" / c.Int32ub,
    "s_users" / c.Bytes(768),
)
