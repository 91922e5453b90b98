"""Running a user's command as a shell does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from extsnap.serve import tools


def filled(command: Sequence[str], volume: str, is_partition: bool) -> list[str]:
    """The command with the paths of the served files; a whole volume has no disk around it."""
    disk = os.path.join(os.path.dirname(volume), "disk") if is_partition else "{disk}"
    return [argument.replace("{disk}", disk).replace("{}", volume) for argument in command]


def execute(command: list[str]) -> tuple[int, bool]:
    """Run a command like a shell does; returns its status, and whether it ran at all."""
    with _signals_for_child() as started:
        try:
            child = subprocess.Popen(command)
        except FileNotFoundError:
            tools.notice(f"{command[0]}: command not found")
            return 127, False
        except OSError as error:
            tools.notice(f"{command[0]}: {error.strerror}")
            return 126, False
        started.append(child)
        status = child.wait()
    return (status if status >= 0 else 128 - status), True


@contextlib.contextmanager
def _signals_for_child() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Ctrl-C reaches the command by itself: it ends, we clean up.  A SIGTERM to us is passed on."""
    children: list[subprocess.Popen[bytes]] = []
    if threading.current_thread() is not threading.main_thread():
        yield children
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    def leave(number: int, frame: FrameType | None) -> None:
        """A handler, not SIG_IGN, which the command would inherit."""

    old = {
        signal.SIGINT: signal.signal(signal.SIGINT, leave),
        signal.SIGQUIT: signal.signal(signal.SIGQUIT, leave),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
        signal.SIGHUP: signal.signal(signal.SIGHUP, pass_on),
    }
    try:
        yield children
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
