"""What is wrong with GPUs, by what is read of them; and what follows for their instances."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.gpu import GpuDevice, GpuFaultKind, GpuReading, XidError
from sagecp.core.gpu_faults import MAX_GPU_COUNT, GpuWatch
from sagecp.core.health_limits import HealthLimits
from sagecp.core.types import EngineCondition, InstanceState
from sagecp.core.xid_codes import BROKEN, DOUBTFUL
from tests.support.core_world import ENGINE_FAILED, STEP_TIME, World, arrive, beat, healthy

LIMITS = HealthLimits(gpu_fault_clear_s=60.0, gpu_throttle_s=30.0, gpu_missing_beat_count=3)
READY, UNHEALTHY = InstanceState.READY, InstanceState.UNHEALTHY
HOT = {"throttle_reasons": ("HwSlowdown", "HwThermalSlowdown"), "utilization": 1.0}
GONE = "gone"
UNREADABLE = "unreadable"

Reading = dict[str, Any] | str


def xids(*codes: int) -> dict[str, Any]:
    return {"xid_errors": tuple(XidError(code, 100.0 + number) for number, code in enumerate(codes))}


def run(script: Sequence[tuple[float, Reading]], devices: Sequence[GpuDevice] = ()) -> list[str]:
    """Have a watch read one GPU, time by time; return what began and what was over, and when."""
    watch = GpuWatch(LIMITS)
    other = GpuReading(index=1, uuid="GPU-b")
    found = []
    for now, content in script:
        if content == "agent restarts":
            watch.note_agent_restart()
            continue
        if content == "engine restarts":
            watch.note_engine_restart()
            continue
        if content == "accept":
            watch.accept()
            continue
        readings = [other]
        if isinstance(content, dict):
            readings.insert(0, GpuReading(index=0, uuid="GPU-a", **content))
        changes = watch.note(
            [] if content == UNREADABLE else readings, devices, now, readable=content != UNREADABLE
        )
        found += [
            f"{now:g} {fault.kind.name}{' out' if fault.quarantines else ''}" for fault in changes.began
        ]
        found += [f"{now:g} {fault.kind.name} over" for fault in changes.cleared]
    return found


FINE: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param([(0, FINE), (1, FINE)], [], id="nothing"),
        # -- the driver's errors
        pytest.param([(0, xids(79)), (1, xids(79)), (500, xids(79))], ["0 XID out"], id="broken for good"),
        pytest.param([(0, xids(13, 31, 43, 45, 68))], [], id="an application's errors"),
        pytest.param([(0, xids(63))], ["0 XID"], id="doubtful"),
        pytest.param([(0, xids(63)), (1, xids(63, 48))], ["0 XID", "1 XID out"], id="it becomes worse"),
        pytest.param(
            [(0, xids(79)), *[(n, xids(*[13] * n)) for n in range(1, 9)]],
            ["0 XID out"],
            id="pushed off the list",
        ),
        pytest.param(
            [(0, xids(79)), (1, "agent restarts"), (2, FINE), (61, FINE), (62, FINE)],
            ["0 XID out", "62 XID over"],
            id="another agent knows nothing of it",
        ),
        pytest.param(
            [(0, xids(79)), (1, "agent restarts"), (2, FINE), (61, xids(79)), (62, FINE), (200, FINE)],
            ["0 XID out"],
            id="it comes again before it was over",
        ),
        pytest.param(
            [(0, xids(94)), (1, "engine restarts"), (2, xids(94)), (62, xids(94))],
            ["0 XID out", "62 XID over"],
            id="contained: until the engine starts again",
        ),
        pytest.param(
            [(0, xids(95)), (1, "engine restarts"), (2, xids(95)), (62, xids(95))],
            ["0 XID out"],
            id="uncontained: not even then",
        ),
        pytest.param(
            [(0, xids(79)), (1, "accept"), (2, xids(79)), (3, xids(79, 48)), (4, xids(79, 48))],
            ["0 XID out", "3 XID out"],
            id="accepted, until there is more",
        ),
        # -- memory
        pytest.param(
            [(0, {"uncorrected_ecc_error_count": 3}), (1, {"uncorrected_ecc_error_count": 3})],
            [],
            id="errors of long ago",
        ),
        pytest.param(
            [
                (0, {"uncorrected_ecc_error_count": 3}),
                (1, {"uncorrected_ecc_error_count": 4}),
                (2, FINE),
                (3, {"uncorrected_ecc_error_count": 4}),
                (500, {"uncorrected_ecc_error_count": 4}),
            ],
            ["1 ECC out"],
            id="another error",
        ),
        pytest.param(
            [
                (0, {"uncorrected_ecc_error_count": 3} | xids(48)),
                (1, {"uncorrected_ecc_error_count": 5} | xids(48)),
                (2, {"uncorrected_ecc_error_count": 0}),
                (62, {"uncorrected_ecc_error_count": 0}),
            ],
            ["0 XID out", "1 ECC out", "62 XID over", "62 ECC over"],
            id="the driver begins anew",
        ),
        pytest.param(
            [
                (0, {"uncorrected_ecc_error_count": 0}),
                (1, {"uncorrected_ecc_error_count": 1}),
                (2, "accept"),
                (3, {"uncorrected_ecc_error_count": 1}),
                (4, {"uncorrected_ecc_error_count": 2}),
            ],
            ["1 ECC out", "4 ECC out"],
            id="accepted errors, and one more",
        ),
        pytest.param(
            [(0, {"row_remap_pending": True}), (1, {"row_remap_failed": True}), (2, FINE), (62, FINE)],
            ["0 ECC", "1 ECC out", "62 ECC over"],
            id="spare rows",
        ),
        pytest.param([(0, {"row_remap_pending": False, "row_remap_failed": False})], [], id="rows are fine"),
        # -- heat and power
        pytest.param([(0, HOT), (29, HOT), (30, HOT)], ["30 THERMAL out"], id="hot for long"),
        pytest.param([(0, HOT), (29, FINE), (30, HOT), (59, HOT)], [], id="hot now and then"),
        pytest.param(
            [(0, HOT), (30, HOT), (31, HOT | {"utilization": 0.0}), (40, FINE), (100, FINE)],
            ["30 THERMAL out", "100 THERMAL over"],
            id="it cools down when it is out",
        ),
        pytest.param(
            [(0, HOT | {"utilization": 0.0}), (30, HOT | {"utilization": 0.0}), (31, HOT)],
            ["30 THERMAL", "31 THERMAL out"],
            id="hot and idle takes nothing from anybody",
        ),
        pytest.param(
            [(n, {"throttle_reasons": ("SwThermalSlowdown",), "utilization": 1.0}) for n in (0, 30)],
            ["30 THERMAL"],
            id="the driver's own measure",
        ),
        pytest.param(
            [
                (0, {"throttle_reasons": ("HwPowerBrakeSlowdown",)}),
                (30, {"throttle_reasons": ("HwPowerBrakeSlowdown",)}),
            ],
            ["30 POWER"],
            id="power",
        ),
        pytest.param(
            [(n, {"throttle_reasons": ("SwPowerCap", "GpuIdle", "HwSlowdown")}) for n in (0, 30, 90)],
            [],
            id="other reasons",
        ),
        # -- links
        pytest.param(
            [
                (0, {"nvlink_count": 18, "active_nvlink_count": 18}),
                (1, {"nvlink_count": 18, "active_nvlink_count": 16}),
                (2, {"nvlink_count": 18, "active_nvlink_count": 18}),
                (62, {"nvlink_count": 18, "active_nvlink_count": 18}),
            ],
            ["1 NVLINK", "62 NVLINK over"],
            id="links that had worked",
        ),
        pytest.param(
            [
                (0, {"nvlink_count": 18, "active_nvlink_count": 12}),
                (1, {"nvlink_count": 18, "active_nvlink_count": 12}),
            ],
            [],
            id="links that never worked",
        ),
        # -- absence
        pytest.param(
            [(0, FINE), (1, GONE), (2, GONE), (3, GONE), (4, GONE), (5, FINE), (65, FINE)],
            ["3 MISSING out", "65 MISSING over"],
            id="gone and back",
        ),
        pytest.param(
            [(0, FINE), (1, GONE), (2, GONE), (3, FINE), (4, GONE), (5, GONE)], [], id="now and then"
        ),
        pytest.param([(0, FINE), *[(n, UNREADABLE) for n in range(1, 9)]], [], id="no GPU can be read"),
        pytest.param(
            [(0, xids(79)), *[(n, UNREADABLE) for n in range(1, 200)]],
            ["0 XID out"],
            id="nothing is learned then",
        ),
        pytest.param(
            [(0, FINE), (1, "agent restarts"), *[(n, GONE) for n in range(2, 9)]],
            [],
            id="another agent, other GPUs",
        ),
        pytest.param(
            [(0, xids(79)), (1, "agent restarts"), (2, GONE), (62, GONE)],
            ["0 XID out", "62 XID over"],
            id="the broken one was taken away",
        ),
    ],
)
def test_faults(script: list[tuple[float, Reading]], expected: list[str]) -> None:
    assert run(script) == expected


def test_gpus_that_were_announced_and_are_not_there() -> None:
    devices = (GpuDevice(index=0, uuid="GPU-a"), GpuDevice(index=1, uuid="GPU-b"))
    assert run([(n, GONE) for n in range(5)], devices) == ["2 MISSING out"]
    # Those of the registration are meant, however many the host has.
    assert run([(0, FINE), *[(n, GONE) for n in range(1, 5)]], devices[1:]) == []


def test_an_error_is_as_old_as_the_agents_clock_says() -> None:
    watch = GpuWatch(LIMITS)
    reading = GpuReading(index=0, xid_errors=(XidError(79, 5000.0),))
    for agent_time_s, begin_s in ((5060.0, 940.0), (4000.0, 1000.0), (None, 1000.0)):
        watch = GpuWatch(LIMITS)
        (fault,) = watch.note([reading], (), 1000.0, agent_time_s=agent_time_s).began
        assert fault.begin_s == begin_s


def test_what_is_said_names_the_gpu_and_what_to_do() -> None:
    watch = GpuWatch(LIMITS)
    readings = [
        GpuReading(index=3, uuid="GPU-1234-5678-9abc", **xids(63, 79)),
        GpuReading(index=0, uncorrected_ecc_error_count=1, row_remap_failed=True),
    ]
    watch.note([dataclasses.replace(readings[1], uncorrected_ecc_error_count=0)], (), 0.0)
    watch.note(readings, (), 1.0)
    assert [fault.message for fault in watch.faults] == [
        "GPU 0: an uncorrected memory error; there are no spare rows left for bad memory; replace the GPU",
        f"GPU 3 (GPU-1234-567): Xid 79, {BROKEN[79]}; Xid 63, {DOUBTFUL[63]}",
    ]
    assert watch.why_not() == "; ".join(fault.message for fault in watch.faults)


def test_many_faults_are_told_in_short() -> None:
    watch = GpuWatch(LIMITS)
    watch.note([GpuReading(index=index, **xids(79)) for index in range(8)], (), 0.0)
    assert len(watch.faults) == 8
    assert watch.why_not().count("Xid 79") == 3
    assert watch.why_not().endswith("; and 5 more")


def test_what_is_remembered_is_bounded() -> None:
    watch = GpuWatch(LIMITS)
    for number in range(500):
        watch.note([GpuReading(index=0, uuid=f"GPU-{number}")], (), float(number))
    assert len(watch._gpus) == MAX_GPU_COUNT
    for number in range(500):
        errors = tuple(XidError(92, float(n)) for n in range(number, number + 8))
        watch.note([GpuReading(index=0, uuid="GPU-0", xid_errors=errors)], (), 1000.0)
    assert len(watch._gpus["GPU-0"].xids) <= 16


def test_a_grave_error_is_not_forgotten_for_many_doubtful_ones() -> None:
    watch = GpuWatch(LIMITS)
    watch.note([GpuReading(index=0, **xids(79))], (), 0.0)
    for number in range(100):
        errors = tuple(XidError(92, float(n)) for n in range(number, number + 8))
        watch.note([GpuReading(index=0, xid_errors=errors)], (), 1000.0)
    assert "Xid 79" in watch.why_not()


# -- what follows for instances --------------------------------------------------------------


def world_of(count: int = 4, **limits: Any) -> World:
    world = World(
        load_balancer="least_connections",
        lease_duration_s=1e6,
        default_concurrency_limit=50,
        health=dataclasses.replace(LIMITS, **limits),
    )
    for number in range(count):
        world.feed(healthy(f"i{number}", incarnation=1, step_time=STEP_TIME))
    return world


def gpu_beat(
    instance_id: str,
    *codes: int,
    incarnation: int = 1,
    condition: EngineCondition = EngineCondition.HEALTHY,
) -> ev.HeartbeatReceived:
    readings = (GpuReading(index=0, uuid=f"GPU-{instance_id}", **xids(*codes)),)
    return dataclasses.replace(beat(instance_id, incarnation, condition), gpus=readings)


def test_an_instance_with_a_broken_gpu_is_out_and_what_runs_there_runs_on() -> None:
    world = world_of(2)
    world.feed(gpu_beat("i0"), arrive("r1"), arrive("r2"))
    running = dict(world.instance("i0").in_flight)
    assert running
    assert world.feed(gpu_beat("i0", 79)) == ["i0 XID out", "i0 READY>UNHEALTHY"]
    instance = world.instance("i0")
    assert instance.state_reason.startswith("GPU 0 (GPU-i0): Xid 79")
    assert instance.in_flight == running
    (fault,) = instance.gpu_faults
    assert (fault.kind, fault.quarantines) == (GpuFaultKind.XID, True)
    # Its engine's word changes nothing, and nobody probes it.
    assert world.feed(gpu_beat("i0", 79)) == []
    assert instance.health.outage is None
    for number in range(3, 9):
        assert world.feed(arrive(f"r{number}"))[-1].endswith("i1")


def test_a_fault_of_a_gpu_that_may_be_another_engines_is_only_shown() -> None:
    world = world_of(2)
    shared = dataclasses.replace(world.instance("i0").spec, gpu_count=1)
    world.feed(ev.InstanceRegistered(shared, 1, EngineCondition.HEALTHY))
    broken = gpu_beat("i0", 79)
    both = dataclasses.replace(broken, gpus=(*broken.gpus, GpuReading(index=1, uuid="GPU-other")))
    world.feed(both)
    instance = world.instance("i0")
    assert instance.state is InstanceState.READY
    assert [(fault.kind, fault.quarantines) for fault in instance.gpu_faults] == [(GpuFaultKind.XID, False)]
    assert "uses 1 of the 2 GPUs" in instance.health.gpu_warning


def test_it_comes_back_when_the_fault_is_over_and_stays_over() -> None:
    world = world_of(2)
    world.feed(gpu_beat("i0", 79))
    # The operator had it reset, and its agent restarted.
    world.feed(healthy("i0", incarnation=2, step_time=STEP_TIME))
    assert world.instance("i0").state is not READY
    found = []
    for _ in range(61):
        found += world.feed(gpu_beat("i0", incarnation=2), gpu_beat("i1"))
        world.wait(1.0)
    assert found == ["i0 XID over", "i0 UNHEALTHY>READY"]
    assert world.instance("i0").gpu_faults == ()


def test_an_operator_who_knows_better_lets_it_back_in() -> None:
    world = world_of(2)
    world.feed(gpu_beat("i0", 79))
    assert world.feed(ev.DrainRequested("i0", force=True)) == ["i0 UNHEALTHY>DRAINING", "i0 DRAINING>DRAINED"]
    assert world.feed(gpu_beat("i0", 79)) == []
    assert world.feed(ev.DrainRequested("i0", undo=True)) == ["i0 DRAINED>READY"]
    assert world.feed(gpu_beat("i0", 79)) == []
    (fault,) = world.instance("i0").gpu_faults
    assert not fault.quarantines
    world.wait(120.0)
    assert world.feed(gpu_beat("i0", 79, 48))[:1] == ["i0 XID out"]


def test_an_instance_that_joins_with_a_broken_gpu_gets_nothing() -> None:
    world = world_of(1)
    world.feed(ev.InstanceRegistered(dataclasses.replace(world.instance("i0").spec, instance_id="new"), 1))
    assert world.feed(gpu_beat("new", 79)) == ["new XID out", "new STARTING>UNHEALTHY"]


def test_no_more_are_taken_out_than_may_be() -> None:
    world = world_of(4)
    found = [world.feed(gpu_beat(f"i{number}", 79)) for number in range(4)]
    assert [lines[1:] for lines in found] == [["i0 READY>UNHEALTHY"], ["i1 READY>UNHEALTHY"], [], []]
    stays = "2 of 4 instances for 'm' are out, of at most 50%"
    assert found[2] == [f"i2 XID {stays}"]
    for name in ("i2", "i3"):
        instance = world.instance(name)
        assert instance.state is READY
        assert instance.state_reason.endswith(f"not taken out: {stays}")
        assert "Xid 79" in instance.state_reason
        (fault,) = instance.gpu_faults
        assert not fault.quarantines
    # Ejections count as well, and against each other.
    world.feed(ev.InstanceDeregistered("i0"), healthy("i4", incarnation=1), healthy("i5", incarnation=1))
    assert world.feed(gpu_beat("i2", 79)) == ["i2 READY>UNHEALTHY"]
    assert world.feed(gpu_beat("i3", 79)) == []


def test_the_last_one_stays_and_is_taken_out_when_there_is_another() -> None:
    world = world_of(1)
    assert world.feed(gpu_beat("i0", 79)) == ["i0 XID no other READY instance serves 'm'"]
    assert world.instance("i0").state is READY
    world.feed(healthy("i1", incarnation=1))
    assert world.feed(gpu_beat("i0", 79)) == ["i0 READY>UNHEALTHY"]
    # And it is better than nothing when that one is gone.
    world.feed(ev.InstanceDeregistered("i1"))
    assert world.feed(gpu_beat("i0", 79)) == ["i0 UNHEALTHY>READY"]
    assert "not taken out: no other READY" in world.instance("i0").state_reason


def test_an_ejected_instance_whose_gpu_breaks_is_not_back_when_it_answers() -> None:
    world = world_of(2, failure_limit=1)
    world.feed(arrive("r"))
    name = world.record("r").instance_id
    failed = [
        effect
        for effect in world.effects(ev.AttemptFailed("r", 1, ENGINE_FAILED, retryable=False))
        if isinstance(effect, fx.InstanceChanged)
    ]
    assert [effect.state for effect in failed] == [UNHEALTHY]
    world.feed(gpu_beat(name, 79))
    for _ in range(8):
        world.wait(31.0)
        world.feed(ev.EngineProbed(name, answered=True), beat_other(world, name))
    assert world.instance(name).health.outage is None
    world.feed(gpu_beat(name, 79))
    assert world.instance(name).state is UNHEALTHY
    assert world.instance(name).state_reason.startswith("GPU 0")


def beat_other(world: World, name: str) -> ev.HeartbeatReceived:
    (other,) = (each for each in world.scheduler.fleet if each.instance_id != name)
    return gpu_beat(other.instance_id)


@pytest.mark.parametrize("codes", [(63,), (13,)])
def test_what_is_not_grave_takes_nobody_out(codes: tuple[int, ...]) -> None:
    world = world_of(2)
    world.feed(gpu_beat("i0", *codes))
    assert world.instance("i0").state is READY
    assert world.instance("i0").state_reason == "the engine answers"
    assert len(world.instance("i0").gpu_faults) == (codes == (63,))
