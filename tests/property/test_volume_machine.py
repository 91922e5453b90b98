"""A whole volume against a plain model: a bytearray for the base, and one for each snapshot.

The machine does what people and kernels do, in any order: writes of any offset and length, punches, changes of the
filesystem by debugfs, flushes, snapshots, deletes, restores, undo, serving, ending, reopening.  Beside the real
volume (a small ext2 or ext4 image in memory) stands the model:

    base        a bytearray: what the volume reads as
    snapshot    the base's bytes at its moment, and the blocks that it preserves, as dumpe2fs and debugfs tell

After every step the base and a view equal the model, and the marks are as the state says.  After some steps, and
at the end, come e2fsck, the two bitmaps, and every record against the model.

extsnap's own edits (the store grows, a restore grafts) change metadata in a way that the model cannot foresee:
there the model takes the volume's word, after e2fsck agreed; file data, file metadata and free blocks are foreseen.
So it does for free blocks that were punched, when the image comes to rest: they may show again what they had.

``EXTSNAP_LONG=1`` runs longer, with new examples every time; else the examples are the same in every run.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from unittest import mock

import lab
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lab import BLOCK, Flags, Survey

from extsnap.errors import RestoreRefused, StoreProtected, VolumeFull
from extsnap.snapshot import hidden
from extsnap.snapshot.volume import Volume

LONG = bool(os.environ.get("EXTSNAP_LONG"))
SNAPSHOTS_MAX = 6
#: Every so many steps the dear invariants are looked at.
THOROUGH = 8
#: Of needed content that a punch hides: the volume is small.
HIDE_BYTES = 12 * BLOCK
GUARD, MARK = (0x465, 0x10), (0x463, 0x80)  # (byte of the image, bit)
# Half of the writes go to the same few blocks, so that they meet blocks that were copied and restored before.
PLACES = {"where": st.integers(0, 12) | st.integers(0, 1 << 16), "skip": st.integers(0, BLOCK - 1) | st.just(0)}
LENGTHS = st.integers(1, 3 * BLOCK) | st.integers(1, 64 * BLOCK) | st.integers(1, 800 * BLOCK) | st.just(BLOCK)


@dataclass
class Moment:
    """The model of a snapshot."""

    content: bytes
    preserved: Flags
    survey: Survey
    safety: bool = False


class VolumeMachine(RuleBasedStateMachine):
    """Rules do things to volume and model; invariants compare the two."""

    @initialize(kind=st.sampled_from(["ext4", "ext2"]))
    def open(self, kind: str) -> None:
        """A plain volume, served from the start or not."""
        self.random = random.Random(kind)
        self.time = 1_700_000_000 * 10**9
        self.device = lab.MemoryDevice(lab.plain_image(kind))
        self.base = bytearray(self.device.content)
        self.snapshots: dict[str, Moment] = {}
        self.serving = False
        self.number = 0
        self.steps = 0
        self.hiding = mock.patch.object(hidden, "HIDE_BYTES", HIDE_BYTES)
        self.hiding.start()
        self.volume = self.opened()
        self.look = lab.survey(self.base)
        self.punched = np.zeros(len(self.look.in_use), np.bool_)

    def opened(self) -> Volume:
        return Volume(self.device, writable=True, clock=self.clock, random_bytes=self.random.randbytes)

    def clock(self) -> int:
        self.time += 10**9
        return self.time

    # -- writes, while serving ---------------------------------------------------------------------------

    def range_of_data(self, where: int, skip: int, length: int) -> tuple[int, int]:
        """(offset, length) within file data and free blocks: what leaves the filesystem consistent."""
        safe = np.flatnonzero((self.look.files | ~self.look.in_use) & ~self.look.store_all)
        first = where % len(safe)
        block, rest = int(safe[first]), safe[first:]
        stop = block + int((rest == np.arange(block, block + len(rest))).sum())
        offset = block * BLOCK + skip
        return offset, min(length, stop * BLOCK - offset, len(self.base) - offset)

    @precondition(lambda self: self.serving)
    @rule(**PLACES, length=LENGTHS, fill=st.integers(0, 3), times=st.integers(1, 3))
    def write(self, where: int, skip: int, length: int, fill: int, times: int) -> None:
        """A write is seen at once; one that finds no room for its copies changes nothing."""
        offset, length = self.range_of_data(where, skip, length)
        for _ in range(times):
            data = bytes(length) if fill == 0 else self.random.randbytes(length)
            try:
                self.volume.write(offset, data)
            except VolumeFull:
                event("a write found no room")
            else:
                self.wrote(offset, data)

    def wrote(self, offset: int, data: bytes) -> None:
        self.base[offset : offset + len(data)] = data
        self.punched[offset // BLOCK : -(-(offset + len(data)) // BLOCK)] = False

    @precondition(lambda self: self.serving)
    @rule(**PLACES, length=LENGTHS)
    def punch(self, where: int, skip: int, length: int) -> None:
        """A punched range reads as zeros."""
        self.discard(*self.range_of_data(where, skip, length))

    @precondition(lambda self: self.serving and self.snapshots)
    @rule(name=st.sampled_from(lab.NAMES), then=st.sampled_from(["", "write {} n9", "rm n9"]))
    def remove_and_trim(self, name: str, then: str) -> None:
        """Snapshots need what was in the file: it is hidden, perhaps written again, perhaps removed for good."""
        self.change("rm " + name, b"")
        for start, count in lab.runs(np.flatnonzero(~self.look.in_use)):
            self.discard(start * BLOCK, min(count * BLOCK, len(self.base) - start * BLOCK))
        if then:
            self.change(then, self.random.randbytes(100 * BLOCK))

    def discard(self, offset: int, length: int) -> None:
        try:
            self.volume.punch(offset, length)
        except VolumeFull:
            event("a punch found no room")
        else:
            self.wrote(offset, bytes(length))
            self.punched[-(-offset // BLOCK) : (offset + length) // BLOCK] = True

    @precondition(lambda self: self.serving and len(self.look.store))
    @rule(where=st.integers(0, 1 << 16), length=st.integers(1, 3 * BLOCK))
    def write_into_the_store(self, where: int, length: int) -> None:
        """A write that would change the store's data is refused; what it reads as may be written to it."""
        blocks = lab.spread(self.look.store[:, 1:])
        offset = int(blocks[where % len(blocks)]) * BLOCK
        length = min(length, len(self.base) - offset)
        with pytest.raises(StoreProtected):
            self.volume.write(offset, b"\1" + self.random.randbytes(length - 1))
        self.volume.write(offset, self.base[offset : offset + length])

    @precondition(lambda self: self.serving)
    @rule(
        change=st.sampled_from(["write", "rm", "touch", "mkdir", "rmdir"]),
        which=st.integers(0, len(lab.NAMES) - 1),
        length=st.integers(0, 200 * BLOCK) | st.integers(1200 * BLOCK, 2400 * BLOCK),
    )
    def change_the_filesystem(self, change: str, which: int, length: int) -> None:
        """Debugfs changes a copy; the sectors that differ are written back, as a kernel would."""
        name = lab.NAMES[which]
        line = {
            "write": f"write {{}} n{which % 4}",
            "rm": f"rm {name}",
            "touch": f"set_inode_field {name} mtime @{1_650_000_000 + length}",
            "mkdir": f"mkdir d{which}",
            "rmdir": f"rmdir d{which}",
        }[change]
        self.change(line, self.random.randbytes(length))

    def change(self, line: str, data: bytes) -> None:
        old = bytes(self.base)
        new = lab.changed_by_debugfs(old, line, data=data)
        if lab.complaint(new):
            return  # debugfs leaves damage behind where it fails: a name that is taken, no space
        written = []
        try:
            for offset, size in lab.changed_runs(old, new):
                self.volume.write(offset, new[offset : offset + size])
                written.append((offset, size))
        except VolumeFull:
            event("a change of the filesystem found no room")
            for offset, size in written:  # what was copied already never needs room again
                self.volume.write(offset, old[offset : offset + size])
        else:
            for offset, size in written:
                self.wrote(offset, new[offset : offset + size])
            self.look = lab.survey(self.base)

    @rule()
    def flush(self) -> None:
        """What the base reads as is on the medium then, but for superblocks, the store and what is hidden."""
        self.volume.flush()
        special = self.look.store_data.copy()
        special |= self.hidden()
        special[lab.unequal(self.base, self.device.content) & lab.flags(len(special), self.superblocks())] = True
        assert not (lab.unequal(self.base, self.device.content) & ~special).any()

    def hidden(self) -> Flags:
        if self.volume.store is None:
            return np.zeros(len(self.look.in_use), np.bool_)
        runs = self.volume.verb("dump", what="header")["header"]["hidden"]
        if runs:
            event("blocks are hidden")
        flags = lab.flags(len(self.look.in_use), lab.spread(np.array(runs, np.int64).reshape(-1, 2)))
        assert not (flags & ~self.punched & ~self.look.store_data).any(), "hidden, and nobody punched it"
        return flags

    def superblocks(self) -> np.ndarray:
        return np.array([at // BLOCK for at in self.volume.medium.offsets], np.int64)

    # -- commands ----------------------------------------------------------------------------------------

    def loose(self) -> Flags:
        """Blocks that may show again what they had, now that the image comes to rest: free, and punched before."""
        flags = self.punched & ~self.look.in_use
        self.punched[:] = False
        return flags

    def take_over(self, expected: bytes | bytearray, *stores: Flags) -> None:
        """After a command: data, free blocks and the files are as expected; the rest is e2fsck's to judge."""
        found = self.volume.read(0, self.volume.size)
        before, after = self.look, lab.survey(found)
        metadata = (before.in_use | after.in_use) & ~after.files
        for store in (before.store_all, after.store_all, *stores):
            metadata |= store
        wrong = np.flatnonzero(lab.unequal(expected, found) & ~metadata)
        assert not len(wrong), f"blocks {wrong[:10].tolist()} of the base are not as the model has them"
        self.base[:] = found
        self.look = after

    @precondition(lambda self: len(self.snapshots) < SNAPSHOTS_MAX)
    @rule()
    def create(self) -> None:
        """A snapshot is the base at its moment, in the blocks that are in use; or there is no room and no change."""
        self.number += 1
        name, tree = f"s{self.number}", self.look.tree
        try:
            self.volume.verb("create", name=name)
        except VolumeFull:
            event("a create found no room")
            self.take_over(self.base)
        else:
            self.take_over(self.base)
            self.note(name)
            assert self.snapshots[name].survey.tree == tree
        assert self.look.tree == tree

    def note(self, name: str) -> None:
        """Take the base as it is for the content of a new snapshot.

        While serving the store grows after the moment itself: there the view tells the metadata of then.
        """
        if not self.serving:
            self.snapshots[name] = Moment(bytes(self.base), self.look.preserved, self.look)
            return
        self.note_from_view(name, bytes(self.base))

    def note_from_view(self, name: str, base: bytes, *, safety: bool = False) -> None:
        """Take a new view for the model of its snapshot, after its files were compared with the base of then."""
        seen = self.volume.open_view(name).pread(0, self.volume.size)
        then = lab.survey(seen)
        assert not lab.complaint(seen)
        assert not (lab.unequal(seen, base) & then.files).any()
        self.snapshots[name] = Moment(seen, then.preserved, then, safety)

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Snapshots go in any order, several at once; base and the other views stay."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.snapshots)), min_size=1, max_size=3, unique=True))
        tree = self.look.tree
        self.volume.verb("delete", names=names)
        for name in names:
            del self.snapshots[name]
        self.take_over(self.base)
        assert self.look.tree == tree

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data(), safety=st.booleans())
    def restore(self, data: st.DataObject, safety: bool) -> None:
        """The base becomes the snapshot in every block that it preserves; the safety snapshot is the base before."""
        self.restore_to(data.draw(st.sampled_from(sorted(self.snapshots))), safety=safety)

    @precondition(lambda self: any(moment.safety for moment in self.snapshots.values()))
    @rule()
    def undo(self) -> None:
        """Undo goes back to the newest safety snapshot."""
        newest = [name for name, moment in self.snapshots.items() if moment.safety][-1]
        self.restore_to(newest, undo=True)

    def restore_to(self, name: str, *, undo: bool = False, safety: bool = True) -> None:
        moment, before, held = self.snapshots[name], self.look, bytes(self.base)
        loose = self.loose()
        try:
            answer = self.volume.verb("restore", **({"undo": True} if undo else {"name": name, "safety": safety}))
        except (VolumeFull, RestoreRefused) as error:
            event(f"a restore ended with {type(error).__name__}")
            self.take_over(self.base, loose)
            assert self.look.tree == before.tree
            return
        assert answer["restored"] == name
        size = len(moment.preserved) * BLOCK
        mask = np.repeat(moment.preserved, BLOCK)
        expected = np.frombuffer(held.ljust(size, b"\0"), np.uint8).copy()
        expected[mask] = np.frombuffer(moment.content.ljust(size, b"\0"), np.uint8)[mask]
        loose &= ~moment.preserved[: len(loose)]
        self.take_over(expected.tobytes()[: len(held)], moment.survey.store_all, loose)
        assert self.look.tree == moment.survey.tree
        if answer["safety"]:
            self.note_from_view(answer["safety"], held, safety=True)
            assert self.snapshots[answer["safety"]].survey.tree == before.tree

    # -- opening and closing -----------------------------------------------------------------------------

    @precondition(lambda self: not self.serving)
    @rule(grow=st.booleans())
    def begin_serving(self, grow: bool) -> None:
        """The volume is served for writing, its store grown ahead or not."""
        self.volume.begin_serving(grow=grow)
        self.serving = True
        self.take_over(self.base)

    @precondition(lambda self: self.serving)
    @rule()
    def end_serving(self) -> None:
        """The image comes to rest."""
        loose, clean = self.loose(), self.volume.end_serving()
        self.serving = False
        self.take_over(self.base, loose)
        self.comes_to_rest(clean)

    def comes_to_rest(self, clean: bool) -> None:
        """Zeros that found no room for what was there before leave the mark; without snapshots they need none."""
        if not clean:
            event("the image kept the mark")
            assert self.hidden().any()
            self.volume.verb("delete", names=list(self.snapshots))
            self.snapshots.clear()
            self.take_over(self.base)

    @rule()
    def reopen(self) -> None:
        """A new process finds what was flushed, and loses no block of the store.

        While serving this is a server that was killed: the next one completes and takes the mark off.
        """
        self.volume.flush()
        at_rest, free = not self.serving, self.free_in_store()
        self.volume = self.opened()
        if at_rest:
            assert self.free_in_store() == free
        assert not self.volume.outside_write
        assert not self.volume.needs_replay
        loose = self.loose() if self.serving else np.zeros(len(self.punched), np.bool_)
        self.serving = False
        self.take_over(self.base, loose)
        self.comes_to_rest(at_rest or not self.device.content[MARK[0]] & MARK[1])

    def free_in_store(self) -> int:
        store = self.volume.verb("info")["store"]
        return store["free_bytes"] if store else 0

    # -- what holds always -------------------------------------------------------------------------------

    @invariant()
    def base_is_the_model(self) -> None:
        """The base reads as its bytearray; the store's data reads as zeros."""
        found = self.volume.read(0, self.volume.size)
        assert not np.flatnonzero(lab.unequal(found, self.base)).tolist()
        data = np.flatnonzero(self.look.store_data)
        assert not lab.unequal(found, bytes(len(found)))[data].any()

    @invariant()
    def names_are_the_model(self) -> None:
        """The snapshots are those of the model, oldest first."""
        assert self.volume.snapshot_names() == list(self.snapshots)

    @invariant()
    def a_view_is_the_model(self) -> None:
        """A view is its bytearray in every block preserved, and zeros elsewhere; each step looks at another one."""
        self.steps += 1
        if self.snapshots:
            self.view_is_the_model(list(self.snapshots)[self.steps % len(self.snapshots)])

    def view_is_the_model(self, name: str) -> None:
        moment = self.snapshots[name]
        seen = self.volume.open_view(name).pread(0, self.volume.size)
        wrong = np.flatnonzero(lab.unequal(seen, moment.content) & moment.preserved)
        assert not len(wrong), f"{name}: blocks {wrong[:10].tolist()} are not as they were"
        stray = np.flatnonzero(lab.unequal(seen, bytes(len(seen))) & ~moment.preserved)
        assert not len(stray), f"{name}: blocks {stray[:10].tolist()} were not in use and are not zeros"

    @invariant()
    def marks_are_as_the_state(self) -> None:
        """Dirty mark: while served with snapshots.  Guard: at rest with snapshots."""
        marked = bool(self.device.content[MARK[0]] & MARK[1])
        guarded = bool(self.device.content[GUARD[0]] & GUARD[1])
        if self.snapshots:
            assert marked == self.serving
            assert guarded or self.serving
        elif not self.serving:
            assert not marked
            assert not guarded

    @invariant()
    def sometimes_everything(self) -> None:
        """The dear invariants."""
        if self.steps % THOROUGH == 0:
            self.everything(list(self.snapshots)[-1:])

    def teardown(self) -> None:
        """At the end the image comes to rest, and all of it is looked at."""
        if not hasattr(self, "volume"):
            return
        self.hiding.stop()
        if self.serving:
            self.end_serving()
        self.everything(list(self.snapshots))
        assert not lab.complaint(self.device.content)
        copy = Volume(lab.MemoryDevice(self.device.content))  # the image, copied, read-only
        assert copy.snapshot_names() == list(self.snapshots)
        for name in self.snapshots:
            self.view_is_the_model(name)
            assert copy.open_view(name).pread(0, copy.size) == self.volume.open_view(name).pread(0, copy.size)

    def everything(self, names: list[str]) -> None:
        assert not lab.complaint(self.base)
        for name in names:
            self.view_is_the_model(name)
            assert not lab.complaint(self.volume.open_view(name).pread(0, self.volume.size)), name
        if self.volume.store is None:
            return
        answer = self.volume.verb("check")
        assert answer["store"]["ok"], answer
        assert not any(entry["errors"] for entry in answer["snapshots"]), answer
        self.bitmaps_agree()
        self.records_agree()
        if not self.serving:  # another process finds as many free blocks: none leaked, none in use twice
            copy = Volume(lab.MemoryDevice(self.device.content))
            assert copy.verb("info")["store"]["free_bytes"] == self.free_in_store()

    def bitmaps_agree(self) -> None:
        """Snapshot allocation bitmap = blocks of the store's inode, a subset of ext's, which extsnap reads right."""
        dump = self.volume.verb("dump", what="bitmaps")["bitmaps"]
        count = len(self.look.in_use)
        mine = lab.flags(count, lab.spread(np.array(dump["snapshot"], np.int64).reshape(-1, 2)))
        assert (mine == self.look.store_all).all()
        assert not (mine & ~self.look.in_use).any()
        ext = lab.flags(count, lab.spread(np.array(dump["block"], np.int64)))
        covered = slice(1, len(self.base) // BLOCK)  # not the boot block, nor the tail: no bitmap has them
        assert (ext == self.look.in_use)[covered].all()

    def records_agree(self) -> None:
        """Every record against the model and the medium.

        Its snapshots preserve the block, have no other record for it, and its copy, found through debugfs's map
        of the store, is what all of them hold.  A copy block belongs to one record and to nothing else.
        """
        self.volume.flush()
        where = {
            int(logical) + index: int(physical) + index
            for logical, physical, length in self.look.store.tolist()
            for index in range(length)
        }
        header = self.volume.verb("dump", what="header")["header"]
        taken = set(range(header["log"]["start"] + header["log"]["blocks"]))
        for blob in header["blobs"]:
            taken.update(lab.spread(np.array(blob["runs"], np.int64).reshape(-1, 2)).tolist())
        seen: set[tuple[int, str]] = set()
        for record in self.volume.verb("dump", what="records")["records"]:
            assert record["snapshots"]
            for index in range(record["length"]):
                block = record["block"] + index
                copy = bytes(BLOCK)
                if record["copy"] is not None:
                    logical = record["copy"] + index
                    assert logical in where, f"the copy of block {block} is not the store's"
                    assert logical not in taken, f"store block {logical}, the copy of block {block}, is in use twice"
                    taken.add(logical)
                    copy = self.device.pread(where[logical] * BLOCK, BLOCK)
                for name in record["snapshots"]:
                    assert (block, name) not in seen, f"block {block} has two records for {name}"
                    seen.add((block, name))
                    moment = self.snapshots[name]
                    assert moment.preserved[block], f"{name} does not preserve block {block} and has a record of it"
                    then = moment.content[block * BLOCK : (block + 1) * BLOCK].ljust(BLOCK, b"\0")
                    assert copy == then, f"the copy of block {block} is not what {name} holds"


TestVolume = VolumeMachine.TestCase
TestVolume.settings = settings(
    max_examples=400 if LONG else 20,
    stateful_step_count=80 if LONG else 30,
    derandomize=not LONG,
    database=None,
    # A sabotage has to be caught, not explained (tools/mutants).
    phases=[Phase.generate] if os.environ.get("EXTSNAP_MUTANT") else [Phase.generate, Phase.shrink],
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
