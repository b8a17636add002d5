"""`sagecp plan` itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.options import ServerOptions, format_option, optional_server_options
from sagecp.cli.plan.model_source import complete_model, read_model
from sagecp.cli.plan.options import (
    GOALS,
    GPUS,
    LARGEST_USUAL_NODE,
    OBJECTIVES,
    PLAN_TYPES,
    PRICES,
    WEIGHT_FORMATS,
    GpusValue,
)
from sagecp.cli.plan.question import PlanOptions, make_request, refusal
from sagecp.cli.plan.workload_source import WorkloadSource, complete_workload, read_workload

if TYPE_CHECKING:
    from sagecp.cli.plan.simulated import CheckedPlan
    from sagecp.core.parallelism.estimates import PlanningResult
    from sagecp.core.parallelism.plan_query import PlanQuery
    from sagecp.v1 import admin_service_pb2

_SHOWN_COUNT = 8
_ALL = 1000
_CHECKED_COUNT = 3

_EPILOG = """\b
Examples:
  sagecp plan --model Llama-3.1-8B --gpus 8xH100 --workload chat --slo ttft=1s,tpot=50ms
  sagecp plan --model ./checkpoint --gpus 8xH100 --nodes 2 --workload trace.csv --plot plans.html
  sagecp plan --model config.json --gpus 4xL4 --gpus 2xH100 --workload prompt=1000,output=200 --rate 5
