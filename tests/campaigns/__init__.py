"""Campaigns: searches for a case in which something is lost, run by ``tools/campaign``, in short by the tests.

Each is a module of this package with a `CAMPAIGN`; `report` says what that is.
"""

from __future__ import annotations

import importlib

from campaigns.report import Campaign

#: Modules, in the order in which ``tools/campaign all`` runs them.
NAMES = ("power", "kills", "faults", "full", "together", "rot")


def load(name: str) -> Campaign:
    """The campaign of that name."""
    campaign = importlib.import_module(f"campaigns.{name}").CAMPAIGN
    assert isinstance(campaign, Campaign)
    return campaign
