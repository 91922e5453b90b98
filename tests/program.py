"""The program as a process of its own, without the half second of a processor that loading it takes every time.

One process for each test process has imported all of extsnap and does nothing else (`main` below).  For a command it
forks: the child gets the command's standard streams, environment and working directory, and calls what the installed
script calls.  So a command is still a process with memory, signals, locks and descriptors of its own; what is not
tried here is its loading, which tests/cli does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_LENGTH = struct.Struct("=Q")
_NUMBER = struct.Struct("=i")


class Loaded:
    """The process that forks; it ends when this one does, or with `close`."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._asking = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", os.path.abspath(__file__), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                # Tests find the processes of theirs by what they were started with.
                env={name: value for name, value in os.environ.items() if not name.startswith("EXTSNAP_")},
            )

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.wait()

    def run(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str],
        timeout: float,
        input: str = "",
        cwd: str | os.PathLike[str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``extsnap WORDS...`` to its end, as `subprocess.run` would.

        The end is that of the process and of everybody who has its standard output or error.

        Raises:
            subprocess.TimeoutExpired: It did not end in time, and was killed.
        """
        request = json.dumps([list(words), dict(env), os.path.abspath(cwd or os.getcwd())]).encode()
        (in_, to), (out, from_out), (err, from_err), (told, telling) = (os.pipe() for _ in range(4))
        try:
            head = _LENGTH.pack(len(request))
            with self._asking:
                socket.send_fds(self._socket, [head], [in_, from_out, from_err, telling])
                self._socket.sendall(request)
        finally:
            for descriptor in (in_, from_out, from_err, telling):
                os.close(descriptor)
        try:
            (pid,) = _NUMBER.unpack(_read(told, _NUMBER.size))
            try:
                _write(to, input.encode())
                os.close(to)
                to = -1
                gathered = _gather([out, err], timeout)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(["extsnap", *words], timeout) from None
            (status,) = _NUMBER.unpack(_read(told, _NUMBER.size))
        finally:
            for descriptor in (to, out, err, told):
                if descriptor >= 0:
                    os.close(descriptor)
        # As subprocess has it: a signal is negative.
        return subprocess.CompletedProcess(["extsnap", *words], os.waitstatus_to_exitcode(status), *gathered)


@functools.cache
def loaded() -> Loaded:
    """The one of this process, which ends with it."""
    one = Loaded()
    atexit.register(one.close)
    return one


def _read(descriptor: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = os.read(descriptor, length - len(data))
        if not piece:
            raise EOFError("the process that starts commands has ended")
        data += piece
    return data


def _write(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it: no error to subprocess either
        while data:
            data = data[os.write(descriptor, data) :]


def _gather(descriptors: list[int], timeout: float) -> list[str]:
    """What comes from each, until all are closed at the other end.

    Raises:
        TimeoutError: That took too long.
    """
    found: dict[int, list[bytes]] = {descriptor: [] for descriptor in descriptors}
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            if not ready and time.monotonic() >= deadline:
                raise TimeoutError
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                found[key.fd].append(piece)
                if not piece:
                    selector.unregister(key.fd)
    return [b"".join(pieces).decode() for pieces in found.values()]


# ---- the other side


def main() -> None:
    """Load everything; then fork for every request, until the test process is gone."""
    import extsnap.cli.app

    for module in pkgutil.walk_packages(extsnap.__path__, "extsnap."):
        importlib.import_module(module.name)
    for name in ("rich.console", "rich.table", "rich.text"):
        importlib.import_module(name)
    gc.freeze()  # children leave these objects alone, so that their memory stays shared
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        while True:
            head, descriptors, _, _ = socket.recv_fds(requests, _LENGTH.size, 4)
            if not head:
                return
            assert len(head) == _LENGTH.size
            request = b""
            (length,) = _LENGTH.unpack(head)
            while len(request) < length:
                request += requests.recv(length - len(request))
            keeper = os.fork()
            if not keeper:
                requests.close()
                _keep(request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            os.waitpid(keeper, 0)


def _keep(request: bytes, descriptors: list[int]) -> NoReturn:
    """Fork the command, and wait for it in a process that nobody waits for: others may want to start meanwhile."""
    *streams, telling = descriptors
    if os.fork():
        os._exit(0)
    pid = os.fork()
    if not pid:
        os.close(telling)
        _become(request, streams)
    for descriptor in streams:
        os.close(descriptor)
    os.write(telling, _NUMBER.pack(pid))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # whoever asked has lost patience, and killed it
        os.write(telling, _NUMBER.pack(status))
    os._exit(0)


def _become(request: bytes, streams: list[int]) -> NoReturn:
    """Be ``extsnap WORDS...`` from here on."""
    words, environment, directory = json.loads(request)
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    # What there was believes that it is no pipe.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir(directory)
    sys.argv = [str(Path(sys.executable).with_name("extsnap")), *words]
    Path("/proc/self/comm").write_text("extsnap")
    from extsnap.cli.app import main as program

    status = 1
    try:
        status = int(program() or 0)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
