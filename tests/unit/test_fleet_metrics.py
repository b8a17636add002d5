"""Metrics of a fleet: what has not ended and what GPUs report, together and by group."""

from __future__ import annotations

import itertools

import pytest

from sagecp.core import events as ev
from sagecp.core.types import EngineCondition, GpuReading, RequestPriority, RequestState
from sagecp.runtime import fleet_metrics as module
from sagecp.runtime.fleet_metrics import fleet_metrics
from sagecp.runtime.monitor import EndedSample, Monitor
from sagecp.runtime.monitor_keys import EVERYTHING, MetricsDimension, MetricsKey
from tests.support.core_world import World, arrive, healthy

GIB = 1 << 30
HIGH, LOW = RequestPriority.HIGH, RequestPriority.LOW


@pytest.fixture
def world() -> World:
    """Two models on three instances of one place each; more requests than places."""
    world = World()
    world.feed(healthy("a", "m", limit=1), healthy("b", "m", limit=1), healthy("c", "n", limit=1))
    for number in range(12):
        model, tenant_id = "mn"[number % 2], f"t{number % 3}"
        priority = HIGH if number % 4 < 2 else LOW
        world.feed(arrive(f"r{number}", model, tenant_id=tenant_id, priority=priority))
    return world


def counts(
    world: World, match: MetricsKey = EVERYTHING, dimension: MetricsDimension | None = None
) -> dict[str, tuple[int, int]]:
    table = fleet_metrics(world.scheduler, Monitor(), world.now, 60.0, match, dimension)
    return {
        value: (live.active, live.queued)
        for value, live in zip(table.values, table.live, strict=True)
        if live.active or live.queued
    }


def expected(
    world: World, match: MetricsKey, dimension: MetricsDimension | None
) -> dict[str, tuple[int, int]]:
    """The same, by a look at each request."""
    found: dict[str, list[int]] = {}
    for record in world.scheduler.requests():
        instance_id = "" if record.queued else record.instance_id
        metadata = record.metadata
        key = MetricsKey(record.model, instance_id, metadata.tenant_id, metadata.priority)
        if all(wanted in ("", None, own) for wanted, own in zip(match, key, strict=True)):
            value = "" if dimension is None else key.value_of(dimension)
            if dimension is None or value:
                found.setdefault(value, [0, 0])[int(record.queued)] += 1
    return {value: (active, queued) for value, (active, queued) in found.items()}


def test_what_has_not_ended_is_counted_by_everything_it_can_be_filtered_by(world: World) -> None:
    assert counts(world) == {"": (3, 9)}
    filters = itertools.product(("", "m", "n"), ("", "a", "c", "z"), ("", "t1"), (None, HIGH))
    for each in filters:
        match = MetricsKey(*each)
        for dimension in (None, *MetricsDimension):
            assert counts(world, match, dimension) == expected(world, match, dimension), (match, dimension)


def test_requests_on_an_instance_that_left_are_still_its_own(world: World) -> None:
    world.feed(ev.InstanceDeregistered("a"))
    by_instance = counts(world, EVERYTHING, MetricsDimension.INSTANCE)
    assert by_instance == {"a": (1, 0), "b": (1, 0), "c": (1, 0)}
    assert counts(world, MetricsKey(instance_id="a")) == {"": (1, 0)}


def test_instances_that_have_done_nothing_yet_are_groups_as_well() -> None:
    world = World()
    world.feed(healthy("a", "m", model_aliases=("alias",)), healthy("b", "n"))
    sample = EndedSample(
        0.0, MetricsKey("old", "gone", "t", HIGH), RequestState.SUCCEEDED, 1.0, 1.0, None, 0.0, 1, None
    )
    monitor = Monitor()
    monitor.record(sample)

    def values(dimension: MetricsDimension, match: MetricsKey = EVERYTHING) -> list[str]:
        return list(fleet_metrics(world.scheduler, monitor, 0.0, 60.0, match, dimension).values)

    assert values(MetricsDimension.INSTANCE) == ["a", "b", "gone"]
    assert values(MetricsDimension.MODEL) == ["alias", "m", "n", "old"]
    assert values(MetricsDimension.INSTANCE, MetricsKey(model="m")) == ["a"]
    assert values(MetricsDimension.MODEL, MetricsKey(model="m")) == ["m"]
    assert values(MetricsDimension.TENANT) == ["t"]
    assert values(MetricsDimension.PRIORITY) == ["HIGH"]
    assert values(MetricsDimension.PRIORITY, MetricsKey(model="m")) == []


def test_groups_are_bounded_the_first_by_name(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr(module, "MAX_GROUP_COUNT", 2)
    table = fleet_metrics(world.scheduler, Monitor(), 0.0, 60.0, EVERYTHING, MetricsDimension.INSTANCE)
    assert list(table.values) == ["a", "b"]
    assert len(table) == 2


def test_gpus_are_those_of_the_instances_of_the_group() -> None:
    world = World()
    world.feed(healthy("a", "m", 1), healthy("b", "m", 1), healthy("c", "n", 1))
    for number, instance_id in enumerate(("a", "b")):
        gpus = tuple(
            GpuReading(
                index=index,
                utilization=0.25 * (number + 1),
                used_memory_bytes=10 * GIB,
                total_memory_bytes=80 * GIB,
            )
            for index in range(2)
        )
        world.feed(ev.HeartbeatReceived(instance_id, 1, EngineCondition.HEALTHY, gpus=gpus))

    def figures(
        match: MetricsKey = EVERYTHING, dimension: MetricsDimension | None = None
    ) -> dict[str, tuple[float | None, float | None, float | None]]:
        table = fleet_metrics(world.scheduler, Monitor(), 0.0, 60.0, match, dimension)
        return {
            value: (
                table.metrics(place).average_gpu_utilization,
                table.metrics(place).used_gpu_memory_gb,
                table.metrics(place).total_gpu_memory_gb,
            )
            for place, value in enumerate(table.values)
        }

    unknown = (None, None, None)
    assert figures() == {"": (0.375, 40.0, 320.0)}
    assert figures(MetricsKey(instance_id="a")) == {"": (0.25, 20.0, 160.0)}
    assert figures(MetricsKey(model="n")) == {"": unknown}
    assert figures(dimension=MetricsDimension.INSTANCE) == {
        "a": (0.25, 20.0, 160.0),
        "b": (0.5, 20.0, 160.0),
        "c": unknown,
    }
    assert figures(dimension=MetricsDimension.MODEL) == {"m": (0.375, 40.0, 320.0), "n": unknown}
    # Tenants and classes share them: they are nobody's.
    assert figures(MetricsKey(tenant_id="t")) == {"": unknown}
    assert figures(MetricsKey(priority=HIGH)) == {"": unknown}
