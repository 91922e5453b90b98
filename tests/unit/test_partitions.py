"""Partition tables: what is in them, what is wrong with them, and which volume of an image is meant.

The kernel's reading of the same tables is compared in ``tests/system/test_system_partitions.py``.
"""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import disks
import pytest
from disks import EXTENDED, LINUX, MIB

import extsnap
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.partitions import Table, read_table
from extsnap.blockdev.recording import MemoryDevice
from extsnap.errors import ExtsnapError, FormatError, NotExtError, VolumeBusy
from extsnap.ext.locate import Place, locate
from extsnap.serve.disk import Disk

SIZE = 16 * MIB
TWO = [(1, MIB, 4 * MIB), (3, 8 * MIB, 2 * MIB)]


class CountingDevice(MemoryDevice):
    """Counts the bytes that are read."""

    count = 0

    def pread(self, offset: int, length: int) -> bytes:
        self.count += length
        return super().pread(offset, length)


def disk(writes: dict[int, bytes], size: int = SIZE) -> CountingDevice:
    device = CountingDevice(size)
    for offset, data in writes.items():
        device.pwrite(offset, data)
    return device


def parts(table: Table | None) -> list[tuple[int, int, int]]:
    assert table is not None
    assert not any(found.problem for found in table.partitions)
    return [(found.number, found.offset, found.length) for found in table.partitions if not found.extended]


@pytest.mark.parametrize("sector", [512, 4096])
def test_gpt(sector: int) -> None:
    table = read_table(disk(disks.gpt(SIZE, TWO, sector=sector)))
    assert parts(table) == TWO
    assert (table.kind, table.sector_size, table.warning) == ("GPT", sector, "")
    assert [found.name for found in table.partitions] == ["part 1", "part 3"]


@pytest.mark.parametrize("sector", [512, 4096])
def test_mbr_with_logical_partitions(sector: int) -> None:
    logical = [(5, 9 * MIB, MIB), (6, 11 * MIB, MIB), (7, 13 * MIB, 2 * MIB)]
    writes = disks.mbr([(2, MIB, MIB)], logical, container=(8 * MIB, 8 * MIB), sector=sector)
    table = read_table(disk(writes), sector)
    assert parts(table) == [(2, MIB, MIB), *logical]
    assert [found.number for found in table.partitions if found.extended] == [4]


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("where", ["signature", "header", "entries"])
def test_a_damaged_primary_gpt(sector: int, where: str) -> None:
    damage = {"signature": sector, "header": sector + 40, "entries": 2 * sector + 130}[where]
    writes = disks.gpt(SIZE, TWO, sector=sector)
    device = disk(writes)
    device.content[damage] ^= 1
    table = read_table(device)
    assert parts(table) == TWO
    assert "primary GPT is damaged" in table.warning
    device.content[SIZE - sector + 50] ^= 1
    with pytest.raises(FormatError, match="backup at the end of the disk cannot be used either"):
        read_table(device)


def test_no_table() -> None:
    assert read_table(disk({})) is None
    assert read_table(MemoryDevice(100)) is None
    assert read_table(disk({510: b"\x55\xaa"})) is None
    boot_code = bytearray(disks.boot_record([(LINUX, 2048, 2048)]))
    boot_code[446] = 0x33  # no boot indicator: the code of a filesystem's boot sector
    assert read_table(disk({0: bytes(boot_code)})) is None


def resealed(writes: dict[int, bytes], offset: int, field: bytes) -> dict[int, bytes]:
    """A GPT whose headers say something else, with right checksums."""
    changed = dict(writes)
    for at in (512, SIZE - 512):
        header = bytearray(changed[at])
        header[offset : offset + len(field)] = field
        header[16:20] = bytes(4)
        header[16:20] = struct.pack("<I", zlib.crc32(header))
        changed[at] = bytes(header)
    return changed


