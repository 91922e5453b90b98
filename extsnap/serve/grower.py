"""Growing the store through a kernel mount: a process of its own, and the server's end of it.

Every system call on a filesystem that is mounted from a served file may wait for that file's server.  So the server
makes none.  It forks this process before anything else, tells it in a line of JSON what to do, and hears of the end
the same way; the request loop never waits for it (`extsnap.snapshot.growth` decides what is asked and what is
believed of the answer).

    -> {"do": "watch", "file": PATH, "disk": PATH, "partition": N, "directory": PATH, "limit": BYTES, "cached": BYTES}
    <- {"mounted": true, "limited": true}                  whenever that changes
    -> {"do": "grow", "number": N, "runs": [[logical, blocks]], "room": BLOCKS, "cookie": HEX, "block": BYTES}
    <- {"do": "grow", "number": N, "extents": [[logical, physical, blocks]], "filled": false, "error": ""}
    -> {"do": "free", "number": N, "runs": [[logical, blocks]], "end": BLOCKS, "block": BYTES}
    <- {"do": "free", "number": N, "error": ""}

Every request is answered, with the number that it has, and at once where there is no mount any more.

*The mount* is found through ``/proc/self/mountinfo`` and sysfs.  It is entered by a private copy (``open_tree``), so
that an unmount at that moment does not find it busy, and only while a request is carried out.

*Growth.*  The store is immutable, which binds root too, so that flag is off in between; one fsync makes blocks and
flag durable.  ext4 allocates without writing (``fallocate``).  ext2 and ext3 cannot: there the file is filled with the
cookie, which the server recognises and does not write.  In a journal that takes data as well, that content would be
replayed after a crash over what was written underneath, so the journal is emptied first (EXT4_IOC_CHECKPOINT; where
the kernel has no such call, a freeze and a thaw).  ext2 has no journal: its metadata is synced, so that no file that
was deleted before claims the blocks after a crash.

*The dirty limit.*  The loop device under the mount may keep only so many dirty pages (``max_bytes`` with
``strict_limit`` of its bdi), so that what arrives without any growth is bounded.  A kernel before Linux 6.2 has no such
limit: there the least of ``max_ratio`` is set, and the server is told that it is not enough.
The kernel's cache of the served file is limited likewise.
These settings outlive the loop device, so they are put back when the mount is gone, and when the server is: this
process hears of that, whatever ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extsnap.serve import clearing, mounting

STORE = ".extsnap/store"

_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_FS_IOC_FIEMAP = 0xC020660B
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_EXT4_IOC_CHECKPOINT = 0x4004662B
_IMMUTABLE_FL, _JOURNAL_DATA_FL = 0x10, 0x4000
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_FIEMAP = struct.Struct("=QQIIII")  # start, length, flags, mapped_extents, extent_count, reserved
_FIEMAP_EXTENT = struct.Struct("=QQQQQIIII")  # logical, physical, length, reserved64[2], flags, reserved[3]
_FIEMAP_FLAG_SYNC = 1
_EXTENT_LAST, _EXTENT_UNKNOWN, _EXTENT_DELALLOC = 1, 2, 4
_EXTENTS_AT_ONCE = 512
_SYS_OPEN_TREE, _OPEN_TREE_CLONE, _AT_FDCWD = 428, 1, -100
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_FILL_BYTES = 8 << 20
#: Of what ordinary users could still write, the last so many blocks are left to them.
_LEFT_ALONE = 256
#: A growth by less than this many blocks is not worth its transaction.
_WORTH_IT = 64
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_WATCH_SECONDS = 1.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.syscall.restype = ctypes.c_long


# ---- the server's end


class Grower:
    """The server's end.

    Attributes:
        mounted: Whether there is a kernel mount of the served file, as far as is known.
        limited: Whether its dirty pages are limited.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._socket = connection
        self._pid = pid
        self._received = bytearray()
        self.mounted = False
        self.limited = True

    @classmethod
    def start(cls, others: list[int]) -> Grower:
        """Fork the process; ``others`` are descriptors that it must not keep.

        Whatever the server opens afterwards (the image and its lock, the FUSE connection) the process does not have.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pid = os.fork()
        if not pid:
            try:
                ours.close()
                for descriptor in others:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a Ctrl-C is for the server, whose end we hear of
                signal.set_wakeup_fd(-1)
                _Process(theirs).run()
            finally:
                os._exit(0)
        theirs.close()
        ours.setblocking(False)
        return cls(ours, pid)

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def send(self, request: dict[str, Any]) -> bool:
        """Ask; False if the process is gone."""
        line = json.dumps(request).encode() + b"\n"
        try:
            self._socket.setblocking(True)  # it reads whenever it has nothing else to do, and has one request at most
            self._socket.sendall(line)
            self._socket.setblocking(False)
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived; None if the process is gone."""
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                return None
            if not data:
                return None
            self._received += data
        found = _messages(self._received)
        for message in found:
            if "mounted" in message:
                self.mounted, self.limited = bool(message["mounted"]), bool(message["limited"])
        return found

    def close(self) -> None:
        """Hang up: the process puts things back and ends, after what it is just doing."""
        self._socket.close()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._pid, os.WNOHANG) == (0, 0):
                    time.sleep(0.005)
                    continue
            return


