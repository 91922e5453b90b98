"""The ext superblock, 1,024 bytes at byte 1,024 of the volume and at the start of backup groups.

Source: the kernel's Documentation/filesystems/ext4/super.rst and fs/ext4/ext4.h.
"""

from __future__ import annotations

import enum

import construct as c

from extsnap.ondisk.codec import Flags

SIZE = 1024
OFFSET = 1024
MAGIC = 0xEF53


class State(enum.IntFlag):
    """s_state."""

    VALID = 1
    ERROR = 2
    ORPHANS = 4
    FC_REPLAY = 0x20


class Compat(enum.IntFlag):
    """s_feature_compat: safe to use without knowing."""

    dir_prealloc = 0x1
    imagic_inodes = 0x2
    has_journal = 0x4
    ext_attr = 0x8
    resize_inode = 0x10
    dir_index = 0x20
    lazy_bg = 0x40
    exclude_inode = 0x80
    exclude_bitmap = 0x100
    sparse_super2 = 0x200
    fast_commit = 0x400
    stable_inodes = 0x800
    orphan_file = 0x1000


class Incompat(enum.IntFlag):
    """s_feature_incompat: refuse without knowing."""

    compression = 0x1
    filetype = 0x2
    needs_recovery = 0x4
    journal_dev = 0x8
    meta_bg = 0x10
    extent = 0x40
    bit64 = 0x80
    mmp = 0x100
    flex_bg = 0x200
    ea_inode = 0x400
    dirdata = 0x1000
    metadata_csum_seed = 0x2000
    large_dir = 0x4000
    inline_data = 0x8000
    encrypt = 0x10000
    casefold = 0x20000


class RoCompat(enum.IntFlag):
    """s_feature_ro_compat: read-only without knowing."""

    sparse_super = 0x1
    large_file = 0x2
    btree_dir = 0x4
    huge_file = 0x8
    uninit_bg = 0x10
    dir_nlink = 0x20
    extra_isize = 0x40
    has_snapshot = 0x80
    quota = 0x100
    bigalloc = 0x200
    metadata_csum = 0x400
    replica = 0x800
    read_only = 0x1000
    project = 0x2000
    shared_blocks = 0x4000
    verity = 0x8000
    orphan_present = 0x10000


