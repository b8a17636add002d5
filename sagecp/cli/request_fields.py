"""The columns of a list of requests."""

from __future__ import annotations

from collections.abc import Callable

from sagecp.cli import render
from sagecp.cli.listing import Field
from sagecp.core.types import RequestStatus


def _text(
    title: str,
    read: Callable[[RequestStatus], str],
    *,
    state: bool = False,
    flexible: bool = False,
    optional: bool = False,
    wide: bool = False,
) -> Field[RequestStatus]:
    column = render.Column(title, state=state, flexible=flexible, optional=optional)
    return Field(
        column, lambda status: read(status) or render.NONE, lambda status: read(status) or None, wide
    )


def _count(
    title: str, read: Callable[[RequestStatus], int | None], *, wide: bool = False
) -> Field[RequestStatus]:
    return Field(render.Column(title, right=True), lambda status: render.compact(read(status)), read, wide)


def _until(
    title: str, read: Callable[[RequestStatus], float | None], *, wide: bool = False
) -> Field[RequestStatus]:
    """Return a field that says how long after its receipt something happened to a request."""

    def seconds(status: RequestStatus) -> float | None:
        moment_s = read(status)
        return None if moment_s is None else max(0.0, moment_s - status.create_time_s)

    return Field(
        render.Column(title, right=True), lambda status: render.duration(seconds(status)), seconds, wide
    )


def _cost_usd(status: RequestStatus) -> float | None:
    return None if status.cost is None else status.cost.actual_usd


REQUEST_FIELDS: tuple[Field[RequestStatus], ...] = (
    _text("REQUEST", lambda status: status.request_id),
    _text("STATE", lambda status: status.state.name, state=True),
    _text("MODEL", lambda status: status.model_name, flexible=True, optional=True),
    Field(
        render.Column("PRIORITY", optional=True),
        lambda status: status.priority.name,
        lambda status: float(status.priority),
    ),
    _text("TENANT", lambda status: status.tenant_id, flexible=True, optional=True, wide=True),
    _text("USER", lambda status: status.user_id, flexible=True, optional=True, wide=True),
    _text("SESSION", lambda status: status.session_id, flexible=True, optional=True, wide=True),
    Field(
        render.Column("AGE", right=True),
        lambda status: render.age(status.create_time_s),
        lambda status: -status.create_time_s,
        ages=True,
    ),
    _until("QUEUED", lambda status: status.dispatch_time_s, wide=True),
    _until("TTFT", lambda status: status.first_token_time_s),
    _until("TOTAL", lambda status: status.end_time_s),
    _count("IN", lambda status: status.usage.prompt_token_count),
    _count("OUT", lambda status: status.usage.completion_token_count),
    _count("AHEAD", lambda status: status.queue_position, wide=True),
    _count("ATTEMPTS", lambda status: len(status.attempts), wide=True),
    Field(
        render.Column("COST", right=True),
        lambda status: render.usd(_cost_usd(status)),
        _cost_usd,
        wide=True,
    ),
    _text("INSTANCE", lambda status: status.instance_id, flexible=True),
    _text("FINISH", lambda status: status.finish_reason, wide=True),
    _text(
        "WHY",
        lambda status: status.failure.message if status.failure else "",
        flexible=True,
        optional=True,
        wide=True,
    ),
)
