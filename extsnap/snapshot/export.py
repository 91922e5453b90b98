"""Export: a snapshot as a raw image of its own, without the store."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from extsnap.blockdev.base import Buffer
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import ExtsnapError
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import graft
from extsnap.snapshot.view import View

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: Zeros of at least this length become holes.
HOLE_BYTES = 4096


class NotWritten(OSError):
    """Writing to the new file failed; ``strerror`` says what was tried, and at which byte."""


def export(volume: Volume, name: str, out: str, *, force: bool = False) -> int:
    """Write the view of ``name`` to the new sparse file ``out``; returns its size in bytes.

    The file appears under its name only when it is complete and durable.

    Raises:
        ExtsnapError: ``out`` exists and ``force`` was not given, or is not a place for a file.
        OSError: ``out`` cannot be written, or the image not be read: names which, the operation and the byte.
    """
    entry = volume.find(name)
    exists = os.path.lexists(out)
    if exists and not force:
        raise ExtsnapError(f"{out} exists already", hint="use --force to replace it")
    if exists and not os.path.isfile(out):
        raise ExtsnapError(f"{out} is not a regular file", hint="name a file to write to")
    if exists and os.path.samefile(out, volume.path):
        raise ExtsnapError(f"{out} is the image itself", hint="name another file to write to")
    with _new_file(out, force) as descriptor:
        write_image(volume, entry.name, descriptor)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise NotWritten(error.errno, "flushing") from error
    return entry.volume_bytes


@contextlib.contextmanager
def _new_file(out: str, replace: bool) -> Iterator[int]:
    """Yield the descriptor of a new file, which gets its name at the end, unless an error comes before.

    Where the filesystem has files without a name, nothing stays of one whose writer is killed.
    """
    directory = os.path.dirname(out) or "."
    partial = f"{out}.{os.getpid()}.partial"
    try:
        descriptor = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
        named = False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        named = True
    try:
        yield descriptor
        if not named and not (replace and os.path.lexists(out)):
            _link(descriptor, out)
            return
        if not named:  # a link replaces nothing
            _link(descriptor, partial)
            named = True
        os.replace(partial, out)
        named = False
    except NotWritten as error:  # not the image, which has errors of its own
        number = error.errno or errno.EIO
        raise OSError(number, f"{error.strerror} of {out} failed: {os.strerror(number)}") from error
    finally:
        os.close(descriptor)
        if named:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)


def _write(descriptor: int, data: Buffer, offset: int) -> None:
    """Write all of ``data``: a filesystem that gets full takes what it has room for, and fails the next time.

    Raises:
        NotWritten: It took no more.
    """
    view, at = memoryview(data), offset
    try:
        while view:
            done = os.pwrite(descriptor, view, at)
            if not done:
                raise OSError(errno.ENOSPC, "no progress")
            view, at = view[done:], at + done
    except OSError as error:
        raise NotWritten(error.errno, f"writing {len(data)} bytes at byte {offset}") from error


def _link(descriptor: int, name: str) -> None:
    # A descriptor for the directory makes Python call linkat(2), which alone follows the link in /proc.
    os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=descriptor, follow_symlinks=True)


def write_image(volume: Volume, name: str, descriptor: int) -> None:
    """Write the exported image of a snapshot to an empty file."""
    view = volume.open_view(name)
    changes = without_store(volume, view)
    os.ftruncate(descriptor, view.size)
    for offset, data in view.pieces():
        _write_sparse(descriptor, offset, data)
    size = volume.block_size
    for block, content in sorted(changes.items()):
        _write(descriptor, content[: view.size - block * size], block * size)


def without_store(volume: Volume, view: View) -> dict[int, bytes]:
    """The blocks of a view that change when ``/.extsnap`` is removed from it."""
    overlay = Overlay(view, volume.block_size)
    fs = Filesystem.open(overlay, writable=True)
    # The snapshot's own moment, so that every export of it is the same.
    if fs.lookup(graft.PATH) is not None:  # else it was renamed, and is a file of zeros like others
        graft.remove(fs, view.snapshot.created_ns // 10**9)
    fs.flush()
    return overlay.changes()


def _write_sparse(descriptor: int, offset: int, data: bytes) -> None:
    """Write all but long runs of zeros."""
    view = memoryview(data)
    zero = bytes(HOLE_BYTES)
    start = None
    for at in range(0, len(data), HOLE_BYTES):
        piece = view[at : at + HOLE_BYTES]
        if piece == zero[: len(piece)]:
            if start is not None:
                _write(descriptor, view[start:at], offset + start)
                start = None
        elif start is None:
            start = at
    if start is not None:
        _write(descriptor, view[start:], offset + start)
