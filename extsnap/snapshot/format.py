"""The store's structures on the medium: Construct definitions and numpy dtypes, no I/O.

``docs/FORMAT.md`` is the specification; this module is laid beside it.  Everything is little-endian.

* The *pointer* stands in the last reserved bytes of every ext superblock (0x3e0): where the header slots are.
* A *slot* is one filesystem block whose first 512 bytes are `Slot`: one sector, so it is never torn.
* A slot names a chain of *segments* (physically contiguous blocks) that hold the *root*: a sequence of sections.
* The root names *blobs*: byte strings in logical blocks of the store.
* The *log* is a run of logical blocks that takes batches of records in place.
"""

from __future__ import annotations

import enum
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import construct as c
import numpy as np
import numpy.typing as npt

from extsnap.errors import StoreDamaged, UnsupportedFeature
from extsnap.ondisk.castagnoli import crc32c

POINTER_OFFSET = 0x3E0
POINTER_MAGIC = b"XSNP"
SLOT_MAGIC = b"EXTSNAP\x01"
SEGMENT_MAGIC = b"XSEG"
BATCH_MAGIC = b"XLOG"
VERSION = 1
SLOT_BYTES = 512
SLOT_RESERVED = SLOT_BYTES - 96 - 4
SECTOR = 512
NAME_BYTES_MAX = 255

#: Copy address of a zero record: the old block was all zeros and needs no copy block.
ZERO_COPY = -1
#: References of a uniform group bitmap in the history: they cost no block.
ALL_CLEAR = -1
ALL_SET = -2


#: There are checksums of snapshots: who does not know them may leave some behind, and nothing else.
COMPAT_CHECKSUMS = 1
#: There are checksums of parts of the index: who does not know them may leave some behind, which are passed by.
COMPAT_PARTS = 2
#: Feature bits: everybody refuses a store with other incompat bits, a writer one with other ro_compat bits.
#: Blocks of the base volume are hidden: whoever does not know of them reads there what was discarded.
INCOMPAT_HIDDEN_RUNS = 1
KNOWN_INCOMPAT = INCOMPAT_HIDDEN_RUNS
#: Entries of the snapshot table have flags: a writer that does not know them would clear them.
RO_COMPAT_SNAPSHOT_FLAGS = 1
#: Structures have a second copy: a writer that does not know it would change the first one only, and use its blocks.
RO_COMPAT_TWINS = 2
KNOWN_RO_COMPAT = RO_COMPAT_SNAPSHOT_FLAGS | RO_COMPAT_TWINS


class SlotFlags(enum.IntFlag):
    """State of the store."""

    #: A server has the base volume open for writing; without a dirty mark beside it: an outside write.
    OPEN = 1
    #: The guard is wanted while the image is at rest.
    GUARD = 2


class Section(enum.IntEnum):
    """Sections of the root."""

    EXTENTS = 1
    MAPPING = 2
    PLACE = 3
    COUNTING_BITMAP = 4
    BLOBS = 5
    BLOB_RUNS = 6
    LOG = 7
    SUPERBLOCKS = 8
    PENDING = 9
    PENDING_EXTENTS = 10
    PENDING_MAPPING = 11
    RESTORE = 12
    RESTORE_MAPPING = 13
    PROPERTIES = 14
    FINGERPRINT = 15
    ALLOCATION = 16
    TWINS = 17
    TWIN_RUNS = 18
    LOG_TWIN = 19


class BlobKind(enum.IntEnum):
    """Kinds of blobs; ``key`` tells several of one kind apart."""

    SNAPSHOTS = 1
    MASKS = 2
    HISTORY = 3
    INDEX = 4
    INDEX_CRCS = 5
    REDO = 6
    HIDDEN = 7
    HISTORY_TWINS = 8
    CHECKSUMS = 9
    INDEX_PARTS = 10


def name_of_blob(kind: int) -> str:
    """A kind of blob in a message; a later version may have others."""
    return BlobKind(kind).name.lower() if kind in BlobKind.__members__.values() else f"blob of kind {kind}"


class PendingKind(enum.IntEnum):
    """What an interrupted edit was; all are finished by applying the redo blocks."""

    SET_UP = 1
    RESIZE = 2
    STRIP = 3
    MOVE = 4  # a resize whose logical blocks keep their content, where their place changes


class Kind(enum.IntEnum):
    """Why a snapshot was taken."""

    MANUAL = 0
    SAFETY = 1
    ATOMIC = 2


class Consistency(enum.IntEnum):
    """What state the filesystem of a snapshot was in."""

    CLEAN = 0
    FROZEN = 1
    CRASH = 2