# ---- the process


def _messages(received: bytearray) -> list[dict[str, Any]]:
    """Take the messages that have arrived whole, a line each, out of what was received."""
    *lines, rest = bytes(received).split(b"\n")
    received[:] = rest
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class _Limit:
    """The settings of a bdi as they were, to be put back."""

    directory: Path
    settings: tuple[tuple[str, str], ...]
    holds: bool  # whether that is enough to bound them

    def put_back(self) -> None:
        for name, value in self.settings:
            with contextlib.suppress(OSError):
                (self.directory / name).write_text(value)


def _limit(device: str, limit: int) -> _Limit:
    """Let a device ("major:minor") keep at most ``limit`` bytes of dirty pages, as far as this kernel can do that."""
    directory = Path("/sys/class/bdi", device)
    before = []
    for name in ("strict_limit", "max_ratio_fine", "max_ratio"):
        with contextlib.suppress(OSError):
            before.append((name, (directory / name).read_text().strip()))
    if any(name == "max_ratio_fine" for name, _ in before):
        before = [(name, value) for name, value in before if name != "max_ratio"]
    done = set()
    for name, value in (("strict_limit", "1"), ("max_ratio", "1"), ("max_bytes", str(limit))):
        with contextlib.suppress(OSError):  # the coarser one stays where the kernel has no finer one
            (directory / name).write_text(value)
            done.add(name)
    return _Limit(directory, tuple(before), {"strict_limit", "max_bytes"} <= done)


