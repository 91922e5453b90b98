"""From an exception to the one line that says what, where and what to do next."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from extsnap import errors
from extsnap.cli.units import safe

REFUSED = 1
USAGE = 2
DAMAGE = 3
RUN_FAILED = 125
INTERRUPTED = 130


class Failed(Exception):
    """Work on ``subject`` failed; the reason is the ``__cause__``, an ExtsnapError or an OSError.

    Attributes:
        subject: What the command was about: an image or a directory, as the user named it.
        status: The exit status.
    """

    def __init__(self, subject: str, status: int = REFUSED) -> None:
        self.subject = subject
        self.status = status
        super().__init__(subject)


class OutputClosed(Exception):
    """Whoever read standard output went away: nothing to report, nobody to report it to."""


@contextmanager
def about(subject: str, *, status: int = REFUSED) -> Iterator[None]:
    """Turn the two kinds of expected errors into ``Failed``, which knows what the command was about."""
    try:
        yield
    except (errors.ExtsnapError, OSError) as error:
        raise Failed(subject, status) from error


# The next step where an error brings none of its own; the first class that fits counts.
_NEXT_STEPS: tuple[tuple[type[errors.ExtsnapError], str], ...] = (
    (errors.ImageNotFound, "check the path"),
    (errors.NotExtError, "give an image or a device that holds an ext2, ext3 or ext4 volume"),
    (errors.UnsupportedFeature, "this release cannot keep snapshots in such a volume; it was not changed"),
    (errors.NeedsRecovery, "run e2fsck -f on the volume, or mount and unmount it once"),
    (errors.VolumeDirty, "run e2fsck -f on the volume"),
    (errors.VolumeBusy, "stop using it there first (extsnap detach, umount)"),
    (errors.OutsideWrite, "extsnap list shows the snapshots"),
    (errors.VolumeFull, "delete snapshots or files, or grow the volume"),
    (errors.StoreDamaged, "extsnap check names what is damaged"),
    (errors.DamagedCopy, "extsnap check names what is damaged"),
    (errors.SnapshotNotFound, "extsnap list shows the snapshots"),
    (errors.SnapshotExists, "choose another name, or delete that one first"),
    (errors.InvalidName, "use 1 to 255 bytes of UTF-8 without / and control characters"),
    (errors.ServerError, "extsnap info shows who serves the volume"),
)
_NEXT_STEP = "extsnap --debug shows the details"

_NEXT_STEPS_ERRNO = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give an image file, a loop device or a block device",
    errno.EACCES: "check its permissions, or run this as its owner or as root",
    errno.EPERM: "check its permissions, or run this as its owner or as root",
    errno.EROFS: "copy it to a place that can be written",
    errno.EBUSY: "stop what uses it, then try again",
    errno.ETXTBSY: "stop what uses it, then try again",
    errno.EEXIST: "choose another path, or remove that one",
    errno.ENOSPC: "free some space there and try again",
    errno.EDQUOT: "free some space there and try again",
    errno.EFBIG: "choose a filesystem, or a limit, that allows larger files",
    errno.ENXIO: "check that the device exists",
    errno.ENODEV: "check that the device exists",
    errno.ENOTEMPTY: "give an empty directory",
    errno.EIO: "check the medium: the kernel log says more",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ELOOP: "check the path: its symbolic links go round in circles",
}


def describe(error: BaseException, subject: str = "") -> str:
    """Return the line for an error: what failed, where, and what to do next.

    Args:
        error: An ExtsnapError or an OSError.
        subject: The image or directory that the command was about; put in front unless the error names it.
    """
    if isinstance(error, errors.ExtsnapError):
        text = str(error)
        step = "" if error.hint else _next_step(error)
    elif isinstance(error, OSError):
        text, step = _describe_os_error(error)
    else:
        text, step = str(error) or type(error).__name__, _NEXT_STEP
    if subject and not _names(text, subject):
        text = f"{subject}: {text}"
    return safe(f"{text}; {step}" if step else text)


def _next_step(error: errors.ExtsnapError) -> str:
    return next((step for kind, step in _NEXT_STEPS if isinstance(error, kind)), _NEXT_STEP)


def _describe_os_error(error: OSError) -> tuple[str, str]:
    reason = error.strerror or str(error) or type(error).__name__
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    reason = reason[:1].lower() + reason[1:] if reason[1:2].islower() else reason
    text = f"{' -> '.join(paths)}: {reason}" if paths else reason
    return text, _NEXT_STEPS_ERRNO.get(error.errno or 0, _NEXT_STEP)


def _names(text: str, subject: str) -> bool:
    """Whether a message already says which file it is about, as given or as an absolute path."""
    return any(path in text for path in {subject, os.path.abspath(subject), os.path.realpath(subject)})
