"""Where the campaign of many at once happens: commands as processes, and a look at what they leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import program

#: Seconds within which every command ends, on a busy machine too.
ENDS_WITHIN = 60.0
#: Seconds that a read or a small write of a served volume may take at most, the machine's own pauses aside.
STALL = 2.0
_RUNTIME = "EXTSNAP_RUNTIME_DIR"
# Everything is imported before the start, so that two of them meet inside the command and not on the way there.
_RUNNER = """\
import os, sys, time
import extsnap.serve.checking, extsnap.serve.mountpoints, extsnap.serve.recovering, extsnap.serve.running
import extsnap.snapshot.volume, extsnap.snapshot.restore, extsnap.snapshot.export
import extsnap.cli.snapshots, extsnap.cli.inspection, extsnap.cli.serving, extsnap.cli.transfer
from extsnap.cli.app import main
os.write(1, b"r")
delay = float(os.read(0, 100))
time.sleep(delay)
sys.argv[0] = "extsnap"
sys.exit(main())
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    words: tuple[str, ...]
    status: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"extsnap {' '.join(self.words)}: status {self.status} after {self.seconds:.1f} s; {self.err.strip()!r}"


class Started:
    """A command that waits for its start.  ``process`` is ours to stop, continue and end."""

    def __init__(self, place: Place, words: Sequence[str | Path]) -> None:
        self.words = tuple(map(str, words))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUNNER, *self.words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=place.top,
            env=place.environment,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None

    def ready(self) -> None:
        """Wait until it has imported everything."""
        assert self.process.stdout is not None
        assert os.read(self.process.stdout.fileno(), 1) == b"r"

    def go(self, delay: float) -> None:
        """Begin after some seconds."""
        assert self.process.stdin is not None
        self.began = time.monotonic()
        os.write(self.process.stdin.fileno(), f"{delay}\n".encode())

    def end(self) -> Ended:
        """Wait for the end.

        Raises:
            AssertionError: It did not end in time, or with a traceback.
        """
        try:
            out, err = self.process.communicate(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"extsnap {' '.join(self.words)} has not ended after {ENDS_WITHIN:.0f} s") from None
        ended = Ended(self.words, self.process.returncode, out.decode(), err.decode(), time.monotonic() - self.began)
        assert "Traceback" not in ended.err, f"{ended.words}: {ended.err}"
        return ended

    def kill(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.wait()


class Place:
    """A directory in memory with a runtime directory of its own, so that all servers in it are ours.

    Attributes:
        top: The directory.
        environment: Of the commands; this process has it too, for what it does itself.
        shared: What a part has prepared for its cases.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self.runtime = top / "run"
        self.runtime.mkdir(mode=0o700)
        self.environment = {
            **os.environ,
            _RUNTIME: str(self.runtime),
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "TMPDIR": str(top),
        }
        self.shared: dict[str, Path] = {}

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Let this process find the servers as well."""
        before = os.environ.get(_RUNTIME)
        os.environ[_RUNTIME] = str(self.runtime)
        try:
            yield
        finally:
            if before is None:
                del os.environ[_RUNTIME]
            else:
                os.environ[_RUNTIME] = before

    def start(self, *words: str | Path) -> Started:
        """A command that waits for `Started.go`."""
        return Started(self, words)

    def extsnap(self, *words: str | Path, ok: bool = True) -> Ended:
        """Run a command to its end; with ``ok`` it must succeed."""
        began, text = time.monotonic(), tuple(map(str, words))
        done = program.loaded().run(text, env=self.environment, cwd=self.top, timeout=ENDS_WITHIN)
        ended = Ended(text, done.returncode, done.stdout, done.stderr, time.monotonic() - began)
        assert "Traceback" not in ended.err, str(ended)
        assert not ok or ended.status == 0, str(ended)
        return ended

    def servers(self) -> list[int]:
        """The processes that run with our runtime directory, but for this one: they are all ours."""
        wanted = f"{_RUNTIME}={self.runtime}".encode()
        found = []
        for process in filter(str.isdigit, os.listdir("/proc")):
            if int(process) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{process}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[0]
                if state != "Z" and wanted in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                    found.append(int(process))
        return found

    def mounts(self) -> list[str]:
        """Mount points below the directory, and mounts of what lies there."""
        with open("/proc/self/mountinfo", errors="replace") as table:
            rows = [line.split() for line in table]
        return [row[4] for row in rows if f"{self.top}/" in row[4] or f"{self.top}/" in row[row.index("-") + 2]]

    def loops(self) -> list[str]:
        """Loop devices over files below the directory."""
        found = []
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if backing.read_text(errors="replace").startswith(f"{self.top}/"):
                    found.append(f"/dev/{backing.parent.parent.name}")
        return found

    def left(self, *, mounts: Sequence[str] = (), loops: Sequence[str] = ()) -> list[str]:
        """What commands and servers left: locks, sockets, processes, directories, loop devices, mounts.

        Args:
            mounts: Those that are the case's own.
            loops: The same.
        """
        found = [f"mount at {point}" for point in self.mounts() if point not in mounts]
        found += [f"loop device {loop}" for loop in self.loops() if loop not in loops]
        found += [f"process {process}" for process in self.servers()]
        found += [f"{name} in the runtime directory" for name in os.listdir(self.runtime) if not name.endswith(_LOGS)]
        found += [f"{path}" for path in self.top.rglob("*.partial")]
        return found

    def assert_nothing_left(self, *, mounts: Sequence[str] = (), loops: Sequence[str] = ()) -> None:
        """What ends by itself may take a moment; nothing may stay.

        Raises:
            AssertionError: Something does.
        """
        until(lambda: not self.left(mounts=mounts, loops=loops), 10)
        left = self.left(mounts=mounts, loops=loops)
        assert not left, f"left behind: {', '.join(left)}"

    def clear(self) -> None:
        """Take away whatever is there, after a case that failed: processes by number, mounts and loops by name."""
        for process in self.servers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
                os.kill(process, signal.SIGKILL)
        until(lambda: not self.servers(), 10)
        for _ in range(4):
            for point in sorted(self.mounts(), key=len, reverse=True):
                subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
            for loop in self.loops():
                subprocess.run(["losetup", "--detach", loop], capture_output=True, check=False)
        for path in self.runtime.iterdir():
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


_LOGS = (".log", ".log.old")


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; returns whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


class Pauses:
    """How long this machine keeps a thread that only sleeps from going on: not a server's fault.  A context manager.

    Attributes:
        longest: Seconds, so far.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.005):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last - 0.005), now

    def __enter__(self) -> Pauses:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(descriptor: int, offset: int, length: int) -> None:
    """Punch a hole, which is what a discard of a loop device arrives as."""
    if _libc.fallocate(descriptor, 3, offset, length):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
