"""The oracle itself, on images that e2fsprogs made: what it reports is right, and it notices differences."""

from __future__ import annotations

import os
import re

import images
import numpy as np
import oracle
import pytest


@pytest.mark.parametrize("name", ["ext2-1k", "ext3-2k", "ext4-1k", "ext4up-4k"])
def test_matrix_images_have_what_the_tests_need(name, matrix_image):
    path = matrix_image(name)
    recipe = images.MATRIX[name]
    volume = oracle.volume_facts(path)
    groups, last = divmod(volume.blocks - volume.first_block, recipe.blocks_per_group)
    assert groups >= 3
    assert last
    flags = re.search(r"Flags: (0x[0-9a-f]+)", oracle.debugfs(path, "stat /")[0])
    assert flags
    assert int(flags[1], 16) & 0x1000, "the root directory is no hash tree"
    lengths = sorted((length for _, length in oracle.free_runs(path)), reverse=True)
    # What is left of the fillers' room for their mapping may be longer than the pattern's runs, but not much.
    assert sum(lengths[:4]) < 1000
    assert sum(lengths) == volume.free_blocks == oracle.free_count(path)
    if recipe.block_size == 1024:
        assert volume.free_blocks // 2 > 65_804
    assert len(oracle.file_blocks(path, "/filler").mapping) > 0
    assert oracle.file_blocks(path, "/filler").depth >= 1
    oracle.assert_clean(path)


@pytest.mark.parametrize("name", ["ext2-4k", "ext4-4k"])
def test_file_blocks_agree_with_icheck_and_bitmap(name, matrix_image):
    path = matrix_image(name)
    used = oracle.blocks_in_use(path)
    for file in ("/filler", "/things/sparse", "/"):
        blocks = oracle.file_blocks(path, file).all_blocks
        assert used[blocks].all()
        assert len(np.unique(blocks)) == len(blocks)
        owners = set(oracle.block_owners(path, [int(block) for block in blocks[:700]]).values())
        assert len(owners) == 1
        assert None not in owners
    listed = oracle.debugfs(path, "blocks /filler")[0].split()
    assert sorted(map(int, listed)) == oracle.file_blocks(path, "/filler").all_blocks.tolist()
    assert oracle.store_blocks(path) is None


def test_uninitialised_groups_are_resolved(tmp_path):
    path = tmp_path / "uninit.img"
    features = "none,extent,flex_bg,metadata_csum,sparse_super"
    images.tool("mke2fs", "-q", "-F", "-t", "ext4", "-O", features, "-g", "1024", "-b", "1024", str(path), "8M")
    assert "BLOCK_UNINIT" in images.tool("dumpe2fs", str(path))
    used = oracle.blocks_in_use(path)
    volume = oracle.volume_facts(path)
    assert (~used).sum() == volume.free_blocks
    assert used[volume.superblocks].all()
    assert len(volume.table_unused)
    assert used[volume.table_unused].all()


def test_a_copy_is_its_own_view_and_one_changed_block_is_named(matrix_image, tmp_path):
    path = matrix_image("ext4-4k")
    copy = oracle.copy_image(path, tmp_path / "copy.img")
    # A view shows zeros where nothing is: the journal's blocks and unused table blocks are zeros in the image.
    oracle.assert_view_is_copy(copy, path)
    block = int(oracle.file_blocks(path, "/filler").data_blocks[1000])
    with open(copy, "r+b") as file:
        file.seek(block * 4096 + 4095)
        old = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([old ^ 1]))
    assert oracle.unequal_blocks(copy, path, oracle.preserved_blocks(path)).tolist() == [block]
    with pytest.raises(AssertionError, match=rf"{block} \(inode \d+\)"):
        oracle.assert_view_is_copy(copy, path)


