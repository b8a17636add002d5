"""Runs attempts: from a decision to the event that says how it went."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sagecp.core import effects as fx
from sagecp.core import events as ev
from sagecp.core.errors import ErrorReason, Failure, InvalidRequestError
from sagecp.core.types import ExecutionInstance, RequestMetadata
from sagecp.runtime.engines.base import (
    EngineDelta,
    EngineError,
    EngineOutcome,
    EngineStreamBrokenError,
    EngineUnreachableError,
)
from sagecp.runtime.engines.continuation import (
    Continuation,
    remaining_token_count,
    usage_after,
    why_not_continued,
)
from sagecp.runtime.executor import ExecutionCoordinator, failure_of
from sagecp.runtime.journal import Journal, JournaledOutput
from sagecp.runtime.output import OutputLog
from sagecp.runtime.requests import RequestHandle
from sagecp.runtime.store.base import StoreError
from sagecp.runtime.store.codec import unpack_token_ids
from sagecp.runtime.tracing.base import RequestTracer

logger = logging.getLogger(__name__)

# A dead engine refuses at once; one that takes longer to say anything is not known to be dead.
_CONFIRM_TIMEOUT_S = 0.5
_DEADLINE_SLACK_S = 0.25


def why_not_resumed(metadata: RequestMetadata, output: OutputLog) -> str:
    """Return why another attempt could not go on after a request's output; ``""``: it could."""
    why = why_not_continued(metadata)
    if why:
        return why
    if output.gap:
        return output.gap
    if output.token_ids() is None:
        return "its engine gave no token ids"
    if not metadata.prompt_token_ids and not output.prompt_token_ids:
        return "its engine gave no token ids of the prompt"
    return ""


def _why_not(handle: RequestHandle) -> str:
    return why_not_resumed(handle.record.metadata, handle.output)


def continuation_of(handle: RequestHandle) -> Continuation | None:
    """Return what the next attempt goes on after, or ``None``: it begins anew."""
    output = handle.output
    if not output.token_count:
        return None
    prompt = handle.record.metadata.prompt_token_ids or tuple(unpack_token_ids(output.prompt_token_ids))
    return Continuation(
        prompt, tuple(output.token_ids() or ()), "".join(delta.text for delta in output.deltas)
    )


