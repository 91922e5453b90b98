"""Tables: aligned, complete, and safe against names that somebody else chose."""

from __future__ import annotations

import json
from typing import Any

import pytest

from extsnap.cli import output, render

from .conftest import snapshot

HOSTILE = [
    "[red]x[/red]",
    "[/]",
    "[link=http://example.org]x[/link]",
    ":smile:",
    "\x1b[2J\x1b[H",
    "\x9b2J",
    "a\nb",
    "a\rb",
    "\u202egpj.exe",
    "\x07",
    "\udcfe",
    "x" * 255,
]


def lines(renderable: Any, width: int = 1 << 16, colours: bool = False) -> list[str]:
    return output.render_lines(renderable, width=width, colours=colours)


@pytest.mark.usefixtures("in_utc")
def test_list() -> None:
    table = render.snapshot_table(
        {
            "version": 1,
            "snapshots": [
                snapshot("first", message="a note"),
                snapshot("the-second", used_bytes=3 << 30, exclusive_bytes=0, shared_bytes=700),
            ],
        }
    )
    assert lines(table) == [
        "NAME        CREATED                 USED  EXCLUSIVE   SHARED  CONSISTENCY  MESSAGE",
        "first       2026-11-22 10:00:00  5.0 MiB    4.0 KiB  2.0 KiB  clean        a note",
        "the-second  2026-11-22 10:00:00  3.0 GiB      0   B  700   B  clean",
    ]


