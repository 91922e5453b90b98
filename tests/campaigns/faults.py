"""Faults of the device: the Nth operation of a command fails, for N = 1, 2, 3 until the command completes.

How many operations a command has is counted on a device that does not fail, so that every N up to there must meet its
fault.  The command then ends with an error that names operation and byte; what is on the medium is judged by `recorded`
as after a power cut: every snapshot exact, the command done or not done, ``e2fsck -fn`` clean after the next open.
The commands that only read must end with an error too, whatever they could have said without what they did not get; an
export may do a large read that failed again in small ones, and then is what it would have been.

A token is ``PART:COMMAND:FAULT:N``.
"""

from __future__ import annotations

import functools
import os
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from campaigns.life import LIFE, small_hold
from campaigns.power import life_of
from campaigns.recorded import BLOCK, EVERYTHING, NOTHING, SECTOR, Event, Recorded, Step, digest, put_below
from campaigns.report import Campaign, Report
from extsnap.blockdev.recording import FaultKind, FaultyDevice, MemoryDevice, OperationKind
from extsnap.errors import ExtsnapError
from extsnap.snapshot import edit
from extsnap.snapshot.export import export
from extsnap.snapshot.volume import Volume

PARTS = ("ext2", "ext3", "ext4")
Action = Callable[[Recorded, Volume], object]


def shrink(life: Recorded, volume: Volume) -> None:
    """The store gives blocks back, as after a delete, and all comes to rest."""
    edit.shrink(volume, 200)
    volume.settle()


#: Steps of the life that are commands of their own, on a volume at rest.
COMMANDS = (
    "first create",
    "begin serving",
    "second create",
    "set",
    "set again",
    "guard off",
    "guard on",
    "growth",
    "move",
    "begin serving again",
    "accept",
    "accept, journal",
    "replay",
    "delete",
    "restore",
    "undo",
    "restore without safety",
    "delete two",
    "delete the rest",
    "strip",
)
#: Steps of a volume that is being served.
SERVED = ("end serving", "create while serving", "end serving again")
#: Steps that a power cut interrupted: what is tried is the open that recovers.
RECOVERED = ("growth", "move", "restore", "delete", "strip", "more writes")
#: Commands that are no step: which step begins where they do, and what they do.
MORE: dict[str, tuple[str, Action]] = {"shrink": ("move", shrink)}
#: A session of writes, on the volume as this step finds it.
SESSION, SESSION_STEP = "writes while serving", "end serving again"


def _exported(volume: Volume) -> bytes:
    with tempfile.TemporaryDirectory(prefix="extsnap-faults-", dir="/dev/shm") as top:
        try:
            export(volume, "two", os.path.join(top, "out"))
            return Path(top, "out").read_bytes()
        except (OSError, ExtsnapError):
            assert not os.listdir(top), "half an export stays behind"
            raise


READING: dict[str, Callable[[Volume], object]] = {
    "list": lambda volume: volume.verb("list"),
    "info": lambda volume: volume.verb("info"),
    "show": lambda volume: volume.verb("show", name="two"),
    "dump": lambda volume: [volume.verb("dump", what=w) for w in ("header", "log", "records", "snapshots", "bitmaps")],
    "view": lambda volume: volume.open_view("two").pread(0, volume.size),
    "check": lambda volume: volume.verb("check"),
    "export": _exported,
}

WRITES: tuple[OperationKind, ...] = ("write", "punch", "flush")
#: Each fault: what the device does, and to which of its operations.
#: "outlived": as "lost", but the power fails later.  The next process finds what was lost in the host's cache,
#: recovers, goes on and flushes, and only then is there nothing but the medium.
FAULTS: dict[str, tuple[FaultKind, tuple[OperationKind, ...]]] = {
    "EIO": ("EIO", WRITES),
    "ENOSPC": ("ENOSPC", WRITES),
    "short": ("short", WRITES),
    "gone": ("gone", WRITES),
    "lost": ("lost", ("flush",)),
    "outlived": ("lost", ("flush",)),
    "read": ("EIO", ("read",)),
    "read-short": ("short", ("read",)),
    "read-gone": ("gone", ("read",)),
}
READ_FAULTS = tuple(name for name, (_, operations) in FAULTS.items() if operations == ("read",))
#: What an error says of the operation that failed.
NAMED = re.compile(r"(read|write|punch) of \d+ bytes at byte \d+ failed|flush of 0 bytes at byte 0 failed")
#: Commands with up to so many writes are tried with each N in the short form too.
SMALL = 12
#: Media that were judged already, by part, command and digest: many faults leave the same.
_SOUND: set[tuple[str, str, bytes]] = set()


