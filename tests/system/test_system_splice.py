"""Large reads of a served volume while it is written: what is sent from the image, and what must not be."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
MIB = 1 << 20
BLOCK = 4096


def read_by_the_server(top: Path) -> int:
    """Bytes that a server of an image below ``top`` has read into its memory."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if any(os.readlink(entry).startswith(f"{top}/image") for entry in (process / "fd").iterdir()):
                    return int(re.search(r"rchar: (\d+)", (process / "io").read_text())[1])  # type: ignore[index]
            except OSError:
                continue
    raise AssertionError("nobody serves the image")


@contextlib.contextmanager
def attached(top: Path, run_cli: Cli, kind: str, megabytes: int, file: bytes) -> Iterator[tuple[Path, Path, int]]:
    """The image with a snapshot, ``volume``, and that opened for direct I/O."""
    image = make_volume(top / "image", kind, megabytes, "-b", "4096", files={"data": file})
    run_cli("create", image, "one")
    served = top / "served"
    served.mkdir()
    run_cli("attach", image, served)
    try:
        handle = os.open(served / "volume", os.O_RDWR | os.O_DIRECT)
        try:
            yield image, served / "volume", handle
        finally:
            os.close(handle)
    finally:
        run_cli("detach", image)


@pytest.mark.system
@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_large_reads_between_writes(kind: str, run_cli: Cli) -> None:
    """Direct reads of a mebibyte at a time show every write before, durable or not, and zeros for the store."""
    rng = random.Random(kind)
    with arena() as top:
        file = rng.randbytes(24 * MIB)
        blocks = {file[at : at + BLOCK] for at in range(0, len(file), BLOCK)}
        with attached(top, run_cli, kind, 96, file) as (_, volume, handle):
            expected = bytearray(volume.read_bytes())
            buffer, block = mmap.mmap(-1, MIB), mmap.mmap(-1, BLOCK)
            before, amount = read_by_the_server(top), 0
            places = [at for at in range(0, len(expected), BLOCK) if bytes(expected[at : at + BLOCK]) in blocks]
            for turn in range(100):
                place, content = rng.choice(places), rng.randbytes(BLOCK)
                block[:] = content
                os.pwrite(handle, block, place)
                expected[place : place + BLOCK] = content
                if turn % 10 == 9:
                    os.fsync(handle)
                start = min(place, len(expected) - MIB) if turn % 2 else rng.randrange(95) * MIB
                assert os.preadv(handle, [buffer], start) == MIB
                assert buffer[:] == expected[start : start + MIB], f"turn {turn}, at {start}"
                amount += MIB
            assert read_by_the_server(top) - before < amount * 3 // 4, "nothing was sent from the image"


@pytest.mark.system
def test_a_write_reaches_the_image_in_a_quiet_moment(run_cli: Cli) -> None:
    """Nobody asks for it to be durable: the image has it soon all the same, so a kill does not take it along."""
    rng = random.Random(7)
    with arena() as top:
        file = rng.randbytes(MIB)
        with attached(top, run_cli, "ext4", 64, file) as (image, volume, handle):
            place = volume.read_bytes().index(file[: 2 * BLOCK])
            block = mmap.mmap(-1, BLOCK)
            block[:] = content = rng.randbytes(BLOCK)
            os.pwrite(handle, block, place)
            with image.open("rb") as below:
                assert os.pread(below.fileno(), BLOCK, place) == file[:BLOCK], "it waits for its copy"
                deadline = time.monotonic() + 20
                while os.pread(below.fileno(), BLOCK, place) != content:
                    assert time.monotonic() < deadline, "it is held for ever"
                    time.sleep(0.1)
