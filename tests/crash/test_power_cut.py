"""Power cuts: the short form of the campaign."""

from __future__ import annotations

import pytest
from campaigns.power import CAMPAIGN, LIVES
from campaigns.report import short_form


@pytest.mark.parametrize("part", LIVES)
def test_a_life_that_is_cut(part: str) -> None:
    short_form(CAMPAIGN, part)


@pytest.mark.system
@pytest.mark.parametrize("part", [part for part in CAMPAIGN.parts if part not in LIVES])
def test_a_kernel_that_is_cut_off(part: str) -> None:
    short_form(CAMPAIGN, part)
