"""What users see of damaged bytes: which structure, which snapshots, which files; the good ones stay readable."""

from __future__ import annotations

import errno
import json
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
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.owners import owners_of

BLOCK = 1024
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def history(top: Path) -> tuple[Path, dict[str, int]]:
    """A volume with snapshots one and two; the block of each file that was overwritten."""
    files = {f"f{number}": random.Random(number).randbytes(40 * BLOCK) for number in range(3)}
    image = make_volume(top / "disk.img", "ext4", 24, "-b", str(BLOCK), files=files)
    blocks = {f"/f{number}": int(oracle.file_blocks(image, f"/f{number}").data_blocks[5]) for number in range(3)}
    for name, written in (("one", ["/f0"]), ("two", ["/f1", "/f2"])):
        with extsnap.open(image) as volume:
            volume.create(name)
            volume.begin_serving(grow=False)
            for path in written:
                volume.write(blocks[path] * BLOCK, random.Random(path).randbytes(BLOCK))
            assert volume.end_serving()
    return image, blocks


def copy_of(cli: Cli, image: Path, block: int) -> tuple[int, list[str]]:
    """(byte of the image, snapshots) of the copy of a block."""
    records = json.loads(cli("dump", "--json", image, "records").stdout)["records"]
    record = next(one for one in records if one["block"] <= block < one["block"] + one["length"])
    logical = record["copy"] + block - record["block"]
    extents = json.loads(cli("dump", "--json", image, "header").stdout)["header"]["extents"]
    place = next(to + logical - start for start, to, length in extents if start <= logical < start + length)
    return place * BLOCK, record["snapshots"]


def flip(image: Path, offset: int) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def states(cli: Cli, image: Path) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in json.loads(cli("list", "--json", image).stdout)["snapshots"]}


@pytest.mark.system
def test_a_damaged_copy(run_cli: Cli) -> None:
    """At rest and served: its file and its snapshot are named, its read is EIO, the other snapshot minds nothing."""
    with arena() as top:
        image, blocks = history(top)
        offset, names = copy_of(run_cli, image, blocks["/f0"])
        assert names == ["one"]
        two = top / "two.img"
        run_cli("export", image, "two", two)
        flip(image, offset)
        assert states(run_cli, image) == {"one": "ok", "two": "ok"}
        found = run_cli("check", image, status=3)
        assert f"the copy of block {blocks['/f0']} fails its checksum" in found.stdout
        assert "in: /f0" in found.stdout
        assert "damage found in the store, snapshot one;" in found.stderr
        assert states(run_cli, image) == {"one": "damaged", "two": "ok"}
        assert '"damaged"' in run_cli("show", "--json", image, "one").stdout
        quick = json.loads(run_cli("check", "--quick", "--json", image, status=3).stdout)
        assert [(entry["name"], entry["ok"], entry.get("files")) for entry in quick["snapshots"]] == [
            ("one", False, ["/f0"]),
            ("two", True, None),
        ]
        assert quick["snapshots"][0]["blocks"] == [[blocks["/f0"], 1]]
        served = top / "served"
        served.mkdir()
        run_cli("attach", image, served)
        view = os.open(served / "snapshots" / "one", os.O_RDONLY)
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.pread(view, BLOCK, blocks["/f0"] * BLOCK)
            assert (
                os.pread(view, BLOCK, blocks["/f1"] * BLOCK)
                == random.Random(1).randbytes(40 * BLOCK)[5 * BLOCK :][:BLOCK]
            )
        finally:
            os.close(view)
        again = json.loads(run_cli("check", "--quick", "--json", image, status=3).stdout)
        assert again["snapshots"] == quick["snapshots"]
        run_cli("detach", image)
        other = top / "again.img"
        run_cli("export", image, "two", other)
        assert oracle.sha256(other) == oracle.sha256(two)
        assert run_cli("export", image, "one", top / "one.img", status=1).stderr.count("fails its checksum") == 1
        flip(image, offset)  # the medium gives the right byte after all
        run_cli("check", image)
        assert states(run_cli, image) == {"one": "ok", "two": "ok"}


