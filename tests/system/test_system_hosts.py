"""Where an image is stored: filesystems, sparse or not, loop devices, partition nodes, read-only places, full ones.

The same line of commands everywhere, through the command line.  The judges are e2fsck, whole-image copies and
the kernel's view of the tree, as in the matrix tests.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import disks
import hosts
import oracle
import pytest
from arena import arena, make_volume, sync
from hosts import MIB

import extsnap
from extsnap.blockdev.image import ImageFile

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
    [("tmpfs", True), ("ext4", False), ("xfs", True), ("btrfs", True), ("btrfs", False)],
    ids=["tmpfs", "ext4-full", "xfs", "btrfs", "btrfs-full"],
)
def test_an_image_on(kind: str, sparse: bool, call_cli: Cli) -> None:
    with arena() as top, hosts.host(kind, top, 128) as directory:
        image = make_image(directory / "disk.img", sparse=sparse)
        link = top / "link"
        link.symlink_to(image)
        the_line(call_cli, image, top, link)
        if sparse:  # what was freed and never written is still the host's
            assert image.stat().st_blocks * 512 < VOLUME_MIB * MIB * 3 // 4


def test_a_loop_device(call_cli: Cli) -> None:
    with arena() as top:
        image = make_image(top / "disk.img")
        with hosts.loop(image, "--sector-size", "4096") as device:
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


# ---- copies that the host shares with the blocks that they are of


def shared_bytes(path: Path) -> int:
    """What the host says is shared with other places, by the flags of FIEMAP (0x2000)."""
    rows = hosts.sh("filefrag", "-e", "-b4096", path).splitlines()
    found = [re.split(r"[:.]+\s*", row.strip()) for row in rows if re.search(r"\bshared\b", row)]
    return sum(int(row[5]) * 4096 for row in found)


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_the_hosts_power_fails_after_a_shared_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a flush called durable is on the host's own medium: the copies that were shared, and the overwrites."""
    cloned = []
    clone = ImageFile.clone

    def remembered(image: ImageFile, source: int, target: int, length: int) -> bool:
        done = clone(image, source, target, length)
        cloned.append(length if done else 0)
        return done

    monkeypatch.setattr(ImageFile, "clone", remembered)
    rng = random.Random(5)
    with arena() as top:
        backing, cut = top / f"host-{kind}.img", top / "cut.img"
        with hosts.host(kind, top, 200) as directory:
            image = make_image(directory / "disk.img")
            blocks = oracle.file_blocks(image, "/big").data
            first, length = int(blocks[0, 1]) * 4096, int(blocks[0, 2]) * 4096
            assert length >= 4 * MIB
            new = rng.randbytes(length)
            with extsnap.open(image) as volume:
                volume.create("one")
                sync(directory)
                copy = oracle.copy_image(image, top / "one.copy")
                volume.begin_serving()
                volume.write(first, new)
                volume.flush()
                oracle.copy_image(backing, cut)  # the medium as it is now; the host is still mounted
                volume.end_serving()
        # Not the short pieces at the ends of what the store has in a row.
        assert (sum(cloned) == 0) if kind == "ext4" else (sum(cloned) > length * 9 // 10), cloned
        point = top / "after"
        point.mkdir()
        hosts.sh("mount", "-o", "loop", cut, point)
        try:
            with extsnap.open(point / "disk.img") as volume:  # recovers
                assert volume.read(first, length) == new
                with volume.snapshots["one"].open() as view, open(top / "view", "wb") as file:
                    shutil.copyfileobj(view, file)
            oracle.assert_view_is_copy(top / "view", copy)
            oracle.assert_clean(point / "disk.img")
        finally:
            hosts.sh("umount", point)


def test_an_image_without_holes_is_not_shared() -> None:
    """Its overwrites need no space from the host, and that stays so."""
    with arena() as top, hosts.host("xfs", top, 64) as directory:
        for sparse in (True, False):
            path = make_image(directory / "disk.img", sparse=sparse)
            source = int(oracle.file_blocks(path, "/big").data[0, 1]) * 4096
            target = VOLUME_MIB * MIB - 2 * MIB
            with ImageFile(str(path), writable=True) as image:
                assert bool(image.clone_least) == sparse
                if sparse:
                    assert image.clone(source, target, MIB)
                    assert image.pread(target, MIB) == image.pread(source, MIB)
                    assert shared_bytes(path) == 2 * MIB
                    image.pwrite(source, b"changed")
                    assert image.pread(target, 7) != b"changed"
                    assert not image.clone(source + 512, target, MIB)
                    assert image.clone_least, "another range may be aligned"
            path.unlink()


# ---- places that cannot be written


@contextmanager
def read_only(image: Path, how: str) -> Iterator[str]:
    """A path of an image through which nobody, root included, can write to it."""
    if how == "mount":
        point = image.parent / "read-only"
        point.mkdir()
        hosts.sh("mount", "--bind", "-o", "ro", image.parent, point)
        try:
            yield str(point / image.name)
        finally:
            hosts.sh("umount", point)
    else:
        with hosts.loop(image, "--read-only") as device:
            yield device


@pytest.mark.parametrize("how", ["mount", "device"])
def test_reading_commands_on_what_cannot_be_written(how: str, call_cli: Cli) -> None:
    with arena() as top:
        image = make_image(top / "disk.img")
        mount, served, out = top / "mount", top / "served", top / "out.img"
        mount.mkdir()
        served.mkdir()
        call_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "one.copy")
        call_cli("run", image, "--", "debugfs", "-w", "-R", "rm small", "{}")
        before = oracle.sha256(image)
        with read_only(image, how) as path:
            for command in ("list", "info", "check"):
                shown = json.loads(call_cli(command, path, "--json").stdout)
                assert shown["snapshots"] == 1 if command == "info" else len(shown["snapshots"]) == 1
            call_cli("check", path, "--quick")
            for what in ("header", "log", "records", "snapshots", "bitmaps"):
                call_cli("dump", path, what)
            assert json.loads(call_cli("show", path, "one", "--json").stdout)["records"] > 0
            call_cli("export", path, "one", out)
            call_cli("mount", path, mount, "--snapshot", "one")
            try:
                with oracle.mounted(copy) as expected, oracle.mounted(out) as exported:
                    oracle.assert_same_tree(oracle.tree(expected), oracle.tree(mount))
                    oracle.assert_same_tree(oracle.tree(expected), oracle.tree(exported))
            finally:
                call_cli("umount", mount)
            call_cli("mount", path, mount, "--snapshot", "one", "--scratch")
            try:
                (mount / "new").write_bytes(b"thrown away")
            finally:
                call_cli("umount", mount)
            writing: list[tuple[str, ...]] = [("create",), ("delete", "one"), ("restore", "one"), ("strip",)]
            writing += [("attach", str(served)), ("mount", str(mount)), ("run", "--", "true")]
            for command, *arguments in writing:
                said = call_cli(command, path, *arguments, status=125 if command == "run" else 1)
                assert f"{path} cannot be written: " in said.stderr, said
                assert "mount --snapshot" in said.stderr
                assert said.stdout == ""
        assert oracle.sha256(image) == before


