"""GPUs as NVIDIA's DCGM exporter tells them, for hosts where this process may not ask the driver."""

from __future__ import annotations

import http.client
import math
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sagecp.agent.gpu.choice import GpuChoice, find_named
from sagecp.agent.gpu.readings import throttle_names
from sagecp.agent.gpu.report import MAX_GPU_COUNT, GpuAbsentError, GpuReport
from sagecp.agent.gpu.xid import XidLog
from sagecp.core.gpu import GpuDevice, GpuReading

DEFAULT_URL = "http://127.0.0.1:9400/metrics"

_MAX_PAGE_BYTES = 4 << 20
_TIMEOUT_S = 0.5
# The exporter itself asks the driver only so often: every 30 s, unless it was told otherwise.
_PERIOD_S = 5.0
_MIB = 1 << 20
# What DCGM writes for "unknown" is at the upper end of 32 and 64 bits.
_BLANK_INT32 = range(0x7FFFFFF0, 0x80000000)
_BLANK_INT64 = float(0x7FFFFFFFFFFFFFF0)

_LINE = re.compile(r"^DCGM_FI_DEV_(\w+)\{(.*)\}\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")

# Names in the exporter's page, without their common beginning; the first that is there counts.
_ERROR_TOTALS = (
    "NVLINK_REPLAY_ERROR_COUNT_TOTAL",
    "NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
    "NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL",
    "NVLINK_CRC_DATA_ERROR_COUNT_TOTAL",
)
_THROTTLE_NAMES = ("CLOCKS_EVENT_REASONS", "CLOCK_THROTTLE_REASONS")
_POWER_LIMIT_NAMES = ("ENFORCED_POWER_LIMIT", "POWER_MGMT_LIMIT")
# Of a part (MIG) these say nothing of the whole GPU.
_OF_PARTS = frozenset({"GPU_UTIL", "MEM_COPY_UTIL", "FB_USED", "FB_FREE", "FB_TOTAL", "FB_RESERVED"})


@dataclass(frozen=True, slots=True)
class DcgmGpu:
    """One GPU of a page: its labels, and its values by name."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    values: dict[str, float]


class DcgmExporter:
    """One exporter's page. Blocks for at most about a second: ask in a thread.

    Args:
        url: The page.
        xid_log: Where critical errors are noted.
        clock: Monotonic seconds.
    """

    def __init__(self, url: str, xid_log: XidLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._xid_log = xid_log
        self._clock = clock
        # An environment's proxy has no business between an agent and its own host; and a page
        # that sends elsewhere is not an exporter's.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        self._gpus: list[DcgmGpu] = []
        self._read_at_s = -math.inf
        self._last_codes: dict[str, int] = {}

    def read(self, choice: GpuChoice) -> GpuReport:
        """Return what the exporter says of the chosen GPUs.

        Raises:
            GpuAbsentError: It does not answer, has no GPU, or not the chosen ones.
        """
        if self._clock() - self._read_at_s >= _PERIOD_S:
            self._gpus = parse_page(self._fetch())
            self._read_at_s = self._clock()
            self._note_errors()
        if not self._gpus:
            raise GpuAbsentError(f"the DCGM exporter at {self._url} tells of no GPU")
        named = choice.named
        chosen = self._gpus
        if named is not None:
            if not named:
                raise GpuAbsentError(f"{choice.named_by} hides every GPU")
            known = [(gpu.index, gpu.uuid) for gpu in self._gpus]
            indices = [find_named(entry, choice.named_by, known) for entry in named]
            by_index = {gpu.index: gpu for gpu in self._gpus}
            chosen = [by_index[index] for index in dict.fromkeys(indices)]
        return GpuReport(
            readings=tuple(_reading(gpu, self._xid_log) for gpu in chosen),
            devices=tuple(_device(gpu) for gpu in chosen),
            chosen_by=choice.named_by,
            are_selected=named is not None,
        )

    def _fetch(self) -> str:
        deadline_s = self._clock() + 2 * _TIMEOUT_S
        data = bytearray()
        try:
            with self._opener.open(self._url, timeout=_TIMEOUT_S) as response:
                while chunk := response.read1(1 << 16):
                    data += chunk
                    if len(data) > _MAX_PAGE_BYTES:
                        raise GpuAbsentError(
                            f"the page at {self._url} is larger than {_MAX_PAGE_BYTES >> 20} MiB: "
                            "not a DCGM exporter's"
                        )
                    if self._clock() > deadline_s:
                        raise TimeoutError("timed out")
                if response.length:
                    raise OSError(f"the page was cut off {response.length} bytes before its end")
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise GpuAbsentError(f"the DCGM exporter at {self._url} does not answer: {reason}") from None
        return data.decode("utf-8", "replace")

    def _note_errors(self) -> None:
        """Note what changed: the page goes on telling of the last error for as long as the exporter runs."""
        for gpu in self._gpus:
            code = int(gpu.values.get("XID_ERRORS", 0))
            before = self._last_codes.get(gpu.uuid)
            self._last_codes[gpu.uuid] = code
            if before is not None and code not in {before, 0}:
                self._xid_log.add(gpu.uuid, code)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:  # noqa: ANN401 - as the base class has it
        return None


def parse_page(text: str) -> list[DcgmGpu]:
    """Return the GPUs of an exporter's page, by index. What cannot be read is left out."""
    found: dict[str, DcgmGpu] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, value = match[1], _value(match[3])
        if value is None:
            continue
        labels = {key: _ESCAPE.sub(_unescape, text) for key, text in _LABEL.findall(match[2])}
        uuid, index = labels.get("UUID", ""), labels.get("gpu", "")
        if not uuid.startswith("GPU-") or not (index.isascii() and index.isdigit() and len(index) < 5):
            continue
        if uuid not in found:
            if len(found) >= MAX_GPU_COUNT:
                continue
            found[uuid] = DcgmGpu(
                int(index), uuid, labels.get("modelName", ""), labels.get("pci_bus_id", ""), {}
            )
        if name == "XID_ERRORS":
            # The label is the newer exporters' way to tell it.
            value = _value(labels.get("err_code", "")) or value
        if not (labels.get("GPU_I_ID") and name in _OF_PARTS):
            # Of several lines, for the containers that share a GPU, the first counts.
            found[uuid].values.setdefault(name, value)
    return sorted(found.values(), key=lambda gpu: gpu.index)