@pytest.mark.parametrize(
    ("offset", "field", "said"),
    [
        (12, struct.pack("<I", 5000), "header_size"),
        (12, struct.pack("<I", 20), "header_size"),
        (24, struct.pack("<Q", 7), "my_lba"),
        (72, struct.pack("<Q", 1 << 60), "partition_entry_lba"),
        (80, struct.pack("<I", 0xFFFFFFFF), "num_partition_entries"),
        (84, struct.pack("<I", 1 << 30), "sizeof_partition_entry"),
        (84, struct.pack("<I", 0), "sizeof_partition_entry"),
        (88, struct.pack("<I", 1), "partition_entry_array_crc32"),
    ],
)
def test_a_gpt_that_makes_no_sense(offset: int, field: bytes, said: str) -> None:
    device = disk(resealed(disks.gpt(SIZE, TWO), offset, field))
    with pytest.raises(FormatError, match=f"{said}|header_crc32"):
        read_table(device)
    assert device.count < 10 * MIB


def loop(at: int, *links: int) -> dict[int, bytes]:
    """An extended partition whose boot records lead from one to the next, by sector from its start."""
    writes = {0: disks.boot_record([(EXTENDED, at, 1000)])}
    for number, link in enumerate(links):
        here = at + (0 if not number else links[number - 1])
        writes[here * 512] = disks.boot_record([(LINUX, 1, 1), (EXTENDED, link, 10)])
    return writes


def test_hostile_chains_of_logical_partitions() -> None:
    for links in ((0,), (10, 20, 10), (10, 0)):
        with pytest.raises(FormatError, match="circles"):
            read_table(disk(loop(100, *links)))
    with pytest.raises(FormatError, match="leaves the disk"):
        read_table(disk(loop(100, 0xFFFFFF00)))
    device = disk(loop(100, *range(4, 8000, 4)))
    with pytest.raises(FormatError, match=r"more than 256|has no end"):
        read_table(device)
    assert device.count < MIB


@pytest.mark.parametrize(
    ("entries", "problems"),
    [
        ([(LINUX, 8, 100), (LINUX, 107, 100)], {1: "partition 2", 2: "partition 1"}),
        ([(LINUX, 8, 1000), (LINUX, 10, 10), (LINUX, 50, 10)], {1: "shares", 2: "partition 1", 3: "partition 1"}),
        ([(LINUX, 0, 100), (LINUX, 200, 100)], {1: "the partition table"}),
        ([(LINUX, 8, 100), (LINUX, 32000, 2000)], {2: "behind the end of the disk"}),
        ([(LINUX, 8, 100), (LINUX, 0xFFFFFFFF, 0xFFFFFFFF)], {2: "behind the end of the disk"}),
        ([(LINUX, 8, 100), (LINUX, 108, 100)], {}),
    ],
)
def test_partitions_that_cannot_be_used(entries, problems) -> None:
    table = read_table(disk({0: disks.boot_record(entries)}))
    assert {found.number for found in table.partitions if found.problem} == set(problems)
    for number, said in problems.items():
        assert said in table.numbered(number).problem


def test_random_tables_end_in_an_answer_or_an_error() -> None:
    rng = random.Random(4)
    writes = disks.gpt(SIZE, TWO)
    logical = [(5, 9 * MIB, MIB), (6, 11 * MIB, MIB)]
    others = disks.mbr([(1, MIB, MIB)], logical, container=(8 * MIB, 8 * MIB))
    seen = set()
    for turn in range(400):
        device = disk(rng.choice((writes, others)))
        for _ in range(rng.randrange(1, 6)):
            at = rng.choice((446, 510, 512, 1024, 8 * MIB + 446, 11 * MIB - 512 + 446)) + rng.randrange(66)
            device.content[at] = rng.randrange(256)
        if turn % 4 == 0:  # also behind right checksums
            where = rng.randrange(16, 92)
            device = disk(resealed(writes, where, rng.randbytes(min(8, 92 - where))))
        try:
            table = read_table(device)
            seen.add(table if table is None else table.kind)
        except ExtsnapError:
            seen.add("error")
        assert device.count < 20 * MIB
    assert seen >= {"MBR", "GPT", "error"}


