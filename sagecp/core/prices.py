"""What a GPU costs per hour, where an instance does not say so itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sagecp.core.errors import FieldViolation
from sagecp.core.gpu_specifications import UnknownGpuError, find_gpu, require_gpu
from sagecp.core.types import ExecutionInstance, PriceSource

_LARGEST_USD = 1e6


@dataclass(frozen=True, slots=True)
class GpuPrice:
    """What one GPU of an instance costs, US dollars per hour; ``None``: nobody knows."""

    usd_per_gpu_hour: float | None = None
    source: PriceSource = PriceSource.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPrices:
    """Prices in US dollars per GPU and hour. What an instance says of itself counts before all of them.

    Attributes:
        usd_per_gpu_hour: By kind of GPU: a name of `core.gpu_specifications`, or the one NVML gives it.
        default_usd_per_gpu_hour: Of any other; 0: there is none.
        use_usual_prices: Take the usual rents of `core.gpu_specifications` before the default. Off:
            what nobody priced has no price, and costs are unknown rather than guessed.
    """

    usd_per_gpu_hour: Mapping[str, float] = field(default_factory=dict)
    default_usd_per_gpu_hour: float = 0.0
    use_usual_prices: bool = False

    def by_kind(self) -> dict[str, float]:
        """Return the price of each kind of GPU that has one, by its short name."""
        return {require_gpu(name).name: price for name, price in self.usd_per_gpu_hour.items()}

    def price_of(self, instance: ExecutionInstance) -> GpuPrice:
        """Return what a GPU of an instance costs, and by whose word."""
        if instance.usd_per_gpu_hour is not None:
            return GpuPrice(instance.usd_per_gpu_hour, PriceSource.INSTANCE)
        gpu = find_gpu(instance.gpu_name)
        if gpu is not None:
            price = self.by_kind().get(gpu.name)
            if price is not None:
                return GpuPrice(price, PriceSource.GPU_KIND)
            if self.use_usual_prices:
                return GpuPrice(gpu.usd_per_hour, PriceSource.USUAL)
        if self.default_usd_per_gpu_hour > 0.0:
            return GpuPrice(self.default_usd_per_gpu_hour, PriceSource.DEFAULT)
        return GpuPrice()

    def violations(self) -> list[FieldViolation]:
        """Return what is wrong with it."""
        found: list[FieldViolation] = []
        names: dict[str, str] = {}
        for name, price in self.usd_per_gpu_hour.items():
            where = f"usd_per_gpu_hour[{name!r}]"
            gpu = find_gpu(name)
            if gpu is None:
                found.extend(UnknownGpuError(name, where).violations)
                continue
            if gpu.name in names:
                found.append(
                    FieldViolation(where, f"is {gpu.name}, as {names[gpu.name]!r} is; keep one of them")
                )
            names[gpu.name] = name
            found.extend(_price_violations(where, price))
        found.extend(_price_violations("default_usd_per_gpu_hour", self.default_usd_per_gpu_hour))
        return found


def _price_violations(where: str, price: float) -> list[FieldViolation]:
    if math.isfinite(price) and 0.0 <= price <= _LARGEST_USD:
        return []
    return [FieldViolation(where, f"is {price:g}; must be 0 to {_LARGEST_USD:g} US dollars")]
