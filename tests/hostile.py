"""Images whose checksums are right and whose content lies: somebody who can write an image can compute a crc32c.

`image` is a small volume with snapshots whose store has one of each structure.  `sealed_*` give the volume with one
structure changed and everything above it sealed again.  `read_all` and `change_all` do to a volume what the commands
do.  `TARGETS` are the parsers as functions of a byte string, for the fuzzer and for the replay of what it found:
a byte string decides what is changed, so a case that crashed is stored in a few bytes.  What the fuzzer begins with
is in ``tests/fixtures/seeds`` (made by ``tools/make-seeds``), what it found in ``tests/fixtures/fuzz``.
"""

from __future__ import annotations

import errno
import functools
import gzip
import os
import random
import resource
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lab
import numpy as np
from lab import BLOCK, MemoryDevice

from extsnap.blockdev.base import Pieces
from extsnap.blockdev.overlay import Overlay
from extsnap.blockdev.partitions import read_table
from extsnap.errors import ExtsnapError
from extsnap.ext import log
from extsnap.ext.directory import entries, parse_block
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.magic import recognise
from extsnap.ext.mapping import parse_extents, parse_indirect
from extsnap.ext.orphans import unlinked, waiting
from extsnap.ondisk import checksum, codec, journal_tags
from extsnap.ondisk.group import GroupDescriptor64
from extsnap.ondisk.inode import inode_struct
from extsnap.ondisk.journal import SIZE as JOURNAL_SUPERBLOCK
from extsnap.ondisk.journal import JournalIncompat, JournalSuperblock
from extsnap.ondisk.journal_tags import BlockType
from extsnap.ondisk.superblock import Incompat, Superblock
from extsnap.serve import control, fuse
from extsnap.snapshot import format as fmt
from extsnap.snapshot.masks import MaskTable
from extsnap.snapshot.medium import Medium
from extsnap.snapshot.root import Root
from extsnap.snapshot.store import Store
from extsnap.snapshot.volume import Volume

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FOUND, SEEDS = FIXTURES / "fuzz", FIXTURES / "seeds"
#: What is promised of every command on every image.
SECONDS, BYTES = 10.0, 512 << 20


# ---- limits


