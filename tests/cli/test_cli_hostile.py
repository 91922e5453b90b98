"""Hand-made hostile images as a user meets them: the commands on files that lie, each with all checksums right.

Every command is a process that may take 10 s of a processor and 512 MiB more than the loaded program has (setrlimit).
It ends with a status of CLI.md and, if that is 1, one line of printable text; a reading command leaves every byte as
it was, and so does a writing one that refuses.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import resource
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import disks
import hostile
import lab
import numpy as np
import pytest
from hostile import BYTES, SECONDS
from lab import BLOCK, MemoryDevice
from program import Loaded

from extsnap.blockdev.overlay import Overlay
from extsnap.ext.filesystem import Filesystem
from extsnap.ondisk.checksum import extent_checksum, inode_seed
from extsnap.ondisk.directory import ROOT_ENTRIES_AT, dx_with_checksum, leaf_with_checksum
from extsnap.snapshot import format as fmt
from extsnap.snapshot.medium import Medium
from extsnap.snapshot.volume import Volume

MIB = 1 << 20
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
Save = Callable[[bytes], Path]


def digest(image: Path) -> str:
    """Of the size and all that is not a hole."""
    found = hashlib.sha256(str(image.stat().st_size).encode())
    with image.open("rb") as file:
        at = 0
        with contextlib.suppress(OSError):  # ENXIO: no data any more
            while True:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
                found.update(f"{at}:{end}".encode() + os.pread(file.fileno(), end - at, at))
                at = end
    return found.hexdigest()


@pytest.fixture(scope="module")
def limited() -> Iterator[Loaded]:
    """A process that starts commands, each of which is killed or fails when it goes beyond what is promised."""
    one = Loaded()
    one.run(["--version"], env=os.environ, timeout=60)  # all is loaded
    pid = one._process.pid
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    for limit, value in (
        (resource.RLIMIT_CPU, int(SECONDS)),
        (resource.RLIMIT_AS, pages * resource.getpagesize() + BYTES),
    ):
        resource.prlimit(pid, limit, (value, value))
    yield one
    one.close()


@pytest.fixture
def run(limited: Loaded, tmp_path: Path) -> Run:
    """Run a command on an image, and judge all that holds whatever the image is."""
    out = tmp_path / "out.img"

    def command(image: Path, *words: str, notes: bool = False) -> Done:
        before = digest(image)
        out.unlink(missing_ok=True)
        done = limited.run(
            [word.format(image=image, out=out) for word in words], env=os.environ, timeout=120, cwd=tmp_path
        )
        said = f"{words} ended with {done.returncode}\n{done.stdout[-500:]}{done.stderr}"
        assert done.returncode in (0, 1, 3), said
        assert "Traceback" not in done.stderr, said
        for text in (done.stdout, done.stderr):
            assert all(letter.isprintable() or letter in "\n\t" for letter in text), ascii(said)
        if done.returncode == 1:
            assert done.stdout == "", said
            assert sum(line.startswith("extsnap: ") for line in done.stderr.splitlines()) == 1, said
        # A check notes in a store that is sound which snapshots it found damaged.
        if not notes and (done.returncode or words[0] not in ("create", "strip")):
            assert digest(image) == before, f"{words} wrote to the image"
        assert {path.name for path in tmp_path.iterdir()} <= {image.name, out.name}, said
        return done

    return command


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Put a volume into a file."""

    def put(content: bytes) -> Path:
        path = tmp_path / "hostile.img"
        path.write_bytes(content)
        return path

    return put


# ---- filesystems


def plain() -> MemoryDevice:
    return MemoryDevice(lab.plain_image("ext4"))


def with_inode(device: MemoryDevice, number: int, change: Callable[[MemoryDevice, Filesystem, object], None]) -> None:
    """Change one inode, and what belongs to it; its checksum is set right."""
    overlay = Filesystem.open(Overlay(Medium(device), BLOCK), writable=True)
    inode = overlay.inode(number)
    change(device, overlay, inode)
    overlay.write_inode(number, inode)
    block = overlay.inode_offset(number) // BLOCK
    device.pwrite(block * BLOCK, overlay.read_block(block))


