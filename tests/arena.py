"""A place in memory for tests that copy, change and delete big images: a disk would be what takes their time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/dev/shm")
NEEDED_BYTES = 3 << 30


@contextlib.contextmanager
def arena() -> Iterator[Path]:
    """Yield a new directory, in memory where there is room; afterwards nothing may be mounted or served from it.

    Raises:
        AssertionError: Something was left behind; it is cleared away all the same.
    """
    roomy = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= NEEDED_BYTES
    top = Path(tempfile.mkdtemp(prefix="extsnap-arena-", dir=MEMORY if roomy else None))
    try:
        yield top
    finally:
        left = clear(top)
        shutil.rmtree(top, ignore_errors=True)
    assert not left, f"left behind: {left}"


def mounts(top: Path) -> list[str]:
    """Return the mount points below a directory, innermost first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split()[4] for line in file]
    return sorted((point for point in points if point.startswith(f"{top}/")), key=len, reverse=True)


def servers(top: Path) -> list[int]:
    """Return the processes of extsnap that serve an image below a directory."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
                if any("extsnap" in word for word in words) and any(str(top) in word for word in words):
                    found.append(int(process.name))
    return found


def clear(top: Path) -> list[str]:
    """Unmount and end what is left below a directory, and name it."""
    deadline = time.monotonic() + 5
    while (mounts(top) or servers(top)) and time.monotonic() < deadline:
        time.sleep(0.05)  # a server ends a moment after its last mount
    left = [f"a mount at {point}" for point in mounts(top)]
    for point in mounts(top):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
    for process in servers(top):
        left.append(f"process {process}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return left


def sync(path: Path) -> None:
    """Write out one filesystem.  `os.sync` waits for every one of the machine: also for one that is stuck."""
    subprocess.run(["sync", "-f", path], check=True)


_COMMON = "ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
_FEATURES = {
    "ext2": _COMMON,
    "ext3": f"{_COMMON},has_journal",
    "ext4": f"{_COMMON},has_journal,extent,64bit,flex_bg,huge_file,dir_nlink,extra_isize,metadata_csum",
}


def make_volume(
    path: Path, kind: str, mebibytes: int, *options: str, features: str = "", files: dict[str, bytes] | None = None
) -> Path:
    """Make a volume by mke2fs with these files in its root, and return its path.

    Args:
        kind: ext2, ext3 or ext4, with the features that those have by default.
        features: More of them, as mke2fs takes them.
    """
    wanted = f"none,{_FEATURES[kind]},{features}".rstrip(",")
    with tempfile.TemporaryDirectory(prefix="extsnap-tree-") as name:
        for file, content in (files or {}).items():
            Path(name, file).write_bytes(content)
        subprocess.run(
            [
                "mke2fs",
                "-q",
                "-F",
                "-t",
                kind,
                "-O",
                wanted,
                "-I",
                "256",
                *options,
                "-d",
                name,
                str(path),
                f"{mebibytes}M",
            ],
            check=True,
            capture_output=True,
            env={**os.environ, "MKE2FS_CONFIG": "/dev/null"},
        )
    return path
