"""A few cycles of `crash_cycles`, and a short soak; both go on for longer when they are asked to."""

from __future__ import annotations

import pytest

from tests.faults.crash_cycles import crash
from tests.faults.soak import soak


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_nothing_acknowledged_is_lost_in_crash_cycles() -> None:
    """Rows 1 to 3 at random: kill -9 at any moment, under load."""
    assert await crash(cycles=5, seed=3, caller_count=8)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_short_soak_adds_up() -> None:
    """Pairs of rows at random: every kind of fault, every kind of caller."""
    assert await soak(minutes=0.5, seed=3, caller_count=12)
