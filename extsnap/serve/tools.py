"""Running system programs: e2fsck, mount, umount, fusermount3 and friends.

Administration programs often live in directories that are not in a user's ``PATH``; they are looked
for there too.  ``LC_ALL=C``, because their output is read and quoted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Collection

from extsnap.errors import ToolError

_SYSTEM_DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin")

# Program -> the Debian package that has it.
_PACKAGES = {
    "e2fsck": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
    "mount": "mount",
    "umount": "mount",
    "losetup": "mount",
    "fusermount3": "fuse3",
    "fuse2fs": "fuse2fs",
    "nbdkit": "nbdkit",
    "qemu-nbd": "qemu-utils",
}


def notice(message: str) -> None:
    """One line for the user that is no error: standard output belongs to what was asked for."""
    print(f"extsnap: {message}", file=sys.stderr, flush=True)


def find(program: str) -> str:
    """Return the path of ``program``.

    Raises:
        ToolError: It is not installed; the hint names the package.
    """
    path = os.environ.get("PATH", os.defpath) + os.pathsep + os.pathsep.join(_SYSTEM_DIRECTORIES)
    found = shutil.which(program, path=path)
    if found is None:
        package = _PACKAGES.get(program, program)
        raise ToolError(f"{program} is not installed", hint=f"install it (Debian: apt install {package})")
    return found


def environment() -> dict[str, str]:
    """The environment of this process with the C locale."""
    return {**os.environ, "LC_ALL": "C"}


def run(program: str, *arguments: str, ok: Collection[int] | None = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, its output captured and its input empty.

    Args:
        program: Name of the program.
        arguments: Its arguments.
        ok: The exit statuses that are no failure, or None if the caller decides.

    Raises:
        ToolError: It is missing, cannot be started, or ended with another status; says its last line.
    """
    command = [find(program), *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment()
        )
    except OSError as error:
        raise ToolError(f"cannot run {program}: {error.strerror}") from error
    if ok is not None and done.returncode not in ok:
        raise ToolError(f"{program} failed with status {done.returncode}: {last_line(done)}")
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a program said last: the line of its output that is worth quoting."""
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    complaints = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # mount(8) ends with a pointer to dmesg(1): the reason is in the line before.
    useful = [line for line in complaints if "dmesg(1)" not in line]
    return (useful or complaints or lines or ["no output"])[-1]
