"""The log of a journal: its blocks in their order, and what a replay makes of them.

Source: the kernel's Documentation/filesystems/ext4/journal.rst, and fs/jbd2/recovery.c for which transactions count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints, expand
from extsnap.errors import FormatError, UnsupportedFeature
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.journal import Journal
from extsnap.ondisk.checksum import crc32c_raw
from extsnap.ondisk.journal import MAGIC, JournalCompat, JournalIncompat
from extsnap.ondisk.journal_tags import (
    BlockType,
    Tags,
    content_checksum,
    header,
    is_whole,
    parse_revoked,
    parse_tags,
)
from extsnap.ondisk.superblock import Compat, Incompat

_CHECKED = JournalIncompat.CSUM_V2 | JournalIncompat.CSUM_V3
_KNOWN = JournalIncompat.REVOKE | JournalIncompat.BIT64 | _CHECKED
#: Blocks of the longest journal that mke2fs makes.
_LONGEST = 10_240_000
#: Blocks for fast commits where the superblock does not say.
_FAST_COMMIT_BLOCKS = 256


@dataclass(frozen=True)
class LogBlock:
    """A block of the log with a header.

    Attributes:
        kind: A `BlockType`.
        sequence: Of its transaction.
        raw: All of it.
        tags: Of a descriptor block, as far as the log has room for what they name.
        places: int64[n], the blocks of the filesystem that hold the content for ``tags``.
    """

    kind: int
    sequence: int
    raw: bytes
    tags: Tags | None = None
    places: Ints | None = None


def walk(fs: Filesystem, journal: Journal) -> Iterator[LogBlock]:
    """The blocks with headers of a log that is not empty, from its beginning, until one does not belong to it.

    Looks at no checksum.  Goes once around the log at most, whatever stands in it.

    Raises:
        FormatError: There cannot be such a log.
    """
    _require_log(fs, journal)
    sb = journal.superblock
    log = np.concatenate([[journal.superblock_block], expand(journal.data_runs[:, 0], journal.data_runs[:, 1])])
    end, first = int(sb.s_maxlen), int(sb.s_first)
    if journal.features & JournalIncompat.FAST_COMMIT:
        end -= int(sb.s_num_fc_blks) or _FAST_COMMIT_BLOCKS
    at, sequence = int(sb.s_start), int(sb.s_sequence)
    left = end - first
    while 0 < first <= at < end and left > 0:
        found = header(raw := fs.read_block(int(log[at])))
        if found is None or found[1] != sequence:
            return
        step = 1
        if found[0] == BlockType.DESCRIPTOR:
            tags = parse_tags(raw, journal.features)
            count = min(len(tags.blocks), left - 1)
            there = Tags(tags.blocks[:count], tags.escaped[:count], tags.checksums[:count])
            places = log[(at - first + 1 + np.arange(count)) % (end - first) + first]
            yield LogBlock(found[0], sequence, raw, there, places)
            step += len(tags.blocks)
        elif found[0] in (BlockType.COMMIT, BlockType.REVOKE):
            yield LogBlock(found[0], sequence, raw)
        else:
            return
        if found[0] == BlockType.COMMIT:
            sequence = (sequence + 1) & 0xFFFFFFFF
        left -= step
        at = (at - first + step) % (end - first) + first


def _require_log(fs: Filesystem, journal: Journal) -> None:
    """Raises FormatError if the superblock tells of a log that the file cannot have."""
    sb = journal.superblock
    first, start, end = int(sb.s_first), int(sb.s_start), int(sb.s_maxlen)
    for field, wrong in (
        ("s_blocksize", sb.s_blocksize != fs.geometry.block_size),
        ("s_maxlen", not first < end <= min(journal.blocks, _LONGEST)),
        ("s_first", first < 1),
        ("s_start", bool(start) and not first <= start < end),
    ):
        if wrong:
            raise FormatError(f"{sb[field]} is impossible", structure="journal superblock", field=field)


def end_sequence(fs: Filesystem, journal: Journal) -> int:
    """A sequence past everything that counts in the log, or has begun in it."""
    sequence = journal.sequence
    if not journal.is_empty:
        for block in walk(fs, journal):
            sequence = block.sequence
        sequence = (sequence + 1) & 0xFFFFFFFF
    return sequence


@dataclass(frozen=True)
class Committed:
    """What the committed transactions of a log say, the last word on every block only.

    Attributes:
        blocks: int64[n], where the contents belong; sorted.
        places: int64[n], the blocks of the filesystem that hold them.
        escaped: bool[n], where the first four bytes are the magic, and zeros in the log.
        sequences: int64[n], the transactions.
        checksums: int64[n], as `Tags` has them.
    """

    blocks: Ints
    places: Ints
    escaped: npt.NDArray[np.bool_]
    sequences: Ints
    checksums: Ints


def committed(fs: Filesystem, journal: Journal) -> Committed:
    """Find what a replay writes: of whole transactions, and not revoked since.

    Raises:
        FormatError: A committed transaction has a block with a wrong checksum, or one that others follow was not.
    """
    features, seed = journal.features, crc32c_raw(0xFFFFFFFF, journal.superblock.s_uuid)
    logged: list[tuple[Ints, ...]] = []
    revoked: list[tuple[Ints, Ints]] = []
    pending: list[LogBlock] = []
    damaged = ended = False
    for block in walk(fs, journal):
        if ended:
            raise FormatError(
                f"the commit block before transaction {block.sequence} has a wrong checksum",
                structure="journal",
                field="h_chksum",
            )
        whole = is_whole(block.raw, block.kind, features, seed)
        if block.kind != BlockType.COMMIT:
            damaged |= not whole  # which matters if a commit follows
            pending.append(block)
            continue
        if not whole:
            ended = True  # never completed, if nothing follows
            continue
        if damaged:
            raise FormatError(
                f"a block of transaction {block.sequence} has a wrong checksum", structure="journal", field="checksum"
            )
        for part in pending:
            if part.tags is not None and part.places is not None:
                tags, of = part.tags, np.full(len(part.places), part.sequence, np.int64)
                logged.append((tags.blocks, part.places, tags.escaped.astype(np.int64), of, tags.checksums))
            else:
                numbers = parse_revoked(part.raw, features)
                revoked.append((numbers, np.full(len(numbers), part.sequence, np.int64)))
        pending = []
    parts = [np.zeros((5, 0), np.int64), *(np.array(part, np.int64) for part in logged)]
    columns = np.concatenate(parts, axis=1)
    _, last = np.unique(columns[0][::-1], return_index=True)
    columns = columns[:, ::-1][:, last]
    columns = columns[:, ~_is_revoked(columns[0], columns[3], journal.sequence, revoked)]
    blocks, places, escaped, sequences, checksums = columns
    return Committed(blocks, places, escaped != 0, sequences, checksums)


def _is_revoked(blocks: Ints, sequences: Ints, first: int, revoked: list[tuple[Ints, Ints]]) -> npt.NDArray[np.bool_]:
    """Which blocks (distinct) a transaction as new as theirs, or newer, has revoked; ages count from ``first``."""
    numbers = np.concatenate([np.zeros(0, np.int64), *(part[0] for part in revoked)])
    if not len(numbers):
        return np.zeros(len(blocks), np.bool_)
    ages = (np.concatenate([part[1] for part in revoked]) - first) & 0xFFFFFFFF
    order = np.lexsort((ages, numbers))
    numbers, ages = numbers[order], ages[order]
    at = np.maximum(np.searchsorted(numbers, blocks, side="right") - 1, 0)  # of several revocations the newest
    newest: npt.NDArray[np.bool_] = ages[at] >= (sequences - first) & 0xFFFFFFFF
    return np.asarray((numbers[at] == blocks) & newest)


def replay(fs: Filesystem) -> None:
    """Do what a recovery does: write what the log's committed transactions say, and empty the journal.

    Open the filesystem again afterwards: what this one has read of it is out of date.  Time and memory grow with what
    is in the log alone, whose blocks are gone through one by one for their checksums.

    Args:
        fs: Writable, on a device that throws away what is not wanted in the end; opened leniently.

    Raises:
        FormatError: The journal is damaged.
        UnsupportedFeature: Its log is of a kind that only the kernel and e2fsck replay.
    """
    if not fs.needs_recovery:
        return
    journal = fs.journal
    if journal is None:
        raise FormatError("needs_recovery is set, and there is none", structure="journal")
    _require_log(fs, journal)
    features = journal.features
    if fs.superblock.s_feature_compat & Compat.fast_commit or features & JournalIncompat.FAST_COMMIT:
        raise UnsupportedFeature("the journal has fast commits, which only the kernel and e2fsck replay")
    if features & JournalIncompat.ASYNC_COMMIT:
        raise UnsupportedFeature("the journal commits asynchronously; only the kernel and e2fsck replay it")
    if features & ~_KNOWN:
        raise UnsupportedFeature(f"the journal has unknown features ({features & ~_KNOWN:#x})")
    if journal.superblock.s_feature_compat & JournalCompat.CHECKSUM:
        raise UnsupportedFeature("the journal has checksums of version 1, which only the kernel and e2fsck know")
    if not journal.is_empty:
        _write(fs, journal, committed(fs, journal), features)
    fs.write_block(journal.superblock_block, journal.superblock_with(sequence=end_sequence(fs, journal)))
    fs.flush()


def _write(fs: Filesystem, journal: Journal, found: Committed, features: int) -> None:
    seed = crc32c_raw(0xFFFFFFFF, journal.superblock.s_uuid)
    beyond = (found.blocks < 0) | (found.blocks >= fs.geometry.blocks_count)
    if beyond.any():
        sequence, block = int(found.sequences[beyond][0]), int(found.blocks[beyond][0])
        raise FormatError(
            f"transaction {sequence} names block {block} outside the volume",
            structure="journal",
            field="t_blocknr",
        )
    magic = MAGIC.to_bytes(4, "big")
    columns = (found.blocks, found.places, found.escaped, found.sequences, found.checksums)
    for block, place, escaped, sequence, checksum in zip(*(column.tolist() for column in columns), strict=True):
        content = fs.read_block(place)
        if features & _CHECKED and content_checksum(content, sequence, features, seed) != checksum:
            raise FormatError(
                f"the copy of block {block} in transaction {sequence} has a wrong checksum",
                structure="journal",
                field="t_checksum",
            )
        fs.write_block(block, magic + content[4:] if escaped else content)


def recovered(fs: Filesystem) -> None:
    """Say that the journal was replayed: the flag off, the superblock's counts those of the descriptors; flushed."""
    fs.superblock.s_feature_incompat &= ~Incompat.needs_recovery
    fs.sum_counts()
    fs.flush()
    fs.write_superblock()
