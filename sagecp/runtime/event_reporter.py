"""Tells operators what happens: effects of the core, and the runtime's own news, as events of the fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sagecp.core import effects as fx
from sagecp.core.engine_state import EngineProcessState
from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.fleet_event import EventKind, EventSeverity
from sagecp.core.prediction.accuracy import QuantityAccuracy
from sagecp.core.prediction.step_time_report import StepTimeReport
from sagecp.core.settings import SchedulingSettings
from sagecp.core.types import InstanceState
from sagecp.runtime.event_log import EventLog
from sagecp.runtime.repetition import Repetition

INFO, WARNING, ERROR = EventSeverity.INFO, EventSeverity.WARNING, EventSeverity.ERROR

DRIFT_ERROR_RATIO = 0.5
"""Predictions have come apart from what happens when half of them are off by more than this."""
DRIFT_OVER_RATIO = 0.4
"""And are back when half of them are off by less."""
DRIFT_COUNT = 50
"""Fewer comparisons say nothing."""
# Of failed requests, so many are told in a minute; one engine that dies takes as many with it as it runs.
_TOLD_FAILURE_COUNT = 50
OVERLOAD_REASONS = frozenset({ErrorReason.QUEUE_FULL, ErrorReason.INFEASIBLE})

AgentNews = (
    fx.GpuFaultBegan | fx.GpuFaultCleared | fx.EngineProcessChanged | fx.ClockSkewChanged | fx.OrderTroubled
)

_FAILED = {ERROR: "requests failed", WARNING: "attempts were lost", INFO: "attempts were moved"}
_ENDED = frozenset({EngineProcessState.BACKING_OFF, EngineProcessState.STOPPED})
_STATE_SEVERITIES = {InstanceState.UNHEALTHY: WARNING, InstanceState.LOST: ERROR}


class EventReporter:
    """Turns what happens into events; what repeats itself is counted.

    Args:
        log: Keeps the events.
    """

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self._failures: Repetition[tuple[EventSeverity, str]] = Repetition(told_count=_TOLD_FAILURE_COUNT)
        self._refusals: Repetition[tuple[str, str]] = Repetition()
        self._overloads: Repetition[str] = Repetition()
        self._drifting: set[str] = set()

    # -- instances -----------------------------------------------------------------

    def instance_changed(self, effect: fx.InstanceChanged) -> None:
        """An instance joined, or changed its state."""
        name, state = effect.instance_id, effect.state.name
        if effect.previous is None:
            self.log.add(
                INFO,
                EventKind.INSTANCE_REGISTERED,
                f"instance registered; it is {state}",
                instance_id=name,
                attributes={"to": state},
            )
            return
        self.log.add(
            _STATE_SEVERITIES.get(effect.state, INFO),
            EventKind.INSTANCE_STATE_CHANGED,
            f"instance became {state}: {effect.reason}",
            instance_id=name,
            attributes={"from": effect.previous.name, "to": state, "reason": effect.reason},
        )

    def instance_removed(self, effect: fx.InstanceRemoved) -> None:
        """An instance is gone."""
        self.log.add(
            INFO,
            EventKind.INSTANCE_REMOVED,
            f"instance removed: {effect.reason}",
            instance_id=effect.instance_id,
            attributes={"reason": effect.reason},
        )

    def ordered(self, instance_id: str, order: str, *, refusal: str = "", cause: str = "") -> None:
        """An operator gave an order.

        Args:
            instance_id: To which instance.
            order: What it was, such as ``"drain"``.
            refusal: Why it was refused; ``""``: it was not.
            cause: Why it was given; ``""``: not said.
        """
        what = f"{order} refused: {refusal}" if refusal else f"{order} ordered"
        self.log.add(
            WARNING if refusal else INFO,
            EventKind.INSTANCE_ORDERED,
            f"{what}: {cause}" if cause and not refusal else what,
            instance_id=instance_id,
            attributes={"order": order, "result": "refused" if refusal else "accepted"},
        )

    # -- requests ------------------------------------------------------------------

    def request_failed(self, failure: Failure, instance_id: str, request_id: str, now: float) -> None:
        """A request failed by no fault of its caller."""
        if self._failures.note((ERROR, failure.reason.name), now, instance_id):
            self._tell_failure(ERROR, failure.message, failure, instance_id, request_id)

    def attempt_lost(
        self, epoch: int, failure: Failure, instance_id: str, request_id: str, now: float
    ) -> None:
        """An attempt was lost, or moved on purpose; its request goes on."""
        was_moved = failure.reason is ErrorReason.SHUTTING_DOWN
        severity = INFO if was_moved else WARNING
        if self._failures.note((severity, failure.reason.name), now, instance_id):
            message = f"attempt {epoch} was {'moved' if was_moved else 'lost'}: {failure.message}"
            self._tell_failure(severity, message, failure, instance_id, request_id)

    def _tell_failure(
        self, severity: EventSeverity, message: str, failure: Failure, instance_id: str, request_id: str
    ) -> None:
        self.log.add(
            severity,
            EventKind.REQUEST_FAILED,
            message,
            instance_id=instance_id,
            request_id=request_id,
            attributes={"reason": failure.reason.name},
        )

    def overloaded(self, reason: ErrorReason, now: float) -> None:
        """A request was refused or given up because too much waits."""
        if self._overloads.note("", now, reason.name):
            self._tell_overload({reason.name: 1})

    def _tell_overload(self, counts: Mapping[str, int]) -> None:
        self.log.add(
            WARNING,
            EventKind.OVERLOAD,
            f"requests were refused, as too much waits: {_counts_text(counts)}; add instances, or send less",
            attributes={name: str(count) for name, count in counts.items()},
        )

    # -- agents --------------------------------------------------------------------

    def agent_reported(self, effect: AgentNews) -> None:
        """An agent told of something new."""
        match effect:
            case fx.GpuFaultBegan():
                self._gpu_fault_began(effect)
            case fx.GpuFaultCleared():
                self._tell(
                    effect, INFO, EventKind.GPU_FAULT_CLEARED, f"over: {effect.fault.message}", _fault(effect)
                )
            case fx.EngineProcessChanged():
                self._process_changed(effect)
            case fx.ClockSkewChanged():
                offset_s = effect.offset_s
                where = f"{abs(offset_s):.1f} s {'ahead of' if offset_s > 0 else 'behind'} ours"
                self._tell(
                    effect,
                    WARNING if effect.skewed else INFO,
                    EventKind.CLOCK_SKEW,
                    f"the clock of its agent is {where}"
                    + (
                        "; have its host set its clock from the network"
                        if effect.skewed
                        else ", near enough again"
                    ),
                    {"offset_s": f"{offset_s:.3f}"},
                )
            case fx.OrderTroubled():
                self._tell(
                    effect,
                    WARNING,
                    EventKind.INSTANCE_ORDERED,
                    f"its agent could not do what it was told to: {effect.trouble}",
                    {"result": "failed"},
                )

    def _gpu_fault_began(self, effect: fx.GpuFaultBegan) -> None:
        ends = {"": "", "out": "; the instance is out of the rotation"}
        end = ends.get(effect.outcome, f"; the instance is not taken out: {effect.outcome}")
        self._tell(
            effect,
            ERROR if effect.outcome else WARNING,
            EventKind.GPU_FAULT,
            f"{effect.fault.message}{end}",
            {**_fault(effect), "result": effect.outcome and ("out" if effect.outcome == "out" else "in")},
        )

    def _process_changed(self, effect: fx.EngineProcessChanged) -> None:
        process = effect.process
        ended = ""
        if process.last_exit_code is not None:
            code = process.last_exit_code
            ended = (
                f"; the last one ended with signal {-code}"
                if code < 0
                else f"; the last one ended with code {code}"
            )
        self._tell(
            effect,
            WARNING if process.state in _ENDED else INFO,
            EventKind.ENGINE_PROCESS_CHANGED,
            f"its engine's process is {process.state.name}, started again {process.restart_count} times"
            + ended,
            {"state": process.state.name, "restart_count": str(process.restart_count)},
        )

    def _tell(
        self,
        effect: AgentNews,
        severity: EventSeverity,
        kind: EventKind,
        message: str,
        attributes: Mapping[str, str],
    ) -> None:
        self.log.add(severity, kind, message, instance_id=effect.instance_id, attributes=attributes)

    # -- heartbeats ----------------------------------------------------------------

    def heartbeat_refused(self, instance_id: str, reason: str, message: str, now: float) -> None:
        """A heartbeat was refused, or part of it; ``reason`` is the name under which it is counted."""
        if self._refusals.note((instance_id, reason), now):
            self.log.add(
                WARNING,
                EventKind.HEARTBEAT_REFUSED,
                f"heartbeat refused: {message}",
                instance_id=instance_id,
                attributes={"reason": reason, "count": "1"},
            )

    # -- the control plane ---------------------------------------------------------

    def trouble(self, message: str) -> None:
        """Something of the control plane itself does not work."""
        self.log.add(ERROR, EventKind.CONTROL_PLANE_TROUBLE, message)

    def trouble_over(self, message: str) -> None:
        """It works again."""
        self.log.add(INFO, EventKind.CONTROL_PLANE_TROUBLE, message)

    def fail_static_changed(self, effect: fx.FailStaticChanged) -> None:
        """Most leases ended together, and instances stay where they are; or that is over."""
        title = "fail static" if effect.active else "fail static is over"
        self.log.add(
            ERROR if effect.active else WARNING, EventKind.CONTROL_PLANE_TROUBLE, f"{title}: {effect.why}"
        )

    def control_plane(self, what: str) -> None:
        """The control plane starts or stops."""
        self.log.add(INFO, EventKind.CONTROL_PLANE_STATE_CHANGED, what)

    def settings_changed(self, settings: SchedulingSettings) -> None:
        """The scheduling configuration changed."""
        names = f"{settings.scheduling_policy}, {settings.routing_strategy}, {settings.load_balancer}"
        comment = f": {settings.comment}" if settings.comment else ""
        self.log.add(
            INFO,
            EventKind.SCHEDULING_CONFIGURED,
            f"version {settings.version} of the scheduling configuration is in force ({names}){comment}",
            attributes={"version": str(settings.version), "comment": settings.comment},
        )

    def policy_switched(self, effect: fx.PolicySwitched) -> None:
        """The adaptive policy put another policy in force."""
        self.log.add(
            INFO,
            EventKind.POLICY_SWITCHED,
            f"the adaptive policy went from {effect.previous} to {effect.policy}: {effect.why}",
            attributes={"from": effect.previous, "to": effect.policy},
        )

    # -- time ----------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Tell what repeated itself, where the time for that has come."""
        for (severity, reason), by_instance in self._failures.due(now):
            what = _FAILED[severity]
            names = ", ".join(name or "none" for name, _ in by_instance.most_common(5))
            self.log.add(
                severity,
                EventKind.REQUEST_FAILED,
                f"{by_instance.total()} more {what} with {reason} within a minute, most of them on {names}",
                attributes={"reason": reason, "count": str(by_instance.total())},
            )
        for (instance_id, reason), counts in self._refusals.due(now):
            self.log.add(
                WARNING,
                EventKind.HEARTBEAT_REFUSED,
                f"{counts.total()} more heartbeats refused within a minute: {reason}",
                instance_id=instance_id,
                attributes={"reason": reason, "count": str(counts.total())},
            )
        for _, counts in self._overloads.due(now):
            self._tell_overload(counts)

    def look_at_predictions(self, accuracy: Mapping[str, QuantityAccuracy]) -> None:
        """Tell when the predictions of a quantity come apart from what happens, and when they are back."""
        for quantity, each in accuracy.items():
            error = each.median_error_ratio
            was_drifting = quantity in self._drifting
            if not was_drifting and each.count >= DRIFT_COUNT and error > DRIFT_ERROR_RATIO:
                self._drifting.add(quantity)
                what = f"predictions of {quantity} have come apart from what happens"
            elif was_drifting and error < DRIFT_OVER_RATIO:
                self._drifting.discard(quantity)
                what = f"predictions of {quantity} are right again"
            else:
                continue
            self.log.add(
                INFO if was_drifting else WARNING,
                EventKind.PREDICTION_DRIFT,
                f"{what}: half of them are off by {error:.0%} or more, and what happens is "
                f"{each.bias_ratio:.2f} times what was predicted in the mean",
                attributes={"quantity": quantity, "median_error": f"{error:.3f}"},
            )

    def step_time_drifted(self, report: StepTimeReport) -> None:
        """Steps of a kind of instance take longer or shorter than was planned, or keep to the plan again."""
        lone = report.lone_instance_id
        direction = "slower" if report.ratio > 1.0 else "faster"
        if not report.drifting:
            what = f"{report.kind}: steps take about as long as planned again, {report.ratio:.2f} times"
        else:
            what = f"{report.kind}: steps take {report.ratio:.2f} times as long as planned"
            if lone:
                what += f"; instance {lone} alone is off: drain it, and look at its GPUs and its engine"
            elif report.ratio > 1.0:
                what += "; look for a slow GPU or another engine version, or replan with `sagecp plan`"
            else:
                what += "; replan with `sagecp plan`: fewer GPUs may do"
        self.log.add(
            WARNING if report.drifting else INFO,
            EventKind.PREDICTION_DRIFT,
            f"{what} ({report.source})",
            instance_id=lone,
            attributes={
                "kind": report.kind,
                "ratio": f"{report.ratio:.3f}",
                "planned": report.source,
                "observations": str(report.observation_count),
                "direction": direction if report.drifting else "over",
            },
        )


def _fault(effect: fx.GpuFaultBegan | fx.GpuFaultCleared) -> dict[str, str]:
    return {"gpu_uuid": effect.fault.gpu_uuid, "kind": effect.fault.kind.name}


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(counts).most_common())
