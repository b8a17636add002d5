"""Heartbeats on their way in: what is possible is taken, what is not is left out and named."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from sagecp.core.agent_clock import AgentClock
from sagecp.core.duration_quantiles import DurationQuantiles
from sagecp.core.engine_state import EngineProcess, EngineProcessState
from sagecp.core.errors import InvalidRequestError
from sagecp.core.gpu import XidError
from sagecp.core.types import EngineCondition, EngineGauges, GpuReading
from sagecp.rpc.convert.heartbeat import heartbeat_from_proto
from sagecp.v1 import fleet_service_pb2, instance_pb2, metrics_pb2

NAN, INF = math.nan, math.inf


def beat(**fields: Any) -> fleet_service_pb2.HeartbeatRequest:
    return fleet_service_pb2.HeartbeatRequest(instance_id="i", incarnation=5, **fields)


def gauges(**fields: Any) -> instance_pb2.EngineGauges:
    return instance_pb2.EngineGauges(running_request_count=2, **fields)


def test_what_is_unknown_stays_unknown() -> None:
    taken = heartbeat_from_proto(
        beat(
            engine_condition=fleet_service_pb2.ENGINE_CONDITION_HEALTHY,
            engine=instance_pb2.EngineGauges(running_request_count=0, sleeping=False),
            gpus=[instance_pb2.GpuReading(index=0, utilization=0.0, throttle_reasons=["x"])],
        )
    )
    assert taken.condition is EngineCondition.HEALTHY
    assert taken.gauges == EngineGauges(running_request_count=0, sleeping=False)
    assert taken.gpus == (GpuReading(index=0, utilization=0.0, throttle_reasons=("x",)),)
    assert (taken.process, taken.agent_time_s, taken.clock_offset_s) == (None, None, None)
    assert not taken.refusals


def test_a_newer_agent_is_understood_as_far_as_possible() -> None:
    taken = heartbeat_from_proto(
        beat(
            engine_condition=42,
            engine_process=instance_pb2.EngineProcess(state=42, restart_count=3),  # type: ignore[arg-type]
        )
    )
    assert taken.condition is EngineCondition.UNKNOWN
    assert taken.gauges is None
    assert taken.process == EngineProcess(state=EngineProcessState.STOPPED, restart_count=3)


@pytest.mark.parametrize("instance_id", ["", "a b", "x" * 129, "ü", "a/b"])
def test_a_beat_of_nobody_is_refused_as_a_whole(instance_id: str) -> None:
    with pytest.raises(InvalidRequestError, match="instance_id"):
        heartbeat_from_proto(fleet_service_pb2.HeartbeatRequest(instance_id=instance_id))


@pytest.mark.parametrize("name", ["key_value_cache_usage", "max_key_value_cache_usage"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.1, 1.1, 1e300])
def test_a_gauge_that_cannot_be_is_unknown(name: str, value: float) -> None:
    taken = heartbeat_from_proto(beat(engine=gauges(**{name: value})))
    assert taken.gauges == EngineGauges(running_request_count=2)
    (refusal,) = taken.refusals
    assert refusal == f"engine.{name} is {value:g}; must be 0 to 1"


def test_a_cache_a_little_more_than_full_is_full() -> None:
    taken = heartbeat_from_proto(beat(engine=gauges(key_value_cache_usage=1.005)))
    assert taken.gauges is not None
    assert taken.gauges.key_value_cache_usage == 1.0
    assert not taken.refusals


@pytest.mark.parametrize("name", ["ttft", "inter_token_latency", "queue_wait"])
@pytest.mark.parametrize("field", ["mean_s", "p50_s", "p95_s", "p99_s"])
@pytest.mark.parametrize("value", [NAN, INF, -1.0])
def test_quantiles_that_cannot_be_are_unknown(name: str, field: str, value: float) -> None:
    bad = metrics_pb2.DurationQuantiles(sample_count=3, **{field: value})
    good = metrics_pb2.DurationQuantiles(sample_count=3, mean_s=1.0)
    others = {each: good for each in ("ttft", "inter_token_latency", "queue_wait") if each != name}
    taken = heartbeat_from_proto(beat(engine=gauges(**{name: bad}, **others)))
    assert taken.gauges is not None
    assert getattr(taken.gauges, name) is None
    assert {getattr(taken.gauges, each) for each in others} == {DurationQuantiles(3, 1.0)}
    (refusal,) = taken.refusals
    assert f"engine.{name}.{field}" in refusal


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in (
            "utilization",
            "memory_utilization",
            "temperature_celsius",
            "memory_temperature_celsius",
            "power_watts",
            "power_limit_watts",
        )
        for value in (NAN, INF, -INF, -1000.0)
    ],
)
def test_a_figure_of_a_gpu_that_cannot_be_is_unknown(name: str, value: float) -> None:
    good = instance_pb2.GpuReading(index=0, uuid="a", utilization=0.5)
    bad = instance_pb2.GpuReading(index=1, uuid="b", sm_clock_mhz=5)
    setattr(bad, name, value)
    taken = heartbeat_from_proto(beat(gpus=[good, bad]))
    assert taken.gpus == (
        GpuReading(index=0, uuid="a", utilization=0.5),
        GpuReading(index=1, uuid="b", sm_clock_mhz=5),
    )
    (refusal,) = taken.refusals
    assert refusal.startswith(f"gpus[1].{name} is ")


def test_texts_and_lists_are_bounded() -> None:
    taken = heartbeat_from_proto(
        beat(
            condition_reason="c" * 9999,
            gpu_absent_reason="g" * 9999,
            order_trouble="o" * 9999,
            engine=gauges(loaded_lora_adapters=["x" * 200, *map(str, range(200))]),
            gpus=[
                instance_pb2.GpuReading(uuid="u" * 200),
                *(
                    instance_pb2.GpuReading(
                        index=number,
                        name="n" * 200,
                        throttle_reasons=["t" * 200] * 30,
                        xid_errors=[
                            instance_pb2.XidError(code=code, error_time=Timestamp(seconds=code))
                            for code in range(20)
                        ],
                    )
                    for number in range(100)
                ),
            ],
            engine_process=instance_pb2.EngineProcess(state=2, last_log_lines=["l" * 300] * 30),  # type: ignore[arg-type]
        )
    )
    assert len(taken.condition_reason) == len(taken.gpu_absent_reason) == len(taken.order_trouble) == 512
    assert taken.gauges is not None
    assert taken.gauges.loaded_lora_adapters == tuple(map(str, range(128)))
    assert len(taken.gpus) == 63
    gpu = taken.gpus[0]
    assert len(gpu.name) == 128
    assert gpu.throttle_reasons == ("t" * 128,) * 16
    assert [error.code for error in gpu.xid_errors] == list(range(12, 20))
    assert taken.process is not None
    assert taken.process.last_log_lines == ("l" * 256,) * 20
    assert [refusal.partition(" ")[0] for refusal in taken.refusals] == [
        "engine.loaded_lora_adapters",
        "gpus",
        "gpus[0].uuid",
    ]


def test_a_gpu_is_read_once() -> None:
    readings = [instance_pb2.GpuReading(index=index, uuid="a") for index in (0, 1)]
    taken = heartbeat_from_proto(beat(gpus=readings))
    assert taken.gpus == (GpuReading(index=0, uuid="a"),)
    assert taken.refusals == ("gpus[1] is another reading of GPU a",)


@pytest.mark.parametrize(
    "time",
    [
        Timestamp(seconds=-1),
        Timestamp(seconds=2**63 - 1),
        Timestamp(seconds=-(2**63)),
        Timestamp(nanos=-1),
        Timestamp(nanos=2**31 - 1),
    ],
)
def test_times_that_cannot_be_are_unknown(time: Timestamp) -> None:
    taken = heartbeat_from_proto(
        beat(
            agent_time=time,
            gpus=[instance_pb2.GpuReading(xid_errors=[instance_pb2.XidError(code=79, error_time=time)])],
            engine_process=instance_pb2.EngineProcess(state=2, start_time=time, next_start_time=time),  # type: ignore[arg-type]
        ),
        1000.0,
    )
    assert (taken.agent_time_s, taken.clock_offset_s) == (None, None)
    assert taken.gpus[0].xid_errors == ()
    assert taken.process == EngineProcess(state=EngineProcessState.RUNNING)
    assert len(taken.refusals) == 4


def test_many_bad_figures_are_counted_and_a_few_named() -> None:
    taken = heartbeat_from_proto(
        beat(gpus=[instance_pb2.GpuReading(index=n, power_watts=NAN) for n in range(20)])
    )
    assert len(taken.refusals) == 9
    assert taken.refusals[-1] == "and 12 more"


def test_clocks_are_compared_and_errors_keep_the_agents_time() -> None:
    taken = heartbeat_from_proto(
        beat(
            agent_time=Timestamp(seconds=1100, nanos=500_000_000),
            gpus=[
                instance_pb2.GpuReading(
                    xid_errors=[instance_pb2.XidError(code=79, error_time=Timestamp(seconds=1090))]
                )
            ],
        ),
        1000.0,
    )
    assert (taken.agent_time_s, taken.clock_offset_s) == (1100.5, 100.5)
    assert taken.gpus[0].xid_errors == (XidError(79, 1090.0),)


# -- clocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "changes", "offset_s"),
    [
        ([None], [], None),
        ([0.0, -0.2, 0.1], [], 0.1),
        # One slow heartbeat, or several: the best one says how it is.
        ([0.0, *[-30.0] * 7], [], 0.0),
        # Behind for certain once none of the last eight says otherwise.
        ([0.0, *[-30.0] * 8], [True], -30.0),
        # Ahead at once: no way is shorter than none.
        ([0.0, 10.0], [True], 10.0),
        # Between the bounds nothing changes.
        ([6.0, *[4.0] * 10], [True], 4.0),
        ([6.0, *[4.0] * 10, *[2.0] * 8], [True, False], 2.0),
        ([4.9] * 10, [], 4.9),
    ],
)
def test_clocks_that_come_apart(shown: list[float], changes: list[bool], offset_s: float | None) -> None:
    clock = AgentClock()
    found = []
    for each in shown:
        if clock.note(each):
            found.append(clock.skewed)  # noqa: PERF401 - one after the other
    assert found == changes
    assert clock.offset_s == offset_s
