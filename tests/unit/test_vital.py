"""Which blocks are metadata by what a journal names; descriptor blocks made here after the kernel's documentation."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
from arena import make_volume

import extsnap
from extsnap.snapshot.vital import Vital
from extsnap.sparsebits import SparseBits

SIZE = 4096
MAGIC = 0xC03B3998
ROWS, ROW_BYTES = 1, 4096  # one group
#: s_feature_incompat of a journal, and how a tag looks then: (blocknr, flags).
LAYOUTS = {
    0x0: lambda block, flags: struct.pack(">IHH", block, 0, flags),
    0x2: lambda block, flags: struct.pack(">IHHI", block, 0, flags, 0),
    0x12: lambda block, flags: struct.pack(">IIII", block, flags, 0, 0),
}


def descriptor(features: int, blocks: list[int]) -> bytes:
    """A descriptor block; only the first tag has a UUID behind it."""
    raw = struct.pack(">III", MAGIC, 1, 7)
    for index, block in enumerate(blocks):
        flags = (0x2 if index else 0) | (0x8 if index == len(blocks) - 1 else 0)
        raw += LAYOUTS[features](block, flags) + (b"" if index else bytes(16))
    return raw.ljust(SIZE, b"\0")


def place(image: Path, what: str) -> list[int]:
    """First and last block of what dumpe2fs says about the first group."""
    said = subprocess.run(["dumpe2fs", image], capture_output=True, text=True, check=True).stdout
    match = re.search(rf"{what} at (\d+)(?:-(\d+))?", said)
    assert match is not None
    return [int(match[1]), int(match[2] or match[1])]


@pytest.fixture
def found(tmp_path: Path):
    """(what is known of a volume of 16,384 blocks, its journal's blocks, its superblock in the journal, the image)."""
    image = make_volume(tmp_path / "disk.img", "ext4", 64, "-b", str(SIZE), "-J", "size=4")
    with extsnap.open(image, writable=False) as volume:
        fs = volume.filesystem()
        vital = Vital(fs, ROWS, ROW_BYTES, 0)
    log = oracle.file_blocks(image, "<8>").data_blocks
    raw = image.read_bytes()[int(log[0]) * SIZE :][:SIZE]
    return vital, log, raw, image


def known(vital: Vital, block: int) -> bool:
    return vital.names(np.array([block]))


@pytest.mark.parametrize("features", list(LAYOUTS))
def test_what_a_journal_names_is_metadata(found, features: int) -> None:
    vital, log, raw, _ = found
    superblock = bytearray(raw)
    superblock[0x28:0x2C] = features.to_bytes(4, "big")
    vital.examine(int(log[0]) * SIZE, superblock)
    assert not any(known(vital, block) for block in (9000, 9001, 9007))
    content = descriptor(features, [9999]).replace(MAGIC.to_bytes(4, "big"), bytes(4))  # as a log escapes it
    vital.examine(int(log[5]) * SIZE, content + descriptor(features, [9000, 9007, 9000]) + content)
    assert [block for block in range(8990, 10000) if known(vital, block)] == [9000, 9007]
    vital.examine(7000 * SIZE, descriptor(features, [9100]))
    assert not known(vital, 9100), "that was no write into the journal"
    vital.examine(int(log[9]) * SIZE, descriptor(features, [ROWS * ROW_BYTES * 8 + 5, 9200]))
    assert known(vital, 9200), "what lies outside the volume is left out, the rest is not"


def test_bitmaps_and_inode_tables_are_metadata(found) -> None:
    vital, log, _, image = found
    bitmaps = [place(image, f"{what} bitmap")[0] for what in ("Block", "Inode")]
    first, last = place(image, "Inode table")
    assert all(known(vital, block) for block in (0, *bitmaps, first, last, int(log[0]), int(log[-1])))
    assert vital.names(np.arange(last, last + 100))
    assert not vital.names(np.zeros(0, np.int64))
    free = np.flatnonzero(~oracle.blocks_in_use(image))
    assert not any(known(vital, block) for block in free.tolist())


def test_as_much_is_kept_as_is_to_be_preserved_but_no_more_than_a_part_of_the_store(found) -> None:
    vital, _, _, image = found
    first, last = place(image, "Inode table")
    need = SparseBits(ROWS, ROW_BYTES)
    assert vital.count(need, 10**6) == 0
    need.set(np.array([[first, 20]]))
    assert vital.count(need, 10**6) == 20
    assert vital.count(need, 40) == 10
    need.set(np.array([[9000, 30]]))
    assert vital.count(need, 10**6) == 50, "of what is not known one transaction"
    need.set(np.array([[9000, 5000]]))
    assert vital.count(need, 10**6) == 20 + vital.most // 4
    assert vital.most == 1024
    assert last - first > 20
