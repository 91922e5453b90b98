"""What the tests judge by: whole-image copies, e2fsprogs and the kernel.  Nothing here uses extsnap's own parser.

An image with snapshots at rest carries the guard and the pointer in its superblocks, which views do not show
(docs/DESIGN.md): comparisons of blocks leave exactly those bits out.  An image with the dirty mark is refused by
every tool here, as it should be.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import manifest
from images import free_runs
from manifest import Entry, Manifest, differences

__all__ = [
    "Entry",
    "FileBlocks",
    "Manifest",
    "Verdict",
    "Volume",
    "assert_clean",
    "assert_same_tree",
    "assert_view_is_copy",
    "block_owners",
    "blocks_in_use",
    "copy_image",
    "debugfs",
    "debugfs_write",
    "differences",
    "e2fsck",
    "file_blocks",
    "free_count",
    "free_counts",
    "free_runs",
    "mounted",
    "parse_stat",
    "preserved_blocks",
    "sha256",
    "store_blocks",
    "superblock_facts",
    "tree",
    "tree_of_image",
    "unequal_blocks",
    "volume_facts",
]

StrPath = str | os.PathLike[str]
STORE = "/.extsnap/store"
JOURNAL = "<8>"
_ENVIRONMENT = {
    **os.environ,
    "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
    "LC_ALL": "C",
    "TZ": "UTC",
    "DEBUGFS_PAGER": "__none__",
}


def _run(*command: StrPath, check: bool = True, text_in: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [os.fspath(part) for part in command],
        input=text_in,
        stdin=subprocess.DEVNULL if text_in is None else None,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env=_ENVIRONMENT,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{done.args} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def copy_image(source: StrPath, target: StrPath) -> Path:
    """Copy an image whole, sparse, and return the copy's path; the copy is writable."""
    _run("cp", "--reflink=auto", "--sparse=always", "--no-preserve=mode", source, target)
    return Path(target)


def sha256(path: StrPath) -> str:
    """Return the digest of every byte of a file: what "changes no byte" is proved by."""
    return _run("sha256sum", "-b", "--", path).stdout.split()[0].lstrip("\\")


# Verdicts of e2fsck.


