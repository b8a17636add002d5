"""Engines whose every step a test decides, behind the port that the real client implements.

A test awaits :meth:`ScriptedEngine.next_call` and then lets the call produce
output, finish or fail, by plain method calls: nothing sleeps, nothing is timed.
(`scripted_engine` has an engine behind a real socket, for tests of the client itself.)
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from sagecp.core.types import ExecutionInstance
from sagecp.runtime.engines.base import (
    EngineCall,
    EngineDelta,
    EngineEndpoint,
    EngineError,
    EngineHealth,
    EngineOutcome,
    EngineSink,
    EngineTimeouts,
    EngineUnreachableError,
)

WAIT_S = 10.0
# Of the tokens that are sent; those below are the tests' own prompts.
_FIRST_ID = 1000


class ScriptedCall:
    """One generation in progress on the engine.

    Attributes:
        call: What the control plane asked for.
        cancelled: Whether the control plane gave it up.
        ended: Set when it is over, in whatever way.
    """

    def __init__(
        self, call: EngineCall, sink: EngineSink, timeouts: EngineTimeouts, texts: dict[int, str]
    ) -> None:
        self.call = call
        self.timeouts = timeouts
        self.cancelled = False
        self.ended = asyncio.Event()
        self.token_count = 0
        self._sink = sink
        self._texts = texts
        # A continuation's prompt holds the tokens that exist; new ones are numbered on.
        prompt = self.body.get("prompt")
        earlier = (
            [token_id for token_id in prompt if token_id >= _FIRST_ID] if isinstance(prompt, list) else []
        )
        self._next_id = max(earlier, default=_FIRST_ID - 1) + 1
        self._result: asyncio.Future[EngineOutcome] = asyncio.get_running_loop().create_future()

    @property
    def request_id(self) -> str:
        """Id of the request, as the engine sees it."""
        return self.call.request_id

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that the engine was sent."""
        decoded: dict[str, Any] = json.loads(self.call.body)
        return decoded

    def tell_prompt(self, token_ids: Sequence[int]) -> None:
        """Tell which token ids the prompt has."""
        self._sink.on_prompt(token_ids)

    def send(self, *texts: str, choice_index: int = 0, raw: bytes | None = None) -> None:
        """Produce one token per text, all found in one read of the socket."""
        deltas = []
        for text in texts:
            deltas.append(EngineDelta(choice_index, text, (self._next_id,), 1, raw=raw))
            self._texts[self._next_id] = text
            self._next_id += 1
            self.token_count += 1
        self.send_deltas(deltas)

    def send_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        """Produce these pieces."""
        self._sink.on_deltas(deltas)

    def finish(self, reason: str = "stop", *, prompt_token_count: int = 7) -> None:
        """Say why it is complete, for every choice."""
        count = self.call.expected_choice_count
        self.send_deltas([EngineDelta(index, "", None, 0, finish_reason=reason) for index in range(count)])
        self.complete(EngineOutcome((reason,) * count, prompt_token_count, self.token_count, 0))

    def complete(self, outcome: EngineOutcome) -> None:
        """Complete without a further piece of output."""
        if not self._result.done():
            self._result.set_result(outcome)

    def fail(self, error: BaseException) -> None:
        """Break."""
        if not self._result.done():
            self._result.set_exception(error)

    def answer(self, *texts: str) -> None:
        """Produce these tokens and finish, all at once."""
        self.send(*texts)
        self.finish()

    async def run(self) -> EngineOutcome:
        """Wait for the script to end the call."""
        try:
            return await self._result
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()

    async def wait_ended(self) -> None:
        """Wait until it is over."""
        await asyncio.wait_for(self.ended.wait(), WAIT_S)


