"""Volumes that must not be touched: one line that says what, where and what next; status 1; no byte changed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume, sync

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

WRITING: dict[str, list[str]] = {
    "create": ["{image}", "name"],
    "attach": ["{image}", "{directory}"],
    "mount": ["{image}", "{directory}"],
    "run": ["{image}", "--", "true"],
}
WRITING_SNAPSHOTS: dict[str, list[str]] = {
    **WRITING,
    "delete": ["{image}", "first"],
    "restore": ["{image}", "first"],
    "strip": ["{image}"],
}


def refused(cli: Cli, image: Path, directory: Path, commands: dict[str, list[str]], *words: str) -> None:
    """Every command is refused, in one line with these words, and changes nothing."""
    before = oracle.sha256(image)
    for command, arguments in commands.items():
        filled = [argument.format(image=image, directory=directory) for argument in arguments]
        done = cli(command, *filled, status=125 if command == "run" else 1)
        shown = f"{command}: {done.stderr}"
        assert done.stdout == "", shown
        assert len(done.stderr.splitlines()) == 1, shown
        assert str(image) in done.stderr, shown
        assert "; " in done.stderr, shown
        for word in words:
            assert word in done.stderr, shown
        assert not os.path.ismount(directory), shown
        assert oracle.sha256(image) == before, shown


@contextmanager
def place(*options: str, features: str = "") -> Iterator[tuple[Path, Path]]:
    """A small volume, and an empty directory."""
    with arena() as top:
        image = make_volume(
            top / "disk.img", "ext4", 16, *options, features=features, files={"file": b"content" * 1000}
        )
        (top / "directory").mkdir()
        yield image, top / "directory"


@pytest.mark.system
def test_a_volume_that_needs_recovery(run_cli: Cli) -> None:
    with place() as (image, directory):
        torn = image.with_name("torn.img")
        with oracle.mounted(image, writable=True) as mount:
            with open(mount / "new", "wb") as file:
                file.write(b"x" * 5000)
                os.fsync(file.fileno())
            oracle.copy_image(image, torn)
        assert "needs_recovery" in oracle.superblock_facts(torn)["Filesystem features"]
        refused(run_cli, torn, directory, {"create": WRITING["create"]}, "needs journal recovery", "e2fsck")


@pytest.mark.system
@pytest.mark.parametrize("snapshots", [False, True])
def test_a_volume_that_the_kernel_has(snapshots: bool, run_cli: Cli) -> None:
    with place() as (image, directory), ExitStack() as stack:
        if snapshots:
            run_cli("create", image, "first")
        mount = stack.enter_context(oracle.mounted(image, "noinit_itable", writable=True))
        sync(mount)
        refused(run_cli, image, directory, WRITING_SNAPSHOTS if snapshots else WRITING, "mounted", str(mount))
        # Another name of the same file is the same volume.
        link = image.with_name("link.img")
        os.link(image, link)
        refused(run_cli, link, directory, {"create": WRITING["create"]}, "mounted")


@pytest.mark.system
def test_a_volume_that_a_loop_device_has(run_cli: Cli) -> None:
    with place() as (image, directory):
        loop = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
        device = loop.stdout.strip()
        try:
            refused(run_cli, image, directory, WRITING, device)
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)
        run_cli("create", image, "name")


@pytest.mark.parametrize(
    ("feature", "named"),
    [
        ("^has_journal\nfeature has_journal", "external journal"),
        ("shared_blocks", "shared_blocks"),
        ("dirdata", "dirdata"),
        ("FEATURE_C30", "FEATURE_C30"),
        ("FEATURE_I25", "FEATURE_I25"),
        ("FEATURE_R30", "FEATURE_R30"),
    ],
)
def test_a_feature_that_is_not_supported(feature: str, named: str, run_cli: Cli) -> None:
    with place() as (image, directory):
        script = directory.parent / "script"
        clear = "ssv journal_inum 0\n" if "has_journal" in feature else ""
        script.write_text(f"{clear}feature {feature}\n")
        subprocess.run(["debugfs", "-w", "-f", script, image], check=True, capture_output=True)
        refused(run_cli, image, directory, {"create": WRITING["create"]}, named)


def test_an_image_with_snapshots_that_was_truncated(run_cli: Cli) -> None:
    with place() as (image, directory):
        run_cli("create", image, "first")
        os.truncate(image, os.path.getsize(image) // 2)
        commands = {**WRITING_SNAPSHOTS, "list": ["{image}"], "export": ["{image}", "first", "{directory}/out"]}
        refused(run_cli, image, directory, commands, "truncated")
        assert os.listdir(directory) == []
