"""Who has an image in use: loop devices and mounts on top of it, by device and inode, never by path."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
import sys
from dataclasses import dataclass

from extsnap.blockdev.image import ImageFile
from extsnap.errors import VolumeBusy

_LOOP_GET_STATUS64 = 0x4C05
#: struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit, then fields not needed here.
_LOOP_INFO = struct.Struct("<QQQQQ192x")


@dataclass(frozen=True)
class Holder:
    """One user of an image.

    Attributes:
        kind: "loop", or "mount" for a FUSE filesystem that reads the file itself.
        name: Path of the loop device, or type of the mount.
        mounts: Where it is mounted.
    """

    kind: str
    name: str
    mounts: tuple[str, ...]


@dataclass(frozen=True)
class _Mount:
    """A line of /proc/self/mountinfo; names as bytes, for they may hold any byte."""

    device: tuple[int, int]
    point: bytes
    kind: bytes
    source: bytes


def _mount_table() -> list[_Mount]:
    """All mounts of this namespace; nothing is stat'ed."""
    found = []
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.rstrip(b"\n").split(b" ")
            major, minor = fields[2].split(b":")
            kind, source = fields[fields.index(b"-", 6) + 1 :][:2]
            found.append(_Mount((int(major), int(minor)), _unescaped(fields[4]), kind, _unescaped(source)))
    return found


def _unescaped(name: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), name)


def mounts_by_device() -> dict[tuple[int, int], list[str]]:
    """Mount points by (major, minor), from /proc/self/mountinfo; nothing is stat'ed."""
    found: dict[tuple[int, int], list[str]] = {}
    for mount in _mount_table():
        found.setdefault(mount.device, []).append(mount.point.decode(errors="replace"))
    return found


def _identity(path: bytes, avoid: set[bytes]) -> tuple[int, int] | None:
    """(st_dev, st_ino) of an absolute path, or None where it cannot be told.

    Nothing at or below a path of ``avoid`` is touched: a call into a FUSE mount waits for its server, which may be
    the process that asks.
    """
    if not path.startswith(b"/"):
        return None
    at, ahead, links = b"/", path.split(b"/"), 0
    try:
        status = os.lstat(at)
        while ahead:
            after = os.path.normpath(at + b"/" + ahead.pop(0))
            # Two leading slashes mean something else to POSIX, and to normpath; not to Linux.
            after = b"/" + after.lstrip(b"/")
            if after in avoid:
                return None
            status = os.lstat(after)
            if not stat.S_ISLNK(status.st_mode):
                at = after
                continue
            links += 1
            if links > 40:
                return None
            target = os.readlink(after)
            ahead = target.split(b"/") + ahead
            at = b"/" if target.startswith(b"/") else at
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _fuse_points(table: list[_Mount]) -> set[bytes]:
    return {mount.point for mount in table if mount.kind.startswith(b"fuse")}


def loop_devices() -> list[str]:
    """Names (loop0, loop1, ...) of the loop devices that have a backing file."""
    try:
        names = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    except OSError:
        return []
    return sorted(name for name in names if os.path.exists(f"/sys/block/{name}/loop"))


def _backing(name: str) -> tuple[int, int] | None:
    """(st_dev, st_ino) of a loop device's backing file; None where it cannot be asked."""
    try:
        descriptor = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return _backing_by_path(name)
    try:
        raw = fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    device, inode, *_ = _LOOP_INFO.unpack(raw)
    # The kernel reports the device in its old 16+16 bit encoding of huge_encode_dev.
    major, minor = (device & 0xFFF00) >> 8, (device & 0xFF) | ((device >> 12) & 0xFFF00)
    return os.makedev(major, minor), inode


def _backing_by_path(name: str) -> tuple[int, int] | None:
    """Without the right to open the loop device: its backing file by the name that sysfs shows."""
    try:
        with open(f"/sys/block/{name}/loop/backing_file", "rb") as file:
            path = file.read().removesuffix(b"\n")
    except OSError:
        return None
    return _identity(path, _fuse_points(_mount_table()))


def _number(path: str) -> int:
    """A number in sysfs; 0 where there is none."""
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _loop_range(name: str) -> tuple[int, int]:
    """(first byte, end) of what a loop device shows of its file."""
    start, length = (_number(f"/sys/block/{name}/loop/{field}") for field in ("offset", "sizelimit"))
    return start, start + length if length else sys.maxsize


def _devices_of(name: str, start: int, end: int) -> list[tuple[int, int]]:
    """(major, minor) of a loop device and of its partitions in a range of its file."""
    base, begin = f"/sys/block/{name}", _loop_range(name)[0]
    found = [base]
    for part in os.listdir(base):
        low = begin + _number(f"{base}/{part}/start") * 512
        if part.startswith(f"{name}p") and low < end and start < low + _number(f"{base}/{part}/size") * 512:
            found.append(f"{base}/{part}")
    numbers = []
    for path in found:
        with open(f"{path}/dev") as file:
            major, minor = file.read().strip().split(":")
        numbers.append((int(major), int(minor)))
    return numbers


def holders(
    device_id: tuple[int, int], start: int = 0, end: int = sys.maxsize, *, serving: bool = False
) -> list[Holder]:
    """Everything on top of the bytes from ``start`` to ``end`` of the file with this (st_dev, st_ino).

    FUSE mounts count whose source is the file (fuse2fs), whatever part of it they read; but not those of extsnap,
    which holds a lock as well.

    Args:
        device_id: The file.
        start: First byte.
        end: Behind the last byte.
        serving: Whether the asker serves files that a loop device may stand on: the kernel asks the server for their
            attributes before it tells a loop device's file, so loop devices are then told by their file's name.
    """
    backing = _backing_by_path if serving else _backing
    found = []
    mounts: dict[tuple[int, int], list[str]] | None = None
    for name in loop_devices():
        low, high = _loop_range(name)
        if low >= end or start >= high or backing(name) != device_id:
            continue
        mounts = mounts if mounts is not None else mounts_by_device()
        points = [point for device in _devices_of(name, start, end) for point in mounts.get(device, ())]
        found.append(Holder("loop", f"/dev/{name}", tuple(points)))
    table = _mount_table()
    avoid = _fuse_points(table)
    for mount in table:
        other_server = mount.kind.startswith(b"fuse") and mount.kind != b"fuse.extsnap"
        if other_server and _identity(mount.source, avoid) == device_id:
            point = mount.point.decode(errors="replace")
            found.append(Holder("mount", mount.kind.decode(errors="replace"), (point,)))
    return found


def require_free(image: ImageFile, *, serving: bool = False) -> None:
    """Refuse an image that is in use.

    Args:
        image: The file, or range of it.
        serving: As `holders` takes it.

    Raises:
        VolumeBusy: Names the loop devices and mounts, and what to do.
    """
    end = image.start + image.size if image.is_range else sys.maxsize
    found = holders(image.device_id, image.start, end, serving=serving)
    if not found:
        return
    parts, steps = [], []
    for holder in found:
        parts.append(f"{holder.name} mounted on {', '.join(holder.mounts)}" if holder.mounts else holder.name)
        steps += [f"umount {mount}" for mount in holder.mounts]
        if holder.kind == "loop":
            steps.append(f"losetup -d {holder.name}")
    raise VolumeBusy(f"{image.path} is in use by {'; '.join(parts)}", hint=f"run {' && '.join(steps)} first")
