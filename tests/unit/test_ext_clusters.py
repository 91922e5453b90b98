"""Clusters of bigalloc as blocks, against plain sets of numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extsnap.arrays import expand
from extsnap.ext.bitmaps import choose_free, count_clusters, expand_clusters, pack_clusters, whole_clusters

ratios = st.sampled_from([1, 2, 4, 16, 64])
runs = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40)), max_size=8)


@given(ratio=ratios, rows=st.lists(st.binary(min_size=3, max_size=3), min_size=1, max_size=4))
def test_bits_of_clusters_and_back(ratio: int, rows: list[bytes]) -> None:
    bits = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 3)
    blocks = expand_clusters(bits, ratio)
    for row, wide in zip(bits, blocks, strict=True):
        one = np.unpackbits(row, bitorder="little")
        assert np.unpackbits(wide, bitorder="little").tolist() == [int(bit) for bit in one for _ in range(ratio)]
    assert (pack_clusters(blocks, ratio) == bits).all()


@given(ratio=ratios, runs=runs)
def test_whole_clusters(ratio: int, runs: list[tuple[int, int]]) -> None:
    found = whole_clusters(np.array(runs, np.int64).reshape(-1, 2), ratio)
    clusters = {block // ratio for start, length in runs for block in range(start, start + length)}
    blocks = sorted(cluster * ratio + at for cluster in clusters for at in range(ratio))
    assert expand(found[:, 0], found[:, 1]).tolist() == blocks
    assert (found[1:, 0] > found[:-1].sum(axis=1)).all(), "runs that touch are one"


@given(ratio=ratios, runs=runs)
def test_clusters_of_a_file(ratio: int, runs: list[tuple[int, int]]) -> None:
    logical, at = [], 0
    for skip, length in runs:
        at += skip
        logical.append((at, 0, length))
        at += length
    clusters = {block // ratio for start, _, length in logical for block in range(start, start + length)}
    assert count_clusters(np.array(logical, np.int64).reshape(-1, 3), ratio) == len(clusters)


@pytest.mark.parametrize("unit", [4, 16])
@given(taken=st.lists(st.booleans(), min_size=1, max_size=200), data=st.data())
def test_only_whole_clusters_are_chosen(unit: int, taken: list[bool], data: st.DataObject) -> None:
    count = unit * data.draw(st.integers(0, 12))
    found = choose_free([np.packbits(taken, bitorder="little")], len(taken), count, unit)
    assert not (found % unit).any()
    free = [start for start in range(0, len(taken) - unit + 1, unit) if not any(taken[start : start + unit])]
    assert int(found[:, 1].sum()) == min(count, unit * len(free))
    assert not any(taken[block] for block in expand(found[:, 0], found[:, 1]).tolist())
