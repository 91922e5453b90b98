"""Sharing and the journal: what one overwrite costs, and when ext itself gets the space back.

Counts are dumpe2fs's, places debugfs's.
"""

from __future__ import annotations

import random

import lab
import numpy as np
import pytest
from lab import BLOCK, MemoryDevice, opened

from extsnap.errors import OutsideWrite
from extsnap.snapshot.volume import Volume

SNAPSHOTS = 5


def survey(volume: Volume) -> lab.Survey:
    return lab.survey(volume.read(0, volume.size))


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
@pytest.mark.parametrize("seed", range(2))
def test_one_copy_for_all_snapshots_that_share_a_block(kind: str, seed: int) -> None:
    """Blocks overwritten once after N snapshots have one copy each, whose record has N names."""
    device = MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    names = [f"s{number}" for number in range(SNAPSHOTS)]
    for name in names:
        volume.verb("create", name=name)
    look = survey(volume)
    file = np.flatnonzero(look.files)[40:72]
    before = [device.pread(int(block) * BLOCK, BLOCK) for block in file]
    volume.begin_serving(grow=False)
    for _ in range(3):  # only the first of three overwrites copies
        for block in file.tolist():
            volume.write(block * BLOCK, random.Random(block).randbytes(BLOCK))
        volume.flush()
    assert volume.end_serving()
    look = survey(volume)
    where = {int(a) + i: int(b) + i for a, b, n in look.store.tolist() for i in range(n)}
    found: dict[int, int | None] = {}
    for record in volume.verb("dump", what="records")["records"]:
        blocks = range(record["block"], record["block"] + record["length"])
        mine = [block for block in blocks if block in file]
        if not mine:
            continue
        assert sorted(record["snapshots"]) == names
        assert record["writes"] >= 3
        for block in mine:
            assert block not in found, f"block {block} has two records"
            found[block] = None if record["copy"] is None else record["copy"] + block - record["block"]
    assert sorted(found) == file.tolist()
    copies = [copy for copy in found.values() if copy is not None]
    assert len(set(copies)) == len(copies)
    for block, content in zip(file.tolist(), before, strict=True):
        copy = found[block]
        assert content == (bytes(BLOCK) if copy is None else device.pread(where[copy] * BLOCK, BLOCK))

    # Deleting all but one snapshot frees none of the copies; deleting the last one frees them in ext's own counts.
    rest = list(names)
    random.Random(seed).shuffle(rest)
    for name in rest[:-1]:
        assert volume.verb("delete", names=[name])["freed_bytes"] < len(copies) * BLOCK
        look = survey(volume)
        assert look.in_use[[where[copy] for copy in copies]].all()
        records = volume.verb("dump", what="records")["records"]
        kept = {b for record in records for b in range(record["block"], record["block"] + record["length"])}
        assert set(file.tolist()) <= kept
    view = volume.open_view(rest[-1])
    for block, content in zip(file.tolist(), before, strict=True):
        assert view.pread(block * BLOCK, BLOCK) == content
    free = look.free
    assert volume.verb("delete", names=rest[-1:])["freed_bytes"] >= len(copies) * BLOCK
    look = survey(volume)
    assert look.free >= free + len(copies)
    assert volume.verb("dump", what="records")["records"] == []
    assert not lab.complaint(device.content)
    mine = lab.spread(np.array(volume.verb("dump", what="bitmaps")["bitmaps"]["snapshot"], np.int64))
    assert (lab.flags(len(look.in_use), mine) == look.store_all).all()

    # Nothing of it stays behind: stripped, the volume has as many free blocks as before the first snapshot.
    volume.verb("strip")
    assert not lab.complaint(device.content)
    assert lab.survey(device.content).free == lab.survey(lab.plain_image(kind)).free


def test_a_delete_frees_the_bitmaps_that_only_it_had() -> None:
    """As many blocks of the store are free as the next process finds."""
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.verb("create", name="one")
    volume.begin_serving()
    base = volume.read(0, volume.size)
    new = lab.changed_by_debugfs(base, "write {} more", data=b"more" * 5000)
    for offset, length in lab.changed_runs(base, new):
        volume.write(offset, new[offset : offset + length])
    assert volume.end_serving()
    volume.verb("create", name="two")
    volume.verb("delete", names=["one"])
    free = volume.verb("info")["store"]["free_bytes"]
    assert opened(MemoryDevice(device.content)).verb("info")["store"]["free_bytes"] == free


