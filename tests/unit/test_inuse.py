"""Devices that stand on each other, as a made-up sysfs tells: for what a test machine's kernel may not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from extsnap.blockdev import inuse
from extsnap.blockdev.inuse import Holder, Span, holders

MIB = 1 << 20
DISK, PART, OTHER = ("device", 8, 0), ("device", 8, 1), ("device", 8, 2)


class Sysfs:
    """A directory like /sys, in which devices are made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "class/block").mkdir(parents=True)

    def add(self, name: str, number: tuple[int, int], *, parent: str = "", **files: str) -> Path:
        directory = (self.root / "class/block" / parent).resolve() if parent else self.root / "devices"
        directory = directory / name
        (directory / "slaves").mkdir(parents=True)
        (self.root / "class/block" / name).symlink_to(directory)
        for path, text in {"dev": f"{number[0]}:{number[1]}", **files}.items():
            file = directory / path.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{text}\n")
        return directory

    def stand(self, upper: str, lower: str) -> None:
        link = self.root / "class/block" / upper / "slaves" / lower
        link.symlink_to((self.root / "class/block" / lower).resolve())

    def on(self, span: Span) -> list[str]:
        return [str(holder) for holder in holders(span, sysfs=str(self.root))]


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    """A disk of 64 MiB with two partitions; nothing is mounted."""
    monkeypatch.setattr(inuse, "_mount_table", lambda process="self": [])
    monkeypatch.setattr(inuse, "in_other_namespaces", lambda read: iter(()))
    monkeypatch.setattr(inuse, "_swaps", lambda avoid: [])
    made = Sysfs(tmp_path / "sys")
    made.add("sda", (8, 0))
    for number in (1, 2):
        sectors = {"start": str(number * 32768), "size": "32768"}
        made.add(f"sda{number}", (8, number), parent="sda", partition=str(number), **sectors)
    return made


def mount(monkeypatch: pytest.MonkeyPatch, device: tuple[int, int], point: bytes, source: bytes = b"/dev/x") -> None:
    table = [*inuse._mount_table(), inuse._Mount(device, point, b"ext4", source)]
    monkeypatch.setattr(inuse, "_mount_table", lambda process="self": table)


def test_partitions_alone_are_no_use(sysfs: Sysfs) -> None:
    for span in (Span(DISK), Span(PART), Span(DISK, 16 * MIB, 32 * MIB)):
        assert sysfs.on(span) == []


def test_device_mapper_on_a_partition(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs.add("dm-0", (253, 0), dm__name="vg-root")
    sysfs.stand("dm-0", "sda2")
    for span in (Span(OTHER), Span(DISK), Span(DISK, 40 * MIB, 41 * MIB)):
        assert sysfs.on(span) == ["/dev/mapper/vg-root"]
    for span in (Span(PART), Span(DISK, 16 * MIB, 32 * MIB)):
        assert sysfs.on(span) == []
    # One on top of the other, the upper one mounted: it has to be taken down first.
    sysfs.add("dm-1", (253, 1), dm__name="crypt")
    sysfs.stand("dm-1", "dm-0")
    mount(monkeypatch, (253, 1), b"/mnt")
    found = holders(Span(OTHER), sysfs=str(sysfs.root))
    assert found == [Holder("mapped", "/dev/mapper/crypt", ("/mnt",)), Holder("mapped", "/dev/mapper/vg-root")]
    assert [step for holder in found for step in holder.steps] == [
        "umount /mnt",
        "dmsetup remove /dev/mapper/crypt",
        "dmsetup remove /dev/mapper/vg-root",
    ]


def test_a_volume_on_device_mapper(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else stands on its slaves uses the same bytes; the partition beside does not."""
    sysfs.add("dm-0", (253, 0), dm__name="data")
    sysfs.stand("dm-0", "sda2")
    assert sysfs.on(Span(("device", 253, 0))) == []
    mount(monkeypatch, (8, 1), b"/beside")
    assert sysfs.on(Span(("device", 253, 0))) == []
    mount(monkeypatch, (8, 2), b"/below")
    assert sysfs.on(Span(("device", 253, 0))) == ["/dev/sda2 mounted on /below"]


def test_md_over_two_disks(sysfs: Sysfs) -> None:
    sysfs.add("sdb", (8, 16))
    sysfs.add("md0", (9, 0))
    for disk in ("sda", "sdb"):
        sysfs.stand("md0", disk)
    found = holders(Span(("device", 8, 16)), sysfs=str(sysfs.root))
    assert found == [Holder("mapped", "/dev/md0")]
    assert found[0].steps == ["mdadm --stop /dev/md0"]
    assert sysfs.on(Span(PART)) == ["/dev/md0"]


def test_a_mounted_disk_and_its_partitions(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(monkeypatch, (8, 1), b"/one")
    assert sysfs.on(Span(DISK)) == ["/dev/sda mounted on /one"]
    assert sysfs.on(Span(PART)) == ["/dev/sda1 mounted on /one"]
    assert sysfs.on(Span(OTHER)) == []
    monkeypatch.setattr(inuse, "_swaps", lambda avoid: [(OTHER, "/dev/sda2")])
    assert sysfs.on(Span(DISK)) == ["/dev/sda mounted on /one used as swap (/dev/sda2)"]
    assert holders(Span(OTHER), sysfs=str(sysfs.root))[0].steps == ["swapoff /dev/sda2"]


def test_loop_devices_by_the_path_of_their_file(sysfs: Sysfs, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.touch()
    key = inuse.file_key(os.stat(path))
    sysfs.add("loop0", (7, 0), loop__backing_file=str(path), loop__offset="0", loop__sizelimit=str(8 * MIB))
    sysfs.add("loop1", (7, 1), loop__backing_file=str(path), loop__offset=str(8 * MIB), loop__sizelimit="0")
    sysfs.add("loop2", (7, 2))
    assert sysfs.on(Span(key)) == ["/dev/loop0", "/dev/loop1"]
    assert sysfs.on(Span(key, 0, MIB)) == ["/dev/loop0"]
    assert sysfs.on(Span(key, 8 * MIB, 9 * MIB)) == ["/dev/loop1"]
    assert sysfs.on(Span(("device", 7, 1))) == []
    sysfs.add("loop3", (7, 3), loop__backing_file=str(path), loop__offset=str(7 * MIB), loop__sizelimit=str(2 * MIB))
    assert sysfs.on(Span(("device", 7, 1))) == ["/dev/loop3"]
    assert sysfs.on(Span(("device", 7, 1), 2 * MIB, 3 * MIB)) == []


def test_btrfs_has_a_number_of_its_own(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the mount's source tells its device."""

    class Device:
        st_mode, st_rdev = 0o060600, os.makedev(8, 2)

    monkeypatch.setattr(inuse, "_status", lambda path, avoid: Device() if path == b"/dev/sda2" else None)
    mount(monkeypatch, (0, 45), b"/btrfs", b"/dev/sda2")
    assert sysfs.on(Span(OTHER)) == ["/dev/sda2 mounted on /btrfs"]
