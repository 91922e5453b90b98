"""The whole line on every kind of volume, through the installed program, judged by e2fsprogs and the kernel.

Every volume is ext2, ext3, ext4, or ext4 with what upstream turns on, with blocks of 1, 2 and 4 KiB, several
groups with a short last one, a hash-tree root, and free space in runs of at most 16 blocks (`images`).
As root, trees are read and half of the changes made by the kernel; without, debugfs does both.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import images
import oracle
import pytest
from arena import arena

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

ROOT = os.geteuid() == 0
# A file of the matrix images that fills most of the volume: overwriting it is overwriting preserved blocks.
FILLER = "filler"


class Session:
    """One image on its way through the test: the program, and the copies that its snapshots are judged by."""

    def __init__(self, cli: Cli, image: Path, scratch: Path) -> None:
        self.cli = cli
        self.image = image
        self.scratch = scratch
        self.copies: dict[str, Path] = {}
        self.trees: dict[str, oracle.Manifest] = {}
        self.directory = scratch / "served"
        self.directory.mkdir()
        self.plain_features = oracle.superblock_facts(image)["Filesystem features"]

    def tree(self, image: Path) -> oracle.Manifest:
        """What an image at rest holds."""
        if not ROOT:
            return oracle.tree_of_image(image)
        with oracle.mounted(image) as directory:
            return oracle.tree(directory)

    def create(self, name: str) -> None:
        """Take a snapshot, and the whole-image copy right after it."""
        assert self.cli("create", self.image, name).stdout == f"{name}\n"
        oracle.assert_clean(self.image)
        self.copies[name] = oracle.copy_image(self.image, self.scratch / f"{name}.copy")
        self.trees[name] = self.tree(self.copies[name])

    @contextmanager
    def attached(self) -> Iterator[Path]:
        self.cli("attach", self.image, self.directory)
        try:
            yield self.directory
        finally:
            self.cli("detach", self.image)
            oracle.assert_clean(self.image)

    def judge_views(self, directory: Path, names: list[str]) -> None:
        """Every view is its copy, and clean."""
        for name in names:
            view = directory / "snapshots" / name
            oracle.assert_view_is_copy(view, self.copies[name])
            oracle.assert_clean(view)


def debugfs_changes(scratch: Path, tag: str, rng: random.Random, block_size: int) -> list[str]:
    """Commands that add, rename, delete and overwrite, in the root's hash tree and below."""
    sources = []
    for number, length in enumerate((0, 5, 3 * block_size + 1, 280 * block_size)):
        path = scratch / f"{tag}-{number}"
        path.write_bytes(rng.randbytes(length))
        sources.append(path)
    victims = rng.sample(range(images.LONG_NAMES), 12)
    long = [f"{number:05d}-{'a long name in the root directory, '.replace(' ', '_') * 6}"[:230] for number in victims]
    commands = [f"mkdir {tag}"]
    commands += [f"write {source} {tag}/file-{number}" for number, source in enumerate(sources)]
    commands += [f"write {sources[1]} {tag}-{number}-{'x' * 180}" for number in range(10)]
    commands += [f"rm {name}" for name in long[:6]]
    commands += [f"ln {name} {tag}-renamed-{at}\nunlink {name}" for at, name in enumerate(long[6:])]
    commands += [f"zap_block -f {FILLER} -p {rng.randrange(256)} {rng.randrange(2000)}" for _ in range(40)]
    return commands


