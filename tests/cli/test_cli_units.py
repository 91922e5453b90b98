"""Sizes, times and foreign text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extsnap.cli.units import human_bytes, local_time, safe, size_cell


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 20, "1.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 60, "1.0 EiB"),
        (1 << 72, "4096.0 EiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_units_of_a_column_have_one_width() -> None:
    cells = [size_cell(count) for count in (0, 900, 4096, 3 << 20, 7 << 30)]
    assert cells == ["0   B", "900   B", "4.0 KiB", "3.0 MiB", "7.0 GiB"]


@given(st.integers(min_value=0, max_value=1 << 62))
def test_no_size_is_rounded_to_1024_of_a_unit(count: int) -> None:
    assert float(human_bytes(count).split()[0]) < 1024


def test_times_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XXX-05:30")
        time.tzset()
        assert local_time("2026-11-22T10:00:00Z") == "2026-11-22 15:30:00"
        assert local_time("2026-11-22T10:00:00.250Z", zone=True) == "2026-11-22 15:30:00 +0530"
    time.tzset()


@pytest.mark.parametrize("text", ["", "yesterday", "9999999-01-01", "\x1b[31m2026"])
def test_what_is_no_time_is_shown_escaped(text: str) -> None:
    assert local_time(text) == safe(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("größe 日本語 🙂", "größe 日本語 🙂"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31m", "\\x9b31m"),
        ("abc\u202egpj", "abc\\u202egpj"),
        ("line\u2028line", "line\\u2028line"),
        ("\udcff", "\\udcff"),
        ("\x7f\x00", "\\x7f\\x00"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        (7, "7"),
    ],
)
def test_foreign_text_cannot_act(text: object, shown: str) -> None:
    assert safe(text) == shown


@given(st.text(st.characters()))
def test_safe_text_is_printable(text: str) -> None:
    assert safe(text).isprintable()
    if text.isprintable():
        assert safe(text) == text
