"""Volumes filled to the last block: the short form of the campaign."""

from __future__ import annotations

import pytest
from campaigns.full import CAMPAIGN
from campaigns.report import short_form


@pytest.mark.parametrize("part", CAMPAIGN.parts)
def test_full_volumes(part: str) -> None:
    short_form(CAMPAIGN, part)
