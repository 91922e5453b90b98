"""Volumes that need recovery: every command says what to do, doing it works, and snapshots stay exact."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

import extsnap
from extsnap.serve import checking

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

REPAIR = ("--", "e2fsck", "-fy", "{}")
pytestmark = pytest.mark.system


def change(mount: Path) -> None:
    """Write, with everything durable and the journal not empty."""
    rng = random.Random(1)
    for number in range(12):
        with (mount / f"new-{number}").open("wb") as file:
            file.write(rng.randbytes(9000))
            file.flush()
            os.fsync(file.fileno())
    for number in range(0, 12, 3):
        (mount / f"new-{number}").unlink()
    with (mount / "big").open("r+b") as file:
        file.write(rng.randbytes(200_000))
        file.flush()
        os.fsync(file.fileno())


def left(top: Path, kind: str, cli: Cli, *, snapshots: bool) -> tuple[Path, dict[str, Path]]:
    """The copy of a volume taken while it was mounted and written, and whole copies of its snapshots."""
    big = random.Random(2).randbytes(1 << 20)
    image = make_volume(top / "disk.img", kind, 24, "-b", "1024", files={"big": big})
    copies = {}
    mount = top / "mount"
    mount.mkdir()
    if not snapshots:
        with oracle.mounted(image, writable=True) as directory:
            change(directory)
            return oracle.copy_image(image, top / "left.img"), copies
    blocks = oracle.file_blocks(image, "/big").data_blocks
    for name in ("one", "two"):
        with extsnap.open(image) as volume:
            volume.create(name)
            copies[name] = oracle.copy_image(image, top / f"{name}.copy")
            volume.begin_serving()
            volume.write(int(blocks[7]) * 1024, name.encode() * 300)
            volume.end_serving()
    cli("mount", image, mount)
    try:
        change(mount)
        copy = oracle.copy_image(image, top / "left.img")
    finally:
        cli("umount", mount)
    mount.rmdir()
    return copy, copies


def assert_exact(image: Path, copies: dict[str, Path]) -> None:
    """Every view is exact and clean."""
    with extsnap.open(image, writable=False) as volume:
        for name, copy in copies.items():
            view = image.with_name("view")
            with view.open("wb") as out:
                shutil.copyfileobj(volume.snapshots[name].open(), out)
            oracle.assert_view_is_copy(view, copy)
            oracle.assert_clean(view)


def judge(image: Path, copies: dict[str, Path]) -> None:
    """The base volume is clean by stock e2fsck, every view exact and clean, and the store sound."""
    oracle.assert_clean(image)
    assert_exact(image, copies)
    assert checking.check(str(image), quick=True)["ok"] is True


@pytest.mark.parametrize("kind", ["ext3", "ext2"])
def test_without_snapshots(kind: str, run_cli: Cli) -> None:
    with arena() as top:
        image, _ = left(top, kind, run_cli, snapshots=False)
        step = f"run extsnap run {image} -- e2fsck -fy {{}}"
        what = "was not cleanly unmounted" if kind == "ext2" else "needs journal recovery"
        before = oracle.sha256(image)
        for command, name in (("create", "one"), ("attach", top / "mount"), ("mount", top / "mount")):
            refused = run_cli(command, image, name, status=1)
            assert refused.stderr == f"extsnap: {image} {what}; {step}\n"
        assert f"{what}; {step}" in run_cli("info", image).stderr
        assert oracle.sha256(image) == before
        assert run_cli("run", image, *REPAIR, status=None).returncode in (0, 1)
        oracle.assert_clean(image)
        run_cli("create", image, "one")
        oracle.assert_clean(image)


@pytest.mark.parametrize("kind", ["ext4", "ext2"])
def test_with_snapshots(kind: str, run_cli: Cli) -> None:
    with arena() as top:
        image, copies = left(top, kind, run_cli, snapshots=True)
        step = f"run extsnap run {image} -- e2fsck -fy {{}}"
        before = oracle.sha256(image)
        for command in ("list", "info"):
            if kind == "ext2" and "was not closed" in run_cli(command, image).stderr:
                continue
            assert step in run_cli(command, image).stderr
        assert step in run_cli("check", image, status=1).stderr
        assert oracle.sha256(image) == before
        tried = oracle.copy_image(image, top / "tried.img")
        created = run_cli("create", tried, "three", status=None)
        if kind == "ext2" and created.returncode:  # e2fsck -p may want decisions
            assert f"run extsnap run {tried} -- e2fsck -fy {{}}" in created.stderr
        else:
            assert created.returncode == 0, created
            oracle.assert_clean(tried)
        assert run_cli("run", image, *REPAIR, status=None).returncode in (0, 1)
        judge(image, copies)


def test_written_outside_and_not_recovered(run_cli: Cli) -> None:
    """Somebody removed the guard and mounted the volume, and the machine went down: no mark, and a journal."""
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 24, "-b", "1024", files={"big": bytes(1 << 20), "other": b"x"})
        run_cli("create", image, "one")
        subprocess.run(["debugfs", "-w", "-R", "feature -read-only", image], check=True, capture_output=True)
        with oracle.mounted(image, writable=True) as directory:
            change(directory)
            copy = oracle.copy_image(image, top / "left.img")
        refused = run_cli("create", copy, "two", status=1).stderr
        assert f"extsnap accept {copy}" in refused
        assert run_cli("run", copy, *REPAIR, status=125).stderr == refused
        accepted = run_cli("accept", copy)
        assert accepted.stdout == "one\n"
        assert f"needs journal recovery; run extsnap run {copy} -- e2fsck -fy {{}}" in accepted.stderr
        assert oracle.e2fsck(copy).status != 0, "the mark keeps stock tools from replaying over what snapshots need"
        assert run_cli("run", copy, *REPAIR, status=None).returncode in (0, 1)
        oracle.assert_clean(copy)
        assert json.loads(run_cli("list", "--json", copy).stdout)["snapshots"][0]["state"] == "tainted"


def room(cli: Cli, image: Path) -> int:
    """Blocks of 1 KiB that the store has free."""
    return int(json.loads(cli("info", "--json", image).stdout)["store"]["free_bytes"]) // 1024


def full(top: Path, cli: Cli) -> tuple[Path, dict[str, Path]]:
    """A volume left with a journal whose replay overwrites 400 needed blocks, and room for half of them."""
    files = {f"f{number:04}": b"content" for number in range(1600)}
    files["big"] = random.Random(3).randbytes(20 << 20)
    image = make_volume(top / "disk.img", "ext4", 32, "-b", "1024", "-J", "size=4", files=files)
    blocks = oracle.file_blocks(image, "/big").data_blocks.tolist()
    copies = {}
    for name in ("one", "two"):
        with extsnap.open(image) as volume:
            volume.create(name)
        copies[name] = oracle.copy_image(image, top / f"{name}.copy")
    directory = top / "served"
    directory.mkdir()
    cli("attach", image, directory)
    try:
        # Before the kernel has it, which is when some of the room would be kept for metadata.
        with (directory / "volume").open("r+b", buffering=0) as volume:
            while (spare := room(cli, image) - 256) > 0:
                for block in blocks[:spare]:
                    os.pwrite(volume.fileno(), b"\xa5" * 1024, block * 1024)
                os.fsync(volume.fileno())
                del blocks[:spare]
        with oracle.mounted(directory / "volume", writable=True) as mount:
            (mount / "f0000").touch()
            for name in files:
                os.chmod(mount / name, 0o600)
            file = os.open(mount / "f0000", os.O_RDONLY)
            os.fsync(file)
            os.close(file)
            left = oracle.copy_image(image, top / "left.img")
    finally:
        cli("detach", image, status=None)
    directory.rmdir()
    return left, copies


def test_recovery_of_a_full_volume(run_cli: Cli) -> None:
    """Refused with nothing changed and the bytes named; one deletion makes room, and what is left is exact."""
    with arena() as top:
        image, copies = full(top, run_cli)
        before = oracle.sha256(image)
        (top / "directory").mkdir()
        for command in (("create", image, "three"), ("attach", image, top / "directory"), ("run", image, *REPAIR)):
            refused = run_cli(*command, status=125 if command[0] == "run" else 1).stderr
            found = re.search(r"needs (\d+) bytes for copies .* the store has (\d+); nothing was changed", refused)
            assert found, refused
            assert int(found[1]) > 400 * 1024 > 256 * 1024 > int(found[2])
        assert oracle.sha256(image) == before
        assert_exact(image, copies)
        run_cli("export", image, "one", top / "out.img")
        oracle.assert_clean(top / "out.img")
        assert "needs" in run_cli("delete", image, "one", "two").stderr
        assert oracle.e2fsck(image).status != 0, "the mark stays until the journal is replayed"
        assert run_cli("run", image, *REPAIR, status=None).returncode in (0, 1)
        judge(image, {})


def test_a_restore_that_a_damaged_copy_stops(run_cli: Cli) -> None:
    """Every command says what stands, and how to go back; that works, and then so does everything else."""
    with arena() as top:
        big = random.Random(2).randbytes(1 << 20)
        image = make_volume(top / "disk.img", "ext4", 24, "-b", "1024", files={"big": big})
        mount = top / "mount"
        mount.mkdir()
        blocks = oracle.file_blocks(image, "/big").data_blocks
        with extsnap.open(image) as volume:
            volume.create("one")
            volume.begin_serving()
            for block in blocks[:400]:
                volume.write(int(block) * 1024, b"new".ljust(1024))
            volume.end_serving()
            (level,) = (level for level in volume.engine.index.levels if len(level.copy))
            copy = int(volume.store.physical(level.copy[level.copy >= 0][-1:])[0])
        with image.open("r+b") as file:
            file.seek(copy * 1024)
            file.write(b"rot")
        stands = re.escape(f"extsnap: the restore of {image} to 'one' was begun and is not finished: ")
        told = re.compile(
            rf"{stands}.* fails its checksum; .* extsnap restore {re.escape(str(image))} (\S+) goes back\n"
        )
        found = told.fullmatch(run_cli("restore", image, "one", status=1).stderr)
        assert found
        safety = found[1]
        for command, *arguments in (
            ("create", "later"),
            ("delete", safety),
            ("attach", mount),
            ("mount", mount),
            ("run", "--", "true"),
            ("restore", "one"),
        ):
            refused = run_cli(command, image, *arguments, status=125 if command == "run" else 1)
            assert told.fullmatch(refused.stderr), (command, refused.stderr)
        assert safety in run_cli("list", image).stdout
        run_cli("restore", image, safety)
        oracle.assert_clean(image)
        assert run_cli("run", image, "--", "debugfs", "-R", "dump /big " + str(top / "out"), "{}").returncode == 0
        assert (top / "out").read_bytes() == b"new".ljust(1024) * 400 + big[400 << 10 :]
        run_cli("delete", image, "one")
        run_cli("restore", image, safety)
        oracle.assert_clean(image)
