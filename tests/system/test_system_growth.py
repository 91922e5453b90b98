"""The store grows, adopts, shrinks while the kernel has the volume mounted; judged by copies, debugfs and e2fsck."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import oracle
import pytest
from arena import arena, make_volume

from extsnap.serve import control, grower, mounting

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.system

MIB = 1 << 20
PATIENCE = 180.0
LONG = bool(os.environ.get("EXTSNAP_LONG"))
MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")


def content(seed: int, mebibytes: int) -> bytes:
    rng = random.Random(seed)
    return b"".join(rng.randbytes(MIB) for _ in range(mebibytes))


def fill(path: Path) -> None:
    """A file that takes all that is free."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def info(cli: Cli, image: Path) -> dict[str, object]:
    return dict(json.loads(cli("info", "--json", image).stdout))


def store_bytes(cli: Cli, image: Path) -> int:
    return int(info(cli, image)["store"]["bytes"])  # type: ignore[index]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def options_of(mount: Path) -> str:
    """Options of an ext filesystem that are in force."""
    name = Path(mounting.mount_at(str(mount)).source).name  # type: ignore[union-attr]
    return Path("/proc/fs/ext4", name, "options").read_text()


def at_home(image: Path, blocks: np.ndarray) -> bytes:
    """What these blocks of 4 KiB hold in an image's file."""
    with image.open("rb", buffering=0) as file:
        return b"".join(os.pread(file.fileno(), 4096, block * 4096) for block in blocks.tolist())


def free_and_store(cli: Cli, image: Path, mount: Path) -> int:
    """Blocks of 4 KiB that df inside the mount calls free, and those of the store, while it does not grow."""
    seen = (0, 0)
    while True:
        now = os.statvfs(mount).f_bfree, store_bytes(cli, image) // 4096
        if now == seen:
            return sum(now)
        seen = now
        time.sleep(0.5)


@contextlib.contextmanager
def snapshot_and_mount(cli: Cli, image: Path, top: Path) -> Iterator[tuple[Path, Path]]:
    """(mount point, copy of the image at the snapshot "one"); unmounted afterwards."""
    cli("create", image, "one")
    copy = oracle.copy_image(image, top / "one.copy")
    mount = top / "mount"
    mount.mkdir()
    cli("mount", image, mount)
    try:
        yield mount, copy
    finally:
        if os.path.ismount(mount):
            cli("umount", mount)


def judge(cli: Cli, image: Path, copy: Path, top: Path, name: str = "one") -> None:
    """Base and view are clean, the view is exact, header and inode agree, and nothing reads as never written."""
    oracle.assert_clean(image)
    served = top / "served"
    served.mkdir()
    cli("attach", image, served)
    try:
        oracle.assert_view_is_copy(served / "snapshots" / name, copy)
        oracle.assert_clean(served / "snapshots" / name)
    finally:
        cli("detach", image)
    assert "[u]" not in "".join(oracle.debugfs(image, "stat /.extsnap/store"))
    assert json.loads(cli("check", "--quick", "--json", image).stdout)["ok"]
    served.rmdir()


def adopted(cli: Cli, image: Path) -> int:
    """Copies that are the very block of which they are the copy, by debugfs's map of the store."""
    stat = "".join(oracle.debugfs(image, "stat /.extsnap/store"))
    place: dict[int, int] = {}
    for first, last, start in re.findall(r"\((\d+)(?:-(\d+))?\):(\d+)", stat):
        for logical in range(int(first), int(last or first) + 1):
            place[logical] = int(start) + logical - int(first)
    records = json.loads(cli("dump", "--json", image, "records").stdout)["records"]
    return sum(
        place.get(record["copy"] + index) == record["block"] + index
        for record in records
        if record["copy"] is not None
        for index in range(record["length"])
    )


def overwrite(descriptor: int, length: int, piece: bytes) -> None:
    """Overwrite so many bytes of a file, from its beginning, with the same piece again and again."""
    for offset in range(0, length, len(piece)):
        os.pwrite(descriptor, piece, offset)


