"""A tiny model of the design: ten blocks, three snapshots and a safety snapshot, one store.

It says in 400 lines of plain Python what the package does in thousands, and exists to find out whether the
*design* holds: every sequence of operations, every crash.  Nothing here knows bytes or formats.

The volume.  Block 0 is the filesystem's metadata: its content is ``Meta``, the block bitmap and the store's map.
It is an ordinary block of the base volume, written through the write path, preserved and copied like any other.
A store of more than two data blocks has a mapping block as well, whose content is ``("map", data)``.  All other
contents are numbers, 0 for zeros.  Sets of blocks, and of snapshots, are the bits of an int.

The medium.  What was written since the last barrier is pending; a crash applies any part of it.  The header is
committed whole, after a barrier.  ``tick`` stands wherever power may fail.

The header.  ``owned`` and ``wanted`` are what the store has and shall have; copies live only in what both have.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

BLOCKS = 10
EVERYTHING = (1 << BLOCKS) - 1
BITS = (1, 2, 4, 8)
ZERO = -1  # the copy of a zero record
NONE = -1  # no mapping block
IN_INODE = 2  # this many data blocks need no mapping block

SABOTAGES = {
    "skip-copy": "an overwrite is not preceded by a copy",
    "overwrite-before-copy": "no barrier between copies and overwrites",
    "newest-only": "a record names only the newest snapshot that needs the copy",
    "forget-recorded": "a record names every snapshot that preserves the block, recorded or not",
    "skip-zero": "a block of zeros gets no record",
    "free-shared": "a deleted snapshot's copies are freed although others need them",
    "leak-copy": "a record whose mask is empty is kept",
    "reuse-bit": "a freed bit is given to a new snapshot while records still bear it",
    "no-adoption": "growth takes a block that a snapshot needs without a record",
    "mapping-excluded": "mapping blocks are not preserved",
    "use-wanted": "copies are put into blocks that the filesystem has not granted yet",
    "forget-wanted": "recovery does not graft what the header wants",
    "surplus-lost": "recovery takes granted blocks into use without adopting needed ones",
    "restore-over-others": "restore writes past the write path",
    "restore-in-place": "restore leaves the store's blocks where the target needs them",
    "graft-then": "restore keeps the bitmap of then with the store's blocks of then",
    "drop-unequal": "restore drops records whose copy differs from the base volume",
    "drop-in-store": "restore drops the records of the store's own blocks where they equal their copy",
    "drop-early": "restore drops records before the base volume is durable",
    "intent-early": "restore forgets its intent before the metadata is written",
    "no-safety-need": "the safety snapshot is not considered when restore overwrites",
}


class Crash(Exception):
    """Power failed."""


class NoSpace(Exception):
    """Refused, with nothing changed."""


class Meta(NamedTuple):
    """The content of block 0."""

    bitmap: int
    data: int
    mapping: int

    @property
    def store(self) -> int:
        return self.data | bit_of(self.mapping)

    @property
    def user(self) -> int:
        return self.bitmap & ~self.store & ~1


class Record(NamedTuple):
    """Binds a block of the base volume to a copy and the snapshots that need it."""

    block: int
    copy: int
    mask: int


class Intent(NamedTuple):
    """A restore under way, with the store's extents as they shall be afterwards."""

    bit: int
    data: int
    mapping: int


class Header(NamedTuple):
    """All that the store knows."""

    owned: tuple[int, int]  # data, mapping
    wanted: tuple[int, int]
    home: int  # the data block that holds the header itself
    snapshots: dict[int, int]  # bit -> preserved blocks, in order of creation
    records: tuple[Record, ...]
    intent: Intent | None = None


def bit_of(block: int) -> int:
    return 0 if block < 0 else 1 << block


def blocks_of(bits: int) -> list[int]:
    return [block for block in range(BLOCKS) if bits >> block & 1]


class Medium:
    """Blocks with a volatile cache in front, and one atomic header."""

    def __init__(self, blocks: list[Any], header: Header) -> None:
        self.durable = blocks
        self.pending: list[tuple[int, Any]] = []
        self.now = list(blocks)
        self.header = header
        self.fuse = -1  # ticks until power fails; negative: never

    def tick(self) -> None:
        if self.fuse >= 0:
            if self.fuse == 0:
                raise Crash
            self.fuse -= 1

    def write(self, block: int, content: Any) -> None:
        self.now[block] = content
        self.pending.append((block, content))
        self.tick()

    def barrier(self) -> None:
        if self.pending:
            self.durable[:] = self.now
            self.pending.clear()
            self.tick()

    def write_journalled(self, changes: tuple[tuple[int, Any], ...]) -> None:
        """What the kernel's journal does for metadata: all of it or nothing."""
        self.barrier()
        for block, content in changes:
            self.now[block] = self.durable[block] = content
        self.tick()

    def commit(self, header: Header) -> None:
        self.barrier()
        self.header = header
        self.tick()

    def crash(self, rng: random.Random) -> None:
        """Keep any part of what was not yet durable."""
        for block, content in self.pending:
            if rng.random() < 0.5:
                self.durable[block] = content
        self.pending.clear()
        self.now = list(self.durable)
        self.fuse = -1


