"""Searches for plans beside the event loop: few at a time, cancelled with their callers, failing in words."""

from __future__ import annotations

import asyncio
import sys

import pytest

from sagecp.core.errors import FieldViolation, InvalidRequestError, QueueFullError
from sagecp.core.gpu_specifications import require_gpu
from sagecp.core.parallelism.estimates import PlanningResult
from sagecp.core.parallelism.gpu_pool import GpuPool
from sagecp.core.parallelism.model_config import parse_model_config
from sagecp.core.parallelism.plan_query import PlanQuery, answer_plan_query
from sagecp.core.parallelism.workload import LengthSample, Workload
from sagecp.core.types import ParallelismType
from sagecp.runtime.computation_process import ComputationError, ComputationProcess
from sagecp.runtime.planner import Planner
from tests.support.plan_models import LLAMA_8B
from tests.support.waiting import until

NOTHING = PlanningResult(plans=(), pareto_front=(), rejected=(), summary="nothing")


def query(gpus: str = "L4", count: int = 2, type_wanted: ParallelismType | None = None) -> PlanQuery:
    return PlanQuery(
        model=parse_model_config(LLAMA_8B, name="llama"),
        pools=(GpuPool(gpu=require_gpu(gpus), gpus_per_node_count=count),),
        workload=Workload(samples=(LengthSample(1000, 100),)),
        type=type_wanted,
        warnings=("mind the gap",),
    )


class ScriptedSearch:
    """Answers when told to, and knows who has been cancelled."""

    def __init__(self) -> None:
        self.under_way: list[asyncio.Future[object]] = []
        self.cancelled_count = 0
        self.most_at_once = 0

    async def run(self, question: object) -> object:
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.under_way.append(future)
        self.most_at_once = max(self.most_at_once, len(self.under_way))
        try:
            return await future
        except asyncio.CancelledError:
            self.cancelled_count += 1
            raise
        finally:
            self.under_way.remove(future)


async def test_a_process_of_its_own_finds_what_is_found_here() -> None:
    found = await Planner().plan(query())
    assert found == answer_plan_query(query())
    assert found.plans
    assert found.warnings[0] == "mind the gap"


async def test_one_searches_few_wait_and_more_are_turned_away() -> None:
    search = ScriptedSearch()
    planner = Planner(search, max_waiting_count=2)
    tasks = [asyncio.create_task(planner.plan(query())) for _ in range(3)]
    await until(lambda: len(search.under_way) == 1, "the first searches")
    with pytest.raises(QueueFullError) as refused:
        await planner.plan(query())
    assert refused.value.retry_after_s == pytest.approx(3.0)
    for _ in tasks:
        await until(lambda: bool(search.under_way), "the next one searches")
        search.under_way[0].set_result(NOTHING)
        await asyncio.sleep(0)
    assert await asyncio.gather(*tasks) == [NOTHING] * 3
    assert search.most_at_once == 1


async def test_who_leaves_ends_the_search_and_the_next_has_its_turn() -> None:
    search = ScriptedSearch()
    planner = Planner(search, max_waiting_count=2)
    first, second, third = (asyncio.create_task(planner.plan(query())) for _ in range(3))
    await until(lambda: len(search.under_way) == 1, "the first searches")
    second.cancel()
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert search.cancelled_count == 1
    await until(lambda: len(search.under_way) == 1, "the third searches")
    search.under_way[0].set_result(NOTHING)
    assert await third == NOTHING
    # Nobody is counted who has left.
    last = [asyncio.create_task(planner.plan(query())) for _ in range(3)]
    await until(lambda: len(search.under_way) == 1, "there is room again")
    for task in last:
        task.cancel()
    await asyncio.gather(*last, return_exceptions=True)


async def test_a_bad_question_comes_back_as_one() -> None:
    search = ScriptedSearch()
    task = asyncio.create_task(Planner(search).plan(query()))
    await until(lambda: bool(search.under_way), "it searches")
    search.under_way[0].set_result((FieldViolation("gpu_pools", "is odd"),))
    with pytest.raises(InvalidRequestError, match="gpu_pools: is odd"):
        await task


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(3)", "search ended with exit status 3: it said nothing"),
        ("raise MemoryError('too large')", "MemoryError: too large"),
        ("pass", "wrote no plans"),
    ],
)
async def test_a_search_that_fails_says_why(program: str, message: str) -> None:
    process = ComputationProcess([sys.executable, "-c", program], 60.0, what="search", result="plans")
    with pytest.raises(ComputationError, match=message):
        await Planner(process).plan(query())


def test_only_plans_of_a_type() -> None:
    everything = answer_plan_query(query(count=4))
    assert len({plan.config.type for plan in everything.plans}) > 1
    kept = answer_plan_query(query(count=4, type_wanted=ParallelismType.TENSOR))
    assert {plan.config.type for plan in kept.plans} == {ParallelismType.TENSOR}
    assert set(kept.pareto_front) <= set(kept.plans)
    assert [plan.config.sizes for plan in kept.plans] == [
        plan.config.sizes for plan in everything.plans if plan.config.type is ParallelismType.TENSOR
    ]
    if kept.plans[0].config.sizes != everything.plans[0].config.sizes:
        assert kept.summary.startswith("Of the plans of type tensor, ")


def test_no_plan_of_a_type_is_said() -> None:
    found = answer_plan_query(query("H100", 2, ParallelismType.EXPERT))
    assert not found.plans
    assert found.summary.startswith("No plan of type expert can be")
