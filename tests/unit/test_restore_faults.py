"""A restore fails once and the process goes on, as servers do: no snapshot is harmed, and the restore is done or not.

What is there is compared as whole images with copies that were made before.
"""

from __future__ import annotations

import errno
import functools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import lab
import numpy as np
import pytest
from lab import opened

from extsnap.arrays import Ints, expand
from extsnap.blockdev.recording import FaultKind, FaultyDevice, MemoryDevice, OperationKind, RecordingDevice
from extsnap.errors import DamagedCopy, ExtsnapError, NeedsRecovery
from extsnap.snapshot.engine import Engine
from extsnap.snapshot.volume import Volume

CopiesFor = Callable[[Iterable[Ints]], int]


def serving(content: bytes) -> tuple[Volume, MemoryDevice]:
    below = MemoryDevice(content)
    volume = opened(below)
    volume.begin_serving()
    return volume, below


def views_of(volume: Volume) -> dict[str, bytes]:
    return {name: volume.open_view(name).pread(0, volume.size) for name in volume.snapshot_names()}


def overwrite(volume: Volume, blocks: list[int], seed: int) -> None:
    rng = random.Random(seed)
    for block in rng.sample(blocks, len(blocks)):
        volume.write(block * lab.BLOCK, rng.randbytes(lab.BLOCK))
    volume.flush()


@dataclass(frozen=True)
class Past:
    """A served volume with two snapshots, killed.

    Attributes:
        content: The medium.
        views: Of its snapshots.
        base: The base volume.
        files: bool[blocks]: those of files, in the base and in both snapshots.
        operations: Writes, punches and flushes of its restore to "one".
        reads: Its reads.
    """

    content: bytes
    views: dict[str, bytes]
    base: bytes
    files: lab.Flags
    operations: int
    reads: int

    @property
    def blocks(self) -> list[int]:
        found: list[int] = np.flatnonzero(self.files).tolist()
        return found


@functools.cache
def past() -> Past:
    device = MemoryDevice(lab.plain_image("ext2"))
    opened(device).create("one")
    files = lab.survey(bytes(device.content)).files
    volume, device = serving(bytes(device.content))
    blocks = np.flatnonzero(files).tolist()
    overwrite(volume, blocks[:300], 1)
    volume.create("two")
    overwrite(volume, blocks[200:450], 2)
    content, views, base = bytes(device.content), views_of(volume), bytes(volume.read(0, volume.size))
    volume, device = serving(content)
    counter = volume._device.below = FaultyDevice(device, fail_at=0)
    volume.verb("restore", name="one")
    return Past(content, views, base, files, counter.count, counter.counts["read"])


CHANGES: tuple[OperationKind, ...] = ("write", "punch", "flush")


def goes_on(then: Past, fail_at: int, kind: FaultKind, operations: tuple[OperationKind, ...] = CHANGES) -> str:
    """Restore with a fault, go on, get killed, be opened again; returns what the restore said."""
    volume, below = serving(then.content)
    device = volume._device.below = FaultyDevice(below, fail_at=fail_at, kind=kind, operations=operations)
    with pytest.raises((OSError, ExtsnapError)) as failure:
        volume.verb("restore", name="one")
    assert device.failures == 1
    begun = isinstance(failure.value, NeedsRecovery)
    assert begun == (volume.standing is not None or volume.restoring is not None), "that is not what was told"
    if begun:
        for action in (lambda: volume.read(0, 512), lambda: volume.write(0, bytes(512)), volume.flush):
            with pytest.raises(OSError, match="a restore was begun") as refused:
                action()
            assert refused.value.errno == errno.EIO
    volume.create("later")
    there = set(volume.snapshot_names()) - set(then.views) - {"later"}
    base = volume.read(0, volume.size)
    safe = {name: volume.open_view(name).pread(0, volume.size) for name in there}
    done = bool(there)
    assert done or not begun, "the next command has not finished the restore"
    wanted = then.views["one"] if done else then.base
    assert not (lab.unequal(base, wanted) & then.files).any(), "neither the volume of before nor the snapshot"
    for content in safe.values():
        assert not (lab.unequal(content, then.base) & then.files).any(), "the safety snapshot is not what was there"
    later = volume.open_view("later").pread(0, volume.size)
    overwrite(volume, then.blocks[::3], 3)
    base = volume.read(0, volume.size)
    again = opened(MemoryDevice(bytes(below.content)))  # killed
    assert views_of(again) == {**then.views, **safe, "later": later}
    found = again.read(0, again.size)
    assert not (lab.unequal(found, base) & then.files).any()
    assert again.verb("check")["store"]["ok"]
    return str(failure.value) if begun else ""


