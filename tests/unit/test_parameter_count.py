"""Parameters and bytes of models, against what is published of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parameter_count import (
    count_parameters,
    part_bits,
    part_format,
    plain_format,
    weight_bytes,
)
from tests.support.plan_values import known_model

# The hub's count of a checkpoint's tensors (its safetensors metadata; kept for many models in
# github.com/debaditc/kvfit, src/kvfit/data/models.json), and the same from transformers' classes.
EXACT_TOTALS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "mistralai/Mistral-Large-Instruct-2407": 122_610_069_504,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    # Without the layer that predicts a second token, and without scales.
    "deepseek-ai/DeepSeek-V3": 671_026_419_200,
    "moonshotai/Kimi-K2-Instruct": 1_026_408_235_864,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "microsoft/phi-4": 14_659_507_200,
}
# From the models' own pages and reports, in rounded figures; those that also see, without their encoders.
ROUNDED_TOTALS = {
    "meta-llama/Llama-4-Scout-17B-16E": 107.8e9,
    "meta-llama/Llama-4-Maverick-17B-128E": 400e9,
    "google/gemma-3-27b-it": 27.0e9,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": 480e9,
    "zai-org/GLM-4.5": 355e9,
}
# Reports count the embeddings in different ways.
ACTIVE = {
    "Qwen/Qwen3-30B-A3B": 3.35e9,
    "Qwen/Qwen3-235B-A22B": 22.2e9,
    "mistralai/Mixtral-8x7B-v0.1": 12.9e9,
    "mistralai/Mixtral-8x22B-v0.1": 39.1e9,
    "deepseek-ai/DeepSeek-V3": 37.5e9,
    "meta-llama/Llama-4-Scout-17B-16E": 17.2e9,
    "moonshotai/Kimi-K2-Instruct": 32.9e9,
}


@pytest.mark.parametrize("name", sorted(EXACT_TOTALS))
def test_totals_are_those_published(name: str) -> None:
    assert count_parameters(known_model(name)).total == pytest.approx(EXACT_TOTALS[name], rel=1e-3)


@pytest.mark.parametrize("name", sorted(ROUNDED_TOTALS))
def test_rounded_totals(name: str) -> None:
    assert count_parameters(known_model(name)).total == pytest.approx(ROUNDED_TOTALS[name], rel=1e-2)


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_active_parameters(name: str) -> None:
    assert count_parameters(known_model(name)).active == pytest.approx(ACTIVE[name], rel=1e-2)


def test_active_parameters_of_gpt_oss_leave_out_its_input_embedding() -> None:
    counts = count_parameters(known_model("gpt-oss-120b"))

    # Its model card: 117B parameters, 5.1B active.
    assert counts.active - counts.embedding == pytest.approx(5.1e9, rel=1e-2)


def test_parts_add_up_by_hand() -> None:
    model = ModelDescription(
        name="tiny",
        layer_count=3,
        hidden_size=10,
        intermediate_size=7,
        attention_head_count=4,
        key_value_head_count=2,
        head_size=5,
        value_head_size=5,
        vocabulary_size=11,
        max_context_token_count=64,
    )

    counts = count_parameters(model)

    assert counts.embedding == counts.output_head == 110
    assert counts.query_output_per_layer == 2 * 10 * 20
    assert counts.key_value_per_layer == 2 * 10 * 10
    assert counts.replicated_attention_per_layer == 0
    assert counts.dense_layer == 3 * 70
    assert counts.norms == 7 * 10
    assert counts.total == counts.active == 220 + 3 * (400 + 200 + 210) + 70
    assert count_parameters(replace(model, tied_embeddings=True)).output_head == 0
    assert count_parameters(replace(model, gated=False)).dense_layer == 2 * 70


def test_latents_are_replicated_and_their_heads_are_not() -> None:
    counts = count_parameters(known_model("deepseek-ai/DeepSeek-V3"))

    assert counts.replicated_attention_per_layer == 7168 * (1536 + 512 + 64)
    assert counts.query_output_per_layer == 1536 * 128 * 192 + 128 * 128 * 7168
    assert counts.key_value_per_layer == 512 * 128 * 256
    assert counts.attention_per_layer == pytest.approx(187.1e6, rel=1e-3)
    assert counts.expert == 3 * 7168 * 2048
    assert counts.routed_experts == 58 * 256 * counts.expert
    assert counts.outside_experts + counts.routed_experts == counts.total


def test_a_stated_number_scales_the_layers_and_nothing_else() -> None:
    model = known_model("Llama-3.1-8B")
    plain = count_parameters(model)

    counts = count_parameters(replace(model, parameter_count=9_000_000_000))

    assert counts.total == pytest.approx(9_000_000_000, rel=1e-6)
    assert (counts.embedding, counts.output_head, counts.norms) == (
        plain.embedding,
        plain.output_head,
        plain.norms,
    )
    assert counts.dense_layer / plain.dense_layer == pytest.approx(
        counts.key_value_per_layer / plain.key_value_per_layer, rel=1e-5
    )


def test_a_stated_number_below_the_embeddings_is_not_believed() -> None:
    model = known_model("Llama-3.1-8B")

    assert count_parameters(replace(model, parameter_count=1)) == count_parameters(model)


# Sizes of the checkpoints' files on the hub, GB.
CHECKPOINTS = {
    "meta-llama/Llama-3.1-8B": 16.06,
    "meta-llama/Llama-3.1-70B": 141.1,
    "Qwen/Qwen2.5-72B-Instruct": 145.4,
    "mistralai/Mixtral-8x7B-v0.1": 93.4,
    "openai/gpt-oss-120b": 65.2,
    "openai/gpt-oss-20b": 13.76,
    "Qwen/Qwen2.5-72B-Instruct-AWQ": 41.6,
}


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_bytes_are_those_of_the_checkpoints(name: str) -> None:
    assert weight_bytes(known_model(name)) == pytest.approx(CHECKPOINTS[name] * 1e9, rel=0.01)


def test_embeddings_and_norms_stay_in_16_bits() -> None:
    model = known_model("Llama-3.1-8B-FP8")
    counts = count_parameters(model)
    plain = counts.embedding + counts.output_head + counts.norms

    assert weight_bytes(model) == counts.total - plain + 2 * plain


def test_parts_left_in_16_bits_take_16() -> None:
    model = known_model("Llama-3.1-405B-FP8")
    counts = count_parameters(model)
    attention = counts.attention_per_layer * counts.layer_count

    whole = weight_bytes(replace(model, unquantized_names=frozenset()))

    assert weight_bytes(model) - whole == attention
    assert part_format(model, "attention") is WeightFormat.BFLOAT16
    assert part_format(model, "dense") is WeightFormat.FP8


def test_only_a_32_bit_model_has_embeddings_in_32() -> None:
    model = replace(known_model("Llama-3.1-8B"), weight_format=WeightFormat.FLOAT32)

    assert plain_format(model) is WeightFormat.FLOAT32
    assert weight_bytes(model) == 4 * count_parameters(model).total


@pytest.mark.parametrize(("group_size", "bits"), [(None, 4.16), (128, 4.15625), (32, 4.625), (0, 4.0)])
def test_smaller_groups_have_more_scales(group_size: int | None, bits: float) -> None:
    model = replace(
        known_model("Llama-3.1-8B"), weight_format=WeightFormat.INT4, weight_group_size=group_size
    )

    assert part_bits(model, "dense") == bits
