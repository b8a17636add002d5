#!/usr/bin/env python3
"""Ask vLLM itself whether it would start with a plan, without weights and without GPUs.

    judge_plans.py < QUESTIONS.json > ANSWERS.json

QUESTIONS::

    {"models": {name: config.json},
     "plans": [{"model": name, "tensor": n, "pipeline": n, "data": n, "expert": n}],
     "commands": [{"model": name, "arguments": [those of vllm serve]}],
     "quantizations": [name],
     "architectures": [name]}

ANSWERS, in the same order::

    {"verdicts": [{"refused": bool, "stage": name, "why": text}],
     "commands": [{size: value}],
     "capabilities": {name: number},
     "stages": {architecture: bool}}

A plan is judged in two stages, as `vllm serve` would meet them: the engine's configuration is
made from a folder with only a config.json, then the model is built on the meta device for the
first and the last stage, in a group of as many ranks as the plan has, of which only this one is
there. Where the CPU build would go another way than CUDA, CUDA's way is taken:

* fp8 kernels that ask for AMX are told that there is AMX;
* AWQ and GPTQ layers go through the checks of the kernels for NVIDIA GPUs.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    TORCHDYNAMO_DISABLE="1",
    VLLM_LOGGING_LEVEL="CRITICAL",
    # What vLLM finds out about a class of models is kept there: 8 s each the first time.
    VLLM_CACHE_ROOT=str(Path(sys.prefix).parent / "cache"),
)

import torch
import vllm.distributed.parallel_state as groups
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
from vllm.model_executor.layers.fused_moe import expert_map_manager
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq, get_quantization_config
from vllm.model_executor.layers.quantization.utils.marlin_utils import check_marlin_supports_layer
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform


def group(size: int, rank: int = 0) -> SimpleNamespace:
    """Make a process group of which only one rank exists."""
    processes = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    return SimpleNamespace(
        world_size=size, rank_in_group=rank, rank=rank, local_rank=0, ranks=list(range(size)),
        is_first_rank=rank == 0, is_last_rank=rank == size - 1,
        device_group=processes, cpu_group=processes, device_communicator=None,
        use_device_communicator=False, device=torch.device("cpu"), unique_name="judged",
    )  # fmt: skip


@contextlib.contextmanager
def as_on_cuda():
    """Let layers be built as they would be on an NVIDIA GPU, as far as sizes matter."""
    experts_of_rank = expert_map_manager.determine_expert_map
    awq_weights = auto_awq.AutoAWQMarlinLinearMethod.create_weights
    choose_kernel = auto_gptq.choose_mp_linear_kernel

    def on_the_cpu(*arguments, **named):
        # Counts elements, which the meta device cannot.
        with torch.device("cpu"):
            return experts_of_rank(*arguments, **named)

    def create_awq_weights(self, layer, *arguments, **named):
        if check_marlin_supports_layer(layer, self.quant_config.group_size, allow_tile_padding=True):
            return awq_weights(self, layer, *arguments, **named)
        fallback = auto_awq.AutoAWQLinearMethod(self.quant_config)
        return fallback.create_weights(layer, *arguments, **named)

    def choose_gptq_kernel(config):
        with mock.patch.object(type(current_platform), "is_cuda", return_value=True):
            possible, why = MarlinLinearKernel.can_implement(config)
        if not possible:
            raise ValueError(why)
        return choose_kernel(config)

    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (torch.cpu, "_is_amx_tile_supported", lambda: True),
            (expert_map_manager, "determine_expert_map", on_the_cpu),
            (auto_awq.AutoAWQMarlinLinearMethod, "create_weights", create_awq_weights),
            (auto_gptq, "choose_mp_linear_kernel", choose_gptq_kernel),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def engine_config(folder: str, plan: dict[str, int]):
    """Make what `vllm serve` makes of a plan, before it loads anything."""
    return EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=True,
        distributed_executor_backend="mp",
        max_model_len=plan.get("context", 2048),
        max_num_batched_tokens=plan.get("batch_tokens", 2048),
        max_num_seqs=plan.get("running", 256),
        tensor_parallel_size=plan["tensor"],
        pipeline_parallel_size=plan["pipeline"],
        data_parallel_size=plan["data"],
        enable_expert_parallel=plan["expert"] > 1,
    ).create_engine_config()


def build(config: Any, plan: dict[str, int], stage: int) -> None:
    """Make a model's layers as the first rank of a stage would."""
    tensor, data = plan["tensor"], plan["data"]
    config.compilation_config.static_forward_context.clear()
    with contextlib.ExitStack() as stack:
        for name, its_group in {
            "_TP": group(tensor),
            "_PP": group(plan["pipeline"], stage),
            "_DP": group(data),
            "_EP": group(tensor * data),
            "_PCP": group(1),
            "_DCP": group(1),
        }.items():
            stack.enter_context(mock.patch.object(groups, name, its_group))
        stack.enter_context(set_current_vllm_config(config, check_compile=False))
        stack.enter_context(as_on_cuda())
        stack.enter_context(torch.device("meta"))
        initialize_model(config)


