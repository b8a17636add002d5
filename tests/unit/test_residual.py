"""What sets one instance apart: mean, spread, jumps, and forgetting."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.prediction.residual import LARGEST_SIGMA, Residual


def feed(residual: Residual, ratios: list[float], start_s: float = 0.0) -> float:
    """Observe one ratio a second; return the time of the last."""
    for index, ratio in enumerate(ratios):
        residual.observe(0.5, 0.5 * ratio, start_s + index)
    return start_s + len(ratios) - 1


def test_nothing_observed() -> None:
    residual = Residual()
    assert residual.factor(1e9) == 1.0
    assert residual.sigma == pytest.approx(0.35)
    assert residual.observation_count == 0


def test_the_first_observations_count_alike() -> None:
    residual = Residual()
    now = feed(residual, [1.3])
    assert residual.factor(now) == pytest.approx(1.3)
    now = feed(residual, [1.3 * 1.2**2], now + 1)
    assert residual.factor(now) == pytest.approx(1.3 * 1.2)


def test_it_settles_on_mean_and_spread() -> None:
    generator = random.Random(1)
    residual = Residual()
    factors, sigmas = [], []
    for second in range(2000):
        residual.observe(1.0, 1.5 * generator.lognormvariate(0.0, 0.2), second)
        factors.append(residual.factor(second))
        sigmas.append(residual.sigma)
    assert statistics.mean(factors[100:]) == pytest.approx(1.5, rel=0.03)
    assert statistics.mean(sigmas[100:]) == pytest.approx(0.2, rel=0.15)


def test_an_exact_model_keeps_some_doubt() -> None:
    residual = Residual()
    feed(residual, [1.0] * 500)
    assert residual.sigma == 0.05


def test_one_outlier_moves_little() -> None:
    residual = Residual()
    now = feed(residual, [1.0] * 20 + [40.0])
    assert residual.factor(now) < 1.1


@pytest.mark.parametrize("slow", [10.0, 1 / 10.0, 3.0])
def test_a_jump_is_followed_after_three_observations_and_so_is_the_recovery(slow: float) -> None:
    residual = Residual()
    now = feed(residual, [1.0] * 50)
    now = feed(residual, [slow] * 2, now + 1)
    assert abs(math.log(residual.factor(now))) < 0.2
    now = feed(residual, [slow], now + 1)
    assert residual.factor(now) == pytest.approx(slow, rel=1e-6)
    now = feed(residual, [slow] * 20, now + 1)
    assert residual.factor(now) == pytest.approx(slow, rel=1e-6)
    assert residual.sigma < 0.2
    now = feed(residual, [1.0] * 3, now + 1)
    assert residual.factor(now) == pytest.approx(1.0, rel=1e-6)
    assert residual.observation_count == 76


def test_a_jump_needs_three_in_a_row_on_one_side() -> None:
    residual = Residual()
    now = feed(residual, [1.0] * 50 + [4.0, 4.0, 1.0, 4.0, 4.0, 0.25, 0.25, 4.0, 4.0])
    assert residual.factor(now) < 1.6


def test_it_returns_to_one_without_observations() -> None:
    residual = Residual(half_life_s=60.0)
    now = feed(residual, [16.0] * 20)
    assert residual.factor(now + 60) == pytest.approx(4.0)
    assert residual.factor(now + 120) == pytest.approx(2.0)
    assert residual.factor(now + 3600) == pytest.approx(1.0, abs=1e-6)
    # A late reader does not change what is known.
    assert residual.factor(now) == pytest.approx(16.0)


def test_after_a_pause_the_next_observation_decides_what_the_pause_meant() -> None:
    still_slow, recovered = Residual(), Residual()
    for residual in (still_slow, recovered):
        now = feed(residual, [10.0] * 20)
    later = now + 300
    still_slow.observe(1.0, 10.0, later)
    recovered.observe(1.0, 1.0, later)
    assert still_slow.factor(later) == pytest.approx(10.0)
    assert recovered.factor(later) < 1.1


def test_ratios_are_bounded() -> None:
    residual = Residual()
    now = feed(residual, [1e9] * 5)
    assert residual.factor(now) == pytest.approx(50.0)
    residual = Residual()
    now = feed(residual, [1e-9] * 5)
    assert residual.factor(now) == pytest.approx(1 / 50)


def test_time_may_stand_still_or_run_backwards() -> None:
    residual = Residual()
    residual.observe(1.0, 2.0, 100.0)
    residual.observe(1.0, 2.0, 90.0)
    assert residual.factor(100.0) == pytest.approx(2.0)
    assert residual.factor(10.0) == pytest.approx(2.0)


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1e-300, 1e300, math.nan, math.inf])
)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.floats(0.0, 1e4)), max_size=50))
def test_it_stays_within_bounds_whatever_is_observed(observations: list[tuple[float, float, float]]) -> None:
    residual, now = Residual(), 0.0
    for predicted_s, observed_s, wait_s in observations:
        now += wait_s
        residual.observe(predicted_s, observed_s, now)
        assert 1 / 50 - 1e-9 <= residual.factor(now) <= 50 + 1e-9
        assert 0.05 <= residual.sigma <= LARGEST_SIGMA
    assert 1 / 50 - 1e-9 <= residual.factor(now + 30) <= 50 + 1e-9


@pytest.mark.parametrize("wrong", [{"smoothing": 0.0}, {"smoothing": 2.0}, {"half_life_s": 0.0}])
def test_arguments(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Residual(**wrong)
