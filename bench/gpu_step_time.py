"""Step times of a real GPU against the step-time formula.

    python -m bench.gpu_step_time [--quick] [--json FILE]

Needs a CUDA GPU with about 70 GB free, torch and Triton, which are no
dependencies of the project; a full run takes some minutes. It runs the
iterations of an engine with a decoder shaped like Llama 3 8B (random weights,
bfloat16, `bench.gpu_decoder`), each as one CUDA graph, and takes the median of
the graph's durations between CUDA events. From steps with almost no context,
decodes with contexts and single prefill chunks it fits the constants of
`sagecp.core.prediction.step_time`; on mixed batches that the fit has not seen it
reports the formula's error with the fitted constants and with the project's.

The overhead `o` of the formula, an engine's own CPU work between two
iterations, is not in these times: constants are compared without it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found]
import triton  # type: ignore[import-not-found]

from bench.gpu_checks import check_decoder, check_kernels, usable_chunk_attentions
from bench.gpu_decoder import CHUNK_ATTENTIONS, Batch, Chunk, Decoder, DecoderShape
from bench.gpu_kernels import DECODE_TUNINGS, DecodeTuning
from bench.step_time_fit import StepObservation, fit, learn, summarise, without_overhead
from sagecp.core.prediction.priors import prior_for
from sagecp.core.prediction.step_time import StepTimeParameters

_MODEL_NAME = "llama-3-8b"
_MODEL_BILLIONS = 8.03
_BATCH_TOKENS = 2048
_MOST_CACHE_TOKENS = 410_000
# What weights, logits and activations of the largest batch leave free.
_RESERVED_BYTES = 24e9
_SHORT_CHUNK = Chunk(0, 64)
# Whole tiles of a kernel, and some that are not.
_PROBE_CHUNKS = tuple(
    Chunk(start, length)
    for start, length in (
        (0, 2048),
        (8192, 512),
        (8192, 2048),
        (32_768, 2048),
        (16_384, 64),
        (16_384, 256),
        (16_384, 300),
        (16_384, 301),
        (16_384, 384),
        (16_384, 900),
    )
)
_UNITS = {
    "memory_base_s": ("a0", "ms", 1e3),
    "memory_per_token_s": ("a1", "us/token", 1e6),
    "compute_base_s": ("b0", "ms", 1e3),
    "compute_per_token_s": ("b1", "us/token", 1e6),
    "context_per_token_s": ("g", "us/KV token", 1e6),
    "attention_per_token_pair_s": ("d", "ns/pair", 1e9),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of one repeated piece of GPU work, in seconds."""

    median_s: float
    lowest_s: float
    highest_s: float
    repeat_count: int


