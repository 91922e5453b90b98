"""An operation fails half way, the state in memory is given up and read anew, and the process goes on, as servers do.

What is read then must be what a power cut would leave; where it cannot be read, nobody is told anything else.
Judged by whole images: of every snapshot as it was before, and of the base volume.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import lab
import numpy as np
import pytest
from lab import BLOCK, MemoryDevice, opened

from extsnap.blockdev.base import CloningDevice
from extsnap.blockdev.recording import EVERYTHING, NOTHING, Cuts, RecordingDevice
from extsnap.errors import ExtsnapError, StoreProtected
from extsnap.snapshot import edit
from extsnap.snapshot.engine import Engine
from extsnap.snapshot.medium import read_state
from extsnap.snapshot.volume import Volume


class Shaky:
    """A device whose operations fail where they are told to, and do nothing then.

    Attributes:
        bad: Asked before every operation: its kind and, for all but reads, its number from 1 on.
        count: Operations so far, reads left out.
        failures: Those that failed.
    """

    clone_least = 0

    def __init__(self, below: CloningDevice) -> None:
        self.below = below
        self.size = below.size
        self.bad: Callable[[str, int], bool] = lambda kind, number: False
        self.count = 0
        self.failures: list[str] = []

    def begin(self, bad: Callable[[str, int], bool]) -> None:
        self.bad, self.count, self.failures = bad, 0, []

    def _do(self, kind: str) -> None:
        self.count += kind != "read"
        if self.bad(kind, self.count):
            self.failures.append(kind)
            raise OSError(errno.EIO, f"{kind} {self.count} failed")

    def pread(self, offset: int, length: int) -> bytes:
        self._do("read")
        return self.below.pread(offset, length)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._do("read")
        self.below.readinto(offset, buffer)

    def pwrite(self, offset: int, data: bytes) -> None:
        self._do("write")
        self.below.pwrite(offset, data)

    def punch(self, offset: int, length: int) -> None:
        self._do("punch")
        self.below.punch(offset, length)

    def clone(self, source: int, target: int, length: int) -> bool:
        return False

    def flush(self) -> None:
        self._do("flush")
        self.below.flush()


def on(number: int) -> Callable[[str, int], bool]:
    """The operation with this number fails, if it is no read."""
    return lambda kind, count: kind != "read" and count == number


def never(kind: str, number: int) -> bool:
    return False


def views_of(volume: Volume) -> dict[str, bytes]:
    return {name: volume.open_view(name).pread(0, volume.size) for name in volume.snapshot_names()}


def overwrite(volume: Volume, blocks: list[int], seed: int) -> None:
    rng = random.Random(seed)
    for block in blocks:
        volume.write(block * BLOCK, rng.randbytes(BLOCK))
    volume.flush()


@dataclass(frozen=True)
class Past:
    """A volume of which a server was killed.

    Attributes:
        content: The medium.
        files: Blocks of files.
        views: Of its snapshots.
        base: The base volume.
    """

    content: bytes
    files: list[int]
    views: dict[str, bytes]
    base: bytes

    def served(self) -> tuple[Volume, Shaky, MemoryDevice]:
        device = MemoryDevice(self.content)
        shaky = Shaky(device)
        volume = opened(shaky)
        volume.begin_serving()
        return volume, shaky, device

    def require_exact(self, volume: Volume, *gone: str) -> None:
        """All snapshots that were there are, and are what they were."""
        now = views_of(volume)
        for name in set(self.views) - set(gone):
            assert now.get(name) == self.views[name], name

    def differs(self, one: bytes, other: bytes) -> bool:
        """Whether two volumes have different files."""
        return bool(lab.unequal(one, other)[self.files].any())


class Above:
    """A server; somebody has the filesystem open."""

    def in_use(self) -> bool:
        return True

    def say(self, message: str) -> None:
        pass


@functools.cache
def past(kind: str) -> Past:
    device = MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    volume.create("one")
    files = np.flatnonzero(lab.survey(lab.plain_image(kind)).files).tolist()
    volume.begin_serving()
    overwrite(volume, files[:150], 1)
    volume.create("two")
    overwrite(volume, files[100:200], 2)
    return Past(bytes(device.content), files, views_of(volume), bytes(volume.read(0, volume.size)))


@functools.cache
def young(kind: str) -> Past:
    """One whose snapshot was just taken."""
    device = MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    volume.create("one")
    volume.begin_serving()
    files = np.flatnonzero(lab.survey(lab.plain_image(kind)).files).tolist()
    return Past(bytes(device.content), files, views_of(volume), bytes(volume.read(0, volume.size)))


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_only_what_is_durable_is_believed(kind: str) -> None:
    """A barrier of a create fails; it goes on, overwrites, and the power fails."""
    before = past(kind)
    tried = 0
    for number in range(1, 60):
        recording = RecordingDevice(MemoryDevice(before.content))
        volume = opened(recording)
        volume.begin_serving()
        shaky = volume._device.below = Shaky(recording)
        shaky.begin(lambda kind, count, number=number: kind == "flush" and count == number)
        with contextlib.suppress(OSError):
            volume.create("three")
        shaky.bad = never
        if shaky.count < number:
            break
        if not shaky.failures:
            continue
        tried += 1
        mark = len(recording.log)
        overwrite(volume, before.files[200:320], 3)
        cuts = Cuts(recording.initial, recording.log)
        for point in {mark, (mark + len(recording.log)) // 2, len(recording.log)}:
            for seed in (NOTHING, EVERYTHING, number):
                before.require_exact(opened(MemoryDevice(bytes(cuts.state(point, seed).content))))
    assert tried >= 3


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_batch_that_nobody_waited_for_is_looked_at(kind: str) -> None:
    """A punch fails when its batch is in the log, a create fails behind it; and what it had copied is written over."""
    before = young(kind)
    cases = 0
    for first in range(4, 7):
        for second in range(1, 20, 3):
            volume, shaky, device = before.served()
            shaky.begin(on(first))
            with contextlib.suppress(OSError):
                volume.punch(before.files[20] * BLOCK, 20 * BLOCK)
            shaky.begin(on(second))
            with contextlib.suppress(OSError, ExtsnapError):
                volume.create("three")
            cases += bool(shaky.failures)
            shaky.bad = never
            before.require_exact(volume)
            overwrite(volume, before.files[20:40], 4)
            before.require_exact(volume)
            before.require_exact(opened(MemoryDevice(bytes(device.content))))
    assert cases > 10


NEXT: dict[str, dict[str, Any]] = {"create": {"name": "three"}, "delete": {"names": ["two"]}, "list": {}, "strip": {}}


@pytest.mark.parametrize("verb", NEXT)
@pytest.mark.parametrize("reads", [1, 2, 4])
def test_a_state_that_cannot_be_read_is_read_by_the_next_command(verb: str, reads: int) -> None:
    """A restore fails at any time, and so does the reading of what is there; then the host is well again."""
    before = past("ext4")
    lost = 0
    for number in [2, 5, 8, 12, 20, 30]:
        volume, shaky, device = before.served()
        seen = [0]

        def bad(kind: str, count: int, number: int = number, shaky: Shaky = shaky, seen: list[int] = seen) -> bool:
            if kind != "read":
                return count == number
            seen[0] += bool(shaky.failures)
            return seen[0] == reads

        shaky.begin(bad)
        with pytest.raises((OSError, ExtsnapError)):
            volume.verb("restore", name="one")
        if shaky.failures[1:] != ["read"]:
            continue
        lost += 1
        with pytest.raises(OSError, match="could not be read again"):
            volume.read(0, BLOCK)
        with pytest.raises(OSError, match="could not be read again"):
            volume.require_store()
        with pytest.raises(OSError, match="could not be read again"):
            volume.find("one")
        shaky.bad = lambda kind, count: kind == "read"
        with pytest.raises(OSError):
            volume.verb(verb, **NEXT[verb])  # nothing is made up
        shaky.bad = never
        result = volume.verb(verb, **NEXT[verb])
        if verb == "strip":
            assert result["snapshots"] >= 2
            continue
        again = opened(MemoryDevice(bytes(device.content)))
        before.require_exact(again, *(["two"] if verb == "delete" else []))
        assert again.verb("check")["store"]["ok"]
        base = bytes(again.read(0, again.size))
        if before.differs(base, before.base):
            assert not before.differs(base, before.views["one"]), "the restore was done, or it was not"
            safety = next(view for name, view in views_of(again).items() if name not in (*before.views, "three"))
            assert not before.differs(safety, before.base)
    assert lost >= 3


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_what_could_not_be_made_ready_is_at_rest(kind: str) -> None:
    """Serving fails to begin, and begins at the second try: all superblocks have the mark before a write."""
    device = MemoryDevice(lab.plain_image(kind))
    with opened(device) as first:
        first.create("one")
    content, files = bytes(device.content), np.flatnonzero(lab.survey(bytes(device.content)).files).tolist()
    for number in range(1, 400):
        below = MemoryDevice(content)
        shaky = Shaky(below)
        volume = opened(shaky)
        before = views_of(volume)
        shaky.begin(on(number))
        try:
            volume.begin_serving()
        except OSError:
            pass
        if not shaky.failures:
            break
        shaky.bad = never
        assert not lab.complaint(below.content)
        volume.begin_serving()
        states = [read_state(bytes(below.content[at : at + 1024])) for at in volume.medium.offsets]
        assert len(states) > 1
        assert all(state.mark for state in states)
        overwrite(volume, files[:5], number)
        again = opened(MemoryDevice(bytes(below.content)))
        assert not again.outside_write
        assert views_of(again) == before
        assert volume.end_serving()
        assert not lab.complaint(below.content)
    assert number > 10


def test_superblocks_say_the_same_after_a_change_of_state_that_failed() -> None:
    """The first snapshot of a volume in use puts the mark on, and fails half way."""
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.begin_serving(set_up=True)
    volume.close()
    content = bytes(device.content)
    for number in range(1, 100):
        below = MemoryDevice(content)
        shaky = Shaky(below)
        volume = opened(shaky)
        volume.begin_serving()
        volume.serve_below(Above())
        shaky.begin(on(number))
        try:
            volume.create("one", quiesced=True)
        except OSError:
            pass
        if not shaky.failures:
            break
        shaky.bad = never
        if not volume.snapshot_names():
            volume.create("one", quiesced=True)
        states = [read_state(bytes(below.content[at : at + 1024])) for at in volume.medium.offsets]
        assert len(states) > 1
        assert all(state.mark for state in states)
        assert opened(MemoryDevice(bytes(below.content))).snapshot_names() == ["one"]
    assert number > 10


def test_a_commit_that_fails_again_and_again_takes_no_room() -> None:
    volume, shaky, device = past("ext4").served()
    store = volume.require_store()
    overwrite(volume, past("ext4").files[200:300], 5)
    slots = {store.slot_block(slot) * BLOCK for slot in (0, 1)}
    write = shaky.pwrite

    def pwrite(offset: int, data: bytes) -> None:
        if offset in slots:
            raise OSError(errno.EIO, "the header cannot be written")
        write(offset, data)

    shaky.pwrite = pwrite  # type: ignore[method-assign]
    with pytest.raises(OSError):
        volume.require_engine().fold()
    for _ in range(20):
        with pytest.raises(OSError):
            volume.flush()
    shaky.pwrite = write  # type: ignore[method-assign]
    volume.flush()
    assert store.available == opened(MemoryDevice(bytes(device.content))).require_store().available


def test_a_refused_delete_leaves_the_mark_of_a_volume_that_needs_recovery() -> None:
    """Without the mark the stock repair would overwrite what snapshots need."""
    device = MemoryDevice(lab.plain_image("ext2"))
    volume = opened(device)
    volume.create("one")
    volume.begin_serving()
    mounted = bytearray(volume.read(1024, 1024))
    mounted[0x3A] &= ~1  # s_state: not clean
    volume.write(1024, bytes(mounted))
    volume.flush()
    for number in range(1, 100):
        below = MemoryDevice(bytes(device.content))
        shaky = Shaky(below)
        again = opened(shaky)
        assert again.needs_replay
        shaky.begin(on(number))
        try:
            again.verb("delete", names=["one"])
        except OSError:
            assert read_state(bytes(below.content[1024:2048])).mark
        if not shaky.failures:
            break
    assert number > 3


def test_an_edit_that_fails_is_finished_before_anybody_writes() -> None:
    """Its blocks are in the header: the next open would put them over what is written from now on."""
    before = past("ext2")
    for number in range(1, 100):
        volume, shaky, device = before.served()
        shaky.begin(on(number))
        with contextlib.suppress(OSError):
            edit.grow(volume, 300)
        if not shaky.failures:
            break
        shaky.bad = never
        volume.recall()
        root = volume.require_store().root
        assert root.pending is None
        bitmap = (int(volume.filesystem().groups.column("bg_block_bitmap")[1]) + 1) * BLOCK - 1
        volume.write(bitmap, b"\xff")  # as a tool above may
        volume.flush()
        again = opened(MemoryDevice(bytes(device.content)))
        assert again.read(bitmap, 1) == b"\xff"
        before.require_exact(again)
    assert number > 10


def test_what_could_not_be_brought_to_rest_is_at_the_second_try() -> None:
    before = past("ext4")
    for number in range(1, 200, 2):
        volume, shaky, device = before.served()
        shaky.begin(on(number))
        with contextlib.suppress(OSError, ExtsnapError):
            volume.end_serving()
        if not shaky.failures:
            break
        shaky.bad = never
        volume.recall()
        assert volume.end_serving()
        assert not read_state(bytes(device.content[1024:2048])).mark
        assert not lab.complaint(device.content)
        before.require_exact(opened(MemoryDevice(bytes(device.content))))
    assert number > 10


def test_a_read_that_fails_takes_nobody_off_the_watch() -> None:
    volume, shaky, _ = past("ext2").served()
    node = int(volume.require_store().root.mapping[0]) * BLOCK
    for number in range(1, 30):
        seen = [0]

        def bad(kind: str, count: int, number: int = number, seen: list[int] = seen) -> bool:
            seen[0] += kind == "read"
            return seen[0] == number

        shaky.begin(bad)
        with contextlib.suppress(OSError):
            volume.watch()
        shaky.bad = never
        assert volume.warden is not None
        with pytest.raises(StoreProtected):
            volume.write(node, b"\xff" * BLOCK)
        if not shaky.failures:
            break
    assert number > 3


def test_an_edit_that_was_promised_room_has_it_whatever_is_kept_back() -> None:
    """Another version may have begun it, which kept less for folds."""
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.create("one")
    before = views_of(volume)
    crash = mock.patch.object(edit, "finish", side_effect=OSError(errno.EIO, "the power fails"))
    with crash, pytest.raises(OSError):
        edit.shrink(volume, 20)
    with mock.patch.object(Engine, "reserve", return_value=1 << 20):
        killed = opened(MemoryDevice(bytes(device.content)))
    assert killed.require_store().root.pending is None
    assert views_of(killed) == before
