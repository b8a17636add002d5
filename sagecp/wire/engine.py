"""Engines: gauges, processes, adapters, and what was learned of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from sagecp.core.duration_quantiles import DurationQuantiles
from sagecp.core.engine_state import (
    EngineCapability,
    EngineGauges,
    EngineProcess,
    EngineProcessState,
    LearnedPerformance,
    LoraAdapter,
)
from sagecp.v1 import instance_pb2 as pb
from sagecp.v1 import metrics_pb2
from sagecp.wire.times import duration, seconds_of, time_s, timestamp

_QUANTILES = ("ttft", "inter_token_latency", "queue_wait")
_REPEATED = ("loaded_lora_adapters", "running_lora_adapters")
_SCALARS = tuple(
    field.name for field in pb.EngineGauges.DESCRIPTOR.fields if field.name not in {*_QUANTILES, *_REPEATED}
)
_CAPABILITIES = frozenset(each.value for each in EngineCapability)
_PROCESS_STATES = frozenset(each.value for each in EngineProcessState)


class _Draft:
    """What becomes gauges: it has the slots of them, and is not frozen."""

    __slots__ = tuple(field.name for field in dataclasses.fields(EngineGauges))


def quantiles_to_proto(value: DurationQuantiles) -> metrics_pb2.DurationQuantiles:
    """Return quantiles of a duration."""
    return metrics_pb2.DurationQuantiles(
        sample_count=value.sample_count,
        mean_s=value.mean_s,
        p50_s=value.p50_s,
        p95_s=value.p95_s,
        p99_s=value.p99_s,
    )


def quantiles_from_proto(message: metrics_pb2.DurationQuantiles) -> DurationQuantiles:
    """Return quantiles of a duration."""
    return DurationQuantiles(
        message.sample_count, message.mean_s, message.p50_s, message.p95_s, message.p99_s
    )


def gauges_to_proto(gauges: EngineGauges) -> pb.EngineGauges:
    """Return gauges; unknown ones stay absent."""
    message = pb.EngineGauges(
        loaded_lora_adapters=gauges.loaded_lora_adapters,
        running_lora_adapters=gauges.running_lora_adapters,
    )
    for name in _SCALARS:
        value = getattr(gauges, name)
        if value is not None:
            setattr(message, name, value)
    for name in _QUANTILES:
        quantiles = getattr(gauges, name)
        if quantiles is not None:
            getattr(message, name).CopyFrom(quantiles_to_proto(quantiles))
    return message


def gauges_from_proto(message: pb.EngineGauges) -> EngineGauges:
    """Return gauges as they are; an absent one is unknown, not zero."""
    # As readings of GPUs are made, and for the same reason.
    draft: Any = object.__new__(_Draft)
    has = message.HasField
    draft.running_request_count = message.running_request_count or (
        0 if has("running_request_count") else None
    )
    draft.waiting_request_count = message.waiting_request_count or (
        0 if has("waiting_request_count") else None
    )
    draft.prefix_cache_query_token_count = message.prefix_cache_query_token_count or (
        0 if has("prefix_cache_query_token_count") else None
    )
    draft.prefix_cache_hit_token_count = message.prefix_cache_hit_token_count or (
        0 if has("prefix_cache_hit_token_count") else None
    )
    draft.prompt_token_count = message.prompt_token_count or (0 if has("prompt_token_count") else None)
    draft.generation_token_count = message.generation_token_count or (
        0 if has("generation_token_count") else None
    )
    draft.preemption_count = message.preemption_count or (0 if has("preemption_count") else None)
    draft.finished_request_count = message.finished_request_count or (
        0 if has("finished_request_count") else None
    )
    draft.key_value_cache_usage = message.key_value_cache_usage or (
        0.0 if has("key_value_cache_usage") else None
    )
    draft.max_key_value_cache_usage = message.max_key_value_cache_usage or (
        0.0 if has("max_key_value_cache_usage") else None
    )
    draft.sleeping = message.sleeping or (False if has("sleeping") else None)
    draft.ttft = quantiles_from_proto(message.ttft) if has("ttft") else None
    draft.inter_token_latency = (
        quantiles_from_proto(message.inter_token_latency) if has("inter_token_latency") else None
    )
    draft.queue_wait = quantiles_from_proto(message.queue_wait) if has("queue_wait") else None
    loaded, running = message.loaded_lora_adapters, message.running_lora_adapters
    draft.loaded_lora_adapters = tuple(loaded) if loaded else ()
    draft.running_lora_adapters = tuple(running) if running else ()
    draft.__class__ = EngineGauges
    gauges: EngineGauges = draft
    return gauges


def capabilities_from_proto(numbers: list[int]) -> frozenset[EngineCapability]:
    """Return what an engine can be told to do; what this version does not know is left out."""
    return frozenset(EngineCapability(number) for number in numbers if number in _CAPABILITIES)


def capabilities_to_proto(
    capabilities: frozenset[EngineCapability],
) -> list[pb.EngineCapability.ValueType]:
    """Return what an engine can be told to do."""
    return [pb.EngineCapability.ValueType(each.value) for each in sorted(capabilities)]


def process_to_proto(process: EngineProcess) -> pb.EngineProcess:
    """Return the process of a supervised engine."""
    message = pb.EngineProcess(
        state=pb.EngineProcessState.ValueType(process.state.value),
        process_id=process.process_id,
        restart_count=process.restart_count,
        last_exit_code=process.last_exit_code,
        last_log_lines=process.last_log_lines,
    )
    if process.start_time_s is not None:
        message.start_time.CopyFrom(timestamp(process.start_time_s))
    if process.next_start_time_s is not None:
        message.next_start_time.CopyFrom(timestamp(process.next_start_time_s))
    return message


def process_from_proto(message: pb.EngineProcess) -> EngineProcess:
    """Return the process of a supervised engine; a state of a newer version counts as STOPPED."""
    state = message.state
    return EngineProcess(
        state=EngineProcessState(state) if state in _PROCESS_STATES else EngineProcessState.STOPPED,
        process_id=message.process_id,
        start_time_s=time_s(message.start_time) if message.HasField("start_time") else None,
        restart_count=message.restart_count,
        last_exit_code=message.last_exit_code if message.HasField("last_exit_code") else None,
        last_log_lines=tuple(message.last_log_lines),
        next_start_time_s=time_s(message.next_start_time) if message.HasField("next_start_time") else None,
    )


def adapters_to_proto(adapters: tuple[LoraAdapter, ...]) -> pb.LoraAdapters:
    """Return a set of LoRA adapters."""
    return pb.LoraAdapters(adapters=[pb.LoraAdapter(name=each.name, path=each.path) for each in adapters])


def adapters_from_proto(message: pb.LoraAdapters) -> tuple[LoraAdapter, ...]:
    """Return a set of LoRA adapters."""
    return tuple(LoraAdapter(each.name, each.path) for each in message.adapters)


def learned_to_proto(learned: LearnedPerformance) -> pb.LearnedPerformance:
    """Return how fast an instance is by what was seen of it."""
    return pb.LearnedPerformance(
        kind=learned.kind,
        observation_count=learned.observation_count,
        slowdown=learned.slowdown,
        single_step_duration=duration(learned.single_step_s),
        step_duration=duration(learned.step_s),
        prefill_tokens_per_second=learned.prefill_tokens_per_second,
        ttft=duration(learned.ttft_s),
        prefill_request_count=learned.prefill_request_count,
    )


def learned_from_proto(message: pb.LearnedPerformance) -> LearnedPerformance:
    """Return how fast an instance is by what was seen of it."""
    return LearnedPerformance(
        kind=message.kind,
        observation_count=message.observation_count,
        slowdown=message.slowdown,
        single_step_s=seconds_of(message.single_step_duration),
        step_s=seconds_of(message.step_duration),
        prefill_tokens_per_second=message.prefill_tokens_per_second,
        ttft_s=seconds_of(message.ttft),
        prefill_request_count=message.prefill_request_count,
    )