def extent_loop(number: int) -> MemoryDevice:
    """The inode's tree names a node that names itself."""
    device = plain()

    def change(device: MemoryDevice, fs: Filesystem, inode: object) -> None:
        node = int(fs.find_free(1)[0, 0])
        head = struct.pack("<HHHHI", 0xF30A, 1, 84, 1, 0) + struct.pack("<IIHH", 0, node, 0, 0)
        raw = head.ljust(12 + 12 * 84, b"\0")
        seed = inode_seed(fs.geometry.checksum_seed, number, inode.i_generation)  # type: ignore[attr-defined]
        device.pwrite(node * BLOCK, raw + extent_checksum(seed, raw).to_bytes(4, "little"))
        root = struct.pack("<HHHHI", 0xF30A, 1, 4, 2, 0) + struct.pack("<IIHH", 0, node, 0, 0)
        inode.i_block = root.ljust(60, b"\0")  # type: ignore[attr-defined]

    with_inode(device, number, change)
    return device


def root_over(rows: list[tuple[int, int, int]]) -> MemoryDevice:
    """The root directory's extents are (logical, length, physical)."""
    device = plain()

    def change(device: MemoryDevice, fs: Filesystem, inode: object) -> None:
        body = b"".join(struct.pack("<IHHI", at, length, block >> 32, block & 0xFFFFFFFF) for at, length, block in rows)
        head = struct.pack("<HHHHI", 0xF30A, len(rows), 4, 0, 0)
        inode.i_block = (head + body).ljust(60, b"\0")  # type: ignore[attr-defined]
        inode.i_size_lo = sum(row[1] for row in rows) * BLOCK  # type: ignore[attr-defined]

    with_inode(device, 2, change)
    return device


def entry_loop() -> MemoryDevice:
    """An entry of the root directory that ends where it begins."""
    device = plain()
    block, seed = hostile.directory_block(device)
    raw = bytearray(device.pread(block * BLOCK, BLOCK))
    raw[16:18] = bytes(2)  # rec_len of ".."
    with_tail = bytes(raw[:-12]) + leaf_with_checksum(seed, bytes(BLOCK - 12) + bytes(raw[-12:]))[-12:]
    device.pwrite(block * BLOCK, with_tail)
    return device


def hash_tree_loop(content: bytes) -> MemoryDevice:
    """The root of a hash tree names itself."""
    device = MemoryDevice(content)
    block, seed = hostile.directory_block(device)
    size = Filesystem.open(Medium(device)).geometry.block_size
    raw = bytearray(device.pread(block * size, size))
    count = int.from_bytes(raw[ROOT_ENTRIES_AT + 2 : ROOT_ENTRIES_AT + 4], "little")
    for entry in range(count):
        raw[ROOT_ENTRIES_AT + 8 * entry + 4 : ROOT_ENTRIES_AT + 8 * entry + 8] = bytes(4)
    device.pwrite(block * size, dx_with_checksum(seed, bytes(raw), ROOT_ENTRIES_AT))
    return device


def flipped(offset: int) -> MemoryDevice:
    """One byte of a volume changed, and nothing sealed."""
    device = plain()
    device.content[offset] ^= 0xFF
    return device


def superblock(**fields: int) -> MemoryDevice:
    return hostile.sealed_superblock(lab.plain_image("ext4"), **fields)


def group(number: int, **fields: int) -> MemoryDevice:
    return hostile.sealed_group(number, lab.plain_image("ext4"), **fields)


def group_table(number: int) -> int:
    return int(Filesystem.open(plain()).groups.column("bg_inode_table")[number])


def group_offset(number: int) -> int:
    return int(Filesystem.open(plain()).groups._offset(number))


