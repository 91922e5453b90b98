"""The client side of one command: what the command line calls.

An image is served or at rest.  ``open_session`` hides which: if a server answers for the image, it
carries out the command; else the volume is opened here, after its journal was replayed if it must be.
Modules that start servers (`starting`) are imported where they are needed: most commands need none.
"""

from __future__ import annotations

import time
from typing import Any

from extsnap.errors import NeedsRecovery, VolumeBusy, VolumeFull
from extsnap.ext.locate import Place, locate
from extsnap.serve import control, tools
from extsnap.serve.contract import DEFAULT_FACTORY, EngineVolume, load_factory
from extsnap.serve.control import ControlClient

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
            from extsnap.serve import live, remote

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
        from extsnap.serve import mounting

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
    place = place_of(image, partition)
    attempts = 4
    while True:
        attempts -= 1
        served = control.connect(key_of(place))
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
        from extsnap.serve import recovering

        if not attempts:
            raise recovering.GaveUp.of(place.name)
        try:
            recovering.recover(place)
        except (NeedsRecovery, VolumeFull) as error:
            if not unrecovered:
                raise
            tools.notice(f"{error.message}; going on without recovery")
            return Session(image, client=None, volume=factory(image, writable=True, partition=place.partition))


def place_of(image: str, partition: int | None) -> Place:
    """Find the volume, and say what is wrong with the partition table if it could be found all the same."""
    place = locate(image, partition)
    if place.warning:
        tools.notice(f"{image}: {place.warning}")
    return place


def key_of(place: Place) -> control.ImageKey:
    """What servers of this volume are known by."""
    return control.image_key(place.path, place.offset)
