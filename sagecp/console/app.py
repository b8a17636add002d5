"""The HTTP port: the page, what it asks for, and the metrics. Speaks plain HTTP; read-only by default."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import msgspec
from aiohttp import web

from sagecp.config import ConsoleConfig, is_loopback
from sagecp.console.feed import ConsoleFeed, TooManyViewersError
from sagecp.console.rows import decision_values, request_values
from sagecp.core.errors import RequestNotFoundError, SageError
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.settings import SettingsChange
from sagecp.runtime.manager import ControlPlaneManager

logger = logging.getLogger(__name__)

RenderMetrics = Callable[[], Awaitable[bytes]]
"""Returns the present metrics in Prometheus's text format."""
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_STATIC = {
    "index.html": "text/html",
    "console.css": "text/css",
    "console.js": "text/javascript",
    "charts.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
# The page needs nothing from elsewhere, and nobody may put it into a frame.
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_ACTION_HEADER = "X-Sagecp-Console"
_MAX_BODY_BYTES = 16 << 10
_LEAST_COMPRESSED_BYTES = 4 << 10
_ENCODE = msgspec.json.encode


class ConsoleServer:
    """Serves the page and the metrics of a manager.

    Args:
        manager: What is shown.
        config: What is allowed.
        render_metrics: Makes the page of metrics.
    """

    def __init__(
        self, manager: ControlPlaneManager, config: ConsoleConfig, render_metrics: RenderMetrics
    ) -> None:
        self._manager = manager
        self._config = config
        self._render_metrics = render_metrics
        self._feed = ConsoleFeed(manager, config.interval_s, config.max_viewer_count)
        self._files = {
            name: resources.files("sagecp.console").joinpath("static", name).read_bytes() for name in _STATIC
        }
        self._runner: web.AppRunner | None = None
        self._host = ""
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one.

        Raises:
            OSError: It cannot listen there.
        """
        self._host = host
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[self._guard])
        app.router.add_get("/metrics", self._metrics)
        if self._config.enabled:
            app.router.add_get("/", self._page)
            app.router.add_get("/static/{name}", self._file)
            app.router.add_get("/api/snapshot", self._snapshot)
            app.router.add_get("/api/stream", self._stream)
            app.router.add_get("/api/requests/{request_id}", self._request)
            app.router.add_post("/api/instances/{instance_id}/drain", self._drain)
            app.router.add_post("/api/instances/{instance_id}/resume", self._resume)
            app.router.add_post("/api/policy", self._set_policy)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        if self._config.enabled:
            self._feed.start()

    async def stop(self) -> None:
        """Close the port and every stream."""
        await self._feed.stop()
        if self._runner is not None:
            await self._runner.cleanup()

    # -- what everybody goes through ----------------------------------------------------

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not self._is_ours(request.host):
            # A page of somebody else's whose name was made to point here.
            return _problem(
                421, f"this is not {request.host[:80]}; open it under the address that it listens on"
            )
        try:
            response = await handler(request)
        except web.HTTPException as error:
            return _problem(error.status, error.reason)
        except SageError as error:
            return _problem(_status_of(error), str(error), error.reason.name)
        except ConnectionError:
            raise
        except Exception:
            logger.exception("the console crashed", extra={"path": request.path})
            return _problem(500, "the server failed to answer; its log has the details")
        if not response.prepared:
            response.headers.update(_SECURITY_HEADERS)
        return response

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header may be meant for a port that only this machine can reach."""
        if not is_loopback(self._host):
            return True
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return is_loopback(name.strip("[]"))

    def _check_action(self, request: web.Request) -> None:
        if not self._config.actions:
            raise web.HTTPForbidden(
                reason="this console only shows; start the server with --console-actions to act from it"
            )
        # A header of one's own cannot be sent by a form of another site, and a script there may not.
        if request.headers.get(_ACTION_HEADER) != "1":
            raise web.HTTPForbidden(reason=f"an action needs the header {_ACTION_HEADER}: 1")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            raise web.HTTPForbidden(reason="an action must come from the console's own page")

    # -- reading --------------------------------------------------------------------------

    async def _metrics(self, request: web.Request) -> web.Response:
        body = await self._render_metrics()
        headers = {"Content-Type": METRICS_CONTENT_TYPE}
        if "gzip" in request.headers.get("Accept-Encoding", "") and len(body) >= _LEAST_COMPRESSED_BYTES:
            # Megabytes of a large fleet are no work for the event loop.
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(body=self._files["index.html"], content_type="text/html", charset="utf-8")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound(reason=f"there is no {name[:80]}")
        return web.Response(body=self._files[name], content_type=_STATIC[name], charset="utf-8")

    async def _snapshot(self, request: web.Request) -> web.Response:
        return _json(await self._whole())

    async def _whole(self) -> dict[str, Any]:
        return {**await self._feed.snapshot(), "actions": self._config.actions}

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**_SECURITY_HEADERS, "Content-Type": "text/event-stream"})
        updates = self._feed.watch()
        try:
            first = await anext(updates)
        except TooManyViewersError:
            raise web.HTTPServiceUnavailable(
                reason=f"{self._config.max_viewer_count} consoles are open already; close one"
            ) from None
        try:
            await response.prepare(request)
            hello = {
                "kind": "hello",
                "actions": self._config.actions,
                "policies": SCHEDULING_POLICIES.names,
            }
            await response.write(_event(hello))
            await response.write(b"data: " + first + b"\n\n")
            async for update in updates:
                await response.write(b"data: " + update + b"\n\n")
        except ConnectionError:
            pass  # The page was closed.
        finally:
            with contextlib.suppress(RuntimeError):
                await updates.aclose()  # type: ignore[attr-defined]
        return response

    async def _request(self, request: web.Request) -> web.Response:
        manager = self._manager
        handle = manager.requests.find(request.match_info["request_id"])
        if handle is None:
            raise RequestNotFoundError(request.match_info["request_id"][:128])
        return _json(
            {
                "request": request_values(manager.status_of(handle)),
                "decisions": [
                    decision_values(each, manager.wall_time) for each in manager.decisions_of(handle)
                ],
            }
        )

    # -- acting ---------------------------------------------------------------------------

    async def _drain(self, request: web.Request) -> web.Response:
        self._check_action(request)
        body = await _body(request)
        self._manager.drain_instance(
            request.match_info["instance_id"], force=body.get("force") is True, cause="web console"
        )
        await self._manager.journal_written()
        return _json({})

    async def _resume(self, request: web.Request) -> web.Response:
        self._check_action(request)
        self._manager.drain_instance(request.match_info["instance_id"], undo=True, cause="web console")
        await self._manager.journal_written()
        return _json({})

    async def _set_policy(self, request: web.Request) -> web.Response:
        self._check_action(request)
        body = await _body(request)
        policy = body.get("scheduling_policy")
        if not isinstance(policy, str):
            raise web.HTTPBadRequest(reason="give scheduling_policy, the name of a policy")
        self._manager.update_scheduling(SettingsChange(scheduling_policy=policy, comment="web console"))
        return _json({})


async def _body(request: web.Request) -> dict[str, Any]:
    data = await request.read()
    if not data:
        return {}
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise web.HTTPBadRequest(reason=f"the body is not a JSON object: {error}") from None


def _status_of(error: SageError) -> int:
    name = error.reason.name
    if name.endswith("_NOT_FOUND"):
        return 404
    return 400 if name in {"INVALID_REQUEST", "UNKNOWN_POLICY"} else 409


def _json(value: object) -> web.Response:
    return web.Response(body=_ENCODE(value), content_type="application/json")


def _event(value: object) -> bytes:
    return b"data: " + _ENCODE(value) + b"\n\n"


def _problem(status: int, message: str, reason: str = "") -> web.Response:
    """Return a refusal, as problem details (RFC 9457)."""
    body = {"status": status, "detail": message, **({"reason": reason} if reason else {})}
    return web.Response(
        status=status, body=_ENCODE(body), content_type="application/problem+json", headers=_SECURITY_HEADERS
    )
