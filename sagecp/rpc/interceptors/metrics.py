"""Prometheus metrics of calls."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sagecp.rpc.interceptors.call import CallInfo

_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RpcMetrics:
    """Counts calls by method and code, times them, and says how many are open.

    Labels are bounded: methods are ours, codes are gRPC's.

    Args:
        registry: Where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._handled = Counter(
            "sagecp_rpc_handled",
            "RPCs that ended, by method and status code.",
            ("method", "code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "sagecp_rpc_duration_seconds",
            "Time from the start of an RPC to its end; for streams, their whole life.",
            ("method",),
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self._open = Gauge("sagecp_rpc_open", "RPCs in progress.", ("method",), registry=registry)
        # Looking up a label costs more than counting: keep the children.
        self._handled_by: dict[tuple[str, str], Counter] = {}
        self._by_method: dict[str, tuple[Histogram, Gauge]] = {}

    def started(self, call: CallInfo) -> None:
        """Count an open call."""
        children = self._by_method.get(call.method)
        if children is None:
            name = call.method.lstrip("/")
            children = self._seconds.labels(name), self._open.labels(name)
            self._by_method[call.method] = children
        children[1].inc()

    def finished(self, call: CallInfo) -> None:
        """Count an ended call."""
        seconds, still_open = self._by_method[call.method]
        still_open.dec()
        seconds.observe(call.duration_s)
        key = (call.method, call.code.name)
        handled = self._handled_by.get(key)
        if handled is None:
            handled = self._handled_by[key] = self._handled.labels(call.method.lstrip("/"), call.code.name)
        handled.inc()
