"""What a baseline may see of the fleet: the engines' exact state, or what was reported of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sagecp.core.types import EngineGauges
from sagecp.sim.fleet.baselines.ledger import Backlog, InstanceLedger
from sagecp.sim.fleet.controller import World
from sagecp.sim.fleet.engine import FleetEngine


@dataclass(frozen=True, slots=True)
class InstanceState:
    """One instance as a baseline sees it.

    Attributes:
        request_count: Requests that have not ended.
        waiting_count: Those in the engine's queue.
        kv_usage: Share of its KV blocks that are held, from 0 to 1.
        held_token_count: Tokens that those blocks have room for.
        decode_count: Requests that decode.
        decode_context_token_count: Sum of their contexts.
        backlog: Prefill before a new request's.
        is_prefilling: Whether part of the backlog is in the step in progress.
        slowness: Factor on the duration of its steps.
    """

    request_count: int
    waiting_count: int
    kv_usage: float
    held_token_count: float
    decode_count: int
    decode_context_token_count: int
    backlog: Backlog
    is_prefilling: bool
    slowness: float


class FleetView(Protocol):
    """Tells the state of instances by index."""

    def request_count(self, index: int) -> int:
        """Return the requests of an instance that have not ended."""

    def queued_prefill_token_count(self, index: int, now: float) -> float:
        """Return the prompt tokens that an instance has still to prefill."""

    def state(self, index: int, now: float) -> InstanceState:
        """Return all that is known of an instance."""

    def reported(self, index: int, gauges: EngineGauges) -> None:
        """Take in a report of an engine's metrics."""

    def dispatched(self, index: int, uncached_token_count: int) -> None:
        """Take notice of a dispatch."""


def bring_up_to(engine: FleetEngine, now: float) -> None:
    """Let an engine's properties say what is true now, and not at its latest event.

    Raises:
        RuntimeError: Something happened before now that the simulation has not told.
    """
    if engine.advance(now):
        raise RuntimeError(f"an engine had events before {now} s that nobody was told of")


class ExactView:
    """Reads the engines themselves.

    Args:
        world: The simulation.
        ledgers: The dispatches to each instance.
    """

    def __init__(self, world: World, ledgers: Sequence[InstanceLedger]) -> None:
        self._engines = world.engines
        self._ledgers = ledgers

    def request_count(self, index: int) -> int:
        """Return the engine's jobs."""
        return self._engines[index].request_count

    def queued_prefill_token_count(self, index: int, now: float) -> float:
        """Return the engine's own count."""
        bring_up_to(self._engines[index], now)
        return self._engines[index].queued_prefill_token_count

    def state(self, index: int, now: float) -> InstanceState:
        """Return the engine's state after the latest step that is over."""
        engine = self._engines[index]
        bring_up_to(engine, now)
        decode_count = engine.decode_count
        prefilling_count = engine.running_count - decode_count
        return InstanceState(
            request_count=engine.request_count,
            waiting_count=engine.waiting_count,
            kv_usage=engine.kv_usage,
            held_token_count=engine.kv_token_count,
            decode_count=decode_count,
            decode_context_token_count=engine.decode_context_token_count,
            backlog=self._ledgers[index].exact_backlog(prefilling_count, engine.queued_prefill_token_count),
            is_prefilling=prefilling_count > 0,
            slowness=engine.slowness,
        )

    def reported(self, index: int, gauges: EngineGauges) -> None:
        """Do nothing: a report is older than what this sees."""

    def dispatched(self, index: int, uncached_token_count: int) -> None:
        """Do nothing: the engine knows."""


class ReportedView:
    """Knows the latest reports that arrived, and what was dispatched since then.

    An instance that never reported is judged by the dispatches alone. Prefill in
    progress is not seen, nor are tokens produced, nor is slowness.

    Args:
        world: The simulation.
        ledgers: The dispatches to each instance.
    """

    def __init__(self, world: World, ledgers: Sequence[InstanceLedger]) -> None:
        self._capacities = [instance.kv_token_capacity for instance in world.instances]
        self._ledgers = ledgers
        self._gauges: list[EngineGauges | None] = [None] * len(ledgers)
        self._new_request_counts = [0] * len(ledgers)
        self._new_token_counts = [0] * len(ledgers)

    def request_count(self, index: int) -> int:
        """Return the dispatches that have not ended."""
        return self._ledgers[index].request_count

    def queued_prefill_token_count(self, index: int, now: float) -> float:
        """Return the uncached tokens of dispatches without a first token."""
        return self._ledgers[index].uncached_token_count

    def state(self, index: int, now: float) -> InstanceState:
        """Return what the latest report and the dispatches since then amount to."""
        ledger, gauges, capacity = self._ledgers[index], self._gauges[index], self._capacities[index]
        waiting_count: int | None = None
        kv_usage: float | None = None
        if gauges is not None:
            waiting_count, kv_usage = gauges.waiting_request_count, gauges.key_value_cache_usage
        if waiting_count is None:
            waiting_count = ledger.prefill_count
        else:
            waiting_count += self._new_request_counts[index]
        if kv_usage is None:
            kv_usage = ledger.context_token_count / capacity
        else:
            kv_usage += self._new_token_counts[index] / capacity
        kv_usage = min(1.0, kv_usage)
        return InstanceState(
            request_count=ledger.request_count,
            waiting_count=waiting_count,
            kv_usage=kv_usage,
            held_token_count=kv_usage * capacity,
            decode_count=ledger.answer_count,
            decode_context_token_count=ledger.context_token_count,
            backlog=ledger.backlog(),
            is_prefilling=False,
            slowness=1.0,
        )

    def reported(self, index: int, gauges: EngineGauges) -> None:
        """Go by this report from now on."""
        self._gauges[index] = gauges
        self._new_request_counts[index] = self._new_token_counts[index] = 0

    def dispatched(self, index: int, uncached_token_count: int) -> None:
        """Count it on top of the latest report."""
        self._new_request_counts[index] += 1
        self._new_token_counts[index] += uncached_token_count