#: By name: the volume, a command that must refuse it, and what it says.
FILESYSTEMS: dict[str, tuple[Callable[[], MemoryDevice], str, str]] = {
    "extent-tree-loop": (lambda: extent_loop(2), "create", "twice|depth"),
    "extent-tree-loop-of-the-journal": (lambda: extent_loop(8), "create", "twice|depth"),
    "extents-over-the-same-blocks": (lambda: root_over([(0, 8, 900), (8, 8, 904)]), "create", "same blocks"),
    "extent-overflows": (lambda: root_over([(0xFFFFFFFF, 0x7FFF, (1 << 48) - 1)]), "create", "extent"),
    "extents-far-apart": (lambda: root_over([(0, 1, 900), (0xFFFFFFF0, 1, 902)]), "create", "holes"),
    "directory-entry-loop": (entry_loop, "create", "director"),
    "huge-block-count": (lambda: superblock(s_blocks_count_hi=1 << 20), "info", "s_blocks_count|truncated|behind"),
    "huge-inode-count": (lambda: superblock(s_inodes_count=0xFFFFFFFF), "info", "s_inodes_count"),
    "huge-block-size": (lambda: superblock(s_log_block_size=0xFFFFFFFF), "info", "s_log_block_size"),
    "no-blocks-per-group": (lambda: superblock(s_blocks_per_group=0), "info", "s_blocks_per_group"),
    "odd-descriptor-size": (lambda: superblock(s_desc_size=0xFFFF), "info", "s_desc_size"),
    "huge-inode-size": (lambda: superblock(s_inode_size=0x8000), "info", "s_inode_size"),
    "table-over-the-superblock": (lambda: group(0, bg_inode_table_lo=1), "create", "group 0"),
    "table-over-another": (lambda: group(1, bg_inode_table_lo=group_table(0)), "create", "shares blocks"),
    "bitmap-outside": (lambda: group(1, bg_block_bitmap_hi=1 << 30), "create", "outside the volume"),
    "superblock-checksum": (lambda: flipped(1024 + 0x3FC), "info", "s_checksum"),
    "group-checksum": (lambda: flipped(group_offset(1) + 0x1E), "create", "bg_checksum"),
}


CREATE = ("create", "{image}", "new")
LIST = ("list", "{image}")
EXPORT = ("export", "{image}", "one", "{out}")
CHECK = ("check", "--quick", "{image}")


@pytest.mark.parametrize("name", FILESYSTEMS)
def test_a_filesystem_that_cannot_be(name: str, run: Run, save: Save) -> None:
    make, refusing, message = FILESYSTEMS[name]
    image = save(make().content)
    for words in (("info", "{image}"), CHECK, CREATE):
        done = run(image, *words)
        if words[0] == refusing:
            assert done.returncode == 1, done.stdout
            assert re.search(message, done.stderr), done.stderr


def test_a_hash_tree_that_goes_in_circles(run: Run, save: Save, fixture_image: Callable[[str], Path]) -> None:
    image = fixture_image("ext4-kernel-hash-tree")
    device = hash_tree_loop(image.read_bytes())
    image.unlink()
    done = run(save(device.content), "create", "{image}", "new")
    assert done.returncode == 1
    assert "the hash tree of directory 2 has a loop" in done.stderr


# ---- stores


def replaced(section: fmt.Section, payload: bytes) -> MemoryDevice:
    return hostile.sealed_sections(lambda parts: parts.update({section: payload}))


def store_over(target: Callable[[Filesystem], int]) -> MemoryDevice:
    """The store's header takes one more block: not its own."""
    fs = Filesystem.open(Medium(MemoryDevice(hostile.image())))

    def more(parts: dict[int, bytes]) -> None:
        rows = np.frombuffer(parts[fmt.Section.EXTENTS], fmt.EXTENT_DTYPE).copy()
        new = np.zeros(1, fmt.EXTENT_DTYPE)
        new["logical"], new["physical"], new["length"] = int((rows["logical"] + rows["length"]).max()), target(fs), 1
        parts[fmt.Section.EXTENTS] = np.concatenate([rows, new]).tobytes()

    return hostile.sealed_sections(more)


def block_of_a_file(fs: Filesystem) -> int:
    number = fs.lookup("/f5")
    assert number
    return int(fs.file_map(number).data[-1, 1:].sum()) - 16


def batch(*records: tuple[int, int, int, int, int]) -> MemoryDevice:
    crcs = sum(length for _, copy, length, *_ in records if copy >= 0)
    return hostile.sealed_batch([], list(records), crcs)


def twice() -> MemoryDevice:
    at = block_of_a_file(Filesystem.open(Medium(MemoryDevice(hostile.image()))))
    return batch((at, fmt.ZERO_COPY, 4, 0, 1), (at + 2, fmt.ZERO_COPY, 4, 0, 1))


def table(**changes: str | int) -> MemoryDevice:
    """The first snapshot of the table has other fields."""
    raw = hostile.blob(fmt.BlobKind.SNAPSHOTS)
    first, *others = fmt.parse_snapshots(raw)
    entry = fmt.SnapshotEntry.parse(first.build())
    for name, value in changes.items():
        entry[name] = value.encode() if isinstance(value, str) else value
    built = bytes(fmt.SnapshotEntry.build(entry)) + b"".join(other.build() for other in others)
    return hostile.sealed_blob(fmt.BlobKind.SNAPSHOTS, 0, built)


