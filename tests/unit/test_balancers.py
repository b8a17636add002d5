"""The balancers that have something to remember, to draw or to measure."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.router.balancers.weighted_round_robin import weight_of
from tests.support.placement_rows import Instance, Placer


def fleet(*names: str, concurrency_limit: int) -> list[Instance]:
    return [Instance(name, concurrency_limit=concurrency_limit) for name in names]


def loaded(**in_flight: int) -> list[Instance]:
    return [Instance(name, count) for name, count in in_flight.items()]


# -- weighted round robin --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "gpu_count", "weight"),
    [
        ({}, 0, 1.0),
        ({}, 8, 8.0),
        ({"sagecp.weight": "2.5"}, 8, 2.5),
        ({"sagecp.weight": "many"}, 8, 8.0),
        ({"sagecp.weight": "0"}, 2, 2.0),
        ({"sagecp.weight": "-1"}, 2, 2.0),
        ({"sagecp.weight": "nan"}, 2, 2.0),
        ({"sagecp.weight": "inf"}, 2, 2.0),
        ({"other": "5"}, 0, 1.0),
    ],
)
def test_weights(labels: dict[str, str], gpu_count: int, weight: float) -> None:
    assert weight_of(Instance("a", labels=labels, gpu_count=gpu_count).spec) == weight


def weighted(**weights: float) -> list[Instance]:
    return [Instance(name, labels={"sagecp.weight": str(weight)}) for name, weight in weights.items()]


def test_weighted_round_robin_is_smooth() -> None:
    # The sequence that nginx's description gives for weights 5, 1, 1.
    placer = Placer("load_balanced", "weighted_round_robin")
    assert "".join(placer.spread(weighted(a=5, b=1, c=1), 14)) == "aabacaa" * 2
    assert placer.reason == "weighted_round_robin: its turn by weight"


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_weighted_round_robin_gives_each_its_share(weights: list[int], data: st.DataObject) -> None:
    instances = weighted(**{f"i{number}": weight for number, weight in enumerate(weights)})
    placer = Placer("load_balanced", "weighted_round_robin")
    total = sum(weights)
    places = placer.spread(instances, 3 * total)
    for number, weight in enumerate(weights):
        assert places.count(f"i{number}") == 3 * weight
    # While some are closed the others share; afterwards nobody catches up in a burst.
    subset = data.draw(st.lists(st.sampled_from(instances), min_size=1, unique_by=id))
    subset_total = round(sum(weight_of(instance.spec) for instance in subset))
    places = placer.spread(subset, 2 * subset_total)
    assert all(places.count(i.instance_id) == 2 * round(weight_of(i.spec)) for i in subset)
    places = placer.spread(instances, total)
    assert all(places.count(f"i{number}") == weight for number, weight in enumerate(weights))


def test_weighted_round_robin_counts_dispatches_only_and_forgets_who_left() -> None:
    instances = weighted(a=5, b=1, c=1)
    placer = Placer("load_balanced", "weighted_round_robin")
    for _ in range(10):
        assert placer.choose(instances) == "a"
    assert "".join(placer.spread(instances, 3)) == "aab"
    placer.strategy.note_fleet(["a", "c"])
    assert set(placer.strategy.balancer._credits) == {"a", "c"}  # type: ignore[attr-defined]


# -- least response time, power of two -------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "score"),
    [
        (Instance("a", ttft_estimate_s=0.5), 0.5),
        (Instance("a", 3, ttft_estimate_s=0.5), 2.0),
        # Never measured: tried at once, by one request.
        (Instance("a"), 0.0),
        (Instance("a", 1), 2.0),
    ],
)
def test_least_response_time(candidate: Instance, score: float) -> None:
    placer = Placer("load_balanced", "least_response_time")
    placer.choose([candidate])
    assert placer.scores == {"a": score}


def test_an_instance_that_looked_slow_is_measured_again() -> None:
    fast, slow = Instance("fast", ttft_estimate_s=0.1), Instance("slow", ttft_estimate_s=9.0)
    placer = Placer("load_balanced", "least_response_time", {"least_response_time.retest_after": 20.0})
    places = []
    for _ in range(100):
        places.append(placer.place([fast, slow]))
        fast.in_flight_count = slow.in_flight_count = 0
    assert [number for number, place in enumerate(places) if place == "slow"] == [41, 83]


def test_a_faster_instance_gets_more_of_a_burst() -> None:
    instances = [Instance("a", ttft_estimate_s=0.1), Instance("b", ttft_estimate_s=0.3)]
    counts = Counter(Placer("load_balanced", "least_response_time").spread(instances, 40))
    assert counts == {"a": 30, "b": 10}


def test_power_of_two_takes_the_better_of_two_it_drew() -> None:
    instances = loaded(a=0, b=1, c=2, d=3)
    placer = Placer("load_balanced", "power_of_two", seed=5)
    counts: Counter[str] = Counter()
    for _ in range(3000):
        chosen = placer.choose(instances)
        drawn = [name for name, score in placer.scores.items() if score < float("inf")]
        assert len(drawn) == 2
        assert chosen == min(drawn)
        counts[chosen] += 1
    # Chances 3/6, 2/6, 1/6, 0.
    assert 1400 < counts["a"] < 1600
    assert 900 < counts["b"] < 1100
    assert 400 < counts["c"] < 600
    assert counts["d"] == 0
    assert Placer("load_balanced", "power_of_two").choose(loaded(only=7)) == "only"


def test_power_of_two_keeps_queues_short() -> None:
    names = [f"i{number:03}" for number in range(100)]

    def longest(strategy: str) -> int:
        instances = fleet(*names, concurrency_limit=1000)
        Placer(strategy, "power_of_two", seed=1).spread(instances, 500)
        return max(instance.in_flight_count for instance in instances)

    assert longest("load_balanced") <= 7
    assert longest("random") >= 10
