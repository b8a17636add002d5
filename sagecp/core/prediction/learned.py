"""How fast an instance is by what was seen of it, for operators."""

from __future__ import annotations

import math

from sagecp.core.engine_state import LearnedPerformance
from sagecp.core.instance_load import InstanceLoad
from sagecp.core.prediction.placement import BATCH_TOKEN_COUNT

REFERENCE_TOKEN_COUNT = 1_000
"""Prompt tokens of the request whose time to first token is told, and context of a single decode."""
LONG_PROMPT_TOKEN_COUNT = 4_000
"""Prompt tokens that the rate of prefill is told for."""


def learned_performance(load: InstanceLoad, now: float) -> LearnedPerformance | None:
    """Return what is known of an instance's speed; ``None``: nothing was seen of its kind.

    Args:
        load: Its work and its speed.
        now: The time on the core's clock.
    """
    kind = load.kind
    count = kind.model.observation_count
    if not count and not kind.trusted:
        return None
    step = kind.model.parameters
    prefill_factor, decode_factor = load.ttft.factor(now), load.tpot.factor(now)
    decode_count, context = load.decode_count, load.context_token_count(now)
    long_s = step.prefill_s(LONG_PROMPT_TOKEN_COUNT, LONG_PROMPT_TOKEN_COUNT, batch_tokens=BATCH_TOKEN_COUNT)
    first_s = step.prefill_s(
        REFERENCE_TOKEN_COUNT, REFERENCE_TOKEN_COUNT, decode_count, context, BATCH_TOKEN_COUNT
    )
    return LearnedPerformance(
        kind=kind.name,
        observation_count=count,
        # Prefill and decode each have their own; one figure is their geometric mean.
        slowdown=math.sqrt(prefill_factor * decode_factor),
        single_step_s=step.decode_step_s(1, REFERENCE_TOKEN_COUNT) * decode_factor,
        step_s=step.decode_step_s(max(1, decode_count), context or REFERENCE_TOKEN_COUNT) * decode_factor,
        prefill_tokens_per_second=LONG_PROMPT_TOKEN_COUNT / max(1e-9, long_s * prefill_factor),
        ttft_s=load.backlog_s(now) + first_s * prefill_factor,
        prefill_request_count=load.prefill_count,
    )
