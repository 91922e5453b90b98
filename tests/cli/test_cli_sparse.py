"""``export IMAGE NAME -``: the copy to standard output."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extsnap.cli.transfer import copy_sparse

from .conftest import Call, FakeSession, fake_export_code

MIB = 1 << 20


def sparse_file(path: Path, pieces: dict[int, bytes], size: int) -> bytes:
    """Make a file with holes; returns what it reads as."""
    content = bytearray(size)
    with open(path, "wb") as file:
        for offset, data in pieces.items():
            os.pwrite(file.fileno(), data, offset)
            content[offset : offset + len(data)] = data
        file.truncate(size)
    return bytes(content)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "source"
    pieces = {0: b"start", 3 * MIB: os.urandom(70000), 9 * MIB + 512: b"x" * 512}
    return path, sparse_file(path, pieces, 12 * MIB)


def copy(path: Path, target: int) -> int:
    """Copy and return the sum of what was reported."""
    done: list[int] = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        copy_sparse(descriptor, target, done.append)
    finally:
        os.close(descriptor)
    return sum(done)


def test_a_new_file_gets_the_holes(source: tuple[Path, bytes], tmp_path: Path) -> None:
    path, content = source
    with open(tmp_path / "out", "wb") as out:
        assert copy(path, out.fileno()) == len(content)
    assert (tmp_path / "out").read_bytes() == content
    assert (tmp_path / "out").stat().st_blocks <= path.stat().st_blocks + 16


@pytest.mark.parametrize("mode", ["ab", "r+b"])
def test_old_content_never_shines_through(mode: str, source: tuple[Path, bytes], tmp_path: Path) -> None:
    path, content = source
    old = b"\xaa" * (13 * MIB)
    (tmp_path / "out").write_bytes(old)
    with open(tmp_path / "out", mode) as out:
        copy(path, out.fileno())
    expected = old + content if mode == "ab" else content + old[len(content) :]
    assert (tmp_path / "out").read_bytes() == expected


def test_after_what_was_written_before(source: tuple[Path, bytes], tmp_path: Path) -> None:
    path, content = source
    with open(tmp_path / "out", "wb", buffering=0) as out:
        out.write(b"header")
        copy(path, out.fileno())
        out.write(b"trailer")
    assert (tmp_path / "out").read_bytes() == b"header" + content + b"trailer"


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.integers(0, 60), st.binary(min_size=1, max_size=9000), max_size=5), st.integers(0, 70))
def test_any_layout_is_copied(pieces: dict[int, bytes], blocks: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path, out = Path(directory, "source"), Path(directory, "out")
        layout = {block * 4096: data for block, data in pieces.items()}
        size = max([blocks * 4096 + 7, *(offset + len(data) for offset, data in layout.items())])
        content = sparse_file(path, layout, size)
        with open(out, "wb") as target:
            copy(path, target.fileno())
        assert out.read_bytes() == content


def write_export(pieces: dict[int, bytes], size: int) -> Callable[..., dict[str, Any]]:
    def export(name: str, out: str, force: bool) -> dict[str, Any]:
        assert not force
        assert os.stat(os.path.dirname(out)).st_mode & 0o777 == 0o700
        sparse_file(Path(out), pieces, size)
        return {"version": 1, "name": name, "out": out, "bytes": size}

    return export


def test_export_to_a_pipe_leaves_nothing_behind(
    extsnap: Call, fake: FakeSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    fake.answers["export"] = write_export({0: b"volume\n"}, 20000)
    done = extsnap("export", "IMAGE", "first", "-")
    assert (done.status, done.err) == (0, "")
    assert done.out.encode() == b"volume\n" + bytes(20000 - 7)
    assert fake.calls[0][1]["out"].startswith(str(tmp_path) + "/")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_writes_nothing(extsnap: Call, fake: FakeSession) -> None:
    fake.answers["export"] = OSError(28, "No space left on device")
    done = extsnap("export", "IMAGE", "first", "-")
    assert (done.status, done.out, len(done.error_lines)) == (1, "", 1)


def test_a_terminal_is_refused(terminal: Callable[..., tuple[int, str]]) -> None:
    status, written = terminal("export", "IMAGE", "first", "-", code=fake_export_code(4096))
    assert status == 1
    assert written.count("\n") == 1
    assert "terminal" in written
    assert "export IMAGE NAME - >" in written


def test_a_reader_of_an_export_that_goes_away_is_no_news() -> None:
    import subprocess

    program = f"import sys\n{fake_export_code(4 * MIB)}\nfrom extsnap.cli.app import main\nsys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, "export", "IMAGE", "first", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(30) == 1


def test_stdout_to_a_file_is_sparse(tmp_path: Path) -> None:
    import subprocess

    program = f"import sys\n{fake_export_code(64 * MIB)}\nfrom extsnap.cli.app import main\nsys.exit(main())"
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", program, "export", "IMAGE", "first", "-"], stdout=out, check=True)
    status = (tmp_path / "out").stat()
    assert status.st_size == 64 * MIB
    assert status.st_blocks * 512 < MIB
    digest = hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest()
    assert digest == hashlib.sha256(b"volume" + bytes(64 * MIB - 6)).hexdigest()
