"""Answers whose bytes stand in a file, given to the kernel without a copy of them in this process.

They go from the file into a pipe and from there into the connection, as references to pages of the host's cache.  Not
every host, kernel and user can do that: whatever is refused, or comes short, is for the caller to copy.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

_F_SETPIPE_SZ = 1031
#: As large as a pipe may be for anybody by default (/proc/sys/fs/pipe-max-size).
PIPE_BYTES = 1 << 20
#: Most bytes of one answer: a pipe has a place for each page, one goes to the header, one more to unaligned ends.
MOST_BYTES = PIPE_BYTES - 2 * mmap.PAGESIZE


class Splice:
    """A way for large answers into one connection.

    Attributes:
        most: Bytes that an answer may have; 0 where nothing can be sent like this.
    """

    def __init__(self, connection: int) -> None:
        """Send to ``connection``, which stays the caller's."""
        self._connection = connection
        self._pipe: tuple[int, int] | None = None
        self.most = MOST_BYTES

    def send(self, head: bytearray, descriptor: int, offset: int, size: int) -> bool:
        """Send ``head`` and ``size`` bytes of a file, at most `most`; nobody may change them meanwhile.

        Returns:
            False if nothing was sent.

        Raises:
            OSError: The connection did not take the answer, as a write of it would not have been taken.
        """
        try:
            if self._pipe is None:
                self._pipe = self._open()
            out, into = self._pipe
            os.write(into, head)
            whole = os.splice(descriptor, into, size, offset_src=offset) == size
        except OSError as error:
            return self._refused(error)
        if not whole:  # there may be an error behind: who copies finds out
            self.close()
            return False
        try:
            os.splice(out, self._connection, len(head) + size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                self.close()
                raise
            return self._refused(error)
        return True

    def _refused(self, error: OSError) -> bool:
        """What is in the pipe goes with it; what cannot be done at all is not tried again."""
        self.close()
        if error.errno in (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EMFILE, errno.ENFILE):
            self.most = 0
        return False

    @staticmethod
    def _open() -> tuple[int, int]:
        ends = os.pipe()
        try:
            fcntl.fcntl(ends[0], _F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            for end in ends:
                os.close(end)
            raise
        return ends

    def close(self) -> None:
        """Let go of the pipe; the next answer makes another one."""
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None
