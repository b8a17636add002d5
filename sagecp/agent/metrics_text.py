"""Reads what matters out of an engine's Prometheus page, and nothing else.

The page of a vLLM server has 50 KiB and more, nearly all of it histogram
buckets. It is searched for a dozen names as it arrives; other lines are never
split, decoded or kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from sagecp.core.types import EngineGauges

# A line longer than this is nothing that we look for.
_MAX_LINE_BYTES = 1 << 20
_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1

# Only the labels that matter: there are thirty more. Quotes within a value are escaped, so that
# nothing there looks like a label.
_LABEL = re.compile(
    rb"(?<![a-zA-Z0-9_])"
    rb"(engine|sleep_state|finished_reason|block_size|num_gpu_blocks|kv_cache_size_tokens)"
    rb'="((?:[^"\\]|\\.)*)"'
)
# Name, labels in braces (whose quoted values may hold braces), value, and possibly a time.
_SAMPLE = re.compile(
    rb'(?:\{([^"}]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"}]*)*)\})?[ \t]+([^ \t\r]+)(?:[ \t]+[-+]?\d+)?[ \t\r]*'
)

_RUNNING = b"vllm:num_requests_running"
_WAITING = b"vllm:num_requests_waiting"
_USAGE = b"vllm:kv_cache_usage_perc"
# The name before vLLM 0.10.
_OLD_USAGE = b"vllm:gpu_cache_usage_perc"
_CACHE_CONFIG = b"vllm:cache_config_info"
_SLEEP = b"vllm:engine_sleep_state"
_SUCCESS = b"vllm:request_success_total"
_SUMMED = {
    b"vllm:prefix_cache_queries_total": "prefix_cache_query_token_count",
    b"vllm:prefix_cache_hits_total": "prefix_cache_hit_token_count",
    b"vllm:prompt_tokens_total": "prompt_token_count",
    b"vllm:generation_tokens_total": "generation_token_count",
    b"vllm:num_preemptions_total": "preemption_count",
}
_WANTED = (_RUNNING, _WAITING, _USAGE, _OLD_USAGE, _CACHE_CONFIG, _SLEEP, _SUCCESS, *_SUMMED)
# A name counts at the start of a line alone, for `# HELP` and `# TYPE` lines also hold it,
# and whole, for longer names begin alike. One pass over the page, at C speed.
_LINE = re.compile(rb"\n(" + b"|".join(map(re.escape, _WANTED)) + rb")([{ \t][^\n]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """What a page of metrics says; ``None`` is unknown.

    Attributes:
        gauges: The engine's state, over all of its data-parallel ranks: counts
            are sums, cache usage is the mean (the ranks' caches have one size).
        engine_count: Ranks seen, by their ``engine`` label; 0: none was named.
        max_key_value_cache_usage: Of the fullest rank.
        key_value_token_capacity: Tokens that fit the caches of all ranks.
    """

    gauges: EngineGauges
    engine_count: int = 0
    max_key_value_cache_usage: float | None = None
    key_value_token_capacity: int | None = None


class MetricsParser:
    """Takes a page piece by piece; keeps at most one unfinished line.

    Lines that are not understood are passed over: a page of another version, or
    a broken one, leaves gauges unknown and never raises.
    """

    def __init__(self) -> None:
        # Always begins with the newline before the unfinished line.
        self._rest = b"\n"
        self._skipping = False
        self._sums: dict[str, float] = {}
        self._usages: list[float] = []
        self._ranks: set[bytes] = set()
        self._awake: list[bool] = []
        self._capacities: dict[bytes, int] = {}

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the page, cut anywhere."""
        data = self._rest + piece
        end = data.rfind(b"\n")
        if end > 0:
            if self._skipping:
                # The first line is the end of one that was too long.
                data = data[data.index(b"\n", 1) :]
                end = data.rfind(b"\n")
                self._skipping = False
            self._scan(data, end)
            data = data[end:]
        if len(data) > _MAX_LINE_BYTES:
            data, self._skipping = b"\n", True
        self._rest = data

    def finish(self) -> EngineMetrics:
        """Return what the page said."""
        if len(self._rest) > 1:
            self.feed(b"\n")
        usages = self._usages
        counts: dict[str, Any] = {name: self._count(name) for name in _SUMMED.values()}
        return EngineMetrics(
            gauges=EngineGauges(
                running_request_count=self._count("running", _UINT32_MAX),
                waiting_request_count=self._count("waiting", _UINT32_MAX),
                key_value_cache_usage=math.fsum(usages) / len(usages) if usages else None,
                finished_request_count=self._count("finished"),
                sleeping=not all(self._awake) if self._awake else None,
                **counts,
            ),
            engine_count=len(self._ranks),
            max_key_value_cache_usage=max(usages, default=None),
            key_value_token_capacity=sum(self._capacities.values()) or None,
        )

    def _count(self, name: str, largest: int = _UINT64_MAX) -> int | None:
        value = self._sums.get(name)
        return None if value is None else min(int(value), largest)

    def _scan(self, data: bytes, end: int) -> None:
        for match in _LINE.finditer(data, 0, end):
            self._take(match[1], match[2])

    def _take(self, name: bytes, sample: bytes) -> None:
        match = _SAMPLE.fullmatch(sample)
        if match is None:
            return
        try:
            value = float(match[2])
        except ValueError:
            return
        if not (value >= 0 and math.isfinite(value)):
            return
        labels: dict[bytes, bytes] = dict(_LABEL.findall(match[1])) if match[1] else {}
        if b"engine" in labels:
            self._ranks.add(labels[b"engine"])
        if name in {_RUNNING, _WAITING}:
            self._add("running" if name == _RUNNING else "waiting", value)
        elif name in {_USAGE, _OLD_USAGE}:
            # Rounding may take it above 1, which no cache is.
            self._usages.append(min(value, 1.0))
        elif name == _SLEEP:
            if labels.get(b"sleep_state") == b"awake":
                self._awake.append(value != 0)
        elif name == _SUCCESS:
            if labels.get(b"finished_reason") != b"abort":
                self._add("finished", value)
        elif name == _CACHE_CONFIG:
            capacity = _capacity(labels)
            if capacity:
                self._capacities[labels.get(b"engine", b"")] = capacity
        else:
            self._add(_SUMMED[name], value)

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value


def _capacity(labels: dict[bytes, bytes]) -> int:
    """Tokens that fit one rank's cache; 0: not said."""
    # What the engine worked out itself comes first: it knows layers that need no full cache.
    stated = _whole(labels.get(b"kv_cache_size_tokens"))
    return stated or _whole(labels.get(b"num_gpu_blocks")) * _whole(labels.get(b"block_size"))


def _whole(text: bytes | None) -> int:
    # Not said at all is the text "None". The length is bounded: Python refuses huge numbers.
    return int(text) if text is not None and text.isdigit() and len(text) < 16 else 0


def parse_metrics(page: bytes) -> EngineMetrics:
    """Return what a whole page says."""
    parser = MetricsParser()
    parser.feed(page)
    return parser.finish()
