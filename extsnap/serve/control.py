"""The control socket of a server: where it is, what is said on it, and both ends of saying it.

One Unix socket for each served volume, named by the image's device and inode and by where in it the volume
begins, mode 0600 in a directory of mode 0700.  Either side asks the kernel who the other one is and talks to
the same user or root only.
A request and an answer are one line of JSON each::

    {"verb": "create", "args": {"name": "before"}}
    {"ok": true, "result": {...}}
    {"ok": false, "error": {"class": "SnapshotExists", "message": "...", "hint": "..."}}

Verbs that begin with ``server.`` are the server's own, all others the volume's.  An error comes back
out of ``ControlClient.call`` as the class that the server raised.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs

from extsnap import errors
from extsnap.blockdev.locks import lock_holder
from extsnap.errors import ExtsnapError, ImageNotFound, ServerError, VolumeBusy

MAX_REQUEST = 1 << 20
MAX_ANSWER = 1 << 30
_RUNTIME_VARIABLE = "EXTSNAP_RUNTIME_DIR"
_LOG_SECONDS = 7 * 24 * 3600  # how long the log of a server that is gone is kept
_ALONE_SECONDS = 10.0
_ENDING_SECONDS = 1.0  # a server that hangs up takes its socket away, or is dead, a moment later

# Classes that may come out of a socket: those of our hierarchy, by name.
_CLASSES = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ExtsnapError)
}
_EXTRA = ("structure", "field", "offset")  # of FormatError


class StillClosing(VolumeBusy):
    """Busy for a moment: the kernel tells of a file's last close a little later than the one who closed it."""


class ServerGone(ServerError):
    """The server ended before it answered."""


# ---- where


@dataclass(frozen=True)
class ImageKey:
    """What identifies a volume, whatever path leads to its image: each partition has a server of its own."""

    device: int
    inode: int
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.device:x}-{self.inode:x}" + (f"-{self.offset:x}" if self.offset else "")


def image_key(image: str, offset: int = 0) -> ImageKey:
    """Return the key of a volume.

    Args:
        image: Path of the image.
        offset: Where the volume begins in it, in bytes.

    Raises:
        ImageNotFound: There is no such file.
    """
    try:
        found = os.stat(image)
    except FileNotFoundError:
        raise ImageNotFound(f"{image}: no such file or device") from None
    except NotADirectoryError:
        raise ImageNotFound(f"{image}: not a directory on the way") from None
    return ImageKey(found.st_dev, found.st_ino, offset)


def key_of_directory(directory: str, image: str) -> ImageKey:
    """Return the key of the volume that a server shows in a directory.

    Args:
        directory: Where it is served.
        image: Path of its image.

    Raises:
        ImageNotFound: The image is gone.
    """
    whole = image_key(image)
    for place in _candidates():
        for path in place.glob(f"{whole}-*.json") if _is_ours(place) else ():
            record = Record.load(path)
            if record is not None and record.directory == directory:
                return image_key(image, record.offset)
    return whole


def _candidates() -> list[Path]:
    """Where a runtime directory may be, the preferred one first; a client looks in all of them.

    Root's does not depend on a login session: the server outlives it, and cron has none.
    """
    chosen = os.environ.get(_RUNTIME_VARIABLE)
    if chosen:
        return [Path(chosen).absolute()]
    uid = os.geteuid()
    fallback = Path(f"/tmp/extsnap-{uid}")
    if uid == 0:
        return [Path("/run/extsnap"), fallback]
    return [platformdirs.user_runtime_path("extsnap"), Path(f"/run/user/{uid}/extsnap"), fallback]


