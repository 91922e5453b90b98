"""Answers that are spliced: whole and right, or not sent at all."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from extsnap.serve.splice import MOST_BYTES, Splice

CONTENT = random.Random(1).randbytes(3 << 20)
HEAD = bytearray(b"sixteen bytes...")
_F_SETPIPE_SZ = 1031


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def connection() -> Iterator[tuple[int, int]]:
    """(where answers arrive, where they are sent to), with room for the largest one."""
    ends = os.pipe()
    fcntl.fcntl(ends[0], _F_SETPIPE_SZ, 1 << 20)
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


def arrived(end: int) -> bytes:
    found = bytearray()
    while True:
        try:
            found += os.read(end, 1 << 20)
        except BlockingIOError:
            return bytes(found)


def pipes() -> int:
    return sum(os.readlink(entry).startswith("pipe:") for entry in Path("/proc/self/fd").iterdir() if entry.exists())


@pytest.mark.parametrize("size", [1, 4096, 300_000, MOST_BYTES])
def test_header_and_bytes_in_one_piece(image: int, connection: tuple[int, int], size: int) -> None:
    splice = Splice(connection[1])
    for offset in (0, 4096, 12_345, len(CONTENT) - size):
        assert splice.send(HEAD, image, offset, size)
        assert arrived(connection[0]) == HEAD + CONTENT[offset : offset + size]
    splice.close()


def test_what_comes_short_is_not_sent(image: int, connection: tuple[int, int]) -> None:
    """And leaves nothing behind for the next answer."""
    before, splice = pipes(), Splice(connection[1])
    for _ in range(3):
        assert not splice.send(HEAD, image, len(CONTENT) - 5000, 6000)
        assert not splice.send(HEAD, image, len(CONTENT), 4096)
        assert arrived(connection[0]) == b""
        assert splice.send(HEAD, image, 4096, 8192)
        assert arrived(connection[0]) == HEAD + CONTENT[4096 : 4096 + 8192]
    assert splice.most == MOST_BYTES
    splice.close()
    assert pipes() == before


def test_a_connection_that_takes_no_splice(image: int, tmp_path: Path) -> None:
    """A file that is appended to takes none: the kernel says EINVAL, and nothing is tried again."""
    path = tmp_path / "log"
    end = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    before, splice = pipes(), Splice(end)
    assert not splice.send(HEAD, image, 0, 4096)
    assert splice.most == 0
    assert path.read_bytes() == b""
    assert pipes() == before
    os.close(end)


def test_a_user_with_too_many_pipes(image: int, connection: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a pipe stays small (EPERM), and would take part of an answer."""

    def small(*_: object) -> int:
        raise PermissionError(1, "too many pages in pipes")

    before, splice = pipes(), Splice(connection[1])
    monkeypatch.setattr(fcntl, "fcntl", small)
    assert not splice.send(HEAD, image, 0, 4096)
    assert splice.most == 0
    assert pipes() == before


def test_an_error_of_the_disk_is_left_to_who_copies(
    image: int, connection: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> int:
        raise OSError(5, "a sector cannot be read")

    splice = Splice(connection[1])
    with monkeypatch.context() as patched:
        patched.setattr(os, "splice", broken)
        assert not splice.send(HEAD, image, 0, 4096)
    assert splice.send(HEAD, image, 0, 4096)
    assert arrived(connection[0]) == HEAD + CONTENT[:4096]
    splice.close()


def test_a_connection_that_is_gone(image: int) -> None:
    ends = os.pipe()
    os.close(ends[0])
    before, splice = pipes(), Splice(ends[1])
    with pytest.raises(BrokenPipeError):
        splice.send(HEAD, image, 0, 4096)
    assert pipes() == before
    os.close(ends[1])
