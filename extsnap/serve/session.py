"""The client side: what the command line and the Python API call.

An image is served or at rest.  ``open_session`` hides which: if a server answers for the image, it
carries out the command; else the volume is opened here, after its journal was replayed if it must be.
The rest starts and ends servers: ``attach``, ``detach``, ``mount``, ``umount``, ``run`` and ``check``.

Whatever is started here is ended here, also on errors and Ctrl-C: a server whose keeper hangs up ends
with its last user.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.inuse import writers
from extsnap.errors import (
    ExtsnapError,
    ImageNotFound,
    ImageReadOnly,
    NeedsRecovery,
    ServerError,
    SnapshotNotFound,
    StoreDamaged,
    VolumeBusy,
    VolumeFull,
)
from extsnap.ext.locate import Place, locate
from extsnap.serve import clearing, commands, control, live, moment, mounting, remote, tools
from extsnap.serve.contract import DEFAULT_FACTORY, EngineVolume, load_factory
from extsnap.serve.control import ControlClient
from extsnap.serve.private import CLOSE_PATIENCE, Private, pass_on, pidfd, wait_gone
from extsnap.serve.server import ENDED_BADLY, SAID, Server, ServerConfig, spawn

if TYPE_CHECKING:  # imported where they are used: `list` needs neither, and is run often
    from extsnap.serve import nbd

FACTORY = DEFAULT_FACTORY
"""Name of what opens a volume; tests serve volumes of their own."""


class Session:
    """One way to give a volume commands, served or at rest.  A context manager.

    Paths in the arguments of a verb must be absolute: a server has a working directory of its own.
    """

    def __init__(self, image: str, *, client: ControlClient | None, volume: EngineVolume | None) -> None:
        self.image = image
        self._client = client
        self._volume = volume

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up, or close the volume."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        volume, self._volume = self._volume, None
        if volume is not None:
            volume.close()

    def call(self, verb: str, /, **arguments: Any) -> dict[str, Any]:
        """Carry out one verb; returns the same object as the command's ``--json``.

        ``info`` gets its ``attached`` here: only this side knows.
        """
        if self._client is not None and verb in ("create", "export"):
            directory = str(self._client.call("server.hello")["directory"])
            if verb == "create":
                result = live.create(self._client, directory, **arguments)
            else:
                result = remote.export(self._client, self.image, directory, **arguments)
        elif self._client is not None:
            result = self._client.call(verb, **arguments)
        elif self._volume is not None:
            result = self._volume.verb(verb, **arguments)
        else:
            raise ValueError("the session is closed")
        if verb == "info":
            result["attached"] = self.served
        return result

    @property
    def served(self) -> dict[str, Any] | None:
        """``{"pid", "directory", "mounts"}`` of the server, or None at rest."""
        if self._client is None:
            return None
        hello = self._client.call("server.hello")
        points = [mount.point for mount in mounting.mounts_over(hello["directory"])]
        return {"pid": hello["pid"], "directory": hello["directory"], "mounts": points}

    @property
    def volume(self) -> EngineVolume | None:
        """The open volume of an image at rest, or None if a server has it."""
        return self._volume


def open_session(image: str, *, writable: bool, partition: int | None = None, unrecovered: bool = False) -> Session:
    """Open an image for commands.

    Args:
        image: Path of the image.
        writable: Whether a command may change it.  An image that carries the dirty mark is recovered first.
        partition: Number of the partition; None and 0 as `locate` takes them.
        unrecovered: Open it all the same where that failed: for commands that leave the filesystem alone.

    Raises:
        ExtsnapError, OSError: As opening a volume does; NeedsRecovery if the replay did not help, VolumeFull if
            its copies have no room.
    """
    factory = load_factory(FACTORY)
    place = _place(image, partition)
    attempts = 4
    while True:
        attempts -= 1
        served = control.connect(_key(place))
        if served is not None:
            return Session(image, client=served[0], volume=None)
        try:
            volume = factory(image, writable=writable, partition=place.partition)
        except VolumeBusy:
            # A server that is just starting or ending has the lock, but no socket.
            if not attempts:
                raise
            time.sleep(0.1)
            continue
        if not writable or not volume.needs_replay:
            return Session(image, client=None, volume=volume)
        volume.close()
        if not attempts:
            raise _GaveUp.of(place.name)
        try:
            _recover(place)
        except (NeedsRecovery, VolumeFull) as error:
            if not unrecovered:
                raise
            tools.notice(f"{error.message}; going on without recovery")
            return Session(image, client=None, volume=factory(image, writable=True, partition=place.partition))


def _place(image: str, partition: int | None) -> Place:
    """Find the volume, and say what is wrong with the partition table if it could be found all the same."""
    place = locate(image, partition)
    if place.warning:
        tools.notice(f"{image}: {place.warning}")
    return place


def _key(place: Place) -> control.ImageKey:
    return control.image_key(place.path, place.offset)


# ---- starting and ending servers


def _config(place: Place, directory: str, **options: Any) -> ServerConfig:
    return ServerConfig(
        image=os.path.realpath(place.path),
        directory=directory,
        factory=FACTORY,
        partition=place.partition,
        offset=place.offset,
        **options,
    )


def _private(place: Place, **options: Any) -> Private:
    return Private(lambda directory: _config(place, directory, private=True, auto_end=True, **options))


def _refuse_served(place: Place) -> None:
    served = control.connect(_key(place))
    if served is not None:
        client, hello = served
        client.close()
        raise VolumeBusy(
            f"{place.name} is already served at {hello['directory']} (pid {hello['pid']})",
            hint=f"use it there, or run extsnap detach {place.name}",
        )


class _GaveUp(NeedsRecovery):
    """Stock e2fsck -p wants decisions.

    Attributes:
        reason: Why, in its own words; may be empty.
    """

    reason = ""

    @classmethod
    def of(cls, name: str, reason: str = "") -> _GaveUp:
        error = cls(
            f"{name}: e2fsck -p could not recover the filesystem" + (f": {reason}" if reason else ""),
            hint=f"run extsnap run {name} -- e2fsck -fy {{}}, or extsnap restore --no-safety {name} SNAPSHOT",
        )
        error.reason = reason
        return error


def _reason(done: subprocess.CompletedProcess[str], directory: str) -> str:
    """Why e2fsck -p gave up: what it found last before it said so."""
    # It says so on either stream; "(i.e., without -a or -p options)" is how the verdict ends, not why.
    found = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
    lines = [line for line in (line.removeprefix(f"{directory}/volume:").strip() for line in found) if line]
    given_up = [number for number, line in enumerate(lines) if "UNEXPECTED INCONSISTENCY" in line]
    return lines[given_up[0] - 1] if given_up and given_up[0] else tools.last_line(done)


def _replay(name: str, keeper: ControlClient, directory: str) -> None:
    """Replay the journal of a marked volume through its server, and have the mark taken off.

    Raises:
        NeedsRecovery: Stock e2fsck wants decisions.
    """
    _preen(name, directory)
    if not keeper.call("server.recovered").get("clean"):
        raise _GaveUp.of(name)


def _preen(name: str, directory: str) -> None:
    """Have stock e2fsck do on a served volume what needs no decisions.

    Raises:
        NeedsRecovery: It wants some.
    """
    done = tools.run("e2fsck", "-p", os.path.join(directory, "volume"), ok=None)
    if not 0 <= done.returncode <= moment.REPAIRED_MAX:
        raise _GaveUp.of(name, _reason(done, directory))


def _recover(place: Place, *, always: bool = False) -> None:
    """Make a marked volume whole again, with a server of our own that serves nobody else.

    Args:
        always: Have e2fsck look at one that needs no recovery, too.
    """
    server = _private(place, lazy=True, repair=always)
    try:
        if server.hello["needs_replay"]:
            _replay(place.name, server.keeper, server.directory)
        elif always:
            _preen(place.name, server.directory)
    except BaseException:
        server.abandon()
        raise
    server.end()


def let_go_of_orphans(image: str, partition: int | None, snapshot: str) -> None:
    """Have e2fsck do on a restored volume what the moment of its snapshot left to be done.

    Until then the volume is as the snapshot's moment left it, and a next mount or e2fsck does the same: an end at any
    point loses nothing.

    Raises:
        NeedsRecovery: That is not done: e2fsck wants decisions, or could not be run.
    """
    place = _place(image, partition)
    served = control.connect(_key(place))
    try:
        if served is None:
            _recover(place, always=True)
        else:
            client, hello = served
            with client:  # nobody else has a turn, or opens the volume, meanwhile
                client.call("server.provision", alone=True, only=True, patience=CLOSE_PATIENCE)
                try:
                    _preen(place.name, str(hello["directory"]))
                finally:  # answered before we end, so that whoever comes next is not refused
                    with contextlib.suppress(ExtsnapError, OSError):
                        client.call("server.done")
    except (ExtsnapError, OSError) as error:
        reason = error.message if isinstance(error, ExtsnapError) else str(error)
        if isinstance(error, _GaveUp) and error.reason:
            reason = error.reason
        raise NeedsRecovery(
            f"{place.name} is restored, but e2fsck -p gave up on what the moment of {snapshot} left to be done: "
            f"{reason}",
            hint=f"run extsnap run {place.name} -- e2fsck -fy {{}}",
        ) from error


# ---- attach and detach


def attach(
    image: str, directory: str, *, foreground: bool = False, allow_other: bool = False, partition: int | None = None
) -> None:
    """Serve ``DIR/volume``, ``DIR/snapshots/NAME`` and, of a partition, ``DIR/disk``; returns when they are there.

    Args:
        image: Path of the image.
        directory: An existing directory.
        foreground: Serve in this process until the end instead (replaying a journal first, if needed).
        allow_other: Let other users have the files, as the image's owner and mode let them have the image.
        partition: Number of the partition; None and 0 as `locate` takes them.

    Raises:
        VolumeBusy: The image is served already.
        ServerError: FUSE cannot be used here, or the directory cannot.
        ExtsnapError, OSError: As opening a volume does.
    """
    place = _place(image, partition)
    _refuse_served(place)
    path = mounting.require_directory(directory)
    if foreground:
        with open_session(image, writable=True, partition=place.partition) as session:  # replays
            if session.volume is None:
                raise VolumeBusy(f"{place.name} is already served")
        server = Server(_config(place, path, allow_other=allow_other))
        server.start()
        server.serve()
        if not server.clean:
            raise ServerError(
                f"{place.name} was not left clean", hint="the next extsnap command that writes recovers it"
            )
        return
    keeper, hello = spawn(_config(place, path, allow_other=allow_other))
    with keeper:
        if hello["needs_replay"]:
            process = pidfd(hello["pid"])
            try:
                _replay(place.name, keeper, path)
            except BaseException:
                keeper.close()  # before it has recovered: the server ends
                wait_gone(process, CLOSE_PATIENCE)
                raise
            finally:
                if process is not None:
                    os.close(process)


def _directory_at(path: str) -> mounting.Mount | None:
    """The served directory at a path, or the one that the mount at that path stands on."""
    found = mounting.mount_at(path)
    if found is None or found.fstype == mounting.FSTYPE:
        return found
    below = clearing.loop_below(found.device)
    directory = _directory_of(below.backing if below is not None else found.source)
    if directory is None or found.number not in {mount.number for mount in clearing.above(directory).mounts}:
        return None
    return directory


def _directory_of(file: str) -> mounting.Mount | None:
    """The served directory that a file is in, by its path alone."""
    return next(
        (
            mount
            for mount in reversed(mounting.mounts())
            if mount.fstype == mounting.FSTYPE and file.startswith(mount.point.rstrip("/") + "/")
        ),
        None,
    )


def _dead_directories(path: str, key: control.ImageKey | None) -> list[mounting.Mount]:
    """Where an image was served by servers that are gone; the image itself may be gone as well, or be elsewhere."""
    records = control.records()
    recorded = {record.directory for named, record in records if key is not None and control.is_named(named, key)}
    others = {record.directory for named, record in records if key is not None and not control.is_named(named, key)}
    return [
        mount
        for mount in mounting.mounts()
        if mount.fstype == mounting.FSTYPE
        and (mount.point in recorded or (mount.source == path and mount.point not in others))
        and clearing.is_dead(mount.point)
    ]


def detach(image_or_directory: str, *, force: bool = False, partition: int | None = None) -> bool:
    """Stop serving; returns once everything is durable, with whether the volume was left clean.

    What a server left behind that was killed goes too: its directory if nothing stands on it, with ``force`` also
    what does, and then what was asked for is done and the answer is True.

    Args:
        image_or_directory: The image, where it is served, or where a filesystem is mounted from there.
        force: Also if it is in use: mounts and loop devices are taken off, users of open files get errors.
        partition: Number of the partition of an image; None and 0 as `locate` takes them.

    Raises:
        VolumeBusy: Somebody has a file open; names the mounts and processes.
        ServerError: Nothing is served there.
    """
    path = os.path.realpath(image_or_directory)
    directory = _directory_at(path)
    key: control.ImageKey | None = None
    missing: ExtsnapError | None = None
    if directory is None:
        try:
            # A directory with nothing served in it has a key as well, that nobody serves.
            is_directory = os.path.isdir(path)
            key = control.image_key(path) if is_directory else _key(_place(image_or_directory, partition))
        except ImageNotFound as error:
            missing = error
        dead = _dead_directories(path, key)
    elif clearing.is_dead(directory.point):
        dead = [directory]
    else:
        dead = []
        key = control.key_of_directory(directory.point, directory.source)
    for gone in dead:
        _clear(gone, image_or_directory, force)
    served = control.connect(key) if key is not None else None
    if served is not None:
        return _end(*served, force)
    if dead:
        return force
    if directory is not None:  # a server without a socket: it ends when it is unmounted
        if force:
            clearing.take_off(directory, tools.notice)
        mounting.unmount(directory.point, lazy=force)
        return True
    if missing is not None:
        raise missing
    other = _served_otherwise(image_or_directory, partition)
    if other is not None:
        raise ServerError(
            f"{image_or_directory} is served at {other.directory} by the path {other.image} (pid {other.pid})",
            hint=f"run extsnap detach {other.directory}",
        )
    raise ServerError(f"{image_or_directory} is not served", hint="extsnap attach serves it")


def _clear(directory: mounting.Mount, named: str, force: bool) -> None:
    """Take away a directory whose server is gone.

    Raises:
        VolumeBusy: Something stands on it, and this was not forced.
    """
    if force:
        clearing.clear(directory, tools.notice)
        tools.notice(f"{directory.source} may need recovery: the next extsnap command that writes does it")
    elif standing := clearing.above(directory):
        raise VolumeBusy(
            f"the server of {directory.source} is gone, and {directory.point} is still in use: {standing}",
            hint=f"extsnap detach --force {named} takes it all away",
        )
    else:
        clearing.remove(directory)
    control.sweep()


def _end(client: ControlClient, hello: dict[str, Any], force: bool) -> bool:
    """End a server that lives; returns whether the volume was left clean."""
    key = control.key_of_directory(hello["directory"], hello["image"])
    process = pidfd(hello["pid"])
    try:
        with client:
            directory = mounting.fuse_mount_at(hello["directory"]) if force else None
            if directory is not None:
                clearing.take_off(directory, tools.notice)
            try:
                result = client.call("server.detach", force=force)
            except control.ServerGone:
                if not hello["auto_end"]:
                    raise
                result = {"clean": not _complaint(key)}  # it ended with its last mount
        wait_gone(process, CLOSE_PATIENCE)
        pass_on(result)
        return bool(result.get("clean", True))
    finally:
        if process is not None:
            os.close(process)


def _served_otherwise(image: str, partition: int | None) -> control.Record | None:
    """The server that has the volume through another device: a loop device over the file, a partition's node."""
    if os.path.isdir(image):
        return None
    place = _place(image, partition)
    with ImageFile(place.path, start=place.offset, length=place.length) as found:
        processes = set(writers(found))
    return next((record for _, record in control.records() if record.pid in processes), None)


