"""The campaign of many at once.

Part ``paths``: two commands at the same moment on one image, each by a path of its own: see `together_paths`.

Part ``clients``: fifty clients of one server, some of them rude, while the volume is read and written: see
`together_clients`.

Part ``readers``: readers of ten snapshots during writes, creates and deletes: see `together_readers`.

A token is ``PART:NUMBER``; the number is the seed of all that the case chooses.  Who comes first is up to the
scheduler: a replay does the same things with the same delays, and may see another order.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from arena import arena

from campaigns import together_clients, together_paths, together_readers
from campaigns.report import Campaign, Report
from campaigns.together_place import Place

TURNS = 6

#: Name of a part: (what makes ready, what tries a case, how many cases for each one that is asked for).
PARTS: dict[str, tuple[Callable[[Place], None], Callable[[Report, str, int, Place], None], int]] = {
    "paths": (together_paths.prepare, together_paths.case, 8),
    "clients": (together_clients.prepare, together_clients.case, 3),
    "readers": (together_readers.prepare, together_readers.case, 1),
}


def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
    """Try cases of a part: of those that are short there are several for each one that is asked for."""
    prepare, case, weight = PARTS[part]
    with arena() as top:
        place = Place(top)
        prepare(place)
        for index in range(cases * weight):
            # What a case does by the rest of its number comes in turn, so that few cases have all of it.
            number = rng.getrandbits(32) * TURNS + index % TURNS
            case(report, f"{part}:{number}", number, place)


def replay(report: Report, token: str) -> None:
    """Try one case again."""
    part, _, number = token.partition(":")
    prepare, case, _ = PARTS[part]
    with arena() as top:
        place = Place(top)
        prepare(place)
        case(report, token, int(number), place)


CAMPAIGN = Campaign(
    name="together",
    title="two commands on one image by any path, fifty clients of one server, readers of ten snapshots",
    parts=tuple(PARTS),
    short=3,
    long=300,
    run=run,
    replay=replay,
    needs_root=True,
)
