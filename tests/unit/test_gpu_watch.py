"""How an agent watches GPUs: without waiting for a driver, and what it makes of them for the contract."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_facts import EngineFacts
from sagecp.agent.gpu.choice import GpuChoice
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.agent.gpu.report import GpuReport
from sagecp.agent.gpu.watch import GpuWatch
from sagecp.agent.messages import spec_to_proto
from sagecp.core.errors import InvalidRequestError
from sagecp.core.gpu import GpuDevice, GpuReading
from sagecp.log import get_logger
from sagecp.v1.fleet_service_pb2 import HeartbeatRequest
from sagecp.wire.gpu import device_from_proto, reading_from_proto, reading_to_proto
from tests.support.nvml_stub import ManualClock, NvmlStub, load_stub, run_with_library
from tests.support.waiting import until

MAX_BEAT_BYTES = 60 << 10


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> NvmlStub:
    return load_stub(monkeypatch)


class SlowProbe(GpuProbe):
    """A driver that answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = threading.Event()
        self.read_count = 0

    def read(self) -> GpuReport:
        self.read_count += 1
        assert self.may_answer.wait(60)
        return GpuReport((GpuReading(index=0),), devices=(GpuDevice(index=0),))


async def test_a_driver_that_hangs_is_not_waited_for() -> None:
    probe = SlowProbe()
    watch = GpuWatch(probe, get_logger("test"))
    watch.choose(GpuChoice())
    for _ in range(2):
        await watch.read()
        assert watch.report == GpuReport(absent_reason="the NVIDIA driver does not answer")
    assert probe.read_count == 1, "it is asked one thing at a time"
    probe.may_answer.set()
    await watch.read()
    assert len(watch.report.readings) == 1
    watch.close()


async def test_the_engines_of_an_agent_share_one_thread() -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "nvml"]

    before = set(threads())
    watches = []
    for _ in range(3):
        probe = SlowProbe()
        probe.may_answer.set()
        watches.append(GpuWatch(probe, get_logger("test")))
        watches[-1].choose(GpuChoice())
        await watches[-1].read()
        assert len(watches[-1].report.readings) == 1
    (thread,) = set(threads()) - before
    watches[0].close()
    await watches[1].read()
    assert len(watches[1].report.readings) == 1
    watches[1].close()
    watches[2].close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_driver_that_never_answers_does_not_keep_the_agent_alive() -> None:
    script = """
import asyncio, threading
from sagecp.agent.gpu.choice import GpuChoice
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.agent.gpu.watch import GpuWatch
from sagecp.log import get_logger

class Hanging(GpuProbe):
    def read(self):
        threading.Event().wait()

async def main():
    watch = GpuWatch(Hanging(), get_logger("test"))
    watch.choose(GpuChoice())
    await watch.read()
    watch.close()
    print(watch.report.absent_reason)

asyncio.run(main())
"""
    assert run_with_library(Path("/nowhere"), script) == "the NVIDIA driver does not answer\n"


async def test_whatever_goes_wrong_is_said_once_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = GpuProbe()

    def fail() -> GpuReport:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(probe, "read", fail)
    watch = GpuWatch(probe, get_logger("test"))
    watch.choose(GpuChoice())
    with capture_logs() as logs:
        for _ in range(3):
            await watch.read()
            assert watch.report.absent_reason == "the GPUs could not be read: ZeroDivisionError('a bug')"
    assert len(logs) == 1
    watch.close()


async def test_what_was_known_is_kept_while_the_driver_hangs(stub: NvmlStub) -> None:
    clock = ManualClock()
    watch = GpuWatch(GpuProbe(clock=clock), get_logger("test"))
    watch.choose(GpuChoice())
    await watch.read()
    before = watch.known
    assert len(before.readings) == 2
    stub.control("fail * -1 1")
    await watch.read()
    assert watch.report.absent_reason == "the NVIDIA driver was unloaded"
    assert watch.known == before
    watch.choose(GpuChoice(selection=("0",), selected_by="--gpus"))
    assert watch.known == GpuReport(), "of other GPUs nothing is known yet"
    watch.close()


