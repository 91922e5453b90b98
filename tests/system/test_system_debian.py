"""A root filesystem as a virtual machine has it: ext4 in a GPT disk image, upgraded through a mount, and taken back.

The tree is this machine's own /etc and parts of its /usr, with everything odd that a tree can hold.  It is compared
entry by entry with what the kernel showed before the first snapshot: content, owner, mode, all three times with
nanoseconds, attributes, hard links, device numbers, holes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import disks
import oracle
import pytest
import realtree
from arena import arena
from hosts import MIB, loop, sh

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

DISK_BYTES = 1200 * MIB
BOOT, ROOT = (MIB, 64 * MIB), (65 * MIB, 1134 * MIB)
DATABASE_BYTES = 220 * MIB


@contextmanager
def mounted(disk: Path, *options: str) -> Iterator[Path]:
    """The root filesystem by the kernel, without extsnap."""
    point = disk.parent / "plain"
    point.mkdir(exist_ok=True)
    with loop(disk, "-o", str(ROOT[0]), "--sizelimit", str(ROOT[1])) as device:
        sh("mount", "-o", ",".join(["noatime", *options]), device, point)
        try:
            yield point
        finally:
            sh("umount", point)


def fsck(disk: Path) -> None:
    with loop(disk, "-r", "-o", str(ROOT[0]), "--sizelimit", str(ROOT[1])) as device:
        oracle.assert_clean(device)


def manifest(directory: Path) -> oracle.Manifest:
    """The tree; of its root, the times are left out: /.extsnap is made there."""
    found = oracle.tree(directory, holes=True)
    found["."] = replace(found["."], mtime_ns=0, ctime_ns=0)
    return found


def make_disk(top: Path) -> Path:
    """The disk image, with the whole tree in it."""
    tree, disk = top / "tree", top / "vm.img"
    tree.mkdir()
    # As Debian has it: /bin and /lib are links into /usr.
    for part, most in (("etc", 20), ("usr/bin", 60), ("usr/lib", 90), ("usr/share", 50)):
        realtree.copy_part(
            Path("/", part), tree / part, most_bytes=most * MIB, most_files=2500, largest=8 * MIB, owners=True
        )
    for name in ("bin", "lib"):
        (tree / name).symlink_to(f"usr/{name}")
    realtree.add_odd_files(tree / "odd", root=True)
    table = disks.gpt(DISK_BYTES, [(1, *BOOT), (2, *ROOT)])
    disks.make(disk, DISK_BYTES, {**table, BOOT[0]: os.urandom(MIB)})
    place = f"offset={ROOT[0]}"
    sh("mke2fs", "-q", "-F", "-t", "ext4", "-E", place, "-L", "root", "-d", tree, disk, f"{ROOT[1] >> 10}k")
    shutil.rmtree(tree)
    with mounted(disk) as root:
        realtree.add_special_files(root / "special")
        rng = random.Random(1)
        (root / "var").mkdir()
        with open(root / "var" / "database", "wb") as file:
            for _ in range(DATABASE_BYTES // MIB):
                file.write(rng.randbytes(MIB))
    return disk


def upgrade(root: Path) -> None:
    """What a package manager and its scripts do, and then an accident."""
    rng = random.Random(2)
    programs = sorted(path for path in (root / "usr/bin").iterdir() if path.is_file() and not path.is_symlink())
    for path in programs:  # each new version beside the old one, then renamed over it, as dpkg does
        new = path.with_name(f"{path.name}.dpkg-new")
        new.write_bytes(rng.randbytes(path.stat().st_size))
        shutil.copystat(path, new)
        path.with_name(f"{path.name}.dpkg-tmp").hardlink_to(path)
        new.rename(path)
        path.with_name(f"{path.name}.dpkg-tmp").unlink()
    with open(root / "var/database", "r+b") as file:  # in place, all of it
        for _ in range(DATABASE_BYTES // MIB):
            file.write(rng.randbytes(MIB))
        os.fsync(file.fileno())
    shutil.rmtree(root / "usr/share")
    (root / "usr/lib").rename(root / "usr/lib.old")
    (root / "usr/lib").mkdir()
    for path in (root / "etc").iterdir():
        if path.is_file() and not path.is_symlink():
            path.write_text("conffile\n")
            os.chown(path, 4, 5)
            path.chmod(0o640)
    special = root / "special"
    for name in ("null", "pipe", "program", "dangling"):
        (special / name).unlink()
    os.mknod(special / "disk-2", 0o060600, os.makedev(8, 1))
    with open(special / "holes", "r+b") as file:
        for offset in range(0, 90 * MIB, 5 * MIB):
            file.seek(offset)
            file.write(b"filled" * 1000)
    os.removexattr(special / "file", "trusted.overlay.opaque")
    os.setxattr(special / "directory", "user.number-3", b"changed")
    os.utime(special / "reserved")


@pytest.mark.system
def test_a_root_filesystem_is_upgraded_and_taken_back(call_cli: Cli) -> None:
    with arena() as top:
        disk = make_disk(top)
        fsck(disk)
        with mounted(disk, "ro") as root:
            before = manifest(root)
        kinds = {entry.kind for entry in before.values()}
        assert {"file", "directory", "symlink", "character device", "block device", "pipe", "socket"} <= kinds
        assert len(before) > 2000
        boot = sha256_of(disk, BOOT)
        mount = top / "mnt"
        mount.mkdir()

        call_cli("create", disk, "delivered", "-P", "2")
        fsck(disk)
        call_cli("mount", disk, mount, "-P", "2")
        try:
            upgrade(mount)
        finally:
            call_cli("umount", mount)
        fsck(disk)
        with mounted(disk, "ro") as root:
            upgraded = manifest(root)
        assert len(oracle.differences(before, upgraded)) > 1000
        shown = json.loads(call_cli("show", disk, "delivered", "-P", "2", "--json").stdout)
        assert shown["copied_bytes"] > DATABASE_BYTES

        safety = call_cli("restore", disk, "delivered", "-P", "2").stdout.strip()
        fsck(disk)
        with mounted(disk, "ro") as root:
            oracle.assert_same_tree(before, manifest(root), ignore=())
        call_cli("mount", disk, mount, "-P", "2", "--snapshot", safety)
        try:
            oracle.assert_same_tree(upgraded, manifest(mount), ignore=())
        finally:
            call_cli("umount", mount)
        assert json.loads(call_cli("check", disk, "-P", "2", "--json").stdout)["ok"]
        assert sha256_of(disk, BOOT) == boot


def sha256_of(path: Path, place: tuple[int, int]) -> str:
    with open(path, "rb") as file:
        file.seek(place[0])
        return subprocess.run(["sha256sum"], input=file.read(place[1]), capture_output=True, check=True).stdout.decode()
