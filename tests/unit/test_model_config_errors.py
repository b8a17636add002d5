"""Bad configurations: every bad field is named, and nothing else is raised."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecp.core.errors import InvalidRequestError
from sagecp.core.parallelism.model_config import (
    ModelConfigError,
    model_config_notes,
    parse_model_config,
)
from sagecp.core.parallelism.parameter_count import count_parameters, weight_bytes
from tests.support.model_configs import CONFIGS, LLAMA, MIXTURE, compressed, published


def _problems(config: object) -> dict[str, str]:
    with pytest.raises(ModelConfigError) as caught:
        parse_model_config(config)  # type: ignore[arg-type]
    return {each.field: each.description for each in caught.value.violations}


def test_every_bad_field_is_named_at_once() -> None:
    config = {
        **LLAMA,
        "num_hidden_layers": "32",
        "hidden_size": True,
        "num_attention_heads": None,
        "vocab_size": 10**5000,
        "tie_word_embeddings": "no",
        "architectures": "LlamaForCausalLM",
    }

    problems = _problems(config)

    assert problems == {
        "model_config.num_hidden_layers": "is '32'; must be a whole number of 1 to 2,000",
        "model_config.hidden_size": "is true; must be a whole number of 1 to 1,000,000",
        "model_config.num_attention_heads": (
            "is missing; it is how many query heads a layer has. Is this the config.json of a language model?"
        ),
        "model_config.vocab_size": "is a number far too large; must be a whole number of 1 to 100,000,000",
        "model_config.tie_word_embeddings": "is 'no'; must be true or false",
        "model_config.architectures": "is 'LlamaForCausalLM'; must be a list",
    }


@pytest.mark.parametrize("config", [None, [], "llama", 7, True])
def test_what_is_no_object_is_refused(config: object) -> None:
    assert "must be the JSON object" in _problems(config)["model_config"]


def test_an_empty_object_is_no_language_model() -> None:
    problems = _problems({})

    assert "model_config.num_hidden_layers" in problems
    assert "model_config.intermediate_size" in problems
    assert len(problems) == 5


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads", "does not divide the 32 query heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads", "must be a whole number of 1"),
        ({"intermediate_size": None}, "intermediate_size", "is missing"),
        ({"head_dim": -1}, "head_dim", "must be a whole number"),
        ({"num_hidden_layers": 1e300}, "num_hidden_layers", "a number far too large"),
        ({"hidden_size": float("nan")}, "hidden_size", "is nan"),
        ({"layer_types": ["full_attention"]}, "layer_types", "lists 1 layers; the model has 32"),
        ({"layer_types": ["full_attention", 7]}, "layer_types", "must be a list of"),
        ({"rope_scaling": "yarn"}, "rope_scaling", "must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor", "above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor", "far too large"),
        ({"torch_dtype": "\ud800"}, "torch_dtype", "must be float16"),
        ({"torch_dtype": "int3"}, "torch_dtype", "must be float16, bfloat16 or float32"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim", "is missing"),
        ({"num_experts": 8}, "num_experts_per_tok", "is missing; each token visits how many of 8"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok", "a layer has 8 experts"),
        (
            {"first_k_dense_replace": 99, "num_experts": 8, "num_experts_per_tok": 2},
            "first_k_dense_replace",
            "0 to 32",
        ),
        ({"quantization_config": "fp8"}, "quantization_config", "must be an object"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "quantization_config.quant_method",
            "known are fp8",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method", "is missing"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config.bits", "is 3"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED"}},
            "quantization_config.quant_algo",
            "known are FP8",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantization_config.config_groups",
            "must be an object of 1 to 16 groups",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {
                        "a": {"weights": {"num_bits": 4, "type": "int"}},
                        "b": {"weights": {"num_bits": 8, "type": "float"}},
                    },
                }
            },
            "quantization_config.config_groups",
            "mixes fp8 and int4",
        ),
        (
            {"quantization_config": compressed(3, "int")},
            "quantization_config.config_groups.group_0.weights.num_bits",
            "is 3 of type 'int'",
        ),
    ],
)
def test_bad_fields(fields: dict[str, Any], field: str, words: str) -> None:
    problems = _problems({**LLAMA, **fields})

    assert words in problems[f"model_config.{field}"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"ssm_state_size": 128}, "ssm_state_size"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
        ({"block_configs": [{"n_heads_in_group": 8}]}, "block_configs"),
        ({"type_vocab_size": 2}, "type_vocab_size"),
        ({"layer_types": ["linear_attention", "full_attention"] * 16}, "layer_types"),
    ],
)
def test_models_of_other_kinds_are_refused(fields: dict[str, Any], field: str) -> None:
    assert "the planner knows decoders" in _problems({**LLAMA, **fields})[f"model_config.{field}"]


def test_linear_attention_is_refused_by_all_that_tells_of_it() -> None:
    problems = _problems(published("qwen3-next-80b-a3b"))

    assert sorted(problems) == [
        "model_config.full_attention_interval",
        "model_config.linear_num_value_heads",
    ]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**17)
    | st.floats()
    | st.text(max_size=12),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=12,
)
# Every name that is read anywhere, so that random values reach everything.
NAMES = sorted(
    {
        *LLAMA,
        *MIXTURE,
        *(name for path in CONFIGS.glob("*.json") for name in published(path.stem)),
        *published("kimi-k2.5-int4")["text_config"],
        "attention_chunk_size",
        "block_configs",
        "compression_config",
        "dtype",
        "is_encoder_decoder",
        "layer_types",
        "mlp_layer_types",
        "moe_layer_end_index",
        "moe_layer_start_index",
        "moe_layers",
        "multi_query_group_num",
        "no_rope_layers",
        "producer",
        "rope_parameters",
        "sliding_window_pattern",
        "thinker_config",
    }
)
QUANTIZATIONS = st.fixed_dictionaries(
    {
        "quant_method": st.sampled_from(
            ["fp8", "awq", "gptq", "bitsandbytes", "mxfp4", "modelopt", "compressed-tensors"]
        )
        | JSON
    },
    optional=dict.fromkeys(
        (
            "bits",
            "config_groups",
            "group_size",
            "ignore",
            "load_in_4bit",
            "modules_to_not_convert",
            "producer",
            "quant_algo",
            "quantization",
            "weight_block_size",
        ),
        JSON,
    ),
)


def _parses_or_is_refused(config: object) -> None:
    try:
        model = parse_model_config(config)  # type: ignore[arg-type]
    except InvalidRequestError as refusal:
        error = refusal
    else:
        assert count_parameters(model).total > 0
        assert weight_bytes(model) > 0
        assert f"{model.name} {model.architecture}".encode()
        model_config_notes(config)  # type: ignore[arg-type]
        return
    assert error.violations
    assert all(each.field.startswith("model_config") for each in error.violations)
    assert len(str(error).encode()) < 10_000


@given(JSON)
def test_nothing_of_json_s_shape_raises_anything_else(config: object) -> None:
    _parses_or_is_refused(config)


@settings(max_examples=300)
@given(
    st.sampled_from([LLAMA, MIXTURE, *(published(path.stem) for path in sorted(CONFIGS.glob("*.json")))]),
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3),
    st.none() | QUANTIZATIONS,
    st.booleans(),
)
def test_nothing_in_a_good_configuration_raises_anything_else(
    config: dict[str, Any], changes: dict[str, Any], quantization: dict[str, Any] | None, inside: bool
) -> None:
    changed = {**config, **changes}
    if quantization is not None:
        changed["quantization_config"] = quantization
    _parses_or_is_refused({"text_config": changed} if inside else changed)