def blob_of(length: int) -> MemoryDevice:
    """The header claims that the table of snapshots has so many bytes."""

    def claim(parts: dict[int, bytes]) -> None:
        rows = np.frombuffer(parts[fmt.Section.BLOBS], fmt.BLOB_DTYPE).copy()
        rows["length"][rows["kind"] == fmt.BlobKind.SNAPSHOTS] = length
        parts[fmt.Section.BLOBS] = rows.tobytes()

    return hostile.sealed_sections(claim)


#: By name: the volume, a command that must refuse it, and what it says.
STORES: dict[str, tuple[Callable[[], MemoryDevice], tuple[str, ...], str]] = {
    "outside-the-volume": (lambda: replaced(fmt.Section.EXTENTS, struct.pack("<QQQ", 0, 6900, 600)), LIST, "extents"),
    "extents-overflow": (lambda: replaced(fmt.Section.EXTENTS, struct.pack("<QQQ", 0, 2**63, 2**63)), LIST, "extents"),
    "at-the-superblock": (lambda: store_over(lambda fs: 1), LIST, "the superblock's block"),
    "at-a-backup": (lambda: store_over(lambda fs: int(fs.geometry.superblock_blocks[1])), CREATE, "metadata"),
    "at-a-bitmap": (lambda: store_over(lambda fs: int(fs.groups.column("bg_inode_bitmap")[-1])), CREATE, "metadata"),
    "at-another-file": (lambda: store_over(block_of_a_file), CREATE, "different blocks"),
    "pointer-at-the-superblock": (lambda: hostile.sealed_pointer(1, 1), LIST, "slot|header|damage"),
    "pointer-outside": (lambda: hostile.sealed_pointer(1 << 40, 1 << 41), LIST, "slot|header|damage"),
    "root-of-terabytes": (lambda: hostile.sealed_slots(root_bytes=1 << 40), LIST, "root"),
    "blob-of-exabytes": (lambda: blob_of(1 << 62), LIST, "blob"),
    "log-outside": (lambda: replaced(fmt.Section.LOG, struct.pack("<QQQ", 1, 2, 1 << 40)), LIST, "log"),
    "bits-without-end": (lambda: replaced(fmt.Section.COUNTING_BITMAP, b"\xff" * 16384), LIST, "beyond 65536"),
    "two-records-for-one-block": (twice, EXPORT, "two records"),
    "record-outside": (lambda: batch((7000, 0, 1, 0, 1)), EXPORT, "record"),
    "record-overflows": (lambda: batch((2**63, -1, 1, 0, 1)), EXPORT, "record"),
    "copy-outside": (lambda: batch((10, 1 << 40, 1, 0, 1)), EXPORT, "record|copy|outside"),
    "copy-is-the-header": (lambda: batch((10, 0, 1, 0, 1)), EXPORT, "in use twice"),
    "records-without-end": (lambda: batch(*[(2000, -1, 1024, 0, 1)] * 400), EXPORT, "more records"),
    "name-is-a-path": (lambda: table(name="../../etc/passwd"), LIST, "has a slash"),
    "name-drives-the-terminal": (lambda: table(name="a\x1b]0;b\x07"), LIST, "control character"),
    "two-of-one-name": (lambda: table(name="two"), LIST, "the same name"),
}


@pytest.mark.parametrize("name", STORES)
def test_a_store_that_cannot_be(name: str, run: Run, save: Save) -> None:
    make, refusing, message = STORES[name]
    image = save(make().content)
    for words in dict.fromkeys((LIST, CHECK, refusing, CREATE, ("strip", "{image}"))):
        done = run(image, *words)
        if words == refusing:
            assert done.returncode == 1, done.stdout
            assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize("where", ["outside", "file"])
def test_superblocks_that_are_none(where: str, run: Run, save: Save) -> None:
    """The guard and the mark are put into superblocks only, whatever a header lists as such."""
    fs = Filesystem.open(Medium(MemoryDevice(hostile.image())))
    block = 1 << 50 if where == "outside" else block_of_a_file(fs)
    image = save(replaced(fmt.Section.SUPERBLOCKS, struct.pack("<QQ", 1024, block * BLOCK)).content)
    before = image.read_bytes()
    for words in (LIST, CHECK, EXPORT, CREATE, ("strip", "{image}")):
        run(image, *words)
    if where == "file":
        assert image.read_bytes()[block * BLOCK : (block + 1) * BLOCK] == before[block * BLOCK : (block + 1) * BLOCK]


