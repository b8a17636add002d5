"""What is predicted of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.prediction.step_time import StepTimeParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Memory of the fullest GPU of a plan. Bytes per GPU unless said otherwise.

    Attributes:
        total_bytes: What the engine may take of the GPU.
        weight_bytes: Weights.
        activation_bytes: Most that a step holds beside them.
        cuda_graph_bytes: Captured graphs.
        runtime_bytes: CUDA, NCCL and the libraries.
        key_value_bytes_per_token: KV cache of one token.
        key_value_token_capacity: Tokens that fit the KV cache of one copy of the model, over
            all its GPUs and stages; 0: nothing is left.
        max_context_token_count: The context that must fit.
    """

    total_bytes: int
    weight_bytes: int
    activation_bytes: int
    cuda_graph_bytes: int
    runtime_bytes: int
    key_value_bytes_per_token: float
    key_value_token_capacity: int
    max_context_token_count: int

    @property
    def key_value_bytes(self) -> int:
        """What is left for the KV cache; below 0: by how much it does not fit."""
        return self.total_bytes - (
            self.weight_bytes + self.activation_bytes + self.cuda_graph_bytes + self.runtime_bytes
        )

    @property
    def fits(self) -> bool:
        """Whether the weights and one request of the longest context fit."""
        return self.key_value_token_capacity >= self.max_context_token_count


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEstimate:
    """What a plan gives and costs. Rates are of the whole plan, all replicas together.

    Attributes:
        config: The plan.
        gpu_name: Kind of its GPUs.
        memory: What fits.
        step_time: Constants of a step of one copy, as the scheduler and the simulator use them.
        single_ttft_s: Time to first token of a mean prompt on an idle copy.
        single_tpot_s: Time per output token of a single stream.
        goodput: Requests per second of which the wanted share meets the objectives; without
            objectives, as many as are served.
        ttft_s: Time to first token that the wanted share stays below, at ``request_rate``.
        tpot_s: Likewise, per output token.
        request_rate: The rate that both are told at: the workload's, or the goodput.
        concurrent_request_count: Requests of one copy at a time at that rate.
        output_tokens_per_second: Of all replicas, when they are saturated.
        usd_per_hour: Price of the GPUs in use.
        usd_per_million_output_tokens: At the goodput; infinite: none is good.
        limited_by: What bounds the goodput: ``ttft``, ``tpot``, ``memory``, ``batch`` or ``compute``.
        carries_load: Whether the workload's rate is within the goodput.
    """

    config: ParallelismConfig
    gpu_name: str
    memory: MemoryEstimate
    step_time: StepTimeParameters
    single_ttft_s: float
    single_tpot_s: float
    goodput: float
    ttft_s: float
    tpot_s: float
    request_rate: float
    concurrent_request_count: float
    output_tokens_per_second: float
    usd_per_hour: float
    usd_per_million_output_tokens: float
    limited_by: str
    carries_load: bool

    @property
    def goodput_per_usd(self) -> float:
        """Good requests for a dollar."""
        return self.goodput * 3600.0 / self.usd_per_hour if self.usd_per_hour > 0.0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedPlan:
    """A plan that cannot be, with every reason; each says what would make it possible."""

    config: ParallelismConfig
    gpu_name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningResult:
    """Answer of the planner.

    Attributes:
        plans: Every plan that can be, best first for the goal.
        pareto_front: Those of them that no other beats in time to first token, time per
            output token, throughput and price at once; a subset, in the same order.
        rejected: Those that cannot be.
        summary: Why the first is recommended, in a sentence or two; where there is none, what
            would make one possible.
        warnings: What to know before trusting it.
    """

    plans: tuple[PlanEstimate, ...]
    pareto_front: tuple[PlanEstimate, ...]
    rejected: tuple[RejectedPlan, ...]
    summary: str
    warnings: tuple[str, ...] = ()

    @property
    def recommended(self) -> PlanEstimate | None:
        """The best, if there is any."""
        return self.plans[0] if self.plans else None