def measure(work: Callable[[], object], at_least_s: float = 0.3) -> Timing:
    """Capture the work as a CUDA graph and time its replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    first_s = statistics.median(_replay(graph, 3))
    durations = _replay(graph, min(200, max(10, int(at_least_s / first_s))))
    return Timing(statistics.median(durations), min(durations), max(durations), len(durations))


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def ceilings() -> dict[str, float]:
    """Return what the GPU reaches on a pass over a large tensor and on a large matrix product."""
    source = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = measure(lambda: torch.neg(source, out=target))
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = measure(lambda: left @ right)
    return {
        "read_and_write_gb_per_s": 2 * source.nbytes / copy.median_s / 1e9,
        "matrix_tflops": 2 * 8192**3 / product.median_s / 1e12,
    }


def choose_decode_tuning(decoder: Decoder, tunings: Sequence[DecodeTuning]) -> dict[str, float]:
    """Set the decoder's fastest decode attention; return each one's read rate, in GB/s."""
    shape = decoder.shape
    batch = Batch(decode_contexts=(4096,) * 64)
    placement = decoder.place(batch)
    query = torch.randn(64, shape.head_count, shape.head_size, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(query)
    layer_bytes = batch.decode_context_tokens * shape.key_value_bytes / shape.layer_count
    rates: dict[DecodeTuning, float] = {}
    for tuning in tunings:
        decoder.decode_tuning = tuning
        timing = measure(lambda: decoder.attend_decodes(placement, 0, query, out), 0.1)
        rates[tuning] = layer_bytes / timing.median_s / 1e9
    decoder.decode_tuning = max(rates, key=rates.__getitem__)
    return {str(tuning): rate for tuning, rate in rates.items()}


def choose_chunk_attention(
    decoder: Decoder, names: Sequence[str], chunks: Sequence[Chunk]
) -> dict[str, dict[str, float]]:
    """Set the decoder's fastest chunk attention; return each one's rates by chunk, in TFLOP/s."""
    shape = decoder.shape
    rates: dict[str, dict[str, float]] = {}
    totals: dict[str, float] = {}
    for name in names:
        rates[name], totals[name] = {}, 0.0
        for chunk in chunks:
            group = decoder.place(Batch(chunks=(chunk,))).groups[0]
            keys, values = decoder.context_of_group(group, 0)
            size = (1, chunk.length, shape.head_count, shape.head_size)
            query = torch.randn(size, dtype=torch.bfloat16, device="cuda")
            out = torch.empty_like(query)
            attend = CHUNK_ATTENTIONS[name]
            duration_s = measure(lambda: attend(query, keys, values, out), 0.1).median_s  # noqa: B023
            pairs = Batch(chunks=(chunk,)).token_pairs
            flops = 4 * shape.head_count * shape.head_size * pairs
            rates[name][f"{chunk.length} at {chunk.start}"] = flops / duration_s / 1e12
            totals[name] += duration_s
    decoder.attend_chunks = CHUNK_ATTENTIONS[min(totals, key=totals.__getitem__)]
    return rates


def calibration_batches(quick: bool, cache_tokens: int) -> dict[str, list[Batch]]:
    """Return what the constants are fitted to, by family."""
    decode_counts = (1, 64, 256) if quick else (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
    short_counts = (8, 32) if quick else (5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32)
    grid_counts = (8, 128) if quick else (1, 8, 32, 64, 128, 256)
    contexts = (1024, 8192) if quick else (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16_384, 32_768)
    lengths = (512, 2048) if quick else (512, 1024, 2048)
    starts = (0, 16_384) if quick else (0, 2048, 4096, 8192, 16_384, 24_576, 32_768)
    families = {
        "linear": [Batch(decode_contexts=(1,) * count) for count in decode_counts]
        + [Batch(chunks=(_SHORT_CHUNK,) * count) for count in short_counts],
        "decode": [
            Batch(decode_contexts=(context,) * count) for count in grid_counts for context in contexts
        ],
        "prefill": [Batch(chunks=(Chunk(start, length),)) for length in lengths for start in starts],
    }
    return {
        family: [batch for batch in batches if batch.cache_tokens <= cache_tokens]
        for family, batches in families.items()
    }


def held_out_batches(quick: bool, cache_tokens: int, seed: int) -> dict[str, list[Batch]]:
    """Return random batches of the sort that an engine runs, by family."""
    generator = random.Random(seed)
    count = 2 if quick else 12

    def decodes() -> tuple[int, ...]:
        return tuple(
            min(16_384, max(16, int(generator.lognormvariate(7.2, 0.9))))
            for _ in range(generator.randint(4, 224))
        )

    def chunk(length: int) -> Chunk:
        return Chunk(generator.choice((0, generator.randint(0, 4096), generator.randint(0, 24_576))), length)

    def full() -> Batch:
        contexts = decodes()
        return Batch(contexts, (chunk(_BATCH_TOKENS - len(contexts)),))

    def part() -> Batch:
        contexts = decodes()
        length = generator.randint(32, _BATCH_TOKENS - len(contexts))
        return Batch(contexts, (chunk(length),))

    def two() -> Batch:
        contexts = decodes()
        room = _BATCH_TOKENS - len(contexts)
        length = generator.randint(64, room - 64)
        return Batch(contexts, (chunk(length), chunk(room - length)))

    def fitting(make: Callable[[], Batch]) -> list[Batch]:
        batches: list[Batch] = []
        while len(batches) < count:
            batch = make()
            if batch.cache_tokens <= cache_tokens:
                batches.append(batch)
        return batches

    return {
        "decodes and a chunk, budget full": fitting(full),
        "decodes and a chunk, budget not full": fitting(part),
        "decodes and two chunks, budget full": fitting(two),
        "decodes of mixed contexts": fitting(lambda: Batch(decodes())),
        "one chunk": fitting(lambda: Batch(chunks=(chunk(generator.randint(32, _BATCH_TOKENS)),))),
    }


def observe(decoder: Decoder, family: str, batch: Batch) -> tuple[StepObservation, Timing]:
    """Measure one batch."""
    placement = decoder.place(batch)
    timing = measure(lambda: decoder.run_and_pick(placement))
    observation = StepObservation(
        family,
        batch.token_count,
        len(batch.decode_contexts),
        batch.decode_context_tokens,
        batch.token_pairs,
        timing.median_s,
    )
    print(
        f"{family}: T {observation.token_count}, decodes {observation.decode_count}, "
        f"KV {observation.decode_context_tokens}, pairs {observation.token_pairs:.0f}: "
        f"{timing.median_s * 1e3:.3f} ms ({timing.lowest_s * 1e3:.3f} to {timing.highest_s * 1e3:.3f})",
        file=sys.stderr,
        flush=True,
    )
    return observation, timing


def observe_all(
    decoder: Decoder, families: dict[str, list[Batch]], seed: int
) -> list[tuple[StepObservation, Timing]]:
    """Measure all batches in random order, so that a drift of the GPU's clock favours no family."""
    work = [(family, batch) for family, batches in families.items() for batch in batches]
    random.Random(seed).shuffle(work)
    return [observe(decoder, family, batch) for family, batch in work]


