"""The kernel's FUSE protocol, spoken directly on ``/dev/fuse``.

The served directory is small and fixed::

    volume            the base volume, read and written
    disk              the disk that it is a partition of, if it is one, read and written
    snapshots/NAME    a view of each snapshot, read-only
    scratch/N         a view, or the volume, under a throw-away layer, read and written; there is none until asked for

One request is one ``readv``, one positioned read or write of the volume, and one ``writev``; the
buffers are allocated once and page-aligned.  A large read of what stands in the image as it is goes through
a pipe instead and is not copied here (`extsnap.serve.splice`).  While the volume holds small writes, all requests that
wait are taken first, each into a slot (`extsnap.serve.slots`), and writes that follow each other are made together.
``linux/fuse.h`` is the specification; structures keep its field order, in the byte order of the host.

*Caching.*  Names and attributes have timeouts of zero, so a snapshot appears and vanishes at once.
(``volume`` alone keeps its attributes where the kernel delays writes: it would ask for them before each.)  A
snapshot's node number comes from its id, which is never used again: a name that is used again cannot
show pages of the snapshot that had it before.  ``volume`` is opened without ``FOPEN_KEEP_CACHE``, so
pages from before a restore (which is refused while ``volume`` is open) are dropped by the next open.
With ``writeback_cache`` writes stay in the kernel's page cache until fsync, close or memory pressure,
as with any file; a write that has no room then fails at fsync or close.  Without it, and with O_DIRECT
(our own loop devices), they reach us at once.

``volume`` and ``disk`` are the same bytes under two names, which the kernel caches apart: while one is open, the
other cannot be opened (EBUSY).

A ``scratch/N`` is there from `make_scratch` until `drop_scratch`, but at least while it is open.  What is written to
it goes to a `Scratch`, so a flush of it has nothing to do, and it neither begins to serve the volume for writing nor
is refused where that cannot be written.  One over the base volume is for those who look at it: the volume is not
opened for writing meanwhile.

*Turns.*  ``serve_one`` handles one request and returns, ``serve_some`` a few: the caller decides what happens between
two calls, and nothing here starts a thread or touches the mount from above.
"""

from __future__ import annotations

import errno
import heapq
import mmap
import os
import stat
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints
from extsnap.blockdev.base import Pieces
from extsnap.blockdev.scratch import Scratch
from extsnap.errors import ExtsnapError, StoreProtected, VolumeBusy, VolumeFull
from extsnap.serve.contract import ServedView, ServedVolume
from extsnap.serve.disk import Disk
from extsnap.serve.slots import SLOTS, Slots
from extsnap.serve.splice import Splice

# Opcodes (enum fuse_opcode).
LOOKUP, FORGET, GETATTR, SETATTR = 1, 2, 3, 4
SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK = 6, 8, 9, 10, 11, 12, 13
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 14, 15, 16, 17, 18, 20
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, ACCESS, CREATE = 25, 26, 27, 28, 29, 30, 34, 35
INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE, RENAME2, LSEEK, TMPFILE = 36, 38, 42, 43, 45, 46, 51

# INIT flags.
ASYNC_READ, BIG_WRITES, ASYNC_DIO, WRITEBACK_CACHE = 1 << 0, 1 << 5, 1 << 15, 1 << 16
PARALLEL_DIROPS, ABORT_ERROR, MAX_PAGES = 1 << 18, 1 << 21, 1 << 22

FOPEN_KEEP_CACHE = 1 << 1
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 0x01, 0x02, 0x10

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("=IiQ")  # len, error, unique
INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
# as INIT_IN, then max_background, congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
ENTRY_OUT = struct.Struct("=QQQQII")  # nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec
ATTR_OUT = struct.Struct("=QII")  # attr_valid, attr_valid_nsec, dummy
SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIIII")  # valid, padding, fh, size, ...
OPEN_IN = struct.Struct("=II")  # flags, open_flags
OPEN_OUT = struct.Struct("=QII")  # fh, open_flags, padding
IO_IN = struct.Struct("=QQIIQII")  # fuse_read_in, fuse_write_in: fh, offset, size, ...
WRITE_OUT = struct.Struct("=II")
# A whole WRITE without its data, as a row of a table.
WRITE_HEAD = np.dtype(
    {
        "names": ["length", "opcode", "unique", "node", "pid", "offset", "size"],
        "formats": ["=u4", "=u4", "=u8", "=u8", "=u4", "=u8", "=u4"],
        "offsets": [0, 4, 8, 16, 32, 48, 56],
        "itemsize": IN_HEADER.size + IO_IN.size,
    }
)
RELEASE_IN = struct.Struct("=QIIQ")  # fh, flags, release_flags, lock_owner
FALLOCATE_IN = struct.Struct("=QQQII")  # fh, offset, length, mode, padding
FORGET_IN = struct.Struct("=Q")
FORGET_ONE = struct.Struct("=QQ")  # nodeid, nlookup
STATFS_OUT = struct.Struct("=QQQQQIII4x24x")
DIRENT = struct.Struct("=QQII")  # ino, off, namelen, type

