"""The store grows and shrinks while the kernel has the base volume mounted: how much, and what becomes of the answer.

Offline extsnap edits the filesystem; while it is mounted only the kernel does.  So somebody above asks the kernel
(`extsnap.serve.grower`, in a process of its own: every system call on that mount may wait for us), and this module
decides what to ask for and takes in what came of it.  Nothing here waits for anything but our own medium.

    Growth.due()      -> a request, or None: nothing to do, or one is under way
    Growth.take()     <- the answer
    Growth.step()     the next piece of it is made true, while `at_work`
    Growth.drop()     whatever of it is not true yet never is: the filesystem is about to be somebody else's

What is durable when
--------------------
* Growth is filesystem first: the answer comes when the file has its new blocks durably.  Until the header's commit
  (`Engine.own`, one for each piece) they are a surplus that nobody writes to; a crash leaves it to the next open.
* Shrinking is header first: `Engine.disown` is durable before the filesystem is asked to free the blocks.
* What was given counts only for as long as whoever gave it has the filesystem.  When extsnap edits it itself, or
  somebody opens it anew, the rest of an answer is dropped, and so is an answer that is still on its way: each bears
  the number of its request.  Such blocks stay a surplus, which the next edit gives back.
* The store's nodes are the kernel's meanwhile: the header's list of them is brought up to date offline, where blocks
  that the kernel left unwritten are made written as well.

How much (`Reserve`)
--------------------
What has been written above can arrive at any moment, with no mount left to grow through (the last unmount): it has
room without any growth.  That is the *reserve*: pages that the loop device, and the kernel's cache of the served file
under it, may keep dirty (their limits are set to that), the journal, our own hold.  Growth begins in good time before
the reserve is touched, a *chunk* at a time; once it is touched, acknowledgements slow down (`Growth.lag`).  Where less
is still to preserve than that, so much is enough.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from extsnap.arrays import Ints, expand, runs_of
from extsnap.blockdev.base import Buffer
from extsnap.errors import ExtsnapError
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import edit, graft
from extsnap.snapshot.engine import HOLD_BYTES
from extsnap.snapshot.root import NO_BLOCKS, Extents
from extsnap.snapshot.vital import NEARLY, metadata_runs

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: Bytes of pages that a loop device above may keep dirty: a share of the volume within these.
DIRTY_LEAST, DIRTY_MOST, DIRTY_SHARE = 8 << 20, 128 << 20, 16
CACHED_SHARE = 2  # of that, once more in the kernel's cache of the served file
CHUNK_LEAST, CHUNK_MOST = 16 << 20, 256 << 20
#: One commit takes in at most so many new blocks: what the request loop does at once is bounded.
PIECE_BLOCKS = 8192
#: Logical runs that the filesystem is asked to free at once.
PUNCH_RUNS = 256
#: Of what the filesystem gives, the largest share that is adopted, which brings no room.
MOST_ADOPTED = 7 / 8
#: At most so many times what is wanted is asked for, where the filesystem gives what snapshots need.
GREED_MOST = 8
#: Blocks of room that are worth asking again at once.
WORTH_IT = 64
#: Seconds for which nothing is asked after an answer that brought nothing.
PAUSE = 2.0
#: Seconds in which writing may use up the whole reserve while it waits for growth; and the longest one waits.
LAG_SECONDS, LAG_MOST = 1.0, 1.0
#: Numbers of requests: none is used twice in a process, whatever volume or session it is of.
_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Reserve:
    """Room that does not wait for growth, in blocks.

    Attributes:
        dirty_bytes: Pages that the loop device above may keep dirty.
        cached_bytes: Pages that the kernel may keep dirty of the served file, between that loop device and us.
        in_flight: What may arrive without any growth.
        chunk: How far ahead of that growth goes, and how much it asks for.
    """

    dirty_bytes: int
    cached_bytes: int
    in_flight: int
    chunk: int

    @classmethod
    def of(cls, fs: Filesystem, size: int) -> Reserve:
        """For a volume of ``size`` bytes."""
        block_size = fs.geometry.block_size
        dirty = min(max(size // DIRTY_SHARE, DIRTY_LEAST), DIRTY_MOST)
        journal = int(fs.journal.data_runs[:, 1].sum()) if fs.journal is not None else 0
        cached = dirty // CACHED_SHARE
        in_flight = (dirty + cached + HOLD_BYTES) // block_size + journal
        chunk = min(max(in_flight, CHUNK_LEAST // block_size), CHUNK_MOST // block_size)
        return cls(dirty, cached, in_flight, chunk)


class Cookie:
    """The zero-fill of a growth on a filesystem that cannot allocate without writing (ext2, ext3).

    The blocks that such a growth writes hold a random pattern that only we know.  It is never written to the medium:
    where it arrives, the file has got a block, whose old content a snapshot may still need, and which stays.

    Attributes:
        pattern: 16 random bytes.
        seen: Blocks at which the pattern arrived.
    """

    def __init__(self, pattern: bytes, block_size: int) -> None:
        self.pattern = pattern
        self._size = block_size
        self._block = np.frombuffer(pattern * (block_size // len(pattern)), np.uint8)
        self._seen: list[Ints] = []

    @property
    def seen(self) -> Ints:
        """int64[n], sorted."""
        return np.unique(np.concatenate(self._seen)) if self._seen else NO_BLOCKS

    def sift(self, offset: int, data: Buffer) -> list[tuple[int, memoryview]]:
        """What is left of a write without the blocks that hold the pattern: (offset, data) each."""
        view, size = memoryview(data), self._size
        if offset % size or len(view) % size:
            return [(offset, view)]
        rows = np.frombuffer(view, np.uint8).reshape(-1, size)
        ours = (rows[:, :16] == self._block[:16]).all(axis=1)
        if not ours.any():
            return [(offset, view)]
        ours[ours] = (rows[ours] == self._block).all(axis=1)
        self._seen.append(np.flatnonzero(ours) + offset // size)
        edges = np.flatnonzero(np.diff(np.concatenate([[True], ours, [True]]))).reshape(-1, 2)
        return [(offset + low * size, view[low * size : high * size]) for low, high in edges.tolist()]


@dataclass
class _Grant:
    """New blocks that the filesystem gave.

    Attributes:
        rows: Those that are not made ours yet, in pieces.
        back: Logical runs that go back to it afterwards.
        gained: Room that came of it so far, in blocks.
    """

    rows: list[Extents]
    back: Ints | None = None
    gained: int = 0


class Growth:
    """Growing and shrinking the store of one served volume through a kernel mount.

    Attributes:
        reserve: See the module.
        mounted: Whether there is a mount to grow through.
        exhausted: Whether the filesystem had nothing more to give, when it was asked last.
        limited: Whether the kernel keeps the dirty pages of that mount within the reserve.  Where it cannot (before
            Linux 6.2), all that is to be preserved is to have room in time, as far as it can be had.
        held_back: Whether nothing may be begun: somebody is about to freeze the filesystem.
        unsettled: Whether the filesystem's home blocks may not say yet what the kernel knows of the store.
        kernel_edits: Whether the kernel was asked to change the store's file since the volume is served.
        cookie: That of the growth that is under way.
        awaited: Number of the request whose answer is still to come, also if it does not count any more.
        hope: Whether a write that finds no room is tried again by whoever serves it: until then no snapshot is dropped
            for it.
    """

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        fs = volume.filesystem()
        self.reserve = Reserve.of(fs, volume.size)
        self._metadata = metadata_runs(fs)
        self.mounted = self.exhausted = False
        self.limited = True
        self.held_back = False
        self.unsettled = self.kernel_edits = self.hope = False
        self.cookie: Cookie | None = None
        self.awaited: int | None = None
        self._asked: str | None = None
        self._grant: _Grant | None = None
        self._wanted = self._ahead = 0
        self._shrink = False
        self._goes_on = False  # whether there is more to ask for when what goes back is back
        self._greed = 1  # how many times as much as is wanted is asked for
        self._retry_at = 0.0
        self._left_then: int | None = None
        self._left_seen = 0
        self._unit = fs.geometry.cluster_blocks

    # -- what to ask for --------------------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        """Whether an answer is awaited or still being made true."""
        return self.awaited is not None or self._grant is not None

    @property
    def is_coming(self) -> bool:
        """Whether there may be more room soon."""
        return self.under_way or (self.held_back and self.mounted)

    @property
    def at_work(self) -> bool:
        """Whether `step` has something to do."""
        return self._grant is not None

    def _keep(self) -> int:
        """Room, in copies, that is worth having while mounted."""
        needed = self._volume.require_engine().blocks_to_preserve()
        return min(needed, self.reserve.in_flight + self.reserve.chunk) if self.limited else needed

    def provision(self) -> None:
        """From now on have room for a snapshot that is about to be taken: its tables, and what it will preserve.

        A writer may go on at full speed with the thaw, before any growth that begins with it.
        """
        tables, copies = self._volume.needs_live()
        self._wanted, self._ahead = tables + edit.MINIMUM_ROOM, min(copies, self.reserve.in_flight)
        self.look_again()

    def provided(self) -> None:
        """It was taken, or will not be."""
        self._wanted = self._ahead = 0
        self.look_again()

    def look_again(self) -> None:
        """What is needed or free has changed otherwise than by writes."""
        self._retry_at, self._left_then = 0.0, None

    @property
    def is_provided(self) -> bool:
        """Whether what `provision` asked for is there, or cannot be had, and nothing is under way."""
        if self._volume.engine is None:  # it could not be read: whoever asks for a snapshot is told
            return True
        return not self.under_way and (self._missing() <= 0 or not self.mounted or self.is_paused)

    @property
    def has_room_for_snapshot(self) -> bool:
        """Whether its tables have room, whatever else had to be left out."""
        engine, store = self._volume.engine, self._volume.store
        return engine is None or store is None or store.available >= engine.reserve() + self._wanted

    @property
    def is_paused(self) -> bool:
        """Whether nothing is asked for a while, because the last answer brought nothing."""
        return time.monotonic() < self._retry_at

    def _missing(self) -> int:
        """Blocks that the store is short of what `provision` asked for."""
        engine, store = self._volume.require_engine(), self._volume.require_store()
        room = min(self._keep(), self.reserve.in_flight) if engine.snapshots else 0
        copies = engine.blocks_for(max(room, self._ahead))
        return engine.reserve() + engine.spared + copies + self._wanted - store.available

    def note_mount(self, mounted: bool) -> None:
        """The kernel has mounted the served volume, or not any more."""
        self.mounted = mounted
        if mounted:
            self._exhaust(False)
        self.look_again()

    def _exhaust(self, exhausted: bool) -> None:
        if exhausted != self.exhausted:
            self.exhausted = exhausted
            self._volume.watch()

    def settled(self) -> None:
        """Everything that the kernel knows is at home, as in a filesystem that is frozen."""
        self.unsettled = self.under_way

    def shrink(self) -> None:
        """Give back what is not worth keeping, as soon as that can be: something was deleted."""
        self._shrink = True
        self._exhaust(False)
        self.look_again()

    def due(self) -> dict[str, Any] | None:
        """The next request, or None.  Cheap unless the room has changed much since it was looked at last."""
        volume = self._volume
        if not self.mounted or self.under_way or volume.engine is None or self.held_back:
            return None
        engine = volume.engine
        if self._retry_at and time.monotonic() >= self._retry_at:
            self.look_again()
        if self._left_then is not None and engine.left >= self._left_then:
            return None
        if self._shrink:
            request = self._give_back()
            if request is not None:
                return request
            self._shrink = False
        blocks = self._growth()
        if blocks <= 0:
            return None
        return self._ask_for(self._greed * blocks)

    def _growth(self) -> int:
        """Blocks to grow by now; 0, and when to look again, where there is enough."""
        engine = self._volume.require_engine()
        missing = self._missing() if self._wanted else 0
        room = engine.room()
        keep = self._keep() if engine.snapshots else 0
        # Room for all that is to be preserved is often a few records short: not worth a growth of its own.
        least = keep - keep // NEARLY
        if self.limited:
            least = min(least, self.reserve.in_flight + self.reserve.chunk // 2)
        if room >= least and missing <= 0:
            self._left_then = engine.left - max(1, (room - least) // 2)
            return 0
        return max(engine.blocks_for(max(0, keep - room)), missing + 64, 256)

    def _ask_for(self, blocks: int) -> dict[str, Any]:
        volume, store = self._volume, self._volume.require_store()
        self.cookie = Cookie(volume.random_bytes(16), volume.block_size)
        number = self._ask("grow")
        runs = graft.logical_runs(store.root.extents, -(-blocks // self._unit) * self._unit)
        return {
            "do": "grow",
            "number": number,
            "runs": runs.tolist(),
            "room": self._volume.require_engine().left,
            "cookie": self.cookie.pattern.hex(),
            "block": volume.block_size,
        }

    def _give_back(self) -> dict[str, Any] | None:
        """Take what is not worth keeping out of the header and ask the filesystem to free it, if there is any."""
        engine, store = self._volume.require_engine(), self._volume.require_store()
        engine.commit()  # if this fails, what is held stays held
        copies = engine.blocks_for(max(self._keep() if engine.snapshots else 0, self._ahead))
        spare = store.available - engine.reserve() - engine.spared - copies - self._wanted - self.reserve.chunk // 8
        if spare <= 0:
            return None
        runs = edit.unused_runs(store, spare, self._unit)[-PUNCH_RUNS:]
        if not len(runs):
            return None
        self._volume.disown(runs)
        return self._ask_to_free(runs)

    def _ask_to_free(self, runs: Ints) -> dict[str, Any]:
        number, end = self._ask("free"), self._volume.require_store().root.size_blocks
        return {"do": "free", "number": number, "runs": runs.tolist(), "end": end, "block": self._volume.block_size}

    def _ask(self, what: str) -> int:
        """Note that the kernel is asked for something; returns the number of the request."""
        self._asked, self.awaited = what, next(_NUMBERS)
        self.unsettled = self.kernel_edits = True
        return self.awaited

    # -- what came of it --------------------------------------------------------------------------------

    def take(self, answer: dict[str, Any]) -> str:
        """Take in an answer; returns a line about what is wrong with it, or nothing.

        Its extents are believed as far as they can be checked: they hold all that the store owns, and what is new
        lies in the volume, is nobody's metadata, and (after a zero-fill) is where the pattern of this growth arrived.
        One that nobody waits for any more is ignored.

        Raises:
            ExtsnapError, OSError: It could not be judged; it does not count.
        """
        if answer.get("number") != self.awaited:
            return ""
        self.awaited = None
        asked, self._asked = self._asked, None
        cookie, self.cookie = self.cookie, None
        self.look_again()
        if asked is None:
            return ""
        if asked != "grow" or answer.get("error"):
            if answer.get("error") or not self._goes_on:
                self.pause()
            self._goes_on = False
            return str(answer.get("error", ""))
        if not answer.get("extents"):
            self.pause()
            self._exhaust(True)
            return ""
        rows = np.array(answer["extents"], np.int64).reshape(-1, 3)
        wrong, new = self._verify(rows, cookie if answer.get("filled") else None)
        if wrong:
            self.pause()
            return f"the growth of the store was not used: {wrong}"
        count = int(new[:, 2].sum())
        self._exhaust(not count)
        if not count:
            self.pause()
            return ""
        engine = self._volume.require_engine()
        engine.commit()
        pieces = _pieces(new)
        needed = np.concatenate([engine.adoptable(np.sort(expand(piece[:, 1], piece[:, 2]))) for piece in pieces])
        if len(needed) > MOST_ADOPTED * count:
            # Adopting it would take the free space for next to no room.  The rest is taken, what snapshots need goes
            # back, and the next request is for more: the kernel looks at the same place first.
            back = _longest(graft.whole_units(runs_of(_logical(new, needed)), self._unit), PUNCH_RUNS)
            rest = graft.keep_logical(new, _between(back))
            self._grant = _Grant(_pieces(rest) if len(rest) else [], back)
            self._greed = min(2 * self._greed, GREED_MOST)
            return ""
        self._greed = 1
        self._grant = _Grant(pieces)
        return ""

    def step(self) -> dict[str, Any] | None:
        """Make the next piece of an answer true; returns a request where blocks go back at once.

        Raises:
            ExtsnapError, OSError: It could not be made true; the volume has to read its state anew.
        """
        grant = self._grant
        if grant is None:
            return None
        if not grant.rows:
            self._grant = None
            if grant.back is None:
                return None
            self._goes_on = grant.gained >= WORTH_IT
            return self._ask_to_free(grant.back)
        volume = self._volume
        engine, store = volume.require_engine(), volume.require_store()
        piece, before = grant.rows.pop(0), store.available
        try:
            engine.commit()  # if this fails, what is held stays held
            self._require_given(piece)
            volume.own(graft.join(np.concatenate([store.root.extents, piece])), expand(piece[:, 1], piece[:, 2]))
        except BaseException:
            self._grant = None
            self.pause()
            raise
        volume.count_room(store.available - before)
        grant.gained += store.available - before
        if not grant.rows and grant.back is None:
            self._grant = None
        return None

    def _require_given(self, piece: Extents) -> None:
        """Refuse rows that are not, or not any more, new blocks of the store's file.

        Raises:
            ExtsnapError: They are not.
        """
        volume, root = self._volume, self._volume.require_store().root
        is_new = not any(_overlap(piece[:, [at, 2]], root.extents[:, [at, 2]]) for at in (0, 1))
        # While somebody has the filesystem, the map of it that we see may be one of before, and their word counts.
        if is_new and not volume.in_use:
            is_new = graft.has_all(volume.filesystem().file_map(root.store_inode).data, piece)
        if not is_new:
            raise ExtsnapError("blocks that it was given are not its new ones any more")

    def drop(self) -> None:
        """What was given and is not made true yet, or is still to be given, is never made true: see the module."""
        self._asked, self._grant, self.cookie = None, None, None
        self._goes_on = False

    def forget(self) -> None:
        """Whoever was asked is gone: there will be no answer."""
        self.drop()
        self.awaited = None
        self.mounted = self.hope = False

    def pause(self) -> None:
        """Ask for nothing for a while, or until a good part of the room that there is now is gone."""
        left = self._volume.engine.left if self._volume.engine is not None else 0
        self._retry_at, self._left_then = time.monotonic() + PAUSE, left - max(64, left // 8)

    def _verify(self, rows: Extents, cookie: Cookie | None) -> tuple[str, Extents]:
        """(what is wrong with a file's extents, or nothing; those of them that are new)."""
        volume = self._volume
        engine, store = volume.require_engine(), volume.require_store()
        nothing = rows[:0]
        if not len(rows) or rows.min() < 0 or (rows[:, 2] < 1).any():
            return "an extent is impossible", nothing
        rows = graft.join(rows)
        by_place = rows[np.argsort(rows[:, 1], kind="stable")]
        if (
            (rows[:, 1] + rows[:, 2] > engine.blocks).any()
            or (rows[:-1, 0] + rows[:-1, 2] > rows[1:, 0]).any()
            or (by_place[:-1, 1] + by_place[:-1, 2] > by_place[1:, 1]).any()
        ):
            return "its extents overlap or leave the volume", nothing
        extents = store.root.extents
        if not graft.has_all(rows, extents):
            return "the file does not have the store's blocks", nothing
        gaps = graft.holes(extents)
        end = int((extents[:, 0] + extents[:, 2]).max())
        beyond = np.array([[end, max(0, engine.blocks - end)]], np.int64)
        new = graft.keep_logical(rows, np.concatenate([gaps, beyond]))
        new = new[new[:, 2] > 0]
        if not len(new):
            return "", new
        root = store.root
        taken = np.concatenate([self._metadata, np.array([[root.directory_block, 1]], np.int64)])
        if _overlap(new[:, 1:], taken):
            return "it holds blocks of the filesystem itself", nothing
        # A node that the kernel freed and gave back as data: until the header's list of nodes is brought up to date, at
        # rest, it is not data for us.
        nodes = root.mapping // self._unit * self._unit
        new = _without(new, expand(nodes, np.full(len(nodes), self._unit)))
        if cookie is not None:
            blocks = np.sort(expand(new[:, 1], new[:, 2]))
            if not np.isin(blocks, cookie.seen).all():
                return "the file's new blocks were not written by it", nothing
        return "", new

    # -- slowing down -----------------------------------------------------------------------------------

    def is_waited_for(self) -> bool:
        """Whether writes are slowed down: the reserve is touched, and growth is under way or waits for a freeze."""
        engine = self._volume.engine
        return engine is not None and self.is_coming and engine.room() < self.reserve.in_flight

    def lag(self) -> float:
        """Seconds by which the acknowledgement of the write that was just made is late.

        Nothing while the reserve is whole or no growth is under way, else more and more as the reserve is used up: so
        that growth comes first.
        """
        engine = self._volume.engine
        if engine is None:
            return 0.0
        copies, self._left_seen = self._left_seen - engine.left, engine.left
        if copies <= 0 or not self.is_waited_for():
            return 0.0
        room = engine.room_for_data()
        # The rate falls with the square of what is left: that never comes to an end.
        return min(LAG_MOST, copies * LAG_SECONDS * self.reserve.in_flight / max(1, room) ** 2)


def _pieces(rows: Extents) -> list[Extents]:
    """Rows cut so that each piece has at most `PIECE_BLOCKS` blocks."""
    count = -(-rows[:, 2] // PIECE_BLOCKS)
    owner = np.repeat(np.arange(len(rows)), count)
    start = expand(np.zeros(len(rows), np.int64), count) * PIECE_BLOCKS
    length = np.minimum(rows[owner, 2] - start, PIECE_BLOCKS)
    cut = np.stack([rows[owner, 0] + start, rows[owner, 1] + start, length], axis=1)
    total = np.cumsum(length)
    pieces, low = [], 0
    while low < len(cut):
        before = int(total[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(total, before + PIECE_BLOCKS, "right")))
        pieces.append(cut[low:high])
        low = high
    return pieces


def _logical(rows: Extents, blocks: Ints) -> Ints:
    """Logical blocks of those of the physical ``blocks`` that rows (which do not overlap) have; sorted."""
    by_place = rows[np.argsort(rows[:, 1], kind="stable")]
    index = np.searchsorted(by_place[:, 1], blocks, "right") - 1
    blocks, index = blocks[index >= 0], index[index >= 0]
    inside = blocks < by_place[index, 1] + by_place[index, 2]
    return np.sort(by_place[index[inside], 0] + blocks[inside] - by_place[index[inside], 1])


def _without(rows: Extents, blocks: Ints) -> Extents:
    """Rows (that do not overlap) without these physical blocks."""
    return graft.keep_logical(rows, _between(runs_of(_logical(rows, blocks))))


def _between(runs: Ints) -> Ints:
    """The runs between sorted runs, before and behind them."""
    starts, ends = np.concatenate([[0], runs.sum(axis=1)]), np.concatenate([runs[:, 0], [1 << 62]])
    return np.stack([starts, ends - starts], axis=1)[ends > starts]


def _longest(runs: Ints, most: int) -> Ints:
    """The longest of sorted runs, at most so many; sorted."""
    return runs[np.sort(np.argsort(-runs[:, 1], kind="stable")[:most])]


def _overlap(first: Ints, second: Ints) -> bool:
    """Whether a run (start, length) of one list shares a block with one of the other."""
    order = np.argsort(second[:, 0], kind="stable")
    starts = second[order, 0]
    reach = np.maximum.accumulate(second[order].sum(axis=1))
    before = np.searchsorted(starts, first.sum(axis=1), "left") - 1
    return bool(((before >= 0) & (reach[np.maximum(before, 0)] > first[:, 0])).any())
