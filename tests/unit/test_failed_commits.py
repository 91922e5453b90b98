"""A header commit fails once and the process goes on: what it was to change is not made true by a later one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import lab
import pytest
from lab import opened

from extsnap.blockdev.recording import FaultyDevice, MemoryDevice
from extsnap.errors import ExtsnapError
from extsnap.snapshot import checksums
from extsnap.snapshot import format as fmt
from extsnap.snapshot.volume import Volume


def taint(volume: Volume) -> object:
    volume.set_states([replace(entry, state=fmt.State.TAINTED) for entry in volume.snapshot_list()])
    return None


def accept(volume: Volume) -> dict[str, object]:
    assert volume.outside_write
    return volume.verb("accept")


def add_checksums(volume: Volume) -> object:
    return checksums.add(volume, "one")


def changed(volume: Volume) -> bool:
    """Whether any of it is there."""
    entry = volume.find("one")
    return entry.state != fmt.State.OK or checksums.has(volume, entry)


@pytest.mark.parametrize("written", ["ssv mkfs_time 1600000000", "ssv state 0"], ids=["at-rest", "to-recover"])
def test_an_outside_write_that_could_not_be_accepted_is_still_one(written: str) -> None:
    """Here it is; the next process may find it accepted, and then the snapshot is tainted."""
    device = MemoryDevice(lab.plain_image("ext2"))
    opened(device).create("one")
    content = lab.changed_by_debugfs(bytes(device.content), written)
    for fail_at in range(1, 100):
        below = MemoryDevice(content)
        volume = opened(below)
        faulty = volume._device.below = FaultyDevice(below, fail_at=fail_at)
        try:
            accept(volume)
        except OSError:
            pass
        if not faulty.failures:
            break
        assert volume.outside_write
        now = changed(volume)
        volume.require_store().commit()  # whatever commits next
        again = opened(MemoryDevice(bytes(below.content)))
        assert changed(again) == now, f"operation {fail_at} failed, and the next commit did what did not come to be"
        assert again.outside_write or now, f"operation {fail_at} failed, and the outside write is forgotten"
        assert accept(volume)["tainted"] == ["one"]
        assert opened(MemoryDevice(bytes(below.content))).find("one").state == fmt.State.TAINTED
    assert fail_at > 5
    assert faulty.failures == 0


@pytest.mark.parametrize(
    ("action", "operations"),
    [(taint, ("write", "flush")), (add_checksums, ("write", "flush")), (add_checksums, ("read",))],
    ids=["states", "checksums", "checksums-read"],
)
def test_a_change_that_failed_is_not_made_true_later(
    action: Callable[[Volume], object], operations: tuple[str, ...]
) -> None:
    """But for a flush that fails after the header was written: then it is there at once, and stays."""
    device = MemoryDevice(lab.plain_image("ext2"))
    opened(device).create("one")
    content = bytes(device.content)
    undone = 0
    for fail_at in range(1, 200):
        below = MemoryDevice(content)
        volume = opened(below)
        truth = volume.open_view("one").pread(0, volume.size)
        faulty = volume._device.below = FaultyDevice(below, fail_at=fail_at, operations=operations)  # type: ignore[arg-type]
        try:
            action(volume)
        except (OSError, ExtsnapError):
            pass
        if not faulty.failures:
            break
        now = changed(volume)
        undone += not now
        volume.create("later")
        assert changed(volume) == now, f"operation {fail_at} failed, and the next command did what did not come to be"
        again = opened(MemoryDevice(bytes(below.content)))
        assert changed(again) == now
        assert again.open_view("one").pread(0, again.size) == truth
        used = [volume.require_store().available for volume in (volume, again)]
        assert used[0] == used[1], f"operation {fail_at} failed, and blocks are lost"
    assert undone > 2
