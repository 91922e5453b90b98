"""Benchmarks of extsnap: the data path against a raw loop device and a qcow2, commands, start-up, and how cost grows.

Every row says what was measured, the median with minimum and maximum, the goal, and whether it was met.  What is
compared is measured in pairs in one run, in rotating order, because machines are noisy: the ratio of each pair counts,
not single times, and more is better.  Needs root and loop devices for the data path, and qemu-storage-daemon and
qemu-img for the peer; rows that cannot be measured are left out, with a line that says so.

    tools/bench --json new.json --compare old.json     everything, about half an hour
    tools/bench --json new.json --docs                 the same, into docs/PERFORMANCE.md
    tools/bench --only loop --only mounted             the data path
    tools/bench --quick                                everything in small: shows that it runs, measures nothing
"""

from __future__ import annotations

import argparse
import compileall
import sys
import tempfile
from pathlib import Path

import bench_processes as processes
import bench_served as served
from bench_contenders import ROOT, Setting, why_no_peer
from bench_growth import bench_growth
from bench_rows import Row, compare, from_json, machine, markdown, put_between, table, to_json

SECTIONS = ("start", "loop", "mounted", "view", "tree", "verbs", "open", "open16", "records", "create", "growth")
MOUNTING = ("loop", "mounted", "view", "tree", "verbs", "create", "growth")


def section(name: str, directory: Path, options: argparse.Namespace, peer: bool) -> list[Row]:
    """The rows of one section."""
    sizes = served.QUICK if options.quick else served.FULL
    runs, seed = sizes.runs, options.seed
    setting = Setting(peer, options.direct_io, options.sparse, seed)
    if name == "start":
        return processes.bench_start(directory, runs)
    if name in ("loop", "mounted"):
        return served.bench_data(directory, sizes, name, setting)
    if name == "view":
        return served.bench_view(directory, sizes, setting)
    if name == "tree":
        return served.bench_tree(directory, sizes, setting)
    if name == "verbs":
        return served.bench_verbs(directory, sizes, setting)
    if name == "open":
        return processes.bench_open(directory, "1 TiB", "1T", processes.TERABYTE, runs)
    if name == "open16":
        return processes.bench_open(directory, "15.9 TiB", "16281G", processes.SIXTEEN_TERABYTES, min(runs, 3))
    if name == "records":
        return processes.bench_records(directory, 10_000 if options.quick else options.records, min(runs, 3))
    if name == "create":
        return processes.bench_create(directory, 12 if options.quick else options.creates, seed)
    return bench_growth(directory, options.plots, runs, quick=options.quick)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to FILE")
    parser.add_argument("--compare", metavar="OLD", type=Path, help="hold the rows against an older run's JSON")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="one section; may be given again")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, few runs: whether it runs; goals do not count"
    )
    parser.add_argument("--plots", metavar="DIR", type=Path, help="write the growth plots there (docs: docs/img)")
    parser.add_argument("--docs", action="store_true", help="put table and plots into docs/PERFORMANCE.md and docs/img")
    parser.add_argument("--no-peer", action="store_true", help="leave qcow2 out: it takes most of the time")
    parser.add_argument("--direct-io", action="store_true", help="direct I/O for the loop devices of raw and qcow2 too")
    parser.add_argument("--sparse", action="store_true", help="images with holes where nothing was written yet")
    parser.add_argument("--directory", metavar="DIR", type=Path, help="where the images go (40 GiB; TMPDIR)")
    parser.add_argument("--creates", type=int, default=100, help="snapshots of the section create")
    parser.add_argument("--records", type=int, default=10_000_000, help="records of the section records")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.docs:
        options.plots = options.plots or ROOT / "docs" / "img"
    old = from_json(options.compare.read_text()) if options.compare else []
    left_out = "left out" if options.no_peer else why_no_peer()
    unserved = served.why_not_served()
    compileall.compile_dir(str(ROOT / "extsnap"), quiet=1)  # as an installed package is
    before, rows, notes = machine(), [], []
    wanted = [name for name in SECTIONS if not options.only or name in options.only]
    if left_out and not unserved:
        notes.append(f"rows against qcow2 are left out: {left_out}")
    with tempfile.TemporaryDirectory(prefix="extsnap-bench-", dir=options.directory) as top:
        for name in wanted:
            if name in MOUNTING and unserved:
                notes.append(f"{name}: left out: {unserved}")
                continue
            print(f"bench: {name}", file=sys.stderr, flush=True)
            with served.clean_directory(Path(top), name) as directory:
                rows += section(name, directory, options, not left_out)
    print(table(rows))
    for note in notes:
        print(note)
    if old:
        print("\n" + compare(old, rows))
    if options.docs:
        document = ROOT / "docs" / "PERFORMANCE.md"
        where = f"{before['cores']} cores, {before['processor']}, Linux {before['kernel']}, Python {before['python']}"
        load = f"load {before['load'][0]:.1f} before, {machine()['load'][0]:.1f} after"
        text = "\n\n".join([f"{where}; {load}.", markdown(rows), *notes])
        document.write_text(put_between(document.read_text(), "tools/bench", text))
    if options.json:
        chosen = {"direct_io": options.direct_io, "sparse": options.sparse, "seed": options.seed}
        about = {"machine": before, "load_after": machine()["load"], "quick": options.quick, "notes": notes, **chosen}
        options.json.write_text(to_json(rows, about))
    return 0 if options.quick or all(row.met is not False for row in rows) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
