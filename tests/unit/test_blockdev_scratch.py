"""A throw-away layer: what is written is read back, and nothing reaches what is below."""

from __future__ import annotations

import random
import tempfile

import pytest
from lab import MemoryDevice

from extsnap.blockdev.scratch import Scratch
from extsnap.errors import DamagedCopy, ExtsnapError

BLOCK = 1024


@pytest.mark.parametrize("size", [40 * BLOCK, 40 * BLOCK - 700])
def test_random_writes(size: int) -> None:
    rng = random.Random(size)
    content = rng.randbytes(size)
    device = MemoryDevice(content)
    scratch, model = Scratch(device, BLOCK), bytearray(content)
    for step in range(400):
        offset = rng.randrange(size)
        length = rng.randrange(1, min(5 * BLOCK, size - offset) + 1)
        if rng.randrange(6) == 0:
            scratch.punch(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            data = rng.randbytes(length)
            scratch.pwrite(offset, data)
            model[offset : offset + length] = data
        assert scratch.pread(offset, length) == model[offset : offset + length], step
        if step % 20 == 0:
            assert scratch.pread(0, size) == model, step
    assert device.content == content
    for offset in (-1, size - 3):
        with pytest.raises(ValueError):
            scratch.pwrite(offset, b"past")
    scratch.close()


class Damaged(MemoryDevice):
    """The first block cannot be read."""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if offset < BLOCK:
            raise DamagedCopy("a copy is damaged")
        super().readinto(offset, buffer)


def test_what_is_written_covers_what_cannot_be_read() -> None:
    scratch = Scratch(Damaged(bytes(4 * BLOCK)), BLOCK)
    with pytest.raises(DamagedCopy):
        scratch.pread(0, BLOCK)
    with pytest.raises(DamagedCopy):
        scratch.pwrite(5, b"a part of it")
    scratch.pwrite(0, b"a" * BLOCK)
    scratch.pwrite(5, b"b")
    assert scratch.pread(0, BLOCK) == b"aaaaab" + b"a" * (BLOCK - 6)
    scratch.close()


def test_a_write_without_room_leaves_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(MemoryDevice(b"o" * 8 * BLOCK), BLOCK)

    def no_room(offset: int, data: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scratch._image, "pwrite", no_room)
        with pytest.raises(OSError, match="No space"):
            scratch.pwrite(0, b"n" * BLOCK)
    assert scratch.pread(0, BLOCK) == b"o" * BLOCK
    scratch.close()


def test_no_scratch_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with pytest.raises(ExtsnapError, match=r"no scratch file of 8192 bytes can be made in /nonexistent: .*TMPDIR"):
        Scratch(MemoryDevice(bytes(8 * BLOCK)), BLOCK)
