"""The life that power cuts and faults interrupt: every command once at least, on a volume that `recorded` keeps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterator
from unittest import mock

import lab
import numpy as np

from campaigns.recorded import BLOCK, Recorded, repaired
from extsnap.arrays import runs_of
from extsnap.snapshot import edit, engine, hidden
from extsnap.snapshot.root import SLOT_BLOCKS
from extsnap.snapshot.volume import Volume

SECTOR_BYTES = 512


def blocks_of_files(recorded: Recorded) -> list[int]:
    """Data blocks of files, in an order by chance that is the same every time."""
    blocks = np.flatnonzero(lab.survey(recorded.volume.read(0, recorded.volume.size)).files).tolist()
    recorded.random.shuffle(blocks)
    return blocks


def session_of_writes(recorded: Recorded) -> None:
    """Random overwrites with flushes between, of whole blocks, parts, the same block twice, and a punch."""
    rng = recorded.random
    blocks = blocks_of_files(recorded)
    for number in range(10):
        for block in blocks[number * 5 : number * 5 + 5]:
            skip = rng.choice([0, 0, 0, 100, SECTOR_BYTES])
            recorded.write(block * BLOCK + skip, rng.randbytes(BLOCK - skip))
        if number % 3 == 1:
            recorded.write(blocks[number * 5] * BLOCK, rng.randbytes(BLOCK))
        if number == 4:
            recorded.punch(blocks[40] * BLOCK, BLOCK)
        if number % 2:
            recorded.flush()


def kernel_session(recorded: Recorded) -> None:
    """What a kernel does to a served volume: mount, a transaction in the journal, checkpoint, unmount.

    Made by debugfs and e2fsck on copies, written back in the kernel's order.  On ext2 there is no journal: the
    superblock says that the volume is not clean, then metadata change in no order at all.
    """
    old = recorded.volume.read(0, recorded.volume.size)
    new = lab.changed_by_debugfs(old, "write {} n0", "rm f1", "mkdir d0", data=b"new" * 5000)
    everything, superblock = set(range(len(old) // BLOCK)), {1}
    stages: list[tuple[bytes, bytes, set[int]]]
    if recorded.kind == "ext2":
        dirty = lab.changed_by_debugfs(old, "set_super_value state 0")
        stages = [(old, dirty, everything), (dirty, new, everything - superblock), (dirty, new, superblock)]
    else:
        data, logged, done, journal = transaction(old, new)
        log = {journal}
        rest = everything - superblock - log
        stages = [
            (old, data, everything),
            (data, logged, superblock),
            (data, logged, log),
            (data, logged, rest),
            (logged, done, rest),
            (logged, done, log),
            (logged, done, superblock),
        ]
    for start, end, part in stages:
        blocks = [block for block in np.flatnonzero(lab.unequal(start, end)).tolist() if block in part]
        recorded.random.shuffle(blocks)
        for block in blocks:
            recorded.write(block * BLOCK, end[block * BLOCK : (block + 1) * BLOCK])
        recorded.flush()
    assert not lab.complaint(recorded.volume.read(0, recorded.volume.size))


def transaction(old: bytes, new: bytes) -> tuple[bytes, bytes, bytes, int]:
    """The change from ``old`` to ``new`` as one transaction of an ext4 journal.

    Returns:
        (with the new file data; with the metadata in the journal; replayed; block of the journal's superblock).
    """
    survey = lab.survey(new)
    changed = lab.unequal(old, new)
    data = bytearray(old)
    for block in np.flatnonzero(changed & survey.files).tolist():
        data[block * BLOCK : (block + 1) * BLOCK] = new[block * BLOCK : (block + 1) * BLOCK]
    changed[:2] = False
    metadata = np.flatnonzero(changed & ~survey.files).tolist()
    content = b"".join(new[block * BLOCK : (block + 1) * BLOCK] for block in metadata)
    numbers = ",".join(map(str, metadata))
    logged = lab.changed_by_debugfs(
        bytes(data), "journal_open", f"journal_write -b {numbers} {{}}", "journal_close", data=content
    )
    return bytes(data), logged, repaired(logged), int(survey.journal[0]) - 1


def trimmed(recorded: Recorded) -> None:
    """All that is free is discarded, as by fstrim: of what a snapshot needs the long runs are hidden, others copied."""
    free = ~lab.survey(recorded.volume.read(0, recorded.volume.size)).in_use
    with mock.patch.object(hidden, "HIDE_BYTES", 4 * BLOCK):
        for start, length in runs_of(np.flatnonzero(free)).tolist():
            recorded.punch(start * BLOCK, length * BLOCK)
    recorded.flush()
    assert recorded.volume.require_engine().hidden.some, "nothing was hidden"


def grow(volume: Volume) -> None:
    edit.grow(volume, 400)
    volume.settle()


def move(volume: Volume) -> None:
    """The log and half of what is behind it go elsewhere, as before a restore that needs their blocks."""
    store = volume.require_store()
    logical = np.arange(SLOT_BLOCKS, SLOT_BLOCKS + store.root.log_blocks + 40)
    edit.move(volume, np.sort(store.physical(logical)))
    volume.settle()


def written_outside(recorded: Recorded, volume: Volume, *, journal: bool = False) -> None:
    """Somebody writes to the image itself, past extsnap: the guard does not stop debugfs.  Then it is opened again.

    Args:
        journal: What was written waits in the journal; on a volume without one nothing is done.
    """
    medium = recorded.device.pread(0, recorded.device.size)
    if journal and recorded.kind == "ext2":
        return
    if journal:
        written = transaction(medium, lab.changed_by_debugfs(medium, "mkdir d1"))[1]
    else:
        written = lab.changed_by_debugfs(medium, "ssv mkfs_time 1600000000")
    for offset, length in lab.changed_runs(medium, written):
        recorded.device.pwrite(offset, written[offset : offset + length])
    recorded.device.flush()
    recorded.reopen()
    assert recorded.volume.outside_write, "an outside write was not noticed"


def proven(recorded: Recorded, volume: Volume) -> None:
    """What a check notes that proves every block of every snapshot: none is tainted, and the next accept is seen."""
    names = volume.snapshot_names()
    volume.verb("note_check", damaged=[], sound=names, proven=names)
    assert not any(entry.state for entry in volume.snapshot_list()), "what is proven whole is tainted"


def replayed(recorded: Recorded, volume: Volume) -> None:
    """What is in the journal comes home through the write path."""
    if volume.needs_replay:
        recorded.replay(volume, volume.read(0, volume.size))


def setting(name: str, **arguments: object) -> Callable[[Recorded, Volume], object]:
    return lambda recorded, volume: volume.verb(name, **arguments)


Action = Callable[[Recorded, Volume], object]
LIFE: list[tuple[str, Action]] = [
    ("first create", lambda recorded, volume: volume.create("one")),
    ("begin serving", lambda recorded, volume: volume.begin_serving()),
    ("writes", lambda recorded, volume: session_of_writes(recorded)),
    ("end serving", lambda recorded, volume: volume.end_serving()),
    ("second create", lambda recorded, volume: volume.create("two", "a message")),
    ("set", setting("set", values={"on-full": "drop-oldest"})),
    ("set again", setting("set", values={"on-full": "refuse"})),
    ("guard off", setting("guard", wanted=False)),
    ("guard on", setting("guard", wanted=True)),
    ("growth", lambda recorded, volume: grow(volume)),
    ("move", lambda recorded, volume: move(volume)),
    ("begin serving again", lambda recorded, volume: volume.begin_serving()),
    ("a kernel's writes", lambda recorded, volume: kernel_session(recorded)),
    ("trim", lambda recorded, volume: trimmed(recorded)),
    ("create while serving", lambda recorded, volume: volume.create("three")),
    ("more writes", lambda recorded, volume: session_of_writes(recorded)),
    ("end serving again", lambda recorded, volume: volume.end_serving()),
    ("written outside", written_outside),
    ("accept", setting("accept")),
    ("proven", proven),
    ("written outside, journal", functools.partial(written_outside, journal=True)),
    ("accept, journal", setting("accept")),
    ("replay", replayed),
    ("delete", lambda recorded, volume: volume.delete(["one"])),
    ("restore", lambda recorded, volume: volume.verb("restore", name="two")),
    ("undo", lambda recorded, volume: volume.verb("restore", undo=True)),
    ("restore without safety", lambda recorded, volume: volume.verb("restore", name="three", safety=False)),
    ("delete two", lambda recorded, volume: volume.delete(["three", "two"])),
    ("delete the rest", lambda recorded, volume: volume.delete(volume.snapshot_names())),
    ("strip", lambda recorded, volume: volume.verb("strip")),
]

#: Steps that are not extsnap's: nothing is promised of a cut in the middle of somebody else's write.
NOT_OURS = {"written outside", "written outside, journal"}
#: Steps that are cut after each operation in the short form too.
EVERY_OPERATION = {
    "first create",
    "second create",
    "growth",
    "move",
    "create while serving",
    "guard off",
    "guard on",
    "set",
    "accept",
    "accept, journal",
    "delete",
    "restore",
    "strip",
}


def lived(kind: str, steps: Container[str] | None = None) -> Recorded:
    """A volume's life, recorded: the whole of it, or only these steps, in the order of `LIFE`."""
    recorded = Recorded(kind)
    for name, action in LIFE:
        if steps is None or name in steps:
            recorded.step(name, functools.partial(action, recorded))
    return recorded


@contextlib.contextmanager
def small_hold() -> Iterator[None]:
    """A hold that fills up within a session of a small volume: more batches, and thousands of opens are faster."""
    with (
        mock.patch.object(engine, "HOLD_BYTES", 32 << 10),
        mock.patch.object(engine, "PIECE_BYTES", 64 << 10),
        mock.patch.object(engine, "EARLY_BYTES", 12 << 10),
    ):
        yield
