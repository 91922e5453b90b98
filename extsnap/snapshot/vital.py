"""Room that is kept for the metadata of a mounted filesystem once the store cannot grow any more.

A write of data that finds no room for a copy fails, and whoever wrote it hears of that at its fsync.  If a write of
metadata fails, the kernel stops the journal, and nothing at all can be written any more (without a journal, the
filesystem is damaged).  So the last of the room is not for data, but for blocks that are known to be metadata:

* bitmaps and inode tables, whose places the geometry tells;
* what a descriptor block of the journal names: directories, extent nodes, and with ``data=journal`` data as well, whose
  way home ends at the journal too.

It is as much as such blocks still have to be preserved, and as one transaction may bring of which nobody knows yet (a
quarter of the journal), but no more than the journal has blocks (so many can be on their way home at once), and no more
than a quarter of the store.  Whoever goes on for long on a full volume may use that up as well.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from extsnap.arrays import Ints, distinct, merge_runs, runs_of
from extsnap.blockdev.base import Buffer
from extsnap.errors import FormatError
from extsnap.ext.filesystem import Filesystem
from extsnap.ondisk import codec
from extsnap.ondisk.journal import MAGIC, SIZE, JournalSuperblock
from extsnap.ondisk.journal_tags import HEADER, BlockType, parse_tags
from extsnap.sparsebits import SparseBits

#: Room for all but so small a part of what is to be preserved is room for everything: nothing grows for less.
NEARLY = 16
#: Bytes that are kept at most where there is no journal.
WITHOUT_JOURNAL = 8 << 20
_DESCRIPTOR = np.frombuffer(HEADER.pack(MAGIC, BlockType.DESCRIPTOR, 0)[:8], np.uint64)[0]


def metadata_runs(fs: Filesystem) -> Ints:
    """Runs (start, length) of the filesystem's own blocks, the journal's among them: no file ever gets them."""
    runs = fs.groups.metadata_runs(np.ones(fs.geometry.groups, np.bool_))
    parts = [np.array([[0, fs.geometry.first_data_block + 1]], np.int64), runs]
    if fs.journal is not None:
        parts += [fs.journal.data_runs, np.array([[fs.journal.superblock_block, 1]], np.int64)]
    return np.concatenate(parts)


class Vital:
    """Which blocks of a served volume are metadata, and how much room is kept for them.

    Args:
        fs: The volume's filesystem.
        rows: Of bits, of the volume.
        row_bytes: Of one of them.
        shift: From a block to its position.

    Attributes:
        most: Blocks that are kept at most.
    """

    def __init__(self, fs: Filesystem, rows: int, row_bytes: int, shift: int) -> None:
        self._shift = shift
        self._size = fs.geometry.block_size
        self._runs = SparseBits.of(metadata_runs(fs) + np.array([shift, 0]), rows, row_bytes).runs()
        self._ends = self._runs.sum(axis=1)
        self._named = SparseBits(rows, row_bytes)
        self._log: tuple[list[int], list[int]] = ([], [])  # where the journal's runs begin and end, in bytes
        self._features = 0
        self.most = WITHOUT_JOURNAL // self._size
        self._journal = -1  # where its superblock is, in bytes
        if fs.journal is not None:
            self._journal = fs.journal.superblock_block * self._size
            log = merge_runs(np.concatenate([fs.journal.data_runs, [[fs.journal.superblock_block, 1]]])) * self._size
            self._log = log[:, 0].tolist(), log.sum(axis=1).tolist()
            self._features = fs.journal.features
            self.most = fs.journal.blocks
        self._count: int | None = None
        self._total = self._asked = 0

    def examine(self, offset: int, data: Buffer) -> None:
        """Take note of what a write into the journal names."""
        starts, ends = self._log
        index = bisect_right(ends, offset)
        if index == len(starts) or starts[index] >= offset + len(data):
            return
        skip = -offset % self._size
        count = (len(data) - skip) // self._size
        if count < 1:
            return
        view = memoryview(data)[skip : skip + count * self._size]
        offset += skip
        if offset <= self._journal < offset + len(view):  # a mount may give it other features
            at = self._journal - offset
            with contextlib.suppress(FormatError):  # nobody's journal any more: nothing is found in it
                found = codec.parse(JournalSuperblock, bytes(view[at : at + SIZE]), "journal superblock")
                self._features = int(found.s_feature_incompat)
        heads = np.frombuffer(view, np.uint64).reshape(count, -1)[:, 0]
        end = self._named.rows * self._named.row_bytes * 8
        for at in np.flatnonzero(heads == _DESCRIPTOR).tolist():
            blocks = parse_tags(bytes(view[at * self._size : (at + 1) * self._size]), self._features).blocks
            positions = distinct(blocks + self._shift)
            self._named.set(runs_of(positions[(positions >= 0) & (positions < end)]))

    def names(self, positions: Ints) -> bool:
        """Whether one of the positions is known to be metadata."""
        index = np.minimum(np.searchsorted(self._ends, positions, "right"), len(self._runs) - 1)
        inside = (self._runs[index, 0] <= positions) & (positions < self._ends[index])
        return bool(inside.any()) or bool(self._named.test(positions).any())

    def kept(self, to_preserve: Callable[[], SparseBits], owned: int, room: int) -> int:
        """Copies that data has no room for: none where there is room for everything.

        Counted now and then: from copy to copy it becomes less, until `count_again`.

        Args:
            to_preserve: Gives what would be copied if all of the volume were overwritten.
            owned: Blocks of the store.
            room: Copies that there is room for.
        """
        if self._count is None or self._asked >= max(64, self._count // 8):
            bits = to_preserve()
            self._count, self._total, self._asked = self.count(bits, owned), bits.total(), 0
        self._asked += 1
        return self._count if room < self._total - self._total // NEARLY else 0

    def count_again(self, rows: int) -> None:
        """Other blocks may be to preserve now, in a volume with so many rows of bits."""
        self._count = None
        if self._named.rows != rows:
            self._named = self._named.reshaped(rows, self._named.row_bytes)

    def count(self, to_preserve: SparseBits, owned: int) -> int:
        """Copies that are worth keeping while so much is to be preserved."""
        known = SparseBits.of(self._runs, to_preserve.rows, to_preserve.row_bytes)
        known |= self._named
        others = to_preserve.copy()
        others -= known
        unknown = others.total()
        transaction = self.most // 4 if self._journal >= 0 else 0  # without a journal nothing gets known
        return min(self.most, owned // 4, to_preserve.total() - unknown + min(transaction, unknown))
