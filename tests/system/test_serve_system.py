"""Serving for real: the kernel's FUSE, loop devices, ext4 and e2fsprogs over a plain-file volume.

Every test works in a directory of its own with a runtime directory of its own, and the fixture
``place`` fails the test if a mount, a loop device or a server is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serve_fakes import FakeVolume, calls

from extsnap.errors import (
    ImageNotFound,
    NeedsRecovery,
    ServerError,
    SnapshotExists,
    SnapshotNotFound,
    ToolError,
    VolumeBusy,
)
from extsnap.serve import attaching, checking, control, mounting, mountpoints, running, session

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and FUSE"),
]

SIZE = 48 << 20


class Place:
    """A directory with an image, mount points, and what a test does most."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.image = root / "image"
        self.served = root / "served"
        self.mnt = root / "mnt"
        self.other = root / "other"
        for directory in (self.served, self.mnt, self.other):
            directory.mkdir()
        with self.image.open("wb") as file:
            file.truncate(SIZE)

    def mkfs(self, *options: str) -> None:
        sh("mke2fs", "-q", "-F", "-t", "ext4", *options, str(self.image))

    @property
    def volume(self) -> Path:
        return self.served / "volume"

    def attach(self) -> None:
        attaching.attach(str(self.image), str(self.served))

    def detach(self, force: bool = False) -> bool:
        return attaching.detach(str(self.served), force=force)

    def server_pid(self) -> int:
        found = control.connect(control.image_key(str(self.image)))
        assert found is not None
        found[0].close()
        return int(found[1]["pid"])

    def fsck(self) -> None:
        sh("e2fsck", "-fn", str(self.image))

    def calls(self) -> list[str]:
        return calls(self.image)


def sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def mounted_below(root: Path) -> list[str]:
    return [mount.point for mount in mounting.mounts() if mount.point.startswith(str(root))]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="serve-test-", dir="/tmp") as root:
        monkeypatch.setenv("EXTSNAP_RUNTIME_DIR", root + "/run")
        monkeypatch.setattr(session, "FACTORY", "serve_fakes:FakeVolume.open")
        place = Place(Path(root))
        try:
            yield place
            leftovers = [*mounted_below(place.root), *mounting.loops_over(root)]
            assert not leftovers
            run = place.root / "run"
            assert not run.exists() or not [name for name in os.listdir(run) if not name.endswith((".log", ".old"))]
        finally:
            for point in reversed(mounted_below(place.root)):
                subprocess.run(["umount", "-l", point], check=False)
            for loop in mounting.loops_over(root):
                subprocess.run(["losetup", "-d", loop.path], check=False)


# ---- attach, the files, detach


def test_attach_serves_files_and_detach_ends(place: Place) -> None:
    content = random.Random(1).randbytes(3 << 20)
    with place.image.open("r+b") as file:
        file.write(content)
    place.attach()
    pid = place.server_pid()
    assert sorted(os.listdir(place.served)) == ["snapshots", "volume"]
    assert place.volume.stat().st_size == SIZE
    with place.volume.open("rb") as file:
        assert file.read(len(content)) == content
    with place.volume.open("r+b", buffering=0) as file:
        file.seek(12345)
        file.write(b"written through" * 100)
        os.fsync(file.fileno())
        with place.image.open("rb") as below:
            below.seek(12345)
            assert below.read(15) == b"written through"
    with pytest.raises(PermissionError):
        place.volume.open("wb")  # would cut it to nothing
    with pytest.raises(PermissionError):
        (place.served / "file").write_bytes(b"")
    found = mounting.fuse_mount_at(str(place.served))
    assert found is not None
    assert found.source == str(place.image), "e2fsck and resize2fs refuse the image by this"
    with pytest.raises(VolumeBusy, match="already served"):
        attaching.attach(str(place.image), str(place.other))
    assert place.detach() is True
    assert not alive(pid)
    assert place.calls() == ["begin grow=True", "end clean=True"]
    with pytest.raises(ServerError, match="not served"):
        place.detach()


