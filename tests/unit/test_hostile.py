"""Images that lie with right checksums: every one is refused by name, in bounded time and memory, with nothing written.

The limits are what docs/SECURITY.md promises: 10 s and 512 MiB.  Images are made here, by `hostile`, never stored.
"""

from __future__ import annotations

import random
import re
import socket
import struct

import hostile
import numpy as np
import pytest
from hostile import bounded, refused
from lab import BLOCK, MemoryDevice

from extsnap.errors import DamagedCopy, FormatError, ServerError, StoreDamaged
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.mapping import build_extents, parse_extents
from extsnap.serve.control import ControlClient
from extsnap.snapshot import format as fmt
from extsnap.snapshot import limits
from extsnap.snapshot.index import Level
from extsnap.snapshot.volume import Volume


class SparseDevice(MemoryDevice):
    """A device whose end is far away: holes read as zeros, as those of a sparse file do."""

    def __init__(self, content: bytes, size: int) -> None:
        super().__init__(content)
        self.size = size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))
        piece = self.content[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece

    def pread(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size
        return bytes(self.content[offset : offset + length]).ljust(length, b"\0")


def record(block: int, copy: int, length: int, mask: int = 0) -> tuple[int, int, int, int, int]:
    return block, copy, length, mask, 1


def unread(device: MemoryDevice) -> str:
    """Why the records of a volume cannot be read; its snapshots are listed, and neither read nor changed."""
    before = bytes(device.content)
    with bounded():
        volume = Volume(device)
        assert volume.snapshot_names() == ["one", "two", "three"]
        with pytest.raises(DamagedCopy, match="cannot be read"):
            volume.open_view("one").pread(0, 4096)
        hostile.read_all(device)
        assert not len(volume.require_engine().index)
    assert device.content == before
    return volume.require_engine().lost


# ---- the store


def test_the_volume_that_is_changed_is_sound() -> None:
    with bounded():
        volume = Volume(MemoryDevice(hostile.image()))
    assert volume.snapshot_names() == ["one", "two", "three"]
    assert volume.verb("check")["store"]["errors"] == []


@pytest.mark.parametrize("name", ["../../etc", "a\x1b]0;b\x07", "..", "-rf", "", "x" * 256, "a\0b"])
def test_a_name_that_breaks_the_rules_is_no_name(name: str) -> None:
    raw = hostile.blob(fmt.BlobKind.SNAPSHOTS)
    first, *others = fmt.parse_snapshots(raw)
    entry = fmt.SnapshotEntry.parse(first.build())
    entry.name = name.encode()
    table = bytes(fmt.SnapshotEntry.build(entry)) + b"".join(other.build() for other in others)
    message = refused(hostile.sealed_blob(fmt.BlobKind.SNAPSHOTS, 0, table))
    assert "snapshot table: the name" in message
    assert message.isprintable()


@pytest.mark.parametrize("field", ["bit", "id", "name"])
def test_two_snapshots_are_not_one(field: str) -> None:
    entries = fmt.parse_snapshots(hostile.blob(fmt.BlobKind.SNAPSHOTS))
    object.__setattr__(entries[1], field, getattr(entries[0], field))
    table = b"".join(entry.build() for entry in entries)
    assert f"the same {field}" in refused(hostile.sealed_blob(fmt.BlobKind.SNAPSHOTS, 0, table))


def test_a_root_that_claims_terabytes() -> None:
    device = hostile.sealed_slots(root_blocks=1 << 27, root_bytes=1 << 37)
    large = SparseDevice(bytes(device.content), 1 << 40)
    with bounded(), pytest.raises(StoreDamaged, match="a root of 137438953472 bytes"):
        Volume(large)


def test_chains_that_go_in_circles() -> None:
    device = MemoryDevice(hostile.image())
    store = hostile.store_of(device)
    for index in range(2):
        slot = fmt.Slot.parse(device.pread(store.slot_block(index) * BLOCK, fmt.SLOT_BYTES))
        at = slot.root_block * BLOCK
        head = fmt.Segment.parse(device.pread(at, fmt.SEGMENT_HEADER))
        head.next_block, head.next_blocks = slot.root_block, slot.root_blocks
        raw = bytes(fmt.Segment.build(head)) + device.pread(at + fmt.SEGMENT_HEADER, head.payload_bytes)
        device.pwrite(at, raw[:4] + fmt.crc(raw[8:]).to_bytes(4, "little") + raw[8:])
    assert "is impossible" in refused(device)


@pytest.mark.parametrize(
    ("section", "payload", "message"),
    [
        (fmt.Section.COUNTING_BITMAP, b"\xff" * 16384, "beyond 65536"),
        (fmt.Section.LOG, struct.pack("<QQQ", 1, 2, 1 << 40), "log"),
        (fmt.Section.LOG, struct.pack("<QQQ", 1, 0, 64), "twice"),
        (fmt.Section.EXTENTS, struct.pack("<QQQ", 0, 2**63 - 1, 2**63), "extents"),
        (fmt.Section.EXTENTS, struct.pack("<QQQ", 1 << 40, 100, 10), "extents"),
        (fmt.Section.EXTENTS, struct.pack("<QQQQQQ", 0, 900, 600, 600, 1000, 100), "overlapping"),
    ],
    ids=["bits", "log-outside", "log-over-slots", "overflow", "far", "overlap"],
)
def test_sections_that_cannot_be(section: fmt.Section, payload: bytes, message: str) -> None:
    assert message in refused(hostile.sealed_sections(lambda parts: parts.update({section: payload})))


def test_records_of_one_block_without_end() -> None:
    """4 MiB of records that would be a milliard of blocks to look at."""
    table = np.zeros(150_000, fmt.RECORD_DTYPE)
    table["block"], table["length"], table["copy"], table["writes"] = 2000, 1024, fmt.ZERO_COPY, 1
    message = unread(hostile.sealed_batch([], [record(2000, fmt.ZERO_COPY, 1024)] * 400, 0))
    assert "more records at block 1024 than there can be" in message
    with bounded(), pytest.raises(StoreDamaged, match="more records"):
        limits.require_sparse([Level.parse(table, np.zeros(0, np.uint32))], 64)


def test_two_records_for_one_block_are_no_content() -> None:
    """Which of two is read would be chance: the block is not read, the others are."""
    fs = Filesystem.open(Volume(MemoryDevice(hostile.image())).medium)
    number = fs.lookup("/f5")
    assert number
    at = int(fs.file_map(number).data[-1, 1:].sum()) - 16
    device = hostile.sealed_batch([], [record(at, fmt.ZERO_COPY, 4), record(at + 2, fmt.ZERO_COPY, 4)], 0)
    volume = Volume(device)
    row = volume.require_engine().masks.bits()[0]
    name = next(entry.name for entry in volume.snapshot_list() if row[entry.bit])
    view = volume.open_view(name)
    with pytest.raises(StoreDamaged, match=f"block {at + 2} has two records"):
        view.pread(at * BLOCK, 8 * BLOCK)
    view.pread(1024, 1024)


@pytest.mark.parametrize(
    "bad",
    [record(7000, 0, 1), record(10, 1 << 40, 1), record(10, 0, 1), record(10, -2, 1), record(10, -1, 0),
     record(10, -1, 1 << 31), record(10, -1, 1, 1 << 20), record(2**63, -1, 1)],
    ids=["outside", "copy-outside", "copy-is-slot", "copy-negative", "empty", "long", "mask", "overflow"],
)  # fmt: skip
def test_a_record_that_cannot_be(bad: tuple[int, int, int, int, int]) -> None:
    crcs = bad[2] if bad[1] >= 0 else 0
    unread(hostile.sealed_batch([], [bad], min(crcs, 100)))


@pytest.mark.parametrize("what", ["metadata", "file"])
def test_a_store_over_what_is_not_its_own_is_not_written(what: str) -> None:
    """Its header takes an inode bitmap, or blocks of a file: views can be read, nothing is written."""
    device = MemoryDevice(hostile.image())
    fs = Filesystem.open(Volume(device).medium)
    number = fs.lookup("/f5")
    assert number
    target = int(fs.file_map(number).data[-1, 1]) if what == "file" else int(fs.groups.column("bg_inode_bitmap")[-1])

    def move(parts: dict[int, bytes]) -> None:
        rows = np.frombuffer(parts[fmt.Section.EXTENTS], fmt.EXTENT_DTYPE).copy()
        more = np.zeros(1, fmt.EXTENT_DTYPE)
        more["logical"], more["physical"], more["length"] = int((rows["logical"] + rows["length"]).max()), target, 1
        parts[fmt.Section.EXTENTS] = np.concatenate([rows, more]).tobytes()

    device = hostile.sealed_sections(move)
    before = bytes(device.content)
    with bounded(), pytest.raises(StoreDamaged, match="metadata" if what == "metadata" else "different blocks"):
        Volume(device, writable=True)
    assert device.content == before


# ---- the filesystem


def test_groups_without_end() -> None:
    """A sparse image of 16 TiB with groups of 2,048 blocks: two million descriptors, all in holes."""
    blocks = 1 << 32
    groups = -(-blocks // 2048)
    device = hostile.sealed_superblock(
        s_log_block_size=2, s_log_cluster_size=2, s_blocks_count_lo=0, s_blocks_count_hi=1, s_first_data_block=0,
        s_blocks_per_group=2048, s_clusters_per_group=2048, s_inodes_per_group=8, s_inodes_count=groups * 8 % (1 << 32),
    )  # fmt: skip
    with bounded(), pytest.raises(FormatError, match="s_blocks_per_group"):
        Volume(SparseDevice(bytes(device.content), blocks * 4096))


def test_groups_that_share_a_bitmap() -> None:
    fs = Filesystem.open(MemoryDevice(hostile.lab.plain_image("ext4")))
    first = int(fs.groups.column("bg_block_bitmap")[0])
    device = hostile.sealed_group(1, bg_block_bitmap_lo=first)
    with pytest.raises(FormatError, match="shares blocks"):
        _ = Filesystem.open(Volume(MemoryDevice(hostile.image())).medium.__class__(device)).groups


def test_an_extent_tree_that_goes_in_circles() -> None:
    root, nodes = build_extents(np.array([[at * 2, 100 + at * 2, 1] for at in range(9)]), np.array([50]), BLOCK, None)
    (node,) = nodes.values()
    head = bytearray(root[:12] + node[12:])
    head[6:8] = (2).to_bytes(2, "little")  # depth: the root names a node that names itself

    def read(blocks: np.ndarray) -> np.ndarray:
        inner = bytearray(BLOCK)
        inner[:12] = struct.pack("<HHHHI", 0xF30A, 1, 84, 1, 0)
        inner[12:24] = struct.pack("<IIHH", 0, 50, 0, 0)
        return np.frombuffer(bytes(inner) * len(blocks), np.uint8).reshape(-1, BLOCK)

    with pytest.raises(FormatError, match="twice"):
        parse_extents(struct.pack("<HHHHIIIHH", 0xF30A, 1, 4, 2, 0, 0, 50, 0, 0) + bytes(36), read, 4096, None)


def test_extents_over_the_same_blocks() -> None:
    root, _ = build_extents(np.array([[0, 100, 10], [10, 105, 10]]), np.zeros(0, np.int64), BLOCK, None)
    with pytest.raises(FormatError, match="same blocks"):
        parse_extents(root, lambda blocks: np.zeros((0, BLOCK), np.uint8), 4096, None)


# ---- messages, and what a byte string decides


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"ok": 0, "error": "x"}', b'{"ok": 0, "error": {"class": "OSError", "errno": 1e999}}']
)
def test_an_answer_that_makes_no_sense(line: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, ControlClient(theirs) as client:
        ours.sendall(line + b"\n")
        with pytest.raises(ServerError, match="makes no sense"):
            client.receive()


@pytest.mark.parametrize("target", hostile.TARGETS)
def test_a_short_life_of_the_fuzzer(target: str) -> None:
    """Byte strings of a fixed seed; tools/fuzz goes on from here, guided by coverage."""
    rng = random.Random(f"short {target}")
    count = {"volume": 12, "commands": 4}.get(target, 300)
    with bounded(120):
        for _ in range(count):
            hostile.TARGETS[target](rng.randbytes(200))


SEEDS = dict(re.findall(r"^\| `([^`]+)` \| [^|]+ \| (.*) \|$", (hostile.SEEDS / "README.md").read_text(), re.MULTILINE))


def test_the_readme_lists_every_seed():
    assert sorted(SEEDS) == [f"{path.parent.name}/{path.name}" for path in hostile.seeds()]
    assert {name.split("/")[0] for name in SEEDS} == set(hostile.TARGETS)


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_ends_as_its_readme_says(name: str) -> None:
    target = name.split("/")[0]
    with bounded():
        assert hostile.ending(target, (hostile.SEEDS / name).read_bytes()) == SEEDS[name]


@pytest.mark.parametrize("path", hostile.stored(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_the_fuzzer_found(path) -> None:
    with bounded():
        hostile.TARGETS[path.parent.name](path.read_bytes())


def test_only_errors_of_ours_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets let everything else through: a fuzzer that hears nothing finds nothing."""
    monkeypatch.setattr(hostile, "recognise", lambda device: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        hostile.TARGETS["parsers"](b"\x01")
