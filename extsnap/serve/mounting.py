"""Mounts, loop devices and who uses a file: everything about the kernel's side of a served directory.

Nothing here may wait for the server itself, because the server calls it too: mounts are read from
``/proc/self/mountinfo``, loop devices from sysfs (the ``LOOP_GET_STATUS64`` ioctl asks the backing file
for its attributes, that is: the server), open files by ``readlink`` in ``/proc``.  None of them calls up
into the mounted directory.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from extsnap.blockdev.inuse import in_other_namespaces
from extsnap.errors import ServerError, ToolError, VolumeBusy
from extsnap.serve import tools
from extsnap.serve.splice import MOST_BYTES

FSTYPE = "fuse.extsnap"

_MS_NOSUID, _MS_NODEV, _MS_NOATIME = 2, 4, 1024
_MNT_FORCE, _MNT_DETACH = 1, 2
#: What every mount has.
_OPTIONS = f"default_permissions,max_read={MOST_BYTES}"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


@dataclass(frozen=True)
class Mount:
    """One line of ``/proc/self/mountinfo``."""

    device: str  # "major:minor"
    point: str
    fstype: str
    source: str
    number: int = 0  # the kernel's id of it, and that of the mount it stands on
    parent: int = 0


@dataclass(frozen=True)
class Loop:
    """A loop device that is set up."""

    path: str  # /dev/loopN
    device: str  # "major:minor"
    backing: str  # the path of its file, as the kernel knows it


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def mounts(process: str = "self") -> list[Mount]:
    """All mounts of a process's mount namespace, in the order they were made."""
    found = []
    # latin-1 keeps bytes as they are through the octal escapes; fsdecode gives the path back.
    for line in Path(f"/proc/{process}/mountinfo").read_text(encoding="latin-1").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kind) < 2:
            continue
        point, source = (os.fsdecode(_unescape(text).encode("latin-1")) for text in (fields[4], kind[1]))
        found.append(Mount(fields[2], point, kind[0], source, int(fields[0]), int(fields[1])))
    return found


def mounts_elsewhere() -> Iterator[Mount]:
    """Mounts of the other mount namespaces that we may look into; their points are paths that lead there from here."""
    for process, mount in in_other_namespaces(mounts):
        yield replace(mount, point=f"/proc/{process}/root{mount.point}")


def mount_at(directory: str) -> Mount | None:
    """The mount that is on top at ``directory`` (an absolute path without symbolic links)."""
    return next((mount for mount in reversed(mounts()) if mount.point == directory), None)


def point_of(path: str) -> str:
    """Where the filesystem is mounted that a path without symbolic links is in; asks nobody but the kernel's table."""
    return max((mount.point for mount in mounts() if under(path, mount.point)), key=len, default="/")


def loops() -> list[Loop]:
    """All loop devices that are set up."""
    found = []
    try:
        names = sorted(name for name in os.listdir("/sys/block") if name.startswith("loop"))
    except OSError:
        return []
    for name in names:
        base = Path("/sys/block", name)
        try:
            backing = os.fsdecode((base / "loop/backing_file").read_bytes().rstrip(b"\n"))
            device = (base / "dev").read_text().strip()
        except OSError:  # not set up, or just gone
            continue
        found.append(Loop(f"/dev/{name}", device, backing))
    return found


def under(path: str, directory: str) -> bool:
    """Whether a path is a directory or something in it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def loops_over(path: str) -> list[Loop]:
    """Loop devices backed by ``path`` or by a file below it."""
    return [loop for loop in loops() if under(loop.backing.removesuffix(" (deleted)"), path)]


def mounts_over(path: str) -> list[Mount]:
    """Filesystems mounted from a served file: through a loop device, or by fuse2fs and its like."""
    all_mounts = mounts()
    devices = {loop.device for loop in loops_over(path)}
    return [
        mount
        for mount in all_mounts
        if mount.device in devices or (mount.fstype != FSTYPE and mount.source and under(mount.source, path))
    ]


def processes_using(path: str) -> list[tuple[int, str]]:
    """(pid, command name) of the processes that have ``path`` or a file below it open, as far as we may see."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        links = [f"/proc/{entry}/cwd", f"/proc/{entry}/root"]
        try:
            links += [f"/proc/{entry}/fd/{fd}" for fd in os.listdir(f"/proc/{entry}/fd")]
        except OSError:  # somebody else's, or gone
            continue
        for link in links:
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if under(target, path):
                try:
                    name = Path(f"/proc/{entry}/comm").read_text().strip()
                except OSError:
                    name = "?"
                found.append((int(entry), name))
                break
    return found


