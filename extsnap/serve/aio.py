"""Many calls on one descriptor in one system call, by Linux' own asynchronous I/O (``io_submit(2)``).

A connection of FUSE takes one request, or one answer, a call.  Whoever is answered is woken, and takes the processor
away from the server: with a call for each, nearly every time.  Nothing is asynchronous here: what is asked of a
connection that does not block is done when ``io_submit`` returns, call after call.
"""

from __future__ import annotations

import ctypes
import os
import sys

import numpy as np

from extsnap.arrays import Ints

PWRITE, PREADV = 1, 7
"""IOCB_CMD_*."""
# struct iocb and struct io_event of linux/aio_abi.h.
_CALL = np.dtype(
    {
        "names": ["opcode", "file", "buffer", "length"],
        "formats": ["=u2", "=u4", "=u8", "=u8"],
        "offsets": [16, 20, 24, 32],
        "itemsize": 64,
    }
)
_EVENT = np.dtype([("data", "=u8"), ("call", "=u8"), ("result", "=i8"), ("second", "=i8")])
# Numbers of io_setup, io_destroy, io_getevents and io_submit.
_GENERIC = (0, 1, 4, 2)
_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": _GENERIC, "riscv64": _GENERIC, "loongarch64": _GENERIC}


class Batch:
    """A table of calls, some of which are made at a time."""

    def __init__(self, descriptor: int, opcode: int, buffers: Ints, lengths: Ints) -> None:
        """Prepare them.

        Args:
            descriptor: Which stays the caller's, and does not block.
            opcode: `PWRITE`, or `PREADV`.
            buffers: Address of each call's bytes, or iovecs, which stay where they are.
            lengths: Number of each call's bytes, or iovecs.

        Raises:
            OSError: It cannot be had here.
        """
        numbers = _NUMBERS.get(os.uname().machine)
        if numbers is None or sys.maxsize < 1 << 32:
            raise OSError("the system calls of this machine are not known")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        setup, self._destroy, self._get, self._submit = map(ctypes.c_long, numbers)
        count = len(buffers)
        self._calls, self._events = np.zeros(count, _CALL), np.zeros(count, _EVENT)
        self._calls["opcode"], self._calls["file"] = opcode, descriptor
        self._calls["buffer"], self._calls["length"] = buffers, lengths
        self._list = self._calls.ctypes.data + np.arange(count) * _CALL.itemsize
        self._listed, self._told = self._list.ctypes.data, self._events.ctypes.data
        self._context = ctypes.c_ulong(0)
        self._call(setup, ctypes.c_long(count), ctypes.byref(self._context))
        # Whoever refuses one of them (a filter of system calls) does so now, when nothing is on its way.
        self._call(self._submit, self._context, ctypes.c_long(0), ctypes.c_void_p(self._listed))
        self._call(self._get, self._context, ctypes.c_long(0), ctypes.c_long(0), ctypes.c_void_p(self._told), None)

    def _call(self, number: ctypes.c_long, *arguments: object) -> int:
        done = int(self._libc.syscall(number, *arguments))
        if done < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return done

    def run(self, count: int, first: int = 0) -> Ints:
        """Make ``count`` calls from ``first`` on, or as many of them as the kernel takes.

        Returns:
            What each of those returned; negative: an errno.

        Raises:
            OSError: None was made.
        """
        listed = ctypes.c_void_p(self._listed + first * self._list.itemsize)
        made = self._call(self._submit, self._context, ctypes.c_long(count), listed)
        told = 0
        while told < made:
            left, place = ctypes.c_long(made - told), ctypes.c_void_p(self._told + told * _EVENT.itemsize)
            try:
                told += self._call(self._get, self._context, left, left, place, None)
            except InterruptedError:
                continue
        return self._events["result"][:made].astype(np.int64)

    def close(self) -> None:
        """Let go of it."""
        self._call(self._destroy, self._context)
