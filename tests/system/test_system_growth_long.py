"""The worst cases of growth over a kernel mount, in the long form only: gigabytes, little memory, nothing left free."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume
from test_system_growth import LONG, MIB, PATIENCE, content, info, judge, snapshot_and_mount, store_bytes

from extsnap.serve import mounting

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.system

GIB = 1 << 30
KINDS = ["ext4", "ext3", "ext2"]


def say(text: str) -> None:
    """A line for the document, whatever pytest captures."""
    print(f"\n{os.environ.get('PYTEST_CURRENT_TEST', '').split('::')[-1].split()[0]}: {text}", file=sys.__stderr__)


def big_volume(top: Path, kind: str, mebibytes: int, size: int, *options: str) -> Path:
    """A volume with a file ``big`` of so many MiB, each MiB of another content."""
    tree = top / "tree"
    tree.mkdir()
    write_big(tree / "big", size, 1)
    image = top / "disk.img"
    made = make_volume(top / "empty.img", kind, mebibytes, "-b", "4096", "-m", "0", *options)
    made.rename(image)
    with oracle.mounted(image, writable=True) as directory:
        subprocess.run(["cp", tree / "big", directory / "big"], check=True)
    (tree / "big").unlink()
    return image


def write_big(path: Path, size: int, seed: int) -> None:
    block = bytearray(content(seed, 1))
    with path.open("wb", buffering=0) as file:
        for number in range(size):
            block[:8] = number.to_bytes(8, "little")
            file.write(block)


def is_big(path: Path, size: int, seed: int) -> bool:
    block = bytearray(content(seed, 1))
    with path.open("rb", buffering=0) as file:
        for number in range(size):
            block[:8] = number.to_bytes(8, "little")
            if file.read(MIB) != block:
                return False
    return True


def overwrite(path: Path, size: int, seed: int, begin: list[str] | None = None) -> None:
    """Overwrite a file of so many MiB, with no fsync, by a process of its own."""
    program = (
        "import sys\nfrom random import Random\n"
        "path, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
        "block = bytearray(Random(seed).randbytes(1 << 20))\n"
        "with open(path, 'r+b', buffering=0) as file:\n"
        "    for number in range(size):\n"
        "        block[:8] = number.to_bytes(8, 'little')\n"
        "        file.write(block)\n"
    )
    command = [*(begin or []), sys.executable, "-c", program, str(path), str(size), str(seed)]
    subprocess.run(command, check=True, timeout=10 * PATIENCE)


def dirty_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(fields["Dirty"].split()[0]) + int(fields["Writeback"].split()[0])) * 1024


@contextlib.contextmanager
def most_dirty() -> Iterator[list[int]]:
    """The most dirty bytes that the machine had meanwhile."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], dirty_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def bdi_of(mount: Path) -> Path:
    device = mounting.mount_at(str(mount)).device  # type: ignore[union-attr]
    return Path("/sys/class/bdi", device)


