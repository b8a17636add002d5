"""The engine's metrics, under vLLM's names and labels, as Prometheus text.

Written by hand because a scrape reads most values from the model itself and
because one histogram is observed for every token.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sagecp.sim.engine_model import EngineModel
from sagecp.sim.engine_types import EngineRequest

if TYPE_CHECKING:
    from sagecp.sim.engine_control import EngineControl

_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_GAP = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
)  # fmt: skip
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
_PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
_FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")


def _decades(limit: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50, ... up to a limit."""
    bounds: list[float] = []
    power = 1
    while power <= limit:
        bounds += [float(power * m) for m in (1, 2, 5) if power * m <= limit]
        power *= 10
    return tuple(bounds)


class Histogram:
    """Counts of observations by upper bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class EngineMetrics:
    """Observes finished tokens and requests, and renders everything.

    Args:
        model: The engine, from which gauges and totals are read.
        model_name: The served name, for the label.
        max_model_len: The longest sequence, which bounds the token histograms.
        info: Labels of ``cache_config_info``.
        created_s: Unix time of the start.
        max_loras: Adapters in one batch; ``None``: it takes none.

    Attributes:
        rejections: Requests refused because the queue was full.
        control: Its sleep, and its LoRA adapters; ``None``: it has neither.
    """

    def __init__(
        self,
        model: EngineModel,
        model_name: str,
        max_model_len: int,
        info: Mapping[str, str],
        created_s: float,
        max_loras: int | None = None,
    ) -> None:
        self._model = model
        self._name = model_name
        self._info = dict(info)
        self._created_s = created_s
        self._max_loras = max_loras
        self.control: EngineControl | None = None
        self._success = dict.fromkeys(_FINISHED_REASONS, 0)
        self.rejections = 0
        tokens = _decades(max_model_len)
        self._step_tokens = Histogram(_STEP_TOKENS)
        self._prompt_tokens = Histogram(tokens)
        self._output_tokens = Histogram(tokens)
        self._most_output_tokens = Histogram(tokens)
        self._choices = Histogram(_CHOICES)
        self._asked_tokens = Histogram(tokens)
        self._time_to_first_token = Histogram(_TTFT)
        self._gap = Histogram(_GAP)
        self._time_per_output_token = Histogram(_GAP)
        self._end_to_end = Histogram(_LATENCY)
        self._queue = Histogram(_LATENCY)
        self._inference = Histogram(_LATENCY)
        self._prefill = Histogram(_LATENCY)
        self._decode = Histogram(_LATENCY)
        self._preemptions = Histogram(_PREEMPTIONS)
        self._computed_prompt_tokens = Histogram(tokens)
        self.observe_gap = self._gap.observe

    def observe_step(self) -> None:
        """Count the step that has just finished."""
        self._step_tokens.observe(self._model.last_step_tokens)

    def observe_first_token(self, request: EngineRequest) -> None:
        """Count a request's first token."""
        self._time_to_first_token.observe(request.first_token_s - request.arrival_s)

    def observe_finish(self, request: EngineRequest, reason: str, choice_count: int) -> None:
        """Count a request that ended with an answer (vLLM does not count aborted ones)."""
        self._success[reason] += 1
        count = request.output_token_count
        self._prompt_tokens.observe(request.prompt_token_count)
        self._output_tokens.observe(count)
        self._most_output_tokens.observe(count)
        self._choices.observe(choice_count)
        self._asked_tokens.observe(request.max_tokens)
        decode_s = request.last_token_s - request.first_token_s
        self._end_to_end.observe(request.last_token_s - request.arrival_s)
        self._queue.observe(request.scheduled_s - request.arrival_s)
        self._prefill.observe(request.first_token_s - request.scheduled_s)
        self._decode.observe(decode_s)
        self._inference.observe(request.last_token_s - request.scheduled_s)
        self._time_per_output_token.observe(decode_s / (count - 1) if count > 1 else 0.0)
        self._preemptions.observe(request.preemption_count)
        self._computed_prompt_tokens.observe(request.prompt_token_count - max(0, request.cached_token_count))

    def render(self) -> bytes:
        """Return the scrape."""
        lines: list[str] = []
        self._render_gauges(lines)
        self._render_adapters(lines)
        self._render_counters(lines)
        self._render_histograms(lines)
        self._family(lines, "cache_config_info", "gauge", "Information of the LLMEngine CacheConfig")
        labels = ",".join(f'{key}="{_escape(value)}"' for key, value in sorted(self._info.items()))
        lines.append(f"vllm:cache_config_info{{{labels}}} 1.0")
        return ("\n".join(lines) + "\n").encode()

    def _render_gauges(self, lines: list[str]) -> None:
        model = self._model
        waiting = float(model.waiting_count)
        sleep_level = None if self.control is None else self.control.sleep_level
        self._values(
            lines,
            "num_requests_running",
            "gauge",
            "Number of requests in model execution batches.",
            [({}, float(model.running_count))],
        )
        self._values(
            lines,
            "num_requests_waiting",
            "gauge",
            "Number of requests waiting to be processed.",
            [({}, waiting)],
        )
        self._values(
            lines,
            "num_requests_waiting_by_reason",
            "gauge",
            "Number of waiting requests by reason: 'capacity' or 'deferred'.",
            [({"reason": "capacity"}, waiting), ({"reason": "deferred"}, 0.0)],
        )
        self._values(
            lines,
            "engine_sleep_state",
            "gauge",
            "Engine sleep state; awake = 1 means engine is awake.",
            [
                ({"sleep_state": "awake"}, float(sleep_level is None)),
                ({"sleep_state": "weights_offloaded"}, float(sleep_level == 1)),
                ({"sleep_state": "discard_all"}, float(sleep_level == 2)),
            ],
        )
        self._values(
            lines,
            "kv_cache_usage_perc",
            "gauge",
            "KV-cache usage. 1 means 100 percent usage.",
            [({}, model.cache.usage)],
        )

    def _render_adapters(self, lines: list[str]) -> None:
        if self._max_loras is None or self.control is None:
            return
        running, waiting = self.control.adapters_in_use()
        self._family(lines, "lora_requests_info", "gauge", "Running stats on lora requests.")
        lines.append(
            f'vllm:lora_requests_info{{max_lora="{self._max_loras}",'
            f'running_lora_adapters="{_escape(",".join(running))}",'
            f'waiting_lora_adapters="{_escape(",".join(waiting))}"}} {time.time()}'
        )

    def _render_counters(self, lines: list[str]) -> None:
        counters = self._model.counters
        cached = float(counters.cached_prompt_tokens)
        prompt = float(counters.prompt_tokens)
        by_source = [
            ({"source": "local_compute"}, prompt - cached),
            ({"source": "local_cache_hit"}, cached),
            ({"source": "external_kv_transfer"}, 0.0),
        ]
        success = [({"finished_reason": reason}, float(count)) for reason, count in self._success.items()]
        for name, text, values in (
            (
                "prefix_cache_queries",
                "Prefix cache queries, in terms of number of queried tokens.",
                [({}, float(counters.prefix_queries))],
            ),
            (
                "prefix_cache_hits",
                "Prefix cache hits, in terms of number of cached tokens.",
                [({}, float(counters.prefix_hits))],
            ),
            (
                "num_preemptions",
                "Cumulative number of preemption from the engine.",
                [({}, float(counters.preemptions))],
            ),
            ("prompt_tokens", "Number of prefill tokens processed.", [({}, prompt)]),
            ("prompt_tokens_by_source", "Number of prompt tokens by source.", by_source),
            ("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", [({}, cached)]),
            (
                "generation_tokens",
                "Number of generation tokens processed.",
                [({}, float(counters.generation_tokens))],
            ),
            ("request_success", "Count of successfully processed requests.", success),
        ):
            self._values(lines, name + "_total", "counter", text, values)
            self._created(lines, name, text, [labels for labels, _ in values])
        text = "Number of admission attempts rejected by a queue limit, by reason."
        self._family(lines, "admission_rejections_total", "counter", text)
        for reason, count in (("max_num_queued_reqs", self.rejections), ("max_num_queued_tokens", 0)):
            lines.append(
                f'vllm:admission_rejections_total{{model_name="{_escape(self._name)}",reason="{reason}"}} '
                f"{float(count)}"
            )

    def _render_histograms(self, lines: list[str]) -> None:
        for name, text, histogram in (
            ("request_prompt_tokens", "Number of prefill tokens processed.", self._prompt_tokens),
            ("request_generation_tokens", "Number of generation tokens processed.", self._output_tokens),
            (
                "iteration_tokens_total",
                "Histogram of number of tokens per engine_step.",
                self._step_tokens,
            ),
            (
                "request_max_num_generation_tokens",
                "Histogram of maximum number of requested generation tokens.",
                self._most_output_tokens,
            ),
            ("request_params_n", "Histogram of the n request parameter.", self._choices),
            (
                "request_params_max_tokens",
                "Histogram of the max_tokens request parameter.",
                self._asked_tokens,
            ),
            (
                "time_to_first_token_seconds",
                "Histogram of time to first token in seconds.",
                self._time_to_first_token,
            ),
            (
                "inter_token_latency_seconds",
                "Histogram of inter-token latency in seconds.",
                self._gap,
            ),
            (
                "request_time_per_output_token_seconds",
                "Histogram of time_per_output_token_seconds per request.",
                self._time_per_output_token,
            ),
            (
                "e2e_request_latency_seconds",
                "Histogram of e2e request latency in seconds.",
                self._end_to_end,
            ),
            (
                "request_queue_time_seconds",
                "Histogram of time spent in WAITING phase for request.",
                self._queue,
            ),
            (
                "request_inference_time_seconds",
                "Histogram of time spent in RUNNING phase for request.",
                self._inference,
            ),
            (
                "request_prefill_time_seconds",
                "Histogram of time spent in PREFILL phase for request.",
                self._prefill,
            ),
            (
                "request_decode_time_seconds",
                "Histogram of time spent in DECODE phase for request.",
                self._decode,
            ),
            (
                "request_num_preemptions",
                "Histogram of the number of times a request was preempted.",
                self._preemptions,
            ),
            (
                "request_prefill_kv_computed_tokens",
                "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
                self._computed_prompt_tokens,
            ),
        ):
            self._family(lines, name, "histogram", text)
            total = 0
            for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
                total += count
                le = "+Inf" if bound is None else str(bound)
                lines.append(f"vllm:{name}_bucket{self._labels({'le': le})} {float(total)}")
            lines.append(f"vllm:{name}_count{self._labels({})} {float(total)}")
            lines.append(f"vllm:{name}_sum{self._labels({})} {histogram.total}")
            self._created(lines, name, text, [{}])

    def _values(
        self,
        lines: list[str],
        name: str,
        kind: str,
        text: str,
        values: Iterable[tuple[Mapping[str, str], float]],
    ) -> None:
        self._family(lines, name, kind, text)
        lines.extend(f"vllm:{name}{self._labels(labels)} {value}" for labels, value in values)

    def _created(
        self, lines: list[str], name: str, text: str, label_sets: Iterable[Mapping[str, str]]
    ) -> None:
        self._values(
            lines, name + "_created", "gauge", text, [(labels, self._created_s) for labels in label_sets]
        )

    @staticmethod
    def _family(lines: list[str], name: str, kind: str, text: str) -> None:
        lines.append(f"# HELP vllm:{name} {text}")
        lines.append(f"# TYPE vllm:{name} {kind}")

    def _labels(self, extra: Mapping[str, str]) -> str:
        labels = sorted({"engine": "0", "model_name": self._name, **extra}.items())
        return "{" + ",".join(f'{key}="{_escape(value)}"' for key, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
