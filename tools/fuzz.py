"""Fuzz the parsers, opened volumes, FUSE and control messages with atheris, guided by coverage.

    tools/fuzz volume --seconds 600
    tools/fuzz all --seconds 3600

A target is a function of a byte string (`tests/hostile.py`); only ExtsnapError and OSError may come out of what it
calls.  It begins with ``tests/fixtures/seeds/TARGET`` and ``tests/fixtures/fuzz/TARGET``.  What crashes is written to
the latter: name the file after what is wrong, and it is a regression test (`tests/unit/test_hostile.py`).  ``all``
gives each target an equal share of the time, goes on behind a crash with another seed, and prints one line of figures
for each.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
FOUND = ROOT / "tests" / "fixtures" / "fuzz"
TARGETS = ("volume", "commands", "parsers", "log", "fuse", "control")
#: As libFuzzer names what it found.
FINDINGS = ("crash-", "timeout-", "oom-", "leak-", "slow-unit-")
#: The last line of progress, and the number of runs.
_PROGRESS = re.compile(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


def fuzz(target: str, seconds: int, seed: int, corpus: Path) -> None:
    """Run one target in this process until the time is over or something crashes; does not return."""
    try:
        import atheris
    except ModuleNotFoundError:
        sys.exit("tools/fuzz: atheris is not there: pip install '.[fuzz]'")
    with atheris.instrument_imports(include=["extsnap"]):
        import hostile
    hostile.image()  # made once, outside of the time that an input may take
    found = FOUND / target
    stored = [path for path in hostile.stored() if path.parent.name == target]
    # What is not corrected yet would end every run at its beginning.
    known = [path for path in stored if not path.name.startswith(FINDINGS)]
    for path in [*hostile.seeds(target), *known]:
        data = path.read_bytes()
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    found.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=4096", "-timeout=10", "-report_slow_units=5"]
    # The instrumented process grows by itself; what an input may take is limited by `bounded`.
    memory = ["-rss_limit_mb=4096", f"-artifact_prefix={found}/", "-print_final_stats=1"]

    def within_limits(data: bytes) -> None:
        with hostile.bounded():
            hostile.TARGETS[target](data)

    atheris.Setup([sys.argv[0], *limits, *memory, str(corpus)], within_limits)
    atheris.Fuzz()


def series(target: str, seconds: float, seed: int) -> str:
    """Run one target for so long, again after each crash; the figures of it."""
    begun = time.monotonic()
    executed = coverage = features = kept = 0
    before = {path.name for path in (FOUND / target).glob("*")}
    with tempfile.TemporaryDirectory(prefix="extsnap-fuzz-") as corpus:
        while (left := int(seconds - (time.monotonic() - begun))) > 0:
            command = [sys.executable, __file__, target, f"--seconds={left}", f"--seed={seed}", f"--corpus={corpus}"]
            run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace")
            progress = _PROGRESS.findall(run.stderr)
            if not progress:
                sys.exit(f"tools/fuzz: {target} did not run:\n{run.stderr[-4000:]}")
            executed += int(progress[-1][0])
            last = [int(number) for number in progress[-1][1:]]
            coverage, features, kept = max(coverage, last[0]), max(features, last[1]), max(kept, last[2])
            if run.returncode:
                print(run.stderr[-6000:], file=sys.stderr, flush=True)
            seed += 1
        new = sorted({path.name for path in (FOUND / target).glob("*")} - before)
    taken = time.monotonic() - begun
    return (
        f"{target}: {taken:.0f} s, {executed} executions, corpus {kept}, coverage {coverage} edges, "
        f"{features} features, {len(new)} findings {' '.join(new)}".rstrip()
    )


def main() -> None:
    """Run one target, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="a directory to keep what was interesting in")
    options = parser.parse_args()
    if options.target == "all":
        for target in TARGETS:
            print(series(target, options.seconds / len(TARGETS), options.seed), flush=True)
    elif options.corpus:
        fuzz(options.target, options.seconds, options.seed, options.corpus)
    else:
        with tempfile.TemporaryDirectory(prefix="extsnap-fuzz-") as corpus:
            fuzz(options.target, options.seconds, options.seed, Path(corpus))


if __name__ == "__main__":
    main()
