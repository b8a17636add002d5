"""Public models by their names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sagecp.core.parallelism.known_models import KNOWN_MODELS, find_model
from sagecp.core.parallelism.model_description import WeightFormat
from sagecp.core.parallelism.parameter_count import count_parameters

B16, F16 = WeightFormat.BFLOAT16, WeightFormat.FLOAT16
FP8, INT8, INT4 = WeightFormat.FP8, WeightFormat.INT8, WeightFormat.INT4


@pytest.mark.parametrize("name", sorted(KNOWN_MODELS))
def test_every_known_model_is_found_under_its_name(name: str) -> None:
    known = KNOWN_MODELS[name]
    full_name = f"{known.organisation}/{name}"

    model = find_model(name)

    assert model is not None
    assert model.name == full_name
    assert model.architecture
    assert find_model(full_name) == model
    assert find_model(name.upper()) == model


@pytest.mark.parametrize(
    ("name", "called", "weight_format", "billions"),
    [
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", B16, 8.03),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", B16, 8.03),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", None, B16, 70.55),
        ("llama3.1-70b", "meta-llama/Llama-3.1-70B", B16, 70.55),
        ("llama3.1:8b", "meta-llama/Llama-3.1-8B", B16, 8.03),
        ("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", B16, 70.55),
        ("llama-2-70b", "meta-llama/Llama-2-70b-hf", F16, 68.98),
        ("Llama-2-13b-chat-hf", "meta-llama/Llama-2-13b-chat-hf", F16, 13.02),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", B16, 46.7),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", None, B16, 46.7),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3", B16, 7.25),
        ("deepseek-r1", "deepseek-ai/DeepSeek-R1", FP8, 671.03),
        ("deepseek-ai/DeepSeek-V3-0324", None, FP8, 671.03),
        ("gpt-oss-120b", "openai/gpt-oss-120b", WeightFormat.MXFP4, 116.8),
        ("gemma-2-27b-it", "google/gemma-2-27b-it", B16, 27.23),
        ("Llama-3.1-405B-FP8", "meta-llama/Llama-3.1-405B-FP8", FP8, 405.85),
        ("Llama-3.1-8B-FP8", None, FP8, 8.03),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8-dynamic", None, FP8, 70.55),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-quantized.w4a16", None, INT4, 70.55),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-quantized.w8a8", None, INT8, 70.55),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", None, INT8, 7.62),
        ("qwen2.5-32b-instruct-awq", None, INT4, 32.76),
        ("TheBloke/Mistral-7B-Instruct-v0.2-AWQ", None, INT4, 7.24),
        ("unsloth/Llama-3.1-8B-Instruct-bnb-4bit", None, INT4, 8.03),
        ("nvidia/Qwen3-32B-NVFP4", None, WeightFormat.NVFP4, 32.76),
    ],
)
def test_names(name: str, called: str | None, weight_format: WeightFormat, billions: float) -> None:
    model = find_model(name)

    assert model is not None
    assert model.name == (called or name)
    assert model.weight_format is weight_format
    assert count_parameters(model).total == pytest.approx(billions * 1e9, rel=2e-3)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "llama",
        "llama-9b",
        "meta-llama/",
        "gpt-4",
        "Llama-3.1-8B-GGUF",
        "Llama-3.1-8B-Instruct-lora",
        # These are stored in few bits already; what others make of them is not known.
        "DeepSeek-V3-AWQ",
        "gpt-oss-20b-FP8",
        "-FP8",
        "8b",
        "x" * 10_000,
        "\ud800",
    ],
)
def test_unknown_names_are_not_guessed(name: str) -> None:
    assert find_model(name) is None


@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        # Their own have scales by blocks; those that others make, by channels.
        ("Qwen/Qwen3-8B-FP8", 128),
        ("Qwen3-30B-A3B-FP8", 128),
        ("RedHatAI/Qwen3-8B-FP8-dynamic", 0),
        ("neuralmagic/Meta-Llama-3.1-8B-FP8", 0),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", 128),
    ],
)
def test_scales_of_quantized_checkpoints(name: str, group_size: int) -> None:
    model = find_model(name)

    assert model is not None
    assert model.weight_group_size == group_size


def test_padded_checkpoints_have_the_widths_that_they_were_padded_to() -> None:
    plain, quantized = find_model("Qwen2.5-72B-Instruct"), find_model("Qwen/Qwen2.5-72B-Instruct-AWQ")
    others = find_model("someone/Qwen2.5-72B-Instruct-AWQ")

    assert plain is not None
    assert quantized is not None
    assert others is not None
    assert (plain.intermediate_size, quantized.intermediate_size) == (29_568, 29_696)
    assert others.intermediate_size == 29_568


def test_variants_with_other_contexts_are_told_apart() -> None:
    contexts = {
        name: model.max_context_token_count
        for name in ("Qwen3-30B-A3B", "Qwen3-30B-A3B-Instruct-2507", "Qwen2.5-7B", "Qwen2.5-7B-Instruct")
        if (model := find_model(name)) is not None
    }

    assert contexts == {
        "Qwen3-30B-A3B": 40_960,
        "Qwen3-30B-A3B-Instruct-2507": 262_144,
        "Qwen2.5-7B": 131_072,
        "Qwen2.5-7B-Instruct": 32_768,
    }


def test_nothing_is_parsed_on_import() -> None:
    program = (
        "import sagecp.core.parallelism.model_config as parser\n"
        "def refuse(*_arguments, **_options): raise AssertionError('parsed')\n"
        "parser.parse_model_config = refuse\n"
        "import sagecp.core.parallelism.known_models\n"
    )

    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
