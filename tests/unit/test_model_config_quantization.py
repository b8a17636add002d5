"""How checkpoints store their weights, as their configurations tell it."""

from __future__ import annotations

from typing import Any

import pytest

from sagecp.core.parallelism.model_config import parse_model_config
from sagecp.core.parallelism.model_description import WeightFormat
from tests.support.model_configs import LLAMA, MIXTURE, compressed


@pytest.mark.parametrize(
    ("quantization", "weight_format", "group_size"),
    [
        ({"quant_method": "fp8"}, WeightFormat.FP8, 0),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, WeightFormat.FP8, 64),
        ({"quant_method": "fbgemm_fp8"}, WeightFormat.FP8, 0),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, WeightFormat.INT4, 64),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, WeightFormat.INT4, 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, WeightFormat.INT4, 0),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, WeightFormat.INT8, 128),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, WeightFormat.INT4, 0),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, WeightFormat.INT8, 0),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, WeightFormat.FP8, 0),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, WeightFormat.NVFP4, 16),
        (
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}},
            WeightFormat.NVFP4,
            16,
        ),
        (compressed(8, "float", strategy="channel"), WeightFormat.FP8, 0),
        (compressed(8, "float", strategy="block", block_structure=[128, 128]), WeightFormat.FP8, 128),
        (compressed(8, "int", strategy="channel"), WeightFormat.INT8, 0),
        (compressed(4, "int", strategy="group", group_size=128), WeightFormat.INT4, 128),
        (compressed(4, "float", strategy="tensor_group", group_size=16), WeightFormat.NVFP4, 16),
    ],
)
def test_quantizations(quantization: dict[str, Any], weight_format: WeightFormat, group_size: int) -> None:
    model = parse_model_config({**LLAMA, "quantization_config": quantization})

    assert (model.weight_format, model.weight_group_size) == (weight_format, group_size)
    assert model.unquantized_names == frozenset()


@pytest.mark.parametrize(
    ("ignored", "left_out"),
    [
        (["lm_head"], set()),
        (["model.layers.0.self_attn.q_proj"], set()),
        (["re:.*self_attn.*"], {"attention"}),
        (["model.layers.*.self_attn"], {"attention"}),
        (["model.layers.*.self_attn*"], {"attention"}),
        ([f"model.layers.{layer}.self_attn*" for layer in range(32)], {"attention"}),
        (["*.self_attn.*_proj"], {"attention"}),
        ([r"re:.*layers\.\d+\.mlp\.experts.*_proj$"], {"experts"}),
        (["self_attn"], {"attention"}),
        ([f"model.layers.{layer}.self_attn" for layer in range(32)], {"attention"}),
        (["re:.*mlp.gate$", "re:.*router.*"], set()),
        ([r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"], {"dense"}),
        (["re:.*block_sparse_moe.experts.*"], {"experts"}),
        (["re:.*shared_expert.*"], {"shared"}),
        # Could take for ever to match: not understood, and left out.
        (["re:(a+)+$", "re:(.*)*x", "*" * 100, "re:[", "re:" + "a" * 1000], set()),
    ],
)
def test_parts_left_in_16_bits(ignored: list[str], left_out: set[str]) -> None:
    quantization = {**compressed(8, "float"), "ignore": ignored}

    model = parse_model_config({**MIXTURE, "quantization_config": quantization})

    assert model.unquantized_names == left_out


def test_targets_limit_what_is_quantized() -> None:
    quantization = compressed(4, "int", group_size=128)
    quantization["config_groups"]["group_0"]["targets"] = ["re:.*mlp.experts.*"]

    model = parse_model_config({**MIXTURE, "quantization_config": quantization})

    assert model.unquantized_names == {"attention", "dense", "shared"}


def test_only_experts_are_stored_in_mxfp4() -> None:
    config = {**MIXTURE, "quantization_config": {"quant_method": "mxfp4"}}

    model = parse_model_config(config)

    assert model.weight_format is WeightFormat.MXFP4
    assert model.unquantized_names == {"attention", "dense", "shared"}
