"""Block bitmaps against dumpe2fs, and what we allocate and free against e2fsck."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import images
import numpy as np
import oracle
import pytest

from extsnap.arrays import bits_of, runs_of
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.overlay import Overlay
from extsnap.blockdev.recording import MemoryDevice
from extsnap.errors import FormatError
from extsnap.ext.bitmaps import choose_free
from extsnap.ext.filesystem import Filesystem

#: Volumes of 30 to 60 groups, most of them uninitialised, whose last group is short: options of mke2fs.
UNINITIALISED = {
    "csum": ["-t", "ext4", "-O", "none,extent,sparse_super,metadata_csum"],
    "csum-64bit-flex": ["-t", "ext4", "-O", "none,extent,sparse_super,metadata_csum,64bit,flex_bg", "-G", "8"],
    "gdt-csum": ["-t", "ext4", "-O", "none,extent,sparse_super,uninit_bg"],
    "gdt-csum-flex": ["-t", "ext4", "-O", "none,extent,sparse_super,uninit_bg,flex_bg", "-G", "16"],
    "reserved-descriptors": ["-t", "ext4", "-O", "none,extent,sparse_super,resize_inode,metadata_csum"],
    "backups-everywhere": ["-t", "ext4", "-O", "none,extent,metadata_csum"],
    "sparse_super2": ["-t", "ext4", "-O", "none,extent,sparse_super2,metadata_csum", "-E", "num_backup_sb=2"],
    "no-checksums": ["-t", "ext2", "-O", "none,sparse_super"],
}


def used_by_bitmaps(fs: Filesystem) -> np.ndarray:
    """bool[blocks_count]; blocks before the first group count as used."""
    geometry = fs.geometry
    bits = np.unpackbits(fs.block_bitmaps().take(np.arange(geometry.groups)).reshape(-1), bitorder="little").astype(
        np.bool_
    )
    inside = geometry.blocks_count - geometry.first_data_block
    assert bits[inside:].all(), "padding bits of the last group are set"
    return np.concatenate([np.ones(geometry.first_data_block, np.bool_), bits[:inside]])


def assert_as_dumpe2fs(image: Path, fs: Filesystem) -> None:
    """Bitmaps, free runs and counts are those that dumpe2fs prints."""
    used = oracle.blocks_in_use(image)[: fs.geometry.blocks_count]
    wrong = np.flatnonzero(used_by_bitmaps(fs) != used)
    assert not len(wrong), f"{image.name}: blocks {wrong[:10]}"
    blocks, inodes = oracle.free_counts(image)
    assert (fs.geometry.free_blocks, fs.geometry.free_inodes) == (blocks, inodes)
    assert int(fs.groups.column("bg_free_blocks_count").sum()) == blocks == int((~used).sum())
    assert int(fs.groups.column("bg_free_inodes_count").sum()) == inodes
    runs = fs.find_free(fs.geometry.blocks_count)
    assert [tuple(run) for run in runs.tolist()] == joined(oracle.free_runs(image))


def blocks_of(runs: np.ndarray) -> np.ndarray:
    """int64[n]: the blocks of runs (start, length)."""
    return np.concatenate([np.zeros(0, np.int64), *[np.arange(start, start + n) for start, n in runs.tolist()]])


def joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs that touch, as those of neighbouring groups do, made one."""
    return [tuple(run) for run in runs_of(blocks_of(np.array(runs, np.int64).reshape(-1, 2))).tolist()]


@pytest.mark.parametrize("name", images.MATRIX)
def test_matrix_bitmaps_are_those_of_dumpe2fs(name):
    path = images.image(name)
    with ImageFile(str(path)) as device:
        assert_as_dumpe2fs(path, Filesystem.open(device))


@pytest.fixture(params=UNINITIALISED)
def uninitialised(request, tmp_path) -> Path:
    path = tmp_path / f"{request.param}.img"
    words = ["-q", "-F", "-b", "1024", "-g", "1024", "-N", "1024", "-m", "0", *UNINITIALISED[request.param]]
    env = {**os.environ, "MKE2FS_CONFIG": "/dev/null"}
    subprocess.run(["mke2fs", *words, str(path), "40700"], check=True, capture_output=True, env=env)
    return path


def test_uninitialised_groups_are_resolved(uninitialised):
    text = subprocess.run(["dumpe2fs", str(uninitialised)], capture_output=True, text=True, check=True).stdout
    if "no-checksums" not in uninitialised.name:
        assert text.count("BLOCK_UNINIT") >= 10
    with ImageFile(str(uninitialised)) as device:
        assert_as_dumpe2fs(uninitialised, Filesystem.open(device))


