"""What the store remembers, watermarks, and how many snapshots go when a copy has no room."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import numpy as np
import oracle
import pytest
from arena import make_volume
from lab import BLOCK, MemoryDevice, opened

import extsnap
from extsnap.errors import ExtsnapError, VolumeFull
from extsnap.snapshot import checksums, edit, settings, taking
from extsnap.snapshot import format as fmt
from extsnap.snapshot.full import Fill
from extsnap.snapshot.volume import Volume

MARK_BYTE, READ_ONLY_BYTE = 0x63, 0x65


def guarded(device: MemoryDevice) -> set[bool]:
    """Whether the superblocks of a volume at rest, primary and backups, have the read-only feature; by e2fsprogs."""
    found = set()
    with lab.as_file(device.content) as path:
        for block in (1, 2049):
            text = lab.run("dumpe2fs", "-h", "-o", f"superblock={block}", "-o", f"blocksize={BLOCK}", path)
            found.add("read-only" in text.split("Filesystem features:")[1].splitlines()[0].split())
    return found


# -- settings


def test_properties_are_remembered() -> None:
    device = MemoryDevice(lab.plain_image("ext4"))
    assert opened(device).verb("set")["properties"] == {"on-full": "refuse"}
    volume = opened(device)
    assert volume.verb("set", values={"on-full": "drop-oldest"})["properties"] == {"on-full": "drop-oldest"}
    assert not lab.complaint(device.content), "a volume that has only a setting is a plain one"
    opened(device).create("one")
    volume = opened(device)
    assert volume.verb("info")["properties"] == {"on-full": "drop-oldest"}
    volume.verb("set", values={"on-full": "refuse"})
    assert opened(device).verb("set")["properties"] == {"on-full": "refuse"}
    assert not lab.complaint(device.content)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"on-full": "never"}, "on-full cannot be 'never'; it can be: refuse, drop-oldest"),
        ({"speed": "high"}, "there is no property 'speed'; it can be: on-full"),
        ({"on-full": "drop-oldest", "dropped": "[]"}, "there is no property 'dropped'"),
    ],
)
def test_what_cannot_be_set(values: dict[str, str], said: str) -> None:
    device = MemoryDevice(lab.plain_image("ext2"))
    before = bytes(device.content)
    with pytest.raises(ExtsnapError, match=said):
        opened(device).verb("set", values=values)
    assert device.content == before


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_the_guard_is_lifted_and_remembered(kind: str) -> None:
    device = MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    volume.create("one")
    assert guarded(device) == {True}
    said = volume.verb("guard", wanted=False)
    assert not said["guard"]
    assert "the snapshots are at risk" in said["notices"][0]
    for _ in range(2):
        assert guarded(device) == {False}
        assert not lab.complaint(device.content)
        volume = opened(device)
        assert not volume.outside_write
        volume.create(f"later-{len(volume.snapshot_names())}")
        volume.begin_serving()
        assert volume.end_serving()
    volume.verb("guard", wanted=True)
    assert guarded(device) == {True}
    assert not opened(device).outside_write


def test_without_snapshots_there_is_no_guard() -> None:
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.create("one")
    assert guarded(device) == {True}
    volume.delete(["one"])
    assert guarded(device) == {False}
    assert not lab.complaint(device.content)


def test_a_guard_of_the_snapshots_to_come() -> None:
    device = MemoryDevice(lab.plain_image("ext4"))
    assert opened(device).verb("guard", wanted=False)["notices"] == []
    assert guarded(device) == {False}
    opened(device).create("one")
    assert guarded(device) == {False}
    opened(device).verb("strip")
    opened(device).create("one")
    assert guarded(device) == {True}, "strip forgets everything"


def test_what_was_dropped_is_a_short_list_of_any_names() -> None:
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    names = ["a=b", 'quo"ted', "\u2028", "ü" * 127, *(f"s{number}" for number in range(9))]
    for name in names:
        volume.create(name)
        volume.delete([name], dropped=True)
    listed = [entry["name"] for entry in opened(device).verb("info")["dropped"]]
    assert listed == names[-8:]
    for name in names[:4]:
        volume.create(name)
        volume.delete([name], dropped=True)
    assert [entry["name"] for entry in opened(device).verb("info")["dropped"]][-4:] == names[:4]
    assert volume.verb("set")["properties"] == {"on-full": "refuse"}


def test_a_list_of_a_later_version_is_no_reason_to_fail() -> None:
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.create("one")
    for text in ("{}", "[[1]]", "[", "[" * 10000, '[["x","y","z","w"]]', "null"):
        root = volume.require_store().root
        root.properties["dropped"] = text
        assert settings.dropped(root) == []
    root.properties["on-full"] = "ask"
    assert settings.properties(root) == {"on-full": "refuse"}


# -- watermarks


@pytest.mark.parametrize(
    ("room", "used", "left", "expected"),
    [
        (1000, 100, 5000, None),
        (100, 400, 5000, "low"),
        (101, 400, 5000, None),
        (5, 95, 5000, "critical"),
        (0, 1, 5000, "critical"),
        (100, 900, 100, None),  # there is no more to copy than there is room for
        (100, 900, 101, "low"),
    ],
)
def test_watermarks(room: int, used: int, left: int, expected: str | None) -> None:
    assert Fill(room, used, left).watermark == expected


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.opened: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def in_use(self) -> bool:
        return False

    def open_views(self) -> list[str]:
        return self.opened

    def snapshots_changed(self) -> None:
        self.said.append("changed")


def blocks_of_files(volume: Volume) -> Iterator[int]:
    return iter(np.flatnonzero(lab.survey(volume.read(0, volume.size)).files).tolist())


def fill_up(volume: Volume, blocks: Iterator[int]) -> int:
    """Overwrite blocks until one is refused, which is returned."""
    for block in blocks:
        try:
            volume.write(block * BLOCK, random.Random(block).randbytes(BLOCK))
        except VolumeFull:
            return block
    raise AssertionError("it never was full")


def small(device: MemoryDevice, *, snapshots: int) -> tuple[Volume, Listener]:
    """A served volume with little room."""
    volume, listener = opened(device), Listener()
    volume.serve_below(listener)
    for number in range(snapshots):
        volume.create(f"s{number}")
    volume.begin_serving(grow=False)
    return volume, listener


def test_warnings_come_once_each_before_the_end() -> None:
    volume, listener = small(MemoryDevice(lab.plain_image("ext2")), snapshots=1)
    fill_up(volume, blocks_of_files(volume))
    assert [line.split("% full")[0][-2:] for line in listener.said] == sorted(
        line.split("% full")[0][-2:] for line in listener.said
    )
    assert len(listener.said) == 2
    assert all("MiB more can be overwritten before writes fail; delete a snapshot" in line for line in listener.said)
    found = volume.verb("info")
    assert found["store"]["watermark"] == "critical"
    assert found["store"]["room_bytes"] < 5 * BLOCK
    assert found["notices"][-1].startswith("the store of image is ")
    listed = volume.verb("list")
    assert listed["watermark"] == "critical"
    assert listed["notices"] == found["notices"]
    volume.verb("set", values={"on-full": "drop-oldest"})
    assert "before the oldest snapshot is dropped" in volume.verb("list")["notices"][-1]


def test_no_more_snapshots_go_than_must() -> None:
    """Three share what was copied, two more have copies of their own: the first three go for one block, no more."""
    volume, listener = small(MemoryDevice(lab.plain_image("ext2")), snapshots=3)
    blocks = list(blocks_of_files(volume))
    written = 0

    def overwrite(count: int) -> None:
        nonlocal written
        for block in blocks[:count]:
            written += 1
            volume.write(block * BLOCK, random.Random(written).randbytes(BLOCK))
        volume.flush()

    overwrite(20)
    for name in ("s3", "s4"):
        volume.end_serving()
        volume.create(name)
        volume.begin_serving(grow=False)
        overwrite(10)
    refused = fill_up(volume, iter(blocks[10:]))
    volume.verb("set", values={"on-full": "drop-oldest"})
    volume.write(refused * BLOCK, bytes([2]) * BLOCK)
    # All five need the block itself; the copies of the first three are theirs alone, but only all three free them.
    assert volume.snapshot_names() == ["s3", "s4"]
    assert [line for line in listener.said if line.startswith("dropped")] == [
        f"dropped snapshot 's{number}' of image: room for copies ran out (on-full=drop-oldest)" for number in range(3)
    ]
    assert listener.said[-1] == "changed"


def test_an_open_view_keeps_its_snapshot() -> None:
    """What goes is the next oldest; where that would not do, nothing goes and the write is refused."""
    device = MemoryDevice(lab.plain_image("ext2"))
    volume, listener = small(device, snapshots=1)
    blocks = list(blocks_of_files(volume))
    fill_up(volume, iter(blocks))
    content = volume.open_view("s0").pread(0, volume.size)
    volume.verb("set", values={"on-full": "drop-oldest"})
    listener.opened = ["s0"]
    before = volume.read(0, volume.size)
    with pytest.raises(VolumeFull):
        volume.write(blocks[-1] * BLOCK, bytes(BLOCK))
    assert volume.read(0, volume.size) == before
    assert volume.open_view("s0").pread(0, volume.size) == content
    listener.opened = []
    volume.write(blocks[-1] * BLOCK, bytes(BLOCK))
    assert volume.snapshot_names() == []
    assert volume.end_serving()
    assert not lab.complaint(device.content)


def test_a_punch_is_refused_whole() -> None:
    """There is room for the copies of its first block, not for all: neither the ragged ends nor the middle are done."""
    device = MemoryDevice(lab.plain_image("ext2"))
    volume, _ = small(device, snapshots=1)
    blocks = np.array(list(blocks_of_files(volume)))
    first, length = max(lab.runs(blocks), key=lambda run: run[1])
    others = blocks[(blocks < first) | (blocks > first + 100)].tolist()
    for block in others:
        if volume.require_engine().room() <= 20:
            break
        volume.write(block * BLOCK, random.Random(block).randbytes(BLOCK))
    assert length > 100
    assert 2 <= volume.require_engine().room() <= 20
    before, then = volume.read(0, volume.size), volume.open_view("s0").pread(0, volume.size)
    with pytest.raises(VolumeFull):
        volume.punch(first * BLOCK + 100, 100 * BLOCK)
    assert volume.read(0, volume.size) == before
    assert volume.open_view("s0").pread(0, volume.size) == then
    volume.delete(["s0"])
    volume.punch(first * BLOCK + 100, 100 * BLOCK)
    assert not any(volume.read(first * BLOCK + 100, 100 * BLOCK))
    assert volume.end_serving()
    assert not lab.complaint(device.content)


def test_an_atomic_run_keeps_its_way_back() -> None:
    """It is the oldest, and needs every copy: the write is refused, and nothing goes."""
    volume, _ = small(MemoryDevice(lab.plain_image("ext2")), snapshots=0)
    volume.end_serving()
    volume.verb("create", name="back", kind="atomic")
    volume.create("other")
    volume.verb("set", values={"on-full": "drop-oldest"})
    volume.begin_serving(grow=False)
    fill_up(volume, blocks_of_files(volume))
    assert volume.snapshot_names() == ["back", "other"]


def full_volume() -> tuple[MemoryDevice, Volume]:
    """A volume at rest without a free block, the store full."""
    device = MemoryDevice(lab.plain_image("ext2"))
    volume, _ = small(device, snapshots=2)
    base = volume.read(0, volume.size)
    free = lab.survey(base).free
    filled = lab.changed_by_debugfs(base, "write {} n0", data=b"x" * (free - 8) * BLOCK)
    for offset, length in lab.changed_runs(base, filled, BLOCK):
        volume.write(offset, filled[offset : offset + length])
    fill_up(volume, blocks_of_files(volume))
    assert volume.end_serving()
    return device, volume


def test_a_create_makes_room_for_itself() -> None:
    device, volume = full_volume()
    with pytest.raises(VolumeFull, match="the snapshot needs"):
        volume.create("third")
    assert volume.snapshot_names() == ["s0", "s1"]
    volume.verb("set", values={"on-full": "drop-oldest"})
    volume.create("third")
    assert volume.snapshot_names()[-1] == "third"
    assert "s0" not in volume.snapshot_names()
    assert np.array_equal(lab.preserved_by(volume, "third"), lab.survey(device.content).preserved)
    assert opened(device).verb("check")["store"]["ok"]
    assert not lab.complaint(device.content)


def little_room(kind: str) -> MemoryDevice:
    """A volume at rest whose store can grow by a part of what one more snapshot needs."""
    device = MemoryDevice(lab.plain_image(kind))
    volume, _ = small(device, snapshots=2)
    base = volume.read(0, volume.size)
    filled = lab.changed_by_debugfs(base, "write {} n0", data=b"x" * (lab.survey(base).free - 60) * BLOCK)
    for offset, length in lab.changed_runs(base, filled, BLOCK):
        volume.write(offset, filled[offset : offset + length])
    for block in blocks_of_files(volume):
        if volume.require_engine().room() <= 20:
            break
        volume.write(block * BLOCK, random.Random(block).randbytes(BLOCK))
    assert volume.end_serving()
    return device


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_create_that_is_refused_gives_back_what_the_store_grew_by(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = little_room(kind)
    before = lab.survey(device.content)
    grown = []
    grow = edit.grow
    monkeypatch.setattr(edit, "grow", lambda *arguments: grown.append(grow(*arguments)) or grown[-1])
    volume = opened(device)
    with pytest.raises(VolumeFull, match="the snapshot needs"):
        volume.create("third")
    assert sum(grown) > 10, "the store has grown before the refusal"
    after = lab.survey(device.content)
    assert after.free == before.free
    assert np.array_equal(after.in_use, before.in_use), "blocks that dumpe2fs calls free"
    assert np.array_equal(after.store, before.store)
    assert not lab.complaint(device.content)
    assert not device.content[1024 + MARK_BYTE] & 0x80
    assert opened(device).verb("check")["store"]["ok"]


def test_the_header_leaves_what_the_store_grew_by() -> None:
    """Every commit puts its chains somewhere else; these are where a shrink takes away."""
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.create("one")
    before, store = lab.survey(device.content), volume.require_store()
    extents = store.root.extents
    assert edit.grow(volume, 40) == 40
    store._cursor = (store.root.size_blocks - 32) // 8
    store.commit()
    assert max(chain.max() for chain in store._chains) >= extents[-1, 0] + extents[-1, 2]
    edit.give_back_growth(volume, extents)
    volume.settle()
    after = lab.survey(device.content)
    assert np.array_equal(after.store, before.store)
    assert after.free == before.free
    assert not lab.complaint(device.content)
    assert opened(device).verb("check")["store"]["ok"]


def test_checksums_that_are_refused_give_back_what_the_store_grew_by(monkeypatch: pytest.MonkeyPatch) -> None:
    device = MemoryDevice(lab.plain_image("ext4"))
    opened(device).create("one")
    before = lab.survey(device.content)
    volume = opened(device)
    store = volume.require_store()

    write = store.write_pieces

    def refuse(kind: fmt.BlobKind, *arguments: Any, **more: Any) -> None:
        if kind != fmt.BlobKind.CHECKSUMS:
            return write(kind, *arguments, **more)
        assert int(store.root.extents[:, 2].sum()) > int(before.store[:, 2].sum()), "it has grown"
        raise VolumeFull("there is no room")

    monkeypatch.setattr(store, "write_pieces", refuse)
    monkeypatch.setattr(checksums, "_blocks_needed", lambda *_: store.available + 50)
    with pytest.raises(VolumeFull, match="there is no room"):
        volume.verb("checksum", name="one")
    after = lab.survey(device.content)
    assert np.array_equal(after.store, before.store)
    assert after.free == before.free
    assert not lab.complaint(device.content)
    assert opened(device).verb("check")["store"]["ok"]


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_first_create_that_is_refused_leaves_a_plain_volume(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store finds room, and then the snapshot does not."""
    device = MemoryDevice(lab.plain_image(kind))
    before = lab.survey(device.content)
    volume = opened(device)

    def refuse(volume: Volume, *_: object) -> None:
        assert volume.store is not None
        edit.grow(volume, 100)
        raise VolumeFull("there is no room")

    monkeypatch.setattr(taking, "make_room_for", refuse)
    with pytest.raises(VolumeFull, match="there is no room"):
        volume.create("one")
    after = lab.survey(device.content)
    assert not len(after.store)
    assert after.free == before.free
    assert np.array_equal(after.in_use, before.in_use)
    assert not lab.complaint(device.content)
    assert opened(device).store is None


