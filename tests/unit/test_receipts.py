"""Receipts: a decision made again from its own inputs is the same decision, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.choice import Choice, choose
from sagecp.core.errors import SageError
from sagecp.core.placement import CandidateRow, PlacementInputs
from sagecp.core.policies.base import PolicyContext
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.receipts import RECEIPT_CANDIDATE_LIMIT, kept_inputs, kept_scores, run_again
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES, make_strategy
from sagecp.core.service_books import ServiceBooks
from sagecp.core.settings import PARAMETERS
from sagecp.core.types import PromptDigest, RequestPriority, SchedulingDecision
from tests.support.core_world import STEP_TIME, World, arrive, configure, healthy
from tests.support.placement_rows import Instance, asked, candidate_row, request_row

TIME_S = st.one_of(st.just(float("inf")), st.floats(0.0, 100.0))
STEP_TIMES = st.builds(
    StepTimeParameters,
    overhead_s=st.floats(0.0, 0.01),
    memory_base_s=st.floats(0.001, 0.1),
    memory_per_token_s=st.floats(0.0, 1e-4),
    compute_base_s=st.floats(0.0, 0.1),
    compute_per_token_s=st.floats(1e-6, 1e-3),
    context_per_token_s=st.floats(0.0, 1e-6),
    attention_per_token_pair_s=st.floats(0.0, 1e-8),
)
ROW = st.fixed_dictionaries(
    {
        "last_dispatch_sequence": st.integers(0, 5),
        "is_open": st.sampled_from([1, 1, 0]),
        "opens_in_s": st.floats(0.0, 5.0),
        "in_flight_count": st.integers(0, 32),
        "concurrency_limit": st.sampled_from([1, 8, 256]),
        "cached_token_count": st.sampled_from([0, 0, 256, 999]),
        "backlog_s": st.floats(0.0, 20.0),
        "decode_count": st.integers(0, 64),
        "context_token_count": st.floats(0.0, 1e5),
        "prefill_share": st.floats(0.0, 1.0),
        "ttft_factor": st.floats(0.02, 50.0),
        "tpot_factor": st.floats(0.02, 50.0),
        "sigma": st.floats(0.05, 2.0),
        "latency_estimate_s": TIME_S,
        "ttft_estimate_s": TIME_S,
        "tpot_estimate_s": TIME_S,
        "usd_per_hour": st.sampled_from([0.0, 1.0, 12.0]),
        "step_time": STEP_TIMES,
    }
)
REQUEST = st.fixed_dictionaries(
    {
        "prompt_token_count": st.integers(1, 200_000),
        "output_token_count": st.floats(1.0, 4000.0),
        "waited_s": st.floats(0.0, 60.0),
        "ttft_objective_s": st.floats(0.01, 30.0),
        "tpot_objective_s": st.floats(0.005, 1.0),
        "priority": st.sampled_from([int(priority) for priority in RequestPriority]),
    }
)


def decide(
    names: tuple[str, str, str], request: dict[str, Any], fields: Sequence[dict[str, Any]], seed: int
) -> tuple[Choice, SchedulingDecision]:
    """Decide as the dispatcher does, with a strategy that draws and remembers, and write the receipt."""
    scheduling_policy, routing_strategy, load_balancer = names
    parameters = PARAMETERS.resolve({})
    policy = SCHEDULING_POLICIES.get(scheduling_policy)(PolicyContext(parameters, ServiceBooks()))
    strategy = make_strategy(routing_strategy, load_balancer, random.Random(seed))
    # Whoever is open comes first, as from the dispatcher.
    fields = sorted(fields, key=lambda each: -each["is_open"])
    instances = [
        Instance(
            f"i{number}",
            in_flight_count=each["in_flight_count"],
            concurrency_limit=each["concurrency_limit"],
            last_dispatch_sequence=each["last_dispatch_sequence"],
        )
        for number, each in enumerate(fields)
    ]
    strategy.note_fleet([instance.instance_id for instance in instances])
    extras = strategy.extras(asked("session" if seed % 2 else ""), instances)
    rows = tuple(
        candidate_row(instance.instance_id, extra=0.0 if extras is None else extras[number], **each)
        for number, (instance, each) in enumerate(zip(instances, fields, strict=True))
    )
    inputs = PlacementInputs(request_row(**request), rows, parameters)
    choice = choose(strategy, policy, inputs)
    decision = SchedulingDecision(
        request_id="r",
        epoch=1,
        instance_id=choice.chosen.instance_id if choice.chosen else "",
        scheduling_policy=scheduling_policy,
        routing_strategy=routing_strategy,
        load_balancer=load_balancer,
        candidates=kept_scores(choice),
        policy_in_force=policy.in_force,
        inputs=kept_inputs(inputs, choice),
    )
    return choice, decision


@pytest.mark.parametrize("scheduling_policy", SCHEDULING_POLICIES.names)
@pytest.mark.parametrize("routing_strategy", ROUTING_STRATEGIES.names)
@pytest.mark.parametrize("load_balancer", LOAD_BALANCERS.names)
@settings(max_examples=3)
@given(request=REQUEST, fields=st.lists(ROW, min_size=1, max_size=20), seed=st.integers(0, 1000))
def test_a_decision_runs_again_bit_for_bit(
    scheduling_policy: str,
    routing_strategy: str,
    load_balancer: str,
    request: dict[str, Any],
    fields: list[dict[str, Any]],
    seed: int,
) -> None:
    _, decision = decide((scheduling_policy, routing_strategy, load_balancer), request, fields, seed)
    assert run_again(decision) == (decision.instance_id, decision.candidates)


def ranked(count: int, open_numbers: set[int]) -> tuple[PlacementInputs, Choice]:
    """Candidates in the order of their numbers, where only some are open."""
    rows = tuple(candidate_row(f"i{n:02}", is_open=int(n in open_numbers)) for n in range(count))
    chosen = next((row for number, row in enumerate(rows) if number in open_numbers), None)
    choice = Choice(chosen, tuple((float(number), row) for number, row in enumerate(rows)))
    return PlacementInputs(request_row(), tuple(reversed(rows)), PARAMETERS.resolve({})), choice


def ids(rows: Sequence[CandidateRow]) -> list[str]:
    return [row.instance_id for row in rows]


@pytest.mark.parametrize(
    ("count", "open_numbers", "kept"),
    [
        (1, {0}, ["i00"]),
        (8, {7}, [f"i0{n}" for n in range(8)]),
        (20, {0, 1}, [f"i0{n}" for n in range(8)]),
        # The chosen one is kept, however many better ones are busy.
        (20, {12, 13}, [*(f"i0{n}" for n in range(7)), "i12"]),
        (20, set(), [f"i0{n}" for n in range(8)]),
    ],
)
def test_a_receipt_keeps_the_best_and_the_chosen(count: int, open_numbers: set[int], kept: list[str]) -> None:
    inputs, choice = ranked(count, open_numbers)
    assert sorted(ids(kept_inputs(inputs, choice).candidates)) == sorted(kept)
    assert [score.instance_id for score in kept_scores(choice)] == kept
    assert len(kept) <= RECEIPT_CANDIDATE_LIMIT


def test_a_receipt_without_inputs_cannot_be_run_again() -> None:
    decision = SchedulingDecision(request_id="r1", epoch=1, instance_id="a")
    with pytest.raises(SageError, match="the receipt of 'r1' holds no inputs"):
        run_again(decision)


@pytest.mark.parametrize("fleet_size", [3, 50])
def test_the_schedulers_receipts_run_again_whatever_changed_since(fleet_size: int) -> None:
    draw = random.Random(fleet_size)
    world = World(default_concurrency_limit=4, parameters={"dispatch.prefill_window_s": 0.25})
    world.feed(
        *(
            healthy(f"i{n:02}", step_time=STEP_TIME, usd_per_gpu_hour=draw.choice([None, 1.0, 3.0]))
            for n in range(fleet_size)
        )
    )
    decisions = []
    for number in range(150):
        if number % 10 == 0:
            world.feed(
                configure(
                    draw.choice(SCHEDULING_POLICIES.names),
                    draw.choice(ROUTING_STRATEGIES.names),
                    draw.choice(LOAD_BALANCERS.names),
                    parameters={"dispatch.patience": draw.choice([0.0, 0.05, 5.0])},
                )
            )
        world.now += draw.choice([0.0, 0.1, 0.5])
        digest = PromptDigest(draw.choice([200, 8000]), tuple(range(draw.randrange(12))), 16)
        running = [record for record in world.scheduler.requests() if not record.queued]
        events: list[ev.Event] = [
            arrive(f"r{number}", prompt_digest=digest, session_id=draw.choice(["", "s1", "s2"]))
        ]
        if len(running) > fleet_size:
            events.append(ev.AttemptSucceeded(running[0].request_id, running[0].epoch, 16))
        for event in events:
            decisions += [
                effect.decision for effect in world.effects(event) if isinstance(effect, fx.DispatchAttempt)
            ]
    assert len(decisions) > 40
    for decision in decisions:
        assert run_again(decision) == (decision.instance_id, decision.candidates)
        assert len(decision.candidates) <= RECEIPT_CANDIDATE_LIMIT
        assert decision.instance_id in [score.instance_id for score in decision.candidates]


def test_other_parameters_give_another_decision() -> None:
    """The receipt holds the parameters that were in force, and they matter."""
    idle: dict[str, Any] = {
        "is_open": 1,
        "in_flight_count": 0,
        "concurrency_limit": 8,
        "last_dispatch_sequence": 0,
    }
    fields = [idle | {"cached_token_count": 900, "backlog_s": 0.05}, idle]
    _, decision = decide(
        ("fifo", "load_balanced", "predicted_latency"), {"prompt_token_count": 1000}, fields, 0
    )
    assert decision.inputs is not None
    places = {}
    for work_price in (10.0, 0.0):
        parameters = dict(decision.inputs.parameters) | {"predicted_latency.work_price": work_price}
        receipt = replace(decision, inputs=replace(decision.inputs, parameters=parameters))
        places[work_price], _ = run_again(receipt)
    # Where its start is cached, or where it starts sooner.
    assert places == {10.0: "i0", 0.0: "i1"}