class State(enum.IntEnum):
    """Whether a snapshot can be trusted."""

    OK = 0
    TAINTED = 1
    DAMAGED = 2


Pointer = c.Struct(
    "magic" / c.Bytes(4),  # POINTER_MAGIC
    "version" / c.Int16ul,
    "reserved" / c.Int16ul,
    "slot_a" / c.Int64ul,  # physical block of slot A
    "slot_b" / c.Int64ul,  # physical block of slot B
    "crc" / c.Int32ul,  # crc32c of the 24 bytes before
)

Slot = c.Struct(
    "magic" / c.Bytes(8),  # SLOT_MAGIC
    "version" / c.Int32ul,
    "compat" / c.Int32ul,
    "ro_compat" / c.Int32ul,
    "incompat" / c.Int32ul,
    "generation" / c.Int64ul,  # the higher one of two valid slots wins
    "store_uuid" / c.Bytes(16),
    "fs_uuid" / c.Bytes(16),  # s_uuid when the store was set up; a hint
    "block_size" / c.Int32ul,
    "flags" / c.Int32ul,  # SlotFlags
    "root_block" / c.Int64ul,  # physical block of the first segment
    "root_blocks" / c.Int32ul,  # length of the first segment, in blocks
    "root_crc" / c.Int32ul,  # crc32c of the whole root
    "root_bytes" / c.Int64ul,
    "reserved" / c.Bytes(SLOT_RESERVED),
    "crc" / c.Int32ul,  # crc32c of the 508 bytes before
)

Segment = c.Struct(
    "magic" / c.Bytes(4),  # SEGMENT_MAGIC
    "crc" / c.Int32ul,  # crc32c of the rest of this header and the payload
    "generation" / c.Int64ul,
    "next_block" / c.Int64ul,  # physical block of the next segment; 0 ends the chain
    "next_blocks" / c.Int32ul,
    "payload_bytes" / c.Int32ul,
)

SectionHeader = c.Struct(
    "kind" / c.Int32ul,
    "reserved" / c.Int32ul,
    "length" / c.Int64ul,  # bytes of payload, which is padded to 8
)

Place = c.Struct(
    "directory_inode" / c.Int32ul,
    "store_inode" / c.Int32ul,
    "directory_block" / c.Int64ul,
    "next_id" / c.Int64ul,  # id of the next snapshot; never reused
    "size_blocks" / c.Int64ul,  # logical size of the store
)

LogPlace = c.Struct(
    "epoch" / c.Int64ul,
    "start" / c.Int64ul,  # first logical block
    "blocks" / c.Int64ul,
)

LogTwin = c.Struct(
    "start" / c.Int64ul,  # first logical block of the log's second copy
    "batches" / c.Int64ul,  # of this epoch that are durable: fewer are damage
)

PendingHead = c.Struct(
    "kind" / c.Int32ul,
    "reserved" / c.Int32ul,
    "size_blocks" / c.Int64ul,
)

RestoreHead = c.Struct(
    "target_id" / c.Int64ul,
    "safety_id" / c.Int64ul,  # 0: none was taken
    "journal_sequence" / c.Int32ul,  # the restored journal starts here, so stale transactions never look next
    "reserved" / c.Int32ul,
)

BatchHeader = c.Struct(
    "magic" / c.Bytes(4),  # BATCH_MAGIC
    "crc" / c.Int32ul,  # crc32c of the rest of this header and the payload
    "epoch" / c.Int64ul,
    "sequence" / c.Int64ul,
    "masks" / c.Int32ul,
    "mask_words" / c.Int32ul,
    "records" / c.Int32ul,
    "crcs" / c.Int32ul,
    "hides" / c.Int32ul,  # runs that are hidden from this batch on; 0 without INCOMPAT_HIDDEN_RUNS
    "shows" / c.Int32ul,  # runs that are hidden no more
    "reserved" / c.Bytes(16),
)

SnapshotEntry = c.Struct(
    "id" / c.Int64ul,
    "bit" / c.Int32ul,
    "kind" / c.Int8ul,
    "consistency" / c.Int8ul,
    "state" / c.Int8ul,
    "flags" / c.Int8ul,  # valid only with RO_COMPAT_SNAPSHOT_FLAGS
    "created_ns" / c.Int64sl,  # since 1970-01-01 UTC
    "volume_bytes" / c.Int64ul,
    "used_blocks" / c.Int64ul,
    "name" / c.Prefixed(c.Int16ul, c.GreedyBytes),
    "message" / c.Prefixed(c.Int32ul, c.GreedyBytes),
    "restored_from" / c.Prefixed(c.Int16ul, c.GreedyBytes),
)

