"""Other tools on the served volume: whatever they do, every snapshot stays exact, or they are stopped."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import disks
import oracle
import pytest
from arena import arena, make_volume

import extsnap
from extsnap.snapshot.volume import Volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ext2": ("ext2", "", ("-b", "1024")),
    "ext3": ("ext3", "", ("-b", "1024")),
    "ext4": ("ext4", "", ("-b", "1024", "-E", "resize=300000")),
    "ext4-seed": ("ext4", "metadata_csum_seed,orphan_file", ("-b", "1024")),
    "ext4-4k": ("ext4", "", ("-b", "4096")),
    # Without reserved descriptors, a table that grows pushes inode tables and data aside.
    "ext4-no-reserve": ("ext4", "^resize_inode", ("-b", "1024", "-g", "1024", "-N", "512")),
    "ext4-meta-bg": ("ext4", "^resize_inode,meta_bg", ("-b", "1024", "-g", "2048", "-N", "512")),
    "ext4-two-backups": ("ext4", "sparse_super2,^resize_inode", ("-b", "1024")),
}
MEBIBYTES = 40
#: Tools that leave the volume clean: (kind, command, statuses that are fine).
HARMLESS: dict[str, tuple[str, str, set[int]]] = {
    "grow-ext2": ("ext2", "resize2fs {} 90M", {0}),
    "grow-ext3": ("ext3", "resize2fs {} 90M", {0}),
    "grow-ext4": ("ext4", "resize2fs {} 200M", {0}),
    "grow-4k": ("ext4-4k", "resize2fs {} 300M", {0}),
    "grow-two-backups": ("ext4-two-backups", "resize2fs {} 90M", {0}),
    "grow-meta-bg": ("ext4-meta-bg", "resize2fs {} 90M", {0}),
    "shrink": ("ext4", "resize2fs {} 36M", {0}),
    "shrink-two-backups": ("ext4-two-backups", "resize2fs {} 30M", {0}),
    "to-32-bit": ("ext4", "resize2fs -s {}", {0}),
    "label": ("ext4", "tune2fs -L new {}", {0}),
    "uuid": ("ext4-seed", "tune2fs -U 3e6be9de-8139-4a1f-9106-a43f08d823a6 {}", {0}),
    "drop-journal": ("ext4", "tune2fs -O ^has_journal {}", {0}),
    "add-journal": ("ext2", "tune2fs -O has_journal {}", {0}),
    "drop-checksums": ("ext4", "tune2fs -O ^metadata_csum {}", {0}),
    "add-extents": ("ext3", "tune2fs -O extents,dir_nlink,extra_isize,uninit_bg {}", {0}),
    "add-quota": ("ext4-4k", "tune2fs -O quota {}", {0}),
    "optimise": ("ext4", "e2fsck -fyD {}", {0, 1}),
    "debugfs": ("ext2", "debugfs -w -f SCRIPT {}", {0}),
    "kill": ("ext4-4k", "debugfs -w -f KILL {}", {0}),
    "zerofree": ("ext3", "zerofree {}", {0}),
}
pytestmark = pytest.mark.system


def volume_of(kind: str, top: Path) -> Path:
    """A new volume with a few dozen files."""
    base, features, options = KINDS[kind]
    content = random.Random(kind)
    files = {f"file{number}": content.randbytes(content.randrange(1, 60_000)) for number in range(40)}
    return make_volume(top / "disk.img", base, MEBIBYTES, *options, features=features, files=files)


def words(command: str, top: Path) -> list[str]:
    """The command's words; SCRIPT is a script for debugfs that overwrites, adds and removes."""
    (top / "new").write_bytes(os.urandom(300_000))
    lines = [f"write {top / 'new'} new", "rm file3", "mkdir d", *(f"zap_block -f file7 -p 85 {n}" for n in range(3))]
    (top / "script").write_text("".join(f"{line}\n" for line in lines))
    (top / "kill").write_text("kill_file /.extsnap/store\n")
    command = command.replace("KILL", str(top / "kill"))
    return command.replace("SCRIPT", str(top / "script")).split()


class History:
    """Snapshots of one image, each with the copy of the image that was taken right after it."""

    def __init__(self, image: Path, top: Path) -> None:
        self.image = image
        self.top = top
        self.copies: dict[str, Path] = {}

    def create(self, name: str) -> None:
        with extsnap.open(self.image) as volume:
            volume.create(name)
        self.copies[name] = oracle.copy_image(self.image, self.top / f"{name}.copy")
        oracle.assert_clean(self.image)

    def judge(self) -> None:
        """Every view equals its copy and is clean, and so are the base volume and the store."""
        oracle.assert_clean(self.image)
        with extsnap.open(self.image, writable=False) as volume:
            assert volume.verb("check")["store"]["ok"]
        self.judge_views()

    def judge_views(self) -> None:
        with extsnap.open(self.image, writable=False) as volume:
            for name, copy in self.copies.items():
                view = self.top / "view"
                write_view(volume, name, view)
                oracle.assert_view_is_copy(view, copy)
                oracle.assert_clean(view)
                view.unlink()

    def restore(self, name: str) -> None:
        with extsnap.open(self.image) as volume:
            volume.verb("restore", name=name)
        self.judge()
        oracle.assert_same_tree(oracle.tree_of_image(self.copies[name]), oracle.tree_of_image(self.image))


