"""The demonstration: snapshots of a real tree in a real ext4 image, every step as a user would type it.

Each step prints its command and what the command said.  Verdicts on the filesystem are e2fsck's own; trees are
compared file by file (content, owner, mode, times, extended attributes).  Any difference ends it with status 1.
Standard library only; extsnap is used as a program.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import manifest
import realtree

MIB = 1 << 20
OVERWRITTEN = 72 * MIB  # by each round of changes, in place
MOST_FILES = 6000
TREES = ("/usr/share", "/usr/lib", "/usr")


class Failed(Exception):
    """A step did not do what it should; the message is one line."""


class Demo:
    """The steps, in a scratch directory that is the current one: commands look as a user would type them."""

    def __init__(self, work: Path, size_mib: int, source: Path, *, root: bool) -> None:
        self.work = work
        self.size_mib = size_mib
        self.source = source
        self.root = root
        self.started = time.monotonic()

    # Saying and doing.

    def headline(self, text: str) -> None:
        print(f"\n=== {text}  [{time.monotonic() - self.started:.0f} s]", flush=True)

    def say(self, text: str) -> None:
        print(f"    {text}", flush=True)

    def command(self, line: str, *, status: int = 0, script: str | None = None) -> str:
        """Print a shell command, run it, print its output, and return what was on standard output.

        Raises:
            Failed: It ended with another status.
        """
        print(f"$ {line}", flush=True)
        done = subprocess.run(
            shlex.split(line), capture_output=True, text=True, errors="replace", input=script or "", check=False
        )
        shown = [row for row in (done.stdout + done.stderr).splitlines() if row.strip()]
        if len(shown) > 40:
            shown[20:-10] = [f"... {len(shown) - 30} more lines"]
        for row in shown:
            self.say(row)
        if done.returncode != status:
            raise Failed(f"{line}: ended with {done.returncode}, should have ended with {status}")
        return done.stdout

    def fsck(self, image: str) -> None:
        self.command(f"e2fsck -fn {image}")

    def compare(
        self,
        what: str,
        expected: manifest.Manifest,
        actual: manifest.Manifest,
        *,
        seconds: bool,
        root_time: bool = True,
    ) -> None:
        """Compare two trees and say how it went.

        Args:
            what: Which trees, for the report.
            expected: The tree as it should be.
            actual: The tree as it is.
            seconds: Compare times by the second.
            root_time: False leaves out the time of the volume's root directory: mke2fs makes it new, the first
                ``create`` adds ``/.extsnap`` to it, and ``export`` takes that away.

        Raises:
            Failed: They differ.
        """
        lines = manifest.differences(expected, actual, ignore=("atime_ns", "ctime_ns"), seconds=seconds)
        if not root_time:
            lines = [line for line in lines if not line.startswith(".: mtime_ns ")]
        for line in lines[:20]:
            self.say(f"DIFFERENT {line}")
        if lines:
            raise Failed(f"{what}: {len(lines)} differences")
        files = [entry for entry in actual.values() if entry.kind == "file"]
        known = ["content", "mode", "owner", "modification time" + (" (in seconds)" if seconds else "")]
        known += ["extended attributes"] if any(entry.xattrs for entry in actual.values()) else []
        self.say(
            f"same: {what}: {len(actual)} entries, {len(files)} files of {sum(f.size for f in files) / MIB:.0f} MiB "
            f"({', '.join(known)})"
        )

    # Preparing.

    def make_tree(self) -> manifest.Manifest:
        """Copy as much of the source as fits, and add what a tree of a distribution does not have."""
        self.headline(f"a real tree: a copy of {self.source}")
        tree = Path("tree")
        budget = self.size_mib * MIB // 4
        count, copied = realtree.copy_part(
            self.source, tree, most_bytes=budget, most_files=MOST_FILES, owners=self.root
        )
        if count < 1000:
            raise Failed(f"{self.source} has only {count} files to copy; name another with --tree")
        with open(tree / "archive.bin", "wb") as archive:
            while archive.tell() < OVERWRITTEN:
                archive.write(os.urandom(MIB))
        (tree / "archive-hard-link.bin").hardlink_to(tree / "archive.bin")
        realtree.add_odd_files(tree / "odd", root=self.root)
        self.say(f"{count} files, {copied / MIB:.0f} MiB, and archive.bin of {OVERWRITTEN // MIB} MiB")
        return manifest.of_tree(tree)

    # Looking at a volume.

    @contextlib.contextmanager
    def mounted(self, line: str, unmount: str) -> Iterator[Path]:
        self.command(line)
        try:
            yield Path("mnt")
        finally:
            self.command(unmount)

    def base_tree(self, image: str = "disk.img") -> manifest.Manifest:
        """Return what a plain, read-only mount by the kernel shows; without root, what debugfs shows."""
        if self.root:
            with self.mounted(f"mount -o loop,ro {image} mnt", "umount mnt") as mnt:
                return manifest.of_tree(mnt)
        return self.debugfs_tree(image)

    def debugfs_tree(self, image: str) -> manifest.Manifest:
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            print(f"$ debugfs -R 'rdump / copy' {image}", flush=True)
            return manifest.of_image(image, Path(scratch))

    def snapshot_tree(self, name: str) -> manifest.Manifest:
        if self.root:
            with self.mounted(f"extsnap mount disk.img mnt --snapshot {name}", "extsnap umount mnt") as mnt:
                return manifest.of_tree(mnt)
        self.command("extsnap attach disk.img mnt")
        try:
            return self.debugfs_tree(f"mnt/snapshots/{name}")
        finally:
            self.command("extsnap detach disk.img")

    # Changing it.

    def change(self, number: int) -> None:
        """Add, rename, delete, and overwrite 72 MiB in place, by the kernel or by debugfs."""
        if self.root:
            with self.mounted("extsnap mount disk.img mnt", "extsnap umount mnt"):
                top = [
                    path.name for path in sorted(Path("mnt").iterdir()) if path.is_dir() and path.name[0] not in ".lo"
                ]
                doomed, renamed = top[number], top[-number]
                added = Path(__file__).resolve().parent.parent / "extsnap"
                self.command(f"cp -a {added} mnt/added-{number}")
                self.command(f"mv mnt/{shlex.quote(renamed)} mnt/renamed-{number}")
                self.command(f"rm -r mnt/{shlex.quote(doomed)}")
                blocks = OVERWRITTEN // MIB
                self.command(
                    f"dd if=/dev/urandom of=mnt/archive.bin bs=1M count={blocks} conv=notrunc,fsync status=none"
                )
                self.command("df -h mnt")
            return
        with open("new.bin", "wb") as file:
            for _ in range(OVERWRITTEN // MIB):
                file.write(os.urandom(MIB))
        commands = [
            "rm archive-hard-link.bin" if number == 1 else "rm renamed-1",
            "rm archive.bin\nwrite new.bin archive.bin",
            f"mkdir added-{number}\nwrite {Path(__file__).resolve()} added-{number}/demo.py",
            f"ln odd/attributes renamed-{number}\nunlink odd/attributes" if number == 1 else "rm odd/secret",
        ]
        Path("changes").write_text("\n".join(commands) + "\n")
        print("$ cat changes", *Path("changes").read_text().splitlines(), sep="\n    ")
        self.command("extsnap run disk.img -- debugfs -w -f changes {}")

    # The whole.

    def run(self) -> None:
        original = self.make_tree()
        with_root = "" if self.root else " (no root: the kernel mounts nothing here)"
        self.headline(f"an ext4 image of {self.size_mib} MiB with that tree in it{with_root}")
        self.command(f"mke2fs -q -t ext4 -d tree disk.img {self.size_mib}M")
        Path("mnt").mkdir()
        self.fsck("disk.img")
        # What mke2fs made of the tree is the reference: versions before 1.47.1 keep whole seconds only.
        delivered = self.base_tree()
        self.compare("the new image and the original tree", original, delivered, seconds=True, root_time=False)

        self.headline("a snapshot")
        self.command("extsnap create disk.img first -m 'as delivered'")
        self.fsck("disk.img")

        self.headline("changes: added, renamed, deleted, 72 MiB overwritten in place")
        self.change(1)
        self.fsck("disk.img")

        self.headline("a second snapshot, and more changes")
        second = self.base_tree()
        self.command("extsnap create disk.img second")
        self.change(2)
        self.fsck("disk.img")
        self.command("extsnap list disk.img")
        latest = self.base_tree()
        if not manifest.differences(delivered, latest) or not manifest.differences(second, latest):
            raise Failed("the changes changed nothing")

        self.headline("the first snapshot still is the original tree")
        self.compare(
            "snapshot first and the original tree", original, self.snapshot_tree("first"), seconds=True, root_time=False
        )
        self.compare("snapshot second and the tree of that moment", second, self.snapshot_tree("second"), seconds=False)

        self.headline("restore it: the base volume becomes the first snapshot")
        self.command("extsnap restore disk.img first")
        self.fsck("disk.img")
        restored = self.base_tree()
        self.compare("the restored volume and the original tree", original, restored, seconds=True, root_time=False)
        self.compare(
            "the restored volume and the image as it was made", delivered, restored, seconds=False, root_time=False
        )
        self.compare("snapshot second, after the restore", second, self.snapshot_tree("second"), seconds=False)

        self.headline("and undo that")
        self.command("extsnap restore disk.img --undo")
        self.fsck("disk.img")
        self.compare("the volume and its tree before the restore", latest, self.base_tree(), seconds=False)
        self.command("extsnap list disk.img")

        self.headline("a snapshot as an image of its own")
        self.command("extsnap export disk.img second second.img")
        self.fsck("second.img")
        self.compare(
            "the export and the tree of that moment",
            second,
            self.base_tree("second.img"),
            seconds=False,
            root_time=False,
        )

        self.headline("everything checked: store, copies, both bitmaps, e2fsck on every view")
        self.command("extsnap check disk.img")
        if not self.root:
            self.headline("without root")
            self.say("changes went through debugfs, trees were read by debugfs; not shown: mounting by the kernel,")
            self.say("times finer than a second, and attributes that debugfs does not print in full")

    def clean_up(self, *, keep: bool) -> None:
        """Unmount and stop whatever is still there below the scratch directory."""
        left = [mount for mount in mounts() if mount == str(self.work) or mount.startswith(f"{self.work}/")]
        for mount in reversed(left):
            quietly("extsnap", "umount", mount)
            if mount in mounts():
                quietly("umount", mount)
        if Path("disk.img").exists() and left:
            quietly("extsnap", "detach", "disk.img", "--force")
        os.chdir("/")
        remaining = [mount for mount in mounts() if mount.startswith(f"{self.work}/")]
        if remaining:
            print(f"demo: still mounted, so not removed: {', '.join(remaining)}", file=sys.stderr)
        elif keep:
            print(f"\nkept: {self.work}")
        else:
            # Directories of the copied tree may not be writable.
            subprocess.run(["chmod", "-R", "u+rwX", str(self.work)], capture_output=True, check=False)
            shutil.rmtree(self.work)


def quietly(*command: str) -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, check=False, timeout=30)


def mounts() -> list[str]:
    """Return all mount points, in the order in which they were mounted."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [line.split()[4] for line in file]


def stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=512, metavar="MIB", help="of the image (at least 512)")
    parser.add_argument("--tree", type=Path, help=f"the tree to copy (else the first of {', '.join(TREES)})")
    parser.add_argument("--keep", action="store_true", help="leave the image and the tree where they are")
    parser.add_argument("--no-root", action="store_true", help="do as if without root")
    options = parser.parse_args()
    if options.size < 512:
        parser.error("--size: at least 512")
    source = options.tree or next((Path(tree) for tree in TREES if Path(tree).is_dir()), None)
    if source is None or not source.is_dir():
        parser.error(f"{source or 'no tree'}: no such directory; name one with --tree")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    work = Path(tempfile.mkdtemp(prefix="extsnap-demo-"))
    os.chdir(work)
    demo = Demo(work, options.size, source.resolve(), root=os.geteuid() == 0 and not options.no_root)
    status = 1
    try:
        demo.run()
        status = 0
    except Failed as failure:
        print(f"demo: FAILED: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    finally:
        demo.clean_up(keep=options.keep)
    if status == 0:
        print(f"\nall as it should be, in {time.monotonic() - demo.started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