@pytest.mark.parametrize("free", [160, 320])
def test_a_full_store_can_grow(free: int) -> None:
    """A session takes half of what is free; its writes leave the room that the store's own growth needs."""
    device = MemoryDevice(lab.plain_image("ext2"))
    volume, _ = small(device, snapshots=1)
    base = volume.read(0, volume.size)
    filled = lab.changed_by_debugfs(base, "write {} n0", data=b"x" * (lab.survey(base).free - free) * BLOCK)
    for offset, length in lab.changed_runs(base, filled, BLOCK):
        volume.write(offset, filled[offset : offset + length])
    assert volume.end_serving()
    volume.create("second")
    volume.begin_serving()
    fill_up(volume, blocks_of_files(volume))
    volume.flush()
    assert edit.grow(volume, 20) >= 20
    assert volume.end_serving()
    assert opened(device).verb("check")["store"]["ok"]
    assert not lab.complaint(device.content)


@pytest.mark.parametrize("fails", range(1, 4))
def test_what_a_failed_command_began_is_not_made_true_by_the_next(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Nth barrier of a create fails; a server goes on with the same volume in memory."""
    device = MemoryDevice(lab.plain_image("ext2"))
    volume = opened(device)
    volume.create("one")
    volume.begin_serving(grow=False)
    flush, left = device.flush, [fails]

    def failing() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "Input/output error")
        flush()

    monkeypatch.setattr(device, "flush", failing)
    try:
        volume.create("two")
    except OSError:
        assert volume.snapshot_names() == ["one"]
    else:
        assert left[0] > 0
    known = volume.snapshot_names()
    volume.verb("set", values={"on-full": "drop-oldest"})
    again = opened(MemoryDevice(bytes(device.content)))
    assert again.snapshot_names() == known
    assert len(again.require_engine().snapshots) == int(again.require_store().root.counting).bit_count()


def test_a_setting_that_cannot_be_committed_takes_no_write_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command goes back to what is on the medium: what was held, and told to be written, is there by then."""
    device = MemoryDevice(lab.plain_image("ext4"))
    opened(device).create("one")
    volume = opened(device)
    volume.begin_serving()
    block = next(blocks_of_files(volume))
    volume.write(block * BLOCK, bytes([0xAA]) * BLOCK)

    def fails() -> None:
        raise OSError(errno.ENOSPC, "the host is full for a moment")

    monkeypatch.setattr(volume.require_store(), "commit", fails)
    with pytest.raises(OSError):
        volume.verb("set", values={"on-full": "drop-oldest"})
    assert volume.read(block * BLOCK, BLOCK) == bytes([0xAA]) * BLOCK
    volume.flush()
    assert device.content[block * BLOCK : (block + 1) * BLOCK] == bytes([0xAA]) * BLOCK


def test_an_open_view_outlives_a_refusal() -> None:
    """A command that fails has the volume read its state anew; a view that is open goes on with it."""
    device = MemoryDevice(lab.plain_image("ext4"))
    volume = opened(device)
    volume.create("one")
    then = volume.read(0, volume.size)
    block = next(iter(blocks_of_files(volume)))
    with volume.snapshots["one"].open() as view:
        assert view.read(4 * BLOCK) == then[: 4 * BLOCK]
        volume.back_to_rest()
        volume.begin_serving()
        volume.write(block * BLOCK, b"\xee" * BLOCK)
        volume.flush()
        view.seek(block * BLOCK)
        assert view.read(BLOCK) == then[block * BLOCK : (block + 1) * BLOCK]


@pytest.mark.parametrize("kind", ["ext4", "ext2"])
def test_a_restore_of_a_served_volume_uses_all_of_the_room(kind: str) -> None:
    """What is kept for metadata is for whoever writes from above."""
    device = MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    volume.create("one")
    then = volume.read(0, volume.size)
    volume.begin_serving()
    assert volume.growth is not None
    volume.growth.note_mount(True)
    volume.growth._wanted = volume.store.available
    assert volume.growth.due() is not None
    volume.growth.take({"do": "grow", "number": volume.growth.awaited, "error": "", "extents": []})
    assert volume.vital is not None
    blocks = list(blocks_of_files(volume))
    for block in blocks:
        volume.write(block * BLOCK, b"\xee" * BLOCK)
    volume.flush()
    volume.verb("restore", name="one")
    volume.growth.note_mount(False)
    assert all(volume.read(block * BLOCK, BLOCK) == then[block * BLOCK : (block + 1) * BLOCK] for block in blocks)
    assert volume.end_serving()
    assert not lab.complaint(device.content)


@pytest.mark.parametrize("folded", [False, True])
def test_a_full_store_lets_a_snapshot_go(folded: bool, tmp_path: Path) -> None:
    """What was overwritten in order has few records and many checksums, which a delete writes anew."""
    image = make_volume(tmp_path / "disk.img", "ext2", 144, "-b", "1024", files={"file": b"\xaa" * (84 << 20)})
    blocks = oracle.file_blocks(image, "/file").data_blocks
    with extsnap.open(image) as volume:
        volume.create("one")
        volume.begin_serving()
        volume.write(int(blocks[0]) * 1024, b"\xcc" * 1024)  # two has a copy of its own: its mask goes with it
        volume.create("two")
        engine = volume.require_engine()
        pieces = iter(
            (at, min(64, first + count - at))
            for first, count in lab.runs(np.array(sorted(blocks)))
            for at in range(first, first + count, 64)
        )
        with contextlib.suppress(VolumeFull):
            for at, count in pieces:
                volume.write(at * 1024, b"\xbb" * 1024 * count)
        assert next(pieces, None) is not None, "it never was full"
        volume.flush()
        assert sum(len(level.crcs) for level in engine.index.levels) > 20_000, "too few copies to show anything"
        if folded:
            engine.fold()
        volume.delete(["two"])
        assert volume.end_serving()
        with volume.snapshots["one"].open() as view:
            view.seek(int(blocks[0]) * 1024)
            assert view.read(1024) == b"\xaa" * 1024
        assert volume.verb("check")["store"]["ok"]