@pytest.mark.usefixtures("stub")
async def test_which_gpus_were_chosen_is_said_whenever_that_changes() -> None:
    watch = GpuWatch(GpuProbe(), get_logger("test"))
    with capture_logs() as logs:
        for choice in (GpuChoice(), GpuChoice(), GpuChoice(selection=("1",), selected_by="--gpus")):
            watch.choose(choice)
            await watch.read()
    watch.close()
    assert [(entry["gpus"], entry["gpus_chosen_by"]) for entry in logs] == [
        ([0, 1], "nobody: all of this host"),
        ([1], "--gpus"),
    ]


async def test_a_watch_that_is_closed_lets_go_of_the_driver(stub: NvmlStub) -> None:
    watch = GpuWatch(GpuProbe(), get_logger("test"))
    watch.choose(GpuChoice())
    await watch.read()
    count = stub.library.nvmlDeviceGetCount_v2
    assert count(_integer()) == 0
    watch.close()
    await until(lambda: count(_integer()) == 1, "NVML is shut")


def _integer() -> Any:
    return ctypes.byref(ctypes.c_uint())


def config(**values: Any) -> AgentConfig:
    return AgentConfig(engine_url="http://127.0.0.1:8000", **values)


def facts(**values: Any) -> EngineFacts:
    return EngineFacts(model_name="m", sources={}, is_local=True, **values)


def test_gpus_are_registered_with_what_never_changes_about_them(stub: NvmlStub) -> None:
    stub.control("link 0 0 1 1", "link 1 0 1 0")
    probe = GpuProbe(GpuChoice(selection=("0", "1"), selected_by="--gpus"))
    report = probe.read()
    probe.close()
    spec = spec_to_proto(config(), facts(), report)
    assert (spec.gpu_count, spec.gpu_name, spec.gpu_memory_gib) == (2, "NVIDIA Stand-In 80GB", 80.0)
    assert tuple(device_from_proto(device) for device in spec.gpu_devices) == report.devices
    assert spec.gpu_devices[0].links[0].nvlink_count == 1


@pytest.mark.usefixtures("stub")
def test_of_gpus_that_nobody_chose_only_those_that_the_engine_needs_are_counted() -> None:
    probe = GpuProbe()
    report = probe.read()
    probe.close()
    assert spec_to_proto(config(), facts(tensor_parallel_size=1), report).gpu_count == 1
    assert spec_to_proto(config(), facts(tensor_parallel_size=8), report).gpu_count == 2


def test_a_beat_with_everything_of_sixteen_gpus_is_small(stub: NvmlStub) -> None:
    stub.control("gpus 16")
    for gpu in range(16):
        stub.control(f"set {gpu} reasons 2047")
        for link in range(18):
            stub.control(f"link {gpu} {link} 1 -1")
    probe = GpuProbe(wall_clock=lambda: 1_700_000_000.25)
    probe.read()
    for gpu in range(16):
        for code in range(8):
            stub.control(f"xid {gpu} {code + 40} -1")
    for _ in range(4):
        report = probe.read()
    probe.close()
    assert all(len(reading.xid_errors) == 8 for reading in report.readings)
    beat = HeartbeatRequest(gpus=[reading_to_proto(reading) for reading in report.readings])
    assert beat.ByteSize() < MAX_BEAT_BYTES / 2
    assert tuple(reading_from_proto(each) for each in beat.gpus) == report.readings
    assert spec_to_proto(config(), facts(), report).ByteSize() < MAX_BEAT_BYTES


@pytest.mark.parametrize("value", ["auto", "off", "http://10.0.0.7:9400/metrics", "https://[::1]/metrics"])
def test_where_an_exporter_may_be(value: str) -> None:
    assert config(dcgm_exporter=value).validate().dcgm_exporter == value


@pytest.mark.parametrize(
    "value", ["", "on", "127.0.0.1:9400", "ftp://h/metrics", "http://", "http://h:0", "http://h:x"]
)
def test_where_an_exporter_cannot_be(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="--dcgm-exporter"):
        config(dcgm_exporter=value).validate()
