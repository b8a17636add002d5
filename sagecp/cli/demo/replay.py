"""Replays a trace: every request when its time has come, whatever became of those before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from sagecp.cli.demo.trace import Trace, TraceRow, make_prompt
from sagecp.client import ClientError, SageClient, TokenStream

# How a program can ask, in turn; `bench/traces` has enough rows for each.
GENERATE = "Generate"
SUBMIT_STREAM = "Submit, then Stream"
RESUMED = "Submit, then Stream in two parts"
WAYS = (GENERATE, SUBMIT_STREAM, RESUMED)


@dataclass(slots=True)
class Outcome:
    """What the user of one request saw. Times in seconds since it was sent.

    Attributes:
        way: One of :data:`WAYS`.
        lateness_s: How much later than planned it was sent.
        error: Why it failed; empty: it did not.
    """

    way: str
    lateness_s: float = 0.0
    ttft_s: float | None = None
    end_to_end_s: float | None = None
    token_count: int = 0
    prompt_token_count: int = 0
    instance_id: str = ""
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """(end-to-end - TTFT) / (output tokens - 1), for answers of two tokens or more."""
        if self.ttft_s is None or self.end_to_end_s is None or self.token_count < 2:
            return None
        return (self.end_to_end_s - self.ttft_s) / (self.token_count - 1)


async def replay(
    client: SageClient,
    trace: Trace,
    *,
    speed: float,
    model: str,
    on_progress: Callable[[list[Outcome], int], None],
) -> list[Outcome]:
    """Send every request of a trace at its time.

    Args:
        client: Where to.
        trace: What and when.
        speed: 2: the trace's times are halved.
        model: Served name; empty: the only one.
        on_progress: Gets the outcomes so far, and how many requests are under way.
    """
    outcomes: list[Outcome] = []
    running = 0
    begin_s = time.monotonic()

    async def one(number: int, row: TraceRow, lateness_s: float) -> None:
        nonlocal running
        outcome = Outcome(WAYS[number % len(WAYS)], lateness_s)
        running += 1
        try:
            await _send(client, row, number, model, outcome)
        except ClientError as error:
            outcome.error = f"{error.reason.name if error.reason else error.code.name}: {error.message}"
        finally:
            running -= 1
        outcomes.append(outcome)
        on_progress(outcomes, running)

    async with asyncio.TaskGroup() as group:
        for number, row in enumerate(trace.rows):
            due_s = begin_s + row.arrival_s / speed
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            group.create_task(one(number, row, max(0.0, time.monotonic() - due_s)))
    return outcomes


async def _send(client: SageClient, row: TraceRow, number: int, model: str, outcome: Outcome) -> None:
    prompt = make_prompt(row, number)
    limit = row.output_token_count
    start_s = time.monotonic()
    if outcome.way == GENERATE:
        stream = client.generate(prompt, model=model, max_tokens=limit, ignore_eos=True)
    else:
        submitted = await client.submit(prompt, model=model, max_tokens=limit, ignore_eos=True)
        stream = client.stream(submitted.request_id)
    if outcome.way == RESUMED:
        # As after a lost connection: another stream goes on where the first one stopped.
        await _read(stream, outcome, start_s, stop_after=limit // 2)
        stream = client.stream(stream.request_id, from_token_index=stream.next_token_index)
    await _read(stream, outcome, start_s)
    end = stream.end
    outcome.end_to_end_s = time.monotonic() - start_s
    if end is not None:
        outcome.instance_id = end.instance_id
        outcome.prompt_token_count = end.usage.prompt_token_count or 0
        if outcome.token_count != end.token_count:
            outcome.error = f"received {outcome.token_count} tokens of {end.token_count}"


async def _read(stream: TokenStream, outcome: Outcome, start_s: float, stop_after: int | None = None) -> None:
    async with stream:
        if stop_after == 0:
            return
        async for chunk in stream:
            if outcome.ttft_s is None:
                outcome.ttft_s = time.monotonic() - start_s
            outcome.token_count += chunk.token_count
            if stop_after is not None and outcome.token_count >= stop_after:
                return
