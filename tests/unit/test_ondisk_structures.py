"""On-disk structures: every byte survives a parse and a build, and every field stands where the documentation puts it.

The lists of fields are transcribed from the kernel's Documentation/filesystems/ext4 (and from fs/ext4/ext4.h and
include/linux/jbd2.h for fields that are younger than those pages): name, offset, bytes.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Literal

import construct as c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extsnap import ondisk
from extsnap.errors import FormatError
from extsnap.ondisk import codec
from extsnap.ondisk.directory import (
    DirEntry,
    DirTail,
    DxCountLimit,
    DxEntry,
    DxRootInfo,
    DxTail,
    dx_node_struct,
    dx_root_struct,
)
from extsnap.ondisk.dtypes import dtype_of
from extsnap.ondisk.extent import INDEX_DTYPE, LEAF_DTYPE, ExtentHeader, ExtentIndex, ExtentLeaf, ExtentTail
from extsnap.ondisk.group import GroupDescriptor32, GroupDescriptor64
from extsnap.ondisk.inode import inode_struct
from extsnap.ondisk.journal import JournalSuperblock
from extsnap.ondisk.superblock import Superblock
from extsnap.snapshot import format as fmt

Layout = list[tuple[str, int, int]]

SUPERBLOCK: Layout = [
    ("s_inodes_count", 0x0, 4),
    ("s_blocks_count_lo", 0x4, 4),
    ("s_r_blocks_count_lo", 0x8, 4),
    ("s_free_blocks_count_lo", 0xC, 4),
    ("s_free_inodes_count", 0x10, 4),
    ("s_first_data_block", 0x14, 4),
    ("s_log_block_size", 0x18, 4),
    ("s_log_cluster_size", 0x1C, 4),
    ("s_blocks_per_group", 0x20, 4),
    ("s_clusters_per_group", 0x24, 4),
    ("s_inodes_per_group", 0x28, 4),
    ("s_mtime", 0x2C, 4),
    ("s_wtime", 0x30, 4),
    ("s_mnt_count", 0x34, 2),
    ("s_max_mnt_count", 0x36, 2),
    ("s_magic", 0x38, 2),
    ("s_state", 0x3A, 2),
    ("s_errors", 0x3C, 2),
    ("s_minor_rev_level", 0x3E, 2),
    ("s_lastcheck", 0x40, 4),
    ("s_checkinterval", 0x44, 4),
    ("s_creator_os", 0x48, 4),
    ("s_rev_level", 0x4C, 4),
    ("s_def_resuid", 0x50, 2),
    ("s_def_resgid", 0x52, 2),
    ("s_first_ino", 0x54, 4),
    ("s_inode_size", 0x58, 2),
    ("s_block_group_nr", 0x5A, 2),
    ("s_feature_compat", 0x5C, 4),
    ("s_feature_incompat", 0x60, 4),
    ("s_feature_ro_compat", 0x64, 4),
    ("s_uuid", 0x68, 16),
    ("s_volume_name", 0x78, 16),
    ("s_last_mounted", 0x88, 64),
    ("s_algorithm_usage_bitmap", 0xC8, 4),
    ("s_prealloc_blocks", 0xCC, 1),
    ("s_prealloc_dir_blocks", 0xCD, 1),
    ("s_reserved_gdt_blocks", 0xCE, 2),
    ("s_journal_uuid", 0xD0, 16),
    ("s_journal_inum", 0xE0, 4),
    ("s_journal_dev", 0xE4, 4),
    ("s_last_orphan", 0xE8, 4),
    ("s_hash_seed", 0xEC, 16),
    ("s_def_hash_version", 0xFC, 1),
    ("s_jnl_backup_type", 0xFD, 1),
    ("s_desc_size", 0xFE, 2),
    ("s_default_mount_opts", 0x100, 4),
    ("s_first_meta_bg", 0x104, 4),
    ("s_mkfs_time", 0x108, 4),
    ("s_jnl_blocks", 0x10C, 68),
    ("s_blocks_count_hi", 0x150, 4),
    ("s_r_blocks_count_hi", 0x154, 4),
    ("s_free_blocks_count_hi", 0x158, 4),
    ("s_min_extra_isize", 0x15C, 2),
    ("s_want_extra_isize", 0x15E, 2),
    ("s_flags", 0x160, 4),
    ("s_raid_stride", 0x164, 2),
    ("s_mmp_interval", 0x166, 2),
    ("s_mmp_block", 0x168, 8),
    ("s_raid_stripe_width", 0x170, 4),
    ("s_log_groups_per_flex", 0x174, 1),
    ("s_checksum_type", 0x175, 1),
    ("s_encryption_level", 0x176, 1),  # ext4.h; reserved in super.rst
    ("s_reserved_pad", 0x177, 1),
    ("s_kbytes_written", 0x178, 8),
    ("s_snapshot_inum", 0x180, 4),
    ("s_snapshot_id", 0x184, 4),
    ("s_snapshot_r_blocks_count", 0x188, 8),
    ("s_snapshot_list", 0x190, 4),
    ("s_error_count", 0x194, 4),
    ("s_first_error_time", 0x198, 4),
    ("s_first_error_ino", 0x19C, 4),
    ("s_first_error_block", 0x1A0, 8),
    ("s_first_error_func", 0x1A8, 32),
    ("s_first_error_line", 0x1C8, 4),
    ("s_last_error_time", 0x1CC, 4),
    ("s_last_error_ino", 0x1D0, 4),
    ("s_last_error_line", 0x1D4, 4),
    ("s_last_error_block", 0x1D8, 8),
    ("s_last_error_func", 0x1E0, 32),
    ("s_mount_opts", 0x200, 64),
    ("s_usr_quota_inum", 0x240, 4),
    ("s_grp_quota_inum", 0x244, 4),
    ("s_overhead_clusters", 0x248, 4),
    ("s_backup_bgs", 0x24C, 8),
    ("s_encrypt_algos", 0x254, 4),
    ("s_encrypt_pw_salt", 0x258, 16),
    ("s_lpf_ino", 0x268, 4),
    ("s_prj_quota_inum", 0x26C, 4),
    ("s_checksum_seed", 0x270, 4),
    ("s_wtime_hi", 0x274, 1),
    ("s_mtime_hi", 0x275, 1),
    ("s_mkfs_time_hi", 0x276, 1),
    ("s_lastcheck_hi", 0x277, 1),
    ("s_first_error_time_hi", 0x278, 1),
    ("s_last_error_time_hi", 0x279, 1),
    ("s_first_error_errcode", 0x27A, 1),  # ext4.h; padding in super.rst
    ("s_last_error_errcode", 0x27B, 1),
    ("s_encoding", 0x27C, 2),
    ("s_encoding_flags", 0x27E, 2),
    ("s_orphan_file_inum", 0x280, 4),
    ("s_def_resuid_hi", 0x284, 2),  # ext4.h; reserved in super.rst
    ("s_def_resgid_hi", 0x286, 2),
    ("s_reserved", 0x288, 372),
    ("s_checksum", 0x3FC, 4),
]

GROUP: Layout = [
    ("bg_block_bitmap_lo", 0x0, 4),
    ("bg_inode_bitmap_lo", 0x4, 4),
    ("bg_inode_table_lo", 0x8, 4),
    ("bg_free_blocks_count_lo", 0xC, 2),
    ("bg_free_inodes_count_lo", 0xE, 2),
    ("bg_used_dirs_count_lo", 0x10, 2),
    ("bg_flags", 0x12, 2),
    ("bg_exclude_bitmap_lo", 0x14, 4),
    ("bg_block_bitmap_csum_lo", 0x18, 2),
    ("bg_inode_bitmap_csum_lo", 0x1A, 2),
    ("bg_itable_unused_lo", 0x1C, 2),
    ("bg_checksum", 0x1E, 2),
    ("bg_block_bitmap_hi", 0x20, 4),
    ("bg_inode_bitmap_hi", 0x24, 4),
    ("bg_inode_table_hi", 0x28, 4),
    ("bg_free_blocks_count_hi", 0x2C, 2),
    ("bg_free_inodes_count_hi", 0x2E, 2),
    ("bg_used_dirs_count_hi", 0x30, 2),
    ("bg_itable_unused_hi", 0x32, 2),
    ("bg_exclude_bitmap_hi", 0x34, 4),
    ("bg_block_bitmap_csum_hi", 0x38, 2),
    ("bg_inode_bitmap_csum_hi", 0x3A, 2),
    ("bg_reserved", 0x3C, 4),
]

# osd1 and osd2 as Linux has them.
INODE: Layout = [
    ("i_mode", 0x0, 2),
    ("i_uid", 0x2, 2),
    ("i_size_lo", 0x4, 4),
    ("i_atime", 0x8, 4),
    ("i_ctime", 0xC, 4),
    ("i_mtime", 0x10, 4),
    ("i_dtime", 0x14, 4),
    ("i_gid", 0x18, 2),
    ("i_links_count", 0x1A, 2),
    ("i_blocks_lo", 0x1C, 4),
    ("i_flags", 0x20, 4),
    ("i_version", 0x24, 4),
    ("i_block", 0x28, 60),
    ("i_generation", 0x64, 4),
    ("i_file_acl_lo", 0x68, 4),
    ("i_size_high", 0x6C, 4),
    ("i_obso_faddr", 0x70, 4),
    ("i_blocks_high", 0x74, 2),
    ("i_file_acl_high", 0x76, 2),
    ("i_uid_high", 0x78, 2),
    ("i_gid_high", 0x7A, 2),
    ("i_checksum_lo", 0x7C, 2),
    ("i_reserved", 0x7E, 2),
]
INODE_EXTRA: Layout = [
    ("i_extra_isize", 0x80, 2),
    ("i_checksum_hi", 0x82, 2),
    ("i_ctime_extra", 0x84, 4),
    ("i_mtime_extra", 0x88, 4),
    ("i_atime_extra", 0x8C, 4),
    ("i_crtime", 0x90, 4),
    ("i_crtime_extra", 0x94, 4),
    ("i_version_hi", 0x98, 4),
    ("i_projid", 0x9C, 4),
]

JOURNAL: Layout = [
    ("h_magic", 0x0, 4),
    ("h_blocktype", 0x4, 4),
    ("h_sequence", 0x8, 4),
    ("s_blocksize", 0xC, 4),
    ("s_maxlen", 0x10, 4),
    ("s_first", 0x14, 4),
    ("s_sequence", 0x18, 4),
    ("s_start", 0x1C, 4),
    ("s_errno", 0x20, 4),
    ("s_feature_compat", 0x24, 4),
    ("s_feature_incompat", 0x28, 4),
    ("s_feature_ro_compat", 0x2C, 4),
    ("s_uuid", 0x30, 16),
    ("s_nr_users", 0x40, 4),
    ("s_dynsuper", 0x44, 4),
    ("s_max_transaction", 0x48, 4),
    ("s_max_trans_data", 0x4C, 4),
    ("s_checksum_type", 0x50, 1),
    ("s_padding2", 0x51, 3),
    ("s_num_fc_blks", 0x54, 4),  # jbd2.h; padding in journal.rst
    ("s_head", 0x58, 4),
    ("s_padding", 0x5C, 160),
    ("s_checksum", 0xFC, 4),
    ("s_users", 0x100, 768),
]

EXTENT_HEADER: Layout = [
    ("eh_magic", 0x0, 2),
    ("eh_entries", 0x2, 2),
    ("eh_max", 0x4, 2),
    ("eh_depth", 0x6, 2),
    ("eh_generation", 0x8, 4),
]
EXTENT_INDEX: Layout = [("ei_block", 0x0, 4), ("ei_leaf_lo", 0x4, 4), ("ei_leaf_hi", 0x8, 2), ("ei_unused", 0xA, 2)]
EXTENT_LEAF: Layout = [("ee_block", 0x0, 4), ("ee_len", 0x4, 2), ("ee_start_hi", 0x6, 2), ("ee_start_lo", 0x8, 4)]

DIR_ENTRY: Layout = [("inode", 0x0, 4), ("rec_len", 0x4, 2), ("name_len", 0x6, 1), ("file_type", 0x7, 1)]
DIR_TAIL: Layout = [
    ("det_reserved_zero1", 0x0, 4),
    ("det_rec_len", 0x4, 2),
    ("det_reserved_zero2", 0x6, 1),
    ("det_reserved_ft", 0x7, 1),
    ("det_checksum", 0x8, 4),
]
DX_ROOT_INFO: Layout = [
    ("reserved_zero", 0x0, 4),
    ("hash_version", 0x4, 1),
    ("info_length", 0x5, 1),
    ("indirect_levels", 0x6, 1),
    ("unused_flags", 0x7, 1),
]
DX_ROOT_1K_WITH_TAIL: Layout = [
    ("dot.inode", 0x0, 4),
    ("dot.rec_len", 0x4, 2),
    ("dot.name_len", 0x6, 1),
    ("dot.file_type", 0x7, 1),
    ("dot_name", 0x8, 4),
    ("dotdot.inode", 0xC, 4),
    ("dotdot.rec_len", 0x10, 2),
    ("dotdot.name_len", 0x12, 1),
    ("dotdot.file_type", 0x13, 1),
    ("dotdot_name", 0x14, 4),
    ("info.reserved_zero", 0x18, 4),
    ("info.hash_version", 0x1C, 1),
    ("info.info_length", 0x1D, 1),
    ("info.indirect_levels", 0x1E, 1),
    ("info.unused_flags", 0x1F, 1),
    ("countlimit.limit", 0x20, 2),
    ("countlimit.count", 0x22, 2),
    ("block", 0x24, 4),
    ("entries", 0x28, 0x3D0),
    ("tail.dt_reserved", 0x3F8, 4),
    ("tail.dt_checksum", 0x3FC, 4),
]
# directory.rst puts block at 0xE; a u32 behind two u16 at 0x8 stands at 0xC, as fs/ext4/namei.c has it.
DX_NODE_1K: Layout = [
    ("fake.inode", 0x0, 4),
    ("fake.rec_len", 0x4, 2),
    ("fake.name_len", 0x6, 1),
    ("fake.file_type", 0x7, 1),
    ("countlimit.limit", 0x8, 2),
    ("countlimit.count", 0xA, 2),
    ("block", 0xC, 4),
    ("entries", 0x10, 0x3F0),
]

#: Definition and what the documentation says of it.
DOCUMENTED: dict[str, tuple[Any, Layout]] = {
    "superblock": (Superblock, SUPERBLOCK),
    "group descriptor of 32 bytes": (GroupDescriptor32, GROUP[:12]),
    "group descriptor of 64 bytes": (GroupDescriptor64, GROUP),
    "inode of 128 bytes": (inode_struct(128), [*INODE, ("i_rest", 0x80, 0)]),
    "inode of 256 bytes": (inode_struct(256), [*INODE, *INODE_EXTRA, ("i_rest", 0xA0, 96)]),
    "inode of 1,024 bytes": (inode_struct(1024), [*INODE, *INODE_EXTRA, ("i_rest", 0xA0, 864)]),
    "journal superblock": (JournalSuperblock, JOURNAL),
    "extent header": (ExtentHeader, EXTENT_HEADER),
    "extent index": (ExtentIndex, EXTENT_INDEX),
    "extent leaf": (ExtentLeaf, EXTENT_LEAF),
    "extent tail": (ExtentTail, [("et_checksum", 0x0, 4)]),
    "directory entry": (DirEntry, DIR_ENTRY),
    "directory tail": (DirTail, DIR_TAIL),
    "dx_root_info": (DxRootInfo, DX_ROOT_INFO),
    "dx_countlimit": (DxCountLimit, [("limit", 0x0, 2), ("count", 0x2, 2)]),
    "dx_entry": (DxEntry, [("hash", 0x0, 4), ("block", 0x4, 4)]),
    "dx_tail": (DxTail, [("dt_reserved", 0x0, 4), ("dt_checksum", 0x4, 4)]),
    "dx_root": (dx_root_struct(1024, True), DX_ROOT_1K_WITH_TAIL),
    "dx_node": (dx_node_struct(1024, False), DX_NODE_1K),
}


def others() -> dict[str, Any]:
    """Variants of the ones above, and all other definitions: those of the store are documented in docs/FORMAT.md."""
    found = {
        "inode of 160 bytes": inode_struct(160),
        "dx_root without a tail": dx_root_struct(1024, False),
        "dx_node with a tail": dx_node_struct(1024, True),
    }
    known = [*(struct for struct, _ in DOCUMENTED.values()), fmt.SnapshotEntry]
    modules = [importlib.import_module(f"extsnap.ondisk.{part.name}") for part in pkgutil.iter_modules(ondisk.__path__)]
    for module in (*modules, fmt):
        for name, value in vars(module).items():
            if isinstance(value, c.Struct) and not any(value is one for one in known):
                found[f"{module.__name__.split('.')[-1]}.{name}"] = value
    return found


FIXED: dict[str, Any] = {**{name: struct for name, (struct, _) in DOCUMENTED.items()}, **others()}
SIZES = {
    "superblock": 1024,
    "group descriptor of 32 bytes": 32,
    "group descriptor of 64 bytes": 64,
    "inode of 128 bytes": 128,
    "inode of 256 bytes": 256,
    "journal superblock": 1024,
    "extent header": 12,
    "extent index": 12,
    "extent leaf": 12,
    "directory tail": 12,
    "dx_root": 1024,
    "dx_node": 1024,
    "dx_root without a tail": 1024,
    "dx_node with a tail": 1024,
}


def layout_of(struct: Any, prefix: str = "", offset: int = 0) -> Layout:
    """Name, offset and bytes of every field of a definition; those of structures inside it by ``outer.inner``."""
    fields: Layout = []
    for field in struct.subcons:
        inner = field.subcon
        size = int(field.sizeof())
        if isinstance(inner, c.Struct):
            fields += layout_of(inner, f"{prefix}{field.name}.", offset)
        else:
            fields.append((prefix + field.name, offset, size))
        offset += size
    return fields


@pytest.mark.parametrize("name", DOCUMENTED)
def test_fields_stand_where_the_documentation_puts_them(name):
    struct, documented = DOCUMENTED[name]
    for found, expected in zip(layout_of(struct), documented, strict=True):
        assert found == expected


@pytest.mark.parametrize("name", DOCUMENTED)
def test_values_are_the_bytes_at_the_documented_place(name):
    """Unsigned, little-endian but for the journal; arrays are of 32-bit words or of hash-tree entries."""
    struct, documented = DOCUMENTED[name]
    order: Literal["big", "little"] = "big" if name == "journal superblock" else "little"
    raw = b"\x80" + np.random.default_rng(2).bytes(struct.sizeof() - 2) + b"\xff"
    parsed = struct.parse(raw)
    for field, offset, size in documented:
        value = parsed
        for part in field.split("."):
            value = value[part]
        there = raw[offset : offset + size]
        if isinstance(value, int):
            assert value == int.from_bytes(there, order), field
        elif isinstance(value, bytes):
            assert value == there, field
        else:
            words = np.array([[item.hash, item.block] if isinstance(item, dict) else item for item in value], "<u4")
            assert words.tobytes() == there, field


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    assert FIXED[name].sizeof() == SIZES[name]


@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("block_size", [1024, 2048, 4096])
def test_hash_tree_blocks_fill_a_block(block_size, has_tail):
    for struct, head in ((dx_root_struct, 32), (dx_node_struct, 8)):
        assert struct(block_size, has_tail).sizeof() == block_size
        # The first entry shares its place with limit and count.
        assert struct(block_size, has_tail).entries.count == (block_size - head) // 8 - 1 - has_tail


@pytest.mark.parametrize("name", FIXED)
def test_every_byte_survives(name):
    """Unknown flags, reserved and padding bytes, labels that are no text: all come out as they went in."""
    struct = FIXED[name]
    size = struct.sizeof()

    @settings(max_examples=50, deadline=None, database=None)
    @given(st.binary(min_size=size, max_size=size))
    def holds(raw: bytes) -> None:
        assert codec.build(struct, codec.parse(struct, raw, name), name) == raw

    holds()
    # Hypothesis prefers small values; these have every bit at least once.
    for seed in range(5):
        raw = np.random.default_rng(seed).bytes(size)
        assert codec.build(struct, codec.parse(struct, raw, name), name) == raw
    for raw in (bytes(size), b"\xff" * size):
        assert codec.build(struct, codec.parse(struct, raw, name), name) == raw


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("change", [-1, 1])
def test_another_length_is_refused(name, change):
    size = FIXED[name].sizeof() + change
    with pytest.raises(FormatError, match=f"has {size} bytes instead of {size - change}") as caught:
        codec.parse(FIXED[name], bytes(size), name, 4096)
    assert (caught.value.structure, caught.value.offset) == (name, 4096)


def test_a_value_that_does_not_fit_is_refused():
    with pytest.raises(FormatError):
        codec.build(DxEntry, {"hash": 1 << 32, "block": 0}, "dx_entry")
    with pytest.raises(FormatError):
        codec.build(fmt.LogPlace, {"epoch": -1, "start": 0, "blocks": 0}, "log place")


def as_plain(value: Any) -> Any:
    """A field of Construct or numpy as ints, lists and dictionaries."""
    if isinstance(value, np.void):
        return {name: as_plain(value[name]) for name in value.dtype.names}
    if isinstance(value, np.ndarray):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: as_plain(item) for name, item in value.items() if name != "_io"}
    if isinstance(value, (list, bytes)):
        return [as_plain(item) for item in value]
    return int(value)


@pytest.mark.parametrize("name", FIXED)
def test_the_dtype_agrees(name):
    struct = FIXED[name]
    dtype = dtype_of(struct)
    assert dtype.itemsize == struct.sizeof()
    rows = 3
    raw = np.random.default_rng(1).bytes(rows * dtype.itemsize)
    for row, value in enumerate(np.frombuffer(raw, dtype)):
        part = raw[row * dtype.itemsize : (row + 1) * dtype.itemsize]
        assert as_plain(value) == as_plain(struct.parse(part))


def test_the_dtypes_of_tables_are_those_of_the_definitions():
    assert dtype_of(ExtentIndex) == INDEX_DTYPE
    assert dtype_of(ExtentLeaf) == LEAF_DTYPE
    with pytest.raises(TypeError, match="has no dtype"):
        dtype_of(fmt.SnapshotEntry)


@given(
    head=st.binary(min_size=40, max_size=40),
    name=st.binary(max_size=300),
    message=st.binary(max_size=300),
    restored_from=st.binary(max_size=300),
)
@settings(max_examples=100, deadline=None, database=None)
def test_every_byte_of_a_snapshot_entry_survives(head, name, message, restored_from):
    raw = head
    for text, width in ((name, 2), (message, 4), (restored_from, 2)):
        raw += len(text).to_bytes(width, "little") + text
    parsed = fmt.SnapshotEntry.parse(raw)
    assert fmt.SnapshotEntry.build(parsed) == raw
    assert (parsed.name, parsed.message, parsed.restored_from) == (name, message, restored_from)
