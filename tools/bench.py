"""Benchmarks: whole processes, creation on a large volume, and the served data path in pairs with a raw loop device.

Every row says what was measured, the median with minimum and maximum, the goal, and whether it was met.  Pairs are
measured in one run, in rotating order, because machines are noisy; the ratio of each pair counts, not single times.
Needs root and loop devices for the data path; without them these rows say so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTSNAP = ROOT / ".venv" / "bin" / "extsnap"
MIB = 1 << 20


@dataclass
class Row:
    """One measured line of the table."""

    name: str
    unit: str
    values: list[float]
    goal: str
    met: bool | None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else float("nan")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    return subprocess.run([str(word) for word in command], check=True, text=True, capture_output=True, **options)  # type: ignore[call-overload, no-any-return]


def bench_list(directory: Path, runs: int) -> Row:
    """``extsnap list`` on a volume with 50 snapshots, as a whole process."""
    sys.path.insert(0, str(ROOT))
    import extsnap

    image = directory / "fifty.img"
    run("truncate", "-s", "256M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    with extsnap.open(image) as volume:
        for number in range(50):
            volume.create(f"snapshot-{number}")
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        run(EXTSNAP, "list", image)
        times.append(time.perf_counter() - start)
    values = times[1:]
    return Row("extsnap list, 50 snapshots, whole process", "s", values, "< 0.5 s", statistics.median(values) < 0.5)


_CREATE = """
import json, os, random, resource, sys, time
import numpy as np
import extsnap
from extsnap.snapshot.volume import Volume
image, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
volume = extsnap.open(image)
fs = volume.filesystem()
data = fs.file_map(fs.lookup("/file")).data
starts = data[:, 2].cumsum() - data[:, 2]
volume.begin_serving()
content = rng.randbytes(4096)
times = []
for number in range(count):
    wanted = np.array([rng.randrange(int(data[:, 2].sum())) for _ in range(1000)])
    which = np.searchsorted(starts, wanted, "right") - 1
    for block in (data[which, 1] + wanted - starts[which]).tolist():
        volume.write(block * 4096, content)
    volume.flush()
    start = time.perf_counter()
    volume.verb("create", name=f"snapshot-{number}")
    times.append(time.perf_counter() - start)