def write_view(volume: Volume, name: str, out: Path) -> None:
    with volume.snapshots[name].open() as file, out.open("wb") as target:
        while piece := file.read(1 << 22):
            if piece != bytes(len(piece)):
                target.write(piece)
            else:
                target.seek(len(piece), os.SEEK_CUR)
        target.truncate()


@pytest.mark.parametrize("case", list(HARMLESS))
def test_a_tool_between_two_snapshots(case: str, run_cli: Cli) -> None:
    """Snapshot, tool, snapshot, back to the first and on to the second; at the end nothing of extsnap is left."""
    kind, command, fine = HARMLESS[case]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"no {command.split()[0]}")
    with arena() as top:
        history = History(volume_of(kind, top), top)
        history.create("one")
        before = oracle.superblock_facts(history.image)
        done = run_cli("run", history.image, "--", *words(command, top), status=None)
        assert done.returncode in fine, done.stdout + done.stderr
        history.judge()
        if done.returncode == 0 and 1 not in fine and case not in ("debugfs", "zerofree"):
            assert oracle.superblock_facts(history.image) != before, "the tool did nothing"
        history.create("two")
        history.judge()
        history.restore("one")
        now = oracle.superblock_facts(history.image)
        for fact in ("Filesystem UUID", "Filesystem volume name", "Block count", "Inode size"):
            assert now.get(fact) == before.get(fact), fact
        history.restore("two")
        with extsnap.open(history.image) as volume:
            volume.verb("strip")
        oracle.assert_clean(history.image)
        assert not oracle.debugfs_knows(history.image, "/.extsnap")
        oracle.assert_same_tree(oracle.tree_of_image(history.copies["two"]), oracle.tree_of_image(history.image))


#: Tools that would move, free or remove the store, or all of the volume.
HARMFUL = {
    "rm": ("ext4", "debugfs -w -R 'rm /.extsnap/store' {}"),
    "unlink": ("ext3", "debugfs -w -R 'unlink /.extsnap/store' {}"),
    "clear": ("ext2", "debugfs -w -R 'clri /.extsnap/store' {}"),
    "truncate": ("ext3", "debugfs -w -R 'punch /.extsnap/store 10' {}"),
    "larger-inodes": ("ext3", "tune2fs -I 512 {}"),
    "shrink-to-the-least": ("ext2", "resize2fs -fM {}"),
    "new-filesystem": ("ext4", "mke2fs -Fq {}"),
    "another-filesystem": ("ext2", "mkswap {}"),
    "zeros": ("ext4", "dd if=/dev/zero of={} bs=64k count=400 conv=notrunc status=none"),
}


@pytest.mark.parametrize("case", list(HARMFUL))
def test_a_tool_that_would_take_the_store_is_stopped(case: str, run_cli: Cli) -> None:
    """No snapshot is damaged, ``--atomic`` brings the volume back, and without it a restore does."""
    kind, command = HARMFUL[case]
    with arena() as top:
        history = History(volume_of(kind, top), top)
        history.create("one")
        fill_served(run_cli, history.image)
        history.create("two")
        tree = oracle.tree_of_image(history.image)
        line = ["sh", "-c", command.replace("{}", "$0"), "{}"]
        done = run_cli("run", "--atomic", history.image, "--", *line, status=None)
        assert done.returncode != 0, "it calls itself successful"
        assert "refused" in done.stderr, done.stderr
        assert "the volume was restored" in done.stderr
        history.judge()
        oracle.assert_same_tree(tree, oracle.tree_of_image(history.image))
        done = run_cli("run", history.image, "--", *line, status=None)
        assert done.returncode != 0
        history.judge_views()
        run_cli("restore", "--no-safety", history.image, "two")
        history.judge()
        oracle.assert_same_tree(tree, oracle.tree_of_image(history.image))


def fill_served(run_cli: Cli, image: Path) -> None:
    """Remove every second file: the snapshot before has them to keep, and the store has gaps around it."""
    commands = "\\n".join(f"rm file{number}" for number in range(0, 40, 2))
    run_cli("run", image, "--", "sh", "-c", f"printf '{commands}\\n' | debugfs -w -f - $0", "{}")


