"""Forecasts of load: what they say of loads whose future is known, and that they never look ahead."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.prediction.forecast import (
    BUCKETS_PER_DAY,
    BUCKETS_PER_HOUR,
    LoadForecast,
    Range,
    Series,
    forecast_load,
)
from sagecp.core.prediction.load_history import BUCKET_S, QUANTITIES

HOUR_S = 3600.0


def history(requests: Series) -> Mapping[str, Series]:
    """A history whose other quantities follow the requests."""
    factors = {"requests": 1.0, "prompt_tokens": 1000.0, "output_tokens": 200.0, "cost_usd": 0.001}
    return {name: requests * factors[name] for name in QUANTITIES}


def total(forecast: LoadForecast, quantity: str = "requests") -> Range:
    assert forecast.total is not None
    return forecast.total.values[quantity]


def daily(days: float, *, low: float = 20.0, high: float = 100.0, noise: float = 0.0) -> Series:
    """A load that swings once a day, least at midnight."""
    at = np.arange(round(days * BUCKETS_PER_DAY))
    swing = (1.0 - np.cos(2.0 * np.pi * at / BUCKETS_PER_DAY)) / 2.0
    load = low + (high - low) * swing
    return load * np.random.default_rng(1).lognormal(0.0, noise, len(at)) if noise else load


def test_without_any_history_there_is_no_forecast_and_it_says_what_is_missing() -> None:
    forecast = forecast_load(history(np.zeros(0)), HOUR_S, BUCKET_S)
    assert (forecast.steps, forecast.total, forecast.accuracy) == ((), None, None)
    assert "no history yet" in forecast.basis


def test_a_short_history_gives_its_mean_between_its_least_and_most() -> None:
    forecast = forecast_load(history(np.array([10.0, 20.0, 60.0])), HOUR_S, BUCKET_S)
    assert total(forecast) == Range(120.0, 360.0, 720.0)
    assert forecast.accuracy is None
    assert "only 15 minutes" in forecast.basis


def test_a_steady_load_goes_on() -> None:
    forecast = forecast_load(history(np.full(BUCKETS_PER_DAY, 50.0)), HOUR_S, BUCKET_S)
    assert total(forecast).p50 == pytest.approx(600.0)
    assert total(forecast).p10 == pytest.approx(600.0)
    assert total(forecast).p90 == pytest.approx(600.0)
    assert total(forecast, "cost_usd").p50 == pytest.approx(0.6)
    assert forecast.accuracy is not None
    assert forecast.accuracy.weighted_error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("hour", [0, 6, 9, 18])
def test_a_load_that_swings_by_day_is_expected_to_swing_again(hour: int) -> None:
    load = daily(6.0, noise=0.05)
    origin = 5 * BUCKETS_PER_DAY + hour * BUCKETS_PER_HOUR
    horizon = 6 * BUCKETS_PER_HOUR
    forecast = forecast_load(history(load[:origin]), 6 * HOUR_S, 3 * BUCKET_S)
    actual = load[origin : origin + horizon].sum()
    naive = load[origin - BUCKETS_PER_HOUR : origin].sum() * 6
    assert abs(total(forecast).p50 - actual) < 0.1 * actual
    assert abs(total(forecast).p50 - actual) < 0.5 * abs(naive - actual)
    assert "time of day" in forecast.basis
    assert forecast.accuracy is not None
    assert forecast.accuracy.weighted_error < 0.5 * forecast.accuracy.naive_weighted_error


def test_a_load_that_swings_by_week_is_known_after_two_weeks() -> None:
    load = daily(15.0)
    for day in (5, 6, 12, 13):
        # A weekend is quiet by day and busy at night.
        night = load[day * BUCKETS_PER_DAY : (day + 1) * BUCKETS_PER_DAY]
        night[:] = 120.0 - night
    origin = 12 * BUCKETS_PER_DAY + 18 * BUCKETS_PER_HOUR
    horizon = 6 * BUCKETS_PER_HOUR
    expected = total(forecast_load(history(load[:origin]), 6 * HOUR_S, HOUR_S)).p50
    actual = load[origin : origin + horizon].sum()
    yesterday = load[origin - BUCKETS_PER_DAY : origin - BUCKETS_PER_DAY + horizon].sum()
    assert abs(expected - actual) < 0.5 * abs(yesterday - actual)


def test_the_level_of_today_moves_the_time_of_day() -> None:
    load = daily(5.5)
    load[5 * BUCKETS_PER_DAY :] *= 2.0
    forecast = forecast_load(history(load), HOUR_S, BUCKET_S)
    assert total(forecast).p50 == pytest.approx(2.0 * 100.0 * BUCKETS_PER_HOUR, rel=0.1)


def test_bounds_hold_as_often_as_they_say() -> None:
    load = daily(8.0, noise=0.3)
    inside = []
    for origin in range(4 * BUCKETS_PER_DAY, 8 * BUCKETS_PER_DAY - BUCKETS_PER_HOUR, 29):
        expected = total(forecast_load(history(load[:origin]), HOUR_S, BUCKET_S))
        inside.append(expected.p10 <= load[origin : origin + BUCKETS_PER_HOUR].sum() <= expected.p90)
    assert 0.65 <= np.mean(inside) <= 0.95


def test_steps_add_up_to_the_total() -> None:
    forecast = forecast_load(history(daily(3.3, noise=0.1)), 6 * HOUR_S, 900.0)
    assert len(forecast.steps) == 24
    for quantity in QUANTITIES:
        steps = sum(step.values[quantity].p50 for step in forecast.steps)
        assert steps == pytest.approx(total(forecast, quantity).p50)


def test_a_gap_in_the_load_gives_no_nonsense() -> None:
    load = daily(4.0)
    load[3 * BUCKETS_PER_DAY :] = 0.0
    forecast = forecast_load(history(load), HOUR_S, BUCKET_S)
    assert total(forecast).p50 < 0.2 * 100.0 * BUCKETS_PER_HOUR


loads = st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=1, max_size=3 * BUCKETS_PER_DAY)


@settings(max_examples=60, deadline=None)
@given(loads, st.sampled_from([BUCKET_S, HOUR_S, 24 * HOUR_S]))
def test_ranges_are_ordered_finite_and_repeatable(load: list[float], horizon_s: float) -> None:
    series = history(np.array(load))
    forecast = forecast_load(series, horizon_s, BUCKET_S)
    assert forecast == forecast_load(series, horizon_s, BUCKET_S)
    for span in (*forecast.steps, forecast.total):
        assert span is not None
        for each in span.values.values():
            assert 0.0 <= each.p10 <= each.p50 <= each.p90 < np.inf


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_what_is_told_of_the_past_does_not_depend_on_what_came_later(seed: int, later: int) -> None:
    """Were an old forecast made from its future, changing that would change its error."""
    draw = np.random.default_rng(seed)
    load = draw.lognormal(3.0, 0.5, BUCKETS_PER_DAY + later)
    known = load[:BUCKETS_PER_DAY]
    forecast = forecast_load(history(known), HOUR_S, BUCKET_S)
    changed = load.copy()
    changed[BUCKETS_PER_DAY:] *= 100.0
    assert forecast_load(history(changed[:BUCKETS_PER_DAY]), HOUR_S, BUCKET_S) == forecast
    # The first errors of a longer history are those of the shorter one.
    one = forecast_load(history(changed), HOUR_S, BUCKET_S).accuracy
    other = forecast.accuracy
    assert one is not None
    assert other is not None
    assert one.sample_count >= other.sample_count


def test_the_choice_at_a_past_moment_uses_nothing_after_it() -> None:
    """With a step in the load, errors before it must stay what they were without it."""
    steady = np.full(3 * BUCKETS_PER_DAY, 50.0)
    jump = np.concatenate([steady, np.full(2 * BUCKETS_PER_HOUR, 500.0)])
    before = forecast_load(history(steady), HOUR_S, BUCKET_S).accuracy
    after = forecast_load(history(jump), HOUR_S, BUCKET_S).accuracy
    assert before is not None
    assert after is not None
    assert before.weighted_error == pytest.approx(0.0, abs=1e-9)
    # Only forecasts whose hour reaches into the jump are wrong: all 450 above in it, and none before.
    wrong = after.weighted_error * (before.sample_count * 600.0)
    assert wrong < 2.0 * 500.0 * (2 * BUCKETS_PER_HOUR) * BUCKETS_PER_HOUR
