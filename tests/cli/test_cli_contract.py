"""Every command on every kind of wrong image, and the whole life of a right one.

Negative cases are listed in ``BAD``: each is refused with one line that names the file and the next step,
with nothing on standard output and without changing a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import disks
import pytest

from .conftest import Call, Outcome, process

MIB = 1 << 20

# Command -> its arguments; {image}, {dir} and {out} are replaced.
ON_IMAGE: dict[str, list[str]] = {
    "create": ["{image}", "first"],
    "list": ["{image}"],
    "show": ["{image}", "first"],
    "delete": ["{image}", "first"],
    "restore": ["{image}", "first"],
    "export": ["{image}", "first", "{out}"],
    "strip": ["{image}"],
    "accept": ["{image}"],
    "set": ["{image}", "on-full=drop-oldest"],
    "guard": ["{image}", "off"],
    "check": ["{image}"],
    "info": ["{image}"],
    "dump": ["{image}", "header"],
    "attach": ["{image}", "{dir}"],
    "detach": ["{image}"],
    "mount": ["{image}", "{dir}"],
    "serve": ["{image}"],
    "run": ["{image}", "--", "true"],
}


def missing(path: Path) -> None:
    pass


def directory(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.touch()


def tiny(path: Path) -> None:
    path.write_bytes(b"x" * 100)


def truncated(path: Path) -> None:
    """A superblock that promises more than is there."""
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path), "8M"], check=True)
    os.truncate(path, 2 * MIB)


def random_bytes(path: Path) -> None:
    path.write_bytes(os.urandom(MIB))


def zeros(path: Path) -> None:
    path.touch()
    os.truncate(path, 8 * MIB)


def text(path: Path) -> None:
    path.write_text("#!/bin/sh\necho hello\n" * 1000)


def xfs(path: Path) -> None:
    path.touch()
    os.truncate(path, 300 * MIB)
    if shutil.which("mkfs.xfs") is None:
        with path.open("r+b") as file:
            file.write(b"XFSB")
        return
    subprocess.run(["mkfs.xfs", "-q", "-f", str(path)], check=True)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def partitions(path: Path, *volumes: int) -> None:
    """A GPT disk with three partitions, some of which hold an ext volume."""
    places = [(1, MIB, 4 * MIB), (2, 6 * MIB, 4 * MIB), (3, 11 * MIB, 4 * MIB)]
    disks.make(path, 16 * MIB, disks.gpt(16 * MIB, places))
    for number, offset, length in places:
        if number in volumes:
            disks.mkfs(path, offset, length)


def several_partitions(path: Path) -> None:
    partitions(path, 1, 3)


def no_ext_partition(path: Path) -> None:
    partitions(path)


def damaged_gpt(path: Path) -> None:
    """Both headers."""
    partitions(path, 2)
    with path.open("r+b") as file:
        for offset in (512 + 40, 16 * MIB - 512 + 40):
            file.seek(offset)
            file.write(b"\xff")


# What the line must say; one of each.
NO_FILESYSTEM = ["no ext2, ext3 or ext4"]
REASONS: dict[str, list[str]] = {
    "missing": ["no such file", "does not exist"],
    "directory": ["directory;", "directory:"],
    "empty": [*NO_FILESYSTEM, "empty"],
    "tiny": [*NO_FILESYSTEM, "too small"],
    "truncated": ["truncated"],
    "random_bytes": NO_FILESYSTEM,
    "zeros": NO_FILESYSTEM,
    "text": NO_FILESYSTEM,
    "xfs": ["holds an xfs filesystem, not ext2, ext3 or ext4"],
    "several_partitions": ["has 2 ext partitions: 1 (ext, 4 mib, 'part 1'), 3 (ext, 4 mib, 'part 3')"],
    "no_ext_partition": ["none of them ext2, ext3 or ext4; there are 1 (unknown content, 4 mib, 'part 1'), 2 ("],
    "damaged_gpt": ["header_crc32 at byte 512: does not match"],
    "fifo": ["neither a file nor a block device", "not a regular file"],
}

BAD = [missing, directory, empty, tiny, truncated, random_bytes, zeros, text, xfs, fifo]
BAD += [several_partitions, no_ext_partition, damaged_gpt]


def state_of(path: Path) -> str:
    """What must not change: the content's digest, or the kind of thing it is."""
    if not path.exists():
        return "missing"
    if not path.is_file():
        return oct(stat.S_IFMT(path.stat().st_mode))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def bad_images() -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory(prefix="extsnap-cli-") as top:
        images = {}
        for make in BAD:
            images[make.__name__] = Path(top, f"case-{len(images)}.img")
            make(images[make.__name__])
        yield images


