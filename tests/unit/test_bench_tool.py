"""tools/bench: the arithmetic of pairs, goals and comparisons, what it writes, and the plots."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree

import bench_plot
import bench_rows
import bench_served
import pytest
from bench_rows import Row


def test_ratios_are_of_pairs_and_more_is_faster() -> None:
    """Not of medians: what made both slow counts for nothing."""
    assert bench_rows.ratios([1.0, 20.0, 2.0], [2.0, 40.0, 3.0]) == [2.0, 2.0, 1.5]
    with pytest.raises(ValueError, match="no pairs"):
        bench_rows.ratios([1.0], [1.0, 2.0])


def test_every_contender_is_in_every_place_equally_often() -> None:
    """And the turn before the first is not counted."""
    order: list[tuple[int, str]] = []

    def work(name: str, turn: int) -> float:
        order.append((turn, name))
        return turn + ord(name) / 1000

    seconds = bench_served.paired("abc", 6, work)
    assert seconds == {name: [turn + ord(name) / 1000 for turn in range(1, 7)] for name in "abc"}
    counted = [name for turn, name in order if turn]
    for place in range(3):
        assert sorted(counted[place::3]) == sorted("aabbcc")


def test_rows_of_pairs() -> None:
    """One against each other contender, with goals and speeds."""
    seconds = {"ours": [2.0, 4.0, 2.0], "raw": [1.0, 1.0, 1.0], "qcow2": [20.0, 20.0, 18.0]}
    raw, peer = bench_rows.pair_rows("loop/x", "work", seconds, {"raw": 0.5, "qcow2": 9.5}, (100, "a second"))
    assert (raw.key, raw.values, raw.median, raw.goal, raw.met) == (
        *("loop/x/raw", [0.5, 0.25, 0.5], 0.5, ">= 0.5 x", True),
    )
    assert (peer.key, peer.values, peer.median, peer.met) == ("loop/x/qcow2", [10.0, 5.0, 9.0], 9.0, False)
    assert raw.note == "medians: 50 against 100 a second"
    assert peer.samples == {"ours": seconds["ours"], "qcow2": seconds["qcow2"]}


def test_goals_of_times_and_rows_without_any() -> None:
    """Times are met from below."""
    assert Row("a", "a", "s", [0.1, 0.3, 0.2], 0.2).met
    assert Row("a", "a", "s", [0.1, 0.3, 0.21], 0.2).met is False
    assert Row("a", "a", "s", [0.1]).met is None
    assert Row("a", "a", "s", [], 1.0).met is None
    assert math.isnan(Row("a", "a", "s", []).median)


def test_the_json_comes_back() -> None:
    """All of a row, and a field of a later version is no error."""
    rows = [Row("a/b", "name", "x", [1.0, 3.0], 2.0, True, "note", {"ours": [1.0, 1.0]}), Row("c", "c", "s", [])]
    text = bench_rows.to_json(rows, {"machine": bench_rows.machine()})
    assert bench_rows.from_json(text) == rows
    found = json.loads(text)
    assert found["rows"][0]["median"] == 2.0
    assert found["rows"][0]["met"] is True
    found["rows"][0]["later"] = 1
    assert bench_rows.from_json(json.dumps(found)) == rows
    for wrong in ("[]", '{"version": 2, "rows": []}'):
        with pytest.raises(ValueError, match="not a result"):
            bench_rows.from_json(wrong)


@pytest.mark.parametrize(
    ("before", "now", "more_is_better", "verdict"),
    [
        ([1.0, 1.2, 1.1], [1.3, 1.4, 1.5], True, "better"),
        ([1.0, 1.2, 1.1], [1.3, 1.4, 1.5], False, "worse"),
        ([1.0, 1.2, 1.1], [0.7, 0.8, 0.9], True, "worse"),
        ([1.0, 1.2, 1.1], [0.7, 0.8, 0.9], False, "better"),
        ([1.0, 1.2, 1.1], [1.15, 1.9, 1.8], True, "same"),  # the medians are far apart, and the runs overlap
        ([1.0, 1.2, 1.1], [1.2, 1.9, 1.8], True, "same"),
    ],
)
def test_a_comparison_calls_noise_the_same(
    before: list[float], now: list[float], more_is_better: bool, verdict: str
) -> None:
    """Only ranges that do not touch are a change."""
    old, new = (Row("key", "work", "x", values, None, more_is_better) for values in (before, now))
    assert bench_rows.verdict(old, new) == verdict
    assert verdict in bench_rows.compare([old], [new])


def test_a_comparison_takes_rows_by_their_key() -> None:
    """Rows that only one run has are left out."""
    old = [Row("a", "old name", "s", [2.0]), Row("gone", "gone", "s", [1.0])]
    new = [Row("new", "new", "s", [1.0]), Row("a", "new name", "s", [1.0]), Row("gone", "gone", "s", [])]
    text = bench_rows.compare(old, new)
    assert text.splitlines()[1:] == [f"{'new name':<72} {2:9.3f} {1:9.3f} {0.5:10.2f} better"]
    assert bench_rows.compare(old, [Row("b", "b", "s", [1.0])]) == "the two runs have no row in common"


def test_the_table_shows_median_least_and_most() -> None:
    """And dashes where nothing was measured."""
    lines = bench_rows.table([Row("a", "work", "s", [3.0, 1.0, 2.0], 1.0), Row("b", "none", "s", [])]).splitlines()
    assert lines[1].split() == ["work", "2.000", "1.000", "3.000", "s", "<=", "1", "s", "NO"]
    assert lines[2].split() == ["none", "-", "-", "-", "s", "-", "-"]


def test_a_document_gets_the_table() -> None:
    """Growth is left to the plots; what stands around the place stays."""
    rows = [
        Row("a", "work", "x", [3.0, 1.0, 2.0], 2.5, True),
        Row("b", "time", "s", [0.25], 1.0),
        Row("growth/x", "left out", "s", [1.0]),
        Row("c", "empty", "s", []),
    ]
    table = bench_rows.markdown(rows)
    assert table.splitlines()[2:] == [
        "| work | 2 | 1 | 3 | >= 2.5 x | **no** |",
        "| time (s) | 0.25 | 0.25 | 0.25 | <= 1 s | yes |",
    ]
    document = "before\n<!-- it: begin -->\nold\n<!-- it: end -->\nbehind\n"
    assert bench_rows.put_between(document, "it", "new") == document.replace("old", "new")
    with pytest.raises(ValueError, match="no place for other"):
        bench_rows.put_between(document, "other", "new")


def test_plots_have_points_where_the_values_are() -> None:
    """Two decades across and up: twice as far is ten times as much, and the line goes from least to most."""
    series = {"a & b": {1.0: [0.01, 0.02, 0.01], 10.0: [0.1], 100.0: [1.0, 0.1, 1.0]}}
    text = bench_plot.svg([bench_plot.Panel("time < 1", "snapshots", "seconds", series)])
    root = xml.etree.ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    points = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter(f"{space}circle")]
    assert len(points) == 3
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)
    assert points[0][1] > points[2][1]
    ranges = [line for line in root.iter(f"{space}line") if line.get("stroke-width") == "2"]
    assert [float(ranges[2].get(end, "")) for end in ("y1", "y2")] == [points[1][1], points[2][1]]
    words = [element.text for element in root.iter(f"{space}text")]
    assert {"time < 1", "a & b", "snapshots", "seconds", "1", "10", "100", "0.01", "0.1"} <= set(words)


def test_a_plot_names_its_places() -> None:
    """And one point alone can be drawn."""
    chart = bench_plot.Panel("size", "size", "s", {"list": {16281.0: [1.0]}}, {16281.0: "15.9 TiB"})
    text = bench_plot.svg([chart, chart])
    xml.etree.ElementTree.fromstring(text)
    assert text.count("15.9 TiB") == 2
    assert "nan" not in text
    assert "inf" not in text
