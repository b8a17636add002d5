"""The event loop that long-lived processes run on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

# With the defaults, 5,000 open streams meet a collection of everything every four seconds, which
# finds next to nothing and takes 0.4 s of CPU while all of them wait. These look at young objects
# in steps of at most 0.05 s, and at everything every few minutes under such a load.
_COLLECTOR_THRESHOLDS = (5_000, 20, 50)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, with few long pauses.

    On uvloop where it is installed: a third less CPU per token.
    """
    with patient_collector():
        try:
            import uvloop
        except ImportError:
            return asyncio.run(main)
        return uvloop.run(main)


@contextlib.contextmanager
def patient_collector() -> Iterator[None]:
    """Have the garbage collector look at many long-lived objects less often, as a server does."""
    before = gc.get_threshold()
    gc.set_threshold(*_COLLECTOR_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
