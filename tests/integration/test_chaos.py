"""The chaos script, for two minutes."""

from __future__ import annotations

import random

import pytest

from tests.integration.chaos import TARGETS, Chaos

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1500)]


def test_two_minutes_of_killed_processes_lose_nothing_and_double_nothing(tmp_path):
    chaos = Chaos(tmp_path, random.Random(3), print)
    chaos.run(120, sorted(TARGETS))
    assert chaos.kills
