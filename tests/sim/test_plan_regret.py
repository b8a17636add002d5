"""The planner's choice against every plan tried in the simulator, on spaces small enough for a test."""

from __future__ import annotations

import pytest

from bench.plan_regret import SPACES, TARGET, Space, try_all

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("space", [SPACES[7], SPACES[14]], ids=str)
def test_little_is_lost_by_believing_the_planner(space: Space) -> None:
    outcome = try_all(space, request_count=800)
    assert outcome.plan_count > 5
    # Fewer requests than in the benchmark: the simulated best is less certain.
    assert outcome.regret <= TARGET + 0.03
    assert sorted(map(abs, outcome.errors))[len(outcome.errors) // 2] < 0.1
