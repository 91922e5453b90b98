"""Filesystems marked with errors: snapshots are recorded as such and exact, and damaged groups are left alone."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest
from arena import arena, make_volume

import extsnap
from extsnap.errors import VolumeDirty
from extsnap.serve import checking, running

BLOCK = 1024
KINDS = {"ext4": ("ext4", ""), "ext4-crc16": ("ext4", "^metadata_csum,uninit_bg"), "ext2": ("ext2", "")}
pytestmark = pytest.mark.system


def volume_with_errors(top: Path, kind: str) -> Path:
    base, features = KINDS[kind]
    files = {f"f{number}": random.Random(number).randbytes(60_000) for number in range(20)}
    image = make_volume(top / "disk.img", base, 40, "-b", str(BLOCK), features=features, files=files)
    oracle.debugfs_write(image, "ssv state 2")
    return image


def place(image: Path, name: str, group: int) -> int:
    """Byte offset of a group's block bitmap, or of its descriptor."""
    text = subprocess.run(["dumpe2fs", image], capture_output=True, text=True, check=False).stdout
    if name == "bitmap":
        return int(re.findall(r"Block bitmap at (\d+)", text)[group]) * BLOCK
    found = re.search(r"Group descriptor size: +(\d+)", text)
    return 2 * BLOCK + group * int(found[1] if found else 32)


def damage(image: Path, what: str, group: int) -> tuple[int, bytes]:
    """Spoil a block bitmap (a block in use looks free, or a free one in use) or a descriptor; (offset, content)."""
    if what == "descriptor":
        at, content = place(image, "descriptor", group) + 12, b"\x0d\x0a"  # bg_free_blocks_count_lo
    else:
        at = place(image, "bitmap", group)
        with image.open("rb") as file:
            file.seek(at)
            row = bytearray(file.read(BLOCK))
        found = row.index(0xFF, 80) if what == "lost" else row.index(0)
        at, content = at + found, b"\x00" if what == "lost" else b"\xff"
    with image.open("r+b") as file:
        file.seek(at)
        file.write(content)
    return at, content


def repair(image: Path) -> None:
    assert running.run(str(image), ["e2fsck", "-fy", "{}"]) in (0, 1)


def assert_exact(image: Path, name: str, copy: Path) -> None:
    """The view equals the copy in every block that e2fsck, repairing another copy, finds to be in use."""
    fixed = oracle.copy_image(copy, copy.with_name("fixed"))
    subprocess.run(["e2fsck", "-fy", fixed], capture_output=True, check=False)
    oracle.assert_clean(fixed)
    used = oracle.preserved_blocks(fixed)
    used[oracle.volume_facts(fixed).superblocks] = False
    with extsnap.open(image, writable=False) as volume, volume.snapshots[name].open() as view:
        shown = np.frombuffer(view.read(), np.uint64).reshape(len(used), -1)
    then = np.frombuffer(copy.read_bytes(), np.uint64).reshape(len(used), -1)
    wrong = np.flatnonzero((shown != then).any(axis=1) & used)
    assert not len(wrong), wrong


@pytest.mark.parametrize(
    ("kind", "what", "group"),
    [
        ("ext4", "lost", 0),
        ("ext4", "descriptor", 2),
        ("ext4-crc16", "taken", 0),
        ("ext2", "descriptor", 1),
    ],
)
def test_damaged_groups(kind: str, what: str, group: int, capfd: pytest.CaptureFixture[str]) -> None:
    with arena() as top:
        image = volume_with_errors(top, kind)
        at, content = damage(image, what, group)
        bitmaps = place(image, "bitmap", group), place(image, "descriptor", group)
        before = image.read_bytes()
        with extsnap.open(image) as volume:
            told = volume.verb("create", name="one")["notices"]
            assert f"marked as having errors, and the snapshot is recorded as such; run extsnap run {image} " in told[0]
            first = (group * 8192 + 1, (group + 1) * 8192 + 1)
            store = volume.verb("dump", what="header")["header"]["extents"]
            assert all(start >= first[1] or start + count <= first[0] for _, start, count in store), "in a bad group"
        after = image.read_bytes()
        assert after[at : at + len(content)] == content
        assert after[bitmaps[0] :][:BLOCK] == before[bitmaps[0] :][:BLOCK]
        assert after[bitmaps[1] :][:32] == before[bitmaps[1] :][:32]
        copy = oracle.copy_image(image, top / "one.copy")
        assert_exact(image, "one", copy)
        repair(image)
        oracle.assert_clean(image)
        assert_exact(image, "one", copy)
        with extsnap.open(image) as volume:
            volume.create("two")
            listed = volume.verb("list")["snapshots"]
            assert [entry["filesystem_errors"] for entry in listed] == [True, False]
            volume.delete(["two"])
        checked = checking.check(str(image))
        assert checked["ok"], checked
        assert checked["state"] == "clean"
        assert checked["snapshots"][0]["errors_then"]
        with extsnap.open(image) as volume:
            volume.verb("restore", name="one")
            assert volume.verb("info")["state"] == "errors"
        repair(image)
        oracle.assert_clean(image)


def test_only_the_mark(run_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with arena() as top:
        image = volume_with_errors(top, "ext4")
        run_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "one.copy")
        notice = f"{image} is marked as having errors; run extsnap run {image} -- e2fsck -fy {{}}\n"
        for command in ("list", "info", "check"):
            assert notice in run_cli(command, image).stderr
        assert "clean, with errors" in run_cli("list", image).stdout
        # A kernel mounts it and leaves the mark: it is at rest as before.
        (top / "mount").mkdir()
        run_cli("mount", image, top / "mount")
        (top / "mount" / "new").write_bytes(os.urandom(9000))
        run_cli("umount", top / "mount")
        assert oracle.e2fsck(image).clean
        with extsnap.open(image) as volume:
            assert volume.verb("info")["state"] == "errors"
        assert_exact(image, "one", copy)
        assert run_cli("run", image, "--", "e2fsck", "-fy", "{}", status=1).returncode
        with extsnap.open(image) as volume:
            assert volume.verb("info")["state"] == "clean"
        assert_exact(image, "one", copy)


@pytest.mark.parametrize("kind", ["ext4", "ext2"])
def test_no_group_verifies(kind: str) -> None:
    with arena() as top:
        image = volume_with_errors(top, kind)
        places = [damage(image, "descriptor", group) for group in range(5)]
        assert len(places) == 5
        digest = oracle.sha256(image)
        with (
            extsnap.open(image) as volume,
            pytest.raises(VolumeDirty, match=r"errors, and 5 of its 5 groups do not verify .* needs .* free blocks"),
        ):
            volume.create("one")
        assert oracle.sha256(image) == digest
