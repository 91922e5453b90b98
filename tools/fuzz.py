"""Fuzz the parsers, opened volumes, FUSE and control messages with atheris, guided by coverage.

    tools/fuzz volume --seconds 600

A target is a function of a byte string (`tests/hostile.py`); only ExtsnapError and OSError may come out of what it
calls.  What is stored in ``tests/fixtures/fuzz/TARGET`` is replayed first.  What crashes is written there: name the
file after what is wrong, and it is a regression test (`tests/unit/test_hostile.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]


def main() -> None:
    """Run one target until the time is over or something crashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="one of the names in tests/hostile.py's TARGETS")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        import atheris
    except ModuleNotFoundError:
        sys.exit("tools/fuzz: atheris is not there: pip install '.[fuzz]'")
    with atheris.instrument_imports(include=["extsnap"]):
        import hostile
    if options.target not in hostile.TARGETS:
        parser.error(f"there is no target {options.target!r}: {', '.join(hostile.TARGETS)}")
    run = hostile.TARGETS[options.target]
    hostile.image()  # made once, outside of the time that an input may take
    found = ROOT / "tests" / "fixtures" / "fuzz" / options.target
    with tempfile.TemporaryDirectory(prefix="extsnap-fuzz-") as corpus:
        stored = [path.read_bytes() for path in hostile.stored() if path.parent.name == options.target]
        for data in [*hostile.seeds(options.target), *stored]:
            (Path(corpus) / hashlib.sha1(data).hexdigest()).write_bytes(data)
        found.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-max_len=4096", "-timeout=10"]
        memory = ["-rss_limit_mb=1024", f"-artifact_prefix={found}/", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *limits, *memory, corpus], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
