"""Which GPUs are an engine's, by the processes that hold them, and how they are shared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_facts import EngineFacts
from sagecp.agent.gpu.choice import GpuChoice
from sagecp.agent.gpu.ownership import GpuProcess, GpuShare, ProcessFamily, share_of
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.agent.gpu.watch import choose_gpus
from tests.support.nvml_stub import ManualClock, NvmlStub, load_stub

# Starts a child, which starts another; each says who it is, and waits for its input to end.
GENERATION = """
import os, subprocess, sys
print(os.getpid(), flush=True)
if int(sys.argv[1]):
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(int(sys.argv[1]) - 1), sys.argv[2]])
sys.stdin.read()
if int(sys.argv[1]):
    child.wait()
"""


@dataclass(frozen=True)
class Family:
    """A process, its child and its grandchild."""

    engine: int
    child: int
    grandchild: int


@pytest.fixture(scope="module")
def family() -> Iterator[Family]:
    with subprocess.Popen(
        [sys.executable, "-c", GENERATION, "2", GENERATION],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ids = [int(process.stdout.readline()) for _ in range(3)]
        assert ids[0] == process.pid
        yield Family(*ids)
        process.stdin.close()
        process.wait(30)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> NvmlStub:
    return load_stub(monkeypatch, "gpus 4")


def test_descendants_are_the_engines_and_nobody_else_is(family: Family) -> None:
    known = ProcessFamily(family.engine)
    assert [known.has(each) for each in (family.engine, family.child, family.grandchild)] == [True] * 3
    # Its parent, the first process of the host, none at all, and one that cannot be.
    assert not any(known.has(each) for each in (os.getpid(), 1, 0, 1 << 30))
    assert not ProcessFamily(family.child).has(family.engine)


@pytest.mark.parametrize(
    ("stat", "expected"),
    [
        ("70 (VLLM::Worker) S 50 70 70 0", True),
        ("70 (a) b) (c (d) S 50 70 70 0", True),
        ("70 (python) S 1 70 70 0", False),
        ("70 (python) S 70 70 70 0", False),
        ("70 (python)", False),
        ("", False),
    ],
)
def test_parents_are_read_whatever_a_process_is_called(tmp_path: Path, stat: str, expected: bool) -> None:
    (tmp_path / "70").mkdir()
    (tmp_path / "70" / "stat").write_text(stat)
    assert ProcessFamily(50, tmp_path).has(70) is expected


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ((), GpuShare(0, 0, 0)),
        ((GpuProcess(5, 100), GpuProcess(5, 20)), GpuShare(120, 0, 2)),
        ((GpuProcess(5, 100), GpuProcess(6, 900)), GpuShare(100, 1, 1)),
        ((GpuProcess(5, None), GpuProcess(6, 900)), GpuShare(None, 1, 1)),
        ((GpuProcess(6, None),), GpuShare(0, 1, 0)),
    ],
)
def test_how_a_gpu_is_shared(tmp_path: Path, processes: tuple[GpuProcess, ...], expected: GpuShare) -> None:
    assert share_of(processes, ProcessFamily(5, tmp_path)) == expected


def test_gpus_are_found_by_the_processes_that_hold_them(stub: NvmlStub, family: Family) -> None:
    stub.control(
        f"process 1 {family.child} 4096",
        f"process 3 {family.grandchild} 8192",
        f"process 3 {os.getpid()} 512",
        f"process 0 {os.getpid()} 512",
    )
    probe = GpuProbe(GpuChoice(engine_process_id=family.engine))
    report = probe.read()
    assert [reading.index for reading in report.readings] == [1, 3]
    assert [reading.engine_memory_bytes for reading in report.readings] == [4096, 8192]
    assert [reading.foreign_process_count for reading in report.readings] == [0, 1]
    assert (report.chosen_by, report.are_selected) == ("the engine's processes", True)
    assert [[link.peer_uuid[:5] for link in device.links] for device in report.devices] == [
        ["GPU-d"],
        ["GPU-b"],
    ]
    probe.close()


def test_an_engine_that_loads_is_looked_for_until_it_is_found(stub: NvmlStub, family: Family) -> None:
    clock = ManualClock()
    choice = GpuChoice(engine_process_id=family.engine, fallback=("0",), fallback_by="CUDA_VISIBLE_DEVICES")
    probe = GpuProbe(choice, clock=clock)
    report = probe.read()
    assert [reading.index for reading in report.readings] == [0]
    assert report.chosen_by == "CUDA_VISIBLE_DEVICES"
    reading = report.readings[0]
    assert (reading.engine_memory_bytes, reading.foreign_process_count) == (None, None), "nobody was seen yet"
    stub.control(f"process 2 {family.child} 1000")
    clock.pass_time(6)
    assert [(each.index, each.engine_memory_bytes) for each in probe.read().readings] == [(2, 1000)]
    stub.control(f"process 1 {family.grandchild} 500")
    clock.pass_time(6)
    assert [each.index for each in probe.read().readings] == [1, 2], "a second worker came"
    # One that goes away, and comes back perhaps, takes no GPU from the list.
    stub.control("no processes", f"process 1 {family.grandchild} 500")
    clock.pass_time(6)
    assert [(each.index, each.engine_memory_bytes) for each in probe.read().readings] == [(1, 500), (2, 0)]
    probe.close()


def test_an_engine_that_was_started_again_is_found_anew(stub: NvmlStub, family: Family) -> None:
    stub.control(f"process 2 {family.engine} 1000")
    probe = GpuProbe(GpuChoice(engine_process_id=family.engine))
    assert [each.index for each in probe.read().readings] == [2]
    stub.control("no processes", f"process 3 {os.getpid()} 1000")
    probe.choose(GpuChoice(engine_process_id=os.getpid()))
    assert [each.index for each in probe.read().readings] == [3]
    probe.close()


def test_process_ids_of_another_namespace_are_nobodys(stub: NvmlStub, family: Family) -> None:
    stub.control("process 0 999999999 4096")
    probe = GpuProbe(GpuChoice(engine_process_id=family.engine))
    report = probe.read()
    assert (report.chosen_by, report.are_selected) == ("nobody: all of this host", False)
    assert len(report.readings) == 4
    assert report.readings[0].foreign_process_count is None
    probe.close()


@pytest.mark.parametrize("code", [3, 4, 13, 999])
def test_a_driver_that_tells_no_processes(stub: NvmlStub, family: Family, code: int) -> None:
    stub.control(f"fail nvmlDeviceGetComputeRunningProcesses_v3 -1 {code}")
    probe = GpuProbe(GpuChoice(engine_process_id=family.engine))
    assert len(probe.read().readings) == 4
    probe.close()


def test_memory_that_the_driver_does_not_tell_is_unknown(stub: NvmlStub, family: Family) -> None:
    stub.control(f"process 1 {family.child} -1")
    probe = GpuProbe(GpuChoice(selection=("1",), selected_by="--gpus", engine_process_id=family.engine))
    reading = probe.read().readings[0]
    assert (reading.engine_memory_bytes, reading.foreign_process_count) == (None, 0)
    probe.close()


def test_gpus_that_were_named_stay_whoever_holds_them(stub: NvmlStub, family: Family) -> None:
    stub.control(f"process 1 {family.child} 4096")
    probe = GpuProbe(GpuChoice(selection=("0",), selected_by="--gpus", engine_process_id=family.engine))
    report = probe.read()
    assert [reading.index for reading in report.readings] == [0]
    assert report.readings[0].engine_memory_bytes is None, "none of its processes is known to be there"
    probe.close()


LOCAL = {"model_name": "m", "sources": {}, "is_local": True, "process_id": 70}


@pytest.mark.parametrize(
    ("gpus", "facts", "environment", "expected"),
    [
        (("1",), LOCAL, {}, GpuChoice(selection=("1",), selected_by="--gpus", engine_process_id=70)),
        # Whoever names GPUs knows, even of an engine that calls itself simulated.
        (
            ("1",),
            LOCAL | {"simulated": True},
            {},
            GpuChoice(selection=("1",), selected_by="--gpus", engine_process_id=70),
        ),
        (
            None,
            LOCAL | {"simulated": True},
            {},
            GpuChoice(absent_reason="the engine is simulated: it uses no GPU"),
        ),
        (
            None,
            LOCAL | {"is_local": False},
            {},
            GpuChoice(absent_reason="the engine runs on another host, 127.0.0.1; run its agent there"),
        ),
        (
            None,
            LOCAL | {"visible_devices": "2,3"},
            {"CUDA_VISIBLE_DEVICES": "0"},
            GpuChoice(
                selection=("2", "3"), selected_by="the engine's CUDA_VISIBLE_DEVICES", engine_process_id=70
            ),
        ),
        (
            None,
            LOCAL,
            {"CUDA_VISIBLE_DEVICES": "0"},
            GpuChoice(engine_process_id=70, fallback=("0",), fallback_by="CUDA_VISIBLE_DEVICES"),
        ),
        (None, LOCAL, {}, GpuChoice(engine_process_id=70, fallback_by="CUDA_VISIBLE_DEVICES")),
        (None, LOCAL | {"process_id": None}, {}, GpuChoice(fallback_by="CUDA_VISIBLE_DEVICES")),
    ],
)
def test_who_decides(
    gpus: tuple[str, ...] | None, facts: dict[str, object], environment: dict[str, str], expected: GpuChoice
) -> None:
    config = AgentConfig(engine_url="http://127.0.0.1:8000", gpus=gpus)
    assert choose_gpus(config, EngineFacts(**facts), environment=environment) == expected  # type: ignore[arg-type]


def test_the_process_that_the_agent_started_comes_before_one_that_was_found() -> None:
    config = AgentConfig(engine_url="http://127.0.0.1:8000")
    facts = EngineFacts(**LOCAL)  # type: ignore[arg-type]
    assert choose_gpus(config, facts, 69, {}).engine_process_id == 69
    # Between two processes there is none.
    assert choose_gpus(config, facts, 0, {}).engine_process_id == 70
