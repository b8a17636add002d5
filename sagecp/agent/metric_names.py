"""Which metrics of an engine are read, under the names that vLLM and SGLang have given them.

Sources: vLLM's ``v1/metrics/loggers.py`` (0.32; older names as noted), SGLang's
``srt/observability/metrics_collector.py`` (0.5).
"""

from __future__ import annotations

import enum


class Meaning(enum.Enum):
    """What is done with the samples of a metric."""

    COUNT = enum.auto()
    """Added up over data-parallel ranks and other labels."""
    USAGE = enum.auto()
    """Share of a rank's KV cache in use."""
    CAPACITY = enum.auto()
    """Tokens that fit a rank's KV cache."""
    CACHE_CONFIG = enum.auto()
    """Settings of the cache, as labels."""
    SLEEP_STATE = enum.auto()
    """1 at the state that the engine is in, by the label ``sleep_state``."""
    FINISHED = enum.auto()
    """Requests that ended, by the label ``finished_reason``; aborted ones do not count."""
    ADAPTERS = enum.auto()
    """LoRA adapters in use, as labels; the value is when that was so."""
    PROGRESS = enum.auto()
    """Tokens as they are computed, by the label ``mode``."""
    BUCKET = enum.auto()
    """A histogram's bucket, by the label ``le``."""
    TOTAL = enum.auto()
    """A histogram's sum."""


RUNNING = "running_request_count"
WAITING = "waiting_request_count"
DECODED = "decoded_token_count"
"""Of a counter that runs with every token, where the plain one runs when requests end."""

METRICS: dict[bytes, tuple[Meaning, str]] = {
    b"vllm:num_requests_running": (Meaning.COUNT, RUNNING),
    b"vllm:num_requests_waiting": (Meaning.COUNT, WAITING),
    b"vllm:kv_cache_usage_perc": (Meaning.USAGE, ""),
    b"vllm:gpu_cache_usage_perc": (Meaning.USAGE, ""),  # Before 0.10.
    b"vllm:cache_config_info": (Meaning.CACHE_CONFIG, ""),
    b"vllm:engine_sleep_state": (Meaning.SLEEP_STATE, ""),
    b"vllm:request_success_total": (Meaning.FINISHED, ""),
    b"vllm:lora_requests_info": (Meaning.ADAPTERS, ""),
    b"vllm:prefix_cache_queries_total": (Meaning.COUNT, "prefix_cache_query_token_count"),
    b"vllm:prefix_cache_hits_total": (Meaning.COUNT, "prefix_cache_hit_token_count"),
    b"vllm:prompt_tokens_total": (Meaning.COUNT, "prompt_token_count"),
    b"vllm:generation_tokens_total": (Meaning.COUNT, "generation_token_count"),
    b"vllm:num_preemptions_total": (Meaning.COUNT, "preemption_count"),
    b"sglang:num_running_reqs": (Meaning.COUNT, RUNNING),
    b"sglang:num_queue_reqs": (Meaning.COUNT, WAITING),
    b"sglang:token_usage": (Meaning.USAGE, ""),
    b"sglang:max_total_num_tokens": (Meaning.CAPACITY, ""),
    b"sglang:cached_tokens_total": (Meaning.COUNT, "prefix_cache_hit_token_count"),
    b"sglang:prompt_tokens_total": (Meaning.COUNT, "prompt_token_count"),
    b"sglang:generation_tokens_total": (Meaning.COUNT, "generation_token_count"),
    b"sglang:realtime_tokens_total": (Meaning.PROGRESS, DECODED),
    b"sglang:num_retracted_requests_total": (Meaning.COUNT, "preemption_count"),
    b"sglang:num_requests_total": (Meaning.COUNT, "finished_request_count"),
}
"""By the name of a sample: what it means, and the gauge or other quantity that it counts for."""

_HISTOGRAMS: tuple[tuple[str, str], ...] = (
    ("vllm:time_to_first_token_seconds", "ttft"),
    ("vllm:inter_token_latency_seconds", "inter_token_latency"),
    ("vllm:time_per_output_token_seconds", "inter_token_latency"),  # Before 0.11.
    ("vllm:request_queue_time_seconds", "queue_wait"),
    ("sglang:time_to_first_token_seconds", "ttft"),
    ("sglang:inter_token_latency_seconds", "inter_token_latency"),
    ("sglang:time_per_output_token_seconds", "inter_token_latency"),  # Before 0.4.6.
    ("sglang:queue_time_seconds", "queue_wait"),
)

METRICS.update((f"{name}_bucket".encode(), (Meaning.BUCKET, name)) for name, _ in _HISTOGRAMS)
METRICS.update((f"{name}_sum".encode(), (Meaning.TOTAL, name)) for name, _ in _HISTOGRAMS)

HISTOGRAM_GAUGES: dict[str, str] = dict(_HISTOGRAMS)
"""By the name of a histogram, the present one before older ones: the gauge that its quantiles are."""
