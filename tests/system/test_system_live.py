"""Snapshots of volumes that are mounted: frozen, as after a crash, thawed whatever happens, and judged by copies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
from arena import arena, make_volume

from extsnap.serve import control, mounting, recovering
from extsnap.serve.freezer import Frozen

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.system

KINDS = ["ext2", "ext3", "ext4"]
HANG = 180


def sh(*command: str | os.PathLike[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + HANG
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def wait_for_loops(directory: Path) -> None:
    """A loop device goes after its mount when nobody looks at it any more: others look at all that there are."""
    deadline = time.monotonic() + HANG
    while mounting.loops_over(str(directory)):
        assert time.monotonic() < deadline, f"loop devices over {directory} stay"
        time.sleep(0.02)


@contextlib.contextmanager
def served(cli: Cli, kind: str, *options: str, mebibytes: int = 48, size: int = 8) -> Iterator[tuple[Path, Path, Path]]:
    """New, with a file of ``size`` MiB, attached and mounted by somebody else: (image, directory, mount point)."""
    with arena() as top:
        image = make_volume(top / "disk.img", kind, mebibytes, "-b", "4096", files={"old": os.urandom(size << 20)})
        directory, point = top / "served", top / "mount"
        directory.mkdir()
        point.mkdir()
        cli("attach", image, directory)
        try:
            sh("mount", "-o", ",".join(["loop", *options]), directory / "volume", point)
            try:
                yield image, directory, point
            finally:
                sh("umount", point)
        finally:
            wait_for_loops(directory)
            cli("detach", image)
        oracle.assert_clean(image)


@contextlib.contextmanager
def frozen_by_hand(point: Path) -> Iterator[None]:
    sh("fsfreeze", "--freeze", point)
    try:
        yield
    finally:
        sh("fsfreeze", "--unfreeze", point)


@contextlib.contextmanager
def writers(point: Path) -> Iterator[dict[str, int]]:
    """Two writers that log what is fsynced: file name to the number of its last line."""
    synced: dict[str, int] = {}
    stop = threading.Event()

    def write(name: str) -> None:
        number = 0
        with (point / name).open("w") as file:
            while not stop.is_set():
                number += 1
                file.write(f"{number:011d}\n")
                file.flush()
                if number % 50 == 0:
                    os.fsync(file.fileno())
                    synced[name] = number

    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    try:
        while len(synced) < 2:
            time.sleep(0.01)
        yield synced
    finally:
        stop.set()
        for thread in threads:
            thread.join(HANG)
            assert not thread.is_alive(), "a writer hangs"


def entry(cli: Cli, image: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cli("show", "--json", image, name).stdout)
    return found


def is_writable(point: Path) -> bool:
    """Whether a write to a filesystem comes back: it does not while that is frozen."""
    done = subprocess.run(["timeout", "-s", "KILL", "20", "touch", point / "probe"], check=False)
    return done.returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_of_a_frozen_volume_is_exact(kind: str, run_cli: Cli) -> None:
    """Judged by a whole copy that was taken while somebody else held the volume frozen."""
    with served(run_cli, kind) as (image, directory, point):
        (point / "file").write_bytes(os.urandom(3 << 20))
        with frozen_by_hand(point):
            # What is on its way from the kernel's cache is in the copy; the snapshot must fetch it by itself.
            copy = oracle.copy_image(directory / "volume", image.parent / "copy.img")
            run_cli("create", image, "then")
        assert entry(run_cli, image, "then")["consistency"] == "frozen"
        for name in ("file", "old"):
            with (point / name).open("r+b") as file:
                file.write(os.urandom(2 << 20))
        (point / "new").write_bytes(os.urandom(1 << 20))
        sh("sync", "--file-system", point)
        oracle.assert_view_is_copy(directory / "snapshots" / "then", copy)
        report = json.loads(run_cli("check", "--json", image).stdout)
        assert report["ok"]
        assert report["base"] == {"e2fsck": 0, "ok": True}
        assert [found["name"] for found in report["snapshots"]] == ["then"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_under_load(kind: str, run_cli: Cli) -> None:
    """Everything that was fsynced before is there, whole lines up to some point, and fsck needs no replay."""
    with served(run_cli, kind) as (image, directory, point):
        with writers(point) as synced:
            before = dict(synced)
            run_cli("create", image, "then")
            after = dict(synced)
            deadline = time.monotonic() + HANG
            while any(synced[name] == after[name] for name in synced):
                assert time.monotonic() < deadline, "the writers do not go on"
                time.sleep(0.01)
        assert entry(run_cli, image, "then")["consistency"] == "frozen"
        view = directory / "snapshots" / "then"
        oracle.assert_clean(view)
        with oracle.mounted(view) as then:
            for name, number in before.items():
                lines = (then / name).read_text().split()
                assert lines == [f"{line:011d}" for line in range(1, len(lines) + 1)]
                assert len(lines) >= number


@pytest.mark.parametrize(("kind", "options"), [("ext4", ""), ("ext3", "data=journal"), ("ext2", "")])
def test_what_was_fsynced_is_in_a_snapshot_without_a_freeze(kind: str, options: str, run_cli: Cli) -> None:
    """Its blocks are used by the journal alone at that moment, and are overwritten afterwards."""
    content = {f"fsynced-{number}": os.urandom(1 << 20) for number in range(4)}
    with served(run_cli, kind, *([options] if options else [])) as (image, directory, point):
        for name, data in content.items():
            with (point / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        run_cli("create", "--no-freeze", image, "then")
        assert entry(run_cli, image, "then")["consistency"] == "crash"
        for name in content:
            (point / name).unlink()
        sh("sync", "--file-system", point)
        for number in range(8):
            (point / f"other-{number}").write_bytes(os.urandom(1 << 20))
        sh("sync", "--file-system", point)
        after = oracle.copy_image(directory / "snapshots" / "then", image.parent / "then.img")
        subprocess.run(["e2fsck", "-fy", after], capture_output=True, check=False)
        oracle.assert_clean(after)
        with oracle.mounted(after) as then:
            for name, data in content.items():
                found = then / name if (then / name).exists() else None
                assert found is not None or kind == "ext2", f"{name} is lost"  # ext2 does not fsync directories' blocks
                assert found is None or found.read_bytes() == data, f"{name} has other bytes"
        report = json.loads(run_cli("check", "--json", image).stdout)
        assert report["ok"], report


@pytest.mark.parametrize(("kind", "options"), [("ext4", ""), ("ext3", "data=journal"), ("ext2", "")])
def test_what_a_snapshot_of_a_mounted_volume_is_restored_to(kind: str, options: str, run_cli: Cli) -> None:
    """What stock e2fsck makes of its view: the log replayed, and the files that were open and unlinked gone."""
    with served(run_cli, kind, *([options] if options else []), mebibytes=96, size=2) as (image, directory, point):
        by_hand: set[str] = set()
        for number in range(3):
            (point / f"file-{number}").write_bytes(os.urandom(300_000))
        sh("sync", "--file-system", point)
        (point / "directory").mkdir()
        for number in range(3):
            with (point / "directory" / f"fsynced-{number}").open("wb") as file:
                file.write(os.urandom(300_000))
                os.fsync(file.fileno())
        with (point / "file-1").open("rb") as held:
            (point / "file-1").unlink()
            with (point / "file-2").open("r+b") as file:
                file.write(b"written again")
                os.fsync(file.fileno())
            run_cli("create", "--no-freeze", image, "crash")
            run_cli("create", image, "frozen")
            for name in ("crash", "frozen"):
                copy = oracle.copy_image(directory / "snapshots" / name, image.parent / f"{name}.img")
                if subprocess.run(["e2fsck", "-p", copy], capture_output=True, check=False).returncode > 3:
                    assert kind == "ext2", "only without a journal e2fsck may have to ask"
                    subprocess.run(["e2fsck", "-fy", copy], capture_output=True, check=False)
                    by_hand.add(name)
            assert held.read(1)
        for number in range(3):
            (point / f"other-{number}").write_bytes(os.urandom(300_000))
            (point / "directory" / f"fsynced-{number}").unlink()
        sh("umount", point)
        wait_for_loops(directory)
        for name in ("crash", "frozen"):
            restored(run_cli, image, name, by_hand)  # of an attached volume
            oracle.assert_clean(directory / "volume")
            oracle.assert_same_tree(without_store(image.parent / f"{name}.img"), without_store(directory / "volume"))
        run_cli("detach", image)
        oracle.assert_clean(image)
        restored(run_cli, image, "crash", by_hand)  # and of one at rest
        oracle.assert_clean(image)
        assert oracle.superblock_facts(image)["Filesystem state"] == "clean"
        oracle.assert_same_tree(without_store(image.parent / "crash.img"), without_store(image))
        report = json.loads(run_cli("check", "--json", image).stdout)
        assert report["ok"], report
        run_cli("attach", image, directory)
        sh("mount", "-o", "loop", directory / "volume", point)


def test_a_mounted_ext2_without_a_fault_is_restored_at_rest(run_cli: Cli) -> None:
    """It was not unmounted, which is all that e2fsck finds: that is put right without a question."""
    with served(run_cli, "ext2", mebibytes=24, size=2) as (image, directory, point):
        (point / "file").write_bytes(b"then")
        sh("sync", "--file-system", point)
        run_cli("create", "--no-freeze", image, "crash")
        (point / "file").write_bytes(b"now")
        sh("umount", point)
        wait_for_loops(directory)
        run_cli("detach", image)
        run_cli("restore", "--no-safety", image, "crash")
        oracle.assert_clean(image)
        assert oracle.superblock_facts(image)["Filesystem state"] == "clean"
        with oracle.mounted(image) as then:
            assert (then / "file").read_bytes() == b"then"
        run_cli("attach", image, directory)
        sh("mount", "-o", "loop", directory / "volume", point)


def test_the_volume_can_be_opened_as_soon_as_orphans_are_gone(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else opens it meanwhile; that ends with an answer, not when the server hears that we hung up."""
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 24, "-b", "4096")
        directory = top / "served"
        directory.mkdir()
        run_cli("attach", image, directory)
        connections: list[control.ControlClient] = []
        try:
            monkeypatch.setattr(control.ControlClient, "close", lambda client: connections.append(client))
            recovering.let_go_of_orphans(str(image), None, "one")
            # Not one of our children, which may: its parent is gone when it opens the volume.
            said = top / "said"
            opens = f"sleep 0.3; true <{directory / 'volume'}; echo $? >{said}.new; mv {said}.new {said}"
            sh("sh", "-c", f"({opens}) 2>&- &")
            wait_for(said)
            assert said.read_text() == "0\n"
        finally:
            monkeypatch.undo()
            for connection in connections:
                connection.close()
            run_cli("detach", image)


