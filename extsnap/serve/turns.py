"""Who has the turn to take a snapshot, or to have the volume for itself: one client of a server after the other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extsnap.errors import ExtsnapError
from extsnap.serve import control, processes

if TYPE_CHECKING:
    from extsnap.serve.server import Server


@dataclass(frozen=True)
class _Wish:
    client: control.Connection
    alone: bool
    only: bool


class Turns:
    """The turns of one server's clients."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._holder: control.Connection | None = None
        self._waiting: deque[_Wish] = deque()

    def take(self, client: control.Connection, *, alone: bool, only: bool) -> dict[str, Any] | None:
        """Give a client the turn, until `end`; None if others are before it: then it is answered when it has it.

        Args:
            client: Who asks.
            alone: It is refused if anybody has the volume open.
            only: Meanwhile nobody opens the volume but that client and the processes that it started.

        Returns:
            ``in_use``: the file that others have open for writing, or None.

        Raises:
            VolumeBusy: See ``alone``.
        """
        files = self._server.files
        assert files is not None
        if alone and files.volume_opens:
            raise self._server.busy([files.base_name], "this needs the volume for itself", "unmount or close it first")
        if self._holder is not None and self._holder is not client:
            self._waiting.append(_Wish(client, alone, only))
            return None
        self._holder = client
        if only:
            files.only = lambda pid: processes.is_of(pid, client.pid)
        return {"in_use": files.base_name if self._server.in_use() else None}

    def end(self, client: control.Connection) -> None:
        """A client has done what it wanted, or is gone: the next one has the turn."""
        self._waiting = deque(wish for wish in self._waiting if wish.client is not client)
        if self._holder is not client:
            return
        self._holder = None
        if self._server.files is not None:
            self._server.files.only = None
        while self._waiting and self._holder is None:
            wish = self._waiting.popleft()
            try:
                result = self.take(wish.client, alone=wish.alone, only=wish.only)
            except ExtsnapError as error:
                wish.client.refuse(error)
            else:
                assert result is not None
                wish.client.answer(result)
            self._server.watch(wish.client)
