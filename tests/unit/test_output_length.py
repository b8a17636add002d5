"""Lengths of answers: learning, back-off, conditioning, bounds."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.prediction.output_length import OutputLengthModel


def learned(
    count: int = 400, median: float = 200.0, sigma: float = 0.6, **shape: object
) -> OutputLengthModel:
    """A model that saw one tenant's log-normal answers."""
    model, generator = OutputLengthModel(), random.Random(1)
    for _ in range(count):
        length = round(generator.lognormvariate(math.log(median), sigma))
        model.observe("tenant", shape.get("max_tokens"), 1000, length)  # type: ignore[arg-type]
    return model


def test_before_anything_was_seen() -> None:
    model = OutputLengthModel()
    assert model.quantile("t", None, 100, 0.5) == pytest.approx(256, rel=0.05)
    assert model.log_spread("t", None, 100) == pytest.approx(1.0, rel=0.05)
    # With a limit, about half of the answers reach it.
    assert model.quantile("t", 64, 100, 0.6) == 64.0
    assert 30 < model.expected("t", 64, 100) < 64
    assert model.quantile("t", 4096, 100, 0.5) == pytest.approx(256, rel=0.05)


def test_it_learns_a_tenants_answers() -> None:
    model = learned()
    assert model.observation_count == 400
    assert model.quantile("tenant", None, 1000, 0.5) == pytest.approx(200, rel=0.1)
    assert model.quantile("tenant", None, 1000, 0.9) == pytest.approx(200 * math.exp(1.2816 * 0.6), rel=0.15)
    assert model.expected("tenant", None, 1000) == pytest.approx(200 * math.exp(0.18), rel=0.12)
    assert model.log_spread("tenant", None, 1000) == pytest.approx(0.6, rel=0.15)


def test_few_observations_already_show() -> None:
    model = OutputLengthModel()
    for _ in range(3):
        model.quantile("t", 1024, 500, 0.5)
        model.observe("t", 1024, 500, 20)
    assert model.quantile("t", 1024, 500, 0.5) < 60


def test_it_backs_off_level_by_level() -> None:
    model = OutputLengthModel()
    for _ in range(200):
        model.observe("short", 1000, 500, 20)
        model.observe("long", 1000, 500, 2000)
        model.observe("other", 8000, 50_000, 4000)
    # A shape that the tenant never used: its other answers say most.
    assert model.quantile("short", 100, 8000, 0.5) < 25
    assert model.quantile("other", 8000, 10, 0.5) > 3500
    # A new tenant: what others ask in this shape.
    assert model.quantile("new", 8000, 50_000, 0.5) > 3500
    assert model.quantile("new", 1000, 500, 0.3) < 25
    assert model.quantile("new", 1000, 500, 0.9) == 1000.0
    # Neither known: everything.
    assert 15 < model.quantile("new", None, 3, 0.2) < 25
    assert model.quantile("new", None, 3, 0.9) > 3500


def test_what_was_produced_conditions_the_rest() -> None:
    model, generator = OutputLengthModel(), random.Random(2)
    lengths = [generator.choice((10, 1000)) for _ in range(400)]
    for length in lengths:
        model.observe("t", None, 100, length)
    assert model.expected("t", None, 100) == pytest.approx(statistics.mean(lengths), rel=0.15)
    assert model.expected("t", None, 100, produced=50) == pytest.approx(1000, rel=0.12)
    assert model.quantile("t", None, 100, 0.5, produced=50) == pytest.approx(1000, rel=0.12)
    assert model.quantile("t", None, 100, 0.01, produced=50) > 50
    # Further than any: still a finite, larger answer.
    for produced in (5000, 10**6, 10**7):
        assert produced < model.expected("t", None, 100, produced) < 1e8
        assert produced < model.quantile("t", None, 100, 0.9, produced) < 1e8


