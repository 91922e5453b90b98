"""Taking away what stands on a served directory: mounts, loop devices, and last the directory itself.

``detach --force`` does it, above all after a server was killed.  The order matters: the kernel names the file under
a loop device by its path, and once the directory is unmounted that path says nothing any more, so what stands on it
goes first.  Whatever cannot be shown to stand on this directory is left alone, and nothing is touched before that is
known of everything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from extsnap.errors import ExtsnapError, VolumeBusy
from extsnap.serve import mounting, tools
from extsnap.serve.mounting import FSTYPE, Loop, Mount

Tell = Callable[[str], None]

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO_BYTES = 232  # struct loop_info64; begins with __u64 lo_device, lo_inode
_GONE = (errno.ENOTCONN, errno.ECONNABORTED)
_LOOP_PATIENCE = 2.0  # seconds in which the kernel lets go of a loop device after its last close


@dataclass(frozen=True)
class Above:
    """What stands on a served directory.

    Attributes:
        mounts: Filesystems mounted from its files, through loop devices, their partitions or fuse2fs; newest first.
        loops: Loop devices over its files, and over those loop devices; uppermost first.
        copies: The directory itself, bound to other places.
    """

    mounts: list[Mount]
    loops: list[Loop]
    copies: list[Mount]

    def __bool__(self) -> bool:
        return bool(self.mounts or self.loops)

    def __str__(self) -> str:
        sources = {mount.device: mount.source for mount in self.mounts}
        sources |= {loop.device: loop.path for loop in self.loops}
        words = []
        for device, source in sources.items():
            points = [mount.point for mount in reversed(self.mounts) if mount.device == device]
            words.append(f"mounted at {', '.join(points)} ({source})" if points else source)
        return ", ".join(words)


def is_dead(directory: str) -> bool:
    """Whether the server of a FUSE directory is gone (asking one that lives is harmless)."""
    try:
        os.stat(directory)
    except OSError as error:
        return error.errno in _GONE
    return False


def above(directory: Mount, files: Collection[str] = ("",)) -> Above:
    """Look for what stands on a served directory.

    Args:
        files: Names in it, to look only for what stands on those.
    """
    paths = [os.path.join(directory.point, name) if name else directory.point for name in files]
    every = mounting.loops()
    found = [loop for loop in every if _backed_by(loop, directory, paths)]
    for loop in found:  # grows on the way: loop devices over loop devices
        nodes = {loop.path, *(f"/dev/{name}" for name in partitions(loop))}
        found += [other for other in every if other.backing in nodes and other not in found]
    devices = {loop.device for loop in found} | {device for loop in found for device in partitions(loop).values()}
    table = mounting.mounts()
    mounts = [
        mount
        for mount in table
        if mount.device in devices
        or (_reads_files(mount) and any(mounting.under(mount.source, path) for path in paths))
    ]
    copies = [
        mount
        for mount in table
        if mount.device == directory.device and mount.fstype == FSTYPE and mount.point != directory.point
    ]
    return Above(mounts[::-1], found[::-1], copies[::-1])


def _reads_files(mount: Mount) -> bool:
    """Whether a mount may be fuse2fs or its like, whose source is the file that it reads."""
    return mount.fstype.startswith("fuse") and mount.fstype != FSTYPE


def _backed_by(loop: Loop, directory: Mount, paths: Collection[str]) -> bool:
    """Whether a loop device's file is one of the directory's, and not one of the same path that it hides."""
    backing = loop.backing.removesuffix(" (deleted)")
    if not any(mounting.under(backing, path) for path in paths):
        return False
    try:
        with open(loop.path, "rb", buffering=0) as device:
            answer = fcntl.ioctl(device, _LOOP_GET_STATUS64, bytes(_LOOP_INFO_BYTES))
    except OSError:
        return True  # its file does not answer: the server is gone; or we may not ask
    major, minor = map(int, directory.device.split(":"))
    return bool(struct.unpack_from("=Q", answer)[0] == os.makedev(major, minor))


def partitions(loop: Loop) -> dict[str, str]:
    """Names of a loop device's partitions, with "major:minor" of each."""
    found = {}
    for entry in Path("/sys/block", os.path.basename(loop.path)).glob(f"{os.path.basename(loop.path)}p*/dev"):
        with contextlib.suppress(OSError):
            found[entry.parent.name] = entry.read_text().strip()
    return found


