"""How long a request the READY instances of each model can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sagecp.core.least_value import LeastValue


class TokenLimits:
    """The largest token limit among the READY instances of each model, kept as they come and go."""

    __slots__ = ("_by_model", "_counted")

    def __init__(self) -> None:
        # Negated, as the largest is asked for.
        self._by_model: dict[str, LeastValue] = {}
        self._counted: dict[str, tuple[Sequence[str], float]] = {}

    def add(self, instance_id: str, models: Sequence[str], token_limit: float) -> None:
        """Count an instance, unless it is counted already.

        Args:
            instance_id: Its id.
            models: The names it serves.
            token_limit: Tokens that it can hold for one request; infinite: unknown.
        """
        if instance_id in self._counted:
            return
        self._counted[instance_id] = (models, token_limit)
        for model in models:
            self._by_model.setdefault(model, LeastValue()).add(-token_limit)

    def discard(self, instance_id: str) -> None:
        """Stop counting an instance, if it is counted."""
        counted = self._counted.pop(instance_id, None)
        if counted is None:
            return
        models, token_limit = counted
        for model in models:
            values = self._by_model[model]
            values.discard(-token_limit)
            if values.least(math.inf) == math.inf:
                del self._by_model[model]

    def largest(self, model: str) -> float:
        """Return the largest limit, in tokens; 0: no instance of the model is READY."""
        values = self._by_model.get(model)
        return -values.least(0.0) if values is not None else 0.0
