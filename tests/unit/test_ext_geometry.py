"""Hostile superblocks and group descriptors: an ExtsnapError, soon, in little memory, and no byte changed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import random
import resource
import struct
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import crc32c
import numpy as np
import oracle
import pytest

import extsnap
from extsnap.blockdev.overlay import Overlay
from extsnap.blockdev.recording import MemoryDevice
from extsnap.errors import ExtsnapError, FormatError
from extsnap.ext.filesystem import Filesystem
from extsnap.sparsebits import SparseBits

SECONDS = 1.0
MEMORY_BYTES = 64 << 20
ADDRESS_SPACE = 4 << 30
#: Kind -> options of mke2fs, size in KiB.
VOLUMES = {
    "ext2": ("-t ext2 -b 1024 -g 1024 -O none,filetype,sparse_super,resize_inode", 5000),
    "ext3-4k": ("-t ext3 -b 4096 -J size=4 -O none,has_journal,filetype,sparse_super", 12288),
    "ext4": (
        "-t ext4 -b 1024 -g 1024 -J size=1 "
        "-O none,has_journal,filetype,extent,64bit,flex_bg,sparse_super,resize_inode,metadata_csum",
        8000,
    ),
    "gdt-csum": ("-t ext4 -b 1024 -g 1024 -O none,extent,sparse_super,uninit_bg", 5000),
}
# Offsets of the superblock's fields, and how wide they are (Documentation/filesystems/ext4/super.rst).
FIELDS = {
    "s_inodes_count": (0x0, "I"),
    "s_blocks_count_lo": (0x4, "I"),
    "s_first_data_block": (0x14, "I"),
    "s_log_block_size": (0x18, "I"),
    "s_log_cluster_size": (0x1C, "I"),
    "s_blocks_per_group": (0x20, "I"),
    "s_inodes_per_group": (0x28, "I"),
    "s_rev_level": (0x4C, "I"),
    "s_first_ino": (0x54, "I"),
    "s_inode_size": (0x58, "H"),
    "s_feature_compat": (0x5C, "I"),
    "s_feature_incompat": (0x60, "I"),
    "s_feature_ro_compat": (0x64, "I"),
    "s_reserved_gdt_blocks": (0xCE, "H"),
    "s_journal_inum": (0xE0, "I"),
    "s_desc_size": (0xFE, "H"),
    "s_blocks_count_hi": (0x150, "I"),
    "s_backup_bgs": (0x24C, "I"),
}
HAS_JOURNAL, RESIZE_INODE = 4, 0x10
BIT64 = 0x80
SPARSE_SUPER, BIGALLOC, METADATA_CSUM = 1, 0x200, 0x400


@functools.cache
def volume(kind: str) -> bytes:
    options, kibibytes = VOLUMES[kind]
    with tempfile.TemporaryDirectory(prefix="extsnap-test-") as name:
        tree, image = Path(name, "tree"), Path(name, "image")
        tree.mkdir()
        (tree / "file").write_bytes(b"content" * 5000)
        words = ["-q", "-F", "-I", "256", "-N", "256", *options.split(), "-E", "lazy_itable_init=1"]
        env = {**os.environ, "MKE2FS_CONFIG": "/dev/null"}
        command = ["mke2fs", *words, "-d", str(tree), str(image), f"{kibibytes}k"]
        subprocess.run(command, check=True, capture_output=True, env=env)
        oracle.assert_clean(image)
        return image.read_bytes()


def sealed(content: bytearray) -> bytearray:
    """With the superblock's checksum right: a hostile hand can do that, too."""
    content[0x7FC:0x800] = (~crc32c.crc32c(bytes(content[0x400:0x7FC])) & 0xFFFFFFFF).to_bytes(4, "little")
    return content


def field(content: bytes | bytearray, name: str) -> int:
    at, width = FIELDS[name]
    return int(struct.unpack_from(f"<{width}", content, 0x400 + at)[0])


def with_fields(kind: str, **values: int) -> bytearray:
    content = bytearray(volume(kind))
    for name, value in values.items():
        at, width = FIELDS[name]
        struct.pack_into(f"<{width}", content, 0x400 + at, value)
    return sealed(content)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail if what is inside takes long or much memory; a wild allocation ends in a MemoryError, not in swap."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, hard))
    tracemalloc.start()
    start = time.monotonic()
    try:
        yield
        took, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert took < SECONDS, f"took {took:.1f} s"
    assert peak < MEMORY_BYTES, f"took {peak >> 20} MiB"


