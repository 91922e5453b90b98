"""A volume that somebody has: refused, naming who, whichever path leads to it, and not a byte is changed."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import disks
import hosts
import oracle
import pytest
from arena import arena, make_volume
from hosts import MIB, loop, partition_node, sh

import extsnap
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.inuse import Span, holders
from extsnap.errors import ExtsnapError, VolumeBusy

pytestmark = pytest.mark.system

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

VOLUME, SWAP = (MIB, 16 * MIB), (20 * MIB, 8 * MIB)
DISK_BYTES = 32 * MIB


@pytest.fixture
def top() -> Iterator[Path]:
    with arena() as directory:
        (directory / "mnt").mkdir()
        yield directory


@pytest.fixture
def image(top: Path) -> Path:
    return make_volume(top / "disk.img", "ext4", 16)


@pytest.fixture
def disk(top: Path) -> Path:
    """A disk with a volume, number 2, and room for a swap area, number 3."""
    path = disks.make(top / "gpt.img", DISK_BYTES, disks.gpt(DISK_BYTES, [(2, *VOLUME), (3, *SWAP)]))
    disks.mkfs(path, *VOLUME)
    return path


@contextmanager
def mounted(device: str, point: Path, *options: str) -> Iterator[Path]:
    sh("mount", *options, device, point)
    try:
        yield point
    finally:
        sh("umount", point)


def refusal(path: str | Path, partition: int | None = None) -> str:
    """What the refusal to write says: one line, with the path as it was given, what to do, and nothing done."""
    before = Path(path).read_bytes()
    with pytest.raises(VolumeBusy) as caught:
        extsnap.open(path, partition=partition).close()  # a success must not keep the device from being taken down
    said = str(caught.value)
    assert said.startswith(f"{path} is in use by "), said
    assert "; run " in said or "; wait for it" in said, said
    assert "\n" not in said
    assert Path(path).read_bytes() == before
    return said


def test_every_path_of_a_mounted_image(image: Path, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "link").symlink_to("disk.img")
    (top / "links").symlink_to(top)
    os.link(image, top / "hard-link")
    (top / "bind").mkdir()
    (top / "bound").touch()
    monkeypatch.chdir(top)
    with ExitStack() as stack:
        sh("mount", "--bind", top, top / "bind")
        stack.callback(sh, "umount", top / "bind")
        sh("mount", "--bind", image, top / "bound")
        stack.callback(sh, "umount", top / "bound")
        device = stack.enter_context(loop(image))
        point = stack.enter_context(mounted(device, top / "mnt"))
        for name in ("disk.img", "link", "links/link", "hard-link", "bind/disk.img", "bound"):
            with pytest.raises(VolumeBusy, match=f"{device} mounted on {point}; run umount {point} && losetup"):
                extsnap.open(name).close()
            assert f"mounted on {point}" in refusal(top / name)


def test_every_node_of_a_mounted_device(image: Path, top: Path) -> None:
    """The kernel refuses, whoever asks; who has it is for us to find out."""
    with loop(image) as device, mounted(device, top / "mnt") as point:
        (top / "by-uuid").symlink_to(device)
        node = Path(f"/dev/extsnap-test-{os.getpid()}")
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
        try:
            for name in (device, top / "by-uuid", node):
                assert f"in use by {device} mounted on {point}; run umount {point} first" in refusal(name)
        finally:
            node.unlink()
        with pytest.raises(VolumeBusy, match=f"mounted on {point}"):
            extsnap.open(image).close()


def test_a_mount_in_another_namespace(image: Path, top: Path) -> None:
    with loop(image) as device:
        script = f"mount {device} {top}/mnt && echo on && read line; umount {top}/mnt"
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"on\n"
            try:
                for path in (device, image):
                    said = refusal(path)
                    assert f"mounted on {top}/mnt in the mount namespace of process " in said
                    assert f"nsenter -m -t {other.pid} umount {top}/mnt" in said
            finally:
                other.communicate(b"\n")


def test_loop_devices_over_loop_devices_and_partitions(disk: Path, top: Path) -> None:
    with loop(disk) as whole, partition_node(whole, 2, *VOLUME) as node:
        extsnap.open(node).close()
        with loop(node) as upper, mounted(upper, top / "mnt") as point:
            assert f"in use by {upper} mounted on {point}; run umount {point} && losetup -d {upper} first" in refusal(
                node
            )
            for path in (whole, disk):
                said = refusal(path, 2)
                assert f"{upper} mounted on {point}" in said
            assert whole in said
        # Two loop devices of the same bytes, of which one has been mounted: the other is the same volume.
        with loop(disk, "-o", str(VOLUME[0])) as other, mounted(other, top / "mnt", "-o", "ro") as point:
            assert f"in use by {other} mounted on {point}" in refusal(node)
        with loop(disk, "-o", str(SWAP[0])):
            extsnap.open(node).close()
        with mounted(node, top / "mnt") as point:
            for path, partition in ((node, None), (whole, 2), (disk, 2)):
                assert f"mounted on {point}" in refusal(path, partition)


def test_swap(disk: Path, top: Path) -> None:
    """A disk of which one partition is swap: that is in nobody's way, but whole it is in use."""
    with loop(disk) as whole, partition_node(whole, 3, *SWAP) as node:
        sh("mkswap", node)
        sh("swapon", node)
        try:
            said = refusal(whole, 2)  # the kernel gives nobody a whole disk of which it uses a part
            assert f"in use by {whole} used as swap ({node}); run swapoff {node} first" in said
            with ImageFile(str(disk)) as file:
                users = holders(Span(file.key, *VOLUME))
                assert [(user.name, user.swaps) for user in users] == [(whole, ())]
                users = holders(Span(file.key))
                assert [(user.name, user.swaps) for user in users] == [(whole, (node,))]
            with partition_node(whole, 2, *VOLUME) as volume:
                extsnap.open(volume).close()
        finally:
            sh("swapoff", node)
    # Swap on a file: its kernel refuses to write to it, and says only "text file busy".
    with hosts.host("ext4", top, 48) as directory:
        path = directory / "swap"
        path.write_bytes(bytes(16 * MIB))
        path.chmod(0o600)
        sh("mkswap", path)
        sh("swapon", path)
        try:
            with ImageFile(str(path)) as file:
                assert [str(user) for user in holders(Span(file.key))] == [f"{path} used as swap"]
        finally:
            sh("swapoff", path)
        with pytest.raises(ExtsnapError, match="swap"):
            extsnap.open(path)


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_another_extsnap(kind: str, top: Path, call_cli: Cli) -> None:
    """By every path, and by a loop device over its image, it is named with its process."""
    with hosts.host(kind, top, 48) as directory:
        image = make_volume(directory / "disk.img", "ext4", 16)
        os.link(image, directory / "hard-link")
        (top / "link").symlink_to(image)
        with extsnap.open(image):
            for path in (image, directory / "hard-link", top / "link"):
                assert f"in use by extsnap in process {os.getpid()}; wait for it" in refusal(path)
            with loop(image) as device:
                assert f"in use by extsnap in process {os.getpid()}; wait for it" in refusal(device)
        with loop(image) as device, extsnap.open(device):
            assert f"in use by extsnap in process {os.getpid()}" in refusal(device)
            assert device in refusal(image)


def test_what_extsnap_serves_is_no_image(image: Path, top: Path, call_cli: Cli) -> None:
    """A store inside a served volume would be one that the served volume's own snapshots know nothing of."""
    served = top / "served"
    served.mkdir()
    call_cli("attach", image, served)
    try:
        said = refusal(served / "volume")
        assert f"in use by extsnap, which serves {image} on {served}; run extsnap detach {served} first" in said
        with loop(served / "volume") as device:
            assert f"which serves {image} on {served}" in refusal(device)
        call_cli("create", image, "one")
    finally:
        call_cli("detach", image)
    oracle.assert_clean(image)
