"""What is written to a volume under repair waits: all of it happens, or nothing."""

from __future__ import annotations

import lab
import numpy as np
import pytest

from extsnap.errors import NeedsRecovery, VolumeFull
from extsnap.ext.filesystem import Filesystem
from extsnap.ondisk.superblock import State
from extsnap.snapshot.volume import Volume


@pytest.fixture
def volume() -> Volume:
    """A volume that is marked with errors, with one snapshot."""
    volume = Volume(lab.MemoryDevice(lab.changed_by_debugfs(lab.plain_image("ext4"), "ssv state 2")), writable=True)
    volume.create("one")
    return volume


def device(volume: Volume) -> lab.MemoryDevice:
    found = volume._device.below
    assert isinstance(found, lab.MemoryDevice)
    return found


def overwrite(volume: Volume, count: int) -> None:
    """Overwrite blocks that the snapshot needs, some of them twice, with flushes between."""
    blocks = np.flatnonzero(lab.survey(volume.read(0, volume.size)).files)
    for turn, block in enumerate(blocks[-count:].tolist() + blocks[-count:].tolist()[:9]):
        volume.write(block * lab.BLOCK, bytes([turn % 255 + 1]) * lab.BLOCK)
        if turn % 50 == 0:
            volume.flush()


def test_a_repair_that_has_room(volume: Volume) -> None:
    base, then = volume.read(0, volume.size), volume.open_view("one").pread(0, volume.size)
    volume.begin_serving(grow=False, repair=True)
    medium = bytes(device(volume).content)
    overwrite(volume, 60)
    assert volume.read(0, volume.size) != base
    assert device(volume).content == medium, "the write did not wait"
    with pytest.raises(NeedsRecovery, match="is being repaired, and its snapshots stay as they are meanwhile; wait"):
        volume.create("two")
    wanted = volume.read(0, volume.size)
    assert volume.end_serving()
    assert volume.read(0, volume.size) == wanted
    assert volume.open_view("one").pread(0, volume.size) == then
    assert not volume.medium.state.mark


def test_meanwhile_nothing_else_changes_the_snapshots(volume: Volume) -> None:
    """Something that failed half way would read the state anew, and what the repair wrote would go through the old."""
    then = volume.open_view("one").pread(0, volume.size)
    volume.begin_serving(grow=False, repair=True)
    assert volume.growth is None, "the store would get blocks that it has only if the repair is let through"
    overwrite(volume, 60)
    engine, wanted = volume.engine, volume.read(0, volume.size)
    for verb, arguments in (
        ("delete", {"names": ["one"]}),
        ("set", {"values": {"on-full": "drop-oldest"}}),
        ("guard", {"wanted": False}),
        ("checksum", {"name": "one"}),
        ("note_check", {"damaged": ["one"], "sound": []}),
        ("strip", {}),
    ):
        with pytest.raises(NeedsRecovery, match="is being repaired") as refusal:
            volume.verb(verb, **arguments)
        assert "try again" in refusal.value.hint
    assert volume.engine is engine
    assert volume.end_serving()
    assert volume.read(0, volume.size) == wanted
    assert volume.open_view("one").pread(0, volume.size) == then
    assert not lab.complaint(device(volume).content)


def test_a_restore_without_safety_waits_for_the_end_of_a_repair() -> None:
    """It may give the volume up, and not under an e2fsck whose writes would then come over what was restored."""
    volume = Volume(lab.MemoryDevice(lab.plain_image("ext2")), writable=True)
    volume.create("one")
    then, files = volume.open_view("one").pread(0, volume.size), lab.survey(volume.read(0, volume.size)).files
    volume.begin_serving()
    overwrite(volume, 20)
    fs = Filesystem.open(volume.base, writable=True)
    fs.superblock.s_state &= ~State.VALID
    fs.write_superblock()
    volume.flush()
    volume = Volume(lab.MemoryDevice(bytes(device(volume).content)), writable=True)
    assert volume.needs_replay
    volume.begin_serving(grow=False, repair=True)
    overwrite(volume, 60)
    wanted = volume.read(0, volume.size)
    with pytest.raises(NeedsRecovery, match="is being repaired, and its snapshots stay as they are meanwhile; wait"):
        volume.verb("restore", name="one", safety=False)
    assert volume.read(0, volume.size) == wanted
    assert not volume.end_serving(), "the repair made nothing whole"
    assert volume.read(0, volume.size) == wanted
    assert volume.open_view("one").pread(0, volume.size) == then
    assert volume.verb("restore", name="one", safety=False)["restored"] == "one"
    assert not (lab.unequal(volume.read(0, volume.size), then) & files).any()
    assert not volume.medium.state.mark
    assert not lab.complaint(device(volume).content)


def test_a_repair_that_has_none(volume: Volume) -> None:
    base, then = volume.read(0, volume.size), volume.open_view("one").pread(0, volume.size)
    volume.begin_serving(grow=False, repair=True)
    overwrite(volume, 600)
    with pytest.raises(VolumeFull, match=r"needs 614400 bytes for copies .* the store has \d+; nothing was changed"):
        volume.end_serving()
    assert volume.read(0, volume.size) == base
    assert volume.open_view("one").pread(0, volume.size) == then
    assert not volume.medium.state.mark, "it is at rest as it was before"
    assert not lab.complaint(device(volume).content)
    volume.delete(["one"])
    volume.begin_serving(grow=False, repair=True)
    overwrite(volume, 600)
    assert volume.end_serving()


def test_a_last_copy_fits_and_one_more_does_not(volume: Volume) -> None:
    """Held against what the engine itself promises: whatever is let through never fails half-way."""
    engine = volume.require_engine()
    room = engine.room() - 8
    assert 100 < room < 600
    for count, fits in ((room + 1, False), (room, True)):
        volume.begin_serving(grow=False, repair=True)
        overwrite(volume, count)
        if fits:
            assert volume.end_serving()
        else:
            with pytest.raises(VolumeFull):
                volume.end_serving()
