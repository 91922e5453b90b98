"""Hidden runs: large parts of the base volume that were discarded while snapshots still need what is in them.

A discard has to read as zeros afterwards.  Copying first what snapshots need would make an fstrim copy gigabytes, so
much needed content is *hidden* instead: the base reads zeros there, and the medium keeps what the snapshots need.

    a hidden block         reads as zeros in the base volume, as before in the views; is needed, so that every write
                           to it is held, and is read by nothing on the fast path
    a write to it          copies what the medium has for the snapshots, as for any needed block; the overwrite
                           reveals it (what a partial write leaves of it is zeros)
    a new snapshot         that preserves it gets a record of zeros, made true by the commit that makes the snapshot
    the last snapshot that needs it goes    the medium is punched, and it is hidden no more
    the image at rest      has no hidden blocks: those in use are copied and punched, free ones just show again what
                           they had, which a free block may (a plain mount knows nothing of hidden runs)

What is durable when.  A discard is durable after `Engine.flush`, like a write.  The flush writes the difference
between what is hidden and what the store knows to be (`log`), after its own barrier:
 1. overwrites and punches of revealed blocks -> barrier
 2. batch with the runs that are hidden now, and those that no longer are -> log; barrier
A crash before 2 leaves a block hidden that was overwritten since the last flush: it reads as zeros, what it was at
that flush.  The other way round it would read what was there before the discard.  What the store calls hidden is
settled by the next command that writes (`reveal`).  A punch of what nobody needs comes after the commit that says so.
A fold writes all hidden runs into a blob; its header commit begins with a barrier, which is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from extsnap.arrays import Ints, distinct, expand, runs_of
from extsnap.errors import VolumeFull
from extsnap.snapshot import format as fmt
from extsnap.snapshot import limits
from extsnap.snapshot.index import RUN_MAX, Level
from extsnap.snapshot.masks import mask_of
from extsnap.sparsebits import SparseBits, parts, runs_of_rows

if TYPE_CHECKING:
    from extsnap.snapshot.engine import Engine

#: A punch over more needed content than this hides it; less is copied.
HIDE_BYTES = 1 << 20
#: Punches copy so much in one session, then all of them hide: a fragmented volume is trimmed in small pieces.
COPIED_BYTES = 32 << 20
#: Group rows whose hidden blocks are worked on at once.
ROWS = 8
#: Blocks of a punch that are looked at together.
WINDOW = 1 << 18
#: Room that is left for new masks and for what records are rounded up to.
MARGIN = 8
#: Runs that are set at once while opening.
LOADED = 1 << 16
_RUN_BYTES = fmt.RUN_DTYPE.itemsize
#: Hidden runs up to which punches hide.
RUNS_MAX = limits.TABLE_BYTES[fmt.BlobKind.HIDDEN] // _RUN_BYTES // 2
_NO_ROWS: Ints = np.zeros(0, np.int64)
_NO_RUNS: Ints = np.zeros((0, 2), np.int64)


class Hidden:
    """Which blocks are hidden, by position, and which of them the store knows to be.

    Attributes:
        bits: The hidden blocks; changed by the methods only.
        some: Whether there may be any, here or in the store: false costs the hot paths nothing.
        runs: About how many runs they are; never fewer.
        copied_bytes: What punches had to preserve since the image was opened.
    """

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.bits = SparseBits(rows, row_bytes)
        self._stored = SparseBits(rows, row_bytes)
        self._touched: list[Ints] = []
        self.some = False
        self.runs = 0
        self.copied_bytes = 0

    @property
    def changed(self) -> bool:
        """Whether the store may know something else."""
        return bool(self._touched)

    def _touch(self, runs: Ints) -> None:
        bits = 8 * self.bits.row_bytes
        first, last = runs[:, 0] // bits, (runs.sum(axis=1) - 1) // bits
        self._touched.append(distinct(expand(first, last - first + 1)))

    def hide(self, runs: Ints) -> None:
        """Blocks are hidden now."""
        if len(runs):
            self.bits.set(runs)
            self.runs += len(runs)
            self.some = True
            self._touch(runs)

    def show(self, runs: Ints) -> None:
        """Blocks are hidden no more."""
        if len(runs):
            self.bits.set(runs, False)
            self.runs += len(runs)  # a hole in a run makes two of it
            self._touch(runs)

    def overlap(self, other: SparseBits) -> Ints:
        """Runs of hidden positions that are set in ``other``, of the same shape."""
        if not self.some:
            return _NO_RUNS
        both, rest = self.bits.copy(), self.bits.copy()
        rest -= other
        both -= rest
        return both.runs()

    def inside(self, start: int, stop: int) -> Ints:
        """Hidden positions in [start, stop): int64[n], sorted."""
        return self.bits.positions(start, stop) if self.some else np.zeros(0, np.int64)

    def among(self, runs: Ints) -> Ints:
        """Hidden positions in any of ``runs``: int64[n], sorted."""
        positions = distinct(expand(runs[:, 0], runs[:, 1]))
        return positions[self.bits.test(positions)]

    def all_runs(self) -> Ints:
        """Runs (start position, length) of all of them, sorted."""
        return self.bits.runs()

    def pieces(self) -> Iterator[Ints]:
        """All hidden positions, sorted, in pieces of bounded size; what is behind a piece may change meanwhile."""
        rows = self.bits.filled_rows()
        for low in range(0, len(rows), ROWS):
            runs = self.bits.runs(rows[low : low + ROWS])
            if len(runs):
                yield expand(runs[:, 0], runs[:, 1])

    def differences(self) -> tuple[Ints, Ints]:
        """(runs that are hidden and the store does not know it, runs of which it still thinks so)."""
        hides, shows = [_NO_RUNS], [_NO_RUNS]
        for rows in parts(distinct(np.concatenate([_NO_ROWS, *self._touched]))):
            now, stored = self.bits.take(rows), self._stored.take(rows)
            hides.append(runs_of_rows(rows, now & ~stored))
            shows.append(runs_of_rows(rows, stored & ~now))
        return np.concatenate(hides), np.concatenate(shows)

    def is_stored(self) -> None:
        """The store knows all of it now."""
        for rows in parts(distinct(np.concatenate([_NO_ROWS, *self._touched]))):
            self.bits.tidy(rows)
            self._stored.put(rows, self.bits.take(rows))
        self._touched = []
        self.some = bool(len(self.bits.filled_rows()))

    def load(self, hides: Ints, shows: Ints) -> None:
        """While opening: what the store says, in the order in which it does."""
        self.hide(hides)
        self.show(shows)

    def take_over(self, other: Hidden) -> None:
        """The store was read anew: what is hidden is as it was in memory all the same."""
        stored, self.bits = self.bits, other.bits
        self._stored = stored
        self.some |= other.some
        self.runs += other.runs
        self.copied_bytes = other.copied_bytes
        self._touched.append(self.bits.differing_rows(stored))

    def reshape(self, rows: int) -> None:
        """The volume has ``rows`` group rows now."""
        row_bytes = self.bits.row_bytes
        self.bits, self._stored = self.bits.reshaped(rows, row_bytes), self._stored.reshaped(rows, row_bytes)
        self._touched = [touched[touched < rows] for touched in self._touched]

    def blob(self, shift: int) -> bytes:
        """All runs, as the store keeps them."""
        runs = self.all_runs()
        self.runs = len(runs)
        return fmt.build_runs(runs - np.array([shift, 0]))


# -- what the write path does --------------------------------------------------------------------------------


def load(engine: Engine, runs: Ints, shows: Ints = _NO_RUNS) -> None:
    """While opening: runs of blocks from the blob, or from a batch of the log.

    Raises:
        StoreDamaged: One lies outside the volume, or they are not sorted and apart.
    """
    shift = np.array([engine.shift, 0])
    for some in (runs, shows):
        limits.require_hidden(some, engine.blocks)
    for low in range(0, len(runs), LOADED):
        engine.hidden.load(runs[low : low + LOADED] + shift, _NO_RUNS)
    for low in range(0, len(shows), LOADED):
        engine.hidden.load(_NO_RUNS, shows[low : low + LOADED] + shift)


def needed_runs(engine: Engine, start: int, stop: int) -> Ints | None:
    """What a punch of [start, stop) has to hide: runs of needed positions, exactly; None if they are few: copy them.

    Nothing may be held.  Superblocks are left out: they are copied.
    """
    hidden = engine.hidden
    least = min(HIDE_BYTES, COPIED_BYTES - hidden.copied_bytes)
    if engine.need.count(start, stop) * engine.block_size <= least:
        return None
    found, total = [_NO_RUNS], 0
    for positions in engine.needed_from(start, stop):
        missing = engine.missing(positions).any(axis=1)
        _punch_hidden(engine, positions[~missing])
        engine.clear_need(positions[~missing])
        missing &= ~engine.owns(positions) & ~engine.is_superblock(positions)
        found.append(runs_of(positions[missing]))
        total += int(missing.sum())
    return np.concatenate(found) if total * engine.block_size > least else None


def require_room(engine: Engine, runs: int, copies: int) -> None:
    """Refuse a punch whose runs or ragged ends the store has no room for.

    Raises:
        VolumeFull: Nothing was changed.
    """
    # Writes that reveal split runs: they may make twice as many of them before the table is full.
    if engine.hidden.runs + runs > RUNS_MAX:
        raise VolumeFull(
            f"a discard would hide {runs} more runs of blocks, and there are {engine.hidden.runs} already",
            hint="stop serving the volume and serve it again: that gives them back",
        )
    blocks = 2 * -(-runs * _RUN_BYTES // engine.block_size) + copies  # the blob has a second copy
    if blocks > engine.room():
        raise VolumeFull(
            f"a discard needs {blocks} blocks of the store, which has room for {max(0, engine.room())}",
            hint="delete a snapshot or free space in the volume",
        )


def revealed(engine: Engine, runs: Ints) -> None:
    """What was hidden in ``runs`` was preserved and then overwritten or punched."""
    positions = engine.hidden.among(runs)
    if len(positions):
        shown = runs_of(positions)
        engine.hidden.show(shown)
        engine.not_special(shown)
        engine.clear_need(positions)


def _punch_hidden(engine: Engine, positions: Ints) -> None:
    """Those of ``positions`` that are hidden and that no snapshot misses become zeros on the medium."""
    if engine.hidden.some:
        runs = runs_of(positions[engine.hidden.bits.test(positions)])
        engine.punch_runs(runs)
        revealed(engine, runs)


def log(engine: Engine) -> None:
    """Step 2 of the module's text; what was overwritten is durable.

    Raises:
        VolumeFull: No room for a fold, which the reserve of the engine covers.
    """
    hidden, store = engine.hidden, engine.store
    hides, shows = hidden.differences()
    if len(hides) or len(shows):
        need = store.batch_bytes(0, 1, 0, 0, len(hides) + len(shows))
        if not store.root.incompat & fmt.INCOMPAT_HIDDEN_RUNS or need > store.log_left:
            engine.fold()  # puts all of it into the blob, and the feature into the header
            return
        shift = np.array([engine.shift, 0])
        none = np.zeros((0, 1), np.uint64)
        store.append_batch(none, b"", np.zeros(0, np.uint32), hides - shift, shows - shift)
        engine.medium.flush()
        store.log_advance()
    hidden.is_stored()


def record_zeros(engine: Engine, bit: int, preserved: SparseBits) -> None:
    """A new snapshot reads zeros where it preserves what is hidden: into the next fold, which must be of its commit.

    Raises:
        VolumeFull: The index has no room.
    """
    runs = engine.hidden.overlap(preserved)
    if not len(runs):
        return
    mask = engine.masks.intern(mask_of([bit], engine.masks.words)[None, :])
    count = -(-runs[:, 1] // RUN_MAX)
    part = expand(np.zeros(len(runs), np.int64), count)
    start = np.repeat(runs[:, 0], count) + part * RUN_MAX
    length = np.minimum(np.repeat(runs.sum(axis=1), count) - start, RUN_MAX)
    zero = np.zeros(len(start), np.int64)
    engine.index.add(
        Level(
            start - engine.shift,
            length,
            zero + fmt.ZERO_COPY,
            np.repeat(mask, len(start)),
            zero,
            np.zeros(0, np.uint32),
        )
    )
    engine.fold(commit=False)


def zero_blocks(engine: Engine, preserved: SparseBits) -> int:
    """Blocks of the store that the records of `record_zeros` take."""
    runs = engine.hidden.overlap(preserved)
    records = int((-(-runs[:, 1] // RUN_MAX)).sum())
    return -(-records * fmt.RECORD_DTYPE.itemsize // engine.block_size)


# -- what nobody needs, and the image at rest ----------------------------------------------------------------


def release(engine: Engine) -> None:
    """Punch what is hidden and needed by no snapshot: what says so must be durable.  The flush comes later."""
    if not engine.hidden.some:
        return
    for positions in engine.hidden.pieces():
        _punch_hidden(engine, positions[~engine.missing(positions).any(axis=1)])


def forget(engine: Engine) -> None:
    """Show all of it as the medium has it: somebody else wrote there, or its content is about to be replaced."""
    for positions in engine.hidden.pieces():
        _show(engine, runs_of(positions))


def _show(engine: Engine, runs: Ints) -> None:
    engine.hidden.show(runs)
    engine.not_special(runs)  # it stays needed


def reveal(engine: Engine, in_use: SparseBits) -> int:
    """Bring the volume to where no block is hidden; durable on return.

    Blocks in use become zeros on the medium, what snapshots need of them is copied.  Free ones show what they had.

    Args:
        in_use: By position.

    Returns:
        Copies that find no room: then blocks in use are still hidden.  0: none is.
    """
    hidden = engine.hidden
    engine.flush()
    release(engine)
    free = hidden.bits.copy()
    free -= in_use
    _show(engine, free.runs())
    total = hidden.bits.total()
    missing = total + MARGIN - max(0, engine.room()) if total else 0
    if missing <= 0:
        for positions in hidden.pieces():
            engine.preserve(positions)
            _punch_hidden(engine, positions)
    engine.flush()
    return max(0, missing)
