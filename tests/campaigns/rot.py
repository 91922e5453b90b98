"""Bit rot: any byte of the store is flipped, and nobody may be shown anything but the truth or an error.

``fields`` flips every field of every structure, in each of its copies: the volume must open, every snapshot must be
read as it was, and the next command that writes must leave a store that is whole again.  ``bytes`` flips bytes of the
store's blocks at random, copies among them: a snapshot whose copy is hit says so, and no other one minds.

The truth is a copy of the base volume at each moment, and what dumpe2fs and debugfs said then of what was in use.

A token is ``PART:STATE:OFFSET:BIT``.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import construct
import lab
import numpy as np
from lab import BLOCK, MemoryDevice

from campaigns.report import Campaign, Report
from extsnap.errors import DamagedCopy, ExtsnapError, StoreDamaged
from extsnap.snapshot import edit
from extsnap.snapshot import format as fmt
from extsnap.snapshot.medium import PRIMARY_OFFSET
from extsnap.snapshot.store import Store, read_slot
from extsnap.snapshot.volume import Volume

PARTS = ("fields", "bytes")
#: What a volume was left in, all records in index levels, some of them in the log, or in the middle of an edit; and its
#: kind.  Where ext's superblock has a checksum, a flipped pointer is damage of the superblock, and e2fsck's to mend.
STATES = {"rest": "ext2", "log": "ext4", "edit": "ext4"}
#: Blocks that a command and the next one compare at once.
_PIECE = 512 * BLOCK


@dataclass(frozen=True)
class Field:
    """A field of a structure on the medium: bytes ``offset`` to ``offset + length`` of the volume."""

    structure: str
    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class Grown:
    """A volume with a history, and the truth about it.

    Attributes:
        content: The medium.
        truth: What each snapshot must read as.
        base: What the base volume must.
        fields: Every field of the structures that have two copies.
        store: Byte ranges of the store on the medium.
        copies: By block of the medium that holds a copy: (block of the snapshots, their names).
    """

    content: bytes
    truth: dict[str, bytes]
    base: bytes
    fields: list[Field]
    store: list[tuple[int, int]]
    copies: dict[int, tuple[int, tuple[str, ...]]]


def opened(content: bytes | bytearray, *, writable: bool) -> Volume:
    """A volume over this medium, which it may change if it is a bytearray of the caller's."""
    device = MemoryDevice(content)
    if isinstance(content, bytearray):
        device.content = content
    clock = iter(range(1_700_000_000 * 10**9, 1_800_000_000 * 10**9, 10**9))
    return Volume(device, writable=writable, clock=lambda: next(clock), random_bytes=random.Random(1).randbytes)