def backups(image: Path) -> list[int]:
    """Blocks of the backup superblocks, as dumpe2fs has them."""
    text = subprocess.run(["dumpe2fs", image], capture_output=True, text=True, check=True).stdout
    words = text.replace(",", " ").split()
    marks = [index for index in range(len(words) - 3) if words[index : index + 3] == ["Backup", "superblock", "at"]]
    return [int(words[index + 3]) for index in marks]


@pytest.mark.parametrize("kind", ["ext4", "ext4-two-backups"])
def test_new_backups_carry_the_guard(kind: str, run_cli: Cli) -> None:
    """... and what was one is freed of it, for whoever has the block then."""
    with arena() as top:
        history = History(volume_of(kind, top), top)
        history.create("one")
        size = oracle.volume_facts(history.image).block_size
        before = backups(history.image)
        run_cli("run", history.image, "--", "resize2fs", "{}", "100M")
        after = backups(history.image)
        assert set(after) - set(before), "no new backup: this test would show nothing"
        for block in sorted({*before, *after}):
            found = subprocess.run(
                ["dumpe2fs", "-h", "-o", f"superblock={block}", "-o", f"blocksize={size}", history.image],
                capture_output=True,
                text=True,
                check=False,
            )
            if block in after:
                assert "read-only" in found.stdout, f"the backup in block {block} has no guard"
            else:
                assert "read-only" not in found.stdout, f"block {block} is no backup and has the guard"
        history.judge()


def test_a_restore_that_the_store_is_in_the_way_of(run_cli: Cli) -> None:
    """The volume grew, the store took blocks past the old end and holds copies there: back and forth all the same."""
    with arena() as top:
        history = History(volume_of("ext4", top), top)
        history.create("small")
        run_cli("run", history.image, "--", "resize2fs", "{}", "120M")
        for name, size in (("filler", 30 << 20), ("big0", 9 << 20), ("big1", 9 << 20)):
            (top / name).write_bytes(random.Random(name).randbytes(size))
        scripts = [f"write {top / 'filler'} filler", "ls", f"rm filler\nwrite {top / 'big0'} big0"]
        scripts.append(f"rm big0\nwrite {top / 'big1'} big1")
        for number, script in enumerate(scripts):
            # The store grows when "ls" begins: the filler stands where it would go first.
            (top / "script").write_text(f"{script}\n")
            run_cli("run", history.image, "--", "debugfs", "-w", "-f", top / "script", "{}")
            if number == 0:
                history.create("filled")
            elif number > 1:
                history.create(f"big{number - 2}")
            if number == 2:
                run_cli("delete", history.image, history.copies.pop("filled").stem)
        store = oracle.store_blocks(history.image)
        assert store is not None
        assert (store.data_blocks >= 40 * 1024).sum() > 1000, "the store has little past the old end"
        for name in ("small", "big0", "small", "big1"):
            history.restore(name)
        run_cli("strip", history.image)
        oracle.assert_clean(history.image)


def test_a_small_restore_without_room_for_the_copies_is_refused(run_cli: Cli) -> None:
    with arena() as top:
        history = History(volume_of("ext4", top), top)
        history.create("small")
        run_cli("run", history.image, "--", "resize2fs", "{}", "160M")
        for number in range(2):
            (top / "big").write_bytes(random.Random(number).randbytes(45 << 20))
            (top / "script").write_text(f"rm big\nwrite {top / 'big'} big\n")
            run_cli("run", history.image, "--", "debugfs", "-w", "-f", top / "script", "{}")
            history.create(f"big{number}")
        free = oracle.free_count(history.image)
        tree = oracle.tree_of_image(history.image)
        said = run_cli("restore", history.image, "small", status=1).stderr
        assert "must move" in said or "more than the volume has" in said, said
        assert "nothing was changed" in said
        history.judge()
        oracle.assert_same_tree(tree, oracle.tree_of_image(history.image))
        assert oracle.free_count(history.image) == free


def test_a_partition_does_not_grow(run_cli: Cli) -> None:
    with arena() as top:
        mib = 1 << 20
        parts = [(1, mib, 40 * mib), (2, 50 * mib, 8 * mib)]
        image = disks.make(top / "disk.img", 64 * mib, disks.gpt(64 * mib, parts))
        disks.mkfs(image, mib, 40 * mib)
        run_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "copy.img")
        said = run_cli("run", image, "--", "resize2fs", "{}", "60M", status=1).stderr
        assert "The containing partition (or device) is only 40960 (1k) blocks" in said, said
        said = run_cli("run", image, "--", "truncate", "-s", "60M", "{}", status=1).stderr
        assert "No space left on device" in said, said
        run_cli("check", image)
        assert image.stat().st_size == 64 * mib
        after, before = image.read_bytes(), copy.read_bytes()
        assert after[: 1 << 20] == before[: 1 << 20]
        assert after[41 * mib :] == before[41 * mib :], "a write left the partition"


