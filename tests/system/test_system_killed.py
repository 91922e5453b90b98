"""The server is killed under load: the image names its snapshots, and the next command brings it to rest."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

# Overwrites, adds and removes, with and without fsync, until it fails.
LOAD = """
import os, random, sys
rng = random.Random(7)
top = sys.argv[1]
big = os.open(top + "/big", os.O_RDWR)
for number in range(1000000):
    os.pwrite(big, rng.randbytes(rng.randrange(1, 60000)), rng.randrange(4 << 20))
    with open(f"{top}/new-{number % 50}", "wb") as file:
        file.write(rng.randbytes(rng.randrange(9000)))
        if number % 7 == 0:
            file.flush()
            os.fsync(file.fileno())
    if number % 5 == 0:
        os.unlink(f"{top}/new-{number % 50}")
    if number == 60:
        print("busy", flush=True)
"""


@pytest.mark.system
@pytest.mark.parametrize("kind", ["ext4", "ext3", "ext2"])
def test_a_killed_server(kind: str, run_cli: Cli) -> None:
    with arena() as top:
        content = random.Random(8).randbytes(5 << 20)
        image = make_volume(top / "disk.img", kind, 32, "-b", "1024", files={"big": content, "small": b"small"})
        copies: dict[str, Path] = {}
        run_cli("create", image, "one")
        copies["one"] = oracle.copy_image(image, top / "one.copy")
        run_cli("run", image, "--", "debugfs", "-w", "-R", "zap_block -f /big -p 3 7", "{}")
        run_cli("create", image, "two")
        copies["two"] = oracle.copy_image(image, top / "two.copy")
        mount = top / "mount"
        mount.mkdir()
        run_cli("mount", image, mount)
        server = json.loads(run_cli("info", "--json", image).stdout)["attached"]["pid"]
        load = subprocess.Popen(
            [sys.executable, "-c", LOAD, mount], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert load.stdout is not None
            assert load.stdout.readline() == "busy\n"
            time.sleep(0.3)
            os.kill(server, signal.SIGKILL)
        finally:
            load.kill()
            load.communicate()
            # The kernel's mount has lost its disk: it goes, whatever extsnap thinks of it.
            if os.path.ismount(mount) and run_cli("umount", mount, status=None).returncode:
                subprocess.run(["umount", mount], capture_output=True, check=False)
        assert not os.path.ismount(mount)

        listed = json.loads(run_cli("list", "--json", image).stdout)["snapshots"]
        assert [entry["name"] for entry in listed] == ["one", "two"]
        marked = oracle.e2fsck(image)
        assert marked.status != 0
        assert "unsupported feature" in marked.text, "stock tools must leave the image alone"
        with contextlib.suppress(FileNotFoundError):
            (top / "out.img").unlink()
        run_cli("export", image, "one", top / "out.img")
        oracle.assert_clean(top / "out.img")

        # The next writing command finishes what was left and has the journal replayed through the write path.
        if kind == "ext2":  # without a journal e2fsck may have to ask
            done = run_cli("run", image, "--", "e2fsck", "-fy", "{}", status=None)
            assert done.returncode in (0, 1), done.stdout + done.stderr
        else:
            run_cli("create", image, "after")
        oracle.assert_clean(image)
        mount.rmdir()
        mount.mkdir()
        run_cli("attach", image, mount)
        try:
            for name, copy in copies.items():
                oracle.assert_view_is_copy(mount / "snapshots" / name, copy)
                oracle.assert_clean(mount / "snapshots" / name)
        finally:
            run_cli("detach", image)
        assert json.loads(run_cli("check", "--json", image).stdout)["ok"] is True
        run_cli("restore", image, "one")
        oracle.assert_clean(image)
        with oracle.mounted(image) as directory:
            assert (directory / "big").read_bytes() == content
            assert not (directory / "new-1").exists()
        run_cli("create", image, "three")
        oracle.assert_clean(image)
