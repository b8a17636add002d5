"""Which plans vLLM starts with, asked of vLLM itself, and what it makes of the commands.

The table is judged by vLLM's own configuration and layers without starting it; a few plans
are then started for real, as many ranks as there are, on the CPU.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.engine_command import engine_arguments, serve_commands
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.memory import key_value_bytes_per_token
from sagecp.core.parallelism.model_config import parse_model_config
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.validity import refusals, violations
from tests.e2e.conftest import ENGINE_START_S, MODEL, RECIPE, Engine
from tests.support.plan_values import config, pool
from tests.support.plan_verdicts import TABLE, Row, rows
from tests.support.processes import Program, free_ports

KEY_VALUE_BYTES = 64 * 2**20
H100 = require_gpu("H100-SXM-80GB")
OPTIONS = EngineOptions(
    gpu_memory_utilization=0.85,
    max_batch_token_count=4096,
    max_running_request_count=128,
    max_context_token_count=2048,
)

# Model of the table, GPUs, plan.
COMMANDS = [
    ("llama-3.1-8b", pool(), config()),
    ("llama-3.1-8b", pool(), config(tensor=4, replicas=2)),
    ("llama-3.1-8b", pool(), config(tensor=2, pipeline=2, data=2)),
    ("llama-3.1-8b", pool(nodes=2), config(tensor=8, pipeline=2)),
    ("llama-3.1-8b", pool(nodes=3), config(tensor=4, data=5)),
    ("llama-3.1-8b", pool(nodes=4), config(tensor=8, pipeline=2, data=2)),
    ("mixtral-8x7b", pool(), config(tensor=8, expert=8)),
    ("deepseek-v3", pool(nodes=4), config(tensor=8, data=4, expert=32)),
]
# vLLM's names of the formats that GPUs may be too old for.
QUANTIZATIONS = {
    "fp8": WeightFormat.FP8,
    "awq": WeightFormat.INT4,
    "gpt_oss_mxfp4": WeightFormat.MXFP4,
    "modelopt_fp4": WeightFormat.NVFP4,
}
STAGES = {"LlamaForCausalLM": True, "Gemma3nForCausalLM": False, "Zamba2ForCausalLM": False}


@pytest.fixture(scope="module")
def venv() -> Path:
    installed = subprocess.run([RECIPE / "install.sh"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(installed.stdout.strip())


def words_of(command: str) -> list[str]:
    """Return what a command gives `vllm serve`, with an address in place of the head node's."""
    line = command.split("\n")[1]
    words = shlex.split(re.sub(r'"\$NODE_\d+_ADDRESS"', "127.0.0.1", line))
    return words[words.index("serve") + 1 :]


def all_commands() -> Iterator[tuple[str, ParallelismConfig, list[str]]]:
    for name, gpus, plan in COMMANDS:
        model = parse_model_config(TABLE["models"][name], name=f"models/{name}")
        for command in serve_commands(model, gpus, plan, OPTIONS):
            yield name, plan, words_of(command)


def unusual_settings() -> dict[str, Any]:
    """Return a question about a command with every setting that is usually left out."""
    name = "llama-3.1-8b"
    options = replace(OPTIONS, key_value_bytes=1.0, block_token_count=32, cuda_graphs=False)
    model = parse_model_config(TABLE["models"][name], name=name)
    return {"model": name, "arguments": list(engine_arguments(model, config(), options))}


@pytest.fixture(scope="module")
def answers(venv: Path) -> dict[str, Any]:
    questions = {
        **TABLE,
        "commands": [
            *({"model": name, "arguments": words} for name, _, words in all_commands()),
            unusual_settings(),
        ],
        "quantizations": list(QUANTIZATIONS),
        "architectures": list(STAGES),
    }
    judged = subprocess.run(
        [venv / "bin" / "python", RECIPE / "judge_plans.py"],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=ENGINE_START_S,
    )
    assert judged.returncode == 0, judged.stderr[-4000:]
    read: dict[str, Any] = json.loads(judged.stdout)
    return read


