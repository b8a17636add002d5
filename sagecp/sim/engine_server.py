"""An HTTP server that looks like vLLM and computes nothing."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import random
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import msgspec
from aiohttp import web

from sagecp.sim import info_endpoints
from sagecp.sim.api_events import ResponseHead
from sagecp.sim.api_fields import ApiError, UnreadableBodyError
from sagecp.sim.api_request import GenerationCall, parse_chat, parse_completion
from sagecp.sim.engine_control import EngineControl
from sagecp.sim.engine_loop import EngineLoop
from sagecp.sim.engine_metrics import EngineMetrics
from sagecp.sim.engine_types import EngineRequest, TokenOutput
from sagecp.sim.fault_control import FaultControl
from sagecp.sim.generation import Choice, Generation
from sagecp.sim.listener import Listener
from sagecp.sim.request_endpoints import add_request_routes
from sagecp.sim.server_config import EngineServerConfig
from sagecp.sim.token_source import TokenSource
from sagecp.sim.tokenizer import EOS_ID
from sagecp.version import __version__

ENGINE_VERSION = "0.32.0+sim"
"""What ``/version`` answers: the vLLM whose behaviour this follows, marked as simulated."""

_logger = logging.getLogger(__name__)
_BUSY = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)
_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8"}
_SERVER_NAME = f"sagecp-engine-sim/{__version__}"
# Seeds of a request's further choices, far from each other.
_CHOICE_STRIDE = 0x5851_F42D
# As vLLM: an idle connection is closed soon, and a client that reuses it finds out.
_KEEP_ALIVE_S = 5.0
# How long connections get to take their last bytes.
_CLOSE_TIMEOUT_S = 0.5

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def json_response(body: bytes, status: int = 200) -> web.Response:
    """Answer with JSON, under vLLM's content type."""
    return web.Response(body=body, status=status, headers={"Content-Type": "application/json"})


