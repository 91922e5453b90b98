"""Numbers, times and foreign text as people read them.

JSON carries bytes and ISO 8601 UTC; what is here is only for the eye.
"""

from __future__ import annotations

from datetime import datetime

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_bytes(count: int) -> str:
    """Return ``count`` bytes in the largest binary unit that leaves at least 1: ``1.5 MiB``, ``512 B``."""
    number, unit = _scaled(count)
    return f"{number} {unit}"


def size_cell(count: int) -> str:
    """The same for a right-aligned column: units padded to one width, so that the numbers line up."""
    number, unit = _scaled(count)
    return f"{number} {unit:>3}"


def _scaled(count: int) -> tuple[str, str]:
    if abs(count) < 1024:
        return str(count), _UNITS[0]
    value = float(count)
    for unit in _UNITS[1:]:
        value /= 1024
        # 1023.95 KiB and more would be rounded to 1024.0: that is 1.0 of the next unit.
        if abs(value) < 1023.95 or unit == _UNITS[-1]:
            return f"{value:.1f}", unit
    raise AssertionError("the last unit takes everything")


def local_time(iso: str, *, zone: bool = False) -> str:
    """Return an ISO 8601 UTC time as local time to the second; text that is no such time is shown escaped.

    Args:
        iso: As in JSON: ``2026-11-22T10:00:00Z``.
        zone: Add the offset from UTC.
    """
    try:
        moment = datetime.fromisoformat(iso).astimezone()
    except (ValueError, OverflowError, OSError):
        return safe(iso)
    return moment.strftime("%Y-%m-%d %H:%M:%S %z" if zone else "%Y-%m-%d %H:%M:%S")


def safe(text: object) -> str:
    r"""Return text that cannot move the cursor, change colours, break the line or turn the reading direction.

    Names, messages and labels come from an image that somebody else may have made.  Whatever is not
    printable (control and format characters, line separators, lone surrogates) is written as Python
    would write it: ``\n``, ``\x1b``, ``\u202e``.  JSON output has the exact text.
    """
    string = str(text)
    if string.isprintable():
        return string
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in string
    )
