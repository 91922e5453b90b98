"""Writes that wait: read back at once, let through in their order with their barriers, or dropped."""

from __future__ import annotations

import random
from typing import Any

import pytest
from lab import MemoryDevice

from extsnap.blockdev.deferred import Deferred
from extsnap.errors import ExtsnapError

BLOCK = 1024


class Told(MemoryDevice):
    """Remembers what it was asked to do."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.told: list[tuple[Any, ...]] = []

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.told.append(("write", offset, bytes(data)))
        super().pwrite(offset, data)

    def punch(self, offset: int, length: int) -> None:
        self.told.append(("punch", offset, length))
        super().punch(offset, length)

    def flush(self) -> None:
        self.told.append(("flush",))


@pytest.mark.parametrize("size", [40 * BLOCK, 40 * BLOCK - 700])
def test_random_writes(size: int) -> None:
    rng = random.Random(size)
    content = rng.randbytes(size)
    device = Told(content)
    deferred = Deferred(device, BLOCK)
    model, asked = bytearray(content), []
    for _ in range(300):
        offset = rng.randrange(size)
        length = rng.randrange(1, min(5 * BLOCK, size - offset) + 1)
        choice = rng.randrange(8)
        if choice == 0:
            deferred.flush()
            if asked and asked[-1] != ("flush",):
                asked.append(("flush",))
        elif choice == 1:
            deferred.punch(offset, length)
            model[offset : offset + length] = bytes(length)
            asked.append(("punch", offset, length))
        else:
            data = rng.randbytes(length)
            deferred.pwrite(offset, data)
            model[offset : offset + length] = data
            asked.append(("write", offset, data))
        assert deferred.pread(offset, length) == model[offset : offset + length]
    assert deferred.pread(0, size) == model
    assert device.content == content
    assert device.told == []
    covered = {block for first, last in deferred.blocks() for block in range(first, last)}
    differing = {at for at in range(-(-size // BLOCK)) if model[at * BLOCK :][:BLOCK] != content[at * BLOCK :][:BLOCK]}
    assert differing <= {at for at in covered if deferred.written[at // 8] >> at % 8 & 1}
    deferred.let_through()
    assert device.content == model
    assert device.told == [*asked, ("flush",)]
    deferred.close()


def test_a_scratch_file_without_room() -> None:
    """A write that is missing would be a hole in the order of the others: nothing is let through."""
    device = Told(bytes(8 * BLOCK))
    deferred = Deferred(device, BLOCK)
    deferred.pwrite(0, b"a" * BLOCK)

    def no_room(offset: int, data: object) -> None:
        raise OSError(28, "No space left on device")

    deferred._image.pwrite = no_room  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        deferred.pwrite(BLOCK, b"b" * BLOCK)
    with pytest.raises(ExtsnapError, match="nothing was changed; set TMPDIR"):
        deferred.let_through()
    deferred.close()
    assert device.told == []
