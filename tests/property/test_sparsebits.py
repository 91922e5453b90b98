"""`SparseBits` against one plain bool for each bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from extsnap import arrays, sparsebits
from extsnap.sparsebits import SparseBits

ROWS = 9
runs = st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.004, 0.05, 0.2, 1.0])), max_size=6)


class Machine(RuleBasedStateMachine):
    """Every operation is done to the bits and to the model; then both answer the same questions."""

    @initialize(row_bytes=st.sampled_from([4, 8, 24]))
    def begin(self, row_bytes: int) -> None:
        self.size = ROWS * row_bytes * 8
        self.bits = SparseBits(ROWS, row_bytes)
        self.model = np.zeros(self.size, np.bool_)
        self.other, self.other_model = SparseBits(ROWS, row_bytes), self.model.copy()

    def places(self, shares: list[tuple[float, float]]) -> np.ndarray:
        """Runs inside the bits, whole rows and row borders among them."""
        per_row = self.bits.row_bytes * 8
        found = []
        for at, part in shares:
            start = int(at * self.size)
            if part == 0.2:
                start = start // per_row * per_row
            found.append((start, min(round(part * self.size), self.size - start)))
        return np.array(found, np.int64).reshape(-1, 2)

    @rule(shares=runs, value=st.booleans())
    def set(self, shares: list[tuple[float, float]], value: bool) -> None:
        chosen = self.places(shares)
        self.bits.set(chosen, value)
        for start, length in chosen.tolist():
            self.model[start : start + length] = value

    @rule(shares=runs)
    def set_ranges(self, shares: list[tuple[float, float]]) -> None:
        for start, length in self.places(shares).tolist():
            if length:
                self.bits.set_range(start, start + length)
                self.model[start : start + length] = True

    @rule()
    def swap(self) -> None:
        self.bits, self.other = self.other, self.bits
        self.model, self.other_model = self.other_model, self.model

    @rule()
    def unite(self) -> None:
        self.bits |= self.other
        self.model |= self.other_model

    @rule()
    def subtract(self) -> None:
        self.bits -= self.other
        self.model &= ~self.other_model

    @rule(rows=st.sets(st.integers(0, ROWS - 1)), seed=st.integers(0, 99), add=st.booleans())
    def put(self, rows: set[int], seed: int, add: bool) -> None:
        which = np.array(sorted(rows), np.int64)
        bitmaps = np.random.default_rng(seed).choice([0, 0xFF], (len(which), self.bits.row_bytes)).astype(np.uint8)
        bitmaps[: seed % 3] = 0xFF * (seed % 2)
        (self.bits.add if add else self.bits.put)(which, bitmaps)
        by_row = self.model.reshape(ROWS, -1)
        new = np.unpackbits(bitmaps, axis=1, bitorder="little").astype(np.bool_)
        by_row[which] = new | by_row[which] if add else new

    @rule(places=st.lists(st.floats(0, 1), max_size=40))
    def mark(self, places: list[float]) -> None:
        positions = np.array([int(place * (self.size - 1)) for place in places], np.int64)
        self.bits.mark(positions)
        self.model[positions] = True

    @rule(places=st.lists(st.floats(0, 1), max_size=40))
    def unmark(self, places: list[float]) -> None:
        positions = np.array([int(place * (self.size - 1)) for place in places], np.int64)
        self.bits.unmark(positions)
        self.model[positions] = False

    @rule()
    def tidy(self) -> None:
        self.bits.tidy()
        by_row = self.model.reshape(ROWS, -1)
        assert self.bits.mixed_rows().tolist() == np.flatnonzero(by_row.any(axis=1) & ~by_row.all(axis=1)).tolist()
        assert self.bits.set_rows().tolist() == np.flatnonzero(by_row.all(axis=1)).tolist()

    @rule()
    def copy(self) -> None:
        before = self.bits
        self.bits = before.copy()
        before.set(np.array([[0, self.size]]), not self.model.all())  # nothing is shared

    @rule(shift=st.integers(-2, 2), more=st.integers(-3, 3))
    def reshape(self, shift: int, more: int) -> None:
        for ratio in (1, 2, 4):
            row_bytes, rows = self.bits.row_bytes // ratio, ROWS * ratio + more
            new = self.bits.reshaped(rows, row_bytes, shift)
            expected = np.zeros(rows * row_bytes * 8, np.bool_)
            moved = shift * row_bytes * 8
            for low in np.flatnonzero(self.model) + moved:
                if 0 <= low < len(expected):
                    expected[low] = True
            assert new.positions(0, len(expected)).tolist() == np.flatnonzero(expected).tolist()
            new.set(np.array([[0, 3], [len(expected) - 3, 3]]))  # and it can be changed like any other
            expected[[0, 1, 2, -3, -2, -1]] = True
            assert new.total() == expected.sum()

    @precondition(lambda self: hasattr(self, "bits"))
    @rule(low=st.floats(0, 1), length=st.floats(0, 0.4))
    def ask(self, low: float, length: float) -> None:
        start = int(low * (self.size - 1))
        stop = min(start + 1 + int(length * self.size), self.size)
        inside = self.model[start:stop]
        assert self.bits.any(start, stop) == inside.any()
        assert self.bits.count(start, stop) == inside.sum()
        assert self.bits.positions(start, stop).tolist() == (np.flatnonzero(inside) + start).tolist()

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "bits"):
            return
        packed = np.packbits(self.model, bitorder="little")
        assert (self.bits[0 : len(packed)] == packed).all()
        assert not self.bits[len(packed) - 1 : len(packed) + 3][1:].any()
        assert self.bits.total() == self.model.sum()
        assert (self.bits.test(np.arange(self.size)) == self.model).all()
        by_row = (self.model != self.other_model).reshape(ROWS, -1).any(axis=1)
        assert self.bits.differing_rows(self.other).tolist() == np.flatnonzero(by_row).tolist()
        assert arrays.bitmap_runs(self.bits, self.size).tolist() == arrays.runs_of(np.flatnonzero(self.model)).tolist()


@pytest.mark.parametrize("part", [2, 2048])
def test_like_plain_bits(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsebits, "PART_ROWS", part)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))


def test_a_place_that_is_used_again() -> None:
    """Nothing of the row that had it before shows in the next one."""
    bits = SparseBits(rows=3, row_bytes=8)
    bits.set(np.array([[10, 20]]))
    bits.set(np.array([[0, 64]]), False)
    bits.set(np.array([[64, 3]]))
    bits.set(np.array([[128, 64]]))
    bits.set(np.array([[128, 5]]), False)
    assert bits.positions(0, 192).tolist() == [64, 65, 66, *range(133, 192)]


def test_uniform_rows_take_no_memory() -> None:
    """2^32 blocks with a few bits set; a row that is set whole gives its bitmap back for others."""
    bits = SparseBits(1 << 17, 4096)
    bits.set(np.array([[0, 1 << 31], [(1 << 31) + 5, 10], [1 << 32 >> 1 | 1 << 20, 1]]))
    assert bits.total() == (1 << 31) + 11
    for row in range(100):
        bits.set(np.array([[row * 32768 + 7, 1]]), False)
        bits.set(np.array([[row * 32768, 32768]]))
    assert bits._pool.nbytes < 1 << 18


@pytest.mark.parametrize("value", [False, True])
def test_bits_of_whole_rows_are_cleared_one_by_one(value: bool) -> None:
    """Rows that are all set, all clear, and mixed; a bit named twice."""
    bits = SparseBits(4, 8)
    bits.set(np.array([[0, 64 * (1 + 3 * value)], [130, 3]]))
    model = np.zeros(256, np.bool_)
    model[bits.positions(0, 256)] = True
    positions = np.array([5, 63, 5, 64, 131, 191, 192, 255])
    bits.unmark(positions)
    model[positions] = False
    assert bits.positions(0, 256).tolist() == np.flatnonzero(model).tolist()
