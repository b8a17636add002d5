"""What is believed of an engine before it has run: names of GPUs and models, and scaling."""

from __future__ import annotations

import math
from dataclasses import astuple, fields
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.gpu_specifications import find_gpu
from sagecp.core.prediction import priors
from sagecp.core.prediction.model_size import model_size_from_name, shape_of
from sagecp.core.prediction.priors import prior_for
from sagecp.core.prediction.step_time import StepTimeParameters

H100, A100, L4 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"


@pytest.mark.parametrize(
    ("gpu_name", "memory_gb_per_s", "dense_tflops"),
    [
        (H100, 3350, 989),
        ("NVIDIA H100 PCIe", 2000, 756),
        ("NVIDIA H100 NVL", 3900, 835),
        ("NVIDIA H200", 4800, 989),
        (A100, 2039, 312),
        ("NVIDIA A100-SXM4-40GB", 1555, 312),
        ("NVIDIA A100 80GB PCIe", 1935, 312),
        ("NVIDIA A100-PCIE-40GB", 1555, 312),
        (L4, 300, 121),
        ("NVIDIA L40S", 864, 362),
        ("NVIDIA L40", 864, 181),
        ("NVIDIA A10", 600, 125),
        ("NVIDIA A10G", 600, 70),
        ("NVIDIA GeForce RTX 4090", 1008, 165),
        ("Tesla T4", 320, 65),
        ("Tesla V100-SXM2-16GB", 900, 125),
    ],
)
def test_gpus_by_the_names_of_nvml(gpu_name: str, memory_gb_per_s: float, dense_tflops: float) -> None:
    gpu = find_gpu(gpu_name)
    assert gpu is not None
    assert (gpu.memory_gb_per_s, gpu.dense_tflops) == (memory_gb_per_s, dense_tflops)


@pytest.mark.parametrize(
    "gpu_name", ["", "CPU", "NVIDIA X9000", "NVIDIA A1000", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"]
)
def test_gpus_that_are_not_known(gpu_name: str) -> None:
    assert find_gpu(gpu_name) is None


@pytest.mark.parametrize(
    ("model_name", "total", "active", "bytes_per_parameter"),
    [
        ("llama-3-70b", 70, 70, 2),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", 8, 8, 2),
        ("Qwen2.5-7B", 7, 7, 2),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5, 0.5, 2),
        ("Qwen2.5-7B-Instruct-1M", 7, 7, 2),
        ("facebook/opt-125m", 0.125, 0.125, 2),
        ("Llama-3.3-70B-Instruct-FP8", 70, 70, 1),
        ("Meta-Llama-3-8B-AWQ", 8, 8, 0.5),
        ("model_13b_int8", 13, 13, 1),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46.7, 12.9, 2),
        ("dbrx-16x12b", 160.1, 22.1, 2),
        ("Qwen3-30B-A3B", 30, 3, 2),
        ("openai/gpt-oss-120b", 117, 5.1, 0.5),
        ("deepseek-ai/DeepSeek-V3", 671, 37, 1),
        ("DeepSeek-R1-Distill-Llama-8B", 8, 8, 1),
        ("microsoft/Phi-3-mini-4k-instruct", 3.8, 3.8, 2),
    ],
)
def test_sizes_by_name(model_name: str, total: float, active: float, bytes_per_parameter: float) -> None:
    size = model_size_from_name(model_name)
    assert size is not None
    assert size.total_billions == pytest.approx(total, rel=1e-2)
    assert size.active_billions == pytest.approx(active, rel=1e-2)
    assert size.bytes_per_parameter == bytes_per_parameter


@pytest.mark.parametrize("model_name", ["", "my-model", "gpt2", "v2.5b1", "0b", "llama-3", "chat-4bit"])
def test_names_that_tell_no_size(model_name: str) -> None:
    assert model_size_from_name(model_name) is None


def test_shapes_lie_between_known_ones() -> None:
    assert shape_of(0.01).layer_count == 24
    assert shape_of(70.6).hidden_size == pytest.approx(8192)
    assert 32 < shape_of(10).layer_count < 48
    assert shape_of(10_000).layer_count == 126