def restored(cli: Cli, image: Path, name: str, by_hand: set[str]) -> None:
    """Restore a snapshot, and do what the message says where e2fsck has to ask."""
    done = cli("restore", "--no-safety", image, name, status=1 if name in by_hand else 0)
    if name in by_hand:
        assert f"is restored, but e2fsck -p gave up on what the moment of {name} left to be done: " in done.stderr
        assert f"run extsnap run {image} -- e2fsck -fy {{}}" in done.stderr
        cli("run", image, "--", "e2fsck", "-fy", "{}", status=1)


def without_store(image: Path) -> oracle.Manifest:
    return {name: entry for name, entry in oracle.tree_of_image(image).items() if not name.startswith(".extsnap")}


def test_a_volume_that_somebody_else_brought_to_rest(run_cli: Cli) -> None:
    with served(run_cli, "ext4") as (image, _, point):
        with frozen_by_hand(point):
            run_cli("create", "--quiesced", image, "quiesced")
        (point / "file").write_bytes(b"x" * 100_000)
        sh("sync", "--file-system", point)
        done = run_cli("create", "--quiesced", image, "not quiesced")
        assert "was not at rest" in done.stderr
        found = [
            (each["name"], each["consistency"])
            for each in json.loads(run_cli("list", "--json", image).stdout)["snapshots"]
        ]
        assert found == [("quiesced", "frozen"), ("not quiesced", "crash")]


