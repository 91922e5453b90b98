"""Starting servers: with what, for whom, and for how long.

Whatever is started here is ended by who asked for it, also on errors and Ctrl-C: a server whose keeper hangs up ends
with its last user.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from extsnap.errors import ImageReadOnly, VolumeBusy
from extsnap.ext.locate import Place
from extsnap.serve import control, remote, session
from extsnap.serve.private import Private
from extsnap.serve.server import ServerConfig
from extsnap.serve.session import key_of


def config(place: Place, directory: str, **options: Any) -> ServerConfig:
    """What a server of this volume in this directory is started with."""
    return ServerConfig(
        image=os.path.realpath(place.path),
        directory=directory,
        factory=session.FACTORY,
        partition=place.partition,
        offset=place.offset,
        **options,
    )


def private(place: Place, **options: Any) -> Private:
    """Start a server of our own, which ends with its last user.

    Raises:
        ExtsnapError, OSError: What it could not start for.
    """
    return Private(lambda directory: config(place, directory, private=True, auto_end=True, **options))


def refuse_served(place: Place) -> None:
    """Refuse a volume that a server has.

    Raises:
        VolumeBusy: One has; names where.
    """
    served = control.connect(key_of(place))
    if served is not None:
        client, hello = served
        client.close()
        raise VolumeBusy(
            f"{place.name} is already served at {hello['directory']} (pid {hello['pid']})",
            hint=f"use it there, or run extsnap detach {place.name}",
        )


def start_for(place: Place, *, lazy: bool, live: bool = False, set_up: bool = False) -> Private:
    """A server for a mount or for NBD; a snapshot of an image that we may not write is served all the same."""
    try:
        return private(place, lazy=lazy, live=live, set_up=set_up)
    except ImageReadOnly:
        if not lazy:
            raise
        return private(place, writable=False)


@contextlib.contextmanager
def served_for_reading(place: Place) -> Iterator[Private]:
    """A server that changes nothing."""
    server = private(place, writable=False)
    try:
        yield server
    except BaseException:
        server.abandon()
        raise
    server.end()


@contextlib.contextmanager
def layer_at_rest(place: Place) -> Iterator[str]:
    """A throw-away layer over a volume that nobody serves."""
    with served_for_reading(place) as server, remote.scratch(server.keeper, server.directory) as path:
        yield path
