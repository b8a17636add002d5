"""What `sagecp check` looks at, and when that is a reason to alert. No I/O."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sagecp.cli import render
from sagecp.cli.thresholds import Range, parse_range
from sagecp.v1 import admin_service_pb2, instance_pb2, metrics_pb2

# Fewer compared predictions say nothing.
_LEAST_PREDICTIONS = 100


class Status(enum.IntEnum):
    """Result of a check; the number is the exit code that monitoring systems expect."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that is looked at.

    Attributes:
        name: For ``--warn`` and ``--crit``, and the label of the performance data.
        what: What its value is.
        warn: Default threshold; empty: none.
        crit: Likewise.
        unit: Of the value, as performance data has it: ``s``, ``%`` or empty.
    """

    name: str
    what: str
    warn: str = ""
    crit: str = ""
    unit: str = ""


RULES: tuple[Rule, ...] = (
    Rule("ready", "READY instances of the model that has the fewest", crit="1:"),
    Rule("unhealthy", "UNHEALTHY instances", warn="0"),
    Rule("lost", "LOST instances", warn="0"),
    Rule("gpu_faults", "faults of GPUs", warn="0"),
    Rule("queue", "share of the queue that is full", warn="50", crit="90", unit="%"),
    Rule("queue_wait", "99th percentile of the wait in the queue", unit="s"),
    Rule("ttft", "99th percentile of the time to first token", unit="s"),
    Rule("slo", "requests with objectives that met them", warn="95:", crit="90:", unit="%"),
    Rule("loop_lag", "delay of the server's event loop", warn="0.25", crit="1", unit="s"),
    Rule("drift", "how many times longer or shorter than predicted", warn="2"),
    Rule("refused", "refused heartbeats, told of once a minute", warn="0"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the control plane said.

    Attributes:
        refusals: Events in the window that tell of refused heartbeats.
        expected_models: Models that should be served, beside those that are registered.
    """

    status: admin_service_pb2.GetStatusResponse
    instances: Sequence[instance_pb2.Instance]
    metrics: metrics_pb2.PerformanceMetrics
    refusals: int = 0
    expected_models: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule came to.

    Attributes:
        value: ``None``: there is nothing to measure, which is no reason to alert.
        text: The same in words.
    """

    rule: Rule
    value: float | None
    text: str
    warn: Range | None
    crit: Range | None

    @property
    def status(self) -> Status:
        """How bad it is."""
        if self.value is None:
            return Status.OK
        if self.crit is not None and self.crit.alerts(self.value):
            return Status.CRITICAL
        if self.warn is not None and self.warn.alerts(self.value):
            return Status.WARNING
        return Status.OK

    @property
    def performance_data(self) -> str:
        """The value as monitoring systems keep it: ``label=value;warn;crit``; empty: there is none."""
        if self.value is None:
            return ""
        warn, crit = (limit.text if limit else "" for limit in (self.warn, self.crit))
        return f"{self.rule.name}={self.value:.6g}{self.rule.unit};{warn};{crit}"


def find(facts: Facts, warn: Mapping[str, str], crit: Mapping[str, str]) -> list[Finding]:
    """Judge what the control plane said.

    Args:
        facts: What it said.
        warn: Thresholds by the names of rules, instead of the defaults; an empty one is none.
        crit: Likewise.

    Raises:
        ValueError: A threshold is no range.
    """
    measured = _measure(facts)
    return [
        Finding(
            rule,
            *measured[rule.name],
            _threshold(warn.get(rule.name, rule.warn)),
            _threshold(crit.get(rule.name, rule.crit)),
        )
        for rule in RULES
    ]


def _threshold(text: str) -> Range | None:
    return parse_range(text) if text else None


def _measure(facts: Facts) -> dict[str, tuple[float | None, str]]:
    status, metrics = facts.status, facts.metrics
    states = Counter(instance.state for instance in facts.instances)
    unhealthy = states[instance_pb2.INSTANCE_STATE_UNHEALTHY]
    lost = states[instance_pb2.INSTANCE_STATE_LOST]
    faults = sum(len(instance.gpu_faults) for instance in facts.instances)
    queued = sum(status.queued_count_by_model.values())
    share = queued / status.queue_capacity * 100 if status.queue_capacity else None
    lag_s = status.event_loop_lag.ToTimedelta().total_seconds()
    waits, ttft = metrics.queue_wait, metrics.ttft
    wait_s = waits.p99_s if waits.sample_count else None
    ttft_s = ttft.p99_s if ttft.sample_count else None
    slo = metrics.slo_compliance_rate * 100 if metrics.HasField("slo_compliance_rate") else None
    return {
        "ready": _ready(facts),
        "unhealthy": (unhealthy, f"{unhealthy} UNHEALTHY{_names(facts, 'UNHEALTHY')}"),
        "lost": (lost, f"{lost} LOST{_names(facts, 'LOST')}"),
        "gpu_faults": (faults, _faults_text(facts, faults)),
        "queue": (share, f"{queued:,} queued of at most {status.queue_capacity:,}"),
        "queue_wait": (wait_s, _quantile_text("99 of 100 wait at most", wait_s)),
        "ttft": (ttft_s, _quantile_text("99 of 100 have their first token within", ttft_s)),
        "slo": (slo, "no objectives" if slo is None else f"{slo:.3g}% met their objectives"),
        "loop_lag": (lag_s, f"event loop lags {render.duration(lag_s)}"),
        "drift": _drift(status),
        "refused": (facts.refusals, _refusals_text(facts)),
    }


def _quantile_text(what: str, seconds: float | None) -> str:
    return "no requests of late" if seconds is None else f"{what} {render.duration(seconds)}"


def _ready(facts: Facts) -> tuple[float, str]:
    ready = dict.fromkeys(facts.expected_models, 0)
    for instance in facts.instances:
        is_ready = instance.state == instance_pb2.INSTANCE_STATE_READY
        for model in {instance.spec.model_name, *instance.spec.model_aliases} & ready.keys() or {
            instance.spec.model_name
        }:
            ready[model] = ready.get(model, 0) + is_ready
    if not ready:
        return 0, "no instance is registered"
    least = min(ready.values())
    if len(ready) == 1:
        return least, f"{least} of {render.plural(len(facts.instances), 'instance')} READY"
    fewest = sorted(model for model, count in ready.items() if count == least)
    return least, f"{least} READY for {render.harmless(', '.join(fewest[:3]))}{_more(len(fewest) - 3)}"


def _names(facts: Facts, state: str) -> str:
    names = [
        instance.spec.instance_id
        for instance in facts.instances
        if instance_pb2.InstanceState.Name(instance.state) == f"INSTANCE_STATE_{state}"
    ]
    return f" ({', '.join(names[:3])}{_more(len(names) - 3)})" if names else ""


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _faults_text(facts: Facts, count: int) -> str:
    if not count:
        return "no GPU faults"
    instance = next(each for each in facts.instances if each.gpu_faults)
    fault = instance.gpu_faults[0]
    return render.harmless(
        f"{render.plural(count, 'GPU fault')} ({instance.spec.instance_id} GPU {fault.gpu_index}: "
        f"{fault.message}{_more(count - 1)})"
    )


def _drift(status: admin_service_pb2.GetStatusResponse) -> tuple[float | None, str]:
    compared = [
        (max(each.bias, 1 / each.bias), each)
        for each in status.prediction_accuracy
        if each.sample_count >= _LEAST_PREDICTIONS and each.bias > 0
    ]
    if not compared:
        return None, "too few predictions to judge"
    factor, worst = max(compared, key=lambda each: each[0])
    return factor, f"{worst.quantity} is {worst.bias:.2f} times what was predicted"


def _refusals_text(facts: Facts) -> str:
    if not facts.refusals:
        return "no heartbeat refused of late"
    counts = sorted(facts.status.refused_heartbeat_count_by_reason.items(), key=lambda item: -item[1])
    return f"heartbeats refused ({', '.join(f'{count:,} {reason}' for reason, count in counts[:3])})"
