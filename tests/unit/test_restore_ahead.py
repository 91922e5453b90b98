"""A restore reads its next piece while a barrier is waited for."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import lab
import numpy as np
import pytest
from lab import BLOCK, MemoryDevice

from extsnap.errors import DamagedCopy
from extsnap.snapshot import restore
from extsnap.snapshot.volume import Volume


class FakeView:
    """Each block has its number in it; one is damaged."""

    engine = SimpleNamespace(block_size=1 << 20)

    def __init__(self, damaged: int = -1) -> None:
        self.damaged, self.asked = damaged, []

    def read_blocks(self, blocks: Any, content: Any) -> None:
        self.asked.append(blocks.tolist())
        if self.damaged in blocks:
            raise DamagedCopy("a copy is damaged")
        content[:] = blocks[:, None]


def test_the_next_piece_leaves_the_present_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "EXCHANGE_BYTES", 4 << 20)
    view, blocks = FakeView(), np.arange(10) * 3
    ahead = restore._Ahead(view, blocks)  # type: ignore[arg-type]
    taken = []
    while (piece := ahead.take()) is not None:
        for _ in range(3):  # several barriers: one piece is read
            ahead.read()
        taken += piece[0].tolist()
        assert (piece[1] == piece[0][:, None]).all()
    assert taken == blocks.tolist()
    assert view.asked == [blocks[:4].tolist(), blocks[4:8].tolist(), blocks[8:].tolist()]


def test_an_error_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before it is exchanged, and durable, when it is raised."""
    monkeypatch.setattr(restore, "EXCHANGE_BYTES", 4 << 20)
    ahead = restore._Ahead(FakeView(damaged=5), np.arange(10))  # type: ignore[arg-type]
    assert ahead.take() is not None
    ahead.read()
    for _ in range(2):
        with pytest.raises(DamagedCopy):
            ahead.take()


def test_nothing_to_exchange() -> None:
    assert restore._Ahead(FakeView(), np.zeros(0, np.int64)).take() is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_restores_in_many_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files overwritten in random blocks are as they were, and after the undo as they had become."""
    monkeypatch.setattr(restore, "EXCHANGE_BYTES", 7 * BLOCK)
    rng = random.Random(kind)
    volume = Volume(MemoryDevice(lab.plain_image(kind)), writable=True)
    volume.verb("create", name="then")
    files = np.flatnonzero(lab.survey(volume.read(0, volume.size)).files)
    volume.begin_serving()
    for block in rng.sample(files.tolist(), 200):
        volume.write(block * BLOCK, rng.randbytes(BLOCK))
    volume.end_serving()
    contents = [[volume.read(block * BLOCK, BLOCK) for block in files.tolist()]]
    view = volume.open_view("then")
    contents.append([view.pread(block * BLOCK, BLOCK) for block in files.tolist()])
    assert contents[0] != contents[1]
    safety = volume.verb("restore", name="then")["safety"]
    assert [volume.read(block * BLOCK, BLOCK) for block in files.tolist()] == contents[1]
    volume.verb("restore", name=safety)
    assert [volume.read(block * BLOCK, BLOCK) for block in files.tolist()] == contents[0]