@pytest.mark.parametrize(("index", "row"), list(enumerate(rows())), ids=str)
def test_vllm_gives_the_verdict_that_we_give(answers: dict[str, Any], index: int, row: Row) -> None:
    verdict = answers["verdicts"][index]
    ours = refusals(row.model, row.config, row.options)
    assert verdict["refused"] == bool(ours), (verdict, ours)
    # For the reason that is meant, and not because a CPU cannot do what a GPU can.
    assert row.engine_says in verdict["why"]


def test_vllm_reads_every_command_as_it_is_meant(answers: dict[str, Any]) -> None:
    commands = list(all_commands())
    assert len(commands) == 18
    for (name, plan, words), read in zip(commands, answers["commands"][:-1], strict=True):
        assert "error" not in read, (words, read)
        assert read["model"] == f"models/{name}"
        assert (read["tensor"], read["pipeline"], read["data"]) == plan.sizes[:3]
        assert read["experts_spread"] == (plan.expert_parallel_size > 1)
        assert not read["hybrid"], "each node would answer for its own copies only"
        assert read["memory_share"] == pytest.approx(0.85)
        assert (read["context"], read["running"], read["batch_tokens"]) == (2048, 128, 4096)


def test_vllm_puts_the_ranks_of_every_node_where_they_belong(answers: dict[str, Any]) -> None:
    read = dict[tuple[str, ParallelismConfig], list[dict[str, Any]]]()
    for (name, plan, _), answer in zip(all_commands(), answers["commands"][:-1], strict=True):
        read.setdefault((name, plan), []).append(answer)
    for (_, plan), nodes in read.items():
        ranks = [node["ranks_here"] for node in nodes]
        assert sum(ranks) == plan.gpu_count
        per_replica = len(nodes) // plan.replica_count
        assert [node["headless"] for node in nodes] == [
            index % per_replica > 0 for index in range(len(nodes))
        ]
        copy = plan.tensor_parallel_size * plan.pipeline_parallel_size
        for index, node in enumerate(nodes):
            if per_replica > 1:
                assert node["first_copy"] == sum(ranks[:index]) // copy


def test_settings_reach_vllm_by_their_names(answers: dict[str, Any]) -> None:
    read = answers["commands"][-1]
    assert (read["cache_type"], read["block_size"], read["eager"]) == ("fp8", 32, True)


def test_formats_need_the_gpus_that_vllm_says(answers: dict[str, Any]) -> None:
    model = rows()[0].model
    for name, weight_format in QUANTIZATIONS.items():
        least = answers["capabilities"][name]
        stored = replace(model, weight_format=weight_format)
        for capability in (least - 0.5, least):
            gpus = replace(pool(), gpu=replace(H100, compute_capability=capability))
            reasons = violations(stored, gpus, config(), OPTIONS)
            assert any("compute capability" in reason for reason in reasons) == (capability < least), name


def test_vllm_cuts_the_models_into_stages_that_we_let_it_cut(answers: dict[str, Any]) -> None:
    assert answers["stages"] == STAGES
    model = rows()[0].model
    for architecture, possible in STAGES.items():
        named = replace(model, architecture=architecture)
        assert (not refusals(named, config(pipeline=2), OPTIONS)) == possible


# What of a command is about sizes and nodes. The rest is set as the tiny model and the CPU need it.
PLAN_OPTIONS = {
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--data-parallel-size-local",
    "--data-parallel-start-rank",
    "--data-parallel-address",
    "--data-parallel-rpc-port",
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--master-port",
}


def plan_words(command: str, own_port: int) -> list[str]:
    """Return a command's options of sizes and nodes, with a port of our own between the nodes."""
    words = words_of(command)
    kept = ["--headless"] if "--headless" in words else []
    for option, value in pairwise(words):
        if option in PLAN_OPTIONS:
            kept += [option, str(own_port) if option.endswith("-port") else value]
    return kept