# ---- mount and umount


def mount(
    image: str,
    directory: str,
    *,
    snapshot: str | None = None,
    scratch: bool = False,
    allow_other: bool = False,
    partition: int | None = None,
) -> None:
    """Mount the base volume, or a snapshot.  The server, if one had to be started, ends with it.

    Args:
        image: Path of the image.
        directory: An existing directory.
        snapshot: The snapshot, which is mounted read-only.
        scratch: Mount the snapshot for writing, over a throw-away layer that goes with the mount.
        allow_other: For other users, too, which a mount by root is in any case.
        partition: Number of the partition; None and 0 as `locate` takes them.

    Raises:
        SnapshotNotFound: No such snapshot.
        ToolError: What mount(8) or fuse2fs said.
        ExtsnapError, OSError: As ``attach`` does.
    """
    target = mounting.require_directory(directory)
    if os.geteuid() == 0:
        tools.find("mount")
    else:
        tools.find("fuse2fs")
    place = _place(image, partition)
    served = control.connect(_key(place))
    if served is not None:
        client, hello = served
        # Hold the connection: it is also the sign that the server was there before and stays.
        with client:
            _mount_from(client, hello["directory"], target, snapshot, scratch, allow_other)
        return
    server = _start_for(place, lazy=snapshot is not None, live=snapshot is None and os.geteuid() == 0)
    try:
        if server.hello["needs_replay"]:
            _replay(place.name, server.keeper, server.directory)
        _mount_from(server.keeper, server.directory, target, snapshot, scratch, allow_other)
    except BaseException:
        server.abandon()
        raise
    server.let_go()


