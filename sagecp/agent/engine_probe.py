"""Asks the engine beside the agent: is it there, what is it, how does it do."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from sagecp.agent.config import AgentConfig
from sagecp.agent.local_engine import EngineArguments, LocalEngine, find_local_engine, is_local_host
from sagecp.agent.metrics_text import EngineMetrics, MetricsParser
from sagecp.core.types import EngineCondition, EngineGauges

# Larger pages than these are not an engine's.
_MAX_JSON_BYTES = 8 << 20
_MAX_METRICS_BYTES = 64 << 20
_ABORT_TIMEOUT_S = 5.0
_ABORT_PATHS = ("/inference/v1/abort_requests", "/abort_requests")
# A health check that is only late, such as behind a long tokenization, is no news; three in a row are.
_LATE_CHECKS_UNTIL_UNHEALTHY = 3
_MAX_REASON_LENGTH = 256
_MAX_MODEL_COUNT = 1001

# How a simulated engine may give itself away, in its version, its server header or its models' owner.
_SIMULATED = re.compile(r"simulat|engine-sim|sagecp|(?<![a-z])sim(?![a-z])", re.IGNORECASE)


class EngineAnswerError(Exception):
    """The engine answered with something that an agent cannot work with; says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine is; ``None`` and empty: it does not say.

    Attributes:
        sources: For each fact found outside the plain API, where it came from.
    """

    model_name: str
    model_aliases: tuple[str, ...] = ()
    max_context_token_count: int | None = None
    key_value_token_capacity: int | None = None
    max_sequence_count: int | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    expert_parallel: bool | None = None
    simulated: bool = False
    engine_version: str = ""
    is_local: bool = False
    visible_devices: str | None = None
    sources: Mapping[str, str]

    def unknown(self) -> list[str]:
        """Return the names of the facts that could not be found out."""
        names = (
            "max_context_token_count",
            "key_value_token_capacity",
            "max_sequence_count",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
            "expert_parallel",
        )
        return [name for name in names if getattr(self, name) is None]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of the engine's list of models."""

    name: str
    is_adapter: bool
    max_context_token_count: int | None
    owner: str


@dataclass(frozen=True, slots=True)
class Observation:
    """How the engine does at one moment."""

    condition: EngineCondition
    reason: str = ""
    gauges: EngineGauges | None = None


