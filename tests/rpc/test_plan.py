"""PlanParallelism over the wire: the planner's answer, every bad field, and a loop that goes on meanwhile."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from sagecp.cli.exit_codes import ExitCode
from sagecp.client import OverloadedError, SageClient
from sagecp.core.config import SchedulerConfig
from sagecp.core.parallelism.estimates import PlanningResult
from sagecp.core.parallelism.plan_query import answer_plan_query
from sagecp.core.prices import GpuPrices
from sagecp.rpc.convert.plan_request import plan_query_from_proto
from sagecp.rpc.convert.plan_response import plans_to_proto
from sagecp.rpc.servicers.planning import PlanAnswers
from sagecp.runtime.planner import Planner
from sagecp.v1 import admin_service_pb2, parallelism_pb2
from tests.support.cli import Cli
from tests.support.plan_models import LLAMA_8B, LLAMA_70B
from tests.support.rpc_rig import Rig, detail_of, failure_of, fields_of, reason_of, running_rig
from tests.support.waiting import until

pb = admin_service_pb2
Code = grpc.StatusCode


def asked(config: dict[str, Any] = LLAMA_8B, **fields: Any) -> pb.PlanParallelismRequest:
    wanted: dict[str, Any] = {
        "model_config_json": json.dumps(config),
        "model_name": "llama",
        "gpu_pools": [parallelism_pb2.GpuPool(gpu_name="H100", gpus_per_node_count=4, node_count=1)],
        "workload": parallelism_pb2.Workload(mean_prompt_token_count=1000, mean_output_token_count=200),
        **fields,
    }
    return pb.PlanParallelismRequest(**wanted)


class EndlessSearch:
    """Never answers, and knows how many wait for it."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self, question: object) -> object:
        self.count += 1
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.count -= 1


def with_planner(rig: Rig, planner: Planner) -> None:
    rig.server._admin._plans = PlanAnswers(planner)


async def test_the_answer_is_the_planners(rig: Rig) -> None:
    request = asked(include_rejected=True, include_pareto_front=True, max_plan_count=3)
    response = await rig.admin.PlanParallelism(request)
    query = plan_query_from_proto(request)
    assert response == plans_to_proto(request, query, answer_plan_query(query))
    assert response.plans[0].commands[0].count("vllm serve llama ") == 1
    assert response.model.parameter_count == pytest.approx(8.03e9, rel=0.01)
    assert response.summary
    assert len(response.plans) >= 3
    assert not any(plan.pareto_optimal is False for plan in response.plans[3:]), "beyond 3: the front alone"


async def test_as_many_plans_as_wanted_and_five_where_nobody_says(rig: Rig) -> None:
    assert len((await rig.admin.PlanParallelism(asked())).plans) == 5
    assert len((await rig.admin.PlanParallelism(asked(max_plan_count=1))).plans) == 1
    response = await rig.admin.PlanParallelism(asked(max_plan_count=1000))
    assert len(response.plans) == response.considered_plan_count - response.rejected_plan_count
    assert not response.rejected


async def test_no_plan_is_an_answer_that_says_what_would_do(rig: Rig) -> None:
    pool = parallelism_pb2.GpuPool(gpu_name="L4", gpus_per_node_count=1, node_count=1)
    response = await rig.admin.PlanParallelism(asked(LLAMA_70B, gpu_pools=[pool], include_rejected=True))
    assert not response.plans
    assert response.rejected[0].reasons
    assert "would be possible with" in response.summary


async def test_prices_are_the_pools_or_the_configurations() -> None:
    prices = SchedulerConfig(prices=GpuPrices(usd_per_gpu_hour={"H100": 1.25}))
    async with running_rig(scheduler=prices) as rig:
        response = await rig.admin.PlanParallelism(asked())
        best = response.plans[0]
        assert best.usd_per_hour == pytest.approx(1.25 * best.gpu_count)
        assert not any("usual prices" in warning for warning in response.warnings)
        own = asked()
        own.gpu_pools[0].usd_per_gpu_hour = 9.0
        best = (await rig.admin.PlanParallelism(own)).plans[0]
        assert best.usd_per_hour == pytest.approx(9.0 * best.gpu_count)