class _Process:
    """Reads requests, carries them out one after the other, and looks after mounts in between."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()
        self._watched: dict[str, Any] | None = None
        self._limits: dict[str, _Limit] = {}
        self._told: bool | None = None

    def run(self) -> None:
        """Until the server hangs up."""
        try:
            with open("/proc/self/mountinfo", "rb", buffering=0) as table:
                poll = select.poll()
                poll.register(self._socket, select.POLLIN)
                poll.register(table, select.POLLPRI)
                while True:
                    events = dict(poll.poll(int(_WATCH_SECONDS * 1000) if self._limits else None))
                    self._look()
                    if self._socket.fileno() in events and not self._hear():
                        return
        finally:
            for limit in self._limits.values():
                limit.put_back()

    def _hear(self) -> bool:
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            return False
        if not data:
            return False
        self._received += data
        for request in _messages(self._received):
            if request["do"] == "watch":
                self._watched = request
                self._told = None
                self._look()
            else:
                self._carry_out(request)
        return True

    def _tell(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _mount(self) -> tuple[mounting.Loop, mounting.Mount] | None:
        """The kernel mount of the served file, with the loop device under it."""
        watched = self._watched
        if watched is None:
            return None
        table = mounting.mounts()
        for loop in mounting.loops():
            devices = set()
            if loop.backing == watched["file"]:
                devices.add(loop.device)
            elif watched["disk"] and loop.backing == watched["disk"]:
                number = str(watched["partition"])
                names = clearing.partitions(loop)
                devices |= {
                    device for name, device in names.items() if name.removeprefix(f"{loop.path[5:]}p") == number
                }
            for mount in table:
                if mount.device in devices and mount.fstype in ("ext2", "ext3", "ext4"):
                    return loop, mount
        return None

    def _look(self) -> None:
        """See whether there is a mount, limit its dirty pages, and put back what is not ours any more."""
        found = self._mount()
        if found is not None and self._watched is not None and found[0].path not in self._limits:
            served = mounting.fuse_mount_at(self._watched["directory"])
            if served is not None:  # it goes with its settings: nothing to put back
                _limit(served.device, int(self._watched["cached"]))
            self._limits[found[0].path] = _limit(found[0].device, int(self._watched["limit"]))
        if self._limits and found is None:
            ours = {self._watched["file"], self._watched["disk"]} if self._watched else set()
            backed = {loop.path for loop in mounting.loops() if loop.backing in ours}
            for path in set(self._limits) - backed:
                self._limits.pop(path).put_back()
        if self._watched is not None and (found is not None) != self._told:
            self._told = found is not None
            limit = self._limits.get(found[0].path) if found is not None else None
            self._tell({"mounted": self._told, "limited": limit is None or limit.holds})

    def _carry_out(self, request: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"do": request["do"], "number": request["number"], "error": ""}
        try:
            found = self._mount()
            if found is None:
                raise OSError(errno.ENOENT, "the volume is not mounted any more")
            block = int(request["block"])
            with _Entered(found[1]) as store:
                if request["do"] == "grow":
                    most = store.available(block, int(request["room"]))
                    answer |= store.grow(request["runs"], most, bytes.fromhex(request["cookie"]), block)
                else:
                    store.free(request["runs"], int(request["end"]), block)
        except (OSError, ValueError) as error:
            answer["error"] = f"the store could not {request['do']}: {error}"
        self._tell(answer)


class _Entered:
    """The store's file in a mounted filesystem, reached through a private copy of the mount; a context manager."""

    def __init__(self, mount: mounting.Mount) -> None:
        self._mount = mount
        self._root = self._file = self._writable = -1
        self._flags: int | None = None

    def __enter__(self) -> _Entered:
        try:
            self._enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        self._root = _clone(self._mount.point)
        major, minor = map(int, self._mount.device.split(":"))
        if os.fstat(self._root).st_dev != os.makedev(major, minor):
            raise OSError(errno.EXDEV, f"something else is mounted over {self._mount.point}")

    def available(self, block: int, room: int) -> int:
        """Blocks that may be taken: the store's free ones (``room``) are to be half of all that is free, at most.

        What ordinary users cannot write counts as taken, and a little is left to them in any case.
        """
        found = os.fstatvfs(self._root)
        free = found.f_bavail * found.f_frsize // block - _LEFT_ALONE
        return max(0, (free - room) // 2)

    def _open(self) -> None:
        """Open the file for writing: it is immutable, which would forbid that."""
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
        directory = os.open(STORE.split("/")[0], os.O_RDONLY | os.O_DIRECTORY | flags, dir_fd=self._root)
        try:
            self._file = os.open(STORE.split("/")[1], os.O_RDONLY | flags, dir_fd=directory)
            self._flags = self._get_flags()
            self._set_flags(self._flags & ~_IMMUTABLE_FL)
            self._writable = os.open(STORE.split("/")[1], os.O_RDWR | flags, dir_fd=directory)
        finally:
            os.close(directory)

    def __exit__(self, *exception: object) -> None:
        if self._file >= 0 and self._flags is not None:
            with contextlib.suppress(OSError):
                self._set_flags(self._flags | _IMMUTABLE_FL)
        for descriptor in (self._writable, self._file, self._root):
            if descriptor >= 0:
                os.close(descriptor)

    def _get_flags(self) -> int:
        answer = fcntl.ioctl(self._file, _FS_IOC_GETFLAGS, bytes(8))
        return int.from_bytes(answer[:4], "little")

    def _set_flags(self, flags: int) -> None:
        fcntl.ioctl(self._file, _FS_IOC_SETFLAGS, flags.to_bytes(8, "little"))

    def grow(self, runs: list[list[int]], most: int, cookie: bytes, block: int) -> dict[str, Any]:
        """Give the file the logical ``runs``, at most so many blocks."""
        if most < min(_WORTH_IT, sum(count for _, count in runs)):
            return {"extents": []}
        self._open()
        filled = False
        for start, count in runs:
            count = min(count, most)
            if count <= 0:
                break
            most -= count
            try:
                if not filled:
                    self._allocate(start * block, count * block)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    if error.errno != errno.ENOSPC:
                        raise
                    break  # what it gave before it ran out is seen below
                filled = True
            if filled and not self._fill(start * block, count * block, cookie * (_FILL_BYTES // len(cookie))):
                break
        self._settle(filled)
        return {"extents": self._extents(block), "filled": filled}

    def _allocate(self, offset: int, length: int) -> None:
        if _libc.fallocate(self._writable, 0, offset, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def _fill(self, offset: int, length: int, pattern: bytes) -> bool:
        """Write the pattern, past the page cache where that can be done; False where the room ends."""
        buffer = mmap.mmap(-1, _FILL_BYTES)
        buffer[:] = pattern
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._writable, fcntl.F_SETFL, fcntl.fcntl(self._writable, fcntl.F_GETFL) | os.O_DIRECT)
        end = offset + length
        with memoryview(buffer) as view:
            while offset < end:
                try:
                    done = os.pwrite(self._writable, view[: min(_FILL_BYTES, end - offset)], offset)
                except OSError as error:
                    if error.errno == errno.ENOSPC:
                        return False
                    if error.errno != errno.EINVAL:
                        raise
                    flags = fcntl.fcntl(self._writable, fcntl.F_GETFL)
                    if not flags & os.O_DIRECT:
                        raise
                    fcntl.fcntl(self._writable, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                    continue
                offset += done
        return True

    def _settle(self, filled: bool) -> None:
        """Make it durable, the flag as well; after a fill, so that nothing of it comes back after a crash."""
        assert self._flags is not None
        self._set_flags(self._flags | _IMMUTABLE_FL)
        os.fsync(self._writable)
        if not filled:
            return
        if self._mount.fstype == "ext2":
            self._sync_metadata()
        elif self._journals_data():
            _empty_journal(self._file)

    def _sync_metadata(self) -> None:
        """Make all metadata of the filesystem durable.

        The ext4 driver has it in the block device's cache.  That of ext2 has changed inodes elsewhere: there all of the
        filesystem is synced, for which many writes may have to be copied first.
        """
        name = Path(f"/sys/dev/block/{self._mount.device}").resolve().name
        if not Path("/sys/fs/ext4", name).is_dir():
            _syncfs(self._writable)
            return
        descriptor = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _journals_data(self) -> bool:
        """Whether the journal takes the content of this file; when in doubt, it does."""
        assert self._flags is not None
        if self._flags & _JOURNAL_DATA_FL:
            return True
        name = Path(f"/sys/dev/block/{self._mount.device}").resolve().name
        try:
            return "data=journal" in Path("/proc/fs/ext4", name, "options").read_text().split()
        except OSError:
            return True

    def free(self, runs: list[list[int]], end: int, block: int) -> None:
        """Take the logical ``runs`` from the file, which ends at block ``end`` then."""
        self._open()
        for start, count in runs:
            if start < end and _libc.fallocate(
                self._writable, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, start * block, count * block
            ):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        os.ftruncate(self._writable, end * block)
        assert self._flags is not None
        self._set_flags(self._flags | _IMMUTABLE_FL)
        os.fsync(self._writable)

    def _extents(self, block: int) -> list[list[int]]:
        """All extents of the file: [logical, physical, blocks].

        Raises:
            OSError: One has no place yet.
        """
        found: list[list[int]] = []
        position = 0
        while True:
            request = bytearray(_FIEMAP.size + _EXTENTS_AT_ONCE * _FIEMAP_EXTENT.size)
            _FIEMAP.pack_into(request, 0, position, (1 << 63) - 1 - position, _FIEMAP_FLAG_SYNC, 0, _EXTENTS_AT_ONCE, 0)
            fcntl.ioctl(self._file, _FS_IOC_FIEMAP, request)
            count = _FIEMAP.unpack_from(request)[3]
            flags = 0
            for index in range(count):
                logical, physical, length, _, _, flags, *_ = _FIEMAP_EXTENT.unpack_from(
                    request, _FIEMAP.size + index * _FIEMAP_EXTENT.size
                )
                if flags & (_EXTENT_UNKNOWN | _EXTENT_DELALLOC):
                    raise OSError(errno.EAGAIN, "a block of it has no place yet")
                found.append([logical // block, physical // block, length // block])
                position = logical + length
            if not count or flags & _EXTENT_LAST:
                return found


def _clone(point: str) -> int:
    """A descriptor of the root of a private copy of a mount; where the kernel has no such thing, of the mount."""
    number = _libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(point)),
        ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC),
    )
    if number >= 0:
        return int(number)
    return os.open(point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _syncfs(descriptor: int) -> None:
    if _libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _empty_journal(descriptor: int) -> None:
    """Have everything that the journal holds written to its place."""
    try:
        fcntl.ioctl(descriptor, _EXT4_IOC_CHECKPOINT, bytes(4))
        return
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    reading, writing = os.pipe()
    guard = os.fork()
    if not guard:  # whatever ends us, the filesystem is thawed
        os.close(writing)
        os.read(reading, 1)
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _FITHAW, 0)
        os._exit(0)
    os.close(reading)
    try:
        fcntl.ioctl(descriptor, _FIFREEZE, 0)
        fcntl.ioctl(descriptor, _FITHAW, 0)
    finally:
        os.close(writing)
        os.waitpid(guard, 0)
