"""Checksums: what mke2fs and the kernel wrote is reproduced, and a changed byte is seen.

Where each structure lies, whose it is and which checksum it has is read from dumpe2fs and debugfs.
"""

from __future__ import annotations

import functools
import gzip
import os
import random
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import images
import numpy as np
import oracle
import pytest

from extsnap.ondisk import castagnoli, checksum
from extsnap.ondisk.directory import dx_with_checksum, leaf_with_checksum

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
#: Written by the kernel, or by mke2fs, debugfs and e2fsck.
KERNEL = ("ext4-kernel-hash-tree", "ext4-frozen-with-orphan")
MATRIX = ("ext4-1k", "ext4up-4k")
#: Options of mke2fs for what neither has: 32-byte descriptors, 128-byte inodes, crc16.
MADE = {
    "csum-wide": "-I 256 -O none,extent,sparse_super,metadata_csum,extra_isize",
    "csum-narrow": "-I 128 -O none,extent,sparse_super,metadata_csum,has_journal -J size=1",
    "crc16": "-I 128 -O none,extent,sparse_super,uninit_bg",
    "crc16-64bit": "-I 256 -O none,extent,sparse_super,uninit_bg,64bit",
}
WITH_METADATA_CSUM = (*KERNEL, *MATRIX, "csum-wide", "csum-narrow")


@dataclass(frozen=True)
class Checked:
    """One structure with a checksum.

    Attributes:
        stored: The checksum that e2fsprogs reads, or that stands in the block.
        bits: How many of the computed checksum's low bits are stored.
        covered: Offsets of bytes that count.
        field: Offsets of the checksum itself, whose old value does not count.
    """

    what: str
    raw: bytes
    compute: Callable[[bytes], int]
    stored: int
    bits: int
    covered: range
    field: tuple[int, ...]


