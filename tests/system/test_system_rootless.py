"""Everything but the kernel's own mounts as a normal user; and what users see of each other's servers.

The user's processes have a mount namespace of their own, in which /dev/fuse is open to them whatever it is here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import oracle
import pytest
from arena import arena, make_volume

import extsnap

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.system

USER = 65534
SECONDS = 180
OLD = b"as it was then " * 20_000
BECOME = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
# The namespace lives for as long as this runs; it says when it is ready.  The program is shown where the user can go.
NAMESPACE = """\
mount -t tmpfs none "$1/dev" && mknod -m 666 "$1/dev/fuse" c 10 229 && mount --bind "$1/dev/fuse" /dev/fuse &&
mount --bind "$2" "$1/python" && mount --bind "$3" "$1/packages" && mount --bind "$4" "$1/source/extsnap" &&
echo ready && exec sleep infinity
"""


class User:
    """A normal user with a home and a runtime directory."""

    def __init__(self, top: Path, holder: int) -> None:
        self.home = top / "home"
        self._enter = ["nsenter", "--mount", f"--target={holder}", f"--wdns={self.home}"]
        self._environment = {
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(top / "runtime"),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": f"{top}/source:{top}/packages",
            "LD_LIBRARY_PATH": f"{top}/python/lib",
            "NO_COLOR": "1",
        }
        python = f"{top}/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        self._program = [python, "-P", "-m", "extsnap.cli.app"]

    def run(self, *words: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self._enter, *BECOME, *map(str, words)],
            capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, env=self._environment,
        )  # fmt: skip
        assert status is None or done.returncode == status, (words, done.stdout, done.stderr)
        return done

    def extsnap(self, *words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run(*self._program, *words, status=status)

    def shell(self, line: str) -> str:
        return self.run("sh", "-ec", line).stdout


@contextlib.contextmanager
def a_user(top: Path) -> Iterator[User]:
    for name in ("home", "runtime", "dev", "python", "packages", "source", "source/extsnap"):
        (top / name).mkdir()
        (top / name).chmod(0o700 if name in ("home", "runtime") else 0o755)
    top.chmod(0o755)
    shown = [sys.base_prefix, Path(numpy.__file__).parent.parent, Path(extsnap.__file__).parent]
    words = ["unshare", "--mount", "--propagation=private", "sh", "-ec", NAMESPACE, "sh", str(top), *map(str, shown)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        for name in ("mnt", "served"):
            (top / "home" / name).mkdir()
        image = make_volume(top / "home" / "disk.img", "ext4", 24, "-b", "4096", files={"file": OLD})
        for path in (image, *(top / "home").iterdir(), top / "home", top / "runtime"):
            os.chown(path, USER, USER)
        yield User(top, holder.pid)
    finally:
        end_all(top)
        holder.kill()
        holder.communicate(timeout=SECONDS)


def end_all(top: Path) -> None:
    """End what the user left, and fail if there was something."""
    deadline = time.monotonic() + 10
    while (left := processes(top)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert not left, f"left behind: {left}"


def processes(top: Path) -> list[int]:
    """The user's processes with a file below a directory in use."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdigit() or entry.stat().st_uid != USER:
                continue
            links = [os.readlink(link) for link in (entry / "fd").iterdir()]
            if any(link.startswith(f"{top}/") for link in links):
                found.append(int(entry.name))
    return found


