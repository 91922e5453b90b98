"""Hidden runs: what is discarded reads as zeros, snapshots keep it, nothing is copied, and a crash changes nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass

import lab
import numpy as np
import pytest
from lab import BLOCK

from extsnap.blockdev.recording import EVERYTHING, Cuts, MemoryDevice, RecordingDevice
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
    place.volume.back_to_rest()
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
    cuts = Cuts(place.device.initial, place.device.log)
    for point in range(first, ends[-1] + 1):
        for seed in (EVERYTHING, *(rng.getrandbits(30) for _ in range(2))):
            content = bytes(cuts.state(point, seed).content)
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


#: Blocks of what is discarded below: more than punches look at together (8,192), and than group rows worked on at once.
LONG_BLOCKS = 20000


def long_volume() -> bytes:
    """A volume of 64 MiB in groups of 2,048 blocks with one file of nearly 20 MiB."""
    with lab.as_file(bytes(64 << 20)) as path, lab.as_file(random.Random(5).randbytes(LONG_BLOCKS * BLOCK)) as file:
        uuid = "00000000-1111-2222-3333-444444444444"
        words = ["-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-g", "2048", "-G", "32", "-m", "0", "-U", uuid]
        words += ["-O", "^has_journal,^resize_inode,sparse_super2"]  # nothing in the way of long runs
        lab.run("mke2fs", *words, "-E", f"hash_seed={uuid},num_backup_sb=0", path)
        lab.run("debugfs", "-w", "-R", f"write {file} f0", path)
        with open(path, "rb") as image:
            return image.read()


def test_long_hidden_runs_that_writes_split() -> None:
    """Against whole copies: discards over many group rows, and writes at and around every border of what is hidden."""
    device = MemoryDevice(long_volume())
    blocks = np.flatnonzero(lab.survey(device.content).files)
    assert len(blocks) == LONG_BLOCKS
    volume = opened(device)
    volume.create("one")
    volume.begin_serving()
    one, base = volume.open_view("one").pread(0, volume.size), bytearray(volume.read(0, volume.size))
    lowest, highest = int(blocks[0]), int(blocks[-1]) + 1
    rng = random.Random(6)

    def punch(first: int, last: int) -> None:
        volume.punch(first * BLOCK, (last - first) * BLOCK)
        base[first * BLOCK : last * BLOCK] = bytes((last - first) * BLOCK)

    def write(offset: int, length: int) -> None:
        data = rng.randbytes(length)
        volume.write(offset, data)
        base[offset : offset + length] = data

    def assert_as_the_copies(volume: Volume, *, of_files: bool = False) -> None:
        different = np.flatnonzero(lab.unequal(volume.read(0, volume.size), base))
        assert not len(np.intersect1d(different, blocks) if of_files else different)
        assert volume.open_view("one").pread(0, volume.size) == one

    def assert_a_crash_changes_nothing() -> None:
        """But the store's own edits of the filesystem, which follow."""
        assert_as_the_copies(opened(MemoryDevice(device.content)), of_files=True)

    assert max(count for _, count in lab.runs(blocks)) > 2 * 8192
    for first, count in lab.runs(blocks):
        punch(first, first + count)
    hidden_then = np.concatenate([np.arange(first, first + count) for first, count in hidden_runs(volume)])
    assert len(hidden_then) > 2 * 8192, "little of it was hidden"
    assert_as_the_copies(volume)
    volume.flush()
    assert_a_crash_changes_nothing()
    borders = [lowest, highest - 2, *range(lowest // 2048 * 2048 + 2048, highest, 2048), lowest + 8191, lowest + 16383]
    for border in borders:
        for offset, length in ((-BLOCK, 2 * BLOCK), (-100, 200), (3 * BLOCK + 10, 20), (7 * BLOCK, BLOCK)):
            at = border * BLOCK + offset
            if set(range(at // BLOCK, (at + length - 1) // BLOCK + 1)) <= set(blocks.tolist()):
                write(at, length)
    volume.flush()
    assert_as_the_copies(volume)
    assert len(hidden_runs(volume)) > len(borders), "the writes have split nothing"
    long = max(lab.runs(blocks), key=lambda run: run[1])
    write(long[0] * BLOCK + 300, min(long[1] - 1, 1500) * BLOCK)  # one write over many runs
    punch(long[0] + 10, long[0] + 1200)  # and a discard of what was written in part
    volume.flush()
    assert_as_the_copies(volume)
    assert_a_crash_changes_nothing()
    assert volume.end_serving()
    assert not hidden_runs(volume)
    assert_as_the_copies(volume, of_files=True)
    assert not lab.complaint(device.content)
    assert not opened(MemoryDevice(device.content)).verb("check")["store"]["errors"]


def hidden_runs(volume: Volume) -> list[list[int]]:
    return volume.verb("dump", what="header")["header"]["hidden"]
