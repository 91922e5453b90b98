"""The units of ``packaging/systemd`` as systemd reads them, and the helper of mount(8) as mount(8) runs it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.system

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
HELPER = PACKAGING / "mount.fuse.extsnap"
SECONDS = 180
OLD = b"as it was then " * 20_000
SWEEP = "from extsnap.serve import control; control.sweep()"
# mount(8) looks for helpers in /sbin alone: in a mount namespace of its own that has one more.
WITH_HELPER = """\
mkdir "$0/original" "$0/sbin"
mount --bind /usr/sbin "$0/original"
ln -s "$0"/original/* "$0/sbin/"
cp "$1" "$0/sbin/"
mount --bind "$0/sbin" /usr/sbin
"""


@pytest.mark.parametrize("instance", ["extsnap-mount@disk.service", "extsnap-snapshot@disk.timer"])
def test_units(instance: str, tmp_path: Path, extsnap_program: Path) -> None:
    """The program is where it is here; nothing else differs from what is installed."""
    for unit in (PACKAGING / "systemd").iterdir():
        text = unit.read_text().replace("/usr/local/bin/extsnap", str(extsnap_program))
        assert "/usr/local" not in text
        (tmp_path / unit.name).write_text(text)
        (tmp_path / unit.name.replace("@.", "@disk.")).write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / instance], capture_output=True, text=True, timeout=SECONDS
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_the_commands_of_the_units(run_cli: Cli) -> None:
    """What the service starts and stops, with its environment file, is what mounts and unmounts."""
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 24, files={"file": OLD})
        run_cli("create", image)
        (top / "mnt").mkdir()
        unit = (PACKAGING / "systemd" / "extsnap-mount@.service").read_text()
        for key, mounted in (("ExecStart", True), ("ExecStop", False)):
            (line,) = re.findall(rf"^{key}=/usr/local/bin/extsnap (.*)$", unit, re.M)
            words = {"$OPTIONS": [], "${IMAGE}": [image], "${DIRECTORY}": [top / "mnt"]}
            run_cli(*(part for word in line.split() for part in words.get(word, [word])))
            assert os.path.ismount(top / "mnt") is mounted


def test_mount_and_fstab(run_cli: Cli, extsnap_program: Path) -> None:
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 24, files={"file": OLD})
        run_cli("create", image, "then")
        (top / "mnt").mkdir()
        (top / "fstab").write_text(f"{image} {top}/mnt fuse.extsnap nofail,x-systemd.requires-mounts-for=/ 0 0\n")

        def run(*lines: str) -> str:
            script = "\n".join(["set -e", WITH_HELPER, 'cd "$0"', *lines])
            words = ["unshare", "--mount", "--propagation=private", "sh", "-c", script, str(top), str(HELPER)]
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=SECONDS,
                env={**os.environ, "EXTSNAP": str(extsnap_program)},
            )  # fmt: skip
            for directory in ("original", "sbin"):
                subprocess.run(["rm", "-rf", "--one-file-system", top / directory], check=True)
            assert done.returncode == 0, (lines, done.stdout, done.stderr)
            return done.stdout

        umount = f'"{extsnap_program}" umount mnt'
        run("mount -T fstab mnt", "echo new >mnt/new", "rm mnt/file", umount)
        assert oracle.debugfs_knows(image, "/new")
        assert not oracle.debugfs_knows(image, "/file")
        before = oracle.sha256(image)
        sweeper = extsnap_program.with_name("python")
        shown = run(
            "mount -t fuse.extsnap -o snapshot=then,ro disk.img mnt", "ls mnt",
            # Whoever sweeps in another namespace sees no mount there, and must leave it all the same.
            f'nsenter --mount=/proc/{os.getpid()}/ns/mnt "{sweeper}" -c "{SWEEP}"', "! touch mnt/x", umount,
            "mount -t fuse.extsnap -o snapshot=then,scratch disk.img mnt", "touch mnt/x", "ls mnt", umount,
        )  # fmt: skip
        assert shown.split() == ["file", "lost+found", "file", "lost+found", "x"]
        assert oracle.sha256(image) == before


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ("noexec", 1, "cannot mount with the option noexec"),
        ("ro", 1, "only snapshots are mounted read-only"),
        ("snapshot=then,scratch,ro", 1, "is there to be written"),
        ("snapshot=nonesuch", 32, "no snapshot nonesuch"),
    ],
)
def test_options_that_are_refused(options: str, status: int, said: str, run_cli: Cli, extsnap_program: Path) -> None:
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 24)
        (top / "mnt").mkdir()
        done = subprocess.run(
            [HELPER, image, top / "mnt", "-o", options], capture_output=True, text=True, timeout=SECONDS,
            env={**os.environ, "EXTSNAP": str(extsnap_program)},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (status, "")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not os.path.ismount(top / "mnt")
