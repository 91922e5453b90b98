"""The command that copies a snapshot out of the volume."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from extsnap.cli import output
from extsnap.cli.failure import about
from extsnap.cli.options import Image, Json, Partition, SnapshotName, Version
from extsnap.cli.snapshots import call
from extsnap.errors import ExtsnapError

_COPY_BYTES = 1 << 20


def export(
    image: Image,
    name: SnapshotName,
    out: Annotated[str, typer.Argument(metavar="OUT", help="File to write; - is standard output.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Write a snapshot as a sparse raw image of its own.

    It has no guard, no store and no history.
    """
    if out == "-":
        if as_json:
            raise typer.BadParameter("--json and an image cannot both go to standard output", param_hint="OUT")
        _export_to_stdout(image, name, partition)
        return
    with output.progress(f"exporting {name}"):
        # Absolute, because the server of a served image works in another directory.
        result = call(
            image, "export", writable=False, partition=partition, name=name, out=os.path.abspath(out), force=force
        )
    if as_json:
        output.emit_json({**result, "out": out})


def _export_to_stdout(image: str, name: str, partition: int | None) -> None:
    """Export to a temporary file and copy that: the work needs a file that it can seek in and punch."""
    if output.stdout_is_terminal():
        with about(image):
            raise ExtsnapError(
                f"{image}: an image does not belong on a terminal",
                hint="send it to a file or a pipe: extsnap export IMAGE NAME - > OUT",
            )
    import tempfile

    # A directory of mode 0700: nobody else can put a link where the file will be.
    with tempfile.TemporaryDirectory(prefix="extsnap-") as directory:
        path = os.path.join(directory, "volume")
        with output.progress(f"exporting {name}"):
            call(image, "export", writable=False, partition=partition, name=name, out=path, force=False)
        with about(path):
            source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with output.progress("copying", total=os.fstat(source).st_size) as advance, output.writing():
                sys.stdout.flush()
                copy_sparse(source, sys.stdout.fileno(), advance)
        finally:
            os.close(source)


def copy_sparse(source: int, target: int, advance: Callable[[int], None]) -> None:
    """Copy a file to an open descriptor, leaving holes where the target can have them.

    A regular file that ends where the writing starts (``> OUT``) gets holes; anything else, also a file
    opened for appending or with old content behind the position, gets zeros, so that it reads the same.

    Args:
        source: A regular file.
        target: Any descriptor open for writing.
        advance: Called with the number of bytes after each step.
    """
    size = os.fstat(source).st_size
    start = _hole_start(target)
    zeros = bytes(_COPY_BYTES)
    for offset, length, is_hole in _segments(source, size):
        if is_hole and start is not None:
            advance(length)
            continue
        if start is not None:
            os.lseek(target, start + offset, os.SEEK_SET)
        position, end = offset, offset + length
        while position < end:
            wanted = min(_COPY_BYTES, end - position)
            piece = zeros[:wanted] if is_hole else os.pread(source, wanted, position)
            if not piece:
                raise OSError(errno.EIO, "the exported image became shorter while it was copied")
            _write_all(target, piece)
            position += len(piece)
            advance(len(piece))
    if start is not None:
        os.ftruncate(target, start + size)
        os.lseek(target, start + size, os.SEEK_SET)


def _hole_start(target: int) -> int | None:
    """Return the position from which seeking over a hole leaves zeros, or None if that is not so."""
    import fcntl

    status = os.fstat(target)
    if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(target, fcntl.F_GETFL) & os.O_APPEND:
        return None
    position = os.lseek(target, 0, os.SEEK_CUR)
    return position if position >= status.st_size else None


def _segments(source: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """Yield ``(offset, length, is_hole)`` over the whole file."""
    position = 0
    while position < size:
        try:
            data = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = size
        if data > position:
            yield position, data - position, True
        if data < size:
            position = os.lseek(source, data, os.SEEK_HOLE)
            yield data, position - data, False
        else:
            position = size


def _write_all(target: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(target, view) :]