class Image:
    """An image and what dumpe2fs says of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = subprocess.run(["dumpe2fs", str(path)], capture_output=True, text=True, check=True).stdout
        head, *self.groups = re.split(r"^Group (?=\d+: \(Blocks)", text, flags=re.MULTILINE)
        self.facts = {name: value.strip() for name, _, value in (line.partition(":") for line in head.splitlines())}
        self.block_size = self.number("Block size")
        self.uuid = uuid.UUID(self.facts["Filesystem UUID"]).bytes
        self.seed = checksum.filesystem_seed(self.uuid)
        if "Checksum seed" in self.facts:
            assert int(self.facts["Checksum seed"], 16) == self.seed

    def number(self, name: str, default: int = 0) -> int:
        return int(self.facts.get(name, default))

    def block(self, number: int, count: int = 1) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), count * self.block_size, number * self.block_size)

    def superblock(self, number: int) -> bytes:
        """The superblock in a block; the primary one stands in block 0 where blocks are bigger than 1 KiB."""
        at = 1024 if number == 0 else 0
        return self.block(number, 2)[at : at + 1024]

    def descriptors(self) -> np.ndarray:
        size = self.number("Group descriptor size", 32)
        start = self.number("First block") + 1
        blocks = -(-len(self.groups) * size // self.block_size)
        raw = np.frombuffer(self.block(start, blocks), np.uint8)
        return raw[: len(self.groups) * size].reshape(-1, size)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Callable[[str], Image]:
    @functools.cache
    def get(name: str) -> Image:
        if name in MATRIX:
            return Image(images.image(name))
        directory = tmp_path_factory.mktemp(name)
        path = directory / "image"
        if name in KERNEL:
            path.write_bytes(gzip.decompress((FIXTURES / f"{name}.img.gz").read_bytes()))
            return Image(path)
        tree = directory / "tree"
        tree.mkdir()
        for number in range(40):
            (tree / f"file-{number}").write_bytes(b"content" * number)
        words = ["-q", "-F", "-t", "ext4", "-b", "1024", "-g", "1024", "-N", "512", *MADE[name].split()]
        images.tool("mke2fs", *words, "-U", images.UUID, "-E", "lazy_itable_init=1", "-d", str(tree), str(path), "6M")
        if name == "csum-wide":
            # An inode without room for i_checksum_hi, as a converted ext3 has them.
            oracle.debugfs_write(path, "sif <13> extra_isize 0")
        return Image(path)

    return get


def superblocks(image: Image) -> Iterator[Checked]:
    at = re.findall(r"(?:Primary|Backup) superblock at (\d+)", "".join(image.groups))
    assert len(at) > 1 or len(image.groups) == 1
    for number in map(int, at):
        raw = image.superblock(number)
        stored = int.from_bytes(raw[0x3FC:], "little")
        if number == int(at[0]):
            assert stored == int(image.facts["Checksum"], 16)
        field = tuple(range(0x3FC, 0x400))
        yield Checked(f"superblock {number}", raw, checksum.superblock_checksum, stored, 32, range(0x3FC), field)


def descriptors(image: Image) -> Iterator[Checked]:
    table = image.descriptors()
    for number, row in enumerate(table):

        def compute(raw: bytes, number: int = number) -> int:
            features = image.facts["Filesystem features"].split()
            rows = np.frombuffer(raw, np.uint8)[None]
            return int(
                checksum.group_checksums(
                    rows,
                    np.array([number]),
                    seed=image.seed,
                    uuid=image.uuid,
                    metadata_csum="metadata_csum" in features,
                )[0]
            )

        stored = int(re.search(r"\) csum 0x([0-9a-f]+)", image.groups[number])[1], 16)
        yield Checked(f"group {number}", row.tobytes(), compute, stored, 16, range(0x1E), (0x1E, 0x1F))


def bitmaps(image: Image) -> Iterator[Checked]:
    """Of groups whose bitmaps were written; others have no checksum."""
    bits = 32 if image.number("Group descriptor size", 32) > 32 else 16
    for group in image.groups:
        for kind, per_group in (("Block", "Blocks per group"), ("Inode", "Inodes per group")):
            if f"{kind.upper()}_UNINIT" in group:
                continue
            found = re.search(rf"{kind} bitmap at (\d+).*csum 0x([0-9a-f]+)", group)
            size = image.number(per_group) // 8
            raw = image.block(int(found[1]))[:size]
            compute = functools.partial(checksum.bitmap_checksum, image.seed)
            what = f"{kind} bitmap at {found[1]}"
            yield Checked(what, raw, compute, int(found[2], 16), bits, range(size), ())


@functools.cache
def stats(image: Image) -> list[tuple[int, str, int]]:
    """(inode number, what debugfs prints of it, byte offset in the image) of inodes in use."""
    per_group = image.number("Inodes per group")
    numbers = []
    for index, group in enumerate(image.groups):
        unused = re.search(r", (\d+) unused inodes", group)  # of these the table has never been written
        numbers += range(index * per_group + 1, (index + 1) * per_group + 1 - (int(unused[1]) if unused else 0))
    commands = [f"{command} <{number}>" for number in numbers for command in ("stat", "imap")]
    answers = oracle.debugfs(image.path, *commands)
    found = []
    for number, stat, place in zip(numbers, answers[::2], answers[1::2], strict=True):
        if re.search(r"Mode:  0000 ", stat) or "Links: 0 " in stat:
            continue
        at = re.search(r"located at block (\d+), offset 0x([0-9a-f]+)", place)
        found.append((number, stat, int(at[1]) * image.block_size + int(at[2], 16)))
    return found


def inodes(image: Image) -> Iterator[Checked]:
    size = image.number("Inode size")
    for number, stat, at in stats(image):
        raw = image.block(at // image.block_size)[at % image.block_size :][:size]
        stored = int(re.search(r"^Inode checksum: 0x([0-9a-f]+)$", stat, re.MULTILINE)[1], 16)
        compute = functools.partial(checksum.inode_checksum, image.seed, number)
        extra = re.search(r"^Size of extra inode fields: (\d+)", stat, re.MULTILINE)
        wide = size > 128 and extra is not None and int(extra[1]) >= 4
        field = (0x7C, 0x7D, *((0x82, 0x83) if wide else ()))
        yield Checked(f"inode {number}", raw, compute, stored, 32 if wide else 16, range(0x7C), field)


def seed_of(image: Image, number: int, stat: str) -> int:
    generation = int(re.search(r"^Generation: (\d+) ", stat, re.MULTILINE)[1])
    return checksum.inode_seed(image.seed, number, generation)


def extent_blocks(image: Image) -> Iterator[Checked]:
    for number, stat, _ in stats(image):
        if int(re.search(r"Flags: (0x[0-9a-f]+)", stat)[1], 16) & 0x80000 == 0:
            continue  # indirect blocks have no checksum
        for block in oracle.parse_stat(stat).mapping.tolist():
            raw = image.block(block)
            # As many entries as fit; the checksum behind them.
            end = 12 + (image.block_size - 12) // 12 * 12
            compute = functools.partial(checksum.extent_checksum, seed_of(image, number, stat))
            stored = int.from_bytes(raw[end : end + 4], "little")
            yield Checked(f"extent block {block}", raw, compute, stored, 32, range(end), tuple(range(end, end + 4)))


@functools.cache
def hash_tree(image: Image, number: int) -> dict[int, int]:
    """Checksum of every root and node of a directory's hash tree, by logical block; empty for a linear directory."""
    done = subprocess.run(
        ["debugfs", "-R", f"htree <{number}>", str(image.path)], capture_output=True, text=True, check=True
    )
    found = re.search(r"Indirect levels: (\d+)", done.stdout)
    if found is None:
        return {}
    checksums = [int(value, 16) for value in re.findall(r"^Checksum: 0x([0-9a-f]+)", done.stdout, re.MULTILINE)]
    assert int(found[1]) <= 1
    nodes = []
    if int(found[1]):
        root = re.split(r"^Number of entries \(count\)", done.stdout, flags=re.MULTILINE)[1]
        nodes = [int(block) for block in re.findall(r"^Entry #\d+: Hash 0x[0-9a-f]+, block (\d+)", root, re.MULTILINE)]
        nodes.pop()  # the first one again: the heading of its own dump
    assert len(checksums) == 1 + len(nodes)
    return dict(zip([0, *nodes], checksums, strict=True))


