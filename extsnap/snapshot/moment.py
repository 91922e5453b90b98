"""Moments of a volume: which blocks a snapshot taken now preserves, and whether it is what it was at rest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from extsnap.arrays import Ints
from extsnap.errors import NeedsRecovery, VolumeDirty
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import format as fmt
from extsnap.snapshot import hidden
from extsnap.sparsebits import SparseBits, parts

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume


def left_undone(fs: Filesystem) -> str:
    """What must be done before the bitmaps can be believed, as the end of a sentence; empty if nothing.

    A filesystem that is only marked with errors has nothing left undone: its bitmaps are verified group by group.
    """
    if fs.needs_recovery:
        return "needs journal recovery"
    if not fs.is_clean and not fs.has_errors:
        return "was not cleanly unmounted"
    return ""


def is_at_rest(fs: Filesystem) -> bool:
    """Whether nothing is left to replay, as in a filesystem that is frozen; without a journal it is taken on trust."""
    return not fs.needs_recovery and (fs.journal is None or fs.journal.is_empty)


def how_to_repair(name: str) -> str:
    """The hint of every message about a filesystem that needs e2fsck: it goes through the write path."""
    return f"run extsnap run {name} -- e2fsck -fy {{}}"


def require_clean(fs: Filesystem, name: str) -> None:
    """Refuse a filesystem whose bitmaps cannot be believed yet.

    Args:
        fs: The filesystem.
        name: What messages and the command line call the volume.

    Raises:
        NeedsRecovery: The journal must be replayed.
        VolumeDirty: It was not cleanly unmounted.
    """
    undone = left_undone(fs)
    if undone:
        kind = NeedsRecovery if fs.needs_recovery else VolumeDirty
        raise kind(f"{name} {undone}", hint=how_to_repair(name))


def in_use(fs: Filesystem, rows: int, row_bytes: int, shift: int, blocks: int, *, crash: bool = False) -> SparseBits:
    """Used blocks by ext's bitmaps, and those that no bitmap covers; arguments as of `preserved`."""
    geometry = fs.geometry
    if crash:
        from extsnap.ext.crash import used_after_crash

        found = used_after_crash(fs)
    else:
        found = fs.block_bitmaps()
    bits = found.reshaped(rows, row_bytes, 1 if shift else 0)
    bits.set(np.array([[shift, geometry.first_data_block]], np.int64))
    end = rows * row_bytes * 8
    bits.set(np.array([[geometry.blocks_count + shift, end - geometry.blocks_count - shift]], np.int64))
    bits.set(np.array([[blocks + shift, end - blocks - shift]], np.int64), False)
    return bits


def preserved(
    fs: Filesystem, rows: int, row_bytes: int, shift: int, blocks: int, owned: Ints, *, crash: bool = False
) -> SparseBits:
    """What a snapshot taken now preserves, in ``rows`` of ``row_bytes``, by position (block + shift).

    Used blocks by ext's bitmaps, the blocks that no bitmap covers (before s_first_data_block, past
    s_blocks_count), and the store's mapping blocks; without the store's data, the data of an empty journal,
    and inode-table blocks that the descriptors call unused.

    After a ``crash`` (a filesystem that is written to and was not brought to rest) a block is used if it is by the
    bitmaps or once the journal is replayed, and nothing is taken for unused; where that cannot be told, all are used.

    Args:
        fs: The filesystem: clean, frozen, or with ``crash`` opened leniently.
        rows, row_bytes, shift: Layout of group rows (see `history`).
        blocks: Blocks of the device, a ragged last one included.
        owned: Physical runs (start, length) of the store's data.
    """
    bits = in_use(fs, rows, row_bytes, shift, blocks, crash=crash)
    move = np.array([shift, 0], np.int64)
    bits.set(owned + move, False)
    if not crash:
        bits.set(fs.inode_table_unused() + move, False)
    journal = fs.journal
    if journal is not None and journal.is_empty:
        bits.set(journal.data_runs + move, False)
    bits.tidy()
    return bits


def fingerprint(fs: Filesystem) -> bytes:
    """32 bytes that change when anybody writes to the volume's metadata at rest.

    Covers the superblock, the group descriptors (whose checksums cover the bitmaps), the journal's superblock,
    and the bitmaps themselves where descriptors have no checksums of them.
    """
    digest = hashlib.blake2b(digest_size=32)
    geometry = fs.geometry
    size = geometry.block_size
    digest.update(fs.device.pread(1024, 1024))
    digest.update(fs.read_blocks(geometry.descriptor_blocks).tobytes())
    if fs.journal is not None:
        digest.update(fs.device.pread(fs.journal.superblock_block * size, 1024))
    if not geometry.has_metadata_csum:
        bitmaps = fs.block_bitmaps()
        for some in parts(np.arange(bitmaps.rows)):
            digest.update(bitmaps.take(some).data)
    return digest.digest()


def detect_outside_write(volume: Volume) -> None:
    """Find out whether anybody wrote to a volume with snapshots at rest, or took its mark away."""
    root = volume.require_store().root
    if not volume.require_engine().snapshots:
        return
    is_open = bool(root.flags & fmt.SlotFlags.OPEN)
    if is_open or (root.fingerprint and fingerprint(volume.filesystem()) != root.fingerprint):
        volume.outside_write = True
        hidden.forget(volume.require_engine())  # the base is what the others saw
