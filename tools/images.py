"""The matrix images that the tests run on: built by e2fsprogs alone, without root, the same bytes every time.

Every image has several groups with a short last one, a hash-tree root directory (two levels where blocks are
small), free space in short runs everywhere, sparse files, devices, links, extended attributes, and, where blocks
are 1 KiB, so much free space that one file of it needs a triple-indirect block.  An image is built once, kept
under ``.cache/images`` by a hash of its recipe and of this file, and must never be written: copy it
(``oracle.copy_image``).

How free space is fragmented: ``debugfs setb`` marks the runs that are to stay free as used (in the bitmap alone,
no count changes), a filler file then takes whatever is left, and ``freeb`` takes the marks off again.  Punching
holes into a filler would be the obvious way, but debugfs 1.47.0 frees the rest of the indirect block as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "images"
NOW = 1700000000  # every time stamp of every image
UUID = "1b9ca3b6-5c7e-4c0f-9f3a-0d6d5a1e0001"
HASH_SEED = "1b9ca3b6-5c7e-4c0f-9f3a-0d6d5a1e0002"
LONG_NAMES = 640
# Lengths of used and free runs, repeated over the whole volume: 41 of 100 blocks used, no free run above 16.
PATTERN = ((1, 2), (3, 8), (2, 1), (9, 16), (4, 4), (2, 3), (5, 1), (1, 3), (4, 7), (2, 2))

_COMMON = "ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
_EXT4 = f"{_COMMON},has_journal,extent,64bit,flex_bg,huge_file,dir_nlink,extra_isize,metadata_csum"
_FEATURES = {
    "ext2": f"none,{_COMMON}",
    "ext3": f"none,{_COMMON},has_journal",
    "ext4": f"none,{_EXT4}",
    # What e2fsprogs turns on by default since 1.47.0; distributions differ.
    "ext4up": f"none,{_EXT4},metadata_csum_seed,orphan_file",
}


@dataclass(frozen=True)
class Recipe:
    """What makes one image.

    Attributes:
        kind: ext2, ext3, ext4, or ext4up: ext4 with metadata_csum_seed and orphan_file.
        block_size: In bytes.
        blocks: Blocks of the volume; no multiple of ``blocks_per_group``.
        blocks_per_group: Smaller than mke2fs would choose where that would need a big image.
        inodes: Inodes of the volume.
        flex_groups: Groups whose bitmaps and tables lie together (ext4).
    """

    kind: str
    block_size: int
    blocks: int
    blocks_per_group: int
    inodes: int
    flex_groups: int

    @property
    def name(self) -> str:
        """How the tests call it, like ``ext4-1k``."""
        return f"{self.kind}-{self.block_size // 1024}k"


_SIZES = (
    # 1 KiB: 29 groups, 228 MiB, of which 59 in 100 are free: more than 65,804 blocks in half of it.
    (1024, 233_000, 8192, 7424, 16),
    (2048, 45_000, 8192, 3072, 4),
    (4096, 21_000, 4096, 3072, 2),
)
MATRIX: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (Recipe(kind, *size) for kind, size in itertools.product(_FEATURES, _SIZES))
}


class BuildError(Exception):
    """A tool of e2fsprogs failed, or made something that e2fsck does not call clean."""


def image(name: str) -> Path:
    """Return the path of a matrix image, built now if the cache does not have it.  Never write to it."""
    recipe = MATRIX[name]
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{name}-{_key(recipe)}.img"
    if path.exists():
        return path
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for stale in CACHE.glob(f"{name}-????????????????.img"):
                stale.unlink()
            unfinished = path.with_suffix(".new")
            build(recipe, unfinished)
            unfinished.chmod(0o444)
            unfinished.rename(path)
    return path


def build(recipe: Recipe, path: Path) -> None:
    """Make the image of ``recipe`` at ``path``.

    Raises:
        BuildError: A tool failed, or the result is not clean.
    """
    path.unlink(missing_ok=True)
    size = recipe.block_size
    options = ["-b", str(size), "-g", str(recipe.blocks_per_group), "-N", str(recipe.inodes), "-I", "256", "-m", "1"]
    options += ["-O", _FEATURES[recipe.kind], "-U", UUID, "-L", recipe.name, "-M", "", "-e", "continue"]
    extended = f"hash_seed={HASH_SEED},root_owner=0:0,lazy_itable_init=1,nodiscard"
    if recipe.kind != "ext2":
        options += ["-J", "size=4"]
    if recipe.kind.startswith("ext4"):
        options += ["-G", str(recipe.flex_groups)]
    tool("mke2fs", "-q", "-F", "-t", recipe.kind[:4], *options, "-E", extended, str(path), str(recipe.blocks))
    with tempfile.TemporaryDirectory(prefix="extsnap-image-") as name:
        scratch = Path(name)
        debugfs_script(path, tree_script(size, scratch), scratch)
        # e2fsck makes hash trees of the big directories: nothing else does it without the kernel.
        tool("e2fsck", "-fyD", str(path), ok=(0, 1))
        fragment(path, size, scratch)
    tool("e2fsck", "-fn", str(path))


def tree_script(block_size: int, scratch: Path) -> Iterator[str]:
    """Yield the debugfs commands that make the tree: many names in the root, and one of everything in /things."""
    rng = random.Random(20231114)
    sources = itertools.count()

    def source(content: bytes) -> Path:
        path = scratch / f"source{next(sources)}"
        path.write_bytes(content)
        return path

    made: list[tuple[str, str, int]] = []  # (path, mode, uid)

    empty = source(b"")
    yield "set_current_time @" + str(NOW)
    for number in range(LONG_NAMES):
        name = f"{number:05d}-{'a long name in the root directory, '.replace(' ', '_') * 6}"[:230]
        content = rng.randbytes(rng.randrange(3 * block_size)) if number % 16 == 0 else b""
        yield f"write {source(content) if content else empty} {name}"
        made.append((name, "0100644", number % 3 * 500))

    def new(name: str, mode: str, uid: int = 0) -> str:
        made.append((f"/things/{name}", mode, uid))
        return name

    yield "mkdir things"
    new("", "040755")
    yield "cd things"
    for length in (0, 1, block_size - 1, block_size, block_size + 1, 13 * block_size, 300 * block_size + 7):
        yield f"write {source(rng.randbytes(length))} {new(f'file-{length}', '0100640', uid=1000)}"
    for name, data_at in (("sparse", (5, 290, 600)), ("hole-first", (700,)), ("dense-ends", (0, 1, 2, 400))):
        path = source(b"")
        with open(path, "r+b") as file:
            for block in data_at:
                file.seek(block * block_size)
                file.write(rng.randbytes(block_size))
            file.truncate(701 * block_size + 3)
        yield f"write {path} {new(name, '0100600')}"
    yield f"symlink {new('fast-link', '0120777')} file-1"
    yield f"symlink {new('slow-link', '0120777')} {'directory/' * 20}target"
    for name, kind, mode in (("pipe", "p", "010644"), ("char", "c 259 4097", "020600"), ("block", "b 8 1", "060660")):
        yield f"mknod {new(name, mode)} {kind}"
    yield f"write {source('ünïcödé'.encode())} {new('größe-日本語', '0104755', uid=70000)}"
    yield "ln größe-日本語 second-name"
    yield "ln größe-日本語 third-name"
    yield "sif größe-日本語 links_count 3"
    for name, length in (("small", 20), ("large", block_size - 200)):
        yield f"write {source(name.encode())} {new(f'with-{name}-attribute', '0100644')}"
        # debugfs splits its command line at spaces and knows no binary: hexadecimal digits.
        yield f"ea_set -f {source(rng.randbytes(length // 2).hex().encode())} with-{name}-attribute user.{name}"
    yield f"mkdir {new('empty', '041777')}"
    yield "cd /"
    for number, (name, mode, uid) in enumerate(made, 12):
        for field, value in (("mode", mode), ("uid", uid), ("gid", uid // 2)):
            yield f"sif {name} {field} {value}"
        if not mode.startswith("04"):  # a directory's checksums depend on it, and are there already
            yield f"sif {name} generation {number * 2654435761 % 2**32}"
        for field in ("atime", "ctime", "mtime", "crtime"):
            yield f"sif {name} {field} @{NOW - number * 60}"


def fragment(path: Path, block_size: int, scratch: Path) -> None:
    """Fill the volume so that free space is left in the short runs of ``PATTERN`` only.

    Two files do it: the first leaves room for its own mapping blocks, whose number is not known beforehand, the
    second takes what remained of that.
    """
    keep = _free_to_keep(free_runs(path))
    extents = "extent" in tool("dumpe2fs", "-h", str(path)).split("Filesystem features:")[1].split("\n")[0].split()
    for number, name in enumerate(("filler", "filler-rest")):
        free = sum(length for _, length in free_runs(path)) - sum(length for _, length in keep)
        # An extent leaf that was split is half empty; a filler has one extent for each run that is kept free.
        mapping = free * 4 // block_size + 8
        if extents:
            mapping = 2 * (len(keep) if number == 0 else free) // ((block_size - 12) // 12) + 8
        content = scratch / name
        rng = random.Random(number)
        with open(content, "wb") as file:
            for start in range(0, free - mapping, 256):
                file.write(rng.randbytes(min(256, free - mapping - start) * block_size))
        script = [f"setb {start} {length}" for start, length in keep]
        script += [f"set_current_time @{NOW}", f"write {content} {name}"]
        for field in ("atime", "ctime", "mtime", "crtime"):
            script.append(f"sif {name} {field} @{NOW}")
        script += [f"sif {name} {field} 0" for field in ("uid", "gid", "generation")] + [f"sif {name} mode 0100600"]
        debugfs_script(path, [*script, *(f"freeb {start} {length}" for start, length in keep)], scratch)
        content.unlink()


def _free_to_keep(free: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut free runs by ``PATTERN``: the parts that stay free."""
    keep = []
    pattern = itertools.cycle(PATTERN)
    for start, length in free:
        at = start
        while at < start + length:
            used, unused = next(pattern)
            unused = min(unused, start + length - at - used)
            if unused > 0:
                keep.append((at + used, unused))
            at += used + max(unused, 0)
    return keep


