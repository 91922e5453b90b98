"""Many writes of a served volume at once: each comes to what it would come to by itself."""

from __future__ import annotations

import random

import lab
import numpy as np
import pytest
from lab import BLOCK, MemoryDevice, opened

from extsnap.blockdev.base import Pieces
from extsnap.errors import StoreProtected
from extsnap.snapshot.volume import Volume


def served(kind: str) -> tuple[Volume, MemoryDevice]:
    device = MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    volume.create("one")
    volume.begin_serving()
    return volume, device


def writes_of(pairs: list[tuple[int, bytes]]) -> Pieces:
    lengths = np.array([len(data) for _, data in pairs])
    buffer = memoryview(b"".join(data for _, data in pairs))
    return Pieces(np.array([offset for offset, _ in pairs]), lengths, np.cumsum(lengths) - lengths, buffer)


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_like_so_many_single_ones(kind: str) -> None:
    """Whole blocks of files and free ones, several to some; the ragged end, parts of blocks and of the store not."""
    rng = random.Random(kind)
    volume, _ = served(kind)
    base = bytearray(volume.read(0, volume.size))
    view = volume.open_view("one")
    before = view.pread(0, view.size)
    store = volume.require_store().root.extents
    used = {block for _, first, count in store.tolist() for block in range(first, first + count)}
    free = [block for block in range(100, volume.size // BLOCK - 4) if not used & set(range(block, block + 4))]
    together = 0
    for _ in range(60):
        near = rng.sample(free, 5)
        pairs = [
            (rng.choice(near) * BLOCK, rng.randbytes(rng.randrange(1, 4) * BLOCK)) for _ in range(rng.randrange(1, 12))
        ]
        if rng.random() < 0.2:
            pairs.append((rng.choice(near) * BLOCK + 100, b"part of a block"))
        if rng.random() < 0.2:
            pairs.append((min(used) * BLOCK, bytes(BLOCK)))
        try:
            done = volume.write_many(writes_of(pairs))
        except StoreProtected:
            done = False
        together += done
        for offset, data in pairs:
            if not done:
                try:
                    volume.write(offset, data)
                except StoreProtected:  # of the metadata that keeps the store
                    continue
            base[offset : offset + len(data)] = data
        if rng.random() < 0.3:
            volume.flush()
    assert together > 20
    assert volume.read(0, volume.size) == base
    assert view.pread(0, view.size) == before
    view.close()
    volume.flush()
    assert volume.read(0, volume.size) == base


def test_what_would_take_the_store_away_is_judged_by_itself() -> None:
    """The inode of the store, among writes that are as they should be."""
    volume, _ = served("ext4")
    fs = volume.filesystem()
    place = fs.inode_offset(volume.require_store().root.store_inode) // BLOCK * BLOCK
    before = volume.read(0, volume.size)
    pairs = [(6000 * BLOCK, b"a" * BLOCK), (place, bytes(BLOCK)), (6001 * BLOCK, b"b" * BLOCK)]
    assert not volume.write_many(writes_of(pairs))
    assert volume.read(0, volume.size) == before
    with pytest.raises(StoreProtected):
        volume.write(*pairs[1])
    assert volume.write_many(writes_of([pairs[0], pairs[2]]))


def test_what_is_held_is_let_out() -> None:
    """It is on the device then, as a write to a disk without snapshots would be: a kill does not take it along."""
    volume, device = served("ext2")
    needed = np.flatnonzero(lab.preserved_by(volume, "one"))
    block = int(needed[len(needed) // 2])
    assert volume.write_many(writes_of([(block * BLOCK, b"n" * BLOCK)]))
    assert volume.holds
    assert device.content[block * BLOCK : (block + 1) * BLOCK] != b"n" * BLOCK
    volume.let_out()
    assert not volume.holds
    assert device.content[block * BLOCK : (block + 1) * BLOCK] == b"n" * BLOCK
