"""The table of counting bitmaps against plain Python sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from extsnap.snapshot.masks import MaskTable, mask_of, words_for

snapshot_sets = st.lists(st.frozensets(st.integers(0, 130), max_size=5), min_size=1, max_size=120)


def sets_of(table: MaskTable) -> list[frozenset[int]]:
    return [frozenset(np.flatnonzero(row).tolist()) for row in table.bits()]


@given(sets=snapshot_sets, alive=st.frozensets(st.integers(0, 130)), data=st.data())
def test_masks_are_interned_restricted_and_numbered_anew(
    sets: list[frozenset[int]], alive: frozenset[int], data: st.DataObject
) -> None:
    table = MaskTable()
    table.widen(words_for(130))
    rows = np.stack([mask_of(sorted(one), table.words) for one in sets])
    ids = table.intern(rows)
    assert table.count == len(set(sets))
    assert [sets_of(table)[number] for number in ids] == sets
    assert (table.intern(rows) == ids).all()
    table.restrict(mask_of(sorted(alive), table.words))
    assert [sets_of(table)[number] for number in ids] == [one & alive for one in sets]
    for bit in (0, 64, 130):
        assert table.has(bit).tolist() == [bit in one for one in sets_of(table)]
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(sets), max_size=len(sets))), np.bool_)
    used = np.zeros(table.count, np.bool_)
    used[ids[keep]] = True
    before = sets_of(table)
    new = table.compact(used)
    wanted = [one & alive for one, kept in zip(sets, keep, strict=True) if kept]
    if new is None:
        assert sets_of(table) == before
        assert table.count < 2 * len(set(wanted)) + 64
    else:
        assert [sets_of(table)[number] for number in new[ids[keep]]] == wanted
        assert sorted(sets_of(table), key=sorted) == sorted(set(wanted), key=sorted)
        again = (
            np.stack([mask_of(sorted(one), table.words) for one in wanted])
            if wanted
            else np.zeros((0, table.words), np.uint64)
        )
        assert (table.intern(again) == new[ids[keep]]).all()


def test_two_hundred_dead_masks_are_worth_it() -> None:
    table = MaskTable()
    table.widen(words_for(199))
    ids = table.intern(np.stack([mask_of([bit], table.words) for bit in range(200)]))
    used = np.zeros(200, np.bool_)
    used[ids[[3, 7]]] = True
    assert table.compact(used) is not None
    assert set(sets_of(table)) == {frozenset([3]), frozenset([7])}
