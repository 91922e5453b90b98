"""A campaign that finds something says so, and how to find it again; one that tried nothing has failed."""

from __future__ import annotations

import io
import random

import pytest
from campaigns.report import MOST_FAILURES, Campaign, Report, short_form


def campaign(bad: set[int]) -> Campaign:
    def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
        for number in range(cases):
            with report.case(f"{part}:{number}", part):
                assert number not in bad, "lost"

    return Campaign("some", "some cases", ("a", "b"), 10, 40, run, lambda report, token: None)


def test_nothing_found() -> None:
    report = Report("some", 7)
    for part in ("a", "b"):
        campaign(set()).run_part(report, part, 10)
    assert report.summary().startswith("some: 10 cases (5 a, 5 b): nothing lost; seed 7, ")
    short_form(campaign(set()), "a")


def test_a_failure_is_told_with_what_replays_it() -> None:
    out = io.StringIO()
    report = Report("some", 7, out)
    campaign({1}).run_part(report, "b", 10)
    assert [failure.token for failure in report.failures] == ["b:1"]
    assert "1 failed" in report.summary()
    assert "FAILED b:1: AssertionError: lost" in out.getvalue()
    with pytest.raises(AssertionError, match="tools/campaign some --seed 3 --replay b:1"):
        short_form(campaign({1}), "b", seed=3)


def test_it_gives_up_after_some_failures() -> None:
    report = Report("some", 7)
    campaign(set(range(100))).run_part(report, "a", 100)
    assert len(report.failures) == MOST_FAILURES


def test_no_case_is_a_failure() -> None:
    report = Report("some", 7)
    with report.part("a"):
        pass
    assert report.failures


def test_chance_comes_from_the_seed_alone() -> None:
    draws = {Report("some", seed).random(part).random() for seed in (1, 2) for part in ("a", "b")}
    assert len(draws) == 4
    assert Report("some", 1).random("a").random() in draws