class EngineServer:
    """A simulated engine that listens; an async context manager.

    Args:
        config: What to simulate.
        die: What ``die_after_tokens`` does. The default breaks every
            connection and stops listening, which suits a server inside
            another process; :func:`~sagecp.sim.engine_process.exit_process` is the real thing.

    Attributes:
        config: As given.
        model: The engine.
        faults: The faults that are switched on; switch them with :meth:`misbehave`.
        control: Its sleep, and its LoRA adapters.
        metrics: What ``/metrics`` shows.
    """

    def __init__(self, config: EngineServerConfig, die: Callable[[], None] | None = None) -> None:
        self.config = config
        self.model = config.make_model()
        self.faults = FaultControl(random.Random(config.seed + 1))
        self.metrics = EngineMetrics(
            self.model,
            config.model_names[0],
            config.max_model_len,
            info_endpoints.cache_config(config, self.model.cache.block_count),
            time.time(),
            config.max_loras if config.enable_lora else None,
        )
        self._die = die if die is not None else self._play_dead
        described = f"{config.model_names[0]} {config.seed} {config.profile} {config.parallel_size}"
        self._fingerprint = f"vllm-{ENGINE_VERSION}-{zlib.crc32(described.encode()):08x}"
        self._random = random.Random(config.seed)
        self._sequence = itertools.count()
        self._live: dict[Generation, None] = {}
        self.control = EngineControl(config, self.model, self._live.keys(), self._apply_sleep)
        self.metrics.control = self.control
        self._draining = False
        self._engine: EngineLoop | None = None
        self._runner: web.AppRunner | None = None
        self._listener: Listener | None = None
        self._idle = asyncio.Event()
        self.misbehave(config.misbehaviour.as_dict())

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The address is in use or not this machine's.
        """
        listener = Listener(self.config.host, self.config.port)
        self._listener = listener
        self._engine = EngineLoop(self.model, self._deliver)
        app = web.Application(client_max_size=self.config.max_body_bytes, middlewares=[self._frame_answer])
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/health", self._health)
        app.router.add_get("/sim/misbehave", self._show_misbehaviour)
        app.router.add_post("/sim/misbehave", self._change_misbehaviour)
        info_endpoints.add_routes(app, self.config, ENGINE_VERSION, self.control)
        self.control.add_routes(app)
        add_request_routes(app, self._live.keys(), self.model)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=_KEEP_ALIVE_S,
            shutdown_timeout=_CLOSE_TIMEOUT_S,
        )
        await self._runner.setup()
        protocols = self._runner.server
        assert protocols is not None  # noqa: S101 - set-up makes one
        await listener.open(protocols)
        self._engine.paused = self.faults.switches.stalled
        listener.refuse(self.faults.switches.refuse_connections_s)

    async def stop(self, timeout_s: float = 0.0) -> None:
        """Stop as vLLM does.

        With a timeout, new requests get 500 while running ones may finish, and
        what is left then ends with an error. Without one, running requests end
        at once with finish reason ``abort``.
        """
        self._draining = True
        if timeout_s > 0 and self._live:
            self._idle.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
            except TimeoutError:
                for generation in list(self._live):
                    generation.fail()
        for generation in list(self._live):
            generation.abort()
        if self._engine is not None:
            self._engine.stop()
        if self._live:
            # Handlers take a turn of the loop to send what ends their answers.
            self._idle.clear()
            with_timeout = asyncio.wait_for(self._idle.wait(), _CLOSE_TIMEOUT_S)
            await asyncio.gather(with_timeout, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        """The port that is listened on."""
        if self._listener is None:
            raise RuntimeError("the server has not been started")
        return self._listener.port

    @property
    def base_url(self) -> str:
        """Where the server is, without a trailing slash."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}"

    @property
    def live_request_count(self) -> int:
        """HTTP requests for text that have not been answered in full."""
        return len(self._live)

    def misbehave(self, changes: dict[str, Any], spared: asyncio.BaseTransport | None = None) -> None:
        """Set switches; streams that run are affected too.

        Args:
            changes: The switches to set.
            spared: A connection that is not reset with the others.

        Raises:
            MisbehaviourError: A name is unknown or a value makes no sense.
        """
        self.faults.change(changes)
        self.model.slowness = self.faults.switches.slow_factor / self.config.speed
        for generation in self._live:
            generation.faults = self._stream_faults(generation)
        if self._engine is not None:
            self._engine.paused = self.faults.switches.stalled
            self._engine.wake()
        if self._listener is not None and "refuse_connections_s" in changes:
            self._listener.refuse(self.faults.switches.refuse_connections_s)
            if self.faults.switches.refuse_connections_s:
                self._reset_connections(spared)

    def _apply_sleep(self) -> None:
        if self._engine is not None:
            self._engine.asleep = self.control.is_asleep
            self._engine.wake()

    def _stream_faults(self, generation: Generation) -> list[tuple[int, str]]:
        """Return the faults that may hit a generation."""
        switches = self.faults.switches
        marker = switches.stream_fault_marker
        if marker is not None and not generation.mentions(marker):
            return []
        return switches.stream_faults()

    def finished(self, request: EngineRequest, reason: str, choice_count: int) -> None:
        """Count a choice that ended with an answer."""
        self.metrics.observe_finish(request, reason, choice_count)

    def claim_fault(self, generation: Generation) -> bool:
        """Return whether this generation may be hit by a fault."""
        return self.faults.claim(generation)

    def die(self) -> None:
        """End as a crash would, once what was written is sent."""
        if self._engine is not None:
            self._engine.stop()
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._die)

    def _play_dead(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._reset_connections()

    def _reset_connections(self, spared: asyncio.BaseTransport | None = None) -> None:
        server = None if self._runner is None else self._runner.server
        for connection in [] if server is None else list(server.connections):
            if connection.transport is not None and connection.transport is not spared:
                connection.transport.abort()

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """Hand a step's tokens to their choices."""
        metrics = self.metrics
        metrics.observe_step()
        observe_gap = metrics.observe_gap
        for request, token_id, finish_reason in outputs:
            if request.output_token_count == 1:
                metrics.observe_first_token(request)
            else:
                observe_gap(request.token_gap_s)
            choice = request.context
            assert isinstance(choice, Choice)  # noqa: S101 - the server makes every request
            choice.push(token_id, finish_reason)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, is_chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, is_chat=True)

    async def _generate(self, request: web.Request, *, is_chat: bool) -> web.StreamResponse:
        """Answer a request for text."""
        self.faults.reject()
        body = await request.read()
        if request.content_type != "application/json":
            raise ApiError(
                "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
                type_="Bad Request",
            )
        parse = parse_chat if is_chat else parse_completion
        call = parse(body, self.control.served_names, self.config.max_model_len)
        if self._draining:
            raise ApiError("The engine is shutting down.", status=500, type_="InternalServerError")
        self._check_queue(call)
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        if call.stream:
            if request.version < (1, 1):
                raise ApiError("streaming needs HTTP/1.1", status=505, type_="HTTP Version Not Supported")
            response.enable_chunked_encoding()
            await response.prepare(request)
        generation = self._begin(request, call)
        try:
            await generation.done
            if not call.stream:
                if generation.error is not None:
                    raise generation.error
                return json_response(generation.body())
            await response.write_eof()
        except asyncio.CancelledError:
            # The client has gone.
            _logger.debug("request aborted", extra={"request_id": generation.head.response_id})
            raise
        finally:
            generation.leave_engine()
            self._live.pop(generation, None)
            self.faults.forget(generation)
            if not self._live:
                self._idle.set()
            if self._engine is not None:
                self._engine.wake()
        return response

    def _begin(self, http_request: web.Request, call: GenerationCall) -> Generation:
        """Put a request's choices into the engine."""
        transport, engine = http_request.transport, self._engine
        if transport is None or engine is None:
            raise ConnectionResetError("the client has gone")
        base = http_request.headers.get("X-Request-Id") or call.body_request_id
        if not base:
            base = f"{uuid.uuid4().int & 0xFFFF_FFFF_FFFF_FFFF:016x}"
        head = ResponseHead(
            ("chatcmpl-" if call.is_chat else "cmpl-") + base, int(time.time()), call.model, self._fingerprint
        )

        def write(data: bytes) -> None:
            # uvloop raises on a transport that was reset, which would lose the step's other tokens.
            if not transport.is_closing():
                transport.write(data)

        generation = Generation(self, call, head, write, transport.abort, transport.close)
        generation.faults = self._stream_faults(generation)
        self._live[generation] = None
        end_token_ids = call.stop_token_ids if call.ignore_eos else call.stop_token_ids | {EOS_ID}
        sampling_seed: int | None = None
        if call.temperature > 0:
            sampling_seed = self._random.getrandbits(63) if call.seed is None else call.seed
        now = engine.now()
        for prompt_index, prompt in enumerate(call.prompts):
            for number in range(call.choice_count):
                chooser = TokenSource(
                    self.config.seed,
                    prompt,
                    None if sampling_seed is None else sampling_seed + number * _CHOICE_STRIDE,
                    endless=call.ignore_eos or self.config.endless_answers,
                )
                engine_request = EngineRequest(
                    f"{head.response_id}-{next(self._sequence)}",
                    prompt,
                    call.max_tokens[prompt_index],
                    chooser,
                    end_token_ids=end_token_ids,
                    min_tokens=call.min_tokens,
                )
                choice = Choice(generation, len(generation.choices), prompt_index, engine_request)
                engine_request.context = choice
                generation.add(choice)
                self.model.add(engine_request, now)
        generation.fire_faults()
        engine.wake()
        return generation

    def _check_queue(self, call: GenerationCall) -> None:
        limit = self.config.max_num_queued_reqs
        added = call.choice_count * len(call.prompts)
        if limit is not None and self.model.request_count + added > limit:
            self.metrics.rejections += 1
            raise ApiError(_BUSY, status=503, type_="Service Unavailable")

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        if self.faults.switches.silent_health:
            await asyncio.get_running_loop().create_future()
        return web.Response()

    async def _show_metrics(self, _request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/plain; version=1.0.0; charset=utf-8"}
        return web.Response(body=self.metrics.render(), headers=headers)

    async def _show_misbehaviour(self, request: web.Request) -> web.StreamResponse:
        _check_loopback(request)
        return json_response(msgspec.json.encode(self.faults.switches.as_dict()))

    async def _change_misbehaviour(self, request: web.Request) -> web.StreamResponse:
        _check_loopback(request)
        try:
            changes = msgspec.json.decode(await request.read(), type=dict[str, Any])
            self.misbehave(changes, request.transport)
        except (msgspec.DecodeError, ValueError) as error:
            raise ApiError(str(error)) from error
        return await self._show_misbehaviour(request)

    @web.middleware
    async def _frame_answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, and turn errors into vLLM's JSON."""
        try:
            if self.config.api_key and request.path.startswith("/v1") and not self._is_authorized(request):
                return json_response(b'{"error":"Unauthorized"}', 401)
            response = await handler(request)
        except ApiError as error:
            response = json_response(error.body(), error.status)
        except ConnectionResetError:
            # The client left before its answer began: nobody reads this one.
            response = web.Response(status=499)
        except UnreadableBodyError:
            response = json_response(b'{"detail":"There was an error parsing the body"}', 400)
        except web.HTTPRequestEntityTooLarge as error:
            response = json_response(ApiError(str(error.text), status=413).body(), 413)
        except web.HTTPException as error:
            response = json_response(msgspec.json.encode({"detail": error.reason}), error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        if not response.prepared:
            response.headers["Server"] = _SERVER_NAME
        return response

    def _is_authorized(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.encode(), self.config.api_key.encode())


def _check_loopback(request: web.Request) -> None:
    """Refuse callers from elsewhere: these switches are for who runs the engine.

    Raises:
        ApiError: The caller is not on this machine.
    """
    remote = request.remote or ""
    if not (remote.startswith(("127.", "::ffff:127.")) or remote == "::1"):
        raise ApiError("only callers on this machine may do that", status=403, type_="Forbidden")
