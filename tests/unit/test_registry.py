"""Names of policies, strategies and balancers: those that exist, and answers about those that do not."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sagecp.core.config import SchedulerConfig
from sagecp.core.errors import ErrorReason, UnknownNameError
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.registry import Registry
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES, make_strategy
from sagecp.core.scheduler import Scheduler

# The names that the contract fixes.
CONTRACT: list[tuple[Registry[Any], str, set[str]]] = [
    (
        SCHEDULING_POLICIES,
        "scheduling policy",
        {"fifo", "priority", "slo_aware", "cost_optimized", "adaptive"},
    ),
    (
        ROUTING_STRATEGIES,
        "routing strategy",
        {"load_balanced", "round_robin", "random", "affinity", "locality"},
    ),
    (
        LOAD_BALANCERS,
        "load balancer",
        {
            "weighted_round_robin",
            "least_connections",
            "least_response_time",
            "power_of_two",
            "predicted_latency",
        },
    ),
]


@pytest.mark.parametrize(("registry", "kind", "names"), CONTRACT)
def test_every_name_of_the_contract_is_there(registry: Registry[Any], kind: str, names: set[str]) -> None:
    assert registry.kind == kind
    assert set(registry.names) == names


@pytest.mark.parametrize(("registry", "kind", "names"), CONTRACT)
def test_classes_know_the_name_under_which_they_are_found(
    registry: Registry[Any], kind: str, names: set[str]
) -> None:
    assert list(registry.names) == sorted(registry.names)
    for name in registry.names:
        assert registry.get(name).name == name


@pytest.mark.parametrize(("registry", "kind", "names"), CONTRACT)
@pytest.mark.parametrize("wrong", ["no-such", "", "FIFO", " fifo"])
def test_an_unknown_name_is_answered_with_the_known_ones(
    registry: Registry[Any], kind: str, names: set[str], wrong: str
) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry.get(wrong)
    error = caught.value
    assert str(error) == f"{kind} {wrong!r} is unknown; choose one of: {', '.join(registry.names)}"
    assert error.reason is ErrorReason.UNKNOWN_POLICY
    assert (error.kind, error.name, error.known) == (kind, wrong, registry.names)
    assert error.metadata == {"known": ",".join(registry.names)}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("scheduling_policy", "no-such"),
        ("routing_strategy", "no-such"),
        ("load_balancer", "no-such"),
        ("load_balancer", "round_robin"),
    ],
)
def test_a_scheduler_is_not_made_from_unknown_names(field: str, wrong: str) -> None:
    names: dict[str, Any] = {field: wrong}
    with pytest.raises(UnknownNameError, match=f"'{wrong}'"):
        Scheduler(SchedulerConfig(**names))


def test_the_defaults_exist() -> None:
    config = SchedulerConfig()
    assert config.scheduling_policy in SCHEDULING_POLICIES.names
    assert config.routing_strategy in ROUTING_STRATEGIES.names
    assert config.load_balancer in LOAD_BALANCERS.names


def test_a_bad_balancer_is_found_even_where_the_strategy_uses_none() -> None:
    with pytest.raises(UnknownNameError):
        make_strategy("round_robin", "no-such", random.Random(0))


def test_one_line_adds_an_entry() -> None:
    class Newest:
        """What a contributor wrote."""

    registry: Registry[object] = Registry("kind of thing", [("newest", Newest)], planned=["next"])
    assert registry.names == ("newest",)
    assert registry.get("newest") is Newest
    with pytest.raises(UnknownNameError, match=r"^kind of thing 'next' is not available"):
        registry.get("next")
