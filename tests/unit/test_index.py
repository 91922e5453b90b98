"""The record index and the masks against naive models, and what damage of their bytes leads to."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from extsnap.blockdev.recording import MemoryDevice
from extsnap.errors import ExtsnapError, StoreDamaged
from extsnap.snapshot import format as fmt
from extsnap.snapshot.engine import Engine
from extsnap.snapshot.format import RECORD_DTYPE, ZERO_COPY
from extsnap.snapshot.index import RUN_MAX, WRITES_MAX, Index, Level, merge
from extsnap.snapshot.masks import MaskTable, mask_of, words_for
from extsnap.snapshot.medium import Medium
from extsnap.snapshot.root import Root
from extsnap.snapshot.store import Store

BLOCKS = 60
MASKS = 4


@dataclass(frozen=True)
class Record:
    """The model of a record: as in docs/FORMAT.md, with the checksums of its copies."""

    block: int
    length: int
    copy: int
    mask: int
    writes: int
    crcs: tuple[int, ...]

    @property
    def blocks(self) -> range:
        return range(self.block, self.block + self.length)

    def without(self, dropped: set[int]) -> list[Record]:
        """What is left of it, as maximal runs."""
        left: list[list[int]] = []
        for block in self.blocks:
            if block in dropped:
                left.append([])
            else:
                left = left or [[]]
                left[-1].append(block)
        parts = []
        for run in filter(None, left):
            at = run[0] - self.block
            copied = self.copy != ZERO_COPY
            crcs = self.crcs[at : at + len(run)] if copied else ()
            copy = self.copy + at if copied else ZERO_COPY
            parts.append(Record(run[0], len(run), copy, self.mask, self.writes, crcs))
        return parts


def level_of(records: list[Record]) -> Level:
    """A level, built column by column."""
    records = sorted(records, key=lambda record: record.block)
    columns = [[getattr(r, name) for r in records] for name in ("block", "length", "copy", "mask", "writes")]
    crcs = [crc for record in records for crc in record.crcs]
    block, length, copy, mask, writes = (np.array(column, np.int64) for column in columns)
    return Level(block, length, copy, mask.astype(np.uint32), writes, np.array(crcs, np.uint32))


def records_of(level: Level) -> list[Record]:
    """The records of a level, one by one; the checksums are counted off as the format says."""
    found, at = [], 0
    for index in range(len(level)):
        block, length, copy = int(level.block[index]), int(level.length[index]), int(level.copy[index])
        count = 0 if copy == ZERO_COPY else length
        crcs = tuple(level.crcs[at : at + count].tolist())
        at += count
        found.append(Record(block, length, copy, int(level.mask[index]), int(level.writes[index]), crcs))
    assert at == len(level.crcs)
    return found


runs = st.lists(
    st.tuples(
        st.integers(0, BLOCKS - 1), st.integers(1, 9), st.booleans(), st.integers(0, MASKS - 1), st.integers(1, 3)
    ),
    max_size=12,
)


class IndexMachine(RuleBasedStateMachine):
    """An index beside a plain list of records; every operation is done to both."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.model: list[Record] = []
        self.copies = 0
        self.key = 0
        self.noted = False

    def new_records(self, wanted: list[tuple[int, int, bool, int, int]]) -> list[Record]:
        records = []
        for block, length, copied, mask, writes in wanted:
            length = min(length, BLOCKS - block)
            crcs = tuple((self.copies + i) * 2654435761 % (1 << 32) for i in range(length)) if copied else ()
            records.append(Record(block, length, self.copies if copied else ZERO_COPY, mask, writes, crcs))
            self.copies += length
        return records

    @rule(wanted=runs)
    def add(self, wanted: list[tuple[int, int, bool, int, int]]) -> None:
        records = self.new_records(wanted)
        self.index.add(level_of(records))
        self.model += records

    @rule(start=st.integers(0, BLOCKS - 1), length=st.integers(1, BLOCKS))
    def write(self, start: int, length: int) -> None:
        self.index.count_write(start, length)
        written = set(range(start, start + length))
        self.model = [replace(r, writes=r.writes + 1) if written & set(r.blocks) else r for r in self.model]

    @rule(runs=st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 9)), max_size=9))
    def write_many(self, runs: list[tuple[int, int]]) -> None:
        self.index.count_writes(np.array(runs, np.int64).reshape(-1, 2))
        for start, length in runs:
            written = set(range(start, start + length))
            self.model = [replace(r, writes=r.writes + 1) if written & set(r.blocks) else r for r in self.model]

    @rule(start=st.integers(0, BLOCKS), length=st.integers(1, BLOCKS))
    def look_up_a_range(self, start: int, length: int) -> None:
        self.index.apply_writes()
        wanted = set(range(start, start + length))
        found = records_of(self.index.in_range(start, start + length))
        assert Counter(found) == Counter(r for r in self.model if wanted & set(r.blocks))
        assert [r.block for r in found] == sorted(r.block for r in found)

    @rule(blocks=st.sets(st.integers(0, BLOCKS + 5)))
    def look_up_blocks(self, blocks: set[int]) -> None:
        self.index.apply_writes()
        array = np.array(sorted(blocks), np.int64)
        found = Counter(
            (int(array[i]), record)
            for level, which, positions in self.index.pairs(array)
            for i, record in zip(which.tolist(), records_of(level.take(positions)), strict=True)
        )
        assert found == Counter((block, r) for block in blocks for r in self.model if block in r.blocks)

    @rule(blocks=st.sets(st.integers(0, BLOCKS - 1), min_size=1), named=st.sets(st.integers(0, MASKS - 1)))
    def drop_blocks(self, blocks: set[int], named: set[int]) -> None:
        """What a restore does with the records of its target."""
        self.index.apply_writes()
        array = np.array(sorted(blocks), np.int64)
        has = np.array([mask in named for mask in range(MASKS)])
        self.index.replace([level.without(array, has[level.mask]) for level in self.index.levels])
        self.model = [part for r in self.model for part in (r.without(blocks) if r.mask in named else [r])]

    @rule(dead=st.sets(st.integers(0, MASKS - 1), max_size=2))
    def delete(self, dead: set[int]) -> None:
        """What a purge does with records that nobody needs."""
        self.index.apply_writes()
        keep = [np.flatnonzero(~np.isin(level.mask, sorted(dead))) for level in self.index.levels]
        self.index.replace([level.take(which) for level, which in zip(self.index.levels, keep, strict=True)])
        self.model = [r for r in self.model if r.mask not in dead]

    @rule()
    def fold(self) -> None:
        """Every record goes through its bytes; stored levels are not merged with what comes later."""
        self.index.apply_writes()
        merged = merge(self.index.levels)
        table = fmt.parse_table(merged.build(), RECORD_DTYPE, "index")
        crcs = np.frombuffer(merged.crcs.astype("<u4").tobytes(), "<u4")
        self.key += 1
        self.index = Index([Level.parse(table, crcs, self.key)])

    @rule()
    def reorder(self) -> None:
        """As after a reopen: the largest level first."""
        self.index.apply_writes()
        self.index = Index(sorted(self.index.levels, key=len, reverse=True))

    @invariant()
    def every_record_is_there(self) -> None:
        levels = self.index.levels
        assert len(self.index) == len(self.model)
        assert all(len(level) for level in levels)
        assert all((np.diff(level.block) >= 0).all() for level in levels)
        # Writes are applied late, so they are compared in the lookups; the rest must be right at any time.
        found = Counter(replace(r, writes=0) for level in levels for r in records_of(level))
        assert found == Counter(replace(r, writes=0) for r in self.model)

    def teardown(self) -> None:
        self.look_up_a_range(0, BLOCKS)


IndexMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)
TestIndex = IndexMachine.TestCase


def test_a_lookup_visits_few_levels():
    """10,000 batches: their levels are as many as the logarithm of the records, and nothing is lost."""
    index = Index()
    for number in range(10_000):
        index.add(level_of([Record(number * 7919 % 10_007, 1, number, 0, 1, (number,))]))
        assert len(index.levels) <= 15
    assert len(index) == 10_000
    sizes = [len(level) for level in index.levels]
    assert all(a >= 2 * b for a, b in itertools.pairwise(sizes))
    assert len(index.in_range(0, 10_007)) == 10_000


def test_stored_levels_are_not_merged():
    """Their blobs are on the medium: an addition must not make them false."""
    stored = level_of([Record(block, 1, block, 0, 1, (block,)) for block in range(0, 20, 2)])
    stored.stored = 3
    index = Index([stored])
    for block in range(1, 200, 2):
        index.add(level_of([Record(block, 1, ZERO_COPY, 1, 1, ())]))
    assert index.levels[0] is stored
    assert len(index.in_range(0, 1)) == 1


def test_a_cut_leaves_the_level_sorted():
    """Records of different snapshots overlap; one that loses its head begins behind the other."""
    other = [Record(1, 2, 200, 1, 1, (20, 21)), Record(5, 1, 300, 1, 1, (30,))]
    level = level_of([Record(0, 9, 100, 0, 1, tuple(range(9))), *other])
    cut = level.without(np.array([0, 1, 2, 4]), level.mask == 0)
    found = [(r.block, r.length, r.copy) for r in records_of(cut)]
    assert found == [(1, 2, 200), (3, 1, 103), (5, 4, 105), (5, 1, 300)]
    index = Index([cut])
    for block in range(9):
        expected = {r for r in records_of(cut) if block in r.blocks}
        assert set(records_of(index.in_range(block, block + 1))) == expected


