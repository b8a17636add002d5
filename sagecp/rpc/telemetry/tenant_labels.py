"""Which tenants have series of their own."""

from __future__ import annotations

from collections.abc import Callable

OTHER = "other"
"""What all tenants without series of their own are called together."""


class TenantLabels:
    """Names the tenants that are busy, at most a bounded number, and calls the rest ``other``.

    A tenant that has a name keeps it while it is in use, so that its counters
    only grow. Where all places are taken, a new tenant gets the place of the one that
    was heard of least recently, if that was long ago; the series of that one end.
    Until then it counts as ``other``.

    Args:
        limit: Most tenants with a name.
        idle_s: How long a tenant must be silent before another may have its place.
        on_retired: Told the tenant that lost its place.
    """

    def __init__(self, limit: int, idle_s: float, on_retired: Callable[[str], None]) -> None:
        self._limit = limit
        self._idle_s = idle_s
        self._on_retired = on_retired
        # When each was last heard of, the least recent first.
        self._seen_s: dict[str, float] = {}

    def label(self, tenant_id: str, now: float) -> str:
        """Return what a tenant is called, and note that it was heard of."""
        seen_s = self._seen_s
        if tenant_id in seen_s:
            del seen_s[tenant_id]
        elif len(seen_s) >= self._limit:
            quietest = next(iter(seen_s))
            if now - seen_s[quietest] < self._idle_s:
                return OTHER
            del seen_s[quietest]
            self._on_retired(quietest)
        seen_s[tenant_id] = now
        return tenant_id
