"""GPUs as a DCGM exporter tells them, from a page served on this host."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.agent.gpu import dcgm
from sagecp.agent.gpu.choice import GpuChoice
from sagecp.agent.gpu.dcgm import parse_page
from sagecp.agent.gpu.probe import GpuProbe
from sagecp.core.gpu import GpuDevice, GpuReading, XidError
from tests.support.nvml_stub import ManualClock, load_stub

PAGE = (Path(__file__).parents[1] / "data" / "dcgm-exporter-sample.txt").read_text()
UUID_0 = "GPU-5c7d1a52-0c1e-4e43-9a70-1f2b7f6c1d01"
UUID_1 = "GPU-8e0b2f9c-77d3-4b16-b0a4-6e5d3c2b1a02"
LABELS = 'gpu="0",UUID="GPU-1",modelName="M"'


class Exporter:
    """A server whose page can be changed."""

    def __init__(self) -> None:
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exporter.request_count += 1
                self.send_response(exporter.status)
                if exporter.status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(exporter.stated_length or len(exporter.page)))
                self.end_headers()
                self.wfile.write(exporter.page)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.page = PAGE.encode()
        self.status = 200
        self.stated_length = 0
        self.request_count = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/metrics"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exporter]:
    # A busy machine is not what is tested.
    monkeypatch.setattr(dcgm, "_TIMEOUT_S", 10.0)
    made = Exporter()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join(10)


def test_everything_an_exporter_tells(exporter: Exporter) -> None:
    report = GpuProbe(dcgm_exporter=exporter.url).read()
    first, second = report.readings
    assert first == GpuReading(
        index=0,
        uuid=UUID_0,
        name="NVIDIA H100 80GB HBM3",
        utilization=0.97,
        used_memory_bytes=72944 << 20,
        total_memory_bytes=(72944 + 8104 + 511) << 20,
        temperature_celsius=64.0,
        power_watts=612.349,
        power_limit_watts=700.0,
        sm_clock_mhz=1980,
        throttle_reasons=("SwPowerCap",),
        uncorrected_ecc_error_count=0,
        corrected_ecc_error_count=3,
        row_remap_failed=False,
        memory_clock_mhz=2619,
        memory_utilization=0.54,
        memory_temperature_celsius=58.0,
        nvlink_error_count=7,
    )
    assert second.uuid == UUID_1
    assert second.row_remap_failed is True
    assert second.nvlink_error_count == 0, "what DCGM writes for unknown is not counted"
    assert second.xid_errors == (), "an error from before the agent came"
    assert report.devices[0] == GpuDevice(
        index=0,
        uuid=UUID_0,
        name="NVIDIA H100 80GB HBM3",
        pci_bus_id="00000000:18:00.0",
        total_memory_bytes=(72944 + 8104 + 511) << 20,
    )
    assert report.chosen_by == "nobody: all of this host"


@pytest.mark.parametrize(
    ("entries", "indices"), [(("1",), [1]), (("1", "0"), [1, 0]), (("GPU-8e0b",), [1]), ((UUID_0, "0"), [0])]
)
def test_only_selected_gpus(exporter: Exporter, entries: tuple[str, ...], indices: list[int]) -> None:
    choice = GpuChoice(selection=entries, selected_by="--gpus")
    report = GpuProbe(choice, exporter.url).read()
    assert [reading.index for reading in report.readings] == indices
    assert (report.chosen_by, report.are_selected) == ("--gpus", True)


def test_a_selection_that_fits_nothing_says_so(exporter: Exporter) -> None:
    choice = GpuChoice(selection=("4",), selected_by="--gpus")
    reason = GpuProbe(choice, exporter.url).read().absent_reason
    assert reason == "GPU 4 of --gpus does not exist: this host has 2, from 0"


def test_an_error_is_told_when_it_changes_and_once(exporter: Exporter) -> None:
    clock = ManualClock()
    probe = GpuProbe(dcgm_exporter=exporter.url, clock=clock, wall_clock=clock)
    probe.read()
    exporter.page = PAGE.replace('err_code="0"', 'err_code="79"').encode()
    clock.pass_time(10)
    for _ in range(3):
        first, second = probe.read().readings
        assert first.xid_errors == (XidError(79, 1010.0),)
        assert second.xid_errors == ()
        clock.pass_time(10)


def test_a_page_is_fetched_now_and_then(exporter: Exporter) -> None:
    clock = ManualClock()
    probe = GpuProbe(dcgm_exporter=exporter.url, clock=clock)
    for _ in range(10):
        assert len(probe.read().readings) == 2
        clock.pass_time(1)
    assert exporter.request_count == 2


@pytest.mark.parametrize(
    ("status", "page", "reason"),
    [
        (404, b"", "the DCGM exporter at {url} does not answer: Not Found"),
        # Nothing on another path of the exporter, or another server, is its page.
        (302, b"", "the DCGM exporter at {url} does not answer: Found"),
        (200, b"", "the DCGM exporter at {url} tells of no GPU"),
        (200, b"\xff\x00<html>", "the DCGM exporter at {url} tells of no GPU"),
        (200, b"#" * (5 << 20), "the page at {url} is larger than 4 MiB: not a DCGM exporter's"),
    ],
)
def test_pages_that_are_no_exporters(exporter: Exporter, status: int, page: bytes, reason: str) -> None:
    exporter.status, exporter.page = status, page
    assert GpuProbe(dcgm_exporter=exporter.url).read().absent_reason == reason.format(url=exporter.url)


def test_a_page_that_is_cut_off_is_not_taken_for_a_host_with_fewer_gpus(exporter: Exporter) -> None:
    exporter.page = PAGE.encode()[:-100]
    exporter.stated_length = len(PAGE)
    reason = GpuProbe(dcgm_exporter=exporter.url).read().absent_reason
    assert reason.endswith("does not answer: the page was cut off 100 bytes before its end")


def test_an_answer_that_is_not_of_a_web_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"nonsense\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
        assert "does not answer: nonsense" in GpuProbe(dcgm_exporter=url).read().absent_reason
        thread.join(10)


def test_an_exporter_that_is_not_there_is_asked_again_soon(exporter: Exporter) -> None:
    clock = ManualClock()
    exporter.status = 500
    probe = GpuProbe(dcgm_exporter=exporter.url, clock=clock)
    assert not probe.read().readings
    assert probe.is_resting
    exporter.status = 200
    clock.pass_time(6)
    assert not probe.is_resting
    assert len(probe.read().readings) == 2


def test_the_exporter_of_this_host_is_read_where_there_is_no_driver(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcgm, "DEFAULT_URL", exporter.url)
    monkeypatch.setattr("sagecp.agent.gpu.probe.DEFAULT_URL", exporter.url)
    stub = load_stub(monkeypatch, "init 12")
    clock = ManualClock()
    no_driver = "no NVIDIA driver: libnvidia-ml.so.1 was not found"
    assert GpuProbe(dcgm_exporter="off", clock=clock).read().absent_reason == no_driver
    probe = GpuProbe(dcgm_exporter="auto", clock=clock)
    assert [reading.uuid for reading in probe.read().readings] == [UUID_0, UUID_1]
    # A driver that comes later is asked itself.
    stub.control("init 0")
    assert probe.read().readings[0].uuid == UUID_0
    clock.pass_time(61)
    assert probe.read().readings[0].uuid.startswith("GPU-a")
    probe.close()
    # What nobody asked for is not what is missing.
    exporter.status = 404
    stub.control("init 12")
    assert GpuProbe(dcgm_exporter="auto", clock=clock).read().absent_reason == no_driver


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"DCGM_FI_DEV_GPU_TEMP{{{LABELS}}} 50", {"GPU_TEMP": 50.0}),
        (f"DCGM_FI_DEV_GPU_TEMP{{{LABELS}}} 50 1700000000000", {"GPU_TEMP": 50.0}),
        (f'DCGM_FI_DEV_GPU_TEMP{{{LABELS},pod="a}} 1"}} 50', {"GPU_TEMP": 50.0}),
        (f"DCGM_FI_DEV_GPU_TEMP{{{LABELS}}} NaN", None),
        (f"DCGM_FI_DEV_GPU_TEMP{{{LABELS}}} -1", None),
        (f"DCGM_FI_DEV_GPU_TEMP{{{LABELS}}} +Inf", None),
        (f"DCGM_FI_DEV_GPU_TEMP{{{LABELS}}} 2147483632", None),
        (f"DCGM_FI_DEV_GPU_TEMP{{{LABELS}}} 9223372036854775792", None),
        (f"DCGM_FI_DEV_GPU_TEMP{{{LABELS}}} fifty", None),
        (f"DCGM_FI_PROF_SM_ACTIVE{{{LABELS}}} 1", None),
        ('DCGM_FI_DEV_GPU_TEMP{gpu="x",UUID="GPU-1"} 50', None),
        ('DCGM_FI_DEV_GPU_TEMP{gpu="0"} 50', None),
        ("DCGM_FI_DEV_GPU_TEMP 50", None),
        # A part of a GPU says nothing of how the whole is used, but of how warm it is.
        (f'DCGM_FI_DEV_FB_USED{{{LABELS},GPU_I_ID="3"}} 50', {}),
        (f'DCGM_FI_DEV_GPU_TEMP{{{LABELS},GPU_I_ID="3"}} 50', {"GPU_TEMP": 50.0}),
        (f'DCGM_FI_DEV_XID_ERRORS{{{LABELS},err_code="48"}} 1', {"XID_ERRORS": 48.0}),
    ],
)
def test_lines_of_a_page(line: str, expected: dict[str, float] | None) -> None:
    found = parse_page(line)
    assert [gpu.values for gpu in found] == ([] if expected is None else [expected])


def test_labels_are_read_as_they_were_meant() -> None:
    line = 'DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-1",modelName="a \\"b\\" \\\\ c\\nd"} 1'
    assert parse_page(line)[0].name == 'a "b" \\ c\nd'


def test_a_page_of_too_many_gpus_is_cut_short() -> None:
    lines = [f'DCGM_FI_DEV_GPU_TEMP{{gpu="{index}",UUID="GPU-{index}"}} 1' for index in range(1000)]
    assert len(parse_page("\n".join(lines))) == 64


@given(
    st.lists(
        st.one_of(
            st.text(max_size=80),
            st.builds(
                'DCGM_FI_DEV_{}{{gpu="{}",UUID="GPU-{}"{}}} {}'.format,
                st.sampled_from(["GPU_TEMP", "FB_USED", "XID_ERRORS", "CLOCKS_EVENT_REASONS", "x"]),
                st.text(max_size=6),
                st.text(max_size=6),
                st.text(max_size=20),
                st.one_of(st.floats().map(str), st.text(max_size=30)),
            ),
        )
    )
)
def test_whatever_a_page_holds_figures_are_plain_numbers(lines: list[str]) -> None:
    for gpu in parse_page("\n".join(lines)):
        assert all(0 <= value < 2**63 for value in gpu.values.values())