def test_merging_keeps_the_order_of_equal_blocks():
    first = [Record(5, 2, 10, 0, 1, (1, 2)), Record(9, 1, ZERO_COPY, 0, 1, ())]
    second = [Record(5, 1, 20, 1, 1, (3,)), Record(7, 1, 30, 1, 1, (4,))]
    assert records_of(merge([level_of(first), level_of(second)])) == [first[0], second[0], second[1], first[1]]
    assert records_of(merge([level_of(second), level_of(first)])) == [second[0], first[0], second[1], first[1]]
    assert len(merge([])) == len(merge([Level.empty()])) == 0


@given(wanted=runs)
@settings(deadline=None)
def test_bytes_and_back(wanted):
    records = IndexMachine().new_records(wanted)
    level = level_of(records)
    raw = level.build()
    assert len(raw) == 28 * len(records)
    again = Level.parse(fmt.parse_table(raw, RECORD_DTYPE, "index"), level.crcs)
    assert records_of(again) == records_of(level)
    assert again.build() == raw


def test_write_counts_saturate_and_begin_at_one():
    level = level_of([Record(1, 1, ZERO_COPY, 0, WRITES_MAX + 5, ()), Record(2, 1, ZERO_COPY, 0, 0, ())])
    table = fmt.parse_table(level.build(), RECORD_DTYPE, "index")
    assert table["writes"].tolist() == [WRITES_MAX, 1]


# -- masks ------------------------------------------------------------------------------------------------


@given(
    batches=st.lists(st.lists(st.sets(st.integers(0, 199), max_size=5), min_size=1, max_size=8), max_size=6),
    dead=st.sets(st.integers(0, 199)),
)
@settings(deadline=None)
def test_masks_against_sets(batches, dead):
    """Equal sets have one id, ids stay, and the table widens as bits come."""
    table, model = MaskTable(), []
    for batch in batches:
        words = max(table.words, *(words_for(max(bits, default=0)) for bits in batch))
        table.widen(words)
        ids = table.intern(np.stack([mask_of(sorted(bits), words) for bits in batch])).tolist()
        for bits in batch:
            if bits not in model:
                model.append(bits)
        assert all(table_bits(table, i) == bits for i, bits in zip(ids, batch, strict=True))
    assert table.count == len(model)
    assert sorted(sorted(table_bits(table, i)) for i in range(table.count)) == sorted(map(sorted, model))
    for bit in {0, 63, 64, 199, 500, *dead}:
        assert table.has(bit).tolist() == [bit in table_bits(table, i) for i in range(table.count)]
    # The log replayed: the same masks under the same ids, in however many words.
    copy = MaskTable()
    copy.widen(table.words)
    copy.intern_exactly(table.rows)
    copy.intern_exactly(np.zeros((1, 1), np.uint64))
    assert copy.rows[:-1].tolist() == table.rows.tolist()
    before = [table_bits(table, i) for i in range(table.count)]
    alive = set(range(64 * table.words)) - dead
    table.restrict(mask_of(sorted(alive), table.words))
    assert [table_bits(table, i) for i in range(table.count)] == [bits & alive for bits in before]
    # Two masks may be equal now: a new one gets an id that says the same.
    if before:
        again = table.intern(table.rows.copy())
        assert table.count == len(before)
        assert [table_bits(table, int(i)) for i in again] == [bits & alive for bits in before]


