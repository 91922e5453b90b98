"""Random work on engine and store alone, without a filesystem, against plain bytearrays.

Without a filesystem a run is cheap, so here are the shapes that a small ext volume does not have: two and four
words of counting bitmap, a store of a few blocks that is full most of the time, group rows of 512 blocks that
writes cross, a first data block, a ragged last block, hundreds of batches in a log of a few blocks.

A snapshot here preserves whatever the test says.  Every run is seeded, and its seed is in the test's name.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import lab
import numpy as np
import pytest
from lab import BLOCK, Flags, MemoryDevice

from extsnap.arrays import Ints, runs_of
from extsnap.blockdev.base import Pieces
from extsnap.errors import DamagedCopy, StoreProtected, VolumeFull
from extsnap.snapshot import blobs, copies, engine, hidden
from extsnap.snapshot import format as fmt
from extsnap.snapshot.engine import Engine
from extsnap.snapshot.medium import Medium
from extsnap.snapshot.root import Root
from extsnap.snapshot.store import Store
from extsnap.snapshot.view import View
from extsnap.sparsebits import SparseBits

TAIL = 300
LOG_BLOCKS = 24


@dataclass
class Moment:
    """The model of a snapshot: what it preserves, and the base then."""

    preserved: Flags
    content: bytes


class FileDevice(MemoryDevice):
    """One that is a file: descriptor 7."""

    def where(self, offset: int, length: int) -> tuple[int, int]:
        return 7, offset


class Bench:
    """An engine over a store in memory, the model beside it, and the commands of `Volume` in their bare form."""

    def __init__(
        self,
        seed: int,
        *,
        blocks: int = 4000,
        store: tuple[tuple[int, int], ...] = ((100, 200), (1000, 300), (2000, 700)),
        first_data_block: int = 1,
        blocks_per_group: int = 512,
    ) -> None:
        self.rng = random.Random(seed)
        self.device = FileDevice(bytes(blocks * BLOCK + TAIL))
        self.count = blocks + 1
        self.geometry = (blocks_per_group, first_data_block)
        # Logical blocks with a hole between the extents, as a store that gave space back has them.
        extents, logical = [], 0
        for physical, length in store:
            extents.append((logical, physical, length))
            logical += length + 20
        self.owned = lab.flags(self.count, lab.spread(np.array(store, np.int64)))
        root = Root(
            store_uuid=b"a" * 16,
            fs_uuid=b"b" * 16,
            block_size=BLOCK,
            extents=np.array(extents, np.int64),
            size_blocks=logical,
            log_blocks=LOG_BLOCKS,
        )
        self.store = Store(self.device, root)
        self.store.mark_used(np.arange(2 + LOG_BLOCKS))
        self.store.commit()
        self.base = bytearray(self.device.size)
        self.snapshots: list[fmt.Snapshot] = []
        self.moments: dict[int, Moment] = {}
        self.refused = self.found = self.at_once = 0
        self.engine = self.opened()

    def opened(self) -> Engine:
        engine = Engine(Medium(self.device), self.store, *self.geometry, list(self.snapshots))
        engine.load()
        engine.pin()
        engine.rebuild_need()
        return engine

    # -- what is done to both ----------------------------------------------------------------------------

    def is_owned(self, offset: int) -> bool:
        return bool(self.owned[offset // BLOCK])

    def hits_store(self, offset: int, data: bytes) -> bool:
        """Whether a block of the store would get anything but the zeros that it reads as."""
        blocks = np.arange(offset, offset + len(data)) // BLOCK
        return bool((self.owned[blocks] & (np.frombuffer(data, np.uint8) != 0)).any())

    def write(self, offset: int, data: bytes) -> None:
        try:
            self.engine.pwrite(offset, data)
        except StoreProtected:
            assert self.hits_store(offset, data)
        except VolumeFull:
            self.refused += 1
        else:
            assert not self.hits_store(offset, data)
            self.base[offset : offset + len(data)] = data

    def write_many(self, writes: list[tuple[int, bytes]]) -> None:
        """Many writes of whole blocks at once, or one by one where the engine wants them so."""
        offsets, lengths = np.array([(offset, len(data)) for offset, data in writes]).T
        buffer = memoryview(b"".join(data for _, data in writes))
        try:
            done = self.engine.write_many(Pieces(offsets, lengths, np.cumsum(lengths) - lengths, buffer))
        except VolumeFull:
            done = False
        if not done:
            for offset, data in writes:
                self.write(offset, data)
            return
        self.at_once += 1
        for offset, data in writes:
            assert not self.hits_store(offset, data)
            self.base[offset : offset + len(data)] = data

    def rewrite(self, blocks: list[int], contents: list[bytes]) -> None:
        """What a restore does with many blocks at once."""
        protected = any(self.owned[block] and any(new) for block, new in zip(blocks, contents, strict=True))
        new = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, BLOCK)

        def look() -> None:
            """Read while the barrier is waited for: views are what they are, and the base is as before."""
            block = self.rng.randrange(self.device.size // BLOCK)
            assert self.engine.pread(block * BLOCK, BLOCK) == self.base[block * BLOCK : (block + 1) * BLOCK]
            for snapshot in self.snapshots[:3]:
                moment, seen = self.moments[snapshot.id], np.zeros((len(blocks), BLOCK), np.uint8)
                View(self.engine, snapshot).read_blocks(np.array(blocks, np.int64), seen)
                for index in np.flatnonzero(moment.preserved[blocks]).tolist():
                    at = blocks[index] * BLOCK
                    assert seen[index].tobytes() == moment.content[at : at + BLOCK]

        try:
            self.engine.rewrite(np.array(blocks, np.int64), new, look)
        except StoreProtected:
            assert protected
        except VolumeFull:
            self.refused += 1
        else:
            assert not protected
            for block, content in zip(blocks, contents, strict=True):
                self.base[block * BLOCK : (block + 1) * BLOCK] = content

    def punch(self, offset: int, length: int) -> None:
        try:
            self.engine.punch(offset, length)
        except VolumeFull:
            self.refused += 1
        else:
            self.base[offset : offset + length] = bytes(length)

    def create(self, preserved: Flags) -> bool:
        """What `taking.stage` and `taking.commit` do, with a bitmap of the test's."""
        engine, store = self.engine, self.store
        engine.flush()
        runs = runs_of(np.flatnonzero(preserved)) + np.array([engine.shift, 0])
        bits = SparseBits.of(runs, engine.rows, engine.row_bytes)
        bits.tidy()
        rows, stored = engine.history.changed_rows(store.root.next_id - 1, bits)
        if store.available < engine.reserve() + 2 * len(stored) + 50:
            return False
        number = store.root.next_id
        engine.history.add(number, rows, bits, store.allocate(2 * len(stored)), store.write_padded)
        bit = (~store.root.counting & (store.root.counting + 1)).bit_length() - 1
        assert bit not in {snapshot.bit for snapshot in self.snapshots}
        kind, consistency, state = fmt.Kind.MANUAL, fmt.Consistency.CLEAN, fmt.State.OK
        used = int(preserved.sum())
        snapshot = fmt.Snapshot(number, bit, f"s{number}", "", kind, consistency, state, 0, self.device.size, used)
        store.root.counting |= 1 << bit
        store.root.next_id += 1
        engine.set_snapshots(engine.snapshots)
        hidden.record_zeros(engine, bit, bits)
        blobs.write_history(store, engine.history)
        store.commit()
        self.snapshots.append(snapshot)
        engine.set_snapshots(list(self.snapshots))
        engine.need |= bits
        self.moments[number] = Moment(preserved, bytes(self.base))
        return True

    def delete(self, snapshot: fmt.Snapshot) -> None:
        """What `Volume.delete` does."""
        engine, store = self.engine, self.store
        engine.commit()
        self.snapshots.remove(snapshot)
        del self.moments[snapshot.id]
        store.root.counting &= ~(1 << snapshot.bit)
        engine.set_snapshots(list(self.snapshots))
        engine.purge()
        store.release(engine.history.collect())
        blobs.write_history(store, engine.history)
        engine.fold(commit=False)
        store.commit()
        hidden.release(engine)

    def reopen(self) -> None:
        """A new process finds the same store: not a block more or less in use."""
        self.engine.flush()
        available = self.store.available
        self.kill()
        assert self.store.available == available

    def kill(self) -> None:
        """A new process finds what the device has, and nothing else."""
        self.store = Store.load(self.device, (self.store.slot_block(0), self.store.slot_block(1)), BLOCK)
        self.engine = self.opened()

    # -- what must hold ----------------------------------------------------------------------------------

    def verify(self) -> None:
        """Base and views are their models; the records are those of the snapshots, and of nothing else."""
        self.verify_places()
        found = self.engine.pread(0, self.device.size)
        wrong = np.flatnonzero(lab.unequal(found, self.base))
        assert not len(wrong), f"blocks {wrong[:10].tolist()} of the base"
        for snapshot in self.snapshots:
            moment = self.moments[snapshot.id]
            seen = View(self.engine, snapshot).pread(0, self.device.size)
            wrong = np.flatnonzero(lab.unequal(seen, moment.content) & moment.preserved)
            assert not len(wrong), f"{snapshot.name}: blocks {wrong[:10].tolist()}"
            stray = np.flatnonzero(lab.unequal(seen, bytes(len(seen))) & ~moment.preserved)
            assert not len(stray), f"{snapshot.name}: stray blocks {stray[:10].tolist()}"
        self.verify_records()

    def verify_places(self) -> None:
        """What is said to stand on the device as it is does so."""
        for _ in range(50):
            length = self.rng.choice([1, BLOCK, 8 * BLOCK, 40 * BLOCK])
            offset = self.rng.randrange(self.device.size - length + 1)
            place = self.engine.where(offset, length)
            if place is not None:
                assert place == (7, offset)
                assert self.device.content[offset : offset + length] == self.base[offset : offset + length]
                self.found += 1

    def verify_records(self) -> None:
        bits = self.engine.masks.bits()
        seen = {snapshot.bit: np.zeros(self.count, np.bool_) for snapshot in self.snapshots}
        places: list[np.ndarray] = []
        for level in self.engine.index.levels:
            assert (np.diff(level.block) >= 0).all()
            for at in range(len(level)):
                run = slice(int(level.block[at]), int(level.block[at] + level.length[at]))
                names = [snapshot for snapshot in self.snapshots if bits[level.mask[at]][snapshot.bit]]
                assert names, "a record that no snapshot needs"
                for snapshot in names:
                    assert not seen[snapshot.bit][run].any(), f"two records of {run} for {snapshot.name}"
                    seen[snapshot.bit][run] = True
                    assert self.moments[snapshot.id].preserved[run].all(), f"{snapshot.name} needs no record of {run}"
                if level.copy[at] >= 0:
                    places.append(np.arange(level.copy[at], level.copy[at] + level.length[at]))
        if places:
            taken = np.concatenate(places)
            assert len(np.unique(taken)) == len(taken), "a copy block of two records"
            self.store.physical(taken)

    def verify_nothing_kept(self) -> None:
        """What is hidden is what a snapshot reads from the medium: all else was punched."""
        for block in lab.spread(np.array(self.hidden_runs(), np.int64).reshape(-1, 2)).tolist():
            missing = self.engine.missing(np.array([block + self.engine.shift]))
            assert missing.any(), f"block {block} is hidden and no snapshot needs it"

    # -- random work -------------------------------------------------------------------------------------

    def some_blocks(self) -> Flags:
        """Clusters of 16 blocks, and now and then a whole row of ones or zeros; never the store's."""
        rng = self.rng
        flags = np.repeat([rng.random() < 0.5 for _ in range(0, self.count, 16)], 16)[: self.count]
        for row in range(self.count // 512):
            if rng.random() < 0.2:
                flags[row * 512 + 1 : (row + 1) * 512 + 1] = rng.random() < 0.5
        return np.asarray(flags & ~self.owned)

    def random_rewrite(self) -> None:
        """Whole blocks, near each other or not, with new content, with what they have, or with zeros."""
        rng = self.rng
        whole = self.device.size // BLOCK
        near = rng.randrange(whole - 60)
        if (hidden_runs := self.hidden_runs()) and rng.random() < 0.7:
            near = min(rng.choice(hidden_runs)[0], whole - 60)
        blocks = sorted(
            rng.sample(range(near, near + 60) if rng.random() < 0.7 else range(whole), rng.randrange(1, 40))
        )
        if rng.random() < 0.9:
            blocks = [block for block in blocks if not self.owned[block]] or [0]
        contents = []
        for block in blocks:
            same = bytes(self.base[block * BLOCK : (block + 1) * BLOCK])
            below = bytes(self.device.content[block * BLOCK : (block + 1) * BLOCK])
            contents.append(rng.choice([rng.randbytes(BLOCK), rng.randbytes(BLOCK), same, below, bytes(BLOCK)]))
        self.rewrite(blocks, contents)

    def random_write(self) -> None:
        if self.rng.random() < 0.15:
            self.random_rewrite()
            return
        rng = self.rng
        if rng.random() < 0.2:
            near = rng.randrange(self.count - 100)
            blocks = [near + rng.randrange(90) for _ in range(rng.randrange(1, 30))]
            self.write_many([(block * BLOCK, rng.randbytes(rng.choice([1, 1, 2]) * BLOCK)) for block in blocks])
            return
        length = rng.choice([1, 100, 1024, 2048, 5000, 30000])
        offset = rng.randrange(self.device.size - length + 1)
        if rng.random() < 0.1:
            offset = self.device.size - length  # the ragged end
        elif rng.random() < 0.5:
            offset = offset // BLOCK * BLOCK
        data = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
        if rng.random() < 0.2:  # as the kernel's page cache does: whole pages, the neighbours as they were read
            end = min(-(-(offset + length) // 4096) * 4096, self.device.size)
            begin = offset // 4096 * 4096
            if not self.hits_store(offset, data):
                data = bytes(self.base[begin:offset]) + data + bytes(self.base[offset + length : end])
                offset = begin
        self.write(offset, data)

    def random_punch(self) -> None:
        length = self.rng.randrange(1, 40000)
        self.punch(self.rng.randrange(self.device.size - length), length)

    def random_reveal(self) -> None:
        """What `Volume.reveal` does: where nothing is in use, the base shows again what the medium has."""
        in_use = self.some_blocks()
        runs = runs_of(np.flatnonzero(in_use)) + np.array([self.engine.shift, 0])
        was = [run for run in self.hidden_runs() if run[1]]
        if hidden.reveal(self.engine, SparseBits.of(runs, self.engine.rows, self.engine.row_bytes)):
            self.refused += 1
        for block in lab.spread(np.array(was, np.int64).reshape(-1, 2)).tolist():
            if not in_use[block]:
                self.base[block * BLOCK : (block + 1) * BLOCK] = self.device.content[
                    block * BLOCK : (block + 1) * BLOCK
                ]

    def hidden_runs(self) -> list[list[int]]:
        return [[start - self.engine.shift, count] for start, count in self.engine.hidden.all_runs().tolist()]

    def random_delete(self) -> None:
        if self.snapshots:
            self.delete(self.rng.choice(self.snapshots))


#: When copies are written before their batch is complete, and in what pieces.
EARLY = [(engine.EARLY_BYTES, copies.PIECE_BYTES), (BLOCK, BLOCK), (3 * BLOCK, 2 * BLOCK), (1, 4 * BLOCK)]


@pytest.fixture
def early(seed: int) -> Iterator[None]:
    """Three seeds of four write copies early, in small pieces."""
    least, piece = EARLY[seed % len(EARLY)]
    with mock.patch.object(engine, "EARLY_BYTES", least), mock.patch.object(copies, "PIECE_BYTES", piece):
        yield


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [4, 80], ids=["few", "many"])
def test_random_work(seed: int, most: int) -> None:
    """Writes, punches, snapshots, deletes, flushes and reopening, until the store is full and beyond."""
    bench = Bench(seed, first_data_block=seed % 2)
    # Without deletes and reopening the store fills up; with them it lives on.
    top = bench.rng.choice([0.84, 0.9, 1])
    for step in range(400):
        dice = bench.rng.random() * top
        if dice < 0.66:
            bench.random_write()
        elif dice < 0.74:
            bench.random_punch()
        elif dice < 0.84:
            if len(bench.snapshots) < most:
                bench.create(bench.some_blocks())
        elif dice < 0.9:
            bench.random_delete()
        elif dice < 0.95:
            bench.engine.flush()
        else:
            bench.reopen()
        if step % 50 == 49:
            bench.verify()
    bench.reopen()
    bench.verify()
    assert bench.found, "nothing of the base stands on the device as it is"
    assert bench.at_once, "no writes were taken at once"


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("least", [0, 20 * BLOCK], ids=["every", "large"])
def test_random_work_with_punches_that_hide(seed: int, least: int) -> None:
    """Punches large and small, hidden from a few blocks on: base and views are as if all had been copied."""
    bench = Bench(seed + 100, first_data_block=seed % 2)
    hid = 0
    with mock.patch.object(hidden, "HIDE_BYTES", least):
        for step in range(300):
            dice = bench.rng.random()
            if dice < 0.45:
                bench.random_write()
            elif dice < 0.68:
                bench.random_punch()
            elif dice < 0.78:
                if len(bench.snapshots) < 6:
                    bench.create(bench.some_blocks())
            elif dice < 0.84:
                bench.random_delete()
            elif dice < 0.94:
                bench.engine.flush()
                hid += len(bench.hidden_runs())
            elif dice < 0.96:
                bench.random_reveal()
            else:
                bench.reopen()
            if step % 25 == 24:
                bench.verify()
        bench.reopen()
        bench.verify()
        bench.verify_nothing_kept()
        while bench.snapshots:
            bench.random_delete()
            bench.verify()
    assert hid
    bench.engine.flush()
    assert not bench.hidden_runs(), "hidden, and no snapshot needs it"
    bench.reopen()
    bench.verify()
    assert not bench.store.root.incompat or bench.store.log_position


def test_a_full_store_refuses_writes_and_keeps_every_snapshot() -> None:
    """Refused writes change nothing; a delete makes room again."""
    bench = Bench(5, store=((100, 260),))
    preserved = ~bench.owned
    bench.write(400 * BLOCK, bench.rng.randbytes(600 * BLOCK))
    assert bench.create(preserved)
    for block in range(400, 1000, 3):
        bench.write(block * BLOCK, bench.rng.randbytes(BLOCK))
    assert bench.refused
    bench.verify()
    bench.engine.flush()
    bench.verify()
    bench.reopen()
    bench.verify()
    refused = bench.refused
    bench.write(1000 * BLOCK, bytes(10))  # zeros are recorded without a copy, but room is asked for first
    bench.punch(400 * BLOCK, 600 * BLOCK)
    assert bench.refused > refused
    bench.verify()
    bench.delete(bench.snapshots[0])
    refused = bench.refused
    bench.write(400 * BLOCK, bench.rng.randbytes(600 * BLOCK))
    assert bench.refused == refused
    bench.reopen()
    bench.verify()


@pytest.mark.parametrize("fails_at", [0, 3, 7])
def test_copies_that_were_written_early(fails_at: int) -> None:
    """They take the room that the held writes were promised; if one cannot be written, none of them keeps its block."""
    bench = Bench(8)
    bench.write(1400 * BLOCK, bench.rng.randbytes(20 * BLOCK))
    assert bench.create(~bench.owned)
    available, room = bench.store.available, bench.engine.room()
    write, copied = bench.device.pwrite, 0

    def failing(offset: int, data: bytes | bytearray | memoryview) -> None:
        nonlocal copied
        copied += 1
        if copied == fails_at:
            raise OSError(errno.EIO, "the disk fails once")
        write(offset, data)

    failed = 0
    with (
        mock.patch.object(engine, "EARLY_BYTES", 4 * BLOCK),
        mock.patch.object(copies, "PIECE_BYTES", BLOCK),
        mock.patch.object(bench.device, "pwrite", failing),
    ):
        for number in range(20):
            try:
                bench.write((1400 + number) * BLOCK, bench.rng.randbytes(BLOCK))
            except OSError:
                failed += 1
                assert bench.store.available == available
            assert bench.engine.room() == room - (number + 1) + failed
            assert bench.engine.left == available - (number + 1) + failed
        assert bench.store.available < available or fails_at
    assert failed == (fails_at > 0)
    bench.engine.flush()
    assert bench.store.available == available - 20 + failed
    bench.reopen()
    bench.verify()


def test_a_later_write_to_a_block_that_is_held_for_its_neighbour() -> None:
    """No snapshot needs the first of the two; it waits in the hold too, and what comes later goes behind it."""
    bench = Bench(11)
    flags = np.zeros(bench.count, np.bool_)
    flags[1401] = True
    assert bench.create(flags)
    bench.write(1400 * BLOCK, bench.rng.randbytes(2 * BLOCK))
    bench.write(1400 * BLOCK, bench.rng.randbytes(BLOCK))
    bench.verify()
    bench.reopen()
    bench.verify()


def test_many_writes_with_two_to_one_block() -> None:
    """One that nobody needs is held with its neighbour; the later one of the same call is behind it all the same."""
    bench = Bench(13)
    flags = np.zeros(bench.count, np.bool_)
    flags[1401] = True
    assert bench.create(flags)
    content = [bench.rng.randbytes(size * BLOCK) for size in (2, 1, 1, 1)]
    bench.write_many(list(zip([1400 * BLOCK, 1400 * BLOCK, 1500 * BLOCK, 1500 * BLOCK], content, strict=True)))
    assert bench.at_once
    bench.write(1500 * BLOCK + 100, b"behind it")
    bench.verify()
    bench.reopen()
    bench.verify()


def test_many_writes_have_their_room() -> None:
    """What is held has a claim on it: more than is left is refused before it is held."""
    bench = Bench(14, store=((100, 260),))
    bench.write(1000 * BLOCK, bench.rng.randbytes(2000 * BLOCK))
    assert bench.create(~bench.owned)
    count = bench.engine.room() * 2 // 3
    assert count > 20
    held, more = (list(range(first, first + count)) for first in (1000, 2000))
    bench.write_many([(block * BLOCK, bench.rng.randbytes(BLOCK)) for block in held])
    assert bench.at_once == 1
    room = bench.engine.room()
    data = memoryview(bytes(count * BLOCK))
    places = np.arange(count) * BLOCK
    with pytest.raises(VolumeFull):
        bench.engine.write_many(Pieces(np.array(more) * BLOCK, np.full(count, BLOCK), places, data))
    assert bench.engine.room() >= room - 1
    bench.verify()
    bench.reopen()
    bench.verify()


class Kept:
    """What the last of the room is kept for: block 1400 alone, with all that is left."""

    most = 40

    def __init__(self, shift: int) -> None:
        self._position = 1400 + shift

    def names(self, positions: Ints) -> bool:
        return self._position in positions.tolist()

    def kept(self, preserve: object, owned: int, room: int) -> int:
        return self.most

    def count_again(self, rows: int) -> None:
        """Nothing else is metadata."""


def test_many_writes_leave_what_is_kept_for_metadata() -> None:
    """One of them that is metadata does not let the others in."""
    bench = Bench(15, store=((100, 260),))
    bench.write(1000 * BLOCK, bench.rng.randbytes(2000 * BLOCK))
    assert bench.create(~bench.owned)
    bench.engine.vital = Kept(bench.engine.shift)  # type: ignore[assignment]
    blocks = iter(range(1401, 3000))
    while not bench.refused:
        bench.write_many([(block * BLOCK, bench.rng.randbytes(BLOCK)) for block in (next(blocks), next(blocks))])
    assert bench.at_once
    room, refused = bench.engine.room(), bench.refused
    assert Kept.most <= room < Kept.most + 8
    several = [1400, *(next(blocks) for _ in range(9))]
    bench.write_many([(block * BLOCK, bench.rng.randbytes(BLOCK)) for block in several])
    assert bench.refused == refused + 9
    assert bench.engine.room() >= Kept.most - 1, "only the metadata took of it"
    bench.verify()


def test_a_block_that_is_held_again_after_its_hold_was_let_out() -> None:
    """The write that fills the hold has it let out first, with the copy that it needs itself."""
    bench = Bench(12)
    assert bench.create(~bench.owned)
    with mock.patch.object(engine, "HOLD_ENTRIES", 4):
        for block in (1400, 1410, 1412, 1414, 1400, 1400):
            bench.write(block * BLOCK, bench.rng.randbytes(BLOCK))
        bench.verify()
        bench.reopen()
    bench.verify()


class Failing:
    """A device whose next operation of a kind fails, once."""

    def __init__(self, bench: Bench, kind: str, number: int = 1, within: range | None = None) -> None:
        self._work, self._left, self._within = getattr(bench.device, kind), number, within
        self._patch = mock.patch.object(bench.device, kind, self)

    def __call__(self, *arguments: Any) -> Any:
        self._left -= self._within is None or arguments[0] in self._within
        if not self._left:
            self._left = -1 << 30
            raise OSError(errno.ENOSPC, "the host is full for a moment")
        return self._work(*arguments)

    def __enter__(self) -> None:
        self._patch.start()

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


@pytest.mark.parametrize("flushed", [False, True])
def test_an_overwrite_that_fails(flushed: bool) -> None:
    """What was held stays held, and what is written to it later is not put back by the next flush."""
    bench = Bench(13)
    assert bench.create(~bench.owned)
    for block in (1400, 1410, 1412):
        bench.write(block * BLOCK, bench.rng.randbytes(BLOCK))
    with Failing(bench, "pwrite", within=range(1410 * BLOCK, 1411 * BLOCK)), pytest.raises(OSError):
        bench.engine.flush()
    if flushed:
        bench.verify()
    bench.write(1400 * BLOCK, bench.rng.randbytes(BLOCK))
    bench.verify()
    bench.engine.flush()
    bench.kill()
    bench.verify()


@pytest.mark.parametrize("what", ["blob", "slot", "barrier"])
@pytest.mark.parametrize("then", ["write", "commit"])
def test_a_fold_that_fails(what: str, then: str) -> None:
    """The medium may have the old root or the new one: what comes after it counts with either."""
    bench = Bench(14)
    assert bench.create(~bench.owned)
    for block in range(1400, 1440, 2):
        bench.write(block * BLOCK, bench.rng.randbytes(BLOCK))
        bench.engine.flush()
    slot = bench.store.slot_block(0) * BLOCK
    failing = {
        "blob": Failing(bench, "pwrite", 3),
        "slot": Failing(bench, "pwrite", within=range(slot, slot + 1)),
        "barrier": Failing(bench, "flush"),
    }[what]
    with failing, pytest.raises(OSError):
        bench.engine.fold()
    if then == "commit":
        bench.store.commit()
    else:
        for block in range(1401, 1440, 2):
            bench.write(block * BLOCK, bench.rng.randbytes(BLOCK))
        bench.engine.commit()  # no flush, which would commit the root as well
    bench.kill()
    bench.verify()


def test_a_discard_that_was_folded_in_vain() -> None:
    """A flush makes a discard durable, also if a fold with it could not be committed."""
    bench = Bench(15)
    bench.write(1400 * BLOCK, bench.rng.randbytes(30 * BLOCK))
    assert bench.create(~bench.owned)
    with mock.patch.object(hidden, "HIDE_BYTES", 0):
        bench.punch(1400 * BLOCK, 30 * BLOCK)
    slot = bench.store.slot_block(0) * BLOCK
    with Failing(bench, "pwrite", within=range(slot, slot + 1)), pytest.raises(OSError):
        bench.engine.fold()
    bench.engine.flush()
    bench.kill()
    bench.verify()


def test_a_hidden_block_is_rewritten_with_what_the_medium_has() -> None:
    """It differs all the same: it read as zeros."""
    bench = Bench(17)
    content = bench.rng.randbytes(30 * BLOCK)
    bench.write(1400 * BLOCK, content)
    assert bench.create(~bench.owned)
    with mock.patch.object(hidden, "HIDE_BYTES", 0):
        bench.punch(1400 * BLOCK, 30 * BLOCK)
    assert bench.hidden_runs(), "it was copied"
    bench.rewrite([1405], [content[5 * BLOCK : 6 * BLOCK]])
    bench.verify()
    bench.reopen()
    bench.verify()


def test_a_batch_whose_barrier_failed() -> None:
    """Its blocks get another use, so it is taken out of the log before."""
    bench = Bench(16)
    bench.write(1400 * BLOCK, bench.rng.randbytes(20 * BLOCK))
    assert bench.create(~bench.owned)
    with Failing(bench, "flush"), pytest.raises(OSError):
        bench.engine.preserve(np.arange(1400, 1420) + bench.engine.shift)
    bench.store.commit()
    bench.kill()
    bench.verify()
    bench.write(1400 * BLOCK, bench.rng.randbytes(20 * BLOCK))
    bench.engine.flush()
    bench.kill()
    bench.verify()


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("seed", range(1, 5))
def test_random_work_with_errors_of_the_host(seed: int) -> None:
    """Now and then a write or a barrier fails once; work goes on, and a kill after a good flush loses nothing."""
    bench, rng = Bench(seed + 200), random.Random(seed)
    failed = 0
    free = [*range(1400, 2000), *range(2800, 3990)]
    hot = rng.sample(free, 40)
    with mock.patch.object(engine, "HOLD_ENTRIES", 24):
        for step in range(200):
            if step % 40 == 0 and len(bench.snapshots) < 4:
                bench.create(bench.some_blocks())
            kind = rng.choice(["pwrite", "flush"])
            failing = Failing(bench, kind, rng.randrange(1, 12)) if rng.random() < 0.3 else contextlib.nullcontext()
            with failing:
                dice = rng.random()
                try:
                    if dice < 0.85:
                        count = rng.randrange(1, 8)
                        bench.write(
                            rng.choice(hot if rng.random() < 0.5 else free) * BLOCK, rng.randbytes(count * BLOCK)
                        )
                    elif dice < 0.93:
                        bench.engine.flush()
                    else:
                        bench.engine.fold()
                except OSError:
                    failed += 1
            if step % 40 == 39:
                bench.engine.flush()
                bench.kill()
                bench.verify()
    assert failed


def test_one_write_that_takes_several_batches() -> None:
    """Every block has a record of its own, which is more than the log has place for."""
    bench = Bench(9)
    for block in range(2700, 3700, 2):
        bench.write(block * BLOCK, bench.rng.randbytes(BLOCK))
    assert bench.create(~bench.owned)
    bench.write(2700 * BLOCK, bench.rng.randbytes(1000 * BLOCK))
    bench.reopen()
    bench.verify()


def test_what_is_recorded_is_not_given_back() -> None:
    """If memory ends after the barrier, the batch counts: its blocks stay what they are until the next open."""
    bench = Bench(10)
    bench.write(1400 * BLOCK, bench.rng.randbytes(20 * BLOCK))
    assert bench.create(~bench.owned)
    available = bench.store.available
    bench.write(1400 * BLOCK, bench.rng.randbytes(20 * BLOCK))
    with mock.patch.object(bench.engine.index, "add", side_effect=MemoryError), pytest.raises(MemoryError):
        bench.engine.commit()
    assert bench.store.available == available - 20
    bench.kill()
    bench.write(1400 * BLOCK, bytes(bench.base[1400 * BLOCK : 1420 * BLOCK]))
    bench.reopen()
    bench.verify()


def test_zeros_have_a_record_and_no_copy() -> None:
    """A block of zeros costs no block of the store, and a run of them one record."""
    bench = Bench(6)
    assert bench.create(~bench.owned)
    available = bench.store.available
    bench.write(1400 * BLOCK, bench.rng.randbytes(300 * BLOCK))
    bench.engine.flush()
    assert bench.store.available == available
    assert [
        (level.block.tolist(), level.length.tolist(), level.copy.tolist()) for level in bench.engine.index.levels
    ] == [([1400], [300], [fmt.ZERO_COPY])]
    bench.verify()


def test_a_write_across_rows_and_the_ragged_end() -> None:
    """One write over every group row behind the store, to the last byte of the volume."""
    bench = Bench(7)
    offset = 2700 * BLOCK + 77
    bench.write(offset, bench.rng.randbytes(bench.device.size - offset))
    flags = np.zeros(bench.count, np.bool_)
    flags[2700::3] = True
    flags[-1] = True
    assert bench.create(flags)
    bench.write(offset - 100, bench.rng.randbytes(bench.device.size - offset + 100))
    bench.verify()
    bench.reopen()
    bench.verify()


def test_two_hundred_snapshots() -> None:
    """Masks of four words; copies shared by many; deletes in random order until nothing is left."""
    bench = Bench(8, store=((100, 200), (1000, 1800)))
    free = bench.store.available
    for number in range(200):
        bench.write((300 + number % 7) * BLOCK, bench.rng.randbytes(3 * BLOCK))
        flags = np.zeros(bench.count, np.bool_)
        flags[301 : 330 + number % 5] = True
        assert bench.create(flags)
        if number in (70, 199):
            bench.verify()
    assert len(bench.snapshots) == 200
    assert bench.engine.masks.words == 4
    assert bench.store.root.counting == (1 << 200) - 1
    available = bench.store.available
    bench.write(322 * BLOCK, b"one copy for all of them")
    bench.engine.flush()
    assert available - bench.store.available <= 1  # block 322 was zeros or is copied once
    bench.reopen()
    bench.verify()
    for number in range(200):
        bench.random_delete()
        if number in (50, 140):
            bench.reopen()
            bench.verify()
            assert bench.create(lab.flags(bench.count, np.arange(500, 600)))
            bench.delete(bench.snapshots[-1])
    bench.reopen()
    assert not len(bench.engine.index)
    assert bench.engine.masks.count <= 64, "masks that nobody bears any more are forgotten"
    assert free - bench.store.available <= 4
    bench.verify()


def test_a_view_does_not_show_held_writes() -> None:
    """What waits in memory is newer than every snapshot."""
    bench = Bench(9)
    bench.write(400 * BLOCK, b"old" * 1000)
    assert bench.create(~bench.owned)
    bench.write(400 * BLOCK, b"new" * 1000)
    assert View(bench.engine, bench.snapshots[0]).pread(400 * BLOCK, 3000) == b"old" * 1000
    assert bench.engine.pread(400 * BLOCK, 3000) == b"new" * 1000
    assert bench.device.pread(400 * BLOCK, 3000) == b"old" * 1000
    bench.verify()


def test_a_damaged_copy_is_never_returned() -> None:
    """A copy that fails its checksum fails the read, of this block and of no other."""
    bench = Bench(10)
    bench.write(400 * BLOCK, b"a" * 2 * BLOCK)
    assert bench.create(~bench.owned)
    bench.write(400 * BLOCK, b"b" * 2 * BLOCK)
    bench.engine.flush()
    (level,) = bench.engine.index.levels
    at = int(bench.store.physical(level.copy)[0]) * BLOCK
    bench.device.content[at + 5] ^= 1
    view = View(bench.engine, bench.snapshots[0])
    with pytest.raises(DamagedCopy, match="block 400"):
        view.pread(400 * BLOCK, 10)
    assert view.pread(401 * BLOCK, BLOCK) == b"a" * BLOCK


def test_a_snapshot_keeps_its_place_in_the_table() -> None:
    """A freed bit is taken again only after no mask bears it: a new snapshot reads nothing of the old one's."""
    bench = Bench(11)
    bench.write(400 * BLOCK, b"first" * 200)
    assert bench.create(~bench.owned)
    bench.write(400 * BLOCK, b"second" * 200)
    assert bench.create(~bench.owned)
    bench.write(400 * BLOCK, b"third" * 200)
    bench.engine.flush()
    old = bench.snapshots[0]
    bench.delete(old)
    assert bench.create(~bench.owned)
    assert bench.snapshots[-1].bit == old.bit
    bench.verify()
    bench.reopen()
    bench.verify()


def test_a_hidden_block_that_all_have_a_copy_of_is_written_through_the_hold() -> None:
    """A crash may leave one: overwritten, and the log does not know it.  It reads as zeros; a write to it counts."""
    bench = Bench(12)
    bench.write(400 * BLOCK, bench.rng.randbytes(40 * BLOCK))
    assert bench.create(~bench.owned)
    with mock.patch.object(hidden, "HIDE_BYTES", 0):
        bench.punch(400 * BLOCK, 40 * BLOCK)
    bench.engine.flush()
    bench.engine.pwrite(410 * BLOCK, b"lost" * BLOCK)
    bench.engine.commit()
    bench.kill()
    bench.verify()
    bench.write(411 * BLOCK, b"kept" * (BLOCK // 4))
    bench.verify()
    bench.reopen()
    bench.verify()