def test_never_above_the_limit() -> None:
    model = learned(median=5000)
    assert model.quantile("tenant", 300, 1000, 0.5) == 300.0
    assert 0.9 * 300 < model.expected("tenant", 300, 1000) <= 300.0
    assert model.expected("tenant", 300, 1000, produced=300) == 300.0
    assert model.quantile("tenant", 300, 1000, 0.1, produced=900) == 300.0


def test_it_follows_change() -> None:
    model = learned(count=1000, median=50)
    for _ in range(2000):
        model.observe("tenant", None, 1000, 800)
    assert model.quantile("tenant", None, 1000, 0.5) == pytest.approx(800, rel=0.12)


def test_answers_are_prepared_once_for_some_observations() -> None:
    model = learned(count=1000)
    before = model.quantile("tenant", None, 1000, 0.5)
    for _ in range(15):
        model.observe("tenant", None, 1000, 1)
        assert model.quantile("tenant", None, 1000, 0.5) == before
    model.observe("tenant", None, 1000, 1)
    assert model.quantile("tenant", None, 1000, 0.5) < before


def test_memory_is_bounded_and_the_forgotten_back_off() -> None:
    model = OutputLengthModel(max_group_count=50)
    for number in range(1000):
        model.observe(f"tenant-{number}", 100 + number, number, 10)
        model.expected(f"tenant-{number}", 100 + number, number)
        assert model.group_count <= 50
    for number in range(2000):
        model.expected(f"reader-{number}", 1, 1)
    assert model.group_count <= 50
    assert len(model._estimates) <= 1024
    assert model.quantile("tenant-0", 100, 0, 0.5) < 12


def test_an_evicted_group_that_returns_counts_again() -> None:
    model = OutputLengthModel(max_group_count=3)
    for _ in range(50):
        model.observe("a", 1000, 500, 900)
    assert model.quantile("a", 1000, 500, 0.5) > 800
    for _ in range(50):
        model.observe("b", 4000, 9000, 30)
    for _ in range(50):
        model.observe("a", 1000, 500, 400)
    assert model.quantile("a", 1000, 500, 0.5) == pytest.approx(400, rel=0.12)


def test_same_observations_same_answers() -> None:
    assert learned().expected("tenant", None, 1000) == learned().expected("tenant", None, 1000)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.one_of(st.none(), st.integers(-5, 10**9)),
            st.integers(-5, 10**9),
            st.one_of(st.integers(-5, 5000), st.integers(0, 10**400), st.just(math.nan), st.just(math.inf)),
        ),
        max_size=40,
    ),
    st.one_of(st.none(), st.integers(1, 10**6)),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_answers_stay_sane_whatever_is_observed(
    observations: list[tuple[str, int | None, int, int]], max_tokens: int | None, prompt: int, produced: int
) -> None:
    model = OutputLengthModel(max_group_count=8)
    for observation in observations:
        model.observe(*observation)
    limit = math.inf if max_tokens is None else max_tokens
    previous = 0.0
    for q in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0):
        length = model.quantile("a", max_tokens, prompt, q, produced)
        assert min(limit, produced + 1) <= length <= limit
        assert length < math.inf
        assert length >= previous
        previous = length
    mean = model.expected("a", max_tokens, prompt, produced)
    assert min(limit, produced + 1) <= mean <= limit
    assert mean <= previous * (1 + 1e-9)
    assert model.log_spread("a", max_tokens, prompt, produced) >= 0.0


@given(st.integers(0, 2**32), st.one_of(st.none(), st.integers(1, 3000)), st.integers(0, 500))
def test_the_mean_is_the_mean_of_the_quantiles(seed: int, max_tokens: int | None, produced: int) -> None:
    model, generator = OutputLengthModel(), random.Random(seed)
    for _ in range(100):
        model.observe("t", max_tokens, 10, generator.randrange(1, 1000))
    levels = [(index + 0.5) / 2000 for index in range(2000)]
    by_quantiles = statistics.mean(model.quantile("t", max_tokens, 10, q, produced) for q in levels)
    assert model.expected("t", max_tokens, 10, produced) == pytest.approx(by_quantiles, rel=0.02)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="max_group_count"):
        OutputLengthModel(max_group_count=0)