def table_bits(table: MaskTable, index: int) -> set[int]:
    """The bits of one mask, from its words, as the format has them."""
    value = int.from_bytes(table.rows[index].astype("<u8").tobytes(), "little")
    found = {bit for bit in range(64 * table.words) if value >> bit & 1}
    assert found == set(np.flatnonzero(table.bits()[index]).tolist())
    return found


# -- damage -----------------------------------------------------------------------------------------------

SIZE = 1024
VOLUME_BLOCKS = 2000
LOG = 8


def store_with(blobs: dict[fmt.BlobKind, bytes]) -> tuple[MemoryDevice, tuple[int, int]]:
    """A committed store that holds these blobs, their checksums right."""
    device = MemoryDevice(VOLUME_BLOCKS * SIZE)
    root = Root(
        store_uuid=b"a" * 16,
        fs_uuid=b"b" * 16,
        block_size=SIZE,
        extents=np.array([[0, 100, 400]], np.int64),
        size_blocks=400,
        log_blocks=LOG,
    )
    store = Store(device, root)
    store.mark_used(np.arange(2 + LOG))
    for kind, raw in blobs.items():
        store.write_blob(kind, 0, raw)
    store.commit()
    return device, (store.slot_block(0), store.slot_block(1))


def load(device: MemoryDevice, slots: tuple[int, int]) -> Engine:
    store = Store.load(device, slots, SIZE)
    engine = Engine(Medium(device), store, 512, 1, [])
    engine.load()
    return engine


GOOD = [Record(10, 3, 200, 0, 1, (1, 2, 3)), Record(12, 1, ZERO_COPY, 1, 1, ()), Record(40, 2, 300, 1, 4, (4, 5))]
GOOD_MASKS = (1).to_bytes(8, "little") + (1).to_bytes(8, "little") + (2).to_bytes(8, "little")


def blobs_of(table: np.ndarray, crcs: bytes, masks: bytes = GOOD_MASKS) -> dict[fmt.BlobKind, bytes]:
    kinds = fmt.BlobKind
    return {kinds.INDEX: table.tobytes(), kinds.INDEX_CRCS: crcs, kinds.MASKS: masks}


def good_table() -> tuple[np.ndarray, bytes]:
    level = level_of(GOOD)
    return np.frombuffer(level.build(), RECORD_DTYPE).copy(), level.crcs.astype("<u4").tobytes()


def test_the_good_index_that_the_bad_ones_come_from():
    table, crcs = good_table()
    engine = load(*store_with(blobs_of(table, crcs)))
    assert records_of(engine.index.levels[0]) == GOOD
    assert table_bits(engine.masks, 1) == {1}