def _start_for(place: Place, *, lazy: bool, live: bool = False, set_up: bool = False) -> Private:
    """A server for a mount or for NBD; a snapshot of an image that we may not write is served all the same."""
    try:
        return _private(place, lazy=lazy, live=live, set_up=set_up)
    except ImageReadOnly:
        if not lazy:
            raise
        return _private(place, writable=False)


def _mount_from(
    client: ControlClient, served: str, target: str, snapshot: str | None, scratch: bool, allow_other: bool
) -> None:
    if snapshot is not None and scratch:
        # The mount has it open when we let it go: the layer ends with it.
        with remote.scratch(client, served, snapshot) as file:
            mounting.mount_file(file, target, read_only=False, allow_other=allow_other)
        return
    file = _require_snapshot(served, snapshot) if snapshot is not None else os.path.join(served, "volume")
    if snapshot is None and not os.path.exists(file):
        raise ServerError(f"{file} is not there: the server has ended")
    mounting.mount_file(file, target, read_only=snapshot is not None, allow_other=allow_other)


def serve(
    image: str,
    *,
    snapshot: str | None,
    scratch: bool,
    address: nbd.Address,
    program: str | None,
    ready: Callable[[dict[str, Any]], None],
    partition: int | None = None,
) -> None:
    """Serve the base volume, or a snapshot, by NBD; returns when a signal has ended that, with everything durable.

    Args:
        image: Path of the image.
        snapshot: The snapshot; for reading only, without ``scratch``.
        scratch: Over a throw-away layer, that goes at the end.
        address: Where clients come.
        program: One of `nbd.PROGRAMS`, or None for one that is installed.
        ready: Told ``{"uri", "program", "read_only"}`` when clients can come.
        partition: Number of the partition; None and 0 as `locate` takes them.

    Raises:
        VolumeBusy: The volume is in use, which NBD's clients would not know of.
        SnapshotNotFound: No such snapshot.
        ServerError: The address cannot be had, or the program or the volume's server ended by itself.
        ExtsnapError, OSError: As ``attach`` does.
    """
    from extsnap.serve import nbd

    offer = nbd.Offer(snapshot, scratch, nbd.choose(program), address.tls)
    place = _place(image, partition)
    # The address first: one that cannot be had leaves everything as it is.
    with nbd.listening(address) as (listener, uri):
        about = {"uri": uri, "program": offer.program, "read_only": offer.read_only}
        told = functools.partial(ready, about)
        served = control.connect(_key(place))
        if served is not None:
            client, hello = served
            with client:
                _serve_from(client, hello, offer, listener, told)
            return
        # A machine has the volume, not the kernel here: the store cannot grow with it, and has all of its room now.
        server = _start_for(place, lazy=snapshot is not None, set_up=snapshot is None)
        try:
            if server.hello["needs_replay"]:
                _replay(place.name, server.keeper, server.directory)
            _serve_from(server.keeper, server.hello, offer, listener, told)
        except BaseException:
            server.abandon()
            raise
    if not server.end():
        raise ServerError(f"{place.name} was not left clean", hint="the next extsnap command that writes recovers it")