def loop_below(device: str) -> Loop | None:
    """The loop device that is a device ("major:minor") or has it as a partition."""
    return next((loop for loop in mounting.loops() if device in (loop.device, *partitions(loop).values())), None)


def take_off(directory: Mount, tell: Tell) -> None:
    """Unmount and detach what stands on a served directory; what is busy is detached lazily.

    Args:
        directory: The served directory, whose server may live or not.
        tell: Called with a line for each thing that was done.

    Raises:
        VolumeBusy: Something that does not stand on the directory is in the way; nothing was done.
        ToolError: umount failed for another reason.
    """
    found = above(directory)
    _refuse_strangers(found)
    busy = [mount for mount in found.mounts if not _unmount(mount, tell)]
    for loop in found.loops:
        _detach(loop, tell, 0.1 if busy else _LOOP_PATIENCE)
    for copy in found.copies:
        mounting.fuse_abort(copy.point, force=False)
        tell(f"unmounted {copy.point}, where the served directory was shown too")


def clear(directory: Mount, tell: Tell) -> None:
    """Take a dead directory away with everything that stands on it.

    Raises:
        VolumeBusy, ToolError: As `take_off`.
    """
    take_off(directory, tell)
    remove(directory)
    tell(f"unmounted {directory.point}, where {directory.source} was served")


def remove(directory: Mount) -> None:
    """Take a dead directory away."""
    mounting.fuse_abort(directory.point)


def remove_if_free(directory: Mount) -> bool:
    """Take a dead directory away if nothing stands on it; returns whether that is so."""
    deadline = time.monotonic() + _LOOP_PATIENCE
    while found := above(directory):
        # The loop device of a mount that has just gone goes a moment later.
        if found.mounts or time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    remove(directory)
    return True


def _refuse_strangers(found: Above) -> None:
    """A mount of somebody else's inside or on top of ours must not go with it.

    Raises:
        VolumeBusy: There is one.
    """
    ours = {mount.number for mount in found.mounts}
    below = dict.fromkeys(ours)
    strangers = []
    table = mounting.mounts()
    while fresh := [mount for mount in table if mount.parent in below and mount.number not in below]:
        below |= dict.fromkeys(mount.number for mount in fresh)
        strangers += [mount.point for mount in fresh]
    strangers += [mount.point for mount in found.mounts if _mount_that_shows_at(mount.point) not in below]
    if strangers:
        raise VolumeBusy(
            f"what is mounted at {', '.join(strangers)} is inside or on top of a mount of this volume, and not of it",
            hint="unmount it first; nothing was done",
        )


def _mount_that_shows_at(point: str) -> int | None:
    """The id of the mount that a path leads to; None if it leads nowhere."""
    try:
        descriptor = os.open(point, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    finally:
        os.close(descriptor)
    return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), None)


def _is_there(mount: Mount) -> bool:
    return any(other.number == mount.number for other in mounting.mounts())


def _unmount(mount: Mount, tell: Tell) -> bool:
    """Returns False if it is in use and will be gone altogether only when its users are."""
    if not _is_there(mount):
        return True
    try:
        mounting.unmount(mount.point)
        tell(f"unmounted {mount.point}")
        return True
    except VolumeBusy:
        if not _is_there(mount):
            return True
    users = [f"{name} (pid {pid})" for pid, name in mounting.processes_using(mount.point)]
    # What a living server still takes shall reach it: afterwards nobody waits for it any more.
    tools.run("sync", "-f", "--", mount.point, ok=None)
    mounting.unmount(mount.point, lazy=True)
    tell(f"unmounted {mount.point} from under {', '.join(users) or 'somebody'}: they get errors until they leave it")
    return False


def _detach(loop: Loop, tell: Tell, patience: float) -> None:
    """A loop device that mount(8) made goes by itself with its mount, if a moment later."""

    def gone(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while any((other.path, other.backing) == (loop.path, loop.backing) for other in mounting.loops()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    if not gone(0.1):
        done = tools.run("losetup", "-d", loop.path, ok=None)  # of one in use: as soon as it is free
        if not gone(patience):
            if done.returncode:
                reason = tools.last_line(done)
                raise ExtsnapError(f"cannot detach {loop.path}: {reason}", hint=f"run losetup -d {loop.path}")
            tell(f"{loop.path} goes with the last who uses it")
            return
    tell(f"detached {loop.path}")
