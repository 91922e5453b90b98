"""A flush means durable: barriers are counted where they arrive, at the block device that the volume lies on.

The image is a loop device, whose ``stat`` has the flush requests that the block layer completed.  Whatever extsnap,
FUSE and the kernel above say of a barrier, that number is what a disk would have seen.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
from arena import arena
from hosts import loop

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
BLOCK = 4096
BLOCKS = 512


class Medium:
    """A block device that counts the barriers that it was given."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._stat = Path("/sys/block") / Path(device).name / "stat"

    @property
    def barriers(self) -> int:
        """Flush requests so far (the 16th number of ``stat``)."""
        return int(self._stat.read_text().split()[15])

    @property
    def sectors_written(self) -> int:
        """So far."""
        return int(self._stat.read_text().split()[6])


@pytest.fixture
def medium(run_cli: Cli) -> Iterator[tuple[Medium, Path]]:
    """A block device with a filesystem that has a file of 512 blocks and a snapshot; a directory to serve it in."""
    with arena() as top:
        image = top / "disk.img"
        content = top / "content"
        content.mkdir()
        (content / "file").write_bytes(random.Random(1).randbytes(BLOCKS * BLOCK))
        options = ["-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-O", "^has_journal", "-d", str(content)]
        subprocess.run(["mke2fs", *options, str(image), "64M"], check=True)
        (top / "served").mkdir()
        with loop(image) as device:
            run_cli("create", device, "one")
            yield Medium(device), top / "served"


@pytest.mark.system
def test_barriers_of_writes_and_flushes(run_cli: Cli, medium: tuple[Medium, Path]) -> None:
    """One for a flush; two where something was copied first; none for what nobody wants to be durable yet."""
    disk, served = medium
    places = [int(block) * BLOCK for block in oracle.file_blocks(disk.device, "/file").data_blocks]
    data = random.Random(2).randbytes(BLOCK)
    run_cli("attach", disk.device, served)
    try:
        handle = os.open(served / "volume", os.O_WRONLY)
        try:
            os.fsync(handle)

            def barriers_of(blocks: list[int], *, flush: bool = True) -> int:
                before = disk.barriers
                for place in blocks:
                    os.pwrite(handle, data, place)
                if flush:
                    os.fsync(handle)
                return disk.barriers - before

            assert barriers_of(places[:1]) == 2, "a first overwrite: copy and record, barrier, overwrite, barrier"
            assert barriers_of(places[1:257]) == 2, "256 first overwrites are one batch"
            written = disk.sectors_written
            assert barriers_of(places[:1]) == 1, "a flush that follows a plain write"
            assert disk.sectors_written - written >= BLOCK // 512, "the write itself reached the medium before it"
            assert barriers_of(places[:257]) == 1
            assert barriers_of([]) == 1, "an fsync is one, whoever wrote before it"
            assert barriers_of(places[257:], flush=False) == 0, "no flush was asked for"
            before = disk.barriers
        finally:
            os.close(handle)
        assert disk.barriers - before >= 2, "closing flushes what was held"
    finally:
        run_cli("detach", disk.device)


@pytest.mark.system
def test_an_fsync_in_a_mounted_filesystem_reaches_the_medium(run_cli: Cli, medium: tuple[Medium, Path]) -> None:
    """Through ext4, a loop device with direct I/O, FUSE and the engine."""
    disk, place = medium
    run_cli("mount", disk.device, place)
    try:
        handle = os.open(place / "file", os.O_RDWR)
        try:
            os.fsync(handle)
            for round_ in range(3):
                barriers, sectors = disk.barriers, disk.sectors_written
                os.pwrite(handle, random.Random(round_).randbytes(BLOCK), 7 * BLOCK)
                os.fsync(handle)
                assert disk.barriers - barriers >= 1 + (round_ == 0), "fsync came back before a barrier"
                assert disk.sectors_written - sectors >= BLOCK // 512, "and before the data"
        finally:
            os.close(handle)
    finally:
        run_cli("umount", place)
