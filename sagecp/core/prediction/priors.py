"""What to believe of an engine's step times before it has run: measured ones, scaled by a roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from sagecp.core.gpu_specifications import GpuSpecification, find_gpu
from sagecp.core.prediction.model_size import ModelSize, model_size_from_name, shape_of
from sagecp.core.prediction.step_time import StepTimeParameters

_MS, _US, _NS = 1e-3, 1e-6, 1e-9


@dataclass(frozen=True, slots=True)
class Prior:
    """Step-time constants to start from.

    Attributes:
        parameters: The constants.
        trusted: Whether GPU and model are known well enough for decisions that
            reject requests. An untrusted prior may be several times off.
        source: Where they come from, in words for people.
    """

    parameters: StepTimeParameters
    trusted: bool
    source: str


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A configuration whose constants are known."""

    name: str
    size: ModelSize
    gpu_name: str
    tensor_parallel_size: int
    parameters: StepTimeParameters


def _anchor(
    billions: float,
    gpu_name: str,
    tensor_parallel_size: int,
    o_ms: float,
    a0_ms: float,
    a1_us: float,
    b0_ms: float,
    b1_us: float,
    g_us: float,
    d_ns: float,
) -> _Anchor:
    return _Anchor(
        f"{billions:.0f}B on {tensor_parallel_size} x {gpu_name}",
        ModelSize(total_billions=billions, active_billions=billions),
        gpu_name,
        tensor_parallel_size,
        StepTimeParameters(
            overhead_s=o_ms * _MS,
            memory_base_s=a0_ms * _MS,
            memory_per_token_s=a1_us * _US,
            compute_base_s=b0_ms * _MS,
            compute_per_token_s=b1_us * _US,
            context_per_token_s=g_us * _US,
            attention_per_token_pair_s=d_ns * _NS,
        ),
    )


# Linear layers of the A100's and H100's: fitted to the profiles published with
# Vidur (MLSys'24). The L4's, attention and overhead: roofline estimates.
_ANCHORS = (
    _anchor(8.03, "A100", 1, 2.0, 10.0, 25, 6.4, 67.2, 0.082, 2.8),
    _anchor(8.03, "H100", 1, 2.0, 6.1, 15, 2.9, 21.6, 0.049, 0.96),
    _anchor(8.03, "L4", 1, 2.5, 62, 60, 10, 210, 0.55, 8.7),
    _anchor(70.6, "H100", 4, 2.5, 16.8, 18, 12.0, 66.6, 0.031, 1.2),
    _anchor(70.6, "H100", 8, 2.5, 10.8, 17, 9.5, 44.3, 0.0155, 0.6),
)

_GENERIC_GPU_NAME = "A100"
_GENERIC_SIZE = ModelSize(total_billions=8.03, active_billions=8.03)

# Shares of the data sheet's rates that the anchors reach.
_WEIGHT_READ_EFFICIENCY = 0.79
_CONTEXT_READ_EFFICIENCY = 0.8
_LINEAR_EFFICIENCY = 0.72
_ATTENTION_EFFICIENCY = 0.55
_LINK_EFFICIENCY = 0.34
# Each layer joins partial results twice; a small message costs this much.
_ALL_REDUCE_S = 24 * _US
# From one pipeline stage to the next: an assumption.
_HAND_OVER_S = 0.5 * _MS
_BASE_OF_COMPUTE = 0.55
_TOKEN_OF_MEMORY = 0.35
_KEY_VALUE_HEAD_COUNT = 8


def prior_for(
    gpu_name: str,
    model_name: str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    parameter_count_billions: float | None = None,
) -> Prior:
    """Return step-time constants for an instance that has not been observed.

    The nearest known configuration, each constant scaled by the ratio of two
    rooflines: weights and contexts by memory bandwidth, linear layers and
    attention by matrix throughput, all-reduce by link bandwidth, sizes by the
    usual shape of a dense model with so many parameters.

    A token passes through all pipeline stages in turn, so that they shorten no
    step; each only adds a hand-over to the overhead. Such a prior is not trusted,
    because stages work on several batches at once, which the formula leaves out.

    Args:
        gpu_name: As NVML gives it; ``""``: unknown.
        model_name: Its size is guessed from it.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: Stages.
        parameter_count_billions: All parameters, where they are known better
            than from the name.
    """
    gpu = find_gpu(gpu_name)
    size = model_size_from_name(model_name)
    if parameter_count_billions is not None and parameter_count_billions > 0.0:
        size = _with_total(size, parameter_count_billions)
    stage_count = max(1, pipeline_parallel_size)
    trusted = gpu is not None and size is not None and not size.is_mixture and stage_count == 1
    target_gpu = gpu or _known_gpu(_GENERIC_GPU_NAME)
    target_size = size or _GENERIC_SIZE
    sharing = max(1, tensor_parallel_size)
    anchor = min(_ANCHORS, key=lambda known: _distance(known, target_size, target_gpu, sharing))
    wanted = _roofline(target_size, target_gpu, sharing)
    given = _roofline(anchor.size, _known_gpu(anchor.gpu_name), anchor.tensor_parallel_size)
    parameters = StepTimeParameters(
        **{
            name: getattr(anchor.parameters, name) * getattr(wanted, name) / getattr(given, name)
            for name in _FIELD_NAMES
        }
    )
    parameters = replace(parameters, overhead_s=parameters.overhead_s + (stage_count - 1) * _HAND_OVER_S)
    return Prior(parameters, trusted, _source(anchor, gpu, size, gpu_name, model_name, stage_count))


