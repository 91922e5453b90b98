"""The group descriptor table as one numpy array: joined columns, checksums, uninitialised groups resolved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints
from extsnap.errors import FormatError
from extsnap.ext.bitmaps import whole_clusters
from extsnap.ext.geometry import Geometry
from extsnap.ondisk.checksum import group_checksums
from extsnap.ondisk.dtypes import dtype_of
from extsnap.ondisk.group import GroupDescriptor32, GroupDescriptor64, GroupFlags

_DTYPE32 = dtype_of(GroupDescriptor32)
_DTYPE64 = dtype_of(GroupDescriptor64)


class GroupTable:
    """All group descriptors of a filesystem.

    Attributes:
        raw: uint8[groups, desc_size], what is on the medium and what is changed in place.
    """

    def __init__(self, geometry: Geometry, uuid: bytes, raw: bytes) -> None:
        self._geometry = geometry
        self._uuid = uuid
        size = geometry.desc_size
        self.raw = np.frombuffer(raw, np.uint8)[: geometry.groups * size].reshape(geometry.groups, size).copy()
        self._wide = size >= 64
        dtype = _DTYPE64 if self._wide else _DTYPE32
        self._table: npt.NDArray[Any] = np.ndarray((geometry.groups,), dtype, buffer=self.raw.data, strides=(size,))

    @property
    def has_checksums(self) -> bool:
        """Whether bg_flags and bg_itable_unused count."""
        return self._geometry.has_metadata_csum or self._geometry.has_gdt_csum

    def column(self, name: str) -> Ints:
        """A field of all groups, lo and hi joined: int64[groups]."""
        low = self._table[name + "_lo"].astype(np.int64)
        if not self._wide:
            return low
        bits = self._table.dtype[name + "_lo"].itemsize * 8
        return low | (self._table[name + "_hi"].astype(np.int64) << bits)

    def set_column(self, name: str, groups: Ints, values: Ints) -> None:
        """Set a joined field of some groups."""
        bits = self._table.dtype[name + "_lo"].itemsize * 8
        self._table[name + "_lo"][groups] = values & ((1 << bits) - 1)
        if self._wide:
            self._table[name + "_hi"][groups] = values >> bits

    @property
    def flags(self) -> Ints:
        """bg_flags of all groups; zeros where they do not count."""
        flags = self._table["bg_flags"].astype(np.int64)
        return flags if self.has_checksums else np.zeros_like(flags)

    def clear_flag(self, groups: Ints, flag: GroupFlags) -> None:
        """Clear a flag of some groups."""
        self._table["bg_flags"][groups] &= np.uint16(~int(flag) & 0xFFFF)

    def _checksums(self, groups: Ints) -> npt.NDArray[np.uint16]:
        return group_checksums(
            self.raw[groups],
            groups,
            seed=self._geometry.checksum_seed,
            uuid=self._uuid,
            metadata_csum=self._geometry.has_metadata_csum,
        )

    def _offset(self, group: int) -> int:
        """Byte offset of a descriptor on the medium."""
        size = self._geometry.block_size
        block, within = divmod(group * self._geometry.desc_size, size)
        return int(self._geometry.descriptor_blocks[block]) * size + within

    def _faults(self) -> Iterator[tuple[npt.NDArray[np.bool_], str, Ints, str]]:
        """(bool[groups]: where it is so, field, its values, what to say of a group) of all that can be wrong."""
        geometry = self._geometry
        if self.has_checksums:
            found = self._table["bg_checksum"].astype(np.int64)
            wrong = self._checksums(np.arange(geometry.groups)) != found
            yield wrong, "bg_checksum", found, "the checksum of group {group} is wrong"
        for name, length in (
            ("bg_block_bitmap", 1),
            ("bg_inode_bitmap", 1),
            ("bg_inode_table", geometry.inode_table_blocks),
        ):
            at = self.column(name)
            wrong = (at <= geometry.first_data_block) | (at > geometry.blocks_count - length)
            yield wrong, name, at, "group {group} has block {value}, outside the volume"
        yield (
            self._shared(),
            "bg_block_bitmap",
            self.column("bg_block_bitmap"),
            ("a bitmap or the inode table of group {group} shares blocks with another one"),
        )
        if self.has_checksums:
            unused = self.column("bg_itable_unused")
            wrong = unused > geometry.inodes_per_group
            yield wrong, "bg_itable_unused", unused, "group {group} has more unused inodes than inodes"

    def _shared(self) -> npt.NDArray[np.bool_]:
        """bool[groups]: whose bitmaps or inode table share blocks with others.

        Groups that share one bitmap would cost memory each for what is on the medium once.
        """
        groups = self._geometry.groups
        start = np.concatenate([self.column(f"bg_{name}") for name in ("block_bitmap", "inode_bitmap", "inode_table")])
        length = np.repeat([1, 1, self._geometry.inode_table_blocks], groups)
        order = np.argsort(start, kind="stable")
        ends = np.maximum.accumulate(start[order] + length[order])
        late = np.flatnonzero(ends[:-1] > start[order][1:])
        shared = np.zeros(groups, np.bool_)
        shared[order[late] % groups] = shared[order[late + 1] % groups] = True
        return shared

    def verify(self) -> None:
        """Check every descriptor.

        Raises:
            FormatError: A checksum or a count is wrong, or an address lies outside the volume; names the group.
        """
        for wrong, field, values, message in self._faults():
            if wrong.any():
                group = int(np.argmax(wrong))
                raise FormatError(
                    message.format(group=group, value=values[group]),
                    structure="group descriptor",
                    field=field,
                    offset=self._offset(group),
                )

    def sound(self) -> npt.NDArray[np.bool_]:
        """bool[groups]: which descriptors `verify` has nothing against."""
        faulty = np.zeros(self._geometry.groups, np.bool_)
        for wrong, *_ in self._faults():
            faulty |= wrong
        return ~faulty

    def metadata_runs(self, which: npt.NDArray[np.bool_]) -> Ints:
        """Runs (start, length) of the blocks that descriptors name and of their groups' heads: int64[n, 2].

        Heads are superblock, descriptors and reserved descriptors, where the group has a backup.
        """
        geometry = self._geometry
        groups = np.flatnonzero(which)
        first = groups * geometry.blocks_per_group + geometry.first_data_block
        parts = [np.stack([first, np.minimum(geometry.group_heads(groups), geometry.blocks_per_group)], axis=1)]
        for name, length in (
            ("bg_block_bitmap", 1),
            ("bg_inode_bitmap", 1),
            ("bg_inode_table", geometry.inode_table_blocks),
        ):
            at = self.column(name)[groups]
            parts.append(np.stack([at, np.full_like(at, length)], axis=1))
        runs = np.concatenate(parts).astype(np.int64)
        return runs[runs[:, 1] > 0]

    def seal(self, groups: Ints) -> None:
        """Recompute bg_checksum of some groups."""
        if self.has_checksums:
            self._table["bg_checksum"][groups] = self._checksums(groups)

    def uninitialised(self) -> tuple[Ints, Ints]:
        """Groups with BLOCK_UNINIT, int64[n], and the blocks used in them, int64[k, 2]: runs, relative to group 0.

        Used are: superblock, descriptors and reserved descriptors where the group has a backup, the group's own
        bitmaps and inode table where they lie inside it, and the padding bits of a short last group.
        """
        geometry = self._geometry
        per_group = geometry.blocks_per_group
        which = np.flatnonzero(self.flags & GroupFlags.BLOCK_UNINIT)
        heads = np.minimum(geometry.group_heads(which), per_group)
        heads = -(-heads // geometry.cluster_blocks) * geometry.cluster_blocks
        used = [np.stack([which * per_group, heads], axis=1)]
        for name, length in (
            ("bg_block_bitmap", 1),
            ("bg_inode_bitmap", 1),
            ("bg_inode_table", geometry.inode_table_blocks),
        ):
            at = self.column(name)[which]
            first = which * per_group
            low = np.clip(at - geometry.first_data_block, first, first + per_group)
            high = np.clip(at - geometry.first_data_block + length, first, first + per_group)
            runs = np.stack([low, high - low], axis=1)
            used.append(whole_clusters(runs[runs[:, 1] > 0], geometry.cluster_blocks))
        if len(which) and which[-1] == geometry.groups - 1:
            in_last = geometry.blocks_count - geometry.first_data_block - int(which[-1]) * per_group
            used.append(np.array([[int(which[-1]) * per_group + in_last, per_group - in_last]], np.int64))
        runs = np.concatenate(used)
        return which, runs[runs[:, 1] > 0]
