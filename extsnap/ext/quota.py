"""Usage in the quota files: what e2fsck compares with what the files of each owner take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extsnap.errors import FormatError
from extsnap.ondisk import codec
from extsnap.ondisk.quota import (
    BLOCK_SIZE,
    DEPTH,
    MAGICS,
    ROOT_BLOCK,
    VERSION,
    QuotaEntry,
    QuotaHeader,
    QuotaLeafHeader,
)

if TYPE_CHECKING:
    from extsnap.ext.filesystem import Filesystem

_HEADER, _ENTRY = QuotaLeafHeader.sizeof(), QuotaEntry.sizeof()


class QuotaFile:
    """One quota file, read and written through the filesystem's blocks."""

    def __init__(self, fs: Filesystem, ino: int, kind: int) -> None:
        """Open the file of inode ``ino``.

        Args:
            kind: 0 for users, 1 for groups, 2 for projects.

        Raises:
            FormatError: It is none.
        """
        self._fs = fs
        self._name = f"quota file (inode {ino})"
        self._data = fs.file_map(ino).data
        header = codec.parse(QuotaHeader, self._block(0)[: QuotaHeader.sizeof()], self._name)
        if header.dqh_magic != MAGICS[kind] or header.dqh_version != VERSION:
            raise FormatError("magic or version is wrong", structure=self._name)
        self._blocks = header.dqi_blocks

    def _place(self, number: int) -> tuple[int, int]:
        """(block of the volume, offset in it) of a block of the quota tree."""
        size = self._fs.geometry.block_size
        logical, within = divmod(number * BLOCK_SIZE, size)
        for start, physical, length in self._data.tolist():  # a handful of extents
            if start <= logical < start + length:
                return physical + logical - start, within
        raise FormatError(f"block {number} of the tree is not mapped", structure=self._name)

    def _block(self, number: int) -> bytes:
        block, within = self._place(number)
        return self._fs.read_block(block)[within : within + BLOCK_SIZE]

    def charge(self, owner: int, space: int, inodes: int) -> None:
        """Add to the usage of an ID.

        Args:
            space: Bytes, negative to take away.
            inodes: Likewise.

        Raises:
            FormatError: The tree is damaged, or has no entry for the ID, or would count below zero.
        """
        number = ROOT_BLOCK
        for level in range(DEPTH):
            index = owner >> 8 * (DEPTH - 1 - level) & 0xFF
            number = int.from_bytes(self._block(number)[4 * index : 4 * index + 4], "little")
            if not ROOT_BLOCK < number < self._blocks:
                raise FormatError(f"has no entry for ID {owner}", structure=self._name)
        block, within = self._place(number)
        content = bytearray(self._fs.read_block(block))
        for at in range(within + _HEADER, within + BLOCK_SIZE - _ENTRY + 1, _ENTRY):
            raw = bytes(content[at : at + _ENTRY])
            entry: Any = codec.parse(QuotaEntry, raw, self._name)
            if entry.dqb_id != owner or not any(raw):
                continue
            entry.dqb_curspace += space
            entry.dqb_curinodes += inodes
            if entry.dqb_curspace < 0 or entry.dqb_curinodes < 0:
                raise FormatError(f"counts less for ID {owner} than its files take", structure=self._name)
            content[at : at + _ENTRY] = codec.build(QuotaEntry, entry, self._name)
            self._fs.write_block(block, bytes(content))
            return
        raise FormatError(f"has no entry for ID {owner}", structure=self._name)


def charge(fs: Filesystem, inode: Any, space: int, inodes: int = 0) -> None:
    """Charge the owners of a file, wherever quota is kept.

    Args:
        inode: Tells user, group and project.
        space: Bytes added, negative for bytes given back.
        inodes: Files added.
    """
    if not space and not inodes:
        return
    owners = (
        inode.i_uid | inode.i_uid_high << 16,
        inode.i_gid | inode.i_gid_high << 16,
        inode.get("i_projid", 0),
    )
    for kind, (ino, owner) in enumerate(zip(fs.quota_inodes, owners, strict=True)):
        if ino:
            QuotaFile(fs, ino, kind).charge(owner, space, inodes)
