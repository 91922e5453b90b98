"""Where the campaign of kills works: an image in memory with two snapshots, commands that may not hang, and judges.

Nothing here waits without a bound: what does not end in time fails with the stacks of the processes in the way.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import oracle
from arena import arena, make_volume, mounts

import extsnap
from campaigns import kills_load

#: Seconds after which whatever was started hangs.
BOUND = 30.0
#: The same for a command that has nothing to wait for.
AT_ONCE = 15.0
MEBIBYTES = 40
LOADS = ("big-0", "big-1")
PROGRAM = Path(sys.executable).parent / "extsnap"
#: In the paths of another volume that is served and mounted meanwhile: as like those of the case as can be.
BYSTANDER = "-bystander"


class Hangs(AssertionError):
    """Something did not end in time."""


def stacks(pids: Sequence[int]) -> str:
    """Where processes are, thread by thread, as the kernel tells."""
    found = []
    for pid in pids:
        for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
            told = []
            for name in ("comm", "wchan", "syscall", "stack"):
                with contextlib.suppress(OSError):
                    told.append(f"{name}: {(task / name).read_text().strip()}")
            found.append(f"process {pid}, thread {task.name}: {'; '.join(told)}")
    return "\n".join(found)


def until(condition: Callable[[], object], what: str, seconds: float = BOUND, pids: Sequence[int] = ()) -> None:
    """Wait for a condition.

    Raises:
        Hangs: It does not come true.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Hangs(f"after {seconds:.0f} s: {what}\n{stacks(pids)}")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    """A process and its children, grandchildren and so on, for what to say of one that hangs."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found


@dataclass
class Done:
    """How a command ended."""

    words: list[str]
    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"{' '.join(self.words)} ended with {self.status}\n{self.out}{self.err}"


def finished(process: subprocess.Popen[str], seconds: float = BOUND) -> Done:
    """Wait for a process.

    Raises:
        Hangs: It does not end; it is killed.
    """
    words = [os.fspath(word) for word in process.args] if isinstance(process.args, list) else [str(process.args)]
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        where = stacks(descendants(process.pid))
        process.kill()
        raise Hangs(f"{' '.join(words)} still runs after {seconds:.0f} s\n{where}") from None
    return Done(words, process.returncode, out or "", err or "")


@dataclass(frozen=True)
class Prepared:
    """An image with snapshots, made once for a part.

    Attributes:
        kind: Of filesystem.
        image: At rest.
        copies: Whole copies, taken right after each snapshot, by its name.
        exports: What ``export`` writes of each.
    """

    kind: str
    image: Path
    copies: dict[str, Path]
    exports: dict[str, str]


@dataclass
class Place:
    """One directory in memory with all that the campaign needs.

    Attributes:
        top: The directory.
        image: The image of the case.
        mount, second, served: Mount points.
    """

    top: Path
    prepared: Prepared | None = None
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def image(self) -> Path:
        return self.top / "disk.img"

    @property
    def mount(self) -> Path:
        return self.top / "mount"

    @property
    def second(self) -> Path:
        return self.top / "second"

    @property
    def served(self) -> Path:
        return self.top / "served"

    @property
    def runtime(self) -> Path:
        return self.top / "run"

    # ---- commands

    def start(self, *words: str | os.PathLike[str], **options: object) -> subprocess.Popen[str]:
        """Start a program in a process group of its own; it ends with the case at the latest."""
        process: subprocess.Popen[str] = subprocess.Popen(
            [os.fspath(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env={
                **os.environ,
                "EXTSNAP_RUNTIME_DIR": str(self.runtime),
                "TMPDIR": str(self.top / "tmp"),
                "LC_ALL": "C",
                "NO_COLOR": "1",
                "COLUMNS": "200",
            },
            **options,  # type: ignore[call-overload]
        )
        self.started.append(process)
        return process

    def command(self, *words: str | os.PathLike[str], status: int | None = 0, seconds: float = BOUND) -> Done:
        """Run a program to its end, which must come in time and with this status (None: any)."""
        done = finished(self.start(*words), seconds)
        assert status is None or done.status == status, str(done)
        assert "Traceback (most recent call last)" not in done.err, str(done)
        return done

    def extsnap(self, *words: str | os.PathLike[str], status: int | None = 0, seconds: float = BOUND) -> Done:
        """Run a command of ours."""
        return self.command(PROGRAM, *words, status=status, seconds=seconds)

    def servers(self) -> dict[int, Path]:
        """Processes that serve from here now, by their records, with where they serve."""
        found = {}
        for path in self.runtime.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                record = json.loads(path.read_text())
                if alive(record["pid"]):
                    found[int(record["pid"])] = Path(record["directory"])
        return found

    def server(self) -> int:
        """The one process that serves."""
        (pid,) = self.servers()
        return pid

    # ---- what is there

    def loops(self) -> list[str]:
        """Loop devices over files below the directory, but the bystander's."""
        found = []
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                path = backing.read_text().strip()
                if path.startswith(f"{self.top}/") and BYSTANDER not in path:
                    found.append(f"/dev/{backing.parent.parent.name} on {path}")
        return found

    def mounts(self) -> list[str]:
        """Mount points below the directory, innermost first, but the bystander's."""
        return [point for point in mounts(self.top) if BYSTANDER not in point]

    def assert_nothing_left(self) -> None:
        """No mount, loop device, server, socket, record or private directory of the case."""
        until(lambda: not (self.mounts() or self.loops() or self.servers()), self.left(), 10, list(self.servers()))
        names = sorted(path.name for path in self.runtime.iterdir() if path.suffix not in (".log", ".old"))
        assert not names, f"left in the runtime directory: {names}"
        left = sorted(path.name for path in (self.top / "tmp").iterdir())
        assert not left, f"left in TMPDIR: {left}"

    def left(self) -> str:
        """What is mounted, set up and running, in words."""
        return f"mounts {self.mounts()}, loop devices {self.loops()}, servers {self.servers()}"

    # ---- the case

    def prepare(self, kind: str, block: int, rng: random.Random) -> Prepared:
        """Make the image with its two snapshots."""
        where = self.top / "prepared"
        where.mkdir()
        files = {name: kills_load.stamped(0, kills_load.SECTORS, 0) for name in LOADS}
        files |= {f"old-{number}": rng.randbytes(rng.randrange(1, 200000)) for number in range(6)}
        image = make_volume(where / "disk.img", kind, MEBIBYTES, "-b", str(block), "-m", "0", files=files)
        copies, exports = {}, {}
        for name in ("one", "two"):
            with extsnap.open(image) as volume:
                volume.create(name)
            copies[name] = oracle.copy_image(image, where / f"{name}.copy")
            self.extsnap("run", image, "--", "debugfs", "-w", "-R", f"rm /old-{1 if name == 'one' else 2}", "{}")
        for name in copies:
            out = where / "out"
            with extsnap.open(image, writable=False) as volume:
                volume.verb("export", name=name, out=str(out))
            oracle.assert_clean(out)
            exports[name] = oracle.sha256(out)
            out.unlink()
        self.prepared = Prepared(kind, image, copies, exports)
        return self.prepared

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        """A fresh copy of the image; afterwards nothing of the case is there any more, however it went."""
        assert self.prepared is not None
        self.started.clear()
        try:
            for directory in (self.mount, self.second, self.served, self.top / "tmp", self.top / "out"):
                directory.mkdir(exist_ok=True)
            shutil.rmtree(self.runtime)
            self.runtime.mkdir(mode=0o700)
            oracle.copy_image(self.prepared.image, self.image)
            yield
        finally:
            self.clean()

    def clean(self) -> None:
        """End and take away what a case left; at its own end there is nothing."""
        for process in self.started:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=5)
        for pid in self.servers():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for point in self.mounts():
            subprocess.run(["umount", "--lazy", point], capture_output=True, check=False, timeout=BOUND)
        for line in self.loops():
            subprocess.run(["losetup", "-d", line.split()[0]], capture_output=True, check=False, timeout=BOUND)
        for path in (self.mount, self.second, self.served, self.top / "tmp", self.top / "out"):
            shutil.rmtree(path, ignore_errors=True)
        self.image.unlink(missing_ok=True)
        for path in self.top.glob("*.log"):
            path.unlink()

    # ---- judges

    def assert_exact(self, names: Sequence[str] = ("one", "two")) -> None:
        """Every snapshot that was there before is what its whole copy is, and clean."""
        assert self.prepared is not None
        with extsnap.open(self.image, writable=False) as volume:
            for name in names:
                path = self.top / "view.copy"
                with volume.snapshots[name].open() as view, path.open("wb") as out:
                    while piece := view.read(4 << 20):
                        out.write(piece)
                try:
                    oracle.assert_view_is_copy(path, self.prepared.copies[name])
                    oracle.assert_clean(path)
                finally:
                    path.unlink()

    def assert_fsynced_is_there(self) -> None:
        """What the loads wrote and fsynced (or, if they ended by themselves, wrote) is in the base volume."""
        with oracle.mounted(self.image) as directory:
            wrong = [line for name in LOADS for line in kills_load.missing(directory, self.log(name), name)]
        assert not wrong, f"{len(wrong)} things are lost: {'; '.join(wrong[:5])}"

    def assert_marked(self) -> None:
        """Stock tools leave the image alone."""
        verdict = oracle.e2fsck(self.image)
        assert not verdict.clean, "the image has no mark, and e2fsck finds it clean"
        assert "unsupported feature" in verdict.text, f"stock tools would write to the image: {verdict}"

    def assert_at_rest(self) -> None:
        """No mark, and clean."""
        oracle.assert_clean(self.image)

    def names(self) -> list[str]:
        """The snapshots."""
        listed = json.loads(self.extsnap("list", "--json", self.image).out)["snapshots"]
        return [str(entry["name"]) for entry in listed]

    def recover(self) -> None:
        """The next command that writes brings the volume to rest; without a journal e2fsck may have to ask."""
        done = self.extsnap("create", self.image, "after", status=None)
        if done.status:
            assert "-- e2fsck -fy {}" in done.err, str(done)
            repaired = self.extsnap("run", self.image, "--", "e2fsck", "-fy", "{}", status=None)
            assert repaired.status in (0, 1), f"{done}{repaired}"
            self.extsnap("create", self.image, "after")
        self.assert_at_rest()

    # ---- loads

    def log(self, name: str) -> Path:
        """Where a load tells what it did."""
        return self.top / f"{name}.log"

    def load(self, name: str, seed: int, seconds: float = float("inf")) -> subprocess.Popen[str]:
        """Start a load on the mount."""
        kind = self.prepared.kind if self.prepared is not None else ""
        words = (self.mount, self.log(name), name, str(seed), str(seconds), "keep" if kind == "ext2" else "")
        return self.start(sys.executable, kills_load.__file__, *words)

    def lines(self) -> int:
        """How far the loads are."""
        return sum(self.log(name).read_text().count("\n") for name in LOADS if self.log(name).exists())


