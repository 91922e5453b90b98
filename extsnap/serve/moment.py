"""Judging a volume at rest or a view by e2fsck, what its moment left to be done told apart from damage.

A snapshot of a mounted volume has files that were open but unlinked, and one of a crash a journal.  ``e2fsck -fn``
does neither and complains.  So the work is done in a throw-away layer over it, by e2fsck, and what it complains of
then is damage.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from extsnap.blockdev.image import ImageFile
from extsnap.errors import ExtsnapError, FormatError
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.orphans import prepare_release, unlinked, waiting
from extsnap.ondisk.superblock import Compat
from extsnap.serve import tools

REPAIRED_MAX = 3
"""Exit statuses of e2fsck up to this: nothing was wrong, or everything is repaired."""

_FSCK_FRAME = ("Pass ", "e2fsck ", "Warning!  ", "********** WARNING: Filesystem still has errors")
_MAX_COMPLAINTS = 20

Layer = Callable[[], AbstractContextManager[str]]
"""Makes a throw-away layer over what is judged: gives the path of a file that can be written."""


def fsck(path: str) -> tuple[int, list[str]]:
    """Run ``e2fsck -fn``; returns its status and what it found wrong."""
    done = tools.run("e2fsck", "-fn", path, ok=None)
    if done.returncode == 0:
        return 0, []
    lines = [line.strip().removeprefix(f"{path}: ") for line in (done.stdout + done.stderr).splitlines()]
    complaints = [
        line
        for line in lines
        if line and not line.startswith(_FSCK_FRAME) and "% non-contiguous" not in line and "is mounted." not in line
    ]
    if len(complaints) > _MAX_COMPLAINTS:
        complaints = [*complaints[:_MAX_COMPLAINTS], f"and {len(complaints) - _MAX_COMPLAINTS} more lines"]
    return done.returncode, complaints or [f"e2fsck ended with status {done.returncode}"]


def judge(path: str, layer: Layer, *, crash: bool = False) -> tuple[int, list[str], int]:
    """Status and complaints of e2fsck, what the moment left to be done aside, and the files open and unlinked then."""
    status, complaints = fsck(path)
    return (status and without_work_left(path, layer, crash=crash)) or (status, complaints, 0)


def check_base(path: str, layer: Layer, *, crash: bool = False) -> dict[str, Any]:
    """What ``check`` tells of the base volume."""
    status, complaints, open_unlinked = judge(path, layer, crash=crash)
    base: dict[str, Any] = {"e2fsck": status, "ok": status == 0}
    if open_unlinked:
        base["open_unlinked"] = open_unlinked
    if complaints:
        base["errors"] = complaints
    return base


def without_work_left(view: str, layer: Layer, *, crash: bool = False) -> tuple[int, list[str], int] | None:
    """Judge a view of which ``e2fsck -fn`` complained as it is after the work that its moment left.

    Args:
        view: Path of the view.
        layer: Makes a layer over it.
        crash: Somebody was writing to it: without a journal what e2fsck mends by itself is such work as well.

    Returns:
        The status and complaints afterwards, and the number of files that were open and unlinked; None if there
        was no such work or it could not be done: then the first verdict counts.
    """
    try:
        left = _work_left(view, crash)
        if not left.listed and not left.needs_replay:
            return None
        count, needs_replay = left.orphans, left.needs_replay
        with layer() as scratch:
            if not needs_replay:
                _prepare(scratch)
            done = tools.run("e2fsck", "-p", scratch, ok=None)
            if needs_replay and not left.journaled and done.returncode > REPAIRED_MAX:
                # A crash without a journal leaves what e2fsck asks about; nothing tells that from damage.
                done = tools.run("e2fsck", "-fy", scratch, ok=None)
            if not 0 <= done.returncode <= REPAIRED_MAX:
                return None
            if not needs_replay and ": clean, " not in done.stdout:
                return None  # it found a reason to check, and mend, everything: damage
            return (*fsck(scratch), count)
    except (ExtsnapError, OSError):
        return None


class _Left(NamedTuple):
    """What a moment left to be done.

    Attributes:
        orphans: Files open and unlinked, as far as they are known before a replay.
        listed: Whether there are such, or files that are only being truncated.
        needs_replay: Whether e2fsck has to replay or mend.
        journaled: Whether there is a journal.
    """

    orphans: int
    listed: bool
    needs_replay: bool
    journaled: bool


def _work_left(view: str, crash: bool) -> _Left:
    """Find it.

    Raises:
        ExtsnapError: The view is damaged where this is told.
    """
    image = ImageFile(view)
    try:
        fs = Filesystem.open(image)
        journaled = bool(fs.superblock.s_feature_compat & Compat.has_journal)
        needs_replay = fs.needs_recovery or (crash and not fs.is_clean)
        try:
            found = waiting(fs)
            return _Left(len(unlinked(fs, found)), bool(found), needs_replay, journaled)
        except FormatError:
            if not needs_replay:
                raise
            return _Left(0, False, needs_replay, journaled)
    finally:
        image.close()


def _prepare(scratch: str) -> None:
    """Make a layer ready for ``e2fsck -p`` to let its orphans go."""
    image = ImageFile(scratch, writable=True)
    try:
        prepare_release(Filesystem.open(image, writable=True))
    finally:
        image.close()
