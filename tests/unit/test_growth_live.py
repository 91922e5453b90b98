"""What is believed of the kernel's answers, and what becomes of the blocks: without a kernel."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from unittest import mock

import lab
import numpy as np
import oracle
import pytest
from arena import make_volume

import extsnap
from extsnap.arrays import expand, overlap
from extsnap.blockdev.overlay import Overlay
from extsnap.errors import ExtsnapError, StoreProtected
from extsnap.ext.filesystem import Filesystem
from extsnap.snapshot import edit, graft
from extsnap.snapshot import format as fmt
from extsnap.snapshot.growth import PIECE_BLOCKS, Cookie, Growth, Reserve, _overlap, _pieces

FILE = bytes(range(256)) * 1024  # 256 KiB


class Above:
    """A server; while ``used`` the kernel has the filesystem, and its word counts."""

    used = True

    def in_use(self) -> bool:
        return self.used

    def say(self, message: str) -> None:
        pass

    def open_views(self) -> list[str]:
        return []

    def snapshots_changed(self) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path):
    """A served volume whose snapshot needs the blocks of a file that is gone, and these blocks."""
    image = make_volume(tmp_path / "disk.img", "ext4", 32, "-b", "1024", files={"gone": FILE, "zeros": bytes(8192)})
    blocks = oracle.file_blocks(image, "/gone").data_blocks
    with extsnap.open(image) as volume:
        volume.create("one")
    copy = oracle.copy_image(image, tmp_path / "copy.img")
    volume = extsnap.open(image)
    volume.begin_serving()
    try:
        yield volume, blocks, copy
    finally:
        volume.close()


@pytest.fixture
def with_nodes(tmp_path: Path):
    """A served volume with a snapshot whose store has nodes: ext2."""
    image = make_volume(tmp_path / "disk.img", "ext2", 32, "-b", "1024", files={"gone": FILE})
    with extsnap.open(image) as volume:
        volume.create("one")
        volume.begin_serving()
        yield volume


def answer(volume, *rows: tuple[int, int, int]) -> dict[str, object]:
    extents = volume.store.root.extents.tolist()
    found = {"do": "grow", "number": volume.growth.awaited, "error": "", "filled": False}
    return found | {"extents": [*extents, *map(list, rows)]}


def ask(volume) -> Growth:
    growth = volume.growth
    assert growth is not None
    volume.serve_below(Above())
    growth.mounted = True
    assert growth.due() is None, "there is room for everything"
    growth._wanted = volume.store.available
    growth.look_again()
    request = growth.due()
    assert request is not None
    assert request["do"] == "grow"
    assert growth.due() is None, "one request at a time"
    return growth


def end_of(volume) -> int:
    return int(volume.store.root.size_blocks)


def free_run(volume, count: int) -> int:
    return int(volume.filesystem().find_free(count, avoid=[volume.needed_groups()], min_run=count)[0, 0])


def test_needed_blocks_are_adopted_and_nobody_writes_them_any_more(served) -> None:
    volume, blocks, _ = served
    growth, free = ask(volume), free_run(volume, 64)
    before = volume.store.available
    assert growth.take(answer(volume, (end_of(volume), int(blocks[0]), 20), (end_of(volume) + 20, free, 60))) == ""
    while growth.at_work:
        assert growth.step() is None
    assert volume.store.available < before + 60  # 20 hold copies; the index that names them takes a few
    assert volume.store.available > before + 45
    with pytest.raises(StoreProtected):
        volume.write(int(blocks[3]) * 1024, b"x" * 1024)
    with volume.snapshots["one"].open() as view:
        view.seek(int(blocks[0]) * 1024)
        assert view.read(20 * 1024) == FILE[: 20 * 1024]
    # All of the room is written: not one of the adopted blocks is taken for it.
    store = volume.store
    logical = store.allocate(store.available)
    store.write_blocks(logical, b"\xee" * (len(logical) * 1024))
    path = volume.path
    volume.close()  # as a kill would
    with extsnap.open(path, writable=False) as again, again.snapshots["one"].open() as view:
        view.seek(int(blocks[0]) * 1024)
        assert view.read(20 * 1024) == FILE[: 20 * 1024]


def test_a_grant_that_is_mostly_needed_blocks_goes_back(served) -> None:
    volume, blocks, _ = served
    growth = ask(volume)
    extents = volume.store.root.extents.copy()
    end = end_of(volume)
    assert growth.take(answer(volume, (end, int(blocks[0]), 40))) == ""
    request = growth.step()
    assert request is not None
    assert (request["do"], request["runs"]) == ("free", [[end, 40]])
    assert np.array_equal(volume.store.root.extents, extents)
    assert growth.take({"do": "free", "number": growth.awaited, "error": ""}) == ""
    growth._wanted = volume.store.available
    assert growth.due() is None, "it stops for a while"


def test_of_a_grant_that_is_nearly_all_needed_the_rest_is_taken_and_more_is_asked_for(served) -> None:
    volume, blocks, _ = served
    growth, free, end = ask(volume), free_run(volume, 16), end_of(volume)
    before = volume.store.available
    assert (
        growth.take(answer(volume, (end, int(blocks[0]), 80), (end + 80, free, 8), (end + 88, int(blocks[80]), 40)))
        == ""
    )
    assert growth.step() is None
    assert volume.store.available == before + 8
    request = growth.step()
    assert request is not None
    assert (request["do"], request["runs"]) == ("free", [[end, 80], [end + 88, 40]])
    assert not growth.at_work
    assert growth.take({"do": "free", "number": growth.awaited, "error": ""}) == ""
    asked = []
    for found in ([(end + 88, free + 8, 1)], []):
        growth._wanted = volume.store.available
        growth.look_again()
        request = growth.due()
        assert request is not None
        asked.append(sum(count for _, count in request["runs"]) / growth._growth())
        growth.take(answer(volume, *found))
        while growth.at_work:
            growth.step()
    assert asked == [2, 1], "twice as much once, and then what is wanted"


def test_what_goes_back_has_no_copies_of_held_writes(served) -> None:
    """Their copies are made when they are let out, which may be just before the store gives up its free blocks."""
    volume, blocks, copy = served
    growth, store = ask(volume), volume.store
    growth.take(answer(volume, (end_of(volume), free_run(volume, 4096), 4096)))
    while growth.at_work:
        growth.step()
    growth._wanted, growth.reserve = 0, replace(growth.reserve, chunk=256)
    for block in blocks:
        volume.write(block * 1024, bytes([7]) * 1024)
    assert volume.engine.left < store.available, "nothing is held"
    store._cursor = (end_of(volume) - 400) // 8  # the next free blocks are the last ones, which go back first
    growth.shrink()
    failing = mock.patch.object(volume.engine, "preserve", side_effect=OSError(errno.EIO, "the disk fails once"))
    with failing, pytest.raises(OSError):
        growth.due()
    assert volume.read(blocks[0] * 1024, 1024) == bytes([7]) * 1024
    request = growth.due()
    assert request is not None
    assert request["do"] == "free"
    volume.flush()
    gone = np.concatenate([np.arange(start, start + count) for start, count in request["runs"]])
    for level in volume.engine.index.levels:
        assert not np.isin(level.copy, gone).any()
    content = Path(copy).read_bytes()
    view = volume.open_view("one")
    for block in blocks:
        assert view.pread(block * 1024, 1024) == content[block * 1024 : (block + 1) * 1024]


def test_a_snapshot_finds_room_for_what_it_will_preserve(tmp_path: Path) -> None:
    """Without snapshots nothing is preserved, and the store is small: a writer may go on with the thaw."""
    image = make_volume(tmp_path / "disk.img", "ext4", 64, "-b", "1024", files={"file": FILE * 32})
    with extsnap.open(image) as volume:
        volume.create("one")
        volume.snapshots["one"].delete()
        volume.begin_serving()
        growth, store = volume.growth, volume.store
        assert growth is not None
        volume.serve_below(Above())
        growth.mounted = True
        store.allocate(store.available - volume.engine.reserve() - volume.engine.spared)
        assert growth.due() is None, "nothing is preserved"
        growth.provision()
        request = growth.due()
        assert request is not None
        used = len(oracle.file_blocks(image, "/file").data_blocks)
        assert sum(count for _, count in request["runs"]) > used
        growth.take(answer(volume, (end_of(volume), free_run(volume, 4096), 4096)))
        while growth.at_work:
            growth.step()
        assert not growth.is_provided, "a part of it is not enough"
        growth.provided()
        assert growth.is_provided


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ([(0, 1 << 40, 4)], "leave the volume"),
        ([(0, 1, 4)], "filesystem itself"),
        ([(0, -5, 4)], "impossible"),
        ([(0, 9000, 0)], "impossible"),
        ([(0, 9000, 8), (8, 9004, 8)], "overlap"),
    ],
)
def test_an_answer_that_cannot_be_is_not_believed(served, rows, wrong) -> None:
    volume, _, _ = served
    growth, end = ask(volume), end_of(volume)
    extents = volume.store.root.extents.copy()
    assert wrong in growth.take(answer(volume, *[(end + logical, place, count) for logical, place, count in rows]))
    assert not growth.at_work
    assert np.array_equal(volume.store.root.extents, extents)


def test_a_map_without_the_stores_blocks_is_not_believed(served) -> None:
    volume, _, _ = served
    growth = ask(volume)
    found = answer(volume, (end_of(volume), free_run(volume, 8), 8))
    found["extents"][0][1] += 1  # type: ignore[index]
    assert "does not have" in growth.take(found)


def test_a_node_that_became_data_waits_until_it_is_no_node_any_more(with_nodes) -> None:
    """Of what the kernel gives, blocks that the header still lists as nodes are left out; ext2, which has some."""
    volume = with_nodes
    growth, free, end = ask(volume), free_run(volume, 64), end_of(volume)
    node, before = int(volume.store.root.mapping[0]), volume.store.root.extents
    rows = [(end, free, 20), (end + 20, node, 1), (end + 21, free + 21, 20)]
    assert growth.take(answer(volume, *rows)) == ""
    while growth.at_work:
        growth.step()
    new = graft.keep_logical(volume.store.root.extents, np.array([[end, 1000]], np.int64))
    assert new.tolist() == [list(rows[0]), list(rows[2])]
    assert graft.has_all(volume.store.root.extents, before)
    assert not overlap(np.concatenate([volume.store.root.extents[:, 1:], [[node, 1]]]))


def test_a_map_of_before_says_nothing_about_the_nodes(with_nodes) -> None:
    """The kernel's edits come home in any order: until a freeze a former node may be anything, whatever came first."""
    volume = with_nodes
    growth = ask(volume)
    node = int(volume.store.root.mapping[0]) * 1024
    old = volume.read(node, 1024)
    growth.take({"do": "grow", "number": growth.awaited, "error": "", "extents": []})
    links = volume.filesystem().inode_offset(volume.store.root.store_inode) + 0x1A
    volume.write(links, b"\2\0")  # the kernel's map of before, whole
    volume.write(node, b"\xff" * 1024)
    volume.write(node, old)
    volume.write(links, b"\1\0")
    growth.settled()
    with pytest.raises(StoreProtected, match="would take the store"):
        volume.write(node, b"\xff" * 1024)


