"""Ten minutes of load on a mounted volume while snapshots come and go (long form only).

fio writes and verifies its own files; an exerciser in the manner of fsx changes one file at random places and makes,
renames, truncates and removes many others, and knows what must be in them.  At every snapshot it stands still and what
it knows is kept: the view must show just that, and be clean.

``EXTSNAP_STRESS_SECONDS`` is how long it takes for each filesystem, ``EXTSNAP_SEED`` where chance comes from.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.system

SECONDS = float(os.environ.get("EXTSNAP_STRESS_SECONDS", "600"))
MEBIBYTES = 4096  # with room for copies of all that is written, for every snapshot that lives
LARGEST = 4 << 20
FILES = 200
SNAPSHOTS = 6
_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_FIO = """
[global]
directory={directory}
verify=crc32c
verify_fatal=1
verify_backlog=256
time_based=1
runtime={seconds}
randseed={seed}
[random]
rw=randwrite
bsrange=4k-64k
size=96m
fsync=64
[direct]
rw=randwrite
bs=4k
size=32m
direct=1
[stream]
rw=write
bs=1m
size=64m
rate=8m
"""
_libc = ctypes.CDLL(None, use_errno=True)


def punch(descriptor: int, offset: int, length: int) -> None:
    assert _libc.fallocate(descriptor, _PUNCH, ctypes.c_long(offset), ctypes.c_long(length)) == 0


class Exerciser(threading.Thread):
    """Changes a directory at random, and knows what is in it.

    Attributes:
        known: Digests by name.
        lock: Hold it to have it stand still.
        fault: What was not as it should be.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.directory, self.rng = directory, random.Random(seed)
        self.known: dict[str, str] = {}
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.fault = ""
        self.steps = 0
        self._content = bytearray()
        self._number = 0

    def run(self) -> None:
        descriptor = os.open(self.directory / "fsx", os.O_RDWR | os.O_CREAT)
        try:
            while not self.over.is_set() and not self.fault:
                with self.lock:
                    self._exercise(descriptor)
                    self._churn()
                    self.steps += 1
        except OSError as error:
            self.fault = f"{error}"
        finally:
            os.close(descriptor)

    def now(self) -> dict[str, str]:
        """What the directory holds; with the lock held."""
        return {**self.known, "fsx": hashlib.sha256(self._content).hexdigest()}

    def _exercise(self, descriptor: int) -> None:
        rng, content = self.rng, self._content
        at, length = rng.randrange(LARGEST), rng.choice((1, 512, 4096, 70_000, 300_000))
        match rng.randrange(6):
            case 0:
                size = rng.randrange(LARGEST)
                os.ftruncate(descriptor, size)
                del content[size:]
                content.extend(bytes(size - len(content)))
            case 1:
                length = min(length, max(0, len(content) - at))
                if length:
                    punch(descriptor, at, length)
                    content[at : at + length] = bytes(length)
            case 2:
                os.fsync(descriptor)
            case 3:
                found = os.pread(descriptor, length, at)
                if found != content[at : at + length]:
                    self.fault = f"fsx reads otherwise at {at}, {length} bytes"
            case _:
                data = rng.randbytes(length)
                os.pwrite(descriptor, data, at)
                content.extend(bytes(max(0, at - len(content))))
                content[at : at + length] = data

    def _churn(self) -> None:
        rng = self.rng
        if len(self.known) < FILES or rng.random() < 0.4:
            name = f"file-{self._number}"
            self._number += 1
            data = rng.randbytes(rng.choice((10, 3000, 20_000, 90_000)))
            (self.directory / name).write_bytes(data)
            self.known[name] = hashlib.sha256(data).hexdigest()
        else:
            name = rng.choice(sorted(self.known))
            if rng.random() < 0.3:
                os.rename(self.directory / name, self.directory / f"{name}-renamed")
                self.known[f"{name}-renamed"] = self.known.pop(name)
            else:
                (self.directory / name).unlink()
                del self.known[name]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


if os.environ.get("EXTSNAP_LONG"):

    @pytest.mark.parametrize("kind", ["ext4", "ext3", "ext2"])
    def test_load_while_snapshots_come_and_go(kind: str, run_cli: Cli) -> None:
        if shutil.which("fio") is None:
            subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "fio"], check=True)
        seed = int(os.environ.get("EXTSNAP_SEED", "0"))
        rng = random.Random(seed)
        print(f"stress {kind}: seed {seed}")
        with arena() as top:
            image = make_volume(top / "disk.img", kind, MEBIBYTES, "-b", "4096")
            mount = top / "mount"
            mount.mkdir()
            run_cli("mount", image, mount)
            try:
                report = _load(image, mount, top, seed, rng, run_cli)
            finally:
                subprocess.run(["umount", mount], capture_output=True, check=False)
            deadline = time.monotonic() + 60
            while run_cli("check", "--quick", image, status=None).returncode and time.monotonic() < deadline:
                time.sleep(0.2)
            oracle.assert_clean(image)
            checked = json.loads(run_cli("check", "--json", image).stdout)
            assert checked["ok"], checked
            print(f"stress {kind}: {report}")

    def _load(image: Path, mount: Path, top: Path, seed: int, rng: random.Random, cli: Cli) -> str:
        (mount / "fio").mkdir()
        (mount / "churn").mkdir()
        job = top / "job.fio"
        job.write_text(_FIO.format(directory=mount / "fio", seconds=int(SECONDS), seed=seed + 1))
        exerciser = Exerciser(mount / "churn", seed)
        expected: dict[str, dict[str, str]] = {}
        taken = deleted = looked = 0
        fio = subprocess.Popen(
            ["fio", "--output-format=terse", job], cwd=top, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        exerciser.start()
        try:
            while fio.poll() is None:
                time.sleep(rng.uniform(0.2, 3))
                assert not exerciser.fault, exerciser.fault
                if len(expected) < SNAPSHOTS and rng.random() < 0.6:
                    name = f"s{taken}"
                    with exerciser.lock:
                        known = exerciser.now()
                        done = cli("create", image, name, status=None)
                    assert done.returncode == 0, done.stderr
                    expected[name] = known
                    taken += 1
                elif expected and rng.random() < 0.5:
                    name = rng.choice(sorted(expected))
                    cli("delete", image, name)
                    del expected[name]
                    deleted += 1
                elif expected:
                    _look(image, rng.choice(sorted(expected)), top, expected, cli)
                    looked += 1
        finally:
            exerciser.over.set()
            exerciser.join(120)
            if fio.poll() is None:
                fio.terminate()
            said = fio.communicate()[0].decode(errors="replace")
        assert fio.returncode == 0, said[-3000:]
        assert not exerciser.is_alive()
        assert not exerciser.fault, exerciser.fault
        assert digests(mount / "churn") == exerciser.now()
        for name in sorted(expected):
            _look(image, name, top, expected, cli)
        entries = json.loads(cli("list", "--json", image).stdout)["snapshots"]
        assert {entry["consistency"] for entry in entries} <= {"frozen"}
        return (
            f"{SECONDS:.0f} s, {exerciser.steps} steps of the exerciser, {taken} snapshots taken, {deleted} deleted, "
            f"{looked + len(expected)} compared: all as it was"
        )

    def _look(image: Path, name: str, top: Path, expected: dict[str, dict[str, str]], cli: Cli) -> None:
        """The snapshot shows what was known when it was taken."""
        point = top / "view"
        point.mkdir(exist_ok=True)
        cli("mount", "--snapshot", name, image, point)
        try:
            assert digests(point / "churn") == expected[name], f"{name} shows something else"
        finally:
            cli("umount", point)
