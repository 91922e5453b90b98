"""Freezes mounted filesystems for the moment of a snapshot, and thaws them whatever becomes of the one who asked.

Run as a process of its own, by `Frozen`, in a session of its own: ``python -I -S freezer.py LIMIT POINT...``.  It
does the system calls on mounts above us, so that whoever waits for it can be killed or interrupted at any time:

    it says     after                                            and then waits for
    ready       syncfs until little is dirty; writers go on      "sync" or "freeze" on standard input
    synced      one more round of it                             "freeze" on standard input
    frozen      FIFREEZE of every point                          anything, or the end of standard input, or the limit
    thawed      FITHAW of what it froze                          -
    late        the same, because the limit had passed           -
    error N P   a freeze failed with errno N at point P;         -
                what was frozen is thawed

The end of standard input is what the kernel makes of a caller that was killed: it thaws.  Only who kills both leaves a
filesystem frozen.  A filesystem that is frozen already is left to the one who did that.

Standard library only: it must start fast, and needs nothing of the package.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from types import TracebackType

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
LIMIT_SECONDS = 30.0
"""Longest time for which filesystems stay frozen, as a rule, whoever still waits for what."""
_FEW_SECONDS = 0.02  # a syncfs that takes no longer had little to write
_MOST_SYNCS = 8


def main(limit: float, points: list[bytes]) -> None:
    """Do it; see the module."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    descriptors = [os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for point in points]
    _sync(descriptors)
    _say(b"ready\n")
    wish = os.read(0, 64)
    if wish == b"sync\n":
        _sync(descriptors, 1)
        _say(b"synced\n")
        wish = os.read(0, 64)
    if wish != b"freeze\n":
        return
    frozen: list[int] = []
    failure = b""
    for point, descriptor in zip(points, descriptors, strict=True):
        try:
            fcntl.ioctl(descriptor, _FIFREEZE, 0)
            frozen.append(descriptor)
        except OSError as error:
            if error.errno != errno.EBUSY:  # EBUSY: somebody else has frozen it, and thaws it
                failure = b"error %d %s\n" % (error.errno or errno.EIO, point)
                break
    answer = failure or b"thawed\n"
    if not failure:
        _say(b"frozen\n")
        if not select.select([0], [], [], limit)[0]:
            answer = b"late\n"
    for descriptor in reversed(frozen):
        try:
            fcntl.ioctl(descriptor, _FITHAW, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: somebody else was faster
                answer = b"error %d a thaw failed\n" % (error.errno or errno.EIO)
    _say(answer)


def _sync(descriptors: list[int], most: int = _MOST_SYNCS) -> None:
    """Have dirty data written while writers still can go on, until a round finds little: the freeze is short then."""
    syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    for _ in range(most):
        begun = time.monotonic()
        for descriptor in descriptors:
            syncfs(descriptor)
        if time.monotonic() - begun < _FEW_SECONDS:
            return


def _say(line: bytes) -> None:
    try:
        os.write(1, line)
    except OSError:  # nobody listens any more
        pass


class Frozen:
    """Filesystems that are frozen between `freeze` and the end of the ``with``.

    Args:
        points: Where they are mounted; none at all is fine and does nothing.
        limit: Seconds for which they stay frozen at most.

    Attributes:
        held: After the ``with``: whether they were frozen all the time until then.
    """

    def __init__(self, points: list[str], limit: float = LIMIT_SECONDS) -> None:
        self._points = points
        self._limit = limit
        self._process: subprocess.Popen[bytes] | None = None
        self._is_frozen = False
        self.held = False

    def __enter__(self) -> Frozen:
        """Start: returns when little is dirty; nothing is frozen yet.

        Raises:
            OSError: A point cannot be opened, or the process ended.
        """
        if self._points:
            command = [sys.executable, "-I", "-S", __file__, str(self._limit), *self._points]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                self._expect(b"ready")
            except BaseException:
                self._end()
                raise
        return self

    def sync(self) -> None:
        """One more round, while writers go on: time has passed since the start.

        Raises:
            OSError: The process ended.
        """
        self._ask(b"sync\n", b"synced")

    def freeze(self) -> None:
        """Freeze them.

        Raises:
            OSError: One cannot be frozen; its point is the error's filename.
        """
        self._is_frozen = self._process is not None  # from here on it may be
        self._ask(b"freeze\n", b"frozen")

    def _ask(self, wish: bytes, wanted: bytes) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.write(wish)
        self._process.stdin.flush()
        self._expect(wanted)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _expect(self, wanted: bytes) -> None:
        said = self._hear()
        if said == wanted:
            return
        words = said.split(b" ", 2)
        if words[0] == b"error":
            code = int(words[1])
            raise OSError(code, os.strerror(code), os.fsdecode(words[2]))
        raise OSError(errno.EIO, f"the process that freezes {', '.join(self._points)} ended")

    def _hear(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip(b"\n")

    def _end(self) -> None:
        """Have them thawed; also if that process is gone, which only a kill can do."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        said = b""
        try:
            try:
                process.stdin.close()
            except OSError:
                pass
            said = process.stdout.readline().rstrip(b"\n")
            process.wait()
        finally:
            process.stdout.close()
            self.held = said == b"thawed"
            if self._is_frozen and said not in (b"thawed", b"late") and not said.startswith(b"error"):
                for point in reversed(self._points):
                    _thaw(point)


def _thaw(point: str) -> None:
    try:
        descriptor = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.ioctl(descriptor, _FITHAW, 0)
    except OSError:
        pass
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(float(sys.argv[1]), [os.fsencode(point) for point in sys.argv[2:]])
