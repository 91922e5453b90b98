"""Scattered reads: all of them arrive, and a disk that makes one wait is told of the rest at once."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest

from extsnap.blockdev import image as module
from extsnap.blockdev.base import Pieces
from extsnap.blockdev.durable import Durable
from extsnap.blockdev.image import ImageFile
from extsnap.snapshot.medium import Medium

CONTENT = bytes(itertools.islice(itertools.cycle(range(251)), 1 << 16))
PLACES = [(5 * 4096, 4096), (0, 512), (9 * 4096, 8192)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096) + CONTENT)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Ranges that the host was told of."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, length, __: told.append((offset, length)))
    return told


def read(path: Path) -> list[bytes]:
    """Through all layers that a volume has below it; the device begins 4,096 bytes into the file."""
    with ImageFile(str(path), start=4096, length=len(CONTENT)) as below:
        offsets, lengths = np.array(PLACES).T
        pieces = Pieces(offsets, lengths, np.cumsum(lengths) - lengths, memoryview(bytearray(sum(lengths))))
        Medium(Durable(below)).read_pieces(pieces)
        return [bytes(buffer) for _, buffer in pieces]


def test_a_disk_that_is_slow_is_given_the_rest_at_once(
    image: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: not again after each slow read."""
    clock = itertools.count(0, 1)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert read(image) == [CONTENT[offset : offset + length] for offset, length in PLACES]
    assert asked == [(4096 + offset, length) for offset, length in PLACES[1:]]


def test_what_is_in_the_cache_is_just_read(
    image: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Telling the host costs as much as reading."""
    monkeypatch.setattr(module.time, "perf_counter", lambda: 0.0)
    assert read(image) == [CONTENT[offset : offset + length] for offset, length in PLACES]
    assert asked == []


def test_a_hint_that_is_refused_is_no_error(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some filesystems take none."""

    def refuse(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    clock = itertools.count(0, 1)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert read(image)[1] == CONTENT[:512]


def test_all_pieces_are_written_and_what_goes_wrong_is_said_as_of_one(image: Path) -> None:
    offsets, lengths = np.array(PLACES).T
    data = memoryview(random.Random(1).randbytes(sum(lengths)))
    pieces = Pieces(offsets, lengths, np.cumsum(lengths) - lengths, data)
    with ImageFile(str(image), start=4096, length=len(CONTENT), writable=True) as below:
        below.write_pieces(pieces)
        for offset, part in pieces:
            assert below.pread(offset, len(part)) == part
        outside = Pieces(np.array([0, 1 << 16]), np.array([4096, 512]), np.array([0, 4096]), data)
        before = below.pread(0, 4096)
        for call in (below.write_pieces, below.read_pieces):
            with pytest.raises(OSError, match=r"ing 512 bytes.*69632"):
                call(Pieces(outside.offsets, outside.lengths, outside.at, memoryview(bytearray(8192))))
        assert below.pread(0, 4096) == before, "nothing is done where one is outside"
    with ImageFile(str(image), start=4096, length=len(CONTENT)) as below:
        with pytest.raises(OSError, match=r"writing 4096 bytes"):
            below.write_pieces(pieces)
        image.write_bytes(image.read_bytes()[: 4096 + 6 * 4096])
        with pytest.raises(OSError, match=r"reading 8192 bytes"):
            below.read_pieces(Pieces(offsets, lengths, pieces.at, memoryview(bytearray(len(data)))))


@pytest.mark.parametrize("at", [[0, 8, 16], [4, 12, 20], [16, 8, 0], [0, 8, 24], [8, 8, 8], [5]])
@pytest.mark.parametrize("lengths", [[8, 8, 8], [8, 4, 8], [3, 3, 3]])
def test_pieces_are_gathered_in_their_order(at: list[int], lengths: list[int]) -> None:
    source = memoryview(bytes(range(40)))
    pieces = Pieces(np.zeros(len(at), np.int64), np.array(lengths[: len(at)]), np.array(at), source)
    there = memoryview(bytearray(b"." * 40))
    pieces.gather(there)
    expected = b"".join(bytes(source[start : start + length]) for start, length in zip(at, lengths, strict=False))
    assert bytes(there) == expected.ljust(40, b".")


def test_what_was_done_in_part_is_gone_on_with(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets, lengths = np.array(PLACES).T
    data = memoryview(random.Random(1).randbytes(sum(lengths)))
    at = np.cumsum(lengths) - lengths
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:300]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:300], at))
    with ImageFile(str(image), start=4096, length=len(CONTENT), writable=True) as below:
        below.write_pieces(Pieces(offsets, lengths, at, data))
        back = memoryview(bytearray(len(data)))
        below.read_pieces(Pieces(offsets, lengths, at, back))
        assert back == data
