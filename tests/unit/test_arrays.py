"""Runs of bits against a plain list of bits, in parts of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extsnap import arrays
from extsnap.ext.bitmaps import choose_free


def runs_by_hand(bits: list[bool]) -> list[list[int]]:
    runs: list[list[int]] = []
    for position, bit in enumerate(bits):
        if bit and position and bits[position - 1]:
            runs[-1][1] += 1
        elif bit:
            runs.append([position, 1])
    return runs


bits = st.lists(st.sampled_from([1, 7, 8, 9, 30]), max_size=12).flatmap(
    lambda lengths: st.booleans().map(
        lambda first: [bool((number + first) % 2) for number, length in enumerate(lengths) for _ in range(length)]
    )
)


@pytest.mark.parametrize("part", [1, 2, 3, 1 << 20])
def test_runs_across_the_borders_of_parts(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_PART_BYTES", part)

    @given(set_bits=bits, other=bits, size=st.integers(0, 200))
    def check(set_bits: list[bool], other: list[bool], size: int) -> None:
        size = min(size, len(set_bits))
        other = (other + [False] * len(set_bits))[: len(set_bits)]
        # What stands behind the last bit that counts must not matter.
        packed = np.packbits([*set_bits, True], bitorder="little")
        also = np.packbits([*other, False], bitorder="little")
        assert arrays.bitmap_runs(packed, size).tolist() == runs_by_hand(set_bits[:size])
        free = [not (one or two) for one, two in zip(set_bits, other, strict=True)][:size]
        found = [run for some in arrays.iter_clear_runs([packed, also], size) for run in some.tolist()]
        assert found == runs_by_hand(free)

    check()


@given(taken=bits, count=st.integers(0, 150))
def test_chosen_blocks_are_free_and_as_many_as_there_are(taken: list[bool], count: int) -> None:
    packed = np.packbits(taken, bitorder="little") if taken else np.zeros(0, np.uint8)
    found = choose_free([packed], len(taken), count)
    blocks = arrays.expand(found[:, 0], found[:, 1]).tolist()
    assert blocks == sorted(set(blocks))
    assert not any(taken[block] for block in blocks)
    assert len(blocks) == min(count, taken.count(False))


def test_long_runs_come_first() -> None:
    """Fragments at the front are left for others while long runs suffice, and the search stops there."""
    taken = np.full(1 << 12, 0x55, np.uint8)
    taken[1024:2048] = 0
    taken[3000:4000] = 0
    assert choose_free([taken], 1 << 15, 4096).tolist() == [[8191, 4096]]
    assert choose_free([taken], 1 << 15, 8192 + 4096).tolist() == [[8191, 8193], [24_000 - 1, 4095]]


def test_rows_that_differ_or_are_filled() -> None:
    """Wherever in a row the one byte is, and where there is none."""
    rows = np.zeros((65, 64), np.uint8)
    rows[np.arange(64), np.arange(64)] = 1
    expected = [True] * 64 + [False]
    assert arrays.filled_rows(rows).tolist() == expected
    assert arrays.differing_rows(rows, np.zeros_like(rows)).tolist() == expected
    assert not arrays.differing_rows(rows, rows.copy()).any()
