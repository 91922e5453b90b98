"""Start writing to the host's disk early, so that a later barrier finds little left to do.

A hint only: no byte is durable because of it, and nothing is ever reported by it.  ``fdatasync`` still
waits for everything and reports every error (sync_file_range without its wait flags does not consume them).
"""

from __future__ import annotations

import ctypes
import threading

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class EarlyWriter:
    """A thread that has the host write out dirty pages of one file while its owner goes on.

    The thread touches nothing but the descriptor, without the interpreter's lock; it starts with the first
    call of `written` that has enough to do.
    """

    def __init__(self, descriptor: int, *, every: int) -> None:
        """Serve ``descriptor``, which must stay open until `close` returns.

        Args:
            descriptor: An open file.
            every: Bytes written between two starts: enough for the disk to be kept busy, few enough that
                a block written again and again reaches the disk seldom.
        """
        self._descriptor = descriptor
        self._every = every
        self._waiting = 0
        self._wake = threading.Lock()
        self._thread: threading.Thread | None = None
        self._over = False

    def written(self, count: int) -> None:
        """Take note of ``count`` bytes written."""
        self._waiting += count
        if self._waiting < self._every:
            return
        self._waiting = 0
        if self._thread is None:
            self._wake.acquire()
            self._thread = threading.Thread(target=self._run, name="early-writer", daemon=True)
            self._thread.start()
        if self._wake.locked():  # else it is awake, and sees these pages as well
            self._wake.release()

    def settled(self) -> None:
        """Take note of a barrier: nothing waits any more."""
        self._waiting = 0

    def close(self) -> None:
        """End the thread; returns when it has let go of the descriptor."""
        self._over = True
        if self._thread is not None:
            if self._wake.locked():
                self._wake.release()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            if self._over:
                return
            _libc.sync_file_range(self._descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)