def directory_blocks(image: Image) -> Iterator[Checked]:
    size = image.block_size
    for number, stat, _ in stats(image):
        if "Type: directory" not in stat:
            continue
        seed = seed_of(image, number, stat)
        tree = hash_tree(image, number) if "Flags: 0x81000" in stat else {}
        for logical, block in enumerate(oracle.parse_stat(stat).data_blocks.tolist()):
            raw = image.block(block)
            seal = functools.partial(leaf_with_checksum, seed)
            if logical in tree:
                seal = functools.partial(dx_with_checksum, seed, entries_at=32 if logical == 0 else 8)

            def compute(raw: bytes, seal: Callable[[bytes], bytes] = seal) -> int:
                return int.from_bytes(seal(raw)[-4:], "little")

            stored = int.from_bytes(raw[-4:], "little")
            assert tree.get(logical, stored) == stored
            what = f"{'node' if logical in tree else 'leaf'} {logical} of directory {number}"
            covered = range(32 if logical in tree else size - 12)
            yield Checked(what, raw, compute, stored, 32, covered, tuple(range(size - 4, size)))


def journal(image: Image) -> Iterator[Checked]:
    raw = image.block(int(oracle.file_blocks(image.path, oracle.JOURNAL).data_blocks[0]))
    stored = int(image.facts["Journal checksum"], 16)
    field = tuple(range(0xFC, 0x100))
    yield Checked("journal", raw, checksum.journal_superblock_checksum, stored, 32, range(0xFC), field)