def test_punch_and_zero_range_reach_the_volume(place: Place) -> None:
    with place.image.open("r+b") as file:
        file.write(b"\xff" * (4 << 20))
    place.attach()
    sh("fallocate", "--punch-hole", "--offset", "4096", "--length", "1048576", str(place.volume))
    sh("fallocate", "--zero-range", "--offset", "2097152", "--length", "4096", str(place.volume))
    with place.volume.open("rb") as file:
        data = file.read(4 << 20)
    assert data.count(0) == 1048576 + 4096
    assert data[4096 : 4096 + 1048576].count(0) == 1048576
    place.detach()


def test_names_appear_and_vanish_at_once_and_never_show_old_pages(place: Place) -> None:
    place.attach()
    snapshots = place.served / "snapshots"
    with session.open_session(str(place.image), writable=True) as commands:
        assert commands.volume is None
        assert commands.served == {"pid": place.server_pid(), "directory": str(place.served), "mounts": []}
        for value in (b"first", b"other"):
            with place.volume.open("r+b") as file:
                file.write(value)
            commands.call("create", name="again")
            assert os.listdir(snapshots) == ["again"]
            assert (snapshots / "again").read_bytes()[:5] == value
            assert (snapshots / "again").stat().st_mode & 0o777 == 0o400
            commands.call("delete", names=["again"])
            assert os.listdir(snapshots) == []
            assert not (snapshots / "again").exists()
        commands.call("create", name="broken")
    with pytest.raises(OSError) as failed:
        (snapshots / "broken").read_bytes()
    assert failed.value.errno == errno.EIO
    with pytest.raises(OSError) as failed:
        (snapshots / "broken").open("r+b")
    assert failed.value.errno == errno.EROFS
    place.detach()


def test_unmounting_the_directory_ends_the_server_cleanly(place: Place) -> None:
    place.attach()
    pid = place.server_pid()
    sh("umount", str(place.served))
    until(lambda: not alive(pid))
    assert place.calls()[-1] == "end clean=True"


def test_detach_names_the_users_and_force_ends_anyway(place: Place) -> None:
    place.attach()
    held = os.open(place.volume, os.O_RDONLY)
    try:
        with pytest.raises(VolumeBusy) as busy:
            place.detach()
        assert f"pid {os.getpid()}" in str(busy.value)
        assert place.detach(force=True) is True
        with pytest.raises(OSError):
            os.read(held, 4096)
    finally:
        with contextlib.suppress(OSError):
            os.close(held)


def test_detach_is_refused_while_someone_stands_in_the_directory(place: Place) -> None:
    place.attach()
    child = subprocess.Popen(["sleep", "60"], cwd=place.served)
    try:
        with pytest.raises(VolumeBusy, match=f"pid {child.pid}"):
            place.detach()
        assert place.volume.exists()
    finally:
        child.kill()
        child.wait()
    assert place.detach() is True


def test_starting_fails_with_the_volumes_error_and_leaves_nothing(place: Place) -> None:
    with pytest.raises(ImageNotFound):
        attaching.attach(str(place.root / "none"), str(place.served))
    with pytest.raises(ServerError, match="make the directory first"):
        attaching.attach(str(place.image), str(place.root / "none"))
    with FakeVolume.open(str(place.image), writable=True), pytest.raises(VolumeBusy, match="locked") as busy:
        place.attach()
    assert busy.value.hint == "wait"
    (place.root / "image.refuse").touch()
    with pytest.raises(NeedsRecovery, match="refused to serve"):
        place.attach()
    assert mounted_below(place.root) == []
    with pytest.raises(NeedsRecovery, match="refused to serve"):
        mountpoints.mount(str(place.image), str(place.mnt))
    with pytest.raises(NeedsRecovery, match="refused to serve"):
        running.run(str(place.image), ["true"])


