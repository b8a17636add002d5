"""Lists: their columns, their order, and what is printed as they change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from sagecp.cli import render
from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError
from sagecp.cli.instance_fields import INSTANCE_FIELDS
from sagecp.cli.listing import ChangeList, Field, check_sort_by, print_list, shown_fields, sort
from sagecp.cli.request_fields import REQUEST_FIELDS
from sagecp.client.values import Instance, Sleep
from sagecp.core.engine_state import EngineGauges, LearnedPerformance
from sagecp.core.gpu import GpuFault, GpuFaultKind, GpuReading
from sagecp.core.types import (
    DurationQuantiles,
    ExecutionInstance,
    InstanceState,
    RequestPriority,
    RequestState,
    RequestStatus,
)

FIELDS: tuple[Field[tuple[str, float | None]], ...] = (
    Field(render.Column("NAME"), lambda pair: pair[0], lambda pair: pair[0]),
    Field(render.Column("SIZE", right=True), lambda pair: str(pair[1] or "-"), lambda pair: pair[1]),
    Field(render.Column("STATE", state=True), lambda _pair: "READY", lambda _pair: None, wide=True),
)
THINGS: Sequence[tuple[str, float | None]] = (("b", 2), ("c", None), ("a", 3))


@pytest.mark.parametrize(
    ("name", "reverse", "order"),
    [("", False, "bca"), ("", True, "acb"), ("name", False, "abc"), ("NAME", True, "cba"),
     ("size", False, "bac"), ("size", True, "abc")],
)  # fmt: skip
def test_order(name: str, reverse: bool, order: str) -> None:
    """What is unknown is last either way."""
    assert "".join(thing[0] for thing in sort(THINGS, FIELDS, name, reverse=reverse)) == order


def test_an_unknown_column_names_those_that_exist() -> None:
    check_sort_by(FIELDS, "state")
    with pytest.raises(CliError, match="no column 'sise'") as caught:
        check_sort_by(FIELDS, "sise")
    assert caught.value.code == ExitCode.INVALID
    assert caught.value.hint == "there are: name, size, state"


def test_tables_wide_and_without_headers(capsys: pytest.CaptureFixture[str]) -> None:
    print_list(THINGS[:1], FIELDS, "table", headers=True)
    print_list(THINGS[:1], FIELDS, "wide", headers=True)
    print_list(THINGS[:1], FIELDS, "table", headers=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["NAME", "SIZE"], ["b", "2"], ["NAME", "SIZE", "STATE"], ["b", "2", "READY"], ["b", "2"]]


def test_wide_tables_show_as_many_columns_as_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    print_list(THINGS, FIELDS, "wide", headers=True)
    assert capsys.readouterr().out.splitlines()[0] == "NAME  SIZE"


def test_changes_are_told_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    table = ChangeList(shown_fields(FIELDS, "wide"), headers=True)
    table.print([(THINGS[0], False)])
    table.print([(("a long name", 1), False), (THINGS[1], True)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["NAME", "SIZE", "STATE"], ["b", "2", "READY"], ["a", "long", "name", "1", "READY"],
        ["c", "-", "GONE"],
    ]  # fmt: skip
    assert lines[3].index("GONE") == lines[2].index("READY"), "later rows are aligned too"


def test_the_names_of_columns_are_the_same_for_ever() -> None:
    """Scripts name them; add some, but take none away."""
    names = [field.column.title.lower() for field in INSTANCE_FIELDS]
    assert names == [
        "instance", "state", "order", "model", "host", "load", "run", "wait", "kv", "gpu", "gpu-mem", "temp",
        "ttft", "eng-ttft", "pred-ttft", "eng-itl", "pred-step", "slowdown", "done", "lost", "beat", "clock",
        "faults", "reason",
    ]  # fmt: skip
    assert [field.column.title.lower() for field in REQUEST_FIELDS] == [
        "request", "state", "model", "priority", "tenant", "user", "session", "age", "queued", "ttft",
        "total", "in", "out", "ahead", "attempts", "cost", "instance", "finish", "why",
    ]  # fmt: skip


def cells(fields: Sequence[Field[Any]], thing: object) -> dict[str, str]:
    return {field.column.title: field.cell(thing) for field in fields}


def test_an_instance_of_which_nothing_is_known() -> None:
    spec = ExecutionInstance(instance_id="i", host="h", port=1, model_name="m")
    bare = Instance(spec=spec, state=InstanceState.STARTING)
    shown = cells(INSTANCE_FIELDS, bare)
    assert (shown["INSTANCE"], shown["STATE"], shown["LOAD"]) == ("i", "STARTING", "0/0")
    unknown = set(shown) - {"INSTANCE", "STATE", "MODEL", "LOAD", "DONE", "LOST"}
    assert {name: shown[name] for name in unknown} == dict.fromkeys(unknown, "-")


def test_an_instance_of_which_everything_is_known() -> None:
    def half(seconds: float) -> DurationQuantiles:
        return DurationQuantiles(sample_count=9, mean_s=1, p50_s=seconds, p95_s=2, p99_s=3)

    gpus = tuple(
        GpuReading(
            index=index,
            utilization=0.5 + index / 4,
            used_memory_bytes=30 << 30,
            total_memory_bytes=80 << 30,
            temperature_celsius=60.0 + index,
        )
        for index in range(2)
    )
    instance = Instance(
        spec=ExecutionInstance(instance_id="i", host="h", port=1, model_name="m", host_id="box"),
        state=InstanceState.UNHEALTHY,
        state_reason="GPU 1 fell off the bus",
        in_flight_request_count=3,
        max_concurrent_request_count=8,
        engine=EngineGauges(
            running_request_count=2,
            waiting_request_count=1,
            key_value_cache_usage=0.0123,
            ttft=half(0.25),
            inter_token_latency=half(0.01),
        ),
        gpus=gpus,
        mean_ttft_s=0.3,
        learned=LearnedPerformance(
            kind="k",
            observation_count=5,
            slowdown=1.5,
            single_step_s=0.01,
            step_s=0.02,
            prefill_tokens_per_second=1e4,
            ttft_s=0.1,
        ),
        sleep=Sleep(begin_time_s=1.0, asleep=True),
        clock_offset_s=-1.5,
        gpu_faults=(
            GpuFault(gpu_uuid="u", gpu_index=1, kind=GpuFaultKind.XID, message="x", begin_s=1.0),
            GpuFault(gpu_uuid="u", gpu_index=1, kind=GpuFaultKind.THERMAL, message="y", begin_s=1.0),
        ),
    )
    shown = cells(INSTANCE_FIELDS, instance)
    expected = {
        "ORDER": "asleep", "HOST": "box", "LOAD": "3/8", "RUN": "2", "WAIT": "1", "KV": "1.2%", "GPU": "62%",
        "GPU-MEM": "60/160G", "TEMP": "61C", "TTFT": "300 ms", "ENG-TTFT": "250 ms", "PRED-TTFT": "100 ms",
        "ENG-ITL": "10.0 ms", "PRED-STEP": "20.0 ms", "SLOWDOWN": "1.50x", "CLOCK": "-1.50 s",
        "FAULTS": "THERMAL,XID", "REASON": "GPU 1 fell off the bus",
    }  # fmt: skip
    assert {name: shown[name] for name in expected} == expected
    for field in INSTANCE_FIELDS:
        alike = [instance, dataclasses.replace(instance)]
        assert len(sort(alike, INSTANCE_FIELDS, field.column.title, reverse=False)) == 2


def test_requests_are_ordered_by_what_their_cells_say() -> None:
    def request(name: str, create_time_s: float, priority: str, **fields: Any) -> RequestStatus:
        return RequestStatus(
            request_id=name,
            state=RequestState.RUNNING,
            model_name="m",
            priority=RequestPriority[priority],
            create_time_s=create_time_s,
            **fields,
        )

    requests = [
        request("old", 10.0, "LOW", first_token_time_s=10.5),
        request("new", 20.0, "CRITICAL", first_token_time_s=21.0),
        request("none", 15.0, "NORMAL"),
    ]

    def order(name: str) -> list[str]:
        return [status.request_id for status in sort(requests, REQUEST_FIELDS, name, reverse=False)]

    assert order("age") == ["new", "none", "old"]
    assert order("ttft") == ["old", "new", "none"]
    assert order("priority") == ["new", "none", "old"]