def judge(model: dict[str, Any], plan: dict[str, int]) -> dict[str, Any]:
    """Return vLLM's verdict on one plan."""
    stage = "configuration"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        try:
            config = engine_config(folder, plan)
            stage = "construction"
            for index in sorted({0, plan["pipeline"] - 1}):
                build(config, plan, index)
        except Exception as error:  # noqa: BLE001  # whatever vLLM raises is its answer
            return {"refused": True, "stage": stage, "why": f"{type(error).__name__}: {error}"[:500]}
    return {"refused": False, "stage": "", "why": ""}


def configure(command: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes that `vllm serve` understands from its arguments, or why it does not."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = make_arg_parser(FlexibleArgumentParser()).parse_args(command["arguments"])
    name = options.model_tag
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(models[command["model"]]))
        options.model, options.skip_tokenizer_init = folder, True
        try:
            config = EngineArgs.from_cli_args(options).create_engine_config(headless=options.headless)
        except Exception as error:  # noqa: BLE001  # whatever vLLM raises is its answer
            return {"error": f"{type(error).__name__}: {error}"[:1000]}
    parallel = config.parallel_config
    return {
        "model": name,
        "port": options.port,
        "headless": options.headless,
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "data": parallel.data_parallel_size,
        "experts_spread": parallel.enable_expert_parallel,
        "node_count": parallel.nnodes,
        "node_rank": parallel.node_rank,
        "ranks_here": parallel.local_world_size * parallel.data_parallel_size_local,
        "first_copy": parallel.data_parallel_rank,
        "hybrid": parallel.data_parallel_hybrid_lb or parallel.data_parallel_external_lb,
        "context": config.model_config.max_model_len,
        "running": config.scheduler_config.max_num_seqs,
        # As it was read: for MLA the CPU build takes another number.
        "batch_tokens": options.max_num_batched_tokens,
        "memory_share": config.cache_config.gpu_memory_utilization,
        "cache_type": config.cache_config.cache_dtype,
        "block_size": config.cache_config.block_size,
        "eager": options.enforce_eager,
    }


def main() -> None:
    questions = json.load(sys.stdin)
    # Whatever is printed on the way is no answer.
    answers_file, sys.stdout = sys.stdout, sys.stderr
    answers = {
        "verdicts": [judge(questions["models"][plan["model"]], plan) for plan in questions.get("plans", [])],
        "commands": [configure(command, questions["models"]) for command in questions.get("commands", [])],
        "capabilities": {
            name: get_quantization_config(name).get_min_capability() / 10
            for name in questions.get("quantizations", [])
        },
        "stages": {
            name: ModelRegistry.models[name].inspect_model_cls().supports_pp
            for name in questions.get("architectures", [])
        },
    }
    json.dump(answers, answers_file)


if __name__ == "__main__":
    main()
