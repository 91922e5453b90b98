"""The design's invariants over random sequences of operations and crashes on a model of ten blocks.

Every sequence has a number; seed and number (and the sabotage, if any) are all that is needed to see it again:

    python tests/property/test_model.py SEED NUMBER [SABOTAGE]
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import model
import pytest
from model import (
    BITS,
    BLOCKS,
    EVERYTHING,
    IN_INODE,
    NONE,
    SABOTAGES,
    ZERO,
    Crash,
    Engine,
    Header,
    Medium,
    Meta,
    NoSpace,
)

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))  # when this file is run by itself
from shares import taken

SEED = int(os.environ.get("EXTSNAP_MODEL_SEED", "20261122"))
LONG = bool(os.environ.get("EXTSNAP_LONG"))
SEQUENCES = 1_000_000 if LONG else 100_000
#: In CI one sequence in five, which ones the commit decides: they try the model, which seldom changes.
NUMBERS = range(SEQUENCES) if LONG else taken(range(SEQUENCES), 5)
SABOTAGED = 30_000  # sequences within which a sabotage must show

State = dict[int, Any]  # block -> content


class Sequence:
    """One random history: the engine, and beside it what a user would remember."""

    def __init__(self, seed: int, number: int, sabotage: str = "", *, talk: bool = False) -> None:
        self.rng = random.Random(seed * 1_000_003 + number)
        self.sabotage = sabotage
        self.talk = talk
        self.next_content = 1
        blocks = list(range(1, BLOCKS))
        self.rng.shuffle(blocks)
        store = blocks[: self.rng.randrange(2, 6)]
        mapping = store.pop() if len(store) > IN_INODE + 1 else NONE
        if mapping == NONE and len(store) > IN_INODE:
            store.pop()
        used = [block for block in blocks if block not in store and block != mapping]
        used = used[: self.rng.randrange(1, len(used))]
        data = sum(1 << block for block in store)
        contents: list[Any] = [0] * BLOCKS
        for block in used:
            contents[block] = self.content()
        bitmap = 1 | data | model.bit_of(mapping) | sum(1 << block for block in used)
        contents[0] = Meta(bitmap, data, mapping)
        if mapping != NONE:
            contents[mapping] = ("map", data)
        extents = (data, mapping)
        self.medium = Medium(contents, Header(extents, extents, store[0], {}, ()))
        self.engine = Engine(self.medium, self.rng, sabotage)
        self.user: State = {block: contents[block] for block in used}
        self.snapshots: dict[int, State] = {}
        self.epochs: dict[int, dict[int, int]] = {}  # snapshot -> block -> how often it had been written
        self.written = [0] * BLOCKS

    def content(self) -> int:
        """A new content; sometimes zeros."""
        if self.rng.random() < 0.15:
            return 0
        self.next_content += 1
        return self.next_content

    # Operations: each returns what the user's blocks and the snapshots are afterwards.

    def step(self) -> None:
        """Do one random operation, perhaps with a crash in it, and check everything."""
        rng = self.rng
        operation = rng.choice(_OPERATIONS)
        crashing = rng.random() < 0.25
        after = getattr(self, operation)(dry=True)
        if after is None:
            return
        arguments, user, snapshots = after
        if crashing:
            self.medium.fuse = rng.randrange(9)
        outcomes = [(user, snapshots)]
        try:
            getattr(self, f"do_{operation}")(*arguments)
            self.medium.barrier()
            self.medium.fuse = -1
        except NoSpace:
            self.medium.fuse = -1
            self.medium.barrier()
            outcomes = [(self.user, self.snapshots)]
        except Crash:
            outcomes.insert(0, (self.user, self.snapshots))
            self.recover(operation)
        if self.talk:
            header = self.engine.header
            print(f"{operation}{arguments} crash={len(outcomes) > 1}: {self.engine.meta}")
            print(f"    {header}\n    {self.medium.now}")
        self.check(operation, outcomes)

    def recover(self, operation: str) -> None:
        for _ in range(3):
            self.medium.crash(self.rng)
            # Power may fail during recovery as well.
            self.medium.fuse = self.rng.choice((-1, -1, 0, 2, 5))
            self.engine = Engine(self.medium, self.rng, self.sabotage)
            try:
                self.engine.recover()
                self.medium.fuse = -1
                return
            except Crash:
                continue
            except NoSpace:
                raise AssertionError(f"no room to recover from a crash in {operation}") from None
        self.medium.crash(self.rng)
        self.engine.recover()

    def overwrite(self, dry: bool) -> Any:
        if not self.user:
            return None
        block, content = self.rng.choice(sorted(self.user)), self.content()
        return (block, content), {**self.user, block: content}, self.snapshots

    def do_overwrite(self, block: int, content: int) -> None:
        self.engine.write((block, content))

    def allocate(self, dry: bool) -> Any:
        free = EVERYTHING & ~self.engine.meta.bitmap
        if not free:
            return None
        block, content = self.rng.choice(model.blocks_of(free)), self.content()
        return (block, content), {**self.user, block: content}, self.snapshots

    def do_allocate(self, block: int, content: int) -> None:
        self.engine.write((block, content))
        self.medium.barrier()
        meta = self.engine.meta
        self.engine.write((0, meta._replace(bitmap=meta.bitmap | 1 << block)))

    def release(self, dry: bool) -> Any:
        if not self.user:
            return None
        block = self.rng.choice(sorted(self.user))
        left = {other: content for other, content in self.user.items() if other != block}
        return (block, self.rng.random() < 0.5), left, self.snapshots

    def do_release(self, block: int, discard: bool) -> None:
        meta = self.engine.meta
        self.engine.write((0, meta._replace(bitmap=meta.bitmap & ~(1 << block))))
        self.medium.barrier()
        if discard:
            try:
                self.engine.write((block, 0))
            except NoSpace:
                pass  # the block is released all the same

    def create(self, dry: bool) -> Any:
        bit = self.engine.free_bit(BITS[:3])
        if not bit:
            return None
        return (bit,), self.user, {**self.snapshots, bit: self.moment()}

    def moment(self) -> State:
        """What a snapshot taken now must show for ever: everything in use but the store's data."""
        meta = self.medium.now[0]
        return {block: self.medium.now[block] for block in model.blocks_of(meta.bitmap & ~meta.data)}

    def do_create(self, bit: int) -> None:
        self.engine.create(bit)

    def delete(self, dry: bool) -> Any:
        if not self.snapshots:
            return None
        bit = self.rng.choice(sorted(self.snapshots))
        return (bit,), self.user, {other: state for other, state in self.snapshots.items() if other != bit}

    def do_delete(self, bit: int) -> None:
        self.engine.delete(bit)

    def grow(self, dry: bool) -> Any:
        return (self.rng.random() < 0.5,), self.user, self.snapshots

    def do_grow(self, live: bool) -> None:
        self.engine.grow(live=live)

    def shrink(self, dry: bool) -> Any:
        return (), self.user, self.snapshots

    def do_shrink(self) -> None:
        self.engine.shrink()

    def restore(self, dry: bool) -> Any:
        if not self.snapshots:
            return None
        bit = self.rng.choice(sorted(self.snapshots))
        then = self.snapshots[bit][0].user
        user = {block: content for block, content in self.snapshots[bit].items() if then >> block & 1}
        safety = self.engine.free_bit(BITS[-1:]) if self.rng.random() < 0.6 else 0
        snapshots = {**self.snapshots, safety: self.moment()} if safety else self.snapshots
        return (bit, bool(safety)), user, snapshots

    def do_restore(self, bit: int, safety: bool) -> None:
        self.engine.restore(bit, safety=safety)

    # Invariants.

    def check(self, operation: str, outcomes: list[tuple[State, dict[int, State]]]) -> None:
        """Assert everything that must hold at rest.

        Args:
            operation: What was done, for the message.
            outcomes: What may be: after a crash, the state before or the state after, whole; else one.
        """
        header = self.medium.header
        now = self.medium.now
        meta = now[0]
        assert not self.medium.pending
        assert header.intent is None
        # Two bitmaps: what the header, the inode and the bitmap say of the store.
        data, mapping = header.owned
        assert header.owned == header.wanted == (meta.data, meta.mapping), "header and inode disagree"
        assert (mapping != NONE) == (data.bit_count() > IN_INODE)
        assert mapping == NONE or now[mapping] == ("map", data), "the mapping block is wrong"
        assert not meta.data & model.bit_of(mapping)
        assert meta.bitmap & (meta.store | 1) == meta.store | 1, "the store is not a subset of the bitmap"
        assert meta.bitmap & 1
        # The base volume: the user's blocks, nothing leaked, nothing lost.
        user = {block: now[block] for block in model.blocks_of(meta.user)}
        possible = [(was, snapshots) for was, snapshots in outcomes if was.keys() == user.keys()]
        possible = [(was, snapshots) for was, snapshots in possible if was == user]
        assert possible, f"the base volume is {user}, should be one of {[was for was, _ in outcomes]}"
        possible = [(was, snapshots) for was, snapshots in outcomes if snapshots.keys() == header.snapshots.keys()]
        assert possible, f"snapshots are {list(header.snapshots)}"
        snapshots = possible[-1][1]
        if operation == "restore" and len(outcomes) > 1 and 8 in snapshots and 8 not in self.snapshots:
            assert user == outcomes[-1][0], "a restore whose safety snapshot exists was not completed"
        # Views.
        copies = 0
        allocated = sum(header.snapshots)
        seen: dict[int, int] = {}
        for block, copy, mask in header.records:
            assert mask, "a record with an empty mask"
            assert not mask & ~allocated, "a record bears the bit of no snapshot"
            assert not seen.get(block, 0) & mask, "two records of a block for one snapshot"
            seen[block] = seen.get(block, 0) | mask
            for bit, preserved in header.snapshots.items():
                assert not mask & bit or preserved >> block & 1, "a record for a snapshot that does not preserve it"
            if copy != ZERO:
                assert data >> copy & 1, "a copy outside the store"
                assert not copies >> copy & 1, "two records share a copy block"
                assert copy != header.home, "a copy in the header's block"
                copies |= 1 << copy
        assert data >> header.home & 1, "the header is outside the store"
        for bit, state in snapshots.items():
            preserved = header.snapshots[bit]
            assert preserved == sum(1 << block for block in state), "preserved blocks are wrong"
            for block, content in state.items():
                if not seen.get(block, 0) & bit:
                    assert not data >> block & 1, (
                        f"block {block}, which a snapshot needs, is the store's without record"
                    )
                    assert now[block] == content, f"snapshot {bit} shows {now[block]} in block {block}, not {content}"
        for block, copy, mask in header.records:
            content = 0 if copy == ZERO else now[copy]
            for bit, state in snapshots.items():
                if mask & bit:
                    assert state[block] == content, (
                        f"snapshot {bit} has copy {content} of block {block}, {state[block]}"
                    )
        # Sharing: snapshots that saw the same content of a block, one after the other, have one record for it.
        for block, bits in seen.items():
            holders = [bit for bit in snapshots if bits & bit]
            for older, newer in itertools.pairwise(holders):
                epochs = [self.epochs.get(bit, {}).get(block, bit - 100) for bit in (older, newer)]
                if epochs[0] == epochs[1]:
                    assert any(
                        record.block == block and record.mask & older and record.mask & newer
                        for record in header.records
                    ), f"snapshots {older} and {newer} do not share the copy of block {block}"
        self.remember(operation, user, snapshots, crashed=len(outcomes) > 1)

    def remember(self, operation: str, user: State, snapshots: dict[int, State], *, crashed: bool) -> None:
        """Make what was found the state from which the next operation starts."""
        for block in range(BLOCKS):
            if self.user.get(block) != user.get(block):
                self.written[block] += 1
        # The safety snapshot of a restore saw what was before: it gets no epoch, and shares as it can.
        for new in snapshots.keys() - self.snapshots.keys() if operation == "create" else ():
            self.epochs[new] = {block: self.written[block] for block in user}
        for gone in self.snapshots.keys() - snapshots.keys():
            self.epochs.pop(gone, None)
        if operation == "restore" or crashed:
            # A restored block is equal to its copy again, and a crash may leave a record of a block that was not
            # overwritten after all: who shares with whom starts anew.
            self.epochs.clear()
        self.user, self.snapshots = user, snapshots

    def run(self) -> None:
        for _ in range(self.rng.randrange(6, 20)):
            self.step()


