"""The image as a device, its lock, who has it in use, and the layer over it that edits are tried on."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from extsnap.blockdev import image as image_module
from extsnap.blockdev import inuse
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.overlay import Overlay
from extsnap.blockdev.recording import MemoryDevice
from extsnap.errors import ExtsnapError, ImageNotFound, VolumeBusy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "volume.img"
    found.write_bytes(random.Random(1).randbytes(100_000))
    return found


def test_reads_writes_and_holes(path):
    content = bytearray(path.read_bytes())
    with ImageFile(str(path), writable=True) as image:
        status = os.stat(path)
        assert (image.size, image.device_id) == (100_000, (status.st_dev, status.st_ino))
        assert image.path == str(path)
        assert image.pread(5, 70_000) == content[5:70_005]
        for offset, data in ((3, b"abc"), (4096, memoryview(b"x" * 9000)), (99_999, bytearray(b"z"))):
            image.pwrite(offset, data)
            content[offset : offset + len(data)] = data
        image.punch(8000, 50_001)
        content[8000:58_001] = bytes(50_001)
        image.flush()
        buffer = bytearray(100_000)
        image.readinto(0, memoryview(buffer))
        assert buffer == content
    assert path.read_bytes() == content
    assert path.stat().st_blocks * 512 < 70_000


def test_transfers_cut_short_are_continued(path, monkeypatch):
    content = path.read_bytes()
    with ImageFile(str(path), writable=True) as image:
        pread, preadv, pwrite = os.pread, os.preadv, os.pwrite
        monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 700), at))
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:700]], at))
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:700], at))
        assert image.pread(10, 5000) == content[10:5010]
        image.pwrite(20, b"q" * 5000)
        assert image.pread(20, 5000) == b"q" * 5000
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
        with pytest.raises(OSError, match="writing 4 bytes at byte 7 ") as caught:
            image.pwrite(7, b"1234")
        assert caught.value.errno == errno.ENOSPC


def test_a_host_without_holes_gets_zeros(path, monkeypatch):
    content = path.read_bytes()

    class NoHoles:
        def fallocate(self, *_):
            image_module.ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr(image_module, "_libc", NoHoles())
    with ImageFile(str(path), writable=True) as image:
        image.punch(1000, 70_000)
        assert image.pread(0, 100_000) == content[:1000] + bytes(70_000) + content[71_000:]


def test_errors_name_operation_place_and_file(path):
    with ImageFile(str(path)) as image:
        with pytest.raises(OSError, match=rf"reading 11 bytes at byte 99990 of {path} failed"):
            image.pread(99_990, 11)
        with pytest.raises(OSError, match=rf"writing 1 bytes at byte 5 of {path} failed: Bad file") as caught:
            image.pwrite(5, b"x")
        assert caught.value.errno == errno.EBADF
        with pytest.raises(OSError, match=r"punching 512 bytes at byte 0 "):
            image.punch(0, 512)


def test_a_flush_that_fails_says_so(path, monkeypatch):
    def refuse(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    with ImageFile(str(path), writable=True) as image, pytest.raises(OSError, match="flushing at byte 0 of ") as caught:
        image.flush()
    assert caught.value.errno == errno.EIO


def test_what_cannot_be_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name, reason in (("absent", "does not exist"), ("gone", "does not exist"), ("", "is a directory")):
        with pytest.raises(ImageNotFound, match=reason):
            ImageFile(str(tmp_path / name))
    for odd in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ImageNotFound, match="neither a file nor a block device"):
            ImageFile(str(odd))
    (tmp_path / "empty").touch()
    with ImageFile(str(tmp_path / "empty")) as image:
        assert image.size == 0


def test_no_permission_is_said_so(path, monkeypatch):
    def refuse(*_args, **_named):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ExtsnapError, match="permission denied"):
        ImageFile(str(path), writable=True)


def test_locks_go_by_inode_and_name_the_process(path, tmp_path):
    os.link(path, tmp_path / "other-name")
    (tmp_path / "link").symlink_to(path)
    with ImageFile(str(path), writable=True, lock="exclusive"):
        for other in ("other-name", "link"):
            for lock in ("shared", "exclusive"):
                with pytest.raises(VolumeBusy, match=f"process {os.getpid()}") as caught:
                    ImageFile(str(tmp_path / other), writable=True, lock=lock)
                assert caught.value.errno == errno.EBUSY
        ImageFile(str(path)).close()
    with ImageFile(str(path), lock="shared"), ImageFile(str(path), lock="shared"), pytest.raises(VolumeBusy):
        ImageFile(str(path), writable=True, lock="exclusive")
    ImageFile(str(path), writable=True, lock="exclusive").close()


def test_the_lock_of_another_process(path):
    code = "import sys, fcntl; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('on', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"on\n"
        with pytest.raises(VolumeBusy, match=f"process {other.pid}"):
            ImageFile(str(path), lock="shared")
        other.communicate(b"\n")
    ImageFile(str(path), writable=True, lock="exclusive").close()


def test_no_descriptor_stays_open_after_a_refusal(path):
    with ImageFile(str(path), writable=True, lock="exclusive"):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(VolumeBusy):
                ImageFile(str(path), writable=True, lock="exclusive")
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [20 * 1024, 20 * 1024 + 300])
def test_overlay_is_the_device_with_the_writes(size):
    rng = random.Random(3)
    below = MemoryDevice(rng.randbytes(size))
    before = bytes(below.content)
    overlay, model = Overlay(below, 1024), bytearray(before)
    for _ in range(300):
        offset = rng.randrange(size)
        length = min(rng.choice((0, 1, 10, 1024, 3000)), size - offset)
        action = rng.randrange(4)
        if action == 0:
            overlay.punch(offset, length)
            model[offset : offset + length] = bytes(length)
        elif action == 1:
            data = rng.randbytes(length)
            overlay.pwrite(offset, data)
            model[offset : offset + length] = data
        elif action == 2:  # writes what is there already: no change
            overlay.pwrite(offset, bytes(model[offset : offset + length]))
        else:
            assert overlay.pread(offset, length) == model[offset : offset + length]
        overlay.flush()
    assert overlay.pread(0, size) == model
    assert below.content == before
    expected = {
        block: bytes(model[block * 1024 : (block + 1) * 1024]).ljust(1024, b"\0")
        for block in range(-(-size // 1024))
        if model[block * 1024 : (block + 1) * 1024] != before[block * 1024 : (block + 1) * 1024]
    }
    assert overlay.changes() == expected
    with pytest.raises(ValueError):
        overlay.pwrite(size - 1, b"xy")


def test_writes_that_change_nothing_are_no_changes():
    overlay = Overlay(MemoryDevice(b"a" * 4096), 1024)
    overlay.pwrite(1000, b"b" * 100)
    assert sorted(overlay.changes()) == [0, 1]
    overlay.pwrite(1000, b"a" * 100)
    assert overlay.changes() == {}


# Who has it in use.


def ext_image(tmp_path: Path) -> Path:
    path = tmp_path / "volume.img"
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(path), "4M"], check=True, capture_output=True)
    return path


def refusal(path: Path) -> str:
    with ImageFile(str(path)) as image, pytest.raises(VolumeBusy) as caught:
        inuse.require_free(image)
    return str(caught.value)


def test_a_free_image_is_free(path):
    with ImageFile(str(path)) as image:
        assert inuse.holders(inuse.Span(image.key)) == []
        inuse.require_free(image)


@pytest.mark.system
def test_loop_devices_and_mounts_by_inode(tmp_path):
    path = ext_image(tmp_path)
    os.link(path, tmp_path / "other-name")
    # Bytes that are no UTF-8, white space of several kinds, and a backslash: mountinfo has all of them its own way.
    point = os.fsencode(tmp_path) + b"/odd \xff\xc2\xa0\r\\040"
    os.mkdir(point)
    loop = subprocess.run(
        ["losetup", "--find", "--show", str(tmp_path / "other-name")], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        (tmp_path / "other-name").rename(tmp_path / "moved")
        said = refusal(path)
        assert f"in use by {loop}; run losetup -d {loop} first" in said
        subprocess.run([b"mount", b"-o", b"ro", os.fsencode(loop), point], check=True)
        try:
            key = inuse.file_key(os.stat(path))
            shown = point.decode(errors="replace")
            assert inuse.holders(inuse.Span(key)) == [inuse.Holder("loop", loop, (shown,))]
            assert f"{loop} mounted on {shown}; run umount {shown} && losetup -d {loop} first" in refusal(path)
            name = loop.removeprefix("/dev/")
            assert inuse._backing(name) == key
            assert inuse._backing_by_path(name) == key
        finally:
            subprocess.run([b"umount", point], check=True)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
    with ImageFile(str(path)) as image:
        inuse.require_free(image)


@pytest.mark.system
def test_a_block_device_that_is_mounted_is_busy(tmp_path):
    path = ext_image(tmp_path)
    (tmp_path / "mnt").mkdir()
    command = ["losetup", "--find", "--show", str(path)]
    loop = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        with ImageFile(loop, writable=True) as image:
            assert image.size == 4 << 20
            assert image.pread(1080, 2) == b"\x53\xef"
        subprocess.run(["mount", "-o", "ro", loop, str(tmp_path / "mnt")], check=True)
        try:
            with pytest.raises(VolumeBusy, match="in use"):
                ImageFile(loop, writable=True)
        finally:
            subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


@pytest.mark.system
def test_fuse2fs_on_the_image(tmp_path):
    """Another filesystem server has the file open: no loop device, no lock, only the mount's source tells."""
    path = ext_image(tmp_path)
    (tmp_path / "link").symlink_to("volume.img")
    point = tmp_path / "mnt"
    point.mkdir()
    server = subprocess.Popen(["fuse2fs", "-f", "-o", "ro", str(tmp_path / "link"), str(point)])
    try:
        deadline = time.monotonic() + 20
        while not os.path.ismount(point):
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.05)
        said = refusal(path)
        assert f"mounted on {point}; run umount {point} first" in said
    finally:
        subprocess.run(["umount", str(point)], check=False)
        server.wait(20)
    with ImageFile(str(path)) as image:
        inuse.require_free(image)


