"""The types of the values of `sagecp plan`'s options."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from sagecp.cli.options import DurationType

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

GOALS = ("goodput_per_usd", "lowest_ttft", "cheapest", "highest_throughput")
PLAN_TYPES = ("tensor", "pipeline", "data", "expert", "hybrid")
WEIGHT_FORMATS = ("bfloat16", "float16", "float32", "fp8", "int8", "int4", "mxfp4", "nvfp4")
_GPUS_EXAMPLE = "8xH100, 2x8xH100 for two nodes of eight, or 8xNAME:memory_gib=96,dense_tflops=400"
# What may follow the name of a GPU: the contract's names of its figures.
_FACTS = (
    "memory_gib", "memory_gb_per_s", "dense_tflops", "eight_bit_tflops", "link_gb_per_s",
    "fast_link_gpu_count", "node_link_gb_per_s",
)  # fmt: skip
# More GPUs do not share a node, but for racks that are sold as one.
LARGEST_USUAL_NODE = 16


@dataclass(frozen=True, slots=True)
class GpusValue:
    """Some equal GPUs.

    Attributes:
        name: Their kind, as it was written.
        gpus_per_node_count: In each node.
        node_count: Nodes; ``None``: as --nodes says.
        facts: Figures that differ from the table of GPUs, by the contract's names.
    """

    name: str
    gpus_per_node_count: int
    node_count: int | None
    facts: tuple[tuple[str, float], ...] = ()


class GpusType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """[NODESx]GPUSxNAME[:FIGURE=NUMBER,...]."""

    name = "gpus"

    def convert(
        self, value: str | GpusValue, param: click.Parameter | None, ctx: click.Context | None
    ) -> GpusValue:
        """Return the GPUs."""
        if isinstance(value, GpusValue):
            return value
        head, _, facts = value.partition(":")
        match = re.fullmatch(
            r"\s*(?:(\d{1,7})\s*x\s*)?(\d{1,7})\s*x\s*([A-Za-z][^,=]*?)\s*", head, re.IGNORECASE
        )
        if match is None:
            self.fail(f"{value!r} is not a number of GPUs; for example {_GPUS_EXAMPLE}", param, ctx)
        node_count = int(match[1]) if match[1] else None
        count = int(match[2])
        if count == 0 or node_count == 0:
            self.fail(f"{value!r} are no GPUs, and a model needs at least one", param, ctx)
        return GpusValue(match[3], count, node_count, self._facts(facts, param, ctx))

    def _facts(
        self, text: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, float], ...]:
        found: dict[str, float] = {}
        for part in filter(None, (each.strip() for each in text.split(","))):
            name, _, number = part.partition("=")
            if name not in _FACTS:
                self.fail(f"{name!r} is not a figure of a GPU; there are {', '.join(_FACTS)}", param, ctx)
            try:
                found[name] = float(number)
            except ValueError:
                self.fail(f"{part!r}: {number!r} is not a number", param, ctx)
        return tuple(found.items())

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the GPUs that are known, after a number."""
        from click.shell_completion import CompletionItem

        from sagecp.core.gpu_specifications import GPU_SPECIFICATIONS

        match = re.fullmatch(r"((?:\d+x){1,2})(.*)", incomplete)
        if match is None:
            return []
        return [
            CompletionItem(match[1] + gpu.name)
            for gpu in GPU_SPECIFICATIONS
            if gpu.name.lower().startswith(match[2].lower())
        ]


class ObjectivesType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """ttft=DURATION,tpot=DURATION; one of them suffices."""

    name = "objectives"

    def convert(
        self, value: str | dict[str, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, float]:
        """Return seconds by name."""
        if isinstance(value, dict):
            return value
        found: dict[str, float] = {}
        for part in value.split(","):
            name, equals, text = (each.strip() for each in part.partition("="))
            if not equals or name not in {"ttft", "tpot"}:
                self.fail(f"{part!r} is not an objective; for example ttft=1s,tpot=50ms", param, ctx)
            if name in found:
                self.fail(f"{name} is there twice", param, ctx)
            seconds = DurationType().convert(text, param, ctx)
            if seconds <= 0.0:
                self.fail(f"{name}={text}: must be above 0", param, ctx)
            found[name] = seconds
        return found


class PricesType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    """USD, or NAME=USD,NAME=USD: rent of one GPU for an hour."""

    name = "prices"

    def convert(
        self, value: str | dict[str, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, float]:
        """Return prices by the name of the GPU as it was written; ``""``: of all."""
        if isinstance(value, dict):
            return value
        found: dict[str, float] = {}
        for part in value.split(","):
            name, equals, text = part.rpartition("=")
            try:
                price = float(text)
            except ValueError:
                price = math.nan
            if not 0.0 < price <= 1e6 or (equals and not name.strip()):
                self.fail(
                    f"{part!r} is not a price in US dollars per GPU and hour; for example 2.5, or "
                    "H100=2.5,L4=0.7",
                    param,
                    ctx,
                )
            found[name.strip()] = price
        return found


GPUS = GpusType()
OBJECTIVES = ObjectivesType()
PRICES = PricesType()
