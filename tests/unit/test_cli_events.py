"""`sagecp events`: what can be asked for, and how an event is shown."""

from __future__ import annotations

import time

import pytest

from sagecp.cli import events as command
from sagecp.cli import events_view, instances, requests
from sagecp.core.fleet_event import EventKind, EventSeverity, FleetEvent
from sagecp.core.types import InstanceState, RequestPriority, RequestState


def test_the_choices_are_those_of_the_contract() -> None:
    """They are written out, so that the help need not import the contract."""
    for written, kind in (
        (command._KINDS, EventKind),
        (command._SEVERITIES, EventSeverity),
        (instances._STATES, InstanceState),
        (requests._STATES, RequestState),
        (requests._PRIORITIES, RequestPriority),
    ):
        assert [name.upper() for name in written] == [each.name for each in kind]


def event(**fields: object) -> FleetEvent:
    values: dict[str, object] = {
        "sequence": 7,
        "time_s": time.time(),
        "severity": EventSeverity.WARNING,
        "kind": EventKind.GPU_FAULT,
        "message": "GPU 3 fell off the bus",
        "instance_id": "engine-1",
        **fields,
    }
    return FleetEvent(**values)  # type: ignore[arg-type]


def shown(output: str, *events: FleetEvent, capsys: pytest.CaptureFixture[str]) -> list[str]:
    show = events_view.printer(output, headers=False)
    for each in events:
        show([each])
    return capsys.readouterr().out.splitlines()


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    about_request = event(instance_id="", request_id="req-1")
    about_nothing = event(instance_id="", severity=EventSeverity.INFO)
    lines = shown("table", event(), about_request, about_nothing, capsys=capsys)
    assert [line.split()[1:4] for line in lines] == [
        ["WARNING", "gpu_fault", "engine-1"], ["WARNING", "gpu_fault", "req-1"], ["INFO", "gpu_fault", "-"],
    ]  # fmt: skip
    assert all(line.endswith("GPU 3 fell off the bus") for line in lines)


def test_other_days_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    (today,) = shown("table", event(), capsys=capsys)
    (before,) = shown("table", event(time_s=time.time() - 40 * 3600), capsys=capsys)
    assert len(before.split()[0]) == len("11-26")
    assert len(today.split()[0]) == len("12:00:00")


def test_wide_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = shown("wide", event(attributes={"gpu": "3", "code": "79"}, request_id="req-1"), capsys=capsys)
    assert line.split()[0] == "7"
    assert line.endswith("gpu_fault  engine-1  req-1  GPU 3 fell off the bus  code=79, gpu=3")


def test_what_others_wrote_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = shown("table", event(message="a\x1b[2Jb\nc"), capsys=capsys)
    assert line.endswith("a[2Jb c")
