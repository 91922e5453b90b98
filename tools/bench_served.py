"""The data path: writes and reads of what is served, and a mounted filesystem in it, in pairs and in rotating order.

One turn is one run of each contender on the same places with the same bytes; who is first changes from turn to turn.
A turn before the first is not counted.  Every turn has a region of its own, so that "first overwrite" is true in each.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from bench_contenders import EXTSNAP, OURS, PEER, RAW, ROOT, Ours, Peer, Raw, Setting, forget, loop, mounted, run
from bench_rows import Row, pair_rows, rotated

MIB = 1 << 20
BLOCK = 4096
FSYNC_BLOCKS, FSYNC_MIB = 256, 64


@dataclass(frozen=True)
class Sizes:
    """How much is done in a run."""

    runs: int
    image_mib: int
    random_mib: int  # a region
    random_writes: int  # of 4 KiB, in a region
    sequential_mib: int  # a region
    view_mib: int
    view_records: int
    files: int
    allocated_gib: int
    changed_mib: int


FULL = Sizes(5, 6144, 256, 4096, 128, 1024, 100_000, 20_000, 64, 1024)
QUICK = Sizes(1, 512, 16, 512, 16, 32, 2_000, 300, 1, 16)

#: (against the peer, against raw)
GOALS = {
    "first-random": (8, 0.6),
    "first-sequential": (3, 0.3),
    "steady-random": (2, 0.85),
    "steady-sequential": (2, 0.8),
    "read-sequential": (1, 0.7),
    "read-random": (1, 0.7),
    "view": (1, 0.6),
    "tree": (1.5, 0.85),
}


def goals(work: str) -> dict[str, float]:
    """By contender."""
    peer, raw = GOALS[work]
    return {PEER: peer, RAW: raw}


# ---- work: each returns seconds


def write(path: Path, places: Sequence[int], size: int, every: int, seed: int) -> float:
    """Write ``size`` bytes at each place, an fsync after every so many and at the end."""
    data = random.Random(seed).randbytes(size)
    handle = os.open(path, os.O_WRONLY)
    try:
        start = time.perf_counter()
        for number, place in enumerate(places, 1):
            os.pwrite(handle, data, place)
            if number % every == 0:
                os.fsync(handle)
        os.fsync(handle)
        return time.perf_counter() - start
    finally:
        os.close(handle)


def read(path: Path, places: Sequence[int], size: int) -> float:
    """Read ``size`` bytes at each place; short pieces without read-ahead, which would make few large reads of them."""
    buffer = mmap.mmap(-1, size)
    handle = os.open(path, os.O_RDONLY)
    try:
        if size < MIB:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        start = time.perf_counter()
        for place in places:
            if os.preadv(handle, [buffer], place) != size:
                raise RuntimeError(f"{path} ends before byte {place + size}")
        return time.perf_counter() - start
    finally:
        os.close(handle)


def paired(names: Sequence[str], runs: int, work: Callable[[str, int], float]) -> dict[str, list[float]]:
    """Seconds by contender: turn after turn, in rotating order, the first turn not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(runs + 1):
        for name in rotated(names, turn):
            took = work(name, turn)
            if turn:
                seconds[name].append(took)
    return seconds


# ---- what is worked on


class Layout:
    """Where the blocks of the files in an image are on its device."""

    def __init__(self, image: Path) -> None:
        sys.path.insert(0, str(ROOT))
        import extsnap

        self._runs = {}
        with extsnap.open(image, writable=False) as volume:
            fs = volume.filesystem()
            for name in ("random", "sequential", "view"):
                inode = fs.lookup(f"/{name}")
                if inode is not None:
                    self._runs[name] = fs.file_map(inode).data.tolist()

    def on_device(self, name: str, places: Sequence[int], size: int) -> list[int]:
        """Bytes of a file as bytes of the device; places whose ``size`` bytes are not in one piece are left out."""
        found = []
        for place in places:
            first, last = place // BLOCK, (place + size - 1) // BLOCK
            for logical, physical, count, *_ in self._runs[name]:
                if logical <= first and last < logical + count:
                    found.append((physical + first - logical) * BLOCK + place % BLOCK)
                    break
        return found


