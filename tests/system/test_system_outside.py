"""Writes to an image at rest, by every tool of which it is known what it changes: what is noticed, and what is at risk.

What changed is told by comparing the image with a copy of before, block by block.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import lab
import numpy as np
import oracle
import pytest
from arena import arena, make_volume

import extsnap
from extsnap.errors import OutsideWrite
from extsnap.serve import checking
from extsnap.snapshot.volume import Volume

BLOCK = 1024
pytestmark = pytest.mark.system


def run(*words: str | Path) -> int:
    return subprocess.run(words, capture_output=True, check=False).returncode


def mount(image: Path, options: str) -> None:
    point = image.parent / "point"
    point.mkdir(exist_ok=True)
    if not run("mount", "-t", "ext4", "-o", f"loop,{options}", image, point):
        (point / "f0").read_bytes()
        subprocess.run(["umount", point], check=True, capture_output=True)


def fuse2fs(image: Path) -> None:
    point = image.parent / "point"
    point.mkdir(exist_ok=True)
    if not run("fuse2fs", "-o", "rw", image, point):
        subprocess.run(["umount", point], check=True, capture_output=True)


def zap(image: Path) -> None:
    run("debugfs", "-w", "-R", "zap_block -f /f1 -p 0x5a 3", image)


def overwrite(image: Path) -> None:
    """What dd does."""
    overwrite_at(image, int(oracle.file_blocks(image, "/f1").data_blocks[5]))


def overwrite_at(image: Path, block: int) -> None:
    with image.open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(b"\x5a" * BLOCK)


#: By name: the action, and whether the fingerprint sees it, with the guard and without.
ACTIONS: dict[str, tuple[Callable[[Path], object], tuple[bool, bool]]] = {
    "mount-ro": (lambda image: mount(image, "ro"), (False, False)),
    "e2fsck-fn": (lambda image: run("e2fsck", "-fn", image), (False, False)),
    "mount-rw": (lambda image: mount(image, "rw"), (False, True)),  # with the guard the mount is read-only
    "debugfs-mkdir": (lambda image: run("debugfs", "-w", "-R", "mkdir /new", image), (True, True)),
    "tune2fs-L": (lambda image: run("tune2fs", "-L", "outside", image), (True, True)),
    "e2fsck-fy": (lambda image: run("e2fsck", "-fy", image), (True, True)),
    "fuse2fs": (fuse2fs, (True, True)),
    "debugfs-sif": (lambda image: run("debugfs", "-w", "-R", "sif /f1 mtime 0x5a5a5a5a", image), (False, False)),
    "zap-block": (zap, (False, False)),
    "dd": (overwrite, (False, False)),
}


def history(top: Path, guard: bool) -> Path:
    """A volume with two snapshots with checksums; of all superblocks and descriptors the first one has copies."""
    files = {f"f{number}": random.Random(number).randbytes(40 * BLOCK) for number in range(3)}
    image = make_volume(top / "disk.img", "ext4", 24, "-b", str(BLOCK), files=files)
    with extsnap.open(image) as volume:
        volume.create("old")
        volume.verb("checksum", name="old")
        geometry = volume.filesystem().geometry
        volume.begin_serving(grow=False)
        for block in [*geometry.superblock_blocks.tolist(), *geometry.descriptor_blocks.tolist()]:
            volume.write(block * BLOCK, volume.read(block * BLOCK, BLOCK))
        assert volume.end_serving()
        volume.create("new")
        volume.verb("checksum", name="new")
        volume.verb("guard", wanted=guard)
    return image


def changed_blocks(before: Path, after: Path) -> set[int]:
    """Blocks in which two images differ, by what stands above guard, mark and pointer."""
    contents = []
    for path in (before, after):
        with extsnap.open(path, writable=False) as volume:
            contents.append(volume.medium.pread(0, volume.size))
    return set(np.flatnonzero(lab.unequal(*contents)).tolist())


def blocks_of(runs: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> set[int]:
    return {block for first, length in runs.tolist() for block in range(first, first + length)}


def records_of(volume: Volume, name: str) -> set[int]:
    records = [record for record in volume.verb("dump", what="records")["records"] if name in record["snapshots"]]
    return {record["block"] + behind for record in records for behind in range(record["length"])}


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("action", list(ACTIONS))
def test_an_outside_write(action: str, guard: bool) -> None:
    """It is said and nothing is changed; a check names just the blocks; what is proven whole is tainted no more."""
    with arena() as top:
        image = history(top, guard)
        before = oracle.copy_image(image, top / "before.img")
        act, seen = ACTIONS[action]
        noticed = seen[0 if guard else 1]
        act(image)
        left = oracle.sha256(image)
        with extsnap.open(image, writable=False) as volume:
            info = volume.verb("info")
            assert info["outside_write"] == noticed
            assert any("snapshots at risk: old, new" in line for line in info["notices"]) == noticed
            recorded = {name: records_of(volume, name) for name in ("old", "new")}
            preserved = {name: blocks_of(volume.open_view(name).preserved_runs()) for name in ("old", "new")}
        if noticed:
            for verb, arguments in (("create", {}), ("delete", {"names": ["old"]}), ("restore", {"name": "old"})):
                with extsnap.open(image) as volume, pytest.raises(OutsideWrite, match="at risk: 'old', 'new'"):
                    volume.verb(verb, **arguments)
            checking.check(str(image), quick=True)
            assert oracle.sha256(image) == left, "before it is accepted nothing is changed"
        differ = changed_blocks(before, image)
        if noticed:
            with extsnap.open(image) as volume:
                assert volume.verb("accept")["tainted"] == ["old", "new"]
        report = checking.check(str(image), quick=True)
        states = {}
        for entry in report["snapshots"]:
            name = entry["name"]
            expected = (differ & preserved[name]) - recorded[name]
            found = blocks_of(np.array(entry.get("blocks", []), np.int64).reshape(-1, 2))
            assert found == expected, name
            states[name] = "damaged" if expected else "ok"
            assert ("/f1" in entry.get("files", [])) == (action in ("debugfs-sif", "zap-block", "dd")), name
        with extsnap.open(image, writable=False) as volume:
            assert {entry["name"]: entry["state"] for entry in volume.verb("list")["snapshots"]} == states
        if action == "tune2fs-L":
            assert states == {"old": "ok", "new": "damaged"}


def killed_while_served(image: Path, top: Path) -> Path:
    """The image as a kill leaves it: served, written to and flushed, and not closed."""
    volume = extsnap.open(image)
    volume.begin_serving()
    volume.write(4096, volume.read(4096, BLOCK))
    volume.flush()
    killed = oracle.copy_image(image, top / "killed.img")
    volume.close()
    return killed


@pytest.mark.parametrize("action", [name for name in ACTIONS if name != "dd"])
def test_nobody_writes_after_a_kill(action: str) -> None:
    """The dirty mark keeps every tool away; the next command completes what there is, and no snapshot is at risk."""
    with arena() as top:
        image = history(top, guard=False)
        killed = killed_while_served(image, top)
        left = oracle.sha256(killed)
        ACTIONS[action][0](killed)
        assert oracle.sha256(killed) == left
        with extsnap.open(killed) as volume:
            assert not volume.outside_write
            assert {entry["state"] for entry in volume.verb("list")["snapshots"]} == {"ok"}
        assert checking.check(str(killed), quick=True)["ok"]


def test_what_heeds_no_mark_after_a_kill_is_found_by_the_checksums() -> None:
    """dd asks nobody: the next command completes what there is, and a check names block, file and snapshots."""
    with arena() as top:
        image = history(top, guard=True)
        block = int(oracle.file_blocks(image, "/f1").data_blocks[5])
        killed = killed_while_served(image, top)
        overwrite_at(killed, block)
        with extsnap.open(killed):
            pass
        for entry in checking.check(str(killed), quick=True)["snapshots"]:
            assert entry["blocks"] == [[block, 1]]
            assert entry["files"] == ["/f1"]