@pytest.mark.parametrize(("kind", "every"), [("ENOSPC", 4), ("short", 7)])
def test_a_server_goes_on_after_a_restore_that_failed(kind: FaultKind, every: int) -> None:
    """The faults are of its last operations: those before are the growth of the store, see tests/crash."""
    then = past()
    said = [goes_on(then, fail_at, kind) for fail_at in range(then.operations, 10, -every)]
    begun = [text for text in said if "was begun and is not finished" in text]
    done = [text for text in said if "is restored to 'one', but not yet at rest" in text]
    assert len(begun) >= 5, "the faults do not hit what is to be hit"
    assert done
    for text in begun + done:
        assert "the next command that writes" in text


def test_a_restore_that_is_done_is_not_told_as_one_that_failed() -> None:
    """What is read after its last commit fails: the snapshot and its safety are there, and the next command goes on."""
    then = past()
    said = [goes_on(then, fail_at, "EIO", ("read",)) for fail_at in range(then.reads, then.reads - 12, -1)]
    done = [text for text in said if "is restored to 'one', but not yet at rest" in text]
    begun = [text for text in said if "was begun and is not finished" in text]
    assert len(done) >= 3, "the faults do not hit what is to be hit"
    assert begun
    assert len(done) + len(begun) == len(said)


def test_what_a_restore_at_rest_has_left_is_done_by_the_next_command() -> None:
    then = past()
    content = opened(MemoryDevice(then.content))
    content.settle()
    start = bytes(content._device.pread(0, content.size))
    counting = FaultyDevice(MemoryDevice(start), fail_at=0)
    opened(counting).verb("restore", name="one")
    for again in (False, True):
        below = MemoryDevice(start)
        volume = opened(FaultyDevice(below, fail_at=counting.count - 8))
        with pytest.raises(NeedsRecovery, match=r"is restored to 'one', but not yet at rest: .*; the next command"):
            volume.verb("restore", name="one")
        assert volume.medium.state.mark
        if again:
            volume = opened(MemoryDevice(bytes(below.content)))
        else:
            volume.verb("set", values={})
            volume.verb("create", name="later")
        assert not volume.medium.state.mark
        assert not (lab.unequal(volume.read(0, volume.size), then.views["one"]) & then.files).any()
        assert sum(name.startswith("before-restore-one") for name in volume.snapshot_names()) == 1


def stuck(then: Past, fail_at: int) -> bytes:
    """A volume whose restore to "one" was begun, and cannot be done: a copy that it needs is damaged."""
    volume, below = serving(then.content)
    volume._device.below = FaultyDevice(below, fail_at=fail_at, kind="gone")
    with pytest.raises((OSError, ExtsnapError)):
        volume.verb("restore", name="one")
    device = MemoryDevice(bytes(below.content))
    volume = opened(device, writable=False)
    engine, store = volume.require_engine(), volume.require_store()
    assert store.root.restore is not None
    mine = engine.masks.has(volume.find("one").bit) & ~engine.masks.has(volume.find("two").bit)
    copies = np.concatenate([level.copy[mine[level.mask] & (level.copy >= 0)] for level in engine.index.levels])
    place = int(store.physical(copies[-1:])[0]) * lab.BLOCK
    device.pwrite(place, bytes(byte ^ 0xFF for byte in device.pread(place, lab.BLOCK)))
    return bytes(device.content)


def safety_of(volume: Volume) -> str:
    (name,) = (entry.name for entry in volume.snapshot_list() if entry.restored_from == "one")
    return name


@pytest.mark.parametrize("back", ["7", "half"])
def test_a_restore_that_cannot_be_done_gives_way_to_another(back: str) -> None:
    """Nothing else may be done meanwhile; no copy is harmed, and the volume of before comes back."""
    then = past()
    fail_at = then.operations * 3 // 4 if back == "half" else then.operations - int(back)
    content = stuck(then, fail_at)
    for name in ("the safety snapshot", "two"):
        device = MemoryDevice(content)
        volume = opened(device)
        safety = safety_of(volume)
        goes_back = rf"begun and is not finished: .* fails its checksum; .* extsnap restore image {safety} goes back"
        for verb, arguments in (
            ("create", {"name": "later"}),
            ("delete", {"names": [safety]}),
            ("delete", {"names": ["one"]}),
            ("strip", {}),
            ("restore", {"name": "one"}),
        ):
            with pytest.raises(NeedsRecovery, match=goes_back):
                volume.verb(verb, **arguments)
        with pytest.raises(NeedsRecovery, match=goes_back):
            volume.begin_serving()
        with pytest.raises(OSError, match="a restore was begun"):
            volume.read(0, 512)
        views = {other: volume.open_view(other).pread(0, volume.size) for other in (safety, "two")}
        assert views["two"] == then.views["two"]
        target = safety if name != "two" else "two"
        told = volume.verb("restore", name=target)
        assert told["safety"] == (None if target == safety else safety)
        assert not volume.medium.state.mark
        assert volume.require_store().root.restore is None
        assert not (lab.unequal(volume.read(0, volume.size), views[target]) & then.files).any()
        assert not (lab.unequal(views[safety], then.base) & then.files).any()
        assert {other: volume.open_view(other).pread(0, volume.size) for other in views} == views
        assert not lab.complaint(bytes(device.content))
        volume.create("later")
        assert volume.verb("restore", name=safety if target == "two" else "two")["safety"]
        assert {other: volume.open_view(other).pread(0, volume.size) for other in views} == views
        assert not lab.complaint(bytes(device.content))


