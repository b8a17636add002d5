"""The `vllm serve` commands that start a plan: one for each process, in the words of vLLM 0.32."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from sagecp.core.parallelism.engine_options import EngineOptions
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.model_description import ModelDescription
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.parallelism.plan_placement import NodeShare, place_replicas

FIRST_PORT = 8000
"""Port of the first replica of a node; the next ones follow it."""
MOST_COMMANDS = 256
"""Commands that are written out; a line tells how many more there are."""

# Ports between the processes of one replica; a replica that spans nodes has its nodes to itself.
_MASTER_PORT = 29501
_DATA_PARALLEL_PORT = 13345
_DEFAULT_BLOCK_TOKEN_COUNT = 16
_UNNAMED_MODEL = "MODEL"


def engine_arguments(
    model: ModelDescription, config: ParallelismConfig, options: EngineOptions
) -> tuple[str, ...]:
    """Return what follows `vllm serve` for a replica on one node, unquoted.

    Whatever the estimates depend on is given even where it equals vLLM's default, because the
    defaults differ between its versions and between GPUs. Quantization is not given: vLLM
    reads it from the checkpoint.
    """
    arguments = [model.name or _UNNAMED_MODEL, *_sizes(config)]
    if options.max_context_token_count is not None:
        arguments += ["--max-model-len", str(options.max_context_token_count)]
    arguments += [
        "--gpu-memory-utilization",
        f"{options.gpu_memory_utilization:g}",
        "--max-num-seqs",
        str(options.max_running_request_count),
        "--max-num-batched-tokens",
        str(options.max_batch_token_count),
    ]
    if options.key_value_bytes == 1.0:
        arguments += ["--kv-cache-dtype", "fp8"]
    if options.block_token_count != _DEFAULT_BLOCK_TOKEN_COUNT:
        arguments += ["--block-size", str(options.block_token_count)]
    if not options.cuda_graphs:
        arguments.append("--enforce-eager")
    return tuple(arguments)


def serve_commands(
    model: ModelDescription, pool: GpuPool, config: ParallelismConfig, options: EngineOptions
) -> tuple[str, ...]:
    """Return a shell command for each process of the plan, each after a comment that names its node.

    A replica that fits a node is one command, with its GPUs and a port of its own. One that
    spans nodes is a command per node; the first of them answers requests, and the others find
    it by its address, which is to be put into the shell variable that the comment names. The
    plan must fit the pool.
    """
    arguments = engine_arguments(model, config, options)
    commands: list[str] = []
    count = 0
    for replica_index, shares in enumerate(place_replicas(pool, config)):
        for command in _replica_commands(arguments, pool, config, replica_index, shares):
            count += 1
            if count <= MOST_COMMANDS:
                commands.append(command)
        if count > MOST_COMMANDS:
            per_replica = len(shares)
            total = per_replica * config.replica_count
            commands.append(f"# and {total - MOST_COMMANDS:,} more like these, up to node {pool.node_count}")
            break
    return tuple(commands)


def _sizes(config: ParallelismConfig) -> Iterator[str]:
    yield from ("--tensor-parallel-size", str(config.tensor_parallel_size))
    if config.pipeline_parallel_size > 1:
        yield from ("--pipeline-parallel-size", str(config.pipeline_parallel_size))
    if config.data_parallel_size > 1:
        yield from ("--data-parallel-size", str(config.data_parallel_size))
    if config.expert_parallel_size > 1:
        yield "--enable-expert-parallel"


def _replica_commands(
    arguments: tuple[str, ...],
    pool: GpuPool,
    config: ParallelismConfig,
    replica_index: int,
    shares: tuple[NodeShare, ...],
) -> Iterator[str]:
    head = shares[0]
    port = FIRST_PORT + head.first_gpu_index // head.gpu_count
    # A shell variable: addresses are not known here.
    variable = f"NODE_{head.node_index + 1}_ADDRESS"
    serve = ["vllm", "serve", *(shlex.quote(argument) for argument in arguments)]
    for index, share in enumerate(shares):
        place = f"node {share.node_index + 1} of {pool.node_count}"
        if config.replica_count > 1:
            place += f", replica {replica_index + 1} of {config.replica_count}"
        words = list(serve)
        if len(shares) > 1:
            place += f"; {variable} is the address of node {head.node_index + 1}"
            words += _across_nodes(shares, index, f'"${variable}"')
        words += ["--headless"] if index else ["--port", str(port)]
        if share.gpu_count < pool.gpus_per_node_count:
            words.insert(0, f"CUDA_VISIBLE_DEVICES={','.join(map(str, share.gpu_indexes))}")
        yield f"# {place}\n{' '.join(words)}"


def _across_nodes(shares: tuple[NodeShare, ...], index: int, address: str) -> list[str]:
    """Return how one node's process finds the others. Where a copy spans nodes, ranks are counted by node."""
    share = shares[index]
    if not share.copy_count:
        nodes = ["--nnodes", str(len(shares)), "--node-rank", str(index)]
        return [*nodes, "--master-addr", address, "--master-port", str(_MASTER_PORT)]
    words = ["--data-parallel-size-local", str(share.copy_count)]
    if index:
        words += ["--data-parallel-start-rank", str(share.first_copy_index)]
    return [*words, "--data-parallel-address", address, "--data-parallel-rpc-port", str(_DATA_PARALLEL_PORT)]