class Engine:
    """The write path, create, delete, growth, shrinking, restore and recovery."""

    def __init__(self, medium: Medium, rng: random.Random, sabotage: str = "") -> None:
        self.medium = medium
        self.rng = rng
        self.sabotage = sabotage

    # Reading.

    @property
    def header(self) -> Header:
        return self.medium.header

    @property
    def meta(self) -> Meta:
        meta: Meta = self.medium.now[0]
        return meta

    def view(self, bit: int, block: int) -> Any:
        """What a snapshot shows in a block that it preserves."""
        for record in self.header.records:
            if record.block == block and record.mask & bit:
                return 0 if record.copy == ZERO else self.medium.now[record.copy]
        return self.medium.now[block]

    def need(self, block: int) -> int:
        """The snapshots that preserve the block and have no record for it."""
        header = self.header
        mask = 0
        for bit, preserved in header.snapshots.items():
            if preserved >> block & 1:
                mask |= bit
        if mask and self.sabotage != "forget-recorded":
            for record in header.records:
                if record.block == block:
                    mask &= ~record.mask
        return mask

    def spare(self) -> int:
        """Data blocks of the store that may take a copy."""
        header = self.header
        spare = header.wanted[0] if self.sabotage == "use-wanted" else header.owned[0] & header.wanted[0]
        spare &= ~(1 << header.home)
        if header.intent is not None:
            spare &= header.intent.data
        for record in header.records:
            if record.copy >= 0:
                spare &= ~(1 << record.copy)
        return spare

    # The write path.

    def write(self, *changes: tuple[int, Any], journal: bool = False) -> None:
        """Write blocks of the base volume: copies first, durable with their records, then the overwrites.

        With ``journal`` the overwrites are one transaction of the kernel's.

        Raises:
            NoSpace: A needed copy has no room; nothing was written.
        """
        header = self.header
        now = self.medium.now
        spare = 0
        looked = False
        records = []
        for block, content in changes:
            if now[block] == content:
                continue
            mask = self.need(block)
            if not mask or self.sabotage == "skip-copy":
                continue
            if self.sabotage == "newest-only":
                mask = 1 << mask.bit_length() - 1
            if self.sabotage == "no-safety-need" and header.intent is not None:
                mask &= ~8
                if not mask:
                    continue
            if now[block] == 0:
                if self.sabotage != "skip-zero":
                    records.append(Record(block, ZERO, mask))
                continue
            if not looked:
                spare, looked = self.spare(), True
            if not spare:
                raise NoSpace
            copy = self.rng.choice(blocks_of(spare))
            spare &= ~(1 << copy)
            records.append(Record(block, copy, mask))
        if records:
            for record in records:
                if record.copy != ZERO:
                    self.medium.write(record.copy, now[record.block])
            if self.sabotage == "overwrite-before-copy":
                # What a missing barrier does: the records and the overwrites may be durable before the copies.
                for block, content in changes:
                    self.medium.write(block, content)
            self.medium.commit(header._replace(records=header.records + tuple(records)))
        if journal:
            self.medium.write_journalled(changes)
            return
        for block, content in changes:
            if now[block] != content:
                self.medium.write(block, content)

    def copies_needed(self, changes: list[tuple[int, Any]], also: int = 0) -> int:
        """How many copies ``write`` would make, if the blocks ``also`` were preserved by one more snapshot."""
        now = self.medium.now
        return sum(
            1
            for block, content in changes
            if now[block] != content and now[block] != 0 and (also >> block & 1 or self.need(block))
        )

    # Snapshots.

    def create(self, bit: int) -> None:
        header = self.header
        self.medium.commit(header._replace(snapshots={**header.snapshots, bit: self.preserved()}))

    def preserved(self) -> int:
        meta = self.meta
        return meta.bitmap & ~(meta.store if self.sabotage == "mapping-excluded" else meta.data)

    def free_bit(self, among: tuple[int, ...]) -> int:
        """A bit that no snapshot has and no record still bears, or 0."""
        borne = 0
        if self.sabotage != "reuse-bit":
            for record in self.header.records:
                borne |= record.mask
        return next((bit for bit in among if bit not in self.header.snapshots and not bit & borne), 0)

    def delete(self, bit: int) -> None:
        """Two commits: the bit goes, then what only it held."""
        header = self.header
        left = {other: preserved for other, preserved in header.snapshots.items() if other != bit}
        records = header.records
        if self.sabotage == "free-shared":
            records = tuple(record for record in records if not record.mask & bit)
        self.medium.commit(header._replace(snapshots=left, records=records))
        self.fold()

    def fold(self) -> None:
        """Take the bits of deleted snapshots out of the records; free copies at mask zero."""
        header = self.header
        if self.sabotage == "reuse-bit":
            return
        allocated = sum(header.snapshots)
        folded = tuple(record._replace(mask=record.mask & allocated) for record in header.records)
        if self.sabotage != "leak-copy":
            folded = tuple(record for record in folded if record.mask)
        if folded != header.records:
            self.medium.commit(header._replace(records=folded))

    # Growing and shrinking.

    def pick(self, bits: int) -> int:
        """Any block of a set, as the kernel hands out what it likes; NoSpace if there is none."""
        if not bits:
            raise NoSpace
        return self.rng.choice(blocks_of(bits))

    def grow(self, *, live: bool) -> None:
        """Give the store one more data block, and a mapping block if it needs one now."""
        data, mapping = self.header.owned
        free = EVERYTHING & ~self.meta.bitmap
        new = self.pick(free)
        if mapping == NONE and data.bit_count() + 1 > IN_INODE:
            mapping = self.pick(free & ~(1 << new))
        self.resize(data | 1 << new, mapping, live=live)

    def shrink(self) -> None:
        """Give one spare data block back, and the mapping block if it is not needed any more."""
        data, mapping = self.header.owned
        new = data & ~(1 << self.pick(self.spare()))
        self.resize(new, mapping if new.bit_count() > IN_INODE else NONE, live=False)

    def resize(self, data: int, mapping: int, *, live: bool) -> None:
        changes = self.graft_changes(data, mapping)
        room = (self.spare() & data).bit_count()
        if self.copies_needed(changes) > room:
            raise NoSpace
        if not live:
            self.medium.commit(self.header._replace(wanted=(data, mapping)))
        self.write(*changes, journal=live)
        self.own(data, mapping)

    def graft_changes(self, data: int, mapping: int) -> list[tuple[int, Any]]:
        """What makes the filesystem say what the header says."""
        meta = self.meta
        bitmap = meta.bitmap & ~meta.store | data | bit_of(mapping)
        changes: list[tuple[int, Any]] = [] if mapping == NONE else [(mapping, ("map", data))]
        return [*changes, (0, Meta(bitmap, data, mapping))]

    def own(self, data: int, mapping: int) -> None:
        """The second commit: the blocks are the store's; those that a snapshot needs are adopted."""
        header = self.header
        adopted = []
        if self.sabotage != "no-adoption":
            for block in blocks_of(data & ~header.owned[0]):
                mask = self.need(block)
                if mask:
                    copy = block if self.medium.now[block] != 0 else ZERO
                    adopted.append(Record(block, copy, mask))
        self.medium.commit(
            header._replace(owned=(data, mapping), wanted=(data, mapping), records=header.records + tuple(adopted))
        )

    # Restore.

    def restore(self, bit: int, *, safety: bool) -> None:
        """Make the base volume the snapshot.

        Raises:
            NoSpace: Refused, nothing changed.
        """
        header = self.header
        safety_bit = 0
        if safety:
            safety_bit = self.free_bit(BITS[-1:])
            if not safety_bit:
                raise NoSpace
        intent = self.plan(bit)
        writes, moves = self.steps(intent)
        also = self.preserved() if safety_bit else 0
        room = (self.spare() & intent.data).bit_count()
        if self.copies_needed(writes, also) + len(moves) > room:
            raise NoSpace
        snapshots = {**header.snapshots, safety_bit: also} if safety_bit else header.snapshots
        self.medium.commit(header._replace(snapshots=snapshots, intent=intent))
        self.finish_restore()

    def target(self, bit: int) -> tuple[Meta, int]:
        """The metadata of then, and the blocks that were the user's then."""
        then: Meta = self.view(bit, 0)
        return then, then.user

    def plan(self, bit: int) -> Intent:
        """Where the store shall lie: off every block that the target uses."""
        _, user = self.target(bit)
        data, mapping = self.header.owned
        if self.sabotage == "restore-in-place":
            return Intent(bit, data, mapping)
        data &= ~user
        if data.bit_count() <= IN_INODE:
            return Intent(bit, data, NONE)
        if mapping == NONE or user >> mapping & 1:
            free = EVERYTHING & ~(self.meta.bitmap | user)
            if free:
                mapping = self.pick(free)
            else:
                # The store gives one of its own spare blocks.
                mapping = self.pick(self.spare() & data)
                data &= ~(1 << mapping)
                if data.bit_count() <= IN_INODE:
                    mapping = NONE
        return Intent(bit, data, mapping)

    def steps(self, intent: Intent) -> tuple[list[tuple[int, Any]], list[Record | int]]:
        """What a restore has yet to do: blocks to write first to last, and copies (or the header) to move out."""
        header = self.header
        then, user = self.target(intent.bit)
        store = intent.data | bit_of(intent.mapping)
        writes: list[tuple[int, Any]] = [(block, self.view(intent.bit, block)) for block in blocks_of(user)]
        if intent.mapping != NONE:
            writes.append((intent.mapping, ("map", intent.data)))
        bitmap = (then.bitmap if self.sabotage == "graft-then" else user | 1) | store
        writes.append((0, Meta(bitmap, intent.data, intent.mapping)))
        moves: list[Record | int] = []
        leaving = header.owned[0] & ~intent.data
        for record in header.records:
            if record.copy >= 0 and leaving >> record.copy & 1 and not self.released(record, intent):
                moves.append(record)
        if leaving >> header.home & 1:
            moves.append(header.home)
        return writes, moves

    def released(self, record: Record, intent: Intent) -> bool:
        """An adopted block that the target shows as it is becomes the base volume's again, for all its snapshots."""
        return record.copy == record.block and bool(record.mask & intent.bit)

    def finish_restore(self) -> None:
        """Do what the intent says; done again after a crash it does what is left."""
        intent = self.header.intent
        assert intent is not None
        writes, moves = self.steps(intent)
        if moves or self.header.wanted != (intent.data, intent.mapping):
            self.move_out(intent, moves)
        if self.sabotage == "drop-early":
            self.drop_records(intent)
        for block, content in writes[:-1]:
            if self.sabotage == "restore-over-others":
                self.medium.write(block, content)
            else:
                self.write((block, content))
        self.medium.barrier()
        if self.sabotage == "intent-early":
            self.medium.commit(self.header._replace(intent=None, owned=self.header.wanted))
        self.write(writes[-1])
        self.medium.barrier()
        records = self.droppable(intent) if self.sabotage != "drop-early" else self.header.records
        self.medium.commit(self.header._replace(owned=self.header.wanted, intent=None, records=records))

    def move_out(self, intent: Intent, moves: list[Record | int]) -> None:
        header = self.header
        spare = self.spare()
        home = header.home
        records = [
            record
            for record in header.records
            if not (record.copy >= 0 and header.owned[0] & ~intent.data & 1 << record.copy) or record in moves
        ]
        for move in moves:
            if not spare:
                raise NoSpace
            to = self.rng.choice(blocks_of(spare))
            spare &= ~(1 << to)
            if isinstance(move, Record):
                self.medium.write(to, self.medium.now[move.copy])
                records[records.index(move)] = move._replace(copy=to)
            else:
                home = to
        self.medium.commit(
            header._replace(
                owned=(intent.data, header.owned[1]),
                wanted=(intent.data, intent.mapping),
                home=home,
                records=tuple(records),
            )
        )

    def droppable(self, intent: Intent) -> tuple[Record, ...]:
        """The records that are left when those equal to the base volume are dropped.

        Only blocks that are the user's again count.  A block of the store may be equal to its copy as well, because
        it *is* the copy (adopted), or by chance; its record must stay.
        """
        now = self.medium.now
        user = EVERYTHING if self.sabotage in ("drop-unequal", "drop-in-store") else self.meta.user
        return tuple(
            record
            for record in self.header.records
            if not record.mask & intent.bit
            or not user >> record.block & 1
            or (
                self.sabotage != "drop-unequal"
                and now[record.block] != (0 if record.copy == ZERO else now[record.copy])
            )
        )

    def drop_records(self, intent: Intent) -> None:
        _, user = self.target(intent.bit)
        kept = tuple(
            record for record in self.header.records if not (record.mask & intent.bit and user >> record.block & 1)
        )
        self.medium.commit(self.header._replace(records=kept))

    # Recovery.

    def recover(self) -> None:
        """What the first command after a crash does."""
        header = self.header
        if header.intent is not None:
            self.finish_restore()
        elif header.owned != header.wanted:
            if self.sabotage != "forget-wanted":
                data, mapping = header.wanted
                self.write(*self.graft_changes(data, mapping))
                self.own(data, mapping)
            else:
                self.medium.commit(header._replace(owned=header.wanted))
        else:
            meta = self.meta
            if (meta.data, meta.mapping) != header.owned:
                # The kernel granted blocks that the header does not know yet: a pending surplus.
                if self.sabotage == "surplus-lost":
                    granted = (meta.data, meta.mapping)
                    self.medium.commit(header._replace(owned=granted, wanted=granted))
                else:
                    self.own(meta.data, meta.mapping)
        self.fold()
        self.medium.barrier()
