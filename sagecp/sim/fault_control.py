"""Which requests the switched-on faults hit."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping
from typing import Any

from sagecp.sim.api_fields import ApiError
from sagecp.sim.misbehaviour import Misbehaviour


class FaultControl:
    """The switches as they are, and how much of their limits is used up.

    Args:
        generator: Draws which requests are rejected.

    Attributes:
        switches: As set last.
    """

    def __init__(self, generator: random.Random) -> None:
        self.switches = Misbehaviour()
        self._random = generator
        self._hit: set[Hashable] = set()
        self._streams_left: int | None = None
        self._rejections_left = 0

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set switches; limits count anew.

        Raises:
            MisbehaviourError: A name is unknown or a value makes no sense.
        """
        self.switches = self.switches.changed(changes)
        if "reject_first" in changes:
            self._rejections_left = self.switches.reject_first
        self._streams_left = self.switches.stream_fault_limit
        self._hit.clear()

    def reject(self) -> None:
        """Refuse a request, if it is one that shall be refused.

        Raises:
            ApiError: It is.
        """
        if self._rejections_left:
            self._rejections_left -= 1
        elif not (self.switches.reject_rate and self._random.random() < self.switches.reject_rate):
            return
        status = self.switches.reject_status
        kind = "InternalServerError" if status >= 500 else "BadRequestError"
        raise ApiError("rejected on purpose", status=status, type_=kind)

    def claim(self, stream: Hashable) -> bool:
        """Return whether a stream may be hit; one that was hit may be hit again."""
        if stream in self._hit or self._streams_left is None:
            return True
        if self._streams_left == 0:
            return False
        self._streams_left -= 1
        self._hit.add(stream)
        return True

    def forget(self, stream: Hashable) -> None:
        """Drop what is known about a stream that has ended."""
        self._hit.discard(stream)
