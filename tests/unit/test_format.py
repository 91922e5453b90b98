"""docs/FORMAT.md against the definitions and against a freshly made store: tables, numbers in the text, hexdumps."""

from __future__ import annotations

import contextlib
import enum
import gzip
import hashlib
import re
import struct
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extsnap.blockdev.recording import MemoryDevice
from extsnap.errors import StoreDamaged, UnsupportedFeature
from extsnap.ondisk.dtypes import dtype_of
from extsnap.snapshot import format as fmt
from extsnap.snapshot.volume import Volume

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = (ROOT / "docs" / "FORMAT.md").read_text()
EXAMPLE = "10. Worked example"
FIXTURE = ROOT / "tests" / "fixtures" / "ext4-uninitialised-groups.img.gz"
BLOCK = 1024
PRIMARY = 1024

#: (first byte, last byte, field, what the third column says)
ByteRow = tuple[int, int, str, str]


def chapter(heading: str) -> str:
    """The text below a heading, up to the next one."""
    found = re.search(rf"^##+ {re.escape(heading)}.*?\n(.*?)(?=^##|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def tables(text: str) -> list[list[list[str]]]:
    """Every table: rows of cells, headings left out."""
    found = re.findall(r"^\|.*\|\n\|(?:---\|)+\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()] for body in found]


def byte_rows(table: list[list[str]]) -> list[ByteRow]:
    rows = []
    for span, field, text in table:
        first, last = re.fullmatch(r"(\d+)-(\d+)", span).groups()
        rows.append((int(first), int(last), field, text))
    return rows


def fields_of(text: str) -> list[tuple[str, str]]:
    """(name, numpy type) of every ``name u32`` in a text."""
    return [(name, f"<{kind}{int(bits) // 8}") for name, kind, bits in re.findall(r"(\w+) ([ui])(8|16|32|64)\b", text)]


def types_of(dtype: np.dtype[Any]) -> list[tuple[str, str]]:
    return [(name, dtype[name].str.replace("|", "<")) for name in dtype.names]


SECTIONS = {int(row[0]): (row[1], row[2]) for row in tables(chapter("3. Root"))[1]}
BLOBS = {int(row[0]): (row[1], row[2]) for row in tables(chapter("4. Blobs"))[0]}


@pytest.mark.parametrize(
    ("heading", "definition", "magic"),
    [
        ("1.1 Pointer", fmt.Pointer, fmt.POINTER_MAGIC),
        ("2. Slot", fmt.Slot, fmt.SLOT_MAGIC),
        ("3. Root", fmt.Segment, fmt.SEGMENT_MAGIC),
        ("5. Records and the log", fmt.BatchHeader, fmt.BATCH_MAGIC),
    ],
)
def test_tables_of_bytes_agree(heading, definition, magic):
    at, expected = 0, []
    for field in definition.subcons:
        expected.append((at, at + field.sizeof() - 1, field.name))
        at += field.sizeof()
    documented = byte_rows(tables(chapter(heading))[0])
    assert [row[:3] for row in documented] == expected
    assert literal(documented[0][3]) == magic


def literal(cell: str) -> bytes:
    """What stands in a cell as ```XSNP```."""
    return re.match(r"`(.*)`", cell)[1].encode().decode("unicode_escape").encode("latin1")


def test_crcs_cover_what_the_tables_say():
    pointer = fmt.build_pointer(7, 9)
    slot = fmt.build_slot(
        generation=3,
        store_uuid=bytes(16),
        fs_uuid=bytes(range(16)),
        block_size=1024,
        flags=0,
        root_block=5,
        root_blocks=1,
        root_crc=2,
        root_bytes=8,
    )
    for heading, raw, parse in (("1.1 Pointer", pointer, fmt.parse_pointer), ("2. Slot", slot, fmt.parse_slot)):
        first, last, field, text = byte_rows(tables(chapter(heading))[0])[-1]
        covered = re.fullmatch(r"of bytes (\d+)-(\d+)", text)
        assert (field, last) == ("crc", len(raw) - 1)
        assert crc32c.crc32c(raw[int(covered[1]) : int(covered[2]) + 1]) == int.from_bytes(raw[first:], "little")
        assert parse(raw) is not None
        for at in range(len(raw)):
            assert parse(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]) is None


def test_another_version_is_refused(made):
    start = dumps()[1][0]
    slot = bytearray(made[start : start + 512])
    slot[8] = 2
    slot[508:] = crc32c.crc32c(bytes(slot[:508])).to_bytes(4, "little")
    with pytest.raises(UnsupportedFeature, match="version 2"):
        fmt.parse_slot(bytes(slot))
    image = bytearray(made)
    for at in (start, start + BLOCK):
        image[at : at + 512] = slot
    for writable in (False, True):
        device = MemoryDevice(bytes(image))
        with pytest.raises(UnsupportedFeature, match="version 2"):
            Volume(device, writable=writable)
        assert device.content == image


@pytest.mark.parametrize(("word", "readable"), [(12, True), (16, True), (20, False)])
def test_feature_words_mean_what_they_say(made, word, readable):
    """Unknown compat bits hinder nobody, ro_compat bits a writer, incompat bits everybody."""
    start = dumps()[1][0]
    image = bytearray(made)
    for at in (start, start + BLOCK):
        slot = image[at : at + 512]
        slot[word + 3] |= 0x40
        slot[508:] = crc32c.crc32c(bytes(slot[:508])).to_bytes(4, "little")
        image[at : at + 512] = slot
    for writable in (False, True):
        device = MemoryDevice(bytes(image))
        if word == 12 or (readable and not writable):
            assert Volume(device, writable=writable).snapshot_names()
        else:
            with pytest.raises(UnsupportedFeature, match="unknown features 0x40000000"):
                Volume(device, writable=writable)
        assert device.content == image


def test_numbers_in_the_text():
    for pattern, value in (
        (r"### 1\.1 Pointer: (\d+) bytes", fmt.Pointer.sizeof()),
        (r"bytes at (0x[0-9a-f]+) of every ext superblock", fmt.POINTER_OFFSET),
        (r"## 2\. Slot: the first (\d+) bytes", fmt.Slot.sizeof()),
        (r"a header of (\d+) bytes, then payload", fmt.Segment.sizeof()),
        (r"Record, (\d+) bytes:", fmt.RECORD_DTYPE.itemsize),
        (r"begins at a multiple of (\d+) bytes", fmt.SECTOR),
        (r"with a header of (\d+) bytes", fmt.BatchHeader.sizeof()),
        (r"copies; (-\d+): the old content was zeros", fmt.ZERO_COPY),
        (r"all zeros \(ref (-\d+)\)", fmt.ALL_CLEAR),
        (r"all ones \(ref (-\d+)\)", fmt.ALL_SET),
        (r"# The store's format, version (\d+)", fmt.VERSION),
    ):
        found = re.search(pattern, DOCUMENT)
        assert found, pattern
        assert int(found[1], 0) == value, pattern


def test_kinds_agree():
    assert {kind: name for kind, (name, _) in SECTIONS.items()} == {kind.value: kind.name for kind in fmt.Section}
    blobs = {kind: name.split(",")[0] for kind, (name, _) in BLOBS.items()}
    assert blobs == {kind.value: kind.name for kind in fmt.BlobKind}


@pytest.mark.parametrize(
    ("enumeration", "text"),
    [
        (fmt.Kind, re.search(r"kind u8 \(([^)]*)\)", DOCUMENT)[1]),
        (fmt.Consistency, re.search(r"consistency u8 \(([^)]*)\)", DOCUMENT)[1]),
        (fmt.State, re.search(r"state u8 \(([^)]*)\)", DOCUMENT)[1]),
        (fmt.PendingKind, re.search(r"kind u32 \((1 [^)]*)\)", DOCUMENT)[1]),
        (fmt.SlotFlags, dict(row[1:] for row in tables(chapter("2. Slot"))[0])["flags"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_enumerations_agree(enumeration: type[enum.IntEnum], text: str):
    documented = {int(value): name.upper().replace("-", "_") for value, name in re.findall(r"(\d+)\s([\w-]+)", text)}
    assert documented == {int(member): member.name for member in enumeration}


RECORD_TEXT = re.search(r"^Record, \d+ bytes: (.*?)\.\n", DOCUMENT, re.MULTILINE | re.DOTALL)[1]
ENTRY_TEXT = re.search(r"^Snapshot entry: (.*?)\. An entry counts", DOCUMENT, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        (re.search(r"Each has a header \((.*?)\)", DOCUMENT)[1], dtype_of(fmt.SectionHeader)),
        (SECTIONS[fmt.Section.EXTENTS][1], fmt.EXTENT_DTYPE),
        (SECTIONS[fmt.Section.PLACE][1], dtype_of(fmt.Place)),
        (SECTIONS[fmt.Section.BLOBS][1], fmt.BLOB_DTYPE),
        (SECTIONS[fmt.Section.BLOB_RUNS][1], fmt.RUN_DTYPE),
        (SECTIONS[fmt.Section.LOG][1], dtype_of(fmt.LogPlace)),
        (re.sub(r"\(.*?\)", "", SECTIONS[fmt.Section.PENDING][1]), dtype_of(fmt.PendingHead)),
        (SECTIONS[fmt.Section.RESTORE][1], dtype_of(fmt.RestoreHead)),
        (SECTIONS[fmt.Section.ALLOCATION][1], fmt.RUN_DTYPE),
        (BLOBS[fmt.BlobKind.HISTORY][1], fmt.HISTORY_DTYPE),
        (RECORD_TEXT, fmt.RECORD_DTYPE),
    ],
    ids=lambda value: "" if isinstance(value, np.dtype) else value[:20],
)
def test_fields_in_the_text_agree(text, dtype):
    documented = fields_of(text)
    assert documented == types_of(dtype)
    assert dtype.itemsize == sum(int(kind[2:]) for _, kind in documented), "the dtype has padding"


def test_snapshot_entry_agrees():
    fixed, strings = ENTRY_TEXT.split(", name ", 1)
    documented = fields_of(fixed)
    lengths = [
        (name, int(bits) // 8) for name, bits in re.findall(r"(\w+)\s\(u(\d+) length, UTF-8\)", "name " + strings)
    ]
    head = fmt.SnapshotEntry.subcons[: len(documented)]
    assert documented == [(field.name, f"<{'iu'[field.subcon.fmtstr[1].isupper()]}{field.sizeof()}") for field in head]
    tail = fmt.SnapshotEntry.subcons[len(documented) :]
    assert lengths == [(field.name, field.subcon.lengthfield.sizeof()) for field in tail]


sections = st.dictionaries(st.integers(0, 0xFFFFFFFF), st.binary(max_size=40), max_size=6)


@given(sections)
@settings(max_examples=100, deadline=None, database=None)
def test_sections_are_padded_and_come_back(parts):
    raw = fmt.build_sections(list(parts.items()))
    assert fmt.parse_sections(raw) == parts
    at = 0
    for kind, payload in parts.items():
        assert struct.unpack_from("<IIQ", raw, at) == (kind, 0, len(payload))
        at += 16
        assert raw[at : at + len(payload)] == payload
        padded = (len(payload) + 7) // 8 * 8
        assert raw[at + len(payload) : at + padded] == bytes(padded - len(payload))
        at += padded
    assert at == len(raw)


def test_damaged_roots_are_named():
    whole = fmt.build_sections([(1, b"12345678"), (2, b"")])
    for raw, text in (
        (whole[:-1], "cut off"),
        (whole[:20], "too long"),
        (whole + whole[:24], "twice"),
        (struct.pack("<IIQ", 1, 0, (1 << 64) - 1) + bytes(64), "too long"),
    ):
        with pytest.raises(StoreDamaged, match=text):
            fmt.parse_sections(raw)


names = st.text(max_size=80).filter(lambda text: not any(0xD800 <= ord(char) < 0xE000 for char in text))
snapshots = st.builds(
    fmt.Snapshot,
    id=st.integers(0, (1 << 64) - 1),
    bit=st.integers(0, (1 << 32) - 1),
    name=names,
    message=names,
    kind=st.sampled_from(fmt.Kind),
    consistency=st.sampled_from(fmt.Consistency),
    state=st.sampled_from(fmt.State),
    created_ns=st.integers(-(1 << 63), (1 << 63) - 1),
    volume_bytes=st.integers(0, (1 << 64) - 1),
    used_blocks=st.integers(0, (1 << 64) - 1),
    restored_from=names,
)


@given(st.lists(snapshots, max_size=4))
@settings(max_examples=60, deadline=None, database=None)
def test_the_snapshot_table_comes_back(table):
    assert fmt.parse_snapshots(b"".join(snapshot.build() for snapshot in table)) == table


@pytest.mark.parametrize(("at", "value"), [(12, 9), (13, 3), (14, 3), (42, 0xFF), (40, 0xFF)])
def test_impossible_snapshots_are_damage(at, value):
    """Kind, consistency, state; a name that is no UTF-8, or longer than the table."""
    raw = bytearray(
        fmt.Snapshot(1, 0, "n", "", fmt.Kind.MANUAL, fmt.Consistency.CLEAN, fmt.State.OK, 0, 1024, 1).build()
    )
    raw[at] = value
    with pytest.raises(StoreDamaged, match="snapshot table"):
        fmt.parse_snapshots(bytes(raw))


@given(st.binary(max_size=120))
@settings(max_examples=200, deadline=None, database=None)
def test_hostile_tables_end_in_an_error(raw):
    for parse in (fmt.parse_snapshots, fmt.parse_sections, lambda raw: fmt.parse_table(raw, fmt.RECORD_DTYPE, "log")):
        with contextlib.suppress(StoreDamaged):
            parse(raw)
    assert fmt.parse_pointer(raw) is None
    assert fmt.parse_slot(raw) is None


# The worked example.


def hexdump(raw: bytes, start: int) -> str:
    """As ``hexdump -C`` prints it."""
    lines: list[str] = []
    before = b""
    for at in range(0, len(raw), 16):
        part = raw[at : at + 16]
        if part == before:
            if lines[-1] != "*":
                lines.append("*")
            continue
        before = part
        halves = "  ".join(filter(None, (part[:8].hex(" "), part[8:].hex(" "))))
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{start + at:08x}  {halves:<48}  |{text}|")
    return "\n".join([*lines, f"{start + len(raw):08x}"])


@pytest.fixture(scope="module")
def made() -> bytes:
    """The example's image, made as the document says."""
    device = MemoryDevice(gzip.decompress(FIXTURE.read_bytes()))
    volume = Volume(
        device, writable=True, clock=lambda: 1_700_000_000 * 10**9, random_bytes=lambda count: bytes(range(count))
    )
    volume.create("first", message="an example")
    volume.close()
    return bytes(device.content)


def dumps() -> list[tuple[int, int, str]]:
    """(first byte, length, text) of the example's hexdumps: pointer, slot, root, snapshot table."""
    found = []
    for text in re.findall(r"^```hexdump\n(.*?)\n```$", chapter(EXAMPLE), re.MULTILINE | re.DOTALL):
        first, end = (int(line.split()[0], 16) for line in (text.splitlines()[0], text.splitlines()[-1]))
        found.append((first, end - first, text))
    return found


def test_the_example_has_a_dump_for_each_table():
    assert dumps()[0][0] == PRIMARY + fmt.POINTER_OFFSET
    assert len(dumps()) == 4
    assert len(tables(chapter(EXAMPLE))) == 5


@pytest.mark.parametrize("number", range(4))
def test_hexdumps_are_those_of_a_fresh_image(made, number):
    first, length, text = dumps()[number]
    assert hexdump(made[first : first + length], first) == text


def values_of(cell: str) -> list[int]:
    return [int(word, 0) for word in re.findall(r"\b(0x[0-9a-f]+|\d+)\b", cell)]


@pytest.mark.parametrize(
    ("table", "dump"), [(0, 0), (1, 1), (2, 2), (4, 3)], ids=["pointer", "slot", "segment", "snapshot"]
)
def test_explained_fields_are_the_bytes(made, table, dump):
    """Every byte of the structure is explained, in order, and has the value that the table says."""
    start, length, _ = dumps()[dump]
    end = 0
    for first, last, field, cell in byte_rows(tables(chapter(EXAMPLE))[table]):
        assert first == end, field
        end = last + 1
        raw = made[start + first : start + end]
        if cell == "zeros":
            assert not any(raw), field
        elif cell.startswith("`"):
            assert raw == literal(cell), field
        elif cell.startswith("length "):
            text = literal(cell.split(", ")[1]) if "`" in cell else b""
            width = len(raw) - len(text)
            assert (int.from_bytes(raw[:width], "little"), raw[width:]) == (len(text), text), field
            assert values_of(cell)[0] == len(text)
        elif len(raw) > 8:
            assert raw.hex() == cell, field
        else:
            assert int.from_bytes(raw, "little") == values_of(cell)[0], field
    assert end == (32 if table == 2 else length)


def test_explained_sections_are_the_bytes(made):
    """Walked with nothing but the document: kind, reserved, length, payload, padding to 8."""
    start, length, _ = dumps()[2]
    root = made[start + 32 : start + length]
    end = 0
    for span, section, cell in tables(chapter(EXAMPLE))[3]:
        first, last = map(int, span.split("-"))
        kind, reserved, size = struct.unpack_from("<IIQ", root, first)
        assert (first, f"{kind} {SECTIONS[kind][0]}", reserved) == (end, section, 0)
        end = last + 1
        payload = root[first + 16 : first + 16 + size]
        assert end == first + 16 + size + -size % 8
        if section.endswith("FINGERPRINT"):
            assert payload.hex() == cell
            continue
        # Fields as chapter 3 has them, over and over; 64-bit words where it names none.
        fields = fields_of(SECTIONS[kind][1]) or [("", "<u8")]
        row = np.dtype([(f"{index}{name}", kind) for index, (name, kind) in enumerate(fields)])
        assert [int(value) for item in np.frombuffer(payload, row) for value in item] == values_of(cell)
        for name, _ in fields:
            assert name in cell
    assert end == len(root)


def test_the_crcs_of_the_example_are_right(made):
    slot, root = (made[first : first + length] for first, length, _ in dumps()[1:3])
    assert crc32c.crc32c(root[8:]) == int.from_bytes(root[4:8], "little")
    assert crc32c.crc32c(root[32:]) == int.from_bytes(slot[84:88], "little")
    entry_at, entry_bytes, _ = dumps()[3]
    blobs = tables(chapter(EXAMPLE))[3][4][2]
    assert values_of(blobs)[2:4] == [entry_bytes, crc32c.crc32c(made[entry_at : entry_at + entry_bytes])]


def test_both_slots_say_the_same(made):
    first = made[dumps()[1][0] :][:BLOCK]
    second = made[dumps()[1][0] + BLOCK :][:BLOCK]
    differ = [at for at in range(BLOCK) if first[at] != second[at]]
    assert differ
    assert set(differ) <= {*range(72, 80), *range(508, 512)}


def test_the_fingerprint_is_the_documented_digest(made):
    """The image has metadata_csum, no journal, and its descriptors in the one block behind the superblock's."""
    superblock = bytearray(made[PRIMARY : PRIMARY + 1024])
    assert int.from_bytes(superblock[0x64:0x68], "little") & 0x1400 == 0x1400  # metadata_csum, and the guard
    assert superblock[0x5C] & 4 == 0
    superblock[0x65] &= 0xEF
    superblock[0x3E0:0x3FC] = bytes(28)
    superblock[0x3FC:] = (crc32c.crc32c(bytes(superblock[:0x3FC])) ^ 0xFFFFFFFF).to_bytes(4, "little")
    digest = hashlib.blake2b(superblock + made[2 * BLOCK : 3 * BLOCK], digest_size=32).hexdigest()
    assert digest == tables(chapter(EXAMPLE))[3][9][2]
