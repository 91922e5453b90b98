"""Who is measured: extsnap, a raw loop device on a plain copy, and a qcow2 with one internal snapshot.

Each turns an image into a block device or a mounted filesystem and back.  The loop devices are those that users of
each have: a plain one (``losetup``, ``mount -o loop``) for raw and qcow2, one with direct I/O for extsnap, as
``extsnap mount`` makes it; ``--direct-io`` gives all of them direct I/O.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTSNAP = Path(sys.executable).with_name("extsnap")
RAW, PEER, OURS = "raw", "qcow2", "ours"
SNAPSHOT = "base"
_DAEMON = "qemu-storage-daemon"


def run(*command: str | Path) -> str:
    """Run a command that must succeed; returns what it printed."""
    done = subprocess.run([str(word) for word in command], check=False, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def why_no_peer() -> str:
    """What qcow2 needs and is not there; empty: nothing."""
    missing = [name for name in (_DAEMON, "qemu-img") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} missing (Debian: qemu-system-common, qemu-utils)"
    helps = subprocess.run([_DAEMON, "--help"], text=True, capture_output=True, check=False).stdout
    return "" if "type=]fuse" in helps or "type=fuse" in helps else f"{_DAEMON} was built without FUSE exports"


@contextlib.contextmanager
def loop(path: Path, *options: str) -> Iterator[Path]:
    """A loop device on a file."""
    device = Path(run("losetup", "--find", "--show", *options, path).strip())
    try:
        yield device
    finally:
        # What is still cached of it would otherwise be written by the last close, after the measurement.
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(device: Path, directory: Path, *options: str) -> Iterator[Path]:
    """A filesystem, mounted."""
    directory.mkdir(exist_ok=True)
    run("mount", *options, device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


@dataclass(frozen=True)
class Setting:
    """How the data path is measured.

    Attributes:
        peer: Against a qcow2 as well.
        direct_io: The loop devices of raw and qcow2 have direct I/O too.
        sparse: The images have holes where nothing was written yet; else their files have all of their blocks, as a
            disk has.  A block that the disk under the host never had takes several times as long, on a thin disk.
        seed: Of places and contents.
    """

    peer: bool
    direct_io: bool
    sparse: bool
    seed: int


class Raw:
    """A plain copy: nothing is copied on write."""

    name = RAW

    def __init__(self, pristine: Path, directory: Path, setting: Setting) -> None:
        self.sparse = setting.sparse
        self.image = directory / f"{self.name}.img"
        self.directory = directory / self.name
        self.directory.mkdir(exist_ok=True)
        self.options = ["--direct-io=on"] if setting.direct_io else []
        self.make(pristine)

    def make(self, pristine: Path) -> None:
        """Bring the image about, with its snapshot."""
        run("cp", f"--sparse={'always' if self.sparse else 'never'}", pristine, self.image)

    @contextlib.contextmanager
    def file(self, snapshot: bool = False) -> Iterator[Path]:
        """The file that a loop device stands on; of the snapshot, if asked."""
        yield self.image

    @contextlib.contextmanager
    def device(self, snapshot: bool = False) -> Iterator[Path]:
        """A loop device on it."""
        read_only = ["--read-only"] if snapshot else []
        with self.file(snapshot) as file, loop(file, *self.options, *read_only) as device:
            yield device

    @contextlib.contextmanager
    def mount(self) -> Iterator[Path]:
        """A mounted filesystem in it."""
        with self.device() as device, mounted(device, self.directory / "mounted") as place:
            yield place

    def forget(self) -> None:
        """Have the host's cache let go of the image: the next read is from the disk."""
        forget(self.image)


class Peer(Raw):
    """The same data as qcow2 with one internal snapshot, served by qemu-storage-daemon over FUSE."""

    name = PEER

    def make(self, pristine: Path) -> None:
        """Convert, and take the snapshot."""
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", pristine, self.image)
        run("qemu-img", "snapshot", "-c", SNAPSHOT, self.image)
        if not self.sparse:  # clusters are taken one after the other, so they will come from what is written here
            write_zeros(self.image, self.image.stat().st_size, pristine.stat().st_size)

    def show_snapshot(self) -> None:
        """From now on the image is what the snapshot was: that is how a qcow2's internal snapshot can be served."""
        run("qemu-img", "snapshot", "-a", SNAPSHOT, self.image)

    @contextlib.contextmanager
    def file(self, snapshot: bool = False) -> Iterator[Path]:
        """The FUSE export."""
        point = self.directory / "export"
        point.touch()
        before = point.stat().st_dev
        log = (self.directory / "log").open("wb")
        daemon = subprocess.Popen(
            [
                *(_DAEMON, "--blockdev", f"driver=file,node-name=file,filename={self.image},discard=unmap"),
                *("--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap"),
                *("--export", f"type=fuse,id=export,node-name=disk,mountpoint={point},writable=on"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + 20
            while point.stat().st_dev == before:
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{_DAEMON}: {(self.directory / 'log').read_text()}")
                time.sleep(0.01)
            yield point
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
            log.close()


class Ours(Raw):
    """An image with one snapshot, served by extsnap."""

    name = OURS

    def make(self, pristine: Path) -> None:
        """Copy, and take the snapshot."""
        super().make(pristine)
        run(EXTSNAP, "create", self.image, SNAPSHOT)
        self.options = ["--direct-io=on"]

    @contextlib.contextmanager
    def file(self, snapshot: bool = False) -> Iterator[Path]:
        """The served file."""
        served = self.directory / "served"
        served.mkdir(exist_ok=True)
        run(EXTSNAP, "attach", self.image, served)
        try:
            yield served / "snapshots" / SNAPSHOT if snapshot else served / "volume"
        finally:
            run(EXTSNAP, "detach", self.image)

    @contextlib.contextmanager
    def mount(self) -> Iterator[Path]:
        """As its users mount it."""
        place = self.directory / "mounted"
        place.mkdir(exist_ok=True)
        run(EXTSNAP, "mount", self.image, place)
        try:
            yield place
        finally:
            run(EXTSNAP, "umount", place)


def write_zeros(path: Path, first: int, last: int) -> None:
    """Make a file longer, by zeros that are really written."""
    zeros = bytes(1 << 20)
    with path.open("r+b") as file:
        file.seek(first)
        while (left := last - file.tell()) > 0:
            file.write(zeros[:left])
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Write out what is cached of a file or device and drop it from the cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
