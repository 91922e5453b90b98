"""From a verb's dict to something to look at.

Every text that comes from an image goes through ``safe`` and into a ``rich.text.Text``, never into a
string that rich would read as markup.  Tables are for what a person reads; dumps, which may have millions
of lines, are made line by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from extsnap.cli.units import human_bytes, local_time, safe, size_cell

_STATE_STYLES = {"ok": "green", "tainted": "yellow", "damaged": "bold red"}
# Rows that a dump's column widths are measured on.
_MEASURED_ROWS = 1000


def snapshot_table(result: Mapping[str, Any]) -> Table:
    """Return the table of ``list``.  Kind and state get a column only where there is something to tell."""
    snapshots: list[Mapping[str, Any]] = result["snapshots"]
    with_kind = any(snapshot["kind"] != "manual" for snapshot in snapshots)
    with_state = any(snapshot["state"] != "ok" for snapshot in snapshots)
    table = _table()
    table.add_column("NAME", overflow="fold")
    table.add_column("CREATED", no_wrap=True)
    for header in ("USED", "EXCLUSIVE", "SHARED"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("CONSISTENCY", no_wrap=True)
    if with_kind:
        table.add_column("KIND", no_wrap=True)
    if with_state:
        table.add_column("STATE", no_wrap=True)
    table.add_column("MESSAGE", overflow="fold")
    for snapshot in snapshots:
        cells = [_text(snapshot["name"]), Text(local_time(str(snapshot["created"])))]
        cells += [Text(size_cell(snapshot[key])) for key in ("used_bytes", "exclusive_bytes", "shared_bytes")]
        errors = ", with errors" if snapshot.get("filesystem_errors") else ""
        cells.append(_text(f"{snapshot['consistency']}{errors}"))
        if with_kind:
            cells.append(_text(snapshot["kind"]))
        if with_state:
            cells.append(_state(snapshot["state"]))
        cells.append(_text(snapshot["message"]))
        table.add_row(*cells)
    for column in table.columns:
        if column.no_wrap:  # has one width: told here, because rich asks every cell for two
            column.width = max(map(cell_len, map(str, (column.header, *column.cells))))
    return table


def snapshot_details(result: Mapping[str, Any]) -> Table:
    """Return the lines of ``show``."""
    table = _pairs()
    known = {
        "name": _text,
        "id": _text,
        "created": _moment,
        "message": _text,
        "kind": _text,
        "consistency": _text,
        "state": _state,
        "restored_from": _text,
        "used_bytes": _size,
        "copied_bytes": _size,
        "exclusive_bytes": _size,
        "shared_bytes": _size,
        "records": _text,
        "volume_bytes": _size,
        "block_size": _size,
    }
    for key, cell in known.items():
        if result.get(key) is not None:
            table.add_row(_label(key), cell(result[key]))
    _add_others(table, result, known)
    return table


def volume_details(result: Mapping[str, Any]) -> Table:
    """Return the lines of ``info``."""
    table = _pairs()
    block_size = int(result["block_size"])
    blocks, free = int(result["blocks"]), int(result["free_blocks"])
    table.add_row("type", _text(result["type"]))
    table.add_row("uuid", _text(result["uuid"]))
    table.add_row("label", _text(result["label"]))
    table.add_row("features", _text(" ".join(str(feature) for feature in result["features"])))
    if result.get("state"):
        table.add_row("state", _text(result["state"]))
    table.add_row("size", Text(f"{human_bytes(blocks * block_size)} ({blocks} blocks of {human_bytes(block_size)})"))
    table.add_row("free", Text(f"{human_bytes(free * block_size)} ({free} blocks)"))
    table.add_row("inodes", Text(f"{result['inodes']}, {result['free_inodes']} free"))
    table.add_row("groups", _text(result["groups"]))
    if result.get("partition"):
        table.add_row("partition", _text(result["partition"]))
    if result.get("offset"):
        table.add_row("offset", Text(f"{human_bytes(result['offset'])} into the image"))
    table.add_row("guard", _text(result["guard"]))
    table.add_row("snapshots", _text(result["snapshots"]))
    store = result.get("store")
    if store is None:
        table.add_row("store", Text("none"))
    else:
        parts = ", ".join(
            f"{human_bytes(store[key])} {word}"
            for key, word in (("copy_bytes", "copies"), ("metadata_bytes", "metadata"), ("free_bytes", "free"))
        )
        table.add_row("store", Text(f"{human_bytes(store['bytes'])} ({parts})"))
        if store.get("room_bytes") is not None:
            mark = f", {safe(store['watermark'])}" if store.get("watermark") else ""
            table.add_row("room for copies", Text(f"{human_bytes(store['room_bytes'])}{mark}"))
    for name, value in sorted((result.get("properties") or {}).items()):
        table.add_row(safe(name), _text(value))
    for gone in result.get("dropped") or ():
        when = Text(" to make room, ").append_text(_moment(gone["dropped"]))
        table.add_row("dropped", _text(gone["name"]).append_text(when))
    attached = result.get("attached")
    if attached is None:
        table.add_row("attached", Text("no"))
    else:
        where = Text(f"process {safe(attached.get('pid'))}, {safe(attached.get('directory'))}")
        table.add_row("attached", where)
        for path in attached.get("mounts") or ():
            table.add_row("mounted", _text(_mount_text(path)))
    known = {
        "type", "uuid", "label", "features", "state", "block_size", "blocks", "free_blocks", "inodes", "free_inodes",
        "groups", "partition", "offset", "guard", "snapshots", "store", "attached", "properties", "dropped",
    }  # fmt: skip
    _add_others(table, result, known)
    return table


#: Of the files that damage belongs to.
_AFFECTED_SHOWN = 20


def check_table(result: Mapping[str, Any]) -> Table:
    """Return the table of ``check``: one line a part, the errors under it."""
    table = _table()
    table.add_column("PART", overflow="fold")
    table.add_column("E2FSCK", justify="right", no_wrap=True)
    table.add_column("RESULT", overflow="fold")
    parts: list[tuple[Text, Mapping[str, Any]]] = [
        (Text("base volume"), result["base"]),
        (Text("store"), result["store"]),
    ]
    parts += [(Text.assemble("snapshot ", _text(snapshot["name"])), snapshot) for snapshot in result["snapshots"]]
    for name, part in parts:
        status = part.get("e2fsck")
        errors = [_text(error) for error in part.get("errors") or ()]
        if part["ok"] is None:
            verdict = Text("skipped", style="yellow")
            if part.get("skipped"):
                errors.append(_text(part["skipped"]))
        else:
            verdict = _state("ok" if part["ok"] else "damaged")
        if part.get("files") or part.get("structures"):
            errors += _affected(part)
        if part.get("errors_then"):
            errors.append(Text("as it was: the filesystem was marked with errors at that moment"))
            errors += [_text(line) for line in part["errors_then"]]
        if count := part.get("open_unlinked"):
            errors.append(Text(f"{count} file{'s' if count != 1 else ''} open and unlinked at that moment"))
        table.add_row(name, Text("-" if status is None else safe(status)), Text("\n").join([verdict, *errors]))
    return table


def _affected(part: Mapping[str, Any]) -> list[Text]:
    """What the damaged blocks belong to: some names, and how many more (--json has all)."""
    lines = []
    for title, names in (
        ("in", part.get("files") or []),
        ("in the filesystem's", part.get("structures") or []),
    ):
        lines += [Text.assemble(f"{title}: ", _text(name)) for name in names[:_AFFECTED_SHOWN]]
        if len(names) > _AFFECTED_SHOWN:
            lines.append(Text(f"{title}: {len(names) - _AFFECTED_SHOWN} more"))
    return lines


def dump_lines(what: str, result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of ``dump``: fields, aligned columns, or for the bitmaps runs of blocks.

    Args:
        what: The structure's name, and the key of it in ``result``.
        result: The verb's dict.
    """
    content = result[what]
    if what == "bitmaps":
        yield f"{'BITMAP':<8}  {'START':>12}  {'LENGTH':>12}"
        for name, runs in content.items():
            for start, length in runs:
                yield f"{safe(name):<8}  {start:>12}  {length:>12}"
    elif isinstance(content, Mapping):
        yield from _field_lines(content)
    else:
        yield from _column_lines(content)


