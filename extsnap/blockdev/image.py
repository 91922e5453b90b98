"""An image file (or block device), or one partition of it, as a device; locked by inode and range.

The lock is two.  An open-file-description lock (`F_OFD_SETLK`) on the bytes of the partition, or on all of them,
keeps two extsnaps apart, and lets two partitions of one image be used at once.  A `flock`, shared by all who use
a part, is there for other programs: ``flock -n``, ``sfdisk --lock`` and udev see an image in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal

from extsnap.arrays import Ints
from extsnap.blockdev.base import Buffer, Pieces
from extsnap.blockdev.early import EarlyWriter
from extsnap.blockdev.inuse import Span, busy, device_key, file_key
from extsnap.blockdev.locks import in_words, lock_holder
from extsnap.errors import ExtsnapError, ImageNotFound, ImageReadOnly, VolumeBusy

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_WRITE_EARLY_EVERY = 256 << 10  # bytes; measured: docs/DECISIONS.md
_CLONE_LEAST = 512 << 10  # bytes; shorter ones are slower than writing: docs/DECISIONS.md
_WAITED_SECONDS = 50e-6  # a read that takes longer had to wait for the disk
_LOCK_ATTEMPTS = 4
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("qQQQ")  # struct file_clone_range: src_fd, src_offset, src_length, dest_offset
_BLKSSZGET, _BLKROGET = 0x1268, 0x125E
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _failure(error: OSError, operation: str, path: str, offset: int) -> OSError:
    return OSError(error.errno, f"{operation} at byte {offset} of {path} failed: {os.strerror(error.errno or 0)}")


def _read_only(path: str, why: str) -> ImageReadOnly:
    hint = "read it with list, export or mount --snapshot, or write to a copy"
    return ImageReadOnly(f"{path} cannot be written: {why}", hint=hint)


class ImageFile:
    """A regular file or block device, or a range of it, with positioned reads and writes.

    Attributes:
        path: Absolute path as it was given, symbolic links not resolved.
        device_id: (st_dev, st_ino): what the lock and every comparison go by, never the path.
        key: The same for `extsnap.blockdev.inuse`, for which a block device is one whatever node names it.
        start: First byte of the range in the file; what is read and written counts from here.
        size: Bytes.
        clone_least: As `extsnap.blockdev.base.Device` has it.
        is_range: Whether it was opened as a part of the file, whose end is then a limit for writes too.
    """

    def __init__(
        self,
        path: str,
        *,
        writable: bool = False,
        lock: Literal["none", "shared", "exclusive"] = "none",
        start: int = 0,
        length: int | None = None,
    ) -> None:
        """Open and lock.

        Args:
            path: A regular file or block device.
            writable: For writing too.
            lock: What nobody else may do meanwhile: write (shared), or read and write (exclusive; needs ``writable``).
            start: First byte of the range that is used.
            length: Bytes of it; None for all of the file, whose size may then change.

        Raises:
            ImageNotFound: Missing, or neither a regular file nor a block device.
            ImageReadOnly: It can be read, and was to be written.
            ExtsnapError: No permission, or the range leaves the file.
            VolumeBusy: Another extsnap has the lock.
        """
        if lock == "exclusive" and not writable:
            raise ValueError("an exclusive lock needs a writable image")
        self.path = os.path.abspath(path)
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "neither a file nor a block device"
                raise ImageNotFound(f"{path} is {kind}", hint="name an image file")
            # O_EXCL on a block device is refused by the kernel while anything is mounted from it.
            if writable and stat.S_ISBLK(status.st_mode):
                flags |= os.O_EXCL
            self._descriptor = os.open(path, flags)
        except ExtsnapError:
            raise
        except FileNotFoundError as error:
            raise ImageNotFound(f"{path} does not exist", hint="check the path") from error
        except PermissionError as error:
            if writable and os.access(path, os.R_OK):
                raise _read_only(path, os.strerror(error.errno or errno.EACCES).lower()) from error
            raise ExtsnapError(f"{path} cannot be opened: permission denied", hint="check its permissions") from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise _read_only(path, "it is on a read-only filesystem") from error
            if error.errno == errno.EBUSY:
                end = sys.maxsize if length is None else start + length
                raise busy(path, Span(device_key(status.st_rdev), start, end)) from error
            raise ExtsnapError(f"{path} cannot be opened: {error.strerror}", hint="check the path") from error
        try:
            opened = os.fstat(self._descriptor)
            self.device_id = (opened.st_dev, opened.st_ino)
            is_device = stat.S_ISBLK(opened.st_mode)
            self.key = device_key(opened.st_rdev) if is_device else file_key(opened)
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
            self.start, self.is_range = start, length is not None
            self.size = end - start if length is None else length
            if start < 0 or self.size < 0 or start + self.size > end:
                raise ExtsnapError(
                    f"{path} has {end} bytes: {self.size} at {start} are not in it", hint="check the path"
                )
            self._limit = sys.maxsize if length is None else start + length
            self._is_file = stat.S_ISREG(opened.st_mode)
            if writable and not self._is_file and self._asked_of_device(_BLKROGET):
                raise _read_only(path, "the device is read-only")
            # Overwriting a shared block takes a new one.  A file without holes was promised that overwrites need none.
            has_holes = self._is_file and opened.st_blocks * 512 < opened.st_size
            self.clone_least = _CLONE_LEAST if writable and has_holes else 0
            self._early = EarlyWriter(self._descriptor, every=_WRITE_EARLY_EVERY)
            if lock != "none":
                self._lock(exclusive=lock == "exclusive")
        except BaseException:
            os.close(self._descriptor)
            raise

    def _lock(self, *, exclusive: bool) -> None:
        length = self.size if self.is_range else 0  # 0: to the end, wherever that will be
        whole = exclusive and not self.is_range
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        wanted = _FLOCK.pack(kind, os.SEEK_SET, self.start, length, 0)
        for attempts_left in reversed(range(_LOCK_ATTEMPTS)):
            try:
                fcntl.flock(self._descriptor, (fcntl.LOCK_EX if whole else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, wanted)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # or it would be taken for the other one's
                holder = lock_holder(self._descriptor, self.start, self.start + length if length else sys.maxsize)
                if holder is None and attempts_left:
                    continue  # nobody has it any more
                who = in_words(holder) if holder else "another process"
                raise VolumeBusy(
                    f"{self.path} is in use by extsnap in {who}", hint="wait for it, or end it with extsnap detach"
                ) from error

    @property
    def sector_size(self) -> int | None:
        """Bytes of a logical sector of a block device; None for a file, which has none."""
        if self._is_file:
            return None
        return self._asked_of_device(_BLKSSZGET)

    def _asked_of_device(self, request: int) -> int:
        return int(struct.unpack("i", fcntl.ioctl(self._descriptor, request, bytes(4)))[0])

    def _at(self, offset: int, length: int, operation: str) -> int:
        """Where ``offset`` of the range is in the file.

        Raises:
            OSError: ``length`` bytes there leave the range.
        """
        at = offset + self.start
        if at + length > self._limit or offset < 0:
            raise _failure(OSError(errno.EIO, ""), f"{operation} {length} bytes", self.path, at)
        return at

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close the file; the lock goes with it."""
        if self._descriptor >= 0:
            self._early.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes.

        Raises:
            OSError: Reading failed, or the file or range ended: names operation and offset in the file.
        """
        at = self._at(offset, length, "reading")
        try:
            data = os.pread(self._descriptor, length, at)
        except OSError as error:
            raise _failure(error, f"reading {length} bytes", self.path, at) from error
        if len(data) == length:
            return data
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; see `pread`."""
        self._read(self._at(offset, len(buffer), "reading"), buffer)

    def _read(self, at: int, buffer: memoryview) -> None:
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:] if done else buffer], at + done)
                if not count:
                    raise OSError(errno.EIO, "the file ends")
                done += count
        except OSError as error:
            raise _failure(error, f"reading {len(buffer)} bytes", self.path, at) from error

    def where(self, offset: int, length: int) -> tuple[int, int]:
        """The descriptor, and where in the file that is.

        Raises:
            OSError: It leaves the range.
        """
        return self._descriptor, self._at(offset, length, "reading")

    def read_pieces(self, pieces: Pieces) -> None:
        """Fill pieces one by one; a disk is given all the rest at once when one was slow.

        Raises:
            OSError: Of the first that cannot be filled, as `readinto`.
        """
        waited = False
        for number, (offset, buffer) in enumerate(self._inside(pieces, "reading"), 1):
            began = time.perf_counter()
            self._read(offset + self.start, buffer)
            if not waited and time.perf_counter() - began > _WAITED_SECONDS:
                waited = True
                self._expect(pieces.offsets[number:] + self.start, pieces.lengths[number:])

    def _expect(self, places: Ints, lengths: Ints) -> None:
        """Have the host begin to read what is wanted soon; only a hint, whatever becomes of it."""
        with contextlib.suppress(OSError):
            for at, length in zip(places.tolist(), lengths.tolist(), strict=True):
                os.posix_fadvise(self._descriptor, at, length, os.POSIX_FADV_WILLNEED)

    def write_pieces(self, pieces: Pieces) -> None:
        """Write pieces one by one, in their order.

        Raises:
            OSError: Of the first that cannot be written, as `pwrite`.
        """
        for offset, data in self._inside(pieces, "writing"):
            self._write(offset + self.start, data)

    def _inside(self, pieces: Pieces, operation: str) -> Pieces:
        """Pieces that are all inside the range.

        Raises:
            OSError: One is not; nothing was done.
        """
        outside = (pieces.offsets < 0) | (pieces.offsets + pieces.lengths + self.start > self._limit)
        for offset, data in pieces.some(outside):
            self._at(offset, len(data), operation)
        return pieces

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``.  Not durable before `flush`.

        Raises:
            OSError: Names operation and offset in the file; any part may have been written, nothing outside the range.
        """
        self._write(self._at(offset, len(data), "writing"), data)

    def _write(self, at: int, data: Buffer) -> None:
        try:
            done = os.pwrite(self._descriptor, data, at)
            while done < len(data):
                count = os.pwrite(self._descriptor, memoryview(data)[done:], at + done)
                if not count:
                    raise OSError(errno.ENOSPC, "no progress")
                done += count
            self._early.written(done)
        except OSError as error:
            raise _failure(error, f"writing {len(data)} bytes", self.path, at) from error

    def punch(self, offset: int, length: int) -> None:
        """Make the range read as zeros; a host that cannot punch holes gets zeros written."""
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        at = self._at(offset, length, "punching")
        if _libc.fallocate(self._descriptor, mode, at, length) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL):
            raise _failure(OSError(number, ""), f"punching {length} bytes", self.path, at)
        zeros = bytes(1 << 20)
        for step in range(offset, offset + length, len(zeros)):
            self.pwrite(step, zeros[: offset + length - step])

    def resize(self, size: int) -> None:
        """Make a file ``size`` bytes long; what is new reads as zeros.  Durable after `flush`, like any write.

        Raises:
            OSError: The size is fixed (ENOSPC: a range of a file, a block device), or the host refuses it.
        """
        if self.is_range or not self._is_file:
            raise _failure(OSError(errno.ENOSPC, ""), f"changing the size to {size} bytes", self.path, self.size)
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise _failure(error, f"changing the size to {size} bytes", self.path, self.size) from error
        self.size = size

    def clone(self, source: int, target: int, length: int) -> bool:
        """Have the host share blocks (btrfs, xfs); its fdatasync makes that durable like any other change of the file.

        Whatever fails here is not told: the caller writes instead, and hears of it then.
        """
        low, high = self._at(source, length, "reading"), self._at(target, length, "writing")
        try:
            fcntl.ioctl(self._descriptor, _FICLONERANGE, _CLONE_RANGE.pack(self._descriptor, low, length, high))
        except OSError as error:
            # A partition, or blocks smaller than the host's, may be aligned elsewhere: EINVAL is about this range.
            if error.errno not in (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EIO):
                self.clone_least = 0
            return False
        return True

    def flush(self) -> None:
        """Barrier (fdatasync): everything written before is durable.

        Raises:
            OSError: The host could not make it durable.
        """
        try:
            os.fdatasync(self._descriptor)
            self._early.settled()
        except OSError as error:
            raise _failure(error, "flushing", self.path, 0) from error

    def flush_while(self, work: Callable[[], None]) -> None:
        """The same while ``work`` is done, see `extsnap.blockdev.base`: the waiting is another thread's.

        Raises:
            OSError: The host could not make it durable.
        """
        failures: list[OSError] = []

        def wait() -> None:
            try:
                self.flush()
            except OSError as error:
                failures.append(error)

        waiting = threading.Thread(target=wait, name="barrier")
        waiting.start()
        try:
            work()
        finally:
            waiting.join()
        if failures:
            raise failures[0]

    def reread(self) -> None:
        """Have what is read from here on come from the medium, not from what the host remembers of it.

        A flush that failed leaves content in the host's cache that the medium never got, and the next flush, of
        whoever it is, succeeds: see `extsnap.blockdev.durable`.  Dirty pages, as a killed process leaves them, are
        written out first; clean ones are dropped.  A host in memory (tmpfs) has no other medium, and keeps all.

        Raises:
            OSError: The host could not write out what it has.
        """
        self.flush()
        # Whole pages, or those at the ends of a partition would be kept.
        low = self.start // mmap.PAGESIZE * mmap.PAGESIZE
        high = -(-(self.start + self.size) // mmap.PAGESIZE) * mmap.PAGESIZE
        os.posix_fadvise(self._descriptor, low, high - low, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
