"""What an engine is: its models, sizes, settings, and what it can be told to do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sagecp.agent.engine_http import EngineAnswerError, EngineHttp
from sagecp.agent.kv_events.address import KvEventsAddress, address_of_engine
from sagecp.agent.local_engine import EngineArguments, LocalEngine, find_local_engine, is_local_host
from sagecp.agent.metrics_text import EngineMetrics
from sagecp.core.engine_state import EngineCapability, LoraAdapter

ABORT_PATHS = ("/inference/v1/abort_requests", "/abort_requests")
LOAD_ADAPTER_PATH = "/v1/load_lora_adapter"
_MAX_MODEL_COUNT = 1001
_MAX_SETTING_LENGTH = 256

# How a simulated engine may give itself away, in its version, its server header or its models' owner.
_SIMULATED = re.compile(r"simulat|engine-sim|sagecp|(?<![a-z])sim(?![a-z])", re.IGNORECASE)

# Settings that tell apart two engines of one version, where vLLM tells them: as labels of
# cache_config_info, and in developer mode by the part of its configuration that has them.
_CACHE_SETTINGS = (
    "block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "num_gpu_blocks",
    "kv_cache_memory_bytes", "kv_cache_max_concurrency", "kv_offloading_size", "prefix_caching_hash_algo",
    "sliding_window", "swap_space", "cpu_offload_gb", "max_loras",
)  # fmt: skip
_TOLD_SETTINGS = {
    "model_config": ("dtype", "quantization", "enforce_eager", "enable_sleep_mode"),
    "scheduler_config": (
        "max_num_batched_tokens",
        "max_num_seqs",
        "enable_chunked_prefill",
        "async_scheduling",
        "policy",
    ),
    "parallel_config": ("distributed_executor_backend",),
    "speculative_config": ("method", "num_speculative_tokens"),
    "lora_config": ("max_loras", "max_lora_rank"),
}
_SETTING_NAMES = {
    "policy": "scheduling_policy",
    "method": "speculative_method",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine is; ``None`` and empty: it does not say.

    Attributes:
        process_id: Of its process on this host, where it can be seen.
        sources: For each fact found outside the plain API, where it came from.
        configuration: Settings that tell apart two engines of one version.
        capabilities: What it can be told to do.
        adapters: LoRA adapters that it has loaded.
        kv_events: Where it publishes its KV-cache events.
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
    process_id: int | None = None
    sources: Mapping[str, str]
    configuration: Mapping[str, str] = field(default_factory=dict)
    capabilities: frozenset[EngineCapability] = frozenset()
    adapters: tuple[LoraAdapter, ...] = ()
    kv_events: KvEventsAddress | None = None

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
    """One entry of the engine's list of models.

    Attributes:
        path: Where an adapter was loaded from. Empty: not said.
    """

    name: str
    is_adapter: bool
    max_context_token_count: int | None
    owner: str
    path: str


def adapters_of(models: list[ServedModel]) -> tuple[LoraAdapter, ...]:
    """Return the LoRA adapters among the models served, by name."""
    loaded = (LoraAdapter(model.name, model.path) for model in models if model.is_adapter)
    return tuple(sorted(loaded, key=lambda adapter: adapter.name))


async def discover(
    http: EngineHttp, host: str, port: int, wanted_model: str, metrics: EngineMetrics | None
) -> EngineFacts:
    """Find out what an engine is, from every source there is.

    Args:
        http: Speaks with it.
        host: Where it is.
        port: And its port.
        wanted_model: Served name to register; empty: the first.
        metrics: What it has just said of itself.

    Raises:
        EngineAnswerError: It lists no models, wants a key, or is no engine at all.
        aiohttp.ClientError: It went away.
    """
    models = await list_models(http)
    version, told = await _read_version(http)
    server_info = await _read_server_info(http)
    capabilities = await _find_capabilities(http)
    is_local = await asyncio.to_thread(is_local_host, host)
    local = await asyncio.to_thread(find_local_engine, port) if is_local else None
    names = [model.name for model in models]
    chosen = wanted_model or names[0]
    if chosen not in names:
        raise EngineAnswerError(f"--model {chosen!r} is not served; the engine has {', '.join(names[:20])}")
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
        process_id=local.process_id if local else None,
        max_sequence_count=stated.max_sequence_count,
        tensor_parallel_size=stated.tensor_parallel_size,
        pipeline_parallel_size=stated.pipeline_parallel_size,
        data_parallel_size=stated.data_parallel_size,
        expert_parallel=stated.expert_parallel,
        sources=sources,
        configuration=dict(_settings(metrics, server_info)),
        capabilities=capabilities,
        adapters=adapters_of(models),
        kv_events=stated.kv_events,
    )


async def list_models(http: EngineHttp) -> list[ServedModel]:
    """Return the models served, base models first.

    Raises:
        EngineAnswerError: The list is missing, empty or malformed, or wants a key.
        aiohttp.ClientError: There was no answer.
    """
    status, body, _ = await http.get_json("/v1/models")
    if status in {401, 403}:
        raise EngineAnswerError(
            f"{http.url}/v1/models answered {status}: the engine wants an API key; set SAGECP_ENGINE_API_KEY"
        )
    entries = body.get("data") if isinstance(body, dict) else None
    if status != 200 or not isinstance(entries, list):
        raise EngineAnswerError(
            f"{http.url}/v1/models answered {status} without a list of models; "
            "is this an OpenAI-compatible engine?"
        )
    models = {
        entry["id"]: ServedModel(
            name=entry["id"],
            # Adapters name the model they build on.
            is_adapter=entry.get("parent") is not None,
            max_context_token_count=_positive(entry.get("max_model_len")),
            owner=str(entry.get("owned_by", "")),
            path=str(entry.get("root") or ""),
        )
        for entry in entries[:_MAX_MODEL_COUNT]
        if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry["id"]
    }
    if not models:
        raise EngineAnswerError(f"{http.url}/v1/models lists no model")
    return sorted(models.values(), key=lambda model: model.is_adapter)


async def _read_version(http: EngineHttp) -> tuple[str, list[str]]:
    """Return the version, and every text in which the engine may have named its kind."""
    try:
        status, body, server = await http.get_json("/version")
    except EngineAnswerError:
        return "", []
    if status != 200 or not isinstance(body, dict):
        return "", [server]
    version = body.get("version")
    told = [f"{key}={value}" for key, value in body.items() if isinstance(value, (str, bool))]
    return (version[:128] if isinstance(version, str) else ""), [server, *told]


async def _read_server_info(http: EngineHttp) -> dict[str, Any]:
    """Return vLLM's configuration, which it tells in developer mode alone."""
    try:
        status, body, _ = await http.get_json("/server_info?config_format=json")
    except EngineAnswerError:
        return {}
    config = body.get("vllm_config") if status == 200 and isinstance(body, dict) else None
    return config if isinstance(config, dict) else {}


