"""How large a model is, as far as its name tells."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters of a model.

    Attributes:
        total_billions: All of them.
        active_billions: Those that compute one token; fewer than all in a mixture of experts.
        bytes_per_parameter: 2 for bf16, 1 for eight bits, 0.5 for four.
        expert_count: Experts per layer; 0: none, or the name does not tell.
    """

    total_billions: float
    active_billions: float
    bytes_per_parameter: float = 2.0
    expert_count: int = 0

    @property
    def is_mixture(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.active_billions < self.total_billions


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What step times depend on beside the number of parameters.

    Attributes:
        layer_count: Layers.
        hidden_size: Width of the residual stream.
        key_value_width: Key heads times their size; values have as many.
    """

    layer_count: float
    hidden_size: float
    key_value_width: float


# Names that tell no size, or not the active one, in lower case: total and active billions.
_NAMED_SIZES = (
    ("gpt-oss-120b", 117.0, 5.1),
    ("gpt-oss-20b", 21.0, 3.6),
    ("mixtral-8x7b", 46.7, 12.9),
    ("mixtral-8x22b", 141.0, 39.0),
    ("llama-4-scout", 109.0, 17.0),
    ("llama-4-maverick", 400.0, 17.0),
    ("phi-3-mini", 3.8, 3.8),
    ("phi-3.5-mini", 3.8, 3.8),
    ("phi-4-mini", 3.8, 3.8),
    ("phi-4", 14.7, 14.7),
    ("mistral-large", 123.0, 123.0),
    ("command-r-plus", 104.0, 104.0),
)
# Experts per layer of families whose names do not tell it, in lower case.
_NAMED_EXPERTS = (
    ("gpt-oss-120b", 128),
    ("gpt-oss-20b", 32),
    ("llama-4-scout", 16),
    ("llama-4-maverick", 128),
    ("deepseek-v3", 256),
    ("deepseek-r1", 256),
    ("qwen3-", 128),
)
# Families whose distilled models have the same name and a size of their own.
_UNSIZED_FAMILIES = (("deepseek-v3", 671.0, 37.0), ("deepseek-r1", 671.0, 37.0))

_NUMBER = r"(\d+(?:\.\d+)?)"
_EXPERTS = re.compile(rf"(?<![a-z0-9.]){_NUMBER}x{_NUMBER}b(?![a-z0-9])")
_BILLIONS = re.compile(rf"(?<![a-z0-9.]){_NUMBER}b(?![a-z0-9])")
_ACTIVE_BILLIONS = re.compile(rf"(?<![a-z0-9])a{_NUMBER}b(?![a-z0-9])")
_MILLIONS = re.compile(rf"(?<![a-z0-9.]){_NUMBER}m(?![a-z0-9])")
_FOUR_BITS = re.compile(r"(?<![a-z0-9])(awq|gptq|int4|4bit|w4a16|w4a8|nvfp4|mxfp4|fp4|q4)(?![a-z0-9])")
_EIGHT_BITS = re.compile(r"(?<![a-z0-9])(fp8|int8|8bit|w8a8|w8a16|q8)(?![a-z0-9])")

# Experts share attention and embeddings: a model of eight times seven billions
# has 46.7, of which two experts' 12.9 compute a token.
_MIXTURE_TOTAL, _MIXTURE_ACTIVE = 46.7 / 56.0, 12.9 / 14.0

# Published configurations of dense models (Qwen2.5, Llama 3), by billions of parameters.
_SHAPES = (
    (0.494, ModelShape(24, 896, 128)),
    (1.24, ModelShape(16, 2048, 512)),
    (3.21, ModelShape(28, 3072, 1024)),
    (8.03, ModelShape(32, 4096, 1024)),
    (14.8, ModelShape(48, 5120, 1024)),
    (32.8, ModelShape(64, 5120, 1024)),
    (70.6, ModelShape(80, 8192, 1024)),
    (405.0, ModelShape(126, 16384, 1024)),
)


def model_size_from_name(model_name: str) -> ModelSize | None:
    """Guess a model's size: ``llama-3-70b``, ``Qwen3-30B-A3B``, ``mixtral-8x7b``, ``opt-125m``.

    Returns:
        The size, or ``None`` when the name tells none.
    """
    name = model_name.lower().replace("_", "-")
    billions = _billions(name)
    if billions is None or not 0.0 < billions[1] <= billions[0]:
        return None
    bytes_per_parameter = 2.0
    if _FOUR_BITS.search(name) or "gpt-oss" in name:
        bytes_per_parameter = 0.5
    elif _EIGHT_BITS.search(name) or any(family in name for family, _, _ in _UNSIZED_FAMILIES):
        bytes_per_parameter = 1.0
    return ModelSize(
        total_billions=billions[0],
        active_billions=billions[1],
        bytes_per_parameter=bytes_per_parameter,
        expert_count=_expert_count(name) if billions[1] < billions[0] else 0,
    )


def shape_of(parameter_billions: float) -> ModelShape:
    """Return the usual shape of a dense model of so many parameters, between known ones on a log scale."""
    if parameter_billions <= _SHAPES[0][0]:
        return _SHAPES[0][1]
    for (lower, low), (upper, high) in pairwise(_SHAPES):
        if parameter_billions <= upper:
            share = math.log(parameter_billions / lower) / math.log(upper / lower)
            return ModelShape(
                _between(low.layer_count, high.layer_count, share),
                _between(low.hidden_size, high.hidden_size, share),
                _between(low.key_value_width, high.key_value_width, share),
            )
    return _SHAPES[-1][1]


def _billions(name: str) -> tuple[float, float] | None:
    """Total and active billions."""
    for known, total, active in _NAMED_SIZES:
        if known in name:
            return total, active
    if experts := _EXPERTS.search(name):
        count, size = float(experts[1]), float(experts[2])
        return count * size * _MIXTURE_TOTAL, min(2.0, count) * size * _MIXTURE_ACTIVE
    if dense := _BILLIONS.search(name):
        total = float(dense[1])
        sparse = _ACTIVE_BILLIONS.search(name)
        return total, float(sparse[1]) if sparse else total
    for known, total, active in _UNSIZED_FAMILIES:
        if known in name:
            return total, active
    if small := _MILLIONS.search(name):
        return float(small[1]) / 1000.0, float(small[1]) / 1000.0
    return None


def _expert_count(name: str) -> int:
    if experts := _EXPERTS.search(name):
        return int(float(experts[1]))
    return next((count for family, count in _NAMED_EXPERTS if family in name), 0)


def _between(low: float, high: float, share: float) -> float:
    return float(low * (high / low) ** share)