#: (logical, physical, length) in blocks.
EXTENT_DTYPE = np.dtype([("logical", "<u8"), ("physical", "<u8"), ("length", "<u8")])
RUN_DTYPE = np.dtype([("start", "<u8"), ("length", "<u8")])
BLOB_DTYPE = np.dtype([("kind", "<u4"), ("key", "<u4"), ("length", "<u8"), ("crc", "<u4"), ("runs", "<u4")])
#: The second copy of a blob: as many runs.
TWIN_DTYPE = np.dtype([("kind", "<u4"), ("key", "<u4"), ("runs", "<u4"), ("reserved", "<u4")])
#: Second copies of the preserved bitmaps, one an entry of the history; -1: there is none.
HISTORY_TWIN_DTYPE = np.dtype("<i8")
#: One record: ``length`` blocks from ``block``; copies at logical blocks from ``copy``, or ZERO_COPY.
RECORD_DTYPE = np.dtype([("block", "<u8"), ("copy", "<i8"), ("length", "<u4"), ("mask", "<u4"), ("writes", "<u4")])
#: From snapshot ``id`` on, the preserved bitmap of group row ``row`` is the one at logical block ``ref``.
HISTORY_DTYPE = np.dtype([("id", "<u8"), ("ref", "<i8"), ("row", "<u4"), ("crc", "<u4")])

POINTER_BYTES = Pointer.sizeof()
SEGMENT_HEADER = Segment.sizeof()
BATCH_HEADER = BatchHeader.sizeof()
SECTION_HEADER = SectionHeader.sizeof()
assert POINTER_BYTES == 28
assert Slot.sizeof() == SLOT_BYTES
assert BATCH_HEADER == 64


def crc(data: Any, value: int = 0) -> int:
    """The usual crc32c (Castagnoli, inverted in and out) of ``data``, continued from ``value``."""
    return int(crc32c(data, value))


def crcs(blocks: Iterable[Any]) -> npt.NDArray[np.uint32]:
    """The same of each of several pieces: uint32[n]."""
    return np.fromiter(map(crc32c, blocks), np.uint32)


def build_pointer(slot_a: int, slot_b: int) -> bytes:
    """The 28 bytes for 0x3e0 of a superblock."""
    raw = bytes(
        Pointer.build(
            {"magic": POINTER_MAGIC, "version": VERSION, "reserved": 0, "slot_a": slot_a, "slot_b": slot_b, "crc": 0}
        )
    )
    return raw[:24] + crc(raw[:24]).to_bytes(4, "little")


def parse_pointer(raw: bytes) -> tuple[int, int] | None:
    """(slot_a, slot_b), or None where the bytes are no valid pointer."""
    if raw[:4] != POINTER_MAGIC or crc(raw[:24]) != int.from_bytes(raw[24:28], "little"):
        return None
    pointer = Pointer.parse(raw)
    return int(pointer.slot_a), int(pointer.slot_b)


def build_slot(**fields: Any) -> bytes:
    """512 bytes of a header slot, checksum set."""
    raw = bytes(
        Slot.build(
            {
                "magic": SLOT_MAGIC,
                "version": VERSION,
                "compat": 0,
                "ro_compat": 0,
                "incompat": 0,
                "reserved": bytes(SLOT_RESERVED),
                "crc": 0,
                **fields,
            }
        )
    )
    return raw[:-4] + crc(raw[:-4]).to_bytes(4, "little")