@pytest.mark.parametrize("kind", [make.__name__ for make in BAD])
@pytest.mark.parametrize("command", ON_IMAGE)
def test_a_wrong_image_is_refused(
    command: str, kind: str, bad_images: dict[str, Path], extsnap: Call, tmp_path: Path
) -> None:
    image = bad_images[kind]
    before = state_of(image)
    done = extsnap(command, *filled(command, image, tmp_path))
    assert done.status == (125 if command == "run" else 1)
    assert done.out == ""
    assert len(done.error_lines) == 1, done.err
    assert done.err.startswith("extsnap: ")
    assert str(image) in done.err
    what, _, step = done.err.partition("; ")
    assert what
    assert step.strip()
    assert state_of(image) == before
    assert not (tmp_path / "out").exists()
    assert not os.path.ismount(tmp_path / "dir")
    if command != "detach":
        assert any(reason in done.err.lower() for reason in REASONS[kind]), done.err


@pytest.mark.parametrize("command", ON_IMAGE)
def test_a_wrong_number_is_refused(command: str, bad_images: dict[str, Path], extsnap: Call, tmp_path: Path) -> None:
    for kind, number, reason in (
        ("several_partitions", "4", "has no partition 4; there are 1 (ext"),
        ("several_partitions", "2", "-P 2 holds no ext2"),
        ("truncated", "1", "has no partitions; leave -P out"),
        ("zeros", "1", "has no partitions"),
    ):
        if (command, number) == ("detach", "2"):
            continue  # it asks only whether it is served
        image = bad_images[kind]
        before = state_of(image)
        done = extsnap(command, "--partition", number, *filled(command, image, tmp_path))
        assert done.status == (125 if command == "run" else 1)
        assert (done.out, len(done.error_lines)) == ("", 1), done.err
        assert str(image) in done.err
        assert reason in done.err
        assert state_of(image) == before


def filled(command: str, image: Path, directory: Path) -> list[str]:
    (directory / "dir").mkdir(exist_ok=True)
    places = {"image": str(image), "dir": str(directory / "dir"), "out": str(directory / "out")}
    return [argument.format(**places) for argument in ON_IMAGE[command]]


