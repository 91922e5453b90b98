"""Power cuts while a volume goes back to a smaller size, the store having moved into what the smaller one has not.

After each cut the next open completes or undoes: every snapshot exact, the base clean and of one of the two sizes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import lab
import numpy as np
import pytest
from campaigns.recorded import EVERYTHING, NOTHING, plain_image

from extsnap.blockdev.recording import Cuts, RecordingDevice
from extsnap.snapshot import edit
from extsnap.snapshot.volume import Volume
from extsnap.sparsebits import SparseBits

BLOCK = lab.BLOCK
DEVICE_BLOCKS = 9200


class GrowingDevice(lab.MemoryDevice):
    def resize(self, size: int) -> None:
        self.content = self.content[:size].ljust(size, b"\0")
        self.size = size


def resized(content: bytes, blocks: int) -> bytes:
    """The volume after ``resize2fs``."""
    with lab.as_file(content) as path:
        lab.run("e2fsck", "-fy", path, check=False)
        lab.run("resize2fs", "-f", path, str(blocks))
        with open(path, "rb") as file:
            return file.read()


def session(volume: Volume, change: Callable[[bytes], bytes], *, grow: bool = True) -> None:
    """A served session at whose end the base volume is what ``change`` makes of it."""
    volume.begin_serving(grow=grow)
    old = volume.read(0, volume.size)
    new = change(old)
    if len(new) > len(old):
        volume.grow(len(new))
        old = old.ljust(len(new), b"\0")
    for offset, length in lab.changed_runs(old, new, BLOCK):
        volume.write(offset, new[offset : offset + length])
    assert volume.end_serving()


def overwritten(content: bytes, rng: random.Random) -> bytes:
    """The volume with other bytes in 120 blocks of its files."""
    base = bytearray(content)
    for block in np.flatnonzero(lab.survey(content).files)[:120].tolist():
        base[block * BLOCK : (block + 1) * BLOCK] = rng.randbytes(BLOCK)
    return bytes(base)


def blocks_of(base: bytes) -> int:
    return int.from_bytes(base[1028:1032], "little")


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_cut_while_the_size_goes_back(kind: str) -> None:
    rng = random.Random(f"{kind} sizes")
    small = plain_image(kind)
    clock = iter(range(10**18, 2 * 10**18, 10**9))

    def opened(on: RecordingDevice | lab.MemoryDevice) -> Volume:
        return Volume(on, writable=True, clock=lambda: next(clock), random_bytes=random.Random(kind).randbytes)

    volume = opened(GrowingDevice(small))
    volume.create("small")
    assert edit.grow(volume, 40)  # what resize2fs overwrites, and the next growth
    volume.settle()
    session(volume, lambda base: resized(base, DEVICE_BLOCKS), grow=False)  # ahead, it gives back later
    low = SparseBits.of(
        np.array([[0, len(small) // BLOCK]]), volume.needed_groups().rows, volume.needed_groups().row_bytes
    )
    assert edit.grow(volume, 350, low) > 300
    volume.settle()
    session(volume, lambda base: overwritten(base, rng), grow=False)  # the store stays as it is
    volume.create("big")
    owned = volume.require_store().root.extents
    assert (owned[:, 1] + owned[:, 2]).max() > len(small) // BLOCK, "the store is inside: this test would show nothing"
    views = {name: volume.open_view(name).pread(0, volume.open_view(name).size) for name in ("small", "big")}
    superblocks = volume.superblock_offsets(volume.filesystem())
    device = RecordingDevice(lab.MemoryDevice(volume.medium.device.pread(0, volume.size)))
    volume = opened(device)
    first = len(device.log)
    volume.verb("restore", name="small")
    assert blocks_of(volume.read(0, 4096)) == len(small) // BLOCK
    sizes = set()
    cuts = Cuts(device.initial, device.log, superblocks=superblocks)
    points = range(first, len(device.log) + 1, 1 if os.environ.get("EXTSNAP_LONG") else 4)
    for point in points:
        for seed in (EVERYTHING, NOTHING, rng.getrandbits(32)):
            state = cuts.state(point, seed)
            where = f"{kind} cut at {point} of {first}..{len(device.log)}, seed {seed}"
            with opened(lab.MemoryDevice(state.content)) as again:
                assert not again.needs_replay, where
                for name, view in views.items():
                    assert again.open_view(name).pread(0, len(view)) == view, f"{where}: {name}"
                content = again.read(0, again.size)
                sizes.add(blocks_of(content))
                complaint = lab.complaint(content)
                assert not complaint, f"{where}: {complaint}"
    assert sizes == {len(small) // BLOCK, DEVICE_BLOCKS}
