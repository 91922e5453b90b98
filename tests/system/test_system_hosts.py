"""Where an image is stored: filesystems, sparse or not, loop devices, partition nodes, read-only places, full ones.

The same line of commands everywhere, through the command line.  The judges are e2fsck, whole-image copies and
the kernel's view of the tree, as in the matrix tests.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import disks
import hosts
import oracle
import pytest
from arena import arena, make_volume
from hosts import MIB

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.system

VOLUME_MIB = 40


def make_image(path: Path, *, sparse: bool = True) -> Path:
    """An ext4 volume with a file of 6 MiB; without ``sparse`` the host has every block of it."""
    rng = random.Random(str(sparse))
    make_volume(path, "ext4", VOLUME_MIB, files={"big": rng.randbytes(6 * MIB), "small": b"old" * 1000})
    if not sparse:
        content = path.read_bytes()
        path.write_bytes(content)
        assert path.stat().st_blocks * 512 >= len(content)
    return path


def the_line(cli: Cli, image: str | Path, top: Path, other_name: Path | None = None) -> None:
    """Create, write through the kernel, create, look, restore, check, export, strip.

    Args:
        image: What the program is given.
        top: A directory for copies and mounts, on another filesystem.
        other_name: Another path of the same volume, for some of the commands.
    """
    other = other_name or image
    mount, served = top / "mount", top / "served"
    mount.mkdir()
    served.mkdir()
    rng = random.Random(3)
    copies: dict[str, Path] = {}

    def create(name: str, path: str | Path) -> None:
        assert cli("create", path, name).stdout == f"{name}\n"
        oracle.assert_clean(image)
        copies[name] = oracle.copy_image(image, top / f"{name}.copy")

    create("one", image)
    cli("mount", other, mount)
    try:
        with open(mount / "big", "r+b") as file:
            file.write(rng.randbytes(3 * MIB))
            os.fsync(file.fileno())
        (mount / "new").write_bytes(rng.randbytes(2 * MIB))
        (mount / "small").unlink()
    finally:
        cli("umount", mount)
    create("two", other)
    cli("run", image, "--", "debugfs", "-w", "-R", "rm new", "{}")
    cli("attach", image, served)
    try:
        for name, copy in copies.items():
            oracle.assert_view_is_copy(served / "snapshots" / name, copy)
            oracle.assert_clean(served / "snapshots" / name)
    finally:
        cli("detach", other)
    cli("restore", other, "one")
    oracle.assert_clean(image)
    with oracle.mounted(copies["one"]) as expected, oracle.mounted(image) as restored:
        oracle.assert_same_tree(oracle.tree(expected, holes=True), oracle.tree(restored, holes=True))
    checked = json.loads(cli("check", image, "--json").stdout)
    assert (checked["ok"], checked["base"]["e2fsck"]) == (True, 0)
    cli("strip", other)
    oracle.assert_clean(image)
    assert not oracle.debugfs_knows(image, "/.extsnap")
    with oracle.mounted(copies["one"]) as expected, oracle.mounted(image) as stripped:
        oracle.assert_same_tree(oracle.tree(expected), oracle.tree(stripped))


@pytest.mark.parametrize(
    ("kind", "sparse"),
    [("tmpfs", True), ("ext4", True), ("ext4", False), ("xfs", True), ("btrfs", True), ("btrfs", False)],
)
def test_an_image_on(kind: str, sparse: bool, call_cli: Cli) -> None:
    with arena() as top, hosts.host(kind, top, 128) as directory:
        image = make_image(directory / "disk.img", sparse=sparse)
        link = top / "link"
        link.symlink_to(image)
        the_line(call_cli, image, top, link)
        if sparse:  # what was freed and never written is still the host's
            assert image.stat().st_blocks * 512 < VOLUME_MIB * MIB * 3 // 4


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_loop_device(sector: int, call_cli: Cli) -> None:
    with arena() as top:
        image = make_image(top / "disk.img")
        with hosts.loop(image, "--sector-size", str(sector)) as device:
            link = top / "by-label"
            link.symlink_to(device)
            the_line(call_cli, device, top, link)
        oracle.assert_clean(image)


def test_the_kernels_device_of_a_partition(call_cli: Cli) -> None:
    """As `/dev/sda2`: the volume is the whole device, and the disk around it stays as it is."""
    place = 2 * MIB, VOLUME_MIB * MIB
    size = (VOLUME_MIB + 4) * MIB
    with arena() as top:
        disk = disks.make(
            top / "disk.img", size, {**disks.gpt(size, [(2, *place)]), MIB: b"before", sum(place): b"next"}
        )
        volume = make_image(top / "volume.img").read_bytes()
        with open(disk, "r+b") as file:
            file.seek(place[0])
            file.write(volume)
        around = outside(disk, place)
        with hosts.loop(disk) as device, hosts.partition_node(device, 2, *place) as node:
            the_line(call_cli, node, top)
        assert outside(disk, place) == around


def outside(path: Path, place: tuple[int, int]) -> bytes:
    content = path.read_bytes()
    return content[: place[0]] + content[sum(place) :]
