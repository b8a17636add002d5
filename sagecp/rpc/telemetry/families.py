"""Counters, histograms and gauges that are kept and written by one event loop.

``prometheus_client`` makes an object per sample and takes a lock per change.
That is right for a few series that threads share; a fleet has a hundred thousand
that only the event loop touches. So these hold plain numbers, and write
themselves in pieces, between which the event loop can do other work.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text, 0.0.4).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

CellT = TypeVar("CellT", bound="Counter | Histogram")

# Lines per piece: a few hundred microseconds of work.
PIECE_LINES = 500
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """Return labels as they stand in the text, without braces: ``model="m",state="READY"``."""
    return ",".join(
        f'{name}="{value.translate(_ESCAPES)}"' for name, value in zip(names, values, strict=True)
    )


def number_text(value: float) -> str:
    """Return a number as it stands in the text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return repr(value) if isinstance(value, float) else str(int(value))


def head(name: str, kind: str, help_text: str) -> str:
    """Return the lines that begin a family.

    Args:
        name: Of its samples; counters end in ``_total``.
        kind: ``counter``, ``gauge`` or ``histogram``.
        help_text: One sentence for a person.
    """
    text = help_text.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def gauges(
    name: str,
    help_text: str,
    label_names: Sequence[str],
    samples: Sequence[tuple[Sequence[str], float]],
    *,
    kind: str = "gauge",
) -> str:
    """Return a small family as text; nothing where it has no samples.

    Args:
        name: Of its samples.
        help_text: One sentence for a person.
        label_names: Names of the labels.
        samples: Values of the labels, and the number.
        kind: ``gauge`` or ``counter``.
    """
    if not samples:
        return ""
    lines = [head(name, kind, help_text)]
    for values, number in samples:
        labels = f"{{{label_text(label_names, values)}}}" if label_names else ""
        lines.append(f"{name}{labels} {number_text(number)}\n")
    return "".join(lines)


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Count."""
        self.value += amount

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Return its line."""
        yield f"{name}{{{labels}}} {self.value:.17g}\n" if labels else f"{name} {self.value:.17g}\n"


class Histogram:
    """Counts of values by classic buckets, each of which holds all values up to its bound.

    Args:
        bounds: Upper bounds, growing, without infinity.
        bound_texts: The same as they stand in the text.
    """

    __slots__ = ("_bound_texts", "_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...], bound_texts: tuple[str, ...]) -> None:
        self._bounds = bounds
        self._bound_texts = bound_texts
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def observe(self, value: float) -> None:
        """Take a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Return its lines."""
        comma = "," if labels else ""
        total = 0
        for bound, count in zip(self._bound_texts, self._counts, strict=False):
            total += count
            yield f'{name}_bucket{{{labels}{comma}le="{bound}"}} {total}\n'
        total += self._counts[-1]
        yield f'{name}_bucket{{{labels}{comma}le="+Inf"}} {total}\n'
        braced = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braced} {number_text(self._sum)}\n{name}_count{braced} {total}\n"


class Family(Generic[CellT]):
    """All series of one name, by the values of their labels. The caller bounds those.

    Args:
        name: Of its samples.
        kind: ``counter`` or ``histogram``.
        help_text: One sentence for a person.
        label_names: Names of the labels.
        make: Makes the numbers of one series.
    """

    def __init__(
        self, name: str, kind: str, help_text: str, label_names: Sequence[str], make: Callable[[], CellT]
    ) -> None:
        self.name = name
        self._kind = kind
        self._help_text = help_text
        self._label_names = tuple(label_names)
        self._make = make
        self._cells: dict[tuple[str, ...], tuple[str, CellT]] = {}

    def __len__(self) -> int:
        return len(self._cells)

    def cell(self, *values: str) -> CellT:
        """Return the series with these values of the labels; worth keeping where it is used often."""
        found = self._cells.get(values)
        if found is None:
            found = self._cells[values] = label_text(self._label_names, values), self._make()
        return found[1]

    def drop(self, *values: str) -> None:
        """Forget a series, if there is one."""
        self._cells.pop(values, None)

    def pieces(self) -> Iterator[str]:
        """Return its text piece by piece; series may come and go between pieces."""
        if not self._cells:
            return
        lines = [head(self.name, self._kind, self._help_text)]
        for labels, cell in list(self._cells.values()):
            lines.extend(cell.lines(self.name, labels))
            if len(lines) >= PIECE_LINES:
                yield "".join(lines)
                lines.clear()
        yield "".join(lines)


def counter(name: str, help_text: str, label_names: Sequence[str] = ()) -> Family[Counter]:
    """Return a family of counters, whose name ends in ``_total``."""
    return Family(name, "counter", help_text, label_names, Counter)


def histogram(
    name: str, help_text: str, label_names: Sequence[str], bounds: Sequence[float]
) -> Family[Histogram]:
    """Return a family of histograms with these upper bounds."""
    texts = tuple(f"{bound:g}" for bound in bounds)
    return Family(name, "histogram", help_text, label_names, lambda: Histogram(tuple(bounds), texts))
