"""Small vectorised helpers over runs and bits, shared by the layers that work in bulk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]

_PART_BYTES = 1 << 20
_PART_RUNS = 1 << 16


class ByteWindows(Protocol):
    """A bitmap that is read a slice of bytes at a time: a plain array, or `SparseBits`."""

    def __getitem__(self, window: slice, /) -> Bits:
        """Bytes [start, stop)."""


def expand(starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> Ints:
    """Concatenate ``arange(start, start + length)`` of every run: int64[sum(lengths)]."""
    lengths = lengths.astype(np.int64)
    total = int(lengths.sum())
    if not total:
        return np.zeros(0, np.int64)
    firsts = np.cumsum(lengths) - lengths
    return np.asarray(
        np.arange(total, dtype=np.int64) - np.repeat(firsts, lengths) + np.repeat(starts.astype(np.int64), lengths)
    )


def jumps(values: Ints) -> npt.NDArray[np.bool_]:
    """bool[n]: where a value is not the one before it plus one; true for the first."""
    found = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1] + 1, out=found[1:])
    return found


def breaks_to_runs(new_run: npt.NDArray[np.bool_], maximum: int) -> tuple[Ints, Ints]:
    """Cut a sequence into runs.

    Args:
        new_run: bool[n], true where element i cannot join element i-1 (element 0 is ignored).
        maximum: Longest run allowed.

    Returns:
        (first, length): int64 arrays, the index of each run's first element and its length.
    """
    count = len(new_run)
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    start = new_run.copy()
    start[0] = True
    first = np.flatnonzero(start)
    length = np.diff(first, append=count)
    if count > maximum and length.max() > maximum:
        within = np.arange(count) - np.repeat(first, length)
        first = np.flatnonzero(within % maximum == 0)
        length = np.diff(first, append=count)
    return first.astype(np.int64, copy=False), length.astype(np.int64, copy=False)


def distinct(values: npt.NDArray[Any]) -> Ints:
    """The values sorted, each once: int64[n].  (`numpy.unique` does more, and imports numpy.ma for it.)"""
    ordered = np.sort(values.astype(np.int64))
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def without(values: Ints, others: Ints) -> Ints:
    """The values (sorted, distinct) that are not among the others (sorted, distinct)."""
    return np.setdiff1d(values, others, assume_unique=True)


def differing_rows(rows: Bits, others: Bits) -> npt.NDArray[np.bool_]:
    """bool[n]: which rows are not the same (uint8[n, m], m a multiple of 8).  Nearly always their first word tells."""
    left, right = rows.view(np.uint64), others.view(np.uint64)
    differs: npt.NDArray[np.bool_] = np.asarray(left[:, 0] != right[:, 0])
    rest = np.flatnonzero(~differs)
    if len(rest):
        differs[rest] = (left[rest] != right[rest]).any(axis=1)
    return differs


def filled_rows(rows: Bits) -> npt.NDArray[np.bool_]:
    """bool[n]: which rows are not all zeros (uint8[n, m], m a multiple of 8)."""
    words = rows.view(np.uint64)
    filled: npt.NDArray[np.bool_] = np.asarray(words[:, 0] != 0)
    rest = np.flatnonzero(~filled)
    if len(rest):
        filled[rest] = words[rest].any(axis=1)
    return filled


def runs_of(sorted_values: npt.NDArray[Any]) -> Ints:
    """Runs of consecutive integers in a sorted, duplicate-free array: int64[n, 2] of (start, length)."""
    if not len(sorted_values):
        return np.zeros((0, 2), np.int64)
    breaks = np.flatnonzero(sorted_values[1:] - sorted_values[:-1] != 1)
    bounds = np.empty(len(breaks) + 2, np.int64)
    bounds[0], bounds[-1] = 0, len(sorted_values)
    np.add(breaks, 1, out=bounds[1:-1])
    runs = np.empty((len(breaks) + 1, 2), np.int64)
    runs[:, 0] = sorted_values[bounds[:-1]]
    np.subtract(bounds[1:], bounds[:-1], out=runs[:, 1])
    return runs


def merge_runs(runs: Ints) -> Ints:
    """Sort runs (start, length) that do not overlap, and join those that touch: int64[n, 2]."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    if len(runs) < 2:
        return runs
    first = np.flatnonzero(np.concatenate([[True], runs[1:, 0] != runs[:-1, 0] + runs[:-1, 1]]))
    return np.stack([runs[first, 0], np.add.reduceat(runs[:, 1], first)], axis=1)


