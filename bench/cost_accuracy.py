"""What requests are charged against what engines did, and what was predicted against what was charged.

`python -m bench.cost_accuracy`: recorded conversations on simulated fleets at several loads. A
line per run: busy time as it was metered and as the engines spent it, the costs of all requests
together against the price of that time, and the bias, median error, 90 % error and coverage of
the predictions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.sim.fleet.experiment import Workload
from sagecp.sim.fleet.scheduler_controller import SchedulerController, SchedulerSetup
from sagecp.sim.fleet.simulation import Simulation

TRACES = Path(__file__).parent / "traces"
# Trace, fleet, and how many times as fast requests arrive as they did.
RUNS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("azure_conversation.csv", "2x8b-h100", (0.1, 0.5, 1.0, 3.0)),
    ("azure_conversation.csv", "8b-h100+2x8b-a100", (1.0, 3.0)),
    ("mooncake_conversation.jsonl", "4x70b-h100-tp4", (0.3, 1.0)),
)


def run(trace_path: Path, fleet: str, scale: float) -> None:
    """Simulate, and print a line."""
    workload = Workload(trace_path=trace_path, fleet=fleet)
    trace = workload.trace(scale, 0)
    charged_usd: list[float] = []

    def listen(_now: float, _event: ev.Event, effects: Sequence[fx.Effect]) -> None:
        charged_usd.extend(
            each.record.spent_usd or 0.0 for each in effects if isinstance(each, fx.RequestEnded)
        )

    controller = SchedulerController(
        SchedulerSetup(scheduling_policy="slo_aware"), trace.block_token_count, listener=listen
    )
    result = Simulation(trace, workload.instances(), controller).run()
    meters = [instance.meter for instance in controller.scheduler.fleet]
    metered_s = sum(meter.busy_s(result.end_s) for meter in meters)
    busy_usd = sum(meter.busy_usd(result.end_s) for meter in meters)
    found = controller.scheduler.book.accuracy.summary()["cost"]
    print(
        f"{trace_path.name[:24]:24} {fleet:18} {scale:5.2f} {len(charged_usd):9,} "
        f"{metered_s:10.1f} {sum(result.busy_s):10.1f} {sum(charged_usd) / busy_usd:9.6f} "
        f"{found.bias_ratio:6.2f} {found.median_error_ratio:7.0%} {found.p90_error_ratio:7.0%} "
        f"{found.upper_coverage or 0.0:9.1%}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, help="this trace, with --fleet and --scale")
    parser.add_argument("--fleet", default="2x8b-h100")
    parser.add_argument("--scale", type=float, action="append", help="may be repeated; default: 1")
    arguments = parser.parse_args()
    print(
        f"{'trace':24} {'fleet':18} {'scale':>5} {'requests':>9} {'metered s':>10} {'engines s':>10} "
        f"{'charged':>9} {'bias':>6} {'median':>7} {'p90':>7} {'within p90'}"
    )
    if arguments.trace is not None:
        for scale in arguments.scale or (1.0,):
            run(arguments.trace, arguments.fleet, scale)
        return
    for name, fleet, scales in RUNS:
        for scale in scales:
            run(TRACES / name, fleet, scale)


if __name__ == "__main__":
    main()