# ---- a host without space


def write_durably(path: Path, mebibytes: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for _ in range(mebibytes):
            file.write(os.urandom(MIB))
            os.fsync(file.fileno())


def fill(directory: Path, left: int) -> Path:
    """Fill a filesystem but for some bytes, and return the file that has to go."""
    filler = directory / "filler"
    with open(filler, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(MIB // 4)):
                pass
        os.fsync(file.fileno())
        file.truncate(file.seek(0, os.SEEK_END) - left)
    return filler


@pytest.mark.parametrize("kind", ["tmpfs", "btrfs"])
def test_the_host_is_full(kind: str, call_cli: Cli) -> None:
    """A sparse image promises more than its host has: what needs a new block there fails, and nothing else is lost."""
    with arena() as top, hosts.host(kind, top, 64) as directory:
        image = make_image(directory / "disk.img")
        mount, served = top / "mount", top / "served"
        mount.mkdir()
        served.mkdir()
        call_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "one.copy")
        filler = fill(directory, 2 * MIB)
        call_cli("mount", image, mount)
        try:
            with pytest.raises(OSError) as failure:
                write_durably(mount / "new", 24)
            assert failure.value.errno in (errno.ENOSPC, errno.EIO, errno.EROFS)
        finally:
            told = call_cli("umount", mount, status=None)
        assert told.returncode in (0, 1), told
        for done in (told, call_cli("list", image), call_cli("create", image, "while-full", status=None)):
            assert not done.returncode or len(done.stderr.splitlines()) == 1, done
        assert call_cli("export", image, "one", top / "out.img").returncode == 0
        filler.unlink()
        call_cli("create", image, "two")
        oracle.assert_clean(image)
        call_cli("attach", image, served)
        try:
            oracle.assert_view_is_copy(served / "snapshots" / "one", copy)
        finally:
            call_cli("detach", image)
        assert json.loads(call_cli("check", image, "--json").stdout)["ok"]
