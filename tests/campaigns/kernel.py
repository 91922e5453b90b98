"""Power cuts under the kernel: ext2, ext3 and ext4 mounted above a served volume, what reaches the medium recorded.

The server is extsnap's own, started as ever; only what opens the volume is ours (`recorded_volume`): it writes every
operation on the medium to a file before it answers.  The load writes and fsyncs files through the mount, and notes
after each fsync how long the record was by then: what it promised must be there after a cut at that length or later.

After a cut, the medium is recovered as a command does it: the journal is replayed by stock ``e2fsck -p`` through the
write path, by ``e2fsck -fy`` where that gives up (ext2 has nothing else).  Then ``e2fsck -fn`` finds nothing on base
and views, every snapshot is what it was, and the files are read back by debugfs.  On ext2 an fsync makes a file's data
and inode durable, but the directory it stands in is another file: what is demanded is content in place.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import random
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lab
from arena import arena, make_volume

from campaigns.recorded import NOTHING, Fsck, repaired
from campaigns.report import Report
from extsnap.blockdev.base import Buffer, Pieces
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.recording import CrashState, Cuts, MemoryDevice, Operation, crash_states
from extsnap.errors import NeedsRecovery
from extsnap.ext.locate import locate
from extsnap.serve import mountpoints, session
from extsnap.snapshot.volume import Volume

#: Bytes that are overwritten in place: no more than a block of any of the volumes.
BLOCK = 1024
BIG_BLOCKS = 2000
#: Block size and MiB of each: with blocks of a page the kernel delays writes to the served file.
SHAPES = {"kernel-ext4": (4096, 24)}
PARTS = ("kernel-ext2", "kernel-ext3-ordered", "kernel-ext3-journal", "kernel-ext4")
ROUNDS = 60
_HEAD = struct.Struct("=cQQ")  # kind, offset, length; the data of a write follow
_KINDS = {b"w": "write", b"p": "punch", b"f": "flush"}
#: One marked medium in so many is shown to stock tools, which must leave every byte alone.
SHOWN = 12
STOCK_TOOLS = (
    ("e2fsck", "-fy"),
    ("e2fsck", "-p"),
    ("e2fsck", "-fy", "-b", "8193"),
    ("debugfs", "-w", "-R", "set_super_value mnt_count 7"),
    ("debugfs", "-w", "-R", "rm /big"),
    ("tune2fs", "-L", "other"),
    ("resize2fs", "-f"),
    ("mount",),
)


# -- in the server's process


class LoggingImage(ImageFile):
    """An image that keeps a record of what it was made to do, in ``PATH.record``, in order and before it answers."""

    def _note(self, kind: bytes, offset: int = 0, length: int = 0, data: Buffer = b"") -> None:
        with open(f"{self.path}.record", "ab") as file:
            file.write(_HEAD.pack(kind, offset, length) + bytes(data))

    def pwrite(self, offset: int, data: Buffer) -> None:
        super().pwrite(offset, data)
        self._note(b"w", offset, len(data), data)

    def write_pieces(self, pieces: Pieces) -> None:
        for offset, data in pieces:
            self.pwrite(offset, data)

    def punch(self, offset: int, length: int) -> None:
        super().punch(offset, length)
        self._note(b"p", offset, length)

    def clone(self, source: int, target: int, length: int) -> bool:
        done = super().clone(source, target, length)
        if done:
            self._note(b"w", target, length, self.pread(target, length))
        return done

    def flush(self) -> None:
        super().flush()
        self._note(b"f")


def recorded_volume(path: str, *, writable: bool, partition: int | None = None) -> Volume:
    """What the server opens: a volume above a record."""
    place = locate(os.fspath(path), partition)
    image = LoggingImage(place.path, writable=writable, lock="exclusive" if writable else "shared")
    try:
        return Volume(image, path=image.path, place=place, device_id=image.device_id, writable=writable)
    except BaseException:
        image.close()
        raise


def read_record(raw: bytes) -> tuple[list[Operation], list[int]]:
    """The operations of a record, and where in it each ends."""
    log, ends, at = [], [], 0
    while at < len(raw):
        kind, offset, length = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        size = length if kind == b"w" else 0
        log.append(Operation(_KINDS[kind], offset, length, raw[at : at + size]))  # type: ignore[arg-type]
        at += size
        ends.append(at)
    return log, ends


# -- the load


@dataclass
class Promise:
    """What an fsync that returned has promised.

    Attributes:
        issued: Bytes of the record when what it is about was first written.
        made: Bytes of the record when the fsync had returned.
        file: Name in the root directory.
        offset, content: What stands there from then on.
        gone: The file is not there from then on.
    """

    issued: int
    made: int
    file: str
    offset: int = 0
    content: bytes = b""
    gone: bool = False


@dataclass
class Recording:
    """A recorded session.

    Attributes:
        initial: The medium before it.
        log: What was done to it.
        views: What each snapshot reads as.
        created: Operations in the record before and after the third snapshot was taken.
        promises: In order.
    """

    part: str
    initial: bytes
    log: list[Operation]
    superblocks: list[int]
    views: dict[str, bytes]
    created: tuple[int, int]
    promises: list[Promise] = field(default_factory=list)


class _Load:
    """Writes and fsyncs through a mount."""

    def __init__(self, directory: Path, record: Path, rng: random.Random, *, names: bool) -> None:
        self.directory, self.record, self.rng, self.names = directory, record, rng, names
        self.promises: list[Promise] = []
        self.kept: list[str] = []

    def open(self) -> None:
        self.top = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        self.big = os.open(self.directory / "big", os.O_RDWR)

    def close(self) -> None:
        os.close(self.big)
        os.close(self.top)

    def _length(self) -> int:
        return os.stat(self.record).st_size if self.record.exists() else 0

    def overwrite(self) -> None:
        """Blocks in place, here and there, made durable together."""
        issued, written = self._length(), {}
        for block in self.rng.sample(range(BIG_BLOCKS), self.rng.randint(1, 12)):
            written[block * BLOCK] = data = self.rng.randbytes(BLOCK)
            os.pwrite(self.big, data, block * BLOCK)
        os.fdatasync(self.big)
        self.promises += [Promise(issued, self._length(), "big", at, data) for at, data in written.items()]

    def new_file(self) -> None:
        """A file that never changes again."""
        name, issued = f"f{len(self.promises)}", self._length()
        data = self.rng.randbytes(self.rng.choice([1, 300, 5000, 20000]))
        file = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, data, 0)
            os.fsync(file)
        finally:
            os.close(file)
        os.fsync(self.top)
        if self.names:
            self.promises.append(Promise(issued, self._length(), name, 0, data))
            self.kept.append(name)

    def replace(self) -> None:
        """Write beside it, rename, fsync the directory: as package managers do."""
        if not self.kept:
            return
        name, issued = self.rng.choice(self.kept), self._length()
        data = self.rng.randbytes(3000)
        with open(self.directory / "new", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(self.directory / "new", self.directory / name)
        os.fsync(self.top)
        self.promises.append(Promise(issued, self._length(), name, 0, data))

    def remove(self) -> None:
        if len(self.kept) < 3:
            return
        name, issued = self.kept.pop(self.rng.randrange(len(self.kept))), self._length()
        os.unlink(self.directory / name)
        os.fsync(self.top)
        self.promises.append(Promise(issued, self._length(), name, gone=True))

    def unsynced(self) -> None:
        """What nobody asks to be durable."""
        with open(self.directory / "loose", "ab") as file:
            file.write(self.rng.randbytes(4000))

    def run(self) -> None:
        steps = [self.overwrite] * 5 + [self.new_file] * 3 + [self.replace, self.remove, self.unsynced]
        for _ in range(ROUNDS):
            self.rng.choice(steps)()


@contextlib.contextmanager
def _recording_servers() -> Iterator[None]:
    """Servers that are started meanwhile keep a record."""
    before = session.FACTORY
    session.FACTORY = f"{__name__}:recorded_volume"
    try:
        yield
    finally:
        session.FACTORY = before


@functools.cache
def recording_of(part: str) -> Recording:
    """Two snapshots at rest, then on the record: a load under the kernel, a third snapshot, and another load."""
    kind = part.split("-")[1]
    block_size, mebibytes = SHAPES.get(part, (1024, 12))
    rng = random.Random(part)
    with arena() as top, _recording_servers():
        options = ["-b", str(block_size), *(["-J", f"size={block_size // 1024}"] if kind != "ext2" else [])]
        content = rng.randbytes(BIG_BLOCKS * BLOCK)
        image = make_volume(top / "disk.img", kind, mebibytes, *options, files={"big": content})
        if part.endswith("journal"):
            lab.run("tune2fs", "-o", "journal_data", str(image))
        with Volume.open(image, writable=True) as volume:
            volume.create("one")
            volume.create("two")
            superblocks = volume.superblock_offsets(volume.filesystem())
            views = {name: volume.open_view(name).pread(0, volume.size) for name in volume.snapshot_names()}
        initial = image.read_bytes()
        mount, record = top / "mount", Path(f"{image}.record")
        mount.mkdir()
        load = _Load(mount, record, rng, names=kind != "ext2")
        created = [0, 0]
        for number in range(2):
            mountpoints.mount(str(image), str(mount))
            try:
                load.open()
                try:
                    load.run()
                finally:
                    load.close()
            finally:
                mountpoints.umount(str(mount))
            if not number:
                created[0] = os.stat(record).st_size
                with recorded_volume(str(image), writable=True) as volume:
                    volume.create("three")
                    views["three"] = volume.open_view("three").pread(0, volume.size)
                created[1] = os.stat(record).st_size
        log, ends = read_record(record.read_bytes())
        for promise in load.promises:  # what was being written just then does not count
            promise.issued, promise.made = bisect_right(ends, promise.issued), bisect_right(ends, promise.made)
        first, last = (bisect_right(ends, at) for at in created)
        return Recording(part, initial, log, superblocks, views, (first, last), load.promises)


# -- the judge

_fsck = Fsck()


def _recovered(content: bytes) -> Volume:
    """Open a medium as the next command does, and replay its journal through the write path."""
    volume = Volume(MemoryDevice(content), writable=True)
    if volume.needs_replay:
        base = volume.read(0, volume.size)
        volume.begin_serving(grow=False)
        new = repaired(base)
        for offset, length in lab.changed_runs(base, new):
            volume.write(offset, new[offset : offset + length])
        volume.flush()
        try:
            clean = volume.end_serving()
        except NeedsRecovery as error:
            raise AssertionError(f"e2fsck was let do its work, and {error}") from error
        assert clean, "the filesystem still needs recovery after e2fsck"
    return volume


def _files(base: bytes) -> dict[str, bytes]:
    """The regular files in the root directory, by debugfs."""
    with lab.as_file(base) as path, tempfile.TemporaryDirectory(prefix="extsnap-read-", dir="/dev/shm") as out:
        lab.run("debugfs", "-R", f"rdump / {out}", path)
        return {entry.name: entry.read_bytes() for entry in Path(out).iterdir() if entry.is_file()}


def _require_promises(recording: Recording, point: int, found: dict[str, bytes]) -> None:
    """Every promise made before the cut holds, unless something later was being written over it."""
    latest: dict[tuple[str, int], Promise] = {}
    underway: dict[tuple[str, int], list[Promise]] = {}
    for promise in recording.promises:
        key = (promise.file, promise.offset)
        if promise.made <= point:
            latest[key] = promise
            underway.pop(key, None)
        elif promise.issued <= point:
            underway.setdefault(key, []).append(promise)
    for key, promise in latest.items():
        allowed = [promise, *underway.get(key, [])]
        if promise.file == "big":
            part = found["big"][promise.offset : promise.offset + BLOCK]
            # In place: each sector is old or new.
            for at in range(0, BLOCK, 512):
                seen = {other.content[at : at + 512] for other in allowed}
                assert part[at : at + 512] in seen, f"big at {promise.offset + at} is not what was fsynced"
        else:
            states = [None if other.gone else other.content for other in allowed]
            assert found.get(promise.file) in states, (
                f"{promise.file} is {'gone' if promise.file not in found else 'something else'} after an fsync "
                f"that returned at operation {promise.made}"
            )


def judge(recording: Recording, point: int, content: bytes, *, show: bool) -> None:
    """Require of one medium what the module says."""
    marked = [bool(content[at + 0x63] & 0x80) for at in recording.superblocks]
    if not marked[0]:
        complaint = _fsck.complaint(content)
        assert not complaint, f"there is no dirty mark, and {complaint}"
    elif show:
        # While the mark goes on, primary first, nothing is being changed yet.
        _require_left_alone(content, [tool for tool in STOCK_TOOLS if all(marked) or "-b" not in tool])
    volume = _recovered(content)
    names = sorted(volume.snapshot_names())
    without, first, last = sorted(set(recording.views) - {"three"}), *recording.created
    expected = ([without] if point < last else []) + ([sorted(recording.views)] if point > first else [])
    assert names in expected, f"there are snapshots {names}"
    for name in names:
        view = recording.views[name]
        seen = volume.open_view(name).pread(0, len(view))
        wrong = lab.unequal(seen, view)
        assert not wrong.any(), f"snapshot {name} differs in {int(wrong.sum())} blocks: {wrong.nonzero()[0][:10]}"
    assert not volume.medium.state.mark, "the mark is still on"
    checked = volume.verb("check")
    assert checked["store"]["ok"], checked["store"]["errors"]
    assert not any(entry["errors"] for entry in checked["snapshots"]), checked["snapshots"]
    base = volume.read(0, volume.size)
    complaint = _fsck.complaint(base)
    assert not complaint, f"after recovery {complaint}"
    _require_promises(recording, point, _files(base))


def _require_left_alone(content: bytes, commands: list[tuple[str, ...]]) -> None:
    """No stock tool changes a byte of a marked medium."""
    for command in commands:
        with lab.as_file(content) as path:
            if command == ("mount",):
                _try_to_mount(path)
            else:
                subprocess.run([*command, path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
            assert Path(path).read_bytes() == content, f"{' '.join(command)} changed a marked medium"


def _try_to_mount(path: str) -> None:
    with tempfile.TemporaryDirectory(prefix="extsnap-mount-") as point:
        done = subprocess.run(["mount", "-o", "loop,rw", path, point], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", point], check=True)
            raise AssertionError("the kernel mounted a marked medium")


def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
    """Cut a session at random, and just where an fsync had returned, all that was not flushed being lost."""
    recording = recording_of(part)
    promised = sorted({promise.made for promise in recording.promises})
    cuts = _cuts(recording)
    for number, point in enumerate(sorted(rng.sample(promised, min(cases // 3, len(promised))))):
        _case(report, recording, cuts.state(point, NOTHING), number)
    cases -= cases // 3
    everywhere = range(len(recording.log) + 1)
    points = sorted(rng.sample(everywhere, min(cases, len(everywhere))))
    variants = -(-cases // len(points))
    states = crash_states(
        recording.initial, recording.log, rng, superblocks=recording.superblocks, points=points, variants=variants
    )
    for number, state in enumerate(states):
        _case(report, recording, state, number)


def _case(report: Report, recording: Recording, state: CrashState, number: int) -> None:
    """Judge one medium; if that fails, the record is kept for a replay, for the kernel never does the same twice."""
    token = f"{recording.part}:{state.point}:{state.seed}"
    with report.case(token, "under the kernel"):
        try:
            judge(recording, state.point, bytes(state.content), show=number % SHOWN == 0)
        except Exception:
            _kept(recording.part).parent.mkdir(parents=True, exist_ok=True)
            _kept(recording.part).write_bytes(pickle.dumps(recording))
            raise


def _kept(part: str) -> Path:
    return Path(__file__).parents[2] / ".cache" / "campaigns" / f"{part}.pickle"


def _cuts(recording: Recording) -> Cuts:
    return Cuts(recording.initial, recording.log, superblocks=recording.superblocks)


def replay(report: Report, part: str, point: int, seed: int) -> None:
    """One cut again, of the record that was kept when it failed; without one, of a new session of the same load."""
    recording = pickle.loads(_kept(part).read_bytes()) if _kept(part).exists() else recording_of(part)
    with report.case(f"{part}:{point}:{seed}", "under the kernel"):
        judge(recording, point, bytes(_cuts(recording).state(point, seed).content), show=True)
