"""What a snapshot is restored to that was taken while somebody wrote, on a filesystem without a journal."""

from __future__ import annotations

import lab
import numpy as np
from lab import MemoryDevice, opened

from extsnap.arrays import runs_of
from extsnap.ext.filesystem import Filesystem
from extsnap.ondisk.superblock import State
from extsnap.snapshot import restore


class InUse:
    """Whoever serves the volume: somebody has it open for writing."""

    def say(self, message: str) -> None:
        raise AssertionError(message)

    def in_use(self) -> bool:
        return True

    def open_views(self) -> list[str]:
        return []


def test_what_inodes_have_is_in_use_whatever_the_bitmaps_say() -> None:
    """The kernel had written a file's inode and not yet the bitmaps: today's store must not be put into its blocks."""
    device = MemoryDevice(lab.plain_image("ext2"))
    opened(device).create("one")
    blocks = np.flatnonzero(lab.survey(device.content).files)
    volume = opened(device)
    volume.begin_serving()
    volume.serve_below(InUse())  # type: ignore[arg-type]
    fs = Filesystem.open(volume.base, writable=True)
    fs.set_blocks(runs_of(blocks), False)
    fs.superblock.s_state &= ~State.VALID
    fs.flush()
    volume.create("crash")
    marked = Filesystem.open(volume.base, lenient=True).block_bitmaps()
    assert not marked.test(blocks - fs.geometry.first_data_block).any()
    (target,) = (entry for entry in volume.require_engine().snapshots if entry.name == "crash")
    overlay = restore._as_restored(volume, target)
    marked = Filesystem.open(overlay, lenient=True).block_bitmaps()
    assert marked.test(blocks - fs.geometry.first_data_block).all()
