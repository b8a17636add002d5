"""What is wrong with the GPUs of one instance, by what its agent reads of them.

Each fault follows one rule, as long as its condition holds:

* ``XID``: the driver reported an error of :mod:`sagecp.core.xid_codes`. It holds
  until another incarnation of the agent no longer tells of it, or the driver's
  counters begin anew; a contained memory error also until the engine starts again.
* ``ECC``: the count of uncorrected memory errors went up, until it begins anew; or
  memory waits to be replaced; or cannot be.
* ``THERMAL``, ``POWER``: the clocks were reduced for it for ``gpu_throttle_s`` without a pause.
* ``NVLINK``: links that had all worked do not.
* ``MISSING``: it was announced, or read before, and is not in ``gpu_missing_beat_count``
  beats in a row.

A fault is over when its condition has not held for ``gpu_fault_clear_s``. Of a GPU
that should be there and of which nothing is read, nothing is learned: its faults stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sagecp.core.gpu import GpuDevice, GpuFault, GpuFaultKind, GpuReading, XidError
from sagecp.core.health_limits import HealthLimits
from sagecp.core.xid_codes import BROKEN, CONTAINED_MEMORY_ERROR, DOUBTFUL

MAX_GPU_COUNT = 64
"""Most GPUs of an instance that are watched."""
# The latest of those that count; an agent tells of eight.
_MAX_XID_COUNT = 16
_LONGEST_AGE_S = 30 * 86_400.0
# A GPU that is hot and idle takes nothing from anybody.
_LEAST_UTILIZATION = 0.1
_THROTTLE_KINDS = (
    ("HwThermalSlowdown", GpuFaultKind.THERMAL, "the hardware slows it down because of heat"),
    ("SwThermalSlowdown", GpuFaultKind.THERMAL, "the driver slows it down because of heat"),
    ("HwPowerBrakeSlowdown", GpuFaultKind.POWER, "the hardware slows it down because of its power supply"),
)


@dataclass(frozen=True, slots=True)
class _Condition:
    """What a fault follows from, now.

    Attributes:
        severe: The instance should not work with it.
        evidence: What it follows from. Where somebody took note of all of it, that was enough.
    """

    kind: GpuFaultKind
    text: str
    severe: bool
    begin_s: float
    evidence: frozenset[object] = frozenset()


@dataclass(slots=True)
class _Gpu:
    """What is remembered of one GPU."""

    key: str
    uuid: str
    index: int
    # Whether it should be there: by the registration, or as it was read since.
    announced: bool = False
    # The reading that the rest below was last brought up to date with.
    reading: GpuReading | None = None
    ecc_baseline: int | None = None
    ecc_count: int | None = None
    had_all_links: bool = False
    missed_count: int = 0
    xids: dict[XidError, float] = field(default_factory=dict)
    throttled_since_s: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"GPU {self.index} ({self.uuid[:12]})" if self.uuid else f"GPU {self.index}"


@dataclass(slots=True)
class _Fault:
    gpu: _Gpu
    condition: _Condition
    begin_s: float
    severe: bool
    accepted: frozenset[object] | None = None
    clear_since_s: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it speaks against work: severe, and nobody took note of all of it."""
        return self.severe and (self.accepted is None or not self.condition.evidence <= self.accepted)

    def view(self) -> GpuFault:
        return GpuFault(
            gpu_uuid=self.gpu.uuid,
            gpu_index=self.gpu.index,
            kind=self.condition.kind,
            message=f"{self.gpu.name}: {self.condition.text}",
            begin_s=self.begin_s,
            quarantines=self.counts,
        )


@dataclass(frozen=True, slots=True)
class GpuChanges:
    """What a report changed. A fault that became worse began again."""

    began: tuple[GpuFault, ...] = ()
    cleared: tuple[GpuFault, ...] = ()


NO_CHANGES = GpuChanges()


