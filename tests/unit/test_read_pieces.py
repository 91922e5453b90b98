"""Scattered reads: all of them arrive, and a disk that makes one wait is told of the rest at once."""

from __future__ import annotations

import itertools
import os
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
