"""Readers of ten snapshots during heavy writes, creates and deletes: every read is compared.

A program for each snapshot reads its served file over and over, each in a way of its own: at random offsets, from
beginning to end, through a memory map, past the cache; and one reads the part of ``volume`` that nobody writes.  They
compare with whole copies.  Meanwhile ``volume`` is written in sessions of many writes (4 KiB, 1 MiB, odd pieces,
holes), all of them done to a model as well: an array with the bytes of the volume.  Between two sessions ``volume`` is
the model, and snapshots are taken and deleted.  The delete of a snapshot whose reader reads is refused, and names the
reader; a name that is used again shows the new snapshot.

The copy of a moment is the model: it holds what was written, and for all else what ``volume`` shows then.  At the end
every view is compared whole, the volume with the model, and e2fsck and ``extsnap check`` find nothing.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracle
from arena import make_volume

from campaigns.report import Report
from campaigns.together_place import ENDS_WITHIN, STALL, Pauses, Place, punch

VIEWS = 10
WAYS = ("random", "sequential", "map", "direct")
_ROUNDS = 4
_MEBIBYTES = 48
_BURST = 0.5  # seconds of writing in a session
_WRITTEN_BYTES, _STILL_BYTES = 5 << 18, 2 << 20
_CHUNK = 1 << 20
_METADATA_BLOCKS = 200  # that a create may change: superblocks, descriptors, bitmaps, the store's inode and map

# Reads a file, compares it with a copy where the mask has ones (a byte for each block), and prints how many reads
# were the same and the longest one in seconds when its input ends; ends with a line about the first that was not.
_READER = """
import mmap, os, random, select, sys, time
path, copy, mask, way, block, seed = sys.argv[1:]
block, rng = int(block), random.Random(int(seed))
file = os.open(path, os.O_RDONLY | (os.O_DIRECT if way == "direct" else 0))
right, judged = open(copy, "rb").read(), open(mask, "rb").read()
size = os.fstat(file).st_size
if size != len(right):
    sys.exit(f"{path} has {size} bytes, not {len(right)}")
