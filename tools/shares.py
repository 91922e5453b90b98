"""What continuous integration takes of a list that is too long for it: the commit decides, so each gets its turn."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

_CHECKOUT = Path(__file__).resolve().parent.parent
_Item = TypeVar("_Item")


def share(items: Sequence[_Item], parts: int, number: int) -> list[_Item]:
    """One part of a list of ``parts``, which have all of it; as many numbers in a row are all of them."""
    return list(items[number % parts :: parts])


def taken(items: Sequence[_Item], parts: int) -> Sequence[_Item]:
    """In CI one part of ``parts``, elsewhere all of them; also for a sabotage, which names what must catch it."""
    if os.environ.get("EXTSNAP_CI") and not os.environ.get("EXTSNAP_MUTANT"):  # tools/test, tools/mutants
        return share(items, parts, commit())
    return items


def commit() -> int:
    """The commit of the checkout as a number; 0 outside git."""
    command = ["git", "-C", str(_CHECKOUT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return int(done.stdout, 16) if done.returncode == 0 else 0
