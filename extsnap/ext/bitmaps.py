"""Choosing free blocks in a block bitmap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from extsnap.arrays import Bits, Ints, iter_clear_runs

#: Run lengths tried in turn: as many blocks as possible come from long runs.
_PREFERENCES = (4096, 256, 32, 4, 1)


def choose_free(taken: Sequence[Bits], size: int, count: int) -> Ints:
    """Up to ``count`` free positions as runs (start, length), sorted; long runs first, low addresses first.

    Looks no further than the address at which runs of the preferred length suffice.

    Args:
        taken: Packed bitmaps; a position is free if its bit is clear in all.
        size: Number of bits that count.
        count: How many are wanted.
    """
    if count <= 0:
        return np.zeros((0, 2), np.int64)
    parts, enough = [np.zeros((0, 2), np.int64)], 0
    for part in iter_clear_runs(taken, size):
        parts.append(part)
        enough += int(part[part[:, 1] >= min(_PREFERENCES[0], count), 1].sum())
        if enough >= count:
            break
    runs = np.concatenate(parts)
    chosen: list[Ints] = []
    left = count
    for least in _PREFERENCES:
        if not left or not len(runs):
            break
        fits = runs[:, 1] >= min(least, left)
        candidates, runs = runs[fits], runs[~fits]
        total = np.cumsum(candidates[:, 1])
        last = int(np.searchsorted(total, left))
        chosen.append(candidates[: last + 1].copy())
        if last < len(candidates):
            chosen[-1][-1, 1] -= total[last] - left
            left = 0
        else:
            left -= int(total[-1]) if len(total) else 0
    found = np.concatenate(chosen) if chosen else np.zeros((0, 2), np.int64)
    return found[np.argsort(found[:, 0])]
