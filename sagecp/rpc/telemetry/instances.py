"""What every instance and GPU says and is, written anew for each scrape.

A fleet of 1,000 instances with 8 GPUs has some 130,000 series. They are written family by
family in pieces, from values that the core holds anyway: nothing is kept between scrapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sagecp.core.gpu import GpuReading
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.types import InstanceState
from sagecp.rpc.telemetry.families import PIECE_LINES, gauges, head, label_text, number_text
from sagecp.rpc.telemetry.instance_figures import (
    GPU_FIGURES,
    INSTANCE_FIGURES,
    Figure,
    InstanceMoment,
    SubjectT,
)

# Each has some labels to write, and those of its GPUs.
_INSTANCES_PER_PIECE = 50


def instance_labels(record: InstanceRecord) -> str:
    """Return what tells an instance's series apart, as text."""
    return label_text(("instance_id", "model"), (record.instance_id, record.spec.model_name))


def gpu_labels(record: InstanceRecord, index: int) -> str:
    """Return what tells a GPU's series apart, as text."""
    return label_text(("instance_id", "gpu"), (record.instance_id, str(index)))


def instance_pieces(records: Iterable[InstanceRecord], now: float) -> Iterator[str]:
    """Return the series of instances and their GPUs as text, piece by piece.

    Args:
        records: The fleet, as a list of its own: it may change between pieces.
        now: On the core's clock.
    """
    moments: list[tuple[str, InstanceMoment]] = []
    # By labels: what an agent reports twice must not spoil the text.
    gpus: dict[str, GpuReading] = {}
    for number, record in enumerate(records):
        moments.append((instance_labels(record), InstanceMoment(record, now)))
        for reading in record.gpus:
            gpus[gpu_labels(record, reading.index)] = reading
        if number % _INSTANCES_PER_PIECE == _INSTANCES_PER_PIECE - 1:
            yield ""
    yield _by_state([moment.record for _, moment in moments])
    yield from _state_pieces(moments)
    for figure in INSTANCE_FIGURES:
        yield from _figure_pieces(figure, moments)
    readings = list(gpus.items())
    for gpu_figure in GPU_FIGURES:
        yield from _figure_pieces(gpu_figure, readings)
    yield from _gpu_pieces(readings)
    yield from _labelled_pieces(
        "sagecp_gpu_fault",
        "1 for each kind of fault of the GPU, and whether it keeps the instance out.",
        (row for _, moment in moments for row in _fault_rows(moment.record)),
    )


def _figure_pieces(figure: Figure[SubjectT], subjects: list[tuple[str, SubjectT]]) -> Iterator[str]:
    """Return one figure of all subjects as text."""
    name, read = figure.name, figure.read
    lines: list[str] = []
    begun = False
    for labels, subject in subjects:
        value = read(subject)
        if value is None:
            continue
        if not begun:
            begun = True
            lines.append(head(name, figure.kind, figure.help_text))
        lines.append(f"{name}{{{labels}}} {number_text(value)}\n")
        if len(lines) >= PIECE_LINES:
            yield "".join(lines)
            lines.clear()
    yield "".join(lines)


def _labelled_pieces(name: str, help_text: str, rows: Iterator[tuple[str, float]]) -> Iterator[str]:
    """Return a gauge whose series differ in more than the subject."""
    lines: list[str] = []
    begun = False
    for labels, value in rows:
        if not begun:
            begun = True
            lines.append(head(name, "gauge", help_text))
        lines.append(f"{name}{{{labels}}} {number_text(value)}\n")
        if len(lines) >= PIECE_LINES:
            yield "".join(lines)
            lines.clear()
    yield "".join(lines)


def _by_state(records: list[InstanceRecord]) -> str:
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        # All states from the start, so that the last instance that leaves one is seen to.
        if (record.spec.model_name, InstanceState.READY.name) not in counts:
            counts.update({(record.spec.model_name, state.name): 0 for state in InstanceState})
        counts[record.spec.model_name, record.state.name] += 1
    return gauges(
        "sagecp_instances", "Registered instances, by state.", ("model", "state"), list(counts.items())
    )


def _state_pieces(moments: list[tuple[str, InstanceMoment]]) -> Iterator[str]:
    yield from _labelled_pieces(
        "sagecp_instance_state",
        "1 for the state that the instance is in.",
        ((f'{labels},state="{moment.record.state.name}"', 1) for labels, moment in moments),
    )
    yield from _labelled_pieces(
        "sagecp_instance_outage",
        "1 while the instance is kept out of the rotation, and for what.",
        ((f'{labels},kind="{kind}"', 1) for labels, moment in moments for kind in _outages(moment.record)),
    )
    yield from _labelled_pieces(
        "sagecp_instance_info",
        "1, with what the instance is.",
        (
            (f"{labels},{_instance_identity(moment.record)}", 1)
            for labels, moment in moments
        ),
    )  # fmt: skip


def _outages(record: InstanceRecord) -> Iterator[str]:
    health = record.health
    if health.outage is not None:
        yield health.outage.value
    if health.gpu_fault:
        yield "gpu_fault"


def _instance_identity(record: InstanceRecord) -> str:
    spec = record.spec
    return label_text(
        ("host_id", "engine_kind", "engine_version"), (spec.host_id, spec.engine_kind, spec.engine_version)
    )


def _gpu_pieces(gpus: list[tuple[str, GpuReading]]) -> Iterator[str]:
    yield from _labelled_pieces(
        "sagecp_gpu_info",
        "1, with what the GPU is.",
        (
            (f"{labels},{label_text(('uuid', 'name'), (reading.uuid, reading.name))}", 1)
            for labels, reading in gpus
        ),
    )

    yield from _labelled_pieces(
        "sagecp_gpu_throttled",
        "1 for each reason why the GPU's clocks are reduced.",
        (
            (f"{labels},{label_text(('reason',), (reason,))}", 1)
            for labels, reading in gpus
            for reason in dict.fromkeys(reading.throttle_reasons)
        ),
    )
    yield from _labelled_pieces(
        "sagecp_gpu_xid_errors",
        "Critical errors that the driver reported since the agent started, by their number.",
        (row for labels, reading in gpus for row in _xid_rows(labels, reading)),
    )


def _fault_rows(record: InstanceRecord) -> Iterator[tuple[str, float]]:
    kinds: dict[tuple[int, str], bool] = {}
    for fault in record.gpu_faults:
        key = fault.gpu_index, fault.kind.name
        kinds[key] = kinds.get(key, False) or fault.quarantines
    for (index, kind), quarantines in kinds.items():
        more = label_text(("kind", "quarantines"), (kind, str(quarantines).lower()))
        yield f"{gpu_labels(record, index)},{more}", 1


def _xid_rows(labels: str, reading: GpuReading) -> Iterator[tuple[str, float]]:
    counts: dict[int, int] = {}
    for error in reading.xid_errors:
        counts[error.code] = counts.get(error.code, 0) + 1
    for code, count in counts.items():
        yield f'{labels},xid="{code}"', count
