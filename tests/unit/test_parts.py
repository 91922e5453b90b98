"""Damage of both copies of the index costs the snapshots that have records there, and them only there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import lab
import numpy as np
import pytest
from lab import BLOCK, MemoryDevice

from extsnap.blockdev.recording import EVERYTHING, NOTHING, Cuts, RecordingDevice
from extsnap.errors import DamagedCopy, StoreDamaged
from extsnap.snapshot import format as fmt
from extsnap.snapshot import parts
from extsnap.snapshot.parts import Parts
from extsnap.snapshot.volume import Volume

INDEX, CRCS, PARTS = fmt.BlobKind.INDEX, fmt.BlobKind.INDEX_CRCS, fmt.BlobKind.INDEX_PARTS
NAMES = ("one", "two", "three")


@dataclass
class Made:
    """A volume at rest with one level of many parts.

    Attributes:
        content: The image.
        truth: What each snapshot reads as.
        owners: For each part, the names of the snapshots that have records there, by `dump records`.
        blocks: For each part, the blocks of the base volume that its records are of.
    """

    content: bytes
    truth: dict[str, bytes]
    owners: list[set[str]]
    blocks: list[set[int]]
    key: int


def opened(content: bytes | bytearray | MemoryDevice | RecordingDevice, *, writable: bool = False) -> Volume:
    device = MemoryDevice(content) if isinstance(content, bytes | bytearray) else content
    return lab.opened(device, writable=writable)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "RECORDS", 8)


@pytest.fixture
def made() -> Made:
    """Snapshot one alone has records in the first third of a file, one and two in the second, all in the last."""
    device, rng = MemoryDevice(lab.plain_image("ext4")), random.Random(1)
    files = np.flatnonzero(lab.survey(device.content).files).tolist()
    truth = {}
    for number, name in enumerate(NAMES):
        opened(device, writable=True).create(name)
        volume = opened(device, writable=True)
        truth[name] = volume.open_view(name).pread(0, volume.size)
        volume.begin_serving(grow=False)
        for block in files[number * 200 : number * 200 + 100 : 2]:
            volume.write(block * BLOCK, rng.randbytes(BLOCK))
        assert volume.end_serving()
    volume = opened(device, writable=True)
    volume.require_engine().purge()  # one level
    levels = volume.require_engine().index.levels
    for level in levels:
        level.stored = -1
    volume.require_engine().fold()
    volume.settle()
    volume = opened(device)
    (level,) = volume.require_engine().index.levels
    rows = volume.require_engine().masks.bits()
    owners, blocks = [], []
    for low in range(0, len(level), 8):
        part = slice(low, low + 8)
        owners.append({e.name for e in volume.snapshot_list() if rows[level.mask[part], e.bit].any()})
        pairs = zip(level.block[part].tolist(), level.length[part].tolist(), strict=True)
        blocks.append({block for first, count in pairs for block in range(first, first + count)})
    assert {frozenset(names) for names in owners} >= {frozenset(["one"]), frozenset(["one", "two"]), frozenset(NAMES)}
    return Made(bytes(device.content), truth, owners, blocks, level.stored)


def places(made: Made, kind: fmt.BlobKind, part: int, copy: int) -> int:
    """Byte of the image in the middle of a part of a copy."""
    store = opened(made.content).require_store()
    table = Parts(store, made.key)
    start, end = table.bytes_of(kind, part)
    at = (start + end) // 2
    block = store.physical(store.blob_blocks(kind, made.key, copy)[at // BLOCK :][:1])
    return int(block[0]) * BLOCK + at % BLOCK


def damaged(made: Made, *where: tuple[fmt.BlobKind, int, int]) -> bytearray:
    medium = bytearray(made.content)
    for kind, part, copy in where:
        medium[places(made, kind, part, copy)] ^= 0x10
    return medium


def unreadable(volume: Volume, name: str, truth: bytes) -> set[int]:
    """Blocks of a view that cannot be read; all others must be what they were."""
    view, failed = volume.open_view(name), set()
    pieces: list[tuple[int, int]] = [(0, len(truth))]
    while pieces:
        at, length = pieces.pop()
        try:
            assert view.pread(at, length) == truth[at : at + length], f"{name}: wrong bytes from {at} on"
        except DamagedCopy:
            if length <= BLOCK:
                failed.add(at // BLOCK)
            else:
                half = -(-length // BLOCK) // 2 * BLOCK
                pieces += [(at, half), (at + half, length - half)]
    return failed


def lost_parts(made: Made) -> Iterator[tuple[int, set[str]]]:
    for names in ({"one"}, {"one", "two"}, set(NAMES)):
        yield made.owners.index(names), names


@pytest.mark.parametrize("kind", [INDEX, CRCS])
def test_a_part_that_is_lost_costs_its_snapshots_only(made: Made, kind: fmt.BlobKind) -> None:
    for part, names in lost_parts(made):
        medium = damaged(made, (kind, part, 0), (kind, part, 1))
        before = bytes(medium)
        volume = opened(medium)
        states = {entry["name"]: entry["state"] for entry in volume.verb("list")["snapshots"]}
        assert states == {name: "damaged" if name in names else "ok" for name in NAMES}
        report = volume.verb("check")
        assert any(f"part {part} of index level {made.key}" in line for line in report["store"]["errors"])
        assert {entry["name"] for entry in report["snapshots"] if entry["errors"]} == names
        for name in NAMES:
            failed = unreadable(volume, name, made.truth[name])
            (entry,) = (entry for entry in report["snapshots"] if entry["name"] == name)
            assert failed == {b for first, count in entry["blocks"] for b in range(first, first + count)}
            assert bool(failed) == (name in names)
            if name in names:
                low, high = min(made.blocks[part]), max(made.blocks[part])
                assert failed >= made.blocks[part] & wanted(made, name)
                assert min(failed) >= low
                assert max(failed) <= high
        assert bytes(volume.medium.device.pread(0, volume.size)) == before


def wanted(made: Made, name: str) -> set[int]:
    """Blocks that a snapshot has records for, by `dump records`."""
    records = opened(made.content).verb("dump", what="records")["records"]
    mine = (record for record in records if name in record["snapshots"])
    return {block for r in mine for block in range(r["block"], r["block"] + r["length"])}


def test_nothing_is_written_but_by_a_delete_of_all_that_are_affected(made: Made) -> None:
    part = made.owners.index({"one", "two"})
    device = MemoryDevice(damaged(made, (INDEX, part, 0), (INDEX, part, 1)))
    before = bytes(device.content)
    for verb, arguments in (
        ("create", {"name": "four"}),
        ("restore", {"name": "three"}),
        ("delete", {"names": ["one"]}),
        ("delete", {"names": ["three", "two"]}),
        ("set", {"values": {"on-full": "drop-oldest"}}),
        ("note_check", {"damaged": [], "sound": []}),
    ):
        with pytest.raises(StoreDamaged, match=r"extsnap delete image one two makes the others whole"):
            opened(device, writable=True).verb(verb, **arguments)
    with pytest.raises(StoreDamaged):
        opened(device, writable=True).begin_serving()
    assert device.content == before
    opened(device, writable=True).verb("delete", names=["two", "one"])
    volume = opened(device)
    assert not volume.verb("check")["store"]["errors"]
    assert not unreadable(volume, "three", made.truth["three"])
    assert not lab.complaint(device.content)
    volume = opened(device, writable=True)
    volume.create("four")
    volume.verb("restore", name="three")
    assert not unreadable(opened(device), "three", made.truth["three"])
    assert not lab.complaint(device.content)


def test_a_strip_of_what_is_lost_in_part(made: Made) -> None:
    device = MemoryDevice(damaged(made, (INDEX, 0, 0), (INDEX, 0, 1)))
    assert opened(device, writable=True).verb("strip")["snapshots"] == 3
    assert not lab.complaint(device.content)
    assert opened(device).store is None


@pytest.mark.parametrize("what", ["a part", "all"])
def test_a_strip_of_what_is_lost_is_cut(made: Made, what: str) -> None:
    """All is as it was, and the next strip works, or there are no snapshots any more."""
    medium = damaged(made, (INDEX, 0, 0), (INDEX, 0, 1))
    if what == "all":
        store = opened(made.content).require_store()
        for copy in range(2):
            blocks = store.physical(store.blob_blocks(fmt.BlobKind.MASKS, 0, copy))
            medium[int(blocks[0]) * BLOCK] ^= 1
    device = RecordingDevice(MemoryDevice(medium))
    assert opened(device, writable=True).verb("strip")["snapshots"] == 3
    cuts = Cuts(medium, device.log)
    left = []
    for point in range(len(device.log) + 1):
        for seed in (NOTHING, EVERYTHING, point):
            again = MemoryDevice(bytes(cuts.state(point, seed).content))
            volume = opened(again, writable=True)
            left.append(len(volume.snapshot_list()))
            assert volume.verb("strip")["snapshots"] == left[-1]
            assert opened(again).store is None
            assert not lab.complaint(again.content)
    assert set(left) == {0, 3}


@pytest.mark.parametrize("kind", [INDEX, CRCS])
def test_copies_that_are_damaged_in_other_places_are_whole_together(made: Made, kind: fmt.BlobKind) -> None:
    last = len(made.owners) - 1
    medium = damaged(made, (kind, 0, 0), (kind, last, 1), (INDEX, 2, 0))
    volume = opened(medium)
    assert all(not unreadable(volume, name, made.truth[name]) for name in NAMES)
    report = volume.verb("check")
    assert any(line.startswith("both copies of ") for line in report["store"]["errors"])
    assert not any(entry["errors"] for entry in report["snapshots"])
    device = MemoryDevice(medium)
    opened(device, writable=True)
    assert not opened(device).verb("check")["store"]["errors"], "it was not mended"
    for part, copy in ((0, 0), (last, 1)):
        at = places(made, kind, part, copy)
        assert device.content[at] == made.content[at]


def test_what_is_lost_with_its_table(made: Made) -> None:
    """Without a table, or with that of another level, nothing tells which records were there."""
    table = [opened(made.content).require_store().blob_blocks(PARTS, made.key, copy) for copy in range(2)]
    medium = damaged(made, (INDEX, 0, 0), (INDEX, 0, 1))
    for blocks in table:
        medium[int(opened(made.content).require_store().physical(blocks)[0]) * BLOCK + 50] ^= 1
    assert {entry["state"] for entry in opened(medium).verb("list")["snapshots"]} == {"damaged"}
    device = MemoryDevice(made.content)
    volume = opened(device, writable=True)
    store = volume.require_store()
    raw = bytearray(store.read_blob(PARTS, made.key))
    raw[0] ^= 1  # the checksum of the level that it is of
    store.write_blob(PARTS, made.key, bytes(raw))
    store.commit()
    assert not opened(device).verb("check")["store"]["errors"]
    for copy in range(2):
        device.content[places(made, INDEX, 0, copy)] ^= 1
    assert {entry["state"] for entry in opened(device).verb("list")["snapshots"]} == {"damaged"}


def test_random_damage_of_both_copies(made: Made) -> None:
    """Whatever is flipped, wherever: every block of every view is what it was, or an error."""
    rng = random.Random(3)
    store = opened(made.content).require_store()
    sizes = {kind: store.blob_length(kind, made.key) for kind in (INDEX, CRCS)}
    some = 0
    for _ in range(12):
        medium = bytearray(made.content)
        for _ in range(rng.randrange(1, 7)):
            kind, copy = rng.choice((INDEX, CRCS)), rng.randrange(2)
            at = rng.randrange(sizes[kind])
            block = store.physical(store.blob_blocks(kind, made.key, copy)[at // BLOCK :][:1])
            medium[int(block[0]) * BLOCK + at % BLOCK] ^= 1 << rng.randrange(8)
        volume = opened(medium)
        states = {entry["name"]: entry["state"] for entry in volume.verb("list")["snapshots"]}
        for name in NAMES:
            failed = unreadable(volume, name, made.truth[name])
            assert states[name] == "damaged" or not failed
            some += bool(failed)
    assert some


def test_masks_of_many_snapshots_are_not_in_the_table(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    """Then what is lost may be anybody's: all are damaged there, and nowhere else."""
    monkeypatch.setattr(parts, "WORDS_MAX", 0)
    device = MemoryDevice(made.content)
    volume = opened(device, writable=True)
    (level,) = volume.require_engine().index.levels
    level.stored = -1
    volume.require_engine().fold()
    again = Made(bytes(device.content), made.truth, made.owners, made.blocks, level.stored)
    part = made.owners.index({"one"})
    volume = opened(damaged(again, (INDEX, part, 0), (INDEX, part, 1)))
    assert {entry["state"] for entry in volume.verb("list")["snapshots"]} == {"damaged"}
    for name in NAMES:
        failed = unreadable(volume, name, made.truth[name])
        assert failed
        assert min(failed) >= min(made.blocks[part])
        assert max(failed) <= max(made.blocks[part])
