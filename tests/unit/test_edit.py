"""Edits of the filesystem that a crash interrupts, where the next open must finish them with what the store keeps."""

from __future__ import annotations

import random

import lab
import numpy as np
import pytest
from lab import opened

from extsnap.errors import VolumeFull
from extsnap.snapshot import edit
from extsnap.snapshot.volume import Volume


class PowerCutError(Exception):
    """Nothing more is written."""


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_shrink_that_is_finished_by_the_next_command(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that go are the first free ones, where copies would be put next; the shrink itself needs copies."""
    device = lab.MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    volume.create("one")
    truth = volume.open_view("one").pread(0, volume.size)
    store = volume.require_store()
    free = store.available_runs()
    gone = free[: np.searchsorted(np.cumsum(free[:, 1]), 30) + 1].copy()
    gone[-1, 1] -= gone[:, 1].sum() - 30
    wanted = edit.without(store.root, gone)
    store.withdraw(gone)

    def cut(volume: Volume) -> None:
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(edit, "finish", cut)
        with pytest.raises(PowerCutError):
            edit.resize(volume, wanted)
    again = opened(lab.MemoryDevice(device.content))
    assert again.require_store().root.pending is None
    copies = again.require_engine().index.levels
    assert sum(len(level.copies()) for level in copies) > 2, "the shrink has made no copies: this shows nothing"
    content = again.medium.device.pread(0, again.size)
    survey = lab.survey(content)
    assert int(survey.store[:, 2].sum()) == int(wanted[:, 2].sum())
    assert not lab.complaint(content)
    reader = opened(lab.MemoryDevice(content), writable=False)
    assert not reader.verb("check")["store"]["errors"]
    assert reader.open_view("one").pread(0, reader.size) == truth


def go_on(volume: Volume, blocks: list[int]) -> None:
    """Overwrite blocks, as many as have room for their copies."""
    rng = random.Random(5)
    for block in blocks:
        try:
            volume.write(block * lab.BLOCK, rng.randbytes(lab.BLOCK))
        except VolumeFull:
            break
    volume.flush()


def test_a_shrink_that_lacks_room_is_refused_before_it_is_begun() -> None:
    """Block by block a store fills up, until there is no room for its own change of size: it is done whole or not."""
    device = lab.MemoryDevice(lab.plain_image("ext4"))
    opened(device).create("one")
    files: list[int] = np.flatnonzero(lab.survey(device.content).files).tolist()
    volume = opened(device)
    truth = volume.open_view("one").pread(0, volume.size)
    engine, store = volume.require_engine(), volume.require_store()
    rng = random.Random(3)
    outcomes = set()
    for block in files[::2]:
        volume.write(block * lab.BLOCK, rng.randbytes(lab.BLOCK))
        if engine.left - engine.reserve() > 80:
            continue
        volume.flush()
        left = store.available - engine.reserve()
        if left < 25:
            break
        if left > 38:
            continue
        below = lab.MemoryDevice(device.content)
        tried = opened(below)
        there = tried.require_store()
        before, extents = there.available, there.root.extents
        changed = edit.shrink(tried, 15)
        outcomes.add(changed > 0)
        assert there.root.pending is None, f"begun and not finished with {left} blocks left"
        if not changed:
            assert (there.available, there.root.extents.tolist()) == (before, extents.tolist())
        go_on(tried, files[1::40])
        again = opened(lab.MemoryDevice(below.content))  # killed
        assert again.open_view("one").pread(0, again.size) == truth
        assert again.read(0, again.size) == tried.read(0, tried.size)
        assert not again.verb("check")["store"]["errors"]
    assert outcomes == {True, False}