def test_what_only_the_kernel_has_of_the_served_file(run_cli: Cli) -> None:
    """A write to the file that nobody has flushed is older than the snapshot."""
    with served(run_cli, "ext4") as (image, directory, point):
        block = oracle.file_blocks(directory / "volume", "/old").data_blocks[5]
        sh("umount", point)
        try:
            with (directory / "volume").open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"new" * 1000, block * 4096)
                run_cli("create", image, "then")
                with (directory / "snapshots" / "then").open("rb") as view:
                    assert os.pread(view.fileno(), 3000, block * 4096) == b"new" * 1000
            assert entry(run_cli, image, "then")["consistency"] == "crash"
        finally:
            sh("mount", "-o", "loop", directory / "volume", point)


def test_commands_on_a_mounted_volume(run_cli: Cli) -> None:
    with served(run_cli, "ext4") as (image, directory, point):
        for number in range(3):
            (point / f"file-{number}").write_bytes(os.urandom(100_000))
            run_cli("create", image, f"s{number}")
        assert sorted(os.listdir(directory / "snapshots")) == ["s0", "s1", "s2"]
        places = [image.parent / f"m{number}" for number in range(3)]
        with contextlib.ExitStack() as stack:
            for number, place in enumerate(places):
                place.mkdir()
                run_cli("mount", "--snapshot", f"s{number}", image, place)
                stack.callback(run_cli, "umount", place)
                assert sum((place / f"file-{other}").exists() for other in range(3)) == number + 1
            refused = run_cli("delete", image, "s1", status=1)
            assert str(places[1]) in refused.stderr
            refused = run_cli("restore", image, "s0", status=1)
            assert f"mounted at {point}" in refused.stderr
            assert "unmount or close it first" in refused.stderr
            refused = run_cli("run", "--atomic", image, "--", "true", status=125)
            assert f"mounted at {point}" in refused.stderr
        wait_for_loops(directory / "snapshots")
        run_cli("dump", image, "records")
        run_cli("delete", image, "s1", "s0")
        assert os.listdir(directory / "snapshots") == ["s2"]


