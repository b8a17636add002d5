"""Which instances have a plan that suits a request: what its hint asks for, or what its size does.

A preference, and no more: an instance whose plan does not suit has its score made worse by the share
`placement.plan_preference`, so that it loses against one that suits and is about as good. Where scores
are losses, that is a share of the loss of one request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sagecp.core.instance_record import InstanceRecord
from sagecp.core.request import RequestRecord

# A plan as slow as this, relative to the fastest, still suits a long request.
_ALIKE = 1.1
# So that equal scores are told apart, zero ones as well.
_LEAST_PENALTY = 1e-9


def plan_mismatches(
    request: RequestRecord, instances: Sequence[InstanceRecord], parameters: Mapping[str, float]
) -> Sequence[int] | None:
    """Return 1 for each instance whose plan does not suit, 0 for the others; ``None``: all suit.

    A hint prefers instances of its type. Without one, a request of
    ``placement.long_request_tokens`` or more prefers the plans that would serve it alone in
    the least time, where the instances have different ones.

    Args:
        request: The request.
        instances: Those it could run on.
        parameters: The scheduler's.
    """
    if parameters["placement.plan_preference"] <= 0.0:
        return None
    hint = request.metadata.parallelism_hint
    if hint is not None:
        found = [0 if instance.plan.type is hint else 1 for instance in instances]
    elif (
        request.expected_token_count >= parameters["placement.long_request_tokens"]
        and len({instance.plan.sizes for instance in instances}) > 1
    ):
        times = [_time_alone_s(request, instance) for instance in instances]
        most = min(times) * _ALIKE
        found = [0 if time_s <= most else 1 for time_s in times]
    else:
        return None
    # Where none suits, or all do, there is nothing to prefer.
    return found if 0 < sum(found) < len(found) else None


def unsuited_score(score: float, share: float, *, is_loss: bool) -> float:
    """Return the score of a candidate whose plan does not suit."""
    return score + (share if is_loss else share * abs(score) + _LEAST_PENALTY)


def _time_alone_s(request: RequestRecord, instance: InstanceRecord) -> float:
    step = instance.load.kind.model.parameters
    prompt = request.prompt_token_count
    output = request.expected_output_token_count / max(1, request.metadata.choice_count)
    return step.prefill_s(prompt, prompt) + output * step.decode_step_s(1, prompt + output / 2.0)
