"""What a campaign is, and what it tells.

A campaign searches for a case in which something is lost: it has parts (kinds of volume, commands), tries many cases
of each, and judges every one by what is not ours: whole copies, e2fsprogs, the kernel.  All chance comes from one
seed.  A case that fails is printed with a token, and ``tools/campaign NAME --replay TOKEN`` tries that case again.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

#: A campaign gives up on a part after so many failures: the first few say it all.
MOST_FAILURES = 5
_PROGRESS_SECONDS = 10.0
#: Cases after which their garbage is collected: volumes are cycles, and each has all of a medium.  In the process of
#: many tests Python itself would wait until there are gigabytes.
_COLLECTED = 16


class TooManyFailures(Exception):
    """`MOST_FAILURES` cases of a part failed."""


@dataclass(frozen=True)
class Failure:
    """A case that failed: the token that replays it, and why."""

    token: str
    reason: str


class Report:
    """Counts cases and keeps failures.

    Args:
        name: The campaign.
        seed: Where all chance comes from.
        stream: Where progress goes; nowhere if it is None.

    Attributes:
        cases: How many were tried.
        seen: What they were, for the summary: how many of which kind.
        failures: Those that failed.
    """

    def __init__(self, name: str, seed: int, stream: TextIO | None = None) -> None:
        self.name = name
        self.seed = seed
        self.cases = 0
        self.seen: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self._stream = stream
        self._part_failures = 0
        self._part_cases = 0
        self._started = self._told = time.monotonic()

    def random(self, part: str) -> random.Random:
        """The source of chance of a part: the same for the same seed, whatever other parts do."""
        return random.Random(f"{self.name} {part} {self.seed}")

    @contextlib.contextmanager
    def case(self, token: str, kind: str = "") -> Iterator[None]:
        """Try one case: an exception inside is its failure, and the campaign goes on.

        Args:
            token: Replays it.
            kind: Counted in `seen`.

        Raises:
            TooManyFailures: This part has enough of them.
        """
        self.cases += 1
        self._part_cases += 1
        if kind:
            self.seen[kind] += 1
        try:
            yield
        except Exception as error:
            self.fail(token, f"{type(error).__name__}: {error}")
        if self.cases % _COLLECTED == 0:
            gc.collect()
        if self._stream is not None and time.monotonic() - self._told > _PROGRESS_SECONDS:
            self._told = time.monotonic()
            print(f"{self.name}: {self.cases} cases, {self._took():.0f} s", file=self._stream, flush=True)

    def fail(self, token: str, reason: str) -> None:
        """Note a failure.

        Raises:
            TooManyFailures: This part has enough of them.
        """
        self.failures.append(Failure(token, reason))
        self._part_failures += 1
        if self._stream is not None:
            print(f"{self.name}: FAILED {token}: {reason}", file=self._stream, flush=True)
        if self._part_failures >= (1 if os.environ.get("EXTSNAP_MUTANT") else MOST_FAILURES):  # tools/mutants needs one
            raise TooManyFailures

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part, and print a line on it.  Without a single case it has failed: it would show nothing."""
        started, self._part_failures, self._part_cases = time.monotonic(), 0, 0
        gc.collect()
        gc.freeze()  # what is there already is not looked at again and again
        with contextlib.suppress(TooManyFailures):
            yield
        if not self._part_cases:
            self.failures.append(Failure(name, "not one case was tried"))
        if self._stream is not None:
            took = time.monotonic() - started
            line = f"{self.name} {name}: {self._part_cases} cases, {self._part_failures} failed, {took:.0f} s"
            print(line, file=self._stream, flush=True)

    def _took(self) -> float:
        return time.monotonic() - self._started

    def summary(self) -> str:
        """The last line: what was tried, what was found, from which seed."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.seen.items()))
        found = f"{len(self.failures)} failed" if self.failures else "nothing lost"
        what = f"{self.cases} cases" + (f" ({kinds})" if kinds else "")
        return f"{self.name}: {what}: {found}; seed {self.seed}, {self._took():.0f} s"


@dataclass(frozen=True)
class Campaign:
    """One campaign.

    Attributes:
        name: As ``tools/campaign`` takes it: that of its module.
        title: What it tries, in a line.
        parts: Names of its parts.
        short: Cases of all parts together in ``tools/test``, about.
        long: The same in the long form.
        run: Tries about so many cases of a part, all chance from the given source: ``run(report, part, cases, rng)``.
        replay: Tries the case of a token again: ``replay(report, token)``.
        needs_root: It mounts.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    short: int
    long: int
    run: Callable[[Report, str, int, random.Random], None]
    replay: Callable[[Report, str], None]
    needs_root: bool = False

    def cases(self, total: int) -> int:
        """How many cases one part gets."""
        return max(1, -(-total // len(self.parts)))

    def run_part(self, report: Report, part: str, total: int) -> None:
        """Run one part's share of ``total`` cases."""
        with report.part(part):
            self.run(report, part, self.cases(total), report.random(part))


def short_form(campaign: Campaign, part: str, *, seed: int = 0) -> None:
    """Run a part of a campaign's short form as a test: ``EXTSNAP_LONG=1`` runs the long one.

    Raises:
        AssertionError: A case failed; names what replays it.
    """
    report = Report(campaign.name, seed, sys.stderr)
    campaign.run_part(report, part, campaign.long if os.environ.get("EXTSNAP_LONG") else campaign.short)
    replays = [
        f"{failure.reason}\n  again: tools/campaign {campaign.name} --seed {seed} --replay {failure.token}"
        for failure in report.failures
    ]
    assert not replays, "\n".join(replays)