def work(device: MemoryDevice) -> None:
    """Everything that a command does with a filesystem: read it all, then edit it above an overlay."""
    fs = Filesystem.open(device)
    fs.require_supported()
    overlay = Overlay(device, fs.geometry.block_size)
    fs = Filesystem.open(overlay, writable=True)
    _ = fs.kind, fs.features, fs.label, fs.geometry.superblock_blocks
    fs.block_bitmaps()
    fs.inode_table_unused()
    _ = fs.journal
    if fs.lookup("/file") is not None:
        fs.file_map(fs.lookup("/file") or 0)
    runs = fs.find_free(10)
    fs.set_blocks(runs, True)
    ino = fs.allocate_inode(directory=False)
    fs.write_inode(ino, fs.new_inode(ino))
    fs.flush()
    fs.set_blocks(runs, False)
    fs.free_inode(ino, directory=False)
    fs.flush()


def refused(content: bytes | bytearray) -> ExtsnapError:
    device = MemoryDevice(content)
    with bounded(), pytest.raises(ExtsnapError) as caught:
        work(device)
    assert device.content == content, "the image was changed"
    return caught.value


@pytest.mark.parametrize("kind", VOLUMES)
def test_an_honest_volume_passes(kind):
    device = MemoryDevice(volume(kind))
    with bounded():
        work(device)
    assert device.content == volume(kind)


HOSTILE: dict[str, dict[str, int]] = {
    "no blocks in a group": {"s_blocks_per_group": 0},
    "blocks in a group are no whole bytes": {"s_blocks_per_group": 1023},
    "more blocks in a group than bits in a block": {"s_blocks_per_group": 1 << 31},
    "a huge group": {"s_blocks_per_group": 0xFFFFFFFF},
    "no inodes in a group": {"s_inodes_per_group": 0, "s_inodes_count": 0},
    "more inodes in a group than bits in a block": {"s_inodes_per_group": 0xFFFFFFF8},
    "all inodes that there can be": {"s_inodes_count": 0xFFFFFFFF},
    "no inodes": {"s_inodes_count": 0},
    "block size shift 60": {"s_log_block_size": 60},
    "block size shift 7": {"s_log_block_size": 7},
    "block size shift of all ones": {"s_log_block_size": 0xFFFFFFFF},
    "first data block 2": {"s_first_data_block": 2},
    "first data block of all ones": {"s_first_data_block": 0xFFFFFFFF},
    "one block more than the image": {"s_blocks_count_lo": 1 << 20},
    "blocks of all ones": {"s_blocks_count_lo": 0xFFFFFFFF},
    "no blocks": {"s_blocks_count_lo": 0},
    "inode size 0": {"s_inode_size": 0},
    "inode size 100": {"s_inode_size": 100},
    "inode size 384": {"s_inode_size": 384},
    "inode size 32768": {"s_inode_size": 32768},
}


@pytest.mark.parametrize("kind", VOLUMES)
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_superblock(kind, what):
    error = refused(with_fields(kind, **HOSTILE[what]))
    assert isinstance(error, FormatError)
    assert error.structure == "superblock"


def counts(content: bytes, blocks: int, per_group: int, inodes: int) -> dict[str, int]:
    """Fields that agree with each other: only the device can show that they are wrong."""
    groups = -(-(blocks - field(content, "s_first_data_block")) // per_group)
    return {
        "s_blocks_count_lo": blocks & 0xFFFFFFFF,
        "s_blocks_count_hi": blocks >> 32,
        "s_blocks_per_group": per_group,
        "s_inodes_per_group": inodes,
        "s_inodes_count": groups * inodes & 0xFFFFFFFF,
    }


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_billions_of_groups_that_agree_with_all_counts(kind, sparse):
    """Nothing of the size of the counts may be made before they are compared with the device."""
    content = volume(kind)
    for blocks in (0xFFFFFFF9, 1 << 30):
        flags = field(content, "s_feature_ro_compat") & ~SPARSE_SUPER | (SPARSE_SUPER if sparse else 0)
        values = {**counts(content, blocks, 8, 8 if blocks == 1 << 30 else 1), "s_feature_ro_compat": flags}
        assert isinstance(refused(with_fields(kind, **values)), FormatError)


def test_a_64bit_count_far_beyond_the_image():
    for high in (1, 0x1000, 0xFFFFFFFF):
        assert refused(with_fields("ext4", s_blocks_count_hi=high))


def test_one_block_more_than_the_image_holds():
    content = volume("ext2")
    refused(content[:-1024])
    refused(with_fields("ext2", s_blocks_count_lo=field(content, "s_blocks_count_lo") + 1))
    device = MemoryDevice(content + b"tail")  # more than the filesystem is no harm
    work(device)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 63, 65, 96, 2048, 0xFFFF])
