"""The memory model: against cited vLLM logs, and what must hold for any model and plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.plan_memory import MemoryCase, load_cases
from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.key_value_memory import token_capacity
from sagecp.core.parallelism.memory import (
    estimate_memory,
    key_value_bytes_per_token,
    weight_bytes_per_gpu,
)
from sagecp.core.parallelism.model_description import (
    ExpertShape,
    LatentAttention,
    ModelDescription,
    WeightFormat,
)
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.parameter_count import weight_bytes
from sagecp.core.parallelism.pipeline_stages import pipeline_stages, stage_layer_counts
from sagecp.core.parallelism.weight_memory import stage_weight_bytes
from tests.support.plan_values import LLAMA_8B

_CASES = load_cases()
_GIB = 1 << 30
# Part: largest relative error. Activations of engines that sort all logits are not predicted.
_PART_BOUNDS = {"weight_gib": 0.035, "request_gib": 0.01}

_LLAMA = replace(LLAMA_8B, name="llama")
_DEEPSEEK = ModelDescription(
    name="deepseek",
    architecture="DeepseekV3ForCausalLM",
    layer_count=61,
    hidden_size=7168,
    intermediate_size=18432,
    attention_head_count=128,
    key_value_head_count=128,
    head_size=192,
    value_head_size=128,
    latent_attention=LatentAttention(
        key_value_rank=512, rope_head_size=64, plain_head_size=128, query_rank=1536
    ),
    experts=ExpertShape(
        expert_count=256,
        active_expert_count=8,
        intermediate_size=2048,
        shared_intermediate_size=2048,
        layer_count=58,
    ),
    vocabulary_size=129280,
    max_context_token_count=163840,
    weight_format=WeightFormat.FP8,
)
_GEMMA = replace(
    _LLAMA,
    name="gemma",
    tied_embeddings=True,
    layer_count=30,
    sliding_layer_count=25,
    sliding_window_token_count=1024,
)
_MODELS = (_LLAMA, _DEEPSEEK, _GEMMA)
_POOL = GpuPool(gpu=require_gpu("H100-SXM-80GB"), gpus_per_node_count=8, node_count=8)
_OPTIONS = EngineOptions()


def _plan(tensor: int = 1, pipeline: int = 1, data: int = 1, expert: int = 1) -> ParallelismConfig:
    return ParallelismConfig(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=data,
        expert_parallel_size=expert,
    )


# --- Against what vLLM printed. ---


@pytest.mark.parametrize("case", [case for case in _CASES if case.within], ids=lambda case: case.name)
def test_predicts_the_printed_cache(case: MemoryCase) -> None:
    if case.error is not None:
        assert abs(case.error) <= case.within, case.source


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_predicts_the_printed_parts(case: MemoryCase) -> None:
    for part, bound in _PART_BOUNDS.items():
        if part in case.figures:
            assert case.predicted[part] == pytest.approx(case.figures[part], rel=bound), (part, case.source)


def test_enough_cases_were_not_fitted() -> None:
    """Ten per cent must hold on at least six that the constants were not made from."""
    held_out = [case for case in _CASES if case.role == "held_out" and case.within and case.error is not None]
    assert len(held_out) >= 6
    assert len({case.source for case in held_out}) >= 4


@pytest.mark.parametrize("case", [case for case in _CASES if not case.within], ids=lambda case: case.name)
def test_cases_that_miss_say_why_and_do_not_get_worse(case: MemoryCase) -> None:
    assert case.reason
    assert case.error is not None
    assert abs(case.error) <= case.missed_by


@pytest.mark.parametrize(
    "case", [case for case in _CASES if case.role == "fitted"], ids=lambda case: case.name
)
def test_keeps_the_parts_it_was_fitted_to(case: MemoryCase) -> None:
    for part in ("activation_gib", "runtime_gib", "graph_gib"):
        if part in case.figures:
            assert case.predicted[part] == pytest.approx(case.figures[part], abs=0.15), part


# --- Weights. ---


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (32, 1, (32,)),
        (32, 4, (8, 8, 8, 8)),
        (61, 2, (31, 30)),
        (61, 4, (15, 15, 16, 15)),
        (62, 4, (15, 16, 16, 15)),
        (63, 4, (16, 16, 16, 15)),
        (2, 3, (1, 1, 0)),
    ],
)
def test_divides_layers_over_stages_as_vllm_does(layers: int, stages: int, expected: tuple[int, ...]) -> None:
    assert stage_layer_counts(layers, stages) == expected


def test_leading_dense_layers_stand_on_the_first_stage() -> None:
    stages = pipeline_stages(_DEEPSEEK, 4)
    assert [stage.dense_layer_count for stage in stages] == [3, 0, 0, 0]
    assert sum(stage.expert_layer_count for stage in stages) == 58


def test_alternating_expert_layers_are_spread() -> None:
    experts = replace(_DEEPSEEK.experts, layer_count=24) if _DEEPSEEK.experts else None
    stages = pipeline_stages(replace(_DEEPSEEK, layer_count=48, experts=experts), 4)
    assert [stage.expert_layer_count for stage in stages] == [6, 6, 6, 6]


def test_embedding_is_on_the_first_stage_and_head_on_the_last() -> None:
    config = _plan(pipeline=4)
    sizes = [stage_weight_bytes(_LLAMA, config, stage) for stage in pipeline_stages(_LLAMA, 4)]
    table = _LLAMA.vocabulary_size * _LLAMA.hidden_size * 2
    assert sizes[0] - sizes[1] == sizes[3] - sizes[2] == table
    assert sizes[1] == sizes[2]


def test_tied_head_is_a_second_copy_only_on_another_stage() -> None:
    table = _GEMMA.vocabulary_size * _GEMMA.hidden_size * 2
    tied, untied = _GEMMA, replace(_GEMMA, tied_embeddings=False)
    assert weight_bytes_per_gpu(untied, _plan()) - weight_bytes_per_gpu(tied, _plan()) == table
    assert weight_bytes_per_gpu(untied, _plan(pipeline=2)) == weight_bytes_per_gpu(tied, _plan(pipeline=2))


def test_vocabulary_is_padded_before_it_is_split() -> None:
    odd = replace(_LLAMA, vocabulary_size=128257)
    even = replace(_LLAMA, vocabulary_size=128320)
    assert weight_bytes_per_gpu(odd, _plan(4)) == weight_bytes_per_gpu(even, _plan(4))


def test_key_value_heads_are_copied_where_there_are_fewer_than_gpus() -> None:
    per_head = _LLAMA.layer_count * _LLAMA.hidden_size * 2 * _LLAMA.head_size * 2
    few = replace(_LLAMA, key_value_head_count=2)
    one = replace(_LLAMA, key_value_head_count=1)
    # Eight GPUs hold one head each, whether there are two or only one.
    assert weight_bytes_per_gpu(few, _plan(8)) == weight_bytes_per_gpu(one, _plan(8))
    assert weight_bytes_per_gpu(few, _plan(1)) - weight_bytes_per_gpu(one, _plan(1)) == per_head


def test_experts_are_spread_whole_or_cut() -> None:
    """Either way every GPU of the group has as much of them; with odd counts the fullest has one more."""
    spread = weight_bytes_per_gpu(_DEEPSEEK, _plan(tensor=8, expert=8))
    cut = weight_bytes_per_gpu(_DEEPSEEK, _plan(tensor=8))
    assert spread == cut
    over_copies = weight_bytes_per_gpu(_DEEPSEEK, _plan(data=8, expert=8))
    assert over_copies > spread  # Each copy has the whole attention.
    assert weight_bytes_per_gpu(_DEEPSEEK, _plan(data=8)) == over_copies
    uneven = weight_bytes_per_gpu(_DEEPSEEK, _plan(data=24, expert=24))
    even = weight_bytes_per_gpu(_DEEPSEEK, _plan(data=32, expert=32))
    one_expert = 3 * 7168 * 2048 * 58
    assert uneven - even == 3 * one_expert  # 11 instead of 8.


def test_copies_do_not_shrink_what_is_not_experts() -> None:
    assert weight_bytes_per_gpu(_LLAMA, _plan(data=4)) == weight_bytes_per_gpu(_LLAMA, _plan())


def test_a_stated_parameter_count_scales_the_weights() -> None:
    larger = replace(_LLAMA, parameter_count=2 * 8_030_261_248)
    more = weight_bytes_per_gpu(larger, _plan()) - weight_bytes_per_gpu(_LLAMA, _plan())
    assert more == 2 * 8_030_261_248


# --- Keys and values. ---


def test_tokens_of_grouped_heads() -> None:
    assert key_value_bytes_per_token(_LLAMA, _plan(), _OPTIONS) == 2 * 32 * 8 * 128 * 2
    assert key_value_bytes_per_token(_LLAMA, _plan(4), _OPTIONS) == 32 * 8 * 128
    assert key_value_bytes_per_token(_LLAMA, _plan(16), _OPTIONS) == 2 * 32 * 128 * 2
    half = replace(_OPTIONS, key_value_bytes=1.0)
    assert key_value_bytes_per_token(_LLAMA, _plan(), half) == 2 * 32 * 8 * 128
    assert key_value_bytes_per_token(_LLAMA, _plan(pipeline=4), _OPTIONS) == 2 * 8 * 8 * 128 * 2


@pytest.mark.parametrize("tensor", [1, 2, 8, 64])
def test_latents_are_whole_on_every_gpu(tensor: int) -> None:
    assert key_value_bytes_per_token(_DEEPSEEK, _plan(tensor), _OPTIONS) == 61 * 576 * 2


def test_layers_with_a_window_keep_no_more() -> None:
    """Five layers keep all, in blocks of five; 25 keep window and step: five groups of blocks."""
    options = EngineOptions(max_context_token_count=131072, max_batch_token_count=2048)
    blocks = 131072 // 16 + 5 * (-(-(1024 - 1 + 2048) // 16) + 1)
    expected = blocks * 16 * 5 * (2 * 8 * 128 * 2) / 131072
    assert key_value_bytes_per_token(_GEMMA, _plan(), options) == expected
    whole = replace(_GEMMA, sliding_layer_count=0, sliding_window_token_count=None)
    assert expected < 0.3 * key_value_bytes_per_token(whole, _plan(), options)


def test_groups_of_similar_size_are_padded_to_the_larger() -> None:
    """12 layers with a window beside 13 without: two groups of 13, not 12 and two of 12."""
    model = replace(_LLAMA, layer_count=25, sliding_layer_count=12, sliding_window_token_count=128)
    options = EngineOptions(max_context_token_count=16384, max_batch_token_count=2048)
    blocks = 1024 + (-(-(127 + 2048) // 16) + 1)
    expected = blocks * 16 * 13 * (2 * 8 * 128 * 2) / 16384
    assert key_value_bytes_per_token(model, _plan(), options) == expected


def test_capacity_is_in_whole_blocks() -> None:
    (stage,) = pipeline_stages(_LLAMA, 1)
    block = 16 * 2 * 32 * 8 * 128 * 2
    assert token_capacity(_LLAMA, _plan(), stage, _OPTIONS, 10 * block - 1) == 9 * 16
    assert token_capacity(_LLAMA, _plan(), stage, _OPTIONS, 10 * block) == 160
    assert token_capacity(_LLAMA, _plan(), stage, _OPTIONS, -block) == 0


# --- All together. ---


def test_stage_that_fits_least_bounds_the_rest() -> None:
    """The last stage has the head and the sampler: what it fits, the others fit, too."""
    config = _plan(pipeline=4)
    memory = estimate_memory(_LLAMA, _POOL, config, _OPTIONS)
    last = pipeline_stages(_LLAMA, 4)[-1]
    assert memory.weight_bytes == stage_weight_bytes(_LLAMA, config, last)
    assert memory.key_value_token_capacity == token_capacity(
        _LLAMA, config, last, _OPTIONS, memory.key_value_bytes
    )


def test_says_by_how_much_it_does_not_fit() -> None:
    memory = estimate_memory(_DEEPSEEK, _POOL, _plan(tensor=4), _OPTIONS)
    assert memory.key_value_token_capacity == 0
    assert not memory.fits
    assert memory.key_value_bytes < -80 * _GIB
    assert estimate_memory(_DEEPSEEK, _POOL, _plan(tensor=8, pipeline=2), _OPTIONS).fits


def test_weights_may_fit_and_the_longest_context_not() -> None:
    pool = replace(_POOL, gpu=require_gpu("L4-24GB"))
    memory = estimate_memory(_LLAMA, pool, _plan(), replace(_OPTIONS, max_batch_token_count=2048))
    assert 0 < memory.key_value_token_capacity < memory.max_context_token_count == 131072
    assert not memory.fits
    short = replace(_OPTIONS, max_batch_token_count=2048, max_context_token_count=8192)
    assert estimate_memory(_LLAMA, pool, _plan(), short).fits


def test_graphs_are_counted_only_where_they_are_captured() -> None:
    eager = estimate_memory(_LLAMA, _POOL, _plan(), replace(_OPTIONS, cuda_graphs=False))
    captured = estimate_memory(_LLAMA, _POOL, _plan(), _OPTIONS)
    assert eager.cuda_graph_bytes == 0 < captured.cuda_graph_bytes < _GIB
    few = estimate_memory(_LLAMA, _POOL, _plan(), replace(_OPTIONS, max_running_request_count=4))
    assert few.cuda_graph_bytes < captured.cuda_graph_bytes / 2


_OPTION_STRATEGY = st.builds(
    EngineOptions,
    gpu_memory_utilization=st.floats(0.05, 1.0),
    max_batch_token_count=st.integers(256, 65536),
    max_running_request_count=st.integers(1, 2048),
    max_context_token_count=st.one_of(st.none(), st.integers(1, 131072)),
    key_value_bytes=st.sampled_from((1.0, 2.0)),
    block_token_count=st.sampled_from((16, 32, 64)),
    cuda_graphs=st.booleans(),
)


@st.composite
def _models(draw: st.DrawFn) -> ModelDescription:
    base = draw(st.sampled_from(_MODELS))
    layers = draw(st.integers(8, 96))
    experts = base.experts and replace(
        base.experts,
        layer_count=draw(st.integers(1, layers)),
        shared_intermediate_size=draw(st.sampled_from((0, 2048))),
    )
    return replace(
        base,
        layer_count=layers,
        experts=experts,
        sliding_layer_count=draw(st.integers(0, layers)) if base.sliding_layer_count else 0,
        tied_embeddings=draw(st.booleans()),
        weight_format=draw(
            st.sampled_from(
                (WeightFormat.BFLOAT16, WeightFormat.FP8, WeightFormat.INT4, WeightFormat.FLOAT32)
            )
        ),
    )


@settings(max_examples=60, deadline=None)
@given(
    model=_models(),
    options=_OPTION_STRATEGY,
    tensor=st.sampled_from((1, 2, 4)),
    pipeline=st.integers(1, 4),
    data=st.integers(1, 4),
    spread=st.booleans(),
)
def test_more_tensor_parallelism_never_takes_more_memory(
    model: ModelDescription, options: EngineOptions, tensor: int, pipeline: int, data: int, spread: bool
) -> None:
    """Weights, activations and cache per token; only the libraries take more."""

    def estimate(size: int) -> tuple[int, int, float]:
        config = _plan(size, pipeline, data, size * data if spread and model.experts else 1)
        memory = estimate_memory(model, _POOL, config, options)
        return weight_bytes_per_gpu(model, config), memory.activation_bytes, memory.key_value_bytes_per_token

    fewer, more = estimate(tensor), estimate(2 * tensor)
    assert more[0] <= fewer[0]
    assert more[2] <= fewer[2]
    if pipeline == 1:
        assert more[1] <= fewer[1]


@settings(max_examples=60, deadline=None)
@given(model=_models(), options=_OPTION_STRATEGY, tensor=st.sampled_from((1, 8)), share=st.floats(0.0, 1.0))
def test_more_of_the_gpu_never_holds_fewer_tokens(
    model: ModelDescription, options: EngineOptions, tensor: int, share: float
) -> None:
    config = _plan(tensor)
    less = replace(options, gpu_memory_utilization=options.gpu_memory_utilization * share)
    held = estimate_memory(model, _POOL, config, options).key_value_token_capacity
    assert estimate_memory(model, _POOL, config, less).key_value_token_capacity <= held


@settings(max_examples=60, deadline=None)
@given(model=_models(), stages=st.integers(1, 12))
def test_stages_make_up_the_whole(model: ModelDescription, stages: int) -> None:
    """Layers and weights, but for what each stage has of its own: the table of positions."""
    parts = pipeline_stages(model, stages)
    assert sum(part.layer_count for part in parts) == model.layer_count
    assert sum(part.sliding_layer_count for part in parts) == model.sliding_layer_count
    assert sum(part.expert_layer_count for part in parts) == (
        model.experts.layer_count if model.experts else 0
    )
    assert all(part.dense_layer_count >= 0 for part in parts)
    assert all(0 <= part.sliding_layer_count <= part.layer_count for part in parts)

    untied = replace(model, tied_embeddings=False)
    latent = untied.latent_attention
    plain = 4 if model.weight_format is WeightFormat.FLOAT32 else 2
    table = untied.max_context_token_count * (latent.rope_head_size if latent else untied.head_size) * plain
    absorbed = 0
    if latent:
        heads = untied.attention_head_count * (latent.plain_head_size + untied.value_head_size)
        absorbed = untied.layer_count * latent.key_value_rank * heads * 2
    total = sum(stage_weight_bytes(untied, _plan(pipeline=stages), part) - table for part in parts)
    assert total == pytest.approx(weight_bytes(untied) + absorbed, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(model=_models(), options=_OPTION_STRATEGY, pipeline=st.integers(1, 4))
def test_what_is_left_holds_what_is_promised(
    model: ModelDescription, options: EngineOptions, pipeline: int
) -> None:
    """No more tokens than the bytes that are left have room for, block by block."""
    memory = estimate_memory(model, _POOL, _plan(8, pipeline), options)
    assert memory.key_value_token_capacity % options.block_token_count == 0
    assert min(memory.weight_bytes, memory.activation_bytes, memory.runtime_bytes, memory.total_bytes) > 0
    if memory.key_value_bytes <= 0:
        assert memory.key_value_token_capacity == 0
    if pipeline == 1 and memory.key_value_token_capacity:
        # A context that does not fill its last block takes it all the same.
        context = memory.max_context_token_count
        filled = context / (-(-context // options.block_token_count) * options.block_token_count)
        needed = memory.key_value_token_capacity * filled * memory.key_value_bytes_per_token
        assert needed <= memory.key_value_bytes * (1 + 1e-9)
