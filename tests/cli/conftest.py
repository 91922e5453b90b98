"""What the tests of the command line share: a way to call it, and a session that only remembers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from extsnap.cli.app import main
from extsnap.serve import attaching, checking, mountpoints, offering, running, session


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return self.err.splitlines()


Call = Callable[..., Outcome]


@pytest.fixture
def extsnap(capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the command line in this process; what its children write is captured as well."""

    def call(*arguments: str) -> Outcome:
        capfd.readouterr()
        try:
            status = main(arguments)
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        out, err = capfd.readouterr()
        return Outcome(status, out, err)

    return call


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[None]:
    """Keep sockets and logs of the tests' servers apart from the machine's, and remove them."""
    with tempfile.TemporaryDirectory(prefix="extsnap-run-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXTSNAP_RUNTIME_DIR", directory)
        yield


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Call the command line as a process of its own, as a user does."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run([sys.executable, "-m", "extsnap.cli.app", *arguments], text=True, timeout=60, **options)


@dataclass
class FakeSession:
    """Stands for ``extsnap.serve.session``: answers what it was told to, or raises it, and remembers the calls."""

    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    opened: list[tuple[str, bool]] = field(default_factory=list)
    partitions: list[int | None] = field(default_factory=list)

    def at(self, partition: int | None) -> FakeSession:
        """Remember which partition was meant."""
        self.partitions.append(partition)
        return self

    def answer(self, verb: str, **arguments: Any) -> Any:
        self.calls.append((verb, arguments))
        answer = self.answers.get(verb, {"version": 1})
        if isinstance(answer, BaseException):
            raise answer
        return answer(**arguments) if callable(answer) else answer

    call = answer

    @property
    def served(self) -> dict[str, Any] | None:
        return None

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    """Replace the session by a fake one."""
    fake = FakeSession()

    def open_session(
        image: str, *, writable: bool, partition: int | None = None, unrecovered: bool = False
    ) -> FakeSession:
        fake.at(partition).opened.append((image, writable))
        answer = fake.answers.get("open")
        if isinstance(answer, BaseException):
            raise answer
        return fake

    monkeypatch.setattr(session, "open_session", open_session)
    monkeypatch.setattr(
        checking,
        "check",
        lambda image, names, quick, *, partition=None: fake.at(partition).answer(
            "check", image=image, names=names, quick=quick
        ),
    )
    monkeypatch.setattr(
        attaching,
        "attach",
        lambda image, directory, *, partition=None, **options: fake.at(partition).answer(
            "attach", image=image, directory=directory, **options
        ),
    )
    monkeypatch.setattr(
        attaching,
        "detach",
        lambda target, *, force=False, partition=None: fake.at(partition).answer("detach", target=target, force=force),
    )
    monkeypatch.setattr(
        mountpoints,
        "mount",
        lambda image, directory, *, partition=None, **options: fake.at(partition).answer(
            "mount", image=image, directory=directory, **options
        ),
    )
    monkeypatch.setattr(mountpoints, "umount", lambda directory: fake.answer("umount", directory=directory))

    def serve(
        image: str, *, ready: Callable[[dict[str, Any]], None], partition: int | None = None, **options: Any
    ) -> None:
        ready(fake.at(partition).answer("serve", image=image, **options))

    monkeypatch.setattr(offering, "serve", serve)
    monkeypatch.setattr(
        running,
        "run",
        lambda image, command, *, atomic=False, ok=frozenset({0}), partition=None: fake.at(partition).answer(
            "run", image=image, command=command, atomic=atomic, ok=ok
        ),
    )
    return fake


@pytest.fixture
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make local time UTC."""
    import time

    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def snapshot(name: str = "first", **changes: Any) -> dict[str, Any]:
    """One snapshot as ``list`` gives it."""
    return {
        "name": name,
        "id": 1,
        "created": "2026-11-22T10:00:00Z",
        "message": "",
        "kind": "manual",
        "consistency": "clean",
        "state": "ok",
        "used_bytes": 5 << 20,
        "copied_bytes": 6144,
        "exclusive_bytes": 4096,
        "shared_bytes": 2048,
        **changes,
    }


@pytest.fixture
def terminal() -> Callable[..., tuple[int, str]]:
    """Call the command line with a pseudo-terminal as output; returns status and what the terminal got."""
    import pty

    def call(*arguments: str, code: str = "", **environment: str) -> tuple[int, str]:
        leader, follower = pty.openpty()
        program = f"import sys\n{code}\nfrom extsnap.cli.app import main\nsys.exit(main())"
        environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
        child = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=follower,
            stderr=follower,
            env={key: value for key, value in environ.items() if value},
        )
        os.close(follower)
        pieces: list[bytes] = []
        try:
            while piece := os.read(leader, 65536):
                pieces.append(piece)
        except OSError:
            pass  # EIO: the other end is closed
        finally:
            os.close(leader)
        return child.wait(timeout=30), b"".join(pieces).decode()

    return call


def fake_export_code(size: int) -> str:
    """Code for a process of its own whose session exports an image of ``size`` bytes."""
    return f"""
from extsnap.serve import session
class Fake:
    served = None
    def call(self, verb, name, out, force):
        with open(out, "wb") as file:
            file.write(b"volume")
            file.truncate({size})
        return {{"version": 1, "name": name, "out": out, "bytes": {size}}}
    def __enter__(self): return self
    def __exit__(self, *exception): pass
session.open_session = lambda image, **options: Fake()
"""
