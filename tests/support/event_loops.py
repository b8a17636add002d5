"""Runs coroutine tests on asyncio's event loop and on uvloop, and lets neither hide a mishap."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

CoroutineTest = Callable[..., Coroutine[Any, Any, None]]
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def on_both_loops(test: CoroutineTest) -> Callable[..., None]:
    """Make a test of a coroutine function: one run for each event loop.

    What a loop would only log (an error in a callback, a failure that nobody
    looked at) fails the test.
    """

    @pytest.mark.parametrize("loop_name", LOOPS)
    @functools.wraps(test)
    def wrapper(loop_name: str, **arguments: Any) -> None:
        mishaps: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: mishaps.append(context))
            async with asyncio.timeout(20):
                await test(**arguments)
            gc.collect()
            await asyncio.sleep(0)

        with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
            runner.run(main())
        assert not mishaps

    own = inspect.signature(test).parameters.values()
    added = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(wrapper)["__signature__"] = inspect.Signature([added, *own])
    parametrized: Callable[..., None] = wrapper
    return parametrized