class AttemptRunner:
    """Owns the tasks that run attempts.

    Args:
        coordinator: Speaks to engines.
        journal: Where durable requests are written; ``None``: nowhere.
        feed: Takes the event that says how an attempt went.
        clock: The core's clock.
        tracer: Says what calls to engines carry for their traces; ``None``: nothing.
    """

    def __init__(
        self,
        coordinator: ExecutionCoordinator,
        journal: Journal | None,
        feed: Callable[[ev.Event], None],
        clock: Callable[[], float],
        tracer: RequestTracer | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._journal = journal
        self._feed = feed
        self._clock = clock
        self._tracer = tracer
        self._tasks: set[asyncio.Task[None]] = set()
        # Attempts that an engine works on, as opposed to those whose end is being told.
        self._executing: set[RequestHandle] = set()
        self._confirmations: dict[str, asyncio.Task[bool]] = {}

    def start(
        self, handle: RequestHandle, effect: fx.DispatchAttempt, instance: ExecutionInstance, incarnation: int
    ) -> None:
        """Run an attempt; its end comes as an event."""
        handle.interruption = None
        handle.output.begin_attempt(effect.epoch)
        task = asyncio.get_running_loop().create_task(self._run(handle, effect, instance, incarnation))
        handle.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def interrupt(self, handle: RequestHandle, effect: fx.InterruptAttempt) -> None:
        """Stop an attempt so that its request goes on elsewhere, if it still runs and that can be."""
        if handle not in self._executing or handle.record.epoch != effect.epoch or handle.task is None:
            return
        if handle.interruption is not None:
            return  # It is being stopped: a second time would break that off.
        if not effect.must_stop and handle.record.has_output and _why_not(handle):
            return
        handle.interruption = effect
        handle.task.cancel()

    async def stop(self) -> None:
        """End every task."""
        tasks = [*self._tasks, *self._confirmations.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self, handle: RequestHandle, effect: fx.DispatchAttempt, instance: ExecutionInstance, incarnation: int
    ) -> None:
        journal = self._journal if handle.durable else None
        sink = handle.output if journal is None else journal.output_of(handle)
        self._executing.add(handle)
        try:
            try:
                if journal is not None:
                    await journal.dispatched(handle, effect.epoch, instance.instance_id, incarnation)
                outcome = await self._execute(handle, effect, instance, sink)
            finally:
                self._executing.discard(handle)
            await _drained(sink)
            event: ev.Event = self._succeeded(handle, effect.epoch, outcome)
        except asyncio.CancelledError:
            interruption, task = handle.interruption, asyncio.current_task()
            if interruption is None or task is None:
                raise
            handle.interruption = None
            task.uncancel()
            await _drained(sink)
            event = self._failed(
                handle,
                effect.epoch,
                interruption.failure,
                # What was moved on purpose was nobody's fault.
                counts_against_engine=interruption.counts,
                counts=interruption.counts,
            )
        except EngineError as error:
            await _drained(sink)
            event = await self._engine_failed(handle, effect.epoch, error, instance.instance_id)
        except InvalidRequestError as error:
            event = self._failed(
                handle, effect.epoch, error.as_failure(), retryable=False, counts_against_engine=False
            )
        except StoreError as error:
            event = self._failed(handle, effect.epoch, error.as_failure(), counts_against_engine=False)
        except Exception:
            logger.exception("attempt crashed", extra={"request_id": handle.request_id})
            failure = Failure(
                ErrorReason.INTERNAL, "the control plane failed to run the request; see its log"
            )
            event = self._failed(handle, effect.epoch, failure, retryable=False, counts_against_engine=False)
        self._feed(event)

    async def _execute(
        self,
        handle: RequestHandle,
        effect: fx.DispatchAttempt,
        instance: ExecutionInstance,
        sink: OutputLog | JournaledOutput,
    ) -> EngineOutcome:
        record, output = handle.record, handle.output
        continuation = continuation_of(handle)
        finish_reason = output.finish_reason()
        if (
            continuation is not None
            and not finish_reason
            and remaining_token_count(record.metadata, len(continuation.output_token_ids)) == 0
        ):
            # All that was missing is the engine's word that this is all.
            finish_reason = "length"
            sink.on_deltas([EngineDelta(0, "", None, 0, finish_reason)])
        if finish_reason and record.metadata.choice_count == 1:
            prompt_ids = () if continuation is None else continuation.prompt_token_ids
            return EngineOutcome((finish_reason,), len(prompt_ids) or None, output.token_count)
        # The core ends it at its deadline; should that come late, the engine does not go on for long.
        deadline_s = record.deadline_s
        timeout_s = None if deadline_s is None else max(0.0, deadline_s - self._clock()) + _DEADLINE_SLACK_S
        result = await self._coordinator.execute_request(
            record.metadata,
            instance,
            effect.decision,
            sink=sink,
            model_name=record.model,
            continuation=continuation,
            timeout_s=timeout_s,
            headers=self._tracer.attempt_headers(record.request_id, effect.epoch) if self._tracer else None,
        )
        return usage_after(result.outcome, continuation)

    @staticmethod
    def _succeeded(handle: RequestHandle, epoch: int, outcome: EngineOutcome) -> ev.AttemptSucceeded:
        handle.outcome = outcome
        usage = handle.usage()
        return ev.AttemptSucceeded(
            handle.request_id,
            epoch,
            handle.output.token_count,
            prompt_token_count=usage.prompt_token_count,
            cached_prompt_token_count=usage.cached_prompt_token_count,
            finish_reasons=tuple(outcome.finish_reasons),
        )

    @staticmethod
    def _failed(
        handle: RequestHandle,
        epoch: int,
        failure: Failure,
        *,
        retryable: bool = True,
        engine_down: bool = False,
        engine_died: bool = False,
        counts_against_engine: bool = True,
        counts: bool = True,
    ) -> ev.AttemptFailed:
        return ev.AttemptFailed(
            handle.request_id,
            epoch,
            failure,
            retryable,
            engine_down,
            counts_against_engine,
            handle.output.token_count,
            _why_not(handle),
            engine_died,
            counts,
        )

    async def _engine_failed(
        self, handle: RequestHandle, epoch: int, error: EngineError, instance_id: str
    ) -> ev.AttemptFailed:
        unreachable = isinstance(error, EngineUnreachableError)
        down = died = unreachable
        if isinstance(error, EngineStreamBrokenError) or (
            isinstance(error, EngineUnreachableError) and error.sent
        ):
            # The connection is gone; whether the engine is, too, decides where the next attempt goes.
            died = await self._confirm_down(instance_id)
            down = down or died
        elif unreachable:
            died = False
        return self._failed(
            handle,
            epoch,
            failure_of(error, instance_id),
            retryable=error.retryable,
            engine_down=down,
            engine_died=died,
            counts_against_engine=error.counts_against_engine,
        )

    async def _confirm_down(self, instance_id: str) -> bool:
        """Ask an engine for its health, once for all attempts that broke off there together."""
        task = self._confirmations.get(instance_id)
        if task is None:
            task = asyncio.get_running_loop().create_task(
                self._coordinator.answers(instance_id, _CONFIRM_TIMEOUT_S)
            )
            self._confirmations[instance_id] = task
            task.add_done_callback(lambda _: self._confirmations.pop(instance_id, None))
        return not await asyncio.shield(task)


async def _drained(sink: OutputLog | JournaledOutput) -> None:
    """Wait until the attempt's output is where readers and the journal see it."""
    if isinstance(sink, JournaledOutput):
        await sink.drained()