KERNEL_MAJOR, KERNEL_MINOR = 7, 31
DEFAULT_MAX_WRITE = 1 << 20
_LARGE = 256 << 10  # bytes of a read that is spliced if it can be; measured: docs/DECISIONS.md
_MANY = 64 << 10  # bytes of a write of which many may come at once
_KEPT = 1 << 30  # seconds
_LATEST = 5.0  # seconds by which an acknowledgement is late at most
_MOST_PARKED = 256  # requests that wait for room: the kernel sends no more than 64 at once of what it delays
_SMALL, _LATEST_SMALL = 16 << 10, 0.05  # the same for what may be metadata, for which others wait

ROOT_NODE, VOLUME_NODE, SNAPSHOTS_NODE, DISK_NODE, SCRATCH_NODE, FIRST_SNAPSHOT_NODE = 1, 2, 3, 4, 5, 16
FIRST_SCRATCH_NODE = 1 << 62

# The requests that would change the tree: it is ours alone.
_TREE_CHANGES = frozenset((SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, CREATE, RENAME2, TMPFILE))


class Unmounted(Exception):
    """The kernel has no more requests: the directory was unmounted or the connection aborted."""


class _Refused(Exception):
    """A request that is answered with an errno, and that is nothing to log."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class _Node:
    """A snapshot's file: what the kernel knows by number."""

    number: int
    name: str
    size: int
    lookups: int = 0
    opens: int = 0
    view: ServedView | None = None


@dataclass
class _Layer:
    """A file of ``scratch``: a snapshot's view, or the base volume, under a throw-away layer.

    Attributes:
        snapshot: The snapshot's name; empty for the base volume.
        view: What is below, and ours to close.
        wanted: Whoever asked for it is still there.
    """

    snapshot: str
    view: ServedView | None
    file: Scratch
    opens: int = 0
    wanted: bool = True


@dataclass(frozen=True)
class _Parked:
    """A write or discard that found no room while more may come, as it was received.

    Attributes:
        since: When it came (monotonic seconds).
        continues: Whether it is the rest of a longer one that began well.
    """

    length: int
    head: bytes
    data: bytes
    since: float
    continues: bool