class EngineProbe:
    """One engine over HTTP. Calls are never made at the same time, except for aborts.

    Args:
        config: Where the engine is.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.address = config.engine
        self._url = self.address.url
        self._model_name = config.model_name
        self._authorization = (
            {"Authorization": f"Bearer {config.engine_api_key}"} if config.engine_api_key else {}
        )
        self._session: aiohttp.ClientSession | None = None
        self._late_count = 0
        self._abort_path: str | None = None

    async def __aenter__(self) -> EngineProbe:
        self._session = aiohttp.ClientSession(
            # Idle connections go before the engine drops them after 5 s: no race for a dying one.
            connector=aiohttp.TCPConnector(limit=4, keepalive_timeout=4.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Over loopback, packing a page costs both sides more than sending it.
            headers={"Accept-Encoding": "identity"},
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

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
        gauges = None
        if with_gauges:
            metrics = await self.read_metrics(deadline_s - loop.time())
            gauges = None if metrics is None else metrics.gauges
        return Observation(EngineCondition.HEALTHY, gauges=gauges)

    async def _check_health(self, timeout_s: float) -> str:
        """Return what is wrong with the engine, or an empty text."""
        try:
            async with asyncio.timeout(timeout_s), self._open("/health") as response:
                status = response.status
                await response.content.read(1024)
        except TimeoutError:
            self._late_count += 1
            if self._late_count < _LATE_CHECKS_UNTIL_UNHEALTHY:
                return ""
            return f"GET /health had no answer within {timeout_s:.2g} s, {self._late_count} times in a row"
        except (aiohttp.ClientError, OSError) as error:
            self._late_count = 0
            return f"GET {self._url}/health failed: {describe(error)}"
        self._late_count = 0
        return "" if status == 200 else f"GET /health answered {status}"

    async def read_metrics(self, timeout_s: float) -> EngineMetrics | None:
        """Return what the engine's metrics say, or ``None`` when they cannot be read."""
        if timeout_s <= 0:
            return None
        try:
            async with asyncio.timeout(timeout_s), self._open("/metrics") as response:
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
            models = await self.list_models()
            version, told = await self._read_version()
            metrics = await self.read_metrics(timeout_s)
            server_info = await self._read_server_info()
            is_local = await asyncio.to_thread(is_local_host, self.address.host)
            local = await asyncio.to_thread(find_local_engine, self.address.port) if is_local else None
        names = [model.name for model in models]
        chosen = self._model_name or names[0]
        if chosen not in names:
            raise EngineAnswerError(
                f"--model {chosen!r} is not served; the engine has {', '.join(names[:20])}"
            )
        sources: dict[str, str] = {}
        stated = _stated_sizes(server_info, local, metrics, sources)
        return EngineFacts(
            model_name=chosen,
            model_aliases=tuple(name for name in names if name != chosen),
            max_context_token_count=models[names.index(chosen)].max_context_token_count,
            key_value_token_capacity=metrics.key_value_token_capacity if metrics else None,
            engine_version=version,
            simulated=any(_SIMULATED.search(text) for text in (*told, *(model.owner for model in models))),
            is_local=is_local,
            visible_devices=local.visible_devices if local else None,
            max_sequence_count=stated.max_sequence_count,
            tensor_parallel_size=stated.tensor_parallel_size,
            pipeline_parallel_size=stated.pipeline_parallel_size,
            data_parallel_size=stated.data_parallel_size,
            expert_parallel=stated.expert_parallel,
            sources=sources,
        )

    async def list_models(self) -> list[ServedModel]:
        """Return the models served, base models first.

        Raises:
            EngineAnswerError: The list is missing, empty or malformed, or wants a key.
        """
        status, body, _ = await self._get_json("/v1/models")
        if status in {401, 403}:
            raise EngineAnswerError(
                f"{self._url}/v1/models answered {status}: the engine wants an API key; "
                "set SAGECP_ENGINE_API_KEY"
            )
        entries = body.get("data") if isinstance(body, dict) else None
        if status != 200 or not isinstance(entries, list):
            raise EngineAnswerError(
                f"{self._url}/v1/models answered {status} without a list of models; "
                "is this an OpenAI-compatible engine?"
            )
        models = {
            entry["id"]: ServedModel(
                name=entry["id"],
                # Adapters name the model they build on.
                is_adapter=entry.get("parent") is not None,
                max_context_token_count=_positive(entry.get("max_model_len")),
                owner=str(entry.get("owned_by", "")),
            )
            for entry in entries[:_MAX_MODEL_COUNT]
            if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry["id"]
        }
        if not models:
            raise EngineAnswerError(f"{self._url}/v1/models lists no model")
        return sorted(models.values(), key=lambda model: model.is_adapter)

    async def abort(self, request_ids: list[str]) -> str:
        """Ask the engine to stop requests; return an empty text, or why that failed.

        vLLM has a page for it in developer mode, or where its token-in-token-out
        API is on. It wants the ids it made itself of ours, which differ by API.
        """
        # An empty list would abort everything.
        wanted = [f"{prefix}{name}" for name in request_ids for prefix in ("chatcmpl-", "cmpl-", "")]
        wanted += [f"cmpl-{name}-0" for name in request_ids]
        if not request_ids or self._session is None:
            return ""
        paths = (self._abort_path,) if self._abort_path else _ABORT_PATHS
        for path in paths:
            try:
                async with (
                    asyncio.timeout(_ABORT_TIMEOUT_S),
                    self._session.post(
                        self._url + path,
                        json={"request_ids": wanted},
                        # One of several API servers behind a port knows only its own requests:
                        # a new connection each time, so that asking again reaches another.
                        headers={**self._authorization, "Connection": "close"},
                        allow_redirects=False,
                    ) as response,
                ):
                    status = response.status
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                return f"POST {path} failed: {describe(error)}"
            if status == 200:
                self._abort_path = path
                return ""
            # 403: the page is there and switched off.
            if status not in {403, 404, 405}:
                return f"POST {path} answered {status}"
        return "this engine has no page to abort requests by id (vLLM has one with VLLM_SERVER_DEV_MODE=1)"

    async def _read_version(self) -> tuple[str, list[str]]:
        """Return the version, and every text in which the engine may have named its kind."""
        try:
            status, body, server = await self._get_json("/version")
        except EngineAnswerError:
            return "", []
        if status != 200 or not isinstance(body, dict):
            return "", [server]
        version = body.get("version")
        told = [f"{key}={value}" for key, value in body.items() if isinstance(value, (str, bool))]
        return (version[:128] if isinstance(version, str) else ""), [server, *told]

    async def _read_server_info(self) -> dict[str, Any]:
        """Return vLLM's configuration, which it tells in developer mode alone."""
        try:
            status, body, _ = await self._get_json("/server_info?config_format=json")
        except EngineAnswerError:
            return {}
        config = body.get("vllm_config") if status == 200 and isinstance(body, dict) else None
        return config if isinstance(config, dict) else {}

    async def _get_json(self, path: str) -> tuple[int, Any, str]:
        async with self._open(path) as response:
            server = response.headers.get("Server", "")[:128]
            if response.status != 200:
                return response.status, None, server
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > _MAX_JSON_BYTES:
                    raise EngineAnswerError(
                        f"{self._url}{path} answered with more than {_MAX_JSON_BYTES} bytes"
                    )
        try:
            return 200, msgspec.json.decode(body), server
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise EngineAnswerError(f"{self._url}{path} answered with something else than JSON") from None

    def _open(self, path: str) -> aiohttp.client._RequestContextManager:
        assert self._session is not None, "use `async with`"  # noqa: S101
        return self._session.get(
            self._url + path,
            headers=self._authorization if path.startswith("/v1/") else None,
            allow_redirects=False,
        )


