"""Writes to a mounted volume until that fails, and logs outside of it what must be there afterwards.

A program of its own: ``python kills_load.py DIRECTORY LOG NAME SEED SECONDS [keep]``.  In ``DIRECTORY/NAME``, a
file of stamped sectors, it overwrites; beside it, it makes and removes files; with ``keep`` it removes none.

Lines of the log:

* ``w FIRST COUNT VERSION``: these sectors are about to be written
* ``f VERSION``: everything written up to that version was fsynced
* ``file NAME SIZE SHA256``: this file and its directory were fsynced
* ``made NAME SIZE SHA256``: this file was written, and not fsynced
* ``drop NAME``: this file is about to go
* ``all``: the time was over, and everything was written, but nothing is said of its being on the medium
* ``error ERRNO``: the end
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import sys
import time
from pathlib import Path

SECTOR = 512
SECTORS = 6144
MOST_FILES = 40
_STAMP = struct.Struct("<QQ")


def stamped(first: int, count: int, version: int) -> bytes:
    """The content of sectors: each says which it is, and in which version."""
    return b"".join(_STAMP.pack(index, version) * (SECTOR // _STAMP.size) for index in range(first, first + count))


def stamps(content: bytes) -> list[int | None]:
    """The version of each sector; None where one is torn or of somewhere else."""
    found: list[int | None] = []
    for index in range(len(content) // SECTOR):
        sector = content[index * SECTOR : (index + 1) * SECTOR]
        which, version = _STAMP.unpack_from(sector)
        found.append(
            version if which == index and sector == _STAMP.pack(which, version) * (len(sector) // 16) else None
        )
    return found


def missing(directory: Path, log: Path, name: str) -> list[str]:
    """What a volume should have by a load's log, and has not, in words."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    everything = ["all"] in lines
    allowed: list[set[int]] = [{0} for _ in range(SECTORS)]
    held: list[int] = [0] * SECTORS
    last = [0] * SECTORS
    files: dict[str, tuple[int, str]] = {}
    made: dict[str, tuple[int, str]] = {}
    for kind, *words in lines:
        if kind == "w":
            first, count, version = map(int, words)
            for index in range(first, first + count):
                allowed[index].add(version)
                last[index] = version
        elif kind == "f":
            held = [version if version <= int(words[0]) else old for version, old in zip(last, held, strict=True)]
        elif kind in ("file", "made"):
            (files if kind == "file" else made)[words[0]] = int(words[1]), words[2]
        elif kind == "drop":
            files.pop(words[0], None)
            made.pop(words[0], None)
    if everything:
        held, files = last, files | made
    wrong = []
    for index, found in enumerate(stamps((directory / name).read_bytes())):
        if found is None or found not in allowed[index] or found < held[index]:
            wrong.append(f"sector {index} of {name} has version {found}, not {held[index]}")
    for file, (size, digest) in files.items():
        try:
            content = (directory / file).read_bytes()
        except OSError as error:
            wrong.append(f"{file}: {error.strerror}")
            continue
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            wrong.append(f"{file} has {len(content)} bytes that are not the {size} fsynced ones")
    return wrong


class Load:
    """One writer."""

    def __init__(self, directory: str, log: str, name: str, seed: int, keep: bool) -> None:
        self.keep = keep
        self.rng = random.Random(seed)
        self.top = directory
        self.name = name
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.big = os.open(os.path.join(directory, name), os.O_RDWR)
        self.directory = os.open(directory, os.O_RDONLY)
        self.version = max(version or 0 for version in stamps(Path(directory, name).read_bytes()))
        self.files: list[str] = []
        self.number = 0

    def say(self, *words: object) -> None:
        os.write(self.log, (" ".join(map(str, words)) + "\n").encode())

    def overwrite(self) -> None:
        count = self.rng.randrange(1, 65)
        first = self.rng.randrange(SECTORS - count)
        self.version += 1
        self.say("w", first, count, self.version)
        os.pwrite(self.big, stamped(first, count, self.version), first * SECTOR)

    def fsync(self) -> None:
        os.fsync(self.big)
        self.say("f", self.version)

    def make(self) -> None:
        if len(self.files) >= MOST_FILES:
            self.remove()
            if self.keep:
                return
        self.number += 1
        name = f"{self.name}-{self.number}"
        content = self.rng.randbytes(self.rng.randrange(30000))
        said = name, len(content), hashlib.sha256(content).hexdigest()
        durable = self.rng.random() < 0.5
        with open(os.path.join(self.top, name), "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            os.fsync(self.directory)
        self.files.append(name)
        self.say("file" if durable else "made", *said)

    def remove(self) -> None:
        if self.files and not self.keep:
            name = self.files.pop(self.rng.randrange(len(self.files)))
            self.say("drop", name)
            os.unlink(os.path.join(self.top, name))

    def step(self) -> None:
        kinds = (self.overwrite, self.fsync, self.make, self.remove)
        self.rng.choices(kinds, (50, 15, 25, 10))[0]()


def main(directory: str, log: str, name: str, seed: str, seconds: str, keep: str = "") -> int:
    """Write until it fails or the time is over; that it failed is no error."""
    load = Load(directory, log, name, int(seed), keep == "keep")
    deadline = time.monotonic() + float(seconds)
    try:
        while time.monotonic() < deadline:
            load.step()
    except OSError as error:
        load.say("error", error.errno)
        return 0
    load.say("all")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
