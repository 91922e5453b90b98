"""Block bitmaps: choosing free blocks, and clusters as blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from extsnap.arrays import Bits, ByteWindows, Ints, iter_clear_runs

#: Run lengths tried in turn: as many blocks as possible come from long runs.
_PREFERENCES = (4096, 256, 32, 4, 1)


def expand_clusters(rows: Bits, ratio: int) -> Bits:
    """Bitmaps of clusters as bitmaps of blocks: uint8[n, bytes * ratio], a cluster's blocks all like its bit."""
    out = np.empty((len(rows), rows.shape[1] * ratio), np.uint8)
    for low in range(0, len(rows), 1024):  # bounded memory: unpacked, a bit takes a byte
        part = np.unpackbits(rows[low : low + 1024], axis=1, bitorder="little")
        out[low : low + 1024] = np.packbits(np.repeat(part, ratio, axis=1), axis=1, bitorder="little")
    return out


def pack_clusters(rows: Bits, ratio: int) -> Bits:
    """Bitmaps of blocks as bitmaps of clusters: uint8[n, bytes // ratio], a bit set where its first block's is.

    The first, because the last cluster of a volume may reach past its end, where bits are set for good.
    """
    out = np.empty((len(rows), rows.shape[1] // ratio), np.uint8)
    for low in range(0, len(rows), 1024):
        part = np.unpackbits(rows[low : low + 1024], axis=1, bitorder="little")[:, ::ratio]
        out[low : low + 1024] = np.packbits(part, axis=1, bitorder="little")
    return out


def choose_free(taken: Sequence[ByteWindows], size: int, count: int, unit: int = 1) -> Ints:
    """Up to ``count`` free positions as runs (start, length), sorted; long runs first, low addresses first.

    Looks no further than the address at which runs of the preferred length suffice.

    Args:
        taken: Packed bitmaps; a position is free if its bit is clear in all.
        size: Number of bits that count.
        count: How many are wanted; a multiple of ``unit``.
        unit: Runs begin and end at multiples of it.
    """
    if count <= 0:
        return np.zeros((0, 2), np.int64)
    parts, enough = [np.zeros((0, 2), np.int64)], 0
    for part in iter_clear_runs(taken, size):
        if unit > 1:
            start, end = -(-part[:, 0] // unit) * unit, part.sum(axis=1) // unit * unit
            part = np.stack([start, end - start], axis=1)[end > start]
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


def whole_clusters(runs: Ints, ratio: int) -> Ints:
    """Runs (start, length) rounded outward to clusters, those that touch or overlap joined: int64[n, 2]."""
    if not len(runs):
        return runs
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    start, end = runs[:, 0] // ratio * ratio, -(-runs.sum(axis=1) // ratio) * ratio
    reach = np.maximum.accumulate(end)
    first = np.flatnonzero(np.concatenate([[True], start[1:] > reach[:-1]]))
    last = np.append(first[1:], len(runs)) - 1
    return np.stack([start[first], reach[last] - start[first]], axis=1)


def count_clusters(data: Ints, ratio: int) -> int:
    """Clusters that a file with the blocks ``data`` (rows logical, physical, length; sorted) takes."""
    if ratio == 1 or not len(data):
        return int(data[:, 2].sum())
    return int(whole_clusters(data[:, [0, 2]], ratio)[:, 1].sum()) // ratio
