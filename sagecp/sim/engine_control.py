"""What can be told to a running engine: to sleep, and which LoRA adapters to have.

As vLLM has it in developer mode (sleep) and with run-time updates of adapters
allowed (LoRA), in its words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from sagecp.sim.api_fields import ApiError
from sagecp.sim.engine_model import EngineModel
from sagecp.sim.engine_types import RequestState
from sagecp.sim.generation import Generation
from sagecp.sim.server_config import EngineServerConfig

_POLL_S = 0.005
_MEMORY_TAGS = frozenset({"weights", "kv_cache"})
_PAUSE_MODES = ("abort", "wait", "keep")
DROPPED_WEIGHTS_LEVEL = 2


class EngineControl:
    """The engine's sleep, and its adapters.

    Args:
        config: Of the server.
        model: The engine.
        live: The generations in progress; read at every call.
        on_change: Called when it falls asleep or wakes up.

    Attributes:
        sleep_level: 1: its weights are in the host's memory; 2: they are dropped; ``None``: awake.
        weights_are_missing: It was woken up without loading the weights that it had dropped.
        adapters: Path of each adapter, by name.
    """

    def __init__(
        self,
        config: EngineServerConfig,
        model: EngineModel,
        live: Collection[Generation],
        on_change: Callable[[], None],
    ) -> None:
        self._config = config
        self._model = model
        self._live = live
        self._on_change = on_change
        self._missing_memory: set[str] = set()
        self.sleep_level: int | None = None
        self.weights_are_missing = False
        self.adapters: dict[str, str] = {}

    @property
    def is_asleep(self) -> bool:
        """Whether no request makes progress."""
        return self.sleep_level is not None

    @property
    def served_names(self) -> tuple[str, ...]:
        """What requests may name as their model."""
        return (*self._config.model_names, *self.adapters)

    def adapters_in_use(self) -> tuple[list[str], list[str]]:
        """Return the adapters of running requests, and those of waiting ones."""
        running: dict[str, None] = {}
        waiting: dict[str, None] = {}
        for generation in self._live:
            if generation.call.model in self.adapters:
                for choice in generation.choices:
                    is_waiting = choice.request.state is RequestState.WAITING
                    (waiting if is_waiting else running)[generation.call.model] = None
        return list(running), list(waiting)

    def add_routes(self, app: web.Application) -> None:
        """Add the pages to an application."""
        app.router.add_post("/sleep", self._sleep)
        app.router.add_post("/wake_up", self._wake_up)
        app.router.add_get("/is_sleeping", self._is_sleeping)
        app.router.add_post("/collective_rpc", self._collective_rpc)
        if self._config.enable_lora:
            app.router.add_post("/v1/load_lora_adapter", self._load_adapter)
            app.router.add_post("/v1/unload_lora_adapter", self._unload_adapter)

    async def _sleep(self, request: web.Request) -> web.StreamResponse:
        level, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
        if level not in {"0", "1", "2"}:
            raise web.HTTPUnprocessableEntity(reason="level must be 0, 1 or 2")
        if mode not in _PAUSE_MODES:
            raise web.HTTPUnprocessableEntity(reason=f"mode must be one of {', '.join(_PAUSE_MODES)}")
        if mode == "abort":
            for generation in list(self._live):
                generation.abort()
        while mode == "wait" and self._model.running_count:  # noqa: ASYNC110 - the model has no event
            await asyncio.sleep(_POLL_S)
        self._model.cache.clear()
        self.sleep_level = int(level)
        self._missing_memory = set(_MEMORY_TAGS)
        self.weights_are_missing = self.sleep_level == DROPPED_WEIGHTS_LEVEL
        self._on_change()
        return _json({"status": "sleeping", "level": self.sleep_level})

    async def _wake_up(self, request: web.Request) -> web.StreamResponse:
        tags = request.query.getall("tags", [])
        self._missing_memory -= set(tags or _MEMORY_TAGS)
        if not self._missing_memory:
            self.sleep_level = None
            self._on_change()
        return _json({"status": "sleeping" if self.is_asleep else "awake", "tags": tags or None})

    async def _is_sleeping(self, _request: web.Request) -> web.StreamResponse:
        return _json({"is_sleeping": self.is_asleep})

    async def _collective_rpc(self, request: web.Request) -> web.StreamResponse:
        body = await _read_object(request)
        if body.get("method") is None:
            raise web.HTTPBadRequest(reason="Missing 'method' in request body")
        if body["method"] == "reload_weights" and "weights" not in self._missing_memory:
            self.weights_are_missing = False
        return _json({"results": [None]})

    async def _load_adapter(self, request: web.Request) -> web.StreamResponse:
        body = await _read_object(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not (isinstance(name, str) and name and isinstance(path, str) and path):
            raise _invalid("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self._config.model_names:
            raise _invalid(f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.adapters:
            raise _invalid(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                "place, set 'load_inplace' to True."
            )
        # A name that is no path is one of a repository, where everything is.
        if path.startswith("/") and not await asyncio.to_thread(Path(path).exists):
            raise ApiError(
                f"Loading lora {name} failed: No adapter found for {path}", status=404, type_="NotFoundError"
            )
        self.adapters[name] = path
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload_adapter(self, request: web.Request) -> web.StreamResponse:
        name = (await _read_object(request)).get("lora_name")
        if not isinstance(name, str) or not name:
            raise _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self.adapters:
            raise ApiError(f"The lora adapter '{name}' cannot be found.", status=404, type_="NotFoundError")
        del self.adapters[name]
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")


def _invalid(message: str) -> ApiError:
    return ApiError(message, type_="InvalidUserInput")


async def _read_object(request: web.Request) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await request.read(), type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise ApiError("the body must be a JSON object") from None


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), headers={"Content-Type": "application/json"})
