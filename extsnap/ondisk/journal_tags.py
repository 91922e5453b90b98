"""The blocks of a jbd2 log: what descriptor blocks name, in each of the four layouts of a tag.

Source: the kernel's Documentation/filesystems/ext4/journal.rst.  All big-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extsnap.ondisk.checksum import crc32c_raw
from extsnap.ondisk.journal import MAGIC, JournalIncompat

HEADER = struct.Struct(">III")  # h_magic, h_blocktype, h_sequence
_UUID_BYTES, _TAIL_BYTES = 16, 4
_REVOKED_AT = 16  # behind the header and r_count
_COMMIT_CHECKSUM = slice(16, 20)  # h_chksum[0]
_CHECKED = JournalIncompat.CSUM_V2 | JournalIncompat.CSUM_V3


class BlockType(enum.IntEnum):
    """h_blocktype."""

    DESCRIPTOR = 1
    COMMIT = 2
    SUPERBLOCK_V1 = 3
    SUPERBLOCK_V2 = 4
    REVOKE = 5


class TagFlags(enum.IntFlag):
    """t_flags of a tag."""

    ESCAPE = 1  # the block began with the magic, which was written as zeros
    SAME_UUID = 2  # no UUID follows the tag
    DELETED = 4
    LAST_TAG = 8


@dataclass(frozen=True)
class Tags:
    """What a descriptor block names, in the order of the blocks that follow it in the log.

    Attributes:
        blocks: int64[n], block numbers of the filesystem.
        escaped: bool[n].
        checksums: int64[n], of the content in the log; of layout 2 the lower 16 bits.  What there is without checksums
            means nothing.
    """

    blocks: npt.NDArray[np.int64]
    escaped: npt.NDArray[np.bool_]
    checksums: npt.NDArray[np.int64]


def _layout(features: int) -> np.dtype[np.void]:
    """How a tag looks in a journal with these s_feature_incompat."""
    if features & JournalIncompat.CSUM_V3:
        return np.dtype([("low", ">u4"), ("flags", ">u4"), ("high", ">u4"), ("checksum", ">u4")])
    fields = [("low", ">u4"), ("checksum", ">u2"), ("flags", ">u2")]
    if features & JournalIncompat.BIT64:
        fields.append(("high", ">u4"))
    if features & JournalIncompat.CSUM_V2:
        fields.append(("unused", ">u2"))  # the kernel's size of a tag has it, nothing stands there
    return np.dtype(fields)


def header(block: bytes) -> tuple[int, int] | None:
    """(h_blocktype, h_sequence) of a block of the log, or None if it is none with a header."""
    magic, kind, sequence = HEADER.unpack_from(block)
    return (kind, sequence) if magic == MAGIC else None


def parse_tags(block: bytes, features: int) -> Tags:
    """The tags of a descriptor block.

    Args:
        block: The whole block, header included.
        features: s_feature_incompat of the journal.
    """
    layout = _layout(features)
    end = len(block) - (_TAIL_BYTES if features & _CHECKED else 0)
    at, found = HEADER.size, [np.zeros(0, layout)]
    while at + layout.itemsize <= end:
        # As a rule only the first tag has a UUID behind it: two rounds, however many tags there are.
        table = np.frombuffer(block, layout, (end - at) // layout.itemsize, at)
        flags = table["flags"]
        stops = np.flatnonzero((flags & TagFlags.LAST_TAG != 0) | (flags & TagFlags.SAME_UUID == 0))
        count = int(stops[0]) + 1 if len(stops) else len(table)
        found.append(table[:count])
        if not len(stops) or flags[count - 1] & TagFlags.LAST_TAG:
            break
        at += count * layout.itemsize + _UUID_BYTES
    tags = np.concatenate(found)
    blocks = tags["low"].astype(np.int64)
    if "high" in (layout.names or ()) and features & JournalIncompat.BIT64:
        blocks |= tags["high"].astype(np.int64) << 32
    return Tags(blocks, tags["flags"] & TagFlags.ESCAPE != 0, tags["checksum"].astype(np.int64))


def parse_revoked(block: bytes, features: int) -> npt.NDArray[np.int64]:
    """The blocks that a revocation block names: int64[n]."""
    count = int.from_bytes(block[HEADER.size : _REVOKED_AT], "big")
    kind = np.dtype(">u8" if features & JournalIncompat.BIT64 else ">u4")
    end = len(block) - (_TAIL_BYTES if features & _CHECKED else 0)
    number = max(0, min(count, end) - _REVOKED_AT) // kind.itemsize
    return np.frombuffer(block, kind, number, _REVOKED_AT).astype(np.int64)


def is_whole(block: bytes, kind: int, features: int, seed: int) -> bool:
    """Whether the checksum of a descriptor, revocation or commit block is right; without checksums all are.

    Args:
        block: The whole block.
        kind: Its `BlockType`.
        features: s_feature_incompat of the journal.
        seed: `crc32c_raw` of the journal's UUID.
    """
    if not features & _CHECKED:
        return True
    at = _COMMIT_CHECKSUM if kind == BlockType.COMMIT else slice(len(block) - _TAIL_BYTES, len(block))
    return crc32c_raw(seed, block[: at.start] + bytes(4) + block[at.stop :]) == int.from_bytes(block[at], "big")


def content_checksum(content: bytes, sequence: int, features: int, seed: int) -> int:
    """What the tag of a logged block holds of ``content``, as it stands in the log."""
    checksum = crc32c_raw(crc32c_raw(seed, sequence.to_bytes(4, "big")), content)
    return checksum if features & JournalIncompat.CSUM_V3 else checksum & 0xFFFF