def test_fusermount3_path(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = mounting._fuse_mount_by_helper(str(place.served), str(place.root / "a,b\\c"), False)
    try:
        found = mounting.fuse_mount_at(str(place.served))
        assert found is not None
        assert found.source == str(place.root / "a,b\\c")
    finally:
        sh("fusermount3", "-u", "-z", str(place.served))
        os.close(fd)
    with pytest.raises(ServerError, match="cannot mount FUSE"):
        mounting._fuse_mount_by_helper(str(place.root / "none"), "x", False)


# ---- commands


def test_concurrent_clients_and_errors_as_their_classes(place: Place) -> None:
    place.attach()
    image = str(place.image)
    failures: list[BaseException] = []

    def work(prefix: str) -> None:
        try:
            for index in range(10):
                with session.open_session(image, writable=True) as commands:
                    commands.call("create", name=f"{prefix}{index}", message="ü\n" * 100)
                    with pytest.raises(SnapshotExists, match="choose another name"):
                        commands.call("create", name=f"{prefix}{index}")
                    commands.call("delete", names=[f"{prefix}{index}"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(prefix,)) for prefix in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with session.open_session(image, writable=True) as one, session.open_session(image, writable=False) as two:
        assert one.call("pid") == two.call("pid") == {"pid": place.server_pid()}
        with pytest.raises(SnapshotNotFound):
            two.call("delete", names=["none"])
        with pytest.raises(ServerError, match="ZeroDivisionError"):
            two.call("bug")
        assert one.call("info")["attached"]["directory"] == str(place.served)
        with pytest.raises(ServerError, match="knows no command"):
            one.call("server.nonsense")
    assert place.detach() is True


def test_the_control_socket_survives_nonsense(place: Place) -> None:
    place.attach()
    path = control.socket_path(control.image_key(str(place.image)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    for nonsense in (
        b"\n",
        b"{}\n",
        b"[1]\n",
        b'{"verb": 1}\n',
        b"\xff\xfe\n",
        b"[" * 100000 + b"\n",
        b"x" * (3 << 20),
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.settimeout(5)
            with contextlib.suppress(OSError):
                client.sendall(nonsense)
            with contextlib.suppress(OSError):
                answer = client.recv(4096)
                assert not answer or json.loads(answer)["ok"] is False
    assert place.detach() is True


def test_what_open_files_forbid(place: Place) -> None:
    place.attach()
    with session.open_session(str(place.image), writable=True) as commands:
        commands.call("create", name="one")
        commands.call("create", name="two")
        with place.volume.open("rb"):
            commands.call("create", name="while-read")
            with pytest.raises(VolumeBusy, match=f"pid {os.getpid()}"):
                commands.call("restore", name="one")
        with place.volume.open("r+b"):
            commands.call("create", name="while-written")
            with pytest.raises(VolumeBusy, match=f"pid {os.getpid()}"):
                commands.call("restore", name="one")
        with (place.served / "snapshots" / "one").open("rb"):
            with pytest.raises(VolumeBusy, match="snapshot one is open"):
                commands.call("delete", names=["one"])
            commands.call("delete", names=["two"])
        commands.call("delete", names=["one"])
        commands.call("restore", name="while-read")
    place.detach()


def test_restored_content_is_seen_by_the_next_open(place: Place) -> None:
    place.attach()
    with session.open_session(str(place.image), writable=True) as commands:
        commands.call("create", name="zeros")
        with place.volume.open("r+b") as file:
            file.write(b"changed")
        with place.volume.open("rb") as file:
            assert file.read(7) == b"changed"
        commands.call("restore", name="zeros")
        with place.volume.open("rb") as file:
            assert file.read(7) == bytes(7)
    place.detach()


def test_a_local_session_when_nobody_serves(place: Place) -> None:
    with session.open_session(str(place.image), writable=True) as commands:
        assert commands.served is None
        assert commands.volume is not None
        assert commands.call("create", name="here") == {"name": "here", "kind": "manual"}
        assert commands.call("info")["attached"] is None
        with pytest.raises(VolumeBusy):
            session.open_session(str(place.image), writable=True)
    with pytest.raises(ImageNotFound):
        session.open_session(str(place.root / "none"), writable=False)


# ---- signals and dead servers


def test_sigterm_ends_cleanly(place: Place) -> None:
    place.attach()
    pid = place.server_pid()
    with place.volume.open("r+b", buffering=0) as file:
        file.write(b"x")
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        assert alive(pid), "not while a file is open"
        file.write(b"y")
    until(lambda: not alive(pid))
    assert place.image.read_bytes()[:2] == b"xy"
    assert place.calls()[-1] == "end clean=True"


def test_a_second_sigterm_ends_at_once(place: Place) -> None:
    place.attach()
    pid = place.server_pid()
    held = os.open(place.volume, os.O_RDONLY)
    try:
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)
        until(lambda: not alive(pid))
    finally:
        with contextlib.suppress(OSError):
            os.close(held)
    assert place.calls()[-1].startswith("end")


def test_a_killed_server_is_cleaned_up_after(place: Place) -> None:
    place.attach()
    pid = place.server_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))
    assert mounted_below(place.root), "the dead mount is still there"
    with session.open_session(str(place.image), writable=True) as commands:
        assert commands.served is None
    assert mounted_below(place.root) == []
    place.attach()
    place.detach()
    place.attach()
    os.kill(place.server_pid(), signal.SIGKILL)
    assert place.detach() is False, "by its directory"


def test_a_killed_starter_takes_a_private_server_with_it(place: Place) -> None:
    script = (
        "from extsnap.serve import running, session; session.FACTORY = 'serve_fakes:FakeVolume.open'; "
        f"running.run({str(place.image)!r}, ['sleep', '60'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    starter = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    try:
        until(lambda: subprocess.run(["pgrep", "-P", str(starter.pid), "-x", "sleep"], capture_output=True).stdout)
        pid = place.server_pid()
    finally:
        os.killpg(starter.pid, signal.SIGKILL)
        starter.wait()
    until(lambda: not alive(pid))
    until(lambda: place.calls()[-1] == "end clean=True")


# ---- recovery


def test_a_marked_image_is_replayed_before_it_is_changed(place: Place) -> None:
    place.mkfs()
    place.attach()
    sh("mount", "-o", "loop", str(place.volume), str(place.mnt))
    (place.mnt / "file").write_bytes(b"x" * 100000)
    sh("sync", "-f", str(place.mnt))
    os.kill(place.server_pid(), signal.SIGKILL)
    sh("umount", str(place.mnt))
    with session.open_session(str(place.image), writable=False) as commands:
        assert commands.volume is not None
        assert commands.volume.needs_replay
    with pytest.raises(NeedsRecovery, match="run"):
        checking.check(str(place.image))
    with session.open_session(str(place.image), writable=True) as commands:
        assert commands.volume is not None
        assert not commands.volume.needs_replay
    assert place.calls()[-2:] == ["begin grow=False", "end clean=True"]
    place.fsck()
    assert "file" in sh("debugfs", "-R", "ls -p /", str(place.image))


def crash(place: Place) -> None:
    """Leave the image as a killed server under a mounted filesystem does."""
    place.attach()
    sh("mount", "-o", "loop", str(place.volume), str(place.mnt))
    (place.mnt / "file").write_bytes(b"x" * 100000)
    sh("sync", "-f", str(place.mnt))
    os.kill(place.server_pid(), signal.SIGKILL)
    sh("umount", str(place.mnt))


def test_attach_mount_and_run_replay_too(place: Place) -> None:
    place.mkfs()
    crash(place)
    place.attach()
    assert place.calls()[-3:] == ["begin grow=False", "end clean=True", "begin grow=True"]
    place.detach()
    crash(place)
    mountpoints.mount(str(place.image), str(place.mnt))
    assert (place.mnt / "file").stat().st_size == 100000
    mountpoints.umount(str(place.mnt))
    crash(place)
    assert running.run(str(place.image), ["e2fsck", "-fn", "{}"]) == 0
    place.fsck()


def test_what_e2fsck_p_cannot_recover_names_the_way_out(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.mkfs("-O", "^metadata_csum")
    running.run(str(place.image), ["true"])
    # The root directory claims to be a fifo, and the superblock knows of errors: -p gives up on that.
    for request in ("set_inode_field <2> mode 010755", "set_super_value state 3"):
        sh("debugfs", "-w", "-R", request, str(place.image))
    state = Path(f"{place.image}.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "mark": True}))
    for action in (
        lambda: session.open_session(str(place.image), writable=True),
        place.attach,
        lambda: mountpoints.mount(str(place.image), str(place.mnt)),
        lambda: running.run(str(place.image), ["true"], atomic=True),
    ):
        with pytest.raises(NeedsRecovery, match=r"e2fsck -fy \{\}"):
            action()
        assert mounted_below(place.root) == []
    assert running.run(str(place.image), ["e2fsck", "-fy", "{}"]) == 1
    assert "could not recover" in capfd.readouterr().err
    place.fsck()
    with session.open_session(str(place.image), writable=True):
        pass


# ---- mount


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_kernel_mount_is_durable_and_clean(place: Place, kind: str) -> None:
    sh("mke2fs", "-q", "-F", "-t", kind, str(place.image))
    image, mnt = str(place.image), place.mnt
    mountpoints.mount(image, str(mnt))
    pid = place.server_pid()
    rng = random.Random(7)
    content = {f"dir{i % 5}/file{i}": rng.randbytes(rng.randrange(1, 300_000)) for i in range(60)}
    for name, data in content.items():
        (mnt / name).parent.mkdir(exist_ok=True)
        (mnt / name).write_bytes(data)
    scattered = bytearray(6 << 20)
    with open(mnt / "scattered", "w+b") as file:
        file.write(scattered)
        for number in range(1500):
            at, piece = rng.randrange(len(scattered) // 4096) * 4096, rng.randbytes(4096)
            scattered[at : at + 4096] = piece
            file.seek(at)
            file.write(piece)
            if number % 100 == 99:
                file.flush()
                os.fsync(file.fileno())
    for name in list(content)[::3]:
        (mnt / name).unlink()
        del content[name]
    sh("fstrim", "-v", str(mnt))
    with session.open_session(image, writable=True) as commands:
        served = commands.served
        assert served is not None
        assert served["mounts"] == [str(mnt)]
        commands.call("create", name="live")
        for verb, arguments in (("restore", {"name": "live"}), ("strip", {})):
            with pytest.raises(VolumeBusy, match=f"needs the volume for itself.*mounted at {mnt}.*unmount"):
                commands.call(verb, **arguments)
        commands.call("delete", names=["live"])
    sums = {name: sha(mnt / name) for name in [*content, "scattered"]}
    mountpoints.umount(str(mnt))
    assert not alive(pid)
    place.fsck()
    assert place.calls()[-1] == "end clean=True"
    sh("mount", "-o", "loop,ro", image, str(mnt))
    try:
        assert {name: sha(mnt / name) for name in sums} == sums
        assert {name: (mnt / name).read_bytes() for name in content} == content
        assert (mnt / "scattered").read_bytes() == scattered
    finally:
        sh("umount", str(mnt))


def test_whoever_unmounts_ends_the_server(place: Place) -> None:
    place.mkfs()
    mountpoints.mount(str(place.image), str(place.mnt))
    pid = place.server_pid()
    (place.mnt / "file").write_bytes(b"x" * 12345)
    sh("umount", str(place.mnt))
    until(lambda: not alive(pid))
    place.fsck()
    assert place.calls()[-1] == "end clean=True"
    with pytest.raises(ServerError, match="nothing is mounted"):
        mountpoints.umount(str(place.mnt))


def test_umount_refuses_what_is_in_use_or_not_ours(place: Place) -> None:
    place.mkfs()
    mountpoints.mount(str(place.image), str(place.mnt))
    with (place.mnt / "file").open("wb"), pytest.raises(VolumeBusy, match=f"pid {os.getpid()}"):
        mountpoints.umount(str(place.mnt))
    mountpoints.umount(str(place.mnt))
    sh("mount", "-t", "tmpfs", "none", str(place.mnt))
    try:
        with pytest.raises(ServerError, match="not mounted by extsnap"):
            mountpoints.umount(str(place.mnt))
    finally:
        sh("umount", str(place.mnt))
    place.attach()
    with pytest.raises(ServerError, match="detach"):
        mountpoints.umount(str(place.served))
    place.detach()


def test_a_failed_mount_leaves_nothing(place: Place) -> None:
    with pytest.raises(ToolError, match="cannot mount"):
        mountpoints.mount(str(place.image), str(place.mnt))  # holds no filesystem
    assert mounted_below(place.root) == []
    with pytest.raises(SnapshotNotFound):
        mountpoints.mount(str(place.image), str(place.mnt), snapshot="none")
    with session.open_session(str(place.image), writable=True) as commands:
        assert commands.served is None


def test_snapshots_and_the_volume_share_a_server(place: Place) -> None:
    place.mkfs()
    image = str(place.image)
    with session.open_session(image, writable=True) as commands:
        commands.call("create", name="empty")
    mountpoints.mount(image, str(place.other), snapshot="empty")
    pid = place.server_pid()
    assert "begin grow=True" not in place.calls(), "nothing is marked for reading a snapshot"
    mountpoints.mount(image, str(place.mnt))
    assert place.server_pid() == pid
    assert place.calls()[-1] == "begin grow=True"
    (place.mnt / "new").write_bytes(b"new")
    assert os.listdir(place.other) == ["lost+found"]
    with pytest.raises(OSError):
        (place.other / "x").write_bytes(b"")
    mountpoints.umount(str(place.mnt))
    assert alive(pid), "the snapshot is still mounted"
    with session.open_session(image, writable=True) as commands:
        with pytest.raises(VolumeBusy, match=f"snapshot empty is open.*{place.other}"):
            commands.call("delete", names=["empty"])
        commands.call("create", name="second")
    mountpoints.umount(str(place.other))
    assert not alive(pid)
    place.fsck()


def test_mount_on_an_attached_image_leaves_its_server(place: Place) -> None:
    place.mkfs()
    place.attach()
    mountpoints.mount(str(place.image), str(place.mnt))
    with pytest.raises(VolumeBusy, match=f"mounted at {place.mnt}"):
        place.detach()
    mountpoints.umount(str(place.mnt))
    assert place.volume.exists()
    sh("e2fsck", "-fn", str(place.volume))
    assert place.detach() is True


# ---- run


def test_run_gives_the_commands_status(place: Place) -> None:
    image = str(place.image)
    place.mkfs()
    assert running.run(image, ["e2fsck", "-fn", "{}"]) == 0
    assert running.run(image, ["sh", "-c", 'test -f "$0" && exit 7', "{}"]) == 7
    assert running.run(image, ["sh", "-c", "kill -9 $$"]) == 128 + 9
    assert running.run(image, ["no-such-command-here"]) == 127
    assert running.run(image, ["/etc/passwd"]) == 126
    assert running.run(image, ["debugfs", "-w", "-R", "mkdir made", "{}"]) == 0
    place.fsck()
    assert "made" in sh("debugfs", "-R", "ls -p /", image)
    place.attach()
    assert running.run(image, ["test", "{}", "=", str(place.volume)]) == 0
    place.detach()


def test_run_atomic(place: Place) -> None:
    place.mkfs()
    image = str(place.image)
    before = sha(place.image)
    write = 'printf broken | dd of="$0" bs=1 seek=2000000 conv=notrunc status=none; exit '
    assert running.run(image, ["sh", "-c", write + "5", "{}"], atomic=True) == 5
    assert sha(place.image) == before, "restored"
    assert running.run(image, ["no-such-command-here"], atomic=True) == 127
    assert sha(place.image) == before
    assert running.run(image, ["sh", "-c", write + "1", "{}"], atomic=True, ok={0, 1}) == 1
    assert sha(place.image) != before
    with FakeVolume.open(image, writable=False) as volume:
        assert volume.snapshot_names() == []
    with place.image.open("r+b") as file:
        file.write(b"REFUSE THE RESTORE")
    with pytest.raises(ServerError, match=r"status 1.*snapshot auto-\d+ is kept"):
        running.run(image, ["false"], atomic=True)
    with FakeVolume.open(image, writable=False) as volume:
        assert len(volume.snapshot_names()) == 1


def test_run_says_when_the_command_left_users_behind(place: Place) -> None:
    command = ["sh", "-c", 'exec 3<"$0"; sleep 60 >/dev/null 2>&1 & echo $! >"$1"', "{}", str(place.root / "pid")]
    with pytest.raises(VolumeBusy, match="stays served"):
        running.run(str(place.image), command)
    server = place.server_pid()
    os.kill(int((place.root / "pid").read_text()), signal.SIGKILL)
    until(lambda: not alive(server))


# ---- check


def test_check(place: Place) -> None:
    place.mkfs("-O", "^metadata_csum")
    image = str(place.image)
    with session.open_session(image, writable=True) as commands:
        commands.call("create", name="good")
    sh("debugfs", "-w", "-R", "set_inode_field <2> mode 010755", image)
    with session.open_session(image, writable=True) as commands:
        commands.call("create", name="bad")
    sh("debugfs", "-w", "-R", "set_inode_field <2> mode 040755", image)
    report = checking.check(image)
    assert report["version"] == 1
    assert report["ok"] is False
    assert report["base"] == {"e2fsck": 0, "ok": True}
    assert report["store"] == {"ok": True, "errors": []}
    good, bad = report["snapshots"]
    assert good == {"name": "good", "e2fsck": 0, "ok": True, "errors": []}
    assert (bad["name"], bad["ok"]) == ("bad", False)
    assert bad["e2fsck"] & 4
    assert bad["errors"]
    assert checking.check(image, ["good"])["ok"] is True
    assert checking.check(image, quick=True)["ok"] is True
    with pytest.raises(SnapshotNotFound):
        checking.check(image, ["none"])
    place.attach()
    served = checking.check(image)
    assert served == report
    sh("mount", "-o", "loop", str(place.volume), str(place.mnt))
    mounted = checking.check(image, ["good"])
    assert mounted["base"] == {"e2fsck": 0, "ok": True}
    assert mounted["ok"] is True
    assert [call for call in place.calls() if "check-" in call][-2:] == [
        f"create {name}" if made else f"delete {name}" for name, made in _checked(place)
    ]
    sh("umount", str(place.mnt))
    place.detach()


def _checked(place: Place) -> list[tuple[str, bool]]:
    """The temporary snapshot of the last check of a mounted volume, made and deleted."""
    name = [call for call in place.calls() if call.startswith("create check-")][-1].removeprefix("create ")
    return [(name, True), (name, False)]


def test_check_tells_orphans_and_journals_from_damage(place: Place) -> None:
    place.mkfs()
    image = str(place.image)
    mountpoints.mount(image, str(place.mnt))
    with (place.mnt / "unlinked").open("wb") as held:
        held.write(b"x" * 500_000)
        held.flush()
        (place.mnt / "other").write_bytes(b"y" * 1000)
        (place.mnt / "unlinked").unlink()
        sh("fsfreeze", "-f", str(place.mnt))
        frozen = place.image.read_bytes()
        sh("fsfreeze", "-u", str(place.mnt))
        (place.mnt / "later").write_bytes(b"z" * 300_000)
        sh("sync", "-f", str(place.mnt))
        crashed = place.image.read_bytes()
    mountpoints.umount(str(place.mnt))
    clean = place.image.read_bytes()
    for name, content in (("frozen", frozen), ("crashed", crashed), ("clean", clean)):
        with place.image.open("r+b") as file:
            file.write(content)
        with FakeVolume.open(image, writable=True) as volume:
            volume.verb("create", name=name)
    assert subprocess.run(["e2fsck", "-fn", image + ".1"], capture_output=True).returncode == 4
    report = checking.check(image)
    assert [(entry["name"], entry["ok"]) for entry in report["snapshots"]] == [
        ("frozen", True), ("crashed", True), ("clean", True),
    ]  # fmt: skip
    assert report["ok"] is True
