"""Metrics from samples of ended requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sagecp.core.types import GpuReading, PerformanceMetrics, RequestMetadata, RequestPriority, RequestState
from sagecp.runtime import monitor as monitor_module
from sagecp.runtime.metrics_table import GpuSums, LiveCount
from sagecp.runtime.monitor import EndedSample, Monitor, objectives_met
from sagecp.runtime.monitor_keys import EVERYTHING, MetricsDimension, MetricsKey
from tests.support.waiting import until

GIB = 1 << 30
KEY = MetricsKey("m", "i", "t", RequestPriority.NORMAL)
# Of quantiles.
ERROR = 0.01


def sample(
    end_s: float = 0.0,
    *,
    key: MetricsKey = KEY,
    state: RequestState = RequestState.SUCCEEDED,
    latency_s: float = 1.0,
    ttft_s: float | None = 0.5,
    tpot_s: float | None = 0.1,
    tokens: int = 10,
    slo_met: bool | None = None,
) -> EndedSample:
    return EndedSample(end_s, key, state, latency_s, ttft_s, tpot_s, 0.25, tokens, slo_met)


def metrics_of(
    monitor: Monitor, now: float, match: MetricsKey = EVERYTHING, window_s: float = 300.0
) -> PerformanceMetrics:
    return monitor.table(now, match=match, window_s=window_s).metrics(0)


def groups_of(
    monitor: Monitor, now: float, dimension: MetricsDimension, match: MetricsKey = EVERYTHING
) -> dict[str, PerformanceMetrics]:
    values = sorted(monitor.values(dimension, match))
    table = monitor.table(
        now,
        match=match,
        dimension=dimension,
        values=values,
        live=[LiveCount()] * len(values),
        gpus=[GpuSums()] * len(values),
    )
    return {value: table.metrics(place) for place, value in enumerate(table.values)}


def test_without_samples_everything_is_zero_or_unknown() -> None:
    metrics = metrics_of(Monitor(), 100.0)
    assert metrics.total_requests == 0
    assert metrics.latency.sample_count == 0
    assert metrics.avg_latency_ms == 0.0
    assert metrics.tokens_per_second == 0.0
    assert metrics.slo_compliance_rate is None
    assert metrics.average_gpu_utilization is None
    assert metrics.total_gpu_memory_gb is None
    assert metrics.used_gpu_memory_gb is None


def test_quantiles_and_counts() -> None:
    monitor = Monitor(start_s=1.0)
    for number in range(1, 101):
        monitor.record(sample(float(number), latency_s=number / 100, ttft_s=number / 200))
    metrics = monitor.table(100.0, live=[LiveCount(2, 3)]).metrics(0)
    assert metrics.completed_requests == 100
    assert metrics.total_requests == 105
    assert (metrics.active_requests, metrics.queued_requests) == (2, 3)
    assert metrics.latency.sample_count == 100
    assert metrics.latency.mean_s == pytest.approx(0.505)
    assert metrics.latency.p50_s == pytest.approx(0.50, rel=ERROR)
    assert metrics.latency.p95_s == pytest.approx(0.95, rel=ERROR)
    assert metrics.latency.p99_s == pytest.approx(0.99, rel=ERROR)
    assert metrics.avg_latency_ms == pytest.approx(505)
    assert metrics.p99_latency_ms == pytest.approx(990, rel=ERROR)
    assert metrics.ttft.p50_s == pytest.approx(0.25, rel=ERROR)
    assert metrics.tpot.mean_s == pytest.approx(0.1)
    assert metrics.queue_wait.mean_s == pytest.approx(0.25)
    # 99 s since it began.
    assert metrics.tokens_per_second == pytest.approx(1000 / 99)
    assert metrics.requests_per_second == pytest.approx(100 / 99)


def test_a_request_without_an_inter_token_time_is_left_out_of_its_quantiles() -> None:
    monitor = Monitor()
    monitor.record(sample(tpot_s=None, ttft_s=None))
    monitor.record(sample(tpot_s=0.2))
    metrics = metrics_of(monitor, 1.0)
    assert metrics.latency.sample_count == 2
    assert metrics.tpot.sample_count == 1
    assert metrics.ttft.sample_count == 1


def test_only_success_counts_as_latency_and_every_end_has_its_counter() -> None:
    monitor = Monitor(start_s=0.0)
    for state in (
        RequestState.SUCCEEDED,
        RequestState.FAILED,
        RequestState.EXPIRED,
        RequestState.CANCELLED,
    ):
        monitor.record(sample(state=state, latency_s=5.0 if state is not RequestState.SUCCEEDED else 1.0))
    metrics = metrics_of(monitor, 1.0)
    assert metrics.completed_requests == 1
    assert metrics.failed_requests == 2
    assert metrics.cancelled_requests == 1
    assert metrics.total_requests == 4
    assert metrics.latency.sample_count == 1
    assert metrics.latency.mean_s == 1.0
    # Tokens of lost requests were produced all the same.
    assert metrics.tokens_per_second == 40.0


def test_where_nothing_succeeded_there_are_no_quantiles() -> None:
    monitor = Monitor(start_s=0.0)
    monitor.record(sample(state=RequestState.FAILED))
    for metrics in (metrics_of(monitor, 1.0), metrics_of(monitor, 1.0, MetricsKey(model="m"))):
        assert (metrics.failed_requests, metrics.latency.sample_count, metrics.latency.p99_s) == (1, 0, 0.0)
        assert metrics.tokens_per_second == 10.0


def test_the_window_leaves_out_older_samples_and_counts_stay() -> None:
    monitor = Monitor()
    monitor.record(sample(0.0, latency_s=9.0))
    monitor.record(sample(100.0, latency_s=1.0))
    metrics = metrics_of(monitor, 120.0, window_s=60.0)
    assert metrics.completed_requests == 2
    assert metrics.latency.sample_count == 1
    assert metrics.latency.mean_s == 1.0
    assert metrics.requests_per_second == pytest.approx(1 / 60)


def test_filters_take_what_matches_in_every_named_respect() -> None:
    monitor = Monitor()
    for model in ("m1", "m2"):
        for priority in (RequestPriority.HIGH, RequestPriority.LOW):
            monitor.record(sample(key=MetricsKey(model, "i", "t", priority)))
    assert metrics_of(monitor, 1.0, MetricsKey(model="m1")).completed_requests == 2
    assert metrics_of(monitor, 1.0, MetricsKey(priority=RequestPriority.LOW)).latency.sample_count == 2
    both = metrics_of(monitor, 1.0, MetricsKey("m2", "i", "t", RequestPriority.HIGH))
    assert both.completed_requests == both.latency.sample_count == 1
    assert metrics_of(monitor, 1.0, MetricsKey(tenant_id="nobody")).total_requests == 0
    assert monitor.values(MetricsDimension.MODEL, EVERYTHING) == {"m1", "m2"}
    assert monitor.values(MetricsDimension.PRIORITY, MetricsKey(model="m1")) == {"HIGH", "LOW"}
    assert monitor.values(MetricsDimension.PRIORITY, MetricsKey(model="m3")) == set()


def test_groups_are_what_filters_for_each_would_find() -> None:
    monitor = Monitor()
    priorities = tuple(RequestPriority)
    for number in range(1, 400):
        key = MetricsKey(f"m{number % 2}", f"i{number % 7}", f"t{number % 3}", priorities[number % 5])
        state = RequestState.FAILED if number % 11 == 0 else RequestState.SUCCEEDED
        met = None if number % 4 == 0 else number % 3 == 0
        ttft_s = number / 500 if number % 6 else None
        monitor.record(
            sample(
                number / 10,
                key=key,
                state=state,
                latency_s=number / 100,
                ttft_s=ttft_s,
                tokens=number,
                slo_met=met,
            )
        )
    for dimension in MetricsDimension:
        for match in (EVERYTHING, MetricsKey(model="m1"), MetricsKey(tenant_id="t2", priority=priorities[0])):
            groups = groups_of(monitor, 40.0, dimension, match)
            assert sum(each.completed_requests for each in groups.values()) > 0
            for value, group in groups.items():
                exact: list[Any] = list(match)
                exact[dimension] = RequestPriority[value] if dimension is MetricsDimension.PRIORITY else value
                assert group == metrics_of(monitor, 40.0, MetricsKey(*exact))
    # Nobody is counted twice, and nobody is left out.
    whole = metrics_of(monitor, 40.0)
    by_model = groups_of(monitor, 40.0, MetricsDimension.MODEL)
    assert whole.completed_requests == sum(each.completed_requests for each in by_model.values())
    assert whole.slo_violations == sum(each.slo_violations for each in by_model.values())
    assert whole.ttft.sample_count == sum(each.ttft.sample_count for each in by_model.values())
    assert whole.tokens_per_second == pytest.approx(sum(m.tokens_per_second for m in by_model.values()))


def test_objectives_are_judged_over_those_that_have_one() -> None:
    monitor = Monitor()
    for slo_met in (True, True, False, None):
        monitor.record(sample(slo_met=slo_met))
    metrics = metrics_of(monitor, 1.0)
    assert metrics.slo_violations == 1
    assert metrics.slo_compliance_rate == pytest.approx(2 / 3)


def test_gpus_that_do_not_report_are_not_zero() -> None:
    gpus = [
        GpuReading(index=0, utilization=0.5, used_memory_bytes=10 * GIB, total_memory_bytes=80 * GIB),
        GpuReading(index=1, utilization=0.9, total_memory_bytes=80 * GIB),
        GpuReading(index=2),
    ]
    sums = GpuSums()
    sums.add(gpus)
    metrics = Monitor().table(1.0, gpus=[sums]).metrics(0)
    assert metrics.average_gpu_utilization == pytest.approx(0.7)
    assert metrics.total_gpu_memory_gb == 160.0
    assert metrics.used_gpu_memory_gb == 10.0


def test_switched_off_it_counts_and_keeps_no_samples() -> None:
    monitor = Monitor(enabled=False)
    monitor.record(sample())
    metrics = metrics_of(monitor, 1.0)
    assert metrics.completed_requests == 1
    assert metrics.latency.sample_count == 0


def test_of_too_many_combinations_the_tenants_are_no_longer_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(monitor_module, "MAX_GROUP_COUNT", 4)
    monitor = Monitor()
    for number in range(100):
        monitor.record(sample(key=MetricsKey("m", f"i{number % 4}", f"t{number}", RequestPriority.LOW)))
    assert metrics_of(monitor, 1.0).completed_requests == 100
    by_instance = groups_of(monitor, 1.0, MetricsDimension.INSTANCE)
    assert {value: each.latency.sample_count for value, each in by_instance.items()} == dict.fromkeys(
        ("i0", "i1", "i2", "i3"), 25
    )
    assert set(groups_of(monitor, 1.0, MetricsDimension.TENANT)) == {"t0", "t1", "t2", "t3"}


def test_what_there_is_no_room_for_is_counted_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "MAX_GROUP_COUNT", 3)
    monitor = Monitor()
    for number in range(20):
        monitor.record(sample(float(number), key=MetricsKey("m", f"i{number}", "t", RequestPriority.LOW)))
    metrics = metrics_of(monitor, 20.0)
    assert metrics.completed_requests == metrics.latency.sample_count == 20
    # Three combinations, and three without their tenants.
    assert set(groups_of(monitor, 20.0, MetricsDimension.INSTANCE)) == {f"i{n}" for n in range(6)}
    assert metrics_of(monitor, 20.0, MetricsKey(model="m")).completed_requests == 6


def test_without_tenants_there_is_room_for_twice_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "MAX_GROUP_COUNT", 3)
    monitor = Monitor()
    for number in range(7):
        monitor.record(sample(key=MetricsKey("m", f"i{number}", "", RequestPriority.LOW)))
    assert set(groups_of(monitor, 1.0, MetricsDimension.INSTANCE)) == {f"i{n}" for n in range(6)}
    # Much later all of them make room, and nothing is forgotten.
    for number in range(7):
        monitor.record(sample(10_000.0, key=MetricsKey("m", f"j{number}", "", RequestPriority.LOW)))
    assert set(groups_of(monitor, 10_000.0, MetricsDimension.INSTANCE)) == {f"j{n}" for n in range(6)}
    assert metrics_of(monitor, 10_000.0).completed_requests == 14
    assert metrics_of(monitor, 10_000.0).latency.sample_count == 7


def test_combinations_that_were_idle_for_long_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "MAX_GROUP_COUNT", 3)
    monitor = Monitor()
    for number in range(3):
        monitor.record(sample(float(number), key=MetricsKey("m", f"old{number}", "t", RequestPriority.LOW)))
    now = 10_000.0
    monitor.record(sample(now, key=MetricsKey("m", "new", "t", RequestPriority.LOW)))
    assert set(groups_of(monitor, now, MetricsDimension.TENANT)) == {"t"}
    by_instance = groups_of(monitor, now, MetricsDimension.INSTANCE)
    # What the old ones counted is still counted, as of nobody in particular.
    assert {value: each.completed_requests for value, each in by_instance.items()} == {
        "new": 1, "old0": 1, "old1": 1, "old2": 1,
    }  # fmt: skip
    assert {value: each.latency.sample_count for value, each in by_instance.items()} == {
        "new": 1, "old0": 0, "old1": 0, "old2": 0,
    }  # fmt: skip
    by_tenant = groups_of(monitor, now, MetricsDimension.TENANT)
    assert by_tenant["t"].completed_requests == 1
    assert metrics_of(monitor, now).completed_requests == 4
    for number in range(3):
        monitor.record(sample(2 * now, key=MetricsKey("m", f"newer{number}", "t", RequestPriority.LOW)))
    assert metrics_of(monitor, 2 * now).completed_requests == 7
    assert "new" in groups_of(monitor, 2 * now, MetricsDimension.INSTANCE)


WITH_ALL = RequestMetadata(slo_deadline_ms=1000, ttft_slo_ms=100, tpot_slo_ms=10)


@pytest.mark.parametrize(
    ("metadata", "state", "latency_s", "ttft_s", "tpot_s", "met"),
    [
        pytest.param(RequestMetadata(), RequestState.FAILED, 9.0, None, None, None, id="no objective"),
        pytest.param(WITH_ALL, RequestState.SUCCEEDED, 1.0, 0.1, 0.01, True, id="all met, to the limit"),
        pytest.param(WITH_ALL, RequestState.SUCCEEDED, 1.1, 0.1, 0.01, False, id="too slow"),
        pytest.param(WITH_ALL, RequestState.SUCCEEDED, 1.0, 0.2, 0.01, False, id="late first token"),
        pytest.param(WITH_ALL, RequestState.SUCCEEDED, 1.0, 0.1, 0.02, False, id="slow tokens"),
        pytest.param(WITH_ALL, RequestState.SUCCEEDED, 1.0, 0.1, None, True, id="one token has no gap"),
        pytest.param(WITH_ALL, RequestState.FAILED, 0.1, 0.1, 0.01, False, id="failed"),
        pytest.param(WITH_ALL, RequestState.EXPIRED, 1.0, None, None, False, id="expired"),
        pytest.param(WITH_ALL, RequestState.CANCELLED, 0.1, None, None, None, id="the user's own wish"),
        pytest.param(
            RequestMetadata(ttft_slo_ms=100), RequestState.SUCCEEDED, 99.0, 0.1, 9.0, True, id="one alone"
        ),
    ],
)
def test_objectives(
    metadata: RequestMetadata,
    state: RequestState,
    latency_s: float,
    ttft_s: float | None,
    tpot_s: float | None,
    met: bool | None,
) -> None:
    assert objectives_met(metadata, state, latency_s, ttft_s, tpot_s) is met


async def test_a_blocked_event_loop_shows() -> None:
    monitor = Monitor()
    watch = asyncio.create_task(monitor.watch_event_loop(0.01))
    await asyncio.sleep(0)
    # What no coroutine may do: hold the loop.
    end_s = asyncio.get_running_loop().time() + 0.1
    while asyncio.get_running_loop().time() < end_s:
        pass
    await until(lambda: monitor.event_loop_lag_s > 0.05)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
