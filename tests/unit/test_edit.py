"""Edits of the filesystem that a crash interrupts, where the next open must finish them with what the store keeps."""

from __future__ import annotations

import random

import lab
import numpy as np
import pytest

from extsnap.snapshot import edit
from extsnap.snapshot.volume import Volume


class PowerCutError(Exception):
    """Nothing more is written."""


def opened(device: lab.MemoryDevice, *, writable: bool = True) -> Volume:
    clock = iter(range(1_700_000_000 * 10**9, 1_800_000_000 * 10**9, 10**9))
    return Volume(device, writable=writable, clock=lambda: next(clock), random_bytes=random.Random(1).randbytes)


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
