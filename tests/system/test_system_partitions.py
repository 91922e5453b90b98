"""Partitions of disk images: their tables judged by partx and, where it reads such tables, by the kernel.

What is in them is judged by the kernel and e2fsck through loop devices with an offset.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path

import disks
import pytest
from disks import EXTENDED, LINUX, MIB
from hosts import loop, partitions, sh

import extsnap
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.partitions import read_table
from extsnap.errors import FormatError, VolumeBusy

pytestmark = pytest.mark.system

SIZE = 64 * MIB
LOGICAL = [(5, 20 * MIB, 8 * MIB), (6, 30 * MIB, 4 * MIB), (7, 36 * MIB, 16 * MIB)]


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and private directories of this test's own."""
    directory = tmp_path_factory.mktemp("run")
    directory.chmod(0o700)
    monkeypatch.setenv("EXTSNAP_RUNTIME_DIR", str(directory))


def kernels_view(path: Path, sector: int) -> dict[int, tuple[int, int]]:
    """(first byte, bytes) of each partition by number, as the kernel has them; empty if it reads no such tables."""
    with loop(path, "-P", "-b", str(sector)) as device:
        base = Path("/sys/block", device.removeprefix("/dev/"))
        found = {}
        for part in base.glob(f"{base.name}p*"):
            start, size = (int((part / field).read_text()) * 512 for field in ("start", "size"))
            found[int(re.sub(r".*p", "", part.name))] = (start, size)
        return found


def partx_view(path: Path, sector: int) -> dict[int, tuple[int, int]]:
    """The same, as util-linux has them."""
    columns = "NR,START,SECTORS"
    shown = sh("partx", "--raw", "--noheadings", "-o", columns, "--sector-size", str(sector), str(path))
    rows = [[int(field) for field in line.split()] for line in shown.splitlines()]
    return {number: (start * 512, sectors * 512) for number, start, sectors in rows}


def ours(path: Path, sector: int) -> dict[int, tuple[int, int]]:
    with ImageFile(str(path)) as image:
        table = read_table(image, sector)
    assert table is not None
    return {part.number: (part.offset, part.length) for part in table.partitions}


