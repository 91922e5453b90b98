"""Parts of an index level: a checksum for every 256 records, and which snapshots have records there.

Each level is in the store twice, and each copy has one checksum.  Where both are damaged, this table says which parts
are whole in either copy: damage in different places of the two loses nothing.  Of a part that is whole in neither the
records are lost, and the table says of which snapshots and of which blocks they were at most.  These snapshots cannot
be read there; all others are read as ever.

The table names the checksums of the two blobs that it is about.  One that is of an older level is passed by: so a
writer that does not know of it does no harm.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints, distinct
from extsnap.errors import StoreDamaged
from extsnap.snapshot import format as fmt
from extsnap.snapshot import limits
from extsnap.snapshot.index import PART_RECORDS, Level
from extsnap.snapshot.masks import MaskTable
from extsnap.snapshot.store import Store

Words = npt.NDArray[np.uint64]

#: Records of a part that is written: 7 KiB of them.
RECORDS = 256
#: Masks of more words than this are not in the table: then a lost part may be any snapshot's.
WORDS_MAX = 16
#: Parts of the largest level.
PARTS_MAX = limits.TABLE_BYTES[fmt.BlobKind.INDEX] // fmt.RECORD_DTYPE.itemsize // RECORDS
#: Bytes of the table for each record, at most: `RECORDS` of them share a row.
BYTES_A_RECORD = 0.625
CRC_BYTES = 4
#: Parts that are looked at together.
_AT_ONCE = 1024
_HEAD = struct.Struct("<IIII")  # crc of the blob INDEX, crc of INDEX_CRCS, words of a mask, records of a part
_ROW = np.dtype(
    [("first", "<u8"), ("end", "<u8"), ("crc", "<u4"), ("crcs_crc", "<u4"), ("crcs", "<u4"), ("reserved", "<u4")]
)
assert _ROW.itemsize == 32
assert (_ROW.itemsize + 8 * WORDS_MAX) / RECORDS <= BYTES_A_RECORD
assert PART_RECORDS % RECORDS == 0


def table_bytes(records: int, words: int) -> int:
    """Bytes of the table of a level."""
    return _HEAD.size + -(-records // RECORDS) * (_ROW.itemsize + 8 * _stored_words(words))


def _stored_words(words: int) -> int:
    return words if words <= WORDS_MAX else 0


class Writer:
    """Makes the table while a level goes out.

    Args:
        level: The level; what it is asked for of a part, `build` has made the bytes of.
        masks: The masks that it names.
    """

    def __init__(self, level: Level, masks: MaskTable) -> None:
        self._level = level
        self._masks = masks
        self._rows: list[np.ndarray[Any, Any]] = []
        self._words: list[Words] = []

    def pieces(self) -> Iterator[bytes]:
        """The level's records as they go to the medium."""
        level, size = self._level, RECORDS * fmt.RECORD_DTYPE.itemsize
        for part in level.parts():
            raw = level.build(part)
            starts = np.arange(part.start, min(part.stop, len(level)), RECORDS)
            rows = np.zeros(len(starts), _ROW)
            inside = starts - part.start
            rows["first"] = level.block[starts]
            rows["end"] = np.maximum.reduceat(level.block[part] + level.length[part], inside)
            rows["crc"] = [fmt.crc(raw[at : at + size]) for at in range(0, len(raw), size)]
            end = int(level.crc_at[part.stop]) if part.stop < len(level) else len(level.crcs)
            borders = np.append(level.crc_at[starts], end)
            rows["crcs"] = np.diff(borders)
            crcs = [level.crcs[low:high] for low, high in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)]
            rows["crcs_crc"] = [fmt.crc(some.astype("<u4", copy=False).tobytes()) for some in crcs]
            self._rows.append(rows)
            if _stored_words(self._masks.words):
                self._words.append(np.bitwise_or.reduceat(self._masks.rows[level.mask[part]], inside, axis=0))
            yield raw

    def build(self, index_crc: int, crcs_crc: int) -> bytes:
        """The table, after the last piece."""
        words = _stored_words(self._masks.words)
        rows = np.concatenate(self._rows)
        out = np.zeros(len(rows), np.dtype([("row", _ROW), ("words", "<u8", (words,))]))
        out["row"] = rows
        if words:
            out["words"] = np.concatenate(self._words)
        return _HEAD.pack(index_crc, crcs_crc, words, RECORDS) + out.tobytes()


