"""Who decides in a simulation: the production scheduler, or a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sagecp.sim.fleet.engine import FleetEngine
from sagecp.sim.fleet.fleet_file import SimInstance
from sagecp.sim.fleet.outcomes import OutcomeState
from sagecp.sim.fleet.traces import TraceRequest


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request must meet to count as good, in seconds.

    Attributes:
        ttft_s: From arrival to the first token.
        tpot_s: Between tokens after it.
        deadline_s: From arrival to the last token; ``None``: none.
    """

    ttft_s: float
    tpot_s: float
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class ObjectiveRule:
    """Objectives of requests whose trace states none: TTFT grows with the prompt."""

    ttft_base_s: float = 1.0
    ttft_per_1000_tokens_s: float = 0.25
    tpot_s: float = 0.15

    def of(self, request: TraceRequest) -> Objectives:
        """Return a request's objectives: its own where it states them."""
        ttft_s = self.ttft_base_s + self.ttft_per_1000_tokens_s * request.prompt_token_count / 1000.0
        return Objectives(
            ttft_s if request.ttft_slo_ms is None else request.ttft_slo_ms / 1000.0,
            self.tpot_s if request.tpot_slo_ms is None else request.tpot_slo_ms / 1000.0,
            None if request.deadline_ms is None else request.deadline_ms / 1000.0,
        )


class World(Protocol):
    """What a controller may do, and what it may see, in a simulation."""

    @property
    def instances(self) -> Sequence[SimInstance]:
        """The fleet, in a fixed order."""

    @property
    def engines(self) -> Sequence[FleetEngine]:
        """The engines in the same order, for controllers that may see exact state."""

    def start(self, request_id: str, instance_index: int) -> None:
        """Give a request to an engine, now; one that could never hold it refuses, see `on_refused`."""

    def abort(self, request_id: str) -> None:
        """Take a request from its engine, now."""

    def end(self, request_id: str, state: OutcomeState) -> None:
        """Say that a request will not run (any further)."""


class Controller(Protocol):
    """Decides. Every method is told the time, in seconds since the run began."""

    @property
    def name(self) -> str:
        """How reports call it."""

    def begin(self, world: World, now: float) -> None:
        """The run begins: the fleet is there, and idle."""

    def on_arrival(self, request: TraceRequest, objectives: Objectives, now: float) -> None:
        """A request arrives."""

    def on_first_token(self, request_id: str, now: float) -> None:
        """A request got its first token."""

    def on_finished(
        self, request_id: str, output_token_count: int, cached_token_count: int, now: float
    ) -> None:
        """A request got its last token."""

    def on_refused(self, request_id: str, now: float) -> None:
        """An engine refused a request, whose tokens are more than its memory holds."""

    def on_timer(self, now: float) -> None:
        """The time that :meth:`next_timer_s` named has come."""

    def next_timer_s(self) -> float | None:
        """Return when it wants to be called next, whatever happens; ``None``: not at all."""

    def on_gauges(self, instance_index: int, gauges: object, now: float) -> None:
        """An engine's metrics arrived, as old as the simulation says."""
