"""A restore fails once and the process goes on, as servers do: no snapshot is harmed, and the restore is done or not.

What is there is compared as whole images with copies that were made before.
"""

from __future__ import annotations

import errno
import functools
import random
from dataclasses import dataclass

import lab
import numpy as np
import pytest
from lab import opened

from extsnap.blockdev.recording import FaultKind, FaultyDevice, MemoryDevice
from extsnap.errors import ExtsnapError, NeedsRecovery
from extsnap.snapshot.volume import Volume


def serving(content: bytes) -> tuple[Volume, MemoryDevice]:
    below = MemoryDevice(content)
    volume = opened(below)
    volume.begin_serving()
    return volume, below


def views_of(volume: Volume) -> dict[str, bytes]:
    return {name: volume.open_view(name).pread(0, volume.size) for name in volume.snapshot_names()}


def overwrite(volume: Volume, blocks: list[int], seed: int) -> None:
    rng = random.Random(seed)
    for block in rng.sample(blocks, len(blocks)):
        volume.write(block * lab.BLOCK, rng.randbytes(lab.BLOCK))
    volume.flush()


@dataclass(frozen=True)
class Past:
    """A served volume with two snapshots, killed.

    Attributes:
        content: The medium.
        views: Of its snapshots.
        base: The base volume.
        files: bool[blocks]: those of files, in the base and in both snapshots.
        operations: Writes, punches and flushes of its restore to "one".
    """

    content: bytes
    views: dict[str, bytes]
    base: bytes
    files: lab.Flags
    operations: int

    @property
    def blocks(self) -> list[int]:
        found: list[int] = np.flatnonzero(self.files).tolist()
        return found


@functools.cache
def past() -> Past:
    device = MemoryDevice(lab.plain_image("ext2"))
    opened(device).create("one")
    files = lab.survey(bytes(device.content)).files
    volume, device = serving(bytes(device.content))
    blocks = np.flatnonzero(files).tolist()
    overwrite(volume, blocks[:300], 1)
    volume.create("two")
    overwrite(volume, blocks[200:450], 2)
    content, views, base = bytes(device.content), views_of(volume), bytes(volume.read(0, volume.size))
    volume, device = serving(content)
    counter = volume._device.below = FaultyDevice(device, fail_at=0)
    volume.verb("restore", name="one")
    return Past(content, views, base, files, counter.count)


def goes_on(then: Past, fail_at: int, kind: FaultKind) -> str:
    """Restore with a fault, go on, get killed, be opened again; returns what the restore said."""
    volume, below = serving(then.content)
    device = volume._device.below = FaultyDevice(below, fail_at=fail_at, kind=kind)
    with pytest.raises((OSError, ExtsnapError)) as failure:
        volume.verb("restore", name="one")
    assert device.failures == 1
    begun = isinstance(failure.value, NeedsRecovery)
    if begun:
        for action in (lambda: volume.read(0, 512), lambda: volume.write(0, bytes(512)), volume.flush):
            with pytest.raises(OSError, match="a restore was begun") as refused:
                action()
            assert refused.value.errno == errno.EIO
    volume.create("later")
    there = set(volume.snapshot_names()) - set(then.views) - {"later"}
    base = volume.read(0, volume.size)
    safe = {name: volume.open_view(name).pread(0, volume.size) for name in there}
    done = bool(there)
    assert done or not begun, "the next command has not finished the restore"
    wanted = then.views["one"] if done else then.base
    assert not (lab.unequal(base, wanted) & then.files).any(), "neither the volume of before nor the snapshot"
    for content in safe.values():
        assert not (lab.unequal(content, then.base) & then.files).any(), "the safety snapshot is not what was there"
    later = volume.open_view("later").pread(0, volume.size)
    overwrite(volume, then.blocks[::3], 3)
    base = volume.read(0, volume.size)
    again = opened(MemoryDevice(bytes(below.content)))  # killed
    assert views_of(again) == {**then.views, **safe, "later": later}
    found = again.read(0, again.size)
    assert not (lab.unequal(found, base) & then.files).any()
    assert again.verb("check")["store"]["ok"]
    return str(failure.value) if begun else ""


@pytest.mark.parametrize(("kind", "every"), [("ENOSPC", 4), ("short", 7)])
def test_a_server_goes_on_after_a_restore_that_failed(kind: FaultKind, every: int) -> None:
    """The faults are of its last operations: those before are the growth of the store, see tests/crash."""
    then = past()
    said = [goes_on(then, fail_at, kind) for fail_at in range(then.operations, 10, -every)]
    begun = [text for text in said if text]
    assert 5 <= len(begun) < len(said), "the faults do not hit what is to be hit"
    for text in begun:
        assert "was begun and is not finished" in text
        assert "the next command that writes" in text


def test_an_open_that_cannot_finish_a_restore_leaves_it_to_the_next() -> None:
    """Nor does the process that gave it up write anything of it afterwards."""
    then = past()
    for fail_at in range(then.operations // 2, then.operations, 9):
        volume, below = serving(then.content)
        volume._device.below = FaultyDevice(below, fail_at=fail_at, kind="gone")
        with pytest.raises((OSError, ExtsnapError)):
            volume.verb("restore", name="one")
        content = bytes(below.content)
        for again in range(1, 9, 2):
            device = MemoryDevice(content)
            try:
                opened(FaultyDevice(device, fail_at=again, kind="EIO"))
            except OSError:
                content = bytes(device.content)
        finished = opened(MemoryDevice(content))
        assert {name: view for name, view in views_of(finished).items() if name in then.views} == then.views
        assert finished.require_store().root.restore is None
        assert not (lab.unequal(finished.read(0, finished.size), then.views["one"]) & then.files).any()