def test_two_snapshots_at_once(run_cli: Cli, extsnap_program: Path) -> None:
    """Each has the filesystem frozen for itself: the one who is first must not thaw it under the other."""
    with served(run_cli, "ext4") as (image, directory, point), writers(point):
        commands = [subprocess.Popen([extsnap_program, "create", image, f"s{number}"]) for number in range(4)]
        assert [command.wait(HANG) for command in commands] == [0] * 4
        for number in range(4):
            assert entry(run_cli, image, f"s{number}")["consistency"] == "frozen"
            oracle.assert_clean(directory / "snapshots" / f"s{number}")


FREEZE = """
import os, signal, sys
from extsnap.serve import control, mounting
from extsnap.serve.freezer import Frozen
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
with Frozen([sys.argv[1]]) as frozen:
    frozen.freeze()
    victim = frozen._process.pid if sys.argv[2] == "helper" else os.getpid()
    os.kill(victim, getattr(signal, sys.argv[3]))
    if sys.argv[2] == "helper":
        frozen._process.wait()
print(frozen.held)
"""


@pytest.fixture
def plain_mount(tmp_path: Path) -> Iterator[Path]:
    image = make_volume(tmp_path / "plain.img", "ext4", 16)
    with oracle.mounted(image, writable=True) as point:
        yield point
        deadline = time.monotonic() + HANG
        while mounting.processes_using(str(point)):  # the one that thaws may outlive the one that was killed
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("who", "number"), [("caller", "SIGKILL"), ("caller", "SIGINT"), ("caller", "SIGTERM"), ("helper", "SIGKILL")]
)
def test_a_thaw_happens_whoever_is_killed(who: str, number: str, plain_mount: Path) -> None:
    command = [sys.executable, "-c", FREEZE, plain_mount, who, number]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert "True" not in done.stdout
    assert is_writable(plain_mount)


def test_a_freeze_has_an_end(plain_mount: Path) -> None:
    with Frozen([str(plain_mount)], limit=0.2) as frozen:
        frozen.freeze()
        assert is_writable(plain_mount)  # once it is over
    assert not frozen.held
    with Frozen([str(plain_mount)]) as frozen:
        frozen.freeze()
    assert frozen.held


def test_what_cannot_be_frozen_is_named(tmp_path: Path, plain_mount: Path) -> None:
    with Frozen([str(plain_mount), "/proc"]) as frozen, pytest.raises(OSError) as caught:
        frozen.freeze()
    assert caught.value.filename == "/proc"
    assert is_writable(plain_mount)


def test_a_temporary_snapshot_goes_with_its_client(run_cli: Cli, extsnap_program: Path) -> None:
    with served(run_cli, "ext4") as (image, directory, point):
        (point / "file").write_bytes(os.urandom(100_000))
        code = (
            "import os, signal, sys\n"
            "from extsnap.serve import control, live\n"
            "client, hello = control.connect(control.image_key(sys.argv[1]))\n"
            "with live.temporary(client, hello['directory'], 'check') as made:\n"
            "    assert os.listdir(sys.argv[2]) == [made['name']]\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, image, directory / "snapshots"], check=False, timeout=HANG)
        assert done.returncode == -signal.SIGKILL
        deadline = time.monotonic() + HANG
        while os.listdir(directory / "snapshots"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
