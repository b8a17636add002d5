"""Step times of plans: against published figures and measured anchors, and that they behave physically."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from bench.plan_time import (
    PublishedSpeed,
    median_absolute_error,
    predicted,
    published_comparisons,
    published_speeds,
)
from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.communication import all_to_all
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.step_model import PlanStepTime, plan_step_time
from sagecp.core.parallelism.throughput import saturated_throughput, throughput_at
from sagecp.core.prediction.priors import prior_for
from tests.support.plan_values import known_model

SPEEDS = published_speeds()
OPTIONS = EngineOptions()
PLENTY = 1e9


def step_time(
    model: str | ModelDescription = "Llama-3.1-70B",
    gpu: str = "H100-SXM-80GB",
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    options: EngineOptions = OPTIONS,
    node_link_gb_per_s: float = 50.0,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    expert: int = 1,
) -> PlanStepTime:
    described = known_model(model) if isinstance(model, str) else model
    pool = GpuPool(
        gpu=require_gpu(gpu),
        gpus_per_node_count=gpus_per_node,
        node_count=nodes,
        node_link_gb_per_s=node_link_gb_per_s,
    )
    config = ParallelismConfig(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=data,
        expert_parallel_size=expert,
    )
    return plan_step_time(described, pool, config, options)


class TestPublishedFigures:
    def test_there_are_enough_with_half_held_out(self) -> None:
        held_out = [speed for speed in SPEEDS if speed.held_out]
        assert len({speed.title for speed in SPEEDS}) >= 20
        assert len(held_out) >= len(SPEEDS) / 2
        assert all(speed.url.startswith("https://") for speed in SPEEDS)
        assert len({speed.url for speed in SPEEDS}) >= 15
        assert {speed.metric for speed in SPEEDS} == {"tpot_ms", "batch_s", "output_per_s", "total_per_s"}

    def test_median_errors(self) -> None:
        held_out = [speed for speed in SPEEDS if speed.held_out]
        assert median_absolute_error(SPEEDS) <= 0.20
        assert median_absolute_error([speed for speed in SPEEDS if not speed.held_out]) <= 0.12
        assert median_absolute_error(held_out) <= 0.25
        assert median_absolute_error([speed for speed in held_out if not speed.is_mixture]) <= 0.20
        assert median_absolute_error([speed for speed in held_out if speed.is_mixture]) <= 0.40

    def test_single_streams_and_saturated_engines_apart(self) -> None:
        assert median_absolute_error([speed for speed in SPEEDS if speed.concurrency == 1]) <= 0.20
        assert median_absolute_error([speed for speed in SPEEDS if math.isinf(speed.concurrency)]) <= 0.25

    @pytest.mark.parametrize("speed", SPEEDS, ids=lambda speed: f"{speed.title}-{speed.concurrency:g}")
    def test_none_is_absurd(self, speed: PublishedSpeed) -> None:
        assert 1 / 2.5 < predicted(speed) / speed.value < 2.5

    def test_ratios_of_plans_on_the_same_gpus(self) -> None:
        for comparison in published_comparisons():
            assert comparison.predicted == pytest.approx(comparison.value, rel=0.25), comparison.title


class TestMeasuredAnchors:
    @pytest.mark.parametrize(
        ("gpu", "model", "tensor"),
        [
            ("A100-SXM-80GB", "Llama-3.1-8B", 1),
            ("H100-SXM-80GB", "Llama-3.1-8B", 1),
            ("L4-24GB", "Llama-3.1-8B", 1),
            ("H100-SXM-80GB", "Llama-3.1-70B", 4),
            ("H100-SXM-80GB", "Llama-3.1-70B", 8),
        ],
    )
    def test_meets_what_the_scheduler_starts_from(self, gpu: str, model: str, tensor: int) -> None:
        planned = step_time(model, gpu, tensor=tensor)
        anchor = prior_for(gpu, model, tensor_parallel_size=tensor).parameters
        errors = [
            planned.step_s(*step) / anchor.step_s(*step) - 1.0
            for step in [
                (1, 500),
                (8, 8e3),
                (32, 64e3),
                (128, 128e3),
                (512, 0),
                (2048, 0, 4e6),
                (8192, 0, 8e6),
            ]
        ]
        assert statistics.median(map(abs, errors)) <= 0.15
        assert max(map(abs, errors)) <= 0.20


class TestPhysics:
    def test_never_shorter_with_more_of_anything(self) -> None:
        for name in ("Llama-3.1-8B", "Mixtral-8x7B", "DeepSeek-V3", "gpt-oss-120b"):
            step = step_time(name, tensor=8)
            counts = [1, 2, 4, 16, 64, 256, 1024, 4096, 8192]
            times = [step.step_s(count) for count in counts]
            assert times == sorted(times)
            assert step.step_s(8, 10_000) > step.step_s(8, 1_000) > step.step_s(8)
            assert step.step_s(512, 0.0, 1e6) > step.step_s(512, 0.0, 1e5)

    def test_many_steps_at_once_are_the_same(self) -> None:
        step = step_time("Mixtral-8x7B", tensor=2)
        counts = np.array([1.0, 7.0, 300.0, 8000.0])
        assert step.linear_s(counts) == pytest.approx([step.step_s(count) for count in counts])

    def test_more_bandwidth_is_faster(self) -> None:
        slow = GpuPool(gpu=require_gpu("H100-SXM-80GB"), gpus_per_node_count=8)
        fast = replace(slow, gpu=replace(slow.gpu, memory_gb_per_s=2 * slow.gpu.memory_gb_per_s))
        model, config = known_model("Llama-3.1-70B"), ParallelismConfig(tensor_parallel_size=4)
        slow_s = plan_step_time(model, slow, config, OPTIONS).step_s(1)
        fast_s = plan_step_time(model, fast, config, OPTIONS).step_s(1)
        assert 0.5 * slow_s < fast_s < 0.75 * slow_s

    def test_tensor_parallelism_shortens_steps_of_large_models(self) -> None:
        times = [step_time(tensor=size).step_s(1) for size in (1, 2, 4, 8)]
        assert times == sorted(times, reverse=True)
        # All-reduces and launches are not divided.
        assert times[3] > times[0] / 8

    def test_tensor_parallelism_hardly_pays_for_small_models(self) -> None:
        assert step_time("Llama-3.2-1B", tensor=8).step_s(1) > 0.5 * step_time("Llama-3.2-1B").step_s(1)

    def test_all_reduces_over_pcie_take_longer_than_over_nvlink(self) -> None:
        over_nvlink = step_time("Llama-3.1-8B", "A100-SXM-80GB", tensor=4)
        over_pcie = step_time("Llama-3.1-8B", "A100-PCIe-80GB", tensor=4)
        assert over_pcie.step_s(4096) > 1.5 * over_nvlink.step_s(4096)

    def test_tensor_parallelism_over_nodes_is_slow(self) -> None:
        within = step_time("Llama-3.1-405B", "H200", tensor=8)
        across = step_time("Llama-3.1-405B", "H200", nodes=2, tensor=16)
        assert across.step_s(4096) > within.step_s(4096)

    def test_pipeline_stages_do_not_shorten_a_step(self) -> None:
        one, two = step_time(tensor=4), step_time(tensor=4, pipeline=2)
        assert one.step_s(1) < two.step_s(1) < 1.1 * one.step_s(1)
        assert two.step_s(2048) > one.step_s(2048)

    def test_four_bits_are_read_in_a_quarter_of_the_time(self) -> None:
        whole = known_model("Llama-3.1-70B")
        quantized = replace(whole, weight_format=WeightFormat.INT4)
        # Without what is not weights: two steps that differ in nothing else.
        difference_s = step_time(whole, tensor=2).step_s(1) - step_time(quantized, tensor=2).step_s(1)
        assert 0.5 * step_time(whole, tensor=2).step_s(1) < difference_s
        # The products are in 16 bits all the same, and widening costs.
        assert step_time(quantized, tensor=2).step_s(8192) > step_time(whole, tensor=2).step_s(8192)

    def test_fp8_computes_faster_only_where_the_gpu_can(self) -> None:
        whole = known_model("Llama-3.1-8B")
        quantized = replace(whole, weight_format=WeightFormat.FP8)
        assert step_time(quantized, "H100").step_s(8192) < 0.7 * step_time(whole, "H100").step_s(8192)
        assert step_time(quantized, "A100-SXM-80GB").step_s(8192) > step_time(whole, "A100-SXM-80GB").step_s(
            8192
        )
        assert step_time(quantized, "A100-SXM-80GB").step_s(1) < 0.7 * step_time(
            whole, "A100-SXM-80GB"
        ).step_s(1)

    def test_without_cuda_graphs_each_layer_is_launched_by_itself(self) -> None:
        eager = step_time("Llama-3.1-8B", options=replace(OPTIONS, cuda_graphs=False))
        assert eager.step_s(1) > step_time("Llama-3.1-8B").step_s(1) + 2e-3

    def test_key_value_heads_are_not_split_below_one(self) -> None:
        model = replace(known_model("Llama-3.1-70B"), key_value_head_count=4)
        four, eight = step_time(model, tensor=4), step_time(model, tensor=8)
        assert eight.context_per_token_s == pytest.approx(four.context_per_token_s)

    def test_latent_attention_reads_little(self) -> None:
        latent, plain = step_time("DeepSeek-V3", tensor=8), step_time("Llama-3.1-405B", tensor=8)
        # 576 values per token and layer on every GPU, against one head's 256 and twice the layers.
        assert latent.context_per_token_s < 2.0 * plain.context_per_token_s

    def test_fp8_cache_halves_the_reading_of_contexts(self) -> None:
        halved = step_time(options=replace(OPTIONS, key_value_bytes=1.0), tensor=4)
        assert halved.context_per_token_s == pytest.approx(step_time(tensor=4).context_per_token_s / 2.0)


class TestMixtures:
    def test_few_tokens_read_few_experts(self) -> None:
        step = step_time("DeepSeek-V3", "H200", tensor=8)
        first, full = step.step_s(1), step.step_s(256)
        assert full > 2.0 * first
        # Half of the experts are read by the 22nd token: 1 - (1 - 8/256)^22.
        assert step.step_s(22) == pytest.approx((first + full) / 2.0, rel=0.1)

    def test_all_to_all_grows_across_nodes(self) -> None:
        within = step_time("DeepSeek-V3", "H200", tensor=1, data=8, expert=8)
        across = step_time("DeepSeek-V3", "H200", nodes=8, tensor=1, data=64, expert=64)
        fast = step_time(
            "DeepSeek-V3", "H200", nodes=8, tensor=1, data=64, expert=64, node_link_gb_per_s=400.0
        )
        assert across.step_s(4096) > fast.step_s(4096)
        assert across.step_s(4096) > within.step_s(4096)

    @pytest.mark.parametrize(("gpu_count", "measured_us"), [(8, 77 + 114), (16, 118 + 195), (64, 173 + 314)])
    def test_all_to_all_takes_as_long_as_measured(self, gpu_count: int, measured_us: float) -> None:
        # github.com/deepseek-ai/DeepEP, docs/legacy.md: kernels for decoding on H800 with 50 GB/s
        # adapters, 128 tokens per GPU, dispatch in 8 bits and combination in 16.
        pool = GpuPool(gpu=require_gpu("H800-80GB"), gpus_per_node_count=8, node_count=max(1, gpu_count // 8))
        config = ParallelismConfig(data_parallel_size=gpu_count, expert_parallel_size=gpu_count)
        spent = all_to_all(known_model("DeepSeek-V3"), pool, config)
        per_layer_us = (spent.fixed_s + 128 * spent.per_token_s) / 58 * 1e6
        assert per_layer_us == pytest.approx(measured_us, rel=0.2)

    def test_more_copies_share_the_reading_of_experts(self) -> None:
        within = step_time("DeepSeek-V3", "H200", gpus_per_node=8, tensor=1, data=8, expert=8)
        across = step_time("DeepSeek-V3", "H200", gpus_per_node=64, tensor=1, data=64, expert=64)
        assert across.step_s(32) < within.step_s(32)

    def test_copies_share_experts_without_expert_parallelism_too(self) -> None:
        alone = step_time("Mixtral-8x7B", tensor=2)
        shared = step_time("Mixtral-8x7B", tensor=2, data=2)
        assert shared.step_s(64) < alone.step_s(64)

    def test_whole_experts_are_imbalanced_slices_are_narrow(self) -> None:
        slices = step_time("Qwen3-235B-A22B-FP8", tensor=4)
        whole = step_time("Qwen3-235B-A22B-FP8", tensor=4, expert=4)
        assert whole.step_s(8192) == pytest.approx(slices.step_s(8192), rel=0.15)


class TestParameters:
    @pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen2.5-72B", "Llama-3.1-405B-FP8", "Qwen3-8B-AWQ"])
    def test_exact_for_dense_models(self, name: str) -> None:
        step = step_time(name, tensor=8)
        for sizes in [(1, 100), (64, 64e3), (256, 1e5), (2048, 1e4, 1e6), (8192, 0, 8e6)]:
            assert step.parameters.step_s(*sizes) == pytest.approx(step.step_s(*sizes))

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [("Mixtral-8x7B", 2), ("Qwen3-30B-A3B", 1), ("gpt-oss-120b", 2), ("DeepSeek-V3", 8)],
    )
    def test_close_for_mixtures(self, name: str, tensor: int) -> None:
        step = step_time(name, "H200", tensor=tensor)
        decodes = [step.parameters.step_s(count) / step.step_s(count) - 1.0 for count in range(8, 257, 8)]
        prefills = [
            step.parameters.step_s(count) / step.step_s(count) - 1.0 for count in (1024, 2048, 4096, 8192)
        ]
        assert statistics.median(map(abs, decodes)) <= 0.35
        assert max(map(abs, prefills)) <= 0.35
        # A single stream is where they are furthest off.
        assert 1.0 <= step.parameters.step_s(1) / step.step_s(1) <= 5.0


class TestThroughput:
    def test_batch_memory_compute_or_load_limits(self) -> None:
        step = step_time("Llama-3.1-8B")
        cases = {
            "batch": saturated_throughput(step, PLENTY, 100, 100, OPTIONS),
            "memory": saturated_throughput(step, 20_000, 100, 100, OPTIONS),
            "compute": saturated_throughput(step, PLENTY, 8000, 10, OPTIONS),
            "load": throughput_at(step, 3, PLENTY, 100, 100, OPTIONS),
        }
        assert {name: state.limited_by for name, state in cases.items()} == {name: name for name in cases}
        assert cases["batch"].running_request_count == 256
        assert cases["load"].running_request_count == 3

    def test_a_single_request_takes_its_prefill_and_its_steps(self) -> None:
        step = step_time("Llama-3.1-8B")
        state = throughput_at(step, 1, PLENTY, 1000, 200, OPTIONS)
        decode_s = step.step_s(1, 1100)
        prefill_s = step.step_s(1001, 1100, 1000**2 / 2) - decode_s
        assert 1.0 / state.requests_per_second == pytest.approx(200 * decode_s + prefill_s)

    def test_grows_with_load_and_saturates(self) -> None:
        step = step_time("Llama-3.1-8B")
        rates = [
            throughput_at(step, count, PLENTY, 500, 200, OPTIONS).output_tokens_per_second
            for count in (1, 4, 16, 64, 256, 1024)
        ]
        assert rates == sorted(rates)
        assert rates[-1] == rates[-2]

    def test_prefill_cannot_exceed_the_budget(self) -> None:
        step = step_time("Llama-3.1-8B")
        state = saturated_throughput(step, PLENTY, 8000, 10, OPTIONS)
        computed_per_step = (state.requests_per_second * 8000) * state.step_s
        assert computed_per_step + state.running_request_count <= OPTIONS.max_batch_token_count * 1.001

    def test_cached_prompts_cost_no_work_but_room(self) -> None:
        step = step_time("Llama-3.1-8B")
        cold = saturated_throughput(step, 100_000, 2000, 100, OPTIONS)
        warm = saturated_throughput(step, 100_000, 2000, 100, OPTIONS, cached_token_count=1900)
        assert warm.output_tokens_per_second > cold.output_tokens_per_second
        assert warm.running_request_count <= 100_000 / 2050

    def test_stages_share_memory_and_requests(self) -> None:
        step = step_time("Llama-3.1-8B", pipeline=2)
        one = saturated_throughput(step, 100_000, 100, 100, OPTIONS)
        two = saturated_throughput(step, 100_000, 100, 100, OPTIONS, stage_count=2)
        assert two.running_request_count == pytest.approx(one.running_request_count)
        assert two.step_s < one.step_s
        assert two.output_tokens_per_second > one.output_tokens_per_second

    def test_no_room_is_no_throughput(self) -> None:
        state = saturated_throughput(step_time("Llama-3.1-8B"), 0, 100, 100, OPTIONS)
        assert state.output_tokens_per_second == 0.0
        assert state.limited_by == "memory"
