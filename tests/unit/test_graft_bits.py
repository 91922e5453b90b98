"""Which of the store's blocks ext's bitmaps call free, asked about millions of them."""

from __future__ import annotations

import random
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from extsnap.snapshot import graft
from extsnap.sparsebits import SparseBits

GROUPS, PER_GROUP = 512, 32768


def filesystem(first_data_block: int, free: list[int]) -> Any:
    """64 GiB but for a short last group, all of it in use but some blocks."""
    used = SparseBits(GROUPS, PER_GROUP // 8)
    used.set(np.array([[0, GROUPS * PER_GROUP]], np.int64))
    used.set(np.array([[block - first_data_block, 1] for block in free], np.int64), False)
    count = GROUPS * PER_GROUP - 1000
    geometry = SimpleNamespace(first_data_block=first_data_block, blocks_count=count)
    return SimpleNamespace(geometry=geometry, block_bitmaps=lambda: used)


@pytest.mark.parametrize("first_data_block", [0, 1])
def test_free_blocks_of_a_large_store(first_data_block: int) -> None:
    """None is missed, none of others is named, and memory is that of the bitmaps, not of a list of all blocks."""
    rng = random.Random(first_data_block)
    free = sorted(rng.sample(range(first_data_block, GROUPS * PER_GROUP - 1000), 500))
    runs = np.array([[first_data_block + 10 + at * 50_000, 40_000] for at in range(335)], np.int64)
    runs = np.concatenate(
        [runs[::-1], runs[:3], np.array([[GROUPS * PER_GROUP - 1100, 2000]])]
    )  # some twice, one too long
    fs = filesystem(first_data_block, free)
    asked = {tuple(run) for run in runs.tolist()}
    expected = [block for block in free if any(start <= block < start + length for start, length in asked)]
    tracemalloc.start()
    found = graft._free_of(fs, runs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tolist() == expected
    assert peak < 24 << 20, peak
