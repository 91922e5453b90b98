"""An image file (or block device) as a device, locked by inode."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from typing import Literal

from extsnap.blockdev.base import Buffer
from extsnap.blockdev.early import EarlyWriter
from extsnap.errors import ExtsnapError, ImageNotFound, VolumeBusy

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_WRITE_EARLY_EVERY = 256 << 10  # bytes; measured: docs/DECISIONS.md
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _failure(error: OSError, operation: str, path: str, offset: int) -> OSError:
    return OSError(error.errno, f"{operation} at byte {offset} of {path} failed: {os.strerror(error.errno or 0)}")


class ImageFile:
    """A regular file or block device with positioned reads and writes.

    Attributes:
        path: Absolute path as it was given, symbolic links not resolved.
        device_id: (st_dev, st_ino): what the lock and every comparison go by, never the path.
        size: Bytes.
    """

    def __init__(
        self,
        path: str,
        *,
        writable: bool = False,
        lock: Literal["none", "shared", "exclusive"] = "none",
    ) -> None:
        """Open and lock.

        Raises:
            ImageNotFound: Missing, or neither a regular file nor a block device.
            ExtsnapError: No permission.
            VolumeBusy: Another extsnap has the lock.
        """
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
            hint = "check its permissions" + (" or open a copy" if writable else "")
            raise ExtsnapError(f"{path} cannot be opened: permission denied", hint=hint) from error
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise VolumeBusy(f"{path} is in use", hint="unmount it first") from error
            raise ExtsnapError(f"{path} cannot be opened: {error.strerror}", hint="check the path") from error
        try:
            opened = os.fstat(self._descriptor)
            self.device_id = (opened.st_dev, opened.st_ino)
            self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
            self._is_file = stat.S_ISREG(opened.st_mode)
            self._early = EarlyWriter(self._descriptor, every=_WRITE_EARLY_EVERY)
            if lock != "none":
                self._lock(exclusive=lock == "exclusive")
        except BaseException:
            os.close(self._descriptor)
            raise

    def _lock(self, *, exclusive: bool) -> None:
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _lock_holder(self.device_id)
            who = f"process {holder}" if holder else "another process"
            raise VolumeBusy(
                f"{self.path} is in use by extsnap in {who}", hint="wait for it, or end it with extsnap detach"
            ) from error

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
            OSError: Reading failed, or the file ended: names operation and offset.
        """
        try:
            data = os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise _failure(error, f"reading {length} bytes", self.path, offset) from error
        if len(data) == length:
            return data
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; see `pread`."""
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:] if done else buffer], offset + done)
                if not count:
                    raise OSError(errno.EIO, "the file ends")
                done += count
        except OSError as error:
            raise _failure(error, f"reading {len(buffer)} bytes", self.path, offset) from error

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``.  Not durable before `flush`.

        Raises:
            OSError: Names operation and offset; any part may have been written.
        """
        try:
            done = os.pwrite(self._descriptor, data, offset)
            while done < len(data):
                count = os.pwrite(self._descriptor, memoryview(data)[done:], offset + done)
                if not count:
                    raise OSError(errno.ENOSPC, "no progress")
                done += count
            self._early.written(done)
        except OSError as error:
            raise _failure(error, f"writing {len(data)} bytes", self.path, offset) from error

    def punch(self, offset: int, length: int) -> None:
        """Make the range read as zeros; a host that cannot punch holes gets zeros written."""
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(self._descriptor, mode, offset, length) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL):
            raise _failure(OSError(number, ""), f"punching {length} bytes", self.path, offset)
        zeros = bytes(1 << 20)
        for at in range(offset, offset + length, len(zeros)):
            self.pwrite(at, zeros[: offset + length - at])

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

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock_holder(device_id: tuple[int, int]) -> int | None:
    """Process that holds a flock on the inode, by /proc/locks; None where it cannot be told."""
    device, inode = device_id
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    try:
        with open("/proc/locks") as locks:
            for line in locks:
                fields = line.split()
                if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted and fields[4].isdigit():
                    return int(fields[4])
    except OSError:
        return None
    return None
