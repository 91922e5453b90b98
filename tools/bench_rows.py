"""What tools/bench measured: rows, the ratios of pairs, the table, the JSON, and the comparison with an older run."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

#: Of the JSON: fields may be added, not renamed.
VERSION = 1


@dataclass
class Row:
    """One measured line of the table.

    Attributes:
        key: Names the row from run to run.
        name: For people.
        unit: Of ``values``; "x" is a ratio.
        values: One a run.
        limit: The goal for the median; None: there is none.
        at_least: Whether more is better; else ``limit`` is the most that is good.
        note: What else there is to say.
        samples: What the values were made from: by contender, one a run.
    """

    key: str
    name: str
    unit: str
    values: list[float]
    limit: float | None = None
    at_least: bool = False
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Of the values; not a number without any."""
        return statistics.median(self.values) if self.values else float("nan")

    @property
    def met(self) -> bool | None:
        """Whether the median is as good as the goal; None without values or goal."""
        if self.limit is None or not self.values:
            return None
        return self.median >= self.limit if self.at_least else self.median <= self.limit

    @property
    def goal(self) -> str:
        """In words."""
        return "-" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """How many times as fast as theirs ours was, pair by pair; both are seconds.

    Raises:
        ValueError: They are no pairs.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} runs and {len(theirs)} are no pairs")
    return [their / our for our, their in zip(ours, theirs, strict=True)]


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The contenders in the order of a turn: each is first, second and last equally often."""
    shift = turn % len(names)
    return [*names[shift:], *names[:shift]]


def pair_rows(
    key: str,
    what: str,
    seconds: Mapping[str, list[float]],
    goals: Mapping[str, float],
    amount: tuple[float, str] | None = None,
) -> list[Row]:
    """A row against each other contender.

    Args:
        key: Of the rows, before the contender's name.
        what: What was done.
        seconds: By contender, "ours" among them; one a run, the same index being one pair.
        goals: By contender, the ratio that is wanted.
        amount: What one run does, and in which unit: for speeds in the note.
    """
    rows = []
    for name, theirs in seconds.items():
        if name == "ours":
            continue
        note = ""
        if amount is not None:
            done, unit = amount
            speeds = {who: done / statistics.median(seconds[who]) for who in ("ours", name)}
            note = f"medians: {speeds['ours']:.0f} against {speeds[name]:.0f} {unit}"
        samples = {who: list(seconds[who]) for who in ("ours", name)}
        values = ratios(seconds["ours"], theirs)
        rows.append(Row(f"{key}/{name}", f"{what}, against {name}", "x", values, goals.get(name), True, note, samples))
    return rows


def table(rows: Iterable[Row]) -> str:
    """The rows as text."""
    lines = [f"{'what':<72} {'median':>9} {'min':>9} {'max':>9} unit  goal          met"]
    for row in rows:
        met = "-" if row.met is None else "yes" if row.met else "NO"
        figures = (row.median, min(row.values), max(row.values)) if row.values else ()
        numbers = " ".join(f"{figure:9.3f}" for figure in figures) or " ".join(["        -"] * 3)
        lines.append(f"{row.name:<72} {numbers} {row.unit:<5} {row.goal:<13} {met}".rstrip())
        if row.note:
            lines.append(f"    {row.note}")
    return "\n".join(lines)


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a table for documents; those of growth are left to the plots."""
    lines = ["| what | median | least | most | goal | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.values and not row.key.startswith("growth/"):
            met = "" if row.met is None else "yes" if row.met else "**no**"
            goal = "" if row.limit is None else row.goal
            figures = " | ".join(f"{figure:.3g}" for figure in (row.median, min(row.values), max(row.values)))
            unit = "" if row.unit == "x" else f" ({row.unit})"
            lines.append(f"| {row.name}{unit} | {figures} | {goal} | {met} |")
    return "\n".join(lines)


def put_between(document: str, marker: str, text: str) -> str:
    """A document with other text between two comments that name ``marker``.

    Raises:
        ValueError: It has no such comments.
    """
    begin, end = f"<!-- {marker}: begin -->\n", f"<!-- {marker}: end -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"the document has no place for {marker}")
    before, _, rest = document.partition(begin)
    return before + begin + text.rstrip("\n") + "\n" + end + rest.partition(end)[2]


def machine() -> dict[str, Any]:
    """Where it was measured, and how busy that was."""
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        pass
    return {
        "processor": model or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": list(os.getloadavg()),
    }


def to_json(rows: Iterable[Row], about: Mapping[str, Any]) -> str:
    """Rows and what is to be known about the run."""
    listed = [{**asdict(row), "median": row.median if row.values else None, "met": row.met} for row in rows]
    return json.dumps({"version": VERSION, **about, "rows": listed}, indent=1)


def from_json(text: str) -> list[Row]:
    """The rows of an older run; fields that are not known here are left out.

    Raises:
        ValueError: It is no such file, or one of a later version.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ValueError(f"not a result of tools/bench, version {VERSION}")
    known = Row.__dataclass_fields__
    return [Row(**{name: value for name, value in row.items() if name in known}) for row in found["rows"]]


def verdict(old: Row, new: Row) -> str:
    """Better or worse only where the two runs' ranges do not even touch: everything else is noise."""
    up = min(new.values) > max(old.values)
    down = max(new.values) < min(old.values)
    if not (up or down):
        return "same"
    return "better" if up == new.at_least else "worse"


def compare(old: Iterable[Row], new: Iterable[Row]) -> str:
    """Rows that both runs have, side by side."""
    before = {row.key: row for row in old if row.values}
    lines = [f"{'what':<72} {'before':>9} {'now':>9} {'now/before':>10}"]
    for row in new:
        was = before.get(row.key)
        if was is None or not row.values:
            continue
        change = row.median / was.median if was.median else float("nan")
        lines.append(f"{row.name:<72} {was.median:9.3f} {row.median:9.3f} {change:10.2f} {verdict(was, row)}")
    return "\n".join(lines) if len(lines) > 1 else "the two runs have no row in common"
