"""``check``: what the store found, e2fsck's verdicts, and the names of the files that are affected."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from extsnap.arrays import distinct, expand
from extsnap.blockdev.image import ImageFile
from extsnap.errors import ExtsnapError
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.owners import owners_of
from extsnap.serve import live, moment, remote, tools
from extsnap.serve.control import ControlClient


def selected(report: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The store's own findings, for the named snapshots only."""
    snapshots = {str(found["name"]): found for found in report.get("snapshots", [])}
    wanted = {name: snapshots[name] for name in names} if names else snapshots
    return {"store": report["store"], "snapshots": wanted}


def report(
    found: dict[str, Any],
    base: dict[str, Any],
    served: tuple[ControlClient, str] | None,
    about: dict[str, Any],
    *,
    fsck: bool,
) -> dict[str, Any]:
    """The object of ``check --json``.

    Args:
        found: What `selected` gave.
        base: The verdict on the base volume.
        served: A server of the snapshots and its directory; None: there is none.
        about: What the verb ``info`` gave.
        fsck: Run e2fsck on the snapshots.
    """
    entries = []
    for name, mine in found["snapshots"].items():
        status: int | None = None
        entry: dict[str, Any] = {"name": name}
        errors = list(mine.get("errors", []))
        path = os.path.join(served[1], "snapshots", name) if served is not None else ""
        if mine.get("blocks"):
            entry["blocks"] = mine["blocks"]
            if path:
                entry.update(affected(path, mine["blocks"]))
        if fsck and served is not None:
            status, complaints, open_unlinked = moment.judge(
                path, functools.partial(remote.scratch, *served, name), crash=mine.get("consistency") == "crash"
            )
            if complaints and mine.get("filesystem_errors"):
                entry["errors_then"] = complaints  # the volume's then: the snapshot shows them as they were
            else:
                errors += complaints
            if open_unlinked:
                entry["open_unlinked"] = open_unlinked
        entries.append({**entry, "e2fsck": status, "ok": not errors, "errors": errors})
    store = {"ok": bool(found["store"]["ok"]), "errors": list(found["store"].get("errors", []))}
    fine = store["ok"] and base["ok"] is not False and all(entry["ok"] for entry in entries)
    return {
        "version": 1,
        "ok": bool(fine),
        "state": about.get("state"),
        "base": base,
        "snapshots": entries,
        "store": store,
        "notices": list(about.get("notices", [])),
    }


def served_base(client: ControlClient, directory: str) -> dict[str, Any]:
    """Judge the base volume of a server, or, where somebody writes to it, a snapshot of it for that time."""
    base = client.call("server.provision").get("in_use")
    if base is None:
        return moment.check_base(os.path.join(directory, "volume"), lambda: remote.scratch(client, directory))
    try:
        with live.temporary(client, directory, "check") as made:
            name, crash = str(made["name"]), made.get("consistency") == "crash"
            view = os.path.join(directory, "snapshots", name)
            return moment.check_base(view, functools.partial(remote.scratch, client, directory, name), crash=crash)
    except (ExtsnapError, OSError) as error:
        return {"e2fsck": None, "ok": None, "skipped": f"{base} is in use, and {error}"}


def note(done: dict[str, Any], found: dict[str, Any], keep: Callable[..., dict[str, Any]]) -> None:
    """Have the image keep what was found, where it says otherwise; what was done, or why it was not, is a notice.

    Args:
        done: The report, which gets the notices.
        found: What `selected` gave.
        keep: Calls the verb ``note_check``.
    """
    snapshots = found["snapshots"]
    damaged = [name for name, mine in snapshots.items() if mine.get("errors") and mine.get("state") != "damaged"]
    sound = [name for name, mine in snapshots.items() if not mine.get("errors") and mine.get("state") == "damaged"]
    proven = [
        name
        for name, mine in snapshots.items()
        if mine.get("proven") and not mine.get("errors") and mine.get("state") != "ok"
    ]
    if not damaged and not sound and not proven and not found["store"].get("worn"):
        return
    try:
        mended = keep(damaged=damaged, sound=sound, proven=proven)["mended"]
    except (ExtsnapError, OSError) as error:
        done["notices"].append(f"what was found is not noted in the image: {error}")
    else:
        done["mended"] = mended
        done["notices"] += [f"{what}; it was written again" for what in mended]


def affected(path: str, runs: list[list[int]]) -> dict[str, Any]:
    """What of a served snapshot has the blocks of ``runs`` [first, length]: ``files``, and ``structures`` in words."""
    starts, lengths = np.array(runs, np.int64).T
    try:
        with contextlib.closing(ImageFile(path, lock="none")) as device:
            fs = Filesystem.open(device)
            found = owners_of(fs, distinct(expand(starts, lengths)))
            standing = expand(found.tables[:, 0], found.tables[:, 1])
    except (ExtsnapError, OSError) as error:
        return {"files": [], "structures": [f"the filesystem cannot be read: {error}"]}
    names = _paths(path, np.union1d(found.inodes, standing).tolist())
    files = [names.get(number, [f"inode {number}"]) for number in found.inodes.tolist()]
    files += [names[number] for number in np.setdiff1d(standing, found.inodes).tolist() if number in names]
    return {"files": sorted({name for several in files for name in several}), "structures": found.structures}


#: Inodes without a name, or whose name ncheck does not tell.
_NAMELESS = {2: "/", 7: "the resize inode", 8: "the journal"}
#: Inodes of one call of debugfs.
_NCHECK_INODES = 500


def _paths(path: str, inodes: list[int]) -> dict[int, list[str]]:
    """Paths by inode; by debugfs, which walks the directories once for many."""
    names = {number: [_NAMELESS[number]] for number in inodes if number in _NAMELESS}
    asked = [number for number in inodes if number not in _NAMELESS]
    for low in range(0, len(asked), _NCHECK_INODES):
        request = " ".join(map(str, asked[low : low + _NCHECK_INODES]))
        done = tools.run("debugfs", "-R", f"ncheck {request}", path, ok=None)
        for number, name in re.findall(r"^(\d+)\t/*(/.*)$", done.stdout, re.MULTILINE):
            names.setdefault(int(number), []).append(name)
    return names
