"""How cost grows: with the number of snapshots, of records, and with the size of the volume; as rows and as plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_contenders import EXTSNAP, loop, mounted, run
from bench_plot import Panel, svg
from bench_processes import empty_volume, first_write, make_records, measured
from bench_rows import Row
from bench_served import fill

SNAPSHOTS, RECORDS = (1, 10, 100, 1000), (10_000, 100_000, 1_000_000, 10_000_000)
#: The host's ext4 has no files of 16 TiB: 15.9 TiB stands for it.
VOLUMES = {"1 GiB": 1, "16 GiB": 16, "256 GiB": 256, "1 TiB": 1024, "4 TiB": 4096, "15.9 TiB": 16281}
WRITES, READ_MIB = 1024, 32

_SNAPSHOTS = """
import json, random, sys, time
import extsnap
image, points, runs, writes, read_mib = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:6])
rng = random.Random(1)
volume = extsnap.open(image)
fs = volume.filesystem()
_, start, count, *_ = max(fs.file_map(fs.lookup("/file")).data.tolist(), key=lambda run: run[2])
volume.begin_serving()
found = {"create": {}, "first overwrite": {}, "view read": {}, "delete": {}}
content = rng.randbytes(4096)
taken = []

def overwrite(number):
    for block in rng.sample(range(start, start + count), number):
        volume.write(block * 4096, content)
    volume.flush()

def timed(what, point, work, *arguments, **more):
    begin = time.perf_counter()
    work(*arguments, **more)
    found[what].setdefault(point, []).append(time.perf_counter() - begin)

def take():
    taken.append(f"snapshot-{len(taken)}")
    return taken[-1]

for point in points:
    while len(volume.snapshot_names()) < point - 1:
        overwrite(16)
        volume.verb("create", name=take())
    for turn in range(runs + 1):
        overwrite(16)
        timed("create", point, volume.verb, "create", name=take())
        if len(volume.snapshot_names()) != point:
            raise SystemExit(f"{len(volume.snapshot_names())} snapshots at {point}")
        timed("first overwrite", point, overwrite, writes)
        view = volume.open_view(volume.snapshot_names()[0])
        buffer = memoryview(bytearray(1 << 20))
        places = [start * 4096 + number * (1 << 20) for number in range(read_mib)]
        timed("view read", point, lambda: [view.readinto(place, buffer) for place in places])
        view.close()
        middle = volume.snapshot_names()[point // 2]
        timed("delete", point, volume.verb, "delete", names=[middle])
volume.end_serving()
volume.close()
print(json.dumps({what: {point: seconds[1:] for point, seconds in by.items()} for what, by in found.items()}))
"""

#: By series, values by position.
Growth = dict[str, dict[float, list[float]]]


def by_snapshots(directory: Path, points: Sequence[int], runs: int) -> Growth:
    """Seconds of create, of 1,024 first overwrites, of reading 32 MiB of the oldest view, of delete; in one process."""
    image = directory / "snapshots.img"
    run("truncate", "-s", "1G", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", image)
    with loop(image) as device, mounted(device, directory / "growing") as place:
        fill(place / "file", 256 << 20, 1)
    words = [image, json.dumps(list(points)), runs, WRITES, READ_MIB]
    found = json.loads(run(sys.executable, "-c", _SNAPSHOTS, *map(str, words)))
    image.unlink()
    return {what: {float(point): seconds for point, seconds in by.items()} for what, by in found.items()}


def by_records(directory: Path, points: Sequence[int], runs: int) -> tuple[Growth, Growth]:
    """Seconds and MiB of ``list``, and of serving for a first write, by the records of the store."""
    seconds: Growth = {"list": {}, "serve, first write, end": {}}
    memory: Growth = {"list": {}, "serve, first write, end": {}}
    for point in points:
        image = directory / "records.img"
        make_records(image, point)
        found = {
            "list": [measured(EXTSNAP, "list", image) for _ in range(runs + 1)],
            "serve, first write, end": [first_write(image) for _ in range(runs + 1)],
        }
        for name, measures in found.items():
            seconds[name][float(point)] = [one[0] for one in measures[1:]]
            memory[name][float(point)] = [one[1] for one in measures[1:]]
        image.unlink()
    return seconds, memory


def by_size(directory: Path, gibibytes: Sequence[int], runs: int) -> tuple[Growth, Growth]:
    """Seconds and MiB of create, list, and of serving for a first write, by the size of a sparse volume."""
    seconds: Growth = {"create": {}, "list": {}, "serve, first write, end": {}}
    memory: Growth = {name: {} for name in seconds}
    for size in gibibytes:
        image = directory / "size.img"
        empty_volume(image, f"{size}G")
        taken = [measured(EXTSNAP, "create", image, f"snapshot-{number}") for number in range(runs + 1)]
        measured(EXTSNAP, "list", image)
        listed = [measured(EXTSNAP, "list", image) for _ in range(runs)]
        wrote = [first_write(image) for _ in range(max(2, runs // 2))]
        for name, found in zip(seconds, (taken[1:], listed, wrote), strict=True):
            seconds[name][float(size)] = [run[0] for run in found]
            memory[name][float(size)] = [run[1] for run in found]
        image.unlink()
    return seconds, memory


def as_rows(key: str, name: str, unit: str, growth: Growth) -> list[Row]:
    """A row for each point."""
    return [
        Row(f"growth/{key}/{what}/{at:.0f}", f"{what}, {at:,.0f} {name}", unit, values)
        for what, points in growth.items()
        for at, values in points.items()
    ]


def bench_growth(directory: Path, images: Path | None, runs: int, *, quick: bool) -> list[Row]:
    """All of it; the plots go to ``images``."""
    snapshots, records = (SNAPSHOTS[:2], RECORDS[:2]) if quick else (SNAPSHOTS, RECORDS)
    sizes = dict(list(VOLUMES.items())[:2]) if quick else VOLUMES

    def plot(name: str, *panels: Panel) -> None:
        if images is not None:
            images.mkdir(parents=True, exist_ok=True)
            (images / f"growth-{name}.svg").write_text(svg(panels))

    with_snapshots = by_snapshots(directory, snapshots, runs)
    rows = as_rows("snapshots", "snapshots", "s", with_snapshots)
    title = "in one process, by the number of snapshots"
    plot("snapshots", Panel(title, "snapshots", "seconds", with_snapshots))
    seconds, memory = by_records(directory, records, runs)
    rows += as_rows("records", "records", "s", seconds) + as_rows(
        "records/memory", "records, peak memory", "MiB", memory
    )
    for row in rows:
        if row.key == f"growth/records/list/{RECORDS[-1]}":
            row.limit = 3
        if row.key == f"growth/records/memory/list/{RECORDS[-1]}":
            row.limit = 1024
    plot(
        "records",
        Panel("time by records", "records", "seconds", seconds),
        Panel("memory by records", "records", "MiB", memory),
    )
    seconds, memory = by_size(directory, list(sizes.values()), runs)
    rows += as_rows("size", "GiB", "s", seconds) + as_rows("size/memory", "GiB, peak memory", "MiB", memory)
    ticks = {float(size): name for name, size in sizes.items()}
    plot(
        "size",
        Panel("time by size", "size of the (sparse) volume", "seconds", seconds, ticks),
        Panel("memory by size", "size of the (sparse) volume", "MiB", memory, ticks),
    )
    return rows