def test_a_fixture_with_uninitialised_groups(fixture_image):
    for name in ("ext4-uninitialised-groups", "ext4-kernel-hash-tree"):
        path = fixture_image(name)
        with ImageFile(str(path)) as device:
            assert_as_dumpe2fs(path, Filesystem.open(device))


def test_padding_is_used_whatever_the_medium_says(uninitialised):
    """Where nothing has a checksum, clear bits behind the last block must not become blocks."""
    with ImageFile(str(uninitialised)) as device:
        fs = Filesystem.open(device)
        block = int(fs.groups.column("bg_block_bitmap")[-1])
        free, checked = fs.find_free(fs.geometry.blocks_count), fs.geometry.has_metadata_csum
    content = bytearray(uninitialised.read_bytes())
    content[block * 1024 + 127] = 0
    changed = Filesystem.open(MemoryDevice(content))
    if not checked:
        used_by_bitmaps(changed)
        assert changed.find_free(changed.geometry.blocks_count).tolist() == free.tolist()


def test_a_bitmap_with_a_wrong_checksum_is_refused(uninitialised):
    with ImageFile(str(uninitialised)) as device:
        fs = Filesystem.open(device)
        block = int(fs.groups.column("bg_block_bitmap")[0])
        checked = fs.geometry.has_metadata_csum
    content = bytearray(uninitialised.read_bytes())
    content[block * 1024 + 100] ^= 4
    broken = Filesystem.open(MemoryDevice(content))
    if checked:
        with pytest.raises(FormatError, match="group 0"):
            broken.block_bitmaps()
    else:
        broken.block_bitmaps()


class Work:
    """Random allocations and frees of one volume.  The blocks it holds belong to a file, so e2fsck agrees."""

    def __init__(self, image: Path, seed: str) -> None:
        self.image = image
        self.rng = random.Random(seed)
        oracle.debugfs_write(image, "write /dev/null work")

    def round(self, *, steps: int) -> None:
        """Some steps, flushed at random moments, through an overlay whose changes are then written."""
        with ImageFile(str(self.image), writable=True) as device:
            overlay = Overlay(device, Filesystem.open(device).geometry.block_size)
            fs = Filesystem.open(overlay, writable=True)
            ino = fs.lookup("/work")
            assert ino is not None
            for _ in range(steps):
                self._step(fs, ino)
                if self.rng.random() < 0.4:
                    fs.flush()
            fs.flush()
            for block, content in overlay.changes().items():
                device.pwrite(block * fs.geometry.block_size, content)

    def _step(self, fs: Filesystem, ino: int) -> None:
        old = fs.file_map(ino)
        held = blocks_of(old.data[:, 1:])
        used = used_by_bitmaps(fs)
        if len(held) and self.rng.random() < 0.45:
            keep = np.sort(self.rng.sample(held.tolist(), self.rng.randrange(len(held))))
        else:
            # Anywhere, or where the allocator wants it.
            if self.rng.random() < 0.5:
                choice = np.flatnonzero(~used)
                length = self.rng.choice((1, 5, 300))
                first = self.rng.randrange(max(1, len(choice) - length))
                new = choice[first : first + length]
            else:
                new = blocks_of(fs.find_free(self.rng.choice((1, 40, 2000))))
            keep = np.sort(np.concatenate([held, new]))
        self._set(fs, ino, old.mapping, held, keep)

    def _set(self, fs: Filesystem, ino: int, mapping: np.ndarray, held: np.ndarray, keep: np.ndarray) -> None:
        """Let the file have exactly the blocks ``keep``: bitmaps first, then the map with nodes of its own."""
        fs.set_blocks(runs_of(np.sort(np.setdiff1d(held, keep))), False)
        fs.set_blocks(runs_of(np.sort(np.setdiff1d(keep, held))), True)
        fs.set_blocks(runs_of(np.sort(mapping)), False)
        runs = runs_of(keep)
        data = np.stack([np.cumsum(runs[:, 1]) - runs[:, 1], runs[:, 0], runs[:, 1]], axis=1)
        nodes = fs.find_free(fs.mapping_blocks_needed(data))
        fs.set_blocks(nodes, True)
        fs.set_file_map(ino, data, blocks_of(nodes), len(keep) * fs.geometry.block_size)


