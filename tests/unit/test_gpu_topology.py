"""How GPUs reach each other, and what never changes about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagecp.agent.gpu.choice import GpuChoice
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.agent.gpu.report import GpuReport
from sagecp.core.gpu import GpuDevice, GpuLink, GpuLinkKind
from tests.support.nvml_stub import ManualClock, NvmlStub, load_stub

UUIDS = [f"GPU-{letter}0000000-1111-2222-3333-444444444444" for letter in "abcd"]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> NvmlStub:
    return load_stub(monkeypatch)


def read(sys: Path = Path("/nowhere"), choice: GpuChoice | None = None) -> GpuReport:
    probe = GpuProbe(choice, sys=sys)
    try:
        return probe.read()
    finally:
        probe.close()


def test_what_a_gpu_is(stub: NvmlStub, tmp_path: Path) -> None:
    folder = tmp_path / "bus/pci/devices/0000:17:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("3\n")
    stub.control("gpus 1")
    assert read(tmp_path).devices == (
        GpuDevice(
            index=0,
            uuid=UUIDS[0],
            name="NVIDIA Stand-In 80GB",
            pci_bus_id="00000000:17:00.0",
            numa_node=3,
            total_memory_bytes=80 << 30,
            max_sm_clock_mhz=1980,
            slowdown_temperature_celsius=90.0,
        ),
    )


def test_numa_nodes_where_the_kernel_does_not_say(stub: NvmlStub, tmp_path: Path) -> None:
    stub.control("set 1 numa_node 0")
    assert [device.numa_node for device in read(tmp_path).devices] == [1, 0], "the driver does"
    stub.control("fail nvmlDeviceGetMemoryAffinity -1 3")
    assert [device.numa_node for device in read(tmp_path).devices] == [None, None]
    folder = tmp_path / "bus/pci/devices/0000:17:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("-1\n")
    stub.control("mend")
    assert read(tmp_path).devices[0].numa_node is None, "the host has one"


def test_two_gpus_with_nvlinks_between_them(stub: NvmlStub) -> None:
    # Four links, one of which does not work, and each end knows the other.
    for link in range(4):
        stub.control(f"link 0 {link} {int(link > 0)} 1", f"link 1 {link} {int(link > 0)} 0")
    report = read()
    assert report.devices[0].links == (GpuLink(UUIDS[1], GpuLinkKind.NVLINK, 4),)
    assert report.devices[1].links == (GpuLink(UUIDS[0], GpuLinkKind.NVLINK, 4),)
    reading = report.readings[0]
    assert (reading.nvlink_count, reading.active_nvlink_count) == (4, 3)
    assert reading.nvlink_error_count == 4 * 4, "replays, recoveries and two kinds of CRC of each"


def test_nvlinks_to_a_switch_reach_everyone_there(stub: NvmlStub) -> None:
    stub.control("gpus 3", "ancestor 40")
    for gpu in (0, 1):
        for link in range(18):
            stub.control(f"link {gpu} {link} 1 -1")
    devices = read().devices
    assert devices[0].links == (
        GpuLink(UUIDS[1], GpuLinkKind.NVLINK, 0),
        GpuLink(UUIDS[2], GpuLinkKind.NUMA_NODE, 0),
    )
    # A partition of the switches' fabric may end between two of them.
    stub.control("set 0 p2p 5")
    assert read().devices[0].links[0] == GpuLink(UUIDS[1], GpuLinkKind.NUMA_NODE, 0)


@pytest.mark.parametrize(
    ("level", "kind"),
    [
        (0, GpuLinkKind.SAME_BOARD),
        (10, GpuLinkKind.PCI_SWITCH),
        (20, GpuLinkKind.PCI_SWITCHES),
        (30, GpuLinkKind.HOST_BRIDGE),
        (40, GpuLinkKind.NUMA_NODE),
        (50, GpuLinkKind.SYSTEM),
    ],
)
def test_ways_over_pci(stub: NvmlStub, level: int, kind: GpuLinkKind) -> None:
    stub.control(f"ancestor {level}")
    assert read().devices[0].links == (GpuLink(UUIDS[1], kind, 0),)


@pytest.mark.parametrize("level", [-1, 60])
def test_a_way_that_is_not_known_is_left_out(stub: NvmlStub, level: int) -> None:
    stub.control(f"ancestor {level}")
    assert read().devices[0].links == ()


def test_only_ways_among_the_engines_gpus_are_told(stub: NvmlStub) -> None:
    stub.control("gpus 4")
    report = read(choice=GpuChoice(selection=("1", "3"), selected_by="--gpus"))
    assert [[link.peer_uuid for link in device.links] for device in report.devices] == [
        [UUIDS[3]],
        [UUIDS[1]],
    ]


def test_nvlinks_are_looked_at_now_and_then(stub: NvmlStub) -> None:
    stub.control("link 0 0 1 1")
    clock = ManualClock()
    probe = GpuProbe(clock=clock)
    assert probe.read().readings[0].active_nvlink_count == 1
    stub.control("link 0 0 0 1", "set 0 link_errors 7")
    assert probe.read().readings[0].active_nvlink_count == 1
    clock.pass_time(11)
    reading = probe.read().readings[0]
    assert (reading.nvlink_count, reading.active_nvlink_count, reading.nvlink_error_count) == (1, 0, 28)
    probe.close()


def test_nvlinks_whose_errors_are_not_counted(stub: NvmlStub) -> None:
    stub.control("link 0 0 1 1", "fail nvmlDeviceGetNvLinkErrorCounter -1 3")
    first, second = read().readings
    assert (first.nvlink_count, first.active_nvlink_count, first.nvlink_error_count) == (1, 1, None)
    assert (second.nvlink_count, second.active_nvlink_count) == (None, None), "it has none"
