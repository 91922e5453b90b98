"""The log of a journal, written by debugfs and by the kernel, and replayed by e2fsck on a copy beside ours."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import oracle
import pytest

from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import FormatError, UnsupportedFeature
from extsnap.ext import log
from extsnap.ext.filesystem import Filesystem
from extsnap.ondisk.journal import MAGIC

BLOCK = 1024
BLOCKS = list(range(3000, 3200))
#: How debugfs opens the journal, and mke2fs options: every layout of a tag.
KINDS = {
    "plain": ("journal_open", "ext3"),
    "64bit": ("journal_open", "ext4 -O 64bit,^metadata_csum"),
    "v2": ("journal_open -c -v 2", "ext4 -O ^64bit,metadata_csum"),
    "v2-64bit": ("journal_open -c -v 2", "ext4 -O 64bit,metadata_csum"),
    "v3": ("journal_open -c -v 3", "ext4 -O ^64bit,metadata_csum"),
    "v3-64bit": ("journal_open -c -v 3", "ext4 -O 64bit,metadata_csum"),
}


def make(path: Path, kind: str) -> Path:
    image = path / "disk.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    oracle._run("mke2fs", "-q", "-F", "-b", str(BLOCK), "-J", "size=2", "-t", *KINDS[kind][1].split(), image)
    return image


def content(path: Path, blocks: int, seed: int, *, magic: bool = False) -> Path:
    data = bytearray(random.Random(seed).randbytes(blocks * BLOCK))
    if magic:
        for at in range(0, len(data), 3 * BLOCK):
            data[at : at + 4] = MAGIC.to_bytes(4, "big")
    file = path / f"content-{seed}"
    file.write_bytes(data)
    return file


def write(image: Path, kind: str, *transactions: str) -> None:
    """Have debugfs write transactions into the journal; each is the end of a `journal_write`."""
    commands = [KINDS[kind][0], *(f"journal_write {each}" for each in transactions), "journal_close"]
    oracle.debugfs_write(image, *commands)


def numbers(blocks: list[int]) -> str:
    return ",".join(map(str, blocks))


def ours(image: Path) -> bytes:
    """What the image reads after our replay."""
    with ImageFile(str(image)) as device:
        overlay = Overlay(device, BLOCK)
        log.replay(Filesystem.open(overlay, writable=True, lenient=True))
        log.recovered(Filesystem.open(overlay, writable=True))
        return overlay.pread(0, device.size)


def assert_as_e2fsck(image: Path) -> None:
    """Our replay against e2fsck's on a copy: every block but the two superblocks, which have times and sequences."""
    journal = oracle.file_blocks(image, "<8>").data_blocks[0]
    expected = oracle.copy_image(image, image.with_suffix(".e2fsck"))
    oracle._run("e2fsck", "-p", "-E", "journal_only", expected, check=False)
    mine = np.frombuffer(ours(image), np.uint8).reshape(-1, BLOCK)
    theirs = np.frombuffer(expected.read_bytes(), np.uint8).reshape(-1, BLOCK)
    different = set(np.flatnonzero((mine != theirs).any(axis=1)).tolist())
    assert sorted(different - {1, int(journal)})[:5] == []
    replayed = image.with_suffix(".ours")
    replayed.write_bytes(mine.tobytes())
    oracle.assert_clean(replayed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_is_that_of_e2fsck(kind: str, tmp_path: Path) -> None:
    """Several transactions, blocks in several of them, revoked and written again, with the magic, one not committed."""
    image = make(tmp_path, kind)
    first, second, third = (content(tmp_path, len(BLOCKS), seed, magic=True) for seed in (1, 2, 3))
    write(
        image,
        kind,
        f"-b {numbers(BLOCKS)} {first}",
        f"-b {numbers(BLOCKS[50:])} {second}",
        f"-r {numbers(BLOCKS[100:120] + BLOCKS[150:160])}",
        f"-b {numbers(BLOCKS[110:130])} {third}",
        f"-c -b {numbers(BLOCKS[140:150])} {first}",
    )
    before = image.read_bytes()
    assert_as_e2fsck(image)
    assert image.read_bytes() == before


def test_an_empty_log_is_replayed_too(tmp_path: Path) -> None:
    image = make(tmp_path, "v3-64bit")
    write(image, "v3-64bit", f"-c -b {BLOCKS[0]} {content(tmp_path, 1, 1)}")
    assert_as_e2fsck(image)


def flip(image: Path, block: int, at: int) -> None:
    with image.open("r+b") as file:
        file.seek(block * BLOCK + at)
        byte = file.read(1)[0]
        file.seek(block * BLOCK + at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("kind", ["v2", "v3-64bit"])
def test_a_log_with_a_wrong_checksum_is_damage(kind: str, tmp_path: Path) -> None:
    """Of content, and of a block that names it; the commit block alone makes that the transaction never was."""
    image = make(tmp_path, kind)
    write(image, kind, f"-b {numbers(BLOCKS[:9])} {content(tmp_path, 9, 1)}")
    blocks = oracle.file_blocks(image, "<8>").data_blocks
    plain = image.read_bytes()
    for block, message in ((1, "a block of transaction"), (4, "the copy of block 3002 in transaction")):
        image.write_bytes(plain)
        flip(image, int(blocks[block]), 500 if block == 4 else BLOCK - 1)
        with pytest.raises(FormatError, match=message):
            ours(image)
    image.write_bytes(plain)
    flip(image, int(blocks[11]), 60)
    assert ours(image)[BLOCKS[0] * BLOCK : BLOCKS[9] * BLOCK] == bytes(9 * BLOCK)


def test_what_only_others_replay_is_said(tmp_path: Path) -> None:
    image = make(tmp_path, "v3-64bit")
    oracle._run("tune2fs", "-O", "fast_commit", image)
    write(image, "v3-64bit", f"-b {BLOCKS[0]} {content(tmp_path, 1, 1)}")
    with pytest.raises(UnsupportedFeature, match="fast commits"):
        ours(image)


def test_where_the_log_ends(tmp_path: Path) -> None:
    """A transaction that only began counts as well: nobody may use its number again."""
    image = make(tmp_path, "plain")
    with ImageFile(str(image)) as device:
        fs = Filesystem.open(device)
        assert fs.journal is not None
        start = fs.journal.sequence
        assert log.end_sequence(fs, fs.journal) == start
    one = content(tmp_path, 1, 1)
    write(image, "plain", f"-b 3000 {one}", f"-b 3001 {one}", f"-c -b 3002 {one}")
    with ImageFile(str(image)) as device:
        fs = Filesystem.open(device)
        assert fs.journal is not None
        assert log.end_sequence(fs, fs.journal) == fs.journal.sequence + 3


def put(image: Path, block: int, at: int, value: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(block * BLOCK + at)
        file.write(value)


@pytest.mark.parametrize(
    ("at", "value", "field"), [(0x0C, 4096, "s_blocksize"), (0x10, 1 << 20, "s_maxlen"), (0x14, 0, "s_first")]
)
def test_a_log_that_cannot_be_is_damage(at: int, value: int, field: str, tmp_path: Path) -> None:
    """And not an empty one: what was fsynced would be lost without a word."""
    image = make(tmp_path, "plain")
    write(image, "plain", f"-b 3000 {content(tmp_path, 1, 1)}")
    put(image, int(oracle.file_blocks(image, "<8>").data_blocks[0]), at, value.to_bytes(4, "big"))
    with pytest.raises(FormatError, match=field):
        ours(image)


def test_a_log_that_begins_behind_its_end_is_damage(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    write(image, "plain", f"-b 3000 {content(tmp_path, 1, 1)}")
    put(image, int(oracle.file_blocks(image, "<8>").data_blocks[0]), 0x1C, (1 << 30).to_bytes(4, "big"))
    with pytest.raises(FormatError, match="s_start"):
        ours(image)


def test_a_transaction_that_others_follow_was_committed(tmp_path: Path) -> None:
    image = make(tmp_path, "v3-64bit")
    one = content(tmp_path, 1, 1)
    write(image, "v3-64bit", f"-b 3000 {one}", f"-b 3001 {one}")
    flip(image, int(oracle.file_blocks(image, "<8>").data_blocks[3]), 60)
    with pytest.raises(FormatError, match="commit block before transaction"):
        ours(image)


def test_a_block_outside_the_volume_is_damage(tmp_path: Path) -> None:
    image = make(tmp_path, "64bit")
    write(image, "64bit", f"-b 3000 {content(tmp_path, 1, 1)}")
    put(image, int(oracle.file_blocks(image, "<8>").data_blocks[1]), 12 + 8, b"\xff\xff\xff\xff")
    with pytest.raises(FormatError, match="outside the volume"):
        ours(image)


@pytest.mark.parametrize("options", ["ext2", "ext4 -O ^has_journal"])
def test_groups_that_do_not_verify_have_no_free_block(options: str, tmp_path: Path) -> None:
    """A bitmap older than what its descriptor says, as a crash without a journal leaves it."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    oracle._run("mke2fs", "-q", "-F", "-b", str(BLOCK), "-t", *options.split(), image)
    old = image.read_bytes()
    oracle.debugfs_write(image, f"write {content(tmp_path, 300, 1)} file")
    blocks = np.array(oracle.file_blocks(image, "/file").data_blocks, np.int64)
    with ImageFile(str(image)) as device:
        fs = Filesystem.open(device)
        bitmap = int(fs.groups.column("bg_block_bitmap")[(blocks[0] - 1) // fs.geometry.blocks_per_group])
    put(image, bitmap, 0, old[bitmap * BLOCK : (bitmap + 1) * BLOCK])
    with ImageFile(str(image)) as device:
        overlay = Overlay(device, BLOCK)
        fs = Filesystem.open(overlay, writable=True, lenient=True)
        assert not fs.sound_groups.all()
        fs.seal_unsound()
        fs.flush()
        assert Filesystem.open(overlay).block_bitmaps().test(blocks - 1).all()
