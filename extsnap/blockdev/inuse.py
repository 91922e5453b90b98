"""Who has an image in use: everything that stands on its bytes, by device and inode, never by path.

Devices stand on each other: a loop device on a file or device, a partition on its disk, device-mapper and md on their
slaves.  So the question has two directions.  *Up*: what stands on the range that is meant, and is mounted or used as
swap.  *Down*: a loop device or partition stands on something itself, and whoever else uses those bytes down there uses
the same volume: another loop device over the file, a mount of the whole disk, an extsnap that has locked the file.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from extsnap.blockdev.locks import lock_holder, write_locks
from extsnap.errors import VolumeBusy

if TYPE_CHECKING:
    from extsnap.blockdev.image import ImageFile

_LOOP_GET_STATUS64 = 0x4C05
#: struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit, then fields not needed here.
_LOOP_INFO = struct.Struct("<QQQQQ192x")
OUR_FILESYSTEM = b"fuse.extsnap"

T = TypeVar("T")
#: ("file", st_dev, st_ino) or ("device", major, minor).
Key = tuple[str, int, int]


def file_key(status: os.stat_result) -> Key:
    """A file, whatever its name."""
    return "file", status.st_dev, status.st_ino


def device_key(number: int) -> Key:
    """A block device, whatever its node; ``number`` as in ``st_rdev``."""
    return "device", os.major(number), os.minor(number)


def _key_of(status: os.stat_result) -> Key:
    return device_key(status.st_rdev) if stat.S_ISBLK(status.st_mode) else file_key(status)


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``end`` of a file or device."""

    key: Key
    start: int = 0
    end: int = sys.maxsize

    def meets(self, other: Span) -> bool:
        """Whether both have a byte in common."""
        return self.key == other.key and self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Holder:
    """One user of an image.

    Attributes:
        kind: "loop", "mapped" (device-mapper, md), "device" (a disk or partition that is mounted or swap), "mount" for
            a FUSE filesystem that reads the file itself, "swap" for a file, "extsnap" for another one of us, "served"
            for a file that one of us serves.
        name: Path of the device or file, type of the mount, number of the process, or path of the served image.
        mounts: Where it is mounted.
        swaps: What of it is swap.
        elsewhere: (process, mount point) in mount namespaces of others, if it is not mounted in ours.
    """

    kind: str
    name: str
    mounts: tuple[str, ...] = ()
    swaps: tuple[str, ...] = ()
    elsewhere: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        if self.kind == "served":
            return f"extsnap, which serves {self.name} on {', '.join(self.mounts)}"
        words = [f"extsnap in process {self.name}" if self.kind == "extsnap" else self.name]
        if self.mounts:
            words.append(f"mounted on {', '.join(self.mounts)}")
        words += [
            f"mounted on {point} in the mount namespace of process {process}" for process, point in self.elsewhere
        ]
        if self.swaps:
            words.append("used as swap" if self.swaps == (self.name,) else f"used as swap ({', '.join(self.swaps)})")
        return " ".join(words)

    @property
    def steps(self) -> list[str]:
        """The commands that end this use."""
        found = [f"{'extsnap detach' if self.kind == 'served' else 'umount'} {point}" for point in self.mounts]
        found += [f"nsenter -m -t {process} umount {point}" for process, point in self.elsewhere]
        found += [f"swapoff {path}" for path in self.swaps]
        if self.kind == "loop":
            found.append(f"losetup -d {self.name}")
        if self.kind == "mapped":
            found.append(
                f"mdadm --stop {self.name}" if self.name.startswith("/dev/md") else f"dmsetup remove {self.name}"
            )
        return found


# ---- what the kernel tells


@dataclass(frozen=True)
class _Mount:
    """A line of /proc/PID/mountinfo; names as bytes, for they may hold any byte."""

    device: tuple[int, int]
    point: bytes
    kind: bytes
    source: bytes

    @property
    def shown_point(self) -> str:
        return self.point.decode(errors="replace")


def _mount_table(process: str = "self") -> list[_Mount]:
    """All mounts of a process's namespace; nothing is stat'ed."""
    found = []
    with open(f"/proc/{process}/mountinfo", "rb") as table:
        for line in table:
            fields = line.rstrip(b"\n").split(b" ")
            major, minor = fields[2].split(b":")
            kind, source = fields[fields.index(b"-", 6) + 1 :][:2]
            found.append(_Mount((int(major), int(minor)), _unescaped(fields[4]), kind, _unescaped(source)))
    return found


def _unescaped(name: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), name)


