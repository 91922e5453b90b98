"""``serve``: the base volume or a snapshot for clients of NBD, for as long as the command runs."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from extsnap.errors import ServerError, VolumeBusy
from extsnap.serve import control, mounting, nbd, remote
from extsnap.serve.control import ControlClient
from extsnap.serve.mountpoints import require_snapshot
from extsnap.serve.recovering import replay
from extsnap.serve.session import key_of, place_of
from extsnap.serve.starting import start_for


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
    offer = nbd.Offer(snapshot, scratch, nbd.choose(program), address.tls)
    place = place_of(image, partition)
    # The address first: one that cannot be had leaves everything as it is.
    with nbd.listening(address) as (listener, uri):
        about = {"uri": uri, "program": offer.program, "read_only": offer.read_only}
        told = functools.partial(ready, about)
        served = control.connect(key_of(place))
        if served is not None:
            client, hello = served
            with client:
                _serve_from(client, hello, offer, listener, told)
            return
        # A machine has the volume, not the kernel here: the store cannot grow with it, and has all of its room now.
        server = start_for(place, lazy=snapshot is not None, set_up=snapshot is None)
        try:
            if server.hello["needs_replay"]:
                replay(place.name, server.keeper, server.directory)
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
    directory = str(hello["directory"])
    with contextlib.ExitStack() as stack:
        if offer.snapshot is None:
            file = os.path.join(directory, "volume")
            if users := mounting.users_of(file) + mounting.users_of(os.path.join(directory, "disk")):
                raise VolumeBusy(f"volume is in use: {', '.join(users)}", hint="unmount or close it first")
        elif offer.scratch:
            file = stack.enter_context(remote.scratch(client, directory, offer.snapshot))
        else:
            file = require_snapshot(directory, offer.snapshot)
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