def commands() -> list[str]:
    """Every command, those that only read last."""
    recovered = [f"recover {name}" for name in RECOVERED]
    return [*recovered, *COMMANDS, *MORE, *SERVED, SESSION, *READING]


class _Writes:
    """A session of writes over a model, which knows what is durable and what may be there besides."""

    def __init__(self, base: bytes, files: list[int]) -> None:
        self.model = bytearray(base)
        self.durable = base
        self.since: list[Event] = []
        self._files = files

    def _put(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        low, high = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
        self.since.append(Event(0, 0, False, low, bytes(self.model[low * SECTOR : high * SECTOR])))

    def __call__(self, life: Recorded, volume: Volume) -> None:
        """Overwrites of needed blocks, whole and in part, twice, a punch, flushes."""
        rng = random.Random("writes")
        blocks = self._files[:]
        rng.shuffle(blocks)
        for number, block in enumerate(blocks[:45]):
            skip = rng.choice([0, 0, 100, SECTOR])
            data = rng.randbytes(BLOCK - skip)
            self._put(block * BLOCK + skip, data)
            volume.write(block * BLOCK + skip, data)
            if number == 20:
                self._put(blocks[50] * BLOCK, bytes(BLOCK))
                volume.punch(blocks[50] * BLOCK, BLOCK)
            if number % 15 == 14:
                self.flush(volume)

    def flush(self, volume: Volume) -> None:
        """A barrier."""
        volume.flush()
        self.durable, self.since = bytes(self.model), []


class _Try:
    """One command on a device that fails once; with 0 never."""

    def __init__(self, part: str, command: str, fault: str, fail_at: int) -> None:
        self.part, self.command, self.fault, self.fail_at = part, command, fault, fail_at
        self.life = life_of(part)
        name = command.removeprefix("recover ")
        if command in MORE:
            name = MORE[command][0]
        elif command == SESSION:
            name = SESSION_STEP
        elif command in READING:
            name = "delete"  # by then it has snapshots, a log and records
        self.step = next(step for step in self.life.steps if step.name == name)
        self.device: FaultyDevice | None = None
        self.below: MemoryDevice | None = None
        self.session: _Writes | None = None
        self.said: object = None

    def _faulty(self, content: bytes) -> FaultyDevice:
        kind, operations = FAULTS[self.fault]
        self.below = MemoryDevice(content)
        self.device = FaultyDevice(
            self.below,
            fail_at=self.fail_at,
            kind=kind,
            operations=operations,
            superblocks=self.life.superblocks,
            rng=random.Random(f"{self.command} {self.fail_at}"),
        )
        return self.device

    def content(self) -> tuple[bytes, int | None]:
        """The medium that the command finds, and where the power cut was that it recovers from."""
        if self.command.startswith("recover "):
            point = (self.step.first + self.step.last) // 2
            return _medium(self.part, point, NOTHING), point
        return _medium(self.part, self.step.first, EVERYTHING), None

    def action(self) -> Action:
        """What the command does to an open volume."""
        if self.command.startswith("recover "):
            return lambda life, volume: volume.finish_restore()  # whoever opens it next hears of it there
        if self.command in MORE:
            return MORE[self.command][1]
        return dict(LIFE)[self.command]

    def attempt(self, content: bytes) -> BaseException | None:
        """Do it; returns how it failed."""
        self.life.time = self.step.time
        try:
            if self.command in READING:
                self.said = READING[self.command](Volume(self._faulty(content)))
            elif self.command in SERVED or self.command == SESSION:
                volume = self.life.opened_serving(MemoryDevice(content))  # only then it begins to fail
                served = volume.medium.device.pread(0, volume.size)
                action: Action
                if self.command == SESSION:
                    files = np.flatnonzero(self.step.before.files).tolist()
                    action = self.session = _Writes(volume.read(0, volume.size), files)
                else:
                    action = self.action()
                put_below(volume, self._faulty(served))
                action(self.life, volume)
            else:
                self.action()(self.life, self.life.opened(self._faulty(content)))
        except (OSError, ExtsnapError) as error:
            return error
        return None

    def run(self) -> None:
        """Try it, and judge what it left."""
        content, point = self.content()
        error = self.attempt(content)
        assert self.device is not None
        assert self.below is not None
        assert self.device.failures, "the command took fewer operations than without a fault"
        if error is None:  # a large read that failed was done again in small ones
            is_read = self.command == "export" and self.fault.startswith("read")
            assert is_read, "an operation failed, and the command did not say so"
            assert self.said == READING[self.command](Volume(MemoryDevice(content))), "what it said is wrong"
            return
        assert NAMED.search(str(error)), f"the error does not name operation and byte: {type(error).__name__}: {error}"
        if self.command in READING:
            assert self.below.content == content, "a command that only reads has written"
        elif self.fault == "outlived":
            self._outlive(self._judged_by(point))
        else:
            media = [bytes(self.below.content)]
            if self.fault == "lost":
                media.append(self.device.medium_after_power_cut())
            for medium in media:
                key = self.part, self.command, digest(medium)
                if key not in _SOUND or self.session is not None:
                    self._judge(medium, point)
                    _SOUND.add(key)

    def _judged_by(self, point: int | None) -> Step:
        if point is not None or self.command == SESSION:
            return self.step
        return reference(self.part, self.command)

    def _judge(self, medium: bytes, point: int | None) -> None:
        step = self._judged_by(point)
        if self.session is not None:
            at_rest = replace(step, after=step.before)
            unit = 1 if self.fault == "short" else SECTOR
            self.life.judge_content(medium, at_rest, base=self.session.durable, since=self.session.since, unit=unit)
        elif point is not None:
            self.life._judge(medium, step, point, None, 1)
        else:
            self.life.judge_content(medium, step)

    def _outlive(self, step: Step) -> None:
        """The next process, on the device that has lost something; then the power fails."""
        assert self.device is not None
        life = self.life
        volume = life.opened(self.device)
        if volume.outside_write:
            volume.verb("accept")
        if volume.needs_replay:
            life.replay(volume, volume.read(0, volume.size))
        volume.begin_serving()
        rng = random.Random("outlived")
        blocks = np.flatnonzero(step.before.files & step.after.files).tolist()  # whether or not it was done
        assert blocks
        for block in rng.sample(blocks, min(40, len(blocks))):
            volume.write(block * BLOCK, rng.randbytes(BLOCK))
        volume.flush()
        base = volume.read(0, volume.size)
        assert self.device.failures == 1
        life.judge_content(self.device.medium_after_power_cut(), step, base=base)


@functools.lru_cache(maxsize=2)
def _medium(part: str, point: int, seed: int) -> bytes:
    """A medium of a life: faults of one command come one after the other."""
    return bytes(life_of(part).state(point, seed).content)


@functools.cache
def reference(part: str, command: str) -> Step:
    """The command on a device that does not fail: what was before, what it wrote, what it left."""
    trial = _Try(part, command, "EIO", 0)
    action = trial.action()
    content, _ = trial.content()
    with small_hold():
        return trial.life.alone(
            trial.step, content, lambda volume: action(trial.life, volume), served=command in SERVED
        )


@functools.cache
def operations(part: str, command: str) -> dict[OperationKind, int]:
    """How many operations of each kind a command has.

    Raises:
        AssertionError: It fails on a device that does not.
    """
    trial = _Try(part, command, "EIO", 0)
    with small_hold():
        error = trial.attempt(trial.content()[0])
    assert error is None, f"{command} fails without a fault: {error}"
    assert trial.device is not None
    return dict(trial.device.counts)


def tries(part: str) -> dict[tuple[str, str], int]:
    """How many N there are for each command and fault."""
    found = {}
    for command in commands():
        counts = operations(part, command)
        for fault in READ_FAULTS if command in READING else FAULTS:
            total = sum(counts.get(kind, 0) for kind in FAULTS[fault][1])
            if total:
                found[command, fault] = total
    return found


def chosen(part: str, cases: int, rng: random.Random) -> list[tuple[str, str, int]]:
    """Everything if there is room for it; else each N of small commands, and some of the others."""
    totals = tries(part)
    if sum(totals.values()) <= cases:
        return [(*pair, fail_at) for pair, total in totals.items() for fail_at in range(1, total + 1)]
    small = [pair for pair, total in totals.items() if pair[1] == "EIO" and total <= SMALL]
    picked = {(*pair, fail_at) for pair in small for fail_at in range(1, totals[pair] + 1)}
    pairs = sorted(totals)
    while len(picked) < cases:
        rng.shuffle(pairs)
        picked |= {(*pair, rng.randint(1, totals[pair])) for pair in pairs[: cases - len(picked)]}
    return sorted(picked)


def _case(report: Report, part: str, command: str, fault: str, fail_at: int) -> None:
    with report.case(f"{part}:{command}:{fault}:{fail_at}", fault), small_hold():
        _Try(part, command, fault, fail_at).run()


def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
    """Every N of every command and fault; in a shorter form some of them."""
    for command, fault, fail_at in chosen(part, cases, rng):
        _case(report, part, command, fault, fail_at)


def replay(report: Report, token: str) -> None:
    """One fault again."""
    part, command, fault, fail_at = token.split(":")
    _case(report, part, command, fault, int(fail_at))


CAMPAIGN = Campaign("faults", "the Nth operation on the device fails", PARTS, 900, 240000, run, replay)