def in_other_namespaces(read: Callable[[str], list[T]]) -> Iterator[tuple[int, T]]:
    """(a process there, mount) of every other mount namespace that we may look into.

    Args:
        read: The mounts that a process sees.
    """
    try:
        seen = {os.readlink("/proc/self/ns/mnt")}
    except OSError:
        return
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            namespace = os.readlink(f"/proc/{process}/ns/mnt")
            if namespace in seen:
                continue
            table = read(process)
        except OSError:  # gone, or somebody else's
            continue
        seen.add(namespace)
        yield from ((int(process), mount) for mount in table)


def _fuse_points(table: list[_Mount]) -> set[bytes]:
    return {mount.point for mount in table if mount.kind.startswith(b"fuse")}


def _status(path: bytes, avoid: set[bytes]) -> os.stat_result | None:
    """What ``stat`` tells of an absolute path, or None where it cannot be told.

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
    return status


def _number(path: str) -> int:
    """A number in sysfs; 0 where there is none."""
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _text(path: str) -> str:
    """A line in sysfs; "" where there is none."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _device_of(directory: str) -> Key | None:
    """The device of a directory in sysfs."""
    major, found, minor = _text(f"{directory}/dev").partition(":")
    return ("device", int(major), int(minor)) if found else None


def _old_number(encoded: int) -> int:
    """A device number as the kernel reports it in `loop_info64` (huge_encode_dev)."""
    return os.makedev((encoded & 0xFFF00) >> 8, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00))


def _backing(name: str) -> Key | None:
    """What a loop device stands on; None where it cannot be asked."""
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
    device, inode, number, *_ = _LOOP_INFO.unpack(raw)
    return device_key(_old_number(number)) if number else ("file", _old_number(device), inode)


def _backing_path(name: str, root: str = "/sys") -> bytes:
    try:
        with open(f"{root}/class/block/{name}/loop/backing_file", "rb") as file:
            return file.read().removesuffix(b"\n")
    except OSError:
        return b""


def _backing_by_path(name: str, root: str = "/sys") -> Key | None:
    """Without asking the loop device: its backing file by the name that sysfs shows."""
    status = _status(_backing_path(name, root), _fuse_points(_mount_table()))
    return None if status is None else _key_of(status)


@dataclass(frozen=True)
class _Block:
    """A block device.

    Attributes:
        name: In sysfs.
        key: Its number.
        kind: As in `Holder`; "device" for disks and partitions.
        path: For people.
        below: What it stands on.
        is_part: Whether it is a partition: where that is mounted, its disk is.
    """

    name: str
    key: Key
    kind: str
    path: str
    below: tuple[Span, ...]
    is_part: bool

    def seen_from_above(self, below: Span, span: Span) -> Span:
        """The part of this device that lies on ``span`` of what it stands on."""
        if self.kind == "mapped":
            return Span(self.key)
        start = max(0, span.start - below.start)
        return Span(self.key, start, sys.maxsize if span.end == sys.maxsize else span.end - below.start)


def _blocks(root: str, *, by_name: bool) -> list[_Block]:
    """All block devices that stand on something, and all disks."""
    base, found = f"{root}/class/block", []
    try:
        names = sorted(os.listdir(base))
    except OSError:
        return []
    for name in names:
        directory = os.path.realpath(f"{base}/{name}")
        key = _device_of(directory)
        if key is None:
            continue
        kind, path, below, is_part = "device", f"/dev/{name.replace('!', '/')}", [], False
        if os.path.exists(f"{directory}/partition"):
            disk, is_part = _device_of(os.path.dirname(directory)), True
            start = _number(f"{directory}/start") * 512
            below = [Span(disk, start, start + _number(f"{directory}/size") * 512)] if disk else []
        elif os.path.exists(f"{directory}/loop"):
            kind, backing = "loop", _backing_by_path(name, root) if by_name or root != "/sys" else _backing(name)
            start, length = (_number(f"{directory}/loop/{part}") for part in ("offset", "sizelimit"))
            below = [Span(backing, start, start + length if length else sys.maxsize)] if backing else []
        else:
            try:
                slaves = [_device_of(f"{directory}/slaves/{slave}") for slave in os.listdir(f"{directory}/slaves")]
            except OSError:
                slaves = []
            below = [Span(slave) for slave in slaves if slave]
            kind = "mapped" if below else "device"
            mapped = _text(f"{directory}/dm/name")
            path = f"/dev/mapper/{mapped}" if mapped else path
        found.append(_Block(name, key, kind, path, tuple(below), is_part))
    return found


def _swaps(avoid: set[bytes]) -> list[tuple[Key, str]]:
    """(file or device, path) of all swap areas."""
    found = []
    try:
        with open("/proc/swaps", "rb") as table:
            rows = table.read().splitlines()[1:]
    except OSError:
        return []
    for row in rows:
        path = _unescaped(row.split()[0])
        status = _status(path, avoid)
        if status is not None:
            found.append((_key_of(status), path.decode(errors="replace")))
    return found