def overlap(runs: Ints) -> bool:
    """Whether any two of the runs (start, length), in any order, share a position."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    return bool((runs[:-1].sum(axis=1) > runs[1:, 0]).any())


def bits_of(runs: Ints, size: int) -> Bits:
    """A packed little-endian bitmap uint8[ceil(size/8)] with the blocks of ``runs`` (start, length) set."""
    bitmap = np.zeros((size + 7) // 8, np.uint8)
    if len(runs):
        set_runs(bitmap, runs)
    return bitmap


def set_runs(bitmap: Bits, runs: Ints, value: bool = True) -> None:
    """Set or clear the bits of ``runs`` (int64[n, 2], start and length) in a packed bitmap, in place."""
    runs = runs[runs[:, 1] > 0]
    for low in range(0, len(runs), _PART_RUNS):  # bounded memory
        _set_some(bitmap, runs[low : low + _PART_RUNS], value)


def _set_some(bitmap: Bits, runs: Ints, value: bool) -> None:
    start, end = runs[:, 0], runs[:, 0] + runs[:, 1]
    first, last = start >> 3, (end - 1) >> 3
    head = (0xFF << (start & 7)).astype(np.uint8)
    tail = (0xFF >> (-end & 7)).astype(np.uint8)
    one = first == last
    set_bits(bitmap, first, np.where(one, head & tail, head), value)
    set_bits(bitmap, last[~one], tail[~one], value)
    # Whole bytes between: those of long runs, which are few, as slices.
    inner = np.maximum(last - first - 1, 0)
    long = inner >= 4096
    for low, high in zip((first[long] + 1).tolist(), last[long].tolist(), strict=True):
        bitmap[low:high] = 0xFF if value else 0
    bitmap[expand(first[~long] + 1, inner[~long])] = 0xFF if value else 0


def set_bits(bitmap: Bits, at: Ints, bits: Bits, value: bool) -> None:
    """Set or clear ``bits`` of the bytes at ``at``, which may be named more than once, in place."""
    if value:
        np.bitwise_or.at(bitmap, at, bits)
    else:
        np.bitwise_and.at(bitmap, at, ~bits)


def test_bits(bitmap: Bits, positions: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """bool[n]: which of the bits at ``positions`` are set."""
    return np.asarray((bitmap[positions >> 3] >> (positions & 7).astype(np.uint8)) & 1, np.bool_)


def set_positions(bitmap: Bits, start: int, stop: int) -> Ints:
    """Positions of the set bits in [start, stop): int64[n], sorted."""
    low = start // 8
    window = np.unpackbits(bitmap[low : (stop + 7) // 8], bitorder="little")
    window = window[start - low * 8 : stop - low * 8]
    return np.flatnonzero(window) + start


def bitmap_runs(bitmap: ByteWindows, size: int) -> Ints:
    """Runs (start, length) of set bits among the first ``size`` bits: int64[n, 2]."""
    parts = list(_iter_runs(size, lambda low, high: bitmap[low:high]))
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def iter_clear_runs(bitmaps: Sequence[ByteWindows], size: int) -> Iterator[Ints]:
    """Runs (start, length) of bits that are clear in all ``bitmaps``, in order, some at a time: int64[n, 2] each."""
    first, *others = bitmaps

    def clear(low: int, high: int) -> Bits:
        taken = first[low:high]
        for other in others:
            taken = taken | other[low:high]
        return ~taken

    return _iter_runs(size, clear)


def _iter_runs(size: int, part: Callable[[int, int], Bits]) -> Iterator[Ints]:
    """Runs of set bits of the bitmap whose bytes [low, high) are ``part(low, high)``.

    A mebibyte at a time, so that a bitmap of any size costs little memory and a caller may stop early.  Bytes that
    equal their neighbours' uniform value are skipped before bits are unpacked.
    """
    total = (size + 7) // 8
    carry = 0
    start = np.zeros(0, np.int64)  # the first bit of a run that is still open
    for low in range(0, total, _PART_BYTES):
        high = min(low + _PART_BYTES, total)
        body = part(low, high)
        if high == total and size & 7:
            body = body.copy()
            body[-1] &= (1 << (size & 7)) - 1
        # A byte matters where it is mixed or where it differs from the byte before it.
        before = np.concatenate([np.array([carry], np.uint8), body[:-1]])
        interesting = np.flatnonzero((body != before) | ((body != 0) & (body != 0xFF)))
        bits = np.unpackbits(body[interesting], bitorder="little").reshape(-1, 8)
        last = np.concatenate([(before[interesting] >> 7)[:, None], bits[:, :7]], axis=1)
        row, column = np.nonzero(bits != last)
        edges = np.concatenate([start, (interesting[row] + low) * 8 + column])
        carry = int(body[-1])
        if high == total and len(edges) % 2:
            edges = np.append(edges, size)
        whole = len(edges) // 2 * 2
        start = edges[whole:]
        if whole:
            yield edges[:whole].reshape(-1, 2) @ np.array([[1, -1], [0, 1]], np.int64)
