"""Prometheus metrics of calls."""

from __future__ import annotations

from collections.abc import Iterator

from sagecp.rpc.interceptors.call import CallInfo
from sagecp.rpc.telemetry.families import Counter, Histogram, counter, gauges, histogram

_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _Method:
    """The series of one method, so that a call costs one look-up."""

    __slots__ = ("handled", "name", "open_count", "seconds")

    def __init__(self, name: str, seconds: Histogram) -> None:
        self.name = name
        self.seconds = seconds
        self.open_count = 0
        self.handled: dict[str, Counter] = {}


class RpcMetrics:
    """Counts calls by method and code, times them, and says how many are open.

    Labels are bounded: methods are ours, codes are gRPC's.
    """

    def __init__(self) -> None:
        self._handled = counter(
            "sagecp_rpc_handled_total", "RPCs that ended, by method and status code.", ("method", "code")
        )
        self._seconds = histogram(
            "sagecp_rpc_duration_seconds",
            "Time from the start of an RPC to its end; for streams, their whole life.",
            ("method",),
            _BOUNDS_S,
        )
        self._methods: dict[str, _Method] = {}

    def started(self, call: CallInfo) -> None:
        """Count an open call."""
        method = self._methods.get(call.method)
        if method is None:
            name = call.method.lstrip("/")
            method = self._methods[call.method] = _Method(name, self._seconds.cell(name))
        method.open_count += 1

    def finished(self, call: CallInfo) -> None:
        """Count an ended call."""
        method = self._methods[call.method]
        method.open_count -= 1
        method.seconds.observe(call.duration_s)
        code = call.code.name
        handled = method.handled.get(code)
        if handled is None:
            handled = method.handled[code] = self._handled.cell(method.name, code)
        handled.add()

    def pieces(self) -> Iterator[str]:
        """Return all of it in Prometheus's text format, piece by piece."""
        yield from self._handled.pieces()
        yield from self._seconds.pieces()
        yield gauges(
            "sagecp_rpc_open",
            "RPCs in progress.",
            ("method",),
            [((method.name,), method.open_count) for method in self._methods.values()],
        )
