"""What a request costs, as it is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCost:
    """What a request costs, US dollars; ``docs/costs.md`` says how that is found.

    Attributes:
        predicted_p10_usd: Predicted when it was last placed, or while it waits on the cheapest
            instance: 10 % quantile, over how long the answer may get. All three 0: nothing was predicted.
        predicted_p50_usd: Median.
        predicted_p90_usd: 90 % quantile.
        actual_usd: What it cost so far, lost attempts included; ``None``: no price is known.
    """

    predicted_p10_usd: float = 0.0
    predicted_p50_usd: float = 0.0
    predicted_p90_usd: float = 0.0
    actual_usd: float | None = None