def _serve_from(
    client: ControlClient, hello: dict[str, Any], offer: nbd.Offer, listener: socket.socket, told: Callable[[], None]
) -> None:
    """Serve a file of a server that runs by NBD, until a signal ends that."""
    from extsnap.serve import nbd

    directory = str(hello["directory"])
    with contextlib.ExitStack() as stack:
        if offer.snapshot is None:
            file = os.path.join(directory, "volume")
            if users := mounting.users_of(file) + mounting.users_of(os.path.join(directory, "disk")):
                raise VolumeBusy(f"volume is in use: {', '.join(users)}", hint="unmount or close it first")
        elif offer.scratch:
            file = stack.enter_context(remote.scratch(client, directory, offer.snapshot))
        else:
            file = _require_snapshot(directory, offer.snapshot)
        # In use from now on, by us, whether the program has it open or not.
        stack.enter_context(_held(file, os.O_RDONLY if offer.read_only else os.O_RDWR))
        nbd.run(nbd.command(offer, file), listener, int(hello["pid"]), told)


@contextlib.contextmanager
def _held(file: str, flags: int) -> Iterator[None]:
    """A served file is open.

    Raises:
        OSError: What was written to it could not be kept.
    """
    descriptor = os.open(file, flags | os.O_CLOEXEC)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    os.close(descriptor)