IMPOSSIBLE: dict[str, tuple[int, str, int]] = {
    "no blocks": (0, "length", 0),
    "too long": (0, "length", RUN_MAX + 1),
    "longest": (2, "length", 0xFFFFFFFF),
    "past the end": (2, "block", VOLUME_BLOCKS - 1),
    "far past the end": (2, "block", 1 << 40),
    "at the end of 63 bits": (2, "block", (1 << 63) - 1),
    "before the beginning": (0, "block", (1 << 64) - 1),
    "out of order": (0, "block", 50),
    "unknown mask": (1, "mask", 2),
    "mask of all ones": (1, "mask", 0xFFFFFFFF),
    "copy below all": (0, "copy", -2),
    "copy outside the store": (0, "copy", 398),
    "copy at the end of 63 bits": (0, "copy", (1 << 63) - 1),
    "copy in a slot": (0, "copy", 0),
    "copy in the log": (0, "copy", 3),
    "copies that overlap": (2, "copy", 201),
    "a copy that turns zero": (0, "copy", ZERO_COPY),
    "a zero that turns copy": (1, "copy", 350),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_record_that_is_impossible(what):
    """All checksums are right: the values themselves are judged."""
    table, crcs = good_table()
    record, name, value = IMPOSSIBLE[what]
    table[name][record] = value
    device, slots = store_with(blobs_of(table, crcs))
    before = bytes(device.content)
    with pytest.raises(StoreDamaged):
        load(device, slots)
    assert device.content == before


@pytest.mark.parametrize(
    "blobs",
    [
        {fmt.BlobKind.INDEX: level_of(GOOD).build()[:-1]},
        {fmt.BlobKind.INDEX: level_of(GOOD).build() + b"\0"},
        {fmt.BlobKind.INDEX_CRCS: b""},
        {fmt.BlobKind.INDEX_CRCS: bytes(4 * 5 - 1)},
        {fmt.BlobKind.INDEX_CRCS: bytes(4 * 6)},
        {fmt.BlobKind.MASKS: b""},
        {fmt.BlobKind.MASKS: b"\1\0\0\0"},
        {fmt.BlobKind.MASKS: GOOD_MASKS[:-1]},
        {fmt.BlobKind.MASKS: GOOD_MASKS[:16]},
        {fmt.BlobKind.MASKS: bytes(8) + GOOD_MASKS[8:]},
        {fmt.BlobKind.MASKS: (5).to_bytes(8, "little") + GOOD_MASKS[8:]},
        {fmt.BlobKind.MASKS: b"\xff" * 8 + GOOD_MASKS[8:]},
    ],
)
def test_blobs_of_a_wrong_shape(blobs):
    table, crcs = good_table()
    with pytest.raises(StoreDamaged):
        load(*store_with({**blobs_of(table, crcs), **blobs}))


def test_a_missing_blob():
    table, crcs = good_table()
    blobs = blobs_of(table, crcs)
    for kind in (fmt.BlobKind.INDEX_CRCS, fmt.BlobKind.MASKS):
        with pytest.raises(StoreDamaged):
            load(*store_with({other: raw for other, raw in blobs.items() if other != kind}))


def test_every_flipped_byte_of_a_blob_is_noticed():
    """One of the two copies may be damaged; with the other one as well there is an error, never a wrong record."""
    table, crcs = good_table()
    blobs = blobs_of(table, crcs)
    device, slots = store_with(blobs)
    whole = load(device, slots)
    rng = random.Random(1)
    for raw in blobs.values():
        first = bytes(device.content).find(raw)
        second = bytes(device.content).find(raw, first + 1)
        assert first % SIZE == second % SIZE == 0
        assert second > first
        for position in range(len(raw)):
            for order in ((first, second), (second, first)):
                device.content[order[0] + position] ^= 1 << rng.randrange(8)
                survived = load(device, slots)
                assert survived.masks.rows.tolist() == whole.masks.rows.tolist()
                assert [records_of(level) for level in survived.index.levels] == [GOOD]
                device.content[order[1] + rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
                with pytest.raises(ExtsnapError, match="checksum"):
                    load(device, slots)
                for at in order:
                    device.content[at : at + len(raw)] = raw
    load(device, slots)


@pytest.mark.parametrize("masks", [np.zeros((3, 0), np.uint64), np.full((1, 1), 4, np.uint64)])
def test_a_batch_of_the_log_that_is_impossible(masks):
    """A batch with the right checksum whose record names a mask that there is not."""
    device, slots = store_with({})
    store = Store.load(device, slots, SIZE)
    table, crcs = good_table()
    table["mask"] = 3
    store.append_batch(masks, table.tobytes(), np.frombuffer(crcs, "<u4"))
    with pytest.raises(StoreDamaged):
        load(device, slots)
