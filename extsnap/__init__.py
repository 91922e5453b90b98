"""extsnap: snapshots inside a plain ext2, ext3 or ext4 volume, kept in its own free space.

import extsnap

with extsnap.open("disk.img") as volume:
    volume.create("before-upgrade")
    with volume.snapshots["before-upgrade"].open() as view:
        view.read(1024)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from extsnap.errors import ExtsnapError

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

__version__ = "0.1.0"
__all__ = ["ExtsnapError", "__version__", "open"]


def open(path: str | os.PathLike[str], *, writable: bool = True, partition: int | None = None) -> Volume:
    """Open an image, lock it, and finish what an interrupted command left.

    Args:
        path: An image file, or a block device.
        writable: False reads only: nothing is locked exclusively and nothing is changed.
        partition: Number of the partition in a disk image; None takes the only ext one; 0 is the whole image.

    Raises:
        ExtsnapError: What, where and what to do next.
    """
    from extsnap.snapshot.volume import Volume

    return Volume.open(path, writable=writable, partition=partition)
