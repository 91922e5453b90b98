"""Export: a snapshot as a raw image of its own, without the store."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from extsnap.blockdev.base import Buffer, ReadableDevice
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import ExtsnapError
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import graft

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

#: Zeros of at least this length become holes.
HOLE_BYTES = 4096


class NotWritten(OSError):
    """Writing to the new file failed; ``strerror`` says what was tried, and at which byte."""


class Source(ReadableDevice, Protocol):
    """What is exported: a view, or what a server shows of one."""

    def pieces(self) -> Iterator[tuple[int, bytes]]: ...


def export(volume: Volume, name: str, out: str, *, force: bool = False) -> int:
    """Write the view of ``name`` to the new sparse file ``out``; returns its size in bytes.

    Raises:
        ExtsnapError, OSError: As `new_file`.
    """
    entry = volume.find(name)
    view = volume.open_view(name)
    with new_file(out, volume.path, force=force) as descriptor:
        write_image(view, volume.block_size, entry.created_ns // 10**9, descriptor)
    return entry.volume_bytes


@contextlib.contextmanager
def new_file(out: str, image: str, *, force: bool = False) -> Iterator[int]:
    """A descriptor of a file that appears as ``out`` when the ``with`` ends well: complete and durable, or not at all.

    Until then it has no name, where the filesystem can do that: nothing is left of it if we are killed.  Without
    ``force`` nothing that has the name by then is replaced, whoever made it.

    Raises:
        ExtsnapError: ``out`` exists and ``force`` was not given, or is not a place for a file.
        OSError: ``out`` cannot be written: names it, the operation and the byte.
    """
    exists = os.path.lexists(out)
    if exists and not force:
        raise _exists_already(out)
    if exists and not os.path.isfile(out):
        raise ExtsnapError(f"{out} is not a regular file", hint="name a file to write to")
    if exists and os.path.samefile(out, image):
        raise ExtsnapError(f"{out} is the image itself", hint="name another file to write to")
    partial = f"{out}.{os.getpid()}.partial"
    named = False
    try:
        descriptor = os.open(os.path.dirname(out) or ".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        named = True
    try:
        yield descriptor
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise NotWritten(error.errno, "flushing") from error
        try:
            if named and force:
                os.replace(partial, out)
                named = False
                return
            _link(descriptor, partial if named else None, out)
        except FileExistsError:
            if not force:
                raise _exists_already(out) from None
            _link(descriptor, None, partial)
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


def _exists_already(out: str) -> ExtsnapError:
    return ExtsnapError(f"{out} exists already", hint="use --force to replace it")


def _link(descriptor: int, name: str | None, out: str) -> None:
    """Give a file a name that nothing has.

    Raises:
        FileExistsError: Something has it.
    """
    try:
        if name is None:  # the link in /proc is followed only where a descriptor is given, whatever its use
            os.link(f"/proc/self/fd/{descriptor}", out, src_dir_fd=descriptor)
        else:
            os.link(name, out)
    except OSError as error:
        if name is None or error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # No hard links here (FAT): the name is taken first, by an empty file.
        os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        os.replace(name, out)


def write_image(source: Source, block_size: int, created: int, descriptor: int) -> None:
    """Write the exported image of a snapshot to an empty file; ``created`` is its moment in seconds."""
    changes = without_store(source, block_size, created)
    os.ftruncate(descriptor, source.size)
    for offset, data in source.pieces():
        _write_sparse(descriptor, offset, data)
    for block, content in sorted(changes.items()):
        _write(descriptor, content[: source.size - block * block_size], block * block_size)


def without_store(source: ReadableDevice, block_size: int, created: int) -> dict[int, bytes]:
    """The blocks of a view that change when ``/.extsnap`` is removed from it."""
    overlay = Overlay(source, block_size)
    fs = Filesystem.open(overlay, writable=True)
    # The snapshot's own moment, so that every export of it is the same.
    if fs.lookup(graft.PATH) is not None:  # else it was renamed, and is a file of zeros like others
        graft.remove(fs, created)
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
