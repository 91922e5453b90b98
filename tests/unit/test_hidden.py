"""Hidden runs: what is discarded reads as zeros, snapshots keep it, nothing is copied, and a crash changes nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass

import lab
import numpy as np
import pytest
from lab import BLOCK

from extsnap.blockdev.recording import EVERYTHING, MemoryDevice, RecordingDevice, crash_state
from extsnap.errors import StoreDamaged, UnsupportedFeature
from extsnap.snapshot import format as fmt
from extsnap.snapshot import hidden
from extsnap.snapshot.volume import Volume

LEAST = 32 * BLOCK


@dataclass
class Place:
    """A volume with a snapshot ``one`` that is served, and the longest run of a file's blocks in it."""

    device: RecordingDevice
    volume: Volume
    offset: int
    length: int
    then: bytes

    def base(self, volume: Volume | None = None) -> bytes:
        return (volume or self.volume).read(self.offset, self.length)

    def view(self, name: str, volume: Volume | None = None) -> bytes:
        return (volume or self.volume).open_view(name).pread(self.offset, self.length)

    def opened(self, content: bytes) -> Volume:
        return opened(MemoryDevice(content))

    def medium(self) -> bytes:
        return self.device.pread(self.offset, self.length)

    def hidden(self, volume: Volume | None = None) -> int:
        runs = (volume or self.volume).verb("dump", what="header")["header"]["hidden"]
        return sum(length for _, length in runs)

    def copied(self) -> int:
        return int(self.volume.verb("list")["snapshots"][0]["copied_bytes"])


def opened(device: MemoryDevice | RecordingDevice) -> Volume:
    return Volume(device, writable=True, clock=lambda: 1_700_000_000 * 10**9, random_bytes=random.Random(1).randbytes)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(hidden, "HIDE_BYTES", LEAST)
    device = RecordingDevice(MemoryDevice(lab.plain_image("ext4")))
    files = np.flatnonzero(lab.survey(device.pread(0, device.size)).files)
    first, count = max(lab.runs(files), key=lambda run: run[1])
    count = min(count, 200)
    assert count * BLOCK > 2 * LEAST
    volume = opened(device)
    volume.create("one")
    volume.begin_serving()
    volume.flush()
    return Place(device, volume, first * BLOCK, count * BLOCK, volume.read(first * BLOCK, count * BLOCK))


def test_a_large_discard_copies_nothing_and_a_small_one_copies(place: Place) -> None:
    copied = place.copied()
    place.volume.punch(place.offset, place.length)
    assert not any(place.base())
    assert place.view("one") == place.medium() == place.then
    assert place.copied() == copied
    assert place.hidden() == place.length // BLOCK
    place.volume.punch(place.offset, 8 * BLOCK)
    assert not any(place.device.pread(place.offset, 8 * BLOCK)), "a small punch is done on the medium"
    assert place.hidden() == place.length // BLOCK - 8
    assert place.view("one") == place.then