Superblock = c.Struct(
    "s_inodes_count" / c.Int32ul,
    "s_blocks_count_lo" / c.Int32ul,
    "s_r_blocks_count_lo" / c.Int32ul,  # reserved for root
    "s_free_blocks_count_lo" / c.Int32ul,
    "s_free_inodes_count" / c.Int32ul,
    "s_first_data_block" / c.Int32ul,  # 1 with 1 KiB blocks (0 with bigalloc), else 0
    "s_log_block_size" / c.Int32ul,  # block size is 1024 << this
    "s_log_cluster_size" / c.Int32ul,  # valid only if bigalloc
    "s_blocks_per_group" / c.Int32ul,
    "s_clusters_per_group" / c.Int32ul,
    "s_inodes_per_group" / c.Int32ul,
    "s_mtime" / c.Int32ul,
    "s_wtime" / c.Int32ul,
    "s_mnt_count" / c.Int16ul,
    "s_max_mnt_count" / c.Int16ul,
    "s_magic" / c.Int16ul,
    "s_state" / Flags(c.Int16ul, State),
    "s_errors" / c.Int16ul,
    "s_minor_rev_level" / c.Int16ul,
    "s_lastcheck" / c.Int32ul,
    "s_checkinterval" / c.Int32ul,
    "s_creator_os" / c.Int32ul,
    "s_rev_level" / c.Int32ul,  # 0: fixed inode size and first inode
    "s_def_resuid" / c.Int16ul,
    "s_def_resgid" / c.Int16ul,
    "s_first_ino" / c.Int32ul,
    "s_inode_size" / c.Int16ul,
    "s_block_group_nr" / c.Int16ul,  # group of this copy
    "s_feature_compat" / Flags(c.Int32ul, Compat),
    "s_feature_incompat" / Flags(c.Int32ul, Incompat),
    "s_feature_ro_compat" / Flags(c.Int32ul, RoCompat),
    "s_uuid" / c.Bytes(16),
    "s_volume_name" / c.Bytes(16),
    "s_last_mounted" / c.Bytes(64),
    "s_algorithm_usage_bitmap" / c.Int32ul,
    "s_prealloc_blocks" / c.Int8ul,
    "s_prealloc_dir_blocks" / c.Int8ul,
    "s_reserved_gdt_blocks" / c.Int16ul,  # valid only if resize_inode
    "s_journal_uuid" / c.Bytes(16),
    "s_journal_inum" / c.Int32ul,  # valid only if has_journal
    "s_journal_dev" / c.Int32ul,
    "s_last_orphan" / c.Int32ul,
    "s_hash_seed" / c.Array(4, c.Int32ul),
    "s_def_hash_version" / c.Int8ul,
    "s_jnl_backup_type" / c.Int8ul,
    "s_desc_size" / c.Int16ul,  # valid only if 64bit
    "s_default_mount_opts" / c.Int32ul,
    "s_first_meta_bg" / c.Int32ul,
    "s_mkfs_time" / c.Int32ul,
    "s_jnl_blocks" / c.Array(17, c.Int32ul),
    "s_blocks_count_hi" / c.Int32ul,  # the _hi counts are valid only if 64bit
    "s_r_blocks_count_hi" / c.Int32ul,
    "s_free_blocks_count_hi" / c.Int32ul,
    "s_min_extra_isize" / c.Int16ul,
    "s_want_extra_isize" / c.Int16ul,
    "s_flags" / c.Int32ul,  # 1 signed, 2 unsigned directory hash
    "s_raid_stride" / c.Int16ul,
    "s_mmp_interval" / c.Int16ul,
    "s_mmp_block" / c.Int64ul,
    "s_raid_stripe_width" / c.Int32ul,
    "s_log_groups_per_flex" / c.Int8ul,
    "s_checksum_type" / c.Int8ul,  # 1: crc32c
    "s_encryption_level" / c.Int8ul,
    "s_reserved_pad" / c.Int8ul,
    "s_kbytes_written" / c.Int64ul,
    "s_snapshot_inum" / c.Int32ul,
    "s_snapshot_id" / c.Int32ul,
    "s_snapshot_r_blocks_count" / c.Int64ul,
    "s_snapshot_list" / c.Int32ul,
    "s_error_count" / c.Int32ul,
    "s_first_error_time" / c.Int32ul,
    "s_first_error_ino" / c.Int32ul,
    "s_first_error_block" / c.Int64ul,
    "s_first_error_func" / c.Bytes(32),
    "s_first_error_line" / c.Int32ul,
    "s_last_error_time" / c.Int32ul,
    "s_last_error_ino" / c.Int32ul,
    "s_last_error_line" / c.Int32ul,
    "s_last_error_block" / c.Int64ul,
    "s_last_error_func" / c.Bytes(32),
    "s_mount_opts" / c.Bytes(64),
    "s_usr_quota_inum" / c.Int32ul,
    "s_grp_quota_inum" / c.Int32ul,
    "s_overhead_clusters" / c.Int32ul,
    "s_backup_bgs" / c.Array(2, c.Int32ul),  # valid only if sparse_super2
    "s_encrypt_algos" / c.Bytes(4),
    "s_encrypt_pw_salt" / c.Bytes(16),
    "s_lpf_ino" / c.Int32ul,
    "s_prj_quota_inum" / c.Int32ul,
    "s_checksum_seed" / c.Int32ul,  # valid only if metadata_csum_seed
    "s_wtime_hi" / c.Int8ul,
    "s_mtime_hi" / c.Int8ul,
    "s_mkfs_time_hi" / c.Int8ul,
    "s_lastcheck_hi" / c.Int8ul,
    "s_first_error_time_hi" / c.Int8ul,
    "s_last_error_time_hi" / c.Int8ul,
    "s_first_error_errcode" / c.Int8ul,
    "s_last_error_errcode" / c.Int8ul,
    "s_encoding" / c.Int16ul,
    "s_encoding_flags" / c.Int16ul,
    "s_orphan_file_inum" / c.Int32ul,
    "s_def_resuid_hi" / c.Int16ul,  # Linux 6.18; reserved in e2fsprogs 1.47
    "s_def_resgid_hi" / c.Int16ul,
    "s_reserved" / c.Bytes(372),  # the last 28 bytes hold extsnap's pointer
    "s_checksum" / c.Int32ul,
)
