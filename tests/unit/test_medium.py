"""The medium: guard, mark and pointer live below, never above; what is written above is what is read there."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import images
import lab
import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extsnap.blockdev.base import Pieces
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.recording import MemoryDevice, RecordingDevice
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import format as fmt
from extsnap.snapshot.medium import (
    DIRTY_MARK,
    MAGIC,
    METADATA_CSUM,
    PRIMARY_OFFSET,
    READ_ONLY,
    SUPERBLOCK_BYTES,
    Medium,
    SuperblockState,
    read_state,
    translate,
)

PLAIN = SuperblockState()
POINTER = fmt.build_pointer(700, 900)
#: Bits of a superblock that are extsnap's below: byte -> mask.
OURS = {0x63: 0x80, 0x65: 0x10, **dict.fromkeys(range(992, 1020), 255)}

states = st.builds(SuperblockState, st.booleans(), st.booleans(), st.sampled_from([b"", POINTER]))


def without_ours(raw: bytes) -> bytes:
    return bytes(byte & ~OURS.get(at, 0) for at, byte in enumerate(raw))


@st.composite
def superblocks(draw: st.DrawFn) -> bytes:
    """1,024 bytes with the magic: random ones, or real ones with random damage; as a tool above writes them."""
    raw = bytearray(draw(st.one_of(st.sampled_from(REAL), st.binary(min_size=1024, max_size=1024))))
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 1023), st.integers(0, 255)), max_size=4)):
        raw[at] = byte
    raw[0x38:0x3A] = MAGIC
    return bytes(raw)


def _real() -> list[bytes]:
    """Superblocks that mke2fs wrote: with and without metadata_csum, primaries and backups."""
    found = []
    for name in ("ext2-1k", "ext3-4k", "ext4-1k", "ext4up-4k"):
        path = images.image(name)
        with open(path, "rb") as file:
            for at in superblock_offsets(path)[:3]:
                file.seek(at)
                found.append(file.read(1024))
    assert all(raw[0x38:0x3A] == MAGIC for raw in found)
    return found


def superblock_offsets(path: Path) -> list[int]:
    """Where dumpe2fs says that superblocks are, in bytes."""
    volume = oracle.volume_facts(path)
    return [max(int(block) * volume.block_size, 1024) for block in volume.superblocks]


REAL = _real()


@given(raw=superblocks(), state=states)
def test_down_and_up_again_is_the_same(raw, state):
    above = without_ours(raw)
    below = translate(above, state)
    assert translate(below, PLAIN) == above
    assert read_state(below) == state


@given(raw=superblocks(), state=states)
def test_up_and_down_again_is_the_same(raw, state):
    """For anything on the medium that bears a state of ours, checksum right or wrong."""
    below = bytearray(without_ours(raw))
    below[0x63] |= 0x80 * state.mark
    below[0x65] |= 0x10 * state.guard
    below[0x3E0:0x3FC] = state.pointer or bytes(28)
    above = translate(bytes(below), PLAIN)
    assert translate(above, read_state(bytes(below))) == below


@given(raw=superblocks(), state=states, other=states)
def test_nothing_else_changes(raw, state, other):
    """All bits but ours and, under metadata_csum, the checksum; and the way there does not count."""
    out = translate(raw, state)
    end = 0x3FC if int.from_bytes(raw[0x64:0x68], "little") & METADATA_CSUM else 0x400
    assert without_ours(out)[:end] == without_ours(raw)[:end]
    assert translate(translate(raw, other), state) == out


@given(raw=superblocks())
@example(raw=REAL[0])
def test_what_is_ours_never_shows_above(raw):
    """Not even what stood there before us, or what a tool above wrote."""
    marked = bytearray(raw)
    marked[0x63] |= 0x80
    marked[0x65] |= 0x10
    marked[0x3E0:0x3FC] = POINTER
    for source in (raw, bytes(marked)):
        above = translate(source, PLAIN)
        assert all(above[at] & bits == 0 for at, bits in OURS.items())
        assert read_state(above) == PLAIN


@given(raw=st.binary(min_size=1024, max_size=1024), state=states)
def test_what_is_no_superblock_passes_as_it_is(raw, state):
    if raw[0x38:0x3A] != MAGIC:
        assert translate(raw, state) == raw


@pytest.mark.parametrize("name", ["ext2-2k", "ext3-4k", "ext4-4k", "ext4up-2k"])
def test_a_right_checksum_stays_right(fresh_image, name):
    """e2fsprogs judges: the guard alone is clean everywhere, and with the mark everything refuses."""
    path = fresh_image(name)
    with ImageFile(str(path), writable=True) as device:
        medium = Medium(device)
        medium.set_offsets(superblock_offsets(path))
        medium.set_state(SuperblockState(guard=True, pointer=POINTER))
    assert "read-only" in oracle.superblock_facts(path)["Filesystem features"]
    oracle.assert_clean(path)
    block = superblock_offsets(path)[1] // oracle.volume_facts(path).block_size
    size = oracle.volume_facts(path).block_size
    checked = subprocess.run(["dumpe2fs", "-h", "-o", f"superblock={block}", "-o", f"blocksize={size}", path],
                             capture_output=True, text=True, check=True)  # fmt: skip
    assert re.search(r"^Filesystem features:.* read-only", checked.stdout, re.MULTILINE)
    with ImageFile(str(path), writable=True) as device:
        medium = Medium(device)
        assert medium.state == SuperblockState(guard=True, pointer=POINTER)
        medium.set_offsets(superblock_offsets(path))
        medium.set_state(replace(medium.state, mark=True))
    for options in ([], ["-b", str(block), "-B", str(size)]):
        verdict = oracle.e2fsck(path, *options)
        assert "FEATURE_I31" in verdict.text or "unsupported feature" in verdict.text
        assert verdict.status & 8


# -- the device -------------------------------------------------------------------------------------------


class Pair:
    """A medium over a device in memory, and beside it a plain one on which the same is done."""

    def __init__(self, content: bytes, offsets: list[int], state: SuperblockState) -> None:
        self.model = bytearray(content)
        self.device = MemoryDevice(content)
        self.offsets = offsets
        self.medium = Medium(self.device)
        self.medium.set_offsets(offsets)
        self.medium.set_state(state)

    def write(self, offset: int, data: bytes) -> None:
        self.medium.pwrite(offset, data)
        self.model[offset : offset + len(data)] = data

    def check(self) -> None:
        """What is read is what was written, and every superblock below bears exactly the state."""
        assert self.medium.pread(0, len(self.model)) == self.model
        below = bytearray(self.device.content)
        for at in self.offsets:
            raw = bytes(below[at : at + 1024])
            if raw[0x38:0x3A] == MAGIC:
                assert read_state(raw) == self.medium.state
                below[at : at + 1024] = self.model[at : at + 1024]
        assert below == self.model, "a byte outside the superblocks was changed"


def content_with(offsets: list[int], size: int, seed: int) -> bytes:
    rng = random.Random(seed)
    content = bytearray(rng.randbytes(size))
    for number, at in enumerate(offsets):
        content[at : at + 1024] = without_ours(REAL[(seed + number) % len(REAL)])
    return bytes(content)


@pytest.mark.parametrize("state", [PLAIN, SuperblockState(True), SuperblockState(True, True, POINTER)])
@pytest.mark.parametrize("seed", range(6))
def test_any_reads_and_writes(seed, state):
    """Pieces of superblocks, several at once, and all around them."""
    offsets = [1024, 8192, 9216, 20480]
    pair = Pair(content_with(offsets, 24000, seed), offsets, state)
    pair.check()
    rng = random.Random(seed)
    for _ in range(150):
        at = rng.choice(offsets) + rng.randrange(-600, 1100)
        length = rng.choice((1, 2, 10, 512, 1024, 4096, 13000))
        at = max(0, min(at, 24000 - length))
        data = bytearray(rng.randbytes(length))
        for where in offsets:  # a tool above may write anything, but what is ours does not stay
            for position in range(max(where, at), min(where + 1024, at + length)):
                data[position - at] &= ~OURS.get(position - where, 0)
                if position - where in (0x38, 0x39):
                    data[position - at] = MAGIC[position - where - 0x38]
        pair.write(at, bytes(data))
        pair.check()
        low = rng.randrange(24000)
        high = rng.randrange(low, 24001)
        assert pair.medium.pread(low, high - low) == pair.model[low:high]


@pytest.mark.parametrize("number", range(0, 12, 2))
def test_a_superblock_in_pieces_of_2_to_10_bytes(number):
    """As resize2fs writes it: in between the checksum is wrong, at the end it is right on both sides."""
    other = without_ours(REAL[number])
    pair = Pair(content_with([1024], 4096, number + 1), [1024], SuperblockState(True, True, POINTER))
    rng = random.Random(number)
    at = 0
    pieces = []
    while at < 1024:
        length = min(rng.randrange(2, 11), 1024 - at)
        pieces.append((at, other[at : at + length]))
        at += length
    rng.shuffle(pieces)
    for at, data in pieces:
        pair.write(1024 + at, data)
        pair.check()
    assert pair.medium.superblock() == other
    assert bytes(pair.device.content[1024:2048]) == translate(other, SuperblockState(True, True, POINTER))


def test_a_bit_of_ours_written_above_is_dropped():
    pair = Pair(content_with([1024], 4096, 0), [1024], SuperblockState(guard=True, pointer=POINTER))
    raw = bytearray(pair.model[1024:2048])
    raw[0x63] |= 0x80
    raw[0x65] |= 0x10
    raw[0x3E0:0x3FC] = fmt.build_pointer(1, 2)
    pair.medium.pwrite(1024, raw)
    pair.check()  # the model was not told
    below = bytes(pair.device.content[1024:2048])
    assert read_state(below) == SuperblockState(guard=True, pointer=POINTER)
    assert int.from_bytes(below[0x60:0x64], "little") & DIRTY_MARK == 0
    assert int.from_bytes(below[0x64:0x68], "little") & READ_ONLY


def test_a_superblock_that_is_wiped_and_made_again():
    """Without the magic it is no superblock and carries nothing; with it, it carries the state again."""
    pair = Pair(content_with([1024, 4096], 8192, 3), [1024, 4096], SuperblockState(True, True, POINTER))
    old = bytes(pair.model[4096:5120])
    pair.write(4096 + 0x38, b"\0\0")
    pair.check()
    assert pair.device.content[4096:5120] == pair.model[4096:5120]
    pair.write(4096 + 0x38, MAGIC)
    pair.check()
    pair.medium.punch(4096, 1024)
    assert pair.medium.pread(4096, 1024) == bytes(1024) == pair.device.content[4096:5120]
    pair.model[4096:5120] = bytes(1024)
    pair.write(4096, old)
    pair.check()


def test_each_superblock_goes_out_in_one_write():
    """1,024 bytes are atomic on the medium only if they are one write."""
    device = RecordingDevice(MemoryDevice(content_with([1024, 8192], 16384, 1)))
    medium = Medium(device)
    medium.set_offsets([1024, 8192])
    medium.set_state(SuperblockState(True, True, POINTER))
    device.log.clear()
    medium.pwrite(1024 + 100, b"x" * 8000)
    writes = [(operation.offset, operation.length) for operation in device.log]
    assert writes == [(1024, 1024), (2048, 6144), (8192, 1024)]


@pytest.mark.parametrize("on", [True, False])
def test_order_of_mark_and_barriers(on):
    """On: the primary, a barrier, the backups.  Off: the other way round.  So no backup has the mark alone."""
    offsets = [1024, 8192, 12288]
    device = RecordingDevice(MemoryDevice(content_with(offsets, 16384, 2)))
    medium = Medium(device)
    medium.set_offsets(offsets)
    guard = SuperblockState(guard=True, pointer=POINTER)
    medium.set_state(guard if on else replace(guard, mark=True))
    device.log.clear()
    medium.set_state(replace(guard, mark=on))
    steps = [operation.offset if operation.kind == "write" else operation.kind for operation in device.log]
    assert steps == ([1024, "flush", 8192, 12288, "flush"] if on else [8192, 12288, "flush", 1024, "flush"])
    for at in offsets:
        assert read_state(device.pread(at, 1024)) == replace(guard, mark=on)


def test_changes_of_state_never_show_above():
    offsets = [1024, 8192]
    pair = Pair(content_with(offsets, 16384, 4), offsets, PLAIN)
    rng = random.Random(4)
    for _ in range(30):
        pair.medium.set_state(SuperblockState(rng.random() < 0.5, rng.random() < 0.5, rng.choice((b"", POINTER))))
        pair.check()
        again = Medium(pair.device)
        assert again.state == pair.medium.state
        assert again.pread(0, 8192) == pair.model[:8192]


def test_devices_without_a_superblock():
    for content in (b"", bytes(1500), bytes(2047), bytes(4096), b"\xff" * 4096):
        medium = Medium(MemoryDevice(content))
        assert medium.offsets == []
        assert medium.state == PLAIN
        assert medium.pread(0, len(content)) == content
    medium = Medium(MemoryDevice(content_with([1024], 5000, 0)))
    medium.set_offsets([1024, 3976, 3977, 1 << 60])
    assert medium.offsets == [PRIMARY_OFFSET, 5000 - SUPERBLOCK_BYTES]


@pytest.mark.parametrize("name", ["ext2-1k", "ext4-4k"])
def test_the_package_finds_every_superblock(name):
    """Its list of superblocks is that of dumpe2fs: a backup left out would bear no mark."""
    path = images.image(name)
    with ImageFile(str(path)) as device:
        geometry = Filesystem.open(device).geometry
        blocks = geometry.superblock_blocks.tolist()
        offsets = [block * geometry.block_size + geometry.superblock_offset(block) for block in blocks]
    assert offsets == superblock_offsets(path)


def test_where_it_stands_as_it_is() -> None:
    """Everywhere but in superblocks, which are translated."""

    class File(lab.MemoryDevice):
        def where(self, offset: int, length: int) -> tuple[int, int]:
            return 7, offset

    medium = Medium(File(lab.plain_image("ext4")))
    assert medium.where(0, 1024) == (7, 0)
    assert medium.where(2048, 1 << 20) == (7, 2048)
    for offset, length in ((0, 1025), (1024, 1), (2047, 1), (0, 1 << 20)):
        assert medium.where(offset, length) is None
    assert Medium(lab.MemoryDevice(lab.plain_image("ext4"))).where(2048, 1024) is None


@pytest.mark.parametrize("seed", range(8))
def test_many_places_at_once_are_as_one_after_the_other(seed: int) -> None:
    """Pieces that end or begin where a superblock does, have a part of it, or several; sizes of blocks mixed."""
    rng = random.Random(seed)
    content = bytearray(rng.randbytes(64 << 10))
    at = [PRIMARY_OFFSET, 16384, 40960, 65024 - 512]
    for offset in at:
        content[offset : offset + SUPERBLOCK_BYTES] = translate(REAL[seed % len(REAL)], PLAIN)
    one, many = (Medium(MemoryDevice(bytes(content))) for _ in range(2))
    for medium in (one, many):
        medium.set_offsets(at)
        medium.set_state(SuperblockState(guard=True, mark=True, pointer=POINTER))
    edges = sorted(
        {0, len(content), *(edge + near for start in at for edge in (start, start + 1024) for near in (-512, 0, 512))}
    )
    cuts = [edge for edge in edges if 0 <= edge <= len(content)]
    pairs = [pair for pair in itertools.pairwise(cuts) if rng.random() < 0.7]
    if seed % 2:
        pairs = [(pairs[0][0], pairs[2][1]), *pairs[3:]]
    rng.shuffle(pairs)
    offsets, lengths = np.array([(low, high - low) for low, high in pairs]).T
    pieces = Pieces(offsets, lengths, np.cumsum(lengths) - lengths, memoryview(bytearray(rng.randbytes(sum(lengths)))))
    for offset, data in pieces:
        one.pwrite(offset, data)
    many.write_pieces(pieces)
    assert many.device.pread(0, len(content)) == one.device.pread(0, len(content))
    assert many.pread(0, len(content)) == one.pread(0, len(content))
    back = Pieces(offsets, lengths, pieces.at, memoryview(bytearray(sum(lengths))))
    many.read_pieces(back)
    for offset, data in back:
        assert bytes(data) == one.pread(offset, len(data))
