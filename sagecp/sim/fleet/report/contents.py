"""What a report is made from: what was asked, and what came out."""

from __future__ import annotations

from dataclasses import dataclass

from sagecp.sim.fleet.experiment import Bounds, Contender, RunResult, Workload
from sagecp.sim.fleet.fleet_file import SimInstance


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContents:
    """Everything that a report says, and nothing of the machine or the moment that it was made on.

    Attributes:
        command: The command line that makes it again.
        version: Of the program.
        trace_name: For people.
        trace_request_count: Requests of the window at scale 1 and the first seed.
        trace_duration_s: Its length, likewise.
        contenders: In the order in which they are shown.
        runs: Of every contender at every scale with every seed.
        bounds: At every scale with every seed; empty: none were asked for.
        event_log_names: Files beside the report.
    """

    command: str
    version: str
    workload: Workload
    fleet: tuple[SimInstance, ...]
    trace_name: str
    trace_request_count: int
    trace_duration_s: float
    is_closed_loop: bool
    contenders: tuple[Contender, ...]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    runs: tuple[RunResult, ...]
    bounds: tuple[Bounds, ...] = ()
    event_log_names: tuple[str, ...] = ()

    @property
    def load_unit(self) -> str:
        """What the load counts per second."""
        return "session starts" if self.is_closed_loop else "requests"

    def runs_of(self, label: str, scale: float | None = None) -> tuple[RunResult, ...]:
        """Return a contender's runs, at one scale or at all of them."""
        return tuple(run for run in self.runs if run.label == label and (scale is None or run.scale == scale))
