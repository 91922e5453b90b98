"""Charts with two logarithmic axes, as SVG: a point is the median of its runs, the line through it their range."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

#: Told apart by the colour-blind, and on white and black alike (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, BOTTOM, LINE = 64, 28, 46, 13


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: Above it.
        across, up: What the axes are, with units.
        series: By name, values by position on the axis across, all above zero.
        ticks: Names of positions across; None: powers of ten.
    """

    title: str
    across: str
    up: str
    series: Mapping[str, Mapping[float, Sequence[float]]]
    ticks: Mapping[float, str] | None = None


def number(value: float) -> str:
    """A power of ten, short."""
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:,.0f}" if value >= 1 else f"{value:.10f}".rstrip("0")


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from the last at or below ``low`` to the first at or above ``high``, two at least."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    wide = math.log10(high) - math.log10(low) or 1.0
    return lambda value: start + (math.log10(value) - math.log10(low)) / wide * (stop - start)


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def panel(chart: Panel, left: float) -> list[str]:
    """The elements of one chart, ``left`` pixels in."""
    positions = sorted({at for points in chart.series.values() for at in points})
    values = [value for points in chart.series.values() for runs in points.values() for value in runs]
    marks = decades(min(values), max(values))
    ticks = chart.ticks or {at: number(at) for at in decades(positions[0], positions[-1])}
    across = _scale(min(*ticks, *positions), max(*ticks, *positions), left + LEFT, left + WIDTH - RIGHT)
    top = 34 + LINE * max(1, len(chart.series) - 1)  # below the names of the series
    up = _scale(marks[0], marks[-1], HEIGHT - BOTTOM, top)
    parts = [_text(left + LEFT, 20, chart.title, ' font-weight="bold"')]
    for mark in marks:
        parts.append(
            f'<line x1="{left + LEFT}" x2="{left + WIDTH - RIGHT}" y1="{up(mark):.1f}" y2="{up(mark):.1f}" '
            'stroke="#ddd"/>'
        )
        parts.append(_text(left + LEFT - 6, up(mark) + 4, number(mark), ' text-anchor="end"'))
    for at, name in ticks.items():
        parts.append(_text(across(at), HEIGHT - BOTTOM + 16, name, ' text-anchor="middle"'))
    parts.append(_text(left + (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.across, ' text-anchor="middle"'))
    parts.append(_text(left + LEFT, top - 8, chart.up, ' fill="#555"'))
    for index, (name, points) in enumerate(chart.series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = []
        for at in sorted(points):
            x, y = across(at), up(statistics.median(points[at]))
            path.append(f"{x:.1f},{y:.1f}")
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(min(points[at])):.1f}" y2="{up(max(points[at])):.1f}" '
                f'stroke="{colour}" stroke-width="2"/><circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            )
        parts.append(f'<polyline points="{" ".join(path)}" fill="none" stroke="{colour}"/>')
        legend = left + WIDTH - RIGHT - 4
        parts.append(_text(legend, 20 + LINE * index, name, f' text-anchor="end" fill="{colour}"'))
    return parts


def svg(panels: Sequence[Panel]) -> str:
    """Charts side by side."""
    wide = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{HEIGHT}" viewBox="0 0 {wide} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{wide}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for index, chart in enumerate(panels):
        parts += panel(chart, index * WIDTH)
    return "\n".join([*parts, "</svg>", ""])