@contextmanager
def bounded(seconds: float = SECONDS, more_bytes: int = BYTES) -> Iterator[None]:
    """Fail what takes longer, or more memory than this process has now and ``more_bytes`` (RLIMIT_AS)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, hard))
    begun = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    taken = time.process_time() - begun
    assert taken < seconds, f"{taken:.1f} s of processor time"


# ---- a volume that has everything


@functools.cache
def image(kind: str = "ext4") -> bytes:
    """A volume at rest with three snapshots: records in the index and in the log, copies, bitmaps, zero records."""
    clock = iter(range(1_700_000_000 * 10**9, 1_800_000_000 * 10**9, 10**9))
    device = MemoryDevice(lab.plain_image(kind))
    rng = random.Random(kind)

    def opened() -> Volume:
        return Volume(device, writable=True, clock=lambda: next(clock), random_bytes=rng.randbytes)

    look = lab.survey(device.content)
    file = np.flatnonzero(look.files).tolist()
    for number, name in enumerate(("one", "two", "three")):
        with opened() as volume:
            volume.verb("create", name=name, message=f"snapshot {number}")
            volume.begin_serving(grow=False)
            for block in file[number * 40 : number * 40 + 60 : 2]:
                volume.write(block * BLOCK, rng.randbytes(BLOCK))
            volume.flush()
            assert volume.end_serving()
    return bytes(device.content)


def store_of(device: MemoryDevice) -> Store:
    """The store of a volume, to be changed and committed again."""
    slots = fmt.parse_pointer(Medium(device).state.pointer)
    assert slots is not None
    store = Store.load(device, slots, BLOCK)
    store.replay_log()
    engine = Volume(MemoryDevice(device.content)).require_engine()
    for level in engine.index.levels:
        store.mark_used(level.copies())
    store.mark_used(engine.history.refs_in_use())
    return store


def sealed_root(change: Callable[[Root], None]) -> MemoryDevice:
    """The volume with another root."""
    device = MemoryDevice(image())
    store = store_of(device)
    change(store.root)
    store.commit()
    return device


def sealed_sections(change: Callable[[dict[int, bytes]], None], source: bytes | None = None) -> MemoryDevice:
    """The volume with other sections in its root."""
    device = MemoryDevice(image() if source is None else source)
    store = store_of(device)
    root = store.root

    def build() -> bytes:
        sections = fmt.parse_sections(Root.build(root))
        change(sections)
        return fmt.build_sections(list(sections.items()))

    root.build = build  # type: ignore[method-assign]
    store.commit()
    return device


def sealed_blob(kind: fmt.BlobKind, key: int, content: bytes) -> MemoryDevice:
    """The volume with another blob."""
    device = MemoryDevice(image())
    store = store_of(device)
    store.write_blob(kind, key, content)
    store.commit()
    return device


def blob(kind: fmt.BlobKind, key: int = 0) -> bytes:
    """A blob of `image`."""
    return store_of(MemoryDevice(image())).read_blob(kind, key)


def lying_parts(change: Callable[[bytes], bytes], number: Callable[[int], int]) -> MemoryDevice:
    """The volume with another table of parts, and bytes flipped in both copies of the index that it is about."""
    device = MemoryDevice(image())
    store = store_of(device)
    keys = sorted(key for kind, key in store.root.blobs if kind == fmt.BlobKind.INDEX)
    key = keys[number(len(keys))]
    store.write_blob(fmt.BlobKind.INDEX_PARTS, key, change(store.read_blob(fmt.BlobKind.INDEX_PARTS, key)))
    store.commit()
    kind = (fmt.BlobKind.INDEX, fmt.BlobKind.INDEX_CRCS)[number(2)]
    for copy in range(2):
        at = number(store.blob_length(kind, key))
        block = store.physical(store.blob_blocks(kind, key, copy)[at // BLOCK :][:1])
        device.content[int(block[0]) * BLOCK + at % BLOCK] ^= 1 << number(8)
    return device


def sealed_batch(masks: list[list[int]], records: list[tuple[int, int, int, int, int]], crcs: int) -> MemoryDevice:
    """The volume with one more batch in its log: records are (block, copy, length, mask id, writes)."""
    device = MemoryDevice(image())
    store = store_of(device)
    table = np.array(records, fmt.RECORD_DTYPE)
    words = np.array(masks, np.uint64).reshape(len(masks), -1) if masks else np.zeros((0, 1), np.uint64)
    store.append_batch(words, table.tobytes(), np.zeros(crcs, np.uint32))
    return device


def sealed_slots(**fields: Any) -> MemoryDevice:
    """The volume with other fields in both slots."""
    device = MemoryDevice(image())
    store = store_of(device)
    for index in range(2):
        at = store.slot_block(index) * BLOCK
        slot = fmt.Slot.parse(device.pread(at, fmt.SLOT_BYTES))
        slot.update(fields)
        raw = bytes(fmt.Slot.build(slot))
        device.pwrite(at, raw[:-4] + fmt.crc(raw[:-4]).to_bytes(4, "little"))
    return device


def sealed_pointer(slot_a: int, slot_b: int, source: bytes | None = None) -> MemoryDevice:
    """The volume whose superblock has its slots elsewhere."""
    device = MemoryDevice(image() if source is None else source)
    device.pwrite(1024 + fmt.POINTER_OFFSET, fmt.build_pointer(slot_a, slot_b))
    return seal_superblock(device)


def seal_superblock(device: MemoryDevice) -> MemoryDevice:
    """Set the checksum of the primary superblock right."""
    raw = device.pread(1024, 1024)
    device.pwrite(1024 + 0x3FC, checksum.superblock_checksum(raw).to_bytes(4, "little"))
    return device


def sealed_superblock(source: bytes | None = None, **fields: Any) -> MemoryDevice:
    """The volume with other fields in the primary superblock."""
    device = MemoryDevice(image() if source is None else source)
    raw = device.pread(1024, 1024)
    superblock = codec.parse(Superblock, raw, "superblock")
    superblock.update(fields)
    device.pwrite(1024, codec.build(Superblock, superblock, "superblock"))
    return seal_superblock(device)


def sealed_group(number: int, source: bytes | None = None, **fields: int) -> MemoryDevice:
    """The volume with other fields in a group descriptor."""
    device = MemoryDevice(image() if source is None else source)
    fs = Filesystem.open(Overlay(Medium(device), BLOCK), writable=True)
    for name, value in fields.items():
        fs.groups._table[name][number] = value
    fs.groups.seal(np.array([number]))
    at = fs.groups._offset(number)
    device.pwrite(at, fs.groups.raw[number].tobytes())
    return device


def sealed_inode(number: int, **fields: Any) -> MemoryDevice:
    """The volume with other fields in an inode."""
    device = MemoryDevice(image())
    fs = Filesystem.open(Overlay(Medium(device), BLOCK), writable=True)
    inode = fs.inode(number)
    inode.update(fields)
    fs.write_inode(number, inode)
    block = fs.inode_offset(number) // BLOCK
    device.pwrite(block * BLOCK, fs.read_block(block))
    return device


def directory_block(device: MemoryDevice, number: int = 2) -> tuple[int, int]:
    """(block, checksum seed) of the first block of a directory."""
    fs = Filesystem.open(Medium(device))
    inode = fs.inode(number)
    seed = checksum.inode_seed(fs.geometry.checksum_seed, number, inode.i_generation)
    return int(fs.file_map(number).data[0, 1]), seed


# ---- what the commands do


def read_all(device: MemoryDevice) -> str:
    """Everything that the reading commands do; what they refuse is passed over.  Why ``list`` is, or nothing."""
    try:
        volume = Volume(device)
        volume.verb("list")
    except ExtsnapError as error:
        return str(error)
    with suppress(ExtsnapError):
        for verb, arguments in (
            ("info", {}),
            ("check", {}),
            *(("dump", {"what": what}) for what in ("header", "log", "records", "snapshots", "bitmaps")),
        ):
            with suppress(ExtsnapError):
                volume.verb(verb, **arguments)
        with suppress(ExtsnapError):
            fs = volume.filesystem()
            unlinked(fs, waiting(fs))
        for name in volume.snapshot_names():
            for verb in ("show", "layout"):
                with suppress(ExtsnapError):
                    volume.verb(verb, name=name)
            with suppress(ExtsnapError):
                for _ in volume.open_view(name).pieces():
                    pass
    return ""


def change_all(device: MemoryDevice) -> str:
    """What the writing commands do, one after the other, as far as each is not refused; why one was, or nothing."""
    refusal = ""
    for verb, arguments in (
        ("create", {"name": "new"}),
        ("restore", {"name": "one"}),
        ("delete", {"names": ["two"]}),
        ("strip", {}),
    ):
        try:
            with Volume(device, writable=True) as volume:
                volume.verb(verb, **arguments)
        except ExtsnapError as error:
            refusal = refusal or str(error)
    return refusal


def refused(device: MemoryDevice) -> str:
    """Open a volume for reading; the message with which it is refused."""
    before = bytes(device.content)
    try:
        with bounded():
            Volume(device).verb("list")
    except ExtsnapError as error:
        assert device.content == before
        return str(error)
    raise AssertionError("it was opened")


# ---- what a byte string decides


class Choices:
    """Numbers and bytes out of a byte string; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return max(0, len(self._data) - self._at)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece.ljust(count, b"\0")

    def number(self, limit: int) -> int:
        """A number below ``limit``."""
        count = (max(limit - 1, 1).bit_length() + 7) // 8
        return int.from_bytes(self.take(count), "little") % limit

    def change(self, raw: bytes) -> bytes:
        """``raw`` with one to four fields of 1 to 8 bytes replaced by numbers that hurt, or moved a little."""
        out = bytearray(raw)
        for _ in range(1 + self.number(4)):
            width = (1, 2, 4, 8)[self.number(4)]
            at = self.number(max(1, len(raw) // width)) * width
            old = int.from_bytes(out[at : at + width], "little")
            kind = self.number(6)
            if kind == 0:
                new = int.from_bytes(self.take(width), "little")
            elif kind == 1:
                new = old + self.number(256) - 128
            elif kind == 2:
                new = old ^ (1 << self.number(8 * width))
            elif kind == 3:
                new = self.number(1 << 16)
            else:
                new = ((1 << 8 * width) - 1) >> self.number(8 * width)
            out[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
        return bytes(out[: len(raw)])


def _changed_store(choose: Choices) -> MemoryDevice:
    """A root or a blob with fields changed, sealed; or the index damaged, and the table of its parts a lie."""
    what = choose.number(4)
    if what == 0:

        def change(sections: dict[int, bytes]) -> None:
            kinds = sorted(sections)
            kind = kinds[choose.number(len(kinds))]
            if choose.number(16) == 0:
                del sections[kind]
            else:
                sections[kind] = choose.change(sections[kind])

        return sealed_sections(change)
    device = MemoryDevice(image())
    store = store_of(device)
    if what == 1:
        keys = sorted(store.root.blobs)
        kind, key = keys[choose.number(len(keys))]
        content = choose.change(store.read_blob(fmt.BlobKind(kind), key))
        if choose.number(8) == 0:
            content = content[: choose.number(len(content) + 1)]
        store.write_blob(fmt.BlobKind(kind), key, content)
        store.commit()
        return device
    if what == 3:
        return lying_parts(choose.change, choose.number)
    fields = ["generation", "block_size", "flags", "root_block", "root_blocks", "root_bytes"]
    name = fields[choose.number(len(fields))]
    return sealed_slots(
        **{name: choose.number(1 << (64 if name in ("generation", "root_block", "root_bytes") else 32))}
    )


def _changed_filesystem(choose: Choices) -> MemoryDevice:
    """A superblock, descriptor, inode or directory with fields changed, sealed."""
    device = MemoryDevice(image())
    what = choose.number(4)
    if what == 0:
        device.pwrite(1024, choose.change(device.pread(1024, 1020)))
        return seal_superblock(device)
    fs = Filesystem.open(Medium(device))
    if what == 1:
        number = choose.number(fs.geometry.groups)
        at = fs.groups._offset(number)
        fs.groups.raw[number] = np.frombuffer(choose.change(fs.groups.raw[number].tobytes()), np.uint8)
        fs.groups.seal(np.array([number]))
        device.pwrite(at, fs.groups.raw[number].tobytes())
        return device
    store = store_of(device)
    numbers = (2, 8, store.root.store_inode, store.root.directory_inode)
    if what == 2:
        number = numbers[choose.number(len(numbers))]
        overlay = Filesystem.open(Overlay(Medium(device), BLOCK), writable=True)
        at = fs.inode_offset(number)
        size = fs.geometry.inode_size
        raw = choose.change(device.pread(at, size))
        overlay.write_inode(number, codec.parse(inode_struct(size), raw, "inode"))
        device.pwrite(at // BLOCK * BLOCK, overlay.read_block(at // BLOCK))
        return device
    number = (2, store.root.directory_inode)[choose.number(2)]
    block, seed = directory_block(device, number)
    raw = choose.change(device.pread(block * BLOCK, BLOCK))
    with suppress(ExtsnapError):
        from extsnap.ondisk.directory import leaf_with_checksum

        raw = leaf_with_checksum(seed, raw)
    device.pwrite(block * BLOCK, raw)
    return device


@functools.cache
def fixture_names() -> list[str]:
    """The small real images that are odd in one way."""
    return sorted(path.name.removesuffix(".img.gz") for path in FIXTURES.glob("*.img.gz"))


@functools.cache
def fixture(name: str) -> bytes:
    """One of them."""
    return gzip.decompress((FIXTURES / f"{name}.img.gz").read_bytes())


def _changed_fixture(choose: Choices) -> MemoryDevice:
    """A small real image with a field changed in one of its first blocks, or in the journal's; superblock sealed."""
    names = fixture_names()
    device = MemoryDevice(fixture(names[choose.number(len(names))]))
    if choose.number(4) == 0:
        return device
    blocks = list(range(2, 256))
    with suppress(ExtsnapError):
        journal = Filesystem.open(Medium(device)).journal
        if journal is not None:
            blocks += [journal.superblock_block, *range(journal.data_runs[0, 0], journal.data_runs[0, 0] + 16)]
    at = blocks[choose.number(len(blocks))] * BLOCK
    device.pwrite(at, choose.change(device.pread(at, BLOCK)))
    if choose.number(2):
        device.pwrite(1024, choose.change(device.pread(1024, 1020)))
    return seal_superblock(device) if checksum_of_superblock(device) else device


def checksum_of_superblock(device: MemoryDevice) -> bool:
    """Whether the primary superblock has a checksum (s_feature_ro_compat says metadata_csum)."""
    return bool(int.from_bytes(device.pread(1024 + 0x64, 4), "little") & 0x400)


#: What the targets `volume` and `commands` change.
_CHANGED = (_changed_store, _changed_filesystem, _changed_fixture)


def _volume(data: bytes) -> str:
    """`Volume` and the reading verbs over a volume with sealed changes; why it is refused, or nothing."""
    choose = Choices(data)
    try:
        device = _CHANGED[choose.number(len(_CHANGED))](choose)
    except (ExtsnapError, AssertionError):
        return ""  # cannot be sealed: not a case
    before = bytes(device.content)
    refusal = read_all(device)
    assert device.content == before, "a reading command wrote"
    return refusal


def _commands(data: bytes) -> str:
    """The same with the writing verbs."""
    choose = Choices(data)
    try:
        device = _CHANGED[choose.number(len(_CHANGED))](choose)
    except (ExtsnapError, AssertionError):
        return ""
    return change_all(device)


def _parsers(data: bytes) -> str:
    """Every parser over the bytes themselves; what one refuses them with, or nothing."""
    choose = Choices(data)
    which = choose.number(len(PARSERS))
    features = 0
    if PARSERS[which] in ("tags", "revoked"):
        features = LAYOUTS[choose.number(len(LAYOUTS))]
    raw = choose.take(choose.left)
    device = MemoryDevice(raw.ljust(4096, b"\0"))

    def read(blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        rows = [(raw * (BLOCK // max(1, len(raw)) + 1))[:BLOCK] if raw else bytes(BLOCK) for _ in blocks]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(blocks), BLOCK)

    parsers: tuple[Callable[[], Any], ...] = (
        lambda: read_table(device),
        lambda: recognise(device),
        lambda: codec.parse(Superblock, raw[:1024], "superblock"),
        lambda: codec.parse(GroupDescriptor64, raw[:64], "group"),
        lambda: codec.parse(inode_struct(256), raw[:256], "inode"),
        lambda: parse_extents(raw[:60].ljust(60, b"\0"), read, 4096, None),
        lambda: parse_indirect(raw[:60].ljust(60, b"\0"), read, 4096, BLOCK),
        lambda: parse_block(raw, True),
        lambda: fmt.parse_sections(raw),
        lambda: fmt.parse_snapshots(raw),
        lambda: MaskTable.parse(raw),
        lambda: list(entries(Filesystem.open(device), 2)),
        lambda: journal_tags.parse_tags(raw.ljust(BLOCK, b"\0"), features),
        lambda: journal_tags.parse_revoked(raw.ljust(BLOCK, b"\0"), features),
    )
    assert len(parsers) == len(PARSERS)
    try:
        parsers[which]()
    except ExtsnapError as error:
        return str(error)
    return ""


#: The parsers by the first byte of what the target `parsers` gets.
PARSERS = (
    "partitions",
    "recognise",
    "superblock",
    "group",
    "inode",
    "extents",
    "indirect",
    "directory",
    "sections",
    "snapshots",
    "masks",
    "volume",
    "tags",
    "revoked",
)
#: s_feature_incompat of the journals that there are: each layout of a tag.
LAYOUTS = (
    0,
    JournalIncompat.BIT64,
    JournalIncompat.CSUM_V2,
    JournalIncompat.CSUM_V2 | JournalIncompat.BIT64,
    JournalIncompat.CSUM_V3,
    JournalIncompat.CSUM_V3 | JournalIncompat.BIT64,
)


def _log(data: bytes) -> str:
    """A log that lies, its checksums right, and what a replay makes of it: what it is refused with, or nothing."""
    choose = Choices(data)
    device = MemoryDevice(lab.plain_image("ext4"))
    fs = Filesystem.open(Medium(device))
    journal = fs.journal
    assert journal is not None
    features = LAYOUTS[choose.number(len(LAYOUTS))] | JournalIncompat.REVOKE
    first = int(journal.superblock.s_first)
    log_blocks = np.concatenate([np.arange(start, start + count) for start, count in journal.data_runs.tolist()])
    sequence = (0, 1, 100, 0xFFFFFFFE)[choose.number(4)]
    start = first + (0 if choose.number(4) else len(log_blocks) - 1 - choose.number(8))
    sb = journal.superblock.copy()
    sb.s_sequence, sb.s_start, sb.s_feature_incompat = sequence, start, features
    raw = codec.build(JournalSuperblock, sb, "journal superblock")
    if not choose.number(8):
        raw = choose.change(raw)
    if int(features) & (JournalIncompat.CSUM_V2 | JournalIncompat.CSUM_V3):
        raw = raw[:0xFC] + checksum.journal_superblock_checksum(raw).to_bytes(4, "big") + raw[0x100:]
    device.pwrite(journal.superblock_block * BLOCK, raw + journal.block[JOURNAL_SUPERBLOCK:])
    at, seed = start, checksum.crc32c_raw(0xFFFFFFFF, journal.superblock.s_uuid)
    for _ in range(1 + choose.number(24)):
        kind = (BlockType.DESCRIPTOR, BlockType.REVOKE, BlockType.COMMIT, 0, 7)[choose.number(5)]
        block = journal_tags.HEADER.pack(0xC03B3998, kind, sequence) + bytes(BLOCK - journal_tags.HEADER.size)
        size = choose.number(BLOCK // 4)
        if kind in (BlockType.DESCRIPTOR, BlockType.REVOKE):
            block = block[:12] + choose.take(size).ljust(BLOCK - 12, b"\0")
        if not kind:
            block = choose.take(size).ljust(BLOCK, b"\0")  # content of what a descriptor names
        elif choose.number(16):
            where = slice(16, 20) if kind == BlockType.COMMIT else slice(BLOCK - 4, BLOCK)
            sealed = block[: where.start] + bytes(4) + block[where.stop :]
            value = checksum.crc32c_raw(seed, sealed).to_bytes(4, "big")
            block = block[: where.start] + value + block[where.stop :]
        device.pwrite(int(log_blocks[(at - first) % len(log_blocks)]) * BLOCK, block)
        at += 1
        if kind == BlockType.COMMIT:
            sequence = (sequence + 1 + (choose.number(3) if not choose.number(16) else 0)) & 0xFFFFFFFF
    superblock = codec.parse(Superblock, device.pread(1024, 1024), "superblock")
    superblock.s_feature_incompat |= Incompat.needs_recovery
    device.pwrite(1024, codec.build(Superblock, superblock, "superblock"))
    overlay = Overlay(Medium(seal_superblock(device)), BLOCK)
    try:
        log.replay(Filesystem.open(overlay, writable=True, lenient=True))
        log.recovered(Filesystem.open(overlay, writable=True))
    except ExtsnapError as error:
        return str(error)
    return ""


class _FuseVolume:
    """What the FUSE target serves."""

    def __init__(self) -> None:
        self.data = bytearray(1 << 16)

    @property
    def size(self) -> int:
        return len(self.data)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= offset + len(buffer) <= self.size, (offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        assert 0 <= offset <= offset + len(data) <= self.size, (offset, len(data))
        self.data[offset : offset + len(data)] = data

    def write_many(self, writes: Pieces) -> bool:
        for offset, data in writes:
            self.write(offset, data)
        return True

    @property
    def holds(self) -> bool:
        return True

    def let_out(self) -> None:
        """Nothing is held."""

    def punch(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size, (offset, length)
        self.data[offset : offset + length] = bytes(length)

    def where(self, offset: int, length: int) -> None:
        """It stands in no file."""

    def grow(self, size: int) -> None:
        raise OSError(errno.ENOSPC, "fixed")

    def flush(self) -> None:
        pass

    def snapshot_names(self) -> list[str]:
        return ["one"]

    def open_view(self, name: str) -> Any:
        return _FuseView()


class _FuseView:
    size = 8192
    id = 7

    def readinto(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= offset + len(buffer) <= self.size, (offset, len(buffer))
        buffer[:] = bytes(len(buffer))

    def close(self) -> None:
        pass


#: Length (to be filled in), opcode, node, and what follows in a request that makes sense.
_REQUESTS = (
    (fuse.INIT, 0, fuse.INIT_IN.pack(7, 38, 1 << 17, 0xFFFFFFFF)),
    (fuse.LOOKUP, 1, b"snapshots\0"),
    (fuse.LOOKUP, 3, b"one\0"),
    (fuse.OPEN, 2, fuse.OPEN_IN.pack(os.O_RDWR, 0)),
    (fuse.OPEN, 16 + 7, fuse.OPEN_IN.pack(os.O_RDONLY, 0)),
    (fuse.READ, 2, fuse.IO_IN.pack(0, 4096, 4096, 0, 0, 0, 0)),
    (fuse.WRITE, 2, fuse.IO_IN.pack(0, 4096, 16, 0, 0, 0, 0) + bytes(16)),
    (fuse.FALLOCATE, 2, fuse.FALLOCATE_IN.pack(0, 0, 4096, 3, 0)),
    (fuse.GETATTR, 2, bytes(16)),
    (fuse.SETATTR, 2, fuse.SETATTR_IN.pack(8, 0, 0, 1 << 16, *([0] * 12))),
    (fuse.OPENDIR, 3, fuse.OPEN_IN.pack(0, 0)),
    (fuse.READDIR, 3, fuse.IO_IN.pack(1, 0, 4096, 0, 0, 0, 0)),
    (fuse.RELEASE, 2, fuse.RELEASE_IN.pack(0, 0, 0, 0)),
    (fuse.BATCH_FORGET, 0, struct.pack("=II", 2, 0) + fuse.FORGET_ONE.pack(23, 1) * 2),
    (fuse.FORGET, 23, fuse.FORGET_IN.pack(1)),
    (fuse.STATFS, 1, b""),
)


def _packets(choose: Choices) -> Iterator[bytes]:
    """The bytes as they are, packet after packet, each with its length in front; or requests of ours, changed."""
    if choose.number(2):
        while choose.left:
            size = choose.take(4)
            yield size + choose.take(min(choose.left, max(0, int.from_bytes(size, "little") - 4)))
        return
    for _ in range(1 + choose.number(24)):
        opcode, node, body = _REQUESTS[choose.number(len(_REQUESTS))]
        packet = fuse.IN_HEADER.pack(fuse.IN_HEADER.size + len(body), opcode, 2, node, 0, 0, 1, 0, 0) + body
        if choose.number(3):
            size = packet[:4]
            packet = choose.change(packet)
            packet = size + packet[4:] if choose.number(4) else packet
        yield packet[: max(1, len(packet) - (choose.number(8) if not choose.number(16) else 0))]


def _fuse(data: bytes) -> None:
    """Messages as the kernel sends them, some changed: an error of ours is never anything but a refusal."""
    choose = Choices(data)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said: list[str] = []
    with ours, theirs:
        theirs.setblocking(False)
        ours.setblocking(False)
        files = fuse.FuseFiles(theirs.fileno(), _FuseVolume(), log=said.append, max_write=1 << 16)  # type: ignore[arg-type]
        files._note = said.append  # type: ignore[method-assign,assignment]
        waiting = 0
        for packet in _packets(choose):
            ours.send(packet)
            waiting += 1
            if waiting < 3 and choose.number(3):
                continue
            while served := files.serve_some():
                waiting -= served
            assert not waiting
            with suppress(BlockingIOError):
                while True:
                    reply = ours.recv(1 << 18)
                    assert int.from_bytes(reply[:4], "little") == len(reply)
        files.close()
    wrong = [line for line in said if line.split(" failed: ")[-1].split(":")[0].endswith("Error")]
    assert not [line for line in wrong if "OSError" not in line], wrong


def _control(data: bytes) -> None:
    """What a client and a server may send to each other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    choose = Choices(data)
    as_server = choose.number(2)
    sent = choose.take(min(choose.left, 1 << 16))
    with ours, theirs:
        ours.setblocking(False)
        with suppress(BlockingIOError):
            ours.send(sent + b"\n")
        ours.shutdown(socket.SHUT_WR)
        if as_server:
            connection = control.Connection(theirs)
            with suppress(ExtsnapError):
                while connection.receive():
                    while connection.has_request:
                        verb, arguments = connection.request()
                        connection.answer({"verb": verb, "arguments": arguments})
                        connection.drain(0)
                    with suppress(BlockingIOError):
                        while ours.recv(1 << 16):
                            pass
        else:
            client = control.ControlClient(theirs)
            with suppress(ExtsnapError, OSError):
                while True:
                    client.receive()


TARGETS: dict[str, Callable[[bytes], str | None]] = {
    "parsers": _parsers,
    "log": _log,
    "volume": _volume,
    "commands": _commands,
    "fuse": _fuse,
    "control": _control,
}


def ending(target: str, data: bytes) -> str:
    """How a seed ends, as the README of the seeds has it."""
    said = TARGETS[target](data)
    if target in ("volume", "commands"):
        return "refused" if said else "done"
    return "" if said is None else said or "read"


def seeds(target: str = "*") -> list[Path]:
    """What the fuzzer begins with, as ``tests/fixtures/seeds/TARGET/NAME``."""
    return sorted(path for path in SEEDS.glob(f"{target}/*") if path.parent.name in TARGETS)


def scratch_file(content: bytes) -> str:
    """A temporary file with this content; the caller removes it."""
    descriptor, path = tempfile.mkstemp(prefix="extsnap-hostile-", suffix=".img")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return path


def stored() -> list[Path]:
    """What the fuzzer found, as ``tests/fixtures/fuzz/TARGET/NAME``."""
    return sorted(path for path in FOUND.glob("*/*") if path.parent.name in TARGETS)
