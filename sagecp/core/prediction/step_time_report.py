"""How each kind of instance of a fleet keeps to its planned step times, for operators."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sagecp.core.instance_record import InstanceRecord
from sagecp.core.parallelism.parallelism_config import ParallelismConfig
from sagecp.core.prediction.book import InstanceKind
from sagecp.core.prediction.step_time_accuracy import lone_deviant


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeReport:
    """Observed by planned step time of one kind of instance.

    Attributes:
        model: Name of the model.
        gpu_name: Kind of the GPUs, as NVML gives it; ``""``: unknown.
        config: Sizes of one instance.
        source: Where the planned times came from.
        observation_count: Observations compared.
        ratio: Observed by planned of late; above 1: slower than planned.
        decode_ratio: The same of steps that only decode; ``None``: none was seen.
        prefill_ratio: The same of prefills.
        drifting: Whether it is off by more than is allowed.
        lone_instance_id: The one instance that is off while all others are not; ``""``: it is
            not one alone.
    """

    model: str
    gpu_name: str
    config: ParallelismConfig
    source: str
    observation_count: int
    ratio: float
    decode_ratio: float | None
    prefill_ratio: float | None
    drifting: bool
    lone_instance_id: str = ""

    @property
    def kind(self) -> str:
        """Model, GPU and sizes, for people."""
        return f"{self.model} on {self.gpu_name or 'unknown GPU'}, {self.config}"


def step_time_reports(instances: Iterable[InstanceRecord]) -> tuple[StepTimeReport, ...]:
    """Return a report of each kind that present instances are of and that was observed, by its name."""
    reports = [
        report
        for kind, members in _by_kind(instances)
        if (report := _report_of(kind, members, most_drift=None)) is not None
    ]
    return tuple(sorted(reports, key=lambda report: report.kind))


def look_for_drift(instances: Iterable[InstanceRecord], most_drift: float) -> tuple[StepTimeReport, ...]:
    """Bring every kind's judgement up to date; return a report of each for which it changed.

    Args:
        instances: The fleet.
        most_drift: Share of the planned time by which the observed one may differ.
    """
    changed = []
    for kind, members in _by_kind(instances):
        if kind.accuracy.judge(most_drift):
            report = _report_of(kind, members, most_drift)
            if report is not None:
                changed.append(report)
    return tuple(changed)


def _by_kind(instances: Iterable[InstanceRecord]) -> Iterable[tuple[InstanceKind, list[InstanceRecord]]]:
    members: dict[InstanceKind, list[InstanceRecord]] = {}
    for instance in instances:
        members.setdefault(instance.load.kind, []).append(instance)
    return members.items()


def _report_of(
    kind: InstanceKind, members: list[InstanceRecord], most_drift: float | None
) -> StepTimeReport | None:
    accuracy = kind.accuracy
    ratio = accuracy.total.value
    if ratio is None:
        return None
    spec = members[0].spec
    lone = ""
    if most_drift is not None and accuracy.drifting:
        lone = lone_deviant({each.instance_id: each.load.planned_ratio for each in members}, most_drift)
    return StepTimeReport(
        model=spec.model_name,
        gpu_name=spec.gpu_name,
        config=members[0].plan,
        source=accuracy.planned.source,
        observation_count=accuracy.total.count,
        ratio=ratio,
        decode_ratio=accuracy.decodes.value,
        prefill_ratio=accuracy.prefills.value,
        drifting=accuracy.drifting,
        lone_instance_id=lone,
    )