def kernel_changes(directory: Path, tag: str, rng: random.Random, copies_bytes: int) -> None:
    """The same by system calls, and ``copies_bytes`` of overwritten content."""
    (directory / tag).mkdir()
    for number in range(20):
        (directory / tag / f"file-{number}-{'y' * 100}").write_bytes(rng.randbytes(rng.randrange(20000)))
    names = sorted(name for name in os.listdir(directory) if name[:5].isdigit())
    for name in rng.sample(names, 20):
        os.unlink(directory / name)
        names.remove(name)
    for number, name in enumerate(rng.sample(names, 20)):
        os.rename(directory / name, directory / tag / f"moved-{number}")
    os.link(directory / "things" / "sparse", directory / tag / "linked")
    with open(directory / FILLER, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        assert size >= copies_bytes
        for offset in range(0, copies_bytes, 1 << 20):
            file.seek(offset)
            file.write(rng.randbytes(min(1 << 20, copies_bytes - offset)))
        for _ in range(200):
            file.seek(rng.randrange(size - 100))
            file.write(rng.randbytes(100))


@pytest.mark.slow
@pytest.mark.parametrize("name", images.MATRIX)
def test_the_whole_line(name: str, run_cli: Cli) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    with arena() as scratch:
        the_whole_line(name, run_cli, scratch)


def the_whole_line(name: str, run_cli: Cli, scratch: Path) -> None:
    recipe = images.MATRIX[name]
    rng = random.Random(name)
    image = oracle.copy_image(images.image(name), scratch / "disk.img")
    session = Session(run_cli, image, scratch)
    session.create("one")
    assert "read-only" in oracle.superblock_facts(image)["Filesystem features"]

    script = scratch / "script"
    script.write_text("\n".join(debugfs_changes(scratch, "first", rng, recipe.block_size)) + "\n")
    done = run_cli("run", image, "--", "debugfs", "-w", "-f", script, "{}")
    assert [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1.")] == []
    oracle.assert_clean(image)
    assert oracle.differences(session.trees["one"], session.tree(image)), "nothing was changed"
    session.create("two")

    if ROOT:
        mount = scratch / "mount"
        mount.mkdir()
        run_cli("mount", image, mount)
        try:
            refused = run_cli("restore", image, "one", status=1)
            assert "mounted" in refused.stderr
            kernel_changes(mount, "second", rng, 10 << 20)
        finally:
            run_cli("umount", mount)
    else:
        script.write_text("\n".join(debugfs_changes(scratch, "second", rng, recipe.block_size)) + "\n")
        run_cli("run", image, "--", "debugfs", "-w", "-f", script, "{}")
    oracle.assert_clean(image)

    with session.attached() as directory:
        session.judge_views(directory, ["one", "two"])
        # The store grew for the session: it must map more than its inode holds.
        blocks = oracle.store_blocks(directory / "volume")
        assert blocks is not None
        triple = recipe.block_size == 1024 and recipe.kind in ("ext2", "ext3")
        assert blocks.depth >= (3 if triple else 1), blocks.depth

    before = session.tree(image)
    moved_alone(session)

    safety = run_cli("restore", image, "one").stdout.strip()
    oracle.assert_clean(image)
    oracle.assert_same_tree(session.trees["one"], session.tree(image))
    if recipe.block_size == 4096:
        with session.attached() as directory:
            session.judge_views(directory, ["one", "two"])
            oracle.assert_clean(directory / "snapshots" / safety)
    second = run_cli("restore", image, "--undo").stdout.strip()
    assert second.startswith("before-undo-")
    oracle.assert_clean(image)
    oracle.assert_same_tree(before, session.tree(image))

    order = ["one", "two", safety, second]
    rng.shuffle(order)
    run_cli("delete", image, order[0])
    oracle.assert_clean(image)
    with session.attached() as directory:
        session.judge_views(directory, [name for name in ("one", "two") if name != order[0]])
        for name in {safety, second} - {order[0]}:
            oracle.assert_clean(directory / "snapshots" / name)
    if recipe.block_size == 4096:
        run_cli("delete", image, *order[1:])
        oracle.assert_clean(image)
        assert "read-only" not in oracle.superblock_facts(image)["Filesystem features"].split()
    run_cli("strip", image)
    oracle.assert_clean(image)
    assert oracle.superblock_facts(image)["Filesystem features"] == session.plain_features
    assert not oracle.debugfs_knows(image, "/.extsnap")
    oracle.assert_same_tree(before, session.tree(image))


def moved_alone(session: Session) -> None:
    """The image copied to another place, alone, still lists, exports and restores."""
    elsewhere = session.scratch / "elsewhere"
    elsewhere.mkdir()
    image = oracle.copy_image(session.image, elsewhere / "other.img")
    listed = session.cli("list", image).stdout
    assert "one" in listed
    assert "two" in listed
    exported = elsewhere / "exported.img"
    session.cli("export", image, "one", exported)
    oracle.assert_clean(exported)
    assert oracle.superblock_facts(exported)["Filesystem features"] == session.plain_features
    assert not oracle.debugfs_knows(exported, "/.extsnap")
    oracle.assert_same_tree(session.trees["one"], session.tree(exported))
    exported.unlink()
    session.cli("restore", image, "two", "--no-safety")
    oracle.assert_clean(image)
    oracle.assert_same_tree(session.trees["two"], session.tree(image))
    image.unlink()
