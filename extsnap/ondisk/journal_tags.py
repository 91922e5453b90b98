"""The blocks of a jbd2 log: what descriptor blocks name, in each of the four layouts of a tag.

Source: the kernel's Documentation/filesystems/ext4/journal.rst.  All big-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extsnap.ondisk.journal import MAGIC, JournalIncompat

HEADER = struct.Struct(">III")  # h_magic, h_blocktype, h_sequence
_UUID_BYTES, _TAIL_BYTES = 16, 4


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
    """

    blocks: npt.NDArray[np.int64]
    escaped: npt.NDArray[np.bool_]


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
    checked = features & (JournalIncompat.CSUM_V2 | JournalIncompat.CSUM_V3)
    end = len(block) - (_TAIL_BYTES if checked else 0)
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
    return Tags(blocks, tags["flags"] & TagFlags.ESCAPE != 0)
