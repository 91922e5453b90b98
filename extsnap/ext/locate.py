"""Where in an image the volume is: the whole of it, or one of its partitions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from extsnap.blockdev.base import ReadableDevice
from extsnap.blockdev.image import ImageFile
from extsnap.errors import ExtsnapError, FormatError, NotExtError
from extsnap.ext.magic import recognise

if TYPE_CHECKING:
    from extsnap.blockdev.partitions import Partition, Table

_SUPERBLOCK, _MAGIC_OFFSET, _GROUP_OFFSET = 1024, 0x38, 0x5A
_BOOT_SIGNATURE = (510, b"\x55\xaa")


@dataclass(frozen=True)
class Place:
    """A volume in an image.

    Attributes:
        path: Of the image, as given.
        partition: Number of the partition; 0: the whole image.
        offset: Bytes from the start of the image.
        length: Bytes; None for the whole image, which has no other end than its own.
        warning: What the user should know of the partition table; "" if nothing.
    """

    path: str
    partition: int = 0
    offset: int = 0
    length: int | None = None
    warning: str = ""

    @property
    def name(self) -> str:
        """The image and the partition as the command line takes them: "disk.img -P 2"."""
        return f"{self.path} -P {self.partition}" if self.partition else self.path


def locate(path: str, partition: int | None = None) -> Place:
    """Find the volume in an image.

    Args:
        path: A file or block device.
        partition: Number of the partition; 0 for the whole image, whatever is in it; None for the whole image if it
            is a volume, else the only ext partition.  An image in which nothing can be found at all is taken whole.

    Raises:
        ImageNotFound: There is no such image.
        NotExtError: No partition, or not the one of this number, is an ext volume; says what there is.
        FormatError: The partition table is damaged.
        ExtsnapError: Several partitions may be meant, there is none of this number, or it cannot be used.
    """
    whole = Place(path)
    if partition == 0:
        return whole
    with ImageFile(path) as image:
        found = _is_ext(image, 0, image.size)
        at, signature = _BOOT_SIGNATURE
        head = image.pread(0, at + len(signature)) if image.size >= at + len(signature) else b""
        if partition is None and not head.endswith(signature):
            return whole
        try:
            table = _table(image, guess=not found)
        except FormatError:
            if partition is None and found:
                return whole
            raise
        if partition is not None:
            return replace(_numbered(image, table, partition), path=path)
        if table is None:
            return whole
        return replace(_only(image, table, whole_is_ext=found), path=path)


def _is_ext(device: ReadableDevice, offset: int, end: int) -> bool:
    """Whether a primary superblock is where one of a volume at ``offset`` would be."""
    at = offset + _SUPERBLOCK
    if at + 1024 > min(end, device.size) or device.pread(at + _MAGIC_OFFSET, 2) != b"\x53\xef":
        return False
    # A partition may begin where a backup of an older, larger volume is left.
    return not offset or device.pread(at + _GROUP_OFFSET, 2) == bytes(2)


def _usable(image: ImageFile, table: Table) -> list[Partition]:
    """The partitions that hold an ext volume and can be used."""
    return [
        found
        for found in table.partitions
        if not (found.problem or found.extended) and _is_ext(image, found.offset, found.end)
    ]


def _table(image: ImageFile, *, guess: bool) -> Table | None:
    """The partition table.

    An MBR does not say how large its sectors are.  A block device knows; in a file they have 512 bytes, unless
    only in sectors of 4096 all partitions are on the disk and an ext volume is where one begins.

    Args:
        image: The disk.
        guess: Whether to look for that.
    """
    from extsnap.blockdev.partitions import SECTOR_SIZES, read_table

    table = read_table(image, image.sector_size)
    certain = not guess or image.sector_size is not None
    if table is None or table.kind != "MBR" or certain or _usable(image, table):
        return table
    try:
        other = read_table(image, SECTOR_SIZES[-1])
    except FormatError:
        return table
    if other is not None and _usable(image, other) and not any(found.problem for found in other.partitions):
        return other
    return table


def _place(path: str, table: Table, found: Partition) -> Place:
    return Place(path, found.number, found.offset, found.length, table.warning)


def _numbered(image: ImageFile, table: Table | None, number: int) -> Place:
    path = image.path
    if table is None:
        raise ExtsnapError(f"{path} has no partitions", hint="leave -P out to use the whole of it")
    found = table.numbered(number)
    if found is None:
        raise ExtsnapError(f"{path} has no partition {number}", hint=_list(image, table, table.partitions))
    if found.problem:
        raise ExtsnapError(
            f"{path}: partition {number} cannot be used: {found.problem}",
            hint="repair the partition table with sfdisk or gdisk",
        )
    if found.extended:
        raise NotExtError(f"{path}: partition {number} is extended", hint=_list(image, table, table.partitions))
    return _place(path, table, found)


def _only(image: ImageFile, table: Table, *, whole_is_ext: bool) -> Place:
    path = image.path
    found = _usable(image, table)
    if whole_is_ext:
        if not found:
            return Place(path)
        raise ExtsnapError(
            f"{path} is an ext volume and a disk whose partitions hold one, too",
            hint=f"choose with -P 0 for the whole of it, or {_choices(found)}",
        )
    if not found:
        raise NotExtError(
            f"{path} holds a disk with partitions ({table.kind}), none of them ext2, ext3 or ext4",
            hint=_list(image, table, table.partitions),
        )
    if len(found) > 1:
        raise ExtsnapError(
            f"{path} has {len(found)} ext partitions: {_described(image, found)}", hint=f"choose with {_choices(found)}"
        )
    return _place(path, table, found[0])


def _choices(found: Iterable[Partition]) -> str:
    return " or ".join(f"-P {part.number}" for part in found)


def _list(image: ImageFile, table: Table, found: Iterable[Partition]) -> str:
    return f"there are {_described(image, found)}" if table.partitions else "there are no partitions"


def _described(image: ImageFile, found: Iterable[Partition]) -> str:
    """Number, content and size of partitions, for one line of a message."""
    words = []
    for part in found:
        size = f"{part.length >> 20} MiB" if part.length >= 1 << 20 else f"{part.length >> 10} KiB"
        if part.problem:
            what = f"unusable: {part.problem}"
        elif part.extended:
            what = "extended"
        elif _is_ext(image, part.offset, part.end):
            what = "ext"
        else:
            with ImageFile(image.path, start=part.offset, length=part.length) as inside:
                what = recognise(inside)[0] or "unknown content"
        name = f", {part.name!a}" if part.name and not part.extended else ""
        words.append(f"{part.number} ({what}, {size}{name})")
    return ", ".join(words)
