"""A virtual machine has the volume by NBD, is snapshotted while it writes, and boots with the snapshot (long form)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.system

GUEST = Path(__file__).resolve().parents[2] / "tools" / "guest"
#: Software emulation takes a while to boot.
SECONDS = 300.0


class Machine:
    """A virtual machine that runs one job on a drive, and what it says on its console."""

    def __init__(self, parts: Path, uri: str, job: str) -> None:
        words = ["qemu-system-x86_64", "-accel", "tcg", "-m", "512", "-smp", "1", "-nographic"]
        words += ["-no-reboot", "-nodefaults", "-serial", "stdio"]
        words += ["-kernel", str(parts / "kernel"), "-initrd", str(parts / "initramfs")]
        words += ["-append", f"console=ttyS0 quiet panic=-1 job={job}"]
        words += ["-drive", f"file={uri},format=raw,if=virtio,cache=none"]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self.text = ""

    def wait_for(self, pattern: str) -> None:
        """Wait until it has said something."""
        deadline = time.monotonic() + SECONDS
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text}"
            if not self.hear(deadline - time.monotonic()):
                pytest.fail(f"the machine ended without {pattern!r}: {self.text}")

    def hear(self, seconds: float = 0.0) -> bool:
        """Take in what it said; returns whether it is still there."""
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            said = os.read(self.process.stdout.fileno(), 65536)
            if not said:
                return False
            self.text += said.decode(errors="replace").replace("\r", "")
            seconds = 0.0
        return True

    def said(self, word: str) -> dict[int, str]:
        """Files by number that it has named with their checksums."""
        return {int(number): sums for number, sums in re.findall(rf"GUEST {word} (\d+) ([0-9a-f]{{32}})\n", self.text)}

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
        self.wait_for("GUEST unmounted")
        self.process.wait(SECONDS)
        self.hear()


@contextlib.contextmanager
def machine(parts: Path, program: Path, job: str, *arguments: str | Path) -> Iterator[Machine]:
    """A machine whose drive is what ``extsnap serve`` gives."""
    words = [str(program), "serve", *map(str, arguments)]
    serving = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert serving.stdout is not None
        uri = serving.stdout.readline().strip()
        assert uri, serving.communicate()[1]
        guest = Machine(parts, uri, job)
        try:
            yield guest
        finally:
            if guest.process.poll() is None:
                guest.process.kill()
            guest.process.communicate()
    finally:
        serving.terminate()
        serving.communicate(timeout=SECONDS)
    assert serving.returncode == 0


if os.environ.get("EXTSNAP_LONG"):

    @pytest.fixture(scope="module")
    def parts() -> Path:
        done = subprocess.run([GUEST], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    @pytest.mark.parametrize("kind", ["ext4", "ext3"])
    def test_a_machine_that_writes(kind: str, parts: Path, run_cli: Cli, extsnap_program: Path) -> None:
        """What it had fsynced before the snapshot is there when a machine boots with it, and the volume goes on."""
        with arena() as top:
            image = make_volume(top / "disk.img", kind, 192, "-b", "4096", files={"old": os.urandom(4 << 20)})
            taken: list[dict[int, str]] = []
            with machine(parts, extsnap_program, "write", image) as guest:
                for round_ in range(3):
                    guest.wait_for(rf"GUEST synced {20 + 40 * round_} ")
                    taken.append(guest.said("synced"))
                    run_cli("create", image, f"live-{round_}")
                guest.wait_for(f"GUEST synced {max(guest.said('synced')) + 20} ")
                guest.end()
                written = guest.said("synced")
            oracle.assert_clean(image)
            listed = json.loads(run_cli("list", "--json", image).stdout)["snapshots"]
            assert [entry["consistency"] for entry in listed] == ["crash"] * 3
            for round_, before in enumerate(taken):
                options = ["--snapshot", f"live-{round_}", "--scratch"]
                with machine(parts, extsnap_program, "read", *options, image) as guest:
                    guest.end()
                    assert "GUEST writable" in guest.text
                    found = guest.said("has")
                assert before.items() <= found.items(), f"of {len(before)} files that were fsynced some are lost"
            with machine(parts, extsnap_program, "read", image) as guest:
                guest.end()
                assert written.items() <= guest.said("has").items()
            report = json.loads(run_cli("check", "--json", image).stdout)
            assert report["ok"], report
            run_cli("restore", image, "live-1")
            oracle.assert_clean(image)
            with machine(parts, extsnap_program, "read", image) as guest:
                guest.end()
                assert taken[1].items() <= guest.said("has").items()