def test_the_journal_is_not_copied() -> None:
    """Writes to the data blocks of an empty journal, and to free blocks, make no record."""
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.verb("create", name="one")
    look = survey(volume)
    before = volume.verb("dump", what="records")["records"]
    volume.begin_serving(grow=False)
    free = np.flatnonzero(~look.in_use)
    for block in [*look.journal.tolist(), *free[:500].tolist()]:
        volume.write(block * BLOCK, b"j" * BLOCK)
    volume.flush()
    assert volume.verb("dump", what="records")["records"] == before


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
@pytest.mark.parametrize("served", [False, True])
def test_a_restored_block_is_copied_again(kind: str, served: bool) -> None:
    """After a restore the base holds what the snapshot reads: the next overwrite copies it, and undo still works."""
    device = MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    volume.verb("create", name="one")
    blocks = np.flatnonzero(survey(volume).files)[5:30].tolist()
    old = [volume.read(block * BLOCK, BLOCK) for block in blocks]
    volume.begin_serving()
    for block in blocks:
        volume.write(block * BLOCK, b"2" * BLOCK)
    if not served:
        assert volume.end_serving()
    safety = volume.verb("restore", name="one")["safety"]
    assert [volume.read(block * BLOCK, BLOCK) for block in blocks] == old
    assert not [
        record
        for record in volume.verb("dump", what="records")["records"]
        if "one" in record["snapshots"] and record["block"] in blocks
    ]
    if not served:
        volume.begin_serving()
    for block in blocks:
        volume.write(block * BLOCK, b"3" * BLOCK)
    assert volume.end_serving()
    for name, content in (("one", old), (safety, [b"2" * BLOCK] * len(blocks))):
        view = volume.open_view(name)
        assert [view.pread(block * BLOCK, BLOCK) for block in blocks] == content
        assert not lab.complaint(view.pread(0, view.size))
    assert volume.verb("restore", undo=True)["restored"] == safety
    assert [volume.read(block * BLOCK, BLOCK) for block in blocks] == [b"2" * BLOCK] * len(blocks)
    assert not lab.complaint(device.content)


def test_a_restore_makes_room_for_its_copies_before_it_begins() -> None:
    """The store has less than it takes, and every block that comes back is needed by a newer snapshot."""
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.verb("create", name="one")
    blocks = np.flatnonzero(survey(volume).files)[:200].tolist()
    old = [volume.read(block * BLOCK, BLOCK) for block in blocks]
    volume.begin_serving(grow=False)
    for block in blocks:
        volume.write(block * BLOCK, b"2" * BLOCK)
    assert volume.end_serving()
    volume.verb("create", name="two")
    assert volume.verb("info")["store"]["free_bytes"] < len(blocks) * BLOCK
    volume.verb("restore", name="one")
    assert [volume.read(block * BLOCK, BLOCK) for block in blocks] == old
    view = volume.open_view("two")
    assert {view.pread(block * BLOCK, BLOCK) for block in blocks} == {b"2" * BLOCK}
    assert not lab.complaint(device.content)


def test_a_write_outside_extsnap_is_noticed() -> None:
    """An image changed by others at rest is recognised, names the snapshots, and is not changed until accepted."""
    device = MemoryDevice(lab.plain_image("ext2"))
    opened(device).verb("create", name="one")
    assert not opened(device).outside_write
    device.content[1024 + 0x2C] ^= 1  # s_mtime, which every mount writes
    volume = opened(device)
    assert volume.outside_write
    content = bytes(device.content)
    with pytest.raises(OutsideWrite, match="one"):
        volume.verb("create", name="two")
    assert bytes(device.content) == content
    volume.verb("accept")
    volume.verb("create", name="two")
    assert not opened(device).outside_write


def test_the_counting_bitmap_grows() -> None:
    """The sixty-fifth snapshot has a second word of it; all of them keep what they had."""
    device = MemoryDevice(lab.plain_image("ext2"))
    volume = opened(device)
    block = int(np.flatnonzero(survey(volume).files)[0])
    for number in range(63):
        volume.create(f"s{number}")
    for number in range(63, 67):
        volume.begin_serving(grow=False)
        volume.write(block * lab.BLOCK, bytes([number]) * lab.BLOCK)
        assert volume.end_serving()
        volume.create(f"s{number}")
    volume.begin_serving(grow=False)
    volume.write(block * lab.BLOCK, b"last" * (lab.BLOCK // 4))
    assert volume.end_serving()
    again = opened(device)
    for number in range(63, 67):
        assert again.open_view(f"s{number}").pread(block * lab.BLOCK, 1) == bytes([number])
    assert again.verb("check")["store"]["ok"]
