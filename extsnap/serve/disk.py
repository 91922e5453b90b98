"""The whole disk that a served partition lies in: its range through the engine, the rest of the image as it is.

Reading takes no lock.  Whoever opens it for writing gets all of the disk or nothing: the ranges before and behind the
partition are locked like volumes of their own, so that no write goes past another extsnap, a loop device or a mount.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from extsnap.blockdev.base import Buffer, Device
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.inuse import require_free
from extsnap.serve.contract import ServedVolume


class Disk:
    """A disk image as one file, with the interface of a served volume.

    Attributes:
        size: Bytes of the image.
    """

    def __init__(self, volume: ServedVolume, image: str, offset: int) -> None:
        """Open the image for reading.

        Args:
            volume: The partition.
            image: Path of the image.
            offset: Where the partition begins in it, in bytes.

        Raises:
            ExtsnapError, OSError: It cannot be opened.
        """
        self._volume = volume
        self._path = image
        self._start, self._end = offset, offset + volume.size
        self._reader = ImageFile(image)
        self.size = self._reader.size
        self._writers: list[ImageFile] = []
        self._users = 0

    def begin_writing(self) -> None:
        """Take the rest of the disk for one more writer.

        Raises:
            VolumeBusy: Somebody uses another part of it; names who.
            ExtsnapError, OSError: It cannot be opened for writing.
        """
        if not self._users:
            try:
                for start, end in ((0, self._start), (self._end, self.size)):
                    if start < end:
                        part = ImageFile(self._path, writable=True, lock="exclusive", start=start, length=end - start)
                        self._writers.append(part)
                        require_free(part, serving=True)
            except BaseException:
                self._give_back()
                raise
        self._users += 1

    def end_writing(self) -> None:
        """Let go of the rest of the disk after the last writer."""
        self._users = max(0, self._users - 1)
        if not self._users:
            self._give_back()

    def _give_back(self) -> None:
        while self._writers:
            self._writers.pop().close()

    def close(self) -> None:
        """Close the image."""
        self._give_back()
        self._reader.close()

    def _split(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Cut a range at the partition's edges: (offset, length, whether inside)."""
        end = offset + length
        for low, high, inside in (
            (0, self._start, False),
            (self._start, self._end, True),
            (self._end, self.size, False),
        ):
            start, stop = max(offset, low), min(end, high)
            if start < stop:
                yield start, stop - start, inside

    def _outside(self, at: int) -> tuple[Device, int]:
        """What takes writes at a byte outside the partition, and where in it that byte is."""
        for part in self._writers:
            if part.start <= at < part.start + part.size:
                return part, at - part.start
        raise OSError(errno.EBADF, "the disk is not open for writing")

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``."""
        for at, length, inside in self._split(offset, len(buffer)):
            piece = buffer[at - offset : at - offset + length]
            if inside:
                self._volume.readinto(at - self._start, piece)
            else:
                self._reader.readinto(at, piece)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``; see `Device.pwrite`."""
        view = memoryview(data)
        for at, length, inside in self._split(offset, len(view)):
            piece = view[at - offset : at - offset + length]
            if inside:
                self._volume.write(at - self._start, piece)
            else:
                part, inside_part = self._outside(at)
                part.pwrite(inside_part, piece)

    def punch(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""
        for at, size, inside in self._split(offset, length):
            if inside:
                self._volume.punch(at - self._start, size)
            else:
                part, inside_part = self._outside(at)
                part.punch(inside_part, size)

    def grow(self, size: int) -> None:
        """Refuse: what lies behind the disk's end is not in its partition table."""
        raise OSError(errno.ENOSPC, f"a disk of {self.size} bytes does not grow to {size}")

    def flush(self) -> None:
        """Barrier for all of the disk."""
        self._volume.flush()
        if self._writers:
            self._writers[0].flush()  # the same file: one barrier is enough for both parts
