"""Requests with a hint or a size that suits one plan prefer instances so configured, and wait for none."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core.choice import choose
from sagecp.core.placement import PlacementInputs
from sagecp.core.receipts import run_again
from sagecp.core.types import ParallelismType
from tests.support.core_world import World, arrive, healthy
from tests.support.placement_rows import candidate_row, request_row

T = ParallelismType
BALANCERS = ("predicted_latency", "least_connections", "least_response_time", "weighted_round_robin")


def world(balancer: str = "predicted_latency", **parameters: float) -> World:
    made = World(load_balancer=balancer, scheduling_policy="fifo", parameters=parameters)
    made.effects(healthy("a-tensor", tensor_parallel_size=4, gpu_name="NVIDIA L40S"))
    made.effects(healthy("b-data", data_parallel_size=4, gpu_name="NVIDIA L40S"))
    made.effects(healthy("c-pipeline", pipeline_parallel_size=4, gpu_name="NVIDIA L40S"))
    return made


def placed(made: World, request_id: str, **fields: Any) -> str:
    made.effects(arrive(request_id, **fields))
    request = made.record(request_id)
    return request.instance_id


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize(
    ("hint", "expected"), [(T.TENSOR, "a-tensor"), (T.DATA, "b-data"), (T.PIPELINE, "c-pipeline")]
)
def test_a_hint_prefers_the_plan_it_names(balancer: str, hint: ParallelismType, expected: str) -> None:
    assert placed(world(balancer), "r", parallelism_hint=hint, prompt="hi") == expected


def test_a_hint_that_nobody_follows_changes_nothing() -> None:
    hinted = placed(world("least_connections"), "r", parallelism_hint=T.EXPERT, prompt="hi")
    assert hinted == placed(world("least_connections"), "r", prompt="hi")


def test_a_busy_instance_is_not_waited_for() -> None:
    made = world("least_connections")
    chosen = [placed(made, f"r{n}", parallelism_hint=T.DATA, prompt="hi") for n in range(6)]
    assert chosen[0] == "b-data"
    # With one request more it is worse by more than the preference.
    assert len(set(chosen)) == 3


def test_long_requests_prefer_the_plan_that_serves_them_fastest() -> None:
    made = world("least_connections", **{"placement.long_request_tokens": 1000.0})
    assert placed(made, "long", prompt_token_ids=tuple(range(5000))) == "a-tensor"


def test_the_preference_can_be_switched_off() -> None:
    made = world("least_connections", **{"placement.plan_preference": 0.0})
    plain = world("least_connections")
    hinted = placed(made, "r", parallelism_hint=T.PIPELINE, prompt="hi")
    assert hinted == placed(plain, "r", prompt="hi")


def test_the_receipt_gives_the_same_choice_again() -> None:
    made = world("least_connections")
    placed(made, "r", parallelism_hint=T.PIPELINE, prompt="hi")
    (request,) = made.scheduler.requests()
    (decision,) = request.decisions
    assert decision.inputs is not None
    assert [row.plan_mismatch for row in decision.inputs.candidates if row.instance_id == "a-tensor"] == [1]
    assert run_again(decision) == (decision.instance_id, decision.candidates)


def test_a_candidate_that_does_not_suit_is_worse_by_the_share() -> None:
    made = world("least_connections")
    strategy, policy = made.scheduler._dispatcher.strategy, made.scheduler._dispatcher.policy
    rows = (
        candidate_row("suits", in_flight_count=10),
        candidate_row("other", in_flight_count=9, plan_mismatch=1),
    )
    for share, expected in ((0.0, "other"), (0.05, "other"), (0.2, "suits")):
        inputs = PlacementInputs(
            request_row(),
            rows,
            {**made.scheduler.settings.current.values, "placement.plan_preference": share},
        )
        assert choose(strategy, policy, inputs).best.instance_id == expected