@pytest.mark.parametrize("attached", [False, True])
def test_fuse2fs_writes_through_the_served_volume(attached: bool, run_cli: Cli) -> None:
    if shutil.which("fuse2fs") is None:
        pytest.skip("no fuse2fs")
    with arena() as top:
        history = History(volume_of("ext4-4k", top), top)
        history.create("one")
        shutil.copytree("/usr/share/doc/e2fsprogs", top / "tree", symlinks=True)
        (top / "mount").mkdir()
        commands = (
            f"fuse2fs -f -o fakeroot $0 {top}/mount & until mountpoint -q {top}/mount; do sleep 0.05; done; "
            f"cp -a {top}/tree {top}/mount/ && rm {top}/mount/file1* && fusermount3 -u {top}/mount && wait $!"
        )
        if attached:
            (top / "served").mkdir()
            run_cli("attach", history.image, top / "served")
        try:
            run_cli("run", history.image, "--", "sh", "-c", commands, "{}")
        finally:
            if attached:
                run_cli("detach", history.image)
        history.judge()
        assert oracle.debugfs_knows(history.image, "/tree")
        history.create("two")
        history.restore("one")


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4-4k"])
def test_removed_through_a_kernel_mount(kind: str, run_cli: Cli) -> None:
    """``rm -rf`` of the store as root: the kernel learns of it from an I/O error, and everything can be repaired."""
    with arena() as top:
        history = History(volume_of(kind, top), top)
        history.create("one")
        mount = top / "mount"
        mount.mkdir()
        run_cli("mount", history.image, mount)
        subprocess.run(["chattr", "-i", mount / ".extsnap", mount / ".extsnap" / "store"], check=True)
        shutil.rmtree(mount / ".extsnap")
        subprocess.run(["sync", "-f", mount], check=False)  # it tells of the write that was refused, or umount does
        run_cli("umount", mount, status=1)
        history.judge_views()
        if kind == "ext2":
            run_cli("run", history.image, "--", "e2fsck", "-fy", "{}", status=1)
        run_cli("create", history.image, "two")
        history.judge()
        history.restore("one")


def test_a_store_without_snapshots_is_not_defended(run_cli: Cli) -> None:
    """Stock tools may move or remove it; the next snapshot has a new one."""
    with arena() as top:
        image = volume_of("ext3", top)
        for damage in ("rm /.extsnap/store", "rm /.extsnap/store\nrmdir /.extsnap", "kill_file /.extsnap/store"):
            run_cli("create", image, "one")
            run_cli("delete", image, "one")
            oracle.debugfs_write(image, *damage.split("\n"))
            if damage.startswith("kill"):
                subprocess.run(["e2fsck", "-fy", image], capture_output=True, check=False)
            oracle.assert_clean(image)
            run_cli("create", image, "two")
            run_cli("check", image)
            run_cli("delete", image, "two")
        oracle.debugfs_write(image, "rm /.extsnap/store")
        run_cli("strip", image)
        oracle.assert_clean(image)
        assert not oracle.debugfs_knows(image, "/.extsnap")


def test_an_image_that_was_cut(run_cli: Cli) -> None:
    with arena() as top:
        history = History(volume_of("ext4", top), top)
        run_cli("run", history.image, "--", "truncate", "-s", "60M", "{}")
        history.create("long")
        os.truncate(history.image, 50 << 20)
        said = run_cli("list", history.image, status=1).stderr
        assert "truncate -s 62914560" in said, said
        os.truncate(history.image, 60 << 20)
        history.judge()


@pytest.mark.parametrize("kind", ["ext2", "ext4-4k"])
def test_a_growth_that_fails_leaves_the_length(kind: str, run_cli: Cli) -> None:
    """``--atomic`` brings the volume back exactly, the image's length too; a longer snapshot keeps it."""
    with arena() as top:
        history = History(volume_of(kind, top), top)
        history.create("one")
        tree, size = oracle.tree_of_image(history.image), history.image.stat().st_size
        run_cli("run", "--atomic", history.image, "--", "sh", "-c", "resize2fs $0 200M && exit 3", "{}", status=3)
        assert history.image.stat().st_size == size
        history.judge()
        oracle.assert_same_tree(tree, oracle.tree_of_image(history.image))
        run_cli("run", history.image, "--", "resize2fs", "{}", "200M")
        history.create("two")
        history.restore("one")
        assert history.image.stat().st_size == 200 << 20
        history.restore("two")
