"""A stretch of the past, to be lived through again under several policies; and what came of it.

These are values: the core makes a :class:`PolicyReplay`, something outside of
it answers with one :class:`PolicyScore` per policy, in another process perhaps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.types import RequestPriority


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayArrival:
    """One request as it arrived.

    Attributes:
        arrival_s: Since the replay began.
        model: Served name.
        block_hashes: Content of the prompt's leading blocks; may cover less than the prompt.
        output_token_count: Per choice: real, or else as it was expected.
        output_known: Whether it is real.
        ttft_objective_s: From arrival to the first token.
        tpot_objective_s: Between tokens.
        deadline_s: From arrival to the last token; ``None``: none.
        cost_budget_usd: Most it may cost; ``None``: no limit.
    """

    arrival_s: float
    model: str
    tenant_id: str
    session_id: str
    user_id: str
    priority: RequestPriority
    prompt_token_count: int
    block_hashes: tuple[int, ...]
    output_token_count: int
    output_known: bool
    max_tokens: int | None
    ttft_objective_s: float
    tpot_objective_s: float
    deadline_s: float | None = None
    cost_budget_usd: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayInstance:
    """One instance as it was when the replay was asked for.

    Attributes:
        kind: Number of its kind; instances of one kind share ``step_time``.
        step_time: What was learned of its kind.
        slowness: How many times as long this one takes.
        key_value_token_capacity: ``None``: unknown.
        max_request_count: Most requests to have there at once.
        usd_per_hour: Price of the whole instance; 0: unknown.
    """

    instance_id: str
    kind: int
    model: str
    model_aliases: tuple[str, ...]
    gpu_name: str
    gpu_count: int
    tensor_parallel_size: int
    step_time: StepTimeParameters
    slowness: float
    key_value_token_capacity: int | None
    max_request_count: int
    usd_per_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyReplay:
    """What to replay, and under which policies.

    Attributes:
        evaluation_id: Comes back with the scores.
        candidates: Names of policies; the one in force is among them.
        arrivals: In order; where the fleet is large, every so many of them.
        duration_s: From the replay's begin to the present.
        judged_from_s: Earlier arrivals only fill the fleet; they do not count.
        block_token_count: Tokens in a block of the prompts.
        instances: In the same proportion to the fleet as the arrivals to all.
        parameters: Those that differ from their defaults.
        class_weights: What meeting the objectives of a request counts.
    """

    evaluation_id: int
    candidates: tuple[str, ...]
    arrivals: tuple[ReplayArrival, ...]
    duration_s: float
    judged_from_s: float
    block_token_count: int
    instances: tuple[ReplayInstance, ...]
    routing_strategy: str
    load_balancer: str
    parameters: Mapping[str, float]
    class_weights: Mapping[RequestPriority, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyScore:
    """How one policy did in a replay.

    Attributes:
        policy: Its name.
        attainment: Share of requests that met every objective, each weighted by its class.
        token_weighted_attainment: Prompt tokens of those over the tokens of all.
        usd_per_good: Price of the time that engines ran, per request that met its
            objectives; ``None``: unknown, or none did.
    """

    policy: str
    attainment: float
    token_weighted_attainment: float
    usd_per_good: float | None = None
