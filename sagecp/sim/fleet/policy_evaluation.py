"""Replays what the adaptive policy wants to know: the production scheduler under each candidate.

Run as a module it is the process in which a server has this done: one
:class:`~sagecp.core.policy_replay.PolicyReplay` is read from the standard
input, and the scores are written to the standard output, both pickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from dataclasses import asdict
from typing import IO

from sagecp.core.policy_replay import PolicyReplay, PolicyScore, ReplayArrival, ReplayInstance
from sagecp.core.types import RequestPriority
from sagecp.sim.fleet.fleet_file import SimInstance
from sagecp.sim.fleet.outcomes import OutcomeArrays
from sagecp.sim.fleet.scheduler_controller import SchedulerController, SchedulerSetup
from sagecp.sim.fleet.simulation import Simulation, SimulationResult
from sagecp.sim.fleet.traces import Trace, TraceRequest
from sagecp.sim.profiles import StepProfile

_FIRST_PORT = 8000
# Of engines that do not say: large enough that prompts, not it, are the limit.
_DEFAULT_KEY_VALUE_TOKENS = 500_000
_MAX_BATCH_TOKENS = 2048
_NICENESS = 10


def score_policies(replay: PolicyReplay) -> tuple[PolicyScore, ...]:
    """Return how each candidate would have done. Equal replays give equal scores.

    The fleet is idle when the replay begins, and its engines take exactly as
    long as the core has learned that they do; answers that had not ended are
    as long as they were expected to be. What had been learned of output
    lengths is learned from the answers of the window beforehand.
    """
    fleet = tuple(_instance(index, each) for index, each in enumerate(replay.instances))
    trace = _trace(replay, fleet)
    return tuple(_score(replay, policy, trace, fleet) for policy in replay.candidates)


def _score(replay: PolicyReplay, policy: str, trace: Trace, fleet: tuple[SimInstance, ...]) -> PolicyScore:
    setup = SchedulerSetup(
        scheduling_policy=policy,
        routing_strategy=replay.routing_strategy,
        load_balancer=replay.load_balancer,
        parameters=replay.parameters,
    )
    controller = SchedulerController(setup, trace.block_token_count)
    lengths = controller.scheduler.book.output_lengths
    for arrival in replay.arrivals:
        if arrival.output_known:
            lengths.observe(
                arrival.tenant_id,
                arrival.max_tokens,
                arrival.prompt_token_count,
                arrival.output_token_count,
            )
    result = Simulation(trace, fleet, controller).run()
    return _score_of(policy, replay, result.outcomes.as_arrays(), _usd(result, fleet))


def _score_of(policy: str, replay: PolicyReplay, rows: OutcomeArrays, usd: float | None) -> PolicyScore:
    judged = rows.arrival_s >= replay.judged_from_s
    good = rows.good & judged
    weight_of = [0.0] + [replay.class_weights[priority] for priority in RequestPriority]
    weights = [weight_of[number] for number in rows.priority]
    total = sum(weight for weight, counts in zip(weights, judged, strict=True) if counts)
    gained = sum(weight for weight, counts in zip(weights, good, strict=True) if counts)
    tokens = int(rows.prompt_token_count[judged].sum())
    good_count = int(rows.good.sum())
    return PolicyScore(
        policy=policy,
        attainment=gained / total if total else 1.0,
        token_weighted_attainment=int(rows.prompt_token_count[good].sum()) / tokens if tokens else 1.0,
        # Of all: engines ran for the arrivals before those that are judged as well.
        usd_per_good=usd / good_count if usd and good_count else None,
    )


def _usd(result: SimulationResult, fleet: tuple[SimInstance, ...]) -> float | None:
    if not all(each.usd_per_gpu_hour > 0.0 for each in fleet):
        return None
    return sum(busy_s * each.usd_per_hour / 3600.0 for busy_s, each in zip(result.busy_s, fleet, strict=True))


def _instance(index: int, instance: ReplayInstance) -> SimInstance:
    capacity = instance.key_value_token_capacity or _DEFAULT_KEY_VALUE_TOKENS
    return SimInstance(
        instance_id=instance.instance_id,
        port=_FIRST_PORT + index,
        profile=StepProfile(
            f"kind {instance.kind}",
            **asdict(instance.step_time),
            kv_token_capacity=capacity,
            tensor_parallel_size=instance.tensor_parallel_size,
        ),
        kv_token_capacity=capacity,
        # Each running request needs a token of every step.
        max_running_requests=min(instance.max_request_count, _MAX_BATCH_TOKENS),
        max_batch_tokens=_MAX_BATCH_TOKENS,
        slowness=instance.slowness,
        model=instance.model,
        model_aliases=instance.model_aliases,
        # Kinds are told apart by it.
        gpu_name=f"{instance.gpu_name} {instance.kind}",
        gpu_count=instance.gpu_count,
        usd_per_gpu_hour=instance.usd_per_hour / instance.gpu_count,
    )


def _trace(replay: PolicyReplay, fleet: tuple[SimInstance, ...]) -> Trace:
    block = replay.block_token_count
    # An estimate from bytes can be more than any engine holds.
    room = min(each.kv_token_capacity // block * block for each in fleet)
    return Trace(
        name="replay",
        block_token_count=block,
        requests=tuple(_request(number, each, room) for number, each in enumerate(replay.arrivals)),
        duration_s=replay.duration_s,
        is_closed_loop=False,
    )


def _request(number: int, arrival: ReplayArrival, room: int) -> TraceRequest:
    prompt = max(1, min(arrival.prompt_token_count, room - 1))
    return TraceRequest(
        request_id=f"r{number:06d}",
        arrival_s=arrival.arrival_s,
        prompt_token_count=prompt,
        output_token_count=max(1, min(arrival.output_token_count, room - prompt)),
        block_hashes=arrival.block_hashes,
        tenant_id=arrival.tenant_id,
        user_id=arrival.user_id,
        session_id=arrival.session_id,
        model=arrival.model,
        priority=arrival.priority,
        deadline_ms=None if arrival.deadline_s is None else arrival.deadline_s * 1000.0,
        ttft_slo_ms=arrival.ttft_objective_s * 1000.0,
        tpot_slo_ms=arrival.tpot_objective_s * 1000.0,
        max_tokens=arrival.max_tokens,
        cost_budget_usd=arrival.cost_budget_usd,
    )


def main(source: IO[bytes], target: IO[bytes]) -> None:
    """Answer one replay; both sides are processes of one server."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICENESS)
    replay: PolicyReplay = pickle.load(source)  # noqa: S301 - written by the server that started this
    pickle.dump(score_policies(replay), target)
    target.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
