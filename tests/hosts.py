"""Filesystems for images to lie on, made in loop images, and the block devices that stand on images."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 1 << 20
#: Each kind with what makes it, and the least size that its program takes.
HOSTS: dict[str, tuple[list[str], int]] = {
    "tmpfs": ([], 0),
    "ext4": (["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0"], 0),
    "xfs": (["mkfs.xfs", "-q", "-f", "-m", "reflink=1"], 300),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], 300),
}

# mkfs.btrfs looks at the file behind every loop device that is mounted, and gives up at one whose server is dead, which
# another test may have on purpose just now: in a mount namespace of its own it does not see them.
ALONE = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'while read -r source point rest; do case $source in /dev/loop*) umount --lazy "$point" ;; esac; done '
    '</proc/self/mounts; exec "$@"',
    "sh",
)


def sh(*command: str | os.PathLike[str]) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout.strip()


@contextlib.contextmanager
def loop(path: str | os.PathLike[str], *options: str) -> Iterator[str]:
    """A loop device over a file or block device."""
    device = sh("losetup", "--find", "--show", *options, path)
    try:
        yield device
    finally:
        sh("losetup", "--detach", device)


@contextlib.contextmanager
def partitions(device: str) -> Iterator[None]:
    """The kernel's own devices of all partitions; a loop device without ``-P`` would keep them for its next user."""
    subprocess.run(["partx", "--delete", device], capture_output=True, check=False)  # where the kernel made them itself
    sh("partx", "--add", device)
    try:
        yield
    finally:
        sh("partx", "--delete", device)


@contextlib.contextmanager
def partition_node(device: str, number: int, offset: int, length: int) -> Iterator[str]:
    """The kernel's own device of a partition, whether or not this kernel reads partition tables."""
    node = f"{device}p{number}"
    sh("partx", "--add", "--nr", str(number), device)
    try:
        name = os.path.basename(node)
        base = Path("/sys/class/block", name)
        assert [int((base / field).read_text()) * 512 for field in ("start", "size")] == [offset, length]
        yield node
    finally:
        sh("partx", "--delete", "--nr", str(number), device)


@contextlib.contextmanager
def host(kind: str, top: Path, mebibytes: int) -> Iterator[Path]:
    """A new filesystem of a kind, mounted below ``top``; on a machine without its programs or the kind, a skip."""
    command, least = HOSTS[kind]
    point = top / f"host-{kind}"
    point.mkdir()
    size = max(mebibytes, least)
    if not command:
        mount: list[str | Path] = ["mount", "-t", "tmpfs", "-o", f"size={size}M", "tmpfs", point]
    else:
        if shutil.which(command[0]) is None:
            pytest.skip(f"no {command[0]}")
        backing = top / f"host-{kind}.img"
        with backing.open("wb") as file:
            file.truncate(size * MIB)
        sh(*ALONE, *command, backing)
        mount = ["mount", "-o", "loop", backing, point]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {kind} here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        sh("umount", point)