@dataclass(frozen=True)
class Verdict:
    """How ``e2fsck -fn`` ended: its exit status and all that it said."""

    status: int
    text: str

    @property
    def clean(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        return f"e2fsck -fn ended with {self.status}\n{self.text}"


def e2fsck(image: StrPath, *options: str) -> Verdict:
    """Return what ``e2fsck -fn`` says of an image."""
    done = _run("e2fsck", "-fn", *options, image, check=False)
    return Verdict(done.returncode, done.stdout + done.stderr)


def assert_clean(image: StrPath) -> None:
    """Fail with e2fsck's own words unless the image is clean."""
    verdict = e2fsck(image)
    assert verdict.clean, f"{image}: {verdict}"


# Facts from debugfs and dumpe2fs.


def debugfs(image: StrPath, *commands: str) -> list[str]:
    """Run debugfs commands, reading, and return the output of each."""
    done = _run("debugfs", "-f", "-", image, text_in="".join(f"{command}\n" for command in commands))
    answers = re.split(r"^debugfs: .*\n", done.stdout, flags=re.MULTILINE)[1:]
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1.")]
    if complaints or len(answers) != len(commands):
        raise AssertionError(f"debugfs on {image}: {complaints or done.stdout}")
    return answers


def debugfs_write(image: StrPath, *commands: str) -> None:
    """Run debugfs commands, writing."""
    done = _run("debugfs", "-w", "-f", "-", image, text_in="".join(f"{command}\n" for command in commands))
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1.")]
    assert not complaints, f"debugfs -w on {image}: {complaints}"


@dataclass(frozen=True)
class FileBlocks:
    """Where a file lies, as ``debugfs stat`` tells.

    Attributes:
        data: int64[n, 3]: logical block, physical block, length; in logical order.
        mapping: int64[k]: extent nodes or indirect blocks.
        depth: 0 if the inode holds the whole map, else the levels of extent nodes or indirect blocks.
    """

    data: npt.NDArray[np.int64]
    mapping: npt.NDArray[np.int64]
    depth: int

    @property
    def data_blocks(self) -> npt.NDArray[np.int64]:
        """Every physical data block, in logical order."""
        return _spread(self.data[:, 1], self.data[:, 2])

    @property
    def all_blocks(self) -> npt.NDArray[np.int64]:
        """Data and mapping, sorted."""
        return np.sort(np.concatenate([self.data_blocks, self.mapping]))


_PART = re.compile(
    r"\((?:(?P<level>ETB\d+|IND|DIND|TIND)|(?P<first>\d+)(?:-\d+)?(?:\[u\])?)\):(?P<start>\d+)(?:-(?P<end>\d+))?"
)
_LEVELS = {"IND": 1, "DIND": 2, "TIND": 3}


def file_blocks(image: StrPath, path: str) -> FileBlocks:
    """Return where a file lies; ``path`` may be an inode number as ``<8>``."""
    return parse_stat(debugfs(image, f'stat "{path}"')[0])


def parse_stat(answer: str) -> FileBlocks:
    """Return where a file lies, from what ``debugfs stat`` printed of it."""
    section = re.search(r"^(?:EXTENTS|BLOCKS):\n(.*)", answer, re.MULTILINE | re.DOTALL)
    rows: list[tuple[int, int, int]] = []
    mapping: list[int] = []
    depth = 0
    for part in _PART.finditer(section[1] if section else ""):
        start = int(part["start"])
        if part["level"] is None:
            rows.append((int(part["first"]), start, int(part["end"] or start) - start + 1))
        else:
            mapping += range(start, int(part["end"] or start) + 1)
            level = part["level"]
            depth = max(depth, _LEVELS[level] if level in _LEVELS else int(level[3:]) + 1)
    data = np.array(rows, np.int64).reshape(-1, 3)
    return FileBlocks(data[np.argsort(data[:, 0], kind="stable")], np.array(mapping, np.int64), depth)


def store_blocks(image: StrPath) -> FileBlocks | None:
    """Return where the store lies, or None if the image has none."""
    found = debugfs_knows(image, STORE)
    return file_blocks(image, STORE) if found else None


def debugfs_knows(image: StrPath, path: str) -> bool:
    """Tell whether an image has this path."""
    done = _run("debugfs", "-R", f'stat "{path}"', image)
    return done.stdout.startswith("Inode: ")


def block_owners(image: StrPath, blocks: Collection[int]) -> dict[int, int | None]:
    """Return the inode that owns each block, by ``debugfs icheck``: None for free blocks and metadata without one."""
    wanted = [int(block) for block in blocks]
    lines = [f"icheck {' '.join(map(str, wanted[at : at + 500]))}" for at in range(0, len(wanted), 500)]
    owners: dict[int, int | None] = {}
    for answer in debugfs(image, *lines):
        for block, inode in re.findall(r"^(\d+)\t(\d+|<block not found>)$", answer, re.MULTILINE):
            owners[int(block)] = int(inode) if inode.isdigit() else None
    return owners


@dataclass(frozen=True)
class Volume:
    """Facts of one volume, as dumpe2fs prints them.

    Attributes:
        superblocks: int64[n]: the blocks that hold a superblock, primary first.
        table_unused: int64[n]: inode-table blocks wholly past the used inodes in groups without ITABLE_ZEROED
            (empty where descriptors have no checksums).
    """

    block_size: int
    blocks: int
    first_block: int
    free_blocks: int
    free_inodes: int
    features: tuple[str, ...]
    superblocks: npt.NDArray[np.int64]
    table_unused: npt.NDArray[np.int64]


def superblock_facts(image: StrPath) -> dict[str, str]:
    """Return the lines of ``dumpe2fs -h`` by their names."""
    lines = _run("dumpe2fs", "-h", image).stdout.splitlines()
    return {name: value.strip() for name, found, value in (line.partition(":") for line in lines) if found}


def volume_facts(image: StrPath) -> Volume:
    """Return the facts of a volume that comparisons of blocks need."""
    text = _run("dumpe2fs", image).stdout
    head, *groups = re.split(r"^Group (?=\d+: \(Blocks)", text, flags=re.MULTILINE)
    facts = {name: value.strip() for name, found, value in (line.partition(":") for line in head.splitlines()) if found}
    features = tuple(facts["Filesystem features"].split())
    block_size = int(facts["Block size"])
    in_a_block = block_size // int(facts.get("Inode size", 128))  # revision 0 does not print it
    unused: list[range] = []
    superblocks = []
    for group in groups:
        at = re.search(r"(?:Primary|Backup) superblock at (\d+)", group)
        if at:
            superblocks.append(int(at[1]))
        flags = group.split("\n")[0]
        tables = re.search(r"Inode table at (\d+)-(\d+)", group)
        past = re.search(r", (\d+) unused inodes", group)
        if "ITABLE_ZEROED" not in flags and tables and past:
            # A block that also holds a used inode counts as used.
            unused.append(range(int(tables[2]) + 1 - int(past[1]) // in_a_block, int(tables[2]) + 1))
    with_checksums = {"metadata_csum", "uninit_bg"} & set(features)
    return Volume(
        block_size=block_size,
        blocks=int(facts["Block count"]),
        first_block=int(facts["First block"]),
        free_blocks=int(facts["Free blocks"]),
        free_inodes=int(facts["Free inodes"]),
        features=features,
        superblocks=np.array(superblocks, np.int64),
        table_unused=np.array([block for part in unused for block in part] if with_checksums else [], np.int64),
    )


def free_counts(image: StrPath) -> tuple[int, int]:
    """Return free blocks and free inodes, as the superblock has them."""
    facts = superblock_facts(image)
    return int(facts["Free blocks"]), int(facts["Free inodes"])


def free_count(image: StrPath) -> int:
    """Return the number of free blocks by the bitmaps, which e2fsck compares with the counts."""
    return sum(length for _, length in free_runs(Path(image)))


def blocks_in_use(image: StrPath) -> npt.NDArray[np.bool_]:
    """Return one bool a block of the file: False where dumpe2fs calls it free.

    Uninitialised groups are resolved by libext2fs.  Blocks before the first data block, and after the last of
    the volume, count as used: no bitmap covers them.
    """
    used = np.ones(-(-os.path.getsize(image) // volume_facts(image).block_size), np.bool_)
    runs = np.array(free_runs(Path(image)), np.int64).reshape(-1, 2)
    used[_spread(runs[:, 0], runs[:, 1])] = False
    return used


def preserved_blocks(copy: StrPath) -> npt.NDArray[np.bool_]:
    """Return the blocks that a view of the moment of ``copy`` must show: all in use but the excluded ones.

    Excluded are the store's data blocks (its mapping blocks are metadata like any), the journal's blocks but its
    superblock, if the journal is empty, and unused parts of inode tables that nothing reads.
    """
    volume = volume_facts(copy)
    preserved = blocks_in_use(copy)
    store = store_blocks(copy)
    if store is not None:
        preserved[store.data_blocks] = False
    if "has_journal" in volume.features and "needs_recovery" not in volume.features:
        journal = file_blocks(copy, JOURNAL)
        preserved[journal.data_blocks[1:]] = False
    preserved[volume.table_unused] = False
    return preserved


# Comparing views with copies.

_CHUNK_BYTES = 1 << 22


def unequal_blocks(view: StrPath, copy: StrPath, blocks: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the blocks out of ``blocks`` in which a view differs from a whole-image copy.

    In superblocks, the guard, the dirty mark, the pointer at 0x3e0 and the checksum over them are left out.
    """
    volume = volume_facts(copy)
    size = volume.block_size
    wrong: list[npt.NDArray[np.int64]] = []
    per_chunk = _CHUNK_BYTES // size
    with open(view, "rb") as left, open(copy, "rb") as right:
        for start in range(0, len(blocks), per_chunk):
            wanted = blocks[start : start + per_chunk]
            if not wanted.any():
                continue
            pair = []
            for file in (left, right):
                file.seek(start * size)
                raw = bytearray(file.read(len(wanted) * size))
                raw += bytes(len(wanted) * size - len(raw))
                for block in volume.superblocks[
                    (volume.superblocks >= start) & (volume.superblocks < start + len(wanted))
                ]:
                    at = (int(block) - start) * size + (1024 if block == 0 else 0)
                    _forget_extsnap(raw, at)
                pair.append(np.frombuffer(raw, np.uint64).reshape(len(wanted), -1))
            differ = (pair[0] != pair[1]).any(axis=1) & wanted
            wrong.append(np.flatnonzero(differ) + start)
    return np.concatenate(wrong) if wrong else np.empty(0, np.int64)


def _forget_extsnap(raw: bytearray, at: int) -> None:
    raw[at + 0x63] &= 0x7F  # s_feature_incompat, bit 31: the dirty mark
    raw[at + 0x65] &= 0xEF  # s_feature_ro_compat, 0x1000: the guard
    raw[at + 0x3E0 : at + 0x400] = bytes(0x20)  # s_reserved's last bytes: the pointer; s_checksum


def nonzero_blocks(view: StrPath, blocks: npt.NDArray[np.bool_], block_size: int) -> npt.NDArray[np.int64]:
    """Return the blocks out of ``blocks`` that do not read as zeros."""
    wrong: list[npt.NDArray[np.int64]] = []
    per_chunk = _CHUNK_BYTES // block_size
    with open(view, "rb") as file:
        for start in range(0, len(blocks), per_chunk):
            wanted = blocks[start : start + per_chunk]
            if wanted.any():
                file.seek(start * block_size)
                raw = file.read(len(wanted) * block_size)
                words = np.frombuffer(raw + bytes(len(wanted) * block_size - len(raw)), np.uint64)
                wrong.append(np.flatnonzero(words.reshape(len(wanted), -1).any(axis=1) & wanted) + start)
    return np.concatenate(wrong) if wrong else np.empty(0, np.int64)


def assert_view_is_copy(view: StrPath, copy: StrPath) -> None:
    """Fail unless a view has its copy's size, equals it in every preserved block, and is zero where nothing was.

    Args:
        view: A file that shows the snapshot: a served one, or one written from the Python API.
        copy: The whole-image copy taken right after the snapshot's ``create`` returned.
    """
    assert os.path.getsize(view) == os.path.getsize(copy), "the view has another size than the image had"
    preserved = preserved_blocks(copy)
    wrong = unequal_blocks(view, copy, preserved)
    if len(wrong):
        owners = block_owners(copy, [int(block) for block in wrong[:10]])
        named = ", ".join(f"{block} ({f'inode {owner}' if owner else 'metadata'})" for block, owner in owners.items())
        raise AssertionError(f"{view} differs from {copy} in {len(wrong)} preserved blocks: {named}")
    volume = volume_facts(copy)
    store = store_blocks(copy)
    elsewhere = ~preserved
    elsewhere[volume.table_unused] = False  # may be preserved or not: nothing reads them
    left = nonzero_blocks(view, elsewhere, volume.block_size)
    kinds = "" if store is None else f", {np.isin(left, store.data_blocks).sum()} of them the store's"
    assert not len(left), f"{view} shows content in {len(left)} blocks not in use then, as {left[:10].tolist()}{kinds}"


# Trees.


def tree(root: StrPath, *, holes: bool = False) -> Manifest:
    """Return what a mounted volume holds, as the kernel tells: content, type, mode, owner, times, xattrs, links."""
    return manifest.of_tree(root, holes=holes)


def tree_of_image(image: StrPath) -> Manifest:
    """Return what an image holds, as debugfs tells: for tests without root.  Times are whole seconds."""
    with tempfile.TemporaryDirectory(prefix="extsnap-tree-") as scratch:
        return manifest.of_image(image, Path(scratch))


def assert_same_tree(expected: Manifest, actual: Manifest, *, ignore: Collection[str] = ("atime_ns",)) -> None:
    """Fail with a line for every difference between two trees."""
    lines = differences(expected, actual, ignore=ignore)
    more = "" if len(lines) <= 20 else f"\n... and {len(lines) - 20} more"
    assert not lines, "the trees differ:\n" + "\n".join(lines[:20]) + more


@contextlib.contextmanager
def mounted(image: StrPath, *options: str, writable: bool = False) -> Iterator[Path]:
    """Mount an image by the kernel through a loop device for the length of a ``with`` (needs root).

    A read-only mount changes no byte: the journal is not loaded.
    """
    facts = superblock_facts(image)
    wanted = ["rw"] if writable else ["ro", "noatime"]
    if not writable and "has_journal" in facts["Filesystem features"]:
        wanted.append("noload")
    with tempfile.TemporaryDirectory(prefix="extsnap-mount-") as directory:
        flags = [] if writable else ["--read-only"]
        loop = _run("losetup", "--find", "--show", *flags, image).stdout.strip()
        try:
            _run("mount", "-t", "ext4", "-o", ",".join([*wanted, *options]), loop, directory)
            try:
                yield Path(directory)
            finally:
                _run("umount", directory)
        finally:
            _run("losetup", "--detach", loop)


def _spread(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return every number of the runs, run after run."""
    if not len(starts):
        return np.empty(0, np.int64)
    ends = np.cumsum(lengths)
    spread: npt.NDArray[np.int64] = np.arange(ends[-1], dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
    return spread