@contextlib.contextmanager
def little_memory(limit: int) -> Iterator[list[str]]:
    """The beginning of a command that runs in a cgroup of its own with so much memory; empty where there is none."""
    group = MEMORY_CGROUP / f"extsnap-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield []
        return
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        until(lambda: not (group / "cgroup.procs").read_text().strip(), "the end of the cgroup's processes")
        group.rmdir()


@pytest.mark.parametrize("kind", ["ext4", "ext3", "ext2"])
def test_more_is_overwritten_than_there_was_room_for(kind: str, run_cli: Cli) -> None:
    """Without one fsync: what the last unmount flushes has room as well.  The writer has little memory."""
    size = 72
    with arena() as top:
        image = make_volume(top / "disk.img", kind, 200, "-b", "4096", "-m", "0", files={"big": content(1, size)})
        new = top / "new"
        new.write_bytes(content(2, size))
        with snapshot_and_mount(run_cli, image, top) as (mount, copy):
            room = int(info(run_cli, image)["store"]["room_bytes"])  # type: ignore[index]
            assert room < size * MIB, "there was room for all of it: this test shows nothing"
            with little_memory(24 * MIB) as begin:
                command = [*begin, "dd", f"if={new}", f"of={mount}/big", "bs=1M", "conv=notrunc"]
                subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
            told = free_and_store(run_cli, image, mount)
        after = oracle.store_blocks(image)
        assert after is not None
        assert len(after.data_blocks) * 4096 >= size * MIB
        # What df said was true: what is not the store's is free or was used before.
        assert abs(oracle.free_count(image) + len(after.data_blocks) - told) < 64
        with oracle.mounted(image) as directory:
            assert (directory / "big").read_bytes() == new.read_bytes()
        judge(run_cli, image, copy, top)
        run_cli("delete", image, "one")
        oracle.assert_clean(image)


def test_space_is_given_back_while_mounted_and_the_dirty_limit_put_back(run_cli: Cli) -> None:
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 160, "-b", "4096", "-m", "0", files={"big": content(3, 48)})
        with snapshot_and_mount(run_cli, image, top) as (mount, _):
            loop = next(loop for loop in mounting.loops() if loop.path == mounting.mount_at(str(mount)).source)  # type: ignore[union-attr]
            bdi = Path("/sys/class/bdi", loop.device)
            until(lambda: (bdi / "strict_limit").read_text().strip() == "1", "a limit of dirty pages")
            assert int((bdi / "max_bytes").read_text()) <= 16 * MIB
            under = Path("/sys/class/bdi", mounting.fuse_mount_at(os.path.dirname(loop.backing)).device)  # type: ignore[union-attr]
            until(
                lambda: (under / "strict_limit").read_text().strip() == "1", "a limit of what the kernel caches below"
            )
            assert int((under / "max_bytes").read_text()) <= 8 * MIB
            with (mount / "big").open("r+b") as file:
                file.write(content(4, 48))
                os.fsync(file.fileno())
            before, free = store_bytes(run_cli, image), os.statvfs(mount).f_bfree
            run_cli("delete", image, "one")
            until(lambda: os.statvfs(mount).f_bfree > free + 40 * 256, "the space of the copies")
            assert store_bytes(run_cli, image) < before - 40 * MIB

        def is_another() -> bool:
            """Loop devices are used again: a test beside this one may have it by now, with a limit of its own."""
            return any(one.device == loop.device and one.backing != loop.backing for one in mounting.loops())

        until(lambda: is_another() or (bdi / "strict_limit").read_text().strip() == "0", "the limit to be lifted")
        assert is_another() or int((bdi / "max_ratio").read_text()) == 100
        oracle.assert_clean(image)
        with oracle.mounted(image) as directory:
            assert (directory / "big").read_bytes() == content(4, 48)
        assert json.loads(run_cli("check", "--json", image).stdout)["ok"]


