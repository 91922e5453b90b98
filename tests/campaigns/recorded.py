"""A volume's life on a recorded medium, cut at any operation, recovered, and judged.

`Recorded` runs steps (create, serve, grow, delete, restore, undo, strip) on a small ext2 or ext4 volume and keeps,
for each step, what was before and after it: the base volume's bytes, every snapshot's bytes, and what debugfs and
dumpe2fs say about which blocks are in use and which belong to files.  `Recorded.judge` then takes one medium that a
power cut may have left (docs/TESTING.md, the fault model) and requires:

1. before anything opens it: the dirty mark is on, or no superblock has it and ``e2fsck -fn`` exits 0 on it as it is;
2. the next writing command opens it, replays a journal by stock ``e2fsck -p`` through the write path, and leaves it
   at rest, without the mark, both bitmaps and every copy sound, ``e2fsck -fn`` clean;
3. the interrupted command never happened or is complete: snapshots and base are those from before, or from after;
4. every snapshot reads, byte for byte, as it did right after its create;
5. what a `flush` made durable before the cut is there, and every other sector has its old content or that of a
   write since;
6. after an accept that was cut the outside write is still seen, or its snapshots are tainted and a journal is behind
   the mark.

A sample of the recoveries is itself recorded and cut, and commands after it too: a second power cut must find a
medium that is as good as the first.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import lab
import numpy as np
import numpy.typing as npt

from extsnap.blockdev.base import CloningDevice
from extsnap.blockdev.recording import (
    EVERYTHING,
    NOTHING,
    CrashState,
    Cuts,
    MemoryDevice,
    Operation,
    RecordingDevice,
    crash_states,
)
from extsnap.snapshot.volume import Volume

Flags = npt.NDArray[np.bool_]
BLOCK = lab.BLOCK
SECTOR = 512
MARK_BYTE, MARK_BIT = 0x63, 0x80
RECOVER_BYTE, RECOVER_BIT = 0x60, 0x04
SLOT_MAGIC = b"EXTSNAP\x01"
JOURNAL_MAGIC = b"\xc0\x3b\x39\x98"
_TOOLS = {**os.environ, "LC_ALL": "C", "E2FSPROGS_FAKE_TIME": "1700000000"}
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextmanager
def as_file(content: bytes | bytearray) -> Iterator[str]:
    """A temporary file with this content, in memory where there is a place for it."""
    with tempfile.NamedTemporaryFile(prefix="extsnap-crash-", suffix=".img", dir=_MEMORY) as file:
        file.write(content)
        file.flush()
        yield file.name


class Fsck:
    """Verdicts of ``e2fsck -fn``, remembered by content."""

    def __init__(self) -> None:
        self._verdicts: dict[bytes, str] = {}
        self.runs = 0

    def complaint(self, content: bytes | bytearray, key: bytes | None = None) -> str:
        """Nothing if the volume is clean.  ``key`` stands for content that e2fsck would judge alike."""
        key = digest(content) if key is None else key
        if key not in self._verdicts:
            self.runs += 1
            with as_file(content) as path:
                done = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True, env=_TOOLS, check=False)
            said = f"e2fsck -fn ended with {done.returncode}\n{done.stdout}{done.stderr}"
            self._verdicts[key] = said if done.returncode else ""
        return self._verdicts[key]


#: The first content of each length that `digest` was asked for.
_FIRST: dict[int, bytes] = {}


def digest(content: bytes | bytearray) -> bytes:
    """Stands for a medium, in this process: a hash of where it differs from the first one of its size, and how."""
    first = _FIRST.setdefault(len(content), bytes(content))
    whole = len(content) // SECTOR
    words = SECTOR // 8
    ours, theirs = (np.frombuffer(side, np.uint64, whole * words).reshape(whole, words) for side in (content, first))
    differs = np.flatnonzero((ours != theirs).any(axis=1))
    hashed = hashlib.blake2b(content[whole * SECTOR :], digest_size=16)
    hashed.update(differs.tobytes())
    hashed.update(ours[differs].tobytes())
    return len(content).to_bytes(8, "little") + hashed.digest()


def repaired(content: bytes) -> bytes:
    """The volume after ``e2fsck -p``; a volume without a journal may need ``e2fsck -fy``."""
    options = ["-p"] if _has_journal(content) else ["-p", "-fy"]
    with as_file(content) as path:
        for option in options:
            done = subprocess.run(["e2fsck", option, path], capture_output=True, text=True, env=_TOOLS, check=False)
            if done.returncode in (0, 1):
                return Path(path).read_bytes()
    raise AssertionError(f"e2fsck {option} ended with {done.returncode}\n{done.stdout}{done.stderr}")


def _has_journal(content: bytes) -> bool:
    return bool(content[1024 + 0x5C] & 4)


def plain_image(kind: str) -> bytes:
    """A volume of 4 or 5 MiB with five groups, 1 KiB blocks, and six files of 3 to 90 blocks."""
    blocks, options = {
        "ext2": (4700, ["-O", "^resize_inode"]),
        "ext3": (5900, ["-J", "size=1"]),
        "ext4": (5900, ["-J", "size=1"]),
    }[kind]
    rng = random.Random(kind)
    with tempfile.TemporaryDirectory(prefix="extsnap-crash-", dir=_MEMORY) as name:
        tree, image = Path(name) / "tree", Path(name) / "image"
        tree.mkdir()
        for number, length in enumerate((3000, 12288, 20000, 40 * BLOCK, 60001, 90 * BLOCK)):
            (tree / f"f{number}").write_bytes(rng.randbytes(length // 2) + bytes(length - length // 2))
            os.utime(tree / f"f{number}", (1600000000, 1600000000))
        image.write_bytes(bytes(blocks * BLOCK))
        uuid = "00000000-1111-2222-3333-444444444444"
        words = ["-q", "-F", "-t", kind, "-b", str(BLOCK), "-g", "1024", "-N", "80", "-m", "0", "-U", uuid]
        lab.run("mke2fs", *words, *options, "-E", f"hash_seed={uuid}", "-d", str(tree), str(image))
        return image.read_bytes()


@dataclass
class Moment:
    """What a volume is at one moment.

    Attributes:
        views: The bytes of each snapshot, by name.
        base: The bytes of the base volume.
        in_use: bool[blocks]: blocks in use that are not the store's data, by dumpe2fs and debugfs.
        files: bool[blocks]: data blocks of the test's files, by debugfs.
        settings: What the store remembers, and which snapshots it calls tainted.
    """

    views: dict[str, bytes]
    base: bytes
    in_use: Flags
    files: Flags
    settings: tuple[object, ...] = ()

    @property
    def names(self) -> list[str]:
        return sorted(self.views)


def settings_of(volume: Volume) -> tuple[object, ...]:
    """What ``set``, ``guard`` and ``accept`` change."""
    if volume.store is None:
        return ()
    listed = volume.verb("list")["snapshots"]
    tainted = tuple(entry["name"] for entry in listed if entry["state"] == "tainted")
    return volume.verb("set")["properties"]["on-full"], volume.guard_wanted, tainted


@dataclass(frozen=True)
class Event:
    """A write or a flush from above.

    Attributes:
        issued: Operations in the record when it began.
        returned: Operations in the record when it returned.
        flush: Everything before is durable then.
        first: The first sector that it wrote; 0 for a flush.
        content: What those sectors read as afterwards; the whole base for a flush.
    """

    issued: int
    returned: int
    flush: bool
    first: int
    content: bytes


@dataclass
class Step:
    """One command, or one session of writes, and the part of the record that it wrote.

    Attributes:
        touched: bool[blocks]: blocks that are written in the step, those of files left out: extsnap's own
            edits of metadata, which e2fsck judges.
        time: Of the clock when it began.
        events: Of a session.
    """

    name: str
    first: int
    last: int
    before: Moment
    after: Moment
    touched: Flags
    time: int
    events: list[Event] = field(default_factory=list)


def metadata_touched(log: list[Operation], before: Moment, after: Moment) -> Flags:
    """bool[blocks]: what the operations write, blocks of files left out."""
    touched = np.zeros(len(before.files), np.bool_)
    for operation in log:
        touched[operation.offset // BLOCK : -(-(operation.offset + operation.length) // BLOCK)] = True
    return touched & ~(before.files | after.files)


def put_below(volume: Volume, device: CloningDevice) -> None:
    """Exchange the device below an open volume for one with the same content."""
    volume._device.below = device


class Recorded:
    """A volume's life, recorded; see the module."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.random = random.Random(f"{kind} campaign")
        self.fsck = Fsck()
        self.time = 1_700_000_000 * 10**9
        self.device = RecordingDevice(MemoryDevice(plain_image(kind)))
        self.steps: list[Step] = []
        self._views: dict[str, bytes] = {}
        self.volume = self.opened(self.device)
        self.superblocks = self.volume.superblock_offsets(self.volume.filesystem())
        assert len(self.superblocks) > 1, "the volume has no backup superblocks"
        self._cuts = Cuts(self.device.initial, self.device.log, superblocks=self.superblocks)
        self._events: list[Event] = []
        self._now = self.moment()

    def opened(self, device: CloningDevice) -> Volume:
        """The volume on a device, recovered where need be."""
        rng = random.Random(len(self.steps))
        return Volume(device, writable=True, clock=self.clock, random_bytes=rng.randbytes)

    def reopen(self) -> None:
        """Open the medium anew, as the next command does."""
        self.volume = self.opened(self.device)
        self._views.clear()  # what somebody wrote outside may show in them

    def clock(self) -> int:
        self.time += 10**9
        return self.time

    # -- living -----------------------------------------------------------------------------------------

    def moment(self) -> Moment:
        """What the volume is now.  A snapshot that is new is read, and proved equal to the base of this moment."""
        base = self.volume.read(0, self.volume.size)
        survey = lab.survey(base)
        for name in self.volume.snapshot_names():
            if name not in self._views:
                view = self.view(self.volume, name)
                complaint = self.fsck.complaint(view)
                assert not complaint, f"the view of {name}: {complaint}"
                self._views[name] = view
        views = {name: self._views[name] for name in self.volume.snapshot_names()}
        return Moment(views, base, survey.in_use & ~survey.store_data, survey.files, settings_of(self.volume))

    def view(self, volume: Volume, name: str) -> bytes:
        return volume.open_view(name).pread(0, volume.size)

    def step(self, name: str, action: Callable[[Volume], object]) -> None:
        """Run a command; remember the moments around it.

        Args:
            name: For messages.
            action: The command.
        """
        before, first, time = self._now, len(self.device.log), self.time
        self._events = []
        action(self.volume)
        last = len(self.device.log)
        self._now = after = self.moment()
        for view_name in set(after.views) - set(before.views):
            wrong = lab.unequal(after.views[view_name], before.base) & before.files
            assert not wrong.any(), f"{view_name} is not what the base was: blocks {np.flatnonzero(wrong)[:10]}"
        touched = metadata_touched(self.device.log[first:last], before, after)
        self.steps.append(Step(name, first, last, before, after, touched, time, self._events))

    def write(self, offset: int, data: bytes) -> None:
        issued = len(self.device.log)
        self.volume.write(offset, data)
        self._event(issued, offset, len(data))

    def punch(self, offset: int, length: int) -> None:
        issued = len(self.device.log)
        self.volume.punch(offset, length)
        self._event(issued, offset, length)

    def flush(self) -> None:
        issued = len(self.device.log)
        self.volume.flush()
        base = self.volume.read(0, self.volume.size)
        self._events.append(Event(issued, len(self.device.log), True, 0, base))

    def _event(self, issued: int, offset: int, length: int) -> None:
        low, high = offset // SECTOR, -(-(offset + length) // SECTOR)
        content = self.volume.read(low * SECTOR, (high - low) * SECTOR)
        self._events.append(Event(issued, len(self.device.log), False, low, content))

    # -- judging ----------------------------------------------------------------------------------------

    def step_at(self, point: int) -> Step:
        """The step that a cut after ``point`` operations interrupts."""
        return next(step for step in self.steps if point <= step.last)

    def states(self, rng: random.Random, points: list[int], variants: int) -> Iterator[CrashState]:
        """Media after cuts at ``points``, `variants` of each by chance."""
        yield from crash_states(
            self.device.initial, self.device.log, rng, superblocks=self.superblocks, points=points, variants=variants
        )

    def half_committed(self) -> list[int]:
        """Points at which the first slot of a header commit is durable and the second is not written."""
        log = self.device.log
        slots = [at for at, operation in enumerate(log) if operation.data[: len(SLOT_MAGIC)] == SLOT_MAGIC]
        return [at + 2 for at in slots[::2] if log[at + 1].kind == "flush"]

    def state(self, point: int, seed: int) -> CrashState:
        """One medium again."""
        return self._cuts.state(point, seed)

    def judge(self, state: CrashState, *, nested: random.Random | None = None, variants: int = 1) -> None:
        """Require everything that the module says of one medium.

        Args:
            state: The medium.
            nested: If given, the recovery and a command after it are cut too.
            variants: States for each cut of those.
        """
        step = self.step_at(state.point)
        where = f"{self.kind}: {step.name}, cut after operation {state.point} of {step.first}..{step.last}"
        where += f", seed {state.seed}"
        try:
            self._judge(bytes(state.content), step, state.point, nested, variants)
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error

    def judge_content(
        self,
        content: bytes,
        step: Step,
        *,
        base: bytes | None = None,
        since: Sequence[Event] = (),
        unit: int = SECTOR,
    ) -> None:
        """Require of a medium that a failed command left what is required after a cut.

        Args:
            content: The medium.
            step: The command.
            base: What of the base volume is durable, if it is known.
            since: Writes that may be there too.
            unit: Bytes of which a write is done all or none: of a host's file a short write may end anywhere.
        """
        events = [Event(0, 0, True, 0, base), *since] if base is not None else []
        step = replace(step, events=events)
        self._recovered(MemoryDevice(content), content, step, lambda found: self._require_flushed(found, step, 0, unit))

    def alone(self, step: Step, content: bytes, action: Callable[[Volume], object], *, served: bool = False) -> Step:
        """The step as a program of its own does it on the medium that the step found: what it wrote, what it left.

        Args:
            served: The volume was being served then: the step begins once it is again.
        """
        self.time = step.time
        if served:
            volume = self.opened_serving(MemoryDevice(content))
            base = volume.read(0, volume.size)
            device = RecordingDevice(MemoryDevice(volume.medium.device.pread(0, volume.size)))
            put_below(volume, device)
            step = replace(step, before=replace(step.before, base=base))
        else:
            device = RecordingDevice(MemoryDevice(content))
            volume = self.opened(device)
        action(volume)
        base = volume.read(0, volume.size)
        survey = lab.survey(base)
        known = step.before.views | step.after.views
        views = {name: self.view(volume, name) for name in volume.snapshot_names()}
        views = {name: known[name] if known.get(name) == view else view for name, view in views.items()}  # kept once
        after = Moment(views, base, survey.in_use & ~survey.store_data, survey.files, settings_of(volume))
        touched = metadata_touched(device.log, step.before, after)
        return replace(step, last=step.first + len(device.log), after=after, touched=touched)

    def opened_serving(self, device: MemoryDevice) -> Volume:
        """The volume of a medium that was taken while it was served, served again."""
        volume = self.opened(device)
        volume.begin_serving()
        return volume

    def _judge(self, content: bytes, step: Step, point: int, nested: random.Random | None, variants: int) -> None:
        if point == step.last and content[1024 + RECOVER_BYTE] & RECOVER_BIT:
            assert content[1024 + MARK_BYTE] & MARK_BIT, "a command has ended, and stock tools may replay the journal"
        device = RecordingDevice(MemoryDevice(content)) if nested else MemoryDevice(content)
        found = self._recovered(device, content, step, lambda base: self._require_flushed(base, step, point))
        if nested is not None:
            assert isinstance(device, RecordingDevice)
            self._cut_again(device, replace(step, before=found, after=found), nested, variants)

    def _recovered(
        self,
        device: MemoryDevice | RecordingDevice,
        content: bytes,
        step: Step,
        require_flushed: Callable[[bytes], None],
    ) -> Moment:
        """Open a medium, recover it, judge it; returns what it is then."""
        marked = [at for at in self.superblocks if content[at + MARK_BYTE] & MARK_BIT]
        if self.superblocks[0] not in marked:
            assert not marked, "a backup superblock has the dirty mark and the primary has not"
            complaint = self.fsck.complaint(content)
            assert not complaint, f"there is no dirty mark, and {complaint}"
        volume = self.opened(device)
        if volume.outside_write:
            assert step.name.startswith("accept"), "it looks as if it had been written outside extsnap"
            volume.verb("accept")
        elif step.name.startswith("accept") and content[1024 + RECOVER_BYTE] & RECOVER_BIT:
            assert marked, "it is accepted, and stock tools may replay the journal"
        if step.name.startswith("accept"):
            assert settings_of(volume) == step.after.settings, "what was written outside is accepted and not tainted"
        base = volume.read(0, volume.size)
        names = sorted(volume.snapshot_names())
        assert names in (step.before.names, step.after.names), f"there are snapshots {names}"
        moment = step.before if names == step.before.names else step.after
        views = self._require_views(volume, step)
        if step.events:
            require_flushed(base)
        else:
            told_apart = step.before.names != step.after.names
            self._require_base(base, [moment] if told_apart else [step.before, step.after], step.touched)
        if volume.needs_replay:
            self.replay(volume, base)
            self._require_views(volume, step)
            base = volume.read(0, volume.size)
        assert not volume.outside_write, "it looks as if it had been written outside extsnap"
        assert not volume.medium.state.mark, "the mark is still on"
        assert volume.medium.state.guard == (bool(names) and volume.guard_wanted), "the guard is not as it should be"
        settings = settings_of(volume)
        assert settings in (step.before.settings, step.after.settings), f"settings are {settings}"
        checked = volume.verb("check")
        assert checked["store"]["ok"], checked["store"]["errors"]
        assert not any(entry["errors"] for entry in checked["snapshots"]), checked["snapshots"]
        at_rest = device.pread(0, device.size)
        complaint = self.fsck.complaint(at_rest, digest(base))
        assert not complaint, f"after recovery {complaint}"
        self._volume = volume
        return Moment(views, base, moment.in_use, moment.files, settings)

    def replay(self, volume: Volume, base: bytes) -> None:
        """What `extsnap` does with e2fsck on the served volume, in its order: home first, then the journal ends."""
        volume.begin_serving(grow=False)
        new = repaired(base)
        changed = list(np.flatnonzero(lab.unequal(base, new)).tolist())
        ends = {1} | {block for block in changed if new[block * BLOCK : block * BLOCK + 4] == JOURNAL_MAGIC}
        for part in ([block for block in changed if block not in ends], [block for block in changed if block in ends]):
            for first, count in lab.runs(np.array(part, np.int64)):
                volume.write(first * BLOCK, new[first * BLOCK : (first + count) * BLOCK])
            volume.flush()
        assert volume.end_serving(), "the filesystem still needs recovery after e2fsck"

    def _require_views(self, volume: Volume, step: Step) -> dict[str, bytes]:
        expected = step.before.views | step.after.views
        views = {}
        for name in volume.snapshot_names():
            views[name] = self.view(volume, name)
            if views[name] != expected[name]:
                wrong = np.flatnonzero(lab.unequal(views[name], expected[name]))
                raise AssertionError(f"snapshot {name} differs in {len(wrong)} blocks: {wrong[:10].tolist()}")
        return views

    def _require_base(self, base: bytes, moments: list[Moment], touched: Flags) -> None:
        reasons = []
        for moment in moments:
            wrong = np.flatnonzero(lab.unequal(base, moment.base) & moment.in_use & ~touched)
            if not len(wrong):
                return
            reasons.append(f"{len(wrong)} blocks: {wrong[:10].tolist()}")
        raise AssertionError(f"the base volume is neither the one from before nor from after: {'; '.join(reasons)}")

    def _require_flushed(self, base: bytes, step: Step, point: int, unit: int = SECTOR) -> None:
        """Every ``unit`` bytes are as at the last flush that had returned, or as a write since left them."""
        flushed = step.before.base
        since: list[Event] = []
        for event in step.events:
            if event.flush and event.returned <= point:
                flushed, since = event.content, []
            elif event.issued <= point and not event.flush:
                since.append(event)
        found = np.frombuffer(base, np.uint8).reshape(-1, unit)
        fine: Flags = (np.frombuffer(flushed, np.uint8).reshape(found.shape) == found).all(axis=1)
        for event in since:
            written = np.frombuffer(event.content, np.uint8).reshape(-1, unit)
            first = event.first * (SECTOR // unit)
            part = slice(first, first + len(written))
            fine[part] |= (found[part] == written).all(axis=1)
        sectors: Flags = np.asarray(fine.reshape(-1, SECTOR // unit).all(axis=1))
        sectors |= ~np.repeat(step.before.in_use | step.after.in_use, BLOCK // SECTOR)
        wrong = np.flatnonzero(~sectors)
        assert not len(wrong), f"sectors of the base are neither flushed nor written: {wrong[:10].tolist()}"

    def _cut_again(self, device: RecordingDevice, step: Step, rng: random.Random, variants: int) -> None:
        """Cut the recovery, and commands after it: a second power cut, also one that finds slots that disagree."""
        recovery = len(device.log)
        volume, files = self._volume, step.before.files
        volume.create("again")
        view = self.view(volume, "again")
        created = len(device.log)
        block = int(rng.choice(np.flatnonzero(files).tolist()))
        volume.begin_serving()
        volume.write(block * BLOCK, rng.randbytes(2 * BLOCK) if files[block + 1] else rng.randbytes(BLOCK))
        volume.flush()
        log = device.log
        for first, last, count in ((0, recovery, 3), (recovery, created, 4), (created, len(log), 2)):
            if first == last:
                continue
            points = [rng.randrange(first, last + 1) for _ in range(count)]
            # Half of a header's commit is where the most can go wrong: cut there as well.
            slots = [at + 1 for at in range(first, last) if log[at].data[: len(SLOT_MAGIC)] == SLOT_MAGIC]
            points += slots[:1] + rng.sample(slots, min(1, len(slots)))
            for state in crash_states(
                device.initial, log, rng, superblocks=self.superblocks, points=points, variants=variants
            ):
                self._judge_second(bytes(state.content), state, step, recovery, created, view)

    def _judge_second(
        self, content: bytes, state: CrashState, step: Step, recovery: int, created: int, view: bytes
    ) -> None:
        expected = step.before.views | {"again": view}
        try:
            volume = self.opened(MemoryDevice(content))
            if volume.outside_write:
                # What was cut is the accept: it did not happen, maybe with half a header.  Nothing is mended before
                # somebody accepts, for nothing may be written until then; and the accept leaves both slots whole.
                assert step.name.startswith("accept"), "it looks as if it had been written outside extsnap"
                assert state.point < recovery, "what was accepted is not accepted any more"
                volume.verb("accept")
            if step.name.startswith("accept"):
                assert settings_of(volume) == step.after.settings, "what was written outside is not tainted any more"
            names = set(volume.snapshot_names())
            may = set(step.before.views) | ({"again"} if state.point > recovery else set())
            must = set(step.before.views) | ({"again"} if state.point >= created else set())
            assert must <= names <= may, f"there are snapshots {sorted(names)}"
            for name in names:
                wrong = np.flatnonzero(lab.unequal(self.view(volume, name), expected[name]))
                assert not len(wrong), f"snapshot {name} differs in blocks {wrong[:10].tolist()}"
            if volume.needs_replay:
                self.replay(volume, volume.read(0, volume.size))
                for name in names:
                    assert self.view(volume, name) == expected[name], f"snapshot {name} differs after the replay"
            assert not volume.outside_write, "it looks as if it had been written outside extsnap"
            assert not volume.medium.state.mark, "the mark is still on"
            checked = volume.verb("check")
            assert checked["store"]["ok"], checked["store"]["errors"]
            base = volume.read(0, volume.size)
            complaint = self.fsck.complaint(base)
            assert not complaint, complaint
            if state.point <= created:
                wrong = np.flatnonzero(lab.unequal(base, step.before.base) & step.before.files)
                assert not len(wrong) or step.events, f"file data differ in blocks {wrong[:10].tolist()}"
        except Exception as error:
            raise AssertionError(
                f"second cut, after operation {state.point} (recovery ends at {recovery}, create at {created}), "
                f"seed {state.seed}: {type(error).__name__}: {error}"
            ) from error


__all__ = ["BLOCK", "EVERYTHING", "NOTHING", "Recorded", "Step"]