def test_nothing_at_or_below_a_fuse_mount_is_touched(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "volume").touch()
    (tmp_path / "link").symlink_to("served/../served/volume")
    (tmp_path / "loop").symlink_to("loop")
    status = os.stat(tmp_path / "served" / "volume")
    base = os.fsencode(tmp_path)
    for name in (b"/served/volume", b"/link", b"//served/./volume"):
        assert os.path.samestat(inuse._status(base + name, set()), status)
    touched = []
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda name: touched.append(name) or lstat(name))
    for name in (b"/served/volume", b"/link", b"/served"):
        assert inuse._status(base + name, {base + b"/served"}) is None
    assert not [name for name in touched if name.startswith(base + b"/served")]
    for name in (b"/loop", b"/absent"):
        assert inuse._status(base + name, set()) is None
    assert inuse._status(b"relative", set()) is None


def test_a_lock_is_a_flock(path):
    """Other tools see it: `flock -n` from util-linux refuses."""
    with ImageFile(str(path), writable=True, lock="exclusive"):
        assert subprocess.run(["flock", "-n", str(path), "true"], check=False).returncode == 1
        with open(path) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_reading_while_a_barrier_is_waited_for(path, monkeypatch):
    """The barrier does not end before the reading has begun, and both have ended on return."""
    begun, events = threading.Event(), []

    def slow(descriptor):
        assert begun.wait(5), "nobody reads while the barrier is waited for"
        time.sleep(0.05)
        events.append("barrier")

    with ImageFile(path, writable=True) as image:
        image.pwrite(0, b"x" * 512)
        monkeypatch.setattr(os, "fdatasync", slow)
        image.flush_while(lambda: (begun.set(), events.append(image.pread(0, 3))))
    assert events == [b"xxx", "barrier"]


def test_a_barrier_that_fails_while_something_is_read(path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EIO, "no")

    read = []
    with ImageFile(path, writable=True) as image:
        monkeypatch.setattr(os, "fdatasync", refuse)
        with pytest.raises(OSError, match="flushing"):
            image.flush_while(lambda: read.append(image.pread(0, 1)))
    assert len(read) == 1