def _require_snapshot(served: str, name: str) -> str:
    """Path of a snapshot's file.

    Raises:
        SnapshotNotFound: There is none.
    """
    file = os.path.join(served, "snapshots", name)
    if not os.path.exists(file):
        raise SnapshotNotFound(f"no snapshot {name}", hint="extsnap list shows them")
    return file


def umount(directory: str) -> None:
    """Unmount what ``mount`` mounted; returns once its server has ended and everything is durable.

    Raises:
        VolumeBusy: Somebody uses the mount; names who.
        ServerError: Nothing of extsnap is mounted there, or not everything could be made durable.
    """
    path = os.path.realpath(directory)
    found = mounting.mount_at(path)
    if found is None:
        raise ServerError(f"nothing is mounted at {directory}")
    if found.fstype == mounting.FSTYPE:
        raise ServerError(f"{directory} is where {found.source} is served", hint=f"run extsnap detach {directory}")
    backing = next((loop.backing for loop in mounting.loops() if loop.device == found.device), found.source)
    fuse = _directory_of(backing)
    if fuse is None:
        raise ServerError(f"{directory} was not mounted by extsnap", hint=f"run umount {directory}")
    try:
        key = control.key_of_directory(fuse.point, fuse.source)
        served = control.connect(key)
    except FileNotFoundError:
        key, served = None, None
    if served is None:
        # A read-only server has no socket, and a dead one nothing to wait for.
        dead = clearing.is_dead(fuse.point)
        try:
            mounting.unmount(path)
        except VolumeBusy as busy:
            if not dead:
                raise
            hint = f"the server of {fuse.source} is gone: close it, or run extsnap detach --force {directory}"
            raise VolumeBusy(busy.message, hint=hint) from busy
        if dead:
            clearing.remove_if_free(fuse)
            control.sweep()
            raise ServerError(
                f"the server of {fuse.source} had ended before the unmount",
                hint="the next extsnap command that writes recovers the volume",
            )
        return
    client, hello = served
    process = pidfd(hello["pid"])
    try:
        with client:
            mounting.unmount(path)
            file = backing.removesuffix(" (deleted)")[len(fuse.point.rstrip("/")) + 1 :]
            try:
                result = client.call("server.settle", file=file, seconds=CLOSE_PATIENCE)
            except control.ServerGone:
                # It may have ended before it read the question: its log tells how.
                result = {"ended": True, "clean": not _complaint(key), "said": _said(key)}
        if not result.get("ended"):
            return
        wait_gone(process, CLOSE_PATIENCE)
        pass_on(result)
        if not result.get("clean", True):
            raise ServerError(
                f"{fuse.source} was not left clean{_complaint(key)}",
                hint="the next extsnap command that writes recovers it",
            )
        if result.get("refusal"):
            raise ServerError(f"{fuse.source}: {result['refusal']}", hint="run extsnap check for what it left")
    finally:
        if process is not None:
            os.close(process)


