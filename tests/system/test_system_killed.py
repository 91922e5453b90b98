"""Servers and commands are killed (``tools/campaign kills``, in short), and what of that chance would not choose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from arena import make_volume
from campaigns import kills
from campaigns.kills_place import AT_ONCE, PROGRAM, Place, alive, finished, place, until
from campaigns.report import short_form

import extsnap

pytestmark = pytest.mark.system


@pytest.mark.parametrize("part", kills.PARTS)
def test_a_campaign_of_kills(part: str) -> None:
    short_form(kills.CAMPAIGN, part)


# What stands on a served directory, case by case.


@pytest.fixture
def at() -> Iterator[Place]:
    """A place with a volume and a snapshot, for tests that are about mounts."""
    with place() as found:
        for directory in (found.mount, found.second, found.served, found.top / "out"):
            directory.mkdir()
        make_volume(found.image, "ext4", 16, files={"here": b"still"})
        with extsnap.open(found.image) as volume:
            volume.create("zero")
        try:
            yield found
        finally:
            found.clean()


def kill_server(at: Place) -> None:
    server = at.server()
    os.kill(server, signal.SIGKILL)
    until(lambda: not alive(server), "the killed server does not go", AT_ONCE)


def test_detach_names_what_stands_on_a_dead_directory_and_force_takes_it_off(at: Place) -> None:
    at.extsnap("attach", at.image, at.served)
    at.extsnap("mount", at.image, at.mount)
    at.command("mount", "--bind", at.mount, at.second)
    loop = at.command("losetup", "--find", "--show", "--read-only", at.served / "volume").out.strip()
    kill_server(at)
    for target in (at.image, at.served, at.mount):
        refused = at.extsnap("detach", target, status=1)
        for word in (str(at.mount), str(at.second), loop, f"extsnap detach --force {target}"):
            assert word in refused.err, str(refused)
    again = at.extsnap("attach", at.image, at.served, status=1)
    assert f"extsnap detach {at.served}" in again.err, str(again)
    done = at.extsnap("detach", "--force", at.served)
    for word in (f"unmounted {at.mount}", f"unmounted {at.second}", f"detached {loop}", f"unmounted {at.served}"):
        assert word in done.err, str(done)
    at.assert_nothing_left()
    assert at.extsnap("detach", "--force", at.served, status=1).err.count("is not served") == 1
    at.recover()


def test_detach_of_a_dead_directory_that_nothing_stands_on(at: Place) -> None:
    at.extsnap("attach", at.image, at.served)
    kill_server(at)
    assert "not left clean" in at.extsnap("detach", at.image, status=1).err
    at.assert_nothing_left()


def test_a_mount_of_somebody_else_inside_is_left_alone(at: Place) -> None:
    at.extsnap("mount", at.image, at.mount)
    (at.mount / "inner").mkdir()
    at.command("mount", "-t", "tmpfs", "none", at.mount / "inner")
    kill_server(at)
    refused = at.extsnap("detach", "--force", at.image, status=1)
    assert f"{at.mount}/inner" in refused.err, str(refused)
    assert "nothing was done" in refused.err, str(refused)
    assert os.path.ismount(at.mount)
    at.command("umount", at.mount / "inner")
    at.extsnap("detach", "--force", at.image)
    at.assert_nothing_left()


def test_a_mount_under_the_mount_stays(at: Place) -> None:
    at.command("mount", "-t", "tmpfs", "none", at.mount)
    at.extsnap("mount", at.image, at.mount)
    kill_server(at)
    at.extsnap("detach", "--force", at.mount)
    assert at.mounts() == [str(at.mount)], "the tmpfs below is not ours"
    at.command("umount", at.mount)
    at.assert_nothing_left()


def test_a_loop_device_over_a_file_that_the_directory_hides_stays(at: Place) -> None:
    hidden = make_volume(at.served / "volume", "ext4", 8)
    loop = at.command("losetup", "--find", "--show", hidden).out.strip()
    try:
        at.extsnap("attach", at.image, at.served)
        at.extsnap("mount", at.image, at.mount)
        kill_server(at)
        at.command("mount", loop, at.second)
        assert "is not served" in at.extsnap("detach", "--force", at.second, status=1).err
        done = at.extsnap("detach", "--force", at.served)
        assert loop not in done.err, str(done)
        at.command("umount", at.second)
        assert at.loops() == [f"{loop} on {hidden}"]
    finally:
        at.command("losetup", "-d", loop)
    at.assert_nothing_left()


def test_partitions_of_a_loop_device_over_the_served_disk(at: Place) -> None:
    content = at.image.read_bytes()
    table = disks.boot_record([(disks.LINUX, 2048, len(content) // 512)])
    at.image.write_bytes(table.ljust(1 << 20, b"\0") + content)
    at.extsnap("attach", at.image, at.served)
    loop = at.command("losetup", "--find", "--show", "--partscan", at.served / "disk").out.strip()
    at.command("partx", "--add", loop, status=None)  # where the kernel does not read tables itself
    node = Path(f"{loop}p1")
    if not node.exists():  # no udev: the kernel knows it, /dev does not
        numbers = Path(f"/sys/block/{loop[5:]}/{loop[5:]}p1/dev").read_text().strip().split(":")
        at.command("mknod", at.top / "out/p1", "b", *numbers)
        node = at.top / "out/p1"
    at.command("mount", node, at.mount)
    kill_server(at)
    refused = at.extsnap("detach", at.image, status=1)
    assert str(at.mount) in refused.err, str(refused)
    at.extsnap("detach", "--force", at.mount)
    at.assert_nothing_left()


def test_the_image_was_moved(at: Place) -> None:
    at.extsnap("mount", at.image, at.mount)
    kill_server(at)
    moved = at.image.rename(at.top / "moved.img")
    try:
        refused = at.extsnap("detach", moved, status=1)
        assert str(at.mount) in refused.err, str(refused)
        at.extsnap("list", moved)
        at.extsnap("detach", "--force", at.top / "disk.img")
        at.assert_nothing_left()
        assert "does not exist" in at.extsnap("detach", "--force", at.top / "disk.img", status=1).err
        at.extsnap("create", moved, "one")
    finally:
        moved.rename(at.image)
    at.assert_at_rest()


def test_commands_go_on_beside_a_dead_mount_and_detach_still_finds_it(at: Place) -> None:
    at.extsnap("mount", at.image, at.mount)
    kill_server(at)
    at.extsnap("create", at.image, "one")
    at.extsnap("attach", at.image, at.served)
    at.extsnap("create", at.image, "two")
    assert os.path.ismount(at.mount)
    at.extsnap("detach", "--force", at.mount)
    assert at.mounts() == [str(at.served)], "the server that lives is another one"
    at.extsnap("create", at.image, "three")
    at.extsnap("detach", at.image)
    at.assert_nothing_left()
    at.assert_at_rest()


def test_umount_of_a_dead_mount_that_is_in_use(at: Place) -> None:
    at.extsnap("mount", at.image, at.mount)
    with (at.mount / "here").open("rb"):
        kill_server(at)
        refused = at.extsnap("umount", at.mount, status=1)
        assert f"extsnap detach --force {at.mount}" in refused.err, str(refused)
        assert f"pid {os.getpid()}" in refused.err, str(refused)
    assert "had ended before" in at.extsnap("umount", at.mount, status=1).err
    at.assert_nothing_left()


def test_force_takes_a_living_server_away_from_whoever_stands_in_the_mount(at: Place) -> None:
    at.extsnap("mount", at.image, at.mount)
    sleeper = at.start("sleep", "600", cwd=at.mount)
    (at.mount / "written").write_bytes(b"before")
    done = at.extsnap("detach", "--force", at.image, status=1)
    assert f"sleep (pid {sleeper.pid})" in done.err, str(done)
    assert "not left clean" in done.err, str(done)
    assert not at.mounts()
    sleeper.kill()
    finished(sleeper)
    at.recover()
    assert at.command("debugfs", "-R", "cat /written", at.image).out == "before", "it was written before"
    at.assert_nothing_left()


def test_a_recovery_that_gave_up_leaves_the_mark(at: Place) -> None:
    """Without a journal: e2fsck -p has marked the filesystem with errors, and its bitmaps are what the crash left."""
    at.image.unlink()
    make_volume(at.image, "ext2", 16, files={"here": b"still", "file": bytes(range(256)) * 64})
    at.extsnap("create", at.image, "one")
    at.extsnap("attach", at.image, at.served)
    at.command("debugfs", "-w", "-R", "sif /file block[1] 99999999", at.served / "volume")
    at.command("debugfs", "-w", "-R", "ssv state 0", at.served / "volume")
    kill_server(at)
    for _ in range(2):
        refused = at.extsnap("create", at.image, "two", status=1)
        assert "-- e2fsck -fy {}" in refused.err, str(refused)
        at.assert_marked()
    at.extsnap("run", at.image, "--", "e2fsck", "-fy", "{}", status=1)
    at.assert_at_rest()
    at.extsnap("create", at.image, "two")
    at.assert_nothing_left()


# What is left in the runtime directory.


def test_the_runtime_directory_is_swept(at: Place) -> None:
    old = time.time() - 30 * 24 * 3600
    kept = ["1-2.log", "serve-held", "other", "1-6.9.json"]
    (at.runtime / "serve-left").mkdir()
    (at.runtime / "serve-held").mkdir()
    for name in ("1-2.log", "1-3.log.old", "1-3.log", "1-4.5.log", ".1-4.999999999", "1-4.json.999999999", "other"):
        (at.runtime / name).touch()
        if name != "1-2.log":
            os.utime(at.runtime / name, (old, old))
    record = '{"pid": %d, "directory": "/nowhere", "image": "/nothing", "private": true, "offset": 0}'
    (at.runtime / "1-5.9.json").write_text(record % 999999999)
    holder = at.start("flock", "--shared", at.runtime / "serve-held", "sleep", "600")
    until(
        lambda: subprocess.run(["flock", "--nonblock", at.runtime / "serve-held", "true"], check=False).returncode,
        "nobody holds the directory",
    )
    (at.runtime / "1-6.9.json").write_text(record % holder.pid)
    at.extsnap("attach", at.image, at.served)
    at.extsnap("detach", at.served)
    assert sorted(path.name for path in at.runtime.iterdir()) == sorted(kept)
    os.killpg(holder.pid, signal.SIGKILL)
    finished(holder)


def test_an_old_record_does_no_harm_to_who_serves_there_now(at: Place) -> None:
    record = '{"pid": 999999999, "directory": "%s", "image": "%s", "private": false, "offset": 0}'
    (at.runtime / "1-5.9.json").write_text(record % (at.served, at.image))
    process = at.start(PROGRAM, "attach", "--foreground", at.image, at.served)
    volume = at.served / "volume"
    until(lambda: volume.exists() or process.poll() is not None, "it does not serve", pids=[process.pid])
    other = make_volume(at.top / "out/other.img", "ext4", 8)
    at.extsnap("run", other, "--", "true")
    assert not (at.runtime / "1-5.9.json").exists()
    assert volume.exists()
    at.extsnap("detach", at.served)
    assert finished(process).status == 0


def test_a_killed_export_leaves_no_file(at: Place) -> None:
    """Killed where it is furthest from its end: with everything written and nothing named."""
    at.extsnap("create", at.image, "one")
    script = (
        "import os, signal, sys; from extsnap.cli.app import main; "
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL); "
        "main(sys.argv[1:])"
    )
    done = at.command(sys.executable, "-c", script, "export", at.image, "one", at.top / "out/one", status=None)
    assert done.status == -signal.SIGKILL, str(done)
    assert list((at.top / "out").iterdir()) == []
    at.extsnap("export", at.image, "one", at.top / "out/one")
    assert [path.name for path in (at.top / "out").iterdir()] == ["one"]