def constants_table(named: dict[str, StepTimeParameters], reference: str) -> str:
    """Return a Markdown table of constants, the reference's first, others with their ratio to it."""
    others = [name for name in named if name != reference]
    lines = [
        "| constant | " + " | ".join([reference, *(f"{name} | ratio" for name in others)]) + " |",
        "|---" * (2 + 2 * len(others)) + "|",
    ]
    for field, (symbol, unit, scale) in _UNITS.items():
        base = getattr(named[reference], field)
        cells = [f"{symbol}, {unit}", f"{base * scale:.3g}"]
        for name in others:
            value = getattr(named[name], field)
            cells += [f"{value * scale:.3g}", f"{value / base:.2f}" if base else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def errors_table(observations: Sequence[StepObservation], named: dict[str, StepTimeParameters]) -> str:
    """Return a Markdown table of relative errors: mean absolute / largest / bias / share within 10 %."""
    lines = [
        "| steps | count | " + " | ".join(named) + " |",
        "|---" * (2 + len(named)) + "|",
    ]
    families = list(dict.fromkeys(observation.family for observation in observations))
    for family in [*sorted(families), *(["all"] if len(families) > 1 else [])]:
        chosen = [step for step in observations if family in {"all", step.family}]
        cells = [family, str(len(chosen))]
        for parameters in named.values():
            summary = summarise(chosen, parameters)
            cells.append(
                f"{summary.mean:.1%} / {summary.worst:.1%} / {summary.bias:+.1%} / {summary.within_bar:.0%}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _records(measured: Sequence[tuple[StepObservation, Timing]]) -> list[dict[str, Any]]:
    return [asdict(observation) | asdict(timing) for observation, timing in measured]


def main() -> int:
    """Check, measure, fit and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes: to see that it runs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--seed", type=int, default=0, help="of weights, held-out batches and order")
    arguments = parser.parse_args()
    began_s = time.monotonic()
    gpu_name = torch.cuda.get_device_name()
    prior = prior_for(gpu_name, _MODEL_NAME, parameter_count_billions=_MODEL_BILLIONS)
    project = without_overhead(prior.parameters)
    with torch.inference_mode():
        print(f"largest errors of the kernels: {check_kernels()}", file=sys.stderr)
        names = usable_chunk_attentions(CHUNK_ATTENTIONS)
        print(f"largest errors of whole steps: {check_decoder(names)}", file=sys.stderr)
        limits = ceilings()
        shape = DecoderShape()
        free_bytes = torch.cuda.mem_get_info()[0] - _RESERVED_BYTES
        cache_tokens = min(_MOST_CACHE_TOKENS, int(free_bytes / shape.key_value_bytes))
        decoder = Decoder(shape, cache_tokens, seed=arguments.seed)
        tunings = DECODE_TUNINGS[:2] if arguments.quick else DECODE_TUNINGS
        decode_rates = choose_decode_tuning(decoder, tunings)
        chunk_rates = choose_chunk_attention(decoder, names, _PROBE_CHUNKS)
        calibration = observe_all(decoder, calibration_batches(arguments.quick, cache_tokens), arguments.seed)
        held_out = observe_all(
            decoder, held_out_batches(arguments.quick, cache_tokens, arguments.seed), arguments.seed
        )
        again = [
            observe(decoder, "again", batch)
            for batch in (
                Batch(decode_contexts=(1,)),
                Batch(decode_contexts=(1024,) * 128),
                Batch(chunks=(Chunk(0, 2048),)),
            )
        ]
    steps = [observation for observation, _ in calibration]
    named = {
        f"project ({prior.source})": project,
        "fitted": fit(steps),
        "learned from the project's": learn(steps, project, arguments.seed),
    }
    seen = [observation for observation, _ in held_out]
    environment = {
        "gpu": gpu_name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cache_tokens": cache_tokens,
        "decode_attention": str(decoder.decode_tuning),
        "chunk_attention": next(n for n, f in CHUNK_ATTENTIONS.items() if f is decoder.attend_chunks),
        "duration_s": round(time.monotonic() - began_s, 1),
    }
    print("\n".join(f"* {name}: {value}" for name, value in environment.items()))
    print("\n".join(f"* {name}: {value:.0f}" for name, value in limits.items()))
    print(f"* decode attention, GB/s: { {name: round(rate) for name, rate in decode_rates.items()} }")
    for name, rates in chunk_rates.items():
        print(f"* {name} attention, TFLOP/s: { {where: round(rate) for where, rate in rates.items()} }")
    print(f"\n{constants_table(named, next(iter(named)))}")
    print(f"\nCalibration: mean / largest / bias / within 10 %\n\n{errors_table(steps, named)}")
    print(f"\nHeld out: mean / largest / bias / within 10 %\n\n{errors_table(seen, named)}")
    if arguments.json:
        record = {
            "environment": environment,
            "ceilings": limits,
            "decode_attention_gb_per_s": decode_rates,
            "chunk_attention_tflops": chunk_rates,
            "constants": {name: asdict(parameters) for name, parameters in named.items()},
            "calibration": _records(calibration),
            "held_out": _records(held_out),
            "again": _records(again),
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
