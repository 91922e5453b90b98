"""Choosing free blocks in a block bitmap."""

from __future__ import annotations

import numpy as np

from extsnap.arrays import Bits, Ints, bitmap_runs

#: Run lengths tried in turn: as many blocks as possible come from long runs.
_PREFERENCES = (4096, 256, 32, 4, 1)


def choose_free(used: Bits, size: int, count: int) -> Ints:
    """Up to ``count`` free positions as runs (start, length), sorted; long runs first, low addresses first.

    Args:
        used: Packed bitmap, set bits are taken.
        size: Number of bits that count.
        count: How many are wanted.
    """
    runs = bitmap_runs(~used, size)
    chosen: list[Ints] = []
    left = count
    for least in _PREFERENCES:
        if not left or not len(runs):
            break
        fits = runs[:, 1] >= min(least, left)
        candidates, runs = runs[fits], runs[~fits]
        total = np.cumsum(candidates[:, 1])
        last = int(np.searchsorted(total, left))
        taken = candidates[: last + 1].copy()
        if last < len(candidates):
            taken[-1, 1] -= total[last] - left
            left = 0
        else:
            left -= int(total[-1]) if len(total) else 0
        chosen.append(taken)
    found = np.concatenate(chosen) if chosen else np.zeros((0, 2), np.int64)
    return found[np.argsort(found[:, 0])]
