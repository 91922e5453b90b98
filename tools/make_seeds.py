"""Make what the fuzzer begins with: ``tests/fixtures/seeds/TARGET/NAME``, each odd in one way, and the README there.

A seed is what a target of `tests/hostile.py` takes: the bytes of a structure behind the number of its parser, packets
and lines as they are on a connection, or which field of a volume gets which value.  The structures are those of small
volumes that mke2fs and extsnap made, so they are kept in the repository and made anew on purpose only.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import disks  # noqa: E402
import hostile  # noqa: E402
import lab  # noqa: E402
from hostile import LAYOUTS, PARSERS  # noqa: E402
from lab import BLOCK, MemoryDevice  # noqa: E402

from extsnap.ext.filesystem import Filesystem  # noqa: E402
from extsnap.ondisk.journal import MAGIC  # noqa: E402
from extsnap.ondisk.journal_tags import BlockType, TagFlags  # noqa: E402
from extsnap.serve import fuse  # noqa: E402
from extsnap.snapshot import format as fmt  # noqa: E402

Seed = tuple[str, str, str, bytes]
ALL_ONES = (1 << 64) - 1


class Script:
    """The bytes that lead `hostile.Choices` to the given choices."""

    def __init__(self) -> None:
        self.raw = b""

    def number(self, value: int, limit: int) -> Script:
        """What ``number(limit)`` gives back."""
        assert 0 <= value < limit, (value, limit)
        self.raw += value.to_bytes((max(limit - 1, 1).bit_length() + 7) // 8, "little")
        return self

    def put(self, offset: int, width: int, value: int, size: int) -> Script:
        """``change`` of ``size`` bytes gives one field of them this value."""
        assert offset % width == 0, "a field is changed at a multiple of its width"
        self.number(0, 4).number((1, 2, 4, 8).index(width), 4).number(offset // width, max(1, size // width))
        self.number(0, 6).raw += (value % (1 << 8 * width)).to_bytes(width, "little")
        return self


def parsers() -> Iterator[Seed]:
    """A structure behind the number of its parser."""
    raw = hostile.image()
    ext2 = lab.plain_image("ext2")
    fs = Filesystem.open(MemoryDevice(ext2))

    def seed(parser: str, name: str, odd: str, content: bytes, layout: int | None = None) -> Seed:
        head = bytes([PARSERS.index(parser)]) + (b"" if layout is None else bytes([layout]))
        return "parsers", f"{parser}-{name}", odd, head + content

    record = disks.boot_record([(disks.LINUX, 2048, 4096), (disks.EXTENDED, 8192, 4096)])
    yield seed("partitions", "mbr", "a partition and an extended one behind the end of the device", record)
    loop = disks.boot_record([(disks.EXTENDED, 1, 7)])
    yield seed("partitions", "chain-in-circles", "an extended partition whose table names itself", loop + loop * 3)
    table = disks.gpt(4096, [(1, 1536, 512)], entries=4)
    image = bytearray(4096)
    for at, piece in table.items():
        image[at : at + len(piece)] = piece
    yield seed("partitions", "gpt", "a GPT of four entries on a disk of eight sectors", bytes(image))
    image[512 + 80 : 512 + 84] = b"\xff" * 4
    yield seed("partitions", "gpt-of-all-entries", "2^32 - 1 entries, the header's checksum wrong", bytes(image))
    for name, odd, content in (
        ("qcow2", "the head of a qcow2 image", b"QFI\xfb" + bytes(508)),
        ("xfs", "the head of an xfs volume", b"XFSB" + bytes(508)),
        ("gzip", "the head of a compressed file", b"\x1f\x8b\x08" + bytes(509)),
        ("luks", "the head of an encrypted volume", b"LUKS\xba\xbe\0\2" + bytes(504)),
    ):
        yield seed("recognise", name, odd, content)
    for kind in ("ext2", "ext4"):
        content = lab.plain_image(kind)[1024:2048]
        yield seed("superblock", kind, f"of a volume as mke2fs makes it, {kind}", content)
    yield seed("superblock", "short", "ends in its middle", raw[1024:1536])
    yield seed("group", "first", "of a volume with snapshots", raw[2048:2112])
    at = hostile.store_of(MemoryDevice(raw)).root.store_inode
    ext4 = Filesystem.open(MemoryDevice(raw))
    where = ext4.inode_offset(at)
    inode = raw[where : where + 256]
    yield seed("inode", "store", "the store's, immutable", inode)
    yield seed("extents", "store", "the store's extents", inode[40:100])
    head = struct.pack("<HHHHI", 0xF30A, 1, 4, 1, 0)
    yield seed(
        "extents", "in-circles", "a root that names a node that is this root", head + struct.pack("<IIHH", 0, 9, 0, 0)
    )
    two = (
        struct.pack("<HHHHI", 0xF30A, 2, 4, 0, 0)
        + struct.pack("<IHHI", 0, 10, 0, 100)
        + struct.pack("<IHHI", 10, 10, 0, 105)
    )
    yield seed("extents", "same-blocks", "two extents share blocks", two)
    deep = struct.pack("<HHHHI", 0xF30A, 4, 4, 9, 0) + bytes(48)
    yield seed("extents", "too-deep", "a depth of nine", deep)
    past = struct.pack("<HHHHI", 0xF30A, 1, 4, 0, 0) + struct.pack("<IHHI", 0xFFFFFFFF, 32768, 0xFFFF, 0xFFFFFFFF)
    yield seed("extents", "past-the-end", "an extent past the end of all files", past)
    number = fs.lookup("/f5")
    assert number is not None
    where = fs.inode_offset(number)
    yield seed(
        "indirect",
        "file",
        "of a file of 800 blocks, whose indirect blocks are one and the same here",
        ext2[where + 40 : where + 100],
    )
    yield seed(
        "indirect",
        "in-circles",
        "all three indirect blocks are one that names itself",
        struct.pack("<15I", *([7] * 15)),
    )
    yield seed("indirect", "outside", "blocks outside the volume", b"\xff" * 60)
    block, _ = hostile.directory_block(MemoryDevice(raw))
    leaf = raw[block * BLOCK : (block + 1) * BLOCK]
    yield seed("directory", "root", "a root directory with the store's", leaf)
    yield seed("directory", "without-progress", "an entry of length 0", leaf[:16] + bytes(2) + leaf[18:])
    yield seed("directory", "name-past-the-end", "a name longer than its entry", leaf[:18] + b"\xff" + leaf[19:])
    yield seed("directory", "escapes", "a name that drives a terminal", leaf[:20] + b"\x1b[2J" + leaf[24:])
    tree = hostile.fixture("ext4-kernel-hash-tree")
    block = int(Filesystem.open(MemoryDevice(tree)).file_map(2).data[0, 1])
    yield seed(
        "directory", "hash-tree", "the root of a hash tree, which is no leaf", tree[block * BLOCK : (block + 1) * BLOCK]
    )
    root = hostile.store_of(MemoryDevice(raw)).root.build()
    yield seed("sections", "root", "of a volume with three snapshots", root)
    section = struct.pack("<IIQQ", fmt.Section.LOG, 0, 8, 0)
    yield seed("sections", "twice", "a section stands twice", section + section)
    yield seed("sections", "too-long", "a section of 2^64 - 1 bytes", root[:8] + b"\xff" * 8)
    yield seed("sections", "cut", "a header that is cut off", root[:12])
    table_raw = hostile.blob(fmt.BlobKind.SNAPSHOTS)
    yield seed("snapshots", "three", "three snapshots", table_raw)
    yield seed("snapshots", "no-state", "a state that there is not", table_raw[:14] + b"\x09" + table_raw[15:])
    yield seed("snapshots", "not-utf-8", "a name that is no UTF-8", table_raw.replace(b"one", b"\xff\xfe\xfd"))
    yield seed("snapshots", "cut", "an entry that is cut off", table_raw[:-3])
    masks = hostile.blob(fmt.BlobKind.MASKS)
    yield seed("masks", "table", "of a volume with three snapshots", masks)
    yield seed("masks", "of-no-words", "masks of no words", bytes(8) + masks[8:])
    yield seed("masks", "of-all-words", "masks of 2^64 - 1 words", b"\xff" * 8 + masks[8:])
    yield seed("volume", "first-blocks", "nothing but the first blocks of a volume", raw[:4000])
    uuid = bytes(16)
    for layout, (features, tag) in enumerate(
        zip(LAYOUTS, (">IHH", ">IHHI", ">IHHH", ">IHHIH", ">IIII", ">IIII"), strict=True)
    ):
        size = len(struct.unpack(tag, bytes(struct.calcsize(tag))))

        def one(block: int, flags: int, tag: str = tag, size: int = size) -> bytes:
            fields = [block, flags, 0, 0] if tag == ">IIII" else [block, 0, flags, *([0] * (size - 3))]
            return struct.pack(tag, *fields)

        head = struct.pack(">III", MAGIC, BlockType.DESCRIPTOR, 1)
        content = (
            head + one(100, 0) + uuid + one(101, TagFlags.SAME_UUID) + one(102, TagFlags.SAME_UUID | TagFlags.LAST_TAG)
        )
        yield seed("tags", f"layout-{layout}", f"three tags; s_feature_incompat {int(features):#x}", content, layout)
    head = struct.pack(">III", MAGIC, BlockType.DESCRIPTOR, 1)
    yield seed("tags", "without-end", "no tag is the last one, each has a UUID", head + bytes(BLOCK - 12), 5)
    endless = head + struct.pack(">IHH", 9, 0, TagFlags.SAME_UUID) * 127
    yield seed("tags", "to-the-last-byte", "tags to the end of the block, none the last", endless[:BLOCK], 0)
    revoke = struct.pack(">III", MAGIC, BlockType.REVOKE, 1)
    yield seed("revoked", "two", "two blocks", revoke + struct.pack(">IQQ", 32, 100, 1 << 40), 5)
    yield seed("revoked", "too-many", "2^32 - 1 bytes of them", revoke + b"\xff" * 4 + struct.pack(">II", 7, 8), 0)
    yield seed("revoked", "less-than-none", "fewer bytes than its own header has", revoke + bytes(4), 2)


class Log:
    """The script of a log, as `hostile.TARGETS["log"]` takes it."""

    def __init__(self, layout: int, sequence: int = 1, start: int | None = None, blocks: int = 1) -> None:
        self.script = Script().number(layout, len(LAYOUTS)).number((0, 1, 100, 0xFFFFFFFE).index(sequence), 4)
        self.script.number(int(start is None), 4)
        if start is not None:
            self.script.number(start, 8)
        self.script.number(1, 8)  # the superblock as it is
        self.script.number(blocks - 1, 24)

    def block(self, kind: int, content: bytes = b"", *, sealed: bool = True, ahead: int | None = None) -> Log:
        """One more block: its kind, what is behind its header (all of it for content)."""
        self.script.number((BlockType.DESCRIPTOR, BlockType.REVOKE, BlockType.COMMIT, 0, 7).index(kind), 5)
        self.script.number(len(content), BLOCK // 4)
        if kind in (BlockType.DESCRIPTOR, BlockType.REVOKE, 0):
            self.script.raw += content
        if kind:
            self.script.number(int(sealed), 16)
        if kind == BlockType.COMMIT:
            self.script.number(int(ahead is None), 16)
            if ahead is not None:
                self.script.number(ahead, 3)
        return self


def logs() -> Iterator[Seed]:
    """Logs that a replay takes, and such that it refuses."""
    last, same = TagFlags.LAST_TAG, TagFlags.SAME_UUID
    tag = struct.pack(">IHH", 3000, 0, last) + bytes(16)
    checked = struct.pack(">IIII", 3000, last, 0, 0) + bytes(16)
    descriptor, revoke, commit = BlockType.DESCRIPTOR, BlockType.REVOKE, BlockType.COMMIT

    def seed(name: str, odd: str, log: Log) -> Seed:
        return "log", name, odd, log.script.raw

    yield seed(
        "one-transaction",
        "one block, committed",
        Log(0, blocks=3).block(descriptor, tag).block(0, b"\x55" * 200).block(commit),
    )
    yield seed(
        "not-committed", "a transaction without a commit", Log(0, blocks=2).block(descriptor, tag).block(0, b"\x55")
    )
    around = Log(0, sequence=0xFFFFFFFE, start=1, blocks=9)
    for _ in range(3):
        around.block(descriptor, tag).block(0, b"\x66").block(commit)
    yield seed("around-both-ends", "sequences pass 2^32 and blocks the end of the log", around)
    yield seed(
        "wrong-content",
        "content that does not have its tag's checksum",
        Log(4, blocks=3).block(descriptor, checked).block(0, b"\x55").block(commit),
    )
    yield seed(
        "torn-descriptor",
        "a committed descriptor with a wrong checksum",
        Log(4, blocks=3).block(descriptor, checked, sealed=False).block(0, b"").block(commit),
    )
    yield seed(
        "torn-commit",
        "a commit with a wrong checksum, and nothing behind it",
        Log(4, blocks=3).block(descriptor, checked).block(0, b"").block(commit, sealed=False),
    )
    followed = Log(4, blocks=4).block(descriptor, checked).block(0, b"").block(commit, sealed=False).block(commit)
    yield seed("torn-commit-inside", "a commit with a wrong checksum, and one behind it", followed)
    outside = struct.pack(">IHHI", 1, 0, last, 0xFFFF) + bytes(16)
    yield seed(
        "outside", "a block outside the volume", Log(1, blocks=3).block(descriptor, outside).block(0, b"").block(commit)
    )
    yield seed(
        "superblock",
        "overwrites the superblock",
        Log(0, blocks=3).block(descriptor, struct.pack(">IHH", 1, 0, last)).block(0, b"\xff" * 255).block(commit),
    )
    yield seed(
        "revoked",
        "a block that is revoked afterwards",
        Log(0, blocks=4)
        .block(descriptor, tag)
        .block(0, b"\x55")
        .block(revoke, struct.pack(">II", 20, 3000))
        .block(commit),
    )
    many = b"".join(struct.pack(">IHH", 3000 + at, 0, same) for at in range(31))
    yield seed(
        "more-tags-than-log",
        "descriptors that name more blocks than the log has",
        Log(0, start=7, blocks=2).block(descriptor, many).block(commit),
    )
    yield seed(
        "skipped-sequence",
        "a commit after which the next sequence is two ahead",
        Log(0, blocks=4).block(commit, ahead=1).block(descriptor, tag).block(0, b"").block(commit),
    )
    yield seed("unknown-kind", "a block of a kind that there is not", Log(0, blocks=2).block(7).block(commit))


def volumes() -> Iterator[tuple[str, str, bytes]]:
    """Which field of a volume gets which value: (name, what is odd, script)."""
    store = hostile.store_of(MemoryDevice(hostile.image()))
    sections = fmt.parse_sections(store.root.build())
    changes = 3
    keys_of_index = sorted(key for kind, key in store.root.blobs if kind == fmt.BlobKind.INDEX)

    def section(kind: fmt.Section, offset: int, width: int, value: int) -> bytes:
        script = Script().number(0, changes).number(0, 4).number(sorted(sections).index(kind), len(sections))
        return script.number(1, 16).put(offset, width, value, len(sections[kind])).raw

    def blob(kind: fmt.BlobKind, offset: int, width: int, value: int) -> bytes:
        keys = sorted(store.root.blobs)
        key = next(name for name in keys if name[0] == kind)
        size = len(store.read_blob(kind, key[1]))
        script = Script().number(0, changes).number(1, 4).number(keys.index(key), len(keys))
        return script.put(offset, width, value, size).number(1, 8).raw

    def slot(field: str, value: int) -> bytes:
        fields = ["generation", "block_size", "flags", "root_block", "root_blocks", "root_bytes"]
        limit = 1 << (64 if field in ("generation", "root_block", "root_bytes") else 32)
        return (
            Script().number(0, changes).number(2, 4).number(fields.index(field), len(fields)).number(value, limit).raw
        )

    def filesystem(what: int, offset: int, width: int, value: int, size: int, *numbers: tuple[int, int]) -> bytes:
        script = Script().number(1, changes).number(what, 4)
        for number in numbers:
            script.number(*number)
        return script.put(offset, width, value, size).raw

    yield "extents-outside", "the store's first extent lies at block 2^40", section(fmt.Section.EXTENTS, 8, 8, 1 << 40)
    yield "extents-of-nothing", "the store's first extent has no blocks", section(fmt.Section.EXTENTS, 16, 8, 0)
    yield "extents-at-the-superblock", "the store's first extent lies at block 1", section(fmt.Section.EXTENTS, 8, 8, 1)
    yield "log-of-everything", "a log of 2^40 blocks", section(fmt.Section.LOG, 16, 8, 1 << 40)
    yield "all-bits", "every bit of the counting bitmap is set", section(fmt.Section.COUNTING_BITMAP, 0, 8, ALL_ONES)
    yield "blob-of-everything", "the snapshot table has 2^63 bytes", section(fmt.Section.BLOBS, 8, 8, 1 << 63)
    yield "runs-outside", "the snapshot table lies outside the store", section(fmt.Section.BLOB_RUNS, 0, 8, 1 << 50)
    yield (
        "twin-in-the-log",
        "the second copy of the snapshot table is in the log",
        section(fmt.Section.TWIN_RUNS, 0, 8, 3),
    )
    yield "store-is-the-root", "the store is the root directory", section(fmt.Section.PLACE, 4, 4, 2)
    yield "superblock-anywhere", "a superblock of 2^62", section(fmt.Section.SUPERBLOCKS, 0, 8, 1 << 62)
    yield "snapshot-of-an-exabyte", "a snapshot of 2^60 bytes", blob(fmt.BlobKind.SNAPSHOTS, 24, 8, 1 << 60)
    yield "snapshot-without-a-bit", "a snapshot with bit 2^31", blob(fmt.BlobKind.SNAPSHOTS, 8, 4, 1 << 31)
    yield "record-of-all-blocks", "a record of 2^32 - 1 blocks", blob(fmt.BlobKind.INDEX, 16, 4, 0xFFFFFFFF)
    yield "record-of-another-mask", "a record with mask 2^31", blob(fmt.BlobKind.INDEX, 20, 4, 1 << 31)
    yield "copy-outside", "a record whose copy lies at block 2^62", blob(fmt.BlobKind.INDEX, 8, 8, 1 << 62)
    yield "copy-of-itself", "a record whose copy is the header", blob(fmt.BlobKind.INDEX, 8, 8, 0)
    yield "masks-of-nothing", "masks of no words", blob(fmt.BlobKind.MASKS, 0, 8, 0)
    yield "bitmap-outside", "a preserved bitmap at block 2^60", blob(fmt.BlobKind.HISTORY, 8, 8, 1 << 60)
    yield "row-outside", "a preserved bitmap of row 2^31", blob(fmt.BlobKind.HISTORY, 16, 4, 1 << 31)
    size = len(hostile.blob(fmt.BlobKind.INDEX_PARTS, keys_of_index[0]))
    for name, odd, offset, width, value in (
        ("parts-of-nothing", "a damaged index whose parts have no records", 12, 4, 0),
        ("parts-of-everything", "a damaged index with one part of 2^32 - 1 records", 12, 4, 0xFFFFFFFF),
        ("parts-of-all-masks", "a damaged index whose parts have masks of 2^32 - 1 words", 8, 4, 0xFFFFFFFF),
        ("parts-outside", "a damaged index with a part that begins at block 2^64 - 1", 16, 8, ALL_ONES),
        ("parts-of-all-blocks", "a damaged index with a part that ends at block 2^64 - 1", 24, 8, ALL_ONES),
    ):
        script = Script().number(0, changes).number(3, 4).number(0, len(keys_of_index))
        yield name, odd, script.put(offset, width, value, size).raw + bytes(16)
    yield "root-nowhere", "a header whose root is at block 0", slot("root_block", 0)
    yield "root-of-an-exabyte", "a header whose root has 2^60 bytes", slot("root_bytes", 1 << 60)
    yield "root-of-all-blocks", "a header whose root has 2^32 - 1 blocks", slot("root_blocks", 0xFFFFFFFF)
    yield "blocks-without-size", "s_log_block_size of 63", filesystem(0, 24, 4, 63, 1020)
    yield "groups-without-inodes", "s_inodes_per_group of 0", filesystem(0, 40, 4, 0, 1020)
    yield "blocks-without-end", "s_blocks_count of 2^32 - 1", filesystem(0, 4, 4, 0xFFFFFFFF, 1020)
    yield "inodes-of-a-byte", "s_inode_size of 1", filesystem(0, 88, 2, 1, 1020)
    yield "bitmap-at-0", "a group whose block bitmap is block 0", filesystem(1, 0, 4, 0, 64, (1, 4))
    yield "journal-of-an-exabyte", "a journal of 2^60 bytes", filesystem(2, 108, 4, 1 << 28, 256, (1, 4))
    yield "store-too-deep", "the store's extent tree is nine deep", filesystem(2, 46, 2, 9, 256, (2, 4))
    yield "entry-of-nothing", "an entry of the root directory has no length", filesystem(3, 16, 2, 0, BLOCK, (0, 2))
    names = hostile.fixture_names()
    for number, name in enumerate(names):
        yield (
            name,
            f"the image {name}, as it is",
            Script().number(2, changes).number(number, len(names)).number(0, 4).raw,
        )


def packets() -> Iterator[Seed]:
    """Requests as the kernel sends them."""

    def packet(opcode: int, node: int, body: bytes = b"", length: int | None = None) -> bytes:
        size = fuse.IN_HEADER.size + len(body)
        return fuse.IN_HEADER.pack(size if length is None else length, opcode, 2, node, 0, 0, 1, 0, 0) + body

    def seed(name: str, odd: str, *sent: bytes) -> Seed:
        return "fuse", name, odd, b"\x01" + b"".join(sent)

    begin = packet(fuse.INIT, 0, fuse.INIT_IN.pack(7, 38, 1 << 17, 0xFFFFFFFF))
    opened = packet(fuse.OPEN, 2, fuse.OPEN_IN.pack(os.O_RDWR, 0))
    yield seed(
        "session",
        "nothing: a look, a write, a read, a discard, the end",
        begin,
        packet(fuse.LOOKUP, 1, b"volume\0"),
        opened,
        packet(fuse.WRITE, 2, fuse.IO_IN.pack(0, 4096, 16, 0, 0, 0, 0) + bytes(16)),
        packet(fuse.READ, 2, fuse.IO_IN.pack(0, 4096, 4096, 0, 0, 0, 0)),
        packet(fuse.FALLOCATE, 2, fuse.FALLOCATE_IN.pack(0, 0, 4096, 3, 0)),
        packet(fuse.RELEASE, 2, fuse.RELEASE_IN.pack(0, 0, 0, 0)),
    )
    write = fuse.IO_IN.pack(0, 0, 1 << 20, 0, 0, 0, 0)
    yield seed(
        "write-of-more-than-came",
        "a write that says it has 1 MiB",
        begin,
        opened,
        packet(fuse.WRITE, 2, write + bytes(8)),
    )
    read = fuse.IO_IN.pack(0, 0, 0xFFFFFFFF, 0, 0, 0, 0)
    yield seed("read-of-4-gib", "a read of 4 GiB", begin, opened, packet(fuse.READ, 2, read))
    past = fuse.IO_IN.pack(0, ALL_ONES, 4096, 0, 0, 0, 0)
    yield seed("read-at-the-end-of-all", "a read at 2^64 - 1", begin, opened, packet(fuse.READ, 2, past))
    punch = fuse.FALLOCATE_IN.pack(0, 1 << 63, 1 << 63, 3, 0)
    yield seed("discard-past-the-end", "a discard from 2^63 on", begin, opened, packet(fuse.FALLOCATE, 2, punch))
    size = fuse.SETATTR_IN.pack(8, 0, 0, ALL_ONES, *([0] * 12))
    yield seed("file-of-16-eib", "the volume is to be 2^64 - 1 bytes long", begin, packet(fuse.SETATTR, 2, size))
    yield seed("name-without-end", "a name without its zero", begin, packet(fuse.LOOKUP, 3, b"one"))
    yield seed("another-protocol", "version 6 of the protocol", packet(fuse.INIT, 0, fuse.INIT_IN.pack(6, 0, 0, 0)))
    yield seed("cut", "a packet of eight bytes", begin, struct.pack("<II", 8, fuse.READ))
    yield seed(
        "wrong-length", "a header that says 16 bytes", begin, struct.pack("<I", 16) + packet(fuse.GETATTR, 2)[4:16]
    )
    forget = struct.pack("=II", 0xFFFFFFFF, 0) + fuse.FORGET_ONE.pack(23, 1)
    yield seed(
        "forget-without-end", "2^32 - 1 nodes to forget, one of them there", begin, packet(fuse.BATCH_FORGET, 0, forget)
    )
    yield seed("no-request", "a request of a kind that there is not", begin, packet(0xFFFF, 2))


def messages() -> Iterator[Seed]:
    """Lines on the control socket, to a client (0) and to a server (1)."""
    lines = (
        ("list", "nothing: a request", 1, b'{"verb": "list", "args": {}}'),
        ("answer", "nothing: an answer", 0, b'{"ok": true, "result": {}}'),
        (
            "refusal",
            "nothing: a refusal",
            0,
            b'{"ok": false, "error": {"class": "VolumeFull", "message": "m", "hint": "h"}}',
        ),
        (
            "errno",
            "an error of the system",
            0,
            b'{"ok": false, "error": {"class": "OSError", "message": "m", "hint": "h", "errno": %d}}' % errno.EIO,
        ),
        ("nested", "5,000 brackets", 1, b"[" * 5000),
        ("nested-answer", "5,000 brackets to a client", 0, b"[" * 5000),
        ("ok-is-a-number", "an answer whose ok is a number", 0, b'{"ok": 1, "result": [1]}'),
        ("args-is-a-list", "arguments that are a list", 1, b'{"verb": "list", "args": []}'),
        ("verb-is-null", "no verb", 1, b'{"verb": null}'),
        ("not-utf-8", "no UTF-8", 1, b'{"verb": "\xff\xfe"}'),
        ("surrogate", "half a character as a name", 1, b'{"verb": "create", "args": {"name": "\\ud800"}}'),
        ("two", "two requests in one piece", 1, b'{"verb": "list"}\n{"verb": "info"}'),
        ("half", "half a request", 1, b'{"verb": "li'),
        (
            "class-is-no-error",
            "an error of a class that is none",
            0,
            b'{"ok": false, "error": {"class": "SystemExit", "message": ""}}',
        ),
    )
    for name, odd, side, line in lines:
        yield "control", name, odd, bytes([side]) + line


def all_seeds() -> list[Seed]:
    """Every seed: (target, name, what is odd, bytes)."""
    both = [(target, *seed) for seed in volumes() for target in ("volume", "commands")]
    return sorted([*parsers(), *logs(), *both, *packets(), *messages()])


HEAD = """# What the fuzzer begins with

Made by `tools/make-seeds`, read by `tools/fuzz`, and each given to its target by `tests/unit/test_hostile.py`. The
bytes mean what their target (`tests/hostile.py`) makes of them: `parsers` the number of a parser and a structure;
`log` the blocks of a log, whose checksums are set right; `volume` (the reading commands) and `commands` (the writing
ones) which field of a volume with snapshots gets which value, everything above it sealed again, or which of the small
images is opened; `fuse` packets; `control` lines. "Ends with": what a parser or a replay says; whether `list` is
refused; whether one of create, restore, delete and strip is.

| seed | what is odd | ends with |
|---|---|---|
"""


def main() -> None:
    """Write them all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--into", type=Path, default=hostile.SEEDS, help="where to (replaced)")
    into: Path = parser.parse_args().into
    shutil.rmtree(into, ignore_errors=True)
    rows = []
    for target, name, odd, raw in all_seeds():
        path = into / target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        rows.append(f"| `{target}/{name}` | {odd} | {hostile.ending(target, raw)} |\n")
    (into / "README.md").write_text(HEAD + "".join(rows))
    print(f"{into}: {len(rows)} seeds")


if __name__ == "__main__":
    main()
