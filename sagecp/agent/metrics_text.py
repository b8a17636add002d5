"""Reads what matters out of an engine's Prometheus page, and nothing else.

The page of a vLLM server has 50 KiB and more, nearly all of it histogram
buckets. It is searched for a few dozen names as it arrives; other lines are
never split, decoded or kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sagecp.agent.histograms import HistogramSnapshot
from sagecp.agent.metric_names import DECODED, HISTOGRAM_GAUGES, METRICS, RUNNING, WAITING, Meaning
from sagecp.core.types import EngineGauges

# A line longer than this is nothing that we look for.
_MAX_LINE_BYTES = 1 << 20
_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1
_MAX_BUCKET_COUNT = 256
_MAX_ADAPTER_COUNT = 128
_MAX_NAME_LENGTH = 128
_MAX_SETTING_COUNT = 128
_MAX_SETTING_LENGTH = 256

# Quotes within a value are escaped, so that nothing there looks like a label.
_LABEL = re.compile(rb'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_BOUND = re.compile(rb'(?<![a-zA-Z0-9_])le="([^"\\]*)"')
# Series that say again what another one says: every tensor-parallel rank of SGLang knows the same,
# and its requests by priority are a part of all of them.
_REPEATED = re.compile(rb'(?<![a-zA-Z0-9_])(?:(?:tp_rank|pp_rank|moe_ep_rank)="(?!0")|priority="(?!"))')
# Name, labels in braces (whose quoted values may hold braces), value, and possibly a time.
_SAMPLE = re.compile(
    rb'(?:\{([^"}]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"}]*)*)\})?[ \t]+([^ \t\r]+)(?:[ \t]+[-+]?\d+)?[ \t\r]*'
)
# A name counts at the start of a line alone, for `# HELP` and `# TYPE` lines also hold it,
# and whole, for longer names begin alike. One pass over the page, at C speed.
_LINE = re.compile(
    rb"\n((?:vllm|sglang):(?:"
    + b"|".join(sorted({re.escape(name.partition(b":")[2]) for name in METRICS}))
    + rb"))([{ \t][^\n]*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """What a page of metrics says; ``None`` is unknown.

    Attributes:
        gauges: The engine's state, over all of its data-parallel ranks: counts
            are sums, cache usage is the mean (the ranks' caches have one size).
        engine_count: Ranks seen, by their ``engine`` or ``dp_rank`` label; 0: none was named.
        key_value_token_capacity: Tokens that fit the caches of all ranks.
        histograms: By gauge, since the engine's start and over all ranks.
        settings: Of the engine's cache, by vLLM's names for them.
        sleep_level: How deep it sleeps, as far as it says so.
    """

    gauges: EngineGauges
    engine_count: int = 0
    key_value_token_capacity: int | None = None
    histograms: Mapping[str, HistogramSnapshot] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    sleep_level: int | None = None


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
        self._dropped_weights = False
        self._capacities: dict[bytes, int] = {}
        self._settings: dict[bytes, bytes] = {}
        self._adapters: tuple[float, bytes] | None = None
        self._buckets: dict[str, dict[bytes, float]] = {}
        self._totals: dict[str, float] = {}

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
        usages, sums = self._usages, self._sums
        if DECODED in sums:
            sums["generation_token_count"] = sums.pop(DECODED)
        if "prefix_cache_hit_token_count" in sums and "prompt_token_count" in sums:
            # SGLang looks every prompt token up, and has no counter for that.
            sums.setdefault("prefix_cache_query_token_count", sums["prompt_token_count"])
        counts: dict[str, Any] = {
            name: min(int(value), _UINT32_MAX if name in {RUNNING, WAITING} else _UINT64_MAX)
            for name, value in sums.items()
        }
        return EngineMetrics(
            gauges=EngineGauges(
                key_value_cache_usage=math.fsum(usages) / len(usages) if usages else None,
                max_key_value_cache_usage=max(usages, default=None),
                sleeping=not all(self._awake) if self._awake else None,
                running_lora_adapters=_names(self._adapters[1]) if self._adapters else (),
                **counts,
            ),
            engine_count=len(self._ranks),
            key_value_token_capacity=sum(self._capacities.values()) or None,
            histograms=self._histograms(),
            settings={_text(name): _text(value) for name, value in self._settings.items()},
            sleep_level=None if not self._awake or all(self._awake) else 2 if self._dropped_weights else 1,
        )

    def _scan(self, data: bytes, end: int) -> None:
        for match in _LINE.finditer(data, 0, end):
            name, sample = match.groups()
            known = METRICS.get(name)
            if known is not None:
                self._take(*known, sample)

    def _take(self, meaning: Meaning, key: str, sample: bytes) -> None:
        match = _SAMPLE.fullmatch(sample)
        if match is None:
            return
        try:
            value = float(match[2])
        except ValueError:
            return
        if not (value >= 0 and math.isfinite(value)):
            return
        text = match[1] or b""
        if _REPEATED.search(text):
            return
        if meaning is Meaning.BUCKET:
            bound = _BOUND.search(text)
            buckets = self._buckets.setdefault(key, {})
            if bound is not None and (bound[1] in buckets or len(buckets) < _MAX_BUCKET_COUNT):
                buckets[bound[1]] = buckets.get(bound[1], 0.0) + value
            return
        labels: dict[bytes, bytes] = dict(_LABEL.findall(text))
        rank = labels.get(b"engine", labels.get(b"dp_rank"))
        if rank is not None:
            self._ranks.add(rank)
        if meaning is Meaning.COUNT:
            self._add(key, value)
        elif meaning is Meaning.TOTAL:
            self._totals[key] = self._totals.get(key, 0.0) + value
        elif meaning is Meaning.USAGE:
            # Rounding may take it above 1, which no cache is.
            self._usages.append(min(value, 1.0))
        elif meaning is Meaning.FINISHED:
            if labels.get(b"finished_reason") != b"abort":
                self._add("finished_request_count", value)
        elif meaning is Meaning.PROGRESS:
            if labels.get(b"mode") == b"decode":
                self._add(key, value)
        else:
            self._take_state(meaning, labels, rank or b"", value)

    def _take_state(self, meaning: Meaning, labels: dict[bytes, bytes], rank: bytes, value: float) -> None:
        if meaning is Meaning.SLEEP_STATE:
            state = labels.get(b"sleep_state")
            if state == b"awake":
                self._awake.append(value != 0)
            elif state == b"discard_all" and value != 0:
                self._dropped_weights = True
        elif meaning is Meaning.CAPACITY:
            self._capacities[rank] = int(min(value, _UINT32_MAX))
        elif meaning is Meaning.ADAPTERS:
            # Series of other combinations stay on the page; the one that was set last is true.
            if self._adapters is None or value >= self._adapters[0]:
                self._adapters = (value, labels.get(b"running_lora_adapters", b""))
            self._settings.setdefault(b"max_loras", labels.get(b"max_lora", b""))
        elif meaning is Meaning.CACHE_CONFIG:
            capacity = _capacity(labels)
            if capacity:
                self._capacities[rank] = capacity
            for name, setting in labels.items():
                if len(self._settings) < _MAX_SETTING_COUNT:
                    self._settings.setdefault(name, setting)

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def _histograms(self) -> dict[str, HistogramSnapshot]:
        found: dict[str, HistogramSnapshot] = {}
        for name, gauge in HISTOGRAM_GAUGES.items():
            if gauge in found or name not in self._buckets or name not in self._totals:
                continue
            try:
                buckets = sorted((float(bound), count) for bound, count in self._buckets[name].items())
            except ValueError:
                continue
            if buckets and buckets[-1][0] == math.inf:
                bounds, counts = zip(*buckets, strict=True)
                found[gauge] = HistogramSnapshot(bounds, counts, self._totals[name])
        return found


def _capacity(labels: dict[bytes, bytes]) -> int:
    """Tokens that fit one rank's cache; 0: not said."""
    # What the engine worked out itself comes first: it knows layers that need no full cache.
    stated = _whole(labels.get(b"kv_cache_size_tokens"))
    return stated or _whole(labels.get(b"num_gpu_blocks")) * _whole(labels.get(b"block_size"))


def _whole(text: bytes | None) -> int:
    # Not said at all is the text "None". The length is bounded: Python refuses huge numbers.
    return int(text) if text is not None and text.isdigit() and len(text) < 16 else 0


def _text(value: bytes) -> str:
    return value[:_MAX_SETTING_LENGTH].decode("utf-8", "replace")


def _names(joined: bytes) -> tuple[str, ...]:
    """Return the adapters of a list with commas."""
    names = (name.strip() for name in joined.decode("utf-8", "replace").split(","))
    return tuple(name for name in names if 0 < len(name) <= _MAX_NAME_LENGTH)[:_MAX_ADAPTER_COUNT]


def parse_metrics(page: bytes) -> EngineMetrics:
    """Return what a whole page says."""
    parser = MetricsParser()
    parser.feed(page)
    return parser.finish()
