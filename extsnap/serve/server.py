"""The server process: one thread that takes turns between FUSE requests and commands.

One poll loop over ``/dev/fuse``, the control socket, its clients, and a pipe that signals arrive on.
Because a command and a request never overlap, "suspend writes" needs no lock: a command is running.

How a server ends:

* ``attach``: by ``detach``, by a signal, or because somebody unmounted its directory.
* ``mount`` and ``run`` (``auto_end``): when the one who started it has hung up and nothing of the
  directory is open any more.  The *keeper*, a socket whose other end only the starter holds, tells
  when that is, also if the starter is killed.
* A signal while files are open is remembered and obeyed when the last one closes; a second one ends
  the server at once.  What is mounted from its files then gets errors, as if it had been killed.

The end: flush, unmount, ``end_serving``, remove the socket, close.  The image stays locked until the last
of these, and whoever waits is answered after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from extsnap.errors import ExtsnapError, ServerError, ToolError, VolumeBusy
from extsnap.serve import clearing, control, loading, mounting
from extsnap.serve.contract import EngineVolume, load_factory
from extsnap.serve.disk import Disk
from extsnap.serve.fuse import FuseFiles, Unmounted
from extsnap.serve.growing import Growing
from extsnap.serve.turns import Turns

_PR_SET_IO_FLUSHER = 57
_REST_SECONDS = 1.0  # without a write, after which nothing is held back any more
_FUSE_BURST = 1024  # looks for a request between two at the control socket
_FUSE_SPIN = 50  # looks in vain before going to sleep: waking up costs more than the request that wakes
_MAX_CLIENTS = 256
_FD_RESERVE = 64  # descriptors that clients may not take: commands open files and start processes
_SILENT_SECONDS = 10.0  # at the limit, a client that was silent for so long makes place
#: How lines of the log begin that whoever ends the session is told.
SAID, ENDED_BADLY = "note: ", "ended badly"
_MOST_SAID = 50  # lines of the volume that a session keeps
#: Commands that may edit the filesystem where nobody has it.
_EDITING = ("create", "checksum", "restore", "strip")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class ServerConfig:
    """What a server is started with (JSON on its way into the process).

    Attributes:
        image: Absolute path of the image, without symbolic links.
        directory: Where the files appear; exists.
        factory: Name of what opens the volume, see ``contract.load_factory``.
        writable: Open the volume for writing; a read-only server has no control socket.
        private: The directory is ours: removed at the end.
        auto_end: End with the last user instead of by ``detach``.
        live: The kernel will mount it: the store grows with it, and a volume without one is given it.
        set_up: Give a volume without snapshots its store now: whoever uses it later keeps it from being changed.
        lazy: Begin to serve for writing only when ``volume`` is opened for it.
        writeback: Let the kernel delay writes; without it a write that is refused fails at once.
        repair: What is run on the volume may be its repair.
        allow_other: Let other users in: who may read or write the image may do so with its files.
        partition: Number of the partition; 0: the whole image.
        offset: Where the volume begins in the image, in bytes.
    """

    image: str
    directory: str
    factory: str
    writable: bool = True
    private: bool = False
    auto_end: bool = False
    live: bool = False
    set_up: bool = False
    lazy: bool = False
    writeback: bool = True
    repair: bool = False
    allow_other: bool = False
    partition: int = 0
    offset: int = 0

    def to_json(self) -> str:
        """For ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServerConfig:
        """The inverse of ``to_json``."""
        return cls(**json.loads(text))


