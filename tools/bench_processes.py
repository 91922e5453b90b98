"""Whole processes: start-up, opening large volumes and stores, creation on a large volume; the time and the memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench_contenders import EXTSNAP, ROOT, loop, mounted, run
from bench_rows import Row

MIB = 1 << 20


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


def rows_of(key: str, name: str, runs: list[tuple[float, float]], seconds: float | None, mib: float) -> list[Row]:
    """Two rows of one command: its time and its memory."""
    times, peaks = [run[0] for run in runs], [run[1] for run in runs]
    return [
        Row(key, name, "s", times, seconds),
        Row(f"{key}/memory", f"{name}, peak memory", "MiB", peaks, mib),
    ]


def empty_volume(image: Path, size: str) -> None:
    """A sparse ext4 of which next to nothing is written."""
    image.unlink(missing_ok=True)
    run("truncate", "-s", size, image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", image)


def bench_start(directory: Path, runs: int) -> list[Row]:
    """``--help``, and ``list`` on a volume with 50 snapshots."""
    sys.path.insert(0, str(ROOT))
    import extsnap

    image = directory / "fifty.img"
    run("truncate", "-s", "256M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    with extsnap.open(image) as volume:
        for number in range(50):
            volume.create(f"snapshot-{number}")
    rows = []
    for key, name, limit, words in (
        ("start/help", "extsnap --help", 0.25, ["--help"]),
        ("start/list", "extsnap list, 50 snapshots", 0.3, ["list", str(image)]),
    ):
        measured(EXTSNAP, *words)
        times = [measured(EXTSNAP, *words)[0] for _ in range(2 * runs)]
        rows.append(Row(key, f"{name}, whole process", "s", times, limit))
    return rows


_CREATE = """
import json, os, random, resource, sys, time
import numpy as np
import extsnap
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
    empty_volume(image, "1T")
    with loop(image) as device, mounted(device, directory / "mnt") as place:
        run("fallocate", "-l", "20G", place / "file")
    whole = [measured(EXTSNAP, "create", image, f"process-{number}")[0] for number in range(3)]
    result = json.loads(run(sys.executable, "-c", _CREATE, image, str(count), str(seed)))
    image.unlink()
    times = result["times"]
    early, late = times[1:6], times[-5:]
    name = "create on 1 TiB with 20 GiB allocated"
    return [
        Row("create/process", f"{name}, whole process", "s", whole, 2),
        Row("create/early", f"{name}, creates 2 to 6", "s", early, 2),
        Row("create/late", f"{name}, last five creates", "s", late, 1.3 * statistics.median(early) + 0.05),
        Row("create/memory", f"{name}, peak memory", "MiB", [result["rss"] / MIB], 512),
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

_RECORDS = """
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
# The index is there twice, and its next version beside it.
edit.grow(volume, count + 6 * count * 36 // size + 8192)
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


def make_records(image: Path, count: int) -> None:
    """A sparse 1 TiB volume whose store has so many records."""
    empty_volume(image, "1T")
    run(sys.executable, "-c", _RECORDS, image, str(count))


def first_write(image: Path) -> tuple[float, float]:
    """(seconds, peak MiB) of a process that serves, writes its first block, and ends."""
    return measured(sys.executable, "-c", _FIRST_WRITE, image)


def bench_open(directory: Path, name: str, size: str, goals: Mapping[str, tuple[float, float]], runs: int) -> list[Row]:
    """Whole processes on an empty, sparse ext4 with three snapshots: what opening costs by the size of the volume."""
    image = directory / "sparse.img"
    empty_volume(image, size)
    taken = [measured(EXTSNAP, "create", image, f"snapshot-{number}") for number in range(3)]
    rows = rows_of(f"open/{size}/create", f"{name} sparse, first three creates", taken, *goals["create"])
    for verb in ("info", "list"):
        found = [measured(EXTSNAP, verb, image) for _ in range(runs)]
        rows += rows_of(f"open/{size}/{verb}", f"{name} sparse, {verb}", found, *goals[verb])
    wrote = [first_write(image) for _ in range(2)]
    rows += rows_of(f"open/{size}/write", f"{name} sparse, serve, a first write, end", wrote, *goals["write"])
    image.unlink()
    return rows


def bench_records(directory: Path, count: int, runs: int) -> list[Row]:
    """Opening a volume whose store has ``count`` records; reading, and for a first served write."""
    image = directory / "records.img"
    make_records(image, count)
    name = f"1 TiB, {count:,} records"
    rows = rows_of("records/list", f"{name}, list", [measured(EXTSNAP, "list", image) for _ in range(runs)], 3, 1024)
    wrote = [first_write(image) for _ in range(2)]
    rows += rows_of("records/write", f"{name}, serve, a first write, end", wrote, 10, 1024)
    image.unlink()
    return rows


#: (seconds, MiB) by command.  The host's ext4 has no files of 16 TiB: 15.9 TiB stands for it.
TERABYTE = {"info": (1, 256), "list": (1, 256), "create": (2, 512), "write": (2, 512)}
SIXTEEN_TERABYTES = {"info": (1, 256), "list": (1, 256), "create": (5, 1024), "write": (5, 1024)}
