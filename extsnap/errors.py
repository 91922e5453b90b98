"""Every error that extsnap raises on purpose, in one hierarchy.

An error says *what* failed, *where*, and *what to do next*: ``str(error)`` is the one line that the
command line prints.  Nothing here imports anything heavy, because every layer imports this module.
"""

from __future__ import annotations

import errno


class ExtsnapError(Exception):
    """Base class.  ``hint`` is the next step for the user, appended to the message.

    Attributes:
        errno: The errno that a served file answers with when this error reaches a read or a write.
    """

    errno: int = errno.EIO

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message}; {hint}" if hint else message)


class ImageNotFound(ExtsnapError, FileNotFoundError):  # type: ignore[misc]  # errno: a value here, a member there
    """The image path does not exist, or is not something that holds a volume."""

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ImageReadOnly(ExtsnapError):
    """The image or device can be read and not written."""

    errno = errno.EROFS


class FormatError(ExtsnapError):
    """An on-disk structure is damaged or impossible.

    Attributes:
        structure: Name of the structure, as the kernel spells it.
        field: Name of the field, or "" for the whole structure.
        offset: Byte offset on the device, or None where it is not known.
    """

    def __init__(
        self, message: str, *, structure: str, field: str = "", offset: int | None = None, hint: str = ""
    ) -> None:
        self.structure = structure
        self.field = field
        self.offset = offset
        where = structure + (f".{field}" if field else "")
        at = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{where}{at}: {message}", hint=hint or "run e2fsck -fn on the volume")


class NotExtError(ExtsnapError):
    """The device holds no ext2, ext3 or ext4 filesystem."""


class UnsupportedFeature(ExtsnapError):
    """A feature of the volume that extsnap does not serve (yet); the message names it."""


class NeedsRecovery(ExtsnapError):
    """The journal has to be replayed, or an interrupted operation completed, first."""


class VolumeDirty(ExtsnapError):
    """The filesystem was not cleanly unmounted or is marked with errors."""


class VolumeBusy(ExtsnapError):
    """Somebody else has the volume; the message names who."""

    errno = errno.EBUSY


class OutsideWrite(ExtsnapError):
    """The image was changed outside extsnap while it had snapshots; the message names those at risk."""


class VolumeFull(ExtsnapError):
    """No free space for a copy, a record or the store."""

    errno = errno.ENOSPC


class StoreDamaged(ExtsnapError):
    """A structure of the store fails its checksum or contradicts another one."""


class DamagedCopy(ExtsnapError):
    """A copy block fails its checksum: the read fails, wrong data is never returned."""


class StoreProtected(ExtsnapError):
    """A write from above that would hit the store's own blocks."""


class SnapshotNotFound(ExtsnapError, KeyError):
    """No snapshot of that name."""

    __str__ = ExtsnapError.__str__


class SnapshotExists(ExtsnapError):
    """The name is taken."""


class InvalidName(ExtsnapError):
    """The name breaks the rules for names."""


class RestoreRefused(ExtsnapError):
    """The restore cannot be done; nothing was changed."""


class ServerError(ExtsnapError):
    """The server process could not be started, reached or ended."""


class ToolError(ExtsnapError):
    """A system program (e2fsck, mount, losetup) is missing or failed."""