@pytest.mark.parametrize(
    ("gpu_name", "model_name", "gpus", "decode_ms", "full_batch_ms"),
    [
        # From the table of constants: one token, and 2048.
        (A100, "llama-3-8b", 1, 12.0, 146.0),
        (H100, "llama-3-8b", 1, 8.1, 49.1),
        (L4, "llama-3-8b", 1, 64.6, 442.6),
        (H100, "llama-3-70b", 4, 19.3, 150.9),
        (H100, "llama-3-70b", 8, 13.3, 102.7),
    ],
)
def test_known_configurations(
    gpu_name: str, model_name: str, gpus: int, decode_ms: float, full_batch_ms: float
) -> None:
    prior = prior_for(gpu_name, model_name, tensor_parallel_size=gpus)
    assert prior.trusted
    assert prior.parameters.decode_step_s(1, 0) == pytest.approx(decode_ms / 1e3, rel=0.02)
    assert prior.parameters.step_s(2048) == pytest.approx(full_batch_ms / 1e3, rel=0.02)


def test_each_known_configuration_is_near_what_the_others_say(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = priors._ANCHORS
    for left_out in anchors:
        monkeypatch.setattr(priors, "_ANCHORS", tuple(known for known in anchors if known is not left_out))
        prior = prior_for(
            left_out.gpu_name,
            "",
            tensor_parallel_size=left_out.tensor_parallel_size,
            parameter_count_billions=left_out.size.total_billions,
        )
        for tokens in (1, 32, 2048):
            ratio = prior.parameters.step_s(tokens, 50_000) / left_out.parameters.step_s(tokens, 50_000)
            assert 0.75 < ratio < 1.33, (left_out.name, tokens, ratio)


def test_faster_gpus_and_smaller_models_are_faster() -> None:
    def times(gpu_name: str, model_name: str, gpus: int = 1) -> tuple[float, float]:
        parameters = prior_for(gpu_name, model_name, tensor_parallel_size=gpus).parameters
        return parameters.decode_step_s(8, 10_000), parameters.step_s(2048)

    chains = [
        [times(gpu, "llama-3-8b") for gpu in ("NVIDIA H200", H100, A100, L4)],
        [times(A100, f"qwen2.5-{size}b") for size in ("0.5", "3", "7", "14", "32", "72")],
        [times(H100, "llama-3-70b", gpus) for gpus in (8, 4, 2)],
        [times(H100, f"llama-3-8b{suffix}") for suffix in ("-awq", "-fp8", "")],
    ]
    for chain in chains:
        for faster, slower in pairwise(chain):
            assert faster[0] < slower[0]
            assert faster[1] <= slower[1] * 1.1


@pytest.mark.parametrize(
    ("gpu_name", "model_name", "sizes", "said"),
    [
        ("", "llama-3-8b", {}, "GPU '' is not known"),
        (H100, "my-model", {}, "size of model 'my-model' is not known"),
        (H100, "mixtral-8x7b", {}, "mixture of experts"),
        (H100, "llama-3-70b", {"pipeline_parallel_size": 2}, "pipeline stages"),
    ],
)
def test_what_is_not_trusted_says_why(
    gpu_name: str, model_name: str, sizes: dict[str, int], said: str
) -> None:
    prior = prior_for(gpu_name, model_name, **sizes)
    assert not prior.trusted
    assert said in prior.source


def test_a_known_parameter_count_counts_more_than_the_name() -> None:
    assert prior_for(H100, "my-model", parameter_count_billions=8.0).trusted
    named = prior_for(H100, "mixtral-8x7b").parameters
    told = prior_for(H100, "mixtral-8x7b", parameter_count_billions=46.7).parameters
    assert astuple(told) == pytest.approx(astuple(named))
    larger = prior_for(H100, "llama-8b", parameter_count_billions=16.0).parameters
    assert larger.memory_base_s > 1.9 * prior_for(H100, "llama-8b").parameters.memory_base_s


@given(
    gpu_name=st.one_of(st.text(max_size=20), st.sampled_from([H100, A100, L4])),
    model_name=st.one_of(
        st.text(max_size=20), st.from_regex(r"m-[0-9]{1,6}(x[0-9]{1,3})?[bm]", fullmatch=True)
    ),
    tensor=st.integers(-1, 1024),
    pipeline=st.integers(-1, 64),
)
def test_priors_are_sane_for_any_names(gpu_name: str, model_name: str, tensor: int, pipeline: int) -> None:
    prior = prior_for(
        gpu_name, model_name, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline
    ).parameters
    assert len(astuple(prior)) == len(fields(StepTimeParameters))
    assert all(0.0 < value < math.inf for value in astuple(prior))
