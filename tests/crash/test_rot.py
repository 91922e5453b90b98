"""Bit rot: the short form of the campaign, and what it must not leave to chance."""

from __future__ import annotations

import re

import lab
import pytest
from campaigns.report import short_form
from campaigns.rot import CAMPAIGN, Field, grown, judge, opened

from extsnap.errors import DamagedCopy, StoreDamaged


@pytest.mark.parametrize("part", CAMPAIGN.parts)
def test_flipped_bytes(part: str) -> None:
    short_form(CAMPAIGN, part)


def copies_of_structures() -> list[Field]:
    """One field of each copy of each structure that is mended in its place."""
    found: dict[str, Field] = {}
    for field in grown("log").fields:
        if field.structure.split()[0] not in ("pointer", "slot", "segment", "root"):
            found.setdefault(field.structure, field)
    return list(found.values())


def test_every_copy_is_named_and_mended_to_the_last_byte() -> None:
    """Both copies of every blob, bitmap and batch: what stands there afterwards is what stood there before."""
    made = grown("log")
    structures = copies_of_structures()
    for first in (field for field in structures if field.structure.endswith("0")):
        assert any(field.structure == first.structure[:-1] + "1" for field in structures), f"{first}: there is one copy"
    for field in structures:
        medium = bytearray(made.content)
        medium[field.offset] ^= 1
        report = opened(medium, writable=False).verb("check")
        assert re.search(rf"block.*\b{field.offset // lab.BLOCK}\b", report["store"]["errors"][0]), field
        assert not any(entry["errors"] for entry in report["snapshots"]), f"{field}: nothing is lost"
        opened(medium, writable=True).verb("note_check", damaged=[], sound=[])
        assert medium[field.offset] == made.content[field.offset], field
        assert opened(medium, writable=False).verb("check")["store"]["ok"], field


def test_a_command_that_writes_says_what_it_mended() -> None:
    made = grown("log")
    field = copies_of_structures()[0]
    medium = bytearray(made.content)
    medium[field.offset] ^= 1
    said = opened(medium, writable=True).verb("create", name="four")["notices"]
    assert any("is damaged" in line and line.endswith("it was written again") for line in said), said
    assert "notices" not in opened(medium, writable=True).verb("delete", names=["four"])


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_copy_that_is_flipped(place: int) -> None:
    """Its snapshots fail there, are named, and are listed as damaged; all others are read to the end."""
    block = sorted(grown("rest").copies)[place]
    judge(grown("rest"), "rest", block * lab.BLOCK + 100, 3, structure=False)


@pytest.mark.parametrize("structure", ["batch", "masks", "history"])
def test_a_structure_that_is_lost(structure: str) -> None:
    """Both copies are flipped: no view shows anything but an error, and nothing is written but by a strip.

    Of the index parts can be lost: `tests/unit/test_parts.py`.
    """
    made = grown("log")
    both = sorted(
        (field for field in copies_of_structures() if field.structure.split()[0] == structure),
        key=lambda field: field.structure,
    )
    medium = bytearray(made.content)
    for field in both[-2:]:  # of the log: its last batch
        medium[field.offset + field.length - 1] ^= 1
    before = bytes(medium)
    volume = opened(medium, writable=False)
    assert {entry["state"] for entry in volume.verb("list")["snapshots"]} == {"damaged"}
    for name in made.truth:
        with pytest.raises(DamagedCopy):
            volume.open_view(name).pread(0, lab.BLOCK)
    report = volume.verb("check")
    assert not report["store"]["ok"]
    assert all(entry["errors"] for entry in report["snapshots"])
    for verb, arguments in (("create", {"name": "four"}), ("delete", {"names": ["one"]}), ("restore", {"name": "one"})):
        with pytest.raises(StoreDamaged, match="extsnap strip makes a plain volume"):
            opened(medium, writable=True).verb(verb, **arguments)
    assert bytes(medium) == before
    assert opened(medium, writable=True).verb("strip")["snapshots"] == 3
    assert not lab.complaint(medium)