_FIELD_NAMES = tuple(field.name for field in fields(StepTimeParameters))


def _with_total(guessed: ModelSize | None, total_billions: float) -> ModelSize:
    """Correct a size guessed from the name by a known number of parameters."""
    if guessed is None:
        return ModelSize(total_billions=total_billions, active_billions=total_billions)
    share = guessed.active_billions / guessed.total_billions
    return ModelSize(
        total_billions=total_billions,
        active_billions=total_billions * share,
        bytes_per_parameter=guessed.bytes_per_parameter,
    )


def _known_gpu(gpu_name: str) -> GpuSpecification:
    gpu = find_gpu(gpu_name)
    if gpu is None:
        raise ValueError(f"no data sheet of the GPU {gpu_name!r}")
    return gpu


def _distance(anchor: _Anchor, size: ModelSize, gpu: GpuSpecification, tensor_parallel_size: int) -> float:
    """How far a configuration is from a known one: the sum of the ratios' logarithms."""
    known = _known_gpu(anchor.gpu_name)
    return (
        abs(math.log(size.active_billions / anchor.size.active_billions))
        + abs(math.log(tensor_parallel_size / anchor.tensor_parallel_size))
        + abs(math.log(gpu.memory_gb_per_s / known.memory_gb_per_s))
        + abs(math.log(gpu.dense_tflops / known.dense_tflops))
    )


def _roofline(size: ModelSize, gpu: GpuSpecification, tensor_parallel_size: int) -> StepTimeParameters:
    """Step-time constants from first principles; the anchors correct what these leave out."""
    shape = shape_of(size.active_billions)
    memory_bytes_per_s = gpu.memory_gb_per_s * 1e9
    flops_per_s = gpu.dense_tflops * 1e12
    # A batch touches more experts than one token does, and not all: between both.
    read_billions = math.sqrt(size.active_billions * size.total_billions)
    read_s = (read_billions * 1e9 * size.bytes_per_parameter) / (
        tensor_parallel_size * _WEIGHT_READ_EFFICIENCY * memory_bytes_per_s
    )
    compute_s = 2.0 * size.active_billions * 1e9 / (tensor_parallel_size * _LINEAR_EFFICIENCY * flops_per_s)
    join_count = 2.0 * shape.layer_count if tensor_parallel_size > 1 else 0.0
    # A ring sends each of the two bytes 2 (n-1)/n times.
    joined_bytes = 2.0 * (tensor_parallel_size - 1) / tensor_parallel_size * shape.hidden_size * 2.0
    join_s = join_count * joined_bytes / (_LINK_EFFICIENCY * gpu.link_gb_per_s * 1e9)
    context_bytes = 2.0 * shape.layer_count * shape.key_value_width * 2.0
    # Heads are not split: beyond their number each GPU keeps a copy.
    context_sharing = min(tensor_parallel_size, _KEY_VALUE_HEAD_COUNT)
    memory_base_s = read_s + join_count * _ALL_REDUCE_S
    compute_per_token_s = compute_s + join_s
    return StepTimeParameters(
        overhead_s=(2.5 if tensor_parallel_size > 1 else 2.0) * _MS,
        memory_base_s=memory_base_s,
        memory_per_token_s=_TOKEN_OF_MEMORY * compute_per_token_s,
        compute_base_s=_BASE_OF_COMPUTE * memory_base_s,
        compute_per_token_s=compute_per_token_s,
        context_per_token_s=context_bytes / (context_sharing * _CONTEXT_READ_EFFICIENCY * memory_bytes_per_s),
        attention_per_token_pair_s=4.0
        * shape.layer_count
        * shape.hidden_size
        / (tensor_parallel_size * _ATTENTION_EFFICIENCY * flops_per_s),
    )


def _source(
    anchor: _Anchor,
    gpu: GpuSpecification | None,
    size: ModelSize | None,
    gpu_name: str,
    model_name: str,
    stage_count: int,
) -> str:
    source = f"scaled from {anchor.name}"
    if gpu is None:
        source += f"; GPU {gpu_name!r} is not known, taken as {_GENERIC_GPU_NAME}"
    if size is None:
        source += f"; size of model {model_name!r} is not known, taken as {_GENERIC_SIZE.total_billions:.0f}B"
    elif size.is_mixture:
        source += "; a mixture of experts, whose steps depend on how many a batch touches"
    if stage_count > 1:
        source += f"; {stage_count} pipeline stages, whose overlap is left out"
    return source