def users_of(path: str) -> list[str]:
    """Who uses a served file, in words for an error message; empty if nobody can be named."""
    found = []
    all_mounts = mounts()
    for loop in loops_over(path):
        points = [mount.point for mount in all_mounts if mount.device == loop.device]
        found.append(f"mounted at {', '.join(points)} ({loop.path})" if points else loop.path)
    for mount in all_mounts:
        if mount.fstype != FSTYPE and mount.source and under(mount.source, path):
            found.append(f"mounted at {mount.point} ({mount.fstype})")
    found += [f"{name} (pid {pid})" for pid, name in processes_using(path)]
    return found


# ---- the FUSE mount itself


def fuse_mount(directory: str, source: str, *, allow_other: bool = False) -> int:
    """Mount a FUSE connection at ``directory`` and return its descriptor (non-blocking, close-on-exec).

    As root with mount(2), else through fusermount3.  ``source`` is the absolute path of the image:
    e2fsck, tune2fs and resize2fs refuse an image that is the source of a mount.

    Raises:
        ServerError: This machine, or this user, has no FUSE; says what to do.
        ToolError: fusermount3 is missing or refused.
    """
    if os.geteuid() == 0:
        fd = _fuse_mount_directly(directory, source, allow_other)
    else:
        fd = _fuse_mount_by_helper(directory, source, allow_other)
    os.set_blocking(fd, False)
    return fd


def _fuse_mount_directly(directory: str, source: str, allow_other: bool) -> int:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ServerError(
            f"cannot serve: /dev/fuse: {error.strerror}",
            hint="load the fuse module (modprobe fuse), or give this container the device /dev/fuse",
        ) from error
    options = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},{_OPTIONS}"
    if allow_other:
        options += ",allow_other"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOATIME
    arguments = (os.fsencode(source), os.fsencode(directory), FSTYPE.encode())
    if _libc.mount(*arguments, flags, options.encode()) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise ServerError(
            f"cannot mount FUSE at {directory}: {os.strerror(code)}",
            hint="mounting needs the right to mount (CAP_SYS_ADMIN) here",
        )
    return fd


