"""Servers and commands are killed (``tools/campaign kills``, in short), and what of that chance would not choose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena import make_volume
from campaigns import kills
from campaigns.kills_place import AT_ONCE, Place, alive, finished, place, until
from campaigns.report import short_form

pytestmark = pytest.mark.system


@pytest.mark.parametrize("part", kills.PARTS)
def test_a_campaign_of_kills(part: str) -> None:
    short_form(kills.CAMPAIGN, part)
