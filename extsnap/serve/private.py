"""A server of one's own: in a private directory, held by whoever started it, and gone with its last user."""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
from collections.abc import Callable
from typing import Any

from extsnap.errors import VolumeBusy
from extsnap.serve import control, tools
from extsnap.serve.server import ServerConfig, spawn

CLOSE_PATIENCE = 10.0
"""Seconds in which the kernel tells a server of a close, and a server ends."""


class Private:
    """A server of our own in a private directory, and the keeper that holds it."""

    def __init__(self, config: Callable[[str], ServerConfig]) -> None:
        """Start it.

        Args:
            config: What it is started with, by its directory; ``private`` and ``auto_end``.

        Raises:
            ExtsnapError, OSError: What it could not start for.
        """
        with control.alone(control.runtime_directory()):
            self.directory = tempfile.mkdtemp(prefix="serve-", dir=control.runtime_directory())
            held = control.hold(self.directory)  # until the server has mounted over it
        try:
            self.keeper, self.hello = spawn(config(self.directory))
        except BaseException:
            with contextlib.suppress(OSError):
                os.rmdir(self.directory)
            raise
        finally:
            os.close(held)
        self._pidfd = pidfd(self.hello["pid"])

    def file(self, name: str = "volume") -> str:
        """Path of a served file."""
        return os.path.join(self.directory, name)

    def let_go(self) -> None:
        """Hang up: the server ends by itself with its last user."""
        self.keeper.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def abandon(self) -> None:
        """Hang up and wait for the end, if nobody uses the files; for the way out of an error."""
        self.keeper.close()
        wait_gone(self._pidfd, CLOSE_PATIENCE)
        self.let_go()

    def end(self) -> bool:
        """End it; returns whether the volume was left clean.

        Raises:
            VolumeBusy: Somebody still has a file open; the server ends when they close it.
            ExtsnapError, OSError: Not everything could be made durable.
        """
        try:
            result = self.keeper.call("server.detach", patience=CLOSE_PATIENCE)
            wait_gone(self._pidfd, CLOSE_PATIENCE)
            pass_on(result)
            return bool(result.get("clean", True))
        except VolumeBusy as busy:
            raise VolumeBusy(busy.message, hint="it stays served until they are done") from busy
        finally:
            self.let_go()


def pass_on(result: dict[str, Any]) -> None:
    """Tell what a server that ended had to say of its session: it stands in its log as well."""
    for line in result.get("said") or ():
        tools.notice(line)


def pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def wait_gone(pidfd: int | None, seconds: float | None) -> bool:
    """Wait for a process to end; returns whether it did."""
    if pidfd is None:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else int(seconds * 1000)))
