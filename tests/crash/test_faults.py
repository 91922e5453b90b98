"""A device that fails: the Nth write, punch or flush of a command ends in an error, and nothing else is lost.

The command reports the error; the next command that opens the volume finds every snapshot exact and the command
done or not done: the short form of the campaign.  And a server that goes on after an error, as servers
do, keeps the promises to everybody else: see the last two tests.
"""

from __future__ import annotations

import random
from dataclasses import replace

import lab
import numpy as np
import pytest
from campaigns.faults import CAMPAIGN, replay, tries
from campaigns.power import life_of
from campaigns.recorded import BLOCK, EVERYTHING, Recorded, Step, put_below
from campaigns.report import Report, short_form

from extsnap.blockdev.recording import FaultKind, FaultyDevice, MemoryDevice
from extsnap.errors import ExtsnapError
from extsnap.snapshot.volume import Volume


@pytest.fixture(scope="module", params=["ext2", "ext4"])
def life(request: pytest.FixtureRequest) -> Recorded:
    """A volume's life; the tests take their starting points from it."""
    return life_of(request.param)


def before(life: Recorded, name: str) -> tuple[Step, bytes]:
    """A step and the medium as the step found it."""
    step = next(step for step in life.steps if step.name == name)
    return step, bytes(life.state(step.first, EVERYTHING).content)


@pytest.mark.parametrize("part", CAMPAIGN.parts)
def test_an_operation_that_fails(part: str) -> None:
    short_form(CAMPAIGN, part)


@pytest.mark.parametrize("command", ["growth", "undo", "restore without safety"])
def test_what_a_failed_flush_lost_is_not_believed_by_the_next_process(command: str) -> None:
    """It finds copies in the host's cache that the medium never got, and must not overwrite what they are of."""
    report = Report(CAMPAIGN.name, 0)
    total = tries("ext2")[command, "outlived"]
    for fail_at in range(1, total + 1):
        replay(report, f"ext2:{command}:outlived:{fail_at}")
    assert total > 5
    assert not report.failures, report.failures


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "short"])
def test_a_server_goes_on_after_an_error(life: Recorded, kind: FaultKind) -> None:
    """A failed write or flush is told to whoever asked; asked again it succeeds, and nothing else is harmed."""
    step, content = before(life, "writes")
    for fail_at in range(1, step.last - step.first, 7):
        below = MemoryDevice(content)
        device = FaultyDevice(below, fail_at=fail_at, kind=kind, superblocks=life.superblocks)
        volume = life.opened_serving(below)
        put_below(volume, device)
        base = bytearray(volume.read(0, volume.size))
        rng = random.Random(fail_at)
        blocks = np.flatnonzero(step.before.files).tolist()
        errors = 0
        for number in range(60):
            block, data = rng.choice(blocks), rng.randbytes(BLOCK)
            errors += insist(lambda: volume.write(block * BLOCK, data))  # noqa: B023
            base[block * BLOCK : (block + 1) * BLOCK] = data
            if number % 9 == 8:
                errors += insist(volume.flush)
        errors += insist(volume.flush)
        assert errors == device.failures <= 1
        assert volume.read(0, volume.size) == base
        assert volume.end_serving()
        rested = volume.read(0, volume.size)  # the end gives store blocks back: metadata only
        assert not (lab.unequal(rested, base) & step.before.files).any()
        step_ended = replace(step, after=replace(step.before, base=rested))
        life.judge_content(bytes(below.content), step_ended, base=rested)


def insist(action) -> int:
    """Do it, once more if it fails; returns how often it failed."""
    try:
        action()
    except OSError:
        action()
        return 1
    return 0


@pytest.mark.parametrize("kind", ["EIO", "short"])
def test_a_create_that_failed_while_serving_never_comes_to_be(life: Recorded, kind: FaultKind) -> None:
    """The server goes on without the snapshot that it could not take: no later commit may make it true by half."""
    step, content = before(life, "create while serving")
    total = step.last - step.first
    for fail_at in range(1, total + 1):
        below = MemoryDevice(content)
        volume = life.opened_serving(below)
        device = FaultyDevice(below, fail_at=fail_at, kind=kind, superblocks=life.superblocks)
        put_below(volume, device)
        try:
            volume.create("three")
        except (OSError, ExtsnapError):
            pass
        if not device.failures:
            return  # it took fewer operations than that
        there = {"three": life.view(volume, "three")} if "three" in volume.snapshot_names() else {}
        for view in there.values():
            assert not (lab.unequal(view, step.before.base) & step.before.files).any()
        rng = random.Random(fail_at)
        for block in np.flatnonzero(step.before.files).tolist()[:200:3]:
            volume.write(block * BLOCK, rng.randbytes(BLOCK))
        volume.flush()
        again = volume.create("later")
        assert again.name == "later"
        volume.end_serving()
        later = Volume(MemoryDevice(bytes(below.content)), writable=True)
        wanted = step.before.views | there
        assert set(later.snapshot_names()) == {*wanted, "later"}, f"{kind} at {fail_at}"
        for name, view in wanted.items():
            assert life.view(later, name) == view, f"{kind} at {fail_at}: {name}"
        assert later.verb("check")["store"]["ok"]
