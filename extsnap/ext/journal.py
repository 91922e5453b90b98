"""The internal journal: where it is, whether it is empty, and its superblock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from extsnap.arrays import Ints
from extsnap.errors import FormatError
from extsnap.ondisk import codec
from extsnap.ondisk.checksum import journal_superblock_checksum
from extsnap.ondisk.journal import MAGIC, SIZE, JournalIncompat, JournalSuperblock

#: Sequences are numbers modulo this.
SEQUENCES = 1 << 32


def later(one: int, other: int) -> int:
    """The one of two sequences that comes after the other: they go round, as in the kernel's ``tid_geq``."""
    return one if (one - other) % SEQUENCES < SEQUENCES // 2 else other


@dataclass(frozen=True)
class Journal:
    """A filesystem's journal.

    Attributes:
        superblock_block: Block that holds the jbd2 superblock.
        data_runs: int64[n, 2], runs (start, length) of all other data blocks of the journal.
        superblock: Parsed.
        block: The whole block of the superblock.
    """

    superblock_block: int
    data_runs: Ints
    superblock: Any
    block: bytes

    @classmethod
    def parse(cls, data: Ints, block: bytes, offset: int) -> Journal:
        """From the journal's runs (logical, physical, length) and its first block.

        Raises:
            FormatError: It is no journal, or its checksum is wrong.
        """
        sb = codec.parse(JournalSuperblock, block[:SIZE], "journal superblock", offset)
        if sb.h_magic != MAGIC or sb.h_blocktype not in (3, 4):
            raise FormatError("magic or type is wrong", structure="journal superblock", field="h_magic", offset=offset)
        if _has_checksum(sb) and sb.s_checksum != journal_superblock_checksum(block):
            raise FormatError(
                "the checksum is wrong", structure="journal superblock", field="s_checksum", offset=offset
            )
        runs = data[:, 1:].copy()
        runs[0] += (1, -1)
        return cls(int(data[0, 1]), runs[runs[:, 1] > 0], sb, block)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to replay."""
        return bool(self.superblock.s_start == 0)

    @property
    def features(self) -> int:
        """s_feature_incompat; a superblock of version 1 has none, whatever stands there."""
        return int(self.superblock.s_feature_incompat) if self.superblock.h_blocktype == 4 else 0

    @property
    def blocks(self) -> int:
        """Blocks that the file has, that of the superblock among them."""
        return 1 + int(self.data_runs[:, 1].sum())

    @property
    def sequence(self) -> int:
        """Commit id that the next transaction gets."""
        return int(self.superblock.s_sequence)

    def superblock_with(self, *, sequence: int) -> bytes:
        """The superblock's block for an empty journal that goes on at ``sequence``, checksum right."""
        sb = self.superblock.copy()
        sb.s_sequence, sb.s_start = sequence, 0
        raw = codec.build(JournalSuperblock, sb, "journal superblock")
        if _has_checksum(sb):
            raw = raw[:0xFC] + journal_superblock_checksum(raw).to_bytes(4, "big") + raw[0x100:]
        return raw + self.block[SIZE:]


def _has_checksum(sb: Any) -> bool:
    """Whether the superblock has one: version 1 (type 3) has no features, whatever stands there."""
    return bool(sb.h_blocktype == 4 and sb.s_feature_incompat & (JournalIncompat.CSUM_V2 | JournalIncompat.CSUM_V3))
