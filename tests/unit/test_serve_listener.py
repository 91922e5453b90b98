"""The server's listener: clients for whom there is no place wait in its queue, and cost nothing there."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

from extsnap.serve.server import Server, ServerConfig


def test_without_place_for_a_client_the_listener_is_left_alone(tmp_path: Path) -> None:
    """A listener that is looked at without being accepted from would wake the server again and again."""
    path = os.fspath(tmp_path / "socket")
    server = Server(ServerConfig("/image", "/directory", "nothing"))
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as one,
        socket.socket(socket.AF_UNIX) as two,
    ):
        listener.bind(path)
        listener.listen()
        server._listener, server._most_clients = listener, 1
        server._listen(True)

        def waiting() -> bool:
            return (listener.fileno(), select.POLLIN) in server._poll.poll(0)

        one.connect(path)
        assert waiting()
        server._accept()
        assert len(server._clients) == 1
        two.connect(path)
        assert waiting()
        server._accept()
        assert len(server._clients) == 1
        assert not waiting(), "it is woken for a client that it does not take"
        (first,) = server._clients.values()
        server._drop(first)
        server._make_place()
        assert waiting()
        server._accept()
        (second,) = server._clients.values()
        assert second is not first
        server._drop(second)
