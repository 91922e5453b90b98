"""System calls on the image that fail, under every command: one line that says what, where and what next."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lab
import numpy as np
import pytest
from arena import arena

from extsnap.blockdev import image as image_module
from extsnap.snapshot import export as export_module
from extsnap.snapshot.volume import Volume

Call = Callable[..., Any]

READING = [
    "list I",
    "show I two",
    "info I",
    "dump I records",
    "export I two O",
    "export I two -",
    "set I",
    "check --quick I",
]
WRITING = [
    "create I three",
    "delete I one",
    "delete I one two",
    "restore I one",
    "restore I one --no-safety",
    "restore I --undo",
    "strip I",
    "set I on-full=drop-oldest",
    "guard I off",
]
#: I is an image at rest, D was written outside extsnap, M was being served when the power failed.
BEGUN = ["accept D", "create M three", "delete M one", "restore M one", "strip M"]


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
def memory() -> Iterator[Path]:
    with arena() as top:
        yield top


@pytest.fixture
def tmp_path(memory: Path) -> Iterator[Path]:
    """Where no barrier waits for a disk: there are thousands of them."""
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture(scope="module", params=["ext4"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of images with two snapshots and content that differs, in the states that `BEGUN` names."""
    top = tmp_path_factory.mktemp("faults")
    path = top / "I"
    content = lab.plain_image(request.param)
    path.write_bytes(content)
    blocks = np.flatnonzero(lab.survey(content).files)[:100].tolist()
    with Volume.open(path, writable=True) as volume:
        volume.create("one")
        volume.begin_serving()
        for block in blocks:
            volume.write(block * 1024, bytes([block % 251]) * 1024)
        volume.end_serving()
        volume.create("two")
        volume.verb("restore", name="two")  # for an undo
    (top / "D").write_bytes(lab.changed_by_debugfs(path.read_bytes(), "ssv mkfs_time 1600000000"))
    volume = Volume.open(path, writable=True)
    volume.begin_serving()
    for block in blocks[::3]:
        volume.write(block * 1024, bytes([block % 241]) * 1024)
    volume.flush()
    (top / "M").write_bytes(path.read_bytes())
    volume.end_serving()
    volume.close()
    return top


@pytest.fixture(scope="module")
def views(kept: Path) -> dict[str, bytes]:
    """What the snapshots read as: by the copies that they are, not by what a faulty command says."""
    with Volume.open(kept / "I") as volume:
        return {name: volume.open_view(name).pread(0, volume.size) for name in ("one", "two")}


READS, WRITES = ("pread", "preadv"), ("pwrite", "fdatasync")
FAULTS: list[tuple[str, str, tuple[str, ...], int | str]] = [
    *(("ext4", command, READS, how) for command in READING for how in (errno.EIO, "end", "half")),
    *(("ext4", command, READS, how) for command in [*WRITING[:6], *BEGUN[:2]] for how in (errno.EIO, "half")),
    *(("ext4", command, WRITES, how) for command in WRITING + BEGUN for how in (errno.EIO, errno.ENOSPC)),
    *(("ext4", command, ("pwrite",), "half") for command in WRITING + BEGUN[:2]),
    *(("ext2", command, WRITES, errno.EIO) for command in WRITING + BEGUN),
    *(("ext2", command, READS, errno.EIO) for command in READING),
]


