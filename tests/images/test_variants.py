"""Every kind of volume through the whole journey, or refused by name with nothing changed."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import variants
from arena import arena
from journey import Journey, refusal

COVERAGE = Path(__file__).resolve().parents[2] / "docs" / "EXT4-COVERAGE.md"


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_the_journey(name: str) -> None:
    variant = variants.VARIANTS[name]
    with arena() as scratch:
        image = oracle.copy_image(variants.image(name), scratch / "disk.img")
        if variant.refused:
            assert variant.refused in refusal(image)
        else:
            Journey(image, scratch, variant.top).travel()


def test_the_support_table_is_of_these_volumes() -> None:
    """`tools/make-coverage` wrote it, after the last change of the list."""
    rows = [line.split(" | ") for line in COVERAGE.read_text().splitlines() if line.startswith("| ")][1:]
    said = {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in rows}
    assert list(said) == [variant.title for variant in variants.VARIANTS.values()]
    for variant in variants.VARIANTS.values():
        assert said[variant.title].startswith("no: " if variant.refused else "yes"), variant.title
