"""Takes instances out of the rotation that fail or hang, and finds out when they work again."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.fleet import Fleet
from sagecp.core.gpu import GpuFault
from sagecp.core.gpu_faults import NO_CHANGES
from sagecp.core.health_limits import HealthLimits
from sagecp.core.instance_health import Outage
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.request import RequestRecord
from sagecp.core.types import EngineGauges, InstanceState

PATIENCE_FACTOR = 3.0
"""Work is overdue after this many times the time that was predicted for it; and what
nobody else can take is given up after this many times the stall timeout."""


def _why_not_its_own(record: InstanceRecord) -> str:
    """Return why a fault may be another engine's on the same host, or ``""``."""
    own_count = record.spec.gpu_count
    if 0 < own_count < len(record.gpus):
        return (
            f"its engine uses {own_count} of the {len(record.gpus)} GPUs, and the agent does not know which"
        )
    return ""


class HealthBook:
    """Judges engines by their work: what they say of themselves ends no outage.

    Args:
        fleet: The instances; each record holds its own health.
        limits: Bounds and times.
        bar: Takes an instance out of the rotation, for a reason.
        settle: Leads an instance to where it belongs by now.
    """

    def __init__(
        self,
        fleet: Fleet,
        limits: HealthLimits,
        bar: Callable[[InstanceRecord, str, float, list[fx.Effect]], None],
        settle: Callable[[InstanceRecord, float, list[fx.Effect]], None],
    ) -> None:
        self._fleet = fleet
        self._limits = limits
        self._bar = bar
        self._settle = settle
        # (time, instance id): when probes are due; stale where the record says otherwise.
        self._probes: list[tuple[float, str]] = []

    # -- failures ----------------------------------------------------------------

    def note_success(self, instance: InstanceRecord) -> None:
        """An attempt ran to its end."""
        if instance.health.failure_count >= self._limits.failure_limit:
            instance.state_reason = "attempts run to their ends again"
        instance.health.note_success()

    def note_failure(
        self,
        instance: InstanceRecord,
        request: RequestRecord,
        failure: Failure,
        now: float,
        effects: list[fx.Effect],
    ) -> None:
        """An attempt failed by the engine's fault. Of one that is out already nothing is learned."""
        health = instance.health
        if instance.state is not InstanceState.READY:
            return
        if not health.note_failure(now, delivering=request.delivered):
            return
        obstacle = self._why_stays_in(instance)
        if obstacle:
            instance.state_reason = (
                f"{health.failure_count} attempts in a row failed, the last with {failure.reason.name}; "
                f"not ejected: {obstacle}"
            )
            return
        health.eject(now, failure.reason.name)
        self._watch(instance)
        self._bar(instance, health.why, now, effects)

    def _why_stays_in(self, instance: InstanceRecord) -> str:
        """Return what speaks against one instance less, or ``""``."""
        share = self._limits.max_ejected_share
        for model in instance.spec.served_models:
            ready_count = out_count = 0
            for each in self._fleet.serving(model):
                if each is instance:
                    continue
                ready_count += each.state is InstanceState.READY
                out_count += each.health.is_out and each.state is InstanceState.UNHEALTHY
            if not ready_count:
                return f"no other READY instance serves {model!r}"
            count = ready_count + out_count + 1
            if not instance.health.is_out and out_count + 1 > max(1, int(share * count)):
                return f"{out_count} of {count} instances for {model!r} are out, of at most {share:.0%}"
        return ""

    # -- GPUs ----------------------------------------------------------------------

    def note_gpus(
        self, record: InstanceRecord, event: ev.HeartbeatReceived, now: float, effects: list[fx.Effect]
    ) -> bool:
        """An agent reported its GPUs; return whether its instance may work again.

        A GPU that is broken takes its instance out of the rotation; what runs there runs
        on. No more instances of a model are taken out than for failures, and never the
        last one: it stays in, and is taken out as soon as there is another. One that is
        out comes back when nothing is wrong any more, when an operator took note of it, or
        when nobody else is left.
        """
        changes = record.gpu_watch.note(
            event.gpus,
            record.spec.gpu_devices,
            now,
            readable=bool(event.gpus) or not event.gpu_absent_reason,
            agent_time_s=event.agent_time_s,
        )
        if changes is NO_CHANGES and not record.gpu_faults:
            return False
        was_out = bool(record.health.gpu_fault)
        self.judge_gpus(record)
        out = record.health.gpu_fault
        name = record.instance_id
        effects += [fx.GpuFaultBegan(name, each, self._outcome(record, each)) for each in changes.began]
        effects += [fx.GpuFaultCleared(name, each) for each in changes.cleared]
        if out and record.state is InstanceState.READY:
            self._bar(record, out, now, effects)
        return was_out and not out

    def judge_gpus(self, record: InstanceRecord) -> None:
        """Decide whether what is wrong with an instance's GPUs keeps it out."""
        health = record.health
        why = record.gpu_watch.why_not()
        obstacle = (_why_not_its_own(record) or self._why_stays_in(record)) if why else ""
        health.gpu_fault = "" if obstacle else why
        health.gpu_warning = f"{why}; not taken out: {obstacle}" if obstacle else ""
        record.gpu_faults = tuple(
            replace(each, quarantines=each.quarantines and not obstacle) for each in record.gpu_watch.faults
        )

    @staticmethod
    def _outcome(record: InstanceRecord, fault: GpuFault) -> str:
        """Return what follows from a fault, in words; ``""``: nothing."""
        if not fault.quarantines:
            return ""
        return record.health.gpu_warning.partition("; not taken out: ")[2] or "out"

    # -- stalls ------------------------------------------------------------------

    def on_engine_silent(self, event: ev.EngineSilent, now: float, effects: list[fx.Effect]) -> None:
        """Nothing came from an instance for a while."""
        record = self._fleet.find(event.instance_id)
        if record is None or not record.in_flight:
            return
        patience_s = self._patience_s(record)
        if event.silent_s < patience_s or not self._has_overdue(record, now):
            return
        # Engines whose figures move work for somebody: the path of our streams is broken, not they.
        if record.health.moved_since(now - event.silent_s / 2):
            return
        if record.health.outage is not Outage.STALLED:
            count = record.in_flight_count
            what = "a request runs" if count == 1 else f"{count} requests run"
            cause = f"{what} on it, and nothing came for {event.silent_s:.0f} s"
            self._quarantine(record, cause, now, effects)
        self._interrupt(record, event.silent_s, patience_s, effects)

    def note_gauges(
        self, record: InstanceRecord, gauges: EngineGauges | None, now: float, effects: list[fx.Effect]
    ) -> None:
        """An agent reported its engine's figures.

        Of an engine that has work of ours its streams tell more.
        """
        still_s = record.health.note_gauges(gauges, now)
        if (
            still_s >= self._limits.stall_timeout_s
            and not record.in_flight
            and record.health.outage is not Outage.STALLED
        ):
            cause = f"its engine reports running requests, and no progress for {still_s:.0f} s"
            self._quarantine(record, cause, now, effects)

    def _quarantine(self, record: InstanceRecord, cause: str, now: float, effects: list[fx.Effect]) -> None:
        record.health.quarantine(now, cause)
        self._watch(record)
        self._bar(record, record.health.why, now, effects)

    def _patience_s(self, record: InstanceRecord) -> float:
        """Return how long an engine may be silent with what it has to prefill.

        By the work, not by the predicted first token: that grows with the silence. Of
        an engine that has answered nothing yet, and whose kind is a guess, predictions
        say little, and its first request may make it compile.
        """
        timeout_s = self._limits.stall_timeout_s
        running = record.in_flight.values()
        guessed = record.ttft_estimate_s is None and not record.load.kind.trusted
        if guessed and not any(each.delivered for each in running):
            timeout_s *= PATIENCE_FACTOR
        work_s = max((each.work_s for each in running if not each.delivered), default=0.0)
        return max(timeout_s, PATIENCE_FACTOR * work_s)

    def _has_overdue(self, record: InstanceRecord, now: float) -> bool:
        """Whether any attempt should have had output by now."""
        return any(
            request.delivered
            or request.dispatch_s is None
            or now - request.dispatch_s
            >= max(self._limits.stall_timeout_s, PATIENCE_FACTOR * request.predicted_ttft_s)
            for request in record.in_flight.values()
        )

    def _interrupt(
        self, record: InstanceRecord, silent_s: float, patience_s: float, effects: list[fx.Effect]
    ) -> None:
        """Let what hangs go on elsewhere; where nobody could take it, it hangs on for a while."""
        failure = Failure(
            ErrorReason.ENGINE_TIMEOUT,
            f"instance {record.instance_id}: the engine hangs, nothing came from it for {silent_s:.0f} s",
        )
        given_up = silent_s >= PATIENCE_FACTOR * patience_s
        for request in record.in_flight.values():
            attempt = (request.request_id, request.epoch)
            certain = min(request.prompt_token_count + 1, record.token_limit)
            # It is not READY itself.
            elsewhere = self._fleet.largest_token_limit(request.model) >= certain
            if attempt not in record.health.asked_attempts and (elsewhere or given_up):
                record.health.asked_attempts.add(attempt)
                effects.append(
                    fx.InterruptAttempt(*attempt, record.instance_id, failure, must_stop=True, counts=True)
                )

    # -- probes ------------------------------------------------------------------

    def on_engine_probed(self, event: ev.EngineProbed, now: float, effects: list[fx.Effect]) -> None:
        """A probe came to its end."""
        record = self._fleet.find(event.instance_id)
        if record is None or record.health.outage is None:
            return
        if record.health.note_probe(now, "" if event.answered else event.detail or "no token came"):
            self._settle(record, now, effects)
            return
        self._watch(record)
        if record.state is InstanceState.UNHEALTHY:
            record.state_reason = record.health.why

    def probe_soon(self, record: InstanceRecord, now: float) -> None:
        """Probe an instance that is out at once: something changed that may have helped."""
        before_s = record.health.probe_s
        record.health.probe_soon(now)
        if record.health.probe_s != before_s:
            self._watch(record)

    def probe_last_resorts(self, record: InstanceRecord, now: float) -> None:
        """An instance left the rotation: where nobody is left, those that are out may be wanted earlier."""
        for model in record.spec.served_models:
            if self._fleet.ready_count(model) == 0:
                for each in self._fleet.serving(model):
                    if each is not record and each.health.outage is not None:
                        self.probe_soon(each, now)

    def advance(self, now: float, effects: list[fx.Effect]) -> None:
        """Ask for the probes whose time has come."""
        while self._probes and self._probes[0][0] <= now:
            entry = heapq.heappop(self._probes)
            if self._is_due(entry):
                record = self._fleet.get(entry[1])
                record.health.begin_probe(now)
                self._watch(record)
                effects.append(fx.ProbeEngine(record.instance_id))

    def next_timer_s(self) -> float | None:
        """Return when :meth:`advance` has something to do, or ``None``."""
        while self._probes and not self._is_due(self._probes[0]):
            heapq.heappop(self._probes)
        return self._probes[0][0] if self._probes else None

    def _watch(self, record: InstanceRecord) -> None:
        if record.health.outage is not None:
            heapq.heappush(self._probes, (record.health.probe_s, record.instance_id))

    def _is_due(self, entry: tuple[float, str]) -> bool:
        time_s, instance_id = entry
        record = self._fleet.find(instance_id)
        return record is not None and record.health.outage is not None and record.health.probe_s == time_s