def test_what_is_no_store_any_more_is_taken_off(run: Run, save: Save) -> None:
    """Whatever a store says, a plain volume can be had again, and e2fsck agrees: the base volume was never touched."""
    image = save(twice().content)
    done = run(image, "strip", "{image}")
    assert done.returncode == 0, done.stderr
    assert not lab.complaint(image.read_bytes())


# ---- what costs more than it says


def hidden(count: int) -> MemoryDevice:
    """Runs of hidden blocks that each cover all of a volume of 4 TiB: a few KiB that are 10^10 rows of bits to set."""
    runs = np.tile(np.array([[0, 1 << 31]]), (count, 1))
    return hostile.sealed_blob(fmt.BlobKind.HIDDEN, 0, fmt.build_runs(runs))


def blob_of_a_store(length: int) -> MemoryDevice:
    """A blob of some bytes that has all blocks of a store of 256 GiB, which lies in a hole."""

    def claim(parts: dict[int, bytes]) -> None:
        extents = np.frombuffer(parts[fmt.Section.EXTENTS], fmt.EXTENT_DTYPE)
        rows = np.frombuffer(parts[fmt.Section.BLOB_RUNS], fmt.RUN_DTYPE).copy()
        more = np.zeros(1, fmt.EXTENT_DTYPE)
        end = int((extents["logical"] + extents["length"]).max())
        more["logical"], more["physical"], more["length"] = end, 1 << 20, length
        rows["start"][0], rows["length"][0] = end, length
        parts[fmt.Section.EXTENTS] = np.concatenate([extents, more]).tobytes()
        parts[fmt.Section.BLOB_RUNS] = rows.tobytes()
        parts[fmt.Section.TWINS] = parts[fmt.Section.TWIN_RUNS] = b""

    return hostile.sealed_sections(claim)