class Server:
    """Serves one volume from ``start`` to the end of ``serve``."""

    def __init__(self, config: ServerConfig, keeper: socket.socket | None = None) -> None:
        self.config = config
        self.clean: bool | None = None
        self._keeper = control.Connection(keeper, keeper=True) if keeper is not None else None
        self._clients: dict[int, control.Connection] = {}
        self._most_clients = _MAX_CLIENTS
        self._listening = False  # whether the listener is looked at: not while there is no place for a client
        self._asked: deque[control.Connection] = deque()  # those with a request that waits, in turn
        self._waiting: list[tuple[control.Connection, str, float]] = []
        self._poll = select.poll()
        self._volume: EngineVolume | None = None
        self._files: FuseFiles | None = None
        self._disk: Disk | None = None
        self._scratch_directory = ""
        self._held = -1
        self._scratches: list[tuple[control.Connection, str]] = []  # who asked for which file
        self._fuse_fd = -1
        self._listener: socket.socket | None = None
        self._socket_path: Path | None = None
        self._record_path: Path | None = None
        self._begun = False
        self._recovering = False
        self._ending_soon = config.auto_end
        self._signal_seen = False
        self._over = False
        self._signals_read, self._signals_write = -1, -1
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup = -1
        self.logged = False
        self._said: list[str] = []
        self._turns = Turns(self)
        self._temporary: dict[str, control.Connection] = {}  # snapshots that go when their client hangs up
        self._left_over: set[str] = set()  # those of clients that did
        self._growing = Growing(self)

    @property
    def volume(self) -> EngineVolume | None:
        """The volume, once it is open."""
        return self._volume

    @property
    def files(self) -> FuseFiles | None:
        """The files, once they are served."""
        return self._files

    def watch(self, client: control.Connection) -> None:
        """Wait for what a client that was answered is about to do."""
        self._watch(client)

    # ---- what the volume asks

    def say(self, message: str) -> None:
        """Log a line of the volume, and keep it for whoever looks after this server."""
        self.log(f"{SAID}{message}")
        if len(self._said) < _MOST_SAID:
            self._said.append(message)

    def in_use(self) -> bool:
        """Whether somebody has the base volume open for writing."""
        return self._files is not None and self._files.volume_write_opens > 0

    def open_views(self) -> list[str]:
        """Names of the snapshots whose file is open."""
        return self._files.open_views() if self._files is not None else []

    def snapshots_changed(self) -> None:
        """Look names up anew."""
        if self._files is not None:
            self._files.snapshots_changed()

    # ---- start

    def start(self) -> dict[str, Any]:
        """Open the volume, mount, listen; returns the greeting.

        Raises:
            ExtsnapError, OSError: Nothing stays behind.
        """
        loading.everything()
        try:
            if self.config.writable and os.geteuid() == 0:
                # Before the image and its lock are ours: the process must have neither.
                self._growing.start([self._keeper.fileno()] if self._keeper is not None else [])
            self._volume = load_factory(self.config.factory)(
                self.config.image, writable=self.config.writable, partition=self.config.partition
            )
            self._volume.serve_below(self)
            # Asked before anything is mounted: it tries the directory, which may be in a filesystem above us later.
            self._scratch_directory = os.path.realpath(tempfile.gettempdir())
            if self.config.partition:
                self._disk = Disk(self._volume, self.config.image, self.config.offset)
            self._mount()
            self._files = FuseFiles(
                self._fuse_fd,
                self._volume,
                disk=self._disk,
                writable=self.config.writable,
                # A page of the kernel's cache is written whole: where it holds several blocks, all would be copied.
                writeback_cache=self.config.writeback and self._volume.block_size >= mmap.PAGESIZE,
                like=os.stat(self.config.image) if self.config.allow_other else None,
                before_write=self._before_write if self.config.writable else None,
                log=self.log,
            )
            if self.config.writable:
                # A marked image is served as it is, and not grown, until its filesystem was replayed.
                self._recovering = self._volume.needs_replay
                if self._recovering or not self.config.lazy:
                    self._begin()
            self._register()
            self._catch_signals()
        except BaseException:
            self._finish()
            raise
        self._poll.register(self._fuse_fd, select.POLLIN)
        self._growing.watch(self._poll)
        if self._keeper is not None:
            self._add(self._keeper)
        with contextlib.suppress(OSError, AttributeError):
            # Under memory pressure our own writes must not wait for writes that wait for us.
            ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
        gc.collect()
        gc.freeze()
        return self._greeting()

    def _mount(self) -> None:
        config = self.config
        path = control.socket_path(control.image_key(config.image, config.offset))
        if config.private:
            # Who sweeps may be in another mount namespace: he sees no mount, and would take it away with its directory.
            self._held = control.hold(config.directory)
        with control.alone(path.parent):
            if config.writable:
                # We have the image: a socket of it can only be that of a server that was killed.
                control.set_aside(path.with_suffix(".json"))
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            self._fuse_fd = mounting.fuse_mount(config.directory, config.image, allow_other=config.allow_other)

    def _register(self) -> None:
        config = self.config
        record = control.Record(os.getpid(), config.directory, config.image, config.private, config.offset)
        path = control.socket_path(control.image_key(config.image, config.offset))
        if not config.writable:  # others may serve it too: none is asked, but all are cleaned up after
            self._record_path = path.with_suffix(f".{os.getpid()}.json")
            record.save(self._record_path)
            return
        self._socket_path, self._record_path = path, path.with_suffix(".json")
        with control.alone(path.parent):
            control.set_aside(self._record_path, config.directory)
            record.save(self._record_path)
            self._listener = control.listen(path)
        self._most_clients = _most_clients()
        self._listen(True)

    def _begin(self) -> None:
        assert self._volume is not None
        if not self._begun:
            self._volume.begin_serving(
                grow=not self._recovering,
                set_up=self.config.live or self.config.set_up or not self.config.auto_end,
                repair=self.config.repair,
                live=self.config.live,
            )
            self._begun = True

    def _before_write(self) -> None:
        """Somebody opens the base volume for writing: the first one since nobody had it may change it as they like."""
        if not self.in_use():
            self._growing.drop()
        self._begin()

    def _catch_signals(self) -> None:
        self._signals_read, self._signals_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup = signal.set_wakeup_fd(self._signals_write, warn_on_full_buffer=False)

        def note(number: int, frame: FrameType | None) -> None:
            """The byte in the pipe says it all."""

        for number in _SIGNALS:
            self._old_handlers[number] = signal.signal(number, note)
        self._poll.register(self._signals_read, select.POLLIN)

    def _greeting(self) -> dict[str, Any]:
        assert self._volume is not None
        return {
            "pid": os.getpid(),
            "directory": self.config.directory,
            "image": self.config.image,
            "partition": self.config.partition or None,
            "auto_end": self.config.auto_end,
            "needs_replay": self._recovering,
            "opens": self._files.total_opens if self._files is not None else 0,
            "refused": self._files.refused if self._files is not None else 0,
            "refusal": self._files.refusal if self._files is not None else "",
            "said": self._said,
        }

    @property
    def has_volume(self) -> bool:
        """Whether the volume could be opened, and so locked."""
        return self._volume is not None

    def log(self, message: str) -> None:
        """One line into the log (standard error)."""
        self.logged = True
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with contextlib.suppress(OSError, ValueError):
            print(f"{stamp} extsnap[{os.getpid()}]: {message}", file=sys.stderr, flush=True)

    # ---- the loop

    def serve(self) -> None:
        """Take turns until the end."""
        assert self._files is not None
        fuse_fd, serve_some, poll = self._fuse_fd, self._files.serve_some, self._poll.poll
        while not self._over:
            try:
                for fd, event in poll(self._timeout()):
                    if fd == fuse_fd:
                        misses, most = 0, self._growing.burst(_FUSE_BURST)
                        while most > 0:
                            served = serve_some()
                            most -= max(1, served)
                            if served:
                                misses = 0
                            elif (misses := misses + 1) > _FUSE_SPIN:
                                break
                    else:
                        self._attend(fd, event)
            except Unmounted:
                self._finish()
                break
            if self._asked:
                try:
                    self._take_turns()
                except Unmounted:
                    self._finish()
                    break
            if not self._over:
                self._growing.turn()
                if not self._files.is_at_rest:
                    self._files.rest(_REST_SECONDS)
            if not self._listening and self._listener is not None:
                self._make_place()
            if self._waiting:
                self._look_after_waiting()
            if self._left_over:
                self._clear_left_over()
            if self._ending_soon and not (self._over or self._keeper_holds() or self._has_users()):
                self._try_to_end()

    def _timeout(self) -> int | None:
        if self._asked:
            return 0
        assert self._files is not None
        looking = self._waiting or self._left_over or (not self._listening and self._listener is not None)
        resting = None if self._files.is_at_rest else int(_REST_SECONDS * 1000) + 1
        return self._growing.timeout(50 if looking else resting)

    def _keeper_holds(self) -> bool:
        return self._keeper is not None

    def _has_users(self) -> bool:
        """Whether a file is open, or about to be by whoever asked for it."""
        assert self._files is not None
        return bool(self._files.total_opens or self._scratches)

    def _attend(self, fd: int, event: int) -> None:
        if fd == self._signals_read:
            self._signalled(os.read(fd, 4096))
        elif fd == self._growing.descriptor:
            self._growing.hear()
        elif self._listener is not None and fd == self._listener.fileno():
            self._accept()
        else:
            client = self._clients.get(fd)
            if client is None:
                return
            if event & select.POLLOUT:
                client.flush()
            if client.wants_to_read and event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._hear(client)
            self._watch(client)

    def _signalled(self, numbers: bytes) -> None:
        assert self._files is not None
        for number in numbers:
            if number not in _SIGNALS or self._over:
                continue
            name = signal.Signals(number).name
            if self._signal_seen and self._has_users():
                self.log(f"{name} again: ending although files are open")
                with contextlib.suppress(Exception):
                    assert self._volume is not None
                    self._volume.flush()
                self._finish()
                return
            self._signal_seen = self._ending_soon = True
            if self._keeper is not None:
                self._drop(self._keeper)
            if self._has_users():
                self.log(f"{name}: ending as soon as nobody has a file open")

    def _accept(self) -> None:
        assert self._listener is not None
        if len(self._clients) >= self._most_clients:
            self._listen(False)
            return
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                # It stays in the queue: to be asked again and again would only keep us from everything else.
                self._listen(False)
            return
        if control.peer(connection)[1] not in (0, os.geteuid()):
            connection.close()
            return
        self._add(control.Connection(connection))

    def _listen(self, on: bool) -> None:
        """Look at the listener, or let those who come wait in its queue."""
        assert self._listener is not None
        if on and not self._listening:
            self._poll.register(self._listener, select.POLLIN)
        elif not on and self._listening:
            self._poll.unregister(self._listener)
        self._listening = on

    def _make_place(self) -> None:
        """There was none for a client that came: the one that has been silent for longest goes, if it is for long."""
        waiting = {id(client) for client, _, _ in self._waiting}
        idle = [
            client
            for client in self._clients.values()
            if not (client.keeper or client.has_request or id(client) in waiting)
        ]
        oldest = min(idle, key=lambda client: client.heard, default=None)
        full = len(self._clients) >= self._most_clients
        if full and (oldest is None or time.monotonic() - oldest.heard < _SILENT_SECONDS):
            return
        if full and oldest is not None:
            self.log(f"{len(self._clients)} clients: hanging up on one that was silent (pid {oldest.pid})")
            self._drop(oldest)
        self._listen(True)

    def _add(self, client: control.Connection) -> None:
        self._clients[client.fileno()] = client
        self._poll.register(client.fileno(), select.POLLIN)

    def _watch(self, client: control.Connection) -> None:
        """Wait for what it is about to do; one that has asked is not listened to before it has its answer."""
        if client.fileno() not in self._clients:
            return
        reading = select.POLLIN if client.wants_to_read else 0
        self._poll.modify(client.fileno(), reading | (select.POLLOUT if client.wants_to_write else 0))
        if client.has_request and client not in self._asked:
            self._asked.append(client)

    def _drop(self, client: control.Connection) -> None:
        if self._clients.pop(client.fileno(), None) is not None:
            self._poll.unregister(client.fileno())
        self._waiting = [item for item in self._waiting if item[0] is not client]
        self._growing.release(client)
        with contextlib.suppress(ValueError):
            self._asked.remove(client)
        client.socket.close()
        for owner, file in list(self._scratches):
            if owner is client:
                self._drop_scratch(owner, file)
        self._left_over |= {name for name, owner in self._temporary.items() if owner is client}
        self._turns.end(client)
        if client is self._keeper:
            self._keeper = None
            if self._recovering:  # the starter died while it replayed the journal, or gave up
                self._ending_soon = True

    def _hear(self, client: control.Connection) -> None:
        try:
            is_there = client.receive()
        except ServerError as error:
            client.refuse(error)
            is_there = False
        if not is_there:
            self._drop(client)

    def _take_turns(self) -> None:
        """Carry out one request of each client that has one, and serve the files in between."""
        for _ in range(len(self._asked)):
            if self._over or not self._asked:
                return
            client = self._asked.popleft()
            self._drain_fuse()
            try:
                verb, arguments = client.request()
            except ServerError as error:
                client.refuse(error)
                self._drop(client)
                continue
            try:
                result = self._obey(client, verb, arguments)
                if result is not None:
                    client.answer(result)
            except Unmounted:
                raise
            except Exception as error:
                if not isinstance(error, ExtsnapError | OSError):
                    self.log(f"command {verb} failed:\n{traceback.format_exc()}")
                client.refuse(error)
            self._watch(client)

    def _drain_fuse(self) -> None:
        """Closes that the kernel has already told us of come before a command that asks who has a file open."""
        assert self._files is not None
        for _ in range(_FUSE_BURST):
            if not self._files.serve_one():
                break

    # ---- commands

    def _make_scratch(self, client: control.Connection, name: str) -> dict[str, Any]:
        """A writable file over a snapshot, or over the base volume, that is there for as long as the client or open."""
        assert self._volume is not None
        assert self._files is not None
        above = {mount.point for mount in mounting.mounts_over(self.config.directory)}
        if mounting.point_of(self._scratch_directory) in above:
            raise ServerError(
                f"scratch files would be in {self._scratch_directory}, on a filesystem that this server serves: "
                "it would wait for itself",
                hint="set TMPDIR to another directory for the command that starts the server",
            )
        file = self._files.make_scratch(name, self._volume.block_size)
        self._scratches.append((client, file))
        return {"file": file}

    def _drop_scratch(self, client: control.Connection, file: str) -> dict[str, Any]:
        assert self._files is not None
        if (client, file) in self._scratches:
            self._scratches.remove((client, file))
            self._files.drop_scratch(file)
        return {}

    def _done(self, client: control.Connection) -> dict[str, Any]:
        self._turns.end(client)
        return {}

    def _obey(self, client: control.Connection, verb: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        assert self._volume is not None
        assert self._files is not None
        own: dict[str, Callable[..., dict[str, Any] | None]] = {
            "server.hello": lambda: self._greeting(),
            "server.detach": lambda force=False: self._detach(client, bool(force)),
            "server.settle": lambda file, seconds=10.0: self._settle(client, str(file), float(seconds)),
            "server.recovered": self._recovered,
            "server.scratch": lambda name="": self._make_scratch(client, str(name)),
            "server.unscratch": lambda file: self._drop_scratch(client, str(file)),
            "server.provision": lambda alone=False, only=False: self._turns.take(client, alone=alone, only=only),
            "server.done": lambda: self._done(client),
            "server.hold": lambda: self._hold(client),
            "server.temporary": lambda name: self._note_temporary(client, str(name)),
        }
        if verb in own:
            return own[verb](**arguments)
        if verb.startswith("server."):
            raise ServerError(f"the server knows no command {verb}", hint="is it of another version of extsnap?")
        self._permit(verb, arguments)
        try:
            return self._volume.verb(verb, **arguments)
        finally:
            self._files.snapshots_changed()
            self._growing.commanded(client, verb)
            if verb == "create":
                self._turns.end(client)

    # ---- snapshots of a volume in use

    def _hold(self, client: control.Connection) -> dict[str, Any] | None:
        """Whoever has the turn is about to freeze: answered when there is room for that; then nothing grows."""
        return self._growing.provision(client, {"provided": True})

    def _note_temporary(self, client: control.Connection, name: str) -> dict[str, Any]:
        """A snapshot that this client is about to take is to go with it."""
        self._temporary[name] = client
        return {}

    def _clear_left_over(self) -> None:
        """Delete the temporary snapshots of clients that hung up, as soon as nobody reads them."""
        assert self._volume is not None
        assert self._files is not None
        if self._volume.is_lost:
            return
        there, read = set(self._volume.snapshot_names()), set(self._files.open_views())
        for name in sorted(self._left_over - (there & read)):
            self._left_over.discard(name)
            self._temporary.pop(name, None)
            if name in there:
                try:
                    self._volume.verb("delete", names=[name])
                except (ExtsnapError, OSError) as error:
                    self.say(f"temporary snapshot {name!a} stays: {error}")
                self._files.snapshots_changed()

    def _permit(self, verb: str, arguments: dict[str, Any]) -> None:
        """Refuse what the files that are open forbid."""
        assert self._volume is not None
        assert self._files is not None
        files = self._files
        if verb in ("restore", "strip") and files.volume_opens:
            raise self.busy([files.base_name], f"{verb} needs the volume for itself", "unmount or close it first")
        if verb in _EDITING and not self.in_use():
            self._growing.drop()
            if self._growing.under_way:  # what it is asked for could still be carried out, in the next mount
                what = f"{self.config.image} was unmounted a moment ago, and the growth of its store is not at its end"
                raise control.StillClosing(what, hint="wait a second, then try again")
        if verb not in ("strip", "delete") or not files.open_views():
            return
        names = set(self._volume.snapshot_names())
        if verb == "delete":
            wanted = arguments.get("names", arguments.get("name", []))
            wanted = {wanted} if isinstance(wanted, str) else set(wanted or [])
            if arguments.get("kind"):
                listed = self._volume.verb("list")["snapshots"]
                wanted |= {found["name"] for found in listed if found.get("kind") == arguments["kind"]}
            names &= wanted
        for name in files.open_views():
            if name in names:
                shown = files.files_of(name)
                raise self.busy(shown, f"snapshot {name} is open", "unmount or close it first")

    def busy(self, files: list[str], what: str, hint: str) -> VolumeBusy:
        """The error that names who has one of these files of ours open, or any if none is given."""
        assert self._files is not None
        name = "its directory"
        for name in files or [""]:
            users = mounting.users_of(os.path.join(self.config.directory, name).rstrip("/"))
            users += [f"pid {owner.pid}" for owner, held in self._scratches if not users and held.startswith(name)]
            name = name or "its directory"
            if users:
                return VolumeBusy(f"{what}; {name} is in use: {', '.join(users)}", hint=hint)
        last = f" (last request from pid {self._files.last_pid})" if self._files.last_pid else ""
        return control.StillClosing(f"{what}; {name} is still open{last}", hint=hint)

    def _or_force(self, hint: str) -> str:
        return f"{hint}, or run extsnap detach --force {self.config.directory}"

    def _detach(self, client: control.Connection, force: bool) -> None:
        assert self._files is not None
        if self._has_users() and not force:
            raise self.busy([], f"{self.config.image} is served", self._or_force("unmount or close it first"))
        self._waiting.append((client, "", float("inf")))
        if not self._end(force=force):
            self._waiting = [item for item in self._waiting if item[0] is not client]
            raise self.busy([], f"{self.config.image} is served", self._or_force("leave the directory first"))

    def _settle(self, client: control.Connection, file: str, seconds: float) -> None:
        """Answered when ``file`` is closed and durable, and, if this server ends with it, when it has ended."""
        self._waiting.append((client, file, time.monotonic() + seconds))
        self._look_after_waiting()

    def _look_after_waiting(self) -> None:
        assert self._files is not None
        assert self._volume is not None
        now = time.monotonic()
        for item in list(self._waiting):
            client, file, deadline = item
            if not file or (self._files.opens_of(file) and (now < deadline or self._growing.under_way)):
                continue
            if self._ending_soon and not self._has_users():
                continue  # answered at the end, which is about to come
            self._waiting.remove(item)
            try:
                self._volume.flush()
                client.answer({"ended": False})
            except Exception as error:
                client.refuse(error)
            self._watch(client)

    def _recovered(self) -> dict[str, Any]:
        """The starter has replayed the journal through us: take the mark off, then serve as usual."""
        assert self._volume is not None
        if self._recovering:
            self._volume.flush()
            clean = self._volume.end_serving()
            self._begun = False
            if not clean:
                return {"clean": False}
            self._recovering = False
            if not self.config.lazy:
                self._begin()
        return {"clean": True}

    # ---- the end

    def _try_to_end(self) -> None:
        """Somebody may have opened a file while the end began: then it comes later."""
        self._end(force=False)

    def _end(self, *, force: bool) -> bool:
        """Unmount and finish; returns False, still serving, if the directory is busy."""
        assert self._files is not None
        if force:
            with contextlib.suppress(Exception):
                assert self._volume is not None
                self._volume.flush()
            mounting.fuse_abort(self.config.directory)
        elif not self._unmount():
            return False
        self._finish()
        return True

    def _unmount(self) -> bool:
        """Unmount from a process of its own and serve on meanwhile: the kernel may still have requests."""
        assert self._files is not None
        lazy = False
        while True:
            try:
                helper = subprocess.Popen(
                    mounting.fuse_unmount_command(self.config.directory, lazy=lazy),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except (OSError, ToolError) as error:
                self.log(f"cannot run umount ({error}): detaching the directory instead")
                mounting.fuse_abort(self.config.directory)
                return True
            poll = select.poll()
            poll.register(self._fuse_fd, select.POLLIN)
            unmounted = False
            while helper.poll() is None:
                try:
                    if not unmounted and poll.poll(20):
                        while self._files.serve_one():
                            pass
                    elif unmounted:
                        helper.wait()
                except Unmounted:
                    unmounted = True
            if helper.returncode == 0 or unmounted:
                return True
            with contextlib.suppress(Unmounted):
                self._drain_fuse()
            if self._files.total_opens or lazy or not self._ending_soon:
                return False
            # Nothing is open: only somebody's working directory keeps the mount busy.
            lazy = True

    def _finish(self) -> None:
        """Everything after the unmount; runs once, whatever fails on the way, and answers all who wait."""
        if self._over:
            return
        self._over = True
        failure: BaseException | None = None
        clean = True
        self._growing.close()
        if self._files is not None:
            failure = self._files.failure
            with contextlib.suppress(Exception):
                self._files.close()
        if self._fuse_fd >= 0:
            os.close(self._fuse_fd)  # from here on every request gets an error
            self._fuse_fd = -1
            self._leave_directory()
        if self._disk is not None:
            with contextlib.suppress(Exception):
                self._disk.close()
        if self._volume is not None:
            try:
                if self._begun:
                    self._volume.flush()
                    self._left_over |= self._temporary.keys()
                    if self._files is not None:
                        self._clear_left_over()
                    clean = bool(self._volume.end_serving())
            except Exception as error:
                failure = failure or error
                clean = False
            # The lock goes last: until then nobody else can have put a socket of its own in this place.
            self._unregister()
            try:
                self._volume.close()
            except Exception as error:
                failure = failure or error
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        if self.config.private:
            with contextlib.suppress(OSError):
                os.rmdir(self.config.directory)
        self.clean = clean and failure is None
        if failure is not None:
            self.log(f"{ENDED_BADLY} with an error: {failure}")
        elif not clean:
            self.log(f"{ENDED_BADLY}: the volume needs recovery: the next extsnap command that writes does it")
        elif self._files is not None and self._files.refused:
            self.log(f"{ENDED_BADLY}: {self._files.refusal}")
        for client, _, _ in self._waiting:
            if failure is not None:
                client.refuse(failure)
            else:
                refusal = self._files.refusal if self._files is not None else ""
                client.answer({"ended": True, "clean": clean, "said": self._said, "refusal": refusal})
            client.drain(2.0)
        self._waiting.clear()
        for client in list(self._clients.values()):
            self._drop(client)
        self._release_signals()

    def _leave_directory(self) -> None:
        """Unmount the directory, unless something stands on it: then it stays, dead, for ``detach --force``."""
        found = mounting.fuse_mount_at(self.config.directory)
        if found is not None and clearing.above(found):
            self.log(f"{self.config.directory} is still in use: extsnap detach --force takes it away")
            if self._record_path is not None and self.config.writable:
                aside = self._record_path.with_suffix(f".{os.getpid()}.json")
                with contextlib.suppress(OSError):
                    self._record_path.rename(aside)
            self._record_path = None
        elif found is not None:
            mounting.fuse_abort(self.config.directory)

    def _unregister(self) -> None:
        if self._listener is not None:
            self._listening = False
            self._listener.close()
            self._listener = None
        if self._socket_path is not None:
            with contextlib.suppress(OSError):
                self._socket_path.unlink(missing_ok=True)
            self._socket_path = None
        if self._record_path is not None:
            with contextlib.suppress(OSError):
                self._record_path.unlink(missing_ok=True)
            self._record_path = None

    def _release_signals(self) -> None:
        if self._signals_read < 0:
            return
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._signals_read)
        os.close(self._signals_write)
        self._signals_read = self._signals_write = -1


def _most_clients() -> int:
    """How many clients at once: so many that commands still have the descriptors that they need."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_CLIENTS if soft == resource.RLIM_INFINITY else max(8, min(_MAX_CLIENTS, soft - _FD_RESERVE))


# ---- the process

# Runs in a fresh interpreter, so that nothing of the caller (threads, locks, descriptors) lives on in the
# server.  It forks before anything is imported: the caller reaps the first process, the second one stays.
_BOOTSTRAP = """\
import os, sys
if os.fork():
    os._exit(0)
import json
settings = json.loads(sys.stdin.buffer.read())
sys.path[:] = settings["path"]
from extsnap.serve import numpy_alone
numpy_alone.load()
from extsnap.serve.server import daemon_main
daemon_main(settings)
"""


def spawn(config: ServerConfig) -> tuple[control.ControlClient, dict[str, Any]]:
    """Start a server process; returns the keeper and the greeting once it serves.

    The server runs on when the keeper is closed, unless it is ``auto_end``.

    Raises:
        ExtsnapError, OSError: What the server could not start for.
    """
    control.sweep()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    log = control.log_path(control.image_key(config.image, config.offset))
    if not config.writable:
        log = log.with_suffix(f".{os.getpid()}.log")
    settings = {
        "config": config.to_json(),
        "keeper": theirs.fileno(),
        "log": os.fspath(log),
        "path": [os.path.abspath(entry) for entry in sys.path],
    }
    try:
        with theirs:
            started = subprocess.run(
                [sys.executable, "-P", "-c", _BOOTSTRAP],
                input=json.dumps(settings).encode(),
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
                check=False,
            )
        if started.returncode:
            raise ServerError(f"cannot start a server: python ended with status {started.returncode}")
        keeper = control.ControlClient(ours)
        try:
            return keeper, keeper.receive()
        except control.ServerGone:
            raise ServerError("the server ended before it was ready", hint=f"see {log}") from None
    except BaseException:
        ours.close()
        raise


def _leave_log(log: Path, own: Path, server: Server | None) -> None:
    """At the end: a log in which something stands is kept, but never in the place of another server's."""
    is_worth_keeping = server is None or server.logged
    if own == log:
        is_ours = os.path.samestat(os.stat(log), os.fstat(2))  # another one may have the image by now
        if is_ours and not is_worth_keeping:
            log.unlink()
    elif is_worth_keeping and (not log.exists() or (server is not None and server.has_volume)):
        own.rename(log)
    else:
        own.unlink()


def daemon_main(settings: dict[str, Any]) -> None:
    """The server process after its fork: log, serve, exit.  Never returns."""
    status = 1
    log = Path(settings["log"])
    own = log.with_name(f".{os.getpid()}.{log.name}")
    keeper = control.Connection(socket.socket(fileno=settings["keeper"]), keeper=True)
    server: Server | None = None
    try:
        os.umask(0o077)
        # The log's own name belongs to the one who has the image, which may be another server than this one.
        fd = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)  # as long as this process lives, the log is not swept away
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for source, target in ((null, 0), (fd, 1), (fd, 2)):
            os.dup2(source, target)
        # Until it serves, a signal must not leave a mount behind.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        config = ServerConfig.from_json(settings["config"])
        server = Server(config, keeper.socket)
        try:
            greeting = server.start()
        except Exception as error:
            if not isinstance(error, ExtsnapError | OSError):
                server.log(f"cannot start:\n{traceback.format_exc()}")
            keeper.socket.setblocking(True)
            keeper.refuse(error)
            return
        if log.exists():
            log.replace(log.with_suffix(".log.old"))
        own.rename(log)
        own = log
        keeper.answer(greeting)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        server.serve()
        status = 0 if server.clean else 1
    except BaseException:
        if server is not None:
            server.logged = True
        traceback.print_exc()
        if server is not None:
            with contextlib.suppress(BaseException):
                server._finish()
    finally:
        with contextlib.suppress(OSError):
            _leave_log(log, own, server)
        os._exit(status)
