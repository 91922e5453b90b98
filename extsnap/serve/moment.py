"""What the moment of a snapshot left to be done, told apart from damage.

A snapshot of a mounted volume has files that were open but unlinked, and one of a crash a journal.  ``e2fsck -fn``
does neither and complains.  So the work is done in a scratch image, by e2fsck, and what it complains of
then is damage.  The scratch image holds the view's metadata only: it costs what e2fsck reads, whatever
the size of the files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

from extsnap.blockdev.image import ImageFile
from extsnap.errors import ExtsnapError
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.orphans import orphan_file_blocks, orphans, prepare_release
from extsnap.serve import tools

REPAIRED_MAX = 3
"""Exit statuses of e2fsck up to this: nothing was wrong, or everything is repaired."""

Fsck = Callable[[str], tuple[int, list[str]]]


def without_work_left(view: str, fsck: Fsck) -> tuple[int, list[str], int] | None:
    """Judge a view of which ``e2fsck -fn`` complained as it is after the work that its moment left.

    Args:
        view: Path of the served view.
        fsck: Runs ``e2fsck -fn`` on a path; returns its status and what it found wrong.

    Returns:
        The status and complaints afterwards, and the number of files that were open and unlinked; None if there
        was no such work or it could not be done: then the first verdict counts.
    """
    try:
        count, needs_replay = _work_left(view)
        if not count and not needs_replay:
            return None
        with tempfile.TemporaryDirectory(prefix="extsnap-check-") as directory:
            scratch = os.path.join(directory, "metadata")
            tools.run("e2image", "-f", "-r", view, scratch)  # -f: also while it is served, it does not change
            _prepare(view, scratch)
            done = tools.run("e2fsck", "-p", scratch, ok=None)
            if not 0 <= done.returncode <= REPAIRED_MAX:
                return None
            if not needs_replay and ": clean, " not in done.stdout:
                return None  # it found a reason to check, and mend, everything: damage
            return (*fsck(scratch), count)
    except ExtsnapError:
        return None


def _work_left(view: str) -> tuple[int, bool]:
    """(files open and unlinked, whether there is a journal to replay).

    Raises:
        ExtsnapError: The view is damaged where this is told.
    """
    image = ImageFile(view)
    try:
        fs = Filesystem.open(image)
        return len(orphans(fs)), fs.needs_recovery
    finally:
        image.close()


def _prepare(view: str, scratch: str) -> None:
    """Complete the scratch image (e2image leaves the orphan file out) and make it ready for ``e2fsck -p``."""
    os.truncate(scratch, max(os.path.getsize(scratch), os.path.getsize(view)))
    source, target = ImageFile(view), ImageFile(scratch, writable=True)
    try:
        size = (fs := Filesystem.open(source)).geometry.block_size
        for block in orphan_file_blocks(fs).tolist():
            target.pwrite(block * size, source.pread(block * size, size))
        if not fs.needs_recovery:
            prepare_release(Filesystem.open(target, writable=True))
    finally:
        source.close()
        target.close()