def test_random_work_leaves_the_volume_clean(uninitialised):
    work = Work(uninitialised, uninitialised.name)
    for _ in range(4):
        work.round(steps=6)
        oracle.assert_clean(uninitialised)
        with ImageFile(str(uninitialised)) as device:
            assert_as_dumpe2fs(uninitialised, Filesystem.open(device))


@pytest.mark.parametrize("name", ["ext2-2k", "ext3-4k", "ext4-4k", "ext4up-2k"])
def test_random_work_on_a_fragmented_volume(fresh_image, name):
    path = fresh_image(name)
    work = Work(path, name)
    for _ in range(2):
        work.round(steps=6)
        oracle.assert_clean(path)
        with ImageFile(str(path)) as device:
            assert_as_dumpe2fs(path, Filesystem.open(device))


def test_every_block_taken_and_given_back(uninitialised):
    """A full volume: all counts 0, no BLOCK_UNINIT left; then everything is as free as before."""
    before = oracle.free_runs(uninitialised)
    work = Work(uninitialised, "all")
    with ImageFile(str(uninitialised), writable=True) as device:
        fs = Filesystem.open(device, writable=True)
        ino = fs.lookup("/work")
        assert ino is not None
        none = np.zeros(0, np.int64)
        everything = np.flatnonzero(~used_by_bitmaps(fs))
        left = max(fs.mapping_blocks_needed(np.array([[0, at, 1]])) for at in (1, 2))
        while True:
            runs = runs_of(everything[: len(everything) - left])
            data = np.stack([np.cumsum(runs[:, 1]) - runs[:, 1], runs[:, 0], runs[:, 1]], axis=1)
            if fs.mapping_blocks_needed(data) <= left:
                break
            left = fs.mapping_blocks_needed(data)
        work._set(fs, ino, none, none, everything[: len(everything) - left])
        fs.flush()
        assert len(fs.find_free(10)) == 0
    oracle.assert_clean(uninitialised)
    assert oracle.free_counts(uninitialised)[0] == 0
    with ImageFile(str(uninitialised), writable=True) as device:
        fs = Filesystem.open(device, writable=True)
        old = fs.file_map(ino)
        work._set(fs, ino, old.mapping, blocks_of(old.data[:, 1:]), none)
        fs.flush()
    oracle.assert_clean(uninitialised)
    assert oracle.free_runs(uninitialised) == before


def test_a_block_is_not_taken_or_freed_twice(uninitialised):
    with ImageFile(str(uninitialised)) as device:
        fs = Filesystem.open(Overlay(device, 1024), writable=True)
        end = fs.geometry.blocks_count
        start = int(fs.find_free(10)[0, 0])
        taken = (([[start + 3, 1]], True), ([[start + 9, 2]], True), ([[start + 9, 2]], False))
        for runs, used in (*taken, ([[end - 1, 2]], True), ([[end, 1]], True), ([[0, 1]], False)):
            fs = Filesystem.open(Overlay(device, 1024), writable=True)
            fs.set_blocks(np.array([[start, 10]]), True)
            with pytest.raises(FormatError):
                fs.set_blocks(np.array(runs), used)


@pytest.mark.parametrize("seed", range(20))
def test_chosen_blocks_are_free_and_as_many_as_wanted(seed):
    """`choose_free` against sets: never a taken block, never fewer than there are, long runs where they suffice."""
    rng = random.Random(seed)
    size = rng.choice((1, 7, 8, 9, 5000, 70001))
    bitmaps = []
    for _ in range(rng.randrange(1, 3)):
        runs, at = [], 0
        while at < size:
            length = rng.choice((1, 2, 30, 300, 5000))
            if rng.random() < 0.5:
                runs.append((at, min(length, size - at)))
            at += length
        bitmaps.append(bits_of(np.array(runs, np.int64).reshape(-1, 2), size))
    taken = np.zeros(size, np.bool_)
    for bitmap in bitmaps:
        taken |= np.unpackbits(bitmap, bitorder="little")[:size].astype(np.bool_)
    available = int((~taken).sum())
    for count in {0, 1, 2, 31, 256, 5000, available, available + 1}:
        runs = choose_free(bitmaps, size, count)
        found = blocks_of(runs)
        assert len(found) == min(count, available)
        assert (np.diff(found) > 0).all()
        assert not taken[found].any()
    longest = max([n for _, n in runs_of(np.flatnonzero(~taken)).tolist()], default=0)
    if 0 < longest < 4096:
        assert len(choose_free(bitmaps, size, longest)) == 1