"""


@click.command("plan", epilog=_EPILOG)
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    shell_complete=complete_model,
    help="Folder of a checkpoint, its config.json, or the name of a known model.",
)
@click.option(
    "--gpus",
    type=GPUS,
    multiple=True,
    required=True,
    metavar="[NODESx]NxGPU",
    help="GPUs of each node, such as 8xH100; may be repeated, to compare kinds.",
)
@click.option("--nodes", type=click.IntRange(1, 100_000), default=1, metavar="N", help="Nodes.  [1]")
@click.option(
    "--workload",
    required=True,
    metavar="WORKLOAD",
    shell_complete=complete_workload,
    help="A trace, chat, code, long-chat or reasoning, or prompt=1000,output=200.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Requests per second to carry; 0: as many as can be.  [the trace's]",
)
@click.option(
    "--scale", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Rate relative to the trace's."
)
@click.option("--no-prefix-cache", is_flag=True, help="Count no prompt of a trace as cached.")
@click.option(
    "--slo",
    type=OBJECTIVES,
    multiple=True,
    metavar="ttft=T,tpot=T",
    help="Objectives: time to the first token, and per further token.",
)
@click.option(
    "--attainment",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    metavar="X",
    help="Share of the requests that must meet them.",
)
@click.option(
    "--objective",
    "goal",
    type=click.Choice(GOALS),
    default=GOALS[0],
    show_default=True,
    help="What the best plan is best at.",
)
@click.option("--type", "plan_type", type=click.Choice(PLAN_TYPES), help="Only plans of this type.")
@click.option(
    "--price",
    "prices",
    type=PRICES,
    multiple=True,
    metavar="USD|GPU=USD,...",
    help="Rent of one GPU for an hour.  [a usual one]",
)
@click.option("--weight-format", type=click.Choice(WEIGHT_FORMATS), help="Where config.json does not tell.")
@click.option("--max-model-len", type=click.IntRange(1), metavar="N", help="Longest context, in tokens.")
@click.option("--kv-cache-dtype", type=click.Choice(["auto", "fp8"]), default="auto", help="vLLM's option.")
@click.option(
    "--gpu-memory-utilization",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="X",
    help="vLLM's option.  [0.9]",
)
@click.option("--max-num-batched-tokens", type=click.IntRange(1), metavar="N", help="vLLM's option.  [8192]")
@click.option("--max-num-seqs", type=click.IntRange(1), metavar="N", help="vLLM's option.  [256]")
@click.option("--enforce-eager", is_flag=True, help="vLLM's: no CUDA graphs.")
@click.option("--all", "show_all", is_flag=True, help="Every plan, not the best alone.")
@click.option("--rejected", is_flag=True, help="Also the plans that cannot be, and why.")
@click.option("--check", is_flag=True, help="Also run the best three in the simulator.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page (.html) or a drawing (.svg) of all plans.",
)
@format_option("table", "wide", "json", "yaml")
@optional_server_options
def plan(
    connection: ServerOptions,
    output: str,
    model: str,
    gpus: tuple[GpusValue, ...],
    nodes: int,
    workload: str,
    rate: float | None,
    scale: float | None,
    no_prefix_cache: bool,
    slo: tuple[dict[str, float], ...],
    prices: tuple[dict[str, float], ...],
    show_all: bool,
    rejected: bool,
    check: bool,
    plot: Path | None,
    **settings: Any,  # noqa: ANN401 - those of the engine and the goal, taken apart below
) -> int:
    """Say how to spread a model over GPUs: which plan, what it gives, what it costs.

    Every plan that vLLM accepts is predicted: its memory, its times and its
    goodput, the requests per second within the objectives. Needs neither a GPU
    nor a server.
    """  # fmt: skip
    if plot is not None and plot.suffix not in {".html", ".svg"}:
        raise CliError(f"--plot: {plot} is neither .html nor .svg", exit_code=ExitCode.INVALID)
    if check and connection.server:
        raise CliError("--check simulates here: leave out --server", exit_code=ExitCode.INVALID)
    source = read_model(model)
    traffic = read_workload(workload, rate=rate, scale=scale, count_cached=not no_prefix_cache)
    options = PlanOptions(
        gpus=gpus,
        node_count=nodes,
        objectives={name: each[name] for each in slo for name in each},
        prices={name: each[name] for each in prices for name in each},
        attainment=settings["attainment"],
        goal=settings["goal"],
        type=settings["plan_type"] or "",
        weight_format=settings["weight_format"] or "",
        max_model_len=settings["max_model_len"],
        key_value_cache_type=settings["kv_cache_dtype"],
        gpu_memory_utilization=settings["gpu_memory_utilization"],
        max_batch_token_count=settings["max_num_batched_tokens"],
        max_running_request_count=settings["max_num_seqs"],
        enforce_eager=settings["enforce_eager"],
        limit=_ALL if show_all or plot is not None else _SHOWN_COUNT,
        with_rejected=rejected,
        with_front=plot is not None,
    )
    request = make_request(source, traffic, options)
    _warn_of_large_nodes(request)
    if connection.server:
        response, local = _ask(connection, request), None
    else:
        response, local = _plan_here(request)
    checked: list[CheckedPlan] | None = None
    if check and local is not None:
        checked = _check(*local)
    if plot is not None and response.plans:
        # First: who reads the answer may stop in the middle.
        _write_plot(plot, request, response, traffic, local)
    _print(request, response, traffic, checked, output, limit=_ALL if show_all else _SHOWN_COUNT)
    return ExitCode.OK if response.plans else ExitCode.NOT_FOUND_OR_CONFLICT


def _ask(
    connection: ServerOptions, request: admin_service_pb2.PlanParallelismRequest
) -> admin_service_pb2.PlanParallelismResponse:
    from sagecp.cli.connect import talk
    from sagecp.client import InvalidArgumentError, SageClient

    async def ask(client: SageClient) -> admin_service_pb2.PlanParallelismResponse:
        return await client.plan_parallelism(request)

    try:
        return talk(connection, ask)
    except CliError as error:
        if isinstance(error.__cause__, InvalidArgumentError) and error.__cause__.violations:
            raise refusal(error.__cause__.violations) from error
        raise


def _plan_here(
    request: admin_service_pb2.PlanParallelismRequest,
) -> tuple[admin_service_pb2.PlanParallelismResponse, tuple[PlanQuery, PlanningResult]]:
    from sagecp.core.errors import InvalidRequestError
    from sagecp.core.parallelism.plan_query import answer_plan_query
    from sagecp.rpc.convert.plan_request import plan_query_from_proto
    from sagecp.rpc.convert.plan_response import plans_to_proto

    try:
        query = plan_query_from_proto(request)
        result = answer_plan_query(query)
    except InvalidRequestError as error:
        raise refusal(error.violations) from error
    return plans_to_proto(request, query, result), (query, result)


def _check(query: PlanQuery, result: PlanningResult) -> list[CheckedPlan]:
    from sagecp.cli.plan.simulated import CheckProgress, check_plans

    plans = result.plans[:_CHECKED_COUNT]
    return check_plans(query, plans, CheckProgress(len(plans)))


def _print(
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
    traffic: WorkloadSource,
    checked: list[CheckedPlan] | None,
    output: str,
    *,
    limit: int,
) -> None:
    from sagecp.cli.output import is_for_programs, print_values

    for note in traffic.notes:
        click.echo(click.style("note: ", fg="yellow") + note, err=True)
    if is_for_programs(output):
        from sagecp.cli.json_output import to_json

        values = json.loads(to_json(response))
        if checked is not None:
            values["simulated"] = [each.as_json() for each in checked]
        print_values(values, output)
        return
    from sagecp.cli.plan import simulated, view

    view.show(request, response, traffic, limit=limit, wide=output == "wide")
    if request.include_rejected:
        view.show_rejected(response.rejected, response.rejected_plan_count)
    if checked is not None:
        simulated.show_checked(checked, request.attainment)


def _warn_of_large_nodes(request: admin_service_pb2.PlanParallelismRequest) -> None:
    for pool in request.gpu_pools:
        count = pool.gpus_per_node_count
        if count > LARGEST_USUAL_NODE and count % 8 == 0 and pool.node_count == 1:
            click.echo(
                click.style("note: ", fg="yellow")
                + f"{count} GPUs in one node: for nodes of eight write --gpus {count // 8}x8x{pool.gpu_name}",
                err=True,
            )


def _write_plot(
    path: Path,
    request: admin_service_pb2.PlanParallelismRequest,
    response: admin_service_pb2.PlanParallelismResponse,
    traffic: WorkloadSource,
    local: tuple[PlanQuery, PlanningResult] | None,
) -> None:
    from sagecp.cli.plan.page import plan_drawing, plan_page

    if path.suffix == ".svg":
        text = plan_drawing(request, response)
    else:
        text = plan_page(request, response, traffic, local)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}", exit_code=ExitCode.INVALID) from error
    click.echo(f"plot: {path}", err=True)