@pytest.mark.system
def test_a_damaged_structure_is_mended(run_cli: Cli) -> None:
    """A check names the structure and writes it again; an image that cannot be written is told as such."""
    with arena() as top:
        image, _ = history(top)
        header = json.loads(run_cli("dump", "--json", image, "header").stdout)["header"]
        flip(image, header["slots"][1] * BLOCK + 100)
        before = oracle.sha256(image)
        slot = f"slot B of the header (block {header['slots'][1]}) is damaged, the other slot is whole"
        with image.open("rb"):  # root may write it all the same: so it is mounted read-only, with a loop device
            loop = subprocess.run(
                ["losetup", "--find", "--show", "-r", image], capture_output=True, text=True, check=True
            )
        try:
            found = run_cli("check", loop.stdout.strip(), status=3)
        finally:
            subprocess.run(["losetup", "-d", loop.stdout.strip()], check=True)
        assert slot in found.stdout
        assert "what was found is not noted in the image" in found.stderr
        assert oracle.sha256(image) == before
        found = run_cli("check", "--quick", image, status=3)
        assert slot in found.stdout
        assert "it was written again" in found.stderr
        assert states(run_cli, image) == {"one": "ok", "two": "ok"}
        run_cli("check", image)


@pytest.mark.system
def test_an_index_that_is_lost(run_cli: Cli) -> None:
    """Both copies are damaged: the snapshots are listed as damaged, none is read wrong, the base is as it was.

    Files that may be affected are named; a delete of the snapshots that have records there makes the volume whole.
    """
    with arena() as top:
        image, _ = history(top)
        with extsnap.open(image, writable=False) as volume:
            store = volume.require_store()
            places = [
                int(block)
                for kind, key in store.root.blobs
                if kind == 4
                for copy in range(2)
                for block in store.physical(store.blob_blocks(kind, key, copy))
            ]
        for block in places:
            flip(image, block * BLOCK + 8)
        found = run_cli("check", image, status=3)
        assert "is damaged in both copies in the same place" in found.stdout
        assert re.search(
            r"part 0 of index level \d fails its checksum in both copies \(blocks \d+, \d+\)", found.stdout
        )
        assert re.search(r"in: /f\d", found.stdout)
        assert states(run_cli, image) == {"one": "damaged", "two": "damaged"}
        assert "has a copy is lost: part 0 of" in run_cli("export", image, "one", top / "out.img", status=1).stderr
        oracle.assert_clean(image)
        before = oracle.sha256(image)
        for command in (["create", image, "three"], ["delete", image, "one"], ["restore", image, "one"]):
            said = run_cli(*command, status=1).stderr
            assert f"extsnap delete {image} one two makes the volume whole again" in said
        assert oracle.sha256(image) == before
        run_cli("delete", image, "two", "one")
        run_cli("check", image)
        oracle.assert_clean(image)
        run_cli("create", image, "three")
        run_cli("check", image)
        run_cli("strip", image)
        oracle.assert_clean(image)
        assert oracle.store_blocks(image) is None


def tree(top: Path, kind: str, size: int) -> Path:
    """A volume with every kind of owner: long and holed files, directories, symlinks, attributes."""
    files = {f"f{number}": random.Random(number).randbytes(9000) for number in range(20)}
    files["long"] = bytes(random.Random(7).randbytes(3 << 20))
    image = make_volume(top / "disk.img", kind, 24, "-b", str(size), files=files)
    lines = [f"symlink link{number} {'x' * number}" for number in (40, 59, 60, 200)]
    oracle.debugfs_write(image, *lines, "mkdir one", "mkdir one/two", f"ea_set one trusted.long {'x' * 400}")
    # Many extents: every other block of a file is given back.
    oracle.debugfs_write(image, *(f"punch /long {block} {block}" for block in range(1, 700, 2)))
    return image


@pytest.mark.parametrize(("kind", "size"), [("ext4", 1024), ("ext4", 4096), ("ext2", 1024), ("ext3", 4096)])
def test_owners_are_those_that_debugfs_names(tmp_path: Path, kind: str, size: int) -> None:
    """Block by block: icheck for all that files own; the rest is the filesystem's own."""
    image = tree(tmp_path, kind, size)
    used = np.flatnonzero(oracle.blocks_in_use(image))
    owners = oracle.block_owners(image, used.tolist())
    with image.open("rb") as file:

        class Device:
            size = image.stat().st_size

            def pread(self, offset: int, length: int) -> bytes:
                return os.pread(file.fileno(), length, offset)

            def readinto(self, offset: int, buffer: memoryview) -> None:
                buffer[:] = self.pread(offset, len(buffer))

        fs = Filesystem.open(Device())
        everything = owners_of(fs, used)
        expected = {number for number in owners.values() if number}
        assert set(everything.inodes.tolist()) == expected
        rng = random.Random(1)
        nodes = oracle.file_blocks(image, "/long").mapping.tolist()
        assert nodes, "the long file has no mapping blocks: this shows nothing of them"
        for block in [*nodes, *rng.sample(used.tolist(), 120)]:
            found = owners_of(fs, np.array([block], np.int64))
            owner = owners[block]
            assert found.inodes.tolist() == ([owner] if owner else []), f"block {block}"
            assert owner or found.structures or block <= 300, f"block {block} is nobody's"
