"""What is refused from above: a write after which the filesystem would no longer own the store's blocks.

The engine lets no write reach the store's data.  A tool that moves, frees or removes the store writes elsewhere
(a shrinking resize2fs copies its blocks and rewrites its inode, `rm` only unlinks it), so the few bytes by which
the filesystem knows the store are watched:

    superblock            magic and s_blocks_count
    group descriptors     bg_inode_table of the groups with the two inodes
    the two inodes        mode, size, links, i_block
    the store's nodes     whole blocks
    its directory         the one block

A write that leaves these bytes as they are passes: filesystems write inodes by the block, neighbours included.
Any other is tried on an overlay first, and passes if the store has all of its data blocks and its one name there.
The kernel may have given it more (`growth`).  What it changed of the map reaches these blocks some time later, in any
order, and a node that it does without may be anything by then.  A map that is whole says nothing: it may be one of
before.  So from a growth on until all is known to be at home (`Growth.unsettled`) a map that is not whole passes too,
if the file is as long as the store: the engine lets nobody write to the store's data meanwhile.
Flags, times and owners are nobody's business here, and the bitmaps are not watched: `Volume.end_serving` puts
the store's bits back, and a write to a block that was given away in between hits the engine's own refusal.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints
from extsnap.blockdev.base import Buffer, Pieces
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import ExtsnapError, FormatError, StoreProtected
from extsnap.ext.directory import parse_block
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.mapping import parse_extents, parse_indirect
from extsnap.ondisk import codec
from extsnap.ondisk.inode import BASE_SIZE, InodeFlags, inode_struct
from extsnap.snapshot import graft
from extsnap.snapshot.medium import MAGIC, PRIMARY_OFFSET

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

_MAGIC = PRIMARY_OFFSET + 0x38, PRIMARY_OFFSET + 0x3A
_COUNT_LOW = PRIMARY_OFFSET + 0x4, PRIMARY_OFFSET + 0x8
_COUNT_HIGH = PRIMARY_OFFSET + 0x150, PRIMARY_OFFSET + 0x154
#: Parts of an inode: i_mode, i_size_lo, i_links_count, i_block, i_size_high.
_INODE_PARTS = ((0x0, 0x2), (0x4, 0x8), (0x1A, 0x1C), (0x28, 0x64), (0x6C, 0x70))
#: Parts of a descriptor: bg_inode_table, low and high.
_TABLE_PARTS = ((0x8, 0xC), (0x28, 0x2C))
_INCOMPAT_64BIT = 0x80


class Warden:
    """Judges the writes that reach a served volume with snapshots.

    Attributes:
        refused: How many writes were refused.
        moved: Whether watched bytes were changed since they were located.
    """

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.refused = 0
        self.moved = False
        self._watch([])
        self._tables: set[int] = set()
        self._inodes: list[int] = []
        self._nodes: set[int] = set()
        self.locate()

    def locate(self) -> None:
        """Find the watched bytes where the filesystem has them now.

        A filesystem that makes no sense at the moment (resize2fs writes a superblock in pieces) leaves them as they
        were, and the next write to them has it tried again; so does an error of the host.

        Raises:
            OSError: The host cannot read it.
        """
        self.moved = True
        root = self._volume.require_store().root
        try:
            fs = self._volume.filesystem()
            tables = _table_parts(fs, (root.store_inode, root.directory_inode))
            inodes = [fs.inode_offset(number) for number in (root.store_inode, root.directory_inode)]
        except ExtsnapError:
            return
        parts = [*tables, *((at + low, at + high) for at in inodes for low, high in _INODE_PARTS)]
        size = fs.geometry.block_size
        nodes = set(root.mapping.tolist())
        with contextlib.suppress(ExtsnapError):  # on its way from the journal, the map may not be whole at home yet
            nodes |= set(fs.file_map(root.store_inode).mapping.tolist())
        self._nodes = {block * size for block in nodes}
        blocks = [root.directory_block, *nodes]
        parts += [(block * size, (block + 1) * size) for block in blocks]
        parts += [_MAGIC, _COUNT_LOW, _COUNT_HIGH]
        parts.sort()
        self._watch(parts)
        self._tables, self._inodes = {start for start, _ in tables}, inodes
        self.moved = False

    def _watch(self, parts: list[tuple[int, int]]) -> None:
        """Watch sorted ranges (start, end) of bytes."""
        self._starts, self._ends = [start for start, _ in parts], [end for _, end in parts]
        nowhere = 1 << 62  # behind the last one
        self._watched = np.array([*self._starts, nowhere]), np.array(self._ends, np.int64)

    def watches(self, writes: Pieces) -> bool:
        """Whether any of the writes has watched bytes, and so has to be judged by itself."""
        starts, ends = self._watched
        return bool((starts[np.searchsorted(ends, writes.offsets, "right")] < writes.offsets + writes.lengths).any())

    def examine(self, offset: int, data: Buffer) -> None:
        """Judge a write before it is made.

        Raises:
            StoreProtected: It would drop or move a block of the store, or unlink it.
        """
        index = bisect_right(self._ends, offset)
        if index >= len(self._starts) or self._starts[index] >= offset + len(data):
            return
        if self.moved:  # first of all the watched bytes may be elsewhere now
            self.locate()
        view, base = memoryview(data), self._volume.base
        changed = []
        index = bisect_right(self._ends, offset)
        while index < len(self._starts) and self._starts[index] < offset + len(view):
            low, high = max(self._starts[index], offset), min(self._ends[index], offset + len(view))
            if base.pread(low, high - low) != view[low - offset : high - offset]:
                changed.append(self._starts[index])
            index += 1
        if changed:
            self._judge(offset, view, changed)

    def examine_punch(self, offset: int, length: int) -> None:
        """Judge a punch: nobody zeroes any of these bytes in good faith.

        Raises:
            StoreProtected: It would zero watched bytes that are not zero.
        """
        index = bisect_right(self._ends, offset)
        while index < len(self._starts) and self._starts[index] < offset + length:
            low, high = max(self._starts[index], offset), min(self._ends[index], offset + length)
            freed = self._unsettled and self._starts[index] in self._nodes  # a node that the kernel does without
            if not freed and any(self._volume.base.pread(low, high - low)):
                raise self._refusal(low, "would zero what says where the store is")
            index += 1

    def _judge(self, offset: int, data: memoryview, changed: list[int]) -> None:
        volume = self._volume
        root = volume.require_store().root
        overlay = Overlay(volume.base, volume.block_size)
        overlay.pwrite(offset, data)
        if changed[0] < PRIMARY_OFFSET + 1024:
            end = int(root.allocation_runs().sum(axis=1).max())
            count = _blocks_count(overlay.pread(PRIMARY_OFFSET, 1024))
            if count < end:
                raise self._refusal(offset, f"would end the filesystem at block {count}, before the store")
            changed = [at for at in changed if at >= PRIMARY_OFFSET + 1024]
        if not changed:
            return
        self.moved = True  # the next write finds where things are then
        if self._tables.issuperset(changed):
            return  # inode tables that move (a growing resize2fs): descriptors and superblock need not agree yet
        try:
            wrong = self._wrong_with(overlay, changed)
        except ExtsnapError as error:
            wrong = error.message
        if wrong:
            raise self._refusal(offset, f"would take the store from the filesystem ({wrong})")

    def _wrong_with(self, overlay: Overlay, changed: list[int]) -> str:
        """What is wrong with the store on ``overlay``; empty if nothing is.

        Reads the bytes themselves: while a tool rewrites a volume (checksums off, another size of descriptors)
        superblock, descriptors and checksums need not agree.

        Raises:
            FormatError: The map or the directory is none.
        """
        root, size = self._volume.require_store().root, self._volume.block_size
        store, directory = (
            codec.parse(inode_struct(BASE_SIZE), overlay.pread(at, BASE_SIZE), "inode") for at in self._inodes
        )
        if store.i_mode & graft.S_IFMT != graft.S_IFREG or not store.i_links_count:
            return "its inode is no file"
        if directory.i_mode & graft.S_IFMT != graft.S_IFDIR or not directory.i_links_count:
            return "its directory is none"

        def read(blocks: Ints) -> npt.NDArray[np.uint8]:
            raw = b"".join(overlay.pread(block * size, size) for block in blocks.tolist())
            return np.frombuffer(raw, np.uint8).reshape(len(blocks), size)

        end = overlay.size // size
        whole = False
        try:
            if store.i_flags & InodeFlags.EXTENTS:
                data = parse_extents(store.i_block, read, end, None).data
            else:
                data = parse_indirect(store.i_block, read, end, size).data
            whole = graft.has_all(data, root.extents)
        except FormatError:
            if not self._unsettled:
                raise
        # The inode that is at home may be one of before; one that comes now is not.
        comes = any(self._inodes[0] <= at < self._inodes[0] + BASE_SIZE for at in changed)
        cut = comes and store.i_size_lo | store.i_size_high << 32 < root.size_blocks * size
        if not whole and (cut or not self._unsettled):
            return "its blocks are others"
        entries = parse_block(overlay.pread(root.directory_block * size, size), has_tail=False)
        if (root.store_inode, graft.FILE_NAME) not in {(entry.inode, entry.name) for entry in entries}:
            return "it has no name"
        return ""

    @property
    def _unsettled(self) -> bool:
        growth = self._volume.growth
        return growth is not None and growth.unsettled

    def _refusal(self, offset: int, what: str) -> StoreProtected:
        self.refused += 1
        return StoreProtected(
            f"a write at byte {offset} {what}; it was refused, and no snapshot is damaged",
            hint="leave /.extsnap alone, or remove it with extsnap strip",
        )


def _table_parts(fs: Filesystem, numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Byte ranges in the descriptors that say where the inode tables of ``numbers`` are; each once."""
    geometry = fs.geometry
    per_block = geometry.block_size // geometry.desc_size
    parts = set()
    for group in {(number - 1) // geometry.inodes_per_group for number in numbers}:
        at = int(geometry.descriptor_blocks[group // per_block]) * geometry.block_size
        at += group % per_block * geometry.desc_size
        parts |= {(at + low, at + high) for low, high in _TABLE_PARTS if high <= geometry.desc_size}
    return sorted(parts)


def _blocks_count(raw: bytes) -> int:
    """s_blocks_count of a superblock that may be half written; 0 for what is none."""
    if raw[0x38:0x3A] != MAGIC:
        return 0
    high = int.from_bytes(raw[0x60:0x64], "little") & _INCOMPAT_64BIT
    return int.from_bytes(raw[4:8], "little") | (int.from_bytes(raw[0x150:0x154], "little") << 32 if high else 0)
