"""First in, first out."""

from __future__ import annotations

from typing import ClassVar

from sagecp.core.policies.base import SchedulingPolicy
from sagecp.core.request import RequestRecord
from sagecp.core.waiting_line import KeyedLine, WaitingLine


class FifoPolicy(SchedulingPolicy):
    """Order of arrival. Fair by age, blind to importance and to deadlines."""

    name: ClassVar[str] = "fifo"

    def new_line(self) -> WaitingLine:
        """Return a line in order of arrival."""
        return KeyedLine(lambda record: record.arrival_s)

    def explain(self, record: RequestRecord) -> str:
        """Return why the request was next."""
        return f"fifo: oldest request waiting for {record.model}"
