"""A volume that fills up: warnings before it, and what ``on-full=drop-oldest`` does when a copy has no room.

The write path asks for room before it takes a write; without it the write is refused whole (`VolumeFull`), and with
``on-full=drop-oldest`` `make_room` runs and the write is tried again.  What is durable when: the deletion is that of
`Volume.delete`, one header commit that names the snapshots as dropped as well; a crash before it leaves them and the
base as they were, after it the write was not done yet and was never acknowledged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extsnap.arrays import Ints
from extsnap.errors import VolumeFull
from extsnap.snapshot import format as fmt
from extsnap.snapshot import settings

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: Shares of the store that are in use, and what that is called.
WATERMARKS = ((0.95, "critical"), (0.8, "low"))
#: Free blocks of the store below which they are looked at: always, never.
ALWAYS, NEVER = 1 << 62, -1


@dataclass(frozen=True)
class Fill:
    """How full a store is.

    Attributes:
        room: Blocks of the base volume that can still be overwritten before room for copies runs out; at rest with
            what the store can still grow by.
        used: Blocks of the store in use.
        to_preserve: Blocks that would have to be copied if all of the volume were overwritten; at least.
    """

    room: int
    used: int
    to_preserve: int

    @property
    def share(self) -> float:
        """Of the store, with what it can still grow by, in use."""
        return self.used / (self.used + self.room) if self.room else 1.0

    @property
    def watermark(self) -> str | None:
        """The highest watermark that is passed; none where all that can be overwritten has room."""
        if self.room >= self.to_preserve:
            return None
        return next((name for share, name in WATERMARKS if self.share >= share), None)


def growth(volume: Volume) -> tuple[int, int]:
    """(blocks that the store can still grow by at rest, those that the largest file of the filesystem leaves it)."""
    fs = volume.filesystem()
    half = max(0, fs.free_blocks - fs.geometry.reserved_blocks) // 2
    largest = max(0, fs.largest_file - volume.require_store().root.owned)
    return min(half, largest), largest


def fill(volume: Volume, to_preserve: int) -> Fill:
    """How full the store of a volume with snapshots is."""
    engine, store = volume.require_engine(), volume.require_store()
    more = 0 if volume.serving else growth(volume)[0]
    owned = store.root.owned
    return Fill(max(0, engine.room_for_data()) + more, owned - engine.left, to_preserve)


def warning(volume: Volume, found: Fill) -> str:
    """The line about a watermark."""
    dropping = settings.properties(volume.require_store().root)[settings.ON_FULL] == settings.DROP_OLDEST
    then = "the oldest snapshot is dropped" if dropping else "writes fail"
    return (
        f"the store of {volume.name} is {found.share:.0%} full: {found.room * volume.block_size / 2**20:.1f} MiB more "
        f"can be overwritten before {then}; delete a snapshot, or grow the volume"
    )


def make_room(volume: Volume, refusal: VolumeFull, needed: Iterable[Ints] = (), blocks: int = 0) -> None:
    """Delete the oldest snapshots that nobody needs, as few as make room for what was refused.

    A snapshot is kept while its view is open, and while a command stands that may go back to it.

    Args:
        refusal: Why it was refused.
        needed: Positions that are to be overwritten.
        blocks: Of the store that are needed as well, whatever goes.

    Raises:
        VolumeFull: ``refusal``: the volume is not to drop any, or even dropping all of them would not do.
            Nothing was changed.
    """
    engine, store = volume.require_engine(), volume.require_store()
    if settings.properties(store.root)[settings.ON_FULL] != settings.DROP_OLDEST or store.root.restore is not None:
        raise refusal
    open_views = set(volume.above.open_views()) if volume.above is not None else set()
    oldest_first = volume.snapshot_list()
    going = [entry for entry in oldest_first if entry.kind != fmt.Kind.ATOMIC and entry.name not in open_views]
    kept = len(going) + 1
    ranks = np.zeros(64 * engine.masks.words, np.int64)
    ranks[[entry.bit for entry in engine.snapshots]] = kept
    ranks[[entry.bit for entry in going]] = np.arange(1, kept)
    room = engine.room_for_data() + engine.copies_in(engine.copies_by_rank(ranks, kept))
    enough = np.flatnonzero((engine.costs_by_rank(needed, ranks, kept) + blocks <= room)[1:])
    if not len(enough):
        raise refusal
    gone = going[: int(enough[0]) + 1]
    volume.delete([entry.name for entry in gone], dropped=True)
    for entry in gone:
        volume.say(f"dropped snapshot {entry.name!a} of {volume.name}: room for copies ran out (on-full=drop-oldest)")
    if volume.above is not None:
        volume.above.snapshots_changed()