def test_list_shows_kind_and_state_where_they_tell_something() -> None:
    header, *rows = lines(
        render.snapshot_table({"snapshots": [snapshot("a", kind="safety"), snapshot("b", state="damaged")]})
    )
    assert header.split()[-3:] == ["KIND", "STATE", "MESSAGE"]
    assert rows[0].split()[-2:] == ["safety", "ok"]
    assert rows[1].split()[-2:] == ["manual", "damaged"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_are_shown_literally(name: str) -> None:
    for result in (
        lines(render.snapshot_table({"snapshots": [snapshot(name, message=name, kind=name, state=name)]})),
        lines(render.snapshot_details({"version": 1, **snapshot(name, message=name), "restored_from": name})),
        lines(render.volume_details(volume(label=name, features=[name], attached=attached(name)))),
        lines(render.check_table(check(snapshots=[{"name": name, "e2fsck": 4, "ok": False, "errors": [name]}]))),
        list(render.dump_lines("records", {"records": [{"block": 1, "snapshots": [name]}]})),
        list(render.dump_lines("snapshots", {"snapshots": [snapshot(name, message=name)]})),
        list(render.dump_lines("header", {"header": {"label": name, name: {"x": name}}})),
        list(render.dump_lines("bitmaps", {"bitmaps": {name: [[1, 2]]}})),
    ):
        assert all(line.isprintable() for line in result)
        assert any(output.safe(name) in line for line in result)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_on_a_terminal(name: str) -> None:
    table = render.snapshot_table({"snapshots": [snapshot(name, message=name)]})
    written = "".join(lines(table, width=100, colours=True))
    # Only our own colours: every escape sequence is a SGR that rich made.
    assert written.replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\n", "").isprintable()


def test_a_narrow_terminal_folds_names_and_cuts_nothing() -> None:
    name = "abcdefghij" * 12
    written = lines(render.snapshot_table({"snapshots": [snapshot(name)]}), width=100)
    assert "".join(line.split()[0] for line in written[1:]) == name
    assert all(len(line) <= 100 for line in written)


def volume(**changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "type": "ext4",
        "uuid": "8f5f0cb6-1df4-4c45-9d30-0a9b7c5cf9a1",
        "label": "data",
        "block_size": 4096,
        "blocks": 25600,
        "free_blocks": 12800,
        "inodes": 6400,
        "free_inodes": 6000,
        "groups": 1,
        "features": ["extent", "metadata_csum"],
        "offset": 0,
        "guard": True,
        "snapshots": 2,
        "store": {"bytes": 8 << 20, "copy_bytes": 4 << 20, "metadata_bytes": 1 << 20, "free_bytes": 3 << 20},
        "attached": None,
        **changes,
    }


def attached(path: str) -> dict[str, Any]:
    return {"pid": 4711, "directory": path, "mounts": [path]}


def test_info() -> None:
    details = volume(offset=1 << 20, partition=5, attached=attached("/srv/x"), marked="run this")
    assert lines(render.volume_details(details)) == [
        "type       ext4",
        "uuid       8f5f0cb6-1df4-4c45-9d30-0a9b7c5cf9a1",
        "label      data",
        "features   extent metadata_csum",
        "size       100.0 MiB (25600 blocks of 4.0 KiB)",
        "free       50.0 MiB (12800 blocks)",
        "inodes     6400, 6000 free",
        "groups     1",
        "partition  5",
        "offset     1.0 MiB into the image",
        "guard      on",
        "snapshots  2",
        "store      8.0 MiB (4.0 MiB copies, 1.0 MiB metadata, 3.0 MiB free)",
        "attached   process 4711, /srv/x",
        "mounted    /srv/x",
        "marked     run this",
    ]
    plain = lines(render.volume_details(volume(store=None, guard=False)))
    assert "store      none" in plain
    assert "guard      off" in plain
    assert "attached   no" in plain


@pytest.mark.usefixtures("in_utc")
def test_show() -> None:
    details = {"version": 1, **snapshot("first", message="a note"), "records": 3, "volume_bytes": 1 << 30}
    assert lines(render.snapshot_details({**details, "block_size": 1024, "added_later": [1, {"a": 2}]})) == [
        "name         first",
        "id           1",
        "created      2026-11-22 10:00:00 +0000",
        "message      a note",
        "kind         manual",
        "consistency  clean",
        "state        ok",
        "used         5.0 MiB (5242880 bytes)",
        "copied       6.0 KiB (6144 bytes)",
        "exclusive    4.0 KiB (4096 bytes)",
        "shared       2.0 KiB (2048 bytes)",
        "records      3",
        "volume       1.0 GiB (1073741824 bytes)",
        "block size   1.0 KiB (1024 bytes)",
        'added later  [1, {"a": 2}]',
    ]


def check(**changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "ok": True,
        "base": {"e2fsck": 0, "ok": True},
        "snapshots": [],
        "store": {"ok": True, "errors": []},
        **changes,
    }


def test_check() -> None:
    snapshots = [
        {"name": "good", "e2fsck": 0, "ok": True, "errors": []},
        {"name": "quick", "e2fsck": None, "ok": True, "errors": []},
        {"name": "bad", "e2fsck": 4, "ok": False, "errors": ["copy of block 7", "Inode 12 is odd"]},
    ]
    base = {"e2fsck": None, "ok": None, "skipped": "mounted at /mnt"}
    assert lines(render.check_table(check(snapshots=snapshots, base=base))) == [
        "PART            E2FSCK  RESULT",
        "base volume          -  skipped",
        "                        mounted at /mnt",
        "store                -  ok",
        "snapshot good        0  ok",
        "snapshot quick       -  ok",
        "snapshot bad         4  damaged",
        "                        copy of block 7",
        "                        Inode 12 is odd",
    ]


def test_dumps() -> None:
    records = [
        {"block": 9, "length": 1, "copy": None, "snapshots": ["a", "b"], "writes": 0},
        {"block": 12345, "length": 16, "copy": 77, "snapshots": ["a"], "writes": 2},
    ]
    assert list(render.dump_lines("records", {"records": records})) == [
        "BLOCK  LENGTH  COPY  SNAPSHOTS  WRITES",
        "    9       1     -  a,b             0",
        "12345      16    77  a               2",
    ]
    assert list(render.dump_lines("log", {"log": []})) == []
    header = {"generation": 4, "extents": [[1, 2]], "owned": {"inode": 12}}
    assert list(render.dump_lines("header", {"header": header})) == [
        "generation  4",
        "extents     [[1, 2]]",
        "owned",
        "  inode  12",
    ]
    runs = {"block": [[1, 100]], "snapshot": [[7, 2], [40, 1]]}
    assert [line.split() for line in render.dump_lines("bitmaps", {"bitmaps": runs})] == [
        ["BITMAP", "START", "LENGTH"],
        ["block", "1", "100"],
        ["snapshot", "7", "2"],
        ["snapshot", "40", "1"],
    ]


@pytest.mark.parametrize(
    "result",
    [
        {"version": 1},
        {"version": 1, "snapshots": []},
        {"version": 1, "snapshots": [snapshot("a"), snapshot("\x1b\u202e\udcff")]},
        {"version": 1, "bitmaps": {"block": [[1, 2], [3, 4]], "snapshot": []}, "empty": {}, "none": None},
        {"version": 1, "store": {"ok": True, "errors": ["a", "b"]}, "features": ["x"], "deep": {"a": {"b": [[1]]}}},
    ],
)
def test_json_is_json_and_safe_on_a_terminal(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    output.emit_json({**result, "notices": ["for stderr"]})
    written = capsys.readouterr().out
    assert json.loads(written) == result
    assert all(line.isascii() and line.isprintable() for line in written.splitlines())
