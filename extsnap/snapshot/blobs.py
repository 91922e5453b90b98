"""How the engine's tables stand in blobs of the store: levels of the index, masks, history, hidden runs.

Whatever is read is the first copy that is whole; what is written is true with the next header commit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints
from extsnap.errors import StoreDamaged
from extsnap.snapshot import format as fmt
from extsnap.snapshot import limits
from extsnap.snapshot.history import History
from extsnap.snapshot.index import Level, gathered
from extsnap.snapshot.masks import MaskTable
from extsnap.snapshot.parts import Lost, Parts, Writer
from extsnap.snapshot.store import Store

CRC_DTYPE = np.dtype("<u4")


def read_level(store: Store, key: int, blocks: int, words: int) -> tuple[Level, Lost]:
    """A level of the index, and the parts of it that are whole in neither copy.

    Records and checksums are two blobs, each of which may be damaged by itself.

    Args:
        blocks: Of the base volume.
        words: Of a mask.

    Raises:
        StoreDamaged: Nothing tells where it is damaged, or it is too large.
    """
    records = fmt.BlobKind.INDEX
    count = store.blob_length(records, key) // fmt.RECORD_DTYPE.itemsize
    try:
        level = store.first_whole(
            records,
            key,
            lambda copy: Level.gather(
                count,
                limits.sound_records(store.read_table(records, key, fmt.RECORD_DTYPE, copy), count),
                store.first_whole(fmt.BlobKind.INDEX_CRCS, key, lambda copy: _read_crcs(store, key, copy)),
                key,
            ),
        )
        return level, Lost()
    except MemoryError as error:
        raise StoreDamaged(f"index {key}: {count} records are more than memory holds") from error
    except StoreDamaged as error:
        try:
            parts = Parts(store, key)
        except StoreDamaged:
            raise error from None  # all that could tell is lost as well, or never was there
        store.worn = True
        return parts.level(), parts.lost(blocks, words)


def _read_crcs(store: Store, key: int, copy: int) -> npt.NDArray[np.uint32]:
    crcs = fmt.BlobKind.INDEX_CRCS
    count = store.blob_length(crcs, key) // CRC_DTYPE.itemsize
    return gathered(count, store.read_table(crcs, key, CRC_DTYPE, copy))


def write_level(store: Store, level: Level, masks: MaskTable, key: int) -> None:
    """Put a level into the blobs under ``key``."""
    parts, blobs = Writer(level, masks), store.root.blobs
    store.write_pieces(fmt.BlobKind.INDEX, key, len(level) * fmt.RECORD_DTYPE.itemsize, parts.pieces())
    crcs = level.crcs.astype(CRC_DTYPE, copy=False)
    store.write_blob(fmt.BlobKind.INDEX_CRCS, key, crcs.tobytes())
    table = parts.build(blobs[fmt.BlobKind.INDEX, key].crc, blobs[fmt.BlobKind.INDEX_CRCS, key].crc)
    store.write_blob(fmt.BlobKind.INDEX_PARTS, key, table)
    level.stored, level.touched = key, False


def drop_levels(store: Store, kept: set[int]) -> None:
    """Drop all levels but those under the keys ``kept``."""
    kinds = (fmt.BlobKind.INDEX, fmt.BlobKind.INDEX_CRCS, fmt.BlobKind.INDEX_PARTS)
    for kind, key in list(store.root.blobs):
        if kind in kinds and key not in kept:
            store.drop_blob(fmt.BlobKind(kind), key)


def read_masks(store: Store) -> MaskTable:
    """The mask table; an empty one where there is none."""
    if (fmt.BlobKind.MASKS, 0) not in store.root.blobs:
        return MaskTable()
    return MaskTable.parse(store.read_blob(fmt.BlobKind.MASKS, 0))


def write_masks(store: Store, masks: MaskTable) -> None:
    """Put the mask table into its blob."""
    head = masks.words.to_bytes(8, "little")
    store.write_blob(fmt.BlobKind.MASKS, 0, head + masks.rows.astype("<u8").tobytes())


def read_history(store: Store, rows: int, row_bytes: int) -> History:
    """The history, of ``rows`` rows of bits; an empty one where there is none."""
    table = np.zeros(0, fmt.HISTORY_DTYPE)
    twins = None
    if (fmt.BlobKind.HISTORY, 0) in store.root.blobs:
        table = fmt.parse_table(store.read_blob(fmt.BlobKind.HISTORY, 0), fmt.HISTORY_DTYPE, "history")
    if (fmt.BlobKind.HISTORY_TWINS, 0) in store.root.blobs:
        raw = store.read_blob(fmt.BlobKind.HISTORY_TWINS, 0)
        twins = fmt.parse_table(raw, fmt.HISTORY_TWIN_DTYPE, "history twins").astype(np.int64)
    return History(rows, row_bytes, table, store.read_blocks, twins)


def write_history(store: Store, history: History) -> None:
    """Put the history table into its blobs."""
    store.write_blob(fmt.BlobKind.HISTORY, 0, history.table.tobytes())
    store.write_blob(fmt.BlobKind.HISTORY_TWINS, 0, history.twins.astype(fmt.HISTORY_TWIN_DTYPE).tobytes())


def read_hidden(store: Store) -> Ints:
    """Hidden runs (start, length) of blocks: int64[n, 2]; none where there are none."""
    if (fmt.BlobKind.HIDDEN, 0) not in store.root.blobs:
        return np.zeros((0, 2), np.int64)
    return store.first_whole(fmt.BlobKind.HIDDEN, 0, lambda copy: _read_runs(store, copy))


def _read_runs(store: Store, copy: int) -> Ints:
    runs = np.zeros((store.blob_length(fmt.BlobKind.HIDDEN, 0) // fmt.RUN_DTYPE.itemsize, 2), np.int64)
    at = 0
    for table in store.read_table(fmt.BlobKind.HIDDEN, 0, fmt.RUN_DTYPE, copy):
        runs[at : at + len(table), 0], runs[at : at + len(table), 1] = table["start"], table["length"]
        at += len(table)
    return runs


def write_hidden(store: Store, runs: bytes) -> None:
    """Put the hidden runs into their blob; the feature is in the header while there are any."""
    if runs:
        store.write_blob(fmt.BlobKind.HIDDEN, 0, runs)
    else:
        store.drop_blob(fmt.BlobKind.HIDDEN, 0)
    store.root.incompat = fmt.INCOMPAT_HIDDEN_RUNS if runs else 0
