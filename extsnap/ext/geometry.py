"""Geometry of a filesystem: counts and sizes with plain names, worked out once from the superblock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from extsnap.arrays import Ints
from extsnap.errors import FormatError
from extsnap.ondisk.checksum import filesystem_seed
from extsnap.ondisk.superblock import OFFSET, Compat, Incompat, RoCompat

#: Groups whose descriptors are read: a sparse image of 16 TiB may name half a milliard.  With 4 KiB blocks and groups
#: of 128 MiB, as mke2fs makes them, these are 128 TiB.
GROUPS_MAX = 1 << 20
#: Rows of bits over all blocks, each as long as a group's bitmap.
ROWS_MAX = 1 << 23


@dataclass(frozen=True)
class Geometry:
    """Sizes and counts; bytes and blocks as the names say.

    Attributes:
        block_size: Bytes.
        cluster_blocks: Blocks of an allocation cluster: 1 without bigalloc.
        desc_size: Bytes of a group descriptor.
        descriptor_blocks: int64[n], blocks of the descriptor table in its order, as the primary superblock has them.
        first_meta_bg: Descriptor blocks from this one on stand in the groups that they describe (meta_bg).
        reserved_gdt_blocks: Blocks kept behind the table for growth.
        free_blocks, free_inodes: By the superblock.
        checksum_seed: Of metadata_csum.
        backup_groups: int64[n], groups with a superblock, group 0 included.
    """

    block_size: int
    cluster_blocks: int
    blocks_count: int
    first_data_block: int
    blocks_per_group: int
    groups: int
    inodes_count: int
    inodes_per_group: int
    inode_size: int
    desc_size: int
    first_inode: int
    reserved_blocks: int
    free_blocks: int
    free_inodes: int
    descriptor_blocks: Ints
    first_meta_bg: int
    reserved_gdt_blocks: int
    has_metadata_csum: bool
    has_gdt_csum: bool
    checksum_seed: int
    backup_groups: Ints

    @property
    def clusters_per_group(self) -> int:
        """Bits of one group's block bitmap."""
        return self.blocks_per_group // self.cluster_blocks

    @property
    def inode_table_blocks(self) -> int:
        """Blocks of one group's inode table."""
        return -(-self.inodes_per_group * self.inode_size // self.block_size)

    @property
    def superblock_blocks(self) -> Ints:
        """Blocks that hold a superblock, the primary's first: int64[n]."""
        blocks = self.first_data_block + self.backup_groups * self.blocks_per_group
        blocks[0] = OFFSET // self.block_size
        return blocks

    def superblock_offset(self, block: int) -> int:
        """Byte offset of the superblock within one of `superblock_blocks`."""
        return OFFSET % self.block_size if block == OFFSET // self.block_size else 0

    def group_heads(self, groups: Ints) -> Ints:
        """Blocks at the start of groups for superblock, descriptors and what is reserved behind them: int64[n]."""
        backup = np.isin(groups, self.backup_groups).astype(np.int64)
        table = len(self.descriptor_blocks)
        per_block = self.block_size // self.desc_size
        within = groups % per_block
        of_meta = backup + np.isin(within, (0, 1, per_block - 1))
        old = groups // per_block < self.first_meta_bg
        return np.where(old, backup * (1 + min(self.first_meta_bg, table) + self.reserved_gdt_blocks), of_meta)

    @classmethod
    def of(cls, sb: Any, device_bytes: int) -> Geometry:
        """From a parsed superblock.

        Every array of the size of the filesystem comes after the checks, so what is taken is bounded by the device.

        Raises:
            FormatError: Values that no filesystem has, or the device is shorter than the filesystem; names the field.
        """

        def require(valid: bool, field: str) -> None:
            if not valid:
                raise FormatError("the value is impossible", structure="superblock", field=field, offset=OFFSET)

        bit64 = bool(sb.s_feature_incompat & Incompat.bit64)
        require(sb.s_log_block_size <= 6, "s_log_block_size")
        block_size = 1024 << sb.s_log_block_size
        high = 1 if bit64 else 0
        blocks = sb.s_blocks_count_lo | high * (sb.s_blocks_count_hi << 32)
        cluster_bits = sb.s_log_cluster_size - sb.s_log_block_size if sb.s_feature_ro_compat & RoCompat.bigalloc else 0
        require(0 <= cluster_bits <= 20, "s_log_cluster_size")
        require(0 < sb.s_blocks_per_group <= (8 * block_size) << cluster_bits, "s_blocks_per_group")
        require(sb.s_blocks_per_group % (8 << cluster_bits) == 0, "s_blocks_per_group")
        first_data_block = 1 if block_size == OFFSET and not cluster_bits else 0
        require(sb.s_first_data_block == first_data_block < blocks, "s_first_data_block")
        if blocks * block_size > device_bytes:
            raise FormatError(
                f"the filesystem has {blocks * block_size} bytes but the image only {device_bytes}: it is truncated",
                structure="superblock",
                field="s_blocks_count",
                offset=OFFSET,
            )
        groups = -(-(blocks - sb.s_first_data_block) // sb.s_blocks_per_group)
        require(0 < sb.s_inodes_per_group <= 8 * block_size, "s_inodes_per_group")
        require(sb.s_inodes_per_group % 8 == 0, "s_inodes_per_group")
        require(sb.s_inodes_count == groups * sb.s_inodes_per_group, "s_inodes_count")
        inode_size = sb.s_inode_size if sb.s_rev_level else 128
        require(128 <= inode_size <= block_size and inode_size & (inode_size - 1) == 0, "s_inode_size")
        desc_size = sb.s_desc_size if bit64 else 32
        require(desc_size in (32, 64, 128, 256, 512, 1024) and desc_size >= (64 if bit64 else 32), "s_desc_size")
        require(groups <= GROUPS_MAX, "s_blocks_per_group")
        require(blocks // (sb.s_blocks_per_group >> cluster_bits) <= ROWS_MAX, "s_blocks_per_group")
        gdt_blocks = -(-groups * desc_size // block_size)
        require(OFFSET // block_size + 1 + gdt_blocks <= blocks, "s_blocks_per_group")
        meta_bg = bool(sb.s_feature_incompat & Incompat.meta_bg)
        first_meta_bg = min(sb.s_first_meta_bg, gdt_blocks) if meta_bg else gdt_blocks
        backup_groups = _backup_groups(sb, groups)
        numbers = np.arange(gdt_blocks, dtype=np.int64)
        home = numbers * (block_size // desc_size)
        in_group = home * sb.s_blocks_per_group + sb.s_first_data_block + np.isin(home, backup_groups)
        descriptor_blocks = np.where(numbers < first_meta_bg, OFFSET // block_size + 1 + numbers, in_group)
        metadata_csum = bool(sb.s_feature_ro_compat & RoCompat.metadata_csum)
        seeded = bool(sb.s_feature_incompat & Incompat.metadata_csum_seed)
        resize = bool(sb.s_feature_compat & Compat.resize_inode)
        return cls(
            block_size=block_size,
            cluster_blocks=1 << cluster_bits,
            blocks_count=blocks,
            first_data_block=sb.s_first_data_block,
            blocks_per_group=sb.s_blocks_per_group,
            groups=groups,
            inodes_count=sb.s_inodes_count,
            inodes_per_group=sb.s_inodes_per_group,
            inode_size=inode_size,
            desc_size=desc_size,
            first_inode=sb.s_first_ino if sb.s_rev_level else 11,
            reserved_blocks=sb.s_r_blocks_count_lo | high * (sb.s_r_blocks_count_hi << 32),
            free_blocks=sb.s_free_blocks_count_lo | high * (sb.s_free_blocks_count_hi << 32),
            free_inodes=sb.s_free_inodes_count,
            descriptor_blocks=descriptor_blocks,
            first_meta_bg=first_meta_bg,
            reserved_gdt_blocks=sb.s_reserved_gdt_blocks if resize else 0,
            has_metadata_csum=metadata_csum,
            has_gdt_csum=bool(sb.s_feature_ro_compat & RoCompat.uninit_bg) and not metadata_csum,
            checksum_seed=sb.s_checksum_seed if seeded else filesystem_seed(sb.s_uuid),
            backup_groups=backup_groups,
        )


def _backup_groups(sb: Any, groups: int) -> Ints:
    if sb.s_feature_compat & Compat.sparse_super2:
        return np.array(sorted({0, *(group for group in sb.s_backup_bgs if 0 < group < groups)}), np.int64)
    if not sb.s_feature_ro_compat & RoCompat.sparse_super:
        return np.arange(groups, dtype=np.int64)
    found = {0, 1}
    for base in (3, 5, 7):
        power = base
        while power < groups:
            found.add(power)
            power *= base
    return np.array(sorted(group for group in found if group < groups), np.int64)
