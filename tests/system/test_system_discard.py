"""Discard on a mounted volume: the host gets back what no snapshot needs, and nothing large is copied for it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lab
import numpy as np
import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
MIB = 1 << 20
SIZE = 4096
LONG = bool(os.environ.get("EXTSNAP_LONG"))


@contextmanager
def mounted(run_cli: Cli, image: Path, mount: Path) -> Iterator[str]:
    """The volume mounted by extsnap; yields its loop device."""
    mount.mkdir(exist_ok=True)
    run_cli("mount", image, mount)
    try:
        source = subprocess.run(
            ["findmnt", "--noheadings", "--output", "SOURCE", mount], check=True, capture_output=True, text=True
        )
        yield source.stdout.strip()
    finally:
        run_cli("umount", mount)


def trim(mount: Path) -> None:
    subprocess.run(["sync", "--file-system", mount], check=True)
    subprocess.run(["fstrim", mount], check=True)


def host_bytes(image: Path) -> int:
    return os.stat(image).st_blocks * 512


def copied_bytes(run_cli: Cli, image: Path) -> int:
    (entry,) = json.loads(run_cli("list", "--json", image).stdout)["snapshots"]
    return int(entry["copied_bytes"])


def zeros_of(device: str, blocks: np.ndarray) -> int:
    """How many of the blocks read as zeros, past every cache."""
    done = subprocess.run(
        ["dd", f"if={device}", "bs=1M", "iflag=direct", "status=none"], check=True, capture_output=True
    )
    content = np.frombuffer(done.stdout, np.uint64).reshape(-1, SIZE // 8)
    return int((~content[blocks].any(axis=1)).sum())


def assert_view(run_cli: Cli, image: Path, name: str, copy: Path, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    run_cli("attach", image, directory)
    try:
        oracle.assert_view_is_copy(directory / "snapshots" / name, copy)
        oracle.assert_clean(directory / "snapshots" / name)
    finally:
        run_cli("detach", image)


@pytest.mark.system
def test_fstrim_gives_back_what_no_snapshot_needs_and_copies_nothing_large(run_cli: Cli) -> None:
    rng = random.Random(4)
    with arena() as top:
        gone, new = rng.randbytes(24 * MIB), rng.randbytes(9 * MIB)
        image = make_volume(
            top / "disk.img", "ext4", 112, "-b", str(SIZE), "-m", "0", files={"kept": rng.randbytes(MIB), "gone": gone}
        )
        blocks = oracle.file_blocks(image, "/gone").data_blocks
        run_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "copy.img")
        mount = top / "mount"
        with mounted(run_cli, image, mount) as loop:
            (mount / "later").write_bytes(rng.randbytes(16 * MIB))
            subprocess.run(["sync", "--file-system", mount], check=True)
            (mount / "later").unlink()
            (mount / "gone").unlink()
            before, copied = host_bytes(image), copied_bytes(run_cli, image)
            trim(mount)
            assert host_bytes(image) <= before - 15 * MIB, "the host keeps what no snapshot needs"
            assert copied_bytes(run_cli, image) - copied <= 2 * MIB, "a trim copied what it discards"
            assert zeros_of(loop, blocks) > len(blocks) * 9 // 10

            (mount / "new").write_bytes(new)
            subprocess.run(["sync", "--file-system", mount], check=True)
            before = host_bytes(image)
            trim(mount)
            assert host_bytes(image) >= before - MIB, "the host lost what a snapshot needs"
        oracle.assert_clean(image)
        assert_view(run_cli, image, "one", copy, top / "served")
        with oracle.mounted(image) as plain:
            assert (plain / "new").read_bytes() == new

        with mounted(run_cli, image, mount):
            trim(mount)
            before = host_bytes(image)
            run_cli("delete", image, "one")
            # The rest of the 24 MiB has copies, in the store.
            assert host_bytes(image) <= before - 10 * MIB, "the host keeps what no snapshot needs any more"
            assert (mount / "new").read_bytes() == new
        oracle.assert_clean(image)


LAZY = ("-b", "1024", "-g", "8192", "-N", "24000", "-E", "lazy_itable_init=1,nodiscard")


def lazy_volume(image: Path, rng: random.Random, files: dict[str, bytes]) -> Path:
    """A volume whose inode tables wait to be zeroed; what was there before shows where nobody does."""
    image.write_bytes(rng.randbytes(96 * MIB))
    make_volume(image, "ext4", 96, *LAZY, files=files)
    assert zeroed(image)[0] < zeroed(image)[1] - 5, "the tables are no lazy ones"
    return image


def assert_tables_are_zeros(image: Path) -> None:
    tables = unused_tables(image)
    assert len(tables) > 1000
    content = np.fromfile(image, np.uint64).reshape(-1, 1024 // 8)
    assert not content[tables].any(), "a table that is called zeroed is not"


@pytest.mark.system
def test_zeros_that_were_written_are_zeros_at_rest(run_cli: Cli) -> None:
    """Write-zeroes as the kernel sends them: over unused inode tables, and over a file that a snapshot needs."""
    rng = random.Random(5)
    with arena() as top:
        image = lazy_volume(top / "disk.img", rng, {"file": rng.randbytes(6 * MIB)})
        blocks = oracle.file_blocks(image, "/file").data_blocks
        tables = unused_tables(image)
        run_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "copy.img")
        directory = top / "served"
        directory.mkdir()
        run_cli("attach", image, directory)
        try:
            loop = subprocess.run(
                ["losetup", "--find", "--show", directory / "volume"], check=True, capture_output=True, text=True
            ).stdout.strip()
            try:
                for first, count in lab.runs(np.concatenate([blocks, tables])):
                    where = ["--offset", str(first * 1024), "--length", str(count * 1024)]
                    subprocess.run(["blkdiscard", "--force", "--zeroout", *where, loop], check=True)
                assert copied_bytes(run_cli, image) <= 2 * MIB, "zeros made copies at once"
                found = np.fromfile(directory / "volume", np.uint64).reshape(-1, 1024 // 8)
                assert not found[blocks].any()
            finally:
                subprocess.run(["losetup", "--detach", loop], check=True)
            oracle.assert_view_is_copy(directory / "snapshots" / "one", copy)
        finally:
            run_cli("detach", image)
        oracle.assert_clean(image)
        assert_tables_are_zeros(image)
        with oracle.mounted(image) as plain:
            assert not any((plain / "file").read_bytes()), "what was discarded is there again"
        assert_view(run_cli, image, "one", copy, directory)


if LONG:  # the kernel takes its time

    def test_inode_tables_are_initialised_lazily(run_cli: Cli) -> None:
        """The kernel's own thread zeroes them: they are zeros at rest, and the snapshot is as it was."""
        rng = random.Random(5)
        with arena() as top:
            image = lazy_volume(top / "disk.img", rng, {"file": b"content" * 100_000})
            run_cli("create", image, "one")
            copy = oracle.copy_image(image, top / "copy.img")
            mount = top / "mount"
            with mounted(run_cli, image, mount) as loop:
                deadline = time.monotonic() + 180
                while zeroed(loop)[0] < zeroed(loop)[1]:
                    assert time.monotonic() < deadline, "the kernel does not come to an end"
                    time.sleep(0.2)
                    subprocess.run(["sync", "--file-system", mount], check=True)
                for number in range(200):
                    (mount / f"n{number}").write_bytes(b"new")
            oracle.assert_clean(image)
            assert zeroed(image)[0] == zeroed(image)[1]
            assert_tables_are_zeros(image)
            assert_view(run_cli, image, "one", copy, top / "served")


def groups_of(image: str | Path) -> list[str]:
    done = subprocess.run(
        ["dumpe2fs", image], check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    return re.split(r"^Group \d+: ", done.stdout, flags=re.MULTILINE)[1:]


def zeroed(image: str | Path) -> tuple[int, int]:
    """(groups whose inode table is said to be zeroed, groups)."""
    groups = groups_of(image)
    return sum("ITABLE_ZEROED" in group for group in groups), len(groups)


def unused_tables(image: Path) -> np.ndarray:
    """Blocks of the inode tables of groups without an inode in use."""
    blocks = []
    for group in groups_of(image):
        first, last = (int(text) for text in re.search(r"Inode table at (\d+)-(\d+)", group).groups())  # type: ignore[union-attr]
        if "INODE_UNINIT" in group:
            blocks.append(np.arange(first, last + 1))
    return np.concatenate(blocks)