class Bystander:
    """Another volume, served beside that of the case and mounted through a loop device."""

    def __init__(self, top: Path) -> None:
        self._environment = {**os.environ, "EXTSNAP_RUNTIME_DIR": str(top / f"run{BYSTANDER}")}
        (top / f"run{BYSTANDER}").mkdir(mode=0o700)
        self.image = make_volume(top / f"disk.img{BYSTANDER}", "ext4", 8, files={"here": b"still"})
        self.served, self.mount = top / f"served{BYSTANDER}", top / f"mount{BYSTANDER}"
        for directory in (self.served, self.mount):
            directory.mkdir()
        self._run(PROGRAM, "attach", self.image, self.served)
        self._run("mount", "-o", "loop,ro", self.served / "volume", self.mount)

    def _run(self, *words: str | os.PathLike[str]) -> None:
        subprocess.run(
            [os.fspath(word) for word in words], check=True, capture_output=True, timeout=BOUND, env=self._environment
        )

    def assert_untouched(self) -> None:
        """It is served and mounted as before."""
        assert os.path.ismount(self.served), "another served volume was unmounted"
        assert os.path.ismount(self.mount), "a mount of another served volume was unmounted"
        assert (self.mount / "here").read_bytes() == b"still"
        assert (self.served / "volume").stat().st_size == self.image.stat().st_size

    def end(self) -> None:
        """Unmount and stop serving.  A loop device goes a moment after its mount; until then `detach` is refused."""
        self._end(self.mount, "umount")
        self._end(self.served, PROGRAM, "detach")

    def _end(self, point: Path, *words: str | os.PathLike[str]) -> None:
        def gone() -> bool:
            with contextlib.suppress(subprocess.SubprocessError):
                self._run(*words, point)
            return not os.path.ismount(point)

        until(gone, f"another served volume is still mounted at {point}")


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """Yield a place."""
    with arena() as top:
        found = Place(top)
        found.runtime.mkdir(mode=0o700)
        (top / "tmp").mkdir()
        try:
            yield found
        finally:
            found.clean()