def fill(path: Path, size: int, seed: int) -> None:
    """A file of so many bytes, no block like another."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(rng.randbytes(MIB))
        file.flush()
        os.fsync(file.fileno())


def pristine_image(directory: Path, mib: int, files: dict[str, int], seed: int) -> Path:
    """An ext4 with files of so many MiB."""
    image = directory / "pristine.img"
    run("truncate", "-s", f"{mib}M", image)
    options = "lazy_itable_init=0,lazy_journal_init=0"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-E", options, image)
    with loop(image) as device, mounted(device, directory / "pristine") as place:
        for number, (name, size) in enumerate(files.items()):
            fill(place / name, size * MIB, seed + number)
    return image


def contenders(directory: Path, pristine: Path, setting: Setting) -> dict[str, Raw]:
    """Fresh ones; what they are made from is removed."""
    kinds: list[type[Raw]] = [Ours, Raw, *([Peer] if setting.peer else [])]
    made = {kind.name: kind(pristine, directory, setting) for kind in kinds}
    pristine.unlink()
    os.sync()  # none of it is to be written while something is measured
    return made


# ---- the rows


def bench_data(directory: Path, sizes: Sizes, way: str, setting: Setting) -> list[Row]:
    """Writes and reads through a loop device on the file (``loop``) or in files of a mounted ext4 (``mounted``)."""
    seed = setting.seed
    turns = sizes.runs + 1
    files = {"random": sizes.random_mib * turns, "sequential": sizes.sequential_mib * turns}
    pristine = pristine_image(directory, sizes.image_mib, files, seed)
    layout = Layout(pristine)
    all_of_them = contenders(directory, pristine, setting)
    with contextlib.ExitStack() as stack:
        tops = {
            name: stack.enter_context(one.device() if way == "loop" else one.mount())
            for name, one in all_of_them.items()
        }
        # Mounting is over, and the kernel's own work on a new mount too.
        os.sync()

        def target(name: str, file: str, places: Sequence[int], size: int) -> tuple[Path, Sequence[int]]:
            if way == "loop":
                return tops[name], layout.on_device(file, places, size)
            return tops[name] / file, places

        def random_places(turn: int) -> list[int]:
            blocks = sizes.random_mib * MIB // BLOCK
            chosen = random.Random(seed + turn).sample(range(blocks), sizes.random_writes)
            return [(turn * blocks + block) * BLOCK for block in chosen]

        def sequential_places(turn: int) -> list[int]:
            return [(turn * sizes.sequential_mib + number) * MIB for number in range(sizes.sequential_mib)]

        def write_random(name: str, turn: int) -> float:
            return write(*target(name, "random", random_places(turn), BLOCK), BLOCK, FSYNC_BLOCKS, seed + turn)

        def write_again(name: str, turn: int) -> float:
            places = random_places(turn)
            random.Random(turn).shuffle(places)
            return write(*target(name, "random", places, BLOCK), BLOCK, FSYNC_BLOCKS, seed - turn - 1)

        def write_sequential(name: str, turn: int) -> float:
            return write(*target(name, "sequential", sequential_places(turn), MIB), MIB, FSYNC_MIB, seed + turn)

        def read_all(name: str, turn: int) -> float:
            path, places = target(name, "sequential", sequential_places(turn), MIB)
            forget(path)
            return read(path, places, MIB)

        def read_random(name: str, turn: int) -> float:
            path, places = target(name, "random", random_places(turn), BLOCK)
            forget(path)
            return read(path, places, BLOCK)

        def cold(work: Callable[[str, int], float]) -> Callable[[str, int], float]:
            def from_the_disk(name: str, turn: int) -> float:
                os.sync()
                all_of_them[name].forget()
                return work(name, turn)

            return from_the_disk

        def warm(work: Callable[[str, int], float]) -> Callable[[str, int], float]:
            def from_the_cache(name: str, turn: int) -> float:
                work(name, turn)
                return work(name, turn)

            return from_the_cache

        ops, mib = (sizes.random_writes, "a second"), (sizes.sequential_mib, "MiB/s")
        works: list[tuple[str, str, Callable[[str, int], float], tuple[float, str]]] = [
            ("first-random", "first overwrite, random 4 KiB", write_random, ops),
            ("first-sequential", "first overwrite, sequential 1 MiB", write_sequential, mib),
            ("steady-random", "steady state, random 4 KiB", write_again, ops),
            ("steady-sequential", "steady state, sequential 1 MiB", write_sequential, mib),
            ("read-sequential/cold", "sequential read, from the disk", cold(read_all), mib),
            ("read-random/cold", "random 4 KiB read, from the disk", cold(read_random), ops),
            ("read-sequential/warm", "sequential read, from the host's cache", warm(read_all), mib),
            ("read-random/warm", "random 4 KiB read, from the host's cache", warm(read_random), ops),
        ]
        rows = []
        for key, what, work, amount in works:
            seconds = paired(list(all_of_them), sizes.runs, work)
            name = f"{'loop device' if way == 'loop' else 'in ext4'}: {what}"
            rows += pair_rows(f"{way}/{key}", name, seconds, goals(key.partition("/")[0]), amount)
    return rows


def bench_view(directory: Path, sizes: Sizes, setting: Setting) -> list[Row]:
    """Sequential read of a snapshot that was overwritten in many scattered blocks since."""
    seed = setting.seed
    pristine = pristine_image(directory, sizes.view_mib * 3 + 256, {"view": sizes.view_mib}, seed)
    layout = Layout(pristine)
    all_of_them = contenders(directory, pristine, setting)
    blocks = random.Random(seed).sample(range(sizes.view_mib * MIB // BLOCK), sizes.view_records)
    scattered = layout.on_device("view", [block * BLOCK for block in blocks], BLOCK)
    places = layout.on_device("view", range(0, sizes.view_mib * MIB, MIB), MIB)
    for one in all_of_them.values():
        if one.name != RAW:
            with one.device() as device:
                write(device, scattered, BLOCK, 4096, seed)
        if isinstance(one, Peer):
            one.show_snapshot()
    with contextlib.ExitStack() as stack:
        devices = {name: stack.enter_context(one.device(snapshot=True)) for name, one in all_of_them.items()}

        def from_the_disk(name: str, turn: int) -> float:
            forget(devices[name])
            all_of_them[name].forget()
            return read(devices[name], places, MIB)

        def from_the_cache(name: str, turn: int) -> float:
            forget(devices[name])
            return read(devices[name], places, MIB)

        rows = []
        for key, what, work in (("cold", "the disk", from_the_disk), ("warm", "the host's cache", from_the_cache)):
            seconds = paired(list(devices), sizes.runs, work)
            name = f"view with {sizes.view_records:,} scattered records, sequential read, from {what}"
            rows += pair_rows(f"view/{key}", name, seconds, goals("view"), (len(places), "MiB/s"))
    return rows


def tree_archive(path: Path, files: int, seed: int) -> None:
    """A tar of a tree of small files, 100 in a directory."""
    rng = random.Random(seed)
    with tarfile.open(path, "w") as archive:
        for number in range(files):
            if number % 100 == 0:
                folder = tarfile.TarInfo(f"tree/{number // 100:04}")
                folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(folder)
            entry = tarfile.TarInfo(f"tree/{number // 100:04}/{number:06}")
            data = rng.randbytes(int(rng.expovariate(1 / 4096)))
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, BytesIO(data))


def bench_tree(directory: Path, sizes: Sizes, setting: Setting) -> list[Row]:
    """Unpack a tree and delete it, in ext4 with a live snapshot; each ends with all of it on the disk."""
    seed = setting.seed
    pristine = pristine_image(directory, max(sizes.image_mib // 3, 512), {"sequential": 16}, seed)
    all_of_them = contenders(directory, pristine, setting)
    archive = directory / "tree.tar"
    tree_archive(archive, sizes.files, seed)
    with contextlib.ExitStack() as stack:
        tops = {name: stack.enter_context(one.mount()) for name, one in all_of_them.items()}

        def timed(name: str, *command: str | Path) -> float:
            start = time.perf_counter()
            run(*command)
            run("sync", "-f", tops[name])
            return time.perf_counter() - start

        def unpack(name: str, turn: int) -> float:
            place = tops[name] / str(turn)
            place.mkdir()
            return timed(name, "tar", "-x", "--no-same-owner", "-C", place, "-f", archive)

        def delete(name: str, turn: int) -> float:
            return timed(name, "rm", "-r", tops[name] / str(turn))

        rows = []
        for key, what, work in (("unpack", "unpacking", unpack), ("delete", "deleting", delete)):
            seconds = paired(list(tops), sizes.runs, work)
            name = f"{what} a tree of {sizes.files:,} files in ext4"
            rows += pair_rows(f"tree/{key}", name, seconds, goals("tree"), (sizes.files, "files a second"))
    return rows


# ---- commands on a large volume

_VERBS = """
import json, random, sys, time
import extsnap
image, runs, changed, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
volume = extsnap.open(image)
fs = volume.filesystem()
maps = {name: fs.file_map(fs.lookup(name)).data.tolist() for name in ("/changed", "/file")}
times = {"create": [], "delete": [], "restore": []}