KINDS: dict[str, Callable[[Image], Iterator[Checked]]] = {
    "superblocks": superblocks,
    "group descriptors": descriptors,
    "bitmaps": bitmaps,
    "inodes": inodes,
    "extent blocks": extent_blocks,
    "directory blocks": directory_blocks,
    "journal superblock": journal,
}
#: A journal has checksums from its first mount on, which turns them on.
CASES = [
    *((name, kind) for name in WITH_METADATA_CSUM for kind in KINDS if kind != "journal superblock" or name in KERNEL),
    *((name, "group descriptors") for name in ("crc16", "crc16-64bit")),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_checksums_are_reproduced(image, name, kind):
    for one in KINDS[kind](image(name)):
        assert one.compute(one.raw) & ((1 << one.bits) - 1) == one.stored, one.what


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_changed_byte_is_seen(image, name, kind):
    rng = random.Random(f"{name} {kind}")
    found = list(KINDS[kind](image(name)))
    for one in rng.sample(found, min(8, len(found))):
        for at in (one.covered[0], one.covered[-1], rng.choice(one.covered)):
            changed = bytearray(one.raw)
            changed[at] ^= rng.randrange(1, 256)
            assert one.compute(bytes(changed)) != one.compute(one.raw), f"{one.what}, byte {at}"
        for at in one.field:
            changed = bytearray(one.raw)
            changed[at] ^= 0xFF
            assert one.compute(bytes(changed)) == one.compute(one.raw), f"{one.what}, byte {at} of the checksum"


def test_there_is_something_of_every_kind(image):
    for name in KERNEL[:1]:
        assert all(any(make(image(name))) for make in KINDS.values())
    found = [one.what.split()[0] for one in directory_blocks(image("ext4-1k"))]
    assert (found.count("node"), found.count("leaf") > 100) == (3, True)
    assert len(list(extent_blocks(image("ext4-1k")))) > 100
    assert [one.what for one in inodes(image("csum-wide")) if one.bits == 16] == ["inode 13"]
    assert {one.bits for one in inodes(image("csum-narrow"))} == {16}
    assert {one.bits for one in bitmaps(image("csum-narrow"))} == {16}


def test_known_answers():
    """The check values of the two algorithms: CRC-32C, and CRC-16 as Modbus has it."""
    assert checksum.crc32c_raw(0xFFFFFFFF, b"123456789") == 0xE3069283 ^ 0xFFFFFFFF
    assert checksum.crc32c_raw(checksum.crc32c_raw(0xFFFFFFFF, b"1234"), b"56789") == 0xE3069283 ^ 0xFFFFFFFF
    rows = np.frombuffer(b"123456789987654321", np.uint8).reshape(2, 9)
    assert checksum.crc16_rows(0xFFFF, rows)[0] == 0x4B37
    assert checksum.crc16_rows(0xFFFF, rows)[1] != 0x4B37


def test_group_checksums_of_a_table_are_those_of_its_rows(image):
    for name in ("ext4-1k", "crc16"):
        volume = image(name)
        table = volume.descriptors()
        options = {"seed": volume.seed, "uuid": volume.uuid, "metadata_csum": name == "ext4-1k"}
        whole = checksum.group_checksums(table, np.arange(len(table)), **options)
        assert whole.tolist() == [one.stored for one in descriptors(volume)]
        assert checksum.group_checksums(table[3:], np.arange(3, len(table)), **options).tolist() == whole[3:].tolist()


@pytest.mark.parametrize("found", [True, False], ids=["compiled", "package"])
def test_both_ways_to_crc32c(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 3720 B.4; in one piece or two."""
    if not found:
        monkeypatch.setattr(castagnoli, "PathFinder", SimpleNamespace(find_spec=lambda *_: None))
    crc32c = castagnoli._find()
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(20, 32)), crc32c(bytes(range(20)))) == 0x46DD794E