if LONG:

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_last_unmount_flushes_what_a_gigabyte_left(kind: str, run_cli: Cli) -> None:
        """A gigabyte is overwritten without one fsync, and the volume unmounted at once."""
        with arena() as top:
            image = big_volume(top, kind, 3000, 1024)
            with snapshot_and_mount(run_cli, image, top) as (mount, copy):
                room = int(info(run_cli, image)["store"]["room_bytes"])  # type: ignore[index]
                assert room < 1024 * MIB, "there was room for all of it: this test shows nothing"
                with most_dirty() as most:
                    begun = time.monotonic()
                    overwrite(mount / "big", 1024, 2)
                    written = time.monotonic()
                    left = dirty_bytes()
                    run_cli("umount", mount, timeout=600)
                    ended = time.monotonic()
            say(
                f"room {room / MIB:.0f} MiB at first; written in {written - begun:.1f} s, unmounted in "
                f"{ended - written:.1f} s; dirty at most {most[0] / MIB:.0f} MiB, at the unmount {left / MIB:.0f} MiB"
            )
            with oracle.mounted(image) as directory:
                assert is_big(directory / "big", 1024, 2)
            judge(run_cli, image, copy, top)

    @pytest.mark.parametrize("kind", KINDS)
    def test_more_is_dirty_than_the_reserve(kind: str, run_cli: Cli) -> None:
        """Somebody lifts the limit of dirty pages: the store grows while all of them are flushed."""
        with arena() as top:
            image = big_volume(top, kind, 3000, 1024)
            with snapshot_and_mount(run_cli, image, top) as (mount, copy):
                room = int(info(run_cli, image)["store"]["room_bytes"])  # type: ignore[index]
                assert room < 1024 * MIB
                bdi = bdi_of(mount)
                for name, value in (("max_ratio", "100"), ("strict_limit", "0")):
                    (bdi / name).write_text(value)
                with most_dirty() as most:
                    overwrite(mount / "big", 1024, 2)
                    begun = time.monotonic()
                    subprocess.run(["sync", "-f", mount], check=True, timeout=600)
                say(
                    f"room {room / MIB:.0f} MiB at first; dirty at most {most[0] / MIB:.0f} MiB, flushed in "
                    f"{time.monotonic() - begun:.1f} s"
                )
                assert most[0] > room, "no more was dirty than there was room for: this test shows nothing"
            with oracle.mounted(image) as directory:
                assert is_big(directory / "big", 1024, 2)
            judge(run_cli, image, copy, top)

    @pytest.mark.parametrize("kind", KINDS)
    def test_snapshots_come_and_go_while_it_grows(kind: str, run_cli: Cli) -> None:
        with arena() as top:
            image = big_volume(top, kind, 3000, 768)
            with snapshot_and_mount(run_cli, image, top) as (mount, copy):
                before, taken, longest = store_bytes(run_cli, image), 0, 0.0
                writer = threading.Thread(target=overwrite, args=(mount / "big", 768, 2))
                writer.start()
                while writer.is_alive():
                    begun = time.monotonic()
                    run_cli("create", image, f"then-{taken}")
                    longest = max(longest, time.monotonic() - begun)
                    if taken % 3 == 2:
                        run_cli("delete", image, f"then-{taken - 1}")
                    taken += 1
                writer.join()
                grown = store_bytes(run_cli, image) - before
                say(f"{taken} snapshots, longest create {longest:.1f} s; the store grew by {grown / MIB:.0f} MiB")
                assert taken > 1
                assert grown > 0
            with oracle.mounted(image) as directory:
                assert is_big(directory / "big", 768, 2)
            judge(run_cli, image, copy, top)
            report = json.loads(run_cli("check", "--json", image, timeout=600).stdout)
            assert report["ok"], report

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_volume_that_is_nearly_full(kind: str, run_cli: Cli) -> None:
        """Where no more can be had writes fail and say so; what df called free can still be written to new files."""
        with arena() as top:
            image = big_volume(top, kind, 1000, 760)
            with snapshot_and_mount(run_cli, image, top) as (mount, copy):
                failed, done = None, 0
                descriptor = os.open(mount / "big", os.O_RDWR)
                try:
                    for number in range(760):
                        os.pwrite(descriptor, content(3, 1), number * MIB)
                        os.fsync(descriptor)
                        done += 1
                except OSError as error:
                    failed = error
                finally:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
                free = os.statvfs(mount).f_bavail * 4096
                say(f"{done} MiB were overwritten before {failed}; then df said {free / MIB:.1f} MiB free")
                assert failed is not None, "there was room for all of it: this test shows nothing"
                assert failed.errno == errno.ENOSPC
                with (mount / "new").open("wb", buffering=0) as file:
                    for _ in range(free // 2 // MIB):
                        file.write(content(4, 1))
                    os.fsync(file.fileno())
                run_cli("delete", image, "one")
                (mount / "new").unlink()
                run_cli("create", image, "two")
            oracle.assert_clean(image)
            del copy
            assert json.loads(run_cli("check", "--json", image, timeout=600).stdout)["ok"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_how_long_writers_stand_still(kind: str, run_cli: Cli) -> None:
        """The worst write or fsync while the store grows, against the same load with all the room from the start."""
        worst: dict[str, list[float]] = {"room": [], "growth": []}
        for way in ("room", "growth", "growth", "room"):
            with arena() as top:
                image = big_volume(top, kind, 2000, 600)
                run_cli("create", image, "one")
                mount = top / "mount"
                mount.mkdir()
                if way == "room":
                    served = top / "served"
                    served.mkdir()
                    run_cli("attach", image, served)
                run_cli("mount", image, mount)
                try:
                    before = store_bytes(run_cli, image)
                    worst[way].append(longest_stall(mount / "big", 600))
                    grown = store_bytes(run_cli, image) - before
                finally:
                    run_cli("umount", mount, timeout=600)
                    if way == "room":
                        run_cli("detach", image, timeout=600)
                assert (grown > 64 * MIB) == (way == "growth")
        say(
            "worst write or fsync in ms: "
            + ", ".join(
                f"{way} {' and '.join(f'{value * 1000:.0f}' for value in values)}" for way, values in worst.items()
            )
        )
        assert min(worst["growth"]) <= max(worst["room"]) + 0.1


def longest_stall(path: Path, size: int) -> float:
    """Overwrite a file in writes of 256 KiB, with an fsync after each MiB; the longest of these calls, in seconds."""
    data, worst = mmap.mmap(-1, MIB // 4), 0.0
    data[:] = content(5, 1)[: MIB // 4]
    with path.open("r+b", buffering=0) as file:
        for number in range(4 * size):
            begun = time.monotonic()
            file.write(data)
            if number % 4 == 3:
                os.fsync(file.fileno())
            worst = max(worst, time.monotonic() - begun)
    return worst
