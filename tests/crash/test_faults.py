"""A device that fails: the Nth write, punch or flush of a command ends in an error, and nothing else is lost.

The command reports the error; the next command that opens the volume finds every snapshot exact and the command
done or not done (`campaign` is the judge, as for power cuts).  And a server that goes on after an error, as servers
do, keeps the promises to everybody else: see the last two tests.
"""

from __future__ import annotations

import random
from dataclasses import replace

import lab
import numpy as np
import pytest
from campaign import BLOCK, EVERYTHING, Campaign, Step
from test_power_cut import LIFE, lived

from extsnap.blockdev.recording import FaultKind, FaultyDevice, MemoryDevice
from extsnap.errors import ExtsnapError
from extsnap.snapshot.volume import Volume

#: Failing operations tried in each step, for each kind of fault.
SAMPLES = 6
ACTIONS = dict(LIFE)
COMMANDS = ["first create", "second create", "growth", "delete", "restore", "undo", "delete the rest", "strip"]


@pytest.fixture(scope="module", params=["ext2", "ext4"])
def campaign(request: pytest.FixtureRequest) -> Campaign:
    """A volume's life; the tests take their starting points from it."""
    return lived(request.param)


def before(campaign: Campaign, name: str) -> tuple[Step, bytes]:
    """A step and the medium as the step found it."""
    step = next(step for step in campaign.steps if step.name == name)
    return step, bytes(campaign.state(step.first, EVERYTHING).content)


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "short", "gone"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_meets_an_error(campaign: Campaign, name: str, kind: FaultKind) -> None:
    """An error, and the next command finds everything exact, the failed command done or not done."""
    step, content = before(campaign, name)
    step = campaign.alone(step, content, lambda volume: ACTIONS[name](campaign, volume))
    total = step.last - step.first
    for fail_at in sorted(random.Random(f"{name} {kind}").sample(range(1, total + 1), min(SAMPLES, total))):
        below = MemoryDevice(content)
        device = FaultyDevice(below, fail_at=fail_at, kind=kind, superblocks=campaign.superblocks)
        campaign.time = step.time
        volume = campaign.opened(device)
        with pytest.raises((OSError, ExtsnapError)):
            ACTIONS[name](campaign, volume)
        assert device.failures, "nothing failed"
        try:
            campaign.judge_content(bytes(below.content), step)
        except Exception as error:
            raise AssertionError(f"{campaign.kind}: {name}, {kind} at {fail_at} of {total}: {error}") from error


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "short"])
def test_a_server_goes_on_after_an_error(campaign: Campaign, kind: FaultKind) -> None:
    """A failed write or flush is told to whoever asked; asked again it succeeds, and nothing else is harmed."""
    step, content = before(campaign, "writes")
    for fail_at in range(1, step.last - step.first, 7):
        below = MemoryDevice(content)
        device = FaultyDevice(below, fail_at=fail_at, kind=kind, superblocks=campaign.superblocks)
        volume = campaign.opened_serving(below)
        volume._device = volume.medium.device = volume.require_store().device = device
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
        campaign.judge_content(bytes(below.content), step_ended, base=rested)


def insist(action) -> int:
    """Do it, once more if it fails; returns how often it failed."""
    try:
        action()
    except OSError:
        action()
        return 1
    return 0


@pytest.mark.parametrize("kind", ["EIO", "short"])
def test_a_create_that_failed_while_serving_never_comes_to_be(campaign: Campaign, kind: FaultKind) -> None:
    """The server goes on without the snapshot that it could not take: no later commit may make it true by half."""
    step, content = before(campaign, "create while serving")
    total = step.last - step.first
    for fail_at in range(1, total + 1):
        below = MemoryDevice(content)
        volume = campaign.opened_serving(below)
        device = FaultyDevice(below, fail_at=fail_at, kind=kind, superblocks=campaign.superblocks)
        volume._device = volume.medium.device = volume.require_store().device = device
        try:
            volume.create("three")
        except (OSError, ExtsnapError):
            pass
        if not device.failures:
            return  # it took fewer operations than that
        there = {"three": campaign.view(volume, "three")} if "three" in volume.snapshot_names() else {}
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
            assert campaign.view(later, name) == view, f"{kind} at {fail_at}: {name}"
        assert later.verb("check")["store"]["ok"]
