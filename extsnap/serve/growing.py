"""The server's part in growth through a kernel mount: it passes on requests and answers, and never waits for either.

Between two turns of the request loop the volume is asked what it wants (`extsnap.snapshot.growth`), the grower is
told, and what it answered is made true a piece at a time.
"""

from __future__ import annotations

import contextlib
import select
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extsnap.errors import ExtsnapError
from extsnap.serve import control
from extsnap.serve.grower import Grower

if TYPE_CHECKING:
    from extsnap.serve.fuse import FuseFiles
    from extsnap.serve.server import Server
    from extsnap.snapshot.growth import Growth

#: Requests between two looks at the room, while a kernel mount may use it up.
_BURST = 64
_PAUSED_MS = 200
_PATIENCE = 10.0  # seconds
_PARKED_MS = 20
#: Seconds for which a write waits for room.  Growth that itself waits for that write would never come.
_PARKED_SECONDS = 5.0


@dataclass
class _Holder:
    """Who waits for room for its snapshot, and once answered was promised that nothing grows until it is made."""

    client: control.Connection
    result: dict[str, Any]
    deadline: float
    answered: bool = False


class Growing:
    """Growth of the store of one server's volume."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._grower: Grower | None = None
        self._poll: select.poll | None = None
        self._watching = False
        self._told_mounted = False
        self._asked_for_parked = False
        self._next_late: float | None = None
        self._holders: dict[int, _Holder] = {}

    @property
    def _growth(self) -> Growth | None:
        volume = self._server.volume
        return volume.growth if volume is not None and self._grower is not None else None

    @property
    def under_way(self) -> bool:
        """Whether the grower has the mount, or what it brought is not taken in yet.

        A filesystem that is unmounted meanwhile goes when the grower is done; its answer comes in any case.
        """
        growth = self._growth
        return growth is not None and growth.under_way

    @property
    def descriptor(self) -> int:
        """For poll; -1 if there is no grower."""
        return self._grower.fileno() if self._grower is not None else -1

    def start(self, others: list[int]) -> None:
        """Start the grower, before anything else is opened; ``others`` are what it must not keep."""
        self._grower = Grower.start(others)

    def drop(self) -> None:
        """Nobody has the volume any more who was asked for something: what they gave counts no more."""
        growth = self._growth
        if growth is not None:
            growth.drop()

    def watch(self, poll: select.poll) -> None:
        """Listen to it."""
        self._poll = poll
        if self._grower is not None:
            poll.register(self._grower.fileno(), select.POLLIN)

    def close(self) -> None:
        """Hang up on it."""
        self._holders.clear()
        grower, self._grower = self._grower, None
        if grower is not None:
            if self._poll is not None:
                self._poll.unregister(grower.fileno())
            grower.close()

    def burst(self, most: int) -> int:
        """How many requests to serve before the next `turn`."""
        return _BURST if self._told_mounted else most

    def timeout(self, waiting: int | None) -> int | None:
        """Milliseconds that the loop may sleep; ``waiting``: what it would do without us."""
        growth = self._growth
        if growth is None:
            return waiting
        if growth.at_work:
            return 0
        limits = [] if waiting is None else [waiting]
        if self._next_late is not None:
            limits.append(int(self._next_late * 1000) + 1)
        if self._holders:
            limits.append(50)
        if self._server.files is not None and self._server.files.parked_seconds is not None:
            limits.append(_PARKED_MS)
        if growth.is_paused:
            limits.append(_PAUSED_MS)
        return min(limits, default=None)

    def hear(self) -> None:
        """Take in what the grower says."""
        grower = self._grower
        if grower is None:
            return
        messages = grower.receive()
        growth = self._growth
        if messages is None:
            self._server.log("the process that grows the store is gone: it does not grow any more")
            if growth is not None:
                growth.forget()
            self.close()
            return
        for message in messages:
            if "do" in message and growth is not None:
                try:
                    wrong = growth.take(message)
                except (ExtsnapError, OSError) as error:
                    wrong = f"the store did not grow: {error}"
                    growth.pause()
                if wrong:
                    self._server.log(wrong)

    def turn(self) -> None:
        """What there is to do between two turns of the loop."""
        files, growth, grower = self._server.files, self._growth, self._grower
        if files is None or growth is None or grower is None:
            self._told_mounted = False
            if files is not None and files.parked_seconds is not None:
                files.hope = None
                files.try_parked()
            return
        if not self._watching:
            self._watching = self._tell(self._where(growth))
        if grower.mounted != growth.mounted:
            self._told_mounted = grower.mounted
            growth.limited = grower.limited
            with contextlib.suppress(ExtsnapError, OSError):  # what watches it could not be read: the next command does
                growth.note_mount(grower.mounted)
        files.lag = growth.lag if growth.mounted else None
        growth.hope = growth.mounted
        files.hope = lambda waited: growth.hope and waited < _PARKED_SECONDS
        waits = files.parked_seconds is not None
        if waits and not self._asked_for_parked:
            growth.look_again()  # the filesystem may have more to give by now
        self._asked_for_parked = waits
        stepped = growth.at_work
        try:
            request = growth.step() if stepped else growth.due()
        except (ExtsnapError, OSError) as error:
            self._server.log(f"the store did not grow: {error}")
            growth.pause()
            request = None
        if request is not None and not self._tell(request):
            growth.forget()
        if files.parked_seconds is not None:
            self._try_parked(files, growth, stepped, files.parked_seconds)
        # After what was asked: between two growths nobody is let off.
        self._next_late = files.acknowledge_late(lambda: growth.at_work or growth.is_waited_for())
        if self._holders:
            self._answer_holders(growth)

    def _try_parked(self, files: FuseFiles, growth: Growth, stepped: bool, waited: float) -> None:
        """Requests that found no room are tried again whenever there is more, and once more when no more will come."""
        growth.hope = stepped or growth.is_coming
        if stepped or not growth.hope or waited >= _PARKED_SECONDS:
            files.try_parked()
        growth.hope = growth.mounted

    def _tell(self, request: dict[str, Any]) -> bool:
        return self._grower is not None and self._grower.send(request)

    def _where(self, growth: Growth) -> dict[str, Any]:
        config = self._server.config
        return {
            "do": "watch",
            "file": f"{config.directory}/volume",
            "disk": f"{config.directory}/disk" if config.partition else "",
            "partition": config.partition,
            "directory": str(config.directory),
            "limit": growth.reserve.dirty_bytes,
            "cached": growth.reserve.cached_bytes,
        }

    # ---- room for a snapshot, before a freeze

    def provision(self, client: control.Connection, result: dict[str, Any]) -> dict[str, Any] | None:
        """Answer ``result`` when there is room for a snapshot and what may be in flight, and nothing is growing.

        From the answer on nothing grows until this client has sent ``create`` or hung up: growth would wait for the
        thaw.  With it comes ``provided``: whether the snapshot's own tables have room.  Growth that does not end (the
        filesystem is frozen already) is waited for only so long.

        Returns:
            The answer, or None if it is given later.
        """
        growth = self._growth
        if growth is None:
            return result
        growth.provision()
        self._holders[id(client)] = _Holder(client, result, time.monotonic() + _PATIENCE)
        self._answer_holders(growth)
        return None

    def _answer_holders(self, growth: Growth) -> None:
        done = growth.is_provided
        for holder in self._holders.values():
            if holder.answered or not (done or time.monotonic() > holder.deadline):
                continue
            holder.answered = growth.held_back = True
            holder.client.answer(holder.result | {"provided": growth.has_room_for_snapshot})
            self._server.watch(holder.client)

    def release(self, client: control.Connection) -> None:
        """A client is gone, or has what it wanted."""
        if self._holders.pop(id(client), None) is None or self._growth is None:
            return
        self._growth.held_back = any(holder.answered for holder in self._holders.values())
        if not self._holders:
            self._growth.provided()

    def commanded(self, client: control.Connection, verb: str) -> None:
        """A command was carried out: what is needed may be more or less."""
        if verb == "create":
            self.release(client)
        growth = self._growth
        if growth is not None:
            if verb in ("delete", "strip"):
                growth.shrink()
            else:
                growth.look_again()
