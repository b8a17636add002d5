"""The door through which others count what happens to requests."""

from __future__ import annotations

from typing import Protocol

from sagecp.core.errors import ErrorReason
from sagecp.core.request import RequestRecord
from sagecp.runtime.monitor import EndedSample
from sagecp.runtime.requests import RequestHandle


class RequestObserver(Protocol):
    """Told what happens to requests, on the event loop: every method must be quick and must not raise."""

    def accepted(self, record: RequestRecord) -> None:
        """A new request was accepted. Those that come back after a restart are not new."""

    def refused(self, reason: ErrorReason) -> None:
        """The core refused a request, or its acceptance could not be written down."""

    def attempt_lost(self, record: RequestRecord, reason: ErrorReason) -> None:
        """An attempt was lost, and its request waits for the next."""

    def ended(self, handle: RequestHandle, sample: EndedSample) -> None:
        """A request came to its end, and the monitor has its sample."""
