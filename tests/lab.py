"""A volume small enough to be judged whole after every step: in memory, made and read by e2fsprogs.

Everything here that says what a volume *is* (`survey`) comes from dumpe2fs and debugfs, never from extsnap.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extsnap.blockdev.base import CloningDevice
from extsnap.snapshot.volume import Volume

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BLOCK = 1024
STORE = "/.extsnap/store"
#: Every file that a volume of the lab may have; `survey` asks for each of them.
NAMES = tuple(f"f{number}" for number in range(6)) + tuple(f"n{number}" for number in range(4))
#: From which size on memory is asked of the kernel by itself, and how much is kept: M_* of mallopt(3).
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_ENVIRONMENT = {
    **os.environ,
    "LC_ALL": "C",
    "TZ": "UTC",
    "DEBUGFS_PAGER": "__none__",
    "E2FSPROGS_FAKE_TIME": "1700000000",
}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let this process keep the memory that it frees.

    Whole images come and go in campaigns by the thousand.  The C library gives blocks of this size back at once, and
    asks for them anew: to fill the pages of a copy took ten times as long as to copy it.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):  # another C library, another way
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, 32 << 20)
    library.mallopt(_TRIM_THRESHOLD, 64 << 20)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_TRIM_THRESHOLD, 1 << 20)
        library.malloc_trim(0)


class MemoryDevice:
    """A device over a bytearray; reading or writing past its end is an error."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = bytearray(content)
        self.size = len(content)

    def _inside(self, offset: int, length: int) -> slice:
        assert offset >= 0, offset
        assert offset + length <= self.size, (offset, length, self.size)
        return slice(offset, offset + length)

    def pread(self, offset: int, length: int) -> bytes:
        return bytes(self.content[self._inside(offset, length)])

    def readinto(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[self._inside(offset, len(buffer))]

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.content[self._inside(offset, len(data))] = data

    def punch(self, offset: int, length: int) -> None:
        self.content[self._inside(offset, length)] = bytes(length)

    clone_least = 2 * BLOCK

    def clone(self, source: int, target: int, length: int) -> bool:
        self.content[self._inside(target, length)] = self.content[self._inside(source, length)]
        return True

    def flush(self) -> None:
        """What is written is there."""


def run(*command: str, text_in: str | None = None, check: bool = True) -> str:
    """Run an e2fsprogs program and return what it printed."""
    done = subprocess.run(
        command, input=text_in or "", capture_output=True, text=True, errors="replace", env=_ENVIRONMENT, check=False
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def as_file(content: bytes | bytearray) -> Iterator[str]:
    """A temporary file with this content, for programs that want one."""
    with tempfile.NamedTemporaryFile(prefix="extsnap-lab-", suffix=".img") as file:
        file.write(content)
        file.flush()
        yield file.name


def opened(device: CloningDevice, *, writable: bool = True) -> Volume:
    """A volume whose times and random numbers are the same in every run."""
    clock = iter(range(1_700_000_000 * 10**9, 1_800_000_000 * 10**9, 10**9))
    return Volume(device, writable=writable, clock=lambda: next(clock), random_bytes=random.Random(1).randbytes)


@functools.cache
def plain_image(kind: str) -> bytes:
    """An ext2, ext3 or ext4 volume with six files of 3 to 800 blocks, three or four groups and 1 KiB blocks.

    The ext2 image has a ragged tail: blocks that belong to the image and not to the filesystem.
    """
    blocks, tail, options = {"ext2": (5400, 700, [])}.get(kind, (7000, 0, ["-J", "size=1"]))
    rng = random.Random(kind)
    with tempfile.TemporaryDirectory(prefix="extsnap-lab-") as name:
        tree, image = Path(name) / "tree", Path(name) / "image"
        tree.mkdir()
        for number, length in enumerate((3000, 12288, 20000, 40 * BLOCK, 60001, 800 * BLOCK)):
            (tree / f"f{number}").write_bytes(rng.randbytes(length * 3 // 4) + bytes(length - length * 3 // 4))
            os.utime(tree / f"f{number}", (1600000000, 1600000000))
        image.write_bytes(bytes(blocks * BLOCK))
        uuid = "00000000-1111-2222-3333-444444444444"
        words = ["-q", "-F", "-t", kind, "-b", str(BLOCK), "-g", "2048", "-N", "128", "-m", "0", "-U", uuid]
        run("mke2fs", *words, *options, "-E", f"hash_seed={uuid}", "-d", str(tree), str(image))
        return image.read_bytes() + rng.randbytes(tail)


@dataclass(frozen=True)
class Survey:
    """What dumpe2fs and debugfs say of a volume.

    Attributes:
        in_use: bool[blocks of the image]: blocks that no bitmap covers count as used.
        free: Free blocks by the superblock.
        store: Rows (logical, physical, length) of the store's file; empty without one.
        mapping: Its indirect blocks or extent nodes.
        journal: The journal's data blocks, its superblock left out.
        files: Data blocks of all files of `NAMES`, as bool[blocks of the image].
        tree: What debugfs prints of the files: names, sizes, modes, times, blocks.
    """

    in_use: Flags
    free: int
    store: Ints
    mapping: Ints
    journal: Ints
    files: Flags
    tree: str

    @property
    def store_data(self) -> Flags:
        """The store's data blocks."""
        return flags(len(self.in_use), spread(self.store[:, 1:]))

    @property
    def store_all(self) -> Flags:
        """The store's data and mapping blocks."""
        return self.store_data | flags(len(self.in_use), self.mapping)

    @property
    def preserved(self) -> Flags:
        """What a snapshot of this volume preserves (docs/DESIGN.md, the moment of creation)."""
        return self.in_use & ~self.store_data & ~flags(len(self.in_use), self.journal)


def flags(count: int, blocks: Ints) -> Flags:
    """bool[count] with the given blocks set."""
    out = np.zeros(count, np.bool_)
    out[blocks] = True
    return out


def spread(runs: Ints) -> Ints:
    """The blocks of runs (start, length), in order."""
    return np.concatenate(
        [np.arange(start, start + count) for start, count in runs.tolist()] or [np.zeros(0, np.int64)]
    )


_DATA = re.compile(r"\((\d+)(?:-\d+)?(?:\[u\])?\):(\d+)(?:-(\d+))?")
_NODE = re.compile(r"\((?:ETB\d+|IND|DIND|TIND)\):(\d+)")


def _map(answer: str) -> tuple[Ints, Ints]:
    rows = [(int(a), int(b), int(c or b) - int(b) + 1) for a, b, c in _DATA.findall(answer)]
    nodes = [int(node) for node in _NODE.findall(answer)]
    return np.array(sorted(rows), np.int64).reshape(-1, 3), np.array(sorted(nodes), np.int64)


def survey(content: bytes | bytearray) -> Survey:
    """Ask dumpe2fs and debugfs about a volume."""
    with as_file(content) as path:
        text = run("dumpe2fs", path)
        lines = [f'stat "{path}"' for path in (STORE, "<8>", *(f"/{name}" for name in NAMES))]
        answers = run("debugfs", "-f", "-", path, text_in="".join(f"{line}\n" for line in lines))
    in_use = np.ones(-(-len(content) // BLOCK), np.bool_)
    for line in re.findall(r"^  Free blocks: (.+)$", text, re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
            in_use[int(first) : int(last or first) + 1] = False
    free = int(re.search(r"^Free blocks:\s+(\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    store, journal, *files = re.split(r"^debugfs: .*\n", answers, flags=re.MULTILINE)[1:]
    assert len(files) == len(NAMES), answers
    extents, mapping = _map(store)
    data = _map(journal)[0] if "has_journal" in text else np.zeros((0, 3), np.int64)
    blocks = np.concatenate([spread(_map(answer)[0][:, 1:]) for answer in files])
    count = len(in_use)
    tree = "".join(answers for answers in files)
    return Survey(in_use, free, extents, mapping, spread(data[:, 1:])[1:], flags(count, blocks), tree)


def preserved_by(volume: Volume, name: str) -> Flags:
    """Which blocks a snapshot preserves by our own account: bool[blocks]."""
    engine = volume.require_engine()
    return engine.history.preserved_at(volume.find(name).id, np.arange(engine.blocks) + engine.shift)


def complaint(content: bytes | bytearray) -> str:
    """What ``e2fsck -fn`` has against a volume: nothing if it is clean."""
    with as_file(content) as path:
        done = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True, env=_ENVIRONMENT, check=False)
    return "" if done.returncode == 0 else f"e2fsck -fn ended with {done.returncode}\n{done.stdout}{done.stderr}"


def changed_by_debugfs(content: bytes, *commands: str, data: bytes = b"") -> bytes:
    """The volume after ``debugfs -w``; ``{}`` in a command is a file with ``data``."""
    with as_file(content) as path, as_file(data) as source:
        run("debugfs", "-w", "-f", "-", path, text_in="".join(f"{line.format(source)}\n" for line in commands))
        return Path(path).read_bytes()


def changed_runs(old: bytes, new: bytes, unit: int = 512) -> list[tuple[int, int]]:
    """Byte ranges (offset, length), whole sectors, in which two volumes differ."""
    count = len(old) // unit
    a = np.frombuffer(old, np.uint8, count * unit).reshape(count, unit)
    b = np.frombuffer(new, np.uint8, count * unit).reshape(count, unit)
    which = np.flatnonzero((a != b).any(axis=1))
    first = np.flatnonzero(np.diff(which, prepend=-2) != 1)
    lengths = np.diff(np.append(first, len(which)))
    return [(int(which[at]) * unit, int(length) * unit) for at, length in zip(first, lengths, strict=True)]


def unequal(left: bytes | bytearray, right: bytes | bytearray) -> Flags:
    """bool[blocks]: where two volumes of one size differ."""
    assert len(left) == len(right)
    whole = len(left) // BLOCK
    found = np.zeros(-(-len(left) // BLOCK), np.bool_)
    if left != right:
        ours, theirs = (np.frombuffer(side, np.uint64, whole * BLOCK // 8) for side in (left, right))
        found[:whole] = (ours != theirs).reshape(whole, BLOCK // 8).any(axis=1)
        found[whole:] = left[whole * BLOCK :] != right[whole * BLOCK :]
    return found


def tried_by_debugfs(content: bytes, command: str, *, data: bytes) -> bytes | None:
    """The volume after one command of ``debugfs -w``, or None if that failed; ``{}`` is a file with ``data``."""
    with as_file(content) as path, as_file(data) as source:
        lines = f"{command.format(source)}\n"
        done = subprocess.run(
            ["debugfs", "-w", "-f", "-", path],
            input=lines,
            capture_output=True,
            text=True,
            env=_ENVIRONMENT,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1.")]
        return None if said or done.returncode else Path(path).read_bytes()


def runs(blocks: Ints) -> list[tuple[int, int]]:
    """Blocks in order as runs (first, length)."""
    blocks = np.unique(blocks)
    first = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    lengths = np.diff(np.append(first, len(blocks)))
    return [(int(blocks[at]), int(length)) for at, length in zip(first, lengths, strict=True)]
