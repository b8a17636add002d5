"""An operator's order that an instance takes no new work."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class DrainOrder:
    """What an operator ordered, and how far it is. Times are on the core's clock.

    It outlasts health, lease and re-registration of its instance. Only undoing
    it, or deregistration, ends it.

    Attributes:
        begin_s: When it was first ordered.
        cause: Why, for the record; ``""``: not said.
        forced: Whether the rest of the fleet was not asked.
        grace_s: How long requests may run on there, as it was ordered; ``None``: to their ends.
        grace_end_s: When requests that are left are moved; ``None``: never.
        moved_request_count: Requests that went on elsewhere.
        asked_request_ids: Requests whose move was asked for; those that cannot go on elsewhere
            run on all the same. Never more than what ran there when the drain began.
        sleep_level: Its engine sleeps once it is drained: 1 keeps the weights in the host's memory,
            2 drops them; 0: it stays awake.
        next_move_s: When there may be something to move; ``None``: nothing will be.
    """

    begin_s: float
    cause: str = ""
    forced: bool = False
    grace_s: float | None = None
    grace_end_s: float | None = None
    moved_request_count: int = 0
    asked_request_ids: set[str] = field(default_factory=set)
    next_move_s: float | None = None
    sleep_level: int = 0
