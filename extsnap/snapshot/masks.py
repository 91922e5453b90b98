"""Counting bitmaps: which snapshot instances share a copy.

A mask has one bit for each snapshot instance and grows by 64 bits at a time.  Records bear the id of an
interned mask, so ten million records that name the same snapshots hold one mask, and deleting a snapshot
touches this table (through the header's allocated bits), not the records.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from extsnap.errors import StoreDamaged

Words = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.uint32]

#: Masks that may stay unused before the table is worth numbering anew, which writes every record again.
_SLACK = 64


def mask_of(bits: list[int], words: int) -> Words:
    """uint64[words] with the given bits set."""
    value = 0
    for bit in bits:
        value |= 1 << bit
    return np.frombuffer(value.to_bytes(words * 8, "little"), "<u8").astype(np.uint64)


def words_for(bit: int) -> int:
    """How many 64-bit words a mask needs to hold ``bit``."""
    return bit // 64 + 1


class MaskTable:
    """Interned masks, in order of their ids.

    Attributes:
        count: Number of masks.
        words: Width of every mask in 64-bit words.
    """

    def __init__(self, rows: Words | None = None, words: int = 1) -> None:
        rows = np.zeros((0, words), np.uint64) if rows is None else rows
        self.words: int = rows.shape[1]
        self._rows = rows
        self.count = len(rows)
        self._ids = {row.tobytes(): index for index, row in enumerate(rows)}

    @classmethod
    def parse(cls, raw: bytes) -> MaskTable:
        """From the store's blob: the width in words (u64), then the masks.

        Raises:
            StoreDamaged: It is no whole number of masks.
        """
        words, size = int.from_bytes(raw[:8], "little"), len(raw) - 8
        if size < 0 or not words or size % (8 * words):
            raise StoreDamaged(f"masks: {len(raw)} bytes are not a whole number of masks of {words} words")
        return cls(np.frombuffer(raw[8:], "<u8").reshape(-1, words).astype(np.uint64)) if size else cls()

    @property
    def rows(self) -> Words:
        """uint64[count, words]."""
        return self._rows[: self.count]

    def widen(self, words: int) -> None:
        """Make every mask at least ``words`` wide."""
        if words <= self.words:
            return
        grown = np.zeros((len(self._rows), words), np.uint64)
        grown[:, : self.words] = self._rows
        self._rows, self.words = grown, words
        self._ids = {row.tobytes(): index for index, row in enumerate(self.rows)}

    def intern(self, masks: Words) -> Ids:
        """Ids of ``masks`` (uint64[n, words]), new masks being added: uint32[n]."""
        masks = np.ascontiguousarray(masks)
        keys = masks.view(np.dtype((np.void, masks.shape[1] * 8))).ravel()
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        ids = np.zeros(len(unique), np.uint32)
        for index, row in enumerate(masks[first]):  # distinct masks only, a handful a batch
            ids[index] = self._intern_one(row)
        return ids[inverse]

    def _intern_one(self, row: Words) -> int:
        key = row.tobytes()
        found = self._ids.get(key)
        if found is not None:
            return found
        if self.count == len(self._rows):
            grown = np.zeros((max(16, 2 * self.count), self.words), np.uint64)
            grown[: self.count] = self._rows
            self._rows = grown
        self._rows[self.count] = row
        self._ids[key] = self.count
        self.count += 1
        return self.count - 1

    def has(self, bit: int) -> npt.NDArray[np.bool_]:
        """bool[count]: which masks name the snapshot with this bit."""
        if bit // 64 >= self.words:
            return np.zeros(self.count, np.bool_)
        return ((self.rows[:, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)).astype(np.bool_)

    def bits(self) -> npt.NDArray[np.bool_]:
        """bool[count, 64 * words]: the table unpacked."""
        return np.unpackbits(
            np.ascontiguousarray(self.rows.astype("<u8")).view(np.uint8).reshape(self.count, self.words * 8),
            axis=1,
            bitorder="little",
        ).astype(np.bool_)

    def intern_exactly(self, masks: Words) -> None:
        """While replaying the log: append ``masks`` under the next ids, which is how their records name them."""
        if masks.shape[1] < self.words:
            masks = np.concatenate([masks, np.zeros((len(masks), self.words - masks.shape[1]), np.uint64)], axis=1)
        self._rows = np.concatenate([self.rows, masks])
        self.count = len(self._rows)
        for index in range(self.count - len(masks), self.count):
            self._ids.setdefault(self._rows[index].tobytes(), index)

    def restrict(self, alive: Words) -> None:
        """Drop the bits of deleted snapshots from every mask; ids stay."""
        self._rows = self._rows & alive
        self._ids = {}
        for index, row in enumerate(self.rows):
            self._ids.setdefault(row.tobytes(), index)

    def compact(self, used: npt.NDArray[np.bool_]) -> Ids | None:
        """Number the masks anew, once most of them are unused or equal to others.

        Args:
            used: bool[count], which ids records bear.

        Returns:
            uint32[count], the new id of every old one that is used; or None, and nothing was changed.
        """
        rows, inverse = np.unique(self.rows[used], axis=0, return_inverse=True)
        if self.count < 2 * len(rows) + _SLACK:
            return None
        ids = np.zeros(self.count, np.uint32)
        ids[used] = inverse.reshape(-1)
        self._rows, self.count = rows, len(rows)
        self._ids = {row.tobytes(): index for index, row in enumerate(rows)}
        return ids