def timed(verb, **arguments):
    start = time.perf_counter()
    result = volume.verb(verb, **arguments)
    times[verb].append(time.perf_counter() - start)
    return result

volume.begin_serving()
_, start, count, *_ = max(maps["/file"], key=lambda run: run[2])
for turn in range(runs):
    for _ in range(1000):
        volume.write((start + rng.randrange(count)) * 4096, rng.randbytes(4096))
    volume.flush()
    timed("create", name=f"taken-{turn}")
for turn in range(runs):
    volume.write((start + rng.randrange(count)) * 4096, rng.randbytes(4096))
    volume.flush()
    timed("delete", names=[f"taken-{turn}"])
volume.verb("create", name="before")
left = changed
for _, start, count, *_ in maps["/changed"]:
    for block in range(start, start + count, 256):
        size = min(256, start + count - block) * 4096
        if left > 0:
            volume.write(block * 4096, rng.randbytes(size))
        left -= size
volume.flush()
volume.end_serving()
last = "before"
for turn in range(runs):
    safety = timed("restore", name=last)["safety"]
    volume.verb("delete", names=[last])
    last = safety
volume.close()
print(json.dumps(times))
"""


def bench_verbs(directory: Path, sizes: Sizes, setting: Setting) -> list[Row]:
    """create, delete and restore with much allocated: ours in the process that serves, qemu-img less its own start."""
    seed = setting.seed
    import json

    allocated, changed = sizes.allocated_gib << 30, sizes.changed_mib * MIB
    image = directory / "large.img"
    run("truncate", "-s", str(allocated * 5 // 4 + 4 * changed + 512 * MIB), image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), image)
    with loop(image) as device, mounted(device, directory / "large") as place:
        fill(place / "changed", changed, seed)
        run("fallocate", "-l", str(allocated - changed), place / "file")
    os.sync()
    words = [image, sizes.runs + 1, changed, seed]
    script = run(sys.executable, "-c", _VERBS, *map(str, words))
    times = {verb: seconds[1:] for verb, seconds in json.loads(script).items()}
    copies = [copy_file(directory, changed, seed) for _ in range(sizes.runs + 1)][1:]
    image.unlink()
    rows = []
    size = f"{sizes.allocated_gib} GiB allocated"
    theirs = peer_verbs(directory, sizes, seed) if setting.peer else {}
    for verb, ours in times.items():
        what = f"{verb}{f' after {sizes.changed_mib} MiB changed' if verb == 'restore' else ''}, {size}"
        rows.append(Row(f"verbs/{verb}/seconds", what, "s", ours))
        if verb in theirs:
            rows += pair_rows(f"verbs/{verb}", what, {OURS: ours, PEER: theirs[verb]}, {PEER: 1})
        if verb == "restore":
            what += f", against a copy of {sizes.changed_mib} MiB"
            rows.append(
                Row(
                    "verbs/restore/copy",
                    what,
                    "x",
                    [our / copy for our, copy in zip(ours, copies, strict=True)],
                    2,
                    samples={OURS: ours, "copy": copies},
                )
            )
    return rows


def copy_file(directory: Path, size: int, seed: int) -> float:
    """Seconds for a durable copy of a file."""
    source, copy = directory / "copied", directory / "copy"
    if not source.exists():
        fill(source, size, seed)
    copy.unlink(missing_ok=True)
    start = time.perf_counter()
    with source.open("rb") as read_from, copy.open("wb") as write_to:
        while data := read_from.read(MIB):
            write_to.write(data)
        write_to.flush()
        os.fdatasync(write_to.fileno())
    return time.perf_counter() - start


def peer_verbs(directory: Path, sizes: Sizes, seed: int) -> dict[str, list[float]]:
    """Seconds of qemu-img snapshot -c, -d and -a, less those of -l: starting, opening, closing."""
    image = directory / "large.qcow2"
    size = f"{sizes.allocated_gib}G"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, size)
    run("qemu-img", "snapshot", "-c", "before", image)
    command = f"write -P 7 0 {sizes.changed_mib}M"
    run("qemu-io", "-f", "qcow2", "-c", command, "-c", "flush", image)
    run("qemu-img", "snapshot", "-c", "after", image)
    os.sync()

    def timed(*words: str) -> float:
        start = time.perf_counter()
        run("qemu-img", "snapshot", *words, image)
        return time.perf_counter() - start

    found: dict[str, list[float]] = {"create": [], "delete": [], "restore": []}
    for turn in range(sizes.runs + 1):
        took = [timed("-c", "taken"), timed("-d", "taken"), timed("-a", ("before", "after")[turn % 2])]
        start = timed("-l")
        for verb, seconds in zip(found, took, strict=True):
            if turn:
                found[verb].append(max(seconds - start, 1e-3))
    image.unlink()
    return found


def why_not_served() -> str:
    """What is missing for rows that mount; empty: nothing."""
    if os.geteuid() != 0:
        return "needs root"
    found = subprocess.run(["losetup", "--find"], capture_output=True, check=False)
    return "" if found.returncode == 0 else "needs loop devices"


@contextlib.contextmanager
def clean_directory(top: Path, name: str) -> Iterator[Path]:
    """A directory of its own, removed at once: the images are large."""
    directory = top / name
    directory.mkdir()
    try:
        yield directory
    finally:
        run("rm", "-rf", directory)


__all__ = ["EXTSNAP", "FULL", "QUICK", "bench_data", "bench_tree", "bench_verbs", "bench_view", "clean_directory"]
