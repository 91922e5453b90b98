"""Whose lock is in the way: processes by the locks that the kernel shows, for error messages.

The kernel names no owner of an open-file-description lock, but shows each lock with the descriptor that has it.
It shows inodes by the device of their superblock, which is not what ``stat`` tells on btrfs and overlays: there
every subvolume has a device number of its own.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Iterator


def _shown_inode(descriptor: int) -> str:
    """The file of an open descriptor as the kernel's lists of locks name it: major:minor:inode."""
    status = os.fstat(descriptor)
    major, minor, inode = os.major(status.st_dev), os.minor(status.st_dev), str(status.st_ino)
    try:
        with open(f"/proc/self/fdinfo/{descriptor}") as file:
            info = dict(line.split(":", 1) for line in file if ":" in line)
        mount, inode = info["mnt_id"].strip(), info.get("ino", inode).strip()
        with open("/proc/self/mountinfo", errors="replace") as table:
            shown = next(line.split()[2] for line in table if line.split(maxsplit=1)[0] == mount)
        major, minor = (int(part) for part in shown.split(":"))
    except (OSError, KeyError, StopIteration):  # no /proc, or a descriptor from another mount namespace
        pass
    return f"{major:02x}:{minor:02x}:{inode}"


def lock_holder(descriptor: int, start: int = 0, end: int = sys.maxsize) -> int | None:
    """Process with a lock in the way of one on bytes ``start`` to ``end`` of an open file; None if none is seen."""
    wanted = _shown_inode(descriptor)
    sharing = None
    for process, fields in _locks_of_descriptors(wanted):
        kind, low, high = fields[1], int(fields[-2]), sys.maxsize if fields[-1] == "EOF" else int(fields[-1]) + 1
        if kind == "OFDLCK" and low < end and start < high:
            return process
        if kind == "FLOCK":
            sharing = sharing or process
    if sharing is not None:
        return sharing
    try:
        with open("/proc/locks") as locks:
            for line in locks:
                fields = line.split()
                if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted and fields[4].isdigit():
                    return int(fields[4])
    except OSError:
        return None
    return None


def in_words(process: int) -> str:
    """A process for an error message: with its user, if that is somebody else."""
    try:
        user = os.stat(f"/proc/{process}").st_uid
    except OSError:  # it has ended
        return f"process {process}"
    if user == os.geteuid():
        return f"process {process}"
    try:
        return f"process {process} of user {pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"process {process} of user {user}"


def _locks_of_descriptors(inode: str) -> Iterator[tuple[int, list[str]]]:
    """(process, fields of a line of /proc/locks) for every lock on an inode that we may see."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            descriptors = os.listdir(f"/proc/{process}/fdinfo")
        except OSError:  # gone, or somebody else's
            continue
        for descriptor in descriptors:
            try:
                with open(f"/proc/{process}/fdinfo/{descriptor}") as file:
                    lines = [line.split()[1:] for line in file if line.startswith("lock:")]
            except OSError:
                continue
            yield from ((int(process), fields) for fields in lines if len(fields) > 7 and fields[5] == inode)


def write_locks() -> Iterator[tuple[int, os.stat_result, int, int]]:
    """(process, file, first byte, end) of every write lock on an open file description that we may see.

    Files of FUSE mounts are left out: to ask for what they are waits for their server.
    """
    try:
        with open("/proc/locks") as locks:
            if not any(line.split()[1:4:2] == ["OFDLCK", "WRITE"] for line in locks):
                return  # as nearly always: no need to look at every descriptor of every process
        with open("/proc/self/mountinfo", errors="replace") as table:
            asking = {line.split()[0] for line in table if line.partition(" - ")[2].startswith("fuse")}
    except OSError:
        return
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            descriptors = os.listdir(f"/proc/{process}/fdinfo")
        except OSError:  # gone, or somebody else's
            continue
        for descriptor in descriptors:
            try:
                with open(f"/proc/{process}/fdinfo/{descriptor}") as file:
                    lines = [line.split() for line in file]
                held = [fields for fields in lines if fields[:1] == ["lock:"] and fields[2:5:2] == ["OFDLCK", "WRITE"]]
                if not held or any(fields[0] == "mnt_id:" and fields[1] in asking for fields in lines):
                    continue
                status = os.stat(f"/proc/{process}/fd/{descriptor}")
            except OSError:
                continue
            for fields in held:
                yield int(process), status, int(fields[-2]), sys.maxsize if fields[-1] == "EOF" else int(fields[-1]) + 1
