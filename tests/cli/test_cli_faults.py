"""System calls on the image that fail, under every command: one line that says what, where and what next."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lab
import numpy as np
import pytest

from extsnap.blockdev import image as image_module

Call = Callable[..., Any]

READING = ["list I", "show I two", "info I", "dump I records", "export I two O", "export I two -", "set I"]
WRITING = [
    "create I three",
    "delete I one",
    "delete I one two",
    "restore I one",
    "restore I one --no-safety",
    "strip I",
    "set I on-full=drop-oldest",
    "guard I off",
]


class FaultySystem:
    """`os`, but the Nth of some calls on an image fails; the rest is passed on.

    Attributes:
        failed: Whether one did.
    """

    def __init__(self, calls: tuple[str, ...], fail_at: int, how: int | str) -> None:
        self._calls, self._left, self._how = calls, fail_at, how
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self._calls:
            return real

        def call(*arguments: Any) -> Any:
            self._left -= 1
            if self._left and not (self._how == "end" and self._left < 0):
                return real(*arguments)
            self.failed = True
            if isinstance(self._how, int):
                raise OSError(self._how, os.strerror(self._how))
            if self._how == "end":  # as of a file that somebody cut
                return b"" if name == "pread" else 0
            return self._half(name, real, arguments)

        return call

    @staticmethod
    def _half(name: str, real: Any, arguments: tuple[Any, ...]) -> Any:
        descriptor, what, offset = arguments
        if name == "pread":
            return real(descriptor, what // 2, offset)
        if name == "preadv":
            return real(descriptor, [what[0][: len(what[0]) // 2]], offset) if len(what[0]) > 1 else real(*arguments)
        return real(descriptor, memoryview(what)[: max(1, len(what) // 2)], offset)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with two snapshots, and content that differs."""
    from extsnap.snapshot.volume import Volume

    path = tmp_path_factory.mktemp("faults") / "disk.img"
    content = lab.plain_image("ext4")
    path.write_bytes(content)
    with Volume.open(path, writable=True) as volume:
        volume.create("one")
        volume.begin_serving()
        for block in np.flatnonzero(lab.survey(content).files)[:100].tolist():
            volume.write(block * 1024, bytes([block % 251]) * 1024)
        volume.end_serving()
        volume.create("two")
    return path


READS, WRITES = ("pread", "preadv"), ("pwrite", "fdatasync")
FAULTS = [
    *((command, READS, how) for command in READING for how in (errno.EIO, "end", "half")),
    *((command, READS, how) for command in WRITING[:4] for how in (errno.EIO, "half")),
    *((command, WRITES, how) for command in WRITING for how in (errno.EIO, errno.ENOSPC)),
    *((command, ("pwrite",), "half") for command in WRITING),
]


@pytest.mark.parametrize(("command", "calls", "how"), FAULTS)
def test_a_system_call_that_fails(
    command: str,
    calls: tuple[str, ...],
    how: int | str,
    kept: Path,
    tmp_path: Path,
    call_cli: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half a transfer is made whole; what fails is told in one line, and the next command works."""
    words = [word.replace("I", str(tmp_path / "disk.img")) if word == "I" else word for word in command.split()]
    words = [str(tmp_path / "out.img") if word == "O" else word for word in words]
    fail_at, tried = 1, 0
    while True:
        for file in (tmp_path / "disk.img", tmp_path / "out.img"):
            file.unlink(missing_ok=True)
        shutil.copyfile(kept, tmp_path / "disk.img")
        system = FaultySystem(calls, fail_at, how)
        monkeypatch.setattr(image_module, "os", system)
        done = call_cli(*words, status=None)
        monkeypatch.undo()
        if not system.failed:
            assert done.returncode == 0
            break
        tried += 1
        fail_at = fail_at * 3 // 2 + 1
        if how == "half":
            assert done.returncode == 0, done.stderr
            continue
        assert done.returncode == 1, f"{fail_at}: {done.stdout}{done.stderr}"
        assert done.stdout == "" or "export" in command
        last = done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert str(tmp_path / "disk.img") in last
        assert "byte" in last, last
        assert "; " in last, f"no next step in {last}"
        assert not (tmp_path / "out.img").exists(), "half an export looks like a whole one"
        call_cli("create", tmp_path / "disk.img", "next")
        checked = call_cli("check", "--quick", tmp_path / "disk.img", status=None)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert tried, "nothing failed: this shows nothing"
