"""Every kind of volume through the whole journey, or refused by name with nothing changed."""

from __future__ import annotations

from pathlib import Path

import images
import oracle
import pytest
import variants
from arena import arena
from journey import Journey, refusal
from shares import taken

import extsnap
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import UnsupportedFeature
from extsnap.ext.filesystem import BLOCK_SIZE_MAX, ROOT_INODE, Filesystem
from extsnap.ondisk.superblock import State

COVERAGE = Path(__file__).resolve().parents[2] / "docs" / "EXT4-COVERAGE.md"


#: In CI one kind in four, which ones the commit decides.
KINDS = taken(list(variants.VARIANTS), 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_journey(name: str) -> None:
    variant = variants.VARIANTS[name]
    with arena() as scratch:
        image = oracle.copy_image(variants.image(name), scratch / "disk.img")
        if variant.refused:
            assert variant.refused in refusal(image)
        else:
            Journey(image, scratch, variant.top).travel()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, variant in variants.VARIANTS.items() if not variant.refused])
def test_every_group_verifies_under_the_mark_of_errors(name: str) -> None:
    """Of a sound volume nothing is distrusted, whatever kind it is."""
    image = ImageFile(str(variants.image(name)))
    overlay = Overlay(image, BLOCK_SIZE_MAX)
    plain = Filesystem.open(overlay, writable=True)
    bitmaps = plain.block_bitmaps()
    plain.superblock.s_state = State.ERROR
    plain.write_superblock()
    marked = Filesystem.open(overlay)
    assert marked.has_errors
    assert marked.sound_groups.all()
    assert not len(marked.block_bitmaps().differing_rows(bitmaps))
    assert marked.free_blocks == plain.geometry.free_blocks
    assert marked.inode_in_use(ROOT_INODE)
    image.close()


def test_an_external_journal_is_no_volume(tmp_path: Path) -> None:
    image = tmp_path / "journal.img"
    image.write_bytes(bytes(4 << 20))
    images.tool("mke2fs", "-q", "-F", "-b", "1024", "-O", "journal_dev", str(image))
    before = oracle.sha256(image)
    for writable in (False, True):
        with pytest.raises(UnsupportedFeature, match="external journal"):
            extsnap.open(image, writable=writable)
    assert oracle.sha256(image) == before


def test_the_support_table_is_of_these_volumes() -> None:
    """`tools/make-coverage` wrote it, after the last change of the list."""
    rows = [line.split(" | ") for line in COVERAGE.read_text().splitlines() if line.startswith("| ")][1:]
    said = {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in rows}
    assert list(said) == [variant.title for variant in variants.VARIANTS.values()]
    for variant in variants.VARIANTS.values():
        assert said[variant.title].startswith("no: " if variant.refused else "yes"), variant.title