def parse_slot(raw: bytes) -> Any:
    """The parsed slot, or None where it is not one (wrong magic or checksum).

    Raises:
        UnsupportedFeature: It is one, of another version of the format.
    """
    raw = raw[:SLOT_BYTES]
    if len(raw) < SLOT_BYTES or raw[:8] != SLOT_MAGIC or crc(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
    slot = Slot.parse(raw)
    if slot.version != VERSION:
        raise UnsupportedFeature(f"the store's format has version {slot.version}", hint="use a newer extsnap")
    return slot


def build_sections(sections: list[tuple[int, bytes]]) -> bytes:
    """Concatenate sections, each with its header and padded to 8 bytes."""
    parts = []
    for kind, payload in sections:
        parts.append(bytes(SectionHeader.build({"kind": kind, "reserved": 0, "length": len(payload)})))
        parts.append(payload)
        parts.append(bytes(-len(payload) % 8))
    return b"".join(parts)


def parse_sections(raw: bytes) -> dict[int, bytes]:
    """Payloads by section kind.

    Raises:
        StoreDamaged: A length runs past the end, or a section stands twice.
    """
    sections: dict[int, bytes] = {}
    offset = 0
    while offset < len(raw):
        if offset + SECTION_HEADER > len(raw):
            raise StoreDamaged(f"root: a section header at byte {offset} is cut off")
        head = SectionHeader.parse(raw[offset : offset + SECTION_HEADER])
        offset += SECTION_HEADER
        if offset + head.length > len(raw) or head.kind in sections:
            raise StoreDamaged(f"root: section {head.kind} at byte {offset} is too long or stands twice")
        sections[int(head.kind)] = raw[offset : offset + head.length]
        offset += head.length + -head.length % 8
    return sections


def parse_table(raw: bytes, dtype: np.dtype[Any], name: str) -> np.ndarray[Any, Any]:
    """A structured array over ``raw``; its length must be a whole number of entries."""
    if len(raw) % dtype.itemsize:
        raise StoreDamaged(f"{name}: {len(raw)} bytes are not a whole number of {dtype.itemsize}-byte entries")
    return np.frombuffer(raw, dtype)


def build_runs(runs: np.ndarray[Any, Any]) -> bytes:
    """A table of runs, int64[n, 2] of (start, length)."""
    table = np.zeros(len(runs), RUN_DTYPE)
    table["start"], table["length"] = runs.T
    return table.tobytes()


def parse_runs(raw: bytes, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Runs from their table: int64[n, 2]."""
    table = parse_table(raw, RUN_DTYPE, name)
    return np.stack([table["start"], table["length"]], axis=1).astype(np.int64)


class SnapshotFlags(enum.IntFlag):
    """What else is known of a snapshot; bits without a name are kept."""

    NONE = 0
    #: The filesystem was marked with errors at that moment.
    FILESYSTEM_ERRORS = 1
    #: It is damaged, and besides it was at risk when the volume was written outside extsnap.
    TAINTED = 2


@dataclass(frozen=True)
class Snapshot:
    """One snapshot instance, as the snapshot table holds it.

    Attributes:
        id: Unique for ever in this store, in order of creation.
        bit: Its bit of the counting bitmap.
        created_ns: Nanoseconds since 1970 UTC.
        volume_bytes: Size of the view.
        used_blocks: Blocks that the view preserves.
        restored_from: For a safety snapshot, the name of the snapshot that was restored; else "".
        flags: What else is known of it.
    """

    id: int
    bit: int
    name: str
    message: str
    kind: Kind
    consistency: Consistency
    state: State
    created_ns: int
    volume_bytes: int
    used_blocks: int
    restored_from: str = ""
    flags: SnapshotFlags = SnapshotFlags.NONE

    def build(self) -> bytes:
        """The bytes of this entry in the snapshot table."""
        return bytes(
            SnapshotEntry.build(
                {
                    "id": self.id,
                    "bit": self.bit,
                    "kind": self.kind,
                    "consistency": self.consistency,
                    "state": self.state,
                    "flags": self.flags,
                    "created_ns": self.created_ns,
                    "volume_bytes": self.volume_bytes,
                    "used_blocks": self.used_blocks,
                    "name": self.name.encode(),
                    "message": self.message.encode(),
                    "restored_from": self.restored_from.encode(),
                }
            )
        )


def fault_of_name(name: str) -> str:
    """Which rule a snapshot's name breaks, as the end of a sentence; empty if none."""
    size = len(name.encode())
    if not 1 <= size <= NAME_BYTES_MAX:
        return f"has {size} bytes; a name has 1 to {NAME_BYTES_MAX}"
    if "/" in name:
        return "has a slash"
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name):
        return "has a control character"
    if name in (".", ".."):
        return "is a directory's name"
    return "starts with a hyphen" if name.startswith("-") else ""


def parse_snapshots(raw: bytes) -> list[Snapshot]:
    """The snapshot table.

    Raises:
        StoreDamaged: An entry is cut off or has an impossible value.
    """
    try:
        return [
            Snapshot(
                id=int(entry.id),
                bit=int(entry.bit),
                name=entry.name.decode(),
                message=entry.message.decode(),
                kind=Kind(entry.kind),
                consistency=Consistency(entry.consistency),
                state=State(entry.state),
                created_ns=int(entry.created_ns),
                volume_bytes=int(entry.volume_bytes),
                used_blocks=int(entry.used_blocks),
                restored_from=entry.restored_from.decode(),
                flags=SnapshotFlags(entry.flags),
            )
            for entry in _parse_entries(raw)
        ]
    except c.StreamError as error:
        raise StoreDamaged("snapshot table: an entry is cut off") from error
    except ValueError as error:
        raise StoreDamaged(f"snapshot table: {error}") from error


def _parse_entries(raw: bytes) -> list[Any]:
    entries = []
    stream = io.BytesIO(raw)
    while stream.tell() < len(raw):
        entries.append(SnapshotEntry.parse_stream(stream))
    return entries
