"""Files open but unlinked at the moment of a snapshot: ``check`` counts them, and still sees damage beside them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
from arena import arena, make_volume

from extsnap.serve import moment

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

VOLUMES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ext2": ("ext2", "", ("-b", "1024")),
    "ext3": ("ext3", "", ("-b", "1024")),
    "ext4": ("ext4", "", ("-b", "4096")),
    "ext4-orphan-file": ("ext4", "orphan_file", ("-b", "1024")),
    "ext4-no-journal": ("ext4", "^has_journal", ("-b", "1024")),
}
WITH_JOURNAL = ["ext3", "ext4", "ext4-orphan-file"]
DAMAGE = {
    "links": "set_inode_field file links_count 3",
    "free-count": "set_bg 0 free_inodes_count 7\nset_bg 0 checksum calc",
    "bitmap": "freeb {block}",
}
pytestmark = pytest.mark.system


def frozen(top: Path, kind: str, files: int, damage: str = "") -> Path:
    """A copy of a volume, taken while it was frozen with that many files open and unlinked, and one in use."""
    base, features, options = VOLUMES[kind]
    image = make_volume(top / "disk.img", base, 24, *options, features=features, files={"file": b"x" * 900_000})
    with oracle.mounted(image, writable=True) as mount, contextlib.ExitStack() as stack:
        for number in range(files):
            path = mount / f"unlinked-{number}"
            held = stack.enter_context(path.open("wb"))
            held.write(os.urandom(3000 * (number + 1)))
            held.flush()
            os.fsync(held.fileno())
            path.unlink()
        stack.enter_context((mount / "used").open("wb")).write(b"used")
        subprocess.run(["fsfreeze", "--freeze", mount], check=True)
        try:
            copy = oracle.copy_image(image, top / "frozen.img")
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", mount], check=True)
    if damage:
        block = oracle.file_blocks(copy, "/file").data_blocks[-1]
        oracle.debugfs_write(copy, *DAMAGE[damage].format(block=block).split("\n"))
    return copy


@pytest.mark.parametrize("kind", list(VOLUMES))
def test_orphans_are_no_damage(kind: str) -> None:
    with arena() as top:
        image = frozen(top, kind, 3)
        assert oracle.e2fsck(image).status == 4  # what stock tools say
        before = oracle.sha256(image)
        assert moment.without_work_left(str(image), lambda: whole_copy(image)) == (0, [], 3)
        assert oracle.sha256(image) == before


@pytest.mark.parametrize("kind", list(VOLUMES))
def test_nothing_left_to_do(kind: str) -> None:
    with arena() as top:
        image = frozen(top, kind, 0)
        oracle.assert_clean(image)
        assert moment.without_work_left(str(image), lambda: whole_copy(image)) is None


@pytest.mark.parametrize("kind", list(VOLUMES))
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_beside_orphans_is_seen(kind: str, damage: str) -> None:
    """An orphan must not excuse what else is wrong."""
    with arena() as top:
        image = frozen(top, kind, 2, damage)
        status, complaints = moment.fsck(str(image))
        after = moment.without_work_left(str(image), lambda: whole_copy(image))
        if after is not None:
            status, complaints, _ = after
        assert status == 4, complaints
        if damage == "links":
            assert any("ref count" in line for line in complaints), complaints
            assert not any("zero dtime" in line for line in complaints), complaints


@contextlib.contextmanager
def whole_copy(image: Path) -> Iterator[str]:
    """What a throw-away layer stands for."""
    yield str(oracle.copy_image(image, image.with_suffix(".scratch")))


def report(cli: Cli, image: Path, *, status: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cli("check", "--json", image, status=status).stdout)
    return found


@pytest.mark.parametrize("kind", WITH_JOURNAL)
def test_check_of_a_view_with_orphans(kind: str, run_cli: Cli) -> None:
    with arena() as top:
        image = frozen(top, kind, 3)
        run_cli("create", image, "then")
        copy = oracle.copy_image(image, top / "copy.img")
        found = report(run_cli, image)
        assert found["base"] == {"e2fsck": 0, "ok": True, "open_unlinked": 3}
        # The volume lets them go, the snapshot has them for ever.
        run_cli("run", image, "--", "e2fsck", "-fy", "{}", status=None)
        oracle.assert_clean(image)
        found = report(run_cli, image)
        assert found["base"] == {"e2fsck": 0, "ok": True}
        expected = {"name": "then", "open_unlinked": 3, "e2fsck": 0, "ok": True, "errors": []}
        assert found["snapshots"] == [expected]
        assert "3 files open and unlinked at that moment" in run_cli("check", image).stdout
        (top / "served").mkdir()
        run_cli("attach", image, top / "served")
        try:
            oracle.assert_view_is_copy(top / "served" / "snapshots" / "then", copy)
            assert report(run_cli, image)["snapshots"] == [expected]
        finally:
            run_cli("detach", image)


@pytest.mark.parametrize("kind", WITH_JOURNAL)
def test_check_of_a_view_with_orphans_and_damage(kind: str, run_cli: Cli) -> None:
    with arena() as top:
        image = frozen(top, kind, 1, "links")
        run_cli("create", image, "then")
        run_cli("run", image, "--", "e2fsck", "-fy", "{}", status=None)
        found = report(run_cli, image, status=3)
        assert found["base"]["ok"]
        assert not found["snapshots"][0]["ok"]
        assert any("ref count" in line for line in found["snapshots"][0]["errors"])
