"""What the store remembers about how it is to behave, and what it did by itself: ``set``, ``guard``, dropped snapshots.

All of it is in the root: the flag GUARD, and the section PROPERTIES (docs/FORMAT.md, 3).

What is durable when: one header commit changes a setting; a crash before it leaves the old one, after it the new one.
The guard is in the superblocks too: the dirty mark is on while they and the header differ, and where an image carries
the mark, the next command that writes makes the superblocks say what the header says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from extsnap.errors import ExtsnapError
from extsnap.snapshot import format as fmt
from extsnap.snapshot.root import Root

if TYPE_CHECKING:
    from extsnap.snapshot.volume import Volume

ON_FULL = "on-full"
REFUSE, DROP_OLDEST = "refuse", "drop-oldest"
#: What ``set`` takes: each property with its values, the default first.
PROPERTIES = {ON_FULL: (REFUSE, DROP_OLDEST)}
#: Key of the list of snapshots that made room for writes, and how many of them are remembered.
_DROPPED = "dropped"
_DROPPED_MAX = 8


def properties(root: Root | None) -> dict[str, str]:
    """Every property with its value; of a volume without a store the defaults."""
    stored = root.properties if root is not None else {}
    return {name: stored[name] if stored.get(name) in values else values[0] for name, values in PROPERTIES.items()}


def validate(values: dict[str, str]) -> None:
    """Refuse what is no property, and values that it cannot have.

    Raises:
        ExtsnapError: Names those that there are.
    """
    for name, value in values.items():
        if name not in PROPERTIES:
            raise ExtsnapError(f"there is no property {name!a}", hint=f"it can be: {', '.join(sorted(PROPERTIES))}")
        if value not in PROPERTIES[name]:
            raise ExtsnapError(f"{name} cannot be {value!a}", hint=f"it can be: {', '.join(PROPERTIES[name])}")


def set_properties(volume: Volume, values: dict[str, str]) -> None:
    """Change properties; durable on return.  A volume without a store gets one.

    Raises:
        ExtsnapError: No such property or value, or the volume cannot have a store; nothing was changed.
    """
    validate(values)
    if {name: properties(volume.store.root if volume.store else None)[name] for name in values} == values:
        return
    with volume.changing() as store:
        store.root.properties |= values
        store.commit()


def set_guard(volume: Volume, wanted: bool) -> None:
    """Remember whether an image with snapshots is to be guarded at rest, and guard it or not; durable on return."""
    if volume.store is not None and bool(volume.store.root.flags & fmt.SlotFlags.GUARD) == wanted:
        return
    with volume.changing() as store:
        if volume.snapshot_list():
            volume.set_mark(True)
        store.root.flags = store.root.flags | fmt.SlotFlags.GUARD if wanted else store.root.flags & ~fmt.SlotFlags.GUARD
        store.commit()


def note_dropped(root: Root, gone: Iterable[fmt.Snapshot], now_ns: int) -> None:
    """Remember snapshots that make room for a write; true with the commit that deletes them."""
    listed = [*dropped(root), *([entry.id, entry.name, entry.created_ns, now_ns] for entry in gone)]
    # No more than a few: the root is small.  Escaped: no name may break the lines of the section.
    root.properties[_DROPPED] = json.dumps(listed[-_DROPPED_MAX:], separators=(",", ":"))


def dropped(root: Root) -> list[tuple[int, str, int, int]]:
    """(id, name, created, dropped) of the last snapshots that made room for a write, times in nanoseconds."""
    try:
        listed = json.loads(root.properties.get(_DROPPED, "[]"))
        return [(int(number), str(name), int(created), int(when)) for number, name, created, when in listed]
    except (ValueError, TypeError, RecursionError):  # of a later version: worth no more than a blank
        return []