def _field_lines(fields: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(str(key)) for key in fields), default=0)
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{safe(key)}"
            yield from _field_lines(value, indent + "  ")
        else:
            yield f"{indent}{safe(key):<{width}}  {_plain(value)}".rstrip()


def _column_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in islice(rows, _MEASURED_ROWS) for key in row))
    measured = [[_plain(row.get(key)) for key in columns] for row in islice(rows, _MEASURED_ROWS)]
    widths = [max(len(key), *(len(line[place]) for line in measured)) for place, key in enumerate(columns)]
    # A column lies to the right if its first value that is there is a number.
    right = [isinstance(next((row[key] for row in rows if row.get(key) is not None), None), int) for key in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if on_right else cell.ljust(width)
            for cell, width, on_right in zip(cells, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    yield line([safe(key).upper() for key in columns])
    for row in rows:
        yield line([_plain(row.get(key)) for key in columns])


def _plain(value: Any) -> str:
    """A value in a dump: text as it is, anything nested as JSON on one line, nothing as ``-``."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(safe(item) for item in value) or "-"
    if isinstance(value, Mapping | list):
        return safe(json.dumps(value))
    return safe(value)


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def _pairs() -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _add_others(table: Table, result: Mapping[str, Any], known: Mapping[str, Any] | set[str]) -> None:
    """Add the fields that a later version of the layer below brings: nothing it says is left out."""
    for key, value in result.items():
        if key not in known and key not in {"version", "notices"} and value is not None:
            table.add_row(_label(key), Text(_plain(value)))


def _label(key: str) -> Text:
    return Text(safe(key.removesuffix("_bytes").replace("_", " ")))


def _text(value: object) -> Text:
    if isinstance(value, bool):
        return Text("on" if value else "off")
    return Text(safe(value))


def _moment(value: object) -> Text:
    return Text(local_time(str(value), zone=True))


def _size(value: int) -> Text:
    return Text(f"{human_bytes(value)} ({value} bytes)" if abs(value) >= 1024 else human_bytes(value))


def _state(value: object) -> Text:
    text = safe(value)
    return Text(text, style=_STATE_STYLES.get(text, ""))


def _mount_text(mount: object) -> str:
    """A mount is a path, or a dict that has one."""
    if isinstance(mount, Mapping):
        return ", ".join(f"{key} {value}" for key, value in mount.items())
    return str(mount)
