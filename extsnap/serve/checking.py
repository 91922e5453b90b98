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
from extsnap.errors import ExtsnapError, NeedsRecovery, StoreDamaged
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.locate import Place
from extsnap.ext.owners import owners_of
from extsnap.serve import control, live, moment, remote, session, tools
from extsnap.serve.contract import EngineVolume, load_factory
from extsnap.serve.control import ControlClient
from extsnap.serve.session import key_of, place_of
from extsnap.serve.starting import layer_at_rest, served_for_reading


def check(image: str, names: Sequence[str] = (), quick: bool = False, partition: int | None = None) -> dict[str, Any]:
    """Check the store, the base volume and the views.

    What is damaged is noted in the image, if it can be written: as states of the snapshots, and by writing again what
    has a whole second copy.  Nothing else is changed.

    Args:
        image: Path of the image.
        names: The snapshots to check, or all.
        quick: Without e2fsck on the views.
        partition: Number of the partition; None and 0 as `locate` takes them.

    Returns:
        The object of ``check --json``.  ``e2fsck`` is None where it was not run: for views with ``quick``, and
        for a base volume in use of which no snapshot could be taken (whose ``ok`` is then None, with a ``skipped``
        that says why).

    Raises:
        SnapshotNotFound: A name that is none.
        NeedsRecovery: The image carries the dirty mark and nobody serves it.
    """
    place = place_of(image, partition)
    served = control.connect(key_of(place))
    if served is not None:
        client, hello = served
        with client:
            found = selected(remote.check(client, list(names)), names)
            base = served_base(client, hello["directory"])
            done = report(found, base, (client, hello["directory"]), client.call("info"), fsck=not quick)
            note(done, found, lambda **states: client.call("note_check", **states))
            return done
    try:
        with _opened(place, image, writable=False) as at_rest:
            about = at_rest.verb("info")
            if at_rest.needs_replay or about.get("marked"):
                raise NeedsRecovery(
                    f"{place.name} was not closed cleanly and must be recovered before it can be checked",
                    hint=f"run extsnap run {place.name} -- e2fsck -fy {{}}",
                )
            found = selected(at_rest.verb("check", names=list(names)), names)
    except StoreDamaged as error:
        # Not even the list of the snapshots can be read, whatever copy: that is what there is to say.
        lost = {"store": {"ok": False, "errors": [error.message]}, "snapshots": {}}
        base = {"e2fsck": None, "ok": None, "skipped": "the store cannot be opened"}
        if not place.partition:  # a partition can only be seen as a volume through its server
            base = moment.check_base(image, lambda: contextlib.nullcontext(os.devnull))
        return report(lost, base, None, {}, fsck=False)
    damaged = any(entry.get("blocks") for entry in found["snapshots"].values())
    if not damaged and (quick or not found["snapshots"]) and not place.partition:
        base = moment.check_base(image, lambda: layer_at_rest(place))
        done = report(found, base, None, about, fsck=False)
    else:
        with served_for_reading(place) as server:
            # A partition can only be seen as a volume through its server; so can the files of a snapshot.
            base = moment.check_base(
                server.file() if place.partition else image, lambda: remote.scratch(server.keeper, server.directory)
            )
            done = report(found, base, (server.keeper, server.directory), about, fsck=not quick)
    if not about.get("outside_write"):
        note(done, found, lambda **states: _noted(place, image, states))
    return done


def _opened(place: Place, image: str, *, writable: bool) -> EngineVolume:
    return load_factory(session.FACTORY)(image, writable=writable, partition=place.partition)


def _noted(place: Place, image: str, states: dict[str, Any]) -> dict[str, Any]:
    with _opened(place, image, writable=True) as volume:
        return volume.verb("note_check", **states)


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
