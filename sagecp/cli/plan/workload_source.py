"""What --workload names: a trace, a kind of traffic that is known, or lengths."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

    from sagecp.core.parallelism.workload import LengthSample
    from sagecp.sim.fleet.traces import Trace

MAX_SAMPLE_COUNT = 1000
"""Requests of a trace that stand for all of it."""
# Longer pauses in a trace, such as a night, would otherwise count as bursts.
_MAX_ARRIVAL_VARIATION = 4.0
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kK]?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTraffic:
    """Traffic as one public trace has it.

    Attributes:
        prompt: Mean tokens of a prompt.
        output: Mean tokens of an answer.
        prompt_spread: Standard deviation of the prompts relative to their mean.
        output_spread: Likewise, of the answers.
        cached_share: Share of the prompts' tokens that an endless prefix cache would have.
        about: What it is, and where the figures are from.
    """

    prompt: float
    output: float
    prompt_spread: float
    output_spread: float
    cached_share: float = 0.0
    about: str


# Means of the traces in bench/workloads.
KNOWN_TRAFFIC = {
    "chat": KnownTraffic(
        prompt=1237, output=221, prompt_spread=0.95, output_spread=0.77,
        about="conversations: Azure's trace of 2023",
    ),
    "code": KnownTraffic(
        prompt=2028, output=28, prompt_spread=0.96, output_spread=2.26,
        about="code completion: Azure's trace of 2023",
    ),
    "long-chat": KnownTraffic(
        prompt=12935, output=346, prompt_spread=1.3, output_spread=0.73, cached_share=0.35,
        about="long conversations with shared beginnings: Mooncake's trace",
    ),
    "reasoning": KnownTraffic(
        prompt=1008, output=2976, prompt_spread=3.4, output_spread=1.05,
        about="answers after long thought: ServeGen's statistics of a reasoning model",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSource:
    """Traffic for a request.

    Attributes:
        samples: What requests look like; empty: only the means are known.
        mean_prompt_token_count: Used without samples.
        mean_output_token_count: Likewise.
        request_rate: Requests per second; ``None``: as many as can be.
        arrival_variation: Of the time between requests, relative to its mean.
        description: For people, in a few words.
        notes: What was assumed.
    """

    samples: tuple[LengthSample, ...] = ()
    mean_prompt_token_count: float = 0.0
    mean_output_token_count: float = 0.0
    request_rate: float | None = None
    arrival_variation: float = 1.0
    description: str
    notes: tuple[str, ...] = ()


def read_workload(
    text: str, *, rate: float | None = None, scale: float | None = None, count_cached: bool = True
) -> WorkloadSource:
    """Return the traffic that somebody named.

    Args:
        text: A trace's file, a name, or ``prompt=1000,output=200``.
        rate: Requests per second, instead of the trace's; 0: as many as can be.
        scale: Rate relative to the trace's.
        count_cached: Whether what a prefix cache would have counts as computed.

    Raises:
        CliError: It is none of them, or cannot be read.
    """
    if scale is not None and rate is not None:
        raise _refusal("--rate and --scale: give the one or the other")
    path = Path(text).expanduser()
    if path.is_file():
        return _from_trace(path, rate, scale, count_cached=count_cached)
    if scale is not None:
        raise _refusal("--scale is for traces; say requests per second with --rate")
    if text in KNOWN_TRAFFIC:
        return _from_known(text, rate, count_cached=count_cached)
    if "=" in text:
        return _from_lengths(text, rate)
    names = ", ".join(KNOWN_TRAFFIC)
    raise _refusal(
        f"--workload: there is no file {text}, and no traffic of that name",
        f"give a trace (docs/simulator-formats.md), one of {names}, or prompt=1000,output=200",
    )


def _from_known(name: str, rate: float | None, *, count_cached: bool) -> WorkloadSource:
    from sagecp.core.parallelism.length_spread import spread_lengths

    known = KNOWN_TRAFFIC[name]
    samples = spread_lengths(
        known.prompt,
        known.output,
        cached_share=known.cached_share if count_cached else 0.0,
        prompt_spread=known.prompt_spread,
        output_spread=known.output_spread,
    )
    note = f"{name}: {known.about}; lengths log-normal around its means, prompts and answers independent"
    return WorkloadSource(samples=samples, request_rate=rate or None, description=name, notes=(note,))


def _from_lengths(text: str, rate: float | None) -> WorkloadSource:
    from sagecp.core.parallelism.length_spread import USUAL_SPREAD, spread_lengths

    values = _read_lengths(text)
    prompt, output = values.get("prompt", 0.0), values.get("output", 0.0)
    if prompt < 1 or output < 1:
        raise _refusal(f"--workload: {text!r}: prompt and output are needed, each at least 1 token",
                "for example prompt=1000,output=200")  # fmt: skip
    spread, cached = values.get("spread", USUAL_SPREAD), values.get("cached", 0.0)
    if cached >= prompt:
        raise _refusal(
            f"--workload: {text!r}: the cached tokens are of the prompt, so there are fewer of them"
        )
    if spread > 10.0:
        raise _refusal(
            f"--workload: {text!r}: spread is relative to the mean: 0 for none, 0.95 as usual, at most 10"
        )
    description = f"{prompt:,.0f} prompt and {output:,.0f} output tokens on average"
    if "spread" not in values and not cached:
        return WorkloadSource(
            mean_prompt_token_count=prompt,
            mean_output_token_count=output,
            request_rate=rate or None,
            description=description,
        )
    samples = spread_lengths(
        prompt, output, cached_share=cached / prompt, prompt_spread=spread, output_spread=spread
    )
    return WorkloadSource(samples=samples, request_rate=rate or None, description=description)


def _read_lengths(text: str) -> dict[str, float]:
    known = ("prompt", "output", "cached", "spread")
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (each.strip() for each in part.partition("="))
        match = _LENGTH.fullmatch(number)
        if not equals or name not in known or match is None or name in values:
            raise _refusal(
                f"--workload: {part!r} of {text!r} is not understood",
                "write prompt=1000,output=200, with cached=TOKENS or spread=0 for equal lengths as you like",
            )
        values[name] = float(match[1]) * (1000.0 if match[2] else 1.0)
    return values


def _from_trace(path: Path, rate: float | None, scale: float | None, *, count_cached: bool) -> WorkloadSource:
    from sagecp.core.parallelism.workload import LengthSample
    from sagecp.sim.fleet.traces import TraceError, read_trace

    try:
        trace = read_trace(path)
    except (TraceError, OSError, ValueError, EOFError) as error:
        raise _refusal(f"--workload: {error}", "docs/simulator-formats.md describes traces") from error
    cached = _cached_tokens(trace) if count_cached else [0] * len(trace.requests)
    rows = sorted(
        zip(trace.requests, cached, strict=True),
        key=lambda row: (row[0].prompt_token_count, row[0].output_token_count, row[0].request_id),
    )
    # Evenly over the lengths: every part of the distribution keeps its share.
    count = min(MAX_SAMPLE_COUNT, len(rows))
    chosen = [rows[(2 * index + 1) * len(rows) // (2 * count)] for index in range(count)]
    samples = tuple(
        LengthSample(request.prompt_token_count, request.output_token_count, tokens)
        for request, tokens in chosen
    )
    notes = []
    if len(rows) > count:
        notes.append(
            f"{count:,} of the {len(rows):,} requests of {path.name} stand for all, evenly by length"
        )
    if any(cached):
        share = sum(cached) / sum(request.prompt_token_count for request in trace.requests)
        notes.append(
            f"{share:.0%} of its prompt tokens were in a prompt before: taken as cached, as if nothing were "
            "ever evicted (--no-prefix-cache: none is)"
        )
    variation = 1.0
    if trace.is_closed_loop:
        if scale is not None:
            raise _refusal("--scale: a trace of sessions has no rate; say requests per second with --rate")
        if rate is None:
            notes.append("a trace of sessions has no rate: planned for as many requests as can be (--rate)")
    else:
        variation = _arrival_variation([request.arrival_s for request in trace.requests])
        if rate is None and trace.duration_s > 0.0:
            rate = len(trace.requests) / trace.duration_s * (scale or 1.0)
    return WorkloadSource(
        samples=samples,
        request_rate=rate or None,
        arrival_variation=variation,
        description=path.name,
        notes=tuple(notes),
    )


def _cached_tokens(trace: Trace) -> list[int]:
    """Return, per request, the leading tokens whose blocks were in a prompt before it."""
    seen: set[int] = set()
    found = []
    for request in trace.requests:
        count = 0
        for block in request.block_hashes:
            if block not in seen:
                break
            count += 1
        seen.update(request.block_hashes)
        # The last token is always computed.
        found.append(min(count * trace.block_token_count, request.prompt_token_count - 1))
    return found


def _arrival_variation(arrivals_s: Sequence[float]) -> float:
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(arrivals_s)]
    mean_s = statistics.fmean(gaps_s) if gaps_s else 0.0
    if mean_s <= 0.0:
        return 1.0
    return min(_MAX_ARRIVAL_VARIATION, statistics.pstdev(gaps_s) / mean_s)


def _refusal(problem: str, hint: str = "") -> CliError:
    return CliError(problem, hint=hint, exit_code=ExitCode.INVALID)


def complete_workload(_ctx: click.Context, _parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Offer the kinds of traffic that are known; files are the shell's."""
    from click.shell_completion import CompletionItem

    found = [
        CompletionItem(name, help=known.about)
        for name, known in KNOWN_TRAFFIC.items()
        if name.startswith(start)
    ]
    return found or [CompletionItem(start, type="file")]