async def test_every_bad_field_is_named(rig: Rig) -> None:
    pool = parallelism_pb2.GpuPool(gpu_name="H1000", gpus_per_node_count=0)
    error = await failure_of(
        rig.admin.PlanParallelism(
            asked(
                {**LLAMA_8B, "num_hidden_layers": -1}, gpu_pools=[pool], attainment=7.0, weight_format="fp7"
            )
        )
    )
    assert error.code() is Code.INVALID_ARGUMENT
    assert reason_of(error) == "INVALID_REQUEST"
    assert set(fields_of(error)) == {
        "model_config_json.num_hidden_layers", "gpu_pools[0].gpu_name", "gpu_pools[0].gpus_per_node_count",
        "gpu_pools[0].node_count", "attainment", "weight_format",
    }  # fmt: skip


async def test_an_empty_question_says_what_is_missing(rig: Rig) -> None:
    error = await failure_of(rig.admin.PlanParallelism(pb.PlanParallelismRequest()))
    assert error.code() is Code.INVALID_ARGUMENT
    assert set(fields_of(error)) == {"model_name", "gpu_pools", "workload"}


async def test_the_loop_goes_on_while_plans_are_searched_for(rig: Rig) -> None:
    nodes = parallelism_pb2.GpuPool(gpu_name="H100", gpus_per_node_count=8, node_count=8)
    search = asyncio.ensure_future(rig.admin.PlanParallelism(asked(LLAMA_70B, gpu_pools=[nodes])))
    answered_count = 0
    while not search.done():
        await rig.admin.GetSchedulingConfig(pb.GetSchedulingConfigRequest())
        answered_count += 1
    assert (await search).plans
    assert answered_count > 10


async def test_too_many_at_once_are_told_when_to_come_back(rig: Rig) -> None:
    search = EndlessSearch()
    with_planner(rig, Planner(search, max_waiting_count=1))
    calls = [rig.admin.PlanParallelism(asked()) for _ in range(2)]
    tasks = [asyncio.ensure_future(call) for call in calls]
    planner = rig.server._admin._plans._planner
    await until(lambda: planner._present_count == 2, "one searches and one waits")
    error = await failure_of(rig.admin.PlanParallelism(asked()))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert reason_of(error) == "QUEUE_FULL"
    assert detail_of(error, error_details_pb2.RetryInfo).retry_delay.seconds == 2
    # Who hangs up makes room.
    for call in calls:
        call.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: planner._present_count == 0, "both have left")
    assert search.count == 0


async def test_a_search_that_fails_is_an_internal_error_in_words(rig: Rig) -> None:
    from sagecp.runtime.computation_process import ComputationProcess

    with_planner(rig, Planner(ComputationProcess(["/nowhere/python"], 60.0, what="search", result="plans")))
    error = await failure_of(rig.admin.PlanParallelism(asked()))
    assert error.code() is Code.INTERNAL
    assert "cannot be started" in (error.details() or "")


async def test_the_client_and_the_command_line_ask_a_server(rig: Rig) -> None:
    address = rig.server.address
    async with SageClient(address) as client:
        response = await client.plan_parallelism(asked())
    assert response.plans
    cli = Cli(address)
    arguments = (
        "plan",
        "--model",
        "Llama-3.1-8B",
        "--gpus",
        "4xH100",
        "--workload",
        "prompt=1000,output=200",
    )
    here, there = await asyncio.gather(
        asyncio.to_thread(cli.json, *arguments), asyncio.to_thread(cli.json, *arguments, "--server", address)
    )
    assert there == here
    refused = await asyncio.to_thread(
        cli.run, *arguments[:3], "--gpus", "4xH1000", *arguments[5:], "-s", address
    )
    assert refused.returncode == ExitCode.INVALID
    assert "error: --gpus: 'H1000' is not a GPU that is known" in refused.stderr


async def test_the_client_knows_a_full_queue(rig: Rig) -> None:
    search = EndlessSearch()
    with_planner(rig, Planner(search, max_waiting_count=0))
    first = asyncio.ensure_future(rig.admin.PlanParallelism(asked()))
    await until(lambda: search.count == 1, "one searches")
    from sagecp.client import NO_RETRY

    async with SageClient(rig.server.address, retry=NO_RETRY) as client:
        with pytest.raises(OverloadedError) as error:
            await client.plan_parallelism(asked())
    assert error.value.retry_after_s == pytest.approx(1.0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


def test_a_large_answer_fits_a_message() -> None:
    nodes = parallelism_pb2.GpuPool(gpu_name="H100", gpus_per_node_count=8, node_count=12_500)
    request = asked(gpu_pools=[nodes], max_plan_count=1000, include_rejected=True, include_pareto_front=True)
    query = plan_query_from_proto(request)
    result = answer_plan_query(query)
    assert isinstance(result, PlanningResult)
    assert plans_to_proto(request, query, result).ByteSize() < 4 << 20