_WEIGHTS = {"overwrite": 4, "allocate": 2, "release": 4, "create": 5, "delete": 2, "grow": 7, "shrink": 1, "restore": 4}
_OPERATIONS = [operation for operation, weight in _WEIGHTS.items() for _ in range(weight)]


def first_failure(numbers: Iterable[int], sabotage: str = "") -> tuple[int, BaseException] | None:
    """Return the number of the first of these sequences that breaks an invariant, and how; None if none does."""
    for number in numbers:
        try:
            Sequence(SEED, number, sabotage).run()
        except Exception as error:  # a broken model may fail in any way: that is what is looked for
            return number, error
    return None


@pytest.mark.slow
def test_every_sequence_keeps_the_invariants(capsys):
    with capsys.disabled():
        print(f"\nmodel: {len(NUMBERS):,} sequences, seed {SEED}")
    failure = first_failure(NUMBERS)
    if failure is not None:
        number, error = failure
        again = f"python {__file__} {SEED} {number}"
        raise AssertionError(f"sequence {number}: {error!r}; see it again: {again}") from error


def test_some_sequences_keep_the_invariants():
    assert first_failure(range(2000)) is None


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_every_sabotage_of_the_model_is_caught(sabotage):
    assert first_failure(range(SABOTAGED), sabotage) is not None, SABOTAGES[sabotage]


def test_the_sequences_reach_what_they_are_meant_to_reach():
    """Coverage of the model itself: each kind of situation occurs often."""
    counts = dict.fromkeys(
        ("mapping", "adopted", "zero", "shared", "three snapshots", "restored", "crashed", "full"), 0
    )
    for number in range(1000):
        sequence = Sequence(SEED, number)
        grown = sequence.engine

        def restore(bit, *, safety, engine=grown):
            Engine.restore(engine, bit, safety=safety)
            counts["restored"] += 1

        grown.restore = restore
        for _ in range(12):
            try:
                sequence.step()
            finally:
                header = sequence.medium.header
                counts["mapping"] += header.owned[1] != NONE
                counts["adopted"] += any(record.copy == record.block for record in header.records)
                counts["zero"] += any(record.copy == ZERO for record in header.records)
                counts["shared"] += any(record.mask.bit_count() > 1 for record in header.records)
                counts["three snapshots"] += len(header.snapshots) >= 3
                counts["crashed"] += sequence.engine is not grown
                counts["full"] += not sequence.engine.spare()
    assert min(counts.values()) > 150, counts


if __name__ == "__main__":
    Sequence(int(sys.argv[1]), int(sys.argv[2]), "".join(sys.argv[3:]), talk=True).run()
