"""How right predictions were, and the histogram behind it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.prediction.accuracy import QUANTITIES, PredictionAccuracy
from sagecp.core.prediction.histogram import LogHistogram


def test_nothing_to_say_before_anything_was_compared() -> None:
    assert dict(PredictionAccuracy().summary()) == {}


def test_bias_error_and_coverage() -> None:
    accuracy = PredictionAccuracy()
    generator = random.Random(1)
    for _ in range(3000):
        actual = 1.25 * generator.lognormvariate(0.0, 0.2)
        accuracy.record("ttft", 1.0, actual, upper=1.25 * math.exp(1.2816 * 0.2))
    summary = accuracy.summary()
    assert list(summary) == ["ttft"]
    ttft = summary["ttft"]
    assert ttft.count == 3000
    assert ttft.bias_ratio == pytest.approx(1.25, rel=0.03)
    assert ttft.median_error_ratio == pytest.approx(0.2, rel=0.15)
    assert ttft.p90_error_ratio == pytest.approx(0.38, rel=0.15)
    assert ttft.upper_coverage == pytest.approx(0.9, abs=0.04)


def test_quantities_are_apart_and_the_bound_is_optional() -> None:
    accuracy = PredictionAccuracy()
    for quantity in QUANTITIES:
        accuracy.record(quantity, 2.0, 1.0)
    summary = accuracy.summary()
    assert tuple(summary) == QUANTITIES
    for entry in summary.values():
        assert entry.count == 1
        assert entry.bias_ratio == pytest.approx(0.5)
        assert entry.median_error_ratio == pytest.approx(1.0, rel=0.05)
        assert entry.upper_coverage is None


def test_a_perfect_prediction() -> None:
    accuracy = PredictionAccuracy()
    accuracy.record("tpot", 0.02, 0.02, upper=0.02)
    entry = accuracy.summary()["tpot"]
    assert entry.bias_ratio == 1.0
    assert entry.median_error_ratio < 0.0011
    assert entry.upper_coverage == 1.0


def test_old_comparisons_are_forgotten() -> None:
    accuracy = PredictionAccuracy(forgetting=0.99)
    for _ in range(1000):
        accuracy.record("latency", 1.0, 3.0, upper=2.0)
    for _ in range(1000):
        accuracy.record("latency", 1.0, 1.1, upper=2.0)
    entry = accuracy.summary()["latency"]
    assert entry.bias_ratio == pytest.approx(1.1, rel=0.01)
    assert entry.p90_error_ratio == pytest.approx(0.1 / 1.1, rel=0.06)
    assert entry.upper_coverage == pytest.approx(1.0, abs=0.01)


def test_an_unknown_quantity_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'speed'.*ttft, tpot, latency, output_tokens"):
        PredictionAccuracy().record("speed", 1.0, 1.0)


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1e-300, 1e300, math.nan])
)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.one_of(st.none(), NUMBERS)), max_size=50))
def test_figures_stay_sane_whatever_is_recorded(records: list[tuple[float, float, float | None]]) -> None:
    accuracy = PredictionAccuracy()
    for predicted, actual, upper in records:
        accuracy.record("ttft", predicted, actual, upper)
    for entry in accuracy.summary().values():
        assert 0.0 <= entry.bias_ratio < math.inf
        assert 0.0 < entry.median_error_ratio <= entry.p90_error_ratio < math.inf
        assert entry.upper_coverage is None or 0.0 <= entry.upper_coverage <= 1.0


# -- the histogram -----------------------------------------------------------------


def test_the_histogram_finds_quantiles_within_a_bucket() -> None:
    histogram = LogHistogram(127, least=1.0, ratio=1.12, forgetting=1.0)
    for value in range(1, 1001):
        histogram.add(value)
    for q in (0.1, 0.5, 0.9, 1.0):
        assert histogram.quantile(q) == pytest.approx(1000 * q, rel=0.07)
    assert histogram.effective_count == pytest.approx(1000)


def test_the_histogram_keeps_its_bounds() -> None:
    histogram = LogHistogram(10, least=1.0, ratio=2.0, forgetting=0.9)
    assert histogram.quantile(0.5) == 0.0
    for value in (0.0, -5.0, 0.5):
        histogram.add(value)
    assert histogram.counts[0] > 0.0
    assert not any(histogram.counts[1:])
    histogram.add(1e300)
    assert histogram.counts[-1] > 0.0


@pytest.mark.parametrize("forgetting", [0.5, 0.9, 0.998])
def test_the_histogram_forgets_and_never_overflows(forgetting: float) -> None:
    histogram = LogHistogram(20, least=1.0, ratio=2.0, forgetting=forgetting)
    for _ in range(30_000):
        histogram.add(3.0)
    assert histogram.effective_count == pytest.approx(1 / (1 - forgetting), rel=1e-6)
    assert histogram.observation_count == 30_000
    assert histogram.unit < 1e10
    assert sum(histogram.counts) / histogram.unit == pytest.approx(histogram.effective_count, rel=1e-6)


@pytest.mark.parametrize("forgetting", [0.0, 1.5])
def test_arguments(forgetting: float) -> None:
    with pytest.raises(ValueError, match="forgetting"):
        LogHistogram(10, least=1.0, ratio=2.0, forgetting=forgetting)