@dataclass
class Lost:
    """Parts that are whole in neither copy; all arrays have one element a part.

    Attributes:
        first, end: int64, blocks of the base volume from where to where lost records may have been.
        words: uint64[n, words], the bits of the snapshots that they may have named; all where that is not known.
        texts: What they are, for messages.
    """

    first: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    end: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    words: Words = field(default_factory=lambda: np.zeros((0, 1), np.uint64))
    texts: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(len(self.first))

    def of(self, bit: int) -> npt.NDArray[np.bool_]:
        """bool[n]: which of them the snapshot with this bit may have records in."""
        if bit // 64 >= self.words.shape[1]:
            return np.zeros(len(self.first), np.bool_)
        return ((self.words[:, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)).astype(np.bool_)

    def covered(self, bit: int, blocks: Ints) -> npt.NDArray[np.bool_]:
        """bool[n]: of which ``blocks`` (sorted) the record, if this snapshot has none elsewhere, may be lost."""
        out = np.zeros(len(blocks), np.bool_)
        mine = self.of(bit)
        low, high = (np.searchsorted(blocks, column[mine]) for column in (self.first, self.end))
        for start, stop in np.stack([low, high], axis=1)[low < high].tolist():
            out[start:stop] = True
        return out

    def add(self, other: Lost) -> None:
        """Those of another level as well."""
        wide = max(self.words.shape[1], other.words.shape[1])
        padded = [np.pad(words, ((0, 0), (0, wide - words.shape[1]))) for words in (self.words, other.words)]
        self.first, self.end = np.append(self.first, other.first), np.append(self.end, other.end)
        self.words, self.texts = np.concatenate(padded), self.texts + other.texts

    def only(self, alive: Words) -> Lost:
        """Those that matter to any of the snapshots in a mask."""
        wide = min(len(alive), self.words.shape[1])
        keep: npt.NDArray[np.bool_] = np.asarray((self.words[:, :wide] & alive[:wide]).any(axis=1))
        texts = [text for text, mine in zip(self.texts, keep.tolist(), strict=True) if mine]
        return Lost(self.first[keep], self.end[keep], self.words[keep], texts)


class Parts:
    """The table of one level, and where each part of it is whole.

    Attributes:
        each: Records of a part; the last one may have fewer.
        records: Of the level.
        index_whole, crcs_whole: bool[2, n]: which parts are whole in each copy, of the records and of their checksums.
    """

    def __init__(self, store: Store, key: int) -> None:
        """Read the table and look at every part of both copies of the level.

        Raises:
            StoreDamaged: There is no table, none that is whole, or it is of another level.
        """
        index, crcs = fmt.BlobKind.INDEX, fmt.BlobKind.INDEX_CRCS
        self._store, self._key = store, key
        raw = store.read_blob(fmt.BlobKind.INDEX_PARTS, key)
        if len(raw) < _HEAD.size:
            raise StoreDamaged(f"store: the parts of index level {key} are cut off")
        index_crc, crcs_crc, words, self.each = _HEAD.unpack_from(raw)
        self.records = store.blob_length(index, key) // fmt.RECORD_DTYPE.itemsize
        count = -(-self.records // max(1, self.each))
        fits = len(raw) == _HEAD.size + count * (_ROW.itemsize + 8 * words)
        if not (self.each and fits and 0 < count <= PARTS_MAX):
            raise StoreDamaged(f"store: the parts of index level {key} are not as many as it has")
        table = np.frombuffer(raw, np.dtype([("row", _ROW), ("words", "<u8", (words,))]), count, _HEAD.size)
        self._rows = table["row"]
        self.crc_starts = np.append(0, np.cumsum(self._rows["crcs"].astype(np.int64)))
        blobs = store.root.blobs.get((index, key)), store.root.blobs.get((crcs, key))
        is_of = [blob.crc for blob in blobs if blob is not None] == [index_crc, crcs_crc]
        if not is_of or int(self.crc_starts[-1]) * CRC_BYTES != store.blob_length(crcs, key):
            raise StoreDamaged(f"store: the parts of index level {key} are of another one")
        self._words = table["words"].astype(np.uint64)
        self._blocks = {
            (kind, copy): store.blob_blocks(kind, key, copy)
            for kind in (index, crcs)
            for copy in range(2 if (kind, key) in store.root.twins else 1)
        }
        self.index_whole, self.crcs_whole = (self._look(kind) for kind in (index, crcs))

    def bytes_of(self, kind: fmt.BlobKind, part: int) -> tuple[int, int]:
        """Where a part begins and ends in the blob."""
        if kind == fmt.BlobKind.INDEX:
            size = fmt.RECORD_DTYPE.itemsize
            return part * self.each * size, min((part + 1) * self.each, self.records) * size
        return int(self.crc_starts[part]) * CRC_BYTES, int(self.crc_starts[part + 1]) * CRC_BYTES

    def _look(self, kind: fmt.BlobKind) -> npt.NDArray[np.bool_]:
        expected = self._rows["crc" if kind == fmt.BlobKind.INDEX else "crcs_crc"]
        whole = np.zeros((2, len(expected)), np.bool_)
        for copy in (copy for of, copy in self._blocks if of == kind):
            for low in range(0, len(expected), _AT_ONCE):
                borders = [self.bytes_of(kind, part) for part in range(low, min(low + _AT_ONCE, len(expected)))]
                begin = borders[0][0]
                raw = memoryview(self._read(kind, copy, begin, borders[-1][1]))
                found = [fmt.crc(raw[start - begin : end - begin]) for start, end in borders]
                whole[copy, low : low + len(found)] = np.array(found, np.uint32) == expected[low : low + len(found)]
        return whole

    def read(self, kind: fmt.BlobKind, part: int, copy: int) -> bytes:
        """The bytes of a part in a copy of a blob, whatever they are."""
        return self._read(kind, copy, *self.bytes_of(kind, part))

    def _read(self, kind: fmt.BlobKind, copy: int, start: int, end: int) -> bytes:
        store = self._store
        low, high = start // store.block_size, -(-end // store.block_size)
        blocks = self._blocks[kind, copy][low:high]
        return store.read_blocks(blocks).tobytes()[start - low * store.block_size :][: end - start]

    def content(self, kind: fmt.BlobKind, part: int) -> bytes:
        """The bytes of a part from the copy in which it is whole."""
        whole = self.index_whole if kind == fmt.BlobKind.INDEX else self.crcs_whole
        return self.read(kind, part, int(whole[:, part].argmax()))

    @property
    def there(self) -> npt.NDArray[np.bool_]:
        """bool[n]: which parts can be had."""
        return np.asarray(self.index_whole.any(axis=0) & self.crcs_whole.any(axis=0))

    def blocks_of(self, part: int) -> Ints:
        """The physical blocks of the records of a part, in both copies."""
        store, kind = self._store, fmt.BlobKind.INDEX
        start, end = self.bytes_of(kind, part)
        low, high = start // store.block_size, -(-end // store.block_size)
        blocks = [blocks[low:high] for (of, _), blocks in self._blocks.items() if of == kind]
        return distinct(store.physical(np.concatenate(blocks)))

    def level(self) -> Level:
        """What there is of the level; it is to be written anew if that is not all."""
        there = np.flatnonzero(self.there).tolist()
        counts = [len(self.read(fmt.BlobKind.INDEX, part, 0)) // fmt.RECORD_DTYPE.itemsize for part in there]
        tables = (np.frombuffer(self.content(fmt.BlobKind.INDEX, part), fmt.RECORD_DTYPE) for part in there)
        crcs = [np.frombuffer(self.content(fmt.BlobKind.INDEX_CRCS, part), "<u4") for part in there]
        joined = np.concatenate([np.zeros(0, np.uint32), *crcs])
        stored = self._key if self.there.all() else -1
        return Level.gather(sum(counts), limits.sound_records(tables, sum(counts)), joined, stored)

    def lost(self, blocks: int, words: int) -> Lost:
        """The parts that cannot be had.

        Args:
            blocks: Of the volume.
            words: Of the store's masks, for parts of which the snapshots are not known.
        """
        gone = np.flatnonzero(~self.there)
        first, end = (np.minimum(self._rows[name][gone], blocks).astype(np.int64) for name in ("first", "end"))
        known = self._words[gone] if self._words.shape[1] else np.full((len(gone), words), ~np.uint64(0), np.uint64)
        texts = [
            f"part {part} of index level {self._key} fails its checksum in both copies (blocks "
            + ", ".join(map(str, self.blocks_of(part)[:8].tolist()))
            + (", ...)" if len(self.blocks_of(part)) > 8 else ")")
            for part in gone.tolist()
        ]
        return Lost(first, end, known, texts)