def free_runs(path: Path) -> list[tuple[int, int]]:
    """Return (start, length) of every free run, as dumpe2fs prints them: with bigalloc by first blocks of clusters."""
    runs = []
    printed = tool("dumpe2fs", str(path))
    sizes = {name: int(size) for name, size in re.findall(r"^(Block|Cluster) size: *(\d+)$", printed, re.MULTILINE)}
    unit = sizes.get("Cluster", sizes["Block"]) // sizes["Block"]
    for line in re.findall(r"^  Free blocks: (.*)$", printed, re.MULTILINE):
        for part in filter(None, line.split(", ")):
            first, _, last = part.partition("-")
            runs.append((int(first), int(last or first) - int(first) + unit))
    return runs


def debugfs_script(path: Path, commands: Iterator[str] | list[str], scratch: Path) -> str:
    """Run debugfs commands on an image, writing.

    Raises:
        BuildError: debugfs reported anything.
    """
    script = scratch / "commands"
    script.write_text("".join(f"{command}\n" for command in commands))
    # debugfs ends with 0 even when a command failed, and says so on standard error only.
    done = subprocess.run(
        ["debugfs", "-w", "-f", str(script), str(path)], capture_output=True, text=True, env=environment(), check=False
    )
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1.")]
    if done.returncode or complaints:
        raise BuildError(f"debugfs on {path}: {complaints[:5] or done.returncode}")
    return done.stdout


def environment() -> dict[str, str]:
    """Return the environment in which e2fsprogs takes ``NOW`` for the present."""
    paths = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    fake = dict.fromkeys(("E2FSPROGS_FAKE_TIME", "SOURCE_DATE_EPOCH", "E2FSCK_TIME"), str(NOW))
    # A configuration file of the machine must not add features, nor an undo directory slow things down.
    return {
        "PATH": paths,
        "LC_ALL": "C",
        "TZ": "UTC",
        "MKE2FS_CONFIG": "/dev/null",
        "E2FSPROGS_UNDO_DIR": "none",
        **fake,
    }


def tool(*command: str, ok: tuple[int, ...] = (0,)) -> str:
    """Run a tool and return what it printed.

    Raises:
        BuildError: It ended with a status not in ``ok``.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode not in ok:
        raise BuildError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.stdout


def _key(recipe: Recipe) -> str:
    version = subprocess.run(["mke2fs", "-V"], capture_output=True, env=environment(), check=False).stderr
    return hashlib.sha256(repr(astuple(recipe)).encode() + version + Path(__file__).read_bytes()).hexdigest()[:16]
