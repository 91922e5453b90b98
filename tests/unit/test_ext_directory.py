"""Directories, linear and hashed: what we change must be clean for e2fsck, and found by debugfs and the kernel."""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

import oracle
import pytest

from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.recording import MemoryDevice
from extsnap.errors import ExtsnapError, FormatError, UnsupportedFeature
from extsnap.ext import directory
from extsnap.ext.filesystem import Filesystem
from extsnap.ondisk.directory import TAIL, dx_with_checksum, leaf_with_checksum

ROOT = 2
FT_FILE = 1
SEED = "01234567-89ab-cdef-0123-456789abcdef"
#: Kind, block size, and options: with and without checksums, extents, file types in entries.
VOLUMES = {
    "ext2-1k": ("ext2", 1024, "^has_journal"),
    "ext3-4k": ("ext3", 4096, "^metadata_csum"),
    "ext4-1k": ("ext4", 1024, "metadata_csum"),
    "ext4-4k": ("ext4", 4096, "metadata_csum"),
    "ext4-nocsum-1k": ("ext4", 1024, "^metadata_csum"),
    "ext2-nofiletype-1k": ("ext2", 1024, "^filetype"),
}


def long_name(number: int, length: int = 250) -> bytes:
    return f"{number:05d}-".encode() + b"n" * (length - 6)