def test_a_life_without_root() -> None:
    with arena() as top, a_user(top) as user:
        image = user.home / "disk.img"
        user.extsnap("create", "disk.img", "then")
        copy = oracle.copy_image(image, top / "then.copy")
        user.extsnap("attach", "disk.img", "served")
        assert user.shell("stat -c '%a %n' served served/volume served/snapshots served/snapshots/then") == (
            "500 served\n600 served/volume\n500 served/snapshots\n400 served/snapshots/then\n"
        )
        runtime = top / "runtime" / "extsnap"
        kept = {path.suffix: path.stat() for path in runtime.iterdir()}
        assert set(kept) >= {".sock", ".json"}
        assert {stat.S_IMODE(found.st_mode) for found in kept.values()} == {0o600}
        assert {found.st_uid for found in kept.values()} == {USER}
        assert (stat.S_IMODE(runtime.stat().st_mode), runtime.stat().st_uid) == (0o700, USER)

        # The kernel lets nobody else in, not even root.
        others = subprocess.run(
            [*user._enter, "cat", "served/volume"], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert "Permission denied" in others.stderr

        said = user.extsnap("mount", "disk.img", "mnt").stderr
        assert "mounting through fuse2fs" in said
        user.shell("echo new >mnt/new; rm mnt/file; cat mnt/new")
        user.extsnap("umount", "mnt")
        user.extsnap("mount", "disk.img", "mnt", "--snapshot", "then", "--scratch")
        assert user.shell("echo gone >mnt/gone; ls mnt").split() == ["file", "gone", "lost+found"]
        user.extsnap("umount", "mnt")
        user.extsnap("mount", "disk.img", "mnt", "--snapshot", "then")
        assert user.shell("ls mnt; cmp mnt/file mnt/file").split() == ["file", "lost+found"]
        user.extsnap("umount", "mnt")
        user.shell("cp served/snapshots/then out.view")
        oracle.assert_view_is_copy(user.home / "out.view", copy)
        user.extsnap("detach", "disk.img")
        user.extsnap("check", "disk.img")

        user.extsnap("run", "disk.img", "--", "debugfs", "-w", "-R", "mkdir made", "{}")
        assert oracle.debugfs_knows(image, "/made")
        user.extsnap("info", "disk.img", "--json")
        user.extsnap("export", "disk.img", "then", "out.img")
        oracle.assert_clean(user.home / "out.img")
        user.extsnap("restore", "disk.img", "then")
        oracle.assert_clean(image)


def test_servers_of_other_users(call_cli: Cli) -> None:
    with arena() as top, a_user(top) as user:
        image = user.home / "disk.img"
        call_cli("create", image, "then")
        served = top / "served"
        served.mkdir()
        call_cli("attach", image, served)
        try:
            for words in (["create", "disk.img"], ["list", "disk.img"], ["mount", "disk.img", "mnt"]):
                said = user.extsnap(*words, status=1).stderr
                assert "is in use by extsnap in process" in said
                assert "of user root" in said
                assert len(said.splitlines()) == 1
        finally:
            call_cli("detach", image)
        user.extsnap("attach", "disk.img", "served")
        said = call_cli("create", image, "more", status=1).stderr
        assert "of user nobody" in said
        user.extsnap("detach", "disk.img")


def test_open_to_others_when_asked(call_cli: Cli) -> None:
    """Who may read or write the image may do so with what is served of it."""
    with arena() as top, a_user(top) as user:
        image, served = user.home / "disk.img", top / "served"
        served.mkdir()
        (top / "home").chmod(0o755)
        call_cli("create", image, "then")
        for mode, allowed in ((0o644, "read"), (0o666, "write"), (0o600, "")):
            os.chown(image, 0, 0)
            image.chmod(mode)
            call_cli("attach", image, served, "--allow-other")
            try:
                wanted = stat.S_IMODE((served / "volume").stat().st_mode), stat.S_IMODE(served.stat().st_mode)
                assert wanted == (mode, 0o555 if mode & 4 else 0o500)
                for file, writing in (("volume", False), ("snapshots/then", False), ("volume", True)):
                    words = ["dd", f"of={served}/{file}", "if=/dev/null", "conv=notrunc"] if writing else [
                        "head", "-c", "1024", f"{served}/{file}"]  # fmt: skip
                    done = subprocess.run([*BECOME, *words], capture_output=True, timeout=SECONDS, check=False)
                    assert (done.returncode == 0) == (allowed == "write" or (allowed == "read" and not writing)), words
            finally:
                call_cli("detach", image)
