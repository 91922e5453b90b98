"""What a directory tree holds, as the kernel or debugfs tells it, and how two trees differ.

Standard library only: the demonstration uses it outside the virtual environment, the tests through ``oracle``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

ALWAYS_LEFT_OUT = ("lost+found", ".extsnap")
TIMES = ("mtime_ns", "atime_ns", "ctime_ns")
_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True)
class Entry:
    """One name in a tree.  A field that is None is not known, and equal to anything.

    Attributes:
        kind: "file", "directory", "symlink", ...
        mode: Permission bits, set-id and sticky bits included.
        rdev: Device number of a device, else 0.
        size: Of a file or symlink, else 0.
        sha256: Of a file's content, else "".
        target: Of a symlink, else "".
        links: Every path of this inode within the tree, if it has more than one.
        data: (start, end) of the parts of a file that are no holes; None unless asked for.
    """

    kind: str
    mode: int
    uid: int | None
    gid: int | None
    rdev: int
    size: int
    mtime_ns: int
    atime_ns: int | None
    ctime_ns: int | None
    sha256: str
    target: str
    links: tuple[str, ...] | None = ()
    xattrs: tuple[tuple[str, bytes], ...] | None = ()
    data: tuple[tuple[int, int], ...] | None = field(default=None)


Manifest = dict[str, Entry]


def of_tree(
    root: str | os.PathLike[str], *, leave_out: Collection[str] = ALWAYS_LEFT_OUT, holes: bool = False
) -> Manifest:
    """Return what is under ``root``, the root itself as ".".

    Args:
        root: A directory, usually where the kernel has a volume mounted.
        leave_out: Names in the root that do not count.
        holes: Record where files have holes as well; only comparable between trees of one block size.
    """
    top = os.fspath(root)
    found: Manifest = {}
    inodes: dict[tuple[int, int], list[str]] = {}
    pending = ["."]
    while pending:
        path = pending.pop()
        full = os.path.join(top, path)
        status = os.lstat(full)
        found[path] = _entry(full, status, holes)
        if stat.S_ISDIR(status.st_mode):
            names = [name for name in os.listdir(full) if path != "." or name not in leave_out]
            pending += [os.path.normpath(os.path.join(path, name)) for name in names]
        elif status.st_nlink > 1:
            inodes.setdefault((status.st_dev, status.st_ino), []).append(path)
    _link(found, inodes.values())
    return found


def _link(found: Manifest, groups: Iterable[list[str]]) -> None:
    for group in groups:
        if len(group) > 1:
            links = tuple(sorted(group))
            for path in links:
                found[path] = replace(found[path], links=links)


def _entry(path: str, status: os.stat_result, holes: bool) -> Entry:
    kind = _TYPES[stat.S_IFMT(status.st_mode)]
    digest, target, data = "", "", None
    if kind == "file":
        with open(path, "rb", opener=_open_without_atime) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            data = _data_parts(file.fileno(), status.st_size) if holes else None
    elif kind == "symlink":
        target = os.readlink(path)
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        rdev=status.st_rdev if "device" in kind else 0,
        size=status.st_size if kind in ("file", "symlink") else 0,
        mtime_ns=status.st_mtime_ns,
        atime_ns=status.st_atime_ns,
        ctime_ns=status.st_ctime_ns,
        sha256=digest,
        target=target,
        xattrs=_xattrs(path),
        data=data,
    )


def _open_without_atime(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # only the owner may
        return os.open(path, flags)


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return ()
        raise
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(names))


def _data_parts(descriptor: int, size: int) -> tuple[tuple[int, int], ...]:
    parts = []
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                break
            raise
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        parts.append((start, at))
    return tuple(parts)


def of_image(image: str | os.PathLike[str], scratch: Path, *, leave_out: Collection[str] = ALWAYS_LEFT_OUT) -> Manifest:
    """Return what is in an image, without mounting it: by ``debugfs rdump`` and ``stat``.

    What debugfs does not tell exactly is None: access and change times, and whatever else ``rdump`` cannot
    restore for an ordinary user comes from ``stat``.  Times are whole seconds.  Devices are left out by rdump.

    Args:
        image: A raw image file.
        scratch: An empty directory for a copy of the tree.
        leave_out: Names in the root that do not count.
    """
    _debugfs(image, [f'rdump / "{scratch}"'])
    for name in leave_out:
        subprocess.run(["rm", "-rf", "--", str(scratch / name)], check=True)
    found = of_tree(scratch, leave_out=leave_out)
    paths = list(found)
    output = _debugfs(image, [f'stat "{_image_path(path)}"' for path in paths])
    answers = re.split(r"^debugfs: stat .*\n", output, flags=re.MULTILINE)[1:]
    inodes: dict[str, list[str]] = {}
    for path, answer in zip(paths, answers, strict=True):
        match = re.search(r"^Inode: (\d+) .*Mode:\s+(\d+).*\n.*\nUser:\s*(\d+)\s+Group:\s*(\d+)", answer, re.MULTILINE)
        mtime = re.search(r"^ ?mtime: 0x([0-9a-f]{8})", answer, re.MULTILINE)
        if match is None or mtime is None:
            raise ValueError(f"debugfs stat says nothing of {path!r} in {image}: {answer[:200]!r}")
        number, mode, uid, gid = match.groups()
        found[path] = replace(
            found[path],
            mode=int(mode, 8) & 0o7777,
            uid=int(uid),
            gid=int(gid),
            mtime_ns=int(mtime[1], 16) * 10**9,
            atime_ns=None,
            ctime_ns=None,
            xattrs=_stat_xattrs(answer),
            links=(),
        )
        if found[path].kind != "directory":
            inodes.setdefault(number, []).append(path)
    _link(found, inodes.values())
    return found


def _image_path(path: str) -> str:
    return "/" if path == "." else "/" + path.replace('"', '""')


def _stat_xattrs(answer: str) -> tuple[tuple[str, bytes], ...] | None:
    """Return attributes from ``stat``'s lines, or None if it does not print a value in full."""
    section = answer.partition("Extended attributes:\n")[2]
    found = []
    for line in section.splitlines():
        if not line.startswith("  "):
            break
        match = re.fullmatch(r'  (\S+) \((\d+)\) = "([^"\\]*)"', line)
        if match is None or len(match[3]) != int(match[2]):
            return None
        found.append((match[1], match[3].encode()))
    return tuple(sorted(found))


