"""Who has an image in use: loop devices and mounts on top of it, by device and inode, never by path."""

from __future__ import annotations

import fcntl
import os
import struct
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
        kind: "loop".
        name: Path of the loop device.
        mounts: Where it is mounted.
    """

    kind: str
    name: str
    mounts: tuple[str, ...]


def mounts_by_device() -> dict[tuple[int, int], list[str]]:
    """Mount points by (major, minor), from /proc/self/mountinfo; nothing is stat'ed."""
    found: dict[tuple[int, int], list[str]] = {}
    with open("/proc/self/mountinfo") as table:
        for line in table:
            fields = line.split()
            major, minor = fields[2].split(":")
            point = fields[4].encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")
            found.setdefault((int(major), int(minor)), []).append(point)
    return found


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
        with open(f"/sys/block/{name}/loop/backing_file") as file:
            status = os.stat(file.read().rstrip("\n"))
    except OSError:
        return None
    return status.st_dev, status.st_ino


def holders(device_id: tuple[int, int]) -> list[Holder]:
    """Everything on top of the file with this (st_dev, st_ino)."""
    found = []
    mounts: dict[tuple[int, int], list[str]] | None = None
    for name in loop_devices():
        if _backing(name) != device_id:
            continue
        mounts = mounts if mounts is not None else mounts_by_device()
        with open(f"/sys/block/{name}/dev") as file:
            major, minor = file.read().strip().split(":")
        found.append(Holder("loop", f"/dev/{name}", tuple(mounts.get((int(major), int(minor)), ()))))
    return found


def require_free(image: ImageFile) -> None:
    """Refuse an image that is in use.

    Raises:
        VolumeBusy: Names the loop devices and mounts, and what to do.
    """
    found = holders(image.device_id)
    if not found:
        return
    parts, steps = [], []
    for holder in found:
        if holder.mounts:
            parts.append(f"{holder.name} mounted on {', '.join(holder.mounts)}")
            steps += [f"umount {mount}" for mount in holder.mounts]
        else:
            parts.append(holder.name)
        steps.append(f"losetup -d {holder.name}")
    raise VolumeBusy(f"{image.path} is in use by {'; '.join(parts)}", hint=f"run {' && '.join(steps)} first")
