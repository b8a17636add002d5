"""The endpoints that only tell something: models, version, tokenizer, configuration."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from aiohttp import web

from sagecp.sim import tokenizer
from sagecp.sim.api_fields import FieldReader, parse_object
from sagecp.sim.api_request import check_model, check_token_ids, read_messages
from sagecp.sim.engine_control import EngineControl
from sagecp.sim.server_config import EngineServerConfig


def cache_config(config: EngineServerConfig, block_count: int) -> dict[str, str]:
    """Return the labels of the metric ``cache_config_info``."""
    tokens = block_count * config.block_size
    return {
        "engine": "0",
        "block_size": str(config.block_size),
        "cache_dtype": "auto",
        "enable_prefix_caching": str(config.enable_prefix_caching),
        "gpu_memory_utilization": "0.92",
        "is_attention_free": "False",
        "kv_cache_max_concurrency": str(round(tokens / config.max_model_len, 4)),
        "kv_cache_size_tokens": str(tokens),
        "num_cpu_blocks": "None",
        "num_gpu_blocks": str(block_count),
        "num_gpu_blocks_override": "None",
        "prefix_caching_hash_algo": "builtin",
        "sliding_window": "None",
    }


def add_routes(
    app: web.Application, config: EngineServerConfig, version: str, control: EngineControl
) -> None:
    """Add the endpoints to an application."""
    endpoints = _InfoEndpoints(config, version, control)
    app.router.add_get("/ping", endpoints.ping)
    app.router.add_post("/ping", endpoints.ping)
    app.router.add_get("/version", endpoints.version)
    app.router.add_get("/load", endpoints.load)
    app.router.add_get("/v1/models", endpoints.models)
    app.router.add_get("/server_info", endpoints.server_info)
    app.router.add_post("/tokenize", endpoints.tokenize)
    app.router.add_post("/detokenize", endpoints.detokenize)


class _InfoEndpoints:
    def __init__(self, config: EngineServerConfig, version: str, control: EngineControl) -> None:
        self._config = config
        self._version = version
        self._control = control

    async def ping(self, _request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def version(self, _request: web.Request) -> web.StreamResponse:
        return _json({"version": self._version})

    async def load(self, _request: web.Request) -> web.StreamResponse:
        # As vLLM without --enable-server-load-tracking.
        return _json({"server_load": 0})

    async def models(self, _request: web.Request) -> web.StreamResponse:
        created = int(time.time())
        cards = [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "vllm",
                "root": self._control.adapters.get(name, self._config.model_names[0]),
                "parent": self._config.model_names[0] if name in self._control.adapters else None,
                "max_model_len": None if name in self._control.adapters else self._config.max_model_len,
                "permission": [
                    {
                        "id": f"modelperm-{uuid.uuid4().hex[:16]}",
                        "object": "model_permission",
                        "created": created,
                        "allow_create_engine": False,
                        "allow_sampling": True,
                        "allow_logprobs": True,
                        "allow_search_indices": False,
                        "allow_view": True,
                        "allow_fine_tuning": False,
                        "organization": "*",
                        "group": None,
                        "is_blocking": False,
                    }
                ],
            }
            for name in self._control.served_names
        ]
        return _json({"object": "list", "data": cards})

    async def server_info(self, request: web.Request) -> web.StreamResponse:
        """Show the configuration, as vLLM's development mode does."""
        config = self._config
        shown: Any = {
            "model_config": {
                "model": config.model_names[0],
                "max_model_len": config.max_model_len,
                "enable_sleep_mode": True,
            },
            "parallel_config": {
                "tensor_parallel_size": config.parallel_size,
                "pipeline_parallel_size": 1,
                "data_parallel_size": 1,
            },
            "scheduler_config": {
                "max_num_seqs": config.max_num_seqs,
                "max_num_batched_tokens": config.max_num_batched_tokens,
            },
            "cache_config": {
                "block_size": config.block_size,
                "enable_prefix_caching": config.enable_prefix_caching,
            },
        }
        if request.query.get("config_format") != "json":
            shown = str(shown)
        return _json({"vllm_config": shown, "vllm_env": {}, "system_env": {}})

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        data = parse_object(await request.read())
        reader = FieldReader(data)
        model = reader.optional_string("model")
        if "messages" in data:
            messages = read_messages(reader)
            add_prompt = reader.boolean("add_generation_prompt", default=True)
            reader.raise_failures()
            token_ids = tokenizer.encode_chat(messages, add_generation_prompt=add_prompt)
        else:
            if "prompt" not in data:
                reader.fail("prompt", "missing", "Field required", data)
                reader.fail("messages", "missing", "Field required", data)
            text = reader.optional_string("prompt")
            reader.raise_failures()
            token_ids = tokenizer.encode(text or "")
        named = reader.boolean("return_token_strs")
        reader.raise_failures()
        check_model(model, self._control.served_names)
        return _json(
            {
                "count": len(token_ids),
                "max_model_len": self._config.max_model_len,
                "tokens": token_ids,
                "token_strs": [tokenizer.token_name(token_id) for token_id in token_ids] if named else None,
            }
        )

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        data = parse_object(await request.read())
        reader = FieldReader(data)
        model = reader.optional_string("model")
        if "tokens" not in data:
            reader.fail("tokens", "missing", "Field required", data)
        elif not isinstance(data["tokens"], list):
            reader.fail("tokens", "list_type", "Input should be a valid list", data["tokens"])
        token_ids = reader.integers("tokens") if isinstance(data.get("tokens"), list) else ()
        for index, token_id in enumerate(token_ids):
            if token_id < 0:
                message = "Input should be greater than or equal to 0"
                reader.fail(f"tokens.{index}", "greater_than_equal", message, token_id, {"ge": 0})
        reader.raise_failures()
        check_model(model, self._control.served_names)
        check_token_ids(token_ids)
        return _json({"prompt": tokenizer.decode(token_ids)})


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), headers={"Content-Type": "application/json"})
