"""The small images are what their README says they are, by e2fsprogs."""

from __future__ import annotations

import re
from pathlib import Path

import oracle
import pytest

DIRECTORY = Path(__file__).resolve().parent.parent / "fixtures"
TABLE = dict(re.findall(r"^\| `([^`]+)` \| (\d+) \|", (DIRECTORY / "README.md").read_text(), re.MULTILINE))


def test_the_readme_lists_every_image():
    assert sorted(TABLE) == sorted(path.name.removesuffix(".img.gz") for path in DIRECTORY.glob("*.img.gz"))
    assert all(path.stat().st_size <= 100 * 1024 for path in DIRECTORY.iterdir())


@pytest.mark.parametrize("name", TABLE)
def test_e2fsck_says_what_the_readme_says(name, fixture_image):
    image = fixture_image(name)
    before = oracle.sha256(image)
    verdict = oracle.e2fsck(image)
    assert verdict.status == int(TABLE[name]), verdict
    assert oracle.sha256(image) == before


def test_each_image_is_odd_in_its_way(fixture_image):
    def facts(name):
        return oracle.superblock_facts(fixture_image(name))

    assert facts("ext2-not-unmounted")["Filesystem state"] == "not clean"
    assert facts("ext2-revision-0")["Filesystem revision #"] == "0 (original)"
    assert (
        facts("ext2-odd-label-and-tail")["Filesystem volume name"].encode(errors="surrogateescape") == b"caf\xe9 \xff"
    )
    assert fixture_image("ext2-odd-label-and-tail").stat().st_size % 1024 == 45
    assert {"bigalloc", "quota"} <= set(facts("ext4-bigalloc-quota")["Filesystem features"].split())
    assert "needs_recovery" in facts("ext4-needs-recovery")["Filesystem features"]
    assert not oracle.debugfs_knows(fixture_image("ext4-needs-recovery"), "/only-in-the-journal")
    assert "needs_recovery" not in facts("ext4-frozen-with-orphan")["Filesystem features"]
    assert "First orphan inode" in facts("ext4-frozen-with-orphan")
    flags = re.search(r"Flags: (0x[0-9a-f]+)", oracle.debugfs(fixture_image("ext4-kernel-hash-tree"), "stat /")[0])
    assert flags
    assert int(flags[1], 16) & 0x1000
    image = fixture_image("ext4-uninitialised-groups")
    assert (~oracle.blocks_in_use(image)).sum() == oracle.volume_facts(image).free_blocks


@pytest.mark.system
def test_a_replay_brings_what_only_the_journal_has(fixture_image):
    image = fixture_image("ext4-needs-recovery")
    with oracle.mounted(image, writable=True) as root:
        assert (root / "only-in-the-journal").is_dir()
        assert (root / "fsynced").stat().st_size == 20000