def test_umount_of_what_is_not_mounted(extsnap: Call, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        done = extsnap("umount", str(path))
        assert (done.status, done.out, len(done.error_lines)) == (1, "", 1)
        assert str(path) in done.err


def without_override() -> list[str]:
    """What takes from root the right to read everything; an owner's own files stay readable."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="no setpriv")
@pytest.mark.parametrize("command", [command for command in ON_IMAGE if command != "detach"])
def test_an_unreadable_image_is_refused(command: str, tmp_path: Path) -> None:
    image = tmp_path / "unreadable.img"
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image), "4M"], check=True)
    before = state_of(image)
    image.chmod(0)
    if os.geteuid() == 0:
        os.chown(image, 65534, 65534)
    program = [*without_override(), sys.executable, "-m", "extsnap.cli.app"]
    done = subprocess.run(
        [*program, command, *filled(command, image, tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (125 if command == "run" else 1)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert str(image) in done.stderr
    assert "permission denied" in done.stderr.lower()
    assert "; " in done.stderr
    image.chmod(0o600)
    assert state_of(image) == before


# ---- a right image


@pytest.fixture
def image() -> Iterator[Path]:
    """A small ext4 volume with a file."""
    with tempfile.TemporaryDirectory(prefix="extsnap-cli-") as top:
        path = Path(top, "disk.img")
        subprocess.run(["mkfs.ext4", "-q", "-F", "-L", "data", str(path), "16M"], check=True)
        write_file(path, "hello", b"old" * 5000)
        yield path


def write_file(image: Path, name: str, content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        debugfs(image, f"rm {name}", write=True)
        debugfs(image, f"write {file.name} {name}", write=True)


def debugfs(image: Path | str, request: str, *, write: bool = False) -> bytes:
    command = ["debugfs", *(["-w"] if write else []), "-R", request, str(image)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def fsck(image: Path) -> int:
    return subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True).returncode


def ok(done: Outcome) -> str:
    assert done.status == 0, done.err
    assert "Traceback" not in done.err
    return done.out


def test_the_life_of_an_image(image: Path, extsnap: Call, tmp_path: Path) -> None:
    disk = str(image)
    created = extsnap("create", disk, "first", "-m", "a [red]note[/red]")
    assert ok(created) == "first\n"
    assert "read-only" in created.err
    assert all(line.startswith("extsnap: ") for line in created.error_lines)
    assert fsck(image) == 0

    listed = json.loads(ok(extsnap("list", "--json", disk)))
    assert [(entry["name"], entry["message"], entry["kind"]) for entry in listed["snapshots"]] == [
        ("first", "a [red]note[/red]", "manual")
    ]
    assert set(listed["snapshots"][0]) >= {
        "name", "id", "created", "message", "kind", "consistency", "state",
        "used_bytes", "copied_bytes", "exclusive_bytes", "shared_bytes",
    }  # fmt: skip
    assert "a [red]note[/red]" in ok(extsnap("list", disk))
    assert json.loads(ok(extsnap("show", "--json", disk, "first")))["volume_bytes"] == 16 * MIB
    assert "first" in ok(extsnap("show", disk, "first"))

    with tempfile.NamedTemporaryFile() as new:
        new.write(b"new" * 5000)
        new.flush()
        shell = f"debugfs -w -R 'rm hello' {{}} && debugfs -w -R 'write {new.name} hello' {{}}"
        ok(extsnap("run", disk, "--", "sh", "-c", f"({shell}) >/dev/null 2>&1"))
    assert debugfs(image, "cat hello") == b"new" * 5000
    second = ok(extsnap("create", disk)).strip()
    assert second.endswith("Z")

    info = json.loads(ok(extsnap("info", "--json", disk)))
    assert (info["type"], info["label"], info["snapshots"], info["attached"]) == ("ext4", "data", 2, None)
    assert set(info["store"]) >= {"bytes", "copy_bytes", "metadata_bytes", "free_bytes"}
    assert info["guard"] is True
    assert "data" in ok(extsnap("info", disk))
    for what in ("header", "log", "records", "snapshots", "bitmaps"):
        assert what in json.loads(ok(extsnap("dump", "--json", disk, what)))
        ok(extsnap("dump", disk, what))

    out = tmp_path / "out.img"
    exported = json.loads(ok(extsnap("export", "--json", disk, "first", str(out))))
    assert (exported["name"], exported["out"]) == ("first", str(out))
    assert debugfs(out, "cat hello") == b"old" * 5000
    assert fsck(out) == 0
    refused = extsnap("export", disk, "first", str(out))
    assert (refused.status, len(refused.error_lines)) == (1, 1)
    assert "--force" in refused.err
    ok(extsnap("export", "--force", disk, "first", str(out)))
    with (tmp_path / "piped.img").open("wb") as piped:
        assert process("export", disk, "first", "-", stdout=piped).returncode == 0
    assert (tmp_path / "piped.img").read_bytes() == out.read_bytes()

    safety = ok(extsnap("restore", disk, "first")).strip()
    assert safety.startswith("before-restore-first-")
    assert debugfs(image, "cat hello") == b"old" * 5000
    ok(extsnap("restore", disk, "--undo", "--no-safety"))
    assert debugfs(image, "cat hello") == b"new" * 5000

    checked = json.loads(ok(extsnap("check", "--json", disk)))
    assert checked["ok"] is True
    assert {entry["name"] for entry in checked["snapshots"]} == {"first", second, safety}
    assert "snapshot first" in ok(extsnap("check", "--quick", disk, "first"))

    deleted = json.loads(ok(extsnap("delete", "--json", disk, second, "first")))
    assert set(deleted["deleted"]) == {second, "first"}
    assert isinstance(deleted["freed_bytes"], int)
    ok(extsnap("delete", disk, "--kind", "safety"))
    assert json.loads(ok(extsnap("list", "--json", disk)))["snapshots"] == []
    ok(extsnap("create", disk, "again"))
    assert json.loads(ok(extsnap("strip", "--json", disk))) == {"version": 1, "snapshots": 1}
    assert fsck(image) == 0
    assert b".extsnap" not in debugfs(image, "ls /")
    assert debugfs(image, "cat hello") == b"new" * 5000


READING: dict[str, Callable[[str, str], list[str]]] = {
    "list": lambda image, out: ["list", image],
    "show": lambda image, out: ["show", image, "first"],
    "info": lambda image, out: ["info", image],
    "dump": lambda image, out: ["dump", image, "records"],
    "check": lambda image, out: ["check", image],
    "export": lambda image, out: ["export", image, "first", out],
}


def test_reading_commands_change_nothing(image: Path, extsnap: Call, tmp_path: Path) -> None:
    ok(extsnap("create", str(image), "first"))
    before = state_of(image)
    for name, command in READING.items():
        ok(extsnap(*command(str(image), str(tmp_path / "out"))))
        assert state_of(image) == before, name


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "a name that is taken": (["create", "{image}", "first"], ["first", "name"]),
    "a name with a slash": (["create", "{image}", "a/b"], ["a/b", ";"]),
    "a name with a control character": (["create", "{image}", "a\x1bb"], ["a\\x1bb", ";"]),
    "a name that is too long": (["create", "{image}", "x" * 256], ["255"]),
    "an empty name": (["create", "{image}", ""], [";"]),
    "dot dot": (["create", "{image}", ".."], [";"]),
    "a leading dash": (["create", "{image}", "--", "-x"], ["-x", ";"]),
    "show no such snapshot": (["show", "{image}", "nonesuch"], ["nonesuch", ";"]),
    "delete no such snapshot": (["delete", "{image}", "first", "nonesuch"], ["nonesuch", ";"]),
    "restore no such snapshot": (["restore", "{image}", "nonesuch"], ["nonesuch", ";"]),
    "undo without a restore": (["restore", "{image}", "--undo"], ["safety"]),
    "export no such snapshot": (["export", "{image}", "nonesuch", "{out}"], ["nonesuch", ";"]),
    "export onto the image itself": (["export", "--force", "{image}", "first", "{image}"], ["{image}"]),
    "export into no directory": (["export", "{image}", "first", "{out}/x/y"], ["{out}"]),
    "export onto a directory": (["export", "--force", "{image}", "first", "{dir}"], ["{dir}"]),
    "check no such snapshot": (["check", "{image}", "nonesuch"], ["nonesuch", ";"]),
    "mount no such snapshot": (["mount", "{image}", "{dir}", "--snapshot", "nonesuch"], ["nonesuch"]),
    "mount on no directory": (["mount", "{image}", "{out}"], ["{out}"]),
    "mount no such snapshot over a layer": (
        ["mount", "{image}", "{dir}", "--scratch", "--snapshot", "nonesuch"],
        ["nonesuch"],
    ),
    "serve no such snapshot": (["serve", "{image}", "--snapshot", "nonesuch"], ["nonesuch"]),
    "serve in no directory": (["serve", "{image}", "--socket", "{out}/x"], ["{out}/x", "--socket"]),
    "attach to no directory": (["attach", "{image}", "{out}"], ["{out}"]),
    "detach what is not attached": (["detach", "{image}"], ["not served", "extsnap attach"]),
}


@pytest.fixture(scope="module")
def with_snapshot() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="extsnap-cli-") as top:
        path = Path(top, "disk.img")
        subprocess.run(["mkfs.ext4", "-q", "-F", str(path), "8M"], check=True)
        assert process("create", str(path), "first").returncode == 0
        yield path


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, with_snapshot: Path, extsnap: Call, tmp_path: Path) -> None:
    arguments, words = REFUSED[case]
    (tmp_path / "dir").mkdir()
    places = {"image": str(with_snapshot), "dir": str(tmp_path / "dir"), "out": str(tmp_path / "out")}
    before = state_of(with_snapshot)
    done = extsnap(*(argument.format(**places) for argument in arguments))
    assert (done.status, done.out) == (1, ""), done.err
    assert len(done.error_lines) == 1
    for word in words:
        assert word.format(**places) in done.err
    assert "; " in done.err
    assert state_of(with_snapshot) == before
    assert not (tmp_path / "out").exists()
    assert not os.path.ismount(tmp_path / "dir")


def test_run_reports_as_shells_do(with_snapshot: Path, extsnap: Call, tmp_path: Path) -> None:
    disk = str(with_snapshot)
    assert extsnap("run", disk, "--", "sh", "-c", "exit 42").status == 42
    assert extsnap("run", disk, "--", "sh", "-c", "kill -9 $$").status == 128 + 9
    (tmp_path / "data").write_text("x")
    for command, status in ((str(tmp_path / "nonesuch"), 127), (str(tmp_path / "data"), 126)):
        done = extsnap("run", disk, "--", command)
        assert (done.status, done.out, len(done.error_lines)) == (status, "", 1)
        assert command in done.err
    assert ok(extsnap("run", disk, "--", "echo", "--", "--json", "{}x")).startswith("-- --json /")
