"""Orphans: files that were open, but no longer had a name, when the filesystem stopped being written.

Three places hold them: a list that begins in the superblock and goes on in ``i_dtime``; the orphan file, of
``orphan_file`` filesystems; without a journal there is none, and the inode alone tells: in use, without a link
or a time of deletion.
"""

from __future__ import annotations

import numpy as np

from extsnap.arrays import Bits, Ints, expand
from extsnap.errors import FormatError
from extsnap.ext.filesystem import Filesystem
from extsnap.ondisk.checksum import inode_seed, orphan_block_checksum
from extsnap.ondisk.group import GroupFlags
from extsnap.ondisk.superblock import Compat, RoCompat, State

#: The tail of a block of the orphan file: magic and checksum.
_TAIL_BYTES = 8
_MODE, _DTIME, _LINKS = 0x00, 0x14, 0x1A


def unlinked(fs: Filesystem, inodes: list[int]) -> list[int]:
    """Those of `waiting` that have no name; the others are only being truncated.

    Raises:
        FormatError: An inode is damaged.
    """
    return [ino for ino in inodes if not fs.inode(ino).i_links_count]


def prepare_release(fs: Filesystem) -> None:
    """Edit a scratch copy so that ``e2fsck -p`` on it releases the orphans and mends nothing else; flushed.

    Wherever the orphans were, all are on the superblock's list afterwards.  Marks that would make e2fsck check (and
    mend) everything are taken off, and the superblock's counts, which are right after an unmount only, are
    those of the descriptors, as e2fsck makes them without a word.

    Raises:
        FormatError: As `waiting`.
    """
    sb = fs.superblock
    following = 0
    for ino in waiting(fs):
        inode = fs.inode(ino)
        inode.i_dtime = following
        fs.write_inode(ino, inode)
        following = ino
    sb.s_last_orphan = following
    for block in orphan_file_blocks(fs).tolist():
        _empty(fs, block)
    sb.s_feature_ro_compat &= ~RoCompat.orphan_present
    if not sb.s_state & State.VALID:
        fs.sum_counts()
    sb.s_state = State.VALID
    sb.s_mnt_count = 0
    sb.s_checkinterval = 0
    fs.flush()
    fs.write_superblock()


def orphan_file_blocks(fs: Filesystem) -> Ints:
    """The blocks of the orphan file; none without one."""
    sb = fs.superblock
    if not sb.s_feature_compat & Compat.orphan_file or not sb.s_orphan_file_inum:
        return np.zeros(0, np.int64)
    data = fs.file_map(sb.s_orphan_file_inum).data
    return expand(data[:, 1], data[:, 2])


def waiting(fs: Filesystem) -> list[int]:
    """Inodes that wait for e2fsck or the next mount, in no order.

    Raises:
        FormatError: The list, the orphan file or an inode is damaged.
    """
    if not fs.superblock.s_feature_compat & Compat.has_journal and not fs.superblock.s_last_orphan:
        return _unlinked(fs)
    return list(dict.fromkeys([*_listed(fs), *_in_file(fs)]))


def _listed(fs: Filesystem) -> list[int]:
    """The list of the superblock.

    Raises:
        FormatError: It names an inode twice, or one that does not exist.
    """
    found: list[int] = []
    seen: set[int] = set()
    ino = int(fs.superblock.s_last_orphan)
    while ino:
        if ino in seen:
            raise FormatError(f"inode {ino} is in it twice", structure="orphan list")
        found.append(ino)
        seen.add(ino)
        ino = int(fs.inode(ino).i_dtime)
    return found


def _in_file(fs: Filesystem) -> list[int]:
    """The inodes that the orphan file names; empty slots are zeros."""
    blocks = fs.read_blocks(orphan_file_blocks(fs))
    numbers = blocks[:, :-_TAIL_BYTES].copy().view("<u4").reshape(-1)
    return [int(ino) for ino in numbers[numbers != 0]]


def _empty(fs: Filesystem, block: int) -> None:
    """Clear a block of the orphan file."""
    ino = int(fs.superblock.s_orphan_file_inum)
    raw = bytes(fs.geometry.block_size - _TAIL_BYTES) + fs.read_block(block)[-_TAIL_BYTES:]
    if fs.geometry.has_metadata_csum:
        seed = inode_seed(fs.geometry.checksum_seed, ino, fs.inode(ino).i_generation)
        raw = raw[:-4] + orphan_block_checksum(seed, block, raw).to_bytes(4, "little")
    fs.write_block(block, raw)


def _unlinked(fs: Filesystem) -> list[int]:
    """Inodes in use without a link or a time of deletion; a group's table at a time."""
    geometry, groups = fs.geometry, fs.groups
    per_group, size = geometry.inodes_per_group, geometry.inode_size
    tables = groups.column("bg_inode_table")
    unused = groups.column("bg_itable_unused") if groups.has_checksums else np.zeros(geometry.groups, np.int64)
    found: list[int] = []
    for group in np.flatnonzero((groups.flags & GroupFlags.INODE_UNINIT) == 0).tolist():
        count = per_group - int(unused[group])
        blocks = -(-count * size // geometry.block_size)
        raw: Bits = fs.read_blocks(int(tables[group]) + np.arange(blocks)).reshape(-1)[: count * size]
        table = raw.reshape(count, size)
        used = (table[:, _MODE : _MODE + 2] != 0).any(axis=1)
        used &= (table[:, _DTIME : _DTIME + 4] == 0).all(axis=1) & (table[:, _LINKS : _LINKS + 2] == 0).all(axis=1)
        numbers = np.flatnonzero(used) + group * per_group + 1
        found += [int(ino) for ino in numbers if ino >= geometry.first_inode and fs.inode_in_use(int(ino))]
    return found