def make(path: Path, volume: str, names: list[bytes], *, indexed: bool) -> Path:
    """A volume whose root has these names (empty files), packed into a hash tree by e2fsck -D where wanted."""
    kind, block_size, features = VOLUMES[volume]
    tree = path.with_suffix(".tree")
    tree.mkdir()
    for name in names:
        (tree / os.fsdecode(name)).touch()
    journal = ["-J", "size=4"] if kind == "ext4" and block_size == 4096 else []
    if kind == "ext3":
        journal = ["-J", "size=4"]
    elif kind == "ext4" and block_size == 1024:
        journal = ["-J", "size=1"]
    words = ["-q", "-F", "-t", kind, "-b", str(block_size), "-N", "2048", "-O", features, *journal]
    words += ["-E", f"hash_seed={SEED}", "-d", str(tree), str(path), "12M"]
    subprocess.run(["mke2fs", *words], check=True, capture_output=True)
    if indexed:
        done = subprocess.run(["e2fsck", "-fyD", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stdout
    oracle.assert_clean(path)
    assert is_indexed(path) == indexed
    return path


def debugfs(path: Path, command: str) -> bytes:
    """As bytes, and without a look at complaints: `htree` complains of a linear directory."""
    return subprocess.run(["debugfs", "-R", command, str(path)], capture_output=True, check=True).stdout


def is_indexed(path: Path) -> bool:
    return b"Indirect levels" in debugfs(path, "htree /")


def listed(path: Path) -> set[bytes]:
    """Names of the root directory as debugfs prints them."""
    # Lines are /inode/mode/uid/gid/name/size/; inode 0 is an unused entry, whose old name debugfs still shows.
    lines = [line.split(b"/") for line in debugfs(path, "ls -p /").split(b"\n") if line.startswith(b"/")]
    return {fields[5] for fields in lines if fields[1] != b"0"} - {b".", b".."}


def levels(path: Path) -> int:
    return int(re.search(rb"Indirect levels: (\d+)", debugfs(path, "htree /")).group(1))


def link(fs: Filesystem, names: list[bytes]) -> None:
    """Add names for one file in the root, which all link to."""
    target = directory.lookup(fs, ROOT, b"target")
    for name in names:
        directory.add_entry(fs, ROOT, name, target, FT_FILE)
    inode = fs.inode(target)
    inode.i_links_count += len(names)
    fs.write_inode(target, inode)


def unlink(fs: Filesystem, names: list[bytes]) -> None:
    target = directory.lookup(fs, ROOT, b"target")
    for name in names:
        directory.remove_entry(fs, ROOT, name)
    inode = fs.inode(target)
    inode.i_links_count -= len(names)
    fs.write_inode(target, inode)


def edit(path: Path, work, names: list[bytes]) -> None:
    with ImageFile(str(path), writable=True) as image:
        fs = Filesystem.open(image, writable=True)
        work(fs, names)
        fs.flush()
    oracle.assert_clean(path)


def kernel_finds(path: Path, present: set[bytes], absent: list[bytes]) -> None:
    with oracle.mounted(path) as mount:
        base = os.fsencode(mount)
        assert set(os.listdir(base)) == present
        for name in present:  # by hash, which listing does not use
            os.lstat(base + b"/" + name)
        for name in absent:
            assert not os.path.lexists(base + b"/" + name)


SHAPES = {
    "linear": ([b"target", b"one", b"two"], False),
    "linear-full": ([b"target", *(long_name(number, 255) for number in range(45))], False),
    "tree": ([b"target", *(long_name(number) for number in range(60))], True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("volume", VOLUMES)
def test_a_name_comes_and_goes(tmp_path, volume, shape):
    names, indexed = SHAPES[shape]
    path = make(tmp_path / "image", volume, names, indexed=indexed)
    before = listed(path)
    edit(path, link, [b".extsnap"])
    assert listed(path) == before | {b".extsnap"}
    assert is_indexed(path) == indexed
    with ImageFile(str(path)) as image:
        fs = Filesystem.open(image)
        assert {entry.name for entry in directory.entries(fs, ROOT)} == listed(path) | {b".", b".."}
        assert directory.lookup(fs, ROOT, b".extsnap") == directory.lookup(fs, ROOT, b"target")
        assert directory.lookup(fs, ROOT, b"absent") is None
    edit(path, unlink, [b".extsnap"])
    assert listed(path) == before


@pytest.mark.parametrize("volume", ["ext2-1k", "ext4-1k", "ext4-4k"])
@pytest.mark.parametrize("indexed", [False, True], ids=["linear", "tree"])
def test_many_names_split_leaves_and_add_a_level(tmp_path, volume, indexed):
    """Names enough to split every leaf of the tree, and with 1 KiB blocks its root and the first nodes too."""
    start = [b"target", *(long_name(number) for number in range(60))]
    path = make(tmp_path / "image", volume, start, indexed=indexed)
    before = listed(path)
    rng = random.Random(1)
    count = 900 if indexed and "1k" in volume else 200
    added = [long_name(10000 + number, rng.choice((7, 20, 90, 250, 250, 255))) for number in range(count)]
    edit(path, link, added)
    assert listed(path) == before | set(added)
    if indexed:
        assert levels(path) == (1 if "1k" in volume else 0)
    with ImageFile(str(path)) as image:
        fs = Filesystem.open(image)
        for name in [*before, *added]:
            assert directory.lookup(fs, ROOT, name) is not None
    rng.shuffle(added)
    edit(path, unlink, added[::2])
    assert listed(path) == before | set(added[1::2])
    # Into the space that was given back.
    edit(path, link, added[::2])
    assert listed(path) == before | set(added)
    edit(path, unlink, added)
    assert listed(path) == before


@pytest.mark.system
@pytest.mark.parametrize("volume", ["ext3-4k", "ext4-1k", "ext4-4k", "ext2-1k"])
@pytest.mark.parametrize("count", [1, 500])
def test_the_kernel_finds_the_names(tmp_path, volume, count):
    start = [b"target", *(long_name(number) for number in range(60))]
    path = make(tmp_path / "image", volume, start, indexed=True)
    before = listed(path)
    added = [b".extsnap", *("ü".encode() * 20 + long_name(number, 180) for number in range(count - 1))]
    edit(path, link, added)
    kernel_finds(path, before | set(added), [b"absent"])
    edit(path, unlink, added[::3])
    kernel_finds(path, before | set(added) - set(added[::3]), added[::3])


@pytest.mark.system
def test_the_kernel_goes_on_where_we_stopped(tmp_path):
    """The kernel splits our leaves and nodes, and we split the kernel's."""
    path = make(tmp_path / "image", "ext4-1k", [b"target", *map(long_name, range(60))], indexed=True)
    ours = [long_name(10000 + number) for number in range(400)]
    edit(path, link, ours)
    theirs = [long_name(20000 + number) for number in range(300)]
    with oracle.mounted(path, writable=True) as mount:
        for name in theirs:
            os.link(mount / "target", os.fsencode(mount) + b"/" + name)
    oracle.assert_clean(path)
    more = [long_name(30000 + number) for number in range(300)]
    edit(path, link, more)
    names = {b"target", b"lost+found", *map(long_name, range(60)), *ours, *theirs, *more}
    kernel_finds(path, names, [])


def memory(path: Path) -> tuple[MemoryDevice, Filesystem]:
    device = MemoryDevice(path.read_bytes())
    return device, Filesystem.open(device, writable=True)


def test_equal_hashes_run_over_several_leaves(tmp_path, monkeypatch):
    """With a hash that knows 8 values, runs of equal hashes are longer than a leaf: all names must still be found."""
    path = make(tmp_path / "image", "ext4-1k", [b"target", *map(long_name, range(60))], indexed=True)
    _, fs = memory(path)
    monkeypatch.setattr(directory._Directory, "hash", lambda self, name, version: (name[4] % 8) << 20)
    # The tree is ordered by another hash now, so it is built anew: an empty one, from the first leaf on.
    made = directory._Directory(fs, ROOT)
    target = next(entry.inode for entry in directory.entries(fs, ROOT) if entry.name == b"target")
    for logical in range(1, len(made.blocks)):
        made.write_leaf(logical, empty_leaf(made))
    made.write_node(0, directory._put_dx_entries(made.read(0), 32, [(0, 1)]))
    names = [long_name(number, 200) for number in range(150)]
    for name in names:
        directory.add_entry(fs, ROOT, name, target, FT_FILE)
    assert all(directory.lookup(fs, ROOT, name) == target for name in names)
    for name in names[::2]:
        directory.remove_entry(fs, ROOT, name)
    assert [directory.lookup(fs, ROOT, name) is None for name in names] == [True, False] * 75
    hashes = [value for value, _ in directory._descend(directory._Directory(fs, ROOT), 0)[0][0].entries]
    assert any(value & 1 for value in hashes), "no leaf continues another"


def empty_leaf(made: directory._Directory) -> bytes:
    block = bytearray(made.size)
    directory._write_entry(block, 0, 0, made.size - (TAIL if made.has_tail else 0), b"", 0)
    return bytes(block)


def test_room_in_pieces_is_put_together(tmp_path):
    """A leaf of unused pieces, none big enough, is packed instead of split (there may be nothing to split)."""
    path = make(tmp_path / "image", "ext4-1k", [b"target", *map(long_name, range(60))], indexed=True)
    _, fs = memory(path)
    made = directory._Directory(fs, ROOT)
    value = made.hash(b"x" * 200, directory._root_info(made).hash_version)
    leaf = directory._descend(made, value)[1]
    block = bytearray(made.size)
    for at in range(0, made.size - TAIL, 44):
        directory._write_entry(block, at, 0, min(44, made.size - TAIL - at), b"", 0)
    made.write_leaf(leaf, bytes(block))
    assert directory.add_entry(fs, ROOT, b"x" * 200, 12, FT_FILE) == []
    assert directory.lookup(fs, ROOT, b"x" * 200) == 12


def test_a_full_tree_is_refused_and_nothing_changes(tmp_path):
    path = make(tmp_path / "image", "ext4-1k", [b"target", *map(long_name, range(60))], indexed=True)
    device, fs = memory(path)
    made = directory._Directory(fs, ROOT)
    root = bytearray(made.read(0))
    leaf = directory._dx_entries(bytes(root), 32, made.limit(0))[1][0][1]
    full = [(number << 8, leaf) for number in range(made.limit(1))]
    node = made.append()[0]
    made.write_node(node, directory._new_node(made, full))
    root[30] = 1
    made.write_node(0, directory._put_dx_entries(bytes(root), 32, [(n << 1, node) for n in range(made.limit(0))]))
    full_leaf = [(0, long_name(n), 12, 1) for n in range(3)]
    made.write_leaf(leaf, directory._leaf_of(made, full_leaf))
    fs.flush()
    before = bytes(device.content)
    with pytest.raises(UnsupportedFeature, match="full"):
        directory.add_entry(fs, ROOT, b"y" * 255, 12, FT_FILE)
    fs.flush()
    assert sum(a != b for a, b in zip(before[4096:], device.content[4096:], strict=True)) == 0


def test_names_that_are_there_or_not(tmp_path):
    path = make(tmp_path / "image", "ext4-1k", [b"target"], indexed=False)
    _, fs = memory(path)
    with pytest.raises(ExtsnapError, match="already"):
        directory.add_entry(fs, ROOT, b"target", 12, FT_FILE)
    with pytest.raises(ExtsnapError, match="no entry"):
        directory.remove_entry(fs, ROOT, b"absent")
    for name in (b"", b"x" * 256):
        with pytest.raises(ValueError):
            directory.add_entry(fs, ROOT, name, 12, FT_FILE)
    assert directory.lookup(fs, directory.lookup(fs, ROOT, b"target"), b"x") is None  # not a directory


@pytest.mark.parametrize("has_tail", [False, True])
def test_hostile_leaves_end_in_an_error(has_tail):
    rng = random.Random(1)
    for _ in range(300):
        block = rng.randbytes(1024)
        try:
            entries = directory.parse_block(block, has_tail)
        except FormatError:
            continue
        assert sum(entry.length for entry in entries) == 1024 - (TAIL if has_tail else 0)
    for length in (0, 4, 7, 10, 13, 1020, 1028, 65535):
        block = b"\x0c\0\0\0" + length.to_bytes(2, "little") + b"\x05\x01" + b"names" + bytes(1011)
        with pytest.raises(FormatError, match="rec_len"):
            directory.parse_block(block, has_tail)


def test_an_entry_over_the_checksum_tail_is_damage():
    block = bytearray(1024)
    directory._write_entry(block, 0, 12, 1024, b"a", 1)
    assert len(directory.parse_block(bytes(block), False)) == 1
    with pytest.raises(FormatError):
        directory.parse_block(bytes(block), True)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (32, 0),  # limit
        (32, 500),
        (32, 124),  # one too many where there is a checksum
        (34, 0),  # count
        (34, 200),
        (36, 0),  # the first leaf is the root
        (36, 9999),  # outside the directory
        (30, 2),  # levels
        (30, 255),
        (29, 7),  # info_length
        (28, 9),  # hash version
    ],
)
@pytest.mark.parametrize("sealed", [False, True], ids=["wrong-checksum", "right-checksum"])
def test_hostile_trees_end_in_an_error(tmp_path, at, value, sealed):
    path = make(tmp_path / "image", "ext4-1k", [b"target", *map(long_name, range(60))], indexed=True)
    _, fs = memory(path)
    made = directory._Directory(fs, ROOT)
    root = bytearray(made.read(0))
    width = 1 if at < 32 else 2
    root[at : at + width] = value.to_bytes(width, "little")
    if at == 36:
        # One entry alone, so that every hash leads to it.
        root[34:36] = b"\x01\0"
    block = bytes(root)
    if sealed and at != 32:
        block = dx_with_checksum(made.seed, block, 32)
    fs.write_block(int(made.blocks[0]), block)
    with pytest.raises((FormatError, UnsupportedFeature)):
        directory.add_entry(fs, ROOT, b".extsnap", 12, FT_FILE)


def test_random_damage_never_escapes(tmp_path):
    path = make(tmp_path / "image", "ext4-nocsum-1k", [b"target", *map(long_name, range(60))], indexed=True)
    content = path.read_bytes()
    _, fs = memory(path)
    blocks = directory._Directory(fs, ROOT).blocks
    rng = random.Random(5)
    for _ in range(300):
        device = MemoryDevice(content)
        for _ in range(rng.randrange(1, 8)):
            base = int(rng.choice(list(blocks[:4]))) * 1024
            device.pwrite(base + rng.randrange(64), rng.choice([b"\0", b"\xff", rng.randbytes(1)]))
        fs = Filesystem.open(device, writable=True)
        for action in (
            lambda fs=fs: list(directory.entries(fs, ROOT)),
            lambda fs=fs: directory.add_entry(fs, ROOT, long_name(rng.randrange(99999)), 12, FT_FILE),
            lambda fs=fs: directory.remove_entry(fs, ROOT, long_name(rng.randrange(60))),
        ):
            try:
                action()
            except ExtsnapError:
                pass


@pytest.mark.parametrize("indexed", [False, True], ids=["linear", "tree"])
def test_a_wrong_checksum_is_not_made_right(tmp_path, indexed):
    path = make(tmp_path / "image", "ext4-4k", [b"target", *map(long_name, range(40))], indexed=indexed)
    _, fs = memory(path)
    made = directory._Directory(fs, ROOT)
    for number in made.blocks:
        block = bytearray(fs.read_block(int(number)))
        block[-1] ^= 1
        block[-5] ^= 1 if indexed else 0
        fs.write_block(int(number), bytes(block))
    with pytest.raises(FormatError, match="checksum") as caught:
        directory.add_entry(fs, ROOT, b".extsnap", 12, FT_FILE)
    assert caught.value.offset in {int(number) * 4096 for number in made.blocks}


@pytest.mark.parametrize("volume", ["ext4-1k", "ext4-4k", "ext2-1k", "ext2-nofiletype-1k"])
def test_the_first_block_of_a_new_directory(tmp_path, volume):
    """The very bytes that mke2fs writes for lost+found, but for the inode number."""
    path = make(tmp_path / "image", volume, [b"target"], indexed=False)
    subprocess.run(["debugfs", "-w", "-R", "mkdir /made", str(path)], check=True, capture_output=True)
    with ImageFile(str(path)) as image:
        fs = Filesystem.open(image)
        ino = directory.lookup(fs, ROOT, b"made")
        theirs = fs.read_block(int(fs.file_map(ino).data[0, 1]))
        assert directory.new_directory_block(fs, ino, ROOT) == theirs


def test_checksums_of_every_block_of_a_kernel_tree(fixture_image):
    """`leaf_with_checksum` and `dx_with_checksum` change nothing in blocks that the kernel wrote."""
    path = fixture_image("ext4-kernel-hash-tree")
    _, fs = memory(path)
    checked = {"leaf": 0, "node": 0}
    found = [ROOT, *(entry.inode for entry in directory.entries(fs, ROOT) if entry.file_type == 2)]
    for ino in dict.fromkeys(found):
        made = directory._Directory(fs, ino)
        nodes = {0} if made.indexed else set()
        if made.indexed and directory._root_info(made).indirect_levels:
            nodes |= {leaf for _, leaf in directory._dx_entries(made.read(0), 32, made.limit(0))[1]}
        for logical in range(len(made.blocks)):
            block = made.read(logical)
            if logical in nodes:
                assert dx_with_checksum(made.seed, block, directory._entries_at(logical)) == block
            else:
                assert leaf_with_checksum(made.seed, block) == block
            checked["node" if logical in nodes else "leaf"] += 1
    assert checked["leaf"] > 10
    assert checked["node"] >= 1


def hashed_root(path: Path, names: list[bytes], *commands: str, features: str = "metadata_csum") -> Path:
    """A hash-tree root with these names for one file, "target", after debugfs commands; by e2fsprogs alone.

    The names are laid down as blocks of a file that then becomes the root: one by one, e2fsprogs would need minutes.
    """
    mke2fs = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-N", "64", "-J", "size=1", "-O", features]
    subprocess.run([*mke2fs, "-E", f"hash_seed={SEED}", str(path), "70M"], check=True, capture_output=True)
    blocks = [bytearray(1024)]
    heads = [(2, b".", 2, 12), (2, b"..", 2, 12), (11, b"lost+found", 2, 20), (12, b"target", 1, 1024 - 44 - 12)]
    at = 0
    for ino, name, kind, length in heads:
        directory._write_entry(blocks[0], at, ino, length, name, kind)
        at += length
    for first in range(0, len(names), 3):
        block = bytearray(1024)
        some = names[first : first + 3]
        for index, name in enumerate(some):
            length = 264 if index < len(some) - 1 else 1024 - 12 - 264 * index
            directory._write_entry(block, 264 * index, 12, length, name, FT_FILE)
        blocks.append(block)
    for block in blocks:
        block[-12:] = b"\0\0\0\0\x0c\0\0\xde\0\0\0\0"  # where the checksum will be; without metadata_csum unused
    content, script = path.with_suffix(".root"), path.with_suffix(".commands")
    content.write_bytes(b"".join(blocks))
    lines = ["write /dev/null target", f"sif target links_count {len(names) + 1}", f"write {content} root"]
    lines += ["sif root mode 040755", "sif root links_count 3", *commands, "copy_inode root <2>", "clri <13>"]
    script.write_text("".join(f"{line}\n" for line in lines))
    subprocess.run(["debugfs", "-w", "-f", str(script), str(path)], check=True, capture_output=True)
    # Leaves without room, so that one more name splits one.
    config = path.with_suffix(".conf")
    config.write_text("[options]\nindexed_dir_slack_percentage = 0\n")
    done = subprocess.run(
        ["e2fsck", "-fyD", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "E2FSCK_CONFIG": str(config)},
    )
    assert done.returncode in (0, 1), done.stdout
    oracle.assert_clean(path)
    assert is_indexed(path)
    assert listed(path) == {b"target", b"lost+found", *names}
    return path


@pytest.mark.parametrize("kind", ["legacy", "half_md4", "tea"])
@pytest.mark.parametrize("flags", [1, 2], ids=["signed", "unsigned"])
def test_trees_of_every_hash_are_split(tmp_path, kind, flags):
    """Names above ASCII have other hashes of signed than of unsigned characters, and e2fsck knows which is right."""
    rng = random.Random(3)
    names = [f"{number:04d}".encode() + "üñ日".encode() * rng.randrange(1, 30) for number in range(300)]
    path = hashed_root(tmp_path / "image", names[:100], f"ssv def_hash_version {kind}", f"ssv flags {flags}")
    edit(path, link, names[100:])
    assert listed(path) == {b"target", b"lost+found", *names}
    edit(path, unlink, names[::2])


def test_a_directory_that_ignores_case(tmp_path):
    """Names are hashed and compared with their case folded, as e2fsck and the kernel do."""
    names = [f"{number:03d}{'NaMe' * 60}".encode() for number in range(150)]
    path = hashed_root(tmp_path / "image", names[:60], "sif root flags 0x40080000", features="casefold,metadata_csum")
    edit(path, link, [b".extsnap", *names[60:]])
    assert listed(path) == {b"target", b"lost+found", b".extsnap", *names}
    _, fs = memory(path)
    for name in names:
        assert directory.lookup(fs, ROOT, name.swapcase()) == directory.lookup(fs, ROOT, b"target")
    with pytest.raises(ExtsnapError, match="already"):
        directory.add_entry(fs, ROOT, b".EXTSNAP", 12, FT_FILE)
    edit(path, unlink, [b".ExtSnap", *(name.lower() for name in names[::2])])
    assert listed(path) == {b"target", b"lost+found", *names[1::2]}


def test_names_whose_case_cannot_be_folded(tmp_path):
    """Their tree is not split, which would need their hashes; what e2fsck makes room in can be used."""
    names = [f"{number:03d}{'ÄÖ日' * 33}".encode() for number in range(60)]
    path = hashed_root(tmp_path / "image", names, "sif root flags 0x40080000", features="casefold,metadata_csum")
    device, fs = memory(path)
    with pytest.raises(UnsupportedFeature, match="ASCII") as refused:
        directory.add_entry(fs, ROOT, b"n" * 240, 12, FT_FILE)
    assert "e2fsck -fyD" in refused.value.hint
    assert device.content == path.read_bytes()
    subprocess.run(["e2fsck", "-fyD", str(path)], check=False, capture_output=True)
    edit(path, link, [b".extsnap"])
    edit(path, unlink, [b".extsnap"])


def test_large_dir_gets_a_third_level(tmp_path):
    """The root and its nodes are full as e2fsck leaves them: a few names more, and there is one level of nodes more."""
    names = [b"%05d" % number + b"n" * 248 for number in range(46_400)]
    path = hashed_root(tmp_path / "image", names, features="large_dir,metadata_csum")
    assert levels(path) == 1
    added = [b"%05d" % number + b"n" * 248 for number in range(50_000, 51_000)]
    done = 0
    while levels(path) == 1:
        assert done < len(added), "the tree does not grow"
        edit(path, link, added[done : done + 100])
        done += 100
    edit(path, link, [b".extsnap", *added[done : done + 100]])
    assert levels(path) == 2
    assert listed(path) == {b"target", b"lost+found", b".extsnap", *names, *added[: done + 100]}
    edit(path, unlink, [b".extsnap", *added[: done + 100]])
