"""How long writers stand still for a snapshot, beside a bare freeze and thaw of a raw loop mount (long form only)."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.system

GIBIBYTES = 64
ROUNDS = 9
#: Seconds that a snapshot may take from writers beyond a bare freeze and thaw.
LIMIT = 0.1
ALLOCATED = 12 << 30

# Writes and fsyncs at random places of a file; prints when each began and ended, by the clock of the machine.
_WRITER = """
import os, random, sys, time
rng = random.Random(sys.argv[2])
descriptor = os.open(sys.argv[1], os.O_RDWR)
blocks, data, number = os.fstat(descriptor).st_size // 4096, rng.randbytes(4096), 0
print("ready", flush=True)
longest, since = 0.0, time.monotonic()
while True:
    before = time.monotonic()
    os.pwrite(descriptor, data, rng.randrange(blocks) * 4096)
    number += 1
    if number % 16 == 0:
        os.fdatasync(descriptor)
    now = time.monotonic()
    if now - before > 0.001:
        print(before, now, flush=True)
"""


@contextlib.contextmanager
def writer(path: Path, seed: int) -> Iterator[Callable[[float, float], float]]:
    """Write to a file; gives what tells the longest wait that touched a time."""
    waits: list[tuple[float, float]] = []
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), str(seed)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def longest(start: float, stop: float) -> float:
        process.terminate()
        assert process.stdout is not None
        for line in process.stdout:
            if len(fields := line.split()) == 2 and line.endswith("\n"):  # the last one may be cut off
                waits.append((float(fields[0]), float(fields[1])))
        return max((last - first for first, last in waits if last >= start and first <= stop), default=0.0)

    try:
        yield longest
    finally:
        process.kill()
        process.communicate()


if os.environ.get("EXTSNAP_LONG"):

    @pytest.mark.parametrize("kind", ["ext4", "ext3"])
    def test_writers_wait_no_longer_than_for_a_freeze(kind: str, run_cli: Cli) -> None:
        with arena() as top:
            image = make_volume(top / "disk.img", kind, GIBIBYTES << 10, "-b", "4096", "-E", "lazy_itable_init=1")
            point, raw = top / "ours", top / "raw"
            point.mkdir()
            raw.mkdir()
            plain = oracle.copy_image(image, top / "plain.img")
            run_cli("mount", image, point)
            try:
                subprocess.run(["mount", "-o", "loop", plain, raw], check=True)
                try:
                    ours, bare = _measure(kind, image, point, raw, run_cli)
                finally:
                    subprocess.run(["umount", raw], check=False)
            finally:
                subprocess.run(["umount", point], check=False)
            more = [our - their for our, their in zip(ours, bare, strict=True)]
            print(
                f"stall {kind}, {GIBIBYTES} GiB, ms, median and maximum of {ROUNDS}: snapshot {_tell(ours)}, "
                f"bare freeze {_tell(bare)}, difference {_tell(more)}"
            )
            assert statistics.median(more) <= LIMIT

    def _tell(times: list[float]) -> str:
        return f"{statistics.median(times) * 1e3:.0f} and {max(times) * 1e3:.0f}"

    def _measure(kind: str, image: Path, point: Path, raw: Path, cli: Cli) -> tuple[list[float], list[float]]:
        for path in (point, raw):
            if kind == "ext4":
                for number in range(ALLOCATED >> 30):
                    subprocess.run(["fallocate", "-l", "1G", path / f"large-{number}"], check=True)
            (path / "file").write_bytes(os.urandom(256 << 20))
            subprocess.run(["sync", "-f", path], check=True)
        ours: list[float] = []
        bare: list[float] = []
        for round_ in range(ROUNDS):
            with writer(raw / "file", round_) as longest:
                time.sleep(1)
                start = time.monotonic()
                subprocess.run(["fsfreeze", "--freeze", raw], check=True)
                subprocess.run(["fsfreeze", "--unfreeze", raw], check=True)
                stop = time.monotonic()
                time.sleep(0.5)
                bare.append(longest(start, stop))
            with writer(point / "file", round_) as longest:
                time.sleep(1)
                start = time.monotonic()
                cli("create", image, f"round-{round_}")
                stop = time.monotonic()
                time.sleep(0.5)
                ours.append(longest(start, stop))
        return ours, bare
