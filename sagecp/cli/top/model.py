"""What the screen shows: the last that was read of a control plane. Pure: time is passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from sagecp.cli.top.trend import Trend

EVENT_LIMIT = 1000
_SEVERITIES = {1: "info", 2: "WARN", 3: "ERROR"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRow:
    """What the table says of an instance; ``None`` is unknown.

    Attributes:
        load: Requests that the control plane has on it; ``limit``: the most it puts there.
        running: Requests in execution, as the engine says; ``waiting``: waiting inside it.
        key_value_usage: Share of the KV cache in use.
        gpu_utilization: Mean over its GPUs, 0 to 1.
        gpu_memory_usage: Share of their memory in use.
        temperature_celsius: Of the hottest.
        drained: Whether there is an order that it takes no work; ``sleeping``: whether its engine
            sleeps, or is to.
        note: What is out of the ordinary, in a few words.
        read_s: When this was read, on the clock of the console.
    """

    instance_id: str
    state: str
    state_reason: str = ""
    model: str = ""
    host_id: str = ""
    load: int = 0
    limit: int = 0
    running: int | None = None
    waiting: int | None = None
    key_value_usage: float | None = None
    ttft_s: float | None = None
    gpu_utilization: float | None = None
    gpu_memory_usage: float | None = None
    temperature_celsius: float | None = None
    drained: bool = False
    sleeping: bool = False
    note: str = ""
    read_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusView:
    """What the header and the queues say of the control plane.

    Attributes:
        start_time_s: Unix seconds, which tell one run of the server from another.
        order: Policy that was configured; ``in_force``: the one that orders the queue now.
        queued_by_class: Waiting requests by priority, ``CRITICAL`` to ``BACKGROUND``.
    """

    version: str = ""
    start_time_s: float = 0.0
    uptime_s: float = 0.0
    accepting: bool = True
    order: str = ""
    in_force: str = ""
    reason: str = ""
    placement: str = ""
    config_version: int = 0
    count_by_state: Mapping[str, int] = field(default_factory=dict)
    queued_by_class: Mapping[str, int] = field(default_factory=dict)
    queued_by_model: Mapping[str, int] = field(default_factory=dict)
    queued_by_tenant: Mapping[str, int] = field(default_factory=dict)
    active: int = 0
    queue_capacity: int = 0
    last_event_sequence: int = 0

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return sum(self.queued_by_class.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsView:
    """What the header says of the last minute; ``None`` is unknown."""

    requests_per_second: float = 0.0
    tokens_per_second: float = 0.0
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    slo_compliance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """Something that happened. Severity 1 is information, 2 a warning, 3 an error."""

    time_s: float
    severity: int
    message: str
    instance_id: str = ""
    request_id: str = ""
    sequence: int = 0

    @property
    def severity_word(self) -> str:
        """The severity in a word."""
        return _SEVERITIES.get(self.severity, "?")


class InstanceTrends:
    """How an instance went over the last minutes."""

    __slots__ = ("gpu", "key_value", "load", "ttft")

    def __init__(self) -> None:
        self.load, self.key_value, self.ttft, self.gpu = Trend(), Trend(), Trend(), Trend()

    def add(self, row: InstanceRow) -> None:
        """Note what was read."""
        now_s = row.read_s
        self.load.add(row.load / row.limit if row.limit else None, now_s)
        self.key_value.add(row.key_value_usage, now_s)
        self.ttft.add(row.ttft_s, now_s)
        self.gpu.add(row.gpu_utilization, now_s)


class Picture:
    """The last that was read of the control plane.

    Attributes:
        instances: By id.
        events: Newest last.
        server_events: Whether the server tells events; ``None``: not known yet. One that
            does not is watched for changes of state instead.
        read_s: When anything was last read, on the console's clock; ``None``: never.
        lost_s: Since when the control plane does not answer; ``None``: it does.
        lost_reason: Why it does not.
        retry_s: When it is tried again.
    """

    def __init__(self) -> None:
        self.status: StatusView | None = None
        self.metrics: MetricsView | None = None
        self.instances: dict[str, InstanceRow] = {}
        self.trends: dict[str, InstanceTrends] = {}
        self.tokens, self.ttft, self.queued = Trend(), Trend(), Trend()
        self.events: deque[EventRow] = deque(maxlen=EVENT_LIMIT)
        self.event_count = 0
        self.last_sequence = 0
        self.server_events: bool | None = None
        self.read_s: float | None = None
        self.read_time_s = 0.0
        self.lost_s: float | None = None
        self.lost_reason = ""
        self.retry_s = 0.0

    # What was read

    def put_status(self, status: StatusView, now_s: float, unix_s: float) -> None:
        """Take a new state of the control plane. Another run of it starts with no events."""
        before = self.status
        if before is not None and before.start_time_s != status.start_time_s:
            self.last_sequence = 0
            self.add_event(EventRow(time_s=unix_s, severity=2, message="the control plane was restarted"))
        self.status = status
        self.queued.add(status.queued, now_s)
        self._note_answer(now_s, unix_s)

    def put_metrics(self, metrics: MetricsView, now_s: float) -> None:
        """Take new metrics."""
        self.metrics = metrics
        self.tokens.add(metrics.tokens_per_second, now_s)
        self.ttft.add(metrics.ttft_p95_s, now_s)

    def put_instances(self, rows: Iterable[InstanceRow], unix_s: float) -> None:
        """Take what was read of some instances."""
        for row in rows:
            before = self.instances.get(row.instance_id)
            if before is not None and before.read_s > row.read_s:
                continue
            self.instances[row.instance_id] = row
            trends = self.trends.get(row.instance_id)
            if trends is None:
                trends = self.trends[row.instance_id] = InstanceTrends()
            trends.add(row)
            if self.server_events is False and before is not None and before.state != row.state:
                self._observe(row, f"{before.state} -> {row.state}", unix_s)

    def keep_only(self, instance_ids: Collection[str], unix_s: float) -> None:
        """Forget every instance but these: the fleet was read as a whole."""
        for instance_id in self.instances.keys() - set(instance_ids):
            self.forget(instance_id, unix_s)

    def forget(self, instance_id: str, unix_s: float) -> None:
        """Forget an instance that is not listed any more."""
        row = self.instances.pop(instance_id, None)
        self.trends.pop(instance_id, None)
        if row is not None and self.server_events is False:
            self._observe(row, "left the fleet", unix_s)

    def _observe(self, row: InstanceRow, what: str, unix_s: float) -> None:
        severity = 2 if row.state in {"UNHEALTHY", "LOST"} else 1
        reason = f": {row.state_reason}" if row.state_reason and row.state != "READY" else ""
        self.add_event(
            EventRow(time_s=unix_s, severity=severity, message=f"{what}{reason}", instance_id=row.instance_id)
        )

    def add_event(self, event: EventRow) -> None:
        """Take an event; one that is known already is dropped."""
        if event.sequence:
            if event.sequence <= self.last_sequence:
                return
            self.last_sequence = event.sequence
        self.events.append(event)
        self.event_count += 1

    # The connection

    def _note_answer(self, now_s: float, unix_s: float) -> None:
        if self.lost_s is not None:
            lost_s = now_s - self.lost_s
            self.add_event(
                EventRow(time_s=unix_s, severity=1, message=f"the connection is back after {lost_s:.0f} s")
            )
        self.read_s, self.read_time_s = now_s, unix_s
        self.lost_s, self.lost_reason = None, ""

    def note_loss(self, reason: str, now_s: float, unix_s: float, retry_s: float) -> None:
        """Note that the control plane does not answer; what was read stays.

        Args:
            reason: Why, in a few words.
            now_s: On the console's clock.
            unix_s: The same in Unix seconds.
            retry_s: When it is tried again, on the console's clock.
        """
        if self.lost_s is None:
            self.lost_s = now_s
            self.add_event(EventRow(time_s=unix_s, severity=3, message=f"connection lost: {reason}"))
        self.lost_reason, self.retry_s = reason, retry_s

    @property
    def is_stale(self) -> bool:
        """Whether this is an old picture, because the control plane does not answer."""
        return self.lost_s is not None