@pytest.mark.parametrize(("kept", "command", "calls", "how"), FAULTS, indirect=["kept"], scope="module")
def test_a_system_call_that_fails(
    command: str,
    calls: tuple[str, ...],
    how: int | str,
    kept: Path,
    views: dict[str, bytes],
    tmp_path: Path,
    call_cli: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half a transfer is made whole; what fails is told in one line, the next command works, nothing is lost."""
    image = next(word for word in command.split() if word in {"I", "D", "M"})
    places = {image: str(tmp_path / "disk.img"), "O": str(tmp_path / "out.img")}
    words = [places.get(word, word) for word in command.split()]
    fail_at, tried = 1, 0
    while True:
        for file in (tmp_path / "disk.img", tmp_path / "out.img"):
            file.unlink(missing_ok=True)
        shutil.copyfile(kept / image, tmp_path / "disk.img")
        system = FaultySystem(calls, fail_at, how)
        monkeypatch.setattr(image_module, "os", system)
        done = call_cli(*words, status=None)
        monkeypatch.undo()
        if not system.failed:
            assert done.returncode == 0
            break
        tried += 1
        at, fail_at = fail_at, fail_at + 1 if os.environ.get("EXTSNAP_LONG") else fail_at * 2 + 1
        if how == "half":
            assert done.returncode == 0, done.stderr
            continue
        assert done.returncode == 1, f"{at}: {done.stdout}{done.stderr}"
        assert done.stdout == "" or "export" in command
        assert len(done.stderr.splitlines()) == 1, done.stderr
        last = done.stderr.splitlines()[-1]
        assert str(tmp_path / "disk.img") in last
        assert "byte" in last, last
        assert "; " in last, f"no next step in {last}"
        assert not (tmp_path / "out.img").exists(), "half an export looks like a whole one"
        if image == "D":
            call_cli("accept", tmp_path / "disk.img")
        call_cli("create", tmp_path / "disk.img", "next")
        checked = call_cli("check", "--quick", "--json", tmp_path / "disk.img", status=None)
        verdicts = json.loads(checked.stdout)
        assert verdicts["ok"] or image == "D", checked.stdout + checked.stderr
        require_views(tmp_path / "disk.img", views, gone=command)
    assert tried, "nothing failed: this shows nothing"


def require_views(image: Path, views: dict[str, bytes], *, gone: str) -> None:
    """Every snapshot is there and exact, but for those that the command was to delete: all of them are, or none."""
    words = gone.split()
    doomed = set(views) if words[0] == "strip" else set(words[2:]) if words[0] == "delete" else set()
    with Volume.open(image) as volume:
        there = set(volume.snapshot_names()) & set(views)
        assert there in (set(views), set(views) - doomed)
        for name in there:
            # What was written outside is the superblock: of that no snapshot had a copy.
            first = 2048 if gone.startswith("accept") else 0
            view = volume.open_view(name).pread(first, volume.size - first)
            assert view == views[name][first:], f"{name} has changed"


@pytest.mark.parametrize("how", [errno.ENOSPC, errno.EIO, "half"])
@pytest.mark.parametrize("old", [False, True])
def test_the_place_of_an_export_fails(
    how: int | str, old: bool, kept: Path, tmp_path: Path, call_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem that gets full takes half of a write first; the error names it and not the image."""
    whole, out = tmp_path / "whole.img", tmp_path / "out.img"
    call_cli("export", kept / "I", "two", whole)
    fail_at = 1
    while True:
        out.unlink(missing_ok=True)
        if old:
            out.write_bytes(b"old")
        system = FaultySystem(("pwrite", "fsync"), fail_at, how)
        if how == "half":
            system = FaultySystem(("pwrite",), fail_at, how)
        monkeypatch.setattr(export_module, "os", system)
        done = call_cli("export", kept / "I", "two", out, *(["--force"] if old else []), status=None)
        monkeypatch.undo()
        if done.returncode:
            assert isinstance(how, int)
            (line,) = done.stderr.splitlines()
            assert f" of {out} failed: " in line
            assert "writing" in line or "flushing" in line
            assert "; " in line
            assert out.read_bytes() == b"old" if old else not out.exists()
            assert {path.name for path in tmp_path.iterdir()} <= {"whole.img", "out.img"}
        else:
            assert out.read_bytes() == whole.read_bytes(), f"half of write {fail_at} is missing, and nothing was said"
        if not system.failed:
            break
        assert done.returncode or how == "half"
        fail_at += 1
    assert fail_at > 2


def test_what_gets_the_name_of_an_export_meanwhile_stays(
    kept: Path, tmp_path: Path, call_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --force nothing is replaced, also not a file that came after the look whether there is one."""
    out = tmp_path / "out.img"

    class Meanwhile:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            out.write_bytes(b"somebody else's")
            os.fsync(descriptor)

    monkeypatch.setattr(export_module, "os", Meanwhile())
    done = call_cli("export", kept / "I", "two", out, status=1)
    assert f"{out} exists already" in done.stderr
    assert out.read_bytes() == b"somebody else's"
    assert list(tmp_path.iterdir()) == [out]


CUT = ["list I", "show I two", "info I", "export I two O", "check --quick I", "create I three", "restore I one"]


@pytest.mark.parametrize("command", CUT)
def test_an_image_that_was_cut(
    command: str, kept: Path, views: dict[str, bytes], tmp_path: Path, call_cli: Call
) -> None:
    """What is not there any more is an error, never zeros; and what is there is not changed."""
    size = (kept / "I").stat().st_size
    image, out = tmp_path / "disk.img", tmp_path / "out.img"
    words = [{"I": str(image), "O": str(out)}.get(word, word) for word in command.split()]
    for length in (0, 1000, 1536, 5000, 60_000, size // 2, size - 300_000, size - 1024, size - 1):
        content = (kept / "I").read_bytes()[:length]
        image.write_bytes(content)
        done = call_cli(*words, status=None)
        assert done.returncode in (1, 3), f"{length}: {done.stdout}"
        assert not out.exists()
        if done.returncode == 1:
            assert done.stdout == ""
            (line,) = done.stderr.splitlines()
            assert str(image) in line
            assert "; " in line
        assert image.read_bytes() == content
        with open(image, "r+b") as file:  # as the error says
            file.seek(length)
            file.write((kept / "I").read_bytes()[length:])
        require_views(image, views, gone="nothing")
