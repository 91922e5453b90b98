"""A restore keeps the journal's sequence moving forward, also where it goes past 2^32."""

from __future__ import annotations

import re

import lab
import pytest
from lab import opened

from extsnap.errors import DamagedCopy, NeedsRecovery
from extsnap.ext.journal import later
from extsnap.snapshot import restore
from extsnap.snapshot.volume import Volume


def journal_sequence(device: lab.MemoryDevice) -> int:
    """By dumpe2fs."""
    with lab.as_file(device.content) as path:
        found = re.search(r"^Journal sequence: +(0x[0-9a-f]+)$", lab.run("dumpe2fs", "-h", path), re.MULTILINE)
    assert found
    return int(found[1], 16)


def go_on_at(device: lab.MemoryDevice, sequence: int) -> None:
    """As if a kernel had mounted the volume and written transactions: the empty journal goes on at ``sequence``."""
    volume = opened(device)
    volume.begin_serving(grow=False)
    journal = volume.filesystem().journal
    assert journal is not None
    volume.write(journal.superblock_block * lab.BLOCK, journal.superblock_with(sequence=sequence))
    assert volume.end_serving()


@pytest.mark.parametrize(
    ("then", "now"),
    [(5, 9), (0xFFFFFFFD, 3), (0xFFFFFFF0, 0xFFFFFFFF), (0x7FFFFFFF, 0x80000005)],
    ids=["plain", "past-the-end", "to-the-end", "past-the-middle"],
)
def test_the_sequence_goes_on_from_now(then: int, now: int) -> None:
    device = lab.MemoryDevice(lab.plain_image("ext4"))
    go_on_at(device, then)
    opened(device).create("then")
    go_on_at(device, now)
    assert journal_sequence(device) == now
    opened(device).verb("restore", name="then")
    assert journal_sequence(device) == (now + 1) % 2**32
    assert not lab.complaint(device.content)
    opened(device).verb("restore", undo=True)
    assert journal_sequence(device) == (now + 2) % 2**32
    assert not lab.complaint(device.content)


def test_the_sequence_goes_on_from_a_restore_that_could_not_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the base volume, which is half restored, nothing can be told: the intent knows what is past all of it."""
    device = lab.MemoryDevice(lab.plain_image("ext4"))
    go_on_at(device, 5)
    opened(device).create("then")
    go_on_at(device, 900)
    really = restore.complete

    def complete(volume: Volume) -> None:
        standing = volume.standing
        assert standing is not None
        if standing.target_id == volume.find("then").id:
            raise DamagedCopy("a copy is damaged")
        really(volume)

    monkeypatch.setattr(restore, "complete", complete)
    volume = opened(device)
    with pytest.raises(NeedsRecovery, match="a copy is damaged"):
        volume.verb("restore", name="then")
    assert volume.standing is not None
    assert volume.standing.journal_sequence == 901
    volume.verb("restore", undo=True)
    assert journal_sequence(device) == 902
    assert not lab.complaint(device.content)


@pytest.mark.parametrize(
    ("one", "other"), [(2, 1), (0, 0xFFFFFFFF), (0x80000000, 1), (7, 7), (0x7FFFFFFF, 0), (0, 0x80000001)]
)
def test_which_of_two_comes_later(one: int, other: int) -> None:
    assert later(one, other) == later(other, one) == one
