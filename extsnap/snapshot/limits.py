"""What a store cannot hold, whatever its checksums say: whoever can write an image can compute a crc32c.

A sparse image of 16 TiB is a few KiB on the host, so the size of the device bounds nothing that is read whole.
Everything here is asked before the memory or the time is spent that it bounds; no store that extsnap writes comes
near a limit, and those of whole tables are asked by the writer as well (`table_limit`), before its commit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from extsnap.arrays import Ints
from extsnap.errors import StoreDamaged, VolumeFull
from extsnap.snapshot import format as fmt
from extsnap.snapshot.index import PART_RECORDS, RUN_MAX, Level
from extsnap.snapshot.medium import PRIMARY_OFFSET

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from extsnap.snapshot.root import Root

#: Bytes of a root, and of the log.
ROOT_BYTES, LOG_BYTES = 32 << 20, 64 << 20
#: Logical blocks of a store: bit arrays of them are in memory.
STORE_BLOCKS = 1 << 29
#: Snapshots, and so bits of a mask.
SNAPSHOTS = 1 << 16
#: Blobs, and superblocks that carry guard, mark and pointer.
BLOBS, SUPERBLOCKS = 4096, 1 << 20
#: Bytes of the tables that are in memory whole.
TABLE_BYTES: dict[int, int] = {
    fmt.BlobKind.SNAPSHOTS: 32 << 20,
    fmt.BlobKind.MASKS: 64 << 20,
    fmt.BlobKind.HISTORY: 128 << 20,
    fmt.BlobKind.HISTORY_TWINS: 128 << 20,
    fmt.BlobKind.REDO: 256 << 20,
    fmt.BlobKind.HIDDEN: 128 << 20,
    # Read a piece at a time: one of each of the 2^32 blocks that a volume can have.
    fmt.BlobKind.CHECKSUMS: 4 << 32,
    fmt.BlobKind.INDEX: (1 << 25) * fmt.RECORD_DTYPE.itemsize,
    fmt.BlobKind.INDEX_CRCS: STORE_BLOCKS * 4,
    fmt.BlobKind.INDEX_PARTS: 32 << 20,
}
#: Bytes of a blob that only a later version knows.
OTHER_BYTES = 256 << 20


def require_slot(root_bytes: int, chain_blocks: int, block_size: int) -> None:
    """Refuse a slot whose root cannot be one, before its chain is read.

    Raises:
        StoreDamaged: It is longer than a root, or its chain longer than it needs.
    """
    room = block_size - fmt.SEGMENT_HEADER
    if root_bytes > ROOT_BYTES or chain_blocks > -(-root_bytes // room):
        raise StoreDamaged(f"a root of {root_bytes} bytes in {chain_blocks} blocks is impossible")


def require_root(root: Root, device_blocks: int) -> None:
    """Refuse a root of which something is too large to be read, or points out of the volume.

    Raises:
        StoreDamaged: Names what.
    """
    size = int((root.extents[:, 0] + root.extents[:, 2]).max()) if len(root.extents) else 0
    if size > STORE_BLOCKS:
        raise StoreDamaged(f"root: a store of {size} blocks is impossible")
    primary = PRIMARY_OFFSET // root.block_size
    if ((root.extents[:, 1] <= primary) & (primary < root.extents[:, 1:].sum(axis=1))).any():
        raise StoreDamaged("root: the store cannot have the superblock's block")  # it would read as zeros
    if root.log_blocks * root.block_size > LOG_BYTES:
        raise StoreDamaged(f"root: a log of {root.log_blocks} blocks is impossible")
    if len(root.blobs) > BLOBS or len(root.superblocks) > SUPERBLOCKS:
        raise StoreDamaged("root: more blobs or superblocks than there can be")
    if root.counting.bit_length() > SNAPSHOTS:
        raise StoreDamaged(f"root: snapshots have bits beyond {SNAPSHOTS}")
    for (kind, key), blob in root.blobs.items():
        if blob.length > TABLE_BYTES.get(kind, OTHER_BYTES):
            raise StoreDamaged(f"root: a blob {kind}.{key} of {blob.length} bytes is impossible")
    mappings = [root.pending.mapping] if root.pending else []
    mappings += [root.restore.mapping] if root.restore else []
    for mapping in mappings:
        if len(mapping) and (mapping.min() < 1 or mapping.max() >= device_blocks):
            raise StoreDamaged("root: a mapping block of what is pending lies outside the volume")


def table_limit(kind: int, length: int) -> None:
    """Refuse to write a table that no reader would take.

    Raises:
        VolumeFull: It is too large; nothing was written.
    """
    limit = TABLE_BYTES.get(kind, OTHER_BYTES)
    if length > limit:
        raise VolumeFull(
            f"the table of {fmt.name_of_blob(kind)} would have {length} bytes and can have {limit}",
            hint="delete snapshots that are not needed any more",
        )


def root_limit(root: Root, length: int) -> None:
    """Refuse to commit a root that no reader would take.

    Raises:
        VolumeFull: Something of it is too large; nothing was written.
    """
    size = int((root.extents[:, 0] + root.extents[:, 2]).max()) if len(root.extents) else 0
    if length > ROOT_BYTES or size > STORE_BLOCKS or root.counting.bit_length() > SNAPSHOTS:
        raise VolumeFull(
            f"the header would have {length} bytes, {size} blocks and {root.counting.bit_length()} snapshots: too much",
            hint="delete snapshots that are not needed any more",
        )


def require_snapshots(table: Sequence[fmt.Snapshot]) -> None:
    """Refuse a table of living snapshots that no series of commands can have made.

    A name is part of paths (``snapshots/NAME``), so one that breaks the rules is not only odd.

    Raises:
        StoreDamaged: Two have the same bit, id or name, or a name breaks a rule.
    """
    for entry in table:
        fault = fmt.fault_of_name(entry.name)
        if fault:
            raise StoreDamaged(f"snapshot table: the name {entry.name!a} {fault}")
    for what in ("bit", "id", "name"):
        if len({getattr(entry, what) for entry in table}) < len(table):
            raise StoreDamaged(f"snapshot table: two snapshots have the same {what}")


def sound_records(tables: Iterable[np.ndarray[Any, Any]], count: int) -> Iterator[np.ndarray[Any, Any]]:
    """The pieces of a table of ``count`` records; those of a large one are looked at before there is memory for more.

    Holes of a sparse image are no records.  Of a table of one piece the checksum has the first word: it tells damage
    from a lie.

    Raises:
        StoreDamaged: A record has an impossible length.
    """
    for table in tables:
        if count > PART_RECORDS and ((table["length"] < 1) | (table["length"] > RUN_MAX)).any():
            raise StoreDamaged("index: a record is impossible")
        yield table


def require_sparse(levels: Sequence[Level], bits: int) -> None:
    """Refuse more records for some blocks than there can be snapshots: work on a block costs what it has records.

    Records of one block have masks without common bits, so a block has at most ``bits`` of them, and those that
    begin in a span of RUN_MAX blocks reach over less than two.

    Raises:
        StoreDamaged: Names about where.
    """
    spans, sums = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for level in levels:
        for part in level.parts():
            span = level.block[part] // RUN_MAX
            first = np.flatnonzero(np.diff(span, prepend=-1))
            spans.append(span[first])
            sums.append(np.add.reduceat(level.length[part], first))
    span, inverse = np.unique(np.concatenate(spans), return_inverse=True)
    reach = np.bincount(inverse, np.concatenate(sums), len(span))
    crowded = np.flatnonzero(reach > 2 * RUN_MAX * bits)
    if len(crowded):
        raise StoreDamaged(f"index: more records at block {int(span[crowded[0]]) * RUN_MAX} than there can be")


def require_hidden(runs: np.ndarray[Any, Any], blocks: int) -> None:
    """Refuse runs of hidden blocks that nobody writes so: a million of them over all of a volume take hours to set.

    Raises:
        StoreDamaged: One lies outside the volume, or they are not sorted and apart.
    """
    if len(runs) and (runs.min() < 0 or (runs[:, 1] < 1).any() or (runs[:, 0] > blocks - runs[:, 1]).any()):
        raise StoreDamaged("hidden runs: one lies outside the volume")
    if (runs[1:, 0] < runs[:-1].sum(axis=1)).any():
        raise StoreDamaged("hidden runs: two have the same blocks")


def require_once(blocks: Ints, name: str) -> None:
    """Refuse what was found for one snapshot if a block (sorted) has two records: either could be wrong.

    Raises:
        StoreDamaged: Names the block and the snapshot.
    """
    twice = np.flatnonzero(blocks[1:] == blocks[:-1])
    if len(twice):
        raise StoreDamaged(
            f"snapshot {name!a}: block {int(blocks[twice[0]])} has two records", hint="run extsnap check"
        )