@pytest.mark.parametrize("kind", ["ext4", "ext3", "ext2"])
def test_freed_blocks_that_a_snapshot_needs_are_adopted(kind: str, run_cli: Cli) -> None:
    """A full volume of small files.  What is free are holes, and of some a snapshot needs the content."""
    small = {f"small{number:04}": content(number, 1)[:4096] for number in range(200)}
    files = {f"{name}-{turn:02}": data for turn in range(20) for name, data in small.items()}
    names = sorted(files)
    with arena() as top:
        options = ("-b", "4096", "-m", "0", "-N", "6000", *(() if kind == "ext2" else ("-J", "size=4")))
        image = make_volume(top / "disk.img", kind, 48, *options, files={"big": content(5, 6), **files})
        with oracle.mounted(image, writable=True) as directory:
            fill(directory / "rest")
            for number, name in enumerate(names):
                if number % 4 in (0, 1):
                    (directory / name).unlink()
        with snapshot_and_mount(run_cli, image, top) as (mount, copy):
            for number, name in enumerate(names):
                if number % 8 == 2:
                    (mount / name).unlink()
            subprocess.run(["sync", "-f", mount], check=True, timeout=PATIENCE)
            before = store_bytes(run_cli, image)
            with (mount / "big").open("r+b", buffering=0) as file:
                for piece in range(2):
                    file.write(content(600 + piece, 1)[: 3 * MIB // 4])
                    os.fsync(file.fileno())
            until(lambda: store_bytes(run_cli, image) > before, "growth")
        assert adopted(run_cli, image) > 20, "nothing was adopted: this test shows nothing"
        judge(run_cli, image, copy, top)
        run_cli("restore", "--no-safety", image, "one")
        oracle.assert_clean(image)
        with oracle.mounted(image) as directory:
            for number, name in enumerate(names):
                assert number % 4 in (0, 1) or (directory / name).read_bytes() == files[name]


@pytest.mark.parametrize("kind", ["ext4", "ext2", *(["ext3"] if LONG else [])])
def test_metadata_has_room_where_data_has_none_left(kind: str, run_cli: Cli) -> None:
    """Nothing more can be had: data is refused, and the filesystem stays writable and whole.

    Without a journal only inodes and bitmaps are known for what they are.
    """
    journaled = kind != "ext2"
    names = [f"d{number % 40:02}-{number:04}" for number in range(3000)]
    renamed = set(names[::7]) if journaled else set()
    with arena() as top:
        files = {"big": content(20, 36), **dict.fromkeys(names, b"x")}
        options = ("-b", "4096", "-m", "0", "-N", "4096", *(("-J", "size=4") if journaled else ()))
        image = make_volume(top / "disk.img", kind, 64, *options, files=files)
        with snapshot_and_mount(run_cli, image, top) as (mount, copy):
            descriptor = os.open(mount / "big", os.O_RDWR | os.O_DSYNC)
            try:
                for size in (MIB, 4096):
                    with pytest.raises(OSError, match="No space left"):
                        overwrite(descriptor, 36 * MIB, content(21, 1)[:size])
                for name in names:
                    (mount / name).chmod(0o600)
                for name in renamed:
                    (mount / name).rename(mount / f"{name}-renamed")
                # The first one may tell of the data once more.
                synced = [subprocess.run(["sync", "-f", mount], check=False).returncode for _ in range(2)]
                if journaled:
                    grower._empty_journal(descriptor)
            finally:
                os.close(descriptor)
            assert synced[1] == 0
        with oracle.mounted(image) as directory:
            for name in names:
                path = directory / (f"{name}-renamed" if name in renamed else name)
                assert path.stat().st_mode & 0o777 == 0o600
        judge(run_cli, image, copy, top)


KILLED = [("ext4", ""), ("ext3", "journal_data"), ("ext3", ""), ("ext2", ""), ("ext4", "journal_data")]


@pytest.mark.parametrize(("kind", "default"), KILLED if LONG else KILLED[:2])
def test_a_server_killed_while_it_grows(kind: str, default: str, run_cli: Cli) -> None:
    with arena() as top:
        image = make_volume(top / "disk.img", kind, 200, "-b", "4096", "-m", "0", files={"big": content(6, 72)})
        if default:
            subprocess.run(["tune2fs", "-o", default, image], check=True, capture_output=True)
        run_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "one.copy")
        mount = top / "mount"
        mount.mkdir()
        run_cli("mount", image, mount)
        served = info(run_cli, image)["attached"]
        before = store_bytes(run_cli, image)
        command = ["dd", "if=/dev/urandom", f"of={mount}/big", "bs=1M", "count=72", "conv=notrunc"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as writer:
            until(lambda: writer.poll() is not None or store_bytes(run_cli, image) > before, "growth")
            os.kill(served["pid"], signal.SIGKILL)  # type: ignore[index]
        run_cli("detach", "--force", image)
        until(lambda: not os.path.ismount(mount), "the unmount")
        run_cli("create", image, "two")  # recovers first
        assert json.loads(run_cli("check", "--json", image).stdout)["ok"]
        judge(run_cli, image, copy, top)


@pytest.mark.parametrize("kind", ["ext3", "ext4"])
def test_a_journal_that_takes_data(kind: str, run_cli: Cli) -> None:
    """The zero-fill of a growth goes through the journal, and is home before the blocks are used."""
    with arena() as top:
        options = ("-b", "4096", "-m", "0", "-J", "size=8")
        image = make_volume(top / "disk.img", kind, 160, *options, files={"big": content(12, 60)})
        subprocess.run(["tune2fs", "-o", "journal_data", image], check=True, capture_output=True)
        new = content(13, 60)
        with snapshot_and_mount(run_cli, image, top) as (mount, copy):
            assert "data=journal" in options_of(mount)
            room, before = int(info(run_cli, image)["store"]["room_bytes"]), store_bytes(run_cli, image)  # type: ignore[index]
            assert room < 60 * MIB, "there was room for all of it: this test shows nothing"
            with (mount / "big").open("r+b", buffering=0) as file:
                for low in range(0, 60 * MIB, 4 * MIB):
                    file.write(new[low : low + 4 * MIB])
                    os.fsync(file.fileno())
            assert store_bytes(run_cli, image) > before
        with oracle.mounted(image) as directory:
            assert (directory / "big").read_bytes() == new
        judge(run_cli, image, copy, top)


@pytest.mark.parametrize("way", ["checkpoint", "freeze"])
def test_a_journal_is_emptied(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is at home afterwards, by the kernel's own call or, without such a call, by a freeze."""
    if way == "freeze":
        monkeypatch.setattr(grower, "_EXT4_IOC_CHECKPOINT", 0x4004667B)
    data = content(14, 1)
    with arena() as top:
        image = make_volume(top / "disk.img", "ext3", 32, "-b", "4096", files={"file": content(17, 1)})
        blocks = oracle.file_blocks(image, "/file").data_blocks
        with oracle.mounted(image, "data=journal", writable=True) as mount, (mount / "file").open("r+b") as file:
            file.write(data)
            file.flush()
            with (mount / "other").open("wb") as other:  # its fsync commits what the transaction has of both
                os.fsync(other.fileno())
            assert at_home(image, blocks) == content(17, 1), "it never was in the journal only: this test shows nothing"
            grower._empty_journal(file.fileno())
            assert at_home(image, blocks) == data
            file.write(b"thawed")
            file.flush()
            os.fsync(file.fileno())


@pytest.mark.parametrize("kind", ["ext4", "ext3", "ext2"])
def test_the_first_snapshot_of_a_mounted_volume(kind: str, run_cli: Cli) -> None:
    """`mount` gives a volume its store, before the kernel has it; then a snapshot can be taken, and the store grows."""
    with arena() as top:
        image = make_volume(top / "disk.img", kind, 112, "-b", "4096", "-m", "0", files={"big": content(15, 24)})
        mount = top / "mount"
        mount.mkdir()
        run_cli("mount", image, mount)
        try:
            before = store_bytes(run_cli, image)
            run_cli("create", image, "one")
            served = Path(info(run_cli, image)["attached"]["directory"])  # type: ignore[index]
            copy = oracle.copy_image(served / "snapshots" / "one", top / "one.copy")
            with oracle.mounted(copy) as then:
                assert (then / "big").read_bytes() == content(15, 24)
            with (mount / "big").open("r+b") as file:
                file.write(content(16, 24))
                os.fsync(file.fileno())
            until(lambda: store_bytes(run_cli, image) > before, "growth")
        finally:
            run_cli("umount", mount)
        with oracle.mounted(image) as directory:
            assert (directory / "big").read_bytes() == content(16, 24)
        oracle.assert_clean(image)
        run_cli("export", image, "one", top / "one.export")
        with oracle.mounted(top / "one.export") as then:
            assert (then / "big").read_bytes() == content(15, 24)


def test_a_volume_without_room_for_a_store_is_mounted(run_cli: Cli) -> None:
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 16, "-b", "1024", "-m", "0")
        with oracle.mounted(image, writable=True) as directory:
            fill(directory / "rest")
        mount = top / "mount"
        mount.mkdir()
        run_cli("mount", image, mount)
        try:
            assert info(run_cli, image)["store"] is None
            run_cli("create", image, "one", status=1)
            (mount / "rest").unlink()
        finally:
            run_cli("umount", mount)
        run_cli("create", image, "one")
        oracle.assert_clean(image)


def test_what_the_kernel_left_is_made_whole_at_rest(run_cli: Cli) -> None:
    """A growth of which the header knows nothing, as a crash leaves it: given back, and the view is what it was."""
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 64, "-b", "1024", files={"big": content(7, 4)})
        run_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "one.copy")
        served = top / "served"
        served.mkdir()
        run_cli("attach", image, served)
        try:
            volume = served / "volume"
            before = oracle.store_blocks(volume)
            assert before is not None
            end = len(before.data_blocks)
            oracle.debugfs_write(
                volume, "sif /.extsnap/store flags 0x80040", f"fallocate /.extsnap/store {end} {end + 99}"
            )
            grown = oracle.store_blocks(volume)
            assert grown is not None
            assert len(grown.data_blocks) == end + 100
            assert "[u]" in "".join(oracle.debugfs(volume, "stat /.extsnap/store"))
        finally:
            run_cli("detach", image)
        served.rmdir()
        assert "Flags: 0x80050" in "".join(oracle.debugfs(image, "stat /.extsnap/store"))
        judge(run_cli, image, copy, top)


