"""A served file on the network: nbdkit or qemu-nbd over it, on a socket that is made here.

The socket is handed over listening, as systemd does (LISTEN_FDS): so its mode, and who may reach it, do not depend on
the program; a client that comes early waits in its queue; and an address that cannot be had is an error before
anything else is started.  Without TLS only a Unix socket of mode 0600 is made, or what was asked for expressly.

The program ends with this process, also if that is killed, and this process with the program.  SIGINT, SIGTERM and
SIGHUP end both: the program answers what it has begun, and the served file is closed after it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from extsnap.errors import ServerError, ToolError
from extsnap.serve import control, tools

PROGRAMS = ("nbdkit", "qemu-nbd")
_END_SECONDS = 10.0  # for the program to answer what it has begun
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Takes the listening socket where LISTEN_FDS has it, asks for a SIGTERM with its parent's end, and becomes the program.
_BECOME = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("extsnap has ended")
os.dup2(int(sys.argv[2]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass(frozen=True)
class Address:
    """Where clients come.

    Attributes:
        socket: Path of a Unix socket; empty for one in the runtime directory.
        host: Name or address of this host to listen at; with it, TCP.
        port: Its port.
        tls: Directory with ca-cert.pem, server-cert.pem and server-key.pem: clients must show a certificate of that CA.
            Empty: without TLS.
    """

    socket: str = ""
    host: str = ""
    port: int = 0
    tls: str = ""


@dataclass(frozen=True)
class Offer:
    """What clients get.

    Attributes:
        snapshot: A snapshot, or None for the base volume.
        scratch: The snapshot under a throw-away layer.
        program: One of `PROGRAMS`.
        tls: As `Address` has it.
    """

    snapshot: str | None
    scratch: bool
    program: str
    tls: str

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written."""
        return self.snapshot is not None and not self.scratch


def choose(program: str | None) -> str:
    """The program of that name, or the first one that is installed.

    Raises:
        ToolError: There is none.
    """
    if program is not None:
        tools.find(program)
        return program
    for name in PROGRAMS:
        with contextlib.suppress(ToolError):
            tools.find(name)
            return name
    raise ToolError("neither nbdkit nor qemu-nbd is installed", hint="install one (Debian: apt install nbdkit)")


def command(offer: Offer, file: str) -> list[str]:
    """The command line that serves ``file`` on the socket that it is given."""
    program, tls = tools.find(offer.program), offer.tls
    if offer.program == "nbdkit":
        secure = ["--tls=require", f"--tls-certificates={tls}", "--tls-verify-peer"] if tls else ["--tls=off"]
        return [program, "--foreground", *(["--readonly"] if offer.read_only else []), *secure, "file", file]
    certificates = tls.replace(",", ",,")
    creds = f"tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={certificates}"
    secure = ["--object", creds, "--tls-creds=tls"] if tls else []
    how = ["--read-only"] if offer.read_only else ["--discard=unmap"]
    return [program, "--persistent", "--shared=0", "--format=raw", *how, *secure, file]


@contextlib.contextmanager
def listening(address: Address) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket and its URI; a Unix socket goes away at the end.

    Raises:
        ServerError: The address cannot be had.
    """
    if address.host:
        with _tcp(address) as listener:
            host, port = listener.getsockname()[:2]
            named = address.host if ":" not in address.host else f"[{host}]"
            yield listener, f"nbd{'s' if address.tls else ''}://{named}:{port}/"
        return
    path = os.path.abspath(address.socket) if address.socket else str(control.runtime_directory() / _own_name())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with listener:
        old = os.umask(0o177)
        try:
            listener.bind(path)
        except OSError as error:
            raise ServerError(
                f"cannot listen at {path}: {error.strerror or error}", hint="give another path by --socket"
            ) from error
        finally:
            os.umask(old)
        try:
            listener.listen(64)
            yield listener, f"nbd+unix:///?socket={urllib.parse.quote(path)}"
        finally:
            Path(path).unlink(missing_ok=True)


def _own_name() -> str:
    """A name that nobody else has; one left by a process that was killed is swept away when it is met."""
    control.sweep()
    return f"nbd-{os.getpid()}.sock"


def _tcp(address: Address) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(where[:2], family=family, backlog=64)
    except OSError as error:
        raise ServerError(
            f"cannot listen at {address.host}, port {address.port}: {error.strerror or error}",
            hint="give another one by --tcp",
        ) from error


def run(arguments: list[str], listener: socket.socket, server_pid: int, ready: Callable[[], None]) -> None:
    """Run the program until a signal ends it.

    Args:
        arguments: As `command` gives them.
        listener: What it takes clients from.
        server_pid: The process that serves its file: without that there is nothing left to do.
        ready: Called when it has greeted a first client.

    Raises:
        ServerError: The program or that process ended by itself.
    """
    name = os.path.basename(arguments[0])
    with tempfile.TemporaryFile() as complaints, _Watched(server_pid) as server:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _BECOME, str(os.getpid()), str(listener.fileno()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            pass_fds=(listener.fileno(),),
            process_group=0,  # Ctrl-C comes to us alone
            env=tools.environment(),
        )
        try:
            with _ending(child) as signalled, _Watched(child.pid) as program:
                with _client(listener) as probe:
                    _wait(probe.fileno(), program.descriptor, server.descriptor)
                    if not (signalled or program.is_gone(0) or server.is_gone(0)):
                        ready()
                _wait(program.descriptor, server.descriptor)
                # Without its file the program may end, too, and a moment earlier.
                if not signalled and server.is_gone(_END_SECONDS / 10):
                    raise ServerError("the server of the volume has ended", hint="extsnap check tells how it left it")
        finally:
            _end(child)
        if not signalled:
            complaints.seek(0)
            last = (complaints.read().decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            raise ServerError(f"{name} ended with status {child.returncode}: {last}")


class _Watched:
    """A process whose end can be waited for; a context manager."""

    def __init__(self, pid: int) -> None:
        self.descriptor = os.pidfd_open(pid)

    def is_gone(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        return bool(select.select([self.descriptor], [], [], seconds)[0])

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.descriptor)


def _client(listener: socket.socket) -> socket.socket:
    """A client of our own: the program greets whoever comes, in the clear."""
    client = socket.socket(listener.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    client.connect(listener.getsockname())
    return client


def _wait(*descriptors: int) -> None:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll()


@contextlib.contextmanager
def _ending(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Signals to us end the program; gives the list of those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        child.send_signal(signal.SIGTERM if len(came) == 1 else signal.SIGKILL)

    old = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
