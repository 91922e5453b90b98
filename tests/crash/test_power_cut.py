"""Power cuts: the short form of the campaign, and lives of a few commands, cut everywhere."""

from __future__ import annotations

import random

import pytest
from campaigns.life import lived
from campaigns.power import CAMPAIGN, LIVES, judged_points
from campaigns.recorded import EVERYTHING, NOTHING, SLOT_MAGIC
from campaigns.report import short_form

#: Lives in which a rule on the order of writes is needed soon, each for the sabotages that break such a rule.
SHORT_LIVES = {
    "writes": ["first create", "begin serving", "writes"],
    "guard": ["first create", "guard off"],
    "growth": ["first create", "growth"],
    "move": ["first create", "growth", "move"],
    "accept": ["first create", "written outside, journal", "accept, journal"],
}


@pytest.mark.parametrize("name", SHORT_LIVES)
def test_a_short_life(name: str) -> None:
    """The last command of it: cut after each operation, with all, nothing, or some of what was not flushed."""
    life = lived("ext4", SHORT_LIVES[name])
    rng = random.Random(name)
    last = life.steps[-1]
    points = [point for point in judged_points(life) if point > last.first]
    points = sorted({*points[:: -(-len(points) // 10)], *points[-2:]})
    for point in points:
        for seed in (NOTHING, EVERYTHING, rng.getrandbits(32), rng.getrandbits(32)):
            life.judge(life.state(point, seed))


def test_cuts_around_the_slots_of_a_header() -> None:
    """Just after a slot, with some of what came before it; between two slots, and then again in what follows."""
    life = lived("ext4", ["first create", "begin serving", "writes", "end serving", "second create"])
    rng = random.Random("slots")
    log, last = life.device.log, life.steps[-1]
    slots = [at + 1 for at in range(last.first, last.last) if log[at].data[: len(SLOT_MAGIC)] == SLOT_MAGIC]
    assert slots
    for point in slots:
        for seed in [rng.getrandbits(32) for _ in range(8)]:
            life.judge(life.state(point, seed))
    for point in [point for point in life.half_committed() if point > last.first]:
        life.judge(life.state(point, NOTHING), nested=rng, variants=3)


@pytest.mark.parametrize("part", LIVES)
def test_a_life_that_is_cut(part: str) -> None:
    short_form(CAMPAIGN, part)


@pytest.mark.system
@pytest.mark.parametrize("part", [part for part in CAMPAIGN.parts if part not in LIVES])
def test_a_kernel_that_is_cut_off(part: str) -> None:
    short_form(CAMPAIGN, part)