TABLES = {
    "gpt": lambda sector: disks.gpt(SIZE, [(1, MIB, 8 * MIB), (4, 20 * MIB, MIB), (128, 40 * MIB, MIB)], sector=sector),
    "gpt of 8 entries": lambda sector: disks.gpt(SIZE, [(8, MIB, 8 * MIB)], sector=sector, entries=8),
    "primary": lambda sector: disks.mbr([(1, MIB, 8 * MIB), (3, 20 * MIB, MIB)], sector=sector),
    "logical": lambda sector: disks.mbr(
        [(2, MIB, 8 * MIB)], LOGICAL, container=(16 * MIB, 40 * MIB), sector=sector
    ),
    "two extended": lambda sector: {
        0: disks.boot_record(
            [(EXTENDED, 8 * MIB // sector, 8 * MIB // sector), (0x0F, 24 * MIB // sector, 8 * MIB // sector)]
        ),
        8 * MIB: disks.boot_record([(0, 0, 0), (LINUX, 8, 16)]),
        24 * MIB: disks.boot_record([(LINUX, 8, 16), (0, 0, 0), (LINUX, 64, 8), (LINUX, 1 << 30, 8)]),
    },
}  # fmt: skip


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("name", TABLES)
def test_numbers_and_places(name: str, sector: int, tmp_path: Path) -> None:
    path = disks.make(tmp_path / "disk.img", SIZE, TABLES[name](sector))
    expected = ours(path, sector)
    assert expected
    assert partx_view(path, sector) == expected
    kernel = kernels_view(path, sector)
    if kernel:  # it shows an extended partition as a small one
        extended = {"logical": {4}, "two extended": {1, 2}}.get(name, set())
        assert {number for number in kernel if number not in extended} == {
            number for number in expected if number not in extended
        }
        assert all(kernel[number] == expected[number] for number in kernel if number not in extended)
    kind = "gpt" if name.startswith("gpt") else "dos"
    if sector == 512:
        assert sh("blkid", "-p", "-o", "value", "-s", "PTTYPE", str(path)) == kind


# ---- volumes in partitions

ONE, OTHER = (MIB, 24 * MIB), (32 * MIB, 24 * MIB)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A GPT disk with two ext4 partitions, 2 and 5, and random bytes in all the gaps."""
    table = disks.gpt(SIZE, [(2, *ONE), (5, *OTHER)])
    noise = {offset: os.urandom(MIB) for offset in (25 * MIB, 30 * MIB, 31 * MIB, 56 * MIB)}
    path = disks.make(tmp_path / "disk.img", SIZE, {**noise, **table})
    disks.mkfs(path, *ONE, label="one")
    disks.mkfs(path, *OTHER, label="other")
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt2").mkdir()
    (tmp_path / "served").mkdir()
    return path


def outside(path: Path, *ranges: tuple[int, int]) -> str:
    """Digest of everything but these ranges."""
    content = bytearray(path.read_bytes())
    for offset, length in ranges:
        content[offset : offset + length] = bytes(length)
    return hashlib.sha256(content).hexdigest()


def fsck(path: Path, place: tuple[int, int]) -> None:
    with loop(path, "-r", "-o", str(place[0]), "--sizelimit", str(place[1])) as device:
        sh("e2fsck", "-fn", device)


def test_a_partition_lives_as_a_volume_of_its_own(disk, run_cli, tmp_path) -> None:
    before = outside(disk, OTHER)
    mnt = tmp_path / "mnt"
    run_cli("mount", disk, mnt, "-P", "5")
    (mnt / "file").write_bytes(b"old" * 50_000)
    assert json.loads(run_cli("info", disk, "-P", "5", "--json").stdout)["attached"]["mounts"] == [str(mnt)]
    assert json.loads(run_cli("info", disk, "-P", "2", "--json").stdout)["attached"] is None
    run_cli("umount", mnt)
    assert run_cli("create", disk, "first", "-P", "5").stdout == "first\n"
    info = json.loads(run_cli("info", "-P", "5", disk, "--json").stdout)
    assert (info["offset"], info["partition"], info["label"], info["snapshots"]) == (OTHER[0], 5, "other", 1)
    assert json.loads(run_cli("list", disk, "-P", "2", "--json").stdout)["snapshots"] == []
    fsck(disk, OTHER)
    run_cli("mount", disk, mnt, "-P", "5")
    (mnt / "file").write_bytes(b"new" * 50_000)
    run_cli("umount", mnt)
    fsck(disk, OTHER)
    run_cli("run", "-P", "5", disk, "--", "debugfs", "-w", "-R", "mkdir made", "{}")
    run_cli("run", "-P", "5", "--atomic", disk, "--", "sh", "-c", "debugfs -w -R 'rm file' {}; exit 1", status=1)
    checked = json.loads(run_cli("check", disk, "-P", "5", "--json").stdout)
    assert (checked["ok"], checked["base"]["e2fsck"]) == (True, 0)
    run_cli("mount", disk, mnt, "-P", "5", "--snapshot", "first")
    assert (mnt / "file").read_bytes() == b"old" * 50_000
    run_cli("umount", mnt)
    run_cli("export", disk, "first", tmp_path / "out.img", "-P", "5")
    sh("e2fsck", "-fn", tmp_path / "out.img")
    assert (tmp_path / "out.img").stat().st_size == OTHER[1]
    run_cli("restore", disk, "first", "-P", "5")
    fsck(disk, OTHER)
    with loop(disk, "-o", str(OTHER[0]), "--sizelimit", str(OTHER[1])) as device:
        sh("mount", "-o", "ro", device, mnt)
        try:
            assert (mnt / "file").read_bytes() == b"old" * 50_000
            assert not (mnt / "made").exists()
        finally:
            sh("umount", mnt)
    run_cli("strip", disk, "-P", "5")
    fsck(disk, OTHER)
    assert outside(disk, OTHER) == before


def test_two_partitions_at_once(disk, run_cli, tmp_path) -> None:
    between = outside(disk, ONE, OTHER)
    mnt, mnt2 = tmp_path / "mnt", tmp_path / "mnt2"
    run_cli("create", disk, "a", "-P", "2")
    run_cli("create", disk, "b", "-P", "5")
    run_cli("mount", disk, mnt, "-P", "2")
    run_cli("mount", disk, mnt2, "-P", "5")
    try:
        (mnt / "one").write_bytes(os.urandom(3 * MIB))
        (mnt2 / "other").write_bytes(os.urandom(3 * MIB))
        served = run_cli("attach", disk, tmp_path / "served", "-P", "5", status=1).stderr
        assert f"{disk} -P 5 is already served at " in served
        with pytest.raises(VolumeBusy, match=r"in use by extsnap in process \d+"):
            extsnap.open(disk, partition=5)
        with (
            pytest.raises(VolumeBusy, match="in use by extsnap"),
            ImageFile(str(disk), writable=True, lock="exclusive"),
        ):
            pass
    finally:
        run_cli("umount", mnt2)
        run_cli("umount", mnt)
    for place in (ONE, OTHER):
        fsck(disk, place)
    assert json.loads(run_cli("list", disk, "-P", "2", "--json").stdout)["snapshots"][0]["name"] == "a"
    assert outside(disk, ONE, OTHER) == between


def test_attach_and_detach_by_directory_and_by_number(disk, run_cli, tmp_path) -> None:
    served = tmp_path / "served"
    for target in ([served], [disk, "-P", "5"]):
        run_cli("attach", disk, served, "-P", "5")
        assert (served / "volume").stat().st_size == OTHER[1]
        said = run_cli("detach", disk, "-P", "2", status=1).stderr
        assert "is not served" in said
        run_cli("detach", *target)
    fsck(disk, OTHER)


def test_a_killed_server_of_a_partition_is_recovered_from(disk, run_cli, tmp_path) -> None:
    before = outside(disk, ONE)
    served = tmp_path / "served"
    run_cli("create", disk, "first", "-P", "2")
    run_cli("attach", disk, served, "-P", "2")
    sh("debugfs", "-w", "-R", "mkdir made", str(served / "volume"))
    pid = json.loads(run_cli("info", disk, "-P", "2", "--json").stdout)["attached"]["pid"]
    os.kill(pid, 9)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run_cli("create", disk, "second", "-P", "2")
    fsck(disk, ONE)
    assert outside(disk, ONE) == before


def test_the_disk_around_a_partition(disk, run_cli, tmp_path) -> None:
    mnt, served = tmp_path / "mnt", tmp_path / "served"
    run_cli("create", disk, "a", "-P", "2")
    elsewhere = outside(disk, OTHER, (30 * MIB, 3))
    run_cli("mount", disk, mnt, "-P", "5")
    (mnt / "file").write_bytes(b"old" * 100_000)
    run_cli("umount", mnt)
    run_cli("create", disk, "first", "-P", "5")
    content = disk.read_bytes()
    run_cli("attach", disk, served, "-P", "5")
    try:
        whole = served / "disk"
        assert sorted(os.listdir(served)) == ["disk", "snapshots", "volume"]
        seen = whole.read_bytes()
        assert outside_of(seen, OTHER) == outside_of(content, OTHER)
        assert seen[OTHER[0] :][: OTHER[1]] == (served / "volume").read_bytes()
        with loop(whole) as device:
            with pytest.raises(OSError, match="busy"):
                (served / "volume").open("rb")
            refused = run_cli("restore", disk, "first", "-P", "5", status=1).stderr
            assert "disk is in use" in refused
            # Somebody can write to the disk: what is checked is a snapshot of this moment.
            assert json.loads(run_cli("check", disk, "-P", "5", "--json").stdout)["base"] == {"e2fsck": 0, "ok": True}
            assert "in use by extsnap in process" in run_cli("create", disk, "-P", "2", status=1).stderr
            with partitions(device):
                sh("mount", f"{device}p5", mnt)
                (mnt / "file").write_bytes(b"new" * 100_000)
                sh("umount", mnt)
            with open(device, "r+b") as file:
                file.seek(30 * MIB)
                file.write(b"gap")
        until_closed(served)
        with ImageFile(str(disk), writable=True, lock="exclusive", start=ONE[0], length=ONE[1]):
            with pytest.raises(OSError, match="busy"):
                whole.open("r+b")
            assert len(whole.read_bytes()) == SIZE
        with loop(disk, "-o", str(ONE[0]), "--sizelimit", str(ONE[1])), pytest.raises(OSError, match="busy"):
            whole.open("r+b")
        with whole.open("r+b"):
            pass
    finally:
        run_cli("detach", served)
    fsck(disk, OTHER)
    assert outside(disk, OTHER, (30 * MIB, 3)) == elsewhere
    assert disk.read_bytes()[30 * MIB :][:3] == b"gap"
    for snapshot, expected in (([], b"new"), (["--snapshot", "first"], b"old")):
        run_cli("mount", disk, mnt, "-P", "5", *snapshot)
        assert (mnt / "file").read_bytes() == expected * 100_000
        run_cli("umount", mnt)
    said = run_cli("run", disk, "-P", "5", "--", "blkid", "-p", "-o", "value", "-s", "PTTYPE", "{disk}").stdout
    assert said == "gpt\n"
    with loop(disk, "-o", str(OTHER[0])) as device:
        assert run_cli("run", device, "--", "echo", "{disk}").stdout == "{disk}\n"


def outside_of(content: bytes, place: tuple[int, int]) -> bytes:
    return content[: place[0]] + content[sum(place) :]


def until_closed(served: Path) -> None:
    """The kernel tells the server of a loop device's last close a little later."""
    deadline = time.monotonic() + 10
    while True:
        try:
            (served / "volume").open("rb").close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_loop_devices_count_where_they_reach(disk, tmp_path) -> None:
    with loop(disk, "-o", str(ONE[0]), "--sizelimit", str(ONE[1])) as device:
        extsnap.open(disk, partition=5).close()
        with pytest.raises(VolumeBusy, match=f"in use by {device}; run losetup -d {device} first"):
            extsnap.open(disk, partition=2)
    with loop(disk, "-P") as device, contextlib.ExitStack() as stack:
        with pytest.raises(VolumeBusy, match=f"in use by {device}; run losetup"):
            extsnap.open(disk, partition=5)
        partition = f"{device}p5"
        stack.enter_context(partitions(device))
        sh("mount", "-o", "ro", partition, tmp_path / "mnt")
        try:
            with pytest.raises(VolumeBusy, match=f"mounted on {tmp_path}/mnt; run umount {tmp_path}/mnt && losetup"):
                extsnap.open(disk, partition=5)
            with pytest.raises(VolumeBusy) as refused:
                extsnap.open(disk, partition=2)
            assert "mounted" not in str(refused.value)
        finally:
            sh("umount", tmp_path / "mnt")


def test_a_block_device_with_partitions(disk, run_cli) -> None:
    """Its sectors are known, and nobody else may have it."""
    with loop(disk) as device:
        run_cli("create", device, "first", "-P", "5")
        assert json.loads(run_cli("info", device, "-P", "5", "--json").stdout)["offset"] == OTHER[0]
    fsck(disk, OTHER)
    path = disks.make(disk.with_name("4k.img"), SIZE, disks.mbr([(1, MIB, 8 * MIB)], sector=4096))
    with loop(path, "-b", "4096") as device, ImageFile(device) as image:
        assert image.sector_size == 4096
        assert read_table(image, image.sector_size).numbered(1).offset == MIB


def test_a_table_that_the_kernel_cannot_read_is_refused(disk, run_cli) -> None:
    with disk.open("r+b") as file:
        for offset in (512 + 20, SIZE - 512 + 20):
            file.seek(offset)
            file.write(b"x")
    before = outside(disk)
    with pytest.raises(FormatError):
        extsnap.open(disk)
    said = run_cli("create", disk, status=1).stderr
    assert len(said.splitlines()) == 1
    assert str(disk) in said
    assert "header_crc32" in said
    assert outside(disk) == before
