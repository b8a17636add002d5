"""The figures of instances and GPUs: how their series are called, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from sagecp.core.engine_state import EngineGauges
from sagecp.core.gpu import GpuReading
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.types import InstanceState

SubjectT = TypeVar("SubjectT")


class InstanceMoment(NamedTuple):
    """An instance at the time of a scrape."""

    record: InstanceRecord
    now: float


@dataclass(frozen=True, slots=True)
class Figure(Generic[SubjectT]):
    """One figure of a subject: how its series are called, and how to read it; ``None``: there is none."""

    name: str
    kind: str
    help_text: str
    read: Callable[[SubjectT], float | None]


def _engine(
    name: str, kind: str, help_text: str, read: Callable[[EngineGauges], float | None]
) -> Figure[InstanceMoment]:
    def of_record(moment: InstanceMoment) -> float | None:
        reported = moment.record.gauges
        return None if reported is None else read(reported)

    return Figure(f"sagecp_instance_engine_{name}", kind, help_text, of_record)


def _mark(value: bool | None) -> float | None:
    return None if value is None else int(value)


INSTANCE_FIGURES: tuple[Figure[InstanceMoment], ...] = (
    Figure(
        "sagecp_instance_ready",
        "gauge",
        "1 while the instance takes work.",
        lambda m: int(m.record.state is InstanceState.READY),
    ),
    Figure(
        "sagecp_instance_draining",
        "gauge",
        "1 while an order keeps new work away.",
        lambda m: int(m.record.drain is not None),
    ),
    Figure(
        "sagecp_instance_requests_in_flight",
        "gauge",
        "Requests that the control plane has on the instance.",
        lambda m: m.record.in_flight_count,
    ),
    Figure(
        "sagecp_instance_concurrency_limit_requests",
        "gauge",
        "Most requests to have there now.",
        lambda m: m.record.concurrency_limit,
    ),
    Figure(
        "sagecp_instance_requests_completed_total",
        "counter",
        "Requests that the instance completed.",
        lambda m: m.record.completed_request_count,
    ),
    Figure(
        "sagecp_instance_attempts_failed_total",
        "counter",
        "Attempts that failed by the engine's fault.",
        lambda m: m.record.failed_attempt_count,
    ),
    Figure(
        "sagecp_instance_heartbeat_age_seconds",
        "gauge",
        "Time since the agent's last heartbeat.",
        lambda m: None if m.record.heartbeat_s is None else m.now - m.record.heartbeat_s,
    ),
    Figure(
        "sagecp_instance_heartbeats_refused_total",
        "counter",
        "Heartbeats of the instance that were refused, in part or as a whole.",
        lambda m: m.record.refused_heartbeat_count,
    ),
    Figure(
        "sagecp_instance_clock_offset_seconds",
        "gauge",
        "How far the clock of the agent is ahead.",
        lambda m: m.record.clock.offset_s,
    ),
    Figure(
        "sagecp_instance_engine_restarts_total",
        "counter",
        "Times that the agent started the engine again, since the agent started.",
        lambda m: None if m.record.engine_process is None else m.record.engine_process.restart_count,
    ),
    Figure(
        "sagecp_instance_ttft_slowdown_ratio",
        "gauge",
        "Learned: how many times as long as its kind the instance takes to the first token.",
        lambda m: m.record.load.ttft.factor(m.now),
    ),
    Figure(
        "sagecp_instance_tpot_slowdown_ratio",
        "gauge",
        "Learned: how many times as long as its kind the instance takes per further token.",
        lambda m: m.record.load.tpot.factor(m.now),
    ),
    Figure(
        "sagecp_instance_prefill_backlog_seconds",
        "gauge",
        "Predicted time until the prefill work of the instance is done.",
        lambda m: m.record.load.backlog_s(m.now),
    ),
    Figure(
        "sagecp_instance_busy_seconds_total",
        "counter",
        "Time in which the instance had requests of the control plane.",
        lambda m: m.record.meter.busy_s(m.now),
    ),
    Figure(
        "sagecp_instance_busy_cost_usd_total",
        "counter",
        "What that time cost, US dollars, where a price is known.",
        lambda m: m.record.meter.busy_usd(m.now) if m.record.usd_per_hour else None,
    ),
    Figure(
        "sagecp_instance_idle_cost_usd_total",
        "counter",
        "What the time without any request cost, US dollars, where a price is known.",
        lambda m: m.record.meter.idle_usd(m.now) if m.record.usd_per_hour else None,
    ),
    _engine(
        "requests_running", "gauge", "Requests that run inside the engine.", lambda g: g.running_request_count
    ),
    _engine(
        "requests_waiting",
        "gauge",
        "Requests that wait inside the engine.",
        lambda g: g.waiting_request_count,
    ),
    _engine(
        "kv_cache_usage_ratio", "gauge", "Used share of the KV cache.", lambda g: g.key_value_cache_usage
    ),
    _engine(
        "prefix_cache_query_tokens_total",
        "counter",
        "Prompt tokens that the engine looked for in its prefix cache.",
        lambda g: g.prefix_cache_query_token_count,
    ),
    _engine(
        "prefix_cache_hit_tokens_total",
        "counter",
        "Those of them that it found.",
        lambda g: g.prefix_cache_hit_token_count,
    ),
    _engine(
        "prompt_tokens_total",
        "counter",
        "Prompt tokens that the engine processed.",
        lambda g: g.prompt_token_count,
    ),
    _engine(
        "generation_tokens_total",
        "counter",
        "Tokens that the engine produced.",
        lambda g: g.generation_token_count,
    ),
    _engine(
        "preemptions_total", "counter", "Requests that the engine set back.", lambda g: g.preemption_count
    ),
    _engine("sleeping", "gauge", "1 while the engine sleeps.", lambda g: _mark(g.sleeping)),
)


def _gpu(
    name: str, kind: str, help_text: str, read: Callable[[GpuReading], float | None]
) -> Figure[GpuReading]:
    return Figure(f"sagecp_gpu_{name}", kind, help_text, read)


GPU_FIGURES: tuple[Figure[GpuReading], ...] = (
    _gpu("utilization_ratio", "gauge", "Share of time in which a kernel ran.", lambda g: g.utilization),
    _gpu("memory_used_bytes", "gauge", "Used memory.", lambda g: g.used_memory_bytes),
    _gpu("memory_size_bytes", "gauge", "Memory there is.", lambda g: g.total_memory_bytes),
    _gpu(
        "engine_memory_bytes",
        "gauge",
        "Memory that the engine's processes hold.",
        lambda g: g.engine_memory_bytes,
    ),
    _gpu(
        "foreign_processes",
        "gauge",
        "Processes with memory that are not the engine's.",
        lambda g: g.foreign_process_count,
    ),
    _gpu("power_watts", "gauge", "Power drawn.", lambda g: g.power_watts),
    _gpu("power_limit_watts", "gauge", "Power that may be drawn.", lambda g: g.power_limit_watts),
    _gpu("temperature_celsius", "gauge", "Temperature of the chip.", lambda g: g.temperature_celsius),
    _gpu(
        "memory_temperature_celsius",
        "gauge",
        "Temperature of the memory.",
        lambda g: g.memory_temperature_celsius,
    ),
    _gpu(
        "sm_clock_hertz",
        "gauge",
        "Clock of the processors.",
        lambda g: None if g.sm_clock_mhz is None else g.sm_clock_mhz * 1_000_000,
    ),
    _gpu(
        "ecc_errors_corrected_total",
        "counter",
        "Memory errors that were corrected.",
        lambda g: g.corrected_ecc_error_count,
    ),
    _gpu(
        "ecc_errors_uncorrected_total",
        "counter",
        "Memory errors that were not.",
        lambda g: g.uncorrected_ecc_error_count,
    ),
    _gpu(
        "row_remap_pending",
        "gauge",
        "1 where bad memory waits for a reset to be replaced.",
        lambda g: _mark(g.row_remap_pending),
    ),
    _gpu(
        "row_remap_failed",
        "gauge",
        "1 where there is no spare memory left.",
        lambda g: _mark(g.row_remap_failed),
    ),
    _gpu("nvlinks", "gauge", "NVLinks that the GPU has.", lambda g: g.nvlink_count),
    _gpu("nvlinks_active", "gauge", "NVLinks that work.", lambda g: g.active_nvlink_count),
    _gpu(
        "nvlink_errors_total",
        "counter",
        "Replays, recoveries and CRC errors of NVLinks.",
        lambda g: g.nvlink_error_count,
    ),
)