def _unescape(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def _value(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not 0 <= value < _BLANK_INT64 or int(value) in _BLANK_INT32:
        return None
    return value


def _reading(gpu: DcgmGpu, xid_log: XidLog) -> GpuReading:
    values = gpu.values
    pending, failed = values.get("ROW_REMAP_PENDING"), values.get("ROW_REMAP_FAILURE")
    errors = [values[name] for name in _ERROR_TOTALS if name in values]
    return GpuReading(
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        utilization=_share(values.get("GPU_UTIL")),
        used_memory_bytes=_whole(values.get("FB_USED"), _MIB),
        total_memory_bytes=_total_memory_bytes(values),
        temperature_celsius=values.get("GPU_TEMP"),
        power_watts=values.get("POWER_USAGE"),
        power_limit_watts=_first(values, _POWER_LIMIT_NAMES),
        sm_clock_mhz=_whole(values.get("SM_CLOCK")),
        throttle_reasons=throttle_names(int(_first(values, _THROTTLE_NAMES) or 0)),
        uncorrected_ecc_error_count=_whole(values.get("ECC_DBE_VOL_TOTAL")),
        corrected_ecc_error_count=_whole(values.get("ECC_SBE_VOL_TOTAL")),
        row_remap_pending=None if pending is None else bool(pending),
        row_remap_failed=None if failed is None else bool(failed),
        xid_errors=xid_log.errors_of(gpu.uuid),
        memory_clock_mhz=_whole(values.get("MEM_CLOCK")),
        memory_utilization=_share(values.get("MEM_COPY_UTIL")),
        memory_temperature_celsius=values.get("MEMORY_TEMP"),
        nvlink_error_count=int(sum(errors)) if errors else None,
    )


def _device(gpu: DcgmGpu) -> GpuDevice:
    return GpuDevice(
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        pci_bus_id=gpu.pci_bus_id,
        total_memory_bytes=_total_memory_bytes(gpu.values),
        max_sm_clock_mhz=_whole(gpu.values.get("MAX_SM_CLOCK")),
        slowdown_temperature_celsius=gpu.values.get("SLOWDOWN_TEMP"),
    )


def _total_memory_bytes(values: dict[str, float]) -> int | None:
    total = values.get("FB_TOTAL")
    if total is None and "FB_USED" in values and "FB_FREE" in values:
        # The exporter's own list of figures has the parts and not their sum.
        total = values["FB_USED"] + values["FB_FREE"] + values.get("FB_RESERVED", 0.0)
    return _whole(total, _MIB)


def _first(values: dict[str, float], names: tuple[str, ...]) -> float | None:
    return next((values[name] for name in names if name in values), None)


def _share(percent: float | None) -> float | None:
    return None if percent is None else min(percent, 100.0) / 100


def _whole(value: float | None, unit: int = 1) -> int | None:
    return None if value is None else round(value * unit)