class GpuWatch:
    """Watches the GPUs of one instance. All times on the core's clock.

    Args:
        limits: How long conditions must hold, and not hold.
    """

    __slots__ = ("_devices", "_faults", "_gpus", "_limits")

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        # As the registration announced them.
        self._devices: Sequence[GpuDevice] = ()
        self._gpus: dict[str, _Gpu] = {}
        self._faults: dict[tuple[str, GpuFaultKind], _Fault] = {}

    @property
    def faults(self) -> tuple[GpuFault, ...]:
        """What is wrong, by GPU; ``quarantines`` tells which speak against work."""
        return tuple(
            fault.view()
            for _, fault in sorted(self._faults.items(), key=lambda each: (each[1].gpu.index, each[0]))
        )

    def why_not(self) -> str:
        """Return what speaks against work, or ``""``."""
        texts = [fault.message for fault in self.faults if fault.quarantines] if self._faults else []
        more = f"; and {len(texts) - 3} more" if len(texts) > 3 else ""
        return "; ".join(texts[:3]) + more

    def accept(self) -> None:
        """Somebody took note of what is wrong, and wants work done: only more of it speaks against that."""
        for fault in self._faults.values():
            fault.accepted = fault.condition.evidence

    def note_agent_restart(self) -> None:
        """Another incarnation of the agent tells anew what it knows."""
        faulty = {gpu_key for gpu_key, _ in self._faults}
        self._devices = ()
        self._gpus = {key: gpu for key, gpu in self._gpus.items() if key in faulty}
        for gpu in self._gpus.values():
            gpu.xids.clear()
            gpu.missed_count = 0
            gpu.announced = False
            gpu.reading = None

    def note_engine_restart(self) -> None:
        """The engine began anew, without what a contained error had hit."""
        for gpu in self._gpus.values():
            for error in [each for each in gpu.xids if each.code == CONTAINED_MEMORY_ERROR]:
                # Kept, so that the agent's telling of it is no news; infinite: it is over.
                gpu.xids[error] = math.inf
            gpu.reading = None

    def note(
        self,
        readings: Sequence[GpuReading],
        devices: Sequence[GpuDevice],
        now: float,
        *,
        readable: bool = True,
        agent_time_s: float | None = None,
    ) -> GpuChanges:
        """Take a report.

        Args:
            readings: Of the GPUs that could be read.
            devices: Those that the instance is said to have; empty: not known.
            now: The time.
            readable: GPUs could be read at all; otherwise the absence of one says nothing.
            agent_time_s: The time of the agent's clock, in Unix seconds; ``None``: unknown.
        """
        if not readings and not self._gpus and not devices:
            return NO_CHANGES
        if devices is not self._devices:
            self._announce(devices)
        seen: set[str] = set()
        found: dict[tuple[str, GpuFaultKind], tuple[_Gpu, _Condition]] = {}
        for reading in readings[:MAX_GPU_COUNT]:
            gpu = self._gpu(reading.uuid, reading.index)
            if gpu is None:
                continue
            seen.add(gpu.key)
            gpu.missed_count = 0
            if not devices:
                gpu.announced = True
            self._follow(gpu, reading, now, agent_time_s)
            # Asked first, because of thousands of readings a second next to none shows anything.
            if self._may_be_faulty(gpu, reading):
                for condition in self._conditions(gpu, reading, now):
                    found[gpu.key, condition.kind] = (gpu, condition)
        if readable:
            for gpu in self._missed(seen):
                found[gpu.key, GpuFaultKind.MISSING] = (
                    gpu,
                    _Condition(GpuFaultKind.MISSING, "it is not there any more", severe=True, begin_s=now),
                )
        if not found and not self._faults:
            return NO_CHANGES
        return self._merge(found, seen, now)

    # -- conditions ----------------------------------------------------------------

    def _gpu(self, uuid: str, index: int) -> _Gpu | None:
        key = uuid or f"index {index}"
        gpu = self._gpus.get(key)
        if gpu is None:
            if len(self._gpus) >= MAX_GPU_COUNT:
                return None
            gpu = self._gpus[key] = _Gpu(key, uuid, index)
        gpu.index = index
        return gpu

    def _announce(self, devices: Sequence[GpuDevice]) -> None:
        self._devices = devices
        for gpu in self._gpus.values():
            gpu.announced = False
        for device in devices[:MAX_GPU_COUNT]:
            gpu_of_device = self._gpu(device.uuid, device.index) if device.uuid else None
            if gpu_of_device is not None:
                gpu_of_device.announced = True

    def _missed(self, seen: set[str]) -> Iterator[_Gpu]:
        """Yield the GPUs that are gone."""
        if len(seen) == len(self._gpus):
            return
        for gpu in self._gpus.values():
            if gpu.announced and gpu.key not in seen:
                gpu.missed_count += 1
                if gpu.missed_count >= self._limits.gpu_missing_beat_count:
                    yield gpu

    @staticmethod
    def _may_be_faulty(gpu: _Gpu, reading: GpuReading) -> bool:
        """Whether there may be conditions of a reading."""
        return bool(
            gpu.xids
            or gpu.throttled_since_s
            or gpu.ecc_count != gpu.ecc_baseline
            or reading.row_remap_failed
            or reading.row_remap_pending
            or reading.active_nvlink_count != reading.nvlink_count
        )

    def _conditions(self, gpu: _Gpu, reading: GpuReading, now: float) -> Iterator[_Condition]:
        if gpu.xids:
            yield from self._xid_condition(gpu, now)
        if reading.row_remap_failed or reading.row_remap_pending or gpu.ecc_count != gpu.ecc_baseline:
            yield from self._ecc_condition(gpu, reading, now)
        if gpu.throttled_since_s:
            yield from self._throttle_conditions(gpu, reading, now)
        active, count = reading.active_nvlink_count, reading.nvlink_count
        if gpu.had_all_links and active is not None and count is not None and active < count:
            yield _Condition(
                GpuFaultKind.NVLINK,
                f"{count - active} of its {count} NVLinks do not work",
                severe=False,
                begin_s=now,
            )

    @staticmethod
    def _follow(gpu: _Gpu, reading: GpuReading, now: float, agent_time_s: float | None) -> None:
        """Bring what is remembered of a GPU up to date."""
        before = gpu.reading
        if before is not None and before.uncorrected_ecc_error_count == reading.uncorrected_ecc_error_count:
            pass
        elif reading.uncorrected_ecc_error_count is not None:
            if gpu.ecc_count is not None and reading.uncorrected_ecc_error_count < gpu.ecc_count:
                # The driver began anew, which takes a reset of the GPU.
                gpu.xids.clear()
                gpu.ecc_baseline = reading.uncorrected_ecc_error_count
            elif gpu.ecc_baseline is None:
                gpu.ecc_baseline = reading.uncorrected_ecc_error_count
            gpu.ecc_count = reading.uncorrected_ecc_error_count
        if reading.xid_errors and (before is None or before.xid_errors != reading.xid_errors):
            for error in reading.xid_errors:
                if error not in gpu.xids and (error.code in BROKEN or error.code in DOUBTFUL):
                    age_s = 0.0 if agent_time_s is None else agent_time_s - error.time_s
                    gpu.xids[error] = now - min(max(age_s, 0.0), _LONGEST_AGE_S)
            while len(gpu.xids) > _MAX_XID_COUNT:
                doubtful = (error for error in gpu.xids if error.code in DOUBTFUL)
                del gpu.xids[next(doubtful, next(iter(gpu.xids)))]
        if reading.throttle_reasons or gpu.throttled_since_s:
            since = gpu.throttled_since_s
            gpu.throttled_since_s = {
                reason: since.get(reason, now)
                for reason, _, _ in _THROTTLE_KINDS
                if reason in reading.throttle_reasons
            }
        if reading.nvlink_count and reading.active_nvlink_count == reading.nvlink_count:
            gpu.had_all_links = True
        gpu.reading = reading

    @staticmethod
    def _xid_condition(gpu: _Gpu, now: float) -> Iterator[_Condition]:
        holding = {error: begin_s for error, begin_s in gpu.xids.items() if begin_s <= now}
        if not holding:
            return
        codes = list(dict.fromkeys(error.code for error in holding))
        codes.sort(key=lambda code: code not in BROKEN)
        yield _Condition(
            GpuFaultKind.XID,
            "; ".join(f"Xid {code}, {BROKEN.get(code) or DOUBTFUL[code]}" for code in codes),
            severe=codes[0] in BROKEN,
            begin_s=min(holding.values()),
            evidence=frozenset(holding),
        )

    @staticmethod
    def _ecc_condition(gpu: _Gpu, reading: GpuReading, now: float) -> Iterator[_Condition]:
        texts: list[str] = []
        evidence: set[object] = set()
        severe = False
        if gpu.ecc_count is not None and gpu.ecc_baseline is not None and gpu.ecc_count > gpu.ecc_baseline:
            count = gpu.ecc_count - gpu.ecc_baseline
            texts.append(
                "an uncorrected memory error" if count == 1 else f"{count} uncorrected memory errors"
            )
            evidence.add(gpu.ecc_count)
            severe = True
        if reading.row_remap_failed:
            texts.append("there are no spare rows left for bad memory; replace the GPU")
            evidence.add("failed")
            severe = True
        elif reading.row_remap_pending:
            texts.append("bad memory is replaced at the next reset; reset the GPU when there is time")
        if texts:
            yield _Condition(GpuFaultKind.ECC, "; ".join(texts), severe, now, frozenset(evidence))

    def _throttle_conditions(self, gpu: _Gpu, reading: GpuReading, now: float) -> Iterator[_Condition]:
        found: set[GpuFaultKind] = set()
        for reason, kind, text in _THROTTLE_KINDS:
            since_s = gpu.throttled_since_s.get(reason)
            if since_s is None or kind in found or now - since_s < self._limits.gpu_throttle_s:
                continue
            found.add(kind)
            busy = reading.utilization is not None and reading.utilization >= _LEAST_UTILIZATION
            celsius = reading.temperature_celsius
            at = f", at {celsius:.0f} degrees" if celsius is not None else ""
            severe = busy and reason == "HwThermalSlowdown"
            yield _Condition(kind, text + (at if kind is GpuFaultKind.THERMAL else ""), severe, since_s)

    # -- faults --------------------------------------------------------------------

    def _merge(
        self, found: dict[tuple[str, GpuFaultKind], tuple[_Gpu, _Condition]], seen: set[str], now: float
    ) -> GpuChanges:
        began, cleared = [], []
        for key, (gpu, condition) in found.items():
            fault = self._faults.get(key)
            if fault is None:
                fault = self._faults[key] = _Fault(gpu, condition, condition.begin_s, condition.severe)
                began.append(fault.view())
                continue
            counted = fault.counts
            fault.condition = condition
            fault.clear_since_s = None
            # A GPU that is out cools down: that does not make it well.
            fault.severe = fault.severe or condition.severe
            if fault.counts and not counted:
                began.append(fault.view())
        for key, fault in list(self._faults.items()):
            if key in found or (fault.gpu.announced and fault.gpu.key not in seen):
                continue
            if fault.clear_since_s is None:
                fault.clear_since_s = now
            if now - fault.clear_since_s >= self._limits.gpu_fault_clear_s:
                del self._faults[key]
                cleared.append(replace(fault.view(), quarantines=False))
        return GpuChanges(tuple(began), tuple(cleared))