def _truth(base: bytes) -> bytes:
    blocks = np.frombuffer(base.ljust(-(-len(base) // BLOCK) * BLOCK, b"\0"), np.uint8).reshape(-1, BLOCK).copy()
    blocks[~lab.survey(base).preserved] = 0
    return blocks.tobytes()[: len(base)]


def _overwrite(volume: Volume, rng: random.Random, count: int) -> None:
    files = np.flatnonzero(lab.survey(volume.read(0, volume.size)).files)
    volume.begin_serving(grow=False)
    for block in rng.sample(files.tolist(), count):
        volume.write(block * BLOCK, rng.randbytes(BLOCK))
        if not rng.randrange(40):
            volume.flush()
    assert volume.end_serving()


@functools.cache
def grown(state: str) -> Grown:
    """A volume that was left in ``state``."""
    rng = random.Random(state)
    medium = bytearray(lab.plain_image(STATES[state]))
    volume = opened(medium, writable=True)
    truth = {}
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(("one", "two", "three")):
            volume.create(name, "a message")
            truth[name] = _truth(volume.read(0, volume.size))
            if number == 2 and state == "log":
                stack.enter_context(mock.patch.object(Volume, "_try_fold", return_value=None))
            _overwrite(volume, rng, 60)
    base = volume.read(0, volume.size)
    fields = list(_fields(volume))
    store = [(block * BLOCK, length * BLOCK) for _, block, length in volume.require_store().root.extents.tolist()]
    copies = _copies(volume)
    if state == "edit":
        volume.create("four")
        truth["four"] = _truth(base := volume.read(0, volume.size))
        with contextlib.suppress(InterruptedError), mock.patch.object(edit, "finish", side_effect=InterruptedError):
            edit.grow(volume, 64)
        begun = opened(bytearray(medium), writable=False)
        fields = [field for field in _fields(begun) if field.structure.startswith("redo")]
        done = opened(bytearray(medium), writable=True)  # what is left of the edit
        base = done.read(0, done.size)
        assert not lab.complaint(base)
    assert fields
    return Grown(bytes(medium), truth, base, fields, store, copies)


def _copies(volume: Volume) -> dict[int, tuple[int, tuple[str, ...]]]:
    store = volume.require_store()
    found = {}
    for record in volume.verb("dump", what="records")["records"]:
        if record["copy"] is not None:
            places = store.physical(np.arange(record["copy"], record["copy"] + record["length"]))
            for behind, block in enumerate(places.tolist()):
                found[block] = record["block"] + behind, tuple(record["snapshots"])
    return found


# -- where every field is ----------------------------------------------------------------------------------


def _struct(definition: Any, at: int, structure: str) -> Iterator[Field]:
    for part in definition.subcons:
        with contextlib.suppress(construct.SizeofError):
            yield Field(structure, part.name, at, size := part.sizeof())
            at += size


def _entries(dtype: np.dtype[Any], places: list[int], structure: str) -> Iterator[Field]:
    """The fields of the first entry and the last one; ``places`` are the bytes of the volume, in order."""
    size = dtype.itemsize
    for entry in sorted({0, len(places) // size - 1}):
        for name, (kind, offset, *_) in (dtype.fields or {"": (dtype, 0)}).items():
            yield Field(structure, name, places[entry * size + offset], kind.itemsize)


_TABLES = {
    fmt.Section.EXTENTS: fmt.EXTENT_DTYPE,
    fmt.Section.BLOBS: fmt.BLOB_DTYPE,
    fmt.Section.BLOB_RUNS: fmt.RUN_DTYPE,
    fmt.Section.TWINS: fmt.TWIN_DTYPE,
    fmt.Section.TWIN_RUNS: fmt.RUN_DTYPE,
    fmt.Section.ALLOCATION: fmt.RUN_DTYPE,
}
_SINGLE = {fmt.Section.PLACE: fmt.Place, fmt.Section.LOG: fmt.LogPlace, fmt.Section.LOG_TWIN: fmt.LogTwin}
_BLOBS = {
    fmt.BlobKind.HISTORY: fmt.HISTORY_DTYPE,
    fmt.BlobKind.INDEX: fmt.RECORD_DTYPE,
}


def _fields(volume: Volume) -> Iterator[Field]:
    store = volume.require_store()
    if not volume.filesystem().geometry.has_metadata_csum:
        yield from _struct(fmt.Pointer, PRIMARY_OFFSET + fmt.POINTER_OFFSET, "pointer")
    for index, slot in enumerate("AB"):
        block = store.slot_block(index)
        yield from _struct(fmt.Slot, block * BLOCK, f"slot {slot}")
        _, raw, chain = read_slot(store.device, block, BLOCK, store.device.size // BLOCK)
        yield from _root_fields(raw, _places(chain)[fmt.SEGMENT_HEADER :], f"root {slot}")
        yield from _struct(fmt.Segment, int(chain[0]) * BLOCK, f"segment {slot}")
    for kind, key in store.root.blobs:
        for copy in range(2):
            places = _places(store.physical(store.blob_blocks(fmt.BlobKind(kind), key, copy)))
            name = f"{fmt.BlobKind(kind).name.lower()} {key} {copy}"
            length = store.root.blobs[kind, key].length
            if kind == fmt.BlobKind.SNAPSHOTS:
                yield from _struct(fmt.SnapshotEntry, places[0], name)
                yield Field(name, "strings", places[44], length - 44)
            else:
                yield from _entries(_BLOBS.get(fmt.BlobKind(kind), np.dtype("<u4")), places[:length], name)
    history = volume.require_engine().history
    for column, name in ((history.table["ref"].astype(np.int64), "bitmap 0"), (history.twins, "bitmap 1")):
        for block in store.physical(column[column >= 0]).tolist():
            yield Field(name, f"block {block}", block * BLOCK, history.row_bytes)
    yield from _log_fields(store)


def _places(blocks: np.ndarray[Any, Any]) -> list[int]:
    return [block * BLOCK + byte for block in blocks.tolist() for byte in range(BLOCK)]


def _root_fields(raw: bytes, places: list[int], structure: str) -> Iterator[Field]:
    at = 0
    while at < len(raw):
        head = fmt.SectionHeader.parse(raw[at : at + fmt.SECTION_HEADER])
        section = fmt.Section(head.kind)
        name = f"{structure} {section.name.lower()}"
        yield from _struct(fmt.SectionHeader, places[at], name)
        at += fmt.SECTION_HEADER
        inside = places[at : at + head.length]
        if section in _TABLES and inside:
            yield from _entries(_TABLES[section], inside, name)
        elif section in _SINGLE:
            yield from _struct(_SINGLE[section], inside[0], name)
        elif inside:
            yield Field(name, "", inside[0], head.length)
        at += head.length + -head.length % 8


def _log_fields(store: Store) -> Iterator[Field]:
    for copy, start in enumerate(store.log_copies()):
        position = number = 0
        raw = store.read_log(start)
        places = _places(store.physical(np.arange(start, start + store.root.log_blocks)))
        while (found := store.parse_batch(raw, position, number)) is not None:
            batch, length = found
            yield from _struct(fmt.BatchHeader, places[position], f"batch {number} {copy}")
            at = position + fmt.BATCH_HEADER + batch.masks.nbytes
            if batch.masks.nbytes:
                yield Field(f"batch {number} {copy}", "masks", places[at - batch.masks.nbytes], batch.masks.nbytes)
            yield from _entries(fmt.RECORD_DTYPE, places[at : at + batch.records.nbytes], f"batch {number} {copy}")
            at += batch.records.nbytes
            yield from _entries(np.dtype("<u4"), places[at : at + batch.crcs.nbytes], f"batch {number} {copy}")
            position, number = position + length, number + 1


# -- judging -----------------------------------------------------------------------------------------------


def _read(volume: Volume, name: str, size: int) -> tuple[bytes, set[int]]:
    """A view, and the blocks of it that cannot be read (they are zeros in it)."""
    view = volume.open_view(name)
    out, failed = bytearray(size), set()
    pieces = [(at, min(_PIECE, size - at)) for at in range(0, size, _PIECE)]
    while pieces:
        at, length = pieces.pop()
        try:
            out[at : at + length] = view.pread(at, length)
        except (DamagedCopy, StoreDamaged):
            if length <= BLOCK:
                failed.add(at // BLOCK)
            else:
                half = length // BLOCK // 2 * BLOCK
                pieces += [(at, half), (at + half, length - half)]
    return bytes(out), failed


def _judge_views(volume: Volume, made: Grown, lost: tuple[int, tuple[str, ...]] | None) -> None:
    for name, wanted in made.truth.items():
        found, failed = _read(volume, name, len(wanted))
        expected = {lost[0]} if lost and name in lost[1] else set()
        assert failed == expected, f"{name}: blocks {sorted(failed)} cannot be read"
        wrong = np.flatnonzero(lab.unequal(found, wanted))
        assert set(wrong.tolist()) <= expected, f"{name}: blocks {wrong.tolist()} are wrong"


def judge(made: Grown, state: str, offset: int, bit: int, *, structure: bool) -> None:
    """Flip a bit of the medium and look at it as everybody would: reading, checking, writing, checking again.

    Args:
        structure: The byte belongs to a structure that has two copies, and a check must name it.
    """
    medium = bytearray(made.content)
    medium[offset] ^= 1 << bit
    lost = made.copies.get(offset // BLOCK)
    before = bytes(medium)
    if state != "edit":
        volume = opened(medium, writable=False)
        _judge_views(volume, made, lost)
        report = volume.verb("check")
        assert report["store"]["ok"] == (lost is None and not structure), f"check found: {report['store']['errors']}"
        named = {entry["name"] for entry in report["snapshots"] if entry["errors"]}
        assert named == set(lost[1] if lost else ()), f"check names {sorted(named)}"
        assert bytes(medium) == before, "who only looks has written"
    volume = opened(medium, writable=True)
    assert volume.read(0, volume.size) == made.base, "the base volume is another one"
    if state != "edit":
        sound = [name for name in made.truth if name not in named]
        volume.verb("note_check", damaged=sorted(named), sound=sound)
    volume = opened(medium, writable=False)
    report = volume.verb("check")
    assert report["store"]["ok"] == (lost is None), f"not mended: {report['store']['errors']}"
    states = {entry["name"]: entry["state"] for entry in volume.verb("list")["snapshots"]}
    assert states == {name: "damaged" if lost and name in lost[1] else "ok" for name in made.truth}
    _judge_views(volume, made, lost)


def _is_noticed(field: Field) -> bool:
    """Whether a check names a flip of this field: for the pointer there is the store's path."""
    return field.structure != "pointer"


def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
    """Flip fields, all of them if there are enough cases; or bytes at random."""
    if part == "fields":
        plan = [(state, field) for state in STATES for field in grown(state).fields]
        for state, field in plan if cases >= len(plan) else rng.sample(plan, cases):
            offset, bit = field.offset + rng.randrange(field.length), rng.randrange(8)
            with report.case(f"fields:{state}:{offset}:{bit}", field.structure.split()[0]):
                try:
                    judge(grown(state), state, offset, bit, structure=_is_noticed(field))
                except (AssertionError, ExtsnapError) as error:
                    raise AssertionError(f"{field.structure}.{field.name}: {error}") from error
        return
    for _ in range(cases):
        state = rng.choice(("rest", "log"))
        ranges = grown(state).store
        start, length = rng.choices(ranges, [length for _, length in ranges])[0]
        _random_byte(report, state, start + rng.randrange(length), rng.randrange(8))


def _random_byte(report: Report, state: str, offset: int, bit: int) -> None:
    made = grown(state)
    of = next((field for field in made.fields if field.offset <= offset < field.offset + field.length), None)
    kind = "copies" if offset // BLOCK in made.copies else "structures" if of else "other bytes"
    with report.case(f"bytes:{state}:{offset}:{bit}", kind):
        judge(made, state, offset, bit, structure=_matters(state, offset))


@functools.cache
def _used(state: str) -> frozenset[tuple[int, int]]:
    """Byte ranges of the structures of a volume, padding left out."""
    made = grown(state)
    store = opened(made.content, writable=False).require_store()
    ranges = []
    for index in range(2):
        block = store.slot_block(index)
        _, raw, chain = read_slot(store.device, block, BLOCK, store.device.size // BLOCK)
        ranges.append((block * BLOCK, fmt.SLOT_BYTES))
        left = len(raw)
        for number in chain.tolist():  # the store is new: each chain is one segment
            head = fmt.SEGMENT_HEADER if number == chain[0] else 0
            ranges.append((number * BLOCK, min(BLOCK, left + head)))
            left -= min(BLOCK, left + head) - head
    for kind, key in store.root.blobs:
        for copy in range(2):
            left = store.root.blobs[kind, key].length
            for number in store.physical(store.blob_blocks(fmt.BlobKind(kind), key, copy)).tolist():
                ranges.append((number * BLOCK, min(BLOCK, left)))
                left -= min(BLOCK, left)
    for field in made.fields:
        if field.structure.startswith("bitmap"):
            ranges.append((field.offset, field.length))
    for start in store.log_copies():
        position = number = 0
        raw = store.read_log(start)
        while (found := store.parse_batch(raw, position, number)) is not None:
            batch, length = found
            size = fmt.BATCH_HEADER + batch.masks.nbytes + batch.records.nbytes + batch.crcs.nbytes
            places = _places(store.physical(np.arange(start, start + store.root.log_blocks)))
            ranges += [(places[position + byte], 1) for byte in range(size)]
            position, number = position + length, number + 1
    return frozenset(ranges)


def _matters(state: str, offset: int) -> bool:
    return any(start <= offset < start + length for start, length in _used(state))


def replay(report: Report, token: str) -> None:
    """One bit again."""
    part, state, offset, bit = token.split(":")
    if part == "bytes":
        _random_byte(report, state, int(offset), int(bit))
        return
    made = grown(state)
    field = next(one for one in made.fields if one.offset <= int(offset) < one.offset + one.length)
    with report.case(token, field.structure):
        judge(made, state, int(offset), int(bit), structure=_is_noticed(field))


CAMPAIGN = Campaign("rot", "bytes of the store that are flipped", PARTS, 24, 4000, run, replay)
