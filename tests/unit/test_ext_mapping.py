"""File mappings against debugfs: whole matrix images, deep trees, what we build ourselves; and hostile ones."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import images
import numpy as np
import oracle
import pytest

from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.recording import MemoryDevice
from extsnap.errors import ExtsnapError, FormatError
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.mapping import FileMap, build_extents, extent_nodes, parse_extents, parse_indirect
from extsnap.ondisk.inode import InodeFlags

SIZE = 1024
PER_BLOCK = SIZE // 4
#: Nothing hostile may take longer, on a slow machine either.
SECONDS = 1.0
#: Every inode of a matrix image that is in use stands below.
INODES = 690


def spread(rows: np.ndarray) -> np.ndarray:
    """int64[blocks, 2]: (logical, physical) of every block of rows (logical, physical, length)."""
    parts = [np.stack([np.arange(n) + first, np.arange(n) + at], axis=1) for first, at, n in rows.tolist()]
    return np.concatenate([np.zeros((0, 2), np.int64), *parts])


def assert_agrees(found: FileMap, told: oracle.FileBlocks, name: str) -> None:
    assert np.array_equal(spread(found.data), spread(told.data)), name
    assert found.mapping.tolist() == told.mapping.tolist(), name  # debugfs, too, prints a node before what is below


@pytest.mark.parametrize("name", images.MATRIX)
def test_every_inode_as_debugfs_has_it(name):
    path = images.image(name)
    answers = oracle.debugfs(path, *(f"stat <{ino}>" for ino in range(1, INODES)))
    depths, mapped = set(), 0
    with ImageFile(str(path)) as device:
        fs = Filesystem.open(device)
        for ino, answer in enumerate(answers, 1):
            if "Type: regular" not in answer and "Type: directory" not in answer and "\nBLOCKS:" not in answer:
                continue  # a short symbolic link or a device: i_block is no map
            if re.search(r"Type: (character|block) special|Fast link dest", answer):
                continue
            told = oracle.parse_stat(answer)
            assert_agrees(fs.file_map(ino), told, f"inode {ino}")
            depths.add(told.depth)
            mapped += bool(len(told.data))
    assert mapped > 40
    # The shapes that the comparison must have met.
    if name.endswith("-1k"):
        assert depths >= ({0, 2, 3} if name.startswith("ext4") else {0, 1, 2, 3}), depths
    else:
        assert max(depths) >= 2, depths


def test_unused_inodes_map_nothing():
    with ImageFile(str(images.image("ext4-4k"))) as device:
        fs = Filesystem.open(device)
        assert not len(fs.file_map(INODES + 100).data)


def mke2fs(path: Path, kind: str, features: str, size: str) -> Path:
    words = ["-q", "-F", "-t", kind, "-b", str(SIZE), "-N", "64", "-O", f"^has_journal,^resize_inode,{features}"]
    env = {**os.environ, "MKE2FS_CONFIG": "/dev/null"}
    subprocess.run(["mke2fs", *words, str(path), size], check=True, capture_output=True, env=env)
    return path


FEATURES = {
    "ext2": ("ext2", "none,filetype,sparse_super"),
    "ext4": ("ext4", "none,filetype,sparse_super,extent,64bit,huge_file,extra_isize"),
    "ext4-csum": ("ext4", "none,filetype,sparse_super,extent,64bit,huge_file,extra_isize,metadata_csum"),
}


@pytest.fixture
def volume(tmp_path) -> Callable[..., Path]:
    def make(kind: str, size: str = "16M") -> Path:
        return mke2fs(tmp_path / f"{kind}.img", *FEATURES[kind], size)

    return make


def put(image: Path, name: str, blocks: range | list[int]) -> None:
    """Write a file with content in these blocks and holes elsewhere."""
    source = image.with_suffix(f".{name}")
    with open(source, "wb") as file:
        for block in blocks:
            file.seek(block * SIZE)
            file.write(b"x" * SIZE)
    oracle.debugfs_write(image, f"write {source} {name}")


def map_of(image: Path, name: str) -> FileMap:
    with ImageFile(str(image)) as device:
        fs = Filesystem.open(device)
        ino = fs.lookup(name)
        assert ino is not None
        return fs.file_map(ino)


@pytest.mark.parametrize("kind", ["ext4", "ext4-csum"])
def test_many_fragments_of_one_block(volume, kind):
    image = volume(kind)
    put(image, "holes", range(1, 4000, 2))
    told = oracle.file_blocks(image, "/holes")
    assert told.depth == 2
    assert len(told.data) == 2000
    found = map_of(image, "/holes")
    assert_agrees(found, told, kind)
    # The same once more, from the rows of dump_extents: index entries of every level, then the leaves.
    (text,) = oracle.debugfs(image, "dump_extents /holes")
    rows = [line.replace("-", " ").replace("/", " ").split() for line in text.splitlines()[1:]]
    leaves = [(int(row[4]), int(row[6]), int(row[8])) for row in rows if row[0] == row[1]]
    nodes = [int(row[6]) for row in rows if row[0] != row[1]]
    assert found.data.tolist() == [list(row) for row in leaves]
    assert found.mapping.tolist() == nodes


def test_unwritten_extents_are_mapped(volume):
    image = volume("ext4-csum")
    put(image, "file", [0, 9])
    oracle.debugfs_write(image, "fallocate /file 0 20")
    (text,) = oracle.debugfs(image, "stat /file")
    assert "[u]" in text
    found = map_of(image, "/file")
    assert_agrees(found, oracle.parse_stat(text), "unwritten")
    assert spread(found.data)[:, 0].tolist() == list(range(21))


def test_longest_extents(tmp_path):
    """A length up to 32,768 is a written extent, above it an unwritten one; debugfs makes one of 32,767."""
    image = tmp_path / "long.img"
    words = ["-q", "-F", "-t", "ext4", "-b", "4096", "-N", "512", "-O", "none,extent,sparse_super,flex_bg"]
    subprocess.run(["mke2fs", *words, str(image), "512M"], check=True, capture_output=True)
    oracle.debugfs_write(image, "write /dev/null file", "fallocate /file 0 89999")
    told = oracle.file_blocks(image, "/file")
    assert told.data[:, 2].max() == 32767
    assert_agrees(map_of(image, "/file"), told, "unwritten")
    # A written one of 32,768, which we build and debugfs reads; 32,769 blocks take two.
    with ImageFile(str(image), writable=True) as device:
        fs = Filesystem.open(device, writable=True)
        ino = fs.lookup("/file")
        assert ino is not None
        fs.set_file_map(ino, np.array([[0, told.data[0, 1], 32769]]), np.zeros(0, np.int64), 32769 * 4096)
        fs.flush()
    assert oracle.file_blocks(image, "/file").data[:, 2].tolist() == [32768, 1]
    assert map_of(image, "/file").data[:, 2].tolist() == [32768, 1]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_indirect_levels(volume, depth):
    image = volume("ext2")
    first = DIRECT_END[depth]
    put(image, "file", [0, 11, first - 1, first, first + 1, first + 256, first + 3000])
    told = oracle.file_blocks(image, "/file")
    assert told.depth >= depth
    assert_agrees(map_of(image, "/file"), told, "file")


def test_more_nodes_than_are_read_at_once(volume):
    image = volume("ext2")
    put(image, "file", range(12, 12 + 2500 * PER_BLOCK, PER_BLOCK))
    told = oracle.file_blocks(image, "/file")
    assert len(told.mapping) > 2500
    assert_agrees(map_of(image, "/file"), told, "file")


DIRECT_END = {1: 12, 2: 12 + PER_BLOCK, 3: 12 + PER_BLOCK + PER_BLOCK**2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", FEATURES)
def test_what_we_build_is_what_debugfs_reads(volume, kind, seed):
    """A file is given random runs with holes; e2fsck and debugfs judge inode, nodes, counts and bitmaps."""
    image = volume(kind)
    rng = random.Random(f"{kind}{seed}")
    put(image, "file", [])
    with ImageFile(str(image), writable=True) as device:
        fs = Filesystem.open(device, writable=True)
        ino = fs.lookup("/file")
        assert ino is not None
        at = int(fs.find_free(1000)[-1, 0])
        logical, rows = 0, []
        for _ in range((2, 300, 900)[seed]):
            length = rng.choice((1, 1, 1, 2, 7))
            logical += rng.choice((0, 0, 1, 30)) if kind != "ext2" else rng.choice((0, 0, 1, 460))
            rows.append((logical, at, length))
            logical += length
            at += length + rng.randrange(2)
        data = np.array(rows, np.int64)
        assert at < fs.geometry.blocks_count
        fs.set_blocks(data[:, 1:], True)
        nodes = fs.find_free(fs.mapping_blocks_needed(data))
        fs.set_blocks(nodes, True)
        mapping = np.concatenate([np.arange(start, start + length) for start, length in [*nodes.tolist(), (0, 0)]])
        fs.set_file_map(ino, data, mapping, logical * SIZE)
        assert spread(fs.file_map(ino).data).tolist() == spread(data).tolist()
        fs.flush()
    oracle.assert_clean(image)
    told = oracle.file_blocks(image, "/file")
    assert spread(told.data).tolist() == spread(data).tolist()
    assert told.mapping.tolist() == mapping.tolist()
    if kind == "ext2" and seed:
        assert told.depth == (2, 3)[seed - 1]
    elif seed:
        assert told.depth == (1, 2)[seed - 1]


# -- hostile mappings -------------------------------------------------------------------------------------

BLOCKS = 4000


class Nodes:
    """Blocks that hold what the test says, and zeros elsewhere; counts what is read of them."""

    def __init__(self, content: dict[int, bytes]) -> None:
        self.content = content
        self.read = 0

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        self.read += len(numbers)
        assert self.read <= 2 * BLOCKS, "reads without end"
        assert ((numbers > 0) & (numbers < BLOCKS)).all(), "reads outside the volume"
        raw = b"".join(self.content.get(number, b"").ljust(SIZE, b"\0") for number in numbers.tolist())
        return np.frombuffer(raw, np.uint8).reshape(-1, SIZE)


no_nodes = Nodes({})


def header(entries: int, depth: int, *, maximum: int = 84, magic: int = 0xF30A) -> bytes:
    return struct.pack("<4HI", magic, entries, maximum, depth, 0)


def index(*entries: tuple[int, int], depth: int, **options: int) -> bytes:
    """An index node: (first logical block, block of the node below)."""
    body = b"".join(struct.pack("<IIHH", at, block & 0xFFFFFFFF, block >> 32, 0) for at, block in entries)
    return header(options.pop("count", len(entries)), depth, **options) + body


def leaf(*entries: tuple[int, int, int], **options: int) -> bytes:
    """A leaf node: (logical, physical, length as it stands on the disk)."""
    body = b"".join(struct.pack("<IHHI", at, n, block >> 32, block & 0xFFFFFFFF) for at, block, n in entries)
    return header(options.pop("count", len(entries)), options.pop("depth", 0), **options) + body


GOOD = leaf((0, 50, 1))
#: What is wrong -> (root, nodes).
HOSTILE_EXTENTS: dict[str, tuple[bytes, dict[int, bytes]]] = {
    "bad magic": (leaf((0, 50, 1), magic=0xF30B), {}),
    "no header": (bytes(60), {}),
    "depth 6": (index((0, 9), depth=6), {}),
    "depth 65535": (index((0, 9), depth=0xFFFF), {}),
    "more entries than the maximum": (leaf((0, 50, 1), count=5, maximum=4), {}),
    "more entries than fit": (leaf((0, 50, 1), count=5, maximum=9), {}),
    "65535 entries": (leaf((0, 50, 1), count=0xFFFF, maximum=0xFFFF), {}),
    "an index without entries": (index(depth=1), {}),
    "an index without entries further down": (index((0, 9), depth=2), {9: index(depth=1)}),
    "depth does not fall": (index((0, 9), depth=1), {9: index((0, 10), depth=1), 10: GOOD}),
    "depth falls by two": (index((0, 9), depth=2), {9: GOOD}),
    "depth rises": (index((0, 9), depth=1), {9: index((0, 10), depth=2), 10: GOOD}),
    "a node that points at itself": (index((0, 9), depth=2), {9: index((0, 9), depth=1)}),
    "a loop of two": (index((0, 9), depth=3), {9: index((0, 10), depth=2), 10: index((0, 9), depth=1)}),
    "one node twice": (index((0, 9), (100, 9), depth=1), {9: GOOD}),
    "one empty leaf twice": (index((0, 9), (100, 9), depth=1), {9: leaf()}),
    "one node twice in different branches": (
        index((0, 9), (100, 10), depth=2),
        {9: index((0, 11), depth=1), 10: index((100, 11), depth=1), 11: GOOD},
    ),
    "a node that is no node": (index((0, 9), depth=1), {}),
    "a node at block 0": (index((0, 0), depth=1), {}),
    "a node past the end": (index((0, BLOCKS), depth=1), {}),
    "a node far past the end": (index((0, (1 << 48) - 1), depth=1), {}),
    "a node with a bad count": (index((0, 9), depth=1), {9: leaf((0, 50, 1), count=85)}),
    "a node whose maximum does not fit": (index((0, 9), depth=1), {9: leaf(count=86, maximum=86)}),
    "an extent at block 0": (leaf((0, 0, 1)), {}),
    "an extent past the end": (leaf((0, BLOCKS - 1, 2)), {}),
    "an extent far past the end": (leaf((0, (1 << 48) - 1, 32768)), {}),
    "an extent of no blocks": (leaf((0, 50, 0)), {}),
    "extents that overlap": (leaf((0, 50, 4), (3, 60, 1)), {}),
    "extents out of order": (leaf((9, 50, 1), (3, 60, 1)), {}),
    "extents of two leaves that overlap": (
        index((0, 9), (5, 10), depth=1),
        {9: leaf((0, 50, 9)), 10: leaf((5, 70, 1))},
    ),
    "leaves out of order": (index((5, 9), (0, 10), depth=1), {9: leaf((5, 50, 1)), 10: leaf((0, 70, 1))}),
    "more blocks than the volume has": (leaf((0, 1, 3000), (3000, 1, 3000)), {}),
}


@pytest.mark.parametrize("what", HOSTILE_EXTENTS)
def test_hostile_extent_tree(what):
    root, content = HOSTILE_EXTENTS[what]
    start = time.monotonic()
    with pytest.raises(FormatError):
        parse_extents(root.ljust(60, b"\0")[:60], Nodes(content), BLOCKS, None)
    assert time.monotonic() - start < SECONDS


def test_the_good_tree_that_the_hostile_ones_come_from():
    nodes = Nodes({9: index((0, 10), depth=1), 10: GOOD})
    found = parse_extents(index((0, 9), depth=2).ljust(60, b"\0"), nodes, BLOCKS, None)
    assert found.data.tolist() == [[0, 50, 1]]
    assert found.mapping.tolist() == [9, 10]
    # The last block of the volume is inside.
    edge = parse_extents(leaf((0, BLOCKS - 1, 1)).ljust(60, b"\0"), no_nodes, BLOCKS, None)
    assert edge.data.tolist() == [[0, BLOCKS - 1, 1]]


def test_nodes_with_a_wrong_checksum(volume):
    """Every byte of a node counts, but those behind the checksum."""
    seed = 0x1234
    rows = np.stack([np.arange(0, 400, 2), np.arange(1000, 1200), np.ones(200, np.int64)], axis=1)
    mapping = np.arange(20, 20 + extent_nodes(rows, SIZE))
    root, content = build_extents(rows, mapping, SIZE, seed)
    assert parse_extents(root, Nodes(content), BLOCKS, seed).data.tolist() == rows.tolist()
    for at in (0, 3, 5, 12, 500, 1016, 1020, 1023):
        for block in content:
            raw = bytearray(content[block])
            raw[at] ^= 0x10
            with pytest.raises(FormatError):
                parse_extents(root, Nodes({**content, block: bytes(raw)}), BLOCKS, seed)


def pointers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def roots(*, direct: int = 0, single: int = 0, double: int = 0, triple: int = 0) -> bytes:
    return pointers(*[direct, *[0] * 11, single, double, triple])


HOSTILE_INDIRECT: dict[str, tuple[bytes, dict[int, bytes]]] = {
    "a direct block past the end": (roots(direct=BLOCKS), {}),
    "a direct block far past the end": (roots(direct=0xFFFFFFFF), {}),
    "an indirect block past the end": (roots(single=BLOCKS), {}),
    "a double indirect block past the end": (roots(double=0xFFFFFFFF), {}),
    "a triple indirect block past the end": (roots(triple=BLOCKS), {}),
    "a block below past the end": (roots(single=9), {9: pointers(0, 0, BLOCKS)}),
    "a node below past the end": (roots(double=9), {9: pointers(BLOCKS + 1)}),
    "a double indirect block that points at itself": (roots(double=9), {9: pointers(9)}),
    "a triple indirect block that points at itself": (roots(triple=9), {9: pointers(*[9] * PER_BLOCK)}),
    "a loop of two": (roots(triple=9), {9: pointers(10), 10: pointers(9)}),
    "one node as single and double": (roots(single=9, double=9), {9: pointers(10), 10: pointers(50)}),
    "one node twice below": (roots(double=9), {9: pointers(10, 10), 10: pointers(50)}),
    "a triple indirect block full of one": (roots(triple=9), {9: pointers(*[10] * PER_BLOCK), 10: pointers(9)}),
    "more blocks than the volume has": (
        roots(double=9),
        {9: pointers(*range(100, 200)), **{n: pointers(*[50] * PER_BLOCK) for n in range(100, 200)}},
    ),
}


@pytest.mark.parametrize("what", HOSTILE_INDIRECT)
def test_hostile_indirect_blocks(what):
    root, content = HOSTILE_INDIRECT[what]
    start = time.monotonic()
    with pytest.raises(FormatError):
        parse_indirect(root, Nodes(content), BLOCKS, SIZE)
    assert time.monotonic() - start < SECONDS


def test_an_indirect_block_that_maps_itself_as_data_is_read_once():
    """What e2fsck calls multiply-claimed is no loop: the block is data at the end of the tree."""
    nodes = Nodes({9: pointers(9)})
    assert parse_indirect(roots(single=9), nodes, BLOCKS, SIZE).data.tolist() == [[12, 9, 1]]
    assert nodes.read == 1


@pytest.mark.parametrize("kind", ["ext2", "ext4", "ext4-csum"])
def test_damaged_nodes_give_a_map_or_an_error(volume, kind):
    """Random damage of real nodes and inodes: an ExtsnapError, or a map that lies inside the volume."""
    image = volume(kind, "4M")
    put(image, "file", range(1, 1400, 2))
    content = image.read_bytes()
    fs = Filesystem.open(MemoryDevice(content))
    ino = fs.lookup("/file")
    assert ino is not None
    places = [int(block) * SIZE for block in fs.file_map(ino).mapping]
    block, within = fs._inode_place(ino)
    rng = random.Random(kind)
    start, refused = time.monotonic(), 0
    rounds = 400
    for _ in range(rounds):
        device = MemoryDevice(content)
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.5:
                at, area = block * SIZE + within + 0x28, 60
            else:
                at, area = rng.choice(places), rng.choice((12, 64, SIZE))
            length = rng.choice((1, 2, 4))
            where = at + rng.randrange(area)
            device.pwrite(where, rng.choice((rng.randbytes(length), b"\xff" * length, bytes(length))))
        try:
            found = Filesystem.open(device).file_map(ino)
        except ExtsnapError:
            refused += 1
            continue
        blocks = spread(found.data)[:, 1]
        assert ((blocks > 0) & (blocks < fs.geometry.blocks_count)).all()
        assert len(np.unique(found.mapping)) == len(found.mapping)
    assert 0 < refused <= rounds
    assert time.monotonic() - start < 20 * SECONDS


def test_a_loop_on_a_real_volume(volume):
    """The inode's own flag decides how i_block is read; a swapped flag is damage, no crash."""
    image = volume("ext4")
    put(image, "file", range(1, 1400, 2))
    with ImageFile(str(image)) as device:
        fs = Filesystem.open(device)
        ino = fs.lookup("/file")
        assert ino is not None
        block, within = fs._inode_place(ino)
    content = bytearray(image.read_bytes())
    at = block * SIZE + within + 0x20
    flags = int.from_bytes(content[at : at + 4], "little") & ~int(InodeFlags.EXTENTS)
    content[at : at + 4] = flags.to_bytes(4, "little")
    with pytest.raises(ExtsnapError):
        Filesystem.open(MemoryDevice(content)).file_map(ino)
