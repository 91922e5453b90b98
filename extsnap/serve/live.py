"""Snapshots of a volume that is in use: the client's part.

 1. the server is asked for the turn: nobody else is between 1 and 5
 2. what is dirty in the filesystems mounted from the served file is written, while everybody goes on and the store
    grows with it; then growth comes to an end, with room for what may still be on its way
 3. they are frozen, by a process that thaws them if we end; the served file is fsynced, so that nothing of it is only
    in the kernel's cache; from here on everything is below the server
 4. the server commits the snapshot: one header commit, durable when it answers
 5. they are thawed, whatever happened; the turn ends with the answer, or with our connection

A crash before the commit of 4 leaves no snapshot, after it a whole one; a client that is killed between 3 and 5 leaves
nothing frozen, and a snapshot or none.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from extsnap.errors import ExtsnapError, ServerError
from extsnap.serve import clearing, mounting, tools
from extsnap.serve.control import ControlClient
from extsnap.serve.freezer import LIMIT_SECONDS, Frozen

BASE_FILES = ("volume", "disk")


def kernel_mounts(directory: str) -> list[mounting.Mount]:
    """The kernel's filesystems that stand on the base volume served at ``directory``, each once, whoever mounted it."""
    served = mounting.fuse_mount_at(directory)
    if served is None:
        return []
    found = clearing.above(served, BASE_FILES)
    known = {mount.device: mount for mount in found.mounts if not mount.fstype.startswith("fuse")}
    hidden = {loop.device for loop in found.loops} - known.keys()
    if hidden:  # a loop device without a mount here: it may have one in another mount namespace
        known |= {mount.device: mount for mount in mounting.mounts_elsewhere() if mount.device in hidden}
    return list(known.values())


def create(
    client: ControlClient, directory: str, *, freeze: bool = True, quiesced: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Take a snapshot through the server of a volume, which may be in use.

    Args:
        client: A connection to it.
        directory: Where it serves.
        freeze: Freeze what the kernel has mounted from it.
        quiesced: Whoever uses the volume has brought it to rest.
        arguments: Of the verb.

    Raises:
        ServerError: A filesystem cannot be frozen, or was not frozen long enough; there is no snapshot.
        ExtsnapError, OSError: What the server raised.
    """
    base = client.call("server.provision").get("in_use")
    if base is None:
        return client.call("create", **arguments)
    points = [mount.point for mount in kernel_mounts(directory)] if freeze and not quiesced else []
    frozen = Frozen(points)
    try:
        with frozen:
            client.call("server.hold")
            frozen.sync()
            frozen.freeze()
            _sync(os.path.join(directory, base))
            result = client.call("create", quiesced=quiesced or bool(points), **arguments)
    except OSError as error:
        if error.filename not in points:
            raise
        raise ServerError(
            f"{error.filename} cannot be frozen: {error.strerror}",
            hint="freezing needs root; --no-freeze takes the snapshot as a crash would leave the volume",
        ) from error
    if points and not frozen.held:
        client.call("delete", names=[result["name"]])
        raise ServerError(
            f"the snapshot took longer than {LIMIT_SECONDS:.0f} s, for which {', '.join(points)} may be frozen at most",
            hint="take it when less is written",
        )
    return result


def _sync(path: str) -> None:
    """Have what the kernel's cache holds of the served file written to the server, and made durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary(client: ControlClient, directory: str, purpose: str) -> Iterator[dict[str, Any]]:
    """A snapshot of the volume as it is, for the time of the ``with``; yields what ``create`` answers.

    The server deletes it when our connection ends, if we do not.

    Raises:
        ExtsnapError, OSError: It cannot be taken.
    """
    name = f"{purpose}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
    client.call("server.temporary", name=name)
    made = create(client, directory, name=name, message=f"for extsnap {purpose}", kind="atomic")
    try:
        yield made
    finally:
        try:
            client.call("delete", names=[name], patience=10.0)
        except ExtsnapError as error:
            tools.notice(f"snapshot {name} is left: {error.message}")