def test_new_nodes_of_the_kernel_are_watched_too(with_nodes) -> None:
    volume = with_nodes
    growth, free, end = ask(volume), free_run(volume, 600), end_of(volume)
    changes, found = granted(volume, (end, free, 600))
    nodes = set(volume.store.root.mapping.tolist())
    double = int(volume.store.root.mapping[1])  # it names the new ones; until it comes nobody knows of them
    for block in sorted(changes, key=lambda block: (block == double, block)):
        volume.write(block * 1024, changes[block])
    assert growth.take(found) == ""
    while growth.at_work:
        assert growth.step() is None
    growth.settled()
    new = set(volume.filesystem().file_map(volume.store.root.store_inode).mapping.tolist())
    assert new - nodes
    for node in new - nodes:
        with pytest.raises(StoreProtected, match="would take the store"):
            volume.write(node * 1024, b"\xff" * 1024)


def test_without_a_limit_of_dirty_pages_all_is_to_have_room(served) -> None:
    volume, _, _ = served
    growth, engine = ask(volume), volume.engine
    growth.take({"do": "grow", "number": growth.awaited, "error": "", "extents": []})
    growth.look_again()
    growth.reserve, growth._wanted = Reserve(0, 0, 8, 8), 0
    asked = []
    for limited in (True, False):
        growth.limited = limited
        asked.append(growth._keep())
    assert asked == [16, engine.blocks_to_preserve()]
    assert asked[1] > 256


