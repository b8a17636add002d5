"""Searches the parameters of the simulator's baselines, so that they are compared at their best.

    python -m bench.tune_baselines --case TRACE FLEET SCALE[,SCALE] [--case ...] [--only dynamo] [--seeds 0,1]

Every combination of a small grid runs on every case at every scale and seed
(a seed rotates the trace: another window). What counts is the mean of the
attainment over all of them. A table per baseline shows the best combinations
and the one that is the default. Use traces for development only, and check the
winner on seeds that the search did not see: ``--only NAME --seeds 2,3``.

A combination takes about a second per run of 600 s of trace.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import machine, print_table
from sagecp.sim.fleet.baselines.registry import make_baseline
from sagecp.sim.fleet.fleet_file import SimInstance, read_fleet
from sagecp.sim.fleet.simulation import Simulation
from sagecp.sim.fleet.statistics import RunStatistics, summarise
from sagecp.sim.fleet.traces import Trace, read_trace, transform

_SOURCES = ("engine", "dispatches")

# What is tried of each parameter.
GRIDS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "llmd_default": {
        "queue_weight": (1.0, 2.0, 4.0),
        "kv_weight": (1.0, 2.0, 4.0),
        "prefix_weight": (1.0, 3.0, 6.0),
        "prefix_source": _SOURCES,
    },
    "dynamo": {
        "overlap_weight": (0.5, 1.0, 2.0),
        "prefill_weight": (1.0, 4.0, 8.0, 16.0, 64.0),
        "prefix_source": _SOURCES,
    },
    "cache_aware": {
        "balance_abs": (2, 4, 8, 16, 64),
        "balance_rel": (1.5, 2.0),
        "match_threshold": (0.1, 0.3, 0.5),
        "prefix_source": _SOURCES,
    },
    "consistent_hash": {
        "load_bound": (0.0, 1.1, 1.25, 1.5, 2.0),
        "key_block_count": (1, 2, 4, 8),
    },
    "min_ttft": {"prefix_source": _SOURCES},
    "min_ttft_reject": {
        "ttft_margin": (0.9, 1.0, 1.15, 1.3),
        "tpot_margin": (0.0, 1.0, 1.2),
        "prefix_source": _SOURCES,
    },
    "llmd_predicted_latency": {
        "headroom": ("most",),
        "affinity_gates": ((), (0.99, 0.8)),
        "affinity_penalty_s": (1.0, 5.0),
        "ttft_weight": (0.6, 0.8, 1.0),
        "prefix_source": _SOURCES,
    },
}


@dataclass(frozen=True, slots=True)
class Case:
    """One load on one fleet."""

    name: str
    trace: Trace
    fleet: tuple[SimInstance, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A combination, and what came of it on every case."""

    parameters: Mapping[str, Any]
    runs: tuple[RunStatistics, ...]

    @property
    def attainment(self) -> float:
        """Mean over the cases."""
        return statistics.fmean(run.attainment or 0.0 for run in self.runs)

    @property
    def token_weighted_attainment(self) -> float:
        """Mean over the cases."""
        return statistics.fmean(run.token_weighted_attainment or 0.0 for run in self.runs)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the loads that the arguments name."""
    for path, fleet_name, scales in arguments.case:
        trace, fleet = read_trace(Path(path)), read_fleet(fleet_name)
        for scale, seed in itertools.product(map(float, scales.split(",")), arguments.seeds):
            part = transform(
                trace, scale=scale, start_s=arguments.start, duration_s=arguments.duration, seed=seed
            )
            yield Case(f"{trace.name} {scale:g}x seed {seed}", part, fleet)


def run(name: str, parameters: Mapping[str, Any], loads: Sequence[Case]) -> Row:
    """Run one combination on every load."""
    runs = []
    for load in loads:
        result = Simulation(load.trace, load.fleet, make_baseline(name, 0, **parameters)).run()
        runs.append(summarise(result.outcomes, load.fleet, duration_s=load.trace.duration_s))
    return Row(parameters, tuple(runs))


def _words(parameters: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in parameters.items()) or "(defaults)"


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", nargs=3, action="append", required=True, metavar=("TRACE", "FLEET", "SCALES")
    )
    parser.add_argument("--only", action="append", choices=tuple(GRIDS), help="search this one only")
    parser.add_argument("--start", type=float, default=0.0, help="start of the window, s of trace")
    parser.add_argument("--duration", type=float, default=600.0, help="length of the window, s of trace")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--top", type=int, default=5, help="combinations to show per baseline")
    arguments = parser.parse_args()
    loads = tuple(cases(arguments))
    print(f"{machine()}; cases: {', '.join(load.name for load in loads)}\n", flush=True)
    for name in arguments.only or GRIDS:
        started_s = time.process_time()
        grid = GRIDS[name]
        rows = [
            run(name, dict(zip(grid, values, strict=True)), loads)
            for values in itertools.product(*grid.values())
        ]
        rows.sort(key=lambda row: -row.attainment)
        print(f"## {name}: {len(rows)} combinations, {time.process_time() - started_s:.0f} s of CPU\n")
        print_table(
            ("attainment", "by tokens", "each case", "parameters"),
            [
                (
                    f"{row.attainment:.3f}",
                    f"{row.token_weighted_attainment:.3f}",
                    " ".join(f"{each.attainment:.3f}" for each in row.runs),
                    _words(row.parameters),
                )
                for row in (*rows[: arguments.top], run(name, {}, loads))
            ],
        )
        print(flush=True)


if __name__ == "__main__":
    main()