def test_guard_mark_and_pointer_are_left_out_but_nothing_else_of_a_superblock(matrix_image, tmp_path):
    path = matrix_image("ext2-2k")
    copy = oracle.copy_image(path, tmp_path / "copy.img")
    preserved = oracle.preserved_blocks(path)
    backup = int(oracle.volume_facts(path).superblocks[1]) * 2048
    with open(copy, "r+b") as file:
        for at in (1024, backup):
            file.seek(at + 0x60)
            incompat, ro_compat = np.frombuffer(file.read(8), "<u4")
            file.seek(at + 0x60)
            file.write(np.array([incompat | 1 << 31, ro_compat | 0x1000], "<u4").tobytes())
            file.seek(at + 0x3E0)
            file.write(b"pointer")
    assert not len(oracle.unequal_blocks(copy, path, preserved))
    with open(copy, "r+b") as file:
        file.seek(backup + 0x78)
        file.write(b"x")
    assert oracle.unequal_blocks(copy, path, preserved).tolist() == [backup // 2048]


def test_content_in_a_free_block_is_noticed(matrix_image, tmp_path):
    path = matrix_image("ext3-4k")
    copy = oracle.copy_image(path, tmp_path / "copy.img")
    start, _ = oracle.free_runs(path)[7]
    with open(copy, "r+b") as file:
        file.seek(start * 4096 + 100)
        file.write(b"x")
    with pytest.raises(AssertionError, match=f"not in use then, as .{start}"):
        oracle.assert_view_is_copy(copy, path)


def test_damage_is_reported_in_the_words_of_e2fsck(matrix_image, tmp_path):
    copy = oracle.copy_image(matrix_image("ext4-4k"), tmp_path / "copy.img")
    oracle.debugfs_write(copy, "sif filler blocks 3")
    verdict = oracle.e2fsck(copy)
    assert verdict.status == 4
    with pytest.raises(AssertionError, match="i_blocks is 3"):
        oracle.assert_clean(copy)


@pytest.mark.system
def test_kernel_and_debugfs_see_the_same_tree(matrix_image, tmp_path):
    path = matrix_image("ext4-2k")
    before = oracle.sha256(path)
    with oracle.mounted(path) as root:
        by_kernel = oracle.tree(root, holes=True)
    assert oracle.sha256(path) == before
    by_debugfs = oracle.tree_of_image(path)
    devices = {name for name, entry in by_kernel.items() if entry.kind not in ("file", "directory", "symlink")}
    assert devices == {"things/pipe", "things/char", "things/block"}
    lines = oracle.differences({k: v for k, v in by_kernel.items() if k not in devices}, by_debugfs, ignore=("data",))
    assert not lines
    assert by_kernel["things/sparse"].data is not None
    assert len(by_kernel["things/sparse"].data) == 3
    assert by_kernel["things/second-name"].links == (
        "things/größe-日本語", "things/second-name", "things/third-name")  # fmt: skip
    assert dict(by_kernel["things/with-small-attribute"].xattrs or ())["user.small"]


@pytest.mark.system
def test_every_kind_of_difference_between_trees_is_reported(tmp_path):
    root = tmp_path / "root"
    (root / "directory").mkdir(parents=True)
    for name in ("content", "mode", "owner", "time", "attribute", "removed", "link-a"):
        (root / name).write_text("same")
    (root / "link-b").hardlink_to(root / "link-a")
    (root / "symlink").symlink_to("content")
    was = oracle.tree(root)
    (root / "content").write_text("diff")
    (root / "mode").chmod(0o400)
    os.chown(root / "owner", 1, 2)
    os.utime(root / "time", ns=(0, 1_000_000_001))
    os.setxattr(root / "attribute", "user.new", b"1")
    (root / "removed").unlink()
    (root / "link-b").unlink()
    (root / "link-b").write_text("same")
    (root / "symlink").unlink()
    (root / "symlink").symlink_to("elsewhere")
    (root / "added").write_text("")
    lines = oracle.differences(was, oracle.tree(root), ignore=("atime_ns", "ctime_ns"))
    for expected in (
        "added: should not",
        "removed: missing",
        "content: sha256",
        "mode: mode should be 0o644, is 0o400",
        "owner: uid",
        "owner: gid",
        "time: mtime_ns",
        "attribute: xattrs",
        "link-a: links",
        "symlink: target",
    ):
        assert any(line.startswith(expected) for line in lines), expected
    with pytest.raises(AssertionError, match="the trees differ"):
        oracle.assert_same_tree(was, oracle.tree(root))