def test_a_restore_that_takes_the_place_of_another_needs_no_room_for_what_it_has() -> None:
    """Much of what it writes has been copied for the first one: room for the rest is enough, to the block."""
    then = past()
    content = stuck(then, then.operations * 3 // 4)
    exact: list[int] = []
    for _ in range(2):
        volume = opened(MemoryDevice(content))
        engine = volume.require_engine()
        reserve, copies_for = engine.reserve, engine.copies_for

        def count(needed: Iterable[Ints], copies_for: CopiesFor = copies_for) -> int:
            exact.append(copies_for(needed))
            return exact[-1]

        def just_enough(engine: Engine = engine, reserve: Callable[[], int] = reserve) -> int:
            """What is kept back, in a store that has room for so many copies until the other one is begun."""
            standing = engine.store.root.restore
            is_begun = standing is None or standing.target_id != engine.snapshots[0].id
            return reserve() if is_begun else engine.store.available - engine.blocks_for(exact[0])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "reserve", just_enough) if exact else patch.setattr(engine, "copies_for", count)
            assert volume.verb("restore", name=safety_of(volume))
        assert not (lab.unequal(volume.read(0, volume.size), then.base) & then.files).any()


def test_a_restore_that_takes_the_place_of_another_is_cut() -> None:
    """Either of them is to be done at any time, and what is restored at last is what the safety snapshot has."""
    then = past()
    content = stuck(then, then.operations * 3 // 4)
    device = RecordingDevice(MemoryDevice(content))
    volume = opened(device)
    device.log.clear()
    device.initial = bytes(device.pread(0, device.size))
    safety = safety_of(volume)
    volume.verb("restore", name=safety)
    found = []
    points = range(0, len(device.log) + 1, max(1, len(device.log) // 24))
    for state in device.crash_states(random.Random(1), points=points):
        below = MemoryDevice(bytes(state.content))
        volume = opened(below)
        found.append(volume.standing is not None)
        if volume.standing is not None:
            assert volume.standing.target_id == volume.find("one").id
            volume.verb("restore", name=safety)
        assert not volume.medium.state.mark
        assert not (lab.unequal(volume.read(0, volume.size), then.base) & then.files).any()
        assert volume.open_view("two").pread(0, volume.size) == then.views["two"]
        assert not lab.complaint(bytes(below.content))
    assert any(found)
    assert not all(found)


def test_an_open_that_cannot_finish_a_restore_leaves_it_to_the_next() -> None:
    """Nor does the process that gave it up write anything of it afterwards."""
    then = past()
    for fail_at in range(then.operations // 2, then.operations, 9):
        volume, below = serving(then.content)
        volume._device.below = FaultyDevice(below, fail_at=fail_at, kind="gone")
        with pytest.raises((OSError, ExtsnapError)):
            volume.verb("restore", name="one")
        content = bytes(below.content)
        for again in range(1, 9, 2):
            device = MemoryDevice(content)
            try:
                opened(FaultyDevice(device, fail_at=again, kind="EIO"))
            except OSError:
                content = bytes(device.content)
        finished = opened(MemoryDevice(content))
        assert {name: view for name, view in views_of(finished).items() if name in then.views} == then.views
        assert finished.require_store().root.restore is None
        assert not (lab.unequal(finished.read(0, finished.size), then.views["one"]) & then.files).any()


def test_a_restore_without_safety_is_not_begun_where_a_copy_is_damaged() -> None:
    """There would be no way back and none to its end."""
    then = past()
    volume, _ = serving(then.content)
    engine = volume.require_engine()
    (level,) = (level for level in engine.index.levels if then.blocks[150] in expand(level.block, level.length))
    at = expand(level.block, level.length).tolist().index(then.blocks[150])
    copy = expand(level.copy, level.length)[at : at + 1]
    spoiled = bytearray(then.content)
    spoiled[int(volume.require_store().physical(copy)[0]) * lab.BLOCK] ^= 1
    volume, below = serving(bytes(spoiled))
    with pytest.raises(DamagedCopy):
        volume.verb("restore", name="one", safety=False)
    assert volume.standing is None
    for now in (volume, opened(MemoryDevice(bytes(below.content)))):
        assert not (lab.unequal(now.read(0, now.size), then.base) & then.files).any()
    volume.create("three")
