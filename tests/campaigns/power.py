"""Power cuts: every write and barrier that reached the medium is recorded, and the record is cut.

Two kinds of parts.  ``ext2``, ``ext3`` and ``ext4`` are the life of a volume, every command in it (`life`), cut after
every operation and with any subset of the unsynced sectors, judged by `recorded`.  ``kernel-*`` are sessions of the
kernel above a served volume with a record underneath (`kernel`).

A token is ``PART:POINT:SEED``, with ``:again`` behind it if the recovery was cut as well.
"""

from __future__ import annotations

import functools
import random

from campaigns import kernel
from campaigns.life import EVERY_OPERATION, NOT_OURS, lived, small_hold
from campaigns.recorded import EVERYTHING, NOTHING, Recorded
from campaigns.report import Campaign, Report

#: One in so many recoveries is cut itself.
AGAIN = 16
LIVES = ("ext2", "ext3", "ext4")
PARTS = (*LIVES, *kernel.PARTS)
#: Cases of a part from which on every operation is cut.
THOROUGH = 1000
#: Which operations a life has in the short form.  ext3 has none: it has ext4's journal and ext2's maps.
TURNS = {"ext2": 0, "ext4": 1}


@functools.cache
def life_of(kind: str) -> Recorded:
    """A life, recorded once."""
    with small_hold():
        return lived(kind)


def judged_points(life: Recorded) -> list[int]:
    """Cuts that are judged: all but those in the middle of somebody else's write."""
    ours = [step for step in life.steps if step.name not in NOT_OURS]
    return [point for step in ours for point in range(step.first + 1, step.last + 1)]


def every_operation(life: Recorded, *, thorough: bool) -> list[int]:
    """Cuts after every operation: media on which is all that was issued, among them all with just what was flushed.

    In the short form two thirds of the operations are left out where other steps have the same kind, and ext2 and
    ext4, whose lives have the same steps, take turns.
    """
    points = []
    turns = 1 if thorough else len(TURNS)
    for step in life.steps:
        if step.name in NOT_OURS:
            continue
        stride = 1 if thorough or step.name in EVERY_OPERATION else 3
        first = step.first + 1 + TURNS.get(life.kind, 0) % turns
        for point in {*range(first, step.last + 1, stride * turns), step.last}:
            # A barrier changes nothing on this medium, only what a session may expect of it, and that a command ended.
            if step.events or life.device.log[point - 1].kind != "flush" or point == step.last:
                points.append(point)
    return sorted(points)


def sampled(life: Recorded, count: int, rng: random.Random) -> list[tuple[int, int, bool]]:
    """(point, seed, whether the recovery is cut as well) of media with some of the unsynced sectors."""
    points = judged_points(life)
    return [(rng.choice(points), rng.getrandbits(32), number % AGAIN == 0) for number in range(count)]


def between_slots(life: Recorded, count: int) -> list[tuple[int, int, bool]]:
    """A cut between the two slots of a header commit, and another one soon after: the newer slot must not be lost."""
    judged = set(judged_points(life))
    points = [point for point in life.half_committed() if point in judged]
    return [(point, NOTHING, True) for point in points[:: max(1, len(points) // max(1, count))]]


def _judge(report: Report, life: Recorded, point: int, seed: int, again: bool) -> None:
    token = f"{life.kind}:{point}:{seed}" + (":again" if again else "")
    what = "second cuts" if again else "whole prefixes" if seed == EVERYTHING else "subsets of sectors"
    with report.case(token, what), small_hold():
        # A life in memory is at its end: its clock and volume are not used by the judge.
        life.judge(life.state(point, seed), nested=random.Random(seed) if again else None, variants=3 if again else 1)


def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
    """Cut a life after every operation, and at random; or a session of the kernel at random."""
    if part in kernel.PARTS:
        kernel.run(report, part, cases, rng)
        return
    life = life_of(part)
    plan = sampled(life, cases, rng) + between_slots(life, cases // 24)
    if part in TURNS or cases >= THOROUGH:
        plan += [(point, EVERYTHING, False) for point in every_operation(life, thorough=cases >= THOROUGH)]
    for point, seed, again in sorted(plan):  # in the order of the record: it is played once
        _judge(report, life, point, seed, again)


def replay(report: Report, token: str) -> None:
    """One medium again."""
    part, point, seed, *again = token.split(":")
    if part in kernel.PARTS:
        kernel.replay(report, part, int(point), int(seed))
    else:
        _judge(report, life_of(part), int(point), int(seed), bool(again))


CAMPAIGN = Campaign(
    "power", "power cuts after any operation, with any unsynced sectors lost", PARTS, 420, 10500, run, replay, True
)
