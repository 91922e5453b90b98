"""Checksums of every block that a snapshot preserves: what an outside write changed can be told block by block.

They are taken after the snapshot, whose content does not change, and become durable and true with one header commit:
a crash before it leaves the snapshot without checksums.

They are crc32 (zlib's polynomial), not crc32c like all others of the store: directory leaves, extent nodes and
superblocks of 1 KiB end with their own crc32c, and the crc32c over such a block is the same whatever stands in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints, breaks_to_runs, expand, jumps
from extsnap.errors import DamagedCopy, ExtsnapError, StoreDamaged, VolumeFull
from extsnap.snapshot import edit
from extsnap.snapshot import format as fmt
from extsnap.snapshot.blobs import CRC_DTYPE
from extsnap.snapshot.view import View, pieces

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: Blocks whose checksums are made or compared at once; their checksums are whole blocks of the store.
PART_BLOCKS = 1 << 16
KIND = fmt.BlobKind.CHECKSUMS


def key_of(entry: fmt.Snapshot) -> int:
    """The key of a snapshot's blob; ids are never used again."""
    return entry.id & 0xFFFFFFFF


def has(volume: Volume, entry: fmt.Snapshot) -> bool:
    """Whether a snapshot has checksums."""
    return volume.store is not None and (KIND, key_of(entry)) in volume.store.root.blobs


def add(volume: Volume, name: str) -> int:
    """Store the checksums of a snapshot; returns how many.

    Raises:
        VolumeFull: There is no room for them; the snapshot is as it was.
        DamagedCopy: The snapshot cannot be read.
        ExtsnapError, OSError: They are not stored, and a server that goes on has nothing of them in memory.
    """
    volume.require_trusted()
    engine, store = volume.require_engine(), volume.require_store()
    engine.flush()
    view = volume.open_view(name)
    runs = view.preserved_runs()
    count = int(runs[:, 1].sum())
    needed = _blocks_needed(volume, count)
    before = store.root.extents
    try:
        if store.available < needed:
            edit.grow(volume, needed - store.available)
        crcs = (_crcs(view, part).astype(CRC_DTYPE).tobytes() for part in _parts(runs))
        store.write_pieces(KIND, key_of(view.snapshot), 4 * count, crcs, twin=False)
        store.commit()
        before = store.root.extents  # from here on they are there, whatever fails
        volume.settle()
    except (VolumeFull, DamagedCopy):
        volume.back_to_size(before)
        raise
    except (ExtsnapError, OSError):
        volume.back_to_rest()
        raise
    return count


def _blocks_needed(volume: Volume, count: int) -> int:
    """Free blocks that the store is to have for so many checksums."""
    return -(-count * 4 // volume.block_size) + volume.require_engine().reserve() + edit.MINIMUM_ROOM


def changed(volume: Volume, entry: fmt.Snapshot) -> Iterator[Ints]:
    """Runs (first block, length) of what is not as it was when the snapshot was taken, part by part.

    A copy that cannot be read is left out: whoever looks at the copies names it.

    Raises:
        StoreDamaged: The checksums are.
    """
    view = volume.open_view(entry.name)
    runs = view.preserved_runs()
    store = volume.require_store()
    if store.blob_length(KIND, key_of(entry)) != 4 * int(runs[:, 1].sum()):
        raise StoreDamaged(f"the checksums of snapshot {entry.name!r} are not as many as its blocks")
    stored = _regrouped(store.read_table(KIND, key_of(entry), CRC_DTYPE))
    for part, expected in zip(_parts(runs), stored, strict=True):
        bad = _differing(view, part, expected)
        first, length = breaks_to_runs(jumps(bad), 1 << 62)
        yield np.stack([bad[first], length], axis=1)


def _parts(runs: Ints) -> Iterator[Ints]:
    """Runs cut into parts of `PART_BLOCKS` blocks, the last one shorter."""
    ends = np.cumsum(runs[:, 1])
    total = int(ends[-1]) if len(runs) else 0
    for low in range(0, total, PART_BLOCKS):
        high = min(low + PART_BLOCKS, total)
        which = slice(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(ends, high, "left")) + 1)
        part, begin = runs[which].copy(), ends[which] - runs[which, 1]
        skip = np.maximum(low - begin, 0)
        part[:, 1] = np.minimum(ends[which], high) - begin - skip
        part[:, 0] += skip
        yield part


def _regrouped(tables: Iterator[npt.NDArray[np.uint32]]) -> Iterator[npt.NDArray[np.uint32]]:
    """The same numbers in pieces of `PART_BLOCKS`, the last one shorter."""
    held = np.zeros(0, CRC_DTYPE)
    for table in tables:
        held = np.concatenate([held, table])
        while len(held) >= PART_BLOCKS:
            yield held[:PART_BLOCKS]
            held = held[PART_BLOCKS:]
    if len(held):
        yield held


def _differing(view: View, runs: Ints, expected: npt.NDArray[np.uint32]) -> Ints:
    """The blocks of ``runs`` whose content in the view does not have the checksum that is expected: int64[n]."""
    blocks = expand(runs[:, 0], runs[:, 1])
    found, known = np.zeros(len(blocks), np.uint32), np.zeros(len(blocks), np.bool_)
    for low, crcs in _contents(view, runs, blocks, skip_damaged=True):
        found[low : low + len(crcs)], known[low : low + len(crcs)] = crcs, True
    return np.asarray(blocks[known & (found != expected)])


def _crcs(view: View, runs: Ints) -> npt.NDArray[np.uint32]:
    """Checksums of the blocks of ``runs``."""
    blocks = expand(runs[:, 0], runs[:, 1])
    return np.concatenate([crcs for _, crcs in _contents(view, runs, blocks, skip_damaged=False)])


def _contents(
    view: View, runs: Ints, blocks: Ints, *, skip_damaged: bool
) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """(index in ``blocks``, checksums from there on), in order; a ragged last block is filled with zeros."""
    size = view.engine.block_size
    todo = list(pieces(runs, size, view.size))[::-1]
    while todo:
        offset, count = todo.pop()
        low, high = np.searchsorted(blocks, [offset // size, -(-(offset + count) // size)]).tolist()
        content = np.zeros(-(-count // size) * size, np.uint8)
        try:
            view.readinto(offset, content.data[:count])
        except DamagedCopy:
            if not skip_damaged:
                raise
            if count > size:
                half = count // size // 2 * size or size
                todo += [(offset + half, count - half), (offset, half)]
            continue
        rows = content.reshape(-1, size)[blocks[low:high] - offset // size]
        yield low, np.array([zlib.crc32(row) for row in rows], np.uint32)
