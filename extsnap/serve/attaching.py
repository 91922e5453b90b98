"""``attach`` and ``detach``: a server that stays, and the end of any."""

from __future__ import annotations

import os
from typing import Any

from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.inuse import writers
from extsnap.errors import ExtsnapError, ImageNotFound, ServerError, VolumeBusy
from extsnap.serve import clearing, control, mounting, tools
from extsnap.serve.control import ControlClient
from extsnap.serve.private import CLOSE_PATIENCE, pass_on, pidfd, wait_gone
from extsnap.serve.recovering import replay
from extsnap.serve.server import ENDED_BADLY, SAID, Server, spawn
from extsnap.serve.session import key_of, open_session, place_of
from extsnap.serve.starting import config, refuse_served


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
    place = place_of(image, partition)
    refuse_served(place)
    path = mounting.require_directory(directory)
    if foreground:
        with open_session(image, writable=True, partition=place.partition) as session:  # replays
            if session.volume is None:
                raise VolumeBusy(f"{place.name} is already served")
        server = Server(config(place, path, allow_other=allow_other))
        server.start()
        server.serve()
        if not server.clean:
            raise ServerError(
                f"{place.name} was not left clean", hint="the next extsnap command that writes recovers it"
            )
        return
    keeper, hello = spawn(config(place, path, allow_other=allow_other))
    with keeper:
        if hello["needs_replay"]:
            process = pidfd(hello["pid"])
            try:
                replay(place.name, keeper, path)
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
    directory = directory_of(below.backing if below is not None else found.source)
    if directory is None or found.number not in {mount.number for mount in clearing.above(directory).mounts}:
        return None
    return directory


def directory_of(file: str) -> mounting.Mount | None:
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
            key = control.image_key(path) if is_directory else key_of(place_of(image_or_directory, partition))
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
                result = {"clean": not complaint(key)}  # it ended with its last mount
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
    place = place_of(image, partition)
    with ImageFile(place.path, start=place.offset, length=place.length) as found:
        processes = set(writers(found))
    return next((record for _, record in control.records() if record.pid in processes), None)


def _logged(key: control.ImageKey | None) -> list[str]:
    """The lines that a server left in its log; one with nothing to tell removes it."""
    if key is None:
        return []
    try:
        return control.log_path(key).read_text(errors="replace").strip().splitlines()
    except (OSError, ExtsnapError):
        return []


def complaint(key: control.ImageKey | None) -> str:
    """Why a server left its volume not clean, as the end of a sentence; empty if it did not."""
    last = _logged(key)[-1:]
    return f": {last[0]}" if last and ENDED_BADLY in last[0] else ""


def said(key: control.ImageKey | None) -> list[str]:
    """What the volume of a server that is gone had to tell."""
    return [line.partition(SAID)[2] for line in _logged(key) if SAID in line]
