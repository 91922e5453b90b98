"""A filesystem marked with errors: which groups can be believed, and edits that leave the others alone."""

from __future__ import annotations

import re

import lab
import numpy as np
import pytest

from extsnap.arrays import bitmap_runs
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import FormatError
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import format as fmt
from extsnap.snapshot.volume import Volume

MARK = "ssv state 2"


def bitmap_block(content: bytes, group: int) -> int:
    with lab.as_file(content) as path:
        return int(re.findall(r"Block bitmap at (\d+)", lab.run("dumpe2fs", path, check=False))[group])


def spoiled(content: bytes, group: int, used: bytes, free: bytes = b"") -> bytes:
    """A volume with a wrong bitmap: at the start of the group ``used``, near its end ``free`` instead of zeros."""
    raw, at = bytearray(content), bitmap_block(content, group) * lab.BLOCK
    raw[at : at + len(used)] = used
    if free:
        assert not any(raw[at + 200 : at + 200 + len(free)])
        raw[at + 200 : at + 200 + len(free)] = free
    return bytes(raw)


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_sound_filesystem_with_the_mark(kind: str) -> None:
    plain = lab.plain_image(kind)
    fs = Filesystem.open(lab.MemoryDevice(lab.changed_by_debugfs(plain, MARK)))
    assert fs.has_errors
    assert fs.sound_groups.all()
    assert fs.free_blocks == fs.geometry.free_blocks == lab.survey(plain).free
    assert not len(fs.block_bitmaps().differing_rows(Filesystem.open(lab.MemoryDevice(plain)).block_bitmaps()))


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_bitmap_that_miscounts_is_not_believed(kind: str) -> None:
    content = spoiled(lab.changed_by_debugfs(lab.plain_image(kind), MARK), 0, b"\xff" * 20 + b"\x7f")
    fs = Filesystem.open(lab.MemoryDevice(content))
    assert fs.sound_groups.tolist() == [False] + [True] * (fs.geometry.groups - 1)
    assert (fs.block_bitmaps().take(np.array([0])) == 0xFF).all()


def test_metadata_must_be_in_use_where_nothing_has_a_checksum() -> None:
    """The count is right: as many blocks are wrongly used as wrongly free, among these the superblock's."""
    content = spoiled(lab.changed_by_debugfs(lab.plain_image("ext2"), MARK), 1, b"\xfe", b"\x01")
    fs = Filesystem.open(lab.MemoryDevice(content))
    assert fs.sound_groups.tolist() == [True, False, True]


def test_without_the_mark_it_is_refused() -> None:
    content = spoiled(lab.plain_image("ext4"), 0, b"\xff" * 20 + b"\x7f")
    with pytest.raises(FormatError, match="bitmap of group 0 fails its checksum"):
        Filesystem.open(lab.MemoryDevice(content)).block_bitmaps()


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_edits_leave_unsound_groups_alone(kind: str) -> None:
    content = spoiled(lab.changed_by_debugfs(lab.plain_image(kind), MARK), 0, b"\xff" * 20 + b"\x7f")
    overlay = Overlay(lab.MemoryDevice(content), lab.BLOCK)
    fs = Filesystem.open(overlay, writable=True)
    geometry = fs.geometry
    row = np.frombuffer(content, np.uint8)[bitmap_block(content, 0) * lab.BLOCK :][: geometry.blocks_per_group // 8]
    used = bitmap_runs(row, geometry.blocks_per_group)[0]
    taken = fs.find_free(700)
    assert taken[:, 0].min() > geometry.blocks_per_group
    fs.set_blocks(taken, True)
    fs.set_blocks(np.array([[geometry.first_data_block + used[0], 8]]), False)  # group 0: stays as it is
    inode = fs.allocate_inode(directory=False)
    fs.flush()
    assert bitmap_block(content, 0) not in overlay.changes()
    again = Filesystem.open(overlay)
    assert again.sound_groups.tolist() == fs.sound_groups.tolist()
    assert again.free_blocks == Filesystem.open(lab.MemoryDevice(content)).free_blocks - 700
    assert again.geometry.free_blocks == geometry.free_blocks - 700
    assert again.geometry.free_inodes == geometry.free_inodes - 1
    assert again.inode_in_use(inode)
    assert inode > geometry.inodes_per_group


def test_the_record_of_errors() -> None:
    """The flag is there with its feature bit, which goes with the last flag: then older writers may write again."""
    device = lab.MemoryDevice(lab.changed_by_debugfs(lab.plain_image("ext4"), MARK))
    with Volume(device, writable=True) as volume:
        volume.create("one")
    twins = fmt.RO_COMPAT_TWINS
    for words, delete in ((fmt.RO_COMPAT_SNAPSHOT_FLAGS | twins, True), (twins, False)):
        with Volume(device, writable=True) as volume:
            store = volume.require_store()
            for index in range(2):
                slot = fmt.parse_slot(device.pread(store.slot_block(index) * lab.BLOCK, fmt.SLOT_BYTES))
                assert (slot.compat, slot.ro_compat, slot.incompat) == (0, words, 0)
            flags = [entry.flags for entry in volume.snapshot_list()]
            assert flags == ([fmt.SnapshotFlags.FILESYSTEM_ERRORS] if delete else [])
            volume.delete(volume.snapshot_names())