def _stated_sizes(
    server_info: dict[str, Any],
    local: LocalEngine | None,
    metrics: EngineMetrics | None,
    sources: dict[str, str],
) -> EngineArguments:
    """Merge what is said about sizes; the engine's own word first, then its command line."""
    parallel, scheduler = server_info.get("parallel_config"), server_info.get("scheduler_config")
    parallel = parallel if isinstance(parallel, dict) else {}
    scheduler = scheduler if isinstance(scheduler, dict) else {}
    told = EngineArguments(
        tensor_parallel_size=_positive(parallel.get("tensor_parallel_size")),
        pipeline_parallel_size=_positive(parallel.get("pipeline_parallel_size")),
        data_parallel_size=_positive(parallel.get("data_parallel_size")),
        max_sequence_count=_positive(scheduler.get("max_num_seqs")),
        expert_parallel=parallel["enable_expert_parallel"]
        if isinstance(parallel.get("enable_expert_parallel"), bool)
        else None,
    )
    # Ranks are counted where they label their metrics. An engine that is one rank of
    # several, each with a server of its own, is a single rank here: rightly so.
    counted = EngineArguments(data_parallel_size=metrics.engine_count or None if metrics else None)
    shown = local.arguments if local else EngineArguments()
    merged: dict[str, Any] = {}
    for name in EngineArguments.__dataclass_fields__:
        for source, arguments in (("server_info", told), ("metrics", counted), ("command line", shown)):
            value = getattr(arguments, name)
            if value is not None:
                merged[name], sources[name] = value, source
                break
    return EngineArguments(**merged)


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None


def describe(error: BaseException) -> str:
    """Return an error of a connection in a few words."""
    if isinstance(error, aiohttp.ClientConnectorError):
        cause: BaseException = error.os_error
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused: nothing listens there"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {cause.reason or cause}"
        return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__)[:_MAX_REASON_LENGTH]
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (str(error) or type(error).__name__)[:_MAX_REASON_LENGTH]
