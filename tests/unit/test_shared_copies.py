"""Copies that a device shares with their sources, beside others that are written: each gets its own content."""

from __future__ import annotations

import random

import numpy as np
import pytest

from extsnap.blockdev.recording import FaultyDevice, MemoryDevice, RecordingDevice
from extsnap.snapshot.store import Store

SIZE, BLOCKS = 1024, 400


def store_on(device: object, rows: list[tuple[int, int, int]]) -> Store:
    """A store of which only the map counts: rows (logical, physical, length)."""
    store = Store.__new__(Store)
    store.device, store.block_size, store._map = device, SIZE, np.array(rows, np.int64)
    return store


def work(store: Store, device: MemoryDevice, logical: list[int], source: list[int]) -> None:
    """Fill blocks, whose content is that of their sources, or made up."""
    expected = [
        device.pread(at * SIZE, SIZE) if at >= 0 else bytes([number % 255 + 1]) * SIZE
        for number, at in enumerate(source)
    ]
    store.write_blocks(np.array(logical), b"".join(expected), np.array(source))
    assert [content.tobytes() for content in store.read_blocks(np.array(logical))] == expected


def test_a_run_of_the_store_around_a_shared_one() -> None:
    """Before and behind what is shared lie blocks that follow each other on the device."""
    device = MemoryDevice(random.Random(1).randbytes(SIZE * BLOCKS))
    store = store_on(device, [(0, 10, 4), (4, 50, 4), (8, 14, 4)])
    work(store, device, list(range(12)), [-1] * 4 + [200, 201, 202, 203] + [-1] * 4)


@pytest.mark.parametrize("seed", range(20))
def test_any_mixture(seed: int) -> None:
    rng = random.Random(seed)
    device = MemoryDevice(rng.randbytes(SIZE * BLOCKS))
    places = rng.sample(range(20), 20)
    store = store_on(device, [(number * 8, place * 8, 8) for number, place in enumerate(places)])
    logical = sorted(rng.sample(range(160), 120))
    sources = [-1] * 120
    for _ in range(12):
        low, length = rng.randrange(120), rng.randrange(1, 12)
        first = rng.randrange(160, BLOCKS - 20)
        sources[low : low + length] = range(first, first + min(length, 120 - low))
    recorder = RecordingDevice(device)
    store.device = recorder
    work(store, device, logical, sources)
    assert sum(operation.length for operation in recorder.log) == 120 * SIZE


def test_a_device_that_refuses_gets_writes() -> None:
    device = MemoryDevice(random.Random(2).randbytes(SIZE * BLOCKS))
    device.clone = lambda source, target, length: False  # type: ignore[method-assign]
    work(store_on(device, [(0, 10, 20)]), device, list(range(20)), list(range(100, 120)))


def test_a_faulty_device_fails_the_write_that_comes_instead() -> None:
    below = MemoryDevice(random.Random(3).randbytes(SIZE * BLOCKS))
    device = FaultyDevice(below, fail_at=1)
    with pytest.raises(OSError):
        work(store_on(device, [(0, 10, 20)]), below, list(range(20)), list(range(100, 120)))
    assert (device.count, device.failures) == (2, 1)