volume.end_serving()
volume.close()
print(json.dumps({"times": times, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def bench_create(directory: Path, count: int, seed: int) -> list[Row]:
    """``create`` on a sparse 1 TiB ext4 with 20 GiB allocated, 1,000 random overwrites between creates."""
    image = directory / "terabyte.img"
    run("truncate", "-s", "1T", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1", image)
    with mounted(image, directory / "mnt") as mount:
        run("fallocate", "-l", "20G", mount / "file")
    whole = []
    for number in range(3):
        start = time.perf_counter()
        run(EXTSNAP, "create", image, f"process-{number}")
        whole.append(time.perf_counter() - start)
    result = json.loads(run(sys.executable, "-c", _CREATE, image, str(count), str(seed)).stdout)
    times = result["times"]
    early, late = times[1:6], times[-5:]
    limit = 1.3 * statistics.median(early) + 0.05
    rss = result["rss"] / MIB
    name = "create on 1 TiB with 20 GiB allocated"
    return [
        Row(f"{name}, whole process", "s", whole, "< 2 s", statistics.median(whole) < 2),
        Row(f"{name}, creates 2 to 6", "s", early, "< 2 s", max(early) < 2),
        Row(f"{name}, last five creates", "s", late, f"<= {limit:.3f} s", statistics.median(late) <= limit),
        Row(f"{name}, peak memory", "MiB", [rss], "< 512 MiB", rss < 512),
    ]


_FIRST_WRITE = """
import sys
from extsnap.snapshot.volume import Volume
volume = Volume.open(sys.argv[1], writable=True)
volume.begin_serving()
start, count = volume.open_view(volume.snapshot_names()[-1]).preserved_runs()[-1].tolist()
# The same content again: whatever it is, the filesystem stays sound, and the old block is copied all the same.
volume.write(start * volume.block_size, volume.read(start * volume.block_size, volume.block_size))
volume.flush()
volume.end_serving()
volume.close()
"""

_TEN_MILLION = """
import sys
import numpy as np
import extsnap
from extsnap.snapshot import edit
from extsnap.snapshot.index import Level
volume = extsnap.open(sys.argv[1])
count = int(sys.argv[2])
volume.create("many")
engine, store = volume.engine, volume.store
size = volume.block_size
edit.grow(volume, count + 3 * count * 32 // size + 4096)
owned = store.root.extents
# Every other block, so that no two records are neighbours; the copies are holes of the image: nobody reads them here.
blocks = np.arange(count, dtype=np.int64) * 2 + 65536
mask = engine.masks.intern(engine.alive[None])
ones = np.ones(count, np.int64)
copies = store.allocate(count)
crcs = np.full(count, 0x12345678, np.uint32)
engine.index.replace([Level(blocks, ones, copies, np.repeat(mask, count), ones.copy(), crcs)])
engine.fold()
volume.settle()
volume.close()
"""


def measured(*command: str | Path) -> tuple[float, float]:
    """(seconds, peak MiB) of a child that must succeed."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen([str(word) for word in command], stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise RuntimeError(f"{command}: {output.read().decode(errors='replace')}")
    return seconds, usage.ru_maxrss / 1024


def rows_of(name: str, runs: list[tuple[float, float]], seconds: float, mib: float) -> list[Row]:
    """Two rows of one command: its time and its memory."""
    times, peaks = [run[0] for run in runs], [run[1] for run in runs]
    return [
        Row(name, "s", times, f"< {seconds:g} s", statistics.median(times) < seconds),
        Row(f"{name}, peak memory", "MiB", peaks, f"< {mib:g} MiB", max(peaks) < mib),
    ]


def bench_open(directory: Path, name: str, size: str, goals: Mapping[str, tuple[float, float]], runs: int) -> list[Row]:
    """Whole processes on an empty, sparse ext4 with three snapshots: what opening costs by the size of the volume."""
    image = directory / "sparse.img"
    run("truncate", "-s", size, image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", image)
    taken = [measured(EXTSNAP, "create", image, f"snapshot-{number}") for number in range(3)]
    rows = rows_of(f"{name} sparse, first three creates", taken, *goals["create"])
    for verb in ("info", "list"):
        rows += rows_of(f"{name} sparse, {verb}", [measured(EXTSNAP, verb, image) for _ in range(runs)], *goals[verb])
    wrote = [measured(sys.executable, "-c", _FIRST_WRITE, image) for _ in range(2)]
    rows += rows_of(f"{name} sparse, serve, a first write, end", wrote, *goals["write"])
    image.unlink()
    return rows


def bench_records(directory: Path, count: int, runs: int) -> list[Row]:
    """Opening a sparse 1 TiB volume whose store has ``count`` records; reading and for a first served write."""
    image = directory / "records.img"
    run("truncate", "-s", "1T", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", image)
    run(sys.executable, "-c", _TEN_MILLION, image, str(count))
    name = f"1 TiB, {count} records"
    rows = rows_of(f"{name}, list", [measured(EXTSNAP, "list", image) for _ in range(runs)], 3, 1024)
    wrote = [measured(sys.executable, "-c", _FIRST_WRITE, image) for _ in range(2)]
    rows += rows_of(f"{name}, serve, a first write, end", wrote, 10, 1024)
    image.unlink()
    return rows


#: (seconds, MiB) by command.  The host's ext4 has no files of 16 TiB: 15.9 TiB stands for it.
TERABYTE = {"info": (1, 256), "list": (1, 256), "create": (2, 512), "write": (2, 512)}
SIXTEEN_TERABYTES = {"info": (1, 256), "list": (1, 256), "create": (5, 1024), "write": (5, 1024)}


@contextlib.contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    """A plain loop mount of an image without snapshots."""
    directory.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


@contextlib.contextmanager
def raw_loop(image: Path, *options: str) -> Iterator[Path]:
    """A loop device on a file."""
    device = Path(run("losetup", "-f", "--show", *options, image).stdout.strip())
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextlib.contextmanager
def attached(image: Path, directory: Path) -> Iterator[Path]:
    """The served file of an image."""
    directory.mkdir(exist_ok=True)
    run(EXTSNAP, "attach", image, directory)
    try:
        yield directory / "volume"
    finally:
        run(EXTSNAP, "detach", image)


def sequential(path: Path, offset: int, size: int, rng: random.Random) -> float:
    """MiB/s of 1 MiB writes over a range, fsync every 64."""
    data = rng.randbytes(MIB)
    handle = os.open(path, os.O_WRONLY)
    try:
        start = time.perf_counter()
        for number in range(size // MIB):
            os.pwrite(handle, data, offset + number * MIB)
            if number % 64 == 63:
                os.fsync(handle)
        os.fsync(handle)
        return size / MIB / (time.perf_counter() - start)
    finally:
        os.close(handle)


def scattered(path: Path, offset: int, size: int, rng: random.Random, count: int = 16384) -> float:
    """Writes a second of random 4 KiB, fsync every 256."""
    data = rng.randbytes(4096)
    places = [offset + rng.randrange(size // 4096) * 4096 for _ in range(count)]
    handle = os.open(path, os.O_WRONLY)
    try:
        start = time.perf_counter()
        for number, place in enumerate(places):
            os.pwrite(handle, data, place)
            if number % 256 == 255:
                os.fsync(handle)
        return count / (time.perf_counter() - start)
    finally:
        os.close(handle)


def bench_served(directory: Path, pairs: int, size: int, seed: int) -> list[Row]:
    """Steady-state writes on the served file against a raw loop device, pair by pair, in turns.

    Steady state: the written range is a file's data blocks and was overwritten once since the last snapshot.
    """
    image, plain = directory / "served.img", directory / "plain.img"
    run("truncate", "-s", str(size * 3), image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", image)
    with mounted(image, directory / "mnt") as mount:
        run("fallocate", "-l", str(size + 64 * MIB), mount / "file")
    sys.path.insert(0, str(ROOT))
    import extsnap

    with extsnap.open(image) as volume:
        fs = volume.filesystem()
        found = fs.lookup("/file")
        assert found is not None
        start, length = max(((row[1], row[2]) for row in fs.file_map(found).data.tolist()), key=lambda run: run[1])
        volume.create("base")
    span = min(size, length * 4096) // MIB * MIB
    shutil.copyfile(image, plain)
    rng = random.Random(seed)
    works: list[tuple[str, str, Callable[[Path, int, int, random.Random], float]]] = [
        ("sequential 1 MiB", "MiB/s", sequential),
        ("random 4 KiB", "1/s", scattered),
    ]
    rows = []
    offset = start * 4096
    with (
        raw_loop(plain) as device,
        attached(image, directory / "serve") as served,
        raw_loop(served, "--direct-io=on") as over,  # as `extsnap mount` has it
    ):
        for target in (served, device):
            overwrite(target, offset, span, rng)
        for way, ours in (("served file", served), ("loop device on it", over)):
            for name, unit, work in works:
                ratios, notes = [], []
                for pair in range(pairs):
                    speeds = {}
                    for target in (ours, device) if pair % 2 else (device, ours):
                        speeds[target] = work(target, offset, span, rng)
                    ratios.append(speeds[ours] / speeds[device])
                    notes.append(f"{speeds[ours]:.0f}/{speeds[device]:.0f}")
                met = statistics.median(ratios) >= 0.6
                what = f"steady state, {name} writes, {way} / raw loop"
                rows.append(Row(what, "x", ratios, ">= 0.6", met, f"{unit}: " + " ".join(notes)))
    return rows


def overwrite(path: Path, offset: int, span: int, rng: random.Random) -> None:
    """Overwrite a range once."""
    handle = os.open(path, os.O_WRONLY)
    try:
        for at in range(offset, offset + span, MIB):
            os.pwrite(handle, rng.randbytes(MIB), at)
        os.fsync(handle)
    finally:
        os.close(handle)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'what':<66} {'median':>9} {'min':>9} {'max':>9} unit  goal          met"]
    for row in rows:
        met = "-" if row.met is None else "yes" if row.met else "NO"
        if row.values:
            numbers = f"{row.median:9.3f} {min(row.values):9.3f} {max(row.values):9.3f}"
        else:
            numbers = f"{'-':>9} {'-':>9} {'-':>9}"
        lines.append(f"{row.name:<66} {numbers} {row.unit:<5} {row.goal:<13} {met}")
        if row.note:
            lines.append(f"    {row.note}")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--creates", type=int, default=100)
    parser.add_argument("--size", type=int, default=256, help="MiB written by the data path rows")
    parser.add_argument("--records", type=int, default=10_000_000, help="records of the large store")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("list", "open", "open16", "records", "create", "served"))
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="extsnap-bench-") as name:
        directory = Path(name)
        if options.only in (None, "list"):
            rows.append(bench_list(directory, 5))
        if options.only in (None, "open"):
            rows += bench_open(directory, "1 TiB", "1T", TERABYTE, 5)
        if options.only in (None, "open16"):
            rows += bench_open(directory, "15.9 TiB", "16281G", SIXTEEN_TERABYTES, 3)
        if options.only in (None, "records"):
            rows += bench_records(directory, options.records, 3)
        if os.geteuid() == 0:
            if options.only in (None, "create"):
                rows += bench_create(directory, options.creates, options.seed)
            if options.only in (None, "served"):
                rows += bench_served(directory, options.pairs, options.size * MIB, options.seed)
        else:
            rows.append(Row("rows that mount or use loop devices", "", [], "", None, "skipped: needs root"))
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.met is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
