"""The largest file that a filesystem can have is the largest store: said before it bites, and never passed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

import extsnap
from extsnap.snapshot import edit

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def longest_by_the_kernel(mount: Path) -> int:
    """Bytes of the longest sparse file that the kernel makes here."""
    with open(mount / "sparse", "wb") as file:
        low, high = 0, 1 << 62
        while high - low > 1:
            middle = (low + high) // 2
            try:
                os.ftruncate(file.fileno(), middle)
                low = middle
            except OSError:
                high = middle
        os.ftruncate(file.fileno(), 0)
    return low


@pytest.mark.system
@pytest.mark.parametrize(("kind", "block_size"), [("ext2", 1024), ("ext2", 4096), ("ext3", 2048), ("ext4", 4096)])
def test_the_largest_file_is_the_kernels(kind: str, block_size: int) -> None:
    with arena() as top:
        image = make_volume(top / "disk.img", kind, 16, "-b", str(block_size))
        with extsnap.open(image) as volume:
            ours = volume.filesystem().largest_file * block_size
        with oracle.mounted(image, writable=True) as mount:
            kernels = longest_by_the_kernel(mount)
        assert ours <= kernels
        assert ours > kernels * 0.98 or (kind, ours) == ("ext4", (2**32 - 1) * block_size)


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_a_store_that_has_the_largest_size(kind: str, tmp_path: Path, run_cli: Cli) -> None:
    """Without large_file that is 2 GiB: the store gets there, stays there, and says so."""
    with arena() as top:
        small = "^large_file,^resize_inode"
        image = make_volume(top / "disk.img", kind, 6 << 10, "-b", "4096", "-N", "1024", features=small)
        said = run_cli("create", image, "one").stderr
        assert "this filesystem has none larger than 2 GiB" in said, said
        assert "can be overwritten before space for copies runs out" in said
        with extsnap.open(image) as volume:
            owned = int(volume.require_store().root.extents[:, 2].sum())
            added = edit.grow(volume, 1 << 20)
            volume.settle()
            assert owned + added == 0x7FFFFFFF // 4096
            assert edit.grow(volume, 100) == 0
        oracle.assert_clean(image)
        store = json.loads(run_cli("info", "--json", image).stdout)["store"]
        assert 0 <= store["largest_bytes"] - store["bytes"] + 4096 * len(oracle.store_blocks(image).mapping) < 8192  # type: ignore[union-attr]
        with extsnap.open(image) as volume:
            volume.require_store().available = 20
            with pytest.raises(extsnap.ExtsnapError, match="the largest file of this filesystem"):
                volume.create("two")
        run_cli("delete", image, "one")
        oracle.assert_clean(image)
