"""Views that are read in order: put together in large windows, and still what the volume was."""

from __future__ import annotations

import random

import lab
import numpy as np
import pytest
from lab import BLOCK, MemoryDevice

from extsnap.errors import DamagedCopy
from extsnap.snapshot.volume import Volume

STEP = 128 << 10


class Counting(MemoryDevice):
    """Counts its reads."""

    reads = amount = 0

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        self.amount += len(buffer)
        super().readinto(offset, buffer)


def served(kind: str) -> tuple[Volume, Counting, bytes, list[int]]:
    """A volume being served, its device, what its snapshot has to show, and blocks of files in random order."""
    device = Counting(lab.plain_image(kind))
    volume = Volume(device, writable=True)
    volume.verb("create", name="then")
    then = volume.open_view("then").pread(0, volume.size)
    volume.begin_serving()
    blocks = np.flatnonzero(lab.survey(volume.read(0, volume.size)).files).tolist()
    random.Random(kind).shuffle(blocks)
    return volume, device, then, blocks


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
@pytest.mark.parametrize("shuffled", [False, True], ids=["ordered", "swapped"])
def test_reads_in_order_while_the_volume_is_written(kind: str, shuffled: bool) -> None:
    """Between any two reads a block is overwritten and made durable; a kernel swaps neighbours now and then."""
    volume, _, then, blocks = served(kind)
    view, rng = volume.open_view("then"), random.Random(1)
    places = list(range(0, view.size, STEP))
    if shuffled:
        for at in range(0, len(places) - 1, 3):
            places[at], places[at + 1] = places[at + 1], places[at]
    for turn, place in enumerate([*places, *places]):
        length = min(STEP, view.size - place)
        assert view.pread(place, length) == then[place : place + length], f"read {turn} at {place}"
        volume.write(blocks[turn] * BLOCK, rng.randbytes(BLOCK))
        volume.flush()
    for _ in range(200):  # parts of blocks, at random
        place = rng.randrange(view.size)
        length = min(rng.randrange(1, 3 * STEP), view.size - place)
        assert view.pread(place, length) == then[place : place + length], f"{length} bytes at {place}"


def test_what_is_read_in_order_is_found_once() -> None:
    """The copies of all blocks of a window are read in their own order: far fewer reads than requests have pieces."""
    volume, device, then, blocks = served("ext4")
    for block in blocks[:300]:
        volume.write(block * BLOCK, bytes(BLOCK))
    volume.flush()
    view = volume.open_view("then")
    device.reads = 0
    for place in range(0, 4 << 20, STEP):
        assert view.pread(place, STEP) == then[place : place + STEP]
    assert device.reads < 16, device.reads
    device.amount = 0
    other = volume.open_view("then")
    for place in random.Random(2).sample(range(0, 4 << 20, BLOCK), 40):  # no window for reads that are short
        assert other.pread(place, BLOCK) == then[place : place + BLOCK]
    assert device.amount <= 40 * BLOCK, device.amount


def test_a_damaged_copy_fails_only_who_reads_it() -> None:
    volume, device, then, blocks = served("ext4")
    victim = next(block for block in blocks if 1 << 18 < block * BLOCK < 4 << 20 and any(then[block * BLOCK :][:BLOCK]))
    volume.write(victim * BLOCK, bytes(BLOCK))
    volume.flush()
    copy = device.content.find(then[victim * BLOCK :][:BLOCK])
    device.content[copy] ^= 1
    view = volume.open_view("then")
    failed = []
    for place in range(0, 4 << 20, STEP):
        try:
            assert view.pread(place, STEP) == then[place : place + STEP]
        except DamagedCopy:
            failed.append(place)
    assert failed == [victim * BLOCK // STEP * STEP]
