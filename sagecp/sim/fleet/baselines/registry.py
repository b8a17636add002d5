"""Every baseline by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sagecp.core.errors import UnknownNameError
from sagecp.sim.fleet.baselines.base import Baseline, BaselineParameters
from sagecp.sim.fleet.baselines.counting import (
    LeastConnections,
    LeastResponseTime,
    LeastTokens,
    PowerOfTwo,
    RandomChoice,
    RoundRobin,
    WeightedRoundRobin,
    WeightedRoundRobinParameters,
)
from sagecp.sim.fleet.baselines.hashing import ConsistentHash, ConsistentHashParameters
from sagecp.sim.fleet.baselines.late import EdfLate, LateBindingParameters, SjfLate
from sagecp.sim.fleet.baselines.predicted import (
    LlmdPredictedLatency,
    LlmdPredictedLatencyParameters,
    MinTtft,
    MinTtftReject,
    MinTtftRejectParameters,
)
from sagecp.sim.fleet.baselines.scored import (
    CacheAware,
    CacheAwareParameters,
    Dynamo,
    DynamoParameters,
    LlmdDefault,
    LlmdDefaultParameters,
)
from sagecp.sim.fleet.controller import Controller

ParametersT = TypeVar("ParametersT", bound=BaselineParameters)


def _factory(
    baseline: Callable[[ParametersT, int], Baseline], parameters_type: type[ParametersT], name: str
) -> Callable[..., Controller]:
    known = tuple(field.name for field in dataclasses.fields(parameters_type))

    def make(seed: int = 0, **parameters: Any) -> Controller:  # noqa: ANN401 - as the dataclass says
        unknown = sorted(parameters.keys() - set(known))
        if unknown:
            raise ValueError(f"baseline {name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
        return baseline(parameters_type(**parameters), seed)

    return make


BASELINES: Mapping[str, Callable[..., Controller]] = {
    "round_robin": _factory(RoundRobin, BaselineParameters, "round_robin"),
    "random": _factory(RandomChoice, BaselineParameters, "random"),
    "power_of_two": _factory(PowerOfTwo, BaselineParameters, "power_of_two"),
    "least_connections": _factory(LeastConnections, BaselineParameters, "least_connections"),
    "weighted_round_robin": _factory(
        WeightedRoundRobin, WeightedRoundRobinParameters, "weighted_round_robin"
    ),
    "least_response_time": _factory(LeastResponseTime, BaselineParameters, "least_response_time"),
    "least_tokens": _factory(LeastTokens, BaselineParameters, "least_tokens"),
    "consistent_hash": _factory(ConsistentHash, ConsistentHashParameters, "consistent_hash"),
    "llmd_default": _factory(LlmdDefault, LlmdDefaultParameters, "llmd_default"),
    "llmd_predicted_latency": _factory(
        LlmdPredictedLatency, LlmdPredictedLatencyParameters, "llmd_predicted_latency"
    ),
    "dynamo": _factory(Dynamo, DynamoParameters, "dynamo"),
    "cache_aware": _factory(CacheAware, CacheAwareParameters, "cache_aware"),
    "min_ttft": _factory(MinTtft, BaselineParameters, "min_ttft"),
    "min_ttft_reject": _factory(MinTtftReject, MinTtftRejectParameters, "min_ttft_reject"),
    "edf_late": _factory(EdfLate, LateBindingParameters, "edf_late"),
    "sjf_late": _factory(SjfLate, LateBindingParameters, "sjf_late"),
}
"""Makes a baseline from a seed and the parameters of its dataclass."""


def make_baseline(name: str, /, seed: int = 0, **parameters: Any) -> Controller:  # noqa: ANN401 - as in BASELINES
    """Return a baseline.

    Args:
        name: One of :data:`BASELINES`.
        seed: Of its generator.
        parameters: Of its dataclass; what is left out has its default.

    Raises:
        UnknownNameError: There is no such baseline; lists those that exist.
        ValueError: It has no such parameter, or a value is out of range.
    """
    try:
        factory = BASELINES[name]
    except KeyError:
        raise UnknownNameError("baseline", name, BASELINES) from None
    return factory(seed, **parameters)