def _debugfs(image: str | os.PathLike[str], commands: list[str]) -> str:
    script = "".join(f"{command}\n" for command in commands)
    paths = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    done = subprocess.run(
        ["debugfs", "-f", "-", os.fspath(image)],
        input=script,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env={**os.environ, "PATH": paths, "LC_ALL": "C", "DEBUGFS_PAGER": "__none__"},
        check=True,
    )
    return done.stdout


def differences(
    expected: Manifest,
    actual: Manifest,
    *,
    ignore: Collection[str] = ("atime_ns",),
    seconds: bool = False,
) -> list[str]:
    """Return one line for every difference, by path; an empty list if the trees are the same.

    Args:
        expected: The tree as it should be.
        actual: The tree as it is.
        ignore: Fields of ``Entry`` that do not count.
        seconds: Compare times by the second, where one side knows no better.
    """
    lines = [f"{path}: missing" for path in expected.keys() - actual.keys()]
    lines += [f"{path}: should not be there ({actual[path].kind})" for path in actual.keys() - expected.keys()]
    names = [part.name for part in fields(Entry) if part.name not in ignore]
    for path in expected.keys() & actual.keys():
        for name in names:
            was, is_now = getattr(expected[path], name), getattr(actual[path], name)
            if was is None or is_now is None:
                continue
            if seconds and name in TIMES:
                was, is_now = was // 10**9, is_now // 10**9
            if was != is_now:
                shown = [oct(value) if name == "mode" else repr(value)[:200] for value in (was, is_now)]
                lines.append(f"{path}: {name} should be {shown[0]}, is {shown[1]}")
    return sorted(lines)
