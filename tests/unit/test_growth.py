"""How far the store grows while a volume is served, by debugfs's block lists of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

import extsnap

FILE_BYTES = 4 << 20


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_snapshots_taken_while_serving_do_not_pile_up_room(kind: str, tmp_path: Path) -> None:
    """Room for everything that is still to be preserved is enough, however many snapshots are taken."""
    content = {"big": bytes(range(256)) * (FILE_BYTES // 256)}
    image = make_volume(tmp_path / "disk.img", kind, 64, "-b", "1024", files=content)
    used = int(oracle.blocks_in_use(image).sum())
    seen, sizes = tmp_path / "seen", []
    with extsnap.open(image) as volume:
        volume.begin_serving()
        for number in range(4):
            volume.verb("create", name=f"s{number}")
            seen.write_bytes(volume.read(0, volume.size))  # the image itself bears the mark
            found = oracle.store_blocks(seen)
            assert found is not None
            sizes.append(len(found.data_blocks))
        assert volume.end_serving()
    records = used * 2 * 80 // 1024  # twice: a fold writes them anew
    assert sizes[0] <= used + records + 700, "more than what there is to preserve, its records, the log, and the tables"
    assert sizes[-1] - sizes[0] <= 3 * 64, f"each snapshot took room of its own: {sizes}"
    oracle.assert_clean(image)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory whose files no barrier waits for."""
    with arena() as top:
        yield top


def test_giving_back_scattered_blocks_may_take_mapping_blocks(memory: Path) -> None:
    """More extents need more nodes: none of them may stand in a block that is just being given back."""
    image = make_volume(memory / "disk.img", "ext4", 24, "-b", "1024", files={"one": b"1" * 1024})
    block = int(oracle.file_blocks(image, "/one").data_blocks[0])
    names = [f"s{number}" for number in range(200)]
    with extsnap.open(image) as volume:
        for number, name in enumerate(names):
            volume.create(name)
            volume.begin_serving(grow=False)
            volume.write(block * 1024, bytes([number]) * 1024)
            assert volume.end_serving()
        before = oracle.store_blocks(image)
        volume.verb("delete", names=names[::2])
        after = oracle.store_blocks(image)
        assert before is not None
        assert after is not None
        assert len(after.data_blocks) < len(before.data_blocks)
        assert len(after.mapping) > len(before.mapping), "the map did not grow: this shows nothing"
        oracle.assert_clean(image)
        for number, name in enumerate(names[1::2]):
            with volume.snapshots[name].open() as view:
                view.seek(block * 1024)
                assert view.read(1024) == bytes([2 * number]) * 1024
