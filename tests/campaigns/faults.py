"""Device faults: the Nth operation of a command fails, for every command, kind of fault and N.

A part is a kind of volume; its commands are those of a life (`life`), each on the medium as that life left it, and
the commands that only read.  After a failed command:

* it ended with an error that names the operation and the byte where it failed;
* what is on the medium is as after a power cut: every snapshot exact, the command done or not done, and the next
  command that opens it brings it to rest (`recorded` is the judge);
* a command that only reads has changed nothing, and gave no answer.

A token is ``PART:COMMAND:FAULT:N``; FAULT is a kind of `extsnap.blockdev.recording.FaultyDevice`, or ``read``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from campaigns.life import LIFE, small_hold
from campaigns.power import life_of
from campaigns.recorded import EVERYTHING, NOTHING, Recorded, Step, put_below
from campaigns.report import Campaign, Report
from extsnap.blockdev.recording import FaultKind, FaultyDevice, MemoryDevice
from extsnap.errors import ExtsnapError
from extsnap.snapshot.volume import Volume

PARTS = ("ext2", "ext3", "ext4")
ACTIONS = dict(LIFE)
#: Steps that are commands of their own, on a volume at rest.
COMMANDS = (
    "first create",
    "begin serving",
    "second create",
    "set",
    "guard off",
    "growth",
    "move",
    "begin serving again",
    "accept",
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
READING: dict[str, Callable[[Volume], object]] = {
    "list": lambda volume: volume.verb("list"),
    "info": lambda volume: volume.verb("info"),
    "show": lambda volume: volume.verb("show", name="two"),
    "dump": lambda volume: [volume.verb("dump", what=what) for what in ("header", "log", "records", "bitmaps")],
    "view": lambda volume: volume.open_view("two").pread(0, volume.size),
}
WRITE_FAULTS: tuple[FaultKind, ...] = ("EIO", "ENOSPC", "short", "gone", "lost")
#: What an error says of the operation that failed.
NAMED = re.compile(r"(read|write|punch) of \d+ bytes at byte \d+ failed|flush of 0 bytes")


def tries(part: str) -> list[tuple[str, str]]:
    """(command, fault) of everything that is tried with each N."""
    every = [f"recover {name}" for name in RECOVERED] + list(COMMANDS + SERVED)
    return [
        *((command, fault) for command in every for fault in (*WRITE_FAULTS, "read")),
        *((command, "read") for command in READING),
    ]


class _Try:
    """One command on a device that fails once."""

    def __init__(self, part: str, command: str, fault: str, fail_at: int) -> None:
        self.life = life_of(part)
        self.command, self.fault, self.fail_at = command, fault, fail_at
        name = command.removeprefix("recover ")
        if command in READING:
            name = "delete"  # by then it has snapshots, a log and records
        self.step = next(step for step in self.life.steps if step.name == name)
        self.device: FaultyDevice | None = None
        self.below: MemoryDevice | None = None

    def _faulty(self, content: bytes) -> FaultyDevice:
        kind: FaultKind = "EIO" if self.fault == "read" else self.fault  # type: ignore[assignment]
        operations = {"read": ("read",), "lost": ("flush",)}.get(self.fault, ("write", "punch", "flush"))
        self.below = MemoryDevice(content)
        self.device = FaultyDevice(
            self.below,
            fail_at=self.fail_at,
            kind=kind,
            operations=operations,  # type: ignore[arg-type]
            superblocks=self.life.superblocks,
            rng=random.Random(f"{self.command} {self.fail_at}"),
        )
        return self.device

    def run(self) -> bool:
        """Returns whether something failed; then it was judged."""
        life, step = self.life, self.step
        if self.command.startswith("recover "):
            point = (step.first + step.last) // 2
            content = bytes(life.state(point, NOTHING).content)
            error = self._attempt(content, lambda volume: None)
            return self._judge(error, content, step, point)
        content = bytes(life.state(step.first, EVERYTHING).content)
        if self.command in READING:
            error = self._attempt(content, READING[self.command], writable=False)
            if error is None:
                return self._require_no_fault()
            self._require_named(error)
            assert self.below is not None
            assert self.below.content == content, "a command that only reads has written"
            return True
        action = ACTIONS[self.command]
        if self.command in SERVED:
            return self._served(content, step, action)
        alone = life.alone(step, content, lambda volume: action(life, volume))
        error = self._attempt(content, lambda volume: action(life, volume))
        return self._judge(error, content, alone, None)

    def _attempt(
        self, content: bytes, action: Callable[[Volume], object], *, writable: bool = True
    ) -> BaseException | None:
        device = self._faulty(content)
        self.life.time = self.step.time
        try:
            if writable:
                action(self.life.opened(device))
            else:
                action(Volume(device))
        except (OSError, ExtsnapError) as error:
            return error
        return None

    def _served(self, content: bytes, step: Step, action: Callable[[Recorded, Volume], object]) -> bool:
        """A volume that is served as the life left it, and only then begins to fail."""
        alone = self.life.alone(step, content, lambda volume: action(self.life, volume), served=True)
        self.life.time = step.time
        volume = self.life.opened_serving(MemoryDevice(content))
        served = volume.medium.device.pread(0, volume.size)
        put_below(volume, self._faulty(served))
        try:
            action(self.life, volume)
        except (OSError, ExtsnapError) as error:
            return self._judge(error, served, alone, None)
        return self._require_no_fault()

    def _require_no_fault(self) -> bool:
        assert self.device is not None
        assert not self.device.failures, "an operation failed, and the command did not say so"
        return False

    def _require_named(self, error: BaseException) -> None:
        assert NAMED.search(str(error)), f"the error does not name operation and offset: {error}"

    def _judge(self, error: BaseException | None, content: bytes, step: Step, point: int | None) -> bool:
        assert self.device is not None
        assert self.below is not None
        if error is None:
            return self._require_no_fault()
        assert self.device.failures, f"nothing failed, and the command said {error}"
        self._require_named(error)
        media = [bytes(self.below.content)]
        if self.fault == "lost":
            media.append(self.device.medium_after_power_cut())
        for medium in media:
            if point is not None:
                self.life._judge(medium, step, point, None, 1)
            else:
                self.life.judge_content(medium, step)
        return True


def _case(report: Report, part: str, command: str, fault: str, fail_at: int) -> bool:
    """Returns whether there may be something to fail after this."""
    with report.case(f"{part}:{command}:{fault}:{fail_at}", fault), small_hold():
        return _Try(part, command, fault, fail_at).run()
    return False


def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
    """Every N of every command and fault; in a shorter form some of them."""
    everything = tries(part)
    # How many operations each has is known once it was tried: doubling finds about where it ends.
    stride = max(1.0, 40 * len(everything) / cases)
    for command, fault in everything:
        fail_at = rng.uniform(1, stride) if stride > 1 else 1.0
        while _case(report, part, command, fault, int(fail_at)):
            fail_at += 1.0 if stride == 1 else rng.uniform(1, 2 * stride)


def replay(report: Report, token: str) -> None:
    """One fault again."""
    part, command, fault, fail_at = token.split(":")
    _case(report, part, command, fault, int(fail_at))


CAMPAIGN = Campaign("faults", "the Nth operation on the device fails", PARTS, 450, 60000, run, replay)
