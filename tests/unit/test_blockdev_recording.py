"""Power cuts and faults made to order: the states that the fault model allows, all of them, and no others."""

from __future__ import annotations

import errno
import random

import pytest

from extsnap.blockdev.recording import (
    SECTOR,
    FaultyDevice,
    MemoryDevice,
    RecordingDevice,
    crash_state,
)


def sector(letter: str, count: int = 1) -> bytes:
    return letter.encode() * (SECTOR * count)


def letters(content: bytes | bytearray, first: int = 0, last: int | None = None) -> str:
    """One letter for each sector, which must be of one piece."""
    found = ""
    for at in range(first * SECTOR, len(content) if last is None else last * SECTOR, SECTOR):
        piece = bytes(content[at : at + SECTOR])
        assert len(set(piece)) == 1, f"the sector at {at} is torn"
        found += chr(piece[0]) if piece[0] else "0"
    return found


def seen(recording: RecordingDevice, point: int, first: int, last: int, count: int = 400, **options) -> set[str]:
    states = recording.crash_states(random.Random(1), points=[point], variants=count, **options)
    return {letters(state.content, first, last) for state in states}


def test_memory_device_stays_within_its_size():
    device = MemoryDevice(1000)
    device.pwrite(990, b"0123456789")
    device.punch(992, 3)
    assert device.pread(988, 12) == b"\0\x0001\0\0\x0056789"
    buffer = bytearray(4)
    device.readinto(996, memoryview(buffer))
    assert buffer == b"6789"
    for action in (
        lambda: device.pread(999, 2),
        lambda: device.pread(-1, 1),
        lambda: device.readinto(997, memoryview(buffer)),
        lambda: device.pwrite(1000, b"x"),
        lambda: device.punch(0, 1001),
    ):
        with pytest.raises(ValueError):
            action()
    assert len(device.content) == device.size == 1000


def test_recording_passes_on_and_keeps_everything():
    below = MemoryDevice(sector(".", 8))
    device = RecordingDevice(below)
    data = bytearray(sector("a"))
    device.pwrite(0, data)
    data[:] = sector("x")  # a buffer used again must not change the record
    device.punch(SECTOR, SECTOR)
    device.flush()
    assert [(entry.kind, entry.offset, entry.length) for entry in device.log] == [
        ("write", 0, SECTOR),
        ("punch", SECTOR, SECTOR),
        ("flush", 0, 0),
    ]
    assert device.log[0].data == sector("a")
    assert device.initial == sector(".", 8)
    assert letters(device.pread(0, device.size)) == letters(below.content) == "a0......"


def test_a_refused_write_is_not_recorded():
    device = RecordingDevice(FaultyDevice(MemoryDevice(4096), fail_at=1))
    with pytest.raises(OSError):
        device.pwrite(0, b"x")
    assert device.log == []


def test_every_subset_of_unsynced_sectors_and_nothing_else():
    device = RecordingDevice(MemoryDevice(sector(".", 10)))
    device.pwrite(6 * SECTOR, sector("a", 2))
    device.pwrite(8 * SECTOR, sector("b"))
    assert seen(device, 2, 6, 9) == {x + y + z for x in ".a" for y in ".a" for z in ".b"}


def test_a_sector_written_twice_has_any_of_its_three_contents():
    device = RecordingDevice(MemoryDevice(sector(".", 10)))
    device.pwrite(6 * SECTOR, sector("a"))
    device.pwrite(6 * SECTOR, sector("b"))
    assert seen(device, 2, 6, 7) == {".", "a", "b"}
    assert seen(device, 1, 6, 7) == {".", "a"}


def test_nothing_before_a_barrier_is_lost_and_nothing_after_the_cut_is_there():
    device = RecordingDevice(MemoryDevice(sector(".", 10)))
    device.pwrite(6 * SECTOR, sector("a", 2))
    device.flush()
    device.punch(7 * SECTOR, SECTOR)
    device.pwrite(8 * SECTOR, sector("z"))
    assert seen(device, 0, 6, 9) == {"..."}
    assert seen(device, 2, 6, 9) == {"aa."}
    assert seen(device, 3, 6, 9) == {"aa.", "a0."}
    assert seen(device, 4, 6, 9) == {"aa.", "a0.", "aaz", "a0z"}