def test_descriptor_size(size):
    assert isinstance(refused(with_fields("ext4", s_desc_size=size)), FormatError)


def test_a_first_data_block_that_does_not_go_with_the_block_size():
    assert isinstance(refused(with_fields("ext2", s_first_data_block=0)), FormatError)
    assert isinstance(refused(with_fields("ext3-4k", s_first_data_block=1)), FormatError)


def test_inodes_in_a_group_that_are_no_whole_bytes():
    """e2fsprogs and the kernel round to 8: the inode bitmap has whole bytes."""
    content = volume("ext2")
    groups = field(content, "s_inodes_count") // field(content, "s_inodes_per_group")
    assert isinstance(refused(with_fields("ext2", s_inodes_per_group=33, s_inodes_count=33 * groups)), FormatError)


def test_descriptors_that_do_not_fit():
    """The only block that is left for them lies past the end."""
    content = bytearray(with_fields("ext2", s_blocks_count_lo=2, s_inodes_count=32, s_inodes_per_group=32)[:2048])
    assert isinstance(refused(content), FormatError)


@pytest.mark.parametrize("kind", ["gdt-csum", "ext4"])
def test_reserved_descriptors_beyond_the_group(kind):
    """A backup's reserved descriptors never mark blocks of the next group."""
    compat = field(volume(kind), "s_feature_compat") | RESIZE_INODE
    for reserved in (1000, 1024, 0xFFFF):
        content = with_fields(kind, s_feature_compat=compat, s_reserved_gdt_blocks=reserved)
        device = MemoryDevice(content)
        with bounded(), contextlib.suppress(ExtsnapError):
            fs = Filesystem.open(device)
            which, used = fs.groups.uninitialised()
            bits = SparseBits.of(used, fs.geometry.groups, fs.geometry.blocks_per_group // 8)
            plain = ~np.isin(which, fs.geometry.backup_groups)
            assert plain.any()
            assert (np.bitwise_count(bits.take(which[plain])).sum(axis=1) < 1000).all()


@pytest.mark.parametrize(
    ("kind", "flags"),
    [*itertools.product(["ext2", "ext4"], ["bigalloc", "no 64bit", "all"]), ("ext4", "revision 0")],
)
def test_features_that_change_the_layout(kind, flags):
    """They are refused, or the volume then contradicts itself."""
    content = volume(kind)
    incompat, ro_compat = field(content, "s_feature_incompat"), field(content, "s_feature_ro_compat")
    values = {
        "bigalloc": {"s_feature_ro_compat": ro_compat | BIGALLOC, "s_log_cluster_size": 4},
        "no 64bit": {"s_feature_incompat": incompat ^ BIT64},
        "revision 0": {"s_rev_level": 0},
        "all": {f"s_feature_{part}": 0xFFFFFFFF for part in ("compat", "incompat", "ro_compat")},
    }[flags]
    refused(with_fields(kind, **values))


@pytest.mark.parametrize("inode", [2, 5, 7, 100, 0xFFFFFFFF])
def test_a_journal_that_is_none(inode):
    refused(with_fields("ext4", s_journal_inum=inode))


# -- group descriptors ------------------------------------------------------------------------------------

#: Where a block number stands in a descriptor: lo, hi.
POINTERS = {"bg_block_bitmap": (0x0, 0x20), "bg_inode_bitmap": (0x4, 0x24), "bg_inode_table": (0x8, 0x28)}


def descriptors(content: bytes | bytearray) -> tuple[int, int]:
    """(offset of the table, size of one descriptor)."""
    size = 64 if field(content, "s_feature_incompat") & BIT64 else 32
    return max(2048, 1024 << field(content, "s_log_block_size")), size


def seal_descriptors(content: bytearray) -> None:
    """Right checksums, computed here by the kernel's definition of metadata_csum."""
    if not field(content, "s_feature_ro_compat") & METADATA_CSUM:
        return
    table, size = descriptors(content)
    seed = ~crc32c.crc32c(bytes(content[0x468:0x478])) & 0xFFFFFFFF
    groups = -(-(field(content, "s_blocks_count_lo") - 1) // field(content, "s_blocks_per_group"))
    for group in range(groups):
        raw = content[table + group * size : table + (group + 1) * size]
        raw[0x1E:0x20] = b"\0\0"
        value = ~crc32c.crc32c(group.to_bytes(4, "little") + bytes(raw), ~seed & 0xFFFFFFFF) & 0xFFFF
        content[table + group * size + 0x1E : table + group * size + 0x20] = value.to_bytes(2, "little")


def test_the_checksums_of_this_file_are_those_of_mke2fs():
    content = bytearray(volume("ext4"))
    seal_descriptors(content)
    assert sealed(content) == volume("ext4")


@pytest.mark.parametrize("pointer", POINTERS)
@pytest.mark.parametrize("kind", ["ext2", "ext3-4k", "ext4"])
def test_descriptor_that_points_outside(kind, pointer):
    clean = volume(kind)
    table, size = descriptors(clean)
    blocks = field(clean, "s_blocks_count_lo")
    first = field(clean, "s_first_data_block")
    values = [0, first, blocks, blocks + 1, 0xFFFFFFFF]
    if size == 64:
        values += [1 << 32, (1 << 63) - 1, (1 << 63) - 2, 1 << 63, (1 << 64) - 1]
    if pointer == "bg_inode_table":
        values += [blocks - 1, (1 << 63) - 8 if size == 64 else blocks - 2]
    for value in values:
        content = bytearray(clean)
        for group in {0, 1 if kind != "ext3-4k" else 0}:
            low, high = POINTERS[pointer]
            struct.pack_into("<I", content, table + group * size + low, value & 0xFFFFFFFF)
            if size == 64:
                struct.pack_into("<I", content, table + group * size + high, value >> 32)
        seal_descriptors(content)
        error = refused(content)
        assert isinstance(error, FormatError), value
        assert (error.structure, error.field) == ("group descriptor", pointer), value


def test_more_unused_inodes_than_inodes():
    """The blocks before the inode table would be zeroed as unused ones of it."""
    clean = volume("ext4")
    table, _ = descriptors(clean)
    for low, high in ((field(clean, "s_inodes_per_group") + 1, 0), (0xFFFF, 0), (0, 1), (0xFFFF, 0xFFFF)):
        content = bytearray(clean)
        struct.pack_into("<H", content, table + 0x1C, low)
        struct.pack_into("<H", content, table + 0x32, high)
        seal_descriptors(content)
        error = refused(content)
        assert isinstance(error, FormatError)
        assert error.field == "bg_itable_unused"


@pytest.mark.parametrize("kind", ["ext4", "gdt-csum"])
def test_descriptor_with_a_wrong_checksum(kind):
    table, size = descriptors(volume(kind))
    for group in range(5):
        for at in range(0, size, 7):
            content = bytearray(volume(kind))
            content[table + group * size + at] ^= 0x40
            error = refused(content)
            assert f"group {group}" in str(error) or "bitmap" in str(error)


# -- at random --------------------------------------------------------------------------------------------

EDGES = (0, 1, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF8, 0xFFFFFFFF)


def change(rng: random.Random, content: bytearray, at: int, width: str) -> None:
    """Put an edge case, anything, or a neighbour of what is there into a field."""
    old = struct.unpack_from(f"<{width}", content, at)[0]
    value = rng.choice((rng.choice(EDGES), rng.getrandbits(32), old + rng.choice((-8, -1, 1, 8)), old << 1))
    struct.pack_into(f"<{width}", content, at, value & (0xFFFFFFFF if width == "I" else 0xFFFF))


@pytest.mark.parametrize("kind", VOLUMES)
def test_random_fields_of_superblock_and_descriptors(kind):
    """Whatever the values are: an ExtsnapError or work well done."""
    rng = random.Random(kind)
    table, size = descriptors(volume(kind))
    ended = 0
    for _ in range(150):
        content = bytearray(volume(kind))
        for _ in range(rng.randrange(2)):
            change(rng, content, table + rng.randrange(5) * size + rng.randrange(0, size, 2), "H")
        seal_descriptors(content)
        for _ in range(rng.randrange(1, 3)):
            at, width = rng.choice(list(FIELDS.values()))
            change(rng, content, 0x400 + at, width)
        device = MemoryDevice(sealed(content))
        with bounded():
            try:
                work(device)
            except ExtsnapError:
                ended += 1
        assert device.content == content
    assert ended > 50


@pytest.mark.parametrize("what", ["no blocks in a group", "block size shift 60", "blocks of all ones"])
def test_the_file_is_as_before(tmp_path, what):
    """Through the public interface, opened for writing: refused, and no byte is changed."""
    path = tmp_path / "image"
    path.write_bytes(with_fields("ext4", **HOSTILE[what]))
    before = oracle.sha256(path)
    with pytest.raises(ExtsnapError):
        extsnap.open(path)
    assert oracle.sha256(path) == before == hashlib.sha256(path.read_bytes()).hexdigest()
