"""Who may do what: runtime directories of others, peers of others, names that lead elsewhere."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import hostile
import pytest
from lab import MemoryDevice

from extsnap.errors import ExtsnapError, ServerError
from extsnap.serve import control
from extsnap.serve.server import Server, ServerConfig
from extsnap.snapshot.export import export
from extsnap.snapshot.volume import Volume


@pytest.mark.parametrize("what", ["link", "open", "file"])
def test_a_runtime_directory_that_is_not_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    place, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if what == "link":
        place.symlink_to(elsewhere)
    elif what == "open":
        place.mkdir()
        place.chmod(0o755)
    else:
        place.write_text("")
    monkeypatch.setenv("EXTSNAP_RUNTIME_DIR", os.fspath(place))
    with pytest.raises(ServerError, match="no runtime directory"):
        control.runtime_directory()
    assert control.records() == []
    assert not list(elsewhere.iterdir())


def test_a_server_hangs_up_on_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(ServerConfig("/image", "/directory", "nothing"))
    path = os.fspath(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        server._listener = listener
        server._listen(True)
        client.settimeout(60)
        client.connect(path)
        monkeypatch.setattr(control, "peer", lambda connection: (1, os.geteuid() + 4711))
        server._accept()
        assert not server._clients
        assert client.recv(1) == b""


def test_a_client_hangs_up_on_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        monkeypatch.setattr(control, "peer", lambda connection: (1, os.geteuid() + 4711))
        with pytest.raises(ServerError, match="another user"):
            control._greet(path)


def test_the_peer_is_who_the_kernel_says() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert control.peer(ours) == (os.getpid(), os.geteuid())


@pytest.mark.parametrize("force", [False, True])
def test_an_export_follows_no_link(tmp_path: Path, force: bool) -> None:
    """With --force the link is replaced; what it leads to stays as it is."""
    precious, out = tmp_path / "precious", tmp_path / "out.img"
    precious.write_text("precious")
    out.symlink_to(precious)
    image = tmp_path / "image"
    image.write_bytes(b"")
    volume = Volume(MemoryDevice(hostile.image()), path=os.fspath(image))
    if force:
        assert export(volume, "one", os.fspath(out), force=True) == out.stat().st_size
        assert not out.is_symlink()
    else:
        with pytest.raises(ExtsnapError, match="exists already"):
            export(volume, "one", os.fspath(out))
    assert precious.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "out.img", "precious"]