# ---- the walk

#: Mounts, swap areas, and mounts elsewhere.
_Uses = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[int, str], ...]]


@dataclass
class _Stack:
    """All devices, mounts and swap areas, as they are now."""

    blocks: list[_Block]
    table: list[_Mount]
    mounts: dict[Key, list[str]] = field(default_factory=dict)
    servers: list[tuple[Key, Holder]] = field(default_factory=list)
    elsewhere: dict[Key, list[tuple[int, str]]] = field(default_factory=dict)
    swaps: list[tuple[Key, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        avoid = _fuse_points(self.table)
        self.swaps = _swaps(avoid)
        for mount in self.table:
            if mount.kind.startswith(b"fuse"):
                # fuse2fs and its like read the file or device itself; extsnap holds a lock as well.
                status = None if mount.kind == OUR_FILESYSTEM else _status(mount.source, avoid)
                if status is not None:
                    kind = mount.kind.decode(errors="replace")
                    self.servers.append((_key_of(status), Holder("mount", kind, (mount.shown_point,))))
                continue
            key: Key = ("device", *mount.device)
            if not mount.device[0] and mount.source.startswith(b"/dev/"):
                # btrfs: the mount has a number of its own.
                status = _status(mount.source, avoid)
                key = key if status is None or not stat.S_ISBLK(status.st_mode) else _key_of(status)
            self.mounts.setdefault(key, []).append(mount.shown_point)

    def look_elsewhere(self) -> None:
        """Note the mounts of other namespaces, of devices that are not mounted in ours."""
        for process, mount in in_other_namespaces(_mount_table):
            key: Key = ("device", *mount.device)
            if mount.device[0] and key not in self.mounts:
                self.elsewhere.setdefault(key, []).append((process, mount.shown_point))

    def block(self, key: Key) -> _Block | None:
        return next((block for block in self.blocks if block.key == key), None)

    def on(self, span: Span, passed: set[Key]) -> list[Holder]:
        """Everything on these bytes, uppermost first, but through the devices of ``passed``."""
        found, uses = self._on(span, passed | {span.key})
        own = self.block(span.key)
        whole = Holder("device", own.path if own else "the device", *self._with(self._uses(span.key), uses))
        if span.key[0] == "file":
            found += [Holder("swap", path, (), (path,)) for key, path in self.swaps if key == span.key]
        elif whole.mounts or whole.swaps or whole.elsewhere:
            found.append(whole)
        return found

    def _uses(self, key: Key) -> _Uses:
        """How a device itself is used."""
        swaps = tuple(path for swap, path in self.swaps if swap == key)
        return tuple(self.mounts.get(key, ())), swaps, tuple(self.elsewhere.get(key, ()))

    @staticmethod
    def _with(one: _Uses, other: _Uses) -> _Uses:
        return one[0] + other[0], one[1] + other[1], one[2] + other[2]

    def _on(self, span: Span, passed: set[Key]) -> tuple[list[Holder], _Uses]:
        """What stands on these bytes, and how partitions there are used: by itself a partition is no use."""
        found = [holder for key, holder in self.servers if key == span.key]
        partitions: _Uses = ((), (), ())
        for block in self.blocks:
            below = next((below for below in block.below if below.meets(span)), None)
            if below is None or block.key in passed:
                continue
            passed.add(block.key)
            higher, uses = self._on(block.seen_from_above(below, span), passed)
            found += higher
            uses = self._with(self._uses(block.key), uses)
            if block.is_part:
                partitions = self._with(partitions, uses)
            else:
                found.append(Holder(block.kind, block.path, *uses))
        return found, partitions

    def above(self, span: Span) -> Iterator[Span]:
        """These bytes, and as what they are seen on the devices that stand on them."""
        yield span
        for block in self.blocks:
            for below in block.below:
                if below.meets(span) and block.key != span.key:
                    yield from self.above(block.seen_from_above(below, span))

    def below(self, span: Span) -> Iterator[tuple[Span, _Block]]:
        """What these bytes stand on themselves, down to the bottom, each with the device that stands on it."""
        block = self.block(span.key)
        if block is None:
            return
        for below in block.below:
            start = below.start if block.kind == "mapped" else below.start + span.start
            end = below.end if block.kind == "mapped" else min(below.end, below.start + span.end)
            lower = Span(below.key, start, end)
            yield lower, block
            yield from self.below(lower)


def _served(span: Span, table: list[_Mount]) -> list[Holder]:
    """The extsnap that serves a file."""
    for mount in table:
        if mount.kind == OUR_FILESYSTEM and span.key[0] == "file" and os.makedev(*mount.device) == span.key[1]:
            return [Holder("served", mount.source.decode(errors="replace"), (mount.shown_point,))]
    return []


def _locked(block: _Block, file: Span, table: list[_Mount]) -> list[Holder]:
    """The extsnap that has locked the file of a loop device."""
    path = _backing_path(block.name)
    status = _status(path, _fuse_points(table))
    if status is None or _key_of(status) != file.key:
        return []
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        process = lock_holder(descriptor, file.start, file.end)
    finally:
        os.close(descriptor)
    return [] if process is None else [Holder("extsnap", str(process))]


def holders(span: Span, *, serving: bool = False, sysfs: str = "/sys") -> list[Holder]:
    """Everything that has these bytes in use, uppermost first.

    FUSE mounts count whose source is the file (fuse2fs), whatever part of it they read.

    Args:
        span: The file or device, and which part of it.
        serving: Whether the asker serves files that a loop device may stand on: the kernel asks the server for their
            attributes before it tells a loop device's file, so loop devices are then told by their file's name.
        sysfs: Where that is mounted.
    """
    stack = _Stack(_blocks(sysfs, by_name=serving), _mount_table())
    found = _all_on(stack, span, serving)
    if found:
        stack.look_elsewhere()
        found = _all_on(stack, span, serving)
    return found


def _all_on(stack: _Stack, span: Span, serving: bool) -> list[Holder]:
    found = stack.on(span, set()) + _served(span, stack.table)
    passed = {span.key}
    for lower, block in stack.below(span):
        found += [holder for holder in stack.on(lower, passed) if holder not in found]
        if lower.key[0] == "file" and not serving:
            found += _served(lower, stack.table) or _locked(block, lower, stack.table)
        passed.add(lower.key)
    return found


def _refusal(path: str, found: list[Holder]) -> VolumeBusy:
    steps = list(dict.fromkeys(step for holder in found for step in holder.steps))
    hint = f"run {' && '.join(steps)} first" if steps else "wait for it, or end it with extsnap detach"
    return VolumeBusy(f"{path} is in use by {'; '.join(map(str, found))}", hint=hint)


def require_free(image: ImageFile, *, serving: bool = False) -> None:
    """Refuse an image that is in use.

    Args:
        image: The file, or range of it.
        serving: As `holders` takes it.

    Raises:
        VolumeBusy: Names who has it, and what to do.
    """
    end = image.start + image.size if image.is_range else sys.maxsize
    found = holders(Span(image.key, image.start, end), serving=serving)
    if found:
        raise _refusal(image.path, found)


def writers(image: ImageFile, *, only_elsewhere: bool = False) -> Iterator[int]:
    """The processes of extsnap that write these bytes, through this file or device or another one.

    Args:
        image: The file or device, or range of it.
        only_elsewhere: Whether a lock of the asker's tells of those through this one.
    """
    span = Span(image.key, image.start, image.start + image.size if image.is_range else sys.maxsize)
    stack = _Stack(_blocks("/sys", by_name=False), [])
    lowest = [span, *(lower for lower, _ in stack.below(span))]
    same = [reached for lower in lowest for reached in stack.above(lower)]
    # As nearly always.  To read the list of all locks takes the kernel many milliseconds, in which it does nothing.
    if only_elsewhere and all(other.key == image.key for other in same):
        return
    for process, status, start, end in write_locks():
        if any(Span(_key_of(status), start, end).meets(other) for other in same):
            yield process


def require_unwritten(image: ImageFile) -> None:
    """Refuse to read an image that another extsnap writes through another device, which has a lock of its own.

    Args:
        image: The file, or range of it, locked against writers of that very file.

    Raises:
        VolumeBusy: Names who writes it.
    """
    for process in writers(image, only_elsewhere=True):
        raise VolumeBusy(
            f"{image.path} is in use by extsnap in process {process}",
            hint="wait for it, or end it with extsnap detach",
        )


def busy(path: str, span: Span) -> VolumeBusy:
    """The error for a block device that the kernel will not give to us alone: names who has it."""
    stack = _Stack(_blocks("/sys", by_name=False), _mount_table())
    stack.look_elsewhere()
    found = _all_on(stack, Span(span.key), False)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        process = None
    else:
        try:
            process = lock_holder(descriptor, span.start, span.end)
        finally:
            os.close(descriptor)
    found += [] if process is None else [Holder("extsnap", str(process))]
    if found:
        return _refusal(os.path.abspath(path), found)
    hint = f"fuser -v {path} may name who has it"
    return VolumeBusy(f"{os.path.abspath(path)} is in use by somebody who has opened it for himself alone", hint=hint)
