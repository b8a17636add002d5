"""The server that `bench.metrics_overhead` measures.

    python -m bench.metrics_overhead_server PORT without 0
    python -m bench.metrics_overhead_server PORT with METRICS_PORT
    python -m bench.metrics_overhead_server PORT timed METRICS_PORT FILE

`timed` is `with`, and in the end writes the CPU seconds that went into metrics to a file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from sagecp.config import JournalConfig, ServerConfig
from sagecp.rpc import server as server_module
from sagecp.rpc.interceptors.call import CallInfo
from sagecp.rpc.interceptors.metrics import RpcMetrics
from sagecp.rpc.servicers.metrics import MetricsSnapshots
from sagecp.rpc.telemetry.exporter import MetricsExporter
from sagecp.rpc.telemetry.requests import RequestTelemetry
from sagecp.runtime.event_loop import run
from sagecp.runtime.manager import ControlPlaneManager
from sagecp.runtime.monitor import Monitor

# What is done for metrics: for every call and request, and for every one who asks.
_HOOKS: tuple[tuple[type, str], ...] = (
    (RpcMetrics, "started"),
    (RpcMetrics, "finished"),
    (RequestTelemetry, "accepted"),
    (RequestTelemetry, "ended"),
    (Monitor, "record"),
)
_ANSWERS: tuple[tuple[type, str], ...] = ((MetricsExporter, "_render"), (MetricsSnapshots, "fill"))


class _Nothing:
    """In place of what counts calls and requests."""

    def __init__(self, *_: object) -> None:
        self.calls = self

    def started(self, call: CallInfo) -> None:
        """Nothing."""

    def finished(self, call: CallInfo) -> None:
        """Nothing."""


class _Stopwatch:
    """Adds up the CPU time of functions, less what the watch itself costs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self._own_s = 0.0
        nothing = self.timed("", lambda: None)
        for _ in range(20_000):
            nothing()
        self._own_s = self.seconds.pop("") / self.counts.pop("")

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function with its time taken."""
        self.seconds[name], self.counts[name] = 0.0, 0

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the function takes
            started_s = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.thread_time() - started_s - self._own_s
                self.counts[name] += 1

        return call

    def timed_coroutine(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a coroutine function with the time of its steps taken."""
        self.seconds[name], self.counts[name] = 0.0, 0

        class Steps:
            def __init__(self, steps: Any) -> None:  # noqa: ANN401 - a coroutine
                self._steps = steps

            def __await__(self) -> Any:  # noqa: ANN401 - a generator
                return self

            def __iter__(self) -> Any:  # noqa: ANN401 - a generator
                return self

            def __next__(self) -> Any:  # noqa: ANN401 - what the loop is asked to wait for
                return step(self._steps)

        def step(steps: Any) -> Any:  # noqa: ANN401 - as above
            started_s = time.thread_time()
            try:
                return steps.send(None)
            finally:
                self.seconds[name] += time.thread_time() - started_s

        async def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the function takes
            self.counts[name] += 1
            return await Steps(function(*arguments, **named))

        return call


def main() -> None:
    """Serve until a signal."""
    port, kind, metrics_port, *file = sys.argv[1:]
    config = ServerConfig(
        listen=f"127.0.0.1:{port}",
        metrics_listen=f"127.0.0.1:{metrics_port}" if metrics_port != "0" else "",
        journal=JournalConfig(enabled=False),
    )
    watch = _Stopwatch()
    with contextlib.ExitStack() as stack:
        if kind == "without":
            stack.enter_context(
                mock.patch.multiple(
                    server_module,
                    MetricsExporter=_Nothing,
                    ControlPlaneManager=functools.partial(ControlPlaneManager, enable_monitoring=False),
                )
            )
        if kind == "timed":
            for owner, name in _HOOKS:
                timed = watch.timed(f"{owner.__name__}.{name}", getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            for owner, name in _ANSWERS:
                timed = watch.timed_coroutine(f"{owner.__name__}.{name}", getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
        run(server_module.run_server(config))
    if file:
        Path(file[0]).write_text(json.dumps({"seconds": watch.seconds, "counts": watch.counts}))


if __name__ == "__main__":
    main()
