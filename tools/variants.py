"""Every kind of ext2, ext3 and ext4 volume that e2fsprogs makes, small, with the options pinned.

`VARIANTS` names them; `image` builds one by e2fsprogs alone, without root, and keeps it under ``.cache/variants`` by
a hash of its recipe.  An image must never be written: copy it.  What the support table says (docs/EXT4-COVERAGE.md)
comes from tests over this list.
"""

from __future__ import annotations

import fcntl
import hashlib
import random
import subprocess
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

from images import BuildError, debugfs_script, environment, tool

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "variants"
UUID = "1b9ca3b6-5c7e-4c0f-9f3a-0d6d5a1e0003"
HASH_SEED = "1b9ca3b6-5c7e-4c0f-9f3a-0d6d5a1e0004"

_EXT2 = "ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
_EXT3 = f"{_EXT2},has_journal"
_EXT4 = f"{_EXT3},extent,64bit,flex_bg,huge_file,dir_nlink,extra_isize,metadata_csum"
_BASES = {"ext2": _EXT2, "ext3": _EXT3, "ext4": _EXT4}


@dataclass(frozen=True)
class Variant:
    """What makes one volume.

    Attributes:
        title: What is special about it, for people.
        base: ext2, ext3 or ext4: the features to start from.
        features: Features added, or with ``^`` taken away, as mke2fs and tune2fs write them.
        block_size: Bytes.
        kibibytes: Size of the image, which may be more than the filesystem takes.
        options: More options of mke2fs.
        extended: More of its ``-E`` options.
        journal: Its ``-J`` options, where there is a journal.
        top: Directory that the files are in; empty for the root.
        first: debugfs commands on the volume as mke2fs left it, which e2fsck then puts in order.
        crowd: How many long names the root gets beside; e2fsck then packs its hash tree without any room.
        letters: What they are made of.
        fragments: Files of one cluster, every second of which is removed again: free space is left between them.
        script: debugfs commands before the files are written.
        then: Commands on the image afterwards; ``{}`` is its path.
        last: Commands when e2fsck has put it in order.
        refused: What the error says where extsnap cannot serve it, else empty.
    """

    title: str
    base: str = "ext4"
    features: str = ""
    block_size: int = 1024
    kibibytes: int = 20_000
    options: tuple[str, ...] = ()
    extended: tuple[str, ...] = ()
    journal: str = "size=1"
    top: str = ""
    first: tuple[str, ...] = ()
    crowd: int = 0
    letters: str = "üñ日"
    fragments: int = 0
    script: tuple[str, ...] = ()
    then: tuple[tuple[str, ...], ...] = ()
    last: tuple[tuple[str, ...], ...] = ()
    refused: str = ""

    @property
    def all_features(self) -> list[str]:
        """The features mke2fs is to make it with."""
        wanted = _BASES[self.base].split(",")
        for feature in filter(None, self.features.split(",")):
            if feature.startswith("^"):
                wanted = [name for name in wanted if name != feature[1:]]
            elif feature not in wanted:
                wanted.append(feature)
        return wanted


