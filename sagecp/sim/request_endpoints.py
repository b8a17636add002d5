"""The endpoints about requests in progress: what an agent reports, and stops by name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from aiohttp import web

from sagecp.sim.api_fields import ApiError
from sagecp.sim.engine_model import EngineModel
from sagecp.sim.generation import Generation


def add_request_routes(app: web.Application, live: Collection[Generation], model: EngineModel) -> None:
    """Add the endpoints to an application.

    Args:
        app: The application.
        live: The generations in progress; read at every call.
        model: The engine that they run on.
    """
    endpoints = _RequestEndpoints(live, model)
    app.router.add_get("/sim/requests", endpoints.show)
    app.router.add_post("/abort_requests", endpoints.abort)


class _RequestEndpoints:
    def __init__(self, live: Collection[Generation], model: EngineModel) -> None:
        self._live = live
        self._model = model

    async def show(self, _request: web.Request) -> web.StreamResponse:
        """Tell the ids of requests in progress, as their clients chose them. vLLM has no such endpoint."""
        return _json(
            {
                "request_ids": [_own_id(generation) for generation in self._live],
                "running_count": self._model.running_count,
                "waiting_count": self._model.waiting_count,
            }
        )

    async def abort(self, request: web.Request) -> web.StreamResponse:
        """End requests by id, or all, as vLLM's development mode does: with finish reason ``abort``."""
        try:
            body: dict[str, Any] = msgspec.json.decode(await request.read(), type=dict[str, Any])
            asked = msgspec.convert(body.get("request_ids") or [], list[str])
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ApiError(f"the body must be an object with a list of request_ids: {error}") from error
        chosen = [
            generation
            for generation in list(self._live)
            if not asked or _own_id(generation) in asked or generation.head.response_id in asked
        ]
        for generation in chosen:
            generation.abort()
        return _json({"status": "aborted", "aborted": len(asked) or len(chosen)})


def _own_id(generation: Generation) -> str:
    """Return the id that the client chose: answers show it behind a prefix."""
    return generation.head.response_id.partition("-")[2]


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), headers={"Content-Type": "application/json"})