def test_a_superblock_is_atomic_its_neighbours_are_not():
    device = RecordingDevice(MemoryDevice(sector(".", 12)))
    device.pwrite(1024, sector("s", 4))  # the superblock and two sectors behind it
    assert seen(device, 1, 2, 6) == {x + y + z for x in ("..", "ss") for y in ".s" for z in ".s"}
    # The same four sectors, where the superblock is said to be elsewhere.
    assert len(seen(device, 1, 2, 6, superblocks=[4096])) == 16
    backup = RecordingDevice(MemoryDevice(sector(".", 12)))
    backup.pwrite(7 * SECTOR, sector("s", 4))
    assert seen(backup, 1, 8, 10, superblocks=[1024, 4096]) == {"..", "ss"}


def test_superblock_in_pieces_is_never_torn():
    """resize2fs writes it 2 to 10 bytes at a time: after any cut it is as it was after one of the pieces."""
    device = RecordingDevice(MemoryDevice(4096))
    stages = [bytes(1024)]
    for at, piece in ((1024, b"12"), (1530, b"3456789012"), (2040, b"345")):
        device.pwrite(at, piece)
        stages.append(device.pread(1024, 1024))
    found = {
        bytes(state.content[1024:2048]) for state in device.crash_states(random.Random(2), points=[3], variants=200)
    }
    assert found == set(stages)


def test_states_can_be_made_again_and_come_in_order():
    device = RecordingDevice(MemoryDevice(sector(".", 16)))
    rng = random.Random(3)
    for _ in range(12):
        action = rng.randrange(4)
        at = rng.randrange(14) * SECTOR
        if action == 0:
            device.flush()
        elif action == 1:
            device.punch(at, SECTOR)
        else:
            device.pwrite(at, rng.randbytes(2 * SECTOR))
    states = list(device.crash_states(random.Random(4), variants=3))
    assert [state.point for state in states] == [point for point in range(13) for _ in range(3)]
    for state in states:
        again = crash_state(device.initial, device.log, state.point, state.seed)
        assert again.content == state.content, state
    with pytest.raises(ValueError):
        list(device.crash_states(random.Random(4), points=[14]))


def test_an_image_that_ends_within_a_sector():
    device = RecordingDevice(MemoryDevice(b"." * 2300))
    device.pwrite(2200, b"x" * 100)
    ends = {bytes(state.content[2048:]) for state in device.crash_states(random.Random(5), points=[1], variants=50)}
    assert ends == {b"." * 252, b"." * 152 + b"x" * 100}


@pytest.mark.parametrize(("kind", "number"), [("EIO", errno.EIO), ("ENOSPC", errno.ENOSPC), ("short", errno.EIO)])
def test_the_nth_operation_fails_once(kind, number):
    below = MemoryDevice(sector(".", 4))
    device = FaultyDevice(below, fail_at=2, kind=kind)
    device.pwrite(0, sector("a"))
    with pytest.raises(OSError, match="at byte 512 failed") as caught:
        device.pwrite(SECTOR, sector("b", 2))
    assert caught.value.errno == number
    device.pwrite(3 * SECTOR, sector("c"))
    device.flush()
    assert letters(below.content) == ("ab.c" if kind == "short" else "a..c")
    assert (device.count, device.failures) == (4, 1)
    assert device.pread(0, 1) == b"a"  # reads are not counted unless asked for


def test_counted_operations_and_a_device_that_is_gone():
    device = FaultyDevice(MemoryDevice(4096), fail_at=3, kind="gone", operations=["read", "flush"])
    device.pwrite(0, b"x")
    device.pread(0, 1)
    device.flush()
    buffer = memoryview(bytearray(1))
    for action in (
        lambda: device.readinto(0, buffer),
        lambda: device.pread(0, 1),
        lambda: device.pwrite(0, b"y"),
        lambda: device.punch(0, 1),
        lambda: device.flush(),
    ):
        with pytest.raises(OSError):
            action()
    assert device.failures == 5
    counter = FaultyDevice(MemoryDevice(4096), fail_at=0)
    counter.pwrite(0, b"x")
    counter.punch(0, 512)
    counter.flush()
    assert (counter.count, counter.failures) == (3, 0)


def test_a_short_punch_does_half():
    below = MemoryDevice(sector(".", 4))
    device = FaultyDevice(below, fail_at=1, kind="short")
    with pytest.raises(OSError):
        device.punch(0, 4 * SECTOR)
    assert letters(below.content) == "00.."


def test_a_short_write_tears_no_superblock():
    below = MemoryDevice(sector(".", 8))
    device = FaultyDevice(below, fail_at=1, kind="short", superblocks=[1024])
    with pytest.raises(OSError):
        device.pwrite(0, sector("a", 6))  # half of it would end within the superblock
    assert letters(below.content) == "aa......"
