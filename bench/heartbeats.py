"""CPU and memory of the control plane under the heartbeats of a fleet.

    python -m bench.heartbeats [--preset 1000x1s | 10000x5s] [--gpus 8] [--engines-per-agent 1]

Agents register instances with their GPUs, open a stream each, and send the beats
of their engines, every one acknowledged: all gauges with quantiles, eight GPUs with
all that NVML gives, the lease token and the time; from beat to beat all figures of
a busy host change. Then the same against a server that acknowledges and does
nothing else: what is gRPC's own of it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.heartbeat_agents import AgentPlan, AgentProcess, BeatCounts
from bench.processes import Measured, control_plane, machine, print_side_by_side, served_by, write_json

_PRESETS = {"1000x1s": (1000, 1.0), "10000x5s": (10_000, 5.0)}


@dataclass(frozen=True, slots=True)
class _Figures:
    """Of one server.

    Attributes:
        due_count: Beats that agents that are never late would have sent.
        agents_cpu_s: CPU time of the agents.
    """

    wall_s: float
    cpu_s: float
    idle_mib: float
    resident_mib: float
    due_count: float
    sent_count: int
    acknowledged_s: list[float]
    agents_cpu_s: float

    def rows(self) -> dict[str, float]:
        count = len(self.acknowledged_s)
        return {
            "CPU, cores": self.cpu_s / self.wall_s,
            "CPU us per beat": self.cpu_s / max(1, count) * 1e6,
            "resident MiB": self.resident_mib,
            "resident MiB before": self.idle_mib,
            "beats due": self.due_count,
            "beats sent": self.sent_count,
            "beats acknowledged": count,
            "beats per second": count / self.wall_s,
            "acknowledged after, p50 ms": statistics.median(self.acknowledged_s) * 1000,
            "acknowledged after, p99 ms": self.acknowledged_s[int(count * 0.99)] * 1000,
            "CPU of the agents, cores": self.agents_cpu_s / self.wall_s,
        }


def _plans(address: str, arguments: argparse.Namespace) -> list[AgentPlan]:
    generators = arguments.generators
    shares = [(arguments.agents + generators - 1 - place) // generators for place in range(generators)]
    return [
        AgentPlan(
            address,
            sum(shares[:place]),
            share,
            max(1, min(share, arguments.connections // generators)),
            arguments.engines_per_agent,
            arguments.gpus,
            arguments.interval,
        )
        for place, share in enumerate(shares)
    ]


def _measure(server: Measured, arguments: argparse.Namespace) -> _Figures:
    idle_mib = server.resident_mib()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(AgentProcess(plan)) for plan in _plans(server.address, arguments)]
        for process in processes:
            process.wait_until_ready()
        # What came of the start is over, and every figure is from a beat like the others.
        time.sleep(2 * arguments.interval)
        for process in processes:
            process.start()
        cpu_s, started_s = server.cpu_s(), time.monotonic()
        time.sleep(arguments.seconds)
        cpu_s, wall_s = server.cpu_s() - cpu_s, time.monotonic() - started_s
        resident_mib = server.resident_mib()
        counts: list[BeatCounts] = [process.stop() for process in processes]
    return _Figures(
        wall_s,
        cpu_s,
        idle_mib,
        resident_mib,
        arguments.agents * arguments.engines_per_agent * wall_s / arguments.interval,
        sum(each.sent for each in counts),
        sorted(value for each in counts for value in each.acknowledged_s),
        sum(each.cpu_s for each in counts),
    )


@contextlib.contextmanager
def _configured_control_plane(interval_s: float, instance_count: int) -> Iterator[Measured]:
    # Leases must outlive the interval: the default of 6 s is made for beats every second.
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(
            f"[scheduler]\nlease_duration_s = {max(6.0, 3 * interval_s):g}\n"
            f"max_instance_count = {max(10_000, instance_count)}\n"
        )
        config.flush()
        with control_plane("--config", config.name) as server:
            yield server


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(_PRESETS), help="sets --agents and --interval")
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--engines-per-agent", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of each engine")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--connections", type=int, default=1000, help="in all; agents share them")
    parser.add_argument("--generators", type=int, default=1, help="processes of agents")
    parser.add_argument("--no-floor", action="store_true", help="leave out the server that does nothing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.preset:
        arguments.agents, arguments.interval = _PRESETS[arguments.preset]
    instance_count = arguments.agents * arguments.engines_per_agent
    figures: dict[str, dict[str, float]] = {}
    with _configured_control_plane(arguments.interval, instance_count) as server:
        figures["sagecp"] = _measure(server, arguments).rows()
    if not arguments.no_floor:
        with served_by("bench.bare_heartbeats") as server:
            figures["bare gRPC"] = _measure(server, arguments).rows()
    print(
        f"\n{machine()}; {arguments.agents} agents of {arguments.engines_per_agent} engines with "
        f"{arguments.gpus} GPUs each, a beat per {arguments.interval:g} s each, in {arguments.seconds:g} s\n"
    )
    print_side_by_side(figures)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
