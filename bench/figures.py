"""The scheduling figures of docs/scheduling.md: policies against baselines on every workload.

    python -m bench.figures --out figures                # everything: about an hour of two cores
    python -m bench.figures --out figures --only mooncake
    python -m bench.figures --out figures --quick        # short windows and one seed: to see that it runs

Each experiment is one `sagecp simulate compare`, whose command line is printed,
and leaves a page and a JSON file in a folder of its name.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.processes import machine

_WORKLOADS = Path(__file__).parent / "workloads"
# With the parameters that `python -m bench.tune_baselines` found best.
_EARLY = (
    "min_ttft",
    "reject:min_ttft_reject?ttft_margin=0.9",
    "llmd_predicted:llmd_predicted_latency?ttft_weight=0.6",
    "dynamo:dynamo?overlap_weight=2&prefill_weight=16&prefix_source=dispatches",
    "llmd_default",
)
# Late binding alone, with exact knowledge of the engines: to tell what the rest is worth.
_LATE = ("sjf_late", "edf_late")


@dataclass(frozen=True, slots=True)
class Experiment:
    """One comparison.

    Attributes:
        trace: File of a workload.
        fleet: As `sagecp simulate` takes it.
        scales: Arrivals relative to the trace.
        duration_s: Window of the trace, at its own speed.
        seed_count: Windows.
        policies: Settings of the scheduler, as `compare` writes them.
        baselines: What they are held against.
        options: More options.
    """

    trace: str
    fleet: str
    scales: str
    duration_s: float
    seed_count: int
    policies: tuple[str, ...]
    baselines: tuple[str, ...]
    options: tuple[str, ...] = ()

    def command(self, out: Path, *, quick: bool) -> list[str]:
        """Return the arguments of `sagecp`."""
        scales = self.scales.split(",")[-1] if quick else self.scales
        return [
            "simulate", "compare",
            "--trace", str(_WORKLOADS / self.trace),
            "--fleet", self.fleet,
            "--scale", scales,
            "--duration", f"{self.duration_s / 10 if quick else self.duration_s:g}s",
            "--seeds", "1" if quick else str(self.seed_count),
            "--policies", ",".join(self.policies),
            "--baselines", ",".join(self.baselines) or "none",
            *self.options,
            "--out", str(out),
        ]  # fmt: skip


EXPERIMENTS: Mapping[str, Experiment] = {
    "mooncake": Experiment(
        "mooncake_conv_a.jsonl.gz", "8x70b-h100-tp4", "1,1.4,1.6,1.8,2,2.2,2.5,2.8", 600, 5,
        ("slo_aware", "adaptive"), (*_EARLY, *_LATE),
    ),
    # The whole file: a window of 600 s at 2x is over in five minutes, too soon for a backlog to show.
    "mooncake_whole": Experiment(
        "mooncake_conv_a.jsonl.gz", "8x70b-h100-tp4", "1.6,1.8,2,2.2,2.5", 1767, 1,
        ("slo_aware", "adaptive"), ("min_ttft", "reject:min_ttft_reject?ttft_margin=0.9", *_LATE),
    ),
    "stale": Experiment(
        "mooncake_conv_a.jsonl.gz", "8x70b-h100-tp4", "1.4,1.8,2", 600, 5,
        ("slo_aware",), (),
        ("--stale", "500ms", "--event-delay", "20ms", "--model-error", "0.25", "--no-bounds"),
    ),
    "slow_instance": Experiment(
        "mooncake_conv_a.jsonl.gz", "8x70b-h100-tp4", "1,1.4", 600, 3,
        ("slo_aware",), ("min_ttft", "least_connections"), ("--slow", "0@60s=10", "--no-bounds"),
    ),
    "synthetic": Experiment(
        "mooncake_synth.jsonl.gz", "8x70b-h100-tp4", "1,1.3,1.6,1.8,2", 300, 3,
        ("slo_aware", "adaptive"), (*_EARLY[:3], *_LATE),
    ),
    "azure_code": Experiment(
        "azure23_code_a.csv.gz", "8b-mixed", "2,4,6,8,10,12", 300, 5,
        ("slo_aware", "adaptive", "cost_optimized"), (*_EARLY[:3], "sjf_late"),
    ),
    "azure_conversation": Experiment(
        "azure23_conv_a.csv.gz", "8b-mixed", "10,12,14,16,17,18", 1200, 3,
        ("slo_aware",), (*_EARLY[:3], "sjf_late"), ("--no-bounds",),
    ),
    "tenants": Experiment(
        "servegen_mlarge_a.csv.gz", "8x70b-h100-tp4", "8,10,12,16", 1000, 3,
        ("priority", "slo_aware", "fifo"), ("min_ttft", "least_connections"), ("--no-bounds",),
    ),
    "reasoning": Experiment(
        "servegen_r1_a.csv.gz", "8x70b-h100-tp4", "2,3,4", 800, 3,
        ("slo_aware",), (*_EARLY[:3], "sjf_late"), ("--no-bounds",),
    ),
    "sessions": Experiment(
        "agentic_coding_a.jsonl.gz", "2x70b-h100-tp8", "0.2,0.5,1,2,4", 1200, 3,
        ("slo_aware", "slo_aware/locality", "slo_aware/affinity"),
        (*_EARLY[:3], "consistent_hash:consistent_hash?load_bound=1.1"),
        ("--sessions-per-s", "0.05", "--longest-think", "60s"),
    ),
}  # fmt: skip


def main() -> int:
    """Run the experiments; return 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--only", action="append", choices=tuple(EXPERIMENTS), help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="short windows, one seed")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    failed = []
    for name in arguments.only or EXPERIMENTS:
        command = EXPERIMENTS[name].command(arguments.out / name, quick=arguments.quick)
        print(f"\n## {name}\n\nsagecp {shlex.join(command)}\n", flush=True)
        if subprocess.run([sys.executable, "-m", "sagecp", *command], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