@pytest.fixture
def serve(venv: Path, tmp_path: Path, logs: Path) -> Iterator[Any]:
    """Start the tiny model, or one of another shape, by the commands of a plan, all on this machine.

    Returns its description and the engine that answers.
    """
    programs: list[Program] = []

    def start(plan: ParallelismConfig, *shape: str, nodes: int = 1) -> tuple[ModelDescription, Engine]:
        folder = venv / "model"
        if shape:
            folder = tmp_path / "model"
            subprocess.run(
                [venv / "bin" / "python", RECIPE / "make_tiny_model.py", folder, *shape], check=True
            )
        model = parse_model_config(json.loads((folder / "config.json").read_text()), name=MODEL)
        gpus = GpuPool(gpu=H100, gpus_per_node_count=plan.gpu_count // nodes, node_count=nodes)
        commands = serve_commands(model, gpus, plan, OPTIONS)
        assert len(commands) == nodes
        between, *ports = free_ports(1 + nodes)
        for command, port in zip(commands, ports, strict=True):
            words = plan_words(command, between)
            if "--headless" not in words:
                words += ["--api-server-count", "1"]
            program = Program(
                f"vLLM {plan}",
                [RECIPE / "serve.sh", str(port), "--distributed-executor-backend", "mp", *words],
                environment={
                    "SAGECP_ENGINE_MODEL": str(folder),
                    "SAGECP_ENGINE_KV_BYTES": str(KEY_VALUE_BYTES),
                },
                log_file=logs / f"plan-{plan}-{port}.log",
            )
            programs.append(program)
        return model, Engine(f"plan-{plan}", ports[0], programs[0])

    yield start
    for program in programs:
        program.stop(timeout_s=5)


def cache_tokens(engine: Engine) -> int:
    """Return the size of the KV cache of one copy, as vLLM prints it."""
    printed = engine.program.wait_for_line(r"KV cache size: ([\d,]+) tokens", ENGINE_START_S)
    return int(printed[1].replace(",", ""))


def predicted_tokens(model: ModelDescription, plan: ParallelismConfig) -> int:
    options = replace(OPTIONS, key_value_bytes=4.0)
    assert not refusals(model, plan, options)
    return int(KEY_VALUE_BYTES // key_value_bytes_per_token(model, plan, options))


def generate(engine: Engine) -> dict[str, Any]:
    return engine.post(
        "/v1/completions", {"model": MODEL, "prompt": "hello there", "max_tokens": 8, "temperature": 0}
    )


@pytest.mark.parametrize(
    ("plan", "nodes"),
    [
        pytest.param(config(tensor=2), 1, id="tensor"),
        pytest.param(config(tensor=2), 2, id="tensor-over-nodes"),
        pytest.param(config(data=2), 2, id="data-over-nodes"),
    ],
)
def test_a_valid_plan_starts_generates_and_has_the_cache_that_was_predicted(
    serve: Any, plan: ParallelismConfig, nodes: int
) -> None:
    model, engine = serve(plan, nodes=nodes)
    assert cache_tokens(engine) == predicted_tokens(model, plan)
    engine.wait_until_healthy()
    assert generate(engine)["usage"]["completion_tokens"] == 8


def test_uneven_stages_start_and_the_larger_one_bounds_the_cache(serve: Any) -> None:
    # The CPU build stops in its first step with stages: only the start can be seen here.
    plan = config(pipeline=2)
    model, engine = serve(plan, "--layers", "3")
    assert cache_tokens(engine) == predicted_tokens(model, plan)


def test_a_prime_number_of_heads_is_refused(serve: Any) -> None:
    plan = config(tensor=2)
    model, engine = serve(plan, "--heads", "3", "--key-value-heads", "3")
    assert refusals(model, plan, OPTIONS)
    engine.program.wait_for_line(r"attention heads \(3\) must be divisible by", ENGINE_START_S)
    assert engine.program.wait(60) != 0
