"""The columns of a list of instances."""

from __future__ import annotations

from collections.abc import Callable

from sagecp.cli import render
from sagecp.cli.listing import Field, SortKey
from sagecp.client.values import Instance

_GIB = 2**30


def gpu_utilization(instance: Instance) -> float | None:
    """Return the mean over its GPUs that report, 0 to 1."""
    known = [gpu.utilization for gpu in instance.gpus if gpu.utilization is not None]
    return sum(known) / len(known) if known else None


def order_text(instance: Instance) -> str:
    """Return what operators ordered of an instance, in a word; ``""``: nothing."""
    if instance.sleep is not None:
        return "asleep" if instance.sleep.asleep else "sleep"
    return "drain" if instance.drain is not None else ""


def fault_text(instance: Instance) -> str:
    """Return the kinds of faults of its GPUs, such as ``"XID,THERMAL"``; ``""``: none."""
    return ",".join(sorted({fault.kind.name for fault in instance.gpu_faults}))


def ahead_text(seconds: float | None) -> str:
    """Return how far a clock is ahead; behind is negative."""
    return render.NONE if seconds is None else f"{'+' if seconds >= 0 else ''}{render.duration(seconds)}"


def _gpu_memory(instance: Instance) -> tuple[int, int] | None:
    known = [
        (gpu.used_memory_bytes, gpu.total_memory_bytes)
        for gpu in instance.gpus
        if gpu.used_memory_bytes is not None and gpu.total_memory_bytes is not None
    ]
    return (sum(used for used, _ in known), sum(total for _, total in known)) if known else None


def _gpu_memory_share(instance: Instance) -> float | None:
    memory = _gpu_memory(instance)
    return memory[0] / memory[1] if memory and memory[1] else None


def _gpu_memory_text(instance: Instance) -> str:
    memory = _gpu_memory(instance)
    return f"{memory[0] / _GIB:.0f}/{memory[1] / _GIB:.0f}G" if memory else render.NONE


def _temperature(instance: Instance) -> float | None:
    return max(
        (gpu.temperature_celsius for gpu in instance.gpus if gpu.temperature_celsius is not None),
        default=None,
    )


def _engine_median(name: str) -> Callable[[Instance], float | None]:
    """Return what reads the median of a duration that engines measure themselves."""

    def read(instance: Instance) -> float | None:
        quantiles = getattr(instance.engine, name) if instance.engine is not None else None
        return quantiles.p50_s if quantiles is not None and quantiles.sample_count else None

    return read


def _gauge(name: str) -> Callable[[Instance], float | None]:
    def read(instance: Instance) -> float | None:
        value: float | None = getattr(instance.engine, name) if instance.engine is not None else None
        return value

    return read


def _learned(name: str) -> Callable[[Instance], float | None]:
    def read(instance: Instance) -> float | None:
        value: float | None = getattr(instance.learned, name) if instance.learned is not None else None
        return value

    return read


def _number(
    title: str,
    read: Callable[[Instance], float | None],
    text: Callable[[float | None], str],
    *,
    wide: bool = False,
) -> Field[Instance]:
    return Field(render.Column(title, right=True), lambda instance: text(read(instance)), read, wide)


def _text(
    title: str,
    read: Callable[[Instance], str],
    *,
    state: bool = False,
    flexible: bool = False,
    optional: bool = False,
    wide: bool = False,
) -> Field[Instance]:
    column = render.Column(title, state=state, flexible=flexible, optional=optional)

    def key(instance: Instance) -> SortKey:
        return read(instance) or None

    return Field(column, lambda instance: read(instance) or render.NONE, key, wide)


def _factor(value: float | None) -> str:
    return render.NONE if value is None else f"{value:.2f}x"


def _share(value: float | None) -> str:
    """Return a share of one without false precision."""
    if value is None:
        return render.NONE
    return f"{value * 100:.1f}%" if value < 0.0995 else f"{value * 100:.0f}%"


def _celsius(value: float | None) -> str:
    return render.NONE if value is None else f"{value:.0f}C"


INSTANCE_FIELDS: tuple[Field[Instance], ...] = (
    _text("INSTANCE", lambda instance: instance.instance_id, flexible=True),
    _text("STATE", lambda instance: instance.state.name, state=True),
    _text("ORDER", order_text, wide=True),
    _text("MODEL", lambda instance: instance.spec.model_name, flexible=True),
    _text("HOST", lambda instance: instance.spec.host_id, flexible=True, optional=True, wide=True),
    Field(
        render.Column("LOAD", right=True),
        lambda instance: f"{instance.in_flight_request_count}/{instance.max_concurrent_request_count}",
        lambda instance: instance.in_flight_request_count,
    ),
    _number("RUN", _gauge("running_request_count"), render.compact, wide=True),
    _number("WAIT", _gauge("waiting_request_count"), render.compact, wide=True),
    _number("KV", _gauge("key_value_cache_usage"), _share),
    _number("GPU", gpu_utilization, _share),
    Field(render.Column("GPU-MEM", right=True), _gpu_memory_text, _gpu_memory_share, wide=True),
    _number("TEMP", _temperature, _celsius, wide=True),
    _number("TTFT", lambda instance: instance.mean_ttft_s, render.duration),
    _number("ENG-TTFT", _engine_median("ttft"), render.duration, wide=True),
    _number("PRED-TTFT", _learned("ttft_s"), render.duration, wide=True),
    _number("ENG-ITL", _engine_median("inter_token_latency"), render.duration, wide=True),
    _number("PRED-STEP", _learned("step_s"), render.duration, wide=True),
    _number("SLOWDOWN", _learned("slowdown"), _factor, wide=True),
    _number("DONE", lambda instance: instance.completed_request_count, render.compact),
    _number("LOST", lambda instance: instance.failed_attempt_count, render.compact),
    Field(
        render.Column("BEAT", right=True),
        lambda instance: render.age(instance.heartbeat_time_s),
        # As the cell says it: the one that was heard of last has the smallest.
        lambda instance: None if instance.heartbeat_time_s is None else -instance.heartbeat_time_s,
        ages=True,
    ),
    Field(
        render.Column("CLOCK", right=True),
        lambda instance: ahead_text(instance.clock_offset_s),
        lambda instance: instance.clock_offset_s,
        wide=True,
        ages=True,
    ),
    _text("FAULTS", fault_text, wide=True),
    Field(
        render.Column("REASON", flexible=True, least_width=24),
        lambda instance: instance.state_reason or render.NONE,
        lambda instance: instance.state_reason or None,
        wide=True,
    ),
)
