"""After a flush that failed, the next one makes durable what the host had given up."""

from __future__ import annotations

import random

import numpy as np
import pytest

from extsnap.blockdev.base import Pieces
from extsnap.blockdev.durable import PIECE_BYTES, Durable
from extsnap.blockdev.recording import FaultyDevice, MemoryDevice


@pytest.mark.parametrize("seed", range(20))
def test_what_a_failed_flush_lost_is_written_again(seed: int) -> None:
    rng = random.Random(seed)
    size = 5 * PIECE_BYTES + 1000
    fail_at = rng.randrange(1, 6)
    faulty = FaultyDevice(MemoryDevice(size), fail_at=fail_at, kind="lost", operations=("flush",), rng=rng)
    device = Durable(faulty)
    content = bytearray(size)
    for number in range(1, 8):
        for _ in range(rng.randrange(1, 5)):
            offset = rng.randrange(size - 1)
            length = rng.randrange(1, min(size - offset, 2 * PIECE_BYTES) + 1)
            data = bytes(length) if rng.random() < 0.3 else rng.randbytes(length)
            if any(data) and seed % 2:
                parts = np.array([0, length // 3]), np.array([length // 3, length - length // 3])
                there = parts[1] > 0
                at, lengths = parts[0][there], parts[1][there]
                device.write_pieces(Pieces(offset + at, lengths, at, memoryview(data)))
            elif any(data):
                device.pwrite(offset, data)
            else:
                device.punch(offset, length)
            content[offset : offset + length] = data
        if number == fail_at:
            with pytest.raises(OSError):
                device.flush() if seed % 2 else device.flush_while(lambda: None)
            there = device.pread(0, size) == content
            assert there, "it is read from the cache all the same"
            lost = faulty.medium_after_power_cut() != content
        else:
            device.flush() if seed % 3 else device.flush_while(lambda: None)
            there = faulty.medium_after_power_cut() == content  # for pytest to compare them would take minutes
            assert there, "a flush succeeded, and not all of it is there"
    assert lost or seed, "the first one loses something: else this shows nothing"


def test_a_size_that_is_fixed() -> None:
    device = Durable(MemoryDevice(4096))
    with pytest.raises(OSError, match="fixed"):
        device.resize(8192)
    device.close()
