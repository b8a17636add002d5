"""Metrics from samples of ended requests."""

from __future__ import annotations

import asyncio

import pytest

from sagecp.core.types import GpuReading, RequestMetadata, RequestPriority, RequestState
from sagecp.runtime import monitor as monitor_module
from sagecp.runtime.monitor import EndedSample, MetricsKey, Monitor, objectives_met
from tests.support.waiting import until

GIB = 1 << 30
KEY = MetricsKey("m", "i", "t", RequestPriority.NORMAL)


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


def test_without_samples_everything_is_zero_or_unknown() -> None:
    metrics = Monitor().metrics(100.0)
    assert metrics.total_requests == 0
    assert metrics.latency.sample_count == 0
    assert metrics.avg_latency_ms == 0.0
    assert metrics.tokens_per_second == 0.0
    assert metrics.slo_compliance_rate is None
    assert metrics.average_gpu_utilization is None
    assert metrics.total_gpu_memory_gb is None
    assert metrics.used_gpu_memory_gb is None


def test_quantiles_and_counts() -> None:
    monitor = Monitor()
    for number in range(1, 101):
        monitor.record(sample(float(number), latency_s=number / 100, ttft_s=number / 200))
    metrics = monitor.metrics(100.0, active_count=2, queued_count=3)
    assert metrics.completed_requests == 100
    assert metrics.total_requests == 105
    assert (metrics.active_requests, metrics.queued_requests) == (2, 3)
    assert metrics.latency.sample_count == 100
    assert metrics.latency.mean_s == pytest.approx(0.505)
    assert metrics.latency.p50_s == pytest.approx(0.505)
    assert metrics.latency.p95_s == pytest.approx(0.9505)
    assert metrics.latency.p99_s == pytest.approx(0.9901)
    assert metrics.avg_latency_ms == pytest.approx(505)
    assert metrics.p99_latency_ms == pytest.approx(990.1)
    assert metrics.ttft.p50_s == pytest.approx(0.2525)
    assert metrics.tpot.mean_s == pytest.approx(0.1)
    assert metrics.queue_wait.mean_s == pytest.approx(0.25)
    # 99 s from the first sample until now.
    assert metrics.tokens_per_second == pytest.approx(1000 / 99)
    assert metrics.requests_per_second == pytest.approx(100 / 99)


def test_a_request_without_an_inter_token_time_is_left_out_of_its_quantiles() -> None:
    monitor = Monitor()
    monitor.record(sample(tpot_s=None, ttft_s=None))
    monitor.record(sample(tpot_s=0.2))
    metrics = monitor.metrics(1.0)
    assert metrics.latency.sample_count == 2
    assert metrics.tpot.sample_count == 1
    assert metrics.ttft.sample_count == 1


def test_only_success_counts_as_latency_and_every_end_has_its_counter() -> None:
    monitor = Monitor()
    for state in (
        RequestState.SUCCEEDED,
        RequestState.FAILED,
        RequestState.EXPIRED,
        RequestState.CANCELLED,
    ):
        monitor.record(sample(state=state, latency_s=5.0 if state is not RequestState.SUCCEEDED else 1.0))
    metrics = monitor.metrics(1.0)
    assert metrics.completed_requests == 1
    assert metrics.failed_requests == 2
    assert metrics.cancelled_requests == 1
    assert metrics.total_requests == 4
    assert metrics.latency.sample_count == 1
    assert metrics.latency.mean_s == 1.0
    # Tokens of lost requests were produced all the same.
    assert metrics.tokens_per_second == 40.0


def test_the_window_leaves_out_older_samples_and_counts_stay() -> None:
    monitor = Monitor()
    monitor.record(sample(0.0, latency_s=9.0))
    monitor.record(sample(100.0, latency_s=1.0))
    metrics = monitor.metrics(120.0, window_s=60.0)
    assert metrics.completed_requests == 2
    assert metrics.latency.sample_count == 1
    assert metrics.latency.mean_s == 1.0
    assert metrics.requests_per_second == pytest.approx(1 / 20)


def test_filters_take_what_matches_in_every_named_respect() -> None:
    monitor = Monitor()
    for model in ("m1", "m2"):
        for priority in (RequestPriority.HIGH, RequestPriority.LOW):
            monitor.record(sample(key=MetricsKey(model, "i", "t", priority)))
    assert monitor.metrics(1.0, match=MetricsKey(model="m1")).completed_requests == 2
    assert monitor.metrics(1.0, match=MetricsKey(priority=RequestPriority.LOW)).latency.sample_count == 2
    both = monitor.metrics(1.0, match=MetricsKey("m2", "i", "t", RequestPriority.HIGH))
    assert both.completed_requests == both.latency.sample_count == 1
    assert monitor.metrics(1.0, match=MetricsKey(tenant_id="nobody")).total_requests == 0
    assert len(list(monitor.combinations())) == 4


def test_objectives_are_judged_over_those_that_have_one() -> None:
    monitor = Monitor()
    for slo_met in (True, True, False, None):
        monitor.record(sample(slo_met=slo_met))
    metrics = monitor.metrics(1.0)
    assert metrics.slo_violations == 1
    assert metrics.slo_compliance_rate == pytest.approx(2 / 3)


def test_gpus_that_do_not_report_are_not_zero() -> None:
    gpus = [
        GpuReading(index=0, utilization=0.5, used_memory_bytes=10 * GIB, total_memory_bytes=80 * GIB),
        GpuReading(index=1, utilization=0.9, total_memory_bytes=80 * GIB),
        GpuReading(index=2),
    ]
    metrics = Monitor().metrics(1.0, gpus=gpus)
    assert metrics.average_gpu_utilization == pytest.approx(0.7)
    assert metrics.total_gpu_memory_gb == 160.0
    assert metrics.used_gpu_memory_gb == 10.0


def test_switched_off_it_counts_and_keeps_no_samples() -> None:
    monitor = Monitor(enabled=False)
    monitor.record(sample())
    metrics = monitor.metrics(1.0)
    assert metrics.completed_requests == 1
    assert metrics.latency.sample_count == 0


def test_samples_and_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "MAX_SAMPLE_COUNT", 5)
    monkeypatch.setattr(monitor_module, "MAX_GROUP_COUNT", 3)
    monitor = Monitor()
    for number in range(20):
        monitor.record(sample(float(number), key=MetricsKey("m", f"i{number}", "t", RequestPriority.LOW)))
    metrics = monitor.metrics(20.0)
    assert metrics.latency.sample_count == 5
    # Nothing is lost from the totals: the rest is counted together.
    assert metrics.completed_requests == 20
    assert len(list(monitor.combinations())) == 4


def test_faults_are_the_latest_twenty_the_newest_first() -> None:
    monitor = Monitor()
    for number in range(30):
        monitor.fault(f"fault {number}", instance_id="i", request_id=f"r{number}")
    faults = monitor.recent_faults()
    assert len(faults) == 20
    assert faults[0].message == "fault 29"
    assert (faults[0].instance_id, faults[0].request_id) == ("i", "r29")
    assert faults[-1].message == "fault 10"


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


def test_the_newest_samples_stay_when_there_are_more_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "MAX_SAMPLE_COUNT", 2500)
    monitor = Monitor()
    for number in range(4000):
        monitor.record(sample(float(number), latency_s=float(number)))
    metrics = monitor.metrics(4000.0, window_s=3600.0)
    assert metrics.latency.sample_count == 2500
    assert metrics.latency.mean_s == pytest.approx((1500 + 3999) / 2)
    assert monitor.metrics(4000.0, window_s=10.0).latency.sample_count == 10