def _is_ours(directory: Path) -> bool:
    """A real directory that belongs to us and that nobody else can enter."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def runtime_directory() -> Path:
    """Return the directory of sockets, records, logs and private mounts; made if it is missing.

    Raises:
        ServerError: None of the possible places can be used.
    """
    for directory in _candidates():
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError:
            continue
        if _is_ours(directory):
            return directory
    raise ServerError(
        "no runtime directory can be made", hint=f"set {_RUNTIME_VARIABLE} to a directory of mode 0700 that you own"
    )


@dataclass
class Record:
    """What a server leaves beside its socket, so that others can clean up after one that was killed."""

    pid: int
    directory: str
    image: str
    private: bool
    offset: int = 0

    def save(self, path: Path) -> None:
        """Write atomically."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(json.dumps(asdict(self)))
        temporary.rename(path)

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """Return the record, or None if there is none that makes sense."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def socket_path(key: ImageKey) -> Path:
    """Where the server of this image listens."""
    return runtime_directory() / f"{key}.sock"


def log_path(key: ImageKey) -> Path:
    """Where the server of this image writes what went wrong."""
    return runtime_directory() / f"{key}.log"


def is_named(path: Path, key: ImageKey) -> bool:
    """Whether a record is of a server of this volume, that lives or not."""
    return path.name.split(".")[0] == str(key)


def records() -> list[tuple[Path, Record]]:
    """What servers have left, those that live and those that are gone."""
    found = []
    for directory in _candidates():
        for path in sorted(directory.glob("*.json")) if _is_ours(directory) else ():
            record = Record.load(path)
            if record is not None:
                found.append((path, record))
    return found


def clean_up_after(record: Record) -> bool:
    """Take away the mount and the private directory of a server that is gone, if nothing stands on it.

    Returns False if something does: only as long as the directory is there can it be seen what, and
    ``detach --force`` take it off.  A directory where another server serves now is that one's.
    """
    if any(other.directory == record.directory and _lives(other.pid) for _, other in records()):
        return True
    from extsnap.serve import clearing, mounting

    found = mounting.fuse_mount_at(record.directory)
    if found is not None and found.source == record.image:
        if clearing.above(found):
            return False
        mounting.fuse_abort(record.directory)
    if record.private:
        with contextlib.suppress(OSError):
            os.rmdir(record.directory)
    return True


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep others from putting servers into a runtime directory or taking them out; a lock that dies with its owner.

    One who finds a dead socket has it while he looks again and cleans up, and a server before it mounts: else what is
    taken away may be the mount and the socket of a server that has just begun.

    Raises:
        ServerError: Another one does not let go of it; names it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _ALONE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = lock_holder(descriptor)
                    raise ServerError(
                        f"process {holder or 'unknown'} has held {directory} for {_ALONE_SECONDS:.0f} seconds",
                        hint="it starts or cleans up a server: continue or end it",
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _refuses(path: Path) -> bool:
    """Whether nobody listens at a socket any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.connect(os.fspath(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _bury(path: Path) -> None:
    """Take away what a server left that had this socket, unless it lives.

    The record stays, under a name of its own, if something still stands on what was served.
    """
    with alone(path.parent):
        if not _refuses(path):  # meanwhile somebody else cleaned up and a new one serves
            return
        left = path.with_suffix(".json")
        set_aside(left)
        left.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def set_aside(path: Path, taken: str = "") -> None:
    """Keep the record of a server that is gone beside that of its successor, if it is still needed.

    ``taken``: where the successor serves, who has no record yet.
    """
    record = Record.load(path)
    if record is not None and record.directory != taken and not clean_up_after(record):
        path.rename(path.with_suffix(f".{record.pid}.json"))


def _lives(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has reaped has, and in a container that may be for ever."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] not in ("Z", "X")


def sweep() -> None:
    """Remove what servers and clients left in the runtime directory that were killed, and old logs.

    What is in use has a process, a lock or a mount, and stays.
    """
    with contextlib.suppress(OSError, ExtsnapError):
        directory = runtime_directory()
        for path in sorted(directory.iterdir()):
            with contextlib.suppress(OSError):
                _sweep(path)


def _sweep(path: Path) -> None:
    if path.name.startswith("serve-"):
        _sweep_private(path)
    elif path.suffix == ".sock":
        if _refuses(path):
            _bury(path)
    elif path.suffix == ".json":
        with alone(path.parent):  # between a record and its socket there is a moment
            record = Record.load(path)
            dead = record is None or not _lives(record.pid)
            if not path.with_suffix(".sock").exists() and dead and (record is None or clean_up_after(record)):
                path.unlink()
    elif path.suffix in (".log", ".old"):
        if time.time() - path.stat().st_mtime > _LOG_SECONDS and _is_free(path):
            path.unlink()
    elif path.suffix[1:].isdigit() and not _lives(int(path.suffix[1:])):  # of a record or socket in the making
        path.unlink()


def _sweep_private(path: Path) -> None:
    """A private directory that is neither mounted nor held by the client that made it."""
    from extsnap.serve import mounting

    with alone(path.parent):  # between making it and holding it there is a moment
        if not any(mount.point == os.fspath(path) for mount in mounting.mounts()) and _is_free(path):
            path.rmdir()


def hold(path: str | Path) -> int:
    """Return a descriptor that keeps a file or directory from being swept away while it is open."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _is_free(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


# ---- errors on the wire


def encode_error(error: BaseException) -> dict[str, Any]:
    """An exception as JSON."""
    if isinstance(error, ExtsnapError):
        kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _CLASSES)
        found: dict[str, Any] = {"class": kind, "message": error.message, "hint": error.hint}
        found.update({name: getattr(error, name) for name in _EXTRA if hasattr(error, name)})
        if isinstance(error, StillClosing):
            found["transient"] = True
        return found
    if isinstance(error, OSError) and error.errno:
        return {"class": "OSError", "message": error.strerror or str(error), "hint": "", "errno": error.errno}
    return {
        "class": "ServerError",
        "message": f"internal error: {type(error).__name__}: {error}",
        "hint": "the server's log has the details",
    }


def decode_error(found: dict[str, Any]) -> Exception:
    """The exception that ``encode_error`` was given, as far as it can be had back."""
    message, hint = str(found.get("message", "")), str(found.get("hint", ""))
    if found.get("class") == "OSError":
        return OSError(int(found.get("errno", errno.EIO)), message)
    if found.get("transient"):
        return StillClosing(message, hint=hint)
    kind = _CLASSES.get(str(found.get("class")), ServerError)
    # FormatError puts its message together from parts: here it already is.
    error = kind.__new__(kind)
    ExtsnapError.__init__(error, message, hint=hint)
    for name in _EXTRA:
        if name in found:
            setattr(error, name, found[name])
    return error


# ---- the client's end


def peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other end, from the kernel."""
    pid, uid, _ = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


class ControlClient:
    """One connection to a server; a context manager."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def send(self, verb: str, /, **arguments: Any) -> None:
        """Ask, without waiting for the answer."""
        line = json.dumps({"verb": verb, "args": arguments}).encode() + b"\n"
        if len(line) > MAX_REQUEST:
            raise ServerError("the request is too long for the control socket")
        try:
            self._connection.sendall(line)
        except OSError as error:
            raise ServerGone("the server ended before it was asked") from error

    def receive(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            ServerGone: The server ended without one.
            ExtsnapError, OSError: What the server raised.
        """
        while True:
            end = self._received.find(b"\n")
            if end >= 0:
                line = bytes(self._received[:end])
                del self._received[: end + 1]
                break
            try:
                data = self._connection.recv(1 << 20)
            except ConnectionError:
                data = b""
            if not data:
                raise ServerGone("the server ended before it answered")
            if len(self._received) + len(data) > MAX_ANSWER:
                raise ServerError("the server's answer is too long")
            self._received += data
        try:
            answer = json.loads(line)
            if answer["ok"]:
                return dict(answer["result"])
            error = decode_error(answer["error"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
            raise ServerError("the server's answer makes no sense") from problem
        raise error

    def call(self, verb: str, /, *, patience: float = 2.0, **arguments: Any) -> dict[str, Any]:
        """Ask and wait; a file that is just being closed is waited for up to ``patience`` seconds."""

        def ask() -> dict[str, Any]:
            self.send(verb, **arguments)
            return self.receive()

        return patiently(ask, patience)


def patiently(action: Callable[[], dict[str, Any]], patience: float) -> dict[str, Any]:
    """Repeat ``action`` while it raises ``StillClosing``."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return action()
        except StillClosing:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def connect(key: ImageKey) -> tuple[ControlClient, dict[str, Any]] | None:
    """Return a connection to the server of this image and its greeting, or None if it is not served.

    What a killed server left behind (socket, mount, private directory) is cleaned up on the way, but for a directory
    on which something stands.
    """
    for directory in _candidates():
        path = directory / f"{key}.sock"
        if not _is_ours(directory):
            continue
        deadline = time.monotonic() + _ENDING_SECONDS
        while path.exists():
            try:
                found = _greet(path)
            except ConnectionRefusedError:
                with contextlib.suppress(FileNotFoundError):
                    _bury(path)
                deadline = time.monotonic() + _ENDING_SECONDS  # if there is one now, it is another one
                continue
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                break  # it is ending: as good as not served
            time.sleep(0.01)
    return None


def _greet(path: Path) -> tuple[ControlClient, dict[str, Any]] | None:
    """A connection and the greeting of whom it leads to; None if he ends (or is being killed) just now.

    Raises:
        ConnectionRefusedError: Nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.connect(os.fspath(path))
        if peer(connection)[1] not in (0, os.geteuid()):
            raise ServerError(f"{path} belongs to another user's process", hint="remove it")
        client = ControlClient(connection)
        return client, client.call("server.hello")
    except (FileNotFoundError, ServerGone):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise


# ---- the server's end


def listen(path: Path) -> socket.socket:
    """Return a listening, non-blocking socket at ``path``.

    It appears under its name only once it listens, so that nobody takes it for a stale one.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        old = os.umask(0o177)
        try:
            listener.bind(os.fspath(temporary))
        finally:
            os.umask(old)
        listener.listen(128)  # who comes when we are at the limit waits here
        temporary.rename(path)
    except OSError as error:
        listener.close()
        temporary.unlink(missing_ok=True)
        raise ServerError(f"cannot make the control socket {path}: {error.strerror or error}") from error
    return listener


class Connection:
    """The server's end of one client: lines in, lines out, never blocking.

    Attributes:
        keeper: The process that started this server holds the other end.
        pid: Who connected.
        heard: When it last sent or took something (monotonic seconds).
    """

    def __init__(self, connection: socket.socket, *, keeper: bool = False) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.keeper = keeper
        self.pid, _ = peer(connection)
        self.heard = time.monotonic()
        self._received = bytearray()
        self._outgoing = bytearray()

    def fileno(self) -> int:
        """For poll."""
        return self.socket.fileno()

    @property
    def wants_to_write(self) -> bool:
        """Whether an answer is still on its way out."""
        return bool(self._outgoing)

    @property
    def has_request(self) -> bool:
        """Whether a whole request waits that can be taken: one who does not take an answer gets no second one."""
        return not self._outgoing and b"\n" in self._received

    @property
    def wants_to_read(self) -> bool:
        """Whether more should be read: what a client may have us keep is one request and one answer."""
        return not self._outgoing and b"\n" not in self._received

    def receive(self) -> bool:
        """Read what is there; False when the client is gone.

        Raises:
            ServerError: It sent something that is no request; hang up.
        """
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        self.heard = time.monotonic()
        self._received += data
        if len(self._received) > MAX_REQUEST and b"\n" not in self._received:
            raise ServerError("the request is too long")
        return True

    def request(self) -> tuple[str, dict[str, Any]]:
        """Take the request that waits.

        Raises:
            ServerError: It is none; hang up.
        """
        end = self._received.index(b"\n")
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            request = json.loads(line)
            verb, arguments = request["verb"], request.get("args", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ServerError("not a request") from error
        if not isinstance(verb, str) or not isinstance(arguments, dict):
            raise ServerError("not a request")
        return verb, arguments

    def answer(self, result: dict[str, Any]) -> None:
        """Queue a result and send what goes out at once."""
        self._queue({"ok": True, "result": result})

    def refuse(self, error: BaseException) -> None:
        """Queue an error."""
        self._queue({"ok": False, "error": encode_error(error)})

    def _queue(self, message: dict[str, Any]) -> None:
        self._outgoing += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the client takes now."""
        try:
            while self._outgoing:
                with memoryview(self._outgoing) as rest:
                    sent = self.socket.send(rest[: 1 << 20])
                del self._outgoing[:sent]
                self.heard = time.monotonic()
        except BlockingIOError:
            return
        except OSError:
            self._outgoing.clear()

    def drain(self, seconds: float) -> None:
        """Send the rest before the process ends, waiting for a slow reader only so long."""
        with contextlib.suppress(OSError):
            self.socket.settimeout(seconds)
            self.socket.sendall(self._outgoing)
        self._outgoing.clear()