# ---- which volume is meant


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A GPT disk with ext4 in 1 and ext2 in 3."""
    path = disks.make(tmp_path / "disk.img", SIZE, disks.gpt(SIZE, TWO))
    disks.mkfs(path, MIB, 4 * MIB)
    disks.mkfs(path, 8 * MIB, 2 * MIB, "ext2")
    return path


def refusal(path: Path, number: int | None = None, kind: type[ExtsnapError] = ExtsnapError) -> str:
    with pytest.raises(kind) as refused:
        locate(str(path), number)
    return str(refused.value)


def test_a_number_is_needed_where_several_may_be_meant(two: Path) -> None:
    said = refusal(two)
    assert f"{two} has 2 ext partitions: 1 (ext, 4 MiB, 'part 1'), 3 (ext, 2 MiB, 'part 3'); " in said
    assert said.endswith("choose with -P 1 or -P 3")
    assert locate(str(two), 3) == Place(str(two), 3, 8 * MIB, 2 * MIB)
    assert locate(str(two), 3).name == f"{two} -P 3"
    assert "no partition 2; there are 1 (ext, 4 MiB, 'part 1'), 3 (ext" in refusal(two, 2)


def test_the_only_one_is_taken(tmp_path: Path) -> None:
    path = disks.make(tmp_path / "disk.img", SIZE, {**disks.gpt(SIZE, TWO), MIB: b"XFSB"})
    assert "1 (an XFS filesystem, 4 MiB, 'part 1'), 3 (unknown content, 2 MiB" in refusal(path, kind=NotExtError)
    disks.mkfs(path, 8 * MIB, 2 * MIB)
    assert locate(str(path)) == Place(str(path), 3, 8 * MIB, 2 * MIB)
    with extsnap.open(path) as volume:
        assert (volume.offset, volume.partition, volume.size) == (8 * MIB, 3, 2 * MIB)
        with pytest.raises(NotExtError, match="-P 1 holds an XFS filesystem"):
            extsnap.open(path, partition=1)


@pytest.mark.parametrize("sector", [512, 4096])
def test_the_sectors_of_an_mbr_are_told_by_where_a_volume_is(tmp_path: Path, sector: int) -> None:
    logical = [(5, 9 * MIB, MIB), (6, 11 * MIB, 2 * MIB)]
    writes = disks.mbr([(1, MIB, MIB)], logical, container=(8 * MIB, 8 * MIB), sector=sector)
    path = disks.make(tmp_path / "disk.img", SIZE, writes)
    disks.mkfs(path, 11 * MIB, 2 * MIB)
    assert locate(str(path)) == Place(str(path), 6, 11 * MIB, 2 * MIB)
    assert "extended" in refusal(path, 4, NotExtError)


def test_whole_volumes(tmp_path: Path) -> None:
    path = disks.make(tmp_path / "disk.img", SIZE, {})
    assert locate(str(path)) == Place(str(path))  # nothing at all: whoever opens it says so
    disks.mkfs(path, 0, SIZE)
    assert locate(str(path)) == locate(str(path), 0) == Place(str(path))
    assert "has no partitions; leave -P out" in refusal(path, 1)
    for record in ([(LINUX, 2048, 2048)], [(disks.PROTECTIVE, 1, 1000)]):  # a boot loader's sector
        with path.open("r+b") as file:
            file.write(disks.boot_record(record))
        assert locate(str(path)) == Place(str(path))
    refusal(path, 1, FormatError)


def test_a_volume_that_may_be_the_disk_or_a_partition(tmp_path: Path) -> None:
    """A disk that was formatted whole, and partitioned later: both superblocks are there."""
    path = disks.make(tmp_path / "disk.img", SIZE, {})
    disks.mkfs(path, 0, SIZE)
    with path.open("r+b") as file:
        file.write(disks.boot_record([(LINUX, 2048, 8192)]))
    disks.mkfs(path, MIB, 4 * MIB)
    assert "choose with -P 0 for the whole of it, or -P 1" in refusal(path)
    assert locate(str(path), 0) == Place(str(path))
    assert locate(str(path), 1) == Place(str(path), 1, MIB, 4 * MIB)


def test_a_partition_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    path = disks.make(tmp_path / "disk.img", SIZE, {0: disks.boot_record([(LINUX, 2048, 8192), (LINUX, 4096, 8192)])})
    disks.mkfs(path, MIB, 4 * MIB)
    assert "partition 1 cannot be used: it shares bytes with partition 2; repair" in refusal(path, 1)
    assert "1 (unusable: it shares bytes with partition 2, 4 MiB" in refusal(path)


# ---- ranges and their locks


def test_a_range_of_an_image_is_a_device_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"a" * 5000 + b"b" * 1000 + b"c" * 5000)
    with ImageFile(str(path), writable=True, start=5000, length=1000) as image:
        assert image.size == 1000
        assert image.pread(0, 1000) == b"b" * 1000
        for work in (
            lambda: image.pread(999, 2),
            lambda: image.pwrite(999, b"xy"),
            lambda: image.pwrite(-1, b"x"),
            lambda: image.readinto(1000, memoryview(bytearray(1))),
            lambda: image.punch(0, 1001),
        ):
            with pytest.raises(OSError, match="at byte "):
                work()
        image.pwrite(998, b"xy")
        image.punch(0, 500)
    assert path.read_bytes() == b"a" * 5000 + bytes(500) + b"b" * 498 + b"xy" + b"c" * 5000
    for start, length in ((10000, 1001), (12000, None), (-1, 5)):
        with pytest.raises(ExtsnapError):
            ImageFile(str(path), start=start, length=length)


def test_locks_are_of_ranges(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(3000))

    def take(start: int = 0, length: int | None = None, *, shared: bool = False) -> ImageFile:
        lock = "shared" if shared else "exclusive"
        return ImageFile(str(path), writable=not shared, lock=lock, start=start, length=length)

    with take(0, 1000), take(1000, 1000), take(2000, 1000, shared=True), take(2000, 1000, shared=True):
        for start, length in ((0, 1000), (500, 1000), (1999, 1), (2000, 1), (0, None)):
            with pytest.raises(VolumeBusy, match="in use by extsnap in process "):
                take(start, length).close()
        with pytest.raises(VolumeBusy, match="in use by extsnap in process "):
            take(shared=True)
    with take(), pytest.raises(VolumeBusy, match="in use by extsnap in process "):
        take(0, 10)
    with pytest.raises(ValueError):
        ImageFile(str(path), lock="exclusive")
    take().close()


# ---- the disk around a served partition


class Inside(MemoryDevice):
    """A served volume, as far as `Disk` uses it."""

    def write(self, offset: int, data: memoryview) -> None:
        self.pwrite(offset, data)


@pytest.mark.parametrize(("start", "length"), [(1000, 3000), (0, 3000), (5000, 5000), (0, 10_000)])
def test_the_disk_is_the_image_with_the_volume_in_its_place(tmp_path: Path, start: int, length: int) -> None:
    rng = random.Random(5)
    path = tmp_path / "image"
    below = rng.randbytes(10_000)
    path.write_bytes(below)
    volume = Inside(rng.randbytes(length))
    model = bytearray(below)
    model[start : start + length] = volume.content
    whole = Disk(volume, str(path), start)
    if length < 10_000:
        with pytest.raises(OSError, match="not open for writing"):
            whole.write(0 if start else 9999, b"x")
    whole.begin_writing()
    whole.begin_writing()
    whole.end_writing()  # one writer is left
    for turn in range(300):
        offset = rng.randrange(10_000)
        count = min(rng.choice((0, 1, 500, 4096, 10_000)), 10_000 - offset)
        if turn % 3 == 0:
            data = rng.randbytes(count)
            whole.write(offset, data)
            model[offset : offset + count] = data
        elif turn % 3 == 1 and count:
            whole.punch(offset, count)
            model[offset : offset + count] = bytes(count)
        else:
            buffer = bytearray(count)
            whole.readinto(offset, memoryview(buffer))
            assert buffer == model[offset : offset + count]
        whole.flush()
    whole.end_writing()
    whole.close()
    assert volume.content == model[start : start + length]
    model[start : start + length] = below[start : start + length]
    assert path.read_bytes() == model


def test_the_disk_is_written_only_if_nobody_has_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(10_000))
    whole = Disk(Inside(1000), str(path), 2000)
    for start in (0, 1999, 3000, 9999):
        with ImageFile(str(path), writable=True, lock="exclusive", start=start, length=1), pytest.raises(VolumeBusy):
            whole.begin_writing()
    with ImageFile(str(path), writable=True, lock="exclusive", start=2000, length=1000):
        whole.begin_writing()
        whole.end_writing()
    whole.close()
    ImageFile(str(path), writable=True, lock="exclusive").close()