async def _find_capabilities(http: EngineHttp) -> frozenset[EngineCapability]:
    """Return what the engine has pages for. Asking does nothing to it."""
    found = set()
    try:
        status, body, _ = await http.get_json("/is_sleeping")
    except EngineAnswerError:
        status, body = 0, None
    if status == 200 and isinstance(body, dict) and isinstance(body.get("is_sleeping"), bool):
        found.add(EngineCapability.SLEEP)
    if await http.has_page(LOAD_ADAPTER_PATH):
        found.add(EngineCapability.LORA)
    for path in ABORT_PATHS:
        if await http.has_page(path):
            found.add(EngineCapability.ABORT)
            break
    return frozenset(found)


def _settings(metrics: EngineMetrics | None, server_info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings that are said, by name."""
    for name in _CACHE_SETTINGS:
        shown = metrics.settings.get(name, "") if metrics else ""
        # vLLM writes what is not set as the text "None".
        if shown not in {"", "None"}:
            yield name, shown
    for part, names in _TOLD_SETTINGS.items():
        told = server_info.get(part)
        if not isinstance(told, dict):
            continue
        for name in names:
            value = told.get(name)
            if isinstance(value, str | int | float) and value not in {"", "None"}:
                yield _SETTING_NAMES.get(name, name), str(value)[:_MAX_SETTING_LENGTH]


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
        kv_events=address_of_engine(server_info.get("kv_events_config")),
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
