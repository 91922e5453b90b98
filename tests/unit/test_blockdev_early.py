"""Writing early: the thread wakes when there is enough to do, never otherwise, and lets go of the file."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from extsnap.blockdev import early
from extsnap.blockdev.image import ImageFile


class Libc:
    """Counts calls, and tells when one has come."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, int]] = []
        self.called = threading.Event()

    def sync_file_range(self, *arguments: int) -> int:
        self.calls.append(arguments)  # type: ignore[arg-type]
        self.called.set()
        return 0


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Libc:
    libc = Libc()
    monkeypatch.setattr(early, "_libc", libc)
    return libc


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_it_waits_for_enough_bytes_and_starts_again_after_a_barrier(libc: Libc) -> None:
    writer = early.EarlyWriter(77, every=100)
    writer.written(99)
    writer.settled()
    writer.written(99)
    assert "early-writer" not in threads()
    writer.written(1)
    assert libc.called.wait(10)
    libc.called.clear()
    writer.written(100)
    assert libc.called.wait(10)
    writer.close()
    assert "early-writer" not in threads()
    assert set(libc.calls) == {(77, 0, 0, 2)}, "the whole file, and never a wait: that would swallow errors"


def test_an_image_writes_early_and_closes_cleanly(libc: Libc, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    with ImageFile(str(path), writable=True) as image:
        image.pwrite(0, b"x" * 4096)
        image.flush()
        assert not libc.calls
        for offset in range(0, 1 << 20, 1 << 16):
            image.pwrite(offset, b"y" * (1 << 16))
        assert libc.called.wait(10)
        image.flush()
    assert "early-writer" not in threads()
    assert path.read_bytes() == b"y" * (1 << 20)