def _logged(key: control.ImageKey | None) -> list[str]:
    """The lines that a server left in its log; one with nothing to tell removes it."""
    if key is None:
        return []
    try:
        return control.log_path(key).read_text(errors="replace").strip().splitlines()
    except (OSError, ExtsnapError):
        return []


def _complaint(key: control.ImageKey | None) -> str:
    """Why a server left its volume not clean, as the end of a sentence; empty if it did not."""
    last = _logged(key)[-1:]
    return f": {last[0]}" if last and ENDED_BADLY in last[0] else ""


def _said(key: control.ImageKey | None) -> list[str]:
    """What the volume of a server that is gone had to tell."""
    return [line.partition(SAID)[2] for line in _logged(key) if SAID in line]


# ---- run


def run(
    image: str,
    command: Sequence[str],
    *,
    atomic: bool = False,
    ok: Collection[int] = frozenset({0}),
    partition: int | None = None,
) -> int:
    """Serve the image while a command runs.

    Args:
        image: Path of the image.
        command: The command; ``{}`` in an argument becomes the path of the served volume, and for a partition
            ``{disk}`` that of the served disk.
        atomic: Take a snapshot first, restore it if the command fails, delete it in both cases.
        ok: The exit statuses that are no failure.
        partition: Number of the partition; None and 0 as `locate` takes them.

    Returns:
        The command's exit status; 126 if it cannot be executed, 127 if it is not found, 128+N if signal N
        ended it.

    Raises:
        ExtsnapError, OSError: A failure of our own (the command line exits with 125).
    """
    if not command:
        raise ServerError("no command to run")
    place = _place(image, partition)
    served = control.connect(_key(place))
    if served is not None:
        client, hello = served
        with client:
            status, refusal = _run_on(client, os.path.join(hello["directory"], "volume"), command, atomic, ok)
            said = client.call("server.hello")["said"]
            pass_on({"said": said[len(hello["said"]) :]})
            return _checked_status(status, refusal, ok, atomic)
    # Without the kernel's delays a tool learns of a refused write at once, not after a hundred others.
    server = _private(place, writeback=False, repair=not atomic)
    try:
        if server.hello["needs_replay"]:
            try:
                _replay(place.name, server.keeper, server.directory)
            except NeedsRecovery as error:
                if atomic:
                    raise
                # This command may be the repair.
                tools.notice(f"{error.message}; running the command on the volume as it is")
        status, refusal = _run_on(server.keeper, server.file(), command, atomic, ok)
    except BaseException:
        server.abandon()
        raise
    try:
        if not server.end():
            tools.notice(f"{place.name} still needs recovery; run extsnap run {place.name} -- e2fsck -fy {{}}")
    except NeedsRecovery as left:
        if status in ok and not refusal:
            raise
        tools.notice(str(left))
    return _checked_status(status, refusal, ok, atomic)


