"""The planner's reading of Hugging Face configurations: by their fields, whatever the architecture."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core.parallelism.model_config import model_config_notes, parse_model_config
from sagecp.core.parallelism.model_description import ExpertShape, LatentAttention, WeightFormat
from sagecp.core.parallelism.parameter_count import count_parameters, weight_bytes
from tests.support.model_configs import LLAMA, MIXTURE, published


def test_llama_is_read_field_by_field() -> None:
    model = parse_model_config(LLAMA, name="mine")

    assert (model.name, model.architecture) == ("mine", "LlamaForCausalLM")
    assert (model.layer_count, model.hidden_size, model.intermediate_size) == (32, 4096, 14336)
    assert (model.attention_head_count, model.key_value_head_count) == (32, 8)
    assert (model.head_size, model.value_head_size) == (128, 128)
    assert (model.vocabulary_size, model.max_context_token_count) == (128256, 131072)
    assert model.gated
    assert not model.tied_embeddings
    assert model.weight_format is WeightFormat.BFLOAT16
    assert model.experts is None
    assert model.latent_attention is None


# Layers, query heads, key-value heads, head size, window, sliding layers, context; parameters where
# transformers' own class was asked, without biases and position embeddings.
PUBLISHED = {
    "qwen3-32b": (64, 64, 8, 128, None, 0, 40960, 32_762_106_880),
    "gpt2": (12, 12, 12, 64, None, 0, 1024, 123_551_232),
    "falcon-7b": (32, 71, 1, 64, None, 0, 2048, 6_921_720_704),
    "opt-125m": (12, 12, 12, 64, None, 0, 2048, 123_563_520),
    "gemma-2-9b": (42, 16, 8, 256, 4096, 21, 8192, 9_241_404_928),
    "glm-4.5-air": (46, 96, 8, 128, None, 0, 131072, 106_851_586_048),
    "llama-4-scout": (48, 40, 8, 128, 8192, 36, 10485760, 107_769_861_120),
    "deepseek-v3.2": (61, 128, 128, 192, None, 0, 163840, 671_026_404_352),
    "kimi-k2.5-int4": (61, 64, 64, 192, None, 0, 262144, 1_026_408_209_408),
    "qwen2.5-72b-awq": (80, 64, 8, 128, None, 0, 32768, 72_705_384_448),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configurations(name: str) -> None:
    layers, heads, key_value_heads, head_size, window, sliding, context, parameters = PUBLISHED[name]

    model = parse_model_config(published(name))

    assert (model.layer_count, model.attention_head_count) == (layers, heads)
    assert (model.key_value_head_count, model.head_size) == (key_value_heads, head_size)
    assert (model.sliding_window_token_count, model.sliding_layer_count) == (window, sliding)
    assert model.max_context_token_count == context
    assert count_parameters(model).total == pytest.approx(parameters, rel=1e-4)


def test_latent_attention() -> None:
    model = parse_model_config(published("deepseek-v3.2"))

    assert model.latent_attention == LatentAttention(
        key_value_rank=512, rope_head_size=64, plain_head_size=128, query_rank=1536
    )
    assert model.value_head_size == 128
    assert model.experts == ExpertShape(
        expert_count=256,
        active_expert_count=8,
        intermediate_size=2048,
        shared_intermediate_size=2048,
        layer_count=58,
    )
    assert model.dense_layer_count == 3
    assert (model.weight_format, model.weight_group_size) == (WeightFormat.FP8, 128)


@pytest.mark.parametrize(
    ("fields", "layer_count"),
    [
        ({}, 32),
        ({"decoder_sparse_step": 2}, 16),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 40]}, 30),
        ({"first_k_dense_replace": 3}, 29),
        ({"num_dense_layers": 2}, 30),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, 15),
        ({"moe_layer_freq": [0] * 4 + [1] * 28}, 28),
        ({"interleave_moe_layer_step": 4}, 8),
        ({"moe_layers": [1, 3, 5, 99]}, 3),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 30}, 30),
        ({"moe_layer_start_index": 3, "moe_layer_end_index": 30, "moe_layer_interval": 1}, 28),
    ],
)
def test_layers_with_experts(fields: dict[str, Any], layer_count: int) -> None:
    model = parse_model_config({**MIXTURE, **fields})

    assert model.experts is not None
    assert model.experts.layer_count == layer_count
    assert model.dense_layer_count == 32 - layer_count
    assert (model.intermediate_size > 0) is (layer_count < 32)


@pytest.mark.parametrize(
    ("fields", "shared"),
    [
        ({}, 0),
        ({"shared_expert_intermediate_size": 4096}, 4096),
        ({"n_shared_experts": 2}, 1536),
        ({"n_shared_experts": None}, 0),
        ({"num_shared_experts": 1}, 768),
    ],
)
def test_shared_experts(fields: dict[str, Any], shared: int) -> None:
    experts = parse_model_config({**MIXTURE, **fields}).experts

    assert experts is not None
    assert experts.shared_intermediate_size == shared


def test_mixtral_has_experts_as_wide_as_its_layers() -> None:
    fields = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}

    model = parse_model_config({**LLAMA, **fields})

    assert model.experts == ExpertShape(
        expert_count=8, active_expert_count=2, intermediate_size=14336, layer_count=32
    )
    assert model.intermediate_size == 0


@pytest.mark.parametrize(
    ("fields", "window", "count"),
    [
        ({"sliding_window": None}, None, 0),
        ({"sliding_window": 4096}, 4096, 32),
        # As long as the context: no window at all.
        ({"sliding_window": 131072}, None, 0),
        ({"sliding_window": 4096, "use_sliding_window": False}, None, 0),
        ({"sliding_window": 4096, "model_type": "qwen2"}, None, 0),
        (
            {
                "sliding_window": 4096,
                "model_type": "qwen2",
                "use_sliding_window": True,
                "max_window_layers": 20,
            },
            4096,
            12,
        ),
        ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16}, 128, 16),
        ({"sliding_window": 512, "sliding_window_pattern": 4}, 512, 24),
        ({"sliding_window": 512, "sliding_window_pattern": "LLLG"}, 512, 24),
        ({"sliding_window": 1024, "model_type": "gemma3_text"}, 1024, 27),
        ({"attention_chunk_size": 8192, "no_rope_layers": [1, 1, 0, 0] * 8}, 8192, 16),
    ],
)
def test_windows(fields: dict[str, Any], window: int | None, count: int) -> None:
    model = parse_model_config({**LLAMA, **fields})

    assert (model.sliding_window_token_count, model.sliding_layer_count) == (window, count)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 8192),
        # The stated length is the stretched one already.
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}},
            4096,
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, 4096),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 8192),
        ({"max_position_embeddings": None}, 2048),
        ({"model_max_length": 1024}, 1024),
    ],
)
def test_contexts(fields: dict[str, Any], context: int) -> None:
    model = parse_model_config({**LLAMA, "max_position_embeddings": 4096, **fields})

    assert model.max_context_token_count == context


def test_a_model_of_several_kinds_of_input_is_its_language_model() -> None:
    config = published("kimi-k2.5-int4")

    model = parse_model_config(config)

    assert model.architecture == "KimiK25ForConditionalGeneration"
    assert (model.weight_format, model.weight_group_size) == (WeightFormat.INT4, 32)
    assert model.unquantized_names == {"attention", "dense", "shared"}
    # 4.5 to 4.6 bits for each expert's weight, 16 for the rest.
    assert weight_bytes(model) == pytest.approx(595e9, rel=0.03)
    assert any("language model" in note for note in model_config_notes(config))


def test_silent_language_parts_are_as_their_classes_assume() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }

    model = parse_model_config({"model_type": "gemma3", "text_config": text})

    assert (model.vocabulary_size, model.max_context_token_count) == (262_208, 131_072)
    assert (model.sliding_window_token_count, model.sliding_layer_count) == (1024, 52)
    assert model.tied_embeddings


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ({"torch_dtype": "float16"}, WeightFormat.FLOAT16),
        ({"dtype": "bfloat16", "torch_dtype": None}, WeightFormat.BFLOAT16),
        ({"torch_dtype": "torch.float16"}, WeightFormat.FLOAT16),
        # Served in 16 bits.
        ({"torch_dtype": "float32"}, WeightFormat.BFLOAT16),
        ({"torch_dtype": None}, WeightFormat.BFLOAT16),
    ],
)
def test_types(dtype: dict[str, Any], expected: WeightFormat) -> None:
    assert parse_model_config({**LLAMA, **dtype}).weight_format is expected


def test_a_stated_format_replaces_the_configuration_s() -> None:
    config = {**LLAMA, "quantization_config": {"quant_method": "something-new"}}

    assert parse_model_config(config, weight_format=WeightFormat.FP8).weight_format is WeightFormat.FP8


def test_a_stated_format_that_the_configuration_has_keeps_its_details() -> None:
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["self_attn"]}
    config = {**LLAMA, "quantization_config": quantization}

    same = parse_model_config(config, weight_format=WeightFormat.FP8)
    other = parse_model_config(config, weight_format=WeightFormat.INT4)

    assert same.weight_group_size == 128
    assert same.unquantized_names == {"attention"}
    assert other.weight_group_size is None
    assert not other.unquantized_names


def test_whole_numbers_may_come_as_floating_point() -> None:
    assert parse_model_config({**LLAMA, "num_hidden_layers": 32.0}).layer_count == 32


def test_notes_tell_what_is_left_out() -> None:
    assert model_config_notes(LLAMA) == ()
    notes = model_config_notes(published("deepseek-v3.2"))
    assert len(notes) == 2
    assert "predict several tokens" in notes[0]
    assert "chosen tokens" in notes[1]
