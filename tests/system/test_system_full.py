"""A volume without room for copies: writes fail and say so, snapshots stay exact, deleting one makes room again."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume, sync

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

MIB = 1 << 20
FILE_BYTES = 16 * MIB


def fill(path: Path, size: int) -> OSError | None:
    """Overwrite a file with durable steps until that fails."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        for offset in range(0, size, MIB):
            os.pwrite(descriptor, b"\xa5" * MIB, offset)
            os.fsync(descriptor)
    except OSError as error:
        return error
    finally:
        os.close(descriptor)
    return None


def fail_in_part(descriptor: int, copied: list[int], file: set[int], block_size: int) -> None:
    """A write of two blocks in two pages: there is room for the first one only.

    The kernel cuts it in two and tells only how much was written.  A loop device takes that for the whole, so the
    next fsync must fail.
    """
    last_of_pages = [block for block in copied[-20:] if (block + 1) * block_size % mmap.PAGESIZE == 0]
    block = max(block for block in last_of_pages if block + 1 in file)
    assert os.pwrite(descriptor, b"\xa6" * 2 * block_size, block * block_size) == block_size
    with pytest.raises(OSError) as failure:
        os.fsync(descriptor)
    assert failure.value.errno == errno.ENOSPC
    os.fsync(descriptor)


def overwrite_durably(descriptor: int, blocks: list[int], block_size: int) -> None:
    for block in blocks:
        os.pwrite(descriptor, b"\xa5" * block_size, block * block_size)
    os.fsync(descriptor)  # where the kernel delays writes, they fail here at the latest


def judge(cli: Cli, image: Path, copies: dict[str, Path], directory: Path) -> None:
    """Every view is exact, clean and can be exported, though nothing has room."""
    cli("attach", image, directory)
    try:
        for name, copy in copies.items():
            oracle.assert_view_is_copy(directory / "snapshots" / name, copy)
            oracle.assert_clean(directory / "snapshots" / name)
    finally:
        cli("detach", image)


def two_snapshots(cli: Cli, image: Path) -> dict[str, Path]:
    copies = {}
    for name in ("one", "two"):
        cli("create", image, name)
        copies[name] = oracle.copy_image(image, image.with_name(f"{name}.copy"))
    return copies