class ScriptedEngine:
    """One engine: its calls, and what it says about its health.

    Attributes:
        calls: Every call so far.
        automatic: Told about every call at its start, to answer without a test's help.
        healthy: What a probe finds.
        health_error: Raised by probes, when given.
        health_gate: When given, probes do not answer before it is set.
        probe_count: Probes so far.
        hung: Whether a probe for one token fails, whatever its health says.
        last_output_s: When it last produced output, on the monotonic clock.
        texts: The text of every token that was sent last under its id, by any engine of the fleet.
        clients: Every client that was made for it.
    """

    def __init__(self, base_url: str, texts: dict[int, str] | None = None) -> None:
        self.base_url = base_url
        self.calls: list[ScriptedCall] = []
        self.automatic: Callable[[ScriptedCall], None] | None = None
        self.healthy = True
        self.health_error: Exception | None = None
        self.health_gate: asyncio.Event | None = None
        self.probe_count = 0
        self.hung = False
        self.last_output_s = -math.inf
        self.texts: dict[int, str] = {} if texts is None else texts
        self.clients: list[ScriptedClient] = []
        self._arrived: asyncio.Queue[ScriptedCall] = asyncio.Queue()
        self._probed: asyncio.Queue[bool] = asyncio.Queue()

    @property
    def running(self) -> list[ScriptedCall]:
        """Calls in progress."""
        return [call for call in self.calls if not call.ended.is_set()]

    async def next_call(self) -> ScriptedCall:
        """Return the next call that no test has taken yet."""
        return await asyncio.wait_for(self._arrived.get(), WAIT_S)

    async def next_probe(self) -> bool:
        """Wait for the next health probe that no test has waited for yet; return what it was told."""
        return await asyncio.wait_for(self._probed.get(), WAIT_S)

    async def generate(self, call: EngineCall, sink: EngineSink, timeouts: EngineTimeouts) -> EngineOutcome:
        """Run a call as the test says."""
        scripted = ScriptedCall(call, sink, timeouts, self.texts)
        self.calls.append(scripted)
        self._arrived.put_nowait(scripted)
        if self.automatic is not None:
            self.automatic(scripted)
        return await scripted.run()

    async def health(self) -> EngineHealth:
        """Answer a probe as the test says."""
        self.probe_count += 1
        if self.health_gate is not None:
            await self.health_gate.wait()
        if self.health_error is not None:
            raise self.health_error
        healthy = self.healthy
        self._probed.put_nowait(healthy)
        return EngineHealth(healthy, 0.001, "" if healthy else "the script says so")


class ScriptedClient:
    """The control plane's client of one scripted engine."""

    def __init__(self, engine: ScriptedEngine, endpoint: EngineEndpoint) -> None:
        self.engine = engine
        self.endpoint = endpoint
        self.closed = False

    async def generate(self, call: EngineCall, sink: EngineSink, timeouts: EngineTimeouts) -> EngineOutcome:
        """Run one call to its end."""
        if self.closed:
            raise EngineUnreachableError("the client is closed")
        return await self.engine.generate(call, sink, timeouts)

    async def health(self, timeout_s: float) -> EngineHealth:
        """Probe the engine."""
        try:
            return await asyncio.wait_for(self.engine.health(), timeout_s)
        except TimeoutError:
            return EngineHealth(False, timeout_s, f"no answer within {timeout_s:g} s")

    @property
    def last_output_s(self) -> float:
        """When any call last produced output."""
        return self.engine.last_output_s

    async def probe(self, model: str, timeout_s: float) -> EngineHealth:
        """Answer as a health probe, unless the engine is hung."""
        if self.engine.hung:
            return EngineHealth(False, timeout_s, f"no token of {model} within {timeout_s:g} s")
        return await self.health(timeout_s)

    async def detokenize(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
        """Return the texts that were sent with these tokens."""
        del model, timeout_s
        return "".join(self.engine.texts.get(token_id, f"<{token_id}>") for token_id in token_ids)

    async def context_token_count(self, model: str, timeout_s: float) -> int:
        """Return the length of the script's context."""
        del model, timeout_s
        return 8192

    async def close(self) -> None:
        """Refuse further calls."""
        self.closed = True


class ScriptedFleet:
    """Makes clients of scripted engines: the ``client_factory`` of a control plane under test.

    Engines are told apart by their URL; :meth:`instance` names the host after the instance.
    """

    def __init__(self) -> None:
        self.engines: dict[str, ScriptedEngine] = {}
        self.texts: dict[int, str] = {}

    def __call__(self, endpoint: EngineEndpoint) -> ScriptedClient:
        """Return a client of the engine that listens at the endpoint."""
        engine = self.at(endpoint.base_url)
        client = ScriptedClient(engine, endpoint)
        engine.clients.append(client)
        return client

    def __getitem__(self, instance_id: str) -> ScriptedEngine:
        return self.at(self.instance(instance_id).engine_url)

    def at(self, base_url: str) -> ScriptedEngine:
        """Return the engine at a URL."""
        return self.engines.setdefault(base_url, ScriptedEngine(base_url, self.texts))

    def instance(
        self,
        instance_id: str,
        *,
        model_name: str = "tiny",
        limit: int | None = None,
        host: str = "",
    ) -> ExecutionInstance:
        """Return an instance whose engine is scripted."""
        return ExecutionInstance(
            instance_id=instance_id,
            host=host or f"{instance_id}.test",
            port=8000,
            model_name=model_name,
            max_concurrent_request_count=limit,
        )


def unreachable(message: str = "connection refused") -> EngineError:
    """Return what a client raises when nobody listens."""
    return EngineUnreachableError(message)
