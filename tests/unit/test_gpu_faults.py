"""What an agent tells of GPUs that go wrong: critical errors, GPUs that are lost, drivers that go."""

from __future__ import annotations

import pytest

from sagecp.agent.gpu.choice import GpuChoice
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.core.gpu import GpuReading, XidError
from tests.support.nvml_stub import ManualClock, NvmlStub, load_stub

WALL_S = 1_700_000_000.0


class Rig:
    """A probe of both GPUs, on clocks that the test moves."""

    def __init__(self, stub: NvmlStub, choice: GpuChoice | None = None) -> None:
        self.stub = stub
        self.clock = ManualClock()
        self.probe = GpuProbe(choice, clock=self.clock, wall_clock=lambda: WALL_S + self.clock.now_s)

    @property
    def wall_s(self) -> float:
        return WALL_S + self.clock.now_s

    def read(self) -> tuple[GpuReading, ...]:
        return self.probe.read().readings


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(load_stub(monkeypatch))


def test_critical_errors_come_with_the_next_reading_and_stay(rig: Rig) -> None:
    assert [reading.xid_errors for reading in rig.read()] == [(), ()]
    rig.stub.control("xid 1 48 -1")
    error = XidError(48, rig.wall_s)
    assert [reading.xid_errors for reading in rig.read()] == [(), (error,)]
    rig.clock.pass_time(3600)
    assert [reading.xid_errors for reading in rig.read()] == [(), (error,)]


def test_the_latest_eight_are_kept(rig: Rig) -> None:
    rig.read()
    for code in range(100):
        rig.stub.control(f"xid 0 {code} -1")
    rig.read()
    errors = rig.read()[0].xid_errors
    assert [error.code for error in errors] == list(range(92, 100))


def test_errors_outlive_the_driver(rig: Rig) -> None:
    rig.read()
    rig.stub.control("xid 0 48 -1")
    rig.read()
    rig.stub.control("fail * -1 1")
    assert rig.probe.read().absent_reason == "the NVIDIA driver was unloaded"
    assert rig.probe.is_resting
    rig.stub.control("mend")
    rig.clock.pass_time(61)
    assert [error.code for error in rig.read()[0].xid_errors] == [48]
    rig.stub.control("xid 0 31 -1")
    assert [error.code for error in rig.read()[0].xid_errors] == [48, 31], "and are heard again"


def test_errors_of_a_part_are_not_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuple(f"MIG-{letter}0000000-1111-2222-3333-444444444444" for letter in "ab")
    rig = Rig(load_stub(monkeypatch), GpuChoice(selection=parts, selected_by="--gpus"))
    rig.read()
    rig.stub.control("xid 0 13 1", "xid 0 31 2", "xid 0 48 -1")
    codes = [[error.code for error in reading.xid_errors] for reading in rig.read()]
    assert codes == [[13, 48], [31, 48]]


@pytest.mark.parametrize(
    "command",
    [
        "fail nvmlEventSetCreate -1 13",
        "fail nvmlDeviceRegisterEvents -1 3",
        "fail nvmlDeviceGetSupportedEventTypes -1 13",
        "fail nvmlEventSetWait_v2 -1 999",
    ],
)
def test_a_driver_without_events_still_tells_the_rest(rig: Rig, command: str) -> None:
    rig.stub.control(command)
    assert [reading.utilization for reading in rig.read()] == [0.75, 0.75]


def test_a_lost_gpu_stays_listed_with_what_is_known_of_it(rig: Rig) -> None:
    before = rig.probe.read()
    rig.stub.control("fail * 1 15")
    lost = XidError(79, rig.wall_s)
    for _ in range(3):
        report = rig.probe.read()
        first, second = report.readings
        assert first == before.readings[0]
        assert second == GpuReading(
            index=1, uuid=before.readings[1].uuid, name=before.readings[1].name, xid_errors=(lost,)
        )
        assert report.devices == before.devices
        rig.clock.pass_time(1)


def test_a_lost_gpu_is_left_alone_for_a_while_and_found_again(rig: Rig) -> None:
    rig.read()
    rig.stub.control("fail * 1 15")
    rig.read()
    rig.stub.control("mend")
    rig.clock.pass_time(30)
    assert rig.read()[1].utilization is None, "not asked: every question to it may take seconds"
    rig.clock.pass_time(31)
    assert rig.read()[1].utilization == 0.75
    # The next time it wants a reset.
    rig.stub.control("fail * 1 16")
    assert [error.code for error in rig.read()[1].xid_errors] == [79, 143]


def test_the_drivers_own_word_of_a_loss_is_not_doubled(rig: Rig) -> None:
    rig.read()
    rig.stub.control("xid 1 79 -1", "fail * 1 15")
    assert [error.code for error in rig.read()[1].xid_errors] == [79]


@pytest.mark.parametrize("command", ["fail nvmlDeviceGetHandleByIndex_v2 0 15", "fail * 0 15"])
def test_a_gpu_lost_before_the_agent_came(rig: Rig, command: str) -> None:
    rig.stub.control(command)
    first, second = rig.read()
    assert first.index == 0
    assert first.temperature_celsius is None
    assert [error.code for error in first.xid_errors] == [79]
    assert second.temperature_celsius == 61.0
    rig.stub.control("mend")
    rig.clock.pass_time(61)
    assert rig.read()[0].temperature_celsius == 61.0


def test_indices_that_move_up_do_not_mix_gpus_up(rig: Rig) -> None:
    first, second = rig.read()
    rig.stub.control("fail * 1 15")
    rig.read()
    # A driver that was opened anew has one GPU less.
    rig.stub.control("gpus 1")
    rig.clock.pass_time(61)
    report = rig.probe.read()
    assert [reading.uuid for reading in report.readings] == [first.uuid, second.uuid]
    assert report.readings[1].temperature_celsius is None
    rig.stub.control("gpus 0")
    rig.clock.pass_time(61)
    report = rig.probe.read()
    assert [reading.temperature_celsius for reading in report.readings] == [None, None]
    assert [reading.uuid for reading in report.readings] == [first.uuid, second.uuid]
