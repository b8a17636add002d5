"""Whether one instance may work although its engine says that it is well.

Two small state machines without a view of the fleet: :class:`InstanceHealth`
knows failures, stalls and probes, :class:`HoldDown` knows how often an instance
fell out of the rotation. :mod:`sagecp.core.health_book` feeds them and acts.
"""

from __future__ import annotations

import enum
import math

from sagecp.core.health_limits import HealthLimits
from sagecp.core.types import EngineGauges

PROBE_ANSWER_TIMEOUT_S = 30.0
"""A probe that nobody answered by then is made again."""
BURST_S = 1.0
"""Streams that are cut within this time were probably cut by one cause."""


class Outage(enum.Enum):
    """Why an instance is out."""

    EJECTED = "ejected"
    STALLED = "stalled"


class InstanceHealth:
    """Failures in a row, the present outage, and the probes that end it.

    in rotation --failures in a row--> EJECTED --time over, probes answered--> in rotation
    in rotation --silent with work---> STALLED --probes answered------------> in rotation

    All times on the core's clock.

    Args:
        limits: Bounds and times.

    Attributes:
        outage: Why it is out; ``None``: it is not.
        why: The same in words.
        failure_count: Failures in a row.
        ejection_count: Ejections in a row; goes down with every ``base_ejection_s`` in rotation.
        probe_s: When the next probe is due; infinite: none is.
        asked_attempts: Attempts (request id, epoch) whose interruption was asked for in this outage.
        gpu_fault: What is wrong with its GPUs, where it is out for that; ``""``: it is not. Beside
            the outage, because no probe ends it: an engine may answer on a GPU that is broken.
        gpu_warning: The same where it stays in all the same, with the reason for that.
    """

    __slots__ = (
        "_failure_s",
        "_gauges",
        "_limits",
        "_probe_wait_s",
        "_progress_s",
        "_return_s",
        "_stale_gauges",
        "_success_count",
        "asked_attempts",
        "ejection_count",
        "failure_count",
        "gpu_fault",
        "gpu_warning",
        "outage",
        "probe_s",
        "probing",
        "why",
    )

    def __init__(self, limits: HealthLimits | None = None) -> None:
        self._limits = limits or HealthLimits()
        self.outage: Outage | None = None
        self.why = ""
        self.failure_count = 0
        self.ejection_count = 0
        self.probe_s = math.inf
        self.probing = False
        self.asked_attempts: set[tuple[str, int]] = set()
        self.gpu_fault = ""
        self.gpu_warning = ""
        self._failure_s = -math.inf
        self._return_s = -math.inf
        self._success_count = 0
        self._probe_wait_s = 0.0
        self._gauges: tuple[object, ...] | None = None
        # What was shown before and after probes were answered: it says nothing of the engine.
        self._stale_gauges: tuple[object, ...] | None = None
        self._progress_s = -math.inf

    @property
    def is_out(self) -> bool:
        """Whether it may not work."""
        return self.outage is not None or bool(self.gpu_fault)

    # -- failures ----------------------------------------------------------------

    def note_success(self) -> None:
        """An attempt ran to its end."""
        self.failure_count = 0

    def note_failure(self, now: float, *, delivering: bool) -> bool:
        """An attempt failed by the engine's fault; return whether that was one too many.

        Args:
            now: The time.
            delivering: Its output was on its way. Many such streams that are cut
                at once, by a proxy that restarts for example, count as one failure.
        """
        if delivering and now - self._failure_s < BURST_S:
            return False
        self._failure_s = now
        self.failure_count += 1
        return self.failure_count >= self._limits.failure_limit

    # -- outages -----------------------------------------------------------------

    def eject(self, now: float, cause: str) -> None:
        """Keep it out: too many failures in a row. ``cause`` says what the last one was."""
        if self._return_s > -math.inf:
            well_s = now - self._return_s
            self.ejection_count = max(0, self.ejection_count - int(well_s // self._limits.base_ejection_s))
        count = self.failure_count
        self._start(Outage.EJECTED)
        self._prolong(now, f"ejected: {count} attempts in a row failed, the last with {cause}")

    def quarantine(self, now: float, cause: str) -> None:
        """Keep it out: it does not work on what it has. One that is ejected is stalled as well."""
        if self.outage is not None:
            self.outage, self.why = Outage.STALLED, f"stalled: {cause}"
            return
        self._start(Outage.STALLED)
        self._probe_wait_s = self._limits.probe_interval_s
        self.probe_s = now + self._probe_wait_s
        self.why = f"stalled: {cause}"

    def _start(self, outage: Outage) -> None:
        self.outage = outage
        self.failure_count = 0
        self._success_count = 0
        self.probing = False
        self.asked_attempts.clear()

    def _prolong(self, now: float, cause: str) -> None:
        self.ejection_count += 1
        duration_s = min(self._limits.max_ejection_s, self._limits.base_ejection_s * self.ejection_count)
        self.probe_s = now + duration_s
        self.why = f"{cause}; out for {duration_s:g} s, then a probe"

    # -- probes ------------------------------------------------------------------

    def begin_probe(self, now: float) -> None:
        """A probe is made."""
        self.probing = True
        self.probe_s = now + PROBE_ANSWER_TIMEOUT_S

    def note_probe(self, now: float, detail: str) -> bool:
        """A probe came to its end; return whether the outage is over.

        Args:
            now: The time.
            detail: What went wrong; ``""``: it was answered.
        """
        if not self.probing or self.outage is None:
            return False
        self.probing = False
        if not detail:
            self._success_count += 1
            self.probe_s = now + self._limits.probe_interval_s
            if self._success_count >= self._limits.probe_success_count:
                self._return(now)
                return True
        elif self.outage is Outage.EJECTED:
            self._success_count = 0
            self._prolong(now, f"ejected: a probe failed ({detail})")
        else:
            self._success_count = 0
            self._probe_wait_s = min(
                self._limits.max_probe_interval_s, max(self._limits.probe_interval_s, self._probe_wait_s * 2)
            )
            self.probe_s = now + self._probe_wait_s
            self.why = f"stalled: a probe failed ({detail}); the next follows after {self._probe_wait_s:g} s"
        return False

    def probe_soon(self, now: float) -> None:
        """Do not wait for the next probe: something changed that may have helped."""
        if self.outage is not None and not self.probing:
            self.probe_s = min(self.probe_s, now)

    def _return(self, now: float) -> None:
        self.outage = None
        self.why = ""
        self.probe_s = math.inf
        self.asked_attempts.clear()
        self._return_s = now
        self._stale_gauges = self._gauges

    # -- progress ----------------------------------------------------------------

    def note_gauges(self, gauges: EngineGauges | None, now: float) -> float:
        """Take an agent's report; return for how long its engine has had work and shown no progress."""
        if gauges is None or not gauges.running_request_count:
            self._gauges = None
            return 0.0
        # What waits may grow while nothing runs; all else moves with the work.
        shown = (
            gauges.running_request_count,
            gauges.key_value_cache_usage,
            gauges.prompt_token_count,
            gauges.generation_token_count,
            gauges.preemption_count,
            gauges.finished_request_count,
        )
        if gauges.generation_token_count is None or shown != self._gauges:
            # An engine that does not count its tokens shows nothing either way.
            self._gauges, self._progress_s = shown, now
        return 0.0 if shown == self._stale_gauges else now - self._progress_s

    def moved_since(self, time_s: float) -> bool:
        """Return whether the engine's own figures have moved since a time, as far as is known."""
        known = self._gauges is not None and self._gauges != self._stale_gauges
        return known and self._progress_s > time_s

    def skip(self, gap_s: float) -> None:
        """Nobody could look for a while: that was no silence."""
        self._progress_s += gap_s

    def forget_progress(self, now: float) -> None:
        """The engine, or its agent, began anew."""
        self._gauges = self._stale_gauges = None
        self._progress_s = now


class HoldDown:
    """How often an instance fell out of the rotation of late, and how long it must stay out.

    The first time costs nothing; the second one soon after holds it for a while,
    and each further one for twice as long.

    Attributes:
        fall_count: Falls in a row.
        fall_s: When the last one was.
        awaited_s: When somebody looks whether it may return.
        doubtful: The last fall has yet to be confirmed.
    """

    __slots__ = ("_before", "_quiet_since_s", "awaited_s", "doubtful", "fall_count", "fall_s")

    def __init__(self) -> None:
        self.fall_count = 0
        self.fall_s = -math.inf
        self.awaited_s = -math.inf
        self.doubtful = False
        # As things stood before the last fall.
        self._before = (0, -math.inf, -math.inf)
        self._quiet_since_s = -math.inf

    def note_fall(self, now: float, limits: HealthLimits) -> None:
        """It fell out."""
        self._before = (self.fall_count, self.fall_s, self._quiet_since_s)
        quiet = now - self._quiet_since_s >= limits.quiet_s
        self.fall_count = 1 if quiet else self.fall_count + 1
        self.fall_s = self._quiet_since_s = now
        self.doubtful = False

    def note_return(self, now: float) -> None:
        """It is back."""
        self._quiet_since_s = now

    def take_back(self) -> None:
        """The last fall was a mistake."""
        self.fall_count, self.fall_s, self._quiet_since_s = self._before
        self.doubtful = False

    def until_s(self, limits: HealthLimits) -> float:
        """Return until when it must stay out."""
        if self.fall_count < 2:
            return self.fall_s
        # Beyond any bound, but no number that overflows.
        doublings = min(self.fall_count - 2, 30)
        return self.fall_s + min(limits.max_hold_down_s, limits.base_hold_down_s * 2.0**doublings)
