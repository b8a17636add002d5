"""What all baselines share: a request is bound when it arrives, and the engines queue."""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sagecp.core.types import EngineGauges
from sagecp.sim.fleet.baselines.ledger import InstanceLedger
from sagecp.sim.fleet.baselines.prefixes import PREFIX_SOURCES, PrefixView, prefix_view
from sagecp.sim.fleet.baselines.views import ExactView, FleetView, ReportedView
from sagecp.sim.fleet.controller import Objectives, World
from sagecp.sim.fleet.outcomes import OutcomeState
from sagecp.sim.fleet.traces import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineParameters:
    """Parameters of every baseline.

    Attributes:
        name: How reports call it; empty: its name in the registry.
        stale: Whether it sees reports of metrics only, as old as the simulation
            delivers them, instead of the engines' exact state.
        prefix_source: What it knows of prefix caches: ``engine``, exactly; or
            ``dispatches``, a model kept from its own dispatches, which also knows what is
            queued. A stale baseline uses ``dispatches``.
    """

    name: str = ""
    stale: bool = False
    prefix_source: str = "engine"

    def __post_init__(self) -> None:
        if self.prefix_source not in PREFIX_SOURCES:
            raise ValueError(
                f"prefix_source must be one of {', '.join(PREFIX_SOURCES)}, not {self.prefix_source!r}"
            )


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to be placed.

    Attributes:
        request: As in the trace.
        objectives: What it must meet.
        candidates: Indices of the instances that serve its model and have room for its length; never empty.
        now: The time, seconds since the run began.
    """

    request: TraceRequest
    objectives: Objectives
    candidates: tuple[int, ...]
    now: float


class Baseline(abc.ABC):
    """A controller that places each request when it arrives; :meth:`choose` says where.

    Subclasses read ``view``, ``prefixes`` and ``ledgers``, which exist from
    :meth:`begin` on, and draw from ``generator`` only.

    Args:
        parameters: Its parameters.
        seed: Of its generator.
    """

    registry_name = ""

    view: FleetView
    prefixes: PrefixView
    world: World
    ledgers: list[InstanceLedger]

    def __init__(self, parameters: BaselineParameters, seed: int = 0) -> None:
        self._parameters = parameters
        self._placed: dict[str, tuple[int, TraceRequest]] = {}
        self.generator = random.Random(seed)

    @property
    def name(self) -> str:
        """How reports call it."""
        return self._parameters.name or self.registry_name

    @abc.abstractmethod
    def choose(self, arrival: Arrival) -> int | None:
        """Return the index of one of the candidates; ``None`` rejects the request."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Look at the fleet before the first request."""

    def begin(self, world: World, now: float) -> None:
        """Take the fleet."""
        self.world = world
        self.ledgers = [InstanceLedger() for _ in world.instances]
        stale = self._parameters.stale
        self.view = ReportedView(world, self.ledgers) if stale else ExactView(world, self.ledgers)
        self.prefixes = prefix_view("dispatches" if stale else self._parameters.prefix_source, world)
        self.prepare()

    def on_arrival(self, request: TraceRequest, objectives: Objectives, now: float) -> None:
        """Place a request, or reject it."""
        candidates = self.candidates(request)
        arrival = Arrival(request, objectives, candidates, now)
        index = self.choose(arrival) if candidates else None
        if index is None:
            self.world.end(request.request_id, OutcomeState.REJECTED)
        else:
            self.place(request, index, now)

    def place(self, request: TraceRequest, index: int, now: float) -> None:
        """Give a request to an instance, and note it."""
        cached_token_count = self.prefixes.cached_token_count(index, request)
        self.ledgers[index].dispatched(
            request.request_id, request.prompt_token_count, cached_token_count, now
        )
        self.view.dispatched(index, request.prompt_token_count - cached_token_count)
        self.prefixes.dispatched(index, request)
        self._placed[request.request_id] = index, request
        self.world.start(request.request_id, index)

    def on_first_token(self, request_id: str, now: float) -> None:
        """Note it."""
        self.ledgers[self._placed[request_id][0]].first_token(request_id, now)

    def on_finished(
        self, request_id: str, output_token_count: int, cached_token_count: int, now: float
    ) -> None:
        """Note it."""
        index, request = self._placed.pop(request_id)
        self.ledgers[index].finished(request_id)
        self.prefixes.finished(index, request)

    def on_refused(self, request_id: str, now: float) -> None:
        """Never called: candidates have room for what they are given."""
        raise AssertionError(f"{self.name} gave {request_id!r} to an engine without room for it")

    def on_timer(self, now: float) -> None:  # noqa: B027 - there is no timer
        """Do nothing: everything is decided at arrival."""

    def next_timer_s(self) -> float | None:
        """Return ``None``: everything is decided at arrival."""
        return None

    def on_gauges(self, instance_index: int, gauges: object, now: float) -> None:
        """Note a report."""
        assert isinstance(gauges, EngineGauges)  # noqa: S101 - reports carry nothing else
        self.view.reported(instance_index, gauges)

    def least(self, indices: Iterable[int], cost: Callable[[int], float]) -> int:
        """Return an index of least cost, any of them where several are equal."""
        best: list[int] = []
        best_cost = 0.0
        for index in indices:
            index_cost = cost(index)
            if not best or index_cost < best_cost:
                best, best_cost = [index], index_cost
            elif index_cost == best_cost:
                best.append(index)
        return best[0] if len(best) == 1 else self.generator.choice(best)

    def candidates(self, request: TraceRequest) -> tuple[int, ...]:
        """Return the instances that serve a request's model and have room for its length."""
        # An engine refuses what can never fit, whoever sends it.
        token_count = request.prompt_token_count + request.output_token_count
        return tuple(
            index
            for index, (instance, engine) in enumerate(
                zip(self.world.instances, self.world.engines, strict=True)
            )
            if token_count <= engine.kv_token_capacity and request.model in ("", instance.model)
        )
