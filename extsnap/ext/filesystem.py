"""An ext2, ext3 or ext4 filesystem on a device: reading its structures and editing them.

    fs = Filesystem.open(device)
    fs.file_map(fs.lookup("/etc/hostname")).data

Edits are kept in memory until `Filesystem.flush`, which writes the blocks that changed and nothing else; a caller
gives a writable filesystem an `Overlay`, so that not even that reaches a medium.  Only the primary superblock and
descriptors are written: backups are refreshed by e2fsck and resize2fs, as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Bits, ByteWindows, Ints, expand, runs_of
from extsnap.blockdev.base import Device, ReadableDevice
from extsnap.errors import FormatError, NotExtError, UnsupportedFeature, VolumeFull
from extsnap.ext.bitmaps import choose_free, count_clusters, expand_clusters, pack_clusters, whole_clusters
from extsnap.ext.geometry import Geometry
from extsnap.ext.groups import GroupTable
from extsnap.ext.journal import Journal
from extsnap.ext.mapping import (
    DIRECT,
    FileMap,
    build_extents,
    build_indirect,
    extent_nodes,
    indirect_nodes,
    parse_extents,
    parse_indirect,
)
from extsnap.ext.quota import charge
from extsnap.ondisk import codec
from extsnap.ondisk.checksum import bitmap_checksum, inode_checksum, inode_seed, superblock_checksum
from extsnap.ondisk.group import GroupFlags
from extsnap.ondisk.inode import BASE_SIZE, EXTRA_SIZE, InodeFlags, inode_struct
from extsnap.ondisk.mmp import MAGIC as MMP_MAGIC
from extsnap.ondisk.mmp import SEQ_CLEAN, SEQ_FSCK, MmpBlock
from extsnap.ondisk.superblock import MAGIC, OFFSET, SIZE, Compat, Incompat, RoCompat, State, Superblock
from extsnap.sparsebits import SparseBits, parts

ROOT_INODE = 2
BLOCK_SIZE_MAX = 65536

_SUPPORTED_COMPAT = (
    Compat.has_journal
    | Compat.ext_attr
    | Compat.resize_inode
    | Compat.dir_index
    | Compat.orphan_file
    | Compat.dir_prealloc
    | Compat.stable_inodes
    | Compat.sparse_super2
    | Compat.fast_commit
)
_SUPPORTED_INCOMPAT = (
    Incompat.filetype
    | Incompat.needs_recovery
    | Incompat.extent
    | Incompat.bit64
    | Incompat.flex_bg
    | Incompat.meta_bg
    | Incompat.metadata_csum_seed
    | Incompat.large_dir
    | Incompat.ea_inode
    | Incompat.encrypt
    | Incompat.casefold
    | Incompat.inline_data
    | Incompat.mmp
)
_SUPPORTED_RO_COMPAT = (
    RoCompat.sparse_super
    | RoCompat.large_file
    | RoCompat.huge_file
    | RoCompat.uninit_bg
    | RoCompat.dir_nlink
    | RoCompat.extra_isize
    | RoCompat.metadata_csum
    | RoCompat.orphan_present
    | RoCompat.verity
    | RoCompat.quota
    | RoCompat.project
    | RoCompat.bigalloc
)
#: Names as e2fsprogs spells them, where the kernel's differ.
_SPELLING = {"bit64": "64bit", "read_only": "read-only", "bigalloc": "bigalloc"}
_EXT4_INCOMPAT = ~int(Incompat.filetype | Incompat.needs_recovery | Incompat.journal_dev | Incompat.meta_bg)
_EXT4_RO_COMPAT = ~int(RoCompat.sparse_super | RoCompat.large_file | RoCompat.btree_dir | RoCompat.read_only)


def _names(flags: Any, kind: type[Any]) -> list[str]:
    """Names of the set bits as e2fsprogs spells them; bits without a name as FEATURE_ with kind and number."""
    letter = {Compat: "C", Incompat: "I", RoCompat: "R"}[kind]
    named = {flag.value: str(flag.name) for flag in kind}
    found = []
    for bit in range(32):
        if int(flags) >> bit & 1:
            name = named.get(1 << bit, f"FEATURE_{letter}{bit}")
            found.append(_SPELLING.get(name, name))
    return found


class Filesystem:
    """One filesystem; see the module.

    Attributes:
        device: Where it is read from and flushed to.
        superblock: The parsed superblock; edits change it.
        geometry: Sizes and counts as they were at opening.
    """

    def __init__(self, device: ReadableDevice, raw: bytes, *, writable: bool, lenient: bool = False) -> None:
        self.device = device
        self.writable = writable
        self._lenient = lenient
        self.superblock = codec.parse(Superblock, raw, "superblock", OFFSET)
        self._raw_superblock = raw
        self.geometry = Geometry.of(self.superblock, device.size)
        self._inode_struct = inode_struct(self.geometry.inode_size)
        self._blocks: dict[int, bytes] = {}
        self._bitmaps: SparseBits | None = None
        self._sound = np.ones(self.geometry.groups, np.bool_)
        self._dirty_groups: set[int] = set()
        self._dirty_descriptors: set[int] = set()

    @classmethod
    def open(cls, device: ReadableDevice, *, writable: bool = False, lenient: bool = False) -> Filesystem:
        """Open and verify superblock and descriptors; everything else is verified when it is read.

        ``lenient`` treats descriptors and bitmaps like those of a filesystem with errors, group by group: of one that
        somebody is writing to they need not agree on the medium.

        Raises:
            NotExtError: No ext superblock.
            UnsupportedFeature: It is the external journal of a filesystem elsewhere.
            FormatError: It is damaged, or the device is shorter than the filesystem.
        """
        if device.size < OFFSET + SIZE:
            raise NotExtError(f"the image has only {device.size} bytes and holds no filesystem", hint="check the path")
        raw = device.pread(OFFSET, SIZE)
        if int.from_bytes(raw[0x38:0x3A], "little") != MAGIC:
            raise NotExtError("there is no ext2, ext3 or ext4 filesystem", hint="check the path")
        if int.from_bytes(raw[0x60:0x64], "little") & Incompat.journal_dev:
            raise UnsupportedFeature(
                "this is an external journal (journal_dev), and no filesystem", hint="name the filesystem's image"
            )
        fs = cls(device, raw, writable=writable, lenient=lenient)
        geometry = fs.geometry
        if geometry.has_metadata_csum and superblock_checksum(raw) != fs.superblock.s_checksum:
            raise FormatError("the checksum is wrong", structure="superblock", field="s_checksum", offset=OFFSET)
        return fs

    @cached_property
    def groups(self) -> GroupTable:
        """The group descriptors, verified; of a filesystem with errors, `sound_groups` tells which can be believed."""
        raw = self.read_blocks(self.geometry.descriptor_blocks).tobytes()
        table = GroupTable(self.geometry, self.superblock.s_uuid, raw)
        if not self._by_group:
            table.verify()
        self._counts_at_open = table.column("bg_free_blocks_count").sum(), table.column("bg_free_inodes_count").sum()
        return table

    @property
    def _by_group(self) -> bool:
        """Whether descriptors and bitmaps are believed group by group."""
        return self._lenient or self.has_errors

    @property
    def sound_groups(self) -> npt.NDArray[np.bool_]:
        """bool[groups]: whose descriptor and block bitmap verify.  All, unless the filesystem is marked with errors.

        Then a group is sound if its descriptor passes `GroupTable.verify`; its bitmap has the checksum of the
        descriptor, where the volume has such checksums; as many clusters are free in it as the descriptor counts;
        and all blocks in it that sound descriptors name, and its own superblock and descriptors, are in use.
        """
        self._used()
        return self._sound

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken: as the superblock counts them, or with errors those free in sound groups."""
        if not self._by_group:
            return self.geometry.free_blocks
        return self.geometry.groups * self.geometry.blocks_per_group - self._used().total()

    # -- what it is -------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """ "ext2", "ext3" or "ext4", by the features, as blkid tells them apart."""
        sb = self.superblock
        if sb.s_feature_incompat & _EXT4_INCOMPAT or sb.s_feature_ro_compat & _EXT4_RO_COMPAT:
            return "ext4"
        return "ext3" if sb.s_feature_compat & Compat.has_journal else "ext2"

    @property
    def uuid(self) -> bytes:
        """s_uuid, 16 bytes."""
        return bytes(self.superblock.s_uuid)

    @property
    def label(self) -> str:
        """s_volume_name; bytes that are not UTF-8 are replaced."""
        return bytes(self.superblock.s_volume_name).split(b"\0")[0].decode(errors="replace")

    @property
    def features(self) -> list[str]:
        """Names of all features that are set."""
        sb = self.superblock
        return [
            *_names(sb.s_feature_compat, Compat),
            *_names(sb.s_feature_incompat, Incompat),
            *_names(sb.s_feature_ro_compat, RoCompat),
        ]

    @property
    def needs_recovery(self) -> bool:
        """Whether the journal must be replayed."""
        return bool(self.superblock.s_feature_incompat & Incompat.needs_recovery)

    @property
    def is_clean(self) -> bool:
        """Whether it was cleanly unmounted."""
        return bool(self.superblock.s_state & State.VALID)

    @property
    def quota_inodes(self) -> tuple[int, int, int]:
        """Inodes of the quota files of users, groups and projects; 0 where none is kept."""
        sb = self.superblock
        if not sb.s_feature_ro_compat & RoCompat.quota:
            return 0, 0, 0
        return sb.s_usr_quota_inum, sb.s_grp_quota_inum, sb.s_prj_quota_inum

    @property
    def has_errors(self) -> bool:
        """Whether it is marked as having errors."""
        return bool(self.superblock.s_state & State.ERROR)

    def mmp_user(self) -> str:
        """Who has the volume in use by its block of multiple-mount protection; empty if nobody has.

        Raises:
            FormatError: There is no such block where the superblock has it.
        """
        sb = self.superblock
        if not sb.s_feature_incompat & Incompat.mmp:
            return ""
        block = codec.parse(MmpBlock, self.read_block(sb.s_mmp_block)[: MmpBlock.sizeof()], "MMP block")
        if block.mmp_magic != MMP_MAGIC:
            raise FormatError("the magic is wrong", structure="MMP block", field="mmp_magic")
        if block.mmp_seq == SEQ_CLEAN:
            return ""
        node, device = (
            bytes(name).split(b"\0")[0].decode(errors="replace") for name in (block.mmp_nodename, block.mmp_bdevname)
        )
        return f"{'e2fsck' if block.mmp_seq == SEQ_FSCK else 'a mount'} on {node} ({device})"

    def require_supported(self) -> None:
        """Refuse what this release does not serve.

        Raises:
            UnsupportedFeature: Names every such feature.
        """
        sb = self.superblock
        found = [
            *_names(int(sb.s_feature_compat) & ~int(_SUPPORTED_COMPAT), Compat),
            *_names(int(sb.s_feature_incompat) & ~int(_SUPPORTED_INCOMPAT), Incompat),
            *_names(int(sb.s_feature_ro_compat) & ~int(_SUPPORTED_RO_COMPAT), RoCompat),
        ]
        if self.geometry.block_size > BLOCK_SIZE_MAX:
            found.append(f"blocks of {self.geometry.block_size} bytes")
        if sb.s_feature_compat & Compat.has_journal and not sb.s_journal_inum:
            found.append("external journal")
        if sb.s_feature_incompat & Incompat.encrypt and self.inode(ROOT_INODE).i_flags & InodeFlags.ENCRYPT:
            found.append("encrypted names in the root directory")
        if found:
            raise UnsupportedFeature(
                f"the volume has {', '.join(found)}, which this release does not support",
                hint="see the limits in the README",
            )

    # -- blocks -----------------------------------------------------------------------------------------

    def read_block(self, number: int) -> bytes:
        """One block, with the edits so far."""
        if number in self._blocks:
            return self._blocks[number]
        if not 0 <= number < self.geometry.blocks_count:
            raise FormatError(f"block {number} lies outside the volume", structure="block pointer")
        return self.device.pread(number * self.geometry.block_size, self.geometry.block_size)

    def write_block(self, number: int, data: bytes) -> None:
        """Change one block; written by `flush`."""
        if len(data) != self.geometry.block_size:
            raise ValueError(f"{len(data)} bytes are not a block")
        self._blocks[number] = bytes(data)

    def read_blocks(self, numbers: Ints) -> npt.NDArray[np.uint8]:
        """Blocks in the order given: uint8[n, block_size]; runs are read at once."""
        size = self.geometry.block_size
        out = np.empty((len(numbers), size), np.uint8)
        order = np.argsort(numbers, kind="stable")
        position = 0
        for start, count in _runs_in_order(numbers[order]):
            raw = self.device.pread(start * size, count * size)
            out[order[position : position + count]] = np.frombuffer(raw, np.uint8).reshape(count, size)
            position += count
        if self._blocks:
            for index in np.flatnonzero(np.isin(numbers, np.fromiter(self._blocks, np.int64))).tolist():
                out[index] = np.frombuffer(self._blocks[int(numbers[index])], np.uint8)
        return out

    # -- block bitmaps ----------------------------------------------------------------------------------

    def block_bitmaps(self) -> SparseBits:
        """All block bitmaps, in rows of blocks_per_group // 8 bytes.

        Row g, bit j is block first_data_block + g * blocks_per_group + j; uninitialised groups are resolved, the
        padding bits of a short last group are set.  Of a filesystem with errors, all bits of unsound groups are set.

        Raises:
            FormatError: A bitmap fails its checksum; names the group.
        """
        return self._used().copy()

    def _used(self) -> SparseBits:
        if self._bitmaps is None:
            self._bitmaps = self._load_bitmaps()
        return self._bitmaps

    def _load_bitmaps(self) -> SparseBits:
        geometry = self.geometry
        row_bytes = geometry.clusters_per_group // 8
        bitmaps = SparseBits(geometry.groups, geometry.blocks_per_group // 8)
        uninitialised, used = self.groups.uninitialised()
        bitmaps.set(used)
        stored = np.setdiff1d(np.arange(geometry.groups), uninitialised)
        if self._by_group:
            self._sound = self.groups.sound()
            stored = stored[self._sound[stored]]
        at = self.groups.column("bg_block_bitmap")
        for some in parts(stored):
            rows = self.read_blocks(at[some])[:, :row_bytes]
            if geometry.has_metadata_csum:
                self._verify_bitmaps(rows, some, "bg_block_bitmap_csum")
            if geometry.cluster_blocks > 1:
                rows = expand_clusters(rows, geometry.cluster_blocks)
            bitmaps.put(some, rows)
        bitmaps.set(self._padding)
        if self._by_group:
            self._sound &= self._plausible(bitmaps)
            unsound = np.flatnonzero(~self._sound) * geometry.blocks_per_group
            whole = np.full_like(unsound, geometry.blocks_per_group)
            bitmaps.set(np.stack([unsound, whole], axis=1))
        return bitmaps

    def _plausible(self, bitmaps: SparseBits) -> npt.NDArray[np.bool_]:
        """bool[groups]: the free count is the descriptor's, and metadata is in use; see `sound_groups`."""
        geometry = self.geometry
        free = np.zeros(geometry.groups, np.int64)
        for some in parts(np.arange(geometry.groups)):
            rows = bitmaps.take(some)
            if geometry.cluster_blocks > 1:
                rows = pack_clusters(rows, geometry.cluster_blocks)
            free[some] = np.bitwise_count(~rows).sum(axis=1, dtype=np.int64)
        plausible = free == self.groups.column("bg_free_blocks_count")
        metadata = self.groups.metadata_runs(self._sound) - np.array([geometry.first_data_block, 0])
        inside = np.minimum(metadata.sum(axis=1), geometry.groups * geometry.blocks_per_group) - metadata[:, 0]
        blocks = expand(metadata[:, 0], inside)
        lost = blocks[~bitmaps.test(blocks)]
        plausible[lost // geometry.blocks_per_group] = False
        return np.asarray(plausible)

    @cached_property
    def _padding(self) -> Ints:
        """Bits of the bitmaps behind the end of the volume: int64[1, 2]."""
        geometry = self.geometry
        end = geometry.blocks_count - geometry.first_data_block
        return np.array([[end, geometry.groups * geometry.blocks_per_group - end]], np.int64)

    def _verify_bitmaps(self, bitmaps: Bits, which: Ints, field: str) -> None:
        expected = self.groups.column(field)[which]
        mask = 0xFFFFFFFF if self.geometry.desc_size >= 64 else 0xFFFF
        seed = self.geometry.checksum_seed
        found = np.array([bitmap_checksum(seed, row.data) & mask for row in bitmaps], np.int64)
        bad = np.flatnonzero(found != expected)
        if self._by_group:
            self._sound[which[bad]] = False
        elif len(bad):
            group = int(which[bad[0]])
            raise FormatError(
                f"the bitmap of group {group} fails its checksum",
                structure="block bitmap",
                offset=int(self.groups.column("bg_block_bitmap")[group]) * self.geometry.block_size,
            )

    def inode_table_unused(self) -> Ints:
        """Runs (start, length) of inode-table blocks that hold no inode yet and may hold anything: int64[n, 2].

        Past bg_itable_unused, in groups without ITABLE_ZEROED, where descriptors have checksums.
        """
        geometry, groups = self.geometry, self.groups
        if not groups.has_checksums or self.has_errors:  # with errors nothing is taken for unused
            return np.zeros((0, 2), np.int64)
        flags = groups.flags
        unused = groups.column("bg_itable_unused")
        unused = np.where(flags & GroupFlags.INODE_UNINIT, geometry.inodes_per_group, unused)
        used = np.clip(geometry.inodes_per_group - unused, 0, geometry.inodes_per_group)
        first = -(-used * geometry.inode_size // geometry.block_size)
        length = geometry.inode_table_blocks - first
        which = (length > 0) & (flags & GroupFlags.INODE_ZEROED == 0)
        start = groups.column("bg_inode_table") + first
        return np.stack([start[which], length[which]], axis=1)

    def set_blocks(self, runs: Ints, used: bool) -> None:
        """Mark runs (start, length) of blocks used or free, in bitmaps, flags and counts.

        With bigalloc the whole clusters that hold them.  Unsound groups are left as they are: what becomes free in
        one is lost until e2fsck finds it.

        Raises:
            FormatError: A block has that state already, or lies outside: the caller's picture is wrong.
        """
        runs = np.asarray(runs, np.int64).reshape(-1, 2)
        runs = runs[runs[:, 1] > 0]
        if not len(runs):
            return
        geometry = self.geometry
        if runs[:, 0].min() < geometry.first_data_block or runs.sum(axis=1).max() > geometry.blocks_count:
            raise FormatError("a block lies outside the volume", structure="block bitmap")
        bitmaps = self._used()
        relative = runs - np.array([geometry.first_data_block, 0])
        if geometry.cluster_blocks > 1:
            relative = whole_clusters(relative, geometry.cluster_blocks)
        if not self._sound.all():
            relative = self._in_sound_groups(relative)
            if not len(relative):
                return
        first = relative[:, 0] // geometry.blocks_per_group
        last = (relative.sum(axis=1) - 1) // geometry.blocks_per_group
        touched = np.unique(expand(first, last - first + 1))
        before = bitmaps.count_rows(touched)
        bitmaps.set(relative, used)
        bitmaps.set(self._padding)
        after = bitmaps.count_rows(touched)
        in_last = geometry.blocks_count - geometry.first_data_block - int(relative.sum(axis=1).max())
        # The last cluster may reach past the end, where the bits are set for good.
        if abs(after - before) != int(relative[:, 1].sum()) + min(in_last, 0):
            state = "used" if used else "free"
            raise FormatError(f"a block that becomes {state} is {state} already", structure="block bitmap")
        self._dirty_groups.update(touched.tolist())

    def _in_sound_groups(self, relative: Ints) -> Ints:
        """The parts of runs that lie in sound groups."""
        per_group = self.geometry.blocks_per_group
        first = relative[:, 0] // per_group
        pieces = (relative.sum(axis=1) - 1) // per_group - first + 1
        group, run = expand(first, pieces), np.repeat(np.arange(len(relative)), pieces)
        low = np.maximum(relative[run, 0], group * per_group)
        high = np.minimum(relative.sum(axis=1)[run], (group + 1) * per_group)
        return np.stack([low, high - low], axis=1)[self._sound[group]]

    def find_free(self, count: int, *, avoid: Sequence[ByteWindows] = (), min_run: int = 1) -> Ints:
        """Up to ``count`` free blocks as runs (start, length), sorted; long runs are preferred.

        With bigalloc whole clusters, so that the count is rounded up to clusters.

        Args:
            count: Blocks wanted; fewer come back where there are not as many.
            avoid: Bitmaps in the same rows, blocks not to take.
            min_run: Shorter runs are left out.
        """
        taken = [self._used(), *avoid]
        geometry = self.geometry
        unit = geometry.cluster_blocks
        size = geometry.blocks_count - geometry.first_data_block
        runs = choose_free(taken, size, -(-count // unit) * unit, unit)
        return np.asarray(runs[runs[:, 1] >= min_run] + np.array([geometry.first_data_block, 0]))

    def allocate_blocks(self, count: int, *avoid: ByteWindows) -> Ints:
        """Take ``count`` blocks that need not stand together; with bigalloc each takes a cluster.

        Args:
            avoid: Bitmaps in the same rows, blocks not to take.

        Returns:
            int64[count], sorted.

        Raises:
            VolumeFull: There are not as many.
        """
        unit = self.geometry.cluster_blocks
        runs = self.find_free(count * unit, avoid=avoid)
        blocks = expand(runs[:, 0] // unit, runs[:, 1] // unit) * unit
        if len(blocks) < count:
            raise VolumeFull(
                f"the volume has only {len(blocks)} blocks that are free and needed by no snapshot, not {count}",
                hint="delete a snapshot, delete files, or grow the volume",
            )
        self.set_blocks(runs, True)
        return np.asarray(blocks)

    # -- inodes -----------------------------------------------------------------------------------------

    def _inode_place(self, ino: int) -> tuple[int, int]:
        geometry = self.geometry
        if not 1 <= ino <= geometry.inodes_count:
            raise FormatError(f"inode {ino} does not exist", structure="inode")
        group, index = divmod(ino - 1, geometry.inodes_per_group)
        table = int(self.groups.column("bg_inode_table")[group])
        block, within = divmod(index * geometry.inode_size, geometry.block_size)
        return table + block, within

    def inode_offset(self, ino: int) -> int:
        """Byte offset of an inode in the volume."""
        block, within = self._inode_place(ino)
        return block * self.geometry.block_size + within

    def inode(self, ino: int) -> Any:
        """One inode, parsed.

        Raises:
            FormatError: It fails its checksum.
        """
        block, within = self._inode_place(ino)
        raw = self.read_block(block)[within : within + self.geometry.inode_size]
        inode = codec.parse(self._inode_struct, raw, f"inode {ino}", block * self.geometry.block_size + within)
        if self.geometry.has_metadata_csum and any(raw):
            found = inode_checksum(self.geometry.checksum_seed, ino, raw)
            wide = len(raw) > BASE_SIZE and inode.get("i_extra_isize", 0) >= 4
            stored = inode.i_checksum_lo | (inode.i_checksum_hi << 16 if wide else 0)
            if stored != (found if wide else found & 0xFFFF):
                raise FormatError(
                    "the checksum is wrong",
                    structure=f"inode {ino}",
                    field="i_checksum_lo",
                    offset=block * self.geometry.block_size + within,
                )
        return inode

    def new_inode(self, ino: int) -> Any:
        """An inode of zeros with the extra area that this filesystem gives new inodes; not written yet."""
        size = self.geometry.inode_size
        inode = codec.parse(self._inode_struct, bytes(size), f"inode {ino}")
        if size >= BASE_SIZE + EXTRA_SIZE:
            inode.i_extra_isize = min(self.superblock.s_want_extra_isize or EXTRA_SIZE, size - BASE_SIZE)
        return inode

    def write_inode(self, ino: int, inode: Any) -> None:
        """Change an inode; its checksum is set."""
        raw = bytearray(codec.build(self._inode_struct, inode, f"inode {ino}"))
        if self.geometry.has_metadata_csum:
            checksum = inode_checksum(self.geometry.checksum_seed, ino, bytes(raw))
            raw[0x7C:0x7E] = (checksum & 0xFFFF).to_bytes(2, "little")
            if len(raw) > BASE_SIZE and inode.i_extra_isize >= 4:
                raw[0x82:0x84] = (checksum >> 16).to_bytes(2, "little")
        block, within = self._inode_place(ino)
        content = bytearray(self.read_block(block))
        content[within : within + len(raw)] = raw
        self.write_block(block, bytes(content))

    def _inode_bitmap(self, group: int) -> bytearray:
        geometry = self.geometry
        size = geometry.inodes_per_group // 8
        if self.groups.flags[group] & GroupFlags.INODE_UNINIT:
            return bytearray(size)
        raw = self.read_block(int(self.groups.column("bg_inode_bitmap")[group]))[:size]
        if geometry.has_metadata_csum:
            mask = 0xFFFFFFFF if geometry.desc_size >= 64 else 0xFFFF
            stored = int(self.groups.column("bg_inode_bitmap_csum")[group])
            if bitmap_checksum(geometry.checksum_seed, raw) & mask != stored:
                raise FormatError(f"the bitmap of group {group} fails its checksum", structure="inode bitmap")
        if self.has_errors:
            free = geometry.inodes_per_group - sum(byte.bit_count() for byte in raw)
            if not self.sound_groups[group] or free != self.groups.column("bg_free_inodes_count")[group]:
                raise FormatError(f"the bitmap of group {group} does not verify", structure="inode bitmap")
        return bytearray(raw)

    def inode_in_use(self, ino: int) -> bool:
        """Whether the inode bitmap has this inode.

        Raises:
            FormatError: The bitmap fails its checksum.
        """
        group, index = divmod(ino - 1, self.geometry.inodes_per_group)
        return bool(self._inode_bitmap(group)[index // 8] >> index % 8 & 1)

    def _put_inode_bitmap(self, group: int, bitmap: bytearray) -> None:
        geometry = self.geometry
        block = int(self.groups.column("bg_inode_bitmap")[group])
        self.write_block(block, bytes(bitmap) + b"\xff" * (geometry.block_size - len(bitmap)))
        one = np.array([group], np.int64)
        if geometry.has_metadata_csum:
            checksum = np.array([bitmap_checksum(geometry.checksum_seed, bytes(bitmap))], np.int64)
            if geometry.desc_size < 64:
                checksum &= 0xFFFF
            self.groups.set_column("bg_inode_bitmap_csum", one, checksum)
        free = geometry.inodes_per_group - sum(byte.bit_count() for byte in bitmap)
        self.groups.set_column("bg_free_inodes_count", one, np.array([free], np.int64))
        self._dirty_descriptors.add(group)

    def allocate_inode(self, *, directory: bool, number: int | None = None, keep: bool = False) -> int:
        """Take a free inode (or exactly ``number``): bitmap, counts, itable_unused; unused table blocks are zeroed.

        With ``keep`` they are not: the inode is there, only the bitmap has lost it.

        Raises:
            VolumeFull: There is none.
        """
        geometry, groups = self.geometry, self.groups
        group = self._group_with_free_inode() if number is None else (number - 1) // geometry.inodes_per_group
        bitmap = self._inode_bitmap(group)
        bits = np.unpackbits(np.frombuffer(bytes(bitmap), np.uint8), bitorder="little")
        if group * geometry.inodes_per_group < geometry.first_inode:
            bits[: geometry.first_inode - 1 - group * geometry.inodes_per_group] = 1
        index = int(np.argmin(bits)) if number is None else (number - 1) % geometry.inodes_per_group
        if bits[index]:
            raise VolumeFull("the volume has no free inode", hint="delete files")
        bitmap[index // 8] |= 1 << index % 8
        if groups.has_checksums:
            self._use_inode_table(group, index, zero=not keep)
        self._put_inode_bitmap(group, bitmap)
        if directory:
            self._count_directory(group, 1)
        return group * geometry.inodes_per_group + index + 1

    def _group_with_free_inode(self) -> int:
        free = self.groups.column("bg_free_inodes_count")
        # The first group may count reserved inodes as used only; a group in use already needs no zeroing.
        for which in (
            (free > 0) & (self.groups.flags & GroupFlags.INODE_UNINIT == 0),
            free > 0,
        ):
            if which.any() and not self.has_errors:
                return int(np.argmax(which))
            for group in np.flatnonzero(which & self.sound_groups).tolist():  # with errors: the first that verifies
                with contextlib.suppress(FormatError):
                    self._inode_bitmap(group)
                    return int(group)
        raise VolumeFull("the volume has no free inode", hint="delete files")

    def _use_inode_table(self, group: int, index: int, *, zero: bool) -> None:
        """Move bg_itable_unused behind ``index``; table blocks that come into use are zeroed where they may not be."""
        geometry, groups = self.geometry, self.groups
        one = np.array([group], np.int64)
        flags = int(groups.flags[group])
        unused = int(groups.column("bg_itable_unused")[group])
        if flags & GroupFlags.INODE_UNINIT:
            unused = geometry.inodes_per_group
        used = geometry.inodes_per_group - unused
        if index >= used:
            if zero and not flags & GroupFlags.INODE_ZEROED:
                table = int(groups.column("bg_inode_table")[group])
                first = -(-used * geometry.inode_size // geometry.block_size)
                last = index * geometry.inode_size // geometry.block_size
                for block in range(table + first, table + last + 1):
                    self.write_block(block, bytes(geometry.block_size))
            groups.set_column("bg_itable_unused", one, np.array([geometry.inodes_per_group - index - 1], np.int64))
        if flags & GroupFlags.INODE_UNINIT:
            groups.clear_flag(one, GroupFlags.INODE_UNINIT)

    def _count_directory(self, group: int, change: int) -> None:
        count = self.groups.column("bg_used_dirs_count")[group] + change
        self.groups.set_column("bg_used_dirs_count", np.array([group]), np.array([count], np.int64))
        self._dirty_descriptors.add(group)

    def free_inode(self, ino: int, *, directory: bool) -> None:
        """Give an inode back; the caller has written it as deleted."""
        group, index = divmod(ino - 1, self.geometry.inodes_per_group)
        bitmap = self._inode_bitmap(group)
        bitmap[index // 8] &= ~(1 << index % 8)
        self._put_inode_bitmap(group, bitmap)
        if directory:
            self._count_directory(group, -1)

    # -- file mappings ----------------------------------------------------------------------------------

    @property
    def _uses_extents(self) -> bool:
        return bool(self.superblock.s_feature_incompat & Incompat.extent)

    def _seed(self, ino: int, inode: Any) -> int | None:
        if not self.geometry.has_metadata_csum:
            return None
        return inode_seed(self.geometry.checksum_seed, ino, inode.i_generation)

    def file_map(self, ino: int) -> FileMap:
        """Where a file's blocks are.

        Raises:
            FormatError: The mapping is damaged.
            UnsupportedFeature: The data is inline.
        """
        inode = self.inode(ino)
        if inode.i_flags & InodeFlags.INLINE_DATA:
            raise UnsupportedFeature(f"inode {ino} has inline data", hint="this release cannot read it")
        geometry = self.geometry
        if inode.i_flags & InodeFlags.EXTENTS:
            return parse_extents(inode.i_block, self.read_blocks, geometry.blocks_count, self._seed(ino, inode))
        return parse_indirect(inode.i_block, self.read_blocks, geometry.blocks_count, geometry.block_size)

    @property
    def largest_file(self) -> int:
        """Blocks that one file can have here, as `set_file_map` maps it.

        The least of: what i_block can map (32-bit logical blocks, or indirect blocks to the third level), what
        i_blocks can count without huge_file, and 2 GiB - 1 without large_file.
        """
        size = self.geometry.block_size
        each = size // 4
        limits = [0xFFFFFFFF if self._uses_extents else DIRECT + each + each**2 + each**3]
        features = self.superblock.s_feature_ro_compat
        if not features & RoCompat.huge_file:
            sectors = 0xFFFFFFFF // (size // 512)
            limits.append(sectors - sectors // each - each if self._uses_extents else sectors - 2 * (sectors // each))
        if not features & RoCompat.large_file:
            limits.append(0x7FFFFFFF // size)
        return min(limits)

    def mapping_blocks_needed(self, data: Ints) -> int:
        """Blocks of extent nodes or indirect blocks that a new mapping of ``data`` takes."""
        count = extent_nodes if self._uses_extents else indirect_nodes
        return count(np.asarray(data, np.int64), self.geometry.block_size)

    def set_file_map(self, ino: int, data: Ints, mapping_blocks: Ints, size_bytes: int) -> None:
        """Give a file the blocks ``data`` (rows logical, physical, length), its nodes in ``mapping_blocks``.

        Sets i_block, i_size and i_blocks; bitmaps are the caller's (`set_blocks`).
        """
        inode = self.inode(ino)
        geometry = self.geometry
        data = np.asarray(data, np.int64)
        if self._uses_extents:
            root, nodes = build_extents(data, mapping_blocks, geometry.block_size, self._seed(ino, inode))
            inode.i_flags |= InodeFlags.EXTENTS
        else:
            root, nodes = build_indirect(data, mapping_blocks, geometry.block_size)
        for block, content in nodes.items():
            self.write_block(block, content)
        inode.i_block = root
        inode.i_size_lo, inode.i_size_high = size_bytes & 0xFFFFFFFF, size_bytes >> 32
        before = self.allocated_bytes(ino)
        clusters = count_clusters(data, geometry.cluster_blocks) + len(mapping_blocks)
        attributes = 1 if inode.i_file_acl_lo or inode.i_file_acl_high else 0
        sectors = (clusters + attributes) * geometry.cluster_blocks * (geometry.block_size // 512)
        if sectors >> (48 if self.superblock.s_feature_ro_compat & RoCompat.huge_file else 32):
            raise VolumeFull(f"inode {ino} cannot count {sectors} sectors", hint="add the feature huge_file")
        inode.i_blocks_lo, inode.i_blocks_high = sectors & 0xFFFFFFFF, sectors >> 32
        inode.i_flags &= ~InodeFlags.HUGE_FILE
        self.write_inode(ino, inode)
        charge(self, inode, sectors * 512 - before)

    def allocated_bytes(self, ino: int) -> int:
        """What a file takes by its i_blocks."""
        inode = self.inode(ino)
        count: int = inode.i_blocks_lo | inode.i_blocks_high << 32
        return count * (self.geometry.block_size if inode.i_flags & InodeFlags.HUGE_FILE else 512)

    @cached_property
    def journal(self) -> Journal | None:
        """The internal journal, or None."""
        sb = self.superblock
        if not sb.s_feature_compat & Compat.has_journal or not sb.s_journal_inum:
            return None
        data = self.file_map(sb.s_journal_inum).data
        if not len(data) or data[0, 0] != 0:
            raise FormatError("the journal has no first block", structure="journal")
        return Journal.parse(data, self.read_block(int(data[0, 1])), int(data[0, 1]) * self.geometry.block_size)

    # -- directories ------------------------------------------------------------------------------------

    def lookup_in(self, directory_ino: int, name: bytes) -> int | None:
        """Inode number of a name in a directory, or None."""
        from extsnap.ext import directory

        return directory.lookup(self, directory_ino, name)

    def lookup(self, path: str) -> int | None:
        """Inode number of an absolute path, or None."""
        ino = ROOT_INODE
        for name in path.split("/"):
            if name:
                found = self.lookup_in(ino, name.encode())
                if found is None:
                    return None
                ino = found
        return ino

    def add_entry(self, directory_ino: int, name: bytes, ino: int, file_type: int) -> list[int]:
        """Add a name to a directory; returns blocks that the directory grew by."""
        from extsnap.ext import directory

        return directory.add_entry(self, directory_ino, name, ino, file_type)

    def remove_entry(self, directory_ino: int, name: bytes) -> None:
        """Remove a name from a directory."""
        from extsnap.ext import directory

        directory.remove_entry(self, directory_ino, name)

    def new_directory_block(self, ino: int, parent: int) -> bytes:
        """The first block of an empty directory."""
        from extsnap.ext import directory

        return directory.new_directory_block(self, ino, parent)

    # -- writing ----------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write everything that changed: bitmaps, descriptors, inodes, blocks, superblock."""
        device = cast(Device, self.device)
        geometry, groups = self.geometry, self.groups
        size = geometry.block_size
        if self._dirty_groups and self._bitmaps is not None:
            touched = np.array(sorted(self._dirty_groups), np.int64)
            rows = self._bitmaps.take(touched)
            if geometry.cluster_blocks > 1:
                rows = pack_clusters(rows, geometry.cluster_blocks)
            free = geometry.clusters_per_group - np.bitwise_count(rows).sum(axis=1, dtype=np.int64)
            groups.set_column("bg_free_blocks_count", touched, free)
            groups.clear_flag(touched, GroupFlags.BLOCK_UNINIT)
            if geometry.has_metadata_csum:
                mask = 0xFFFFFFFF if geometry.desc_size >= 64 else 0xFFFF
                checksums = [bitmap_checksum(geometry.checksum_seed, row.data) & mask for row in rows]
                groups.set_column("bg_block_bitmap_csum", touched, np.array(checksums, np.int64))
            padding = b"\xff" * (size - rows.shape[1])
            for block, row in zip(groups.column("bg_block_bitmap")[touched].tolist(), rows, strict=True):
                self.write_block(block, row.tobytes() + padding)
        changed = self._dirty_groups | self._dirty_descriptors
        if changed:
            groups.seal(np.array(sorted(changed), np.int64))
            table = groups.raw.reshape(-1)
            per_block = size // geometry.desc_size
            for index in sorted({group // per_block for group in changed}):
                piece = table[index * size : (index + 1) * size].tobytes()
                device.pwrite(int(geometry.descriptor_blocks[index]) * size, piece)
            self.sum_counts()
            self.write_superblock()
        for block, content in sorted(self._blocks.items()):
            device.pwrite(block * size, content)
        self._blocks = {}
        self._dirty_groups, self._dirty_descriptors = set(), set()

    def seal_unsound(self) -> None:
        """Have unsound groups say that all of their blocks are used, bitmap, count and checksum; written by `flush`.

        For e2fsck to sort out: no block of a file can be taken for free meanwhile.
        """
        self._used()
        unsound = np.flatnonzero(~self._sound)
        self._sound = np.ones_like(self._sound)
        self._dirty_groups.update(unsound.tolist())

    def sum_counts(self) -> None:
        """Make the superblock's free counts the sums of the descriptors'; not written yet.

        With errors the descriptors of unsound groups count nothing: the superblock's counts move by what was edited.
        """
        sb = self.superblock
        blocks = self.groups.column("bg_free_blocks_count").sum()
        inodes = self.groups.column("bg_free_inodes_count").sum()
        unit = self.geometry.cluster_blocks
        free, free_inodes = int(blocks) * unit, int(inodes)
        if self.has_errors:
            blocks_before, inodes_before = self._counts_at_open
            free = max(0, self.geometry.free_blocks + int(blocks - blocks_before) * unit)
            free_inodes = max(0, self.geometry.free_inodes + int(inodes - inodes_before))
        sb.s_free_blocks_count_lo = free & 0xFFFFFFFF
        if sb.s_feature_incompat & Incompat.bit64:
            sb.s_free_blocks_count_hi = free >> 32
        sb.s_free_inodes_count = free_inodes

    def write_superblock(self) -> None:
        """Write the superblock as it was edited, its checksum set."""
        sb = self.superblock
        raw = codec.build(Superblock, sb, "superblock")
        if self.geometry.has_metadata_csum:
            sb.s_checksum = superblock_checksum(raw)
            raw = codec.build(Superblock, sb, "superblock")
        cast(Device, self.device).pwrite(OFFSET, raw)


def _runs_in_order(sorted_numbers: Ints) -> list[tuple[int, int]]:
    """(start, count) of runs in a sorted array; a number that stands twice begins a run of its own."""
    unique = not (sorted_numbers[1:] == sorted_numbers[:-1]).any()
    runs = runs_of(sorted_numbers) if unique else np.stack([sorted_numbers, np.ones_like(sorted_numbers)], axis=1)
    return [(int(start), int(count)) for start, count in runs]