def _sizes() -> dict[str, Variant]:
    found = {}
    for base in ("ext2", "ext3", "ext4"):
        for size in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
            # A journal has at least 1,024 blocks.
            journal = f"size={max(1, size // 1024)}"
            kibibytes = 20_000 + (size // 1024) * 3_000
            found[f"{base}-{size // 1024}k"] = Variant(
                f"{base}, blocks of {size // 1024} KiB", base, "", size, kibibytes, journal=journal
            )
    return found


VARIANTS: dict[str, Variant] = {
    **_sizes(),
    "inode-128": Variant("inodes of 128 bytes", options=("-I", "128"), features="^extra_isize"),
    "inode-128-csum-none": Variant("inodes of 128 bytes, ext2", "ext2", options=("-I", "128")),
    "inode-512": Variant("inodes of 512 bytes", options=("-I", "512")),
    "inode-1024": Variant("inodes of 1,024 bytes: a whole block each", options=("-I", "1024")),
    "inode-4096": Variant(
        "inodes of 4,096 bytes", options=("-I", "4096"), block_size=4096, kibibytes=60_000, journal="size=4"
    ),
    "revision-0": Variant("revision 0", "ext2", options=("-r", "0")),
    "desc-128": Variant("descriptors of 128 bytes", extended=("desc_size=128",), kibibytes=30_000),
    "desc-1024": Variant(
        "descriptors of 1,024 bytes: a whole block each", extended=("desc_size=1024",), features="^resize_inode"
    ),
    "no-64bit": Variant("32-byte descriptors", features="^64bit"),
    "no-flex-bg": Variant("no flex_bg", features="^flex_bg"),
    "flex-odd": Variant("group count not a multiple of the flex size", options=("-G", "4"), kibibytes=50_000),
    "meta-bg": Variant("meta_bg", features="meta_bg,^resize_inode", options=("-g", "256"), kibibytes=40_000),
    "meta-bg-32": Variant(
        "meta_bg with 32-byte descriptors",
        features="meta_bg,^resize_inode,^64bit",
        options=("-g", "256"),
        kibibytes=40_000,
    ),
    "sparse-super2": Variant("sparse_super2", features="sparse_super2,^sparse_super,^resize_inode", kibibytes=60_000),
    "sparse-super2-one": Variant(
        "sparse_super2 with one backup",
        features="sparse_super2,^sparse_super,^resize_inode",
        extended=("num_backup_sb=1",),
        kibibytes=60_000,
    ),
    "sparse-super2-none": Variant(
        "sparse_super2 without backups",
        features="sparse_super2,^sparse_super,^resize_inode",
        extended=("num_backup_sb=0",),
        kibibytes=60_000,
    ),
    "backups-everywhere": Variant(
        "a superblock in every group", "ext2", features="^sparse_super,^resize_inode", kibibytes=60_000
    ),
    "no-resize-inode": Variant("no resize_inode", features="^resize_inode"),
    "uninit-bg": Variant("uninit_bg (gdt_csum)", features="^metadata_csum,uninit_bg", kibibytes=60_000),
    "uninit-bg-32": Variant(
        "uninit_bg, 32-byte descriptors", features="^metadata_csum,uninit_bg,^64bit", kibibytes=60_000
    ),
    "no-csum": Variant("no checksums", features="^metadata_csum"),
    "csum-seed": Variant(
        "metadata_csum_seed", features="metadata_csum_seed", then=(("tune2fs", "-U", "random", "{}"),)
    ),
    "no-extents": Variant("ext4 without extents", features="^extent,^64bit"),
    "mixed-mapping": Variant(
        "extents and indirect blocks side by side",
        features="^extent,^64bit,^metadata_csum,^flex_bg",
        then=(("tune2fs", "-O", "extent", "{}"), ("debugfs", "-w", "-R", "mkdir later", "{}")),
    ),
    "bigalloc": Variant("bigalloc, clusters of 16 KiB", features="bigalloc", kibibytes=60_000, options=("-C", "16384")),
    "bigalloc-fragmented": Variant(
        "bigalloc, every second cluster free",
        features="bigalloc",
        kibibytes=60_000,
        options=("-C", "16384", "-N", "4096"),
        fragments=3300,
    ),
    "bigalloc-4k": Variant(
        "bigalloc, blocks of 4 KiB",
        features="bigalloc",
        block_size=4096,
        kibibytes=200_000,
        options=("-C", "65536"),
        journal="size=4",
    ),
    "inline-data": Variant("inline_data", features="inline_data"),
    # e2fsprogs never makes one: a new inline directory is copied over the root's inode.
    "inline-root": Variant(
        "inline_data with an inline root directory",
        features="inline_data",
        options=("-I", "512"),
        top="/d",
        first=("mkdir a", "cd a", "link <11> lost+found", "mkdir d", "cd /", "copy_inode a <2>"),
        script=("ea_set / user.first 1", f"ea_set / user.second {'2' * 100}", "ea_set / user.third 333"),
    ),
    "no-dir-index": Variant("no dir_index", features="^dir_index"),
    "no-filetype": Variant("no filetype", "ext2", features="^filetype"),
    "large-dir": Variant("large_dir", features="large_dir"),
    "root-tree": Variant("a hash tree for a root directory", crowd=40),
    "root-tree-deep": Variant("a root directory whose hash tree has two levels", crowd=520, options=("-N", "2048")),
    "hash-legacy": Variant("hash of the legacy kind", script=("ssv def_hash_version legacy",), crowd=40),
    "hash-tea": Variant("hash of the TEA kind", script=("ssv def_hash_version tea",), crowd=40),
    "hash-unsigned": Variant("hashes of unsigned characters", script=("ssv flags 2",), crowd=40),
    "hash-legacy-unsigned": Variant(
        "hash of the legacy kind, unsigned", script=("ssv def_hash_version legacy", "ssv flags 2"), crowd=40
    ),
    "hash-tea-unsigned": Variant(
        "hash of the TEA kind, unsigned", script=("ssv def_hash_version tea", "ssv flags 2"), crowd=40
    ),
    "ea-inode": Variant("ea_inode", features="ea_inode"),
    "encrypt": Variant("encrypt", features="encrypt"),
    "verity": Variant("verity", features="verity", block_size=4096, kibibytes=50_000, journal="size=4"),
    "casefold": Variant("casefold", features="casefold"),
    "casefold-root": Variant(
        "a root directory that ignores case",
        features="casefold",
        first=("sif <2> flags 0x40080000",),
        crowd=40,
        letters="NaMe",
    ),
    "no-huge-file": Variant("no huge_file", features="^huge_file"),
    "no-large-file": Variant("no large_file", "ext2", features="^large_file"),
    "no-dir-nlink": Variant("no dir_nlink", features="^dir_nlink"),
    "orphan-file": Variant("orphan_file", features="orphan_file"),
    "quota": Variant("quota", features="quota"),
    "project": Variant("quota with project", features="quota,project"),
    "mmp": Variant(  # at the end: every program that writes to one waits for eleven seconds
        "mmp", last=(("tune2fs", "-O", "mmp", "-E", "mmp_update_interval=1", "{}"),)
    ),
    "fast-commit": Variant("fast_commit", features="fast_commit", journal="size=4", kibibytes=30_000),
    "stable-inodes": Variant("stable_inodes", features="stable_inodes"),
    "journal-1": Variant("journal superblock of version 1", "ext3", script=("zap_block -f <8> -o 7 -l 1 -p 3 0",)),
    "journal-csum-1": Variant(
        "journal with checksums of version 1",
        features="^metadata_csum",
        script=("zap_block -f <8> -o 39 -l 1 -p 1 0", "zap_block -f <8> -o 43 -l 1 -p 2 0"),
    ),
    "journal-csum-2": Variant("journal with checksums of version 2", script=("jo -c -v 2", "jc")),
    "journal-csum-3": Variant("journal with checksums of version 3", script=("jo -c -v 3", "jc")),
    "journal-32": Variant("journal with 32-bit numbers and no checksums", features="^64bit,^metadata_csum"),
    "short-last-group": Variant("a last group of 300 blocks", kibibytes=8192 * 3 + 301),
    "ragged-image": Variant(
        "an image that is no multiple of the block size", block_size=4096, kibibytes=30_003, journal="size=4"
    ),
    "tiny-groups": Variant("groups of 256 blocks", "ext2", options=("-g", "256"), features="^resize_inode"),
    "no-reserve": Variant("nothing reserved for root", options=("-m", "0")),
    "everything": Variant(
        "everything at once, but for mmp",
        features="bigalloc,inline_data,quota,project,ea_inode,encrypt,verity,casefold,large_dir,metadata_csum_seed,"
        "orphan_file,fast_commit,stable_inodes,sparse_super2,^sparse_super,^resize_inode",
        block_size=4096,
        kibibytes=80_000,
        options=("-C", "16384"),
        extended=("desc_size=128",),
        journal="size=4",
        crowd=100,
    ),
    "encrypted-root": Variant(
        "encrypted names in the root directory",
        features="encrypt",
        then=(("debugfs", "-w", "-R", "sif <2> flags 0x80800", "{}"),),
        refused="encrypted names in the root directory",
    ),
    "unknown-feature": Variant(
        "a feature that e2fsprogs does not know",
        then=(("debugfs", "-w", "-R", "feature FEATURE_R30", "{}"),),
        refused="FEATURE_R30",
    ),
    "external-journal": Variant(
        "journal on another device",
        "ext2",
        then=(("debugfs", "-w", "-R", "feature has_journal", "{}"),),
        refused="external journal",
    ),
}


def image(name: str) -> Path:
    """Return the path of a variant's image, built now if the cache does not have it.  Never write to it."""
    variant = VARIANTS[name]
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{name}-{_key(variant)}.img"
    if path.exists():
        return path
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for stale in CACHE.glob(f"{name}-????????????????.img"):
                stale.unlink()
            unfinished = path.with_suffix(".new")
            build(name, variant, unfinished)
            unfinished.chmod(0o444)
            unfinished.rename(path)
    return path


def build(name: str, variant: Variant, path: Path) -> None:
    """Make the volume of ``variant`` at ``path``.

    Raises:
        BuildError: A tool failed, or the result is not clean.
    """
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(variant.kibibytes * 1024)
    options = ["-b", str(variant.block_size), "-U", UUID, "-L", name[:16], "-M", "", "-e", "continue", *variant.options]
    if not {"-I", "-r"} & set(variant.options):
        options += ["-I", "256"]
    if "has_journal" in variant.all_features:
        options += ["-J", variant.journal]
    if variant.options[:1] != ("-r",):
        options += ["-O", ",".join(["none", *variant.all_features])]
    extended = ["root_owner=0:0", "lazy_itable_init=1", "nodiscard", f"hash_seed={HASH_SEED}", *variant.extended]
    words = [*options, "-E", ",".join(extended), str(path)]
    tool("mke2fs", "-q", "-F", "-t", variant.base, *words)
    with tempfile.TemporaryDirectory(prefix="extsnap-variant-") as scratch:
        if variant.first:
            debugfs_script(path, list(variant.first), Path(scratch))
            tool("e2fsck", "-fy", str(path), ok=(0, 1))
        debugfs_script(path, _tree(variant, Path(scratch)), Path(scratch))
    for command in variant.then:
        tool(*(word.format(path) for word in command))
    if not variant.refused:
        _put_in_order(path, packed=bool(variant.crowd))
        for command in variant.last:
            tool(*(word.format(path) for word in command))
        tool("e2fsck", "-fn", str(path))


def _put_in_order(path: Path, *, packed: bool) -> None:
    """e2fsck makes the hash trees, with room in every leaf or without any.

    Raises:
        BuildError: It failed.
    """
    with tempfile.NamedTemporaryFile("w", prefix="extsnap-variant-", suffix=".conf") as config:
        config.write("[options]\nindexed_dir_slack_percentage = 0\n" if packed else "")
        config.flush()
        done = subprocess.run(
            ["e2fsck", "-fyD", str(path)],
            capture_output=True,
            text=True,
            env={**environment(), "E2FSCK_CONFIG": config.name},
            check=False,
        )
    if done.returncode not in (0, 1):
        raise BuildError(f"e2fsck of {path} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")


def _tree(variant: Variant, scratch: Path) -> list[str]:
    """Commands: files of many sizes, a sparse one, a directory that becomes a hash tree."""
    rng = random.Random(variant.title)
    size = variant.block_size
    commands = [*variant.script, *([f"cd {variant.top}"] if variant.top else []), "mkdir many", "cd many"]
    empty = scratch / "empty"
    empty.write_bytes(b"")
    names = 40 if "inline" in variant.features else max(60, 3 * size // 60)
    commands += [f"write {empty} {number:04d}-{'n' * 40}" for number in range(min(names, 400))]
    commands += [f"cd {variant.top or '/'}"]
    # Four fill a leaf of 1 KiB: there is no room for another name.
    room = 256 if "metadata_csum" not in variant.all_features else 252
    for number in range(variant.crowd):
        name = f"{number:04d}" + variant.letters * 80
        kept = name.encode()[: room - 8].decode(errors="ignore")
        commands.append(f"write {empty} {kept}{'-' * (room - 8 - len(kept.encode()))}")
    for number, length in enumerate((0, 1, 50, size, size + 1, 14 * size, 300 * 1024)):
        source = scratch / f"file{number}"
        source.write_bytes(rng.randbytes(length))
        commands.append(f"write {source} file{number}")
    if "ea_inode" in variant.all_features:  # more than a block: the value has an inode of its own
        commands.append(f"ea_set -f {scratch / 'file5'} file2 user.large")
    sparse = scratch / "sparse"
    with sparse.open("wb") as file:
        for block in (1, 20, 290):
            file.seek(block * size)
            file.write(rng.randbytes(size))
    if variant.fragments:
        cluster = scratch / "cluster"
        cluster.write_bytes(rng.randbytes(int(variant.options[variant.options.index("-C") + 1])))
        commands += ["mkdir fragments", "cd fragments"]
        commands += [f"write {cluster} {number}" for number in range(variant.fragments)]
        commands += [f"rm {number}" for number in range(0, variant.fragments, 2)] + [f"cd {variant.top or '/'}"]
    commands += [f"write {sparse} sparse", "symlink link file1", f"symlink slow {'directory/' * 12}target"]
    return commands


def _key(variant: Variant) -> str:
    version = subprocess.run(["mke2fs", "-V"], capture_output=True, env=environment(), check=False).stderr
    return hashlib.sha256(repr(astuple(variant)).encode() + version + Path(__file__).read_bytes()).hexdigest()[:16]


__all__ = ["VARIANTS", "BuildError", "Variant", "build", "image"]
