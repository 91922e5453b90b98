"""Power cuts: after every operation of a volume's life, and with any subset of the unsynced sectors.

The judge is in `campaign`; a failure prints kind, point and seed, and ``--crash-replay KIND:POINT:SEED`` judges that
one medium again.  ``EXTSNAP_CRASH_STATES=5000`` (or ``--crash-states``) samples more, ``--crash-seed`` others.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import lab
import numpy as np
import pytest
from campaign import BLOCK, EVERYTHING, NOTHING, Campaign, repaired

from extsnap.snapshot import edit
from extsnap.snapshot.store import SLOT_BLOCKS
from extsnap.snapshot.volume import Volume

SECTOR_BYTES = 512


def blocks_of_files(campaign: Campaign) -> list[int]:
    """Data blocks of files, in an order by chance that is the same every time."""
    blocks = np.flatnonzero(lab.survey(campaign.volume.read(0, campaign.volume.size)).files).tolist()
    campaign.random.shuffle(blocks)
    return blocks


def session_of_writes(campaign: Campaign) -> None:
    """Random overwrites with flushes between, of whole blocks, parts, the same block twice, and a punch."""
    rng = campaign.random
    blocks = blocks_of_files(campaign)
    for number in range(10):
        for block in blocks[number * 5 : number * 5 + 5]:
            skip = rng.choice([0, 0, 0, 100, SECTOR_BYTES])
            campaign.write(block * BLOCK + skip, rng.randbytes(BLOCK - skip))
        if number % 3 == 1:
            campaign.write(blocks[number * 5] * BLOCK, rng.randbytes(BLOCK))
        if number == 4:
            campaign.punch(blocks[40] * BLOCK, BLOCK)
        if number % 2:
            campaign.flush()


def kernel_session(campaign: Campaign) -> None:
    """What a kernel does to a served volume: mount, a transaction in the journal, checkpoint, unmount.

    Made by debugfs and e2fsck on copies, written back in the kernel's order.  On ext2 there is no journal: the
    superblock says that the volume is not clean, then metadata change in no order at all.
    """
    old = campaign.volume.read(0, campaign.volume.size)
    new = lab.changed_by_debugfs(old, "write {} n0", "rm f1", "mkdir d0", data=b"new" * 5000)
    everything, superblock = set(range(len(old) // BLOCK)), {1}
    stages: list[tuple[bytes, bytes, set[int]]]
    if campaign.kind == "ext2":
        dirty = lab.changed_by_debugfs(old, "set_super_value state 0")
        stages = [(old, dirty, everything), (dirty, new, everything - superblock), (dirty, new, superblock)]
    else:
        data, logged, done, journal = transaction(old, new)
        log = {journal}
        rest = everything - superblock - log
        stages = [
            (old, data, everything),
            (data, logged, superblock),
            (data, logged, log),
            (data, logged, rest),
            (logged, done, rest),
            (logged, done, log),
            (logged, done, superblock),
        ]
    for start, end, part in stages:
        blocks = [block for block in np.flatnonzero(lab.unequal(start, end)).tolist() if block in part]
        campaign.random.shuffle(blocks)
        for block in blocks:
            campaign.write(block * BLOCK, end[block * BLOCK : (block + 1) * BLOCK])
        campaign.flush()
    assert not lab.complaint(campaign.volume.read(0, campaign.volume.size))


def transaction(old: bytes, new: bytes) -> tuple[bytes, bytes, bytes, int]:
    """The change from ``old`` to ``new`` as one transaction of an ext4 journal.

    Returns:
        (with the new file data; with the metadata in the journal; replayed; block of the journal's superblock).
    """
    survey = lab.survey(new)
    changed = lab.unequal(old, new)
    data = bytearray(old)
    for block in np.flatnonzero(changed & survey.files).tolist():
        data[block * BLOCK : (block + 1) * BLOCK] = new[block * BLOCK : (block + 1) * BLOCK]
    changed[:2] = False
    metadata = np.flatnonzero(changed & ~survey.files).tolist()
    content = b"".join(new[block * BLOCK : (block + 1) * BLOCK] for block in metadata)
    numbers = ",".join(map(str, metadata))
    logged = lab.changed_by_debugfs(
        bytes(data), "journal_open", f"journal_write -b {numbers} {{}}", "journal_close", data=content
    )
    return bytes(data), logged, repaired(logged), int(survey.journal[0]) - 1


def move(volume: Volume) -> None:
    """The log and half of what is behind it go elsewhere, as before a restore that needs their blocks."""
    store = volume.require_store()
    logical = np.arange(SLOT_BLOCKS, SLOT_BLOCKS + store.root.log_blocks + 40)
    edit.move(volume, np.sort(store.physical(logical)))
    volume.settle()


Action = Callable[[Campaign, Volume], object]
LIFE: list[tuple[str, Action]] = [
    ("first create", lambda campaign, volume: volume.create("one")),
    ("begin serving", lambda campaign, volume: volume.begin_serving()),
    ("writes", lambda campaign, volume: session_of_writes(campaign)),
    ("end serving", lambda campaign, volume: volume.end_serving()),
    ("second create", lambda campaign, volume: volume.create("two", "a message")),
    ("growth", lambda campaign, volume: (edit.grow(volume, 400), volume.settle())),
    ("move", lambda campaign, volume: move(volume)),
    ("begin serving again", lambda campaign, volume: volume.begin_serving()),
    ("a kernel's writes", lambda campaign, volume: kernel_session(campaign)),
    ("create while serving", lambda campaign, volume: volume.create("three")),
    ("more writes", lambda campaign, volume: session_of_writes(campaign)),
    ("end serving again", lambda campaign, volume: volume.end_serving()),
    ("delete", lambda campaign, volume: volume.delete(["one"])),
    ("restore", lambda campaign, volume: volume.verb("restore", name="two")),
    ("undo", lambda campaign, volume: volume.verb("restore", undo=True)),
    ("restore without safety", lambda campaign, volume: volume.verb("restore", name="three", safety=False)),
    ("delete two", lambda campaign, volume: volume.delete(["three", "two"])),
    ("delete the rest", lambda campaign, volume: volume.delete(volume.snapshot_names())),
    ("strip", lambda campaign, volume: volume.verb("strip")),
]

EVERY_OPERATION = {
    "first create",
    "second create",
    "growth",
    "move",
    "create while serving",
    "delete",
    "restore",
    "strip",
}


def lived(kind: str) -> Campaign:
    """A volume's whole life, recorded."""
    campaign = Campaign(kind)
    for name, action in LIFE:
        campaign.step(name, lambda volume, action=action: action(campaign, volume))
    return campaign


@pytest.fixture(scope="module", params=["ext2", "ext4"])
def campaign(request: pytest.FixtureRequest) -> Campaign:
    """A volume's life; the tests only read it."""
    return lived(request.param)


def test_replay(campaign: Campaign, request: pytest.FixtureRequest) -> None:
    """Judge the one medium that ``--crash-replay`` names."""
    wanted = request.config.getoption("--crash-replay", default=None)
    if wanted is None:
        pytest.skip("no --crash-replay")
    kind, point, seed = wanted.split(":")
    if kind == campaign.kind:
        campaign.judge(campaign.state(int(point), int(seed)))
        campaign.judge(campaign.state(int(point), int(seed)), nested=random.Random(int(seed)))


def test_cut_after_every_operation(campaign: Campaign, crash_states: int) -> None:
    """All that was issued is on the medium, after every single operation.

    Among these are all media that hold just what was flushed.  In the short form two thirds of the operations are
    left out where other steps have the same kind.
    """
    for step in campaign.steps:
        stride = 1 if step.name in EVERY_OPERATION or crash_states >= 1000 else 3
        for point in range(step.first + 1, step.last + 1, stride):
            # A barrier changes nothing on this medium, only what a session may expect of it.
            if step.events or campaign.device.log[point - 1].kind != "flush":
                campaign.judge(campaign.state(point, EVERYTHING))


def test_sampled_subsets_of_unsynced_sectors(
    campaign: Campaign, crash_states: int, request: pytest.FixtureRequest
) -> None:
    """Any unsynced sector persists or not, by chance; some recoveries are cut as well."""
    rng = random.Random(request.config.getoption("--crash-seed", default=0))
    total = len(campaign.device.log)
    points = sorted(rng.randrange(1, total + 1) for _ in range(crash_states))
    second = random.Random(rng.random())
    for number, state in enumerate(campaign.states(rng, points, 1)):
        campaign.judge(state, nested=second if number % 16 == 0 else None)


def test_second_cut_while_the_slots_disagree(campaign: Campaign, crash_states: int) -> None:
    """A cut between the two slots of a header commit, and another one soon after: the newer slot must not be lost."""
    rng = random.Random(crash_states)
    points = campaign.half_committed()
    for point in points[:: max(1, 24 * len(points) // crash_states)]:
        campaign.judge(campaign.state(point, NOTHING), nested=rng, variants=3)
