"""Runs requests on engines: one client per instance, and the translation of what goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sagecp.config import EngineConfig
from sagecp.core.errors import ErrorReason, Failure, InstanceNotFoundError
from sagecp.core.types import ExecutionInstance, RequestMetadata, SchedulingDecision
from sagecp.runtime.engines.base import (
    EngineCall,
    EngineClient,
    EngineDelta,
    EngineEndpoint,
    EngineError,
    EngineHealth,
    EngineOutcome,
    EngineOverloadedError,
    EngineRejectedError,
    EngineSink,
    EngineTimeoutError,
    EngineTimeouts,
    EngineUnreachableError,
)
from sagecp.runtime.engines.continuation import Continuation
from sagecp.runtime.engines.request_body import engine_request_id, make_engine_call
from sagecp.runtime.engines.splice import continue_generation
from sagecp.runtime.engines.vllm import VllmEngineClient

ClientFactory = Callable[[EngineEndpoint], EngineClient]


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """A completed request.

    Attributes:
        outcome: Finish reasons and the engine's token counts.
        text: Text of the first choice, when no sink was given; else ``""``.
        token_ids: Its token ids, likewise, where the engine gives them.
    """

    outcome: EngineOutcome
    text: str = ""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ExecutionMetrics:
    """What the coordinator did since it was made."""

    started_count: int
    succeeded_count: int
    failed_count: int
    aborted_count: int
    running_count: int
    instance_count: int


class _CollectingSink:
    """Keeps the first choice, for callers who want the whole answer at once."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        """Ignore it."""

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        for delta in deltas:
            if delta.choice_index == 0:
                self.text.append(delta.text)
                self.token_ids.extend(delta.token_ids or ())


class _Engine:
    """One instance's client, with the number of calls that use it, and since when any does."""

    __slots__ = ("busy_since_s", "call_count", "client", "endpoint", "model_name", "retired")

    def __init__(self, endpoint: EngineEndpoint, model_name: str, client: EngineClient) -> None:
        self.endpoint = endpoint
        self.model_name = model_name
        self.busy_since_s = 0.0
        self.client = client
        self.call_count = 0
        self.retired = False


