"""The moment of creation: what a snapshot preserves is found once, and from the filesystem as it is then."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import lab
import numpy as np
import pytest
from lab import BLOCK, MemoryDevice, opened

from extsnap.errors import StoreProtected
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import edit
from extsnap.snapshot.volume import Volume


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_what_the_store_grew_by_for_a_snapshot_is_seen_by_it(kind: str) -> None:
    device = MemoryDevice(lab.plain_image(kind))
    volume = opened(device)
    volume.create("one")
    volume.begin_serving(grow=False)
    for block in np.flatnonzero(lab.survey(volume.read(0, volume.size)).files).tolist():
        if volume.require_engine().room() < 60:
            break
        volume.write(block * BLOCK, bytes([block % 255 + 1]) * BLOCK)
    assert volume.end_serving()
    grow, grown = edit.grow, []

    def grow_more(volume: Volume, blocks: int) -> int:
        """By so much that its map gets nodes."""
        grown.append(grow(volume, blocks + 300))
        return grown[-1]

    with mock.patch.object(edit, "grow", grow_more):
        volume.create("two")
    assert sum(grown) > 300
    assert np.array_equal(lab.preserved_by(volume, "two"), lab.survey(device.content).preserved)


def test_the_journal_is_read_once_for_a_snapshot_of_a_frozen_volume() -> None:
    """While the filesystem is frozen everybody waits."""
    volume = opened(MemoryDevice(lab.plain_image("ext3")))
    volume.create("one")
    volume.begin_serving()
    volume.serve_below(Above())
    with mock.patch.object(Filesystem, "file_map", autospec=True, side_effect=Filesystem.file_map) as mapped:
        assert volume.create("two", quiesced=True).info.consistency.name == "FROZEN"
    assert mapped.call_count == 1


@pytest.fixture
def served() -> Iterator[Volume]:
    """A served ext2 volume with a snapshot, at rest."""
    volume = opened(MemoryDevice(lab.plain_image("ext2")))
    volume.create("one")
    volume.begin_serving()
    yield volume
    volume.close()


class Above:
    """A server; while ``used`` somebody has the filesystem open."""

    def __init__(self, *, used: bool = True) -> None:
        self.used = used

    def in_use(self) -> bool:
        return self.used

    def say(self, message: str) -> None:
        pass


def test_nodes_of_an_edit_of_ours_are_watched(served: Volume) -> None:
    served.serve_below(Above(used=False))
    before = set(served.require_store().root.mapping.tolist())
    assert edit.grow(served, 600)
    served.settle()
    new = set(served.require_store().root.mapping.tolist()) - before
    assert new
    for node in new:
        with pytest.raises(StoreProtected):
            served.write(node * BLOCK, b"\xff" * BLOCK)