@pytest.mark.parametrize(("kind", "block_size"), [("ext2", 1024), ("ext4", 4096)])
def test_a_served_volume_that_fills_up(kind: str, block_size: int, run_cli: Cli) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    content = random.Random(5).randbytes(FILE_BYTES)
    with arena() as top:
        image = make_volume(top / "disk.img", kind, 28, "-b", str(block_size), files={"big": content})
        blocks = oracle.file_blocks(image, "/big").data_blocks
        copies = two_snapshots(run_cli, image)
        directory = top / "served"
        directory.mkdir()
        run_cli("attach", image, directory)
        try:
            descriptor = os.open(directory / "volume", os.O_RDWR)
            try:
                # Every now and then a block, so that later some are copied and their neighbours are not.
                copied = blocks.tolist()[:: MIB // block_size // 8 - 1]
                overwrite_durably(descriptor, copied, block_size)
                with pytest.raises(OSError) as failure:
                    overwrite_durably(descriptor, blocks.tolist(), block_size)
                assert failure.value.errno == errno.ENOSPC
                if block_size < mmap.PAGESIZE:
                    fail_in_part(descriptor, copied, set(blocks.tolist()), block_size)
            finally:
                with contextlib.suppress(OSError):  # told above; a close may tell again
                    os.close(descriptor)
        finally:
            run_cli("detach", image, status=None)
        oracle.assert_clean(image)
        judge(run_cli, image, copies, directory)
        # The first deletion frees nothing: the other snapshot shares every copy.
        run_cli("delete", image, "one")
        oracle.assert_clean(image)
        judge(run_cli, image, {"two": copies["two"]}, directory)
        run_cli("delete", image, "two")
        oracle.assert_clean(image)
        run_cli("create", image, "three")


@pytest.mark.system
@pytest.mark.parametrize(("kind", "block_size"), [("ext2", 1024), ("ext3", 1024), ("ext4", 1024), ("ext4", 4096)])
def test_a_mounted_volume_that_fills_up(kind: str, block_size: int, run_cli: Cli) -> None:
    content = random.Random(6).randbytes(FILE_BYTES)
    with arena() as top:
        image = make_volume(top / "disk.img", kind, 28, "-b", str(block_size), files={"big": content})
        copies = two_snapshots(run_cli, image)
        mount = top / "mount"
        mount.mkdir()
        run_cli("mount", image, mount)
        try:
            failure = fill(mount / "big", FILE_BYTES)
        finally:
            told = run_cli("umount", mount, status=None)
        assert failure is not None, "content was lost, and fsync said that it was there"
        assert failure.errno in (errno.ENOSPC, errno.EIO, errno.EROFS), failure
        # fsync told already; whether the end of the session tells once more depends on what was still dirty.
        assert told.returncode in (0, 1), told
        if told.returncode:
            assert "room" in told.stderr or "recover" in told.stderr
        # A mounted ext4 that could not write its journal was not closed: the next command replays it.
        run_cli("delete", image, "one")
        oracle.assert_clean(image)
        judge(run_cli, image, {"two": copies["two"]}, mount)
        run_cli("delete", image, "two")
        oracle.assert_clean(image)
        with oracle.mounted(image) as directory:
            assert (directory / "big").stat().st_size == FILE_BYTES


def test_warnings_come_before_a_volume_is_full(run_cli: Cli, extsnap_program: Path) -> None:
    """Each watermark once on the server's standard error; `list` and `info` show how full it is by then."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    with arena() as top:
        files = {"big": random.Random(8).randbytes(17 * MIB)}
        image = make_volume(top / "disk.img", "ext4", 24, "-b", "1024", files=files)
        blocks = oracle.file_blocks(image, "/big").data_blocks.tolist()
        run_cli("create", image, "one")
        served = top / "served"
        served.mkdir()
        log = top / "log"
        with log.open("wb") as errors:
            server = subprocess.Popen([extsnap_program, "attach", "--foreground", image, served], stderr=errors)
        try:
            wait_for(lambda: (served / "volume").exists() or server.poll() is not None)
            descriptor = os.open(served / "volume", os.O_RDWR)
            with pytest.raises(OSError) as failure:
                overwrite_in_steps(descriptor, blocks)
            assert failure.value.errno == errno.ENOSPC
            with contextlib.suppress(OSError):  # told above
                os.close(descriptor)
            listed, shown = run_cli("list", image), run_cli("info", image)
            assert json.loads(run_cli("list", "--json", image).stdout)["watermark"] == "critical"
        finally:
            run_cli("detach", image, status=None)
            assert server.wait(180) == 0
        (room,) = [line for line in shown.stdout.splitlines() if line.startswith("room for copies")]
        assert room.split() == ["room", "for", "copies", "0", "B,", "critical"]
        assert "100% full: 0.0 MiB more can be overwritten before writes fail" in listed.stderr
        warned = [line.split(": note: ")[1] for line in log.read_text().splitlines() if "% full" in line]
        low, critical = (int(line.split(" is ")[1].split("%")[0]) for line in warned)
        assert 80 <= low < 95 <= critical, warned
        assert all("delete a snapshot, or grow the volume" in line for line in warned)


def overwrite_in_steps(descriptor: int, blocks: list[int]) -> None:
    for first in range(0, len(blocks), 50):
        overwrite_durably(descriptor, blocks[first : first + 50], 1024)


def wait_for(happened: Callable[[], bool]) -> None:
    over = time.monotonic() + 180
    while not happened():
        assert time.monotonic() < over, "a hang"
        time.sleep(0.05)


def take_the_rest(directory: Path) -> None:
    """Write a file until the filesystem has not one free block."""
    number = directory.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    kept_back = Path("/sys/fs/ext4", device, "reserved_clusters")  # for delayed writes
    kept_back.write_text("0\n")
    with (directory / "rest").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\x5a" * 1024)


@pytest.mark.system
@pytest.mark.parametrize(("kind", "block_size"), [("ext2", 1024), ("ext3", 1024), ("ext4", 4096)])
def test_the_oldest_snapshots_make_room(kind: str, block_size: int, run_cli: Cli) -> None:
    """On a filesystem without a free block, through the kernel: every write succeeds, and what goes is named."""
    rng = random.Random(7)
    size = 6 * MIB
    with arena() as top:
        image = make_volume(top / "disk.img", kind, 26, "-b", str(block_size), files={"big": rng.randbytes(size)})
        run_cli("set", image, "on-full=drop-oldest")
        mount = top / "mount"
        mount.mkdir()
        copies: dict[str, Path] = {}
        dropped: list[str] = []
        for number in range(4):
            name = f"s{number}"
            run_cli("create", image, name)
            copies[name] = oracle.copy_image(image, top / f"{name}.copy")
            run_cli("mount", image, mount)
            if not number:
                take_the_rest(mount)
                sync(mount)
                assert os.statvfs(mount).f_bfree == 0
            content = rng.randbytes(size)
            with (mount / "big").open("r+b") as file:
                file.write(content)
                os.fsync(file.fileno())
            told = run_cli("umount", mount)
            shown = json.loads(run_cli("info", "--json", image).stdout)
            dropped = [entry["name"] for entry in shown["dropped"]]
            left = [entry["name"] for entry in json.loads(run_cli("list", "--json", image).stdout)["snapshots"]]
            assert dropped + left == sorted(copies), "what goes is the oldest, and info names it"
            for gone in set(dropped) & {name for name in copies if copies[name].exists()}:
                assert f"dropped snapshot '{gone}' of {image}" in told.stderr
                copies[gone].unlink()
            oracle.assert_clean(image)
            with oracle.mounted(image) as directory:
                assert (directory / "big").read_bytes() == content
            judge(run_cli, image, {name: copies[name] for name in left}, mount)
        assert len(dropped) >= 2, "it never was full: this test shows nothing"
        assert json.loads(run_cli("check", "--json", image).stdout)["ok"]
