from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from sagecp.core.parallelism.engine_command import MOST_COMMANDS, engine_arguments, serve_commands
from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from tests.support.plan_values import LLAMA_8B, config, pool

OPTIONS = EngineOptions()


def commands(gpus: GpuPool, plan: ParallelismConfig) -> list[tuple[str, dict[str, str], list[str]]]:
    """Return the comment, the environment and the words of every command."""
    parsed = []
    for command in serve_commands(LLAMA_8B, gpus, plan, OPTIONS):
        comment, line = command.split("\n")
        words = shlex.split(line)
        start = words.index("vllm")
        parsed.append((comment, dict(word.split("=", 1) for word in words[:start]), words[start:]))
    return parsed


def value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def test_a_replica_takes_the_whole_node_and_says_what_estimates_depend_on() -> None:
    [command] = serve_commands(LLAMA_8B, pool(8), config(tensor=8), OPTIONS)
    assert command == (
        "# node 1 of 1\n"
        "vllm serve meta-llama/Llama-3.1-8B --tensor-parallel-size 8 --gpu-memory-utilization 0.9 "
        "--max-num-seqs 256 --max-num-batched-tokens 8192 --port 8000"
    )


def test_every_setting_is_passed_on() -> None:
    options = EngineOptions(
        gpu_memory_utilization=0.85,
        max_batch_token_count=4096,
        max_running_request_count=64,
        max_context_token_count=32768,
        key_value_bytes=1.0,
        block_token_count=32,
        cuda_graphs=False,
    )
    assert engine_arguments(LLAMA_8B, config(2, 2, 2, 4), options) == (
        "meta-llama/Llama-3.1-8B",
        "--tensor-parallel-size", "2",
        "--pipeline-parallel-size", "2",
        "--data-parallel-size", "2",
        "--enable-expert-parallel",
        "--max-model-len", "32768",
        "--gpu-memory-utilization", "0.85",
        "--max-num-seqs", "64",
        "--max-num-batched-tokens", "4096",
        "--kv-cache-dtype", "fp8",
        "--block-size", "32",
        "--enforce-eager",
    )  # fmt: skip


def test_replicas_share_a_node_with_gpus_and_ports_of_their_own() -> None:
    found = commands(pool(8, nodes=2), config(tensor=2, replicas=6))
    assert [
        (comment, environment["CUDA_VISIBLE_DEVICES"], value(words, "--port"))
        for comment, environment, words in found
    ] == [
        ("# node 1 of 2, replica 1 of 6", "0,1", "8000"),
        ("# node 1 of 2, replica 2 of 6", "2,3", "8001"),
        ("# node 1 of 2, replica 3 of 6", "4,5", "8002"),
        ("# node 1 of 2, replica 4 of 6", "6,7", "8003"),
        ("# node 2 of 2, replica 5 of 6", "0,1", "8000"),
        ("# node 2 of 2, replica 6 of 6", "2,3", "8001"),
    ]


def test_a_copy_over_nodes_is_ranked_by_node_and_only_its_head_answers() -> None:
    found = commands(pool(8, nodes=4), config(tensor=8, pipeline=2, replicas=2))
    assert [
        (comment, value(words, "--nnodes"), value(words, "--node-rank"), value(words, "--master-addr"))
        for comment, _, words in found
    ] == [
        (
            "# node 1 of 4, replica 1 of 2; NODE_1_ADDRESS is the address of node 1",
            "2",
            "0",
            "$NODE_1_ADDRESS",
        ),
        (
            "# node 2 of 4, replica 1 of 2; NODE_1_ADDRESS is the address of node 1",
            "2",
            "1",
            "$NODE_1_ADDRESS",
        ),
        (
            "# node 3 of 4, replica 2 of 2; NODE_3_ADDRESS is the address of node 3",
            "2",
            "0",
            "$NODE_3_ADDRESS",
        ),
        (
            "# node 4 of 4, replica 2 of 2; NODE_3_ADDRESS is the address of node 3",
            "2",
            "1",
            "$NODE_3_ADDRESS",
        ),
    ]
    assert ["--headless" in words for _, _, words in found] == [False, True, False, True]
    assert [value(words, "--port") for _, _, words in found] == ["8000", None, "8000", None]


@pytest.mark.parametrize(
    ("plan", "local", "starts"),
    [
        pytest.param(
            config(tensor=8, data=4, expert=32), ["1", "1", "1", "1"], [None, "1", "2", "3"], id="one-each"
        ),
        pytest.param(config(tensor=4, data=6), ["2", "2", "2"], [None, "2", "4"], id="two-each"),
        pytest.param(config(tensor=4, data=5), ["2", "2", "1"], [None, "2", "4"], id="uneven"),
    ],
)
def test_copies_over_nodes_are_counted_from_the_head(
    plan: ParallelismConfig, local: list[str], starts: list[str | None]
) -> None:
    found = commands(pool(8, nodes=4), plan)
    assert [value(words, "--data-parallel-size-local") for _, _, words in found] == local
    assert [value(words, "--data-parallel-start-rank") for _, _, words in found] == starts
    assert {value(words, "--data-parallel-address") for _, _, words in found} == {"$NODE_1_ADDRESS"}
    assert ["--headless" in words for _, _, words in found] == [False] + [True] * (len(local) - 1)


def test_the_last_node_of_uneven_copies_shows_only_the_gpus_it_uses() -> None:
    found = commands(pool(8, nodes=3), config(tensor=4, data=5))
    assert [environment.get("CUDA_VISIBLE_DEVICES") for _, environment, _ in found] == [None, None, "0,1,2,3"]


def test_names_are_safe_in_a_shell() -> None:
    model = "/models/it's a $(trap); rm -rf"
    named = replace(LLAMA_8B, name=model)
    [command] = serve_commands(named, pool(1), config(), OPTIONS)
    assert shlex.split(command.split("\n")[1])[2] == model


def test_an_unnamed_model_leaves_a_place_for_its_name() -> None:
    unnamed = replace(LLAMA_8B, name="")
    assert engine_arguments(unnamed, config(), OPTIONS)[0] == "MODEL"


def test_a_large_fleet_gets_some_commands_and_their_number() -> None:
    found = serve_commands(LLAMA_8B, pool(8, nodes=500), config(replicas=4000), OPTIONS)
    assert len(found) == MOST_COMMANDS + 1
    assert found[-1] == "# and 3,744 more like these, up to node 500"