class ExecutionCoordinator:
    """Executes requests on instances.

    Args:
        config: Timeouts and what to ask engines for.
        client_factory: Makes the client of an endpoint; the default speaks vLLM's HTTP API.
    """

    def __init__(
        self, config: EngineConfig | None = None, client_factory: ClientFactory | None = None
    ) -> None:
        self._config = config or EngineConfig()
        self._factory: ClientFactory = client_factory or VllmEngineClient
        self._engines: dict[str, _Engine] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._timeouts = EngineTimeouts(
            connect_s=self._config.connect_timeout_s,
            first_token_s=self._config.first_token_timeout_s,
            inter_token_s=self._config.inter_token_timeout_s,
        )
        self._started = self._succeeded = self._failed = self._aborted = 0

    def attach(self, instance: ExecutionInstance) -> None:
        """Make the instance reachable; a changed address replaces the client once its calls have ended."""
        endpoint = EngineEndpoint(instance.engine_url, instance.api_key)
        known = self._engines.get(instance.instance_id)
        if known is not None:
            if known.endpoint == endpoint:
                known.model_name = instance.model_name
                return
            self._retire(known)
        self._engines[instance.instance_id] = _Engine(endpoint, instance.model_name, self._factory(endpoint))

    def detach(self, instance_id: str) -> None:
        """Forget an instance; calls in progress go on."""
        engine = self._engines.pop(instance_id, None)
        if engine is not None:
            self._retire(engine)

    def _retire(self, engine: _Engine) -> None:
        engine.retired = True
        if engine.call_count == 0:
            task = asyncio.get_running_loop().create_task(engine.client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _engine_of(self, instance: ExecutionInstance) -> _Engine:
        endpoint = EngineEndpoint(instance.engine_url, instance.api_key)
        engine = self._engines.get(instance.instance_id)
        if engine is None or engine.endpoint != endpoint:
            # It left the fleet, or moved, after the decision; or was never in it. A client for
            # this call alone: attaching would bring back what was taken out.
            engine = _Engine(endpoint, instance.model_name, self._factory(endpoint))
            engine.retired = True
        return engine

    async def execute_request(
        self,
        request: RequestMetadata,
        instance: ExecutionInstance,
        decision: SchedulingDecision | None = None,
        *,
        sink: EngineSink | None = None,
        model_name: str = "",
        continuation: Continuation | None = None,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ExecutionResult:
        """Run one request on one instance, to its end.

        Cancelling the awaiting task stops the engine's work at once.

        Args:
            request: What is asked, validated.
            instance: Where to run it.
            decision: Why it runs there. Its epoch tells the engine's attempts of one request apart.
            sink: Takes the output as it arrives. Without one the first
                choice is collected and returned.
            model_name: Served name to ask for; default: the request's, else the instance's.
            continuation: What earlier attempts produced, to go on after. The
                sink gets what is new; the outcome's counts are this attempt's own.
            timeout_s: What is left of the request's deadline; the engine does not work longer.
            headers: Further headers of the call, such as a trace context.

        Raises:
            EngineError: It did not complete.
            InvalidRequestError: It cannot be put into the engine's terms.
            ValueError: The request cannot be continued.
        """
        model = model_name or request.model_name or instance.model_name
        request_id = engine_request_id(request.request_id, 1 if decision is None else decision.epoch)
        call: EngineCall | None = None
        if continuation is None:
            call = make_engine_call(request, model, token_ids=self._config.token_ids, request_id=request_id)
            if headers:
                call = dataclasses.replace(call, headers=headers)
        timeouts = self._timeouts
        if timeout_s is not None:
            timeouts = dataclasses.replace(timeouts, total_s=timeout_s)
        collected = _CollectingSink() if sink is None else None
        taker = sink or collected or _CollectingSink()
        engine = self._engine_of(instance)
        if engine.call_count == 0:
            engine.busy_since_s = time.monotonic()
        engine.call_count += 1
        self._started += 1
        try:
            if call is not None:
                generating = engine.client.generate(call, taker, timeouts)
                # The client keeps it as long as it needs it.
                call = None
                outcome = await generating
            else:
                assert continuation is not None  # noqa: S101 - one or the other
                outcome = await continue_generation(
                    engine.client,
                    request,
                    model,
                    continuation,
                    taker,
                    timeouts,
                    request_id=request_id,
                    headers=headers,
                )
        except asyncio.CancelledError:
            self._aborted += 1
            raise
        except BaseException:
            self._failed += 1
            raise
        finally:
            engine.call_count -= 1
            if engine.retired and engine.call_count == 0:
                self._retire(engine)
        self._succeeded += 1
        if collected is None:
            return ExecutionResult(outcome)
        return ExecutionResult(outcome, "".join(collected.text), tuple(collected.token_ids))

    def _attached(self, instance_id: str) -> _Engine:
        engine = self._engines.get(instance_id)
        if engine is None:
            raise InstanceNotFoundError(instance_id)
        return engine

    async def health_check(self, instance_id: str) -> EngineHealth:
        """Probe one instance.

        Raises:
            InstanceNotFoundError: It is not attached.
        """
        engine = self._attached(instance_id)
        return await engine.client.health(self._config.health_timeout_s)

    async def answers(self, instance_id: str, timeout_s: float) -> bool:
        """Return whether an engine answers its health check in time; one that is not attached does not."""
        engine = self._engines.get(instance_id)
        return engine is not None and (await engine.client.health(timeout_s)).healthy

    async def probe_generation(self, instance_id: str, timeout_s: float | None = None) -> EngineHealth:
        """Have one instance generate a token, as a hung engine cannot while its ``/health`` is well.

        Args:
            instance_id: The instance.
            timeout_s: For the whole probe; default: that of health probes.

        Raises:
            InstanceNotFoundError: It is not attached.
        """
        engine = self._attached(instance_id)
        return await engine.client.probe(
            engine.model_name, self._config.health_timeout_s if timeout_s is None else timeout_s
        )

    def silent_since(self, instance_id: str) -> float | None:
        """Return since when no call on an instance has produced output, on the monotonic clock.

        ``None`` while no call runs there: an idle engine is silent, too.
        """
        engine = self._engines.get(instance_id)
        if engine is None or engine.call_count == 0:
            return None
        return max(engine.busy_since_s, engine.client.last_output_s)

    async def health_check_all(self) -> dict[str, EngineHealth]:
        """Probe every instance at once; by instance id."""
        ids = list(self._engines)
        results = await asyncio.gather(*(self.health_check(instance_id) for instance_id in ids))
        return dict(zip(ids, results, strict=True))

    def get_metrics(self) -> ExecutionMetrics:
        """Return what was done so far."""
        return ExecutionMetrics(
            started_count=self._started,
            succeeded_count=self._succeeded,
            failed_count=self._failed,
            aborted_count=self._aborted,
            running_count=self._started - self._succeeded - self._failed - self._aborted,
            instance_count=len(self._engines),
        )

    async def close(self) -> None:
        """Close every connection."""
        engines, self._engines = list(self._engines.values()), {}
        await asyncio.gather(*(engine.client.close() for engine in engines), *self._closing)


def failure_of(error: EngineError, instance_id: str) -> Failure:
    """Return what a user is told about an engine's failure."""
    if isinstance(error, EngineRejectedError):
        where = f" (parameter {error.parameter})" if error.parameter else ""
        return Failure(ErrorReason.ENGINE_REJECTED, f"the engine refused the request{where}: {error}")
    if isinstance(error, EngineTimeoutError):
        if error.phase == "total":
            return Failure(ErrorReason.DEADLINE_EXCEEDED, f"instance {instance_id}: {error}")
        return Failure(ErrorReason.ENGINE_TIMEOUT, f"instance {instance_id}: {error}")
    if isinstance(error, EngineUnreachableError):
        return Failure(ErrorReason.ENGINE_UNREACHABLE, f"instance {instance_id}: {error}")
    if isinstance(error, EngineOverloadedError):
        return Failure(ErrorReason.ENGINE_FAILED, f"instance {instance_id} is full: {error}")
    return Failure(ErrorReason.ENGINE_FAILED, f"instance {instance_id}: {error}")