def test_a_fill_counts_only_where_its_pattern_arrived(served) -> None:
    volume, blocks, _ = served
    growth, free, end = ask(volume), free_run(volume, 64), end_of(volume)
    cookie = growth.cookie
    assert cookie is not None
    data = bytearray(cookie.pattern * (64 * 1024 // 16))
    data[5 * 1024 : 6 * 1024] = b"somebody's".ljust(1024)
    old = volume.read(free * 1024, 64 * 1024)
    volume.write(free * 1024, data)
    seen = volume.read(free * 1024, 64 * 1024)
    assert seen[:5120] + seen[6144:] == old[:5120] + old[6144:], "the pattern was written"
    assert seen[5120:6144] == b"somebody's".ljust(1024)
    filled = answer(volume, (end, free, 64)) | {"filled": True}
    assert "not written by it" in growth.take(filled)
    growth._retry_at, growth._left_then = 0.0, None
    assert growth.due() is not None
    assert growth.cookie is not None
    filled["number"] = growth.awaited
    volume.write(free * 1024, growth.cookie.pattern * (64 * 1024 // 16))
    volume.write(int(blocks[0]) * 1024, growth.cookie.pattern * (8 * 1024 // 16))
    filled["extents"].append([end + 64, int(blocks[0]), 8])  # type: ignore[attr-defined]
    assert growth.take(filled) == ""
    growth.step()
    assert int(volume.store.root.extents[:, 2].sum()) == end + 72
    with volume.snapshots["one"].open() as view:
        view.seek(int(blocks[0]) * 1024)
        assert view.read(8 * 1024) == FILE[: 8 * 1024], "what the snapshot needs was lost under the fill"


def from_above(volume, changed: bytes) -> None:
    """Write what is different in ``changed``, as the kernel would."""
    old = np.frombuffer(volume.read(0, volume.size), np.uint8).reshape(-1, 1024)
    new = np.frombuffer(changed, np.uint8).reshape(-1, 1024)
    for block in np.flatnonzero((old != new).any(axis=1)).tolist():
        volume.write(block * 1024, new[block].tobytes())


def granted(volume, *rows: tuple[int, int, int]) -> tuple[dict[int, bytes], dict[str, object]]:
    """The blocks that the kernel writes when it gives the store these rows, and what is answered then."""
    overlay = Overlay(volume.base, 1024)
    fs = Filesystem.open(overlay, writable=True)
    root, found = volume.store.root, answer(volume, *rows)
    wanted = np.array(found["extents"], np.int64)
    graft.resize(fs, root.store_inode, root.extents, wanted, volume.needed_groups())
    fs.flush()
    return overlay.changes(), found


def half_made(volume, monkeypatch, *rows: tuple[int, int, int]) -> tuple[Growth, dict[str, object]]:
    """The kernel has given the store these rows, the first of them is made true, and now it has unmounted."""
    growth = ask(volume)
    monkeypatch.setattr("extsnap.snapshot.growth.PIECE_BLOCKS", rows[0][2])
    changes, found = granted(volume, *rows)
    for block, data in sorted(changes.items()):
        volume.write(block * 1024, data)
    assert growth.take(found) == ""
    assert growth.step() is None
    assert growth.at_work, "it is all in one piece"
    volume.above.used = False
    return growth, found


def test_a_restore_ends_what_an_unmounted_kernel_gave(served, monkeypatch) -> None:
    """The rest of it are blocks of a file that is there again."""
    volume, blocks, _ = served
    from_above(volume, lab.changed_by_debugfs(volume.read(0, volume.size), "rm /gone"))
    end, free = end_of(volume), free_run(volume, 60)
    growth, found = half_made(volume, monkeypatch, (end, free, 60), (end + 60, int(blocks[0]), 20))
    volume.verb("restore", name="one")
    assert not growth.at_work
    growth.take(found)
    while growth.at_work:
        growth.step()
    assert volume.read(int(blocks[0]) * 1024, 20 * 1024) == FILE[: 20 * 1024]
    assert volume.end_serving()
    assert not lab.complaint(Path(volume.path).read_bytes())


def give(volume, *rows: tuple[int, int, int]) -> None:
    """The kernel gives the store these rows, all of them are made true, and it unmounts."""
    growth = volume.growth
    assert growth is not None
    volume.serve_below(Above())
    growth.mounted, growth._wanted = True, volume.store.available
    growth.look_again()
    assert growth.due() is not None
    changes, found = granted(volume, *rows)
    for block, data in sorted(changes.items()):
        volume.write(block * 1024, data)
    assert growth.take(found) == ""
    while growth.at_work:
        assert growth.step() is None
    volume.above.used = False


def require_restored(volume, name: str, views: dict[str, bytes]) -> None:
    """The volume is what the snapshot was, but for the store, nothing waits to be done, and no view has changed."""
    store, end = volume.require_store(), volume.size // 1024
    assert store.root.restore is None
    owned = np.zeros(end, bool)
    owned[expand(store.root.extents[:, 1], store.root.extents[:, 2])] = True
    files = lab.survey(views[name]).files
    assert not (files & owned).any()
    assert not (lab.unequal(volume.read(0, volume.size), views[name]) & files).any()
    assert {entry: volume.open_view(entry).pread(0, volume.size) for entry in views} == views
    assert not lab.complaint(volume.read(0, volume.size))
    assert volume.end_serving()
    volume.create("later")
    assert volume.verb("check")["store"]["ok"]
    assert not lab.complaint(Path(volume.path).read_bytes())


def test_a_restore_leaves_the_store_what_was_free_then(tmp_path: Path) -> None:
    """A snapshot that is taken in the middle of writes keeps free blocks too, and the kernel gives the store some."""
    image = make_volume(tmp_path / "disk.img", "ext2", 32, "-b", "1024", files={"gone": FILE, "kept": FILE})
    blocks = oracle.file_blocks(image, "/gone").data_blocks
    kept = oracle.file_blocks(image, "/kept").data_blocks
    with extsnap.open(image) as volume:
        volume.create("base")
        volume.begin_serving()
        from_above(volume, lab.changed_by_debugfs(volume.read(0, volume.size), "rm /gone"))
        volume.serve_below(Above())
        assert volume.create("crash").info.consistency == fmt.Consistency.CRASH
        free = int(volume.filesystem().find_free(64, avoid=[], min_run=64)[0, 0])
        still = blocks[-20:]  # of the file that was gone, and are not written again
        assert still[0] > free + 64
        for block in [*range(free, free + 64), *kept[:5]]:
            volume.write(block * 1024, b"new".ljust(1024))
        volume.flush()
        views = {name: volume.open_view(name).pread(0, volume.size) for name in volume.snapshot_names()}
        end = end_of(volume)
        give(volume, (end, free, 64), (end + 64, int(still[0]), 20))
        assert volume.engine.owns(still + volume.engine.shift).all()
        volume.verb("restore", name="crash")
        require_restored(volume, "crash", views)


def test_a_restore_leaves_the_store_what_was_a_node_of_its_then(tmp_path: Path) -> None:
    """A restore has put the nodes elsewhere; the snapshot keeps the old ones, and the kernel gives them as data."""
    image = make_volume(tmp_path / "disk.img", "ext2", 32, "-b", "1024", files={"kept": FILE})
    kept = oracle.file_blocks(image, "/kept").data_blocks
    with extsnap.open(image) as volume:
        volume.create("one")
        node = int(volume.store.root.mapping[0])
        volume.verb("restore", name="one", safety=False)
        assert node not in volume.store.root.mapping
        volume.begin_serving()
        free, end = free_run(volume, 64), end_of(volume)
        for block in kept[:5]:
            volume.write(block * 1024, b"new".ljust(1024))
        views = {"one": volume.open_view("one").pread(0, volume.size)}
        assert any(views["one"][node * 1024 : (node + 1) * 1024])
        give(volume, (end, free, 60), (end + 60, node, 1))
        assert volume.engine.owns(np.array([node]) + volume.engine.shift).all()
        volume.verb("restore", name="one")
        require_restored(volume, "one", views)


def test_an_edit_of_our_own_ends_what_an_unmounted_kernel_gave(served, monkeypatch) -> None:
    """It gives the rest back, and then that may be the store's anyway: twice the store's is nobody's."""
    volume, _, _ = served
    end, free = end_of(volume), free_run(volume, 120)
    growth, _ = half_made(volume, monkeypatch, (end, free, 60), (end + 60, free + 60, 60))
    assert edit.grow(volume, 300) == 300
    assert not growth.at_work
    volume.create("two")
    while growth.at_work:
        growth.step()
    assert not overlap(volume.store.root.allocation_runs())
    assert volume.end_serving()
    volume.close()
    assert not lab.complaint(Path(volume.path).read_bytes())
    with extsnap.open(volume.path, writable=False) as again:
        assert again.snapshot_names() == ["one", "two"]


def test_what_the_kernel_gave_is_made_true_after_the_unmount_too(served, monkeypatch) -> None:
    volume, _, _ = served
    end, free = end_of(volume), free_run(volume, 120)
    growth, _ = half_made(volume, monkeypatch, (end, free, 60), (end + 60, free + 60, 60))
    assert growth.step() is None
    assert not growth.under_way
    assert end_of(volume) == end + 120
    assert volume.end_serving()
    assert not lab.complaint(Path(volume.path).read_bytes())


def test_blocks_that_the_file_does_not_have_are_never_made_ours(served) -> None:
    """Whoever unmounted may have let somebody else at the filesystem."""
    volume, _, _ = served
    growth, before = ask(volume), volume.store.root.extents.copy()
    growth.take(answer(volume, (end_of(volume), free_run(volume, 64), 64)))
    volume.above.used = False
    with pytest.raises(ExtsnapError, match="not its new ones"):
        growth.step()
    assert not growth.under_way
    assert np.array_equal(volume.store.root.extents, before)


def test_blocks_that_the_store_has_are_not_made_ours_twice(served) -> None:
    volume, _, _ = served
    growth = ask(volume)
    growth.take(answer(volume, (end_of(volume), free_run(volume, 64), 64)))
    assert growth._grant is not None
    growth._grant.rows *= 2
    growth.step()
    extents = volume.store.root.extents.copy()
    with pytest.raises(ExtsnapError, match="not its new ones"):
        growth.step()
    assert np.array_equal(volume.store.root.extents, extents)


def test_a_late_answer_is_not_the_next_ones(served) -> None:
    volume, _, _ = served
    growth = ask(volume)
    late = answer(volume, (end_of(volume), free_run(volume, 64), 64))
    growth.drop()
    growth.look_again()
    assert growth.under_way
    assert growth.due() is None, "one request at a time"
    assert growth.take(late) == ""
    assert not growth.under_way, "it was dropped before it came"
    request = growth.due()
    assert request is not None
    assert request["number"] != late["number"]
    assert growth.take(late) == ""
    assert growth.awaited == request["number"]
    assert not growth.at_work
    growth.take(late | {"number": request["number"]})
    assert growth.at_work


def test_sifting_a_write() -> None:
    cookie = Cookie(b"0123456789abcdef", 1024)
    ours, theirs = b"0123456789abcdef" * 64, b"0123456789abcdef" + bytes(1008)
    left = cookie.sift(4096, ours + theirs + theirs + ours)
    assert [(offset, bytes(data)) for offset, data in left] == [(5120, theirs + theirs)]
    assert cookie.sift(0, ours) == []
    assert cookie.seen.tolist() == [0, 4, 7]
    assert cookie.sift(512, ours)[0][0] == 512, "what is no block is nobody's pattern"


def test_pieces_and_overlaps() -> None:
    rows = np.array([[0, 100, 3 * PIECE_BLOCKS + 5], [90000, 7, 2]], np.int64)
    pieces = _pieces(rows)
    assert all(piece[:, 2].sum() <= PIECE_BLOCKS for piece in pieces)
    assert np.array_equal(graft.join(np.concatenate(pieces)), rows)
    runs = np.array([[10, 5], [2, 1], [40, 100]], np.int64)
    for first, hit in (((0, 2), False), ((0, 3), True), ((14, 1), True), ((15, 25), False), ((139, 9), True)):
        assert _overlap(np.array([first], np.int64), runs) is hit


def test_the_reserve_follows_volume_and_journal(tmp_path: Path) -> None:
    small = make_volume(tmp_path / "small.img", "ext2", 32, "-b", "4096")
    large = make_volume(tmp_path / "large.img", "ext3", 400, "-b", "4096", "-J", "size=8")
    found = []
    for image in (small, large):
        with extsnap.open(image) as volume:
            found.append(Reserve.of(volume.filesystem(), volume.size))
    assert found[0].dirty_bytes == 8 << 20
    assert found[1].dirty_bytes == 25 << 20
    assert found[1].cached_bytes == 25 << 19
    assert found[1].in_flight * 4096 == (25 << 20) + (25 << 19) + (32 << 20) + (8 << 20) - 4096


def test_acknowledgements_are_late_only_while_growth_is_needed(served) -> None:
    volume, blocks, _ = served
    growth = ask(volume)
    piece = b"x" * 8192

    def write(number: int) -> float:
        volume.write(int(blocks[0]) * 1024 + number * 8192, piece)
        return growth.lag()

    growth.lag()
    growth.reserve = Reserve(0, 0, 100, 100)
    assert write(0) == 0.0, "the reserve is whole"
    growth.reserve = Reserve(0, 0, 1 << 40, 100)
    assert 0.0 < write(1) <= 1.0
    assert growth.lag() == 0.0, "nothing was written since"
    growth.take({"do": "grow", "number": growth.awaited, "error": "", "extents": []})
    assert write(2) == 0.0, "nothing is under way that could be waited for"