def _run_on(
    client: ControlClient, path: str, command: Sequence[str], atomic: bool, ok: Collection[int]
) -> tuple[int, str]:
    """Run a command on the served volume; returns its status, and what was refused of its writes."""
    snapshot = ""
    if atomic:
        client.call("server.provision", alone=True, patience=CLOSE_PATIENCE)
        snapshot = str(client.call("create", kind="atomic")["name"])
    before = client.call("server.hello")
    ran, status, refusal = True, -1, ""  # an error between here and the end of the command is a failed command
    try:
        status, ran = commands.execute(commands.filled(command, path, before.get("partition") is not None))
        after = client.call("server.hello")
        refusal = after["refusal"] if after["refused"] > before["refused"] else ""
    finally:
        if snapshot:
            if ran and (status not in ok or refusal):
                try:
                    client.call("restore", name=snapshot, safety=False, patience=CLOSE_PATIENCE)
                except (ExtsnapError, OSError) as error:
                    raise ServerError(
                        f"the command ended with status {status}, and the volume could not be restored: {error}",
                        hint=f"snapshot {snapshot} is kept: restore it",
                    ) from error
            client.call("delete", names=[snapshot], patience=CLOSE_PATIENCE)
    return status, refusal


def _checked_status(status: int, refusal: str, ok: Collection[int], atomic: bool) -> int:
    """The status of a command; one that calls itself successful although writes of it were refused is none.

    Raises:
        ServerError: It is such a one.
    """
    if not refusal:
        return status
    if status in ok:
        raise ServerError(
            f"the command ended with status {status}, but {refusal}",
            hint="the volume was restored" if atomic else "run extsnap check, then repair or restore the volume",
        )
    tools.notice(f"{refusal}; {'the volume was restored' if atomic else 'see extsnap check for what it left'}")
    return status