whole = mmap.mmap(file, size, prot=mmap.PROT_READ) if way == "map" else None
pages = mmap.mmap(-1, 1 << 20)
used = [at for at in range(0, size, block) if judged[at // block]]
longest, count, at = 0.0, 0, 0
print("reading", flush=True)
while not select.select([0], [], [], 0)[0]:
    if way == "sequential":
        length = min(1 << 20, size - at)
    elif way == "direct":
        length = min(4096 * rng.choice((1, 1, 4, 32, 256)), size - size % 4096)
        at = min(rng.choice(used) // 4096 * 4096, size - length)
    else:
        length = rng.choice((1, 100, 4096, 70000))
        at = max(0, min(rng.choice(used) + rng.randrange(-2000, 2000), size - length))
    before = time.monotonic()
    if whole is not None:
        found = whole[at : at + length]
    elif way == "direct":
        got = os.preadv(file, [memoryview(pages)[:length]], at)
        found = pages[:got]
    else:
        found = os.pread(file, length, at)
    longest, count = max(longest, time.monotonic() - before), count + 1
    if len(found) != length:
        sys.exit(f"{len(found)} of {length} bytes at {at} of {path}")
    if found != right[at : at + length]:
        for place in range(at // block * block, at + length, block):
            low, high = max(place, at), min(place + block, at + length)
            if judged[place // block] and found[low - at : high - at] != right[low:high]:
                sys.exit(f"{way} read of {length} bytes at {at} of {path}: block {place // block} is not as it was")
    at += length
    if at >= size:
        at = 0
    if count % 4 == 0:  # eleven of these must leave something of the machine to the server
        time.sleep(0.02)
print(count, longest)
"""


@dataclass
class _Reader:
    """A program that reads one file."""

    path: Path
    process: subprocess.Popen[str]

    def failed(self) -> str:
        """What it found wrong by now; empty if nothing."""
        if self.process.poll() is None:
            return ""
        return self.process.communicate()[1].strip() or f"the reader of {self.path} ended"

    def end(self) -> tuple[int, float]:
        """Let it end; returns how many reads it has compared, and the longest one in seconds.

        Raises:
            AssertionError: Something was not as it should be.
        """
        try:
            out, err = self.process.communicate("", timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a read of {self.path} has not ended after {ENDS_WITHIN:.0f} s") from None
        assert self.process.returncode == 0, err.strip()
        count, longest = out.split()[-2:]
        return int(count), float(longest)

    def kill(self) -> None:
        """End it in any case."""
        self.process.kill()
        self.process.communicate()


def prepare(place: Place) -> None:
    """Make a volume for each size of blocks; its files say where may be written."""
    rng = random.Random("together readers")
    for block in (1024, 4096):
        files = {"written": rng.randbytes(_WRITTEN_BYTES), "still": rng.randbytes(_STILL_BYTES)}
        options = ("-b", str(block))
        place.shared[str(block)] = make_volume(place.top / f"{block}.img", "ext4", _MEBIBYTES, *options, files=files)


def case(report: Report, token: str, number: int, place: Place) -> None:
    """Try one."""
    block = (4096, 1024)[number % 2]
    top = place.top / f"case-{number}"
    with report.case(token, f"blocks of {block}"):
        top.mkdir()
        (top / "served").mkdir()
        image = oracle.copy_image(place.shared[str(block)], top / "disk.img")
        one = _Case(place, top, image, block, random.Random(number))
        try:
            one.run()
        except BaseException:
            one.kill()
            place.clear()
            raise
        finally:
            shutil.rmtree(top, ignore_errors=True)
        report.seen["reads compared"] += one.compared


class _Case:
    def __init__(self, place: Place, top: Path, image: Path, block: int, rng: random.Random) -> None:
        self.place, self.top, self.image, self.block, self.rng = place, top, image, block, rng
        self.volume = top / "served" / "volume"
        self.written = self._ranges("/written")
        self.readers: dict[str, _Reader] = {}
        self.still: _Reader | None = None
        self.model = bytearray()
        self.compared = 0
        self.number = 0
        self.longest = 0.0

    def _ranges(self, path: str) -> list[tuple[int, int]]:
        rows = oracle.file_blocks(self.image, path).data.tolist()
        return [(start * self.block, count * self.block) for _, start, count in rows]

    def run(self) -> None:
        with Pauses() as pauses:
            still = self._ranges("/still")
            self.place.extsnap("attach", self.image, self.top / "served")
            self.model = bytearray(self.volume.read_bytes())
            self._read_still(still)
            for _ in range(VIEWS):
                self._write(0.1)
                self._create(f"view-{self.number}")
                self._assert_readers_content()
            for _ in range(_ROUNDS):
                self._write(_BURST)
                self._exchange()
                self._assert_readers_content()
            assert self.still is not None
            for reader in (*self.readers.values(), self.still):
                self._note(*reader.end())
            assert self.longest < STALL + pauses.longest, f"a read or write took {self.longest:.2f} s"
            assert self.compared > 10 * VIEWS, "hardly anything was read"
        self._at_the_end()

    def kill(self) -> None:
        """End all readers."""
        for reader in (*self.readers.values(), *([self.still] if self.still else [])):
            reader.kill()

    def _note(self, count: int, longest: float) -> None:
        self.compared += count
        self.longest = max(self.longest, longest)

    def _timed(self, began: float) -> None:
        self.longest = max(self.longest, time.monotonic() - began)

    # -- writing

    def _write(self, seconds: float) -> None:
        """Write for a while, and see that the volume is the model before it is closed and after."""
        rng, over = self.rng, time.monotonic() + seconds
        served = os.open(self.volume, os.O_RDWR)
        try:
            while time.monotonic() < over:
                start, length = rng.choice(self.written)
                size = min(rng.choice((4096, 4096, 4096, 4096, self.block, _CHUNK, 5000, 700)), length)
                at = start + rng.randrange(length - size + 1)
                if size in (4096, _CHUNK) and rng.random() < 0.9:
                    at = start + (at - start) // self.block * self.block
                began = time.monotonic()
                if rng.random() < 0.1:
                    punch(served, at, size)
                    self.model[at : at + size] = bytes(size)
                else:
                    data = rng.randbytes(size)
                    assert os.pwrite(served, data, at) == size
                    self.model[at : at + size] = data
                if rng.random() < 0.02:
                    os.fsync(served)
                self._timed(began)
                if rng.random() < 0.05:
                    self._assert_volume(served)
            os.fsync(served)
        finally:
            os.close(served)
        with open(self.volume, "rb", buffering=0) as again:
            self._assert_volume(again.fileno())

    def _assert_volume(self, served: int) -> None:
        """A random piece of what is written is the model's."""
        start, length = self.rng.choice(self.written)
        size = min(length, 65536)
        at = start + self.rng.randrange(length - size + 1)
        assert os.pread(served, size, at) == self.model[at : at + size], f"bytes {at} on of volume are not the model's"
        self.compared += 1

    # -- snapshots

    def _create(self, name: str) -> None:
        """Take a snapshot while nobody writes, with the copy of this moment, and start its reader."""
        before = self.volume.read_bytes()
        self.place.extsnap("create", self.image, name)
        shown = self.volume.read_bytes()
        content = bytearray(shown)
        for start, length in self.written:
            content[start : start + length] = self.model[start : start + length]
        assert bytes(content) == shown, f"{name}: volume is not the model"
        # Before and after the moment extsnap itself may have given the store more room or less: of the few blocks of
        # metadata that this changed, the view says what they were, e2fsck that they are right; they must stay so.
        view = self.top / "served" / "snapshots" / name
        with view.open("rb", buffering=0) as file:
            for at in self._differences(before, shown):
                content[at : at + self.block] = os.pread(file.fileno(), self.block, at)
        copy, judged = self.top / f"{name}.copy", self.top / f"{name}.mask"
        copy.write_bytes(content)
        oracle.assert_clean(view)
        volume = oracle.volume_facts(copy)
        mask = oracle.preserved_blocks(copy)
        mask[volume.superblocks] = False  # compared at the end, without what is extsnap's
        judged.write_bytes(mask.astype(np.uint8).tobytes())
        self.readers[name] = self._reader(view, copy, judged)
        self.number += 1

    def _differences(self, before: bytes, after: bytes) -> list[int]:
        """Offsets of the blocks in which two contents of the volume differ; what the case writes is none of them."""
        pair = [np.frombuffer(side, np.uint64).reshape(-1, self.block // 8) for side in (before, after)]
        found: list[int] = (np.flatnonzero((pair[0] != pair[1]).any(axis=1)) * self.block).tolist()
        ours = [at for at in found if any(start <= at < start + length for start, length in self.written)]
        assert not ours, f"a create changed what is written: {ours[:5]}"
        assert len(found) < _METADATA_BLOCKS, f"a create changed {len(found)} blocks"
        return found

    def _reader(self, path: Path, copy: Path, mask: Path, way: str = "") -> _Reader:
        way = way or WAYS[self.number % len(WAYS)]
        seed = str(self.rng.getrandbits(32))
        process = subprocess.Popen(
            [sys.executable, "-c", _READER, str(path), str(copy), str(mask), way, str(self.block), seed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        reader = _Reader(path, process)
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], ENDS_WITHIN)
        if not ready or process.stdout.readline() != "reading\n":
            raise AssertionError(reader.failed() or f"no reader of {path}")
        return reader

    def _read_still(self, ranges: list[tuple[int, int]]) -> None:
        copy, judged = self.top / "still.copy", self.top / "still.mask"
        copy.write_bytes(self.model)
        mask = np.zeros(-(-len(self.model) // self.block), np.uint8)
        for start, length in ranges:
            mask[start // self.block : (start + length) // self.block] = 1
        judged.write_bytes(mask.tobytes())
        self.still = self._reader(self.volume, copy, judged, "random")

    def _exchange(self) -> None:
        """Delete a snapshot, which its reader has to let go of first; take another one, at times of the same name."""
        name = self.rng.choice(sorted(self.readers))
        reader = self.readers[name]
        refused = self.place.extsnap("delete", self.image, name, ok=False)
        wrong = reader.failed()
        assert not wrong, wrong
        assert refused.status == 1, str(refused)
        assert re.search(rf"pid {reader.process.pid}\b", refused.err), f"the reader is not named: {refused}"
        self._note(*self.readers.pop(name).end())
        self.place.extsnap("delete", self.image, name)
        # Not by its name: that would make the kernel forget the file, pages and all, before the name is used again.
        assert name not in os.listdir(self.top / "served" / "snapshots")
        self._create(name if self.rng.random() < 0.5 else f"view-{self.number + VIEWS}")

    def _assert_readers_content(self) -> None:
        for reader in (*self.readers.values(), *([self.still] if self.still else [])):
            wrong = reader.failed()
            assert not wrong, wrong

    # -- the end

    def _at_the_end(self) -> None:
        shown = self.volume.read_bytes()
        for start, length in self.written:
            assert shown[start : start + length] == self.model[start : start + length], "volume is not the model"
        for name in self.readers:
            view = self.top / "served" / "snapshots" / name
            oracle.assert_view_is_copy(view, self.top / f"{name}.copy")
            oracle.assert_clean(view)
        self.place.extsnap("detach", self.image)
        oracle.assert_clean(self.image)
        whole = self.image.read_bytes()
        for start, length in self.written:
            assert whole[start : start + length] == self.model[start : start + length], "the image is not the model"
        checked = json.loads(self.place.extsnap("check", "--json", "--quick", self.image).out)
        assert checked["ok"], checked
        self.place.assert_nothing_left()
