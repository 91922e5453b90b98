"""``mount --snapshot NAME --scratch``: a view that can be written, gone at the unmount, and nothing else touched."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.system

OLD = b"as it was then " * 20_000


def snapshotted(top: Path, cli: Cli, kind: str = "ext4", size: str = "4096") -> tuple[Path, Path]:
    """An image with a snapshot `then` and a later change, and the whole copy of that moment."""
    image = make_volume(top / "disk.img", kind, 24, "-b", size, files={"file": OLD, "other": OLD})
    cli("create", image, "then")
    copy = oracle.copy_image(image, top / "then.copy")
    cli("run", image, "--", "debugfs", "-w", "-R", "rm other", "{}")
    for name in ("mnt", "second", "served"):
        (top / name).mkdir()
    return image, copy


@contextlib.contextmanager
def mounted(cli: Cli, *arguments: str | Path) -> Iterator[None]:
    cli("mount", *arguments)
    try:
        yield
    finally:
        cli("umount", arguments[1])


@pytest.mark.parametrize(("kind", "size"), [("ext2", "1024"), ("ext3", "1024"), ("ext4", "4096")])
def test_written_and_thrown_away(kind: str, size: str, call_cli: Cli) -> None:
    with arena() as top:
        image, copy = snapshotted(top, call_cli, kind, size)
        before = oracle.sha256(image)
        mount = top / "mnt"
        for _ in range(2):  # the second time nothing is left of the first
            with mounted(call_cli, image, mount, "--snapshot", "then", "--scratch"):
                assert (mount / "file").read_bytes() == OLD
                assert (mount / "other").read_bytes() == OLD
                assert not (mount / "new").exists()
                (mount / "new").write_bytes(OLD * 4)
                (mount / "file").unlink()
                with (mount / "other").open("r+b") as file:
                    file.write(b"now")
                    os.fsync(file.fileno())
                subprocess.run(["sync", "-f", mount], check=True)
                assert (mount / "other").read_bytes() == b"now" + OLD[3:]
            assert oracle.sha256(image) == before
        oracle.assert_clean(image)
        call_cli("attach", image, top / "served")
        try:
            oracle.assert_view_is_copy(top / "served" / "snapshots" / "then", copy)
        finally:
            call_cli("detach", image)


def test_layers_apart_beside_the_volume(call_cli: Cli) -> None:
    """Two layers over one snapshot and the mounted volume know nothing of each other; the snapshot stays meanwhile."""
    with arena() as top:
        image, copy = snapshotted(top, call_cli)
        served, first, second = top / "served", top / "mnt", top / "second"
        call_cli("attach", image, served)
        try:
            with (
                mounted(call_cli, image, first, "--snapshot", "then", "--scratch"),
                mounted(call_cli, image, second, "--snapshot", "then", "--scratch"),
            ):
                (first / "file").write_bytes(b"first")
                (second / "file").write_bytes(b"second")
                for mount in (first, second):
                    subprocess.run(["sync", "-f", mount], check=True)
                with (served / "volume").open("rb") as base, oracle.mounted(copy) as then:
                    assert base.read(4096)
                    assert (then / "file").read_bytes() == OLD
                assert ((first / "file").read_bytes(), (second / "file").read_bytes()) == (b"first", b"second")
                oracle.assert_view_is_copy(served / "snapshots" / "then", copy)
                refused = call_cli("delete", image, "then", status=1).stderr
                assert "snapshot then is open; scratch/1 is in use: mounted at" in refused, refused
                assert str(first) in refused
                assert call_cli("detach", image, status=1).stderr.count(str(first)) == 1
                mountpoints = call_cli("info", image, "--json").stdout
                assert str(first) in mountpoints
                assert str(second) in mountpoints
            assert sorted(os.listdir(served)) == ["snapshots", "volume"]
            call_cli("delete", image, "then")
        finally:
            call_cli("detach", image)
        oracle.assert_clean(image)


def write_durably(path: Path, content: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())


def test_no_room_for_the_layer(run_cli: Cli) -> None:
    """What has no room fails to whoever wrote it; the snapshot and the image do not know."""
    with arena() as top:
        image, _ = snapshotted(top, run_cli)
        before = oracle.sha256(image)
        small, mount = top / "small", top / "mnt"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "none", small], check=True)
        try:
            run_cli("mount", image, mount, "--snapshot", "then", "--scratch", env={"TMPDIR": str(small)})
            try:
                with pytest.raises(OSError) as failed:
                    write_durably(mount / "new", OLD * 32)
                assert failed.value.errno in (errno.EIO, errno.ENOSPC)
                assert (mount / "file").read_bytes() == OLD
            finally:
                run_cli("umount", mount)
        finally:
            subprocess.run(["umount", small], check=True)
        assert oracle.sha256(image) == before


def test_scratch_files_on_the_volume_itself(run_cli: Cli) -> None:
    """A server cannot keep them in a filesystem that waits for it."""
    with arena() as top:
        image, _ = snapshotted(top, run_cli)
        run_cli("attach", image, top / "served", env={"TMPDIR": str(top / "mnt")})
        try:
            with mounted(run_cli, image, top / "mnt"):
                refused = run_cli("mount", image, top / "second", "--snapshot", "then", "--scratch", status=1).stderr
                assert f"scratch files would be in {top}/mnt" in refused
                assert "set TMPDIR" in refused
        finally:
            run_cli("detach", image)