#: By name: a volume that is then made 4 TiB long, all of it a hole; a command that must refuse it, and what it says.
BOMBS: dict[str, tuple[Callable[[], MemoryDevice], tuple[str, ...], str]] = {
    "nothing-but-long": (lambda: MemoryDevice(hostile.image()), (), ""),
    "hidden-runs": (lambda: hidden(4096), EXPORT, "two have the same blocks"),
    "blob-with-all-blocks": (lambda: blob_of_a_store(1 << 28), LIST, "more blocks than it needs"),
    "root-with-all-blocks": (lambda: hostile.sealed_slots(root_bytes=1 << 41, root_blocks=1 << 31), LIST, "a root of"),
    "log-of-a-terabyte": (
        lambda: replaced(fmt.Section.LOG, struct.pack("<QQQ", 1, 2, 1 << 30)),
        LIST,
        "the log lies outside|a log of",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_that_ask_for_everything(name: str, run: Run, save: Save) -> None:
    make, refusing, message = BOMBS[name]
    image = save(make().content)
    os.truncate(image, 4 << 40)
    for words in (LIST, ("dump", "{image}", "bitmaps"), EXPORT, CREATE):
        if words is EXPORT and not refusing:
            continue  # of a snapshot that can be read: its length is no lie
        # The store of a volume that is just long has grown before it is known to be too small for a snapshot.
        done = run(image, *words, notes=words is CREATE and not refusing)
        if words == refusing:
            assert done.returncode == 1, done.stdout
            assert re.search(message, done.stderr), done.stderr


# ---- names


def test_names_that_drive_a_terminal_are_shown_and_do_nothing(run: Run, save: Save) -> None:
    """Label, message and the name of a file that a check names: all of them are somebody else's."""
    evil = "\x1b]0;owned\x07\x1b[2J\r"
    base = lab.changed_by_debugfs(lab.plain_image("ext4"), f'write {{}} "evil{evil[:-1]}"', data=bytes(range(256)) * 64)
    device = MemoryDevice(base)
    clock = iter(range(1_700_000_000 * 10**9, 1_800_000_000 * 10**9, 10**9))
    with Volume(device, writable=True, clock=lambda: next(clock)) as volume:
        volume.verb("create", name="one", message="m")
        volume.verb("checksum", name="one")
        found = volume.filesystem().lookup("/evil\x1b]0;owned\x07\x1b[2J")
        assert found
        block = int(volume.filesystem().file_map(found).data[0, 1])
    entries = fmt.parse_snapshots(hostile.store_of(device).read_blob(fmt.BlobKind.SNAPSHOTS, 0))
    object.__setattr__(entries[0], "message", evil)
    store = hostile.store_of(device)
    store.write_blob(fmt.BlobKind.SNAPSHOTS, 0, b"".join(entry.build() for entry in entries))
    store.commit()
    device.content[block * BLOCK] ^= 1
    image = save(device.content)
    assert "owned" in run(image, "list", "{image}").stdout
    assert "owned" in run(image, "show", "{image}", "one").stdout
    done = run(image, *CHECK, notes=True)
    assert done.returncode == 3
    assert "evil" in done.stdout + done.stderr
    label = evil.encode()[:16].ljust(16, b"\0")
    image.write_bytes(hostile.sealed_superblock(lab.plain_image("ext4"), s_volume_name=label).content)
    assert "owned" in run(image, "info", "{image}").stdout


def test_directories_that_go_in_circles(run: Run, save: Save) -> None:
    """A check that looks for the owner of a damaged block walks directories: one is in itself, and holds the root."""
    commands = ("mkdir /d", "mkdir /d/e", "ln <2> /d/root", "ln /d /d/e/d", "write {} /d/e/file")
    device = MemoryDevice(lab.changed_by_debugfs(lab.plain_image("ext4"), *commands, data=bytes(range(256)) * 64))
    with Volume(device, writable=True) as volume:
        volume.verb("create", name="one")
        volume.verb("checksum", name="one")
        found = volume.filesystem().lookup("/d/e/file")
        assert found
        block = int(volume.filesystem().file_map(found).data[0, 1])
    device.content[block * BLOCK] ^= 1
    done = run(save(device.content), "check", "--quick", "{image}", notes=True)
    assert done.returncode == 3
    assert "/e/file" in done.stdout + done.stderr


# ---- partition tables


def gpt_with(**fields: int) -> dict[int, bytes]:
    """A GPT, backup included, with other fields in both headers, sealed."""
    written = disks.gpt(8 * MIB, [(1, MIB, 4 * MIB)])
    places = {
        "partition_entry_lba": (72, "<Q"),
        "num_partition_entries": (80, "<I"),
        "sizeof_partition_entry": (84, "<I"),
    }
    for at in (512, 8 * MIB - 512):
        raw = bytearray(written[at])
        for name, value in fields.items():
            struct.pack_into(places[name][1], raw, places[name][0], value)
        raw[16:20] = bytes(4)
        raw[16:20] = zlib.crc32(raw[:92]).to_bytes(4, "little")
        written[at] = bytes(raw)
    return written


def circle() -> dict[int, bytes]:
    """The second boot record of logical partitions names the first as the next."""
    written = disks.mbr([], [(5, 2 * MIB, MIB), (6, 4 * MIB, MIB)], container=(MIB, 6 * MIB))
    second = max(written)
    raw = bytearray(written[second])
    raw[462:478] = struct.pack("<B3sB3sII", 0, bytes(3), 5, bytes(3), 0, 100)
    written[second] = bytes(raw)
    return written


#: By name: what is written where, and what is said.
TABLES: dict[str, tuple[Callable[[], dict[int, bytes]], str]] = {
    "logical-circle": (circle, "goes round in circles"),
    "overlapping": (lambda: disks.mbr([(1, MIB, 4 * MIB), (2, 2 * MIB, 4 * MIB)]), "shares bytes"),
    "beyond-the-end": (lambda: disks.mbr([(1, MIB, 1 << 40)]), "behind the end"),
    "gpt-huge-count": (lambda: gpt_with(num_partition_entries=0xFFFFFFFF), "too many"),
    "gpt-huge-entries": (lambda: gpt_with(sizeof_partition_entry=0xFFFFFF80), "128 is supported"),
    "gpt-entries-outside": (lambda: gpt_with(partition_entry_lba=2**64 - 1), "leaves the disk"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_partition_table_that_cannot_be(name: str, run: Run, tmp_path: Path) -> None:
    make, message = TABLES[name]
    image = disks.make(tmp_path / "hostile.img", 8 * MIB, make())
    for words in (LIST, (*CREATE, "-P", "1"), (*CREATE, "-P", "5")):
        done = run(image, *words)
        assert done.returncode == 1
        if words is LIST:
            assert message in done.stderr, done.stderr
