"""``mount`` and ``umount``: the base volume or a snapshot in a directory, and the server that ends with it."""

from __future__ import annotations

import os

from extsnap.errors import ServerError, SnapshotNotFound, VolumeBusy
from extsnap.serve import clearing, control, mounting, remote, tools
from extsnap.serve.attaching import complaint, directory_of, said
from extsnap.serve.control import ControlClient
from extsnap.serve.private import CLOSE_PATIENCE, pass_on, pidfd, wait_gone
from extsnap.serve.recovering import replay
from extsnap.serve.session import key_of, place_of
from extsnap.serve.starting import start_for


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
    place = place_of(image, partition)
    served = control.connect(key_of(place))
    if served is not None:
        client, hello = served
        # Hold the connection: it is also the sign that the server was there before and stays.
        with client:
            _mount_from(client, hello["directory"], target, snapshot, scratch, allow_other)
        return
    server = start_for(place, lazy=snapshot is not None, live=snapshot is None and os.geteuid() == 0)
    try:
        if server.hello["needs_replay"]:
            replay(place.name, server.keeper, server.directory)
        _mount_from(server.keeper, server.directory, target, snapshot, scratch, allow_other)
    except BaseException:
        server.abandon()
        raise
    server.let_go()


def _mount_from(
    client: ControlClient, served: str, target: str, snapshot: str | None, scratch: bool, allow_other: bool
) -> None:
    if snapshot is not None and scratch:
        # The mount has it open when we let it go: the layer ends with it.
        with remote.scratch(client, served, snapshot) as file:
            mounting.mount_file(file, target, read_only=False, allow_other=allow_other)
        return
    file = require_snapshot(served, snapshot) if snapshot is not None else os.path.join(served, "volume")
    if snapshot is None and not os.path.exists(file):
        raise ServerError(f"{file} is not there: the server has ended")
    mounting.mount_file(file, target, read_only=snapshot is not None, allow_other=allow_other)


def require_snapshot(served: str, name: str) -> str:
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
    fuse = directory_of(backing)
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
                result = {"ended": True, "clean": not complaint(key), "said": said(key)}
        if not result.get("ended"):
            return
        wait_gone(process, CLOSE_PATIENCE)
        pass_on(result)
        if not result.get("clean", True):
            raise ServerError(
                f"{fuse.source} was not left clean{complaint(key)}",
                hint="the next extsnap command that writes recovers it",
            )
        if result.get("refusal"):
            raise ServerError(f"{fuse.source}: {result['refusal']}", hint="run extsnap check for what it left")
    finally:
        if process is not None:
            os.close(process)
