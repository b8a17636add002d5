"""Asks the engine beside the agent: is it there, what is it, how does it do."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

from sagecp.agent.config import AgentConfig
from sagecp.agent.engine_facts import ABORT_PATHS, EngineFacts, ServedModel, discover, list_models
from sagecp.agent.engine_http import EngineHttp, describe
from sagecp.agent.histograms import LatencyWindow
from sagecp.agent.metrics_text import EngineMetrics, MetricsParser
from sagecp.core.types import EngineCondition, EngineGauges

# Larger pages than this are not an engine's.
_MAX_METRICS_BYTES = 64 << 20
_ABORT_TIMEOUT_S = 5.0
# A health check that is only late, such as behind a long tokenization, is no news; three in a row are.
_LATE_CHECKS_UNTIL_UNHEALTHY = 3


@dataclass(frozen=True, slots=True)
class Observation:
    """How the engine does at one moment.

    Attributes:
        sleep_level: How deep it sleeps, where it says so.
    """

    condition: EngineCondition
    reason: str = ""
    gauges: EngineGauges | None = None
    sleep_level: int | None = None


class EngineProbe:
    """One engine over HTTP. Calls are never made at the same time, except for aborts and orders.

    Args:
        config: Where the engine is.

    Attributes:
        address: Of the engine.
        http: Speaks with it.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.address = config.engine
        self.http = EngineHttp(config)
        self._model_name = config.model_name
        self._latencies = LatencyWindow()
        self._late_count = 0
        self._abort_path: str | None = None

    async def __aenter__(self) -> Self:
        await self.http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.__aexit__()

    async def observe(self, timeout_s: float, *, with_gauges: bool = True) -> Observation:
        """Return how the engine does.

        Args:
            timeout_s: For everything together.
            with_gauges: Read the metrics too.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        trouble = await self._check_health(timeout_s)
        if trouble:
            return Observation(EngineCondition.UNHEALTHY, trouble)
        metrics = await self.read_metrics(deadline_s - loop.time()) if with_gauges else None
        if metrics is None:
            return Observation(EngineCondition.HEALTHY)
        latencies: dict[str, Any] = self._latencies.add(loop.time(), metrics.histograms)
        return Observation(
            EngineCondition.HEALTHY,
            gauges=dataclasses.replace(metrics.gauges, **latencies),
            sleep_level=metrics.sleep_level,
        )

    async def _check_health(self, timeout_s: float) -> str:
        """Return what is wrong with the engine, or an empty text."""
        try:
            async with asyncio.timeout(timeout_s), self.http.open("/health") as response:
                status = response.status
                await response.content.read(1024)
        except TimeoutError:
            self._late_count += 1
            if self._late_count < _LATE_CHECKS_UNTIL_UNHEALTHY:
                return ""
            return f"GET /health had no answer within {timeout_s:.2g} s, {self._late_count} times in a row"
        except (aiohttp.ClientError, OSError) as error:
            self._late_count = 0
            return f"GET {self.http.url}/health failed: {describe(error)}"
        self._late_count = 0
        return "" if status == 200 else f"GET /health answered {status}"

    async def read_metrics(self, timeout_s: float) -> EngineMetrics | None:
        """Return what the engine's metrics say, or ``None`` when they cannot be read."""
        if timeout_s <= 0:
            return None
        try:
            async with asyncio.timeout(timeout_s), self.http.open("/metrics") as response:
                if response.status != 200:
                    return None
                parser = MetricsParser()
                size = 0
                async for piece in response.content.iter_any():
                    size += len(piece)
                    if size > _MAX_METRICS_BYTES:
                        return None
                    parser.feed(piece)
        except (TimeoutError, aiohttp.ClientError, OSError):
            return None
        return parser.finish()

    async def discover(self, timeout_s: float) -> EngineFacts:
        """Find out what the engine is, from every source there is.

        Raises:
            EngineAnswerError: It lists no models, wants a key, or is no engine at all.
            aiohttp.ClientError: It went away.
            TimeoutError: It did not answer.
        """
        async with asyncio.timeout(timeout_s):
            metrics = await self.read_metrics(timeout_s)
            address = self.address
            return await discover(self.http, address.host, address.port, self._model_name, metrics)

    async def list_models(self) -> list[ServedModel]:
        """Return the models served, base models first.

        Raises:
            EngineAnswerError: The list is missing, empty or malformed, or wants a key.
        """
        return await list_models(self.http)

    async def abort(self, request_ids: list[str]) -> str:
        """Ask the engine to stop requests; return an empty text, or why that failed.

        vLLM has a page for it in developer mode, or where its token-in-token-out
        API is on. It wants the ids it made itself of ours, which differ by API.
        """
        # An empty list would abort everything.
        if not request_ids:
            return ""
        wanted = [f"{prefix}{name}" for name in request_ids for prefix in ("chatcmpl-", "cmpl-", "")]
        wanted += [f"cmpl-{name}-0" for name in request_ids]
        paths = (self._abort_path,) if self._abort_path else ABORT_PATHS
        for path in paths:
            status, trouble = await self.http.post(
                path,
                _ABORT_TIMEOUT_S,
                {"request_ids": wanted},
                # One of several API servers behind a port knows only its own requests:
                # a new connection each time, so that asking again reaches another.
                {"Connection": "close"},
            )
            if status == 200:
                self._abort_path = path
                return ""
            if not status:
                return f"POST {path} failed: {trouble}"
            # 403: the page is there and switched off.
            if status not in {403, 404, 405}:
                return f"POST {path} answered {status}"
        return "this engine has no page to abort requests by id (vLLM has one with VLLM_SERVER_DEV_MODE=1)"