class FuseFiles:
    """One connection: the tree above, answered from a volume.

    Attributes:
        volume_opens: How often ``volume`` or ``disk`` is open now.
        volume_write_opens: How often of these for writing.
        last_pid: The process behind the last request that had one.
        refused: How many writes were refused because they would have hurt the store.
        refusal: What the last of these refusals said.
        lag: Called after a write: seconds by which its acknowledgement is late.  It is done all the same; whoever
            writes gets slower.  None: never.
        only: Which processes may open ``volume`` or ``disk``, by their number; None: all.
        hope: Whether a write that finds no room, and has waited for so many seconds, is to wait for more: until
            `try_parked` finds it or hope is lost.
        failure: The first error of a flush whose answer could not reach anybody (a loop device lets go
            of its file without asking for the result), or None.
    """

    def __init__(
        self,
        fd: int,
        volume: ServedVolume,
        *,
        disk: Disk | None = None,
        writable: bool = True,
        max_write: int = DEFAULT_MAX_WRITE,
        writeback_cache: bool = False,
        like: os.stat_result | None = None,
        before_write: Callable[[], None] | None = None,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Speak on ``fd``, a mounted, non-blocking ``/dev/fuse``.

        Args:
            fd: The connection; stays the caller's.
            volume: What is served.
            disk: What is served as ``disk``; stays the caller's.
            writable: Whether ``volume`` may be opened for writing.
            max_write: Largest write and read of one request, a multiple of the page size.
            writeback_cache: Let the kernel delay writes; whoever needs them must fsync ``volume``.
            like: Owner and mode of the image, which the files get; None: they are ours alone.
            before_write: Called before ``volume`` or ``disk`` is opened for writing; may raise.
            log: Takes one line about a request that failed.
        """
        self._fd = fd
        self._volume = volume
        self._disk = disk
        self._bases: dict[int, ServedVolume | Disk] = {VOLUME_NODE: volume}
        if disk is not None:
            self._bases[DISK_NODE] = disk
        self._base = VOLUME_NODE  # which of them is open, if one is
        self._writable = writable
        self._max_write = max_write
        self._writeback_cache = writeback_cache
        self._before_write = before_write
        self._log = log
        self._last_logged = ("", 0.0)
        self.volume_opens = 0
        self.volume_write_opens = 0
        self.last_pid = self._pid = 0
        self.refused = 0
        self.refusal = ""
        self.failure: Exception | None = None
        # Where it does not delay writes, the kernel cuts one at our limit and, where it is no whole page, at its first
        # and last page.  If a later part fails, the loop device takes the short write for a whole one: the next fsync
        # fails as well.  (Delayed and direct ones fail whole; an fsync that fails stops the journal of a mounted ext4.)
        # Kept: where the last writes ended, and those of them that may have been the first part of a longer one.
        self._ends: deque[int] = deque(maxlen=64)
        self._heads: deque[int] = deque(maxlen=64)
        self._unreported: Exception | None = None
        self._dirty = False
        self._writes = self._let_out = 0  # how many there were, and how many when all was let out
        self._seen = 0, 0.0  # the same when `rest` last saw another number, and when that was
        self._layers: dict[int, _Layer] = {}
        self._next_layer = FIRST_SCRATCH_NODE + 1
        self._nodes: dict[int, _Node] = {}
        self._by_name: dict[str, _Node] = {}
        self._listings: dict[int, list[tuple[bytes, int, int]]] = {}
        self._next_listing = 1
        self._uid, self._gid = (os.geteuid(), os.getegid()) if like is None else (like.st_uid, like.st_gid)
        self._mode = 0o600 if like is None else like.st_mode & 0o666
        self.only: Callable[[int], bool] | None = None
        self.hope: Callable[[float], bool] | None = None
        self._parked: deque[_Parked] = deque()
        # Of the request in the buffers: since when it waits, and whether it is the rest of one that began well.
        self._since, self._continues = 0.0, False
        # Acknowledgements that are late: when they are due (monotonic), and what they acknowledge.
        self.lag: Callable[[], float] | None = None
        self._late: list[tuple[float, int, int]] = []  # a heap
        self._last_late = 0.0
        self._started = int(time.time())
        self._changed = self._started
        self._touched = False
        # A WRITE is header, fuse_write_in, data: read like this, its data is page-aligned.
        self._slots = Slots(fd, IN_HEADER.size + IO_IN.size, max(max_write, 1 << 16))
        self._head, self._data = self._slots.heads[0], self._slots.data[0]  # of the request that is carried out
        self._expects_more = False  # small writes come many at a time
        self._out_head = bytearray(OUT_HEADER.size)
        self._splice = Splice(fd)
        self._out_data = memoryview(mmap.mmap(-1, max_write))
        self._write_reply = bytearray(OUT_HEADER.size + WRITE_OUT.size)
        self._slow: dict[int, Callable[[int, bytes], bytes | None]] = {
            LOOKUP: self._lookup,
            GETATTR: self._getattr,
            SETATTR: self._setattr,
            OPEN: self._open,
            RELEASE: self._release,
            FLUSH: self._flush,
            FSYNC: self._fsync,
            FALLOCATE: self._fallocate,
            OPENDIR: self._opendir,
            READDIR: self._readdir,
            RELEASEDIR: self._releasedir,
            FSYNCDIR: self._nothing,
            STATFS: self._statfs,
            ACCESS: self._nothing,
            DESTROY: self._nothing,
            INIT: self._init,
        }

    # ---- what the server asks

    @property
    def total_opens(self) -> int:
        """How many files of the tree are open."""
        opens = [node.opens for node in self._nodes.values()] + [layer.opens for layer in self._layers.values()]
        return self.volume_opens + sum(opens)

    @property
    def base_name(self) -> str:
        """Which of ``volume`` and ``disk`` is open, if one is."""
        return "disk" if self._base == DISK_NODE else "volume"

    def open_views(self) -> list[str]:
        """Names of the snapshots whose file is open, or that are under a throw-away layer."""
        layered = {layer.snapshot for layer in self._layers.values() if layer.snapshot}
        return sorted(layered | {node.name for node in self._nodes.values() if node.opens})

    def files_of(self, name: str) -> list[str]:
        """Which files show a snapshot."""
        layers = [self._layer_name(number) for number, layer in self._layers.items() if layer.snapshot == name]
        return [f"snapshots/{name}", *layers]

    def opens_of(self, file: str) -> int:
        """How often ``volume``, ``snapshots/NAME`` or ``scratch/N`` is open."""
        if file in ("volume", "disk"):
            return self.volume_opens if file == self.base_name else 0
        if file.startswith("scratch/"):
            return sum(layer.opens for number, layer in self._layers.items() if self._layer_name(number) == file)
        return sum(node.opens for node in self._nodes.values() if f"snapshots/{node.name}" == file)

    def snapshots_changed(self) -> None:
        """Forget which name means which snapshot: a command may have changed it."""
        self._by_name.clear()

    def make_scratch(self, name: str, block_size: int) -> str:
        """Put a throw-away layer over a snapshot, or over the base volume if ``name`` is empty; returns its file.

        Raises:
            VolumeBusy: The base volume is open for writing.
            SnapshotNotFound: There is no such snapshot.
            ExtsnapError: No scratch file can be made.
        """
        if name:
            view = self._volume.open_view(name)
            try:
                layer = _Layer(name, view, Scratch(view, block_size))
            except BaseException:
                view.close()
                raise
        elif self.volume_write_opens:
            raise VolumeBusy(f"{self.base_name} is open for writing", hint="unmount or close it first")
        else:
            layer = _Layer("", None, Scratch(self._volume, block_size))
        number, self._next_layer = self._next_layer, self._next_layer + 1
        self._layers[number] = layer
        return self._layer_name(number)

    def drop_scratch(self, file: str) -> None:
        """Whoever asked for it has gone: the layer goes with the last who has it open."""
        for number, layer in list(self._layers.items()):
            if self._layer_name(number) == file:
                layer.wanted = False
                self._end_layer(number)

    def _end_layer(self, number: int) -> None:
        layer = self._layers[number]
        if layer.wanted or layer.opens:
            return
        del self._layers[number]
        layer.file.close()
        if layer.view is not None:
            layer.view.close()

    @staticmethod
    def _layer_name(number: int) -> str:
        return f"scratch/{number - FIRST_SCRATCH_NODE}"

    def close(self) -> None:
        """Close the views that are still open (after the end of the connection)."""
        self._splice.close()
        self._slots.close()
        self._head = self._data = memoryview(b"")
        for number, layer in list(self._layers.items()):
            layer.wanted, layer.opens = False, 0
            self._end_layer(number)
        for node in self._nodes.values():
            if node.view is not None:
                view, node.view = node.view, None
                view.close()
        self._nodes.clear()
        self._by_name.clear()

    # ---- requests

    def serve_one(self) -> bool:
        """Take one request and answer it; returns False if none is waiting.

        Raises:
            Unmounted: There will be no more.
        """
        return self._serve(1) > 0

    def serve_some(self) -> int:
        """Take one request or, while small writes come, all that wait, and answer them; returns how many.

        Raises:
            Unmounted: There will be no more.
        """
        return self._serve(SLOTS if self._expects_more else 1)

    def _serve(self, most: int) -> int:
        try:
            lengths = self._slots.take(most)
        except OSError as error:
            raise Unmounted from error
        count = len(lengths)
        self._expects_more = False  # a small write says otherwise
        if count > 1:
            heads = self._slots.headers(count, WRITE_HEAD)
            small = self._small_writes(heads, lengths)
        else:
            small = [False]
        slot = 0
        while slot < count:
            end = slot + 1
            while small[slot] and end < count and small[end]:
                end += 1
            if end == slot + 1 or not self._write_many(heads[slot:end], slot):
                for each in range(slot, end):
                    self._carry_out(each, lengths[each])
            slot = end
        return count

    def _carry_out(self, slot: int, length: int) -> None:
        """Carry out and answer the request in a slot."""
        if length < IN_HEADER.size:
            return
        self._head, self._data = self._slots.heads[slot], self._slots.data[slot]
        claimed, opcode, unique, node, _, _, self._pid, _, _ = IN_HEADER.unpack_from(self._head)
        if self._pid:
            self.last_pid = self._pid
        if claimed != length:
            self._fail(unique, errno.EINVAL)
            return
        self._since, self._continues = 0.0, False
        self._answer_to(opcode, unique, node, length)

    def _answer_to(self, opcode: int, unique: int, node: int, length: int) -> None:
        """Carry out and answer the request in the buffers."""
        try:
            if opcode == WRITE:
                self._write(unique, node, length)
            elif opcode == READ:
                self._read(unique, node, length)
            elif opcode in (FORGET, BATCH_FORGET):
                self._forget(opcode, node, length)
            elif opcode in self._slow:
                answer = self._slow[opcode](node, self._body(length))
                if not self._answer(unique, answer or b"") and opcode == OPEN:
                    self._unopen(node, self._body(length))
            else:
                # ENOSYS is remembered by the kernel: it does not ask again, and ends interrupts that way too.
                self._fail(unique, errno.EPERM if opcode in _TREE_CHANGES else errno.ENOSYS)
        except Unmounted:
            raise
        except _Refused as refusal:
            self._fail(unique, refusal.code)
        except struct.error:
            self._fail(unique, errno.EINVAL)
        except Exception as error:  # one bad request must never end the others
            if isinstance(error, VolumeFull) and self._park(opcode, length):
                return
            if self._continues:
                self._unreported = error
            if isinstance(error, StoreProtected):
                self.refused += 1
                self.refusal = error.message
            self._report(opcode, error)
            self._fail(unique, error_number(error))

    # ---- between two requests

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is held back of what was written."""
        return not self._dirty or self._let_out == self._writes

    def rest(self, after: float) -> None:
        """Let out what is held back, if nothing was written between two calls that are so many seconds apart."""
        now = time.monotonic()
        if self._seen[0] != self._writes:
            self._seen = self._writes, now
        elif now - self._seen[1] >= after and not self.is_at_rest:
            self._let_out = self._writes
            try:
                self._volume.let_out()
            except Exception as error:  # it stays held, and the next flush says so to whoever asks
                self._report(WRITE, error)

    # ---- requests that wait for room

    def _park(self, opcode: int, length: int) -> bool:
        """Whether the request in the buffers, which found no room, is tried again instead of refused."""
        if opcode not in (WRITE, FALLOCATE) or self.hope is None or len(self._parked) >= _MOST_PARKED:
            return False
        now = time.monotonic()
        since = self._since or now
        if not self.hope(now - since):
            return False
        data = bytes(self._data[: max(0, length - len(self._head))])
        self._parked.append(_Parked(length, bytes(self._head), data, since, self._continues))
        return True

    @property
    def parked_seconds(self) -> float | None:
        """For how long the first of the requests that wait for room has done so; None: none waits."""
        return time.monotonic() - self._parked[0].since if self._parked else None

    def try_parked(self) -> None:
        """Try requests that wait for room again, in their order, until one has to go on waiting."""
        waiting = len(self._parked)
        while waiting:
            parked = self._parked.popleft()
            waiting -= 1
            self._head[:] = parked.head
            self._data[: len(parked.data)] = parked.data
            self._since, self._continues = parked.since, parked.continues
            _, opcode, unique, node, *_ = IN_HEADER.unpack_from(parked.head)
            self._answer_to(opcode, unique, node, parked.length)
            if len(self._parked) > waiting:
                self._parked.rotate(1)
                return

    def _body(self, length: int) -> bytes:
        split = len(self._head)
        if length <= split:
            return bytes(self._head[IN_HEADER.size : length])
        return bytes(self._head[IN_HEADER.size :]) + bytes(self._data[: length - split])

    def _send(self, unique: int, parts: list[bytes | bytearray | memoryview]) -> bool:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            self._not_taken(unique, error)
            return False
        return True

    def _not_taken(self, unique: int, error: OSError) -> None:
        if error.errno == errno.ENODEV:
            raise Unmounted from error
        if error.errno != errno.ENOENT:  # else the asker was interrupted and is gone
            self._note(f"answer to request {unique} was not taken: {error.strerror}")

    def _answer(self, unique: int, payload: bytes) -> bool:
        OUT_HEADER.pack_into(self._out_head, 0, OUT_HEADER.size + len(payload), 0, unique)
        return self._send(unique, [self._out_head, payload] if payload else [self._out_head])

    def _fail(self, unique: int, code: int) -> None:
        OUT_HEADER.pack_into(self._out_head, 0, OUT_HEADER.size, -code, unique)
        self._send(unique, [self._out_head])

    def _report(self, opcode: int, error: Exception) -> None:
        what = {WRITE: "write", READ: "read", FSYNC: "fsync", FLUSH: "flush", FALLOCATE: "discard"}.get(opcode)
        name = "" if isinstance(error, ExtsnapError) else f"{type(error).__name__}: "
        self._note(f"{what or f'request {opcode}'} failed: {name}{error}")

    def _note(self, message: str) -> None:
        """Log, but not the same line for each of a thousand requests."""
        now = time.monotonic()
        text, when = self._last_logged
        if message != text or now - when > 1.0:
            self._last_logged = (message, now)
            self._log(message)

    # ---- the hot path

    def _write(self, unique: int, node: int, length: int) -> None:
        _, offset, size, _, _, _, _ = IO_IN.unpack_from(self._head, IN_HEADER.size)
        if size != length - len(self._head):
            raise _Refused(errno.EINVAL)
        base = self._bases.get(node)
        if base is None:
            self._write_scratch(unique, node, offset, size)
            return
        if not self._writable:
            raise _Refused(errno.EROFS)
        if offset + size > base.size:
            base.grow(offset + size)
        self._dirty = self._touched = True
        self._writes += 1
        try:
            base.write(offset, self._data[:size])
        except Exception:
            if not self._writeback_cache and (offset in self._heads or (size % mmap.PAGESIZE and offset in self._ends)):
                self._continues = True
            raise
        self._ends.append(offset + size)
        if offset % mmap.PAGESIZE or size == self._max_write:
            self._heads.append(offset + size)
        self._expects_more = size <= _MANY and node == VOLUME_NODE and self._volume.holds
        if delay := self._delay():
            self._acknowledge_late(unique, size, delay)
        else:
            self._written(unique, size)

    def _delay(self) -> float:
        """Seconds by which what was just written is to be acknowledged late; it is made, whatever becomes of this."""
        try:
            return self.lag() if self.lag is not None else 0.0
        except Exception as error:
            self._report(WRITE, error)
            return 0.0

    def _acknowledge_late(self, unique: int, size: int, delay: float) -> None:
        """Leave a write that was made to `acknowledge_late`."""
        now = time.monotonic()
        if size <= _SMALL:
            due = now + min(delay, _LATEST_SMALL)
        else:  # one after the other: many may be on their way at once
            due = self._last_late = min(max(self._last_late, now) + delay, now + _LATEST)
        heapq.heappush(self._late, (due, unique, size))

    def _small_writes(self, heads: npt.NDArray[np.void], lengths: list[int]) -> list[bool]:
        """Which requests are small writes to the base volume that are as they should be."""
        if not self._writable:
            return [False] * len(lengths)
        small = (heads["opcode"] == WRITE) & (heads["node"] == VOLUME_NODE)
        small &= (heads["length"] == lengths) & (heads["length"] == heads["size"] + len(self._head))
        small &= (heads["size"] > 0) & (heads["size"] <= _MANY)
        small &= heads["offset"] <= self._volume.size
        return list((small & (heads["offset"] + heads["size"] <= self._volume.size)).tolist())

    def _write_many(self, heads: npt.NDArray[np.void], first: int) -> bool:
        """Carry out and answer small writes in slots from ``first`` on; False if they are to be taken one by one."""
        at, buffer = self._slots.places(first, len(heads))
        offsets, sizes = heads["offset"].astype(np.int64), heads["size"].astype(np.int64)
        self._dirty = self._touched = True
        self._writes += 1
        try:
            if not self._volume.write_many(Pieces(offsets, sizes, at, buffer)):
                return False
        except Exception:  # one by one it is found out which of them that is about, and said
            return False
        self._expects_more = self._volume.holds
        self.last_pid = next((pid for pid in heads["pid"][::-1].tolist() if pid), self.last_pid)
        ends = offsets + sizes
        self._ends.extend(ends.tolist())
        self._heads.extend(ends[(offsets % mmap.PAGESIZE != 0) | (sizes == self._max_write)].tolist())
        delay = self._delay() / len(heads)  # it is that of all of them together
        if delay:
            for unique, size in zip(heads["unique"].tolist(), sizes.tolist(), strict=True):
                self._acknowledge_late(unique, size, delay)
        else:
            self._all_written(heads["unique"], sizes)
        return True

    def _all_written(self, uniques: npt.NDArray[np.uint64], sizes: Ints) -> None:
        results = self._slots.written(uniques, sizes)
        for number in np.flatnonzero(results < 0).tolist():
            code = -int(results[number])
            self._not_taken(int(uniques[number]), OSError(code, os.strerror(code)))
        for unique, size in zip(uniques[len(results) :].tolist(), sizes[len(results) :].tolist(), strict=True):
            self._written(unique, size)

    def _write_scratch(self, unique: int, node: int, offset: int, size: int) -> None:
        layer = self._layers.get(node)
        if layer is None:
            raise _Refused(errno.EBADF)
        if offset + size > layer.file.size:
            raise _Refused(errno.ENOSPC)
        layer.file.pwrite(offset, self._data[:size])
        self._written(unique, size)

    def _written(self, unique: int, size: int) -> None:
        reply = self._write_reply
        OUT_HEADER.pack_into(reply, 0, len(reply), 0, unique)
        WRITE_OUT.pack_into(reply, OUT_HEADER.size, size, 0)
        self._send(unique, [reply])

    def acknowledge_late(self, reason: Callable[[], bool]) -> float | None:
        """Acknowledge the writes whose time has come; returns the seconds until that of the next, if there is one.

        Where there is no ``reason`` to wait any more, that is all of them.
        """
        if self._late and (self.lag is None or not reason()):
            self._last_late = 0.0
            for _, unique, size in sorted(self._late):
                self._written(unique, size)
            self._late.clear()
        while self._late:
            wait = self._late[0][0] - time.monotonic()
            if wait > 0:
                return wait
            _, unique, size = heapq.heappop(self._late)
            self._written(unique, size)
        return None

    def _read(self, unique: int, node: int, length: int) -> None:
        if length < len(self._head):
            raise _Refused(errno.EINVAL)
        _, offset, size, _, _, _, _ = IO_IN.unpack_from(self._head, IN_HEADER.size)
        source: ServedVolume | ServedView | Disk | Scratch | None = self._bases.get(node)
        if source is None:
            found = self._nodes.get(node)
            source = self._layers[node].file if node in self._layers else found.view if found is not None else None
            if source is None:
                raise _Refused(errno.EBADF)
        size = max(0, min(size, source.size - offset, self._max_write))
        if _LARGE <= size <= self._splice.most and source is self._volume and self._spliced(unique, offset, size):
            return
        OUT_HEADER.pack_into(self._out_head, 0, OUT_HEADER.size + size, 0, unique)
        if size:
            data = self._out_data[:size]
            source.readinto(offset, data)
            # readinto may have raised or logged, never answered: the header is still ours.
            self._send(unique, [self._out_head, data])
        else:
            self._send(unique, [self._out_head])

    def _spliced(self, unique: int, offset: int, size: int) -> bool:
        """Answer a read of ``volume`` with what stands in the image as it is; False: not possible here and now."""
        place = self._volume.where(offset, size)
        if place is None:
            return False
        OUT_HEADER.pack_into(self._out_head, 0, OUT_HEADER.size + size, 0, unique)
        try:
            return self._splice.send(self._out_head, *place, size)
        except OSError as error:
            self._not_taken(unique, error)
            return error.errno == errno.ENOENT  # else the asker still waits: it gets a copy

    # ---- the rest

    def _nothing(self, node: int, body: bytes) -> bytes | None:
        return None

    def _init(self, node: int, body: bytes) -> bytes:
        major, minor, max_readahead, offered = INIT_IN.unpack_from(body)
        if major < KERNEL_MAJOR or (major == KERNEL_MAJOR and minor < KERNEL_MINOR):
            self._log(f"the kernel speaks FUSE {major}.{minor}; {KERNEL_MAJOR}.{KERNEL_MINOR} is needed")
            raise _Refused(errno.EPROTO)
        if major > KERNEL_MAJOR:  # it asks again with our version
            return INIT_OUT.pack(KERNEL_MAJOR, KERNEL_MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        wanted = ASYNC_READ | BIG_WRITES | ASYNC_DIO | PARALLEL_DIROPS | ABORT_ERROR | MAX_PAGES
        if self._writeback_cache:
            wanted |= WRITEBACK_CACHE
        return INIT_OUT.pack(
            KERNEL_MAJOR,
            KERNEL_MINOR,
            min(max_readahead, self._max_write),
            offered & wanted,
            64,
            48,
            self._max_write,
            1,
            self._max_write // mmap.PAGESIZE,
            0,
            0,
        )

    def _attributes(self, node: int) -> bytes:
        changed = self._started
        reading = self._mode & 0o444
        if node in (ROOT_NODE, SNAPSHOTS_NODE, SCRATCH_NODE):
            mode, links, size = stat.S_IFDIR | reading | reading >> 2, 3 if node == ROOT_NODE else 2, 0
        elif node in self._layers:
            mode, links, size = stat.S_IFREG | self._mode, 1, self._layers[node].file.size
        elif node in self._bases:
            if self._touched:
                self._changed, self._touched = int(time.time()), False
            changed = self._changed
            mode, links, size = stat.S_IFREG | (self._mode if self._writable else reading), 1, self._bases[node].size
        else:
            known = self._nodes.get(node)
            if known is None:
                raise _Refused(errno.ESTALE)
            mode, links, size = stat.S_IFREG | reading, 1, known.size
        blocks, owner = -(-size // 512), (self._uid, self._gid)
        return ATTR.pack(node, size, blocks, changed, changed, changed, 0, 0, 0, mode, links, *owner, 0, 4096, 0)

    def _valid(self, node: int) -> int:
        """Seconds for which the kernel may keep the attributes of a node."""
        return _KEPT if (node in self._bases or node in self._layers) and self._writeback_cache else 0

    def _snapshot(self, name: str) -> _Node:
        if name not in self._volume.snapshot_names():
            self._by_name.pop(name, None)
            raise _Refused(errno.ENOENT)
        node = self._by_name.get(name)
        if node is None:
            view = self._volume.open_view(name)
            try:
                number, size = FIRST_SNAPSHOT_NODE + view.id, view.size
            finally:
                view.close()
            node = self._nodes.get(number) or _Node(number, name, size)
            self._by_name[name] = node
        return node

    def _lookup(self, parent: int, body: bytes) -> bytes:
        raw = body.split(b"\0", 1)[0]
        number = 0
        if parent == ROOT_NODE:
            number = next((number for name, number, _ in self._root() if name == raw), 0)
        elif parent == SNAPSHOTS_NODE:
            try:
                node = self._snapshot(raw.decode("utf-8"))
            except UnicodeDecodeError:
                raise _Refused(errno.ENOENT) from None
            self._nodes[node.number] = node
            node.lookups += 1
            number = node.number
        elif parent == SCRATCH_NODE:
            names = {self._layer_name(layer).encode(): layer for layer in self._layers}
            number = names.get(b"scratch/" + raw, 0)
        if not number:
            raise _Refused(errno.ENOENT)
        return ENTRY_OUT.pack(number, 0, 0, self._valid(number), 0, 0) + self._attributes(number)

    def _forget(self, opcode: int, node: int, length: int) -> None:
        """FORGET and BATCH_FORGET have no answer, not even to a malformed one."""
        body = self._body(length)
        try:
            if opcode == FORGET:
                pairs = [(node, FORGET_IN.unpack_from(body)[0])]
            else:
                (count,) = struct.unpack_from("=I", body)
                count = min(count, (len(body) - 8) // FORGET_ONE.size)
                pairs = [FORGET_ONE.unpack_from(body, 8 + index * FORGET_ONE.size) for index in range(count)]
        except struct.error:
            return
        for number, lookups in pairs:
            known = self._nodes.get(number)
            if known is not None:
                known.lookups = max(0, known.lookups - lookups)
                self._drop_unused(known)

    def _drop_unused(self, node: _Node) -> None:
        if not node.lookups and not node.opens:
            self._nodes.pop(node.number, None)

    def _getattr(self, node: int, body: bytes) -> bytes:
        return ATTR_OUT.pack(self._valid(node), 0, 0) + self._attributes(node)

    def _setattr(self, node: int, body: bytes) -> bytes:
        fields = SETATTR_IN.unpack_from(body)
        valid, size = fields[0], fields[3]
        base = self._bases.get(node)
        if node in self._layers:
            if valid & FATTR_SIZE and size != self._layers[node].file.size:
                raise _Refused(errno.EPERM)
        elif base is None or not self._writable:
            raise _Refused(errno.EROFS)
        elif valid & FATTR_SIZE and size < base.size:
            raise _Refused(errno.EPERM)  # the end may be what a snapshot still needs
        elif valid & FATTR_SIZE and size > base.size:
            base.grow(size)
        if valid & (FATTR_MODE | FATTR_UID | FATTR_GID):
            raise _Refused(errno.EPERM)
        return self._getattr(node, body)

    def _open(self, node: int, body: bytes) -> bytes:
        flags, _ = OPEN_IN.unpack_from(body)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if node in self._bases:
            if self.volume_opens and node != self._base:
                raise _Refused(errno.EBUSY)
            if self.only is not None and not self.only(self._pid):
                raise _Refused(errno.EBUSY)
            if writing:
                if not self._writable:
                    raise _Refused(errno.EROFS)
                if any(not layer.snapshot for layer in self._layers.values()):
                    raise _Refused(errno.EBUSY)  # somebody looks at it as it is
                if node == DISK_NODE and self._disk is not None:
                    self._disk.begin_writing()
                try:
                    if self._before_write is not None:
                        self._before_write()
                except BaseException:
                    if node == DISK_NODE and self._disk is not None:
                        self._disk.end_writing()
                    raise
                self.volume_write_opens += 1
            self._base = node
            self.volume_opens += 1
            return OPEN_OUT.pack(0, 0, 0)
        if node in self._layers:
            self._layers[node].opens += 1
            return OPEN_OUT.pack(0, 0, 0)
        if node in (ROOT_NODE, SNAPSHOTS_NODE, SCRATCH_NODE):
            raise _Refused(errno.EISDIR)
        known = self._nodes.get(node)
        # Between the lookup and this there may have been commands: what counts is what the name means now.
        if known is None or self._snapshot(known.name) is not known:
            raise _Refused(errno.ESTALE)  # the kernel looks the name up again, but only once
        if writing:
            raise _Refused(errno.EROFS)
        if known.view is None:
            known.view = self._volume.open_view(known.name)
        known.opens += 1
        return OPEN_OUT.pack(0, FOPEN_KEEP_CACHE, 0)

    def _release(self, node: int, body: bytes) -> None:
        _, flags, _, _ = RELEASE_IN.unpack_from(body)
        try:
            if node in self._bases and self._dirty:
                self._settle()
        except Exception as error:  # nobody waits for the answer of a release
            self.failure = self.failure or error
            raise
        finally:
            self._let_go(node, flags & os.O_ACCMODE != os.O_RDONLY)

    def _unopen(self, node: int, body: bytes) -> None:
        """An open whose answer found nobody: no release will come."""
        self._let_go(node, OPEN_IN.unpack_from(body)[0] & os.O_ACCMODE != os.O_RDONLY)

    def _let_go(self, node: int, writing: bool) -> None:
        if node in self._bases:
            self.volume_opens = max(0, self.volume_opens - 1)
            if writing:
                self.volume_write_opens = max(0, self.volume_write_opens - 1)
                if node == DISK_NODE and self._disk is not None:
                    self._disk.end_writing()
            return
        if node in self._layers:
            self._layers[node].opens -= 1
            self._end_layer(node)
            return
        known = self._nodes.get(node)
        if known is None or not known.opens:
            return
        known.opens -= 1
        if not known.opens:
            view, known.view = known.view, None
            self._drop_unused(known)
            if view is not None:
                view.close()

    def _settle(self) -> None:
        self._dirty = False
        try:
            self._bases[self._base].flush()
        except BaseException:
            self._dirty = True
            raise

    def _flush(self, node: int, body: bytes) -> None:
        # Closing is the only barrier that debugfs and friends give.
        if node in self._bases and self._dirty:
            self._settle()

    def _fsync(self, node: int, body: bytes) -> None:
        if node in self._bases and self._writable:
            self._settle()
            if self._unreported is not None:
                error, self._unreported = self._unreported, None
                raise error

    def _fallocate(self, node: int, body: bytes) -> None:
        _, offset, length, mode, _ = FALLOCATE_IN.unpack_from(body)
        layer = self._layers.get(node)
        base = self._bases.get(node)
        if layer is None and (base is None or not self._writable):
            raise _Refused(errno.EROFS)
        # Discard and write-zeroes of a loop device both arrive as 3.  One EOPNOTSUPP to them would
        # end discard on that loop device for good.
        if mode & ~FALLOC_KEEP_SIZE not in (FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE):
            raise _Refused(errno.EOPNOTSUPP)
        if layer is not None:
            layer.file.punch(offset, length)
            return
        assert base is not None
        if offset + length > base.size:
            if mode & FALLOC_ZERO_RANGE and not mode & FALLOC_KEEP_SIZE:
                base.grow(offset + length)
            length = max(0, base.size - offset)
        if length:
            self._dirty = self._touched = True
            self._writes += 1
            base.punch(offset, length)

    def _root(self) -> list[tuple[bytes, int, int]]:
        """(name, number, type) of what is in the served directory."""
        file, directory = stat.S_IFREG >> 12, stat.S_IFDIR >> 12
        entries = [(b"volume", VOLUME_NODE, file), (b"snapshots", SNAPSHOTS_NODE, directory)]
        if self._disk is not None:
            entries.append((b"disk", DISK_NODE, file))
        if self._layers:
            entries.append((b"scratch", SCRATCH_NODE, directory))
        return entries

    def _opendir(self, node: int, body: bytes) -> bytes:
        if node == ROOT_NODE:
            entries = self._root()
        elif node == SNAPSHOTS_NODE:
            # The number in a listing is informative only: a lookup gives the real one.
            entries = [(name.encode("utf-8"), 0xFFFFFFFF, stat.S_IFREG >> 12) for name in self._volume.snapshot_names()]
        elif node == SCRATCH_NODE:
            names = [(self._layer_name(number).partition("/")[2], number) for number in self._layers]
            entries = [(name.encode(), number, stat.S_IFREG >> 12) for name, number in names]
        else:
            raise _Refused(errno.ENOTDIR)
        handle = self._next_listing
        self._next_listing += 1
        directory = stat.S_IFDIR >> 12
        self._listings[handle] = [(b".", node, directory), (b"..", ROOT_NODE, directory), *entries]
        return OPEN_OUT.pack(handle, 0, 0)

    def _readdir(self, node: int, body: bytes) -> bytes:
        handle, offset, size, _, _, _, _ = IO_IN.unpack_from(body)
        listing = self._listings.get(handle)
        if listing is None:
            raise _Refused(errno.EBADF)
        parts: list[bytes] = []
        room = min(size, self._max_write)
        for index in range(offset, len(listing)):
            name, number, kind = listing[index]
            entry = DIRENT.pack(number, index + 1, len(name), kind) + name
            entry += bytes(-len(entry) % 8)
            if len(entry) > room:
                break
            room -= len(entry)
            parts.append(entry)
        return b"".join(parts)

    def _releasedir(self, node: int, body: bytes) -> None:
        self._listings.pop(RELEASE_IN.unpack_from(body)[0], None)

    def _statfs(self, node: int, body: bytes) -> bytes:
        return STATFS_OUT.pack(self._volume.size // 4096, 0, 0, 0, 0, 4096, 255, 4096)


def error_number(error: BaseException) -> int:
    """The errno that a served file answers with when ``error`` reaches a request."""
    if isinstance(error, ExtsnapError):
        return error.errno or errno.EIO
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO
