"""How many requests there are of each kind, without looking at each of them."""

from __future__ import annotations

from collections.abc import ItemsView

from sagecp.core.request import RequestRecord

RequestKind = tuple[str, str, int]
"""Model, tenant and number of the class."""


class RequestCounts:
    """Counts requests by model, tenant and class. Kinds without any request take no memory."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[RequestKind, int] = {}

    def add(self, request: RequestRecord) -> None:
        """Count a request."""
        metadata = request.metadata
        kind = (request.model, metadata.tenant_id, int(metadata.priority))
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def discard(self, request: RequestRecord) -> None:
        """Stop counting a request that was counted."""
        metadata = request.metadata
        kind = (request.model, metadata.tenant_id, int(metadata.priority))
        left = self._counts[kind] - 1
        if left:
            self._counts[kind] = left
        else:
            del self._counts[kind]

    def items(self) -> ItemsView[RequestKind, int]:
        """Return the kinds that there are, each with its number of requests."""
        return self._counts.items()