# ---- check


def check(image: str, names: Sequence[str] = (), quick: bool = False, partition: int | None = None) -> dict[str, Any]:
    """Check the store, the base volume and the views.

    What is damaged is noted in the image, if it can be written: as states of the snapshots, and by writing again what
    has a whole second copy.  Nothing else is changed.

    Args:
        image: Path of the image.
        names: The snapshots to check, or all.
        quick: Without e2fsck on the views.
        partition: Number of the partition; None and 0 as `locate` takes them.

    Returns:
        The object of ``check --json``.  ``e2fsck`` is None where it was not run: for views with ``quick``, and
        for a base volume in use of which no snapshot could be taken (whose ``ok`` is then None, with a ``skipped``
        that says why).

    Raises:
        SnapshotNotFound: A name that is none.
        NeedsRecovery: The image carries the dirty mark and nobody serves it.
    """
    from extsnap.serve import checking

    place = _place(image, partition)
    served = control.connect(_key(place))
    if served is not None:
        client, hello = served
        with client:
            found = checking.selected(remote.check(client, list(names)), names)
            base = checking.served_base(client, hello["directory"])
            done = checking.report(found, base, (client, hello["directory"]), client.call("info"), fsck=not quick)
            checking.note(done, found, lambda **states: client.call("note_check", **states))
            return done
    try:
        with _opened(place, image, writable=False) as at_rest:
            about = at_rest.verb("info")
            if at_rest.needs_replay or about.get("marked"):
                raise NeedsRecovery(
                    f"{place.name} was not closed cleanly and must be recovered before it can be checked",
                    hint=f"run extsnap run {place.name} -- e2fsck -fy {{}}",
                )
            found = checking.selected(at_rest.verb("check", names=list(names)), names)
    except StoreDamaged as error:
        # Not even the list of the snapshots can be read, whatever copy: that is what there is to say.
        lost = {"store": {"ok": False, "errors": [error.message]}, "snapshots": {}}
        base = {"e2fsck": None, "ok": None, "skipped": "the store cannot be opened"}
        if not place.partition:  # a partition can only be seen as a volume through its server
            base = moment.check_base(image, lambda: contextlib.nullcontext(os.devnull))
        return checking.report(lost, base, None, {}, fsck=False)
    damaged = any(entry.get("blocks") for entry in found["snapshots"].values())
    if not damaged and (quick or not found["snapshots"]) and not place.partition:
        base = moment.check_base(image, lambda: _layer_at_rest(place))
        done = checking.report(found, base, None, about, fsck=False)
    else:
        with _served_for_reading(place) as server:
            # A partition can only be seen as a volume through its server; so can the files of a snapshot.
            base = moment.check_base(
                server.file() if place.partition else image, lambda: remote.scratch(server.keeper, server.directory)
            )
            done = checking.report(found, base, (server.keeper, server.directory), about, fsck=not quick)
    if not about.get("outside_write"):
        checking.note(done, found, lambda **states: _noted(place, image, states))
    return done


@contextlib.contextmanager
def _served_for_reading(place: Place) -> Iterator[Private]:
    """A server that changes nothing."""
    server = _private(place, writable=False)
    try:
        yield server
    except BaseException:
        server.abandon()
        raise
    server.end()


@contextlib.contextmanager
def _layer_at_rest(place: Place) -> Iterator[str]:
    """A throw-away layer over a volume that nobody serves."""
    with _served_for_reading(place) as server, remote.scratch(server.keeper, server.directory) as path:
        yield path


def _opened(place: Place, image: str, *, writable: bool) -> EngineVolume:
    return load_factory(FACTORY)(image, writable=writable, partition=place.partition)


def _noted(place: Place, image: str, states: dict[str, Any]) -> dict[str, Any]:
    with _opened(place, image, writable=True) as volume:
        return volume.verb("note_check", **states)
