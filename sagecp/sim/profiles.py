"""How long one engine step takes: constants per model and GPU, and the formula over them.

One step runs the decodes of all running requests and a chunk of prefill. With
``T`` scheduled tokens, ``KV`` the sum of the decodes' contexts, and prefill
chunks of ``c`` tokens starting at position ``p``:

    step = o + max(a0 + a1*T, b0 + b1*T) + g*KV + d*sum(c*(p + c/2))

The first arm of the maximum is the time to read the weights, the second the
time to compute with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

FIXED_PROFILE = "fixed"
INSTANT_PROFILE = "instant"


@dataclass(frozen=True, slots=True)
class StepProfile:
    """The constants of one model on one kind of GPU, times in seconds.

    Attributes:
        name: How a person chooses it.
        overhead_s: ``o``, per step: scheduling, sampling, launching.
        memory_base_s: ``a0``, reading the weights once.
        memory_per_token_s: ``a1``, per scheduled token while memory-bound.
        compute_base_s: ``b0``.
        compute_per_token_s: ``b1``, per scheduled token while compute-bound.
        context_per_token_s: ``g``, per token of decode context read.
        attention_per_token_pair_s: ``d``, per pair of prefill token and token before it.
        kv_token_capacity: Tokens that fit in the KV cache.
        tensor_parallel_size: GPUs that share each layer.
    """

    name: str
    overhead_s: float
    memory_base_s: float
    memory_per_token_s: float
    compute_base_s: float
    compute_per_token_s: float
    context_per_token_s: float
    attention_per_token_pair_s: float
    kv_token_capacity: int
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"profile {self.name!r}: {field.name} must be finite and >= 0, not {value}")
        for name in ("kv_token_capacity", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"profile {self.name!r}: {name} must be at least 1")

    def step_s(self, token_count: int, decode_context_tokens: int = 0, token_pairs: float = 0.0) -> float:
        """Return the duration of one step, in seconds.

        Args:
            token_count: Scheduled tokens, decodes and prefill chunks together.
            decode_context_tokens: Sum of the contexts of the decodes, the new token included.
            token_pairs: ``sum(c * (p + c/2))`` over the prefill chunks.
        """
        return (
            self.overhead_s
            + max(
                self.memory_base_s + self.memory_per_token_s * token_count,
                self.compute_base_s + self.compute_per_token_s * token_count,
            )
            + self.context_per_token_s * decode_context_tokens
            + self.attention_per_token_pair_s * token_pairs
        )


_MS, _US, _NS = 1e-3, 1e-6, 1e-9


def _profile(
    name: str,
    o_ms: float,
    a0_ms: float,
    a1_us: float,
    b0_ms: float,
    b1_us: float,
    g_us: float,
    d_ns: float,
    kv_tokens: int,
    tensor_parallel_size: int = 1,
) -> StepProfile:
    return StepProfile(
        name,
        o_ms * _MS,
        a0_ms * _MS,
        a1_us * _US,
        b0_ms * _MS,
        b1_us * _US,
        g_us * _US,
        d_ns * _NS,
        kv_tokens,
        tensor_parallel_size,
    )


_8B_H100 = _profile("8b-h100", 2.0, 6.1, 15, 2.9, 21.6, 0.049, 0.96, 410_000)
_70B_H100_TP8 = _profile("70b-h100-tp8", 2.5, 10.8, 17, 9.5, 44.3, 0.0155, 0.6, 1_290_000, 8)

# The linear layers' constants of the first five are fitted to published
# profiles of those GPUs (the L4's follow from a roofline only); attention's and
# the overhead are estimates. The pessimistic two follow ranges published for
# another simulator: 10-15 ms and 18-28 ms between tokens, 150 and 300 us per
# prompt token.
_NAMED = (
    _profile("8b-a100", 2.0, 10.0, 25, 6.4, 67.2, 0.082, 2.8, 410_000),
    _8B_H100,
    _profile("8b-l4", 2.5, 62, 60, 10, 210, 0.55, 8.7, 34_000),
    _profile("70b-h100-tp4", 2.5, 16.8, 18, 12.0, 66.6, 0.031, 1.2, 430_000, 4),
    _70B_H100_TP8,
    replace(_8B_H100, name="8b-h100-pessimistic", memory_base_s=10.5 * _MS, compute_per_token_s=150 * _US),
    replace(
        _70B_H100_TP8,
        name="70b-h100-tp8-pessimistic",
        memory_base_s=20.5 * _MS,
        compute_per_token_s=300 * _US,
    ),
    _profile(INSTANT_PROFILE, 0, 0, 0, 0, 0, 0, 0, 524_288),
    # Only the KV capacity counts: the fixed times are given beside it.
    _profile(FIXED_PROFILE, 0, 0, 0, 0, 0, 0, 0, 524_288),
)

PROFILES: dict[str, StepProfile] = {profile.name: profile for profile in _NAMED}
"""Every profile by name. ``instant`` costs nothing; ``fixed`` paces each request by given times."""


def get_profile(name: str) -> StepProfile:
    """Return the profile of this name.

    Raises:
        ValueError: There is none; the message lists those that exist.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise ValueError(f"unknown profile {name!r}; choose one of: {', '.join(PROFILES)}") from None
