"""The root: everything that one header commit makes true, and how it is written down (docs/FORMAT.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import construct
import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints, merge_runs
from extsnap.errors import StoreDamaged
from extsnap.snapshot import format as fmt
from extsnap.snapshot import limits

#: Rows (logical, physical, length).
Extents = npt.NDArray[np.int64]
NO_EXTENTS: Extents = np.zeros((0, 3), np.int64)
NO_FLAGS = fmt.SlotFlags(0)
NO_BLOCKS: Ints = np.zeros(0, np.int64)
NO_RUNS: Ints = np.zeros((0, 2), np.int64)
#: The two slots are the first two logical blocks of the store.
SLOT_BLOCKS = 2


@dataclass(frozen=True)
class Blob:
    """A byte string in the store: ``runs`` are logical (start, length)."""

    length: int
    crc: int
    runs: Ints


@dataclass(frozen=True)
class Pending:
    """An edit of the filesystem that was committed and may not be applied yet; its blocks are the REDO blob."""

    kind: fmt.PendingKind
    extents: Extents
    mapping: Ints
    size_blocks: int


@dataclass(frozen=True)
class RestoreIntent:
    """A restore that was committed; it is repeated until it is done."""

    target_id: int
    safety_id: int
    journal_sequence: int
    mapping: Ints


@dataclass
class Root:
    """Everything that one header commit makes true.

    Attributes:
        extents: Rows (logical, physical, length) that the store owns: data and metadata of extsnap.
        mapping: Physical blocks of the store inode's extent nodes or indirect blocks.
        size_blocks: Logical size of the store.
        counting: The counting bitmap: bit i is set where snapshot bit i is allocated.
        superblocks: Byte offsets of the superblocks that carry guard, mark and pointer.
        ro_compat: Feature word of the slots: what a writer must know.
        twins: Runs (start, length) of the second copies of blobs.
        log_twin: First logical block of the log's second copy; 0: there is none.
        log_batches: Batches of this epoch that were durable at the commit.
        incompat: Feature word of the slots: what everybody must know.
    """

    store_uuid: bytes
    fs_uuid: bytes
    block_size: int
    generation: int = 0
    flags: fmt.SlotFlags = NO_FLAGS
    extents: Extents = field(default_factory=lambda: NO_EXTENTS)
    mapping: Ints = field(default_factory=lambda: NO_BLOCKS)
    directory_inode: int = 0
    store_inode: int = 0
    directory_block: int = 0
    size_blocks: int = 0
    next_id: int = 1
    counting: int = 0
    blobs: dict[tuple[int, int], Blob] = field(default_factory=dict)
    log_epoch: int = 1
    log_start: int = SLOT_BLOCKS
    log_blocks: int = 0
    superblocks: list[int] = field(default_factory=list)
    pending: Pending | None = None
    restore: RestoreIntent | None = None
    properties: dict[str, str] = field(default_factory=dict)
    fingerprint: bytes = b""
    ro_compat: int = 0
    twins: dict[tuple[int, int], Ints] = field(default_factory=dict)
    log_twin: int = 0
    log_batches: int = 0
    incompat: int = 0

    @property
    def owned(self) -> int:
        """Blocks of ``extents``."""
        return int(self.extents[:, 2].sum())

    def allocation_runs(self) -> Ints:
        """Runs (start, length) of every block of extsnap: what the snapshot allocation bitmap holds."""
        mapping = np.stack([self.mapping, np.ones_like(self.mapping)], axis=1)
        return merge_runs(np.concatenate([self.extents[:, 1:], mapping]))

    def verify_places(self) -> None:
        """Refuse a root whose log or blobs lie outside the store, before anything is allocated for them.

        Raises:
            StoreDamaged: Names which.
        """
        size = int((self.extents[:, 0] + self.extents[:, 2]).max()) if len(self.extents) else 0
        if not 0 <= self.log_start <= self.log_start + self.log_blocks <= size or self.size_blocks > 2 * size + 8:
            raise StoreDamaged("root: the log lies outside the store")
        if not 0 <= self.log_twin <= self.log_twin + self.log_blocks <= size:
            raise StoreDamaged("root: the second copy of the log lies outside the store")
        places = [(name, blob.runs) for name, blob in self.blobs.items()]
        for (kind, key), runs in [*places, *self.twins.items()]:
            outside = len(runs) and (runs.min() < 0 or runs.max() > size or runs.sum(axis=1).max() > size)
            if outside or (len(runs) and runs[:, 1].sum() > size):
                raise StoreDamaged(f"root: blob {kind}.{key} lies outside the store")
            # All its blocks are read: a few bytes must not claim the whole store.
            length = self.blobs[kind, key].length
            if len(runs) and runs[:, 1].sum() > -(-length // self.block_size):
                raise StoreDamaged(f"root: blob {kind}.{key} of {length} bytes has more blocks than it needs")

    def build(self) -> bytes:
        """The root's bytes: its sections."""
        section = fmt.Section
        words = max(1, (self.counting.bit_length() + 63) // 64)
        place = fmt.Place.build(
            {
                "directory_inode": self.directory_inode,
                "store_inode": self.store_inode,
                "directory_block": self.directory_block,
                "next_id": self.next_id,
                "size_blocks": self.size_blocks,
            }
        )
        log = fmt.LogPlace.build({"epoch": self.log_epoch, "start": self.log_start, "blocks": self.log_blocks})
        blobs = np.zeros(len(self.blobs), fmt.BLOB_DTYPE)
        for index, ((kind, key), blob) in enumerate(sorted(self.blobs.items())):
            blobs[index] = (kind, key, blob.length, blob.crc, len(blob.runs))
        runs = [fmt.build_runs(blob.runs) for _, blob in sorted(self.blobs.items())]
        sections = [
            (section.EXTENTS, _extents_bytes(self.extents)),
            (section.MAPPING, self.mapping.astype("<u8").tobytes()),
            (section.PLACE, bytes(place)),
            (section.COUNTING_BITMAP, self.counting.to_bytes(words * 8, "little")),
            (section.BLOBS, blobs.tobytes()),
            (section.BLOB_RUNS, b"".join(runs)),
            (section.LOG, bytes(log)),
            (section.SUPERBLOCKS, np.array(self.superblocks, "<u8").tobytes()),
            (section.PROPERTIES, "".join(f"{k}={v}\n" for k, v in sorted(self.properties.items())).encode()),
            (section.FINGERPRINT, self.fingerprint),
            (section.ALLOCATION, fmt.build_runs(self.allocation_runs())),
        ]
        if self.twins:
            twins = np.zeros(len(self.twins), fmt.TWIN_DTYPE)
            for index, ((kind, key), mine) in enumerate(sorted(self.twins.items())):
                twins[index] = (kind, key, len(mine), 0)
            sections += [
                (section.TWINS, twins.tobytes()),
                (section.TWIN_RUNS, b"".join(fmt.build_runs(mine) for _, mine in sorted(self.twins.items()))),
            ]
        if self.log_twin:
            twin = fmt.LogTwin.build({"start": self.log_twin, "batches": self.log_batches})
            sections.append((section.LOG_TWIN, bytes(twin)))
        if self.pending:
            head = {"kind": self.pending.kind, "reserved": 0, "size_blocks": self.pending.size_blocks}
            sections += [
                (section.PENDING, bytes(fmt.PendingHead.build(head))),
                (section.PENDING_EXTENTS, _extents_bytes(self.pending.extents)),
                (section.PENDING_MAPPING, self.pending.mapping.astype("<u8").tobytes()),
            ]
        if self.restore:
            intent = {
                "target_id": self.restore.target_id,
                "safety_id": self.restore.safety_id,
                "journal_sequence": self.restore.journal_sequence,
                "reserved": 0,
            }
            sections += [
                (section.RESTORE, bytes(fmt.RestoreHead.build(intent))),
                (section.RESTORE_MAPPING, self.restore.mapping.astype("<u8").tobytes()),
            ]
        return fmt.build_sections([(int(kind), payload) for kind, payload in sections])

    @classmethod
    def parse(cls, slot: Any, raw: bytes, device_blocks: int) -> Root:
        """From a slot and the root that it names.

        Raises:
            StoreDamaged: Something is missing, or points outside the volume or onto itself.
        """
        section = fmt.Section
        parts = fmt.parse_sections(raw)
        try:
            place = fmt.Place.parse(parts[section.PLACE])
            log = fmt.LogPlace.parse(parts[section.LOG])
            blobs = _parse_blobs(parts[section.BLOBS], parts[section.BLOB_RUNS])
            root = cls(
                store_uuid=slot.store_uuid,
                ro_compat=int(slot.ro_compat),
                incompat=int(slot.incompat),
                fs_uuid=slot.fs_uuid,
                block_size=slot.block_size,
                generation=slot.generation,
                flags=fmt.SlotFlags(slot.flags),
                extents=_parse_extents(parts[section.EXTENTS], device_blocks),
                mapping=fmt.parse_table(parts[section.MAPPING], np.dtype("<u8"), "mapping").astype(np.int64),
                directory_inode=place.directory_inode,
                store_inode=place.store_inode,
                directory_block=place.directory_block,
                size_blocks=place.size_blocks,
                next_id=place.next_id,
                counting=int.from_bytes(parts[section.COUNTING_BITMAP], "little"),
                blobs=blobs,
                log_epoch=log.epoch,
                log_start=log.start,
                log_blocks=log.blocks,
                superblocks=[
                    int(at) for at in fmt.parse_table(parts[section.SUPERBLOCKS], np.dtype("<u8"), "superblocks")
                ],
                properties=dict(
                    line.split("=", 1) for line in parts[section.PROPERTIES].decode().split("\n") if "=" in line
                ),
                fingerprint=parts[section.FINGERPRINT],
            )
            if section.TWINS in parts:
                root.twins = _parse_twins(parts[section.TWINS], parts[section.TWIN_RUNS], blobs)
            if section.LOG_TWIN in parts:
                twin = fmt.LogTwin.parse(parts[section.LOG_TWIN])
                root.log_twin, root.log_batches = int(twin.start), int(twin.batches)
            if section.PENDING in parts:
                head = fmt.PendingHead.parse(parts[section.PENDING])
                root.pending = Pending(
                    fmt.PendingKind(head.kind),
                    _parse_extents(parts[section.PENDING_EXTENTS], device_blocks),
                    fmt.parse_table(parts[section.PENDING_MAPPING], np.dtype("<u8"), "pending").astype(np.int64),
                    int(head.size_blocks),
                )
            if section.RESTORE in parts:
                intent = fmt.RestoreHead.parse(parts[section.RESTORE])
                root.restore = RestoreIntent(
                    int(intent.target_id),
                    int(intent.safety_id),
                    int(intent.journal_sequence),
                    fmt.parse_table(parts[section.RESTORE_MAPPING], np.dtype("<u8"), "restore").astype(np.int64),
                )
        except KeyError as error:
            raise StoreDamaged(f"root: section {error} is missing") from error
        except (construct.ConstructError, ValueError) as error:
            raise StoreDamaged(f"root: {' '.join(str(error).split())}") from error
        root.verify_places()
        limits.require_root(root, device_blocks)
        if len(root.mapping) and (root.mapping.min() < 0 or root.mapping.max() >= device_blocks):
            raise StoreDamaged("root: a mapping block lies outside the volume")
        return root


def _extents_bytes(extents: Extents) -> bytes:
    table = np.zeros(len(extents), fmt.EXTENT_DTYPE)
    table["logical"], table["physical"], table["length"] = extents.T
    return table.tobytes()


def _parse_extents(raw: bytes, device_blocks: int) -> Extents:
    table = fmt.parse_table(raw, fmt.EXTENT_DTYPE, "extents")
    extents = np.stack([table["logical"], table["physical"], table["length"]], axis=1).astype(np.int64)
    if not len(extents):
        return NO_EXTENTS
    if extents.min() < 0 or (extents[:, 2] < 1).any() or extents.max() > device_blocks:
        raise StoreDamaged("extents: a length or an address is impossible")
    ends = extents[:, 0] + extents[:, 2]
    # Holes are filled before the file grows, so the store is never longer than the volume.
    if ends.max() > device_blocks:
        raise StoreDamaged("extents: the store is longer than the volume")
    by_physical = extents[np.argsort(extents[:, 1], kind="stable")]
    overlaps = (by_physical[:-1, 1] + by_physical[:-1, 2] > by_physical[1:, 1]).any()
    if (ends[:-1] > extents[1:, 0]).any() or overlaps or (extents[:, 1] + extents[:, 2]).max() > device_blocks:
        raise StoreDamaged("extents: out of order, overlapping or outside the volume")
    return extents


def _parse_blobs(raw: bytes, raw_runs: bytes) -> dict[tuple[int, int], Blob]:
    table = fmt.parse_table(raw, fmt.BLOB_DTYPE, "blobs")
    pairs = fmt.parse_runs(raw_runs, "blob runs")
    blobs, at = {}, 0
    for entry in table:  # one a blob: a few, whatever the size of the volume
        count = int(entry["runs"])
        blobs[int(entry["kind"]), int(entry["key"])] = Blob(
            int(entry["length"]), int(entry["crc"]), pairs[at : at + count]
        )
        at += count
    if at != len(pairs):
        raise StoreDamaged("blobs: the runs do not add up")
    return blobs


def _parse_twins(raw: bytes, raw_runs: bytes, blobs: dict[tuple[int, int], Blob]) -> dict[tuple[int, int], Ints]:
    table = fmt.parse_table(raw, fmt.TWIN_DTYPE, "twins")
    runs = fmt.parse_table(raw_runs, fmt.RUN_DTYPE, "twin runs")
    pairs = np.stack([runs["start"], runs["length"]], axis=1).astype(np.int64)
    ends = np.cumsum(table["runs"], dtype=np.int64)
    if (int(ends[-1]) if len(ends) else 0) != len(pairs):
        raise StoreDamaged("twins: the runs do not add up")
    names = zip(table["kind"].tolist(), table["key"].tolist(), strict=True)
    twins = dict(zip(names, np.split(pairs, ends[:-1]), strict=True)) if len(table) else {}
    for name, mine in twins.items():
        if name not in blobs or int(blobs[name].runs[:, 1].sum()) != int(mine[:, 1].sum()):
            raise StoreDamaged(f"twins: blob {name[0]}.{name[1]} has none of this size")
    return twins
