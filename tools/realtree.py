"""Real trees to try things on: parts of this machine's own, and everything odd that a tree can hold.

Standard library only: the demonstration uses it outside the virtual environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import struct
from pathlib import Path

MIB = 1 << 20


def copy_part(
    source: Path, target: Path, *, most_bytes: int, most_files: int, largest: int = 2 * MIB, owners: bool = False
) -> tuple[int, int]:
    """Copy a tree until enough of it is there; what cannot be read and what is no file or symlink is left out.

    Args:
        source: A directory.
        target: A new directory.
        most_bytes: Copy no further directory after so many bytes, ...
        most_files: ... or files.
        largest: Leave out larger files.
        owners: Keep owners and groups (needs root).

    Returns:
        (files, bytes) copied.
    """
    count = copied = 0
    for directory, names, files in os.walk(source):
        names.sort()
        into = target / os.path.relpath(directory, source)
        into.mkdir(parents=True, exist_ok=True)
        for name in sorted(files):
            file = Path(directory, name)
            try:
                status = file.lstat()
                ordinary = stat.S_ISLNK(status.st_mode) or stat.S_ISREG(status.st_mode)
                if status.st_size > largest or not ordinary or not os.access(file, os.R_OK):
                    continue
                shutil.copy2(file, into / name, follow_symlinks=False)
                if owners:
                    os.chown(into / name, status.st_uid, status.st_gid, follow_symlinks=False)
                    if not stat.S_ISLNK(status.st_mode):
                        (into / name).chmod(stat.S_IMODE(status.st_mode))  # chown takes set-id bits away
            except FileNotFoundError:
                continue
            count, copied = count + 1, copied + status.st_size
        shutil.copystat(directory, into)
        if count >= most_files or copied >= most_bytes:
            break
    return count, copied


def add_odd_files(directory: Path, *, root: bool) -> None:
    """What any user can make and a distribution does not have: an attribute, 50 MiB of hole, a private file.

    Args:
        directory: A new directory.
        root: Whether the private file may belong to somebody else.
    """
    directory.mkdir()
    (directory / "attributes").write_text("has extended attributes\n")
    with contextlib.suppress(OSError):  # tmpfs has none
        os.setxattr(directory / "attributes", "user.comment", b"kept as well")
    (directory / "sparse").write_bytes(b"")
    os.truncate(directory / "sparse", 50 * MIB)
    (directory / "secret").write_text("mode 0600\n")
    (directory / "secret").chmod(0o600)
    if root:
        os.chown(directory / "secret", 12345, 54321)


def add_special_files(directory: Path) -> None:
    """What only root can make, and what mke2fs does not copy exactly: make it where the kernel has the volume mounted.

    Devices, a pipe, a socket, hard links of all of them and across directories, set-id bits, capabilities, an access
    list, large and many attributes, holes of every shape, names of any bytes, times with nanoseconds and far away.

    Args:
        directory: A new directory.
    """
    directory.mkdir(mode=0o1777)
    os.mknod(directory / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(directory / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    os.mkfifo(directory / "pipe", 0o622)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(directory / "socket"))
    (directory / "file").write_bytes(b"linked\n")
    other = directory / "directory"
    other.mkdir()
    for name in ("null", "disk", "pipe", "socket", "file"):
        (other / f"{name}-again").hardlink_to(directory / name)
    for number in range(200):
        (other / f"file-{number}").hardlink_to(directory / "file")
    (directory / "dangling").symlink_to("../nowhere")
    (directory / "long-symlink").symlink_to("l" * 3000)
    os.chown(directory / "long-symlink", 7, 8, follow_symlinks=False)
    (directory / os.fsdecode(b"bytes \xff\xfe\n\\ \x01")).write_bytes(b"")
    (directory / ("n" * 255)).write_bytes(b"")
    program = directory / "program"
    program.write_bytes(b"#!/bin/false\n")
    os.chown(program, 1, 2)
    program.chmod(0o6755)
    permitted = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep
    os.setxattr(program, "security.capability", permitted)
    nobody = 2**32 - 1
    entries = [(1, 6, nobody), (2, 4, 1000), (4, 4, nobody), (16, 4, nobody), (32, 0, nobody)]  # u:: u:1000 g:: m:: o::
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(directory / "file", "system.posix_acl_access", listed)
    os.setxattr(directory / "file", "trusted.overlay.opaque", b"y")
    for number in range(20):
        os.setxattr(other, f"user.number-{number}", os.urandom(number))
    os.setxattr(program, "user.large", os.urandom(2500))
    holes = directory / "holes"
    with open(holes, "wb") as file:
        for offset in (4096, 3 * MIB, 3 * MIB + 8192, 40 * MIB + 5, 90 * MIB):
            file.seek(offset)
            file.write(b"here" * 100)
        file.truncate(100 * MIB + 1)
    with open(directory / "reserved", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 3 * MIB)
    times = {
        "file": (1, 999_999_999),
        "holes": (2_000_000_000_123_456_789, 4_000_000_000_000_000_001),
        "pipe": (-5, -1),
    }
    for name, pair in times.items():
        os.utime(directory / name, ns=pair)
    os.utime(directory / "dangling", ns=(123_456_789, 987_654_321), follow_symlinks=False)
