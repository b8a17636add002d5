"""Experiments: tasks are values, and their results do not depend on where or how often they run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sagecp.sim.fleet.baselines.registry import BASELINES
from sagecp.sim.fleet.experiment import Bounds, BoundsTask, Contender, ContenderError, RunTask, Workload
from sagecp.sim.fleet.simulation import SimulationOptions
from sagecp.sim.fleet.workers import run_tasks
from tests.support.sim_traces import HARSH_WORLD, mixed_requests, write_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace") / "trace.jsonl", mixed_requests(60))


def workload(trace: Path, **more: Any) -> Workload:
    return Workload(trace_path=trace, **{"fleet": "2x8b-h100", **more})


def tasks_of(trace: Path) -> list[RunTask | BoundsTask]:
    world = workload(trace, options=HARSH_WORLD, fleet="2x8b-h100+1x8b-l4", model_error=0.2)
    contenders = [
        Contender(label="own"),
        Contender(label="random", scheduling_policy="fifo", routing_strategy="random"),
        Contender(label="two", baseline="power_of_two"),
    ]
    runs = [
        RunTask(workload=world, contender=contender, scale=scale, seed=seed, with_charts=seed == 0)
        for contender in contenders
        for scale in (1.0, 3.0)
        for seed in (0, 1)
    ]
    return [*runs, BoundsTask(workload=world, scale=3.0)]


def test_results_do_not_depend_on_the_number_of_processes(trace: Path) -> None:
    tasks = tasks_of(trace)
    shares: list[list[float]] = []
    here = run_tasks(tasks, on_progress=lambda each: shares.append(list(each)))
    assert shares[-1] == [1.0] * len(tasks)
    assert all(before <= after for before, after in zip(shares[0], shares[-1], strict=True))
    assert run_tasks(tasks, job_count=2) == here
    assert run_tasks(tasks) == here


def test_a_failing_task_ends_the_others(trace: Path) -> None:
    good = RunTask(workload=workload(trace), contender=Contender(label="own"))
    bad = dataclasses.replace(good, contender=Contender(label="bad", baseline="nonsense"))
    with pytest.raises(ContenderError, match="baseline 'nonsense' is unknown"):
        run_tasks([good, bad, good], job_count=2)


@pytest.mark.parametrize("baseline", sorted(BASELINES))
def test_every_baseline_can_contend_and_be_stale(trace: Path, baseline: str) -> None:
    contender = Contender(label=baseline, baseline=baseline)
    contender.check()
    world = workload(trace, options=SimulationOptions(gauge_interval_s=0.5, gauge_delay_s=0.5))
    result = RunTask(workload=world, contender=contender).execute()
    assert result.statistics.request_count == 60
    assert result.statistics.good_count > 0


@pytest.mark.parametrize(
    ("contender", "message"),
    [
        ({"scheduling_policy": "x"}, "scheduling policy 'x' is unknown; choose one of: adaptive, "),
        ({"routing_strategy": "x"}, "routing strategy 'x' is unknown; choose one of: affinity, "),
        ({"load_balancer": "x"}, "load balancer 'x' is unknown"),
        ({"parameters": {"slo_aware.x": 1.0}}, "is not a parameter"),
        ({"parameters": {"slo_aware.work_weight": float("nan")}}, "nan"),
        ({"baseline": "x"}, "baseline 'x' is unknown; choose one of: "),
        ({"baseline": "min_ttft", "parameters": {"x": 1}}, "x"),
    ],
)
def test_what_cannot_contend_is_found_before_anything_runs(contender: dict[str, Any], message: str) -> None:
    with pytest.raises(ContenderError) as raised:
        Contender(label="own", **contender).check()
    assert message in str(raised.value)


@pytest.mark.parametrize("baseline", ["", "min_ttft"])
def test_what_no_engine_can_hold_is_a_miss_and_nothing_else_is_lost(tmp_path: Path, baseline: str) -> None:
    limits = ("deadline_ms", "cost_budget_usd")
    rows = [{name: row[name] for name in row if name not in limits} for row in mixed_requests(20)]
    rows[7] |= {"prompt_tokens": 5_000_000, "block_hashes": []}
    path = write_trace(tmp_path / "trace.jsonl", rows)
    task = RunTask(workload=workload(path), contender=Contender(label="own", baseline=baseline))
    statistics = task.execute().statistics
    assert (statistics.request_count, statistics.succeeded_count) == (20, 19)
    # A baseline looks at the fleet before; the scheduler learns it from the engine, as in production.
    assert (statistics.rejected_share, statistics.failed_share) == ((0.05, 0.0) if baseline else (0.0, 0.05))


def test_a_trace_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for count in (3, 5):
        write_trace(path, mixed_requests(count))
        assert len(workload(path).trace(1.0, 0).requests) == count


def test_models_that_nobody_serves_are_misses(tmp_path: Path) -> None:
    rows = [{**row, "model": "other"} for row in mixed_requests(10)]
    path = write_trace(tmp_path / "trace.jsonl", rows)
    result = RunTask(workload=workload(path), contender=Contender(label="own"), with_charts=True).execute()
    assert result.statistics.rejected_share == 1.0
    assert result.statistics.attainment == 0.0


def test_one_request_is_a_trace(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.jsonl", [{"t_s": 0, "prompt_tokens": 10, "output_tokens": 3}])
    result = RunTask(workload=workload(path), contender=Contender(label="own"), with_charts=True).execute()
    assert result.statistics.good_count == 1
    assert result.load_per_s == pytest.approx(1 / result.end_s)


def test_sessions_wait_for_themselves(tmp_path: Path) -> None:
    rows = [
        {
            "session": f"s{family}", "turn": turn, "t_s": 3.0 * turn, "think_s": 1.0,
            "prompt_tokens": 64 * (turn + 1) + 1, "output_tokens": 20, "hash_ranges": [0, turn + 1],
        }
        for family in range(8)
        for turn in range(4)
    ]  # fmt: skip
    path = write_trace(tmp_path / "sessions.jsonl", rows)
    world = workload(path, sessions_per_s=0.5)
    result = RunTask(workload=world, contender=Contender(label="own"), scale=2.0, with_charts=True).execute()
    assert result.statistics.request_count == 32
    assert result.load_per_s == 1.0
    assert (result.statistics.prefix_hit_share or 0.0) > 0.3
    with pytest.raises(ValueError, match="closed-loop"):
        BoundsTask(workload=world, scale=1.0).execute()


def test_bounds_are_ordered(trace: Path) -> None:
    low, high = (BoundsTask(workload=workload(trace), scale=scale).execute() for scale in (1.0, 50.0))
    assert isinstance(low, Bounds)
    for bounds in (low, high):
        assert bounds.infinite_hit_share is not None
        assert bounds.belady_hit_share is not None
        assert bounds.pooled_lru_hit_share is not None
        assert 0.0 < bounds.pooled_lru_hit_share <= bounds.belady_hit_share <= bounds.infinite_hit_share < 1.0
    assert low.limit_per_s is not None
    assert high.limit_per_s == pytest.approx(low.limit_per_s)
    assert low.attainment is not None
    assert high.attainment is not None
    assert high.attainment <= low.attainment <= 1.0


def test_a_worse_world_is_not_a_better_one(trace: Path) -> None:
    kind = RunTask(workload=workload(trace), contender=Contender(label="own"), scale=3.0).execute()
    harsh_workload = workload(trace, options=HARSH_WORLD, model_error=0.3)
    harsh = RunTask(workload=harsh_workload, contender=Contender(label="own"), scale=3.0).execute()
    assert harsh.statistics.good_count <= kind.statistics.good_count
    assert harsh.statistics.succeeded_count > 0