def test_room_for_a_snapshot_is_provided_and_nothing_grows_meanwhile(run_cli: Cli) -> None:
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 128, "-b", "4096", "-m", "0", files={"big": content(8, 40)})
        with snapshot_and_mount(run_cli, image, top) as (mount, copy):
            found = control.connect(control.image_key(str(image)))
            assert found is not None
            client = found[0]
            with client:
                assert client.call("server.provision") == {"in_use": "volume"}
                assert client.call("server.hold") == {"provided": True}
                before = store_bytes(run_cli, image)
                with (mount / "big").open("r+b") as file:
                    file.write(content(9, 24))
                    os.fsync(file.fileno())
                assert store_bytes(run_cli, image) == before, "it grew, although somebody was about to freeze"
            until(lambda: store_bytes(run_cli, image) > before, "growth after the client hung up")
        judge(run_cli, image, copy, top)


def test_snapshots_while_it_grows(run_cli: Cli) -> None:
    """A writer that makes the store grow, and snapshots meanwhile: all are clean, and the first one is exact."""
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 240, "-b", "4096", "-m", "0", files={"big": content(11, 72)})
        with snapshot_and_mount(run_cli, image, top) as (mount, copy):
            before = store_bytes(run_cli, image)
            command = ["dd", "if=/dev/urandom", f"of={mount}/big", "bs=1M", "count=72", "conv=notrunc,fsync"]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as writer:
                for name in ("two", "three"):
                    run_cli("create", image, name)
                assert writer.wait(PATIENCE) == 0
            assert store_bytes(run_cli, image) > before
        judge(run_cli, image, copy, top)
        report = json.loads(run_cli("check", "--json", image).stdout)
        assert report["ok"], report
        assert [entry["e2fsck"] for entry in report["snapshots"]] == [0, 0, 0]
