"""Search for a case in which something is lost: power cuts, kills, device faults, full volumes, many users at once.

Every campaign has a short form, which tools/test runs, and a long one.  Each prints how many cases it tried and what it
found; a case that failed is printed with a token that tries it again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests"), str(Path(__file__).resolve().parent)]

import campaigns  # noqa: E402
import lab  # noqa: E402
from campaigns.report import Campaign, Report  # noqa: E402


def run(campaign: Campaign, options: argparse.Namespace) -> bool:
    """Run one campaign; returns whether nothing was found."""
    report = Report(campaign.name, options.seed, sys.stdout)
    print(f"{campaign.name}: {campaign.title}", flush=True)
    if campaign.needs_root and os.geteuid():
        print(f"{campaign.name}: not run: it mounts, which takes root", file=sys.stderr)
        return False
    if options.replay:
        with report.part(options.replay):
            campaign.replay(report, options.replay)
    else:
        total = options.cases or (campaign.long if options.long else campaign.short)
        for part in options.part or campaign.parts:
            campaign.run_part(report, part, total)
    print(report.summary(), flush=True)
    for failure in report.failures:
        print(f"  tools/campaign {campaign.name} --seed {report.seed} --replay {failure.token}")
    return not report.failures


def main() -> int:
    """Return the exit status: 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="*", help=f"{', '.join(campaigns.NAMES)}, or all of them")
    parser.add_argument("--long", action="store_true", help="the long form: hours, not minutes")
    parser.add_argument("--cases", type=int, help="about so many cases over all parts")
    parser.add_argument("--part", action="append", help="only this part of a campaign; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="where all chance comes from")
    parser.add_argument("--replay", metavar="TOKEN", help="one case again, by the token of its failure")
    options = parser.parse_args()
    names = [name for name in options.name if name != "all"] or campaigns.NAMES
    unknown = sorted(set(names) - set(campaigns.NAMES))
    if unknown:
        parser.error(f"no such campaign: {', '.join(unknown)}; there are {', '.join(campaigns.NAMES)}")
    if (options.replay or options.part) and len(names) != 1:
        parser.error("--replay and --part take the name of one campaign")
    chosen = [campaigns.load(name) for name in names]
    for part in options.part or ():
        if part not in chosen[0].parts:
            parser.error(f"{names[0]} has no part {part}; it has {', '.join(chosen[0].parts)}")
    with lab.kept_memory():
        found_nothing = [run(campaign, options) for campaign in chosen]
    return 0 if all(found_nothing) else 1


if __name__ == "__main__":
    sys.exit(main())
