"""Root directories whose hash tree the kernel made up to three levels deep: the store's name goes in and out again."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
#: One inode has at most 65,000 names.
LINKS = 60_000
pytestmark = pytest.mark.system


def filled(image: Path, names: int) -> None:
    """Fill the root with names of the greatest length, all of them links to a few files."""
    with oracle.mounted(image, writable=True) as mount:
        source = ""
        for number in range(names):
            name = f"{number:07d}-{'n' * 247}"
            if number % LINKS == 0:
                source = name
                (mount / name).write_bytes(b"linked")
            else:
                os.link(mount / source, mount / name)
    oracle.assert_clean(image)


def levels(image: Path) -> int:
    """Levels of index blocks in the root directory, the root's own included, as debugfs prints them."""
    found = re.search(r"Indirect levels: (\d+)", "\n".join(oracle.debugfs(image, "htree_dump /")))
    assert found is not None, "the root has no hash tree"
    return int(found[1]) + 1


@pytest.mark.parametrize(("names", "deep", "features"), [(20, 1, ""), (3000, 2, ""), (64_000, 3, "large_dir")])
def test_a_root_directory_of_many_levels(names: int, deep: int, features: str, run_cli: Cli) -> None:
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 96, "-b", "1024", features=features)
        filled(image, names)
        assert levels(image) == deep
        run_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "copy.img")
        oracle.assert_clean(image)
        assert levels(image) == deep
        run_cli("run", image, "--", "debugfs", "-w", "-R", f"rm {5:07d}-{'n' * 247}", "{}")
        oracle.assert_clean(image)
        run_cli("restore", image, "one")
        oracle.assert_clean(image)
        out = top / "out.img"
        run_cli("export", image, "one", out)
        oracle.assert_clean(out)
        view = top / "served"
        view.mkdir()
        run_cli("attach", image, view)
        try:
            oracle.assert_view_is_copy(view / "snapshots" / "one", copy)
        finally:
            run_cli("detach", image)
        run_cli("strip", image)
        oracle.assert_clean(image)
        assert levels(image) == deep
        with oracle.mounted(image) as mount:
            assert len(os.listdir(mount)) == names + 1  # and lost+found
