"""Checking the store against itself, against the filesystem, and every copy against its checksum.

`check_store` and `check_piece` change nothing.  `note` makes known what they found: it rewrites what has a whole second
copy (see `twins`) and commits the states of the snapshots, with one header commit that a crash takes whole or not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints, breaks_to_runs, expand, jumps
from extsnap.errors import ExtsnapError
from extsnap.snapshot import checksums, graft
from extsnap.snapshot import format as fmt
from extsnap.snapshot.index import Level
from extsnap.snapshot.twins import examine
from extsnap.sparsebits import SparseBits

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

Flags = npt.NDArray[np.bool_]

#: Blocks of the base volume whose records are looked at together.
SPAN_BLOCKS = 8192
#: Copy blocks verified at once.
PIECE_BLOCKS = 4096
#: Damaged copies named one by one; the rest is counted.
NAMED = 20


@dataclass
class Findings:
    """What is wrong.

    Attributes:
        errors: Of the store.
        worn: Whether a structure has a damaged copy and a whole one.
        by_snapshot: Of the snapshots, by name.
        blocks: Runs [first block, length] of what cannot be read, or is not as it was, by name of the snapshot.
        proven: Snapshots whose checksums prove every block.
    """

    errors: list[str] = field(default_factory=list)
    worn: bool = False
    by_snapshot: dict[str, list[str]] = field(default_factory=dict)
    blocks: dict[str, list[list[int]]] = field(default_factory=dict)
    proven: list[str] = field(default_factory=list)
    _damaged: int = 0
    _named: int = 0
    _doubled: int = 0

    def add(self, piece: dict[str, Any]) -> None:
        """Take in what `check_piece` found."""
        self._doubled += piece["doubled"]
        for first, length, names in piece["damaged"]:
            if not names:
                continue
            self._damaged += length
            if self._named < NAMED:
                self._named += 1
                self.errors.append(_copies_text(first, length))
            for name in names:
                mine = self.by_snapshot.setdefault(name, [])
                if len(mine) < NAMED:
                    mine.append(
                        f"block {first} cannot be read: its copy fails its checksum"
                        if length == 1
                        else (
                            f"blocks {first} to {first + length - 1} cannot be read: their copies fail their checksums"
                        )
                    )
                self.blocks.setdefault(name, []).append([first, length])

    def close(self) -> None:
        """Say how many there are, after the last piece."""
        if self._doubled:
            self.errors.append(f"{self._doubled} pairs of records name the same block and the same snapshot")
        if self._damaged > 1:
            self.errors.append(f"{self._damaged} copies fail their checksum")


def _copies_text(first: int, length: int) -> str:
    if length == 1:
        return f"the copy of block {first} fails its checksum"
    return f"the copies of blocks {first} to {first + length - 1} fail their checksums"


def check_store(volume: Volume, *, copies: bool = True) -> Findings:
    """Check everything; what is found is empty for a sound store.

    Copies are read in bounded pieces; nothing is written.

    Args:
        copies: Look at records and copies as well.
    """
    found = Findings()
    if volume.store is None:
        return found
    _check_structures(volume, found)
    if volume.require_engine().lost:
        return found
    try:
        found.errors += _check_bitmaps(volume)
    except ExtsnapError as error:
        found.errors.append(str(error))
    if copies:
        first: int | None = 0
        try:
            while first is not None:
                piece = check_piece(volume, first)
                found.add(piece)
                first = piece["next"]
        except ExtsnapError as error:
            found.errors.append(str(error))
        found.close()
    _check_sums(volume, found)
    if volume.outside_write:
        for name in (name for name in volume.snapshot_names() if name not in found.proven):
            found.by_snapshot.setdefault(name, []).append("the volume was written outside extsnap since this snapshot")
    return found


def check_piece(volume: Volume, first: int, *, seconds: float = 0.0) -> dict[str, Any]:
    """Check the records of a part of the base volume, and their copies.

    Every part is checked as it is now: between two of them the volume may be written, and snapshots come and go.

    Args:
        first: Block from which on.
        seconds: For about so long; but at least one part.

    Returns:
        ``next``: the block to go on from, or None at the end; ``doubled``: pairs of records of one block and one
        snapshot; ``damaged``: [block, length, [names of the snapshots that read the copies]] for each run of copies
        that is.
    """
    deadline = time.monotonic() + seconds
    doubled, damaged = 0, []
    engine = volume.engine
    at = None if engine is None else engine.index.next_block(first)
    while engine is not None and at is not None:
        records = engine.index.in_range(at, at + SPAN_BLOCKS)
        blocks = expand(records.block, records.length)
        inside = (blocks >= at) & (blocks < at + SPAN_BLOCKS)
        masks = np.repeat(records.mask, records.length)
        doubled += _doubled(blocks[inside], (engine.masks.rows & engine.alive)[masks[inside]])
        damaged += _damaged(volume, records, blocks, inside, masks)
        at = engine.index.next_block(at + SPAN_BLOCKS)
        if time.monotonic() >= deadline:
            break
    return {"next": at, "doubled": doubled, "damaged": damaged}


def _check_bitmaps(volume: Volume) -> list[str]:
    """Header, inode and the two bitmaps say the same."""
    store = volume.require_store()
    root = store.root
    if root.pending is not None or root.restore is not None:
        return ["an interrupted operation is waiting: the next extsnap command that writes completes it"]
    errors: list[str] = []
    if volume.growth is not None and volume.growth.kernel_edits:
        return errors  # the kernel has told us, and its journal; bitmaps and nodes at home follow, the header at rest
    fs = volume.filesystem()
    found = fs.file_map(root.store_inode)
    if not np.array_equal(graft.join(found.data), graft.join(root.extents)):
        errors.append("the store's header and its inode name different data blocks")
    if not np.array_equal(np.sort(found.mapping), np.sort(root.mapping)):
        errors.append("the store's header and its inode name different mapping blocks")
    geometry = fs.geometry
    mine = SparseBits.of(
        root.allocation_runs() - np.array([geometry.first_data_block, 0]),
        geometry.groups,
        geometry.blocks_per_group // 8,
    )
    mine -= fs.block_bitmaps()
    free = mine.total()
    if free:
        errors.append(f"{free} blocks of the snapshot allocation bitmap are free in the block allocation bitmap")
    return errors


def _doubled(blocks: Ints, rows: npt.NDArray[np.uint64]) -> int:
    """Pairs of records for the same block and the same snapshot."""
    order = np.argsort(blocks, kind="stable")
    blocks, rows = blocks[order], rows[order]
    pairs = 0
    distance = 1
    while distance < len(blocks):  # as many rounds as one block has records
        same = np.flatnonzero(blocks[distance:] == blocks[:-distance])
        if not len(same):
            break
        pairs += int((rows[same] & rows[same + distance]).any(axis=1).sum())
        distance += 1
    return pairs


def _check_structures(volume: Volume, found: Findings) -> None:
    """Both copies of every structure of the store."""
    engine, store = volume.require_engine(), volume.require_store()
    examined = examine(store, engine.history, engine.snapshots)
    found.errors += examined.lost + examined.worn
    found.errors += engine.lost_parts.texts[:NAMED]
    if len(engine.lost_parts.texts) > NAMED:
        found.errors.append(f"{len(engine.lost_parts.texts)} parts of the index fail their checksums in both copies")
    found.worn = bool(examined.worn)
    if engine.lost and not examined.lost:
        examined.lose(engine.lost, None)
        found.errors.append(engine.lost)
    if engine.hidden.some and not volume.medium.state.mark:
        found.errors.append("blocks are hidden, but the image is at rest")
    for entry in volume.snapshot_list():
        if examined.snapshots is None or entry.id in examined.snapshots:
            found.by_snapshot.setdefault(entry.name, []).extend(
                f"it cannot be read whole: {what}" for what in examined.lost[:NAMED]
            )
        if engine.lost_parts.of(entry.bit).any():
            found.by_snapshot.setdefault(entry.name, []).extend(
                f"it cannot be read whole: {what}" for what in engine.lost_parts.texts[:NAMED]
            )
            found.blocks.setdefault(entry.name, []).extend(volume.open_view(entry.name).unknown_runs().tolist())


def _check_sums(volume: Volume, found: Findings) -> None:
    """Hold every block of the snapshots that have checksums against them."""
    for entry in volume.snapshot_list():
        if not checksums.has(volume, entry):
            continue
        try:
            runs = np.concatenate([np.zeros((0, 2), np.int64), *checksums.changed(volume, entry)])
        except ExtsnapError:
            continue  # a table of checksums that is damaged proves nothing; it is named as a structure
        mine = found.by_snapshot.setdefault(entry.name, [])
        for first, length in runs[:NAMED].tolist():
            what = f"block {first} is" if length == 1 else f"blocks {first} to {first + length - 1} are"
            mine.append(f"{what} not as when the snapshot was taken: written outside extsnap")
        if len(runs) > NAMED:
            mine.append(f"{int(runs[:, 1].sum())} blocks are not as when the snapshot was taken")
        if len(runs):
            found.blocks.setdefault(entry.name, []).extend(runs.tolist())
        if not mine:
            found.proven.append(entry.name)


def _damaged(
    volume: Volume, records: Level, blocks: Ints, inside: Flags, masks: npt.NDArray[np.uint32]
) -> list[tuple[int, int, list[str]]]:
    """(block, length, snapshots that read them) of the runs of copies that do not have their checksums, by block."""
    engine, store = volume.require_engine(), volume.require_store()
    copied = np.repeat(records.copy >= 0, records.length)
    behind = blocks - np.repeat(records.block, records.length)
    logical = np.repeat(records.copy, records.length) + behind
    crc_at = np.repeat(records.crc_at, records.length) + behind
    which = np.flatnonzero(inside & copied)
    which = which[np.argsort(logical[which], kind="stable")]
    bad = [np.zeros(0, np.int64)]
    for low in range(0, len(which), PIECE_BLOCKS):
        part = which[low : low + PIECE_BLOCKS]
        found = fmt.crcs(store.read_blocks(logical[part]))
        bad.append(part[found != records.crcs[crc_at[part]]])
    wrong = np.concatenate(bad)
    wrong = wrong[np.lexsort((blocks[wrong], masks[wrong]))]
    new = jumps(blocks[wrong]) | (np.diff(masks[wrong].astype(np.int64), prepend=-1) != 0)
    first, length = breaks_to_runs(new, 1 << 62)
    bits = engine.masks.bits()
    entries = volume.snapshot_list()
    runs = zip(blocks[wrong[first]].tolist(), length.tolist(), masks[wrong[first]].tolist(), strict=True)
    return sorted(
        (block, count, [entry.name for entry in entries if bits[mask, entry.bit]]) for block, count, mask in runs
    )


def note(volume: Volume, damaged: list[str], sound: list[str], proven: Sequence[str] = ()) -> list[str]:
    """Commit what a check found; returns what was mended from second copies.

    Args:
        damaged: Snapshots that cannot be read whole: they get the state ``damaged``.
        sound: Snapshots that can: of these it is taken away.  They may still be tainted.
        proven: Snapshots whose checksums prove every block: they are not tainted either.
    """
    volume.require_trusted()
    engine, store = volume.require_engine(), volume.require_store()
    engine.flush()
    mended = examine(store, engine.history, engine.snapshots, mend=True).worn
    store.worn = engine.history.worn = False
    marked = [_noted(entry, damaged, sound, proven) for entry in engine.snapshots]
    if marked != engine.snapshots:
        volume.set_states(marked)
    return mended


def _noted(entry: fmt.Snapshot, damaged: list[str], sound: list[str], proven: Sequence[str]) -> fmt.Snapshot:
    tainted = entry.state == fmt.State.TAINTED or bool(entry.flags & fmt.SnapshotFlags.TAINTED)
    if entry.name in damaged:
        kept = entry.flags | (fmt.SnapshotFlags.TAINTED if tainted else fmt.SnapshotFlags.NONE)
        return replace(entry, state=fmt.State.DAMAGED, flags=kept)
    if entry.name in proven:
        return replace(entry, state=fmt.State.OK, flags=entry.flags & ~fmt.SnapshotFlags.TAINTED)
    if entry.name in sound:
        state = fmt.State.TAINTED if tainted else fmt.State.OK
        return replace(entry, state=state, flags=entry.flags & ~fmt.SnapshotFlags.TAINTED)
    return entry