def _fuse_mount_by_helper(directory: str, source: str, allow_other: bool) -> int:
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"fsname={name},subtype=extsnap,{_OPTIONS},nosuid,nodev,noatime"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            helper = subprocess.Popen(
                [tools.find("fusermount3"), "-o", options, "--", directory],
                env={**tools.environment(), "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise ToolError(f"cannot run fusermount3: {error.strerror}") from error
        theirs.close()
        _, complaint = helper.communicate()
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1) if helper.returncode == 0 else (b"", [], 0, None)
        except OSError:
            fds = []
    if not fds:
        reason = (complaint.strip().splitlines() or ["no reason given"])[-1]
        raise ServerError(
            f"cannot mount FUSE at {directory}: {reason}",
            hint="/dev/fuse must be accessible and fusermount3 setuid root; or run extsnap as root",
        )
    os.set_inheritable(fds[0], False)
    return int(fds[0])


def fuse_unmount_command(directory: str, *, lazy: bool = False) -> list[str]:
    """The command that unmounts a FUSE directory: the server runs it and serves on meanwhile."""
    if os.geteuid() == 0:
        return [tools.find("umount"), "-i", *(["-l"] if lazy else []), directory]
    return [tools.find("fusermount3"), "-u", *(["-z"] if lazy else []), directory]


def fuse_abort(directory: str, *, force: bool = True) -> None:
    """Take a FUSE directory away at once, whoever uses it: lazily, without waiting for its server.

    ``force``: what waits for the server gets errors now.
    """
    path = os.fsencode(directory)
    if os.geteuid() == 0:
        if force:
            _libc.umount2(path, _MNT_FORCE)
        _libc.umount2(path, _MNT_DETACH)
        return
    try:
        subprocess.run(fuse_unmount_command(directory, lazy=True), capture_output=True, check=False)
    except (OSError, ToolError):
        pass


def fuse_mount_at(directory: str) -> Mount | None:
    """The served directory mounted at ``directory``, or None if it is none."""
    found = mount_at(directory)
    return found if found is not None and found.fstype == FSTYPE else None


# ---- mounts above a served file


def require_directory(directory: str) -> str:
    """Return the absolute path of a directory that can be mounted over.

    Raises:
        ServerError: It does not exist or is no directory, or an extsnap directory is already there.
    """
    path = os.path.realpath(directory)
    existing = mount_at(path)  # before stat: a dead FUSE mount answers that with an error
    if existing is not None and existing.fstype == FSTYPE:
        raise ServerError(f"{directory} already serves {existing.source}", hint=f"run extsnap detach {directory} first")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ServerError(f"{directory}: {error.strerror}", hint="make the directory first") from error
    if not stat.S_ISDIR(mode):
        raise ServerError(f"{directory} is not a directory")
    return path


def mount_file(file: str, directory: str, *, read_only: bool, allow_other: bool = False) -> None:
    """Mount a served file: through a loop device as root (it goes away with the mount), else with fuse2fs.

    ``allow_other``: also for other users, which a mount by root always is.

    Raises:
        ToolError: With what mount(8) or fuse2fs said.
    """
    if os.geteuid() != 0:
        tools.notice("not root: mounting through fuse2fs (slower, and without the kernel's checks)")
        others = ",allow_other,default_permissions" if allow_other else ""
        tools.run("fuse2fs", file, directory, "-o", f"{'ro' if read_only else 'rw'},fakeroot{others}")
        return
    options = "loop,ro" if read_only else "loop"
    done = tools.run("mount", "-o", options, "--", file, directory, ok=None)
    if done.returncode and read_only:
        # A view whose journal was not empty at its moment: nothing can be replayed into it.
        again = tools.run("mount", "-o", options + ",noload", "--", file, directory, ok=None)
        if again.returncode == 0:
            tools.notice("the snapshot's journal was not empty and cannot be replayed read-only: mounted without it")
            done = again
    if done.returncode:
        raise ToolError(f"cannot mount {file} at {directory}: {tools.last_line(done)}")
    _read_and_write_directly(directory)


def _read_and_write_directly(directory: str) -> None:
    """Have the loop device under a new mount go past the page cache of the file that it stands on.

    Its own cache is enough, its requests reach the server many at a time, and their errors and sizes are exact.
    A kernel that cannot goes on as it is.
    """
    mount = mount_at(directory)
    if mount is not None and mount.source.startswith("/dev/loop"):
        tools.run("losetup", "--direct-io=on", mount.source, ok=None)


def unmount(directory: str, *, lazy: bool = False) -> None:
    """Unmount what is on top at ``directory`` (a kernel filesystem or fuse2fs).

    ``lazy``: from there now, altogether when nobody uses it any more.

    Raises:
        VolumeBusy: Somebody uses it; names the processes.
        ToolError: umount failed for another reason.
    """
    found = mount_at(directory)
    if os.geteuid() != 0 and found is not None and found.fstype.startswith("fuse"):
        done = tools.run("fusermount3", "-u", *(["-z"] if lazy else []), "--", directory, ok=None)
    else:
        done = tools.run("umount", *(["--lazy"] if lazy else []), "--", directory, ok=None)
    if done.returncode == 0:
        return
    if "busy" in done.stderr:
        users = [f"{name} (pid {pid})" for pid, name in processes_using(directory)]
        inner = [mount.point for mount in mounts() if mount.point.startswith(directory.rstrip("/") + "/")]
        users += [f"mount at {point}" for point in inner]
        raise VolumeBusy(
            f"{directory} is in use" + (f" by {', '.join(users)}" if users else ""), hint="close it and unmount again"
        )
    raise ToolError(f"cannot unmount {directory}: {tools.last_line(done)}")