def test_many_small_discards_hide_in_the_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "COPIED_BYTES", 40 * BLOCK)
    for first in range(0, place.length // BLOCK, 20):
        place.volume.punch(place.offset + first * BLOCK, 20 * BLOCK)
    assert not any(place.base())
    assert place.view("one") == place.then
    assert place.hidden() == place.length // BLOCK - 40


def test_a_write_to_a_hidden_block_keeps_what_the_snapshot_has(place: Place) -> None:
    place.volume.punch(place.offset, place.length)
    place.volume.flush()
    place.volume.write(place.offset + 5 * BLOCK + 100, b"new")
    place.volume.flush()
    expected = bytearray(place.length)
    expected[5 * BLOCK + 100 : 5 * BLOCK + 103] = b"new"
    assert place.base() == expected
    assert place.view("one") == place.then
    assert place.hidden() == place.length // BLOCK - 1


def test_a_new_snapshot_reads_the_zeros(place: Place) -> None:
    place.volume.punch(place.offset, place.length)
    place.volume.create("two")
    assert not any(place.view("two"))
    place.volume.write(place.offset, b"new" * BLOCK)
    place.volume.flush()
    assert not any(place.view("two"))
    assert place.view("one") == place.then
    assert place.volume.end_serving()
    assert not any(place.view("two"))
    assert place.view("one") == place.then
    again = place.opened(bytes(place.device.pread(0, place.device.size)))
    assert not any(place.view("two", again))


def test_the_host_gets_back_what_the_last_snapshot_needed(place: Place) -> None:
    place.volume.create("two")
    place.volume.punch(place.offset, place.length)
    place.volume.delete(["one"])
    assert place.view("two") == place.medium() == place.then
    place.volume.delete(["two"])
    assert not any(place.medium())
    assert not place.hidden()


def test_an_image_at_rest_has_zeros_where_they_were_written(place: Place) -> None:
    """And what is free may show again what it had; the feature is gone from the header."""
    place.volume.punch(place.offset, place.length)
    place.volume.flush()
    assert place.volume.require_store().root.incompat == fmt.INCOMPAT_HIDDEN_RUNS
    assert place.volume.end_serving()
    assert not any(place.medium())
    assert place.view("one") == place.then
    assert place.volume.require_store().root.incompat == 0
    assert not place.volume.medium.state.mark
    assert not lab.complaint(place.device.pread(0, place.device.size))


def test_no_room_for_the_zeros_keeps_the_mark(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.volume.punch(place.offset, place.length)
    monkeypatch.setattr("extsnap.snapshot.engine.Engine.room", lambda engine: 0)
    monkeypatch.setattr("extsnap.snapshot.edit.grow", lambda volume, blocks: 0)
    assert not place.volume.end_serving()
    assert place.volume.medium.state.mark
    assert place.view("one") == place.then
    place.volume.delete(["one"])
    assert not any(place.medium())
    assert not place.volume.medium.state.mark


def test_a_restore_brings_back_what_is_hidden(place: Place) -> None:
    place.volume.punch(place.offset, place.length)
    place.volume.create("two")
    place.volume.verb("restore", name="one")
    assert place.base() == place.then
    assert not any(place.view("two"))
    place.volume.verb("restore", name="two")
    assert not any(place.base())
    assert place.view("one") == place.then


def test_the_state_survives_an_operation_that_failed(place: Place) -> None:
    """What is read anew is the store; what was discarded and written since its last flush is not forgotten."""
    place.volume.punch(place.offset, place.length)
    place.volume.flush()
    place.volume.write(place.offset, b"\1" * BLOCK)
    place.volume.require_engine().commit()
    place.volume.punch(place.offset + place.length // 2, place.length // 2)
    place.volume._back_to_rest()
    assert place.base() == b"\1" * BLOCK + bytes(place.length - BLOCK)
    place.volume.flush()
    again = place.opened(bytes(place.device.pread(0, place.device.size)))
    assert place.base(again) == b"\1" * BLOCK + bytes(place.length - BLOCK)
    assert place.view("one", again) == place.then


def test_a_crash_leaves_what_was_flushed_or_what_was_written_since(place: Place) -> None:
    """Sector by sector, wherever it is cut and whatever of the unsynced sectors is lost; never what was discarded."""
    half = place.length // 2
    steps = [
        lambda volume: volume.punch(place.offset, place.length),
        lambda volume: volume.flush(),
        lambda volume: volume.write(place.offset + 3 * BLOCK, b"\1" * 4 * BLOCK),
        lambda volume: volume.write(place.offset + half + 100, b"\2" * BLOCK),
        lambda volume: volume.flush(),
        lambda volume: volume.punch(place.offset, place.length),
        lambda volume: volume.write(place.offset + 5 * BLOCK, b"\3" * BLOCK),
        lambda volume: volume.flush(),
        lambda volume: volume.end_serving(),
    ]
    first = len(place.device.log)
    states, ends = [place.then], [first]
    for step in steps:
        step(place.volume)
        states.append(place.base())
        ends.append(len(place.device.log))
    flushed = [0, 2, 5, 8]
    rng = random.Random(7)
    for point in range(first, ends[-1] + 1):
        for seed in (EVERYTHING, *(rng.getrandbits(30) for _ in range(2))):
            content = bytes(crash_state(place.device.initial, place.device.log, point, seed).content)
            volume = place.opened(content)
            done = max(number for number in flushed if ends[number] <= point)
            begun = min([number for number in range(len(ends)) if ends[number] >= point])
            found = sectors(place.base(volume))
            fine = np.zeros(len(found), np.bool_)
            for state in states[done : begun + 1]:
                fine |= (sectors(state) == found).all(axis=1)
            assert fine.all(), (point, seed, np.flatnonzero(~fine)[:10])
            assert place.view("one", volume) == place.then, (point, seed)
            assert not volume.medium.state.mark
            assert not place.hidden(volume)


def sectors(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint64).reshape(-1, 64)


def test_a_program_that_does_not_know_refuses_and_a_run_outside_is_damage(place: Place) -> None:
    place.volume.punch(place.offset, place.length)
    place.volume.flush()
    content = bytes(place.device.pread(0, place.device.size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "KNOWN_INCOMPAT", 0)
        for writable in (False, True):
            with pytest.raises(UnsupportedFeature, match="unknown features 0x1"):
                Volume(MemoryDevice(content), writable=writable)
    reader = Volume(MemoryDevice(content))
    assert not any(place.base(reader))
    assert place.view("one", reader) == place.then
    engine = reader.require_engine()
    with pytest.raises(StoreDamaged, match="outside the volume"):
        hidden.load(engine, np.array([[engine.blocks - 1, 2]], np.int64))
