"""Traces of requests: what arrives at a simulated fleet, and when.

An open-loop trace says when each request arrives. A closed-loop trace is made
of sessions: a turn arrives when the turn before it has ended and its user has
thought, so a slow fleet is asked less. ``docs/simulator-formats.md`` describes
the files.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sagecp.core.types import RequestPriority
from sagecp.sim.fleet.trace_blocks import BlockReader
from sagecp.sim.fleet.trace_formats import TraceError, TraceRow, read_rows

__all__ = ["DEFAULT_SESSIONS_PER_S", "Trace", "TraceError", "TraceRequest", "read_trace", "transform"]

DEFAULT_SESSIONS_PER_S = 0.05
"""How often a session starts where nobody says: one every 20 s."""

_OPEN_LOOP_RANGE_BLOCK_TOKENS = 512
_SESSION_RANGE_BLOCK_TOKENS = 64
_HASH_BLOCK_TOKENS = 16
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        request_id: Unique in the trace, and kept by :func:`transform`.
        arrival_s: Since the trace began; 0 where ``after`` is set.
        prompt_token_count: Tokens of the prompt.
        output_token_count: Tokens that the model will produce, at least one.
        block_hashes: Content ids of the prompt's leading full blocks, below 2**63;
            equal ids are equal content. May cover less than the prompt.
        deadline_ms: From arrival to the end.
        ttft_slo_ms: Objective for the time to the first token; ``None``: not set.
        tpot_slo_ms: Objective for the time per further token; ``None``: not set.
        max_tokens: Limit that the user gave.
        after: Id of the request whose end, plus ``think_s``, makes this one
            arrive; empty: it arrives at ``arrival_s``. It is earlier in the trace.
        think_s: From the end of ``after`` to this arrival.
    """

    request_id: str
    arrival_s: float
    prompt_token_count: int
    output_token_count: int
    block_hashes: tuple[int, ...] = ()
    tenant_id: str = ""
    user_id: str = ""
    session_id: str = ""
    model: str = ""
    priority: RequestPriority = RequestPriority.NORMAL
    deadline_ms: float | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    max_tokens: int | None = None
    cost_budget_usd: float | None = None
    after: str = ""
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival; in a closed loop, session by session.

    Attributes:
        name: For people: the file's, without its endings.
        block_token_count: Tokens in a block of ``block_hashes``.
        requests: All of them.
        duration_s: Time that the arrivals cover, one mean gap after the last
            one included. In a closed loop, time in which sessions start; 0
            until :func:`transform` chose the starts.
        is_closed_loop: Whether turns wait for the turns before them.
    """

    name: str
    block_token_count: int
    requests: tuple[TraceRequest, ...]
    duration_s: float
    is_closed_loop: bool


def read_trace(path: Path) -> Trace:
    """Read a trace of any documented format, found out from its content.

    Raises:
        TraceError: Says which file and line, what is wrong, and what to do.
    """
    rows = read_rows(path)
    is_closed_loop = rows[0].turn is not None
    for row in rows:
        if (row.turn is not None) is not is_closed_loop:
            raise TraceError(
                path,
                row.line_number,
                f"{'lacks' if is_closed_loop else 'has'} turn, unlike the lines before it; "
                "give it on every line (sessions) or on none (arrivals)",
            )
        if is_closed_loop and not row.session_id:
            raise TraceError(
                path, row.line_number, "has turn but no session; say which session it is a turn of"
            )
    blocks = BlockReader(path, _block_token_count(path, rows, is_closed_loop))
    name = path.name.split(".")[0]
    if is_closed_loop:
        return Trace(name, blocks.token_count, tuple(_session_requests(path, rows, blocks)), 0.0, True)
    rows.sort(key=lambda row: row.t_s)
    requests = tuple(
        _request(number, row, blocks.read(row, ""), arrival_s=row.t_s) for number, row in enumerate(rows)
    )
    return Trace(name, blocks.token_count, requests, _covered_s([row.t_s for row in rows]), False)


def _covered_s(arrivals_s: list[float]) -> float:
    """Return the last arrival plus one mean gap: the period of the trace if it were repeated."""
    if len(arrivals_s) < 2:
        return arrivals_s[-1]
    return arrivals_s[-1] + (arrivals_s[-1] - arrivals_s[0]) / (len(arrivals_s) - 1)


def _block_token_count(path: Path, rows: list[TraceRow], is_closed_loop: bool) -> int:
    """Return what the rows say of the blocks' size, or what their kind of ids has by default."""
    said = next((row for row in rows if row.block_token_count is not None), None)
    if said is None or said.block_token_count is None:
        if any(row.hash_ranges for row in rows):
            return _SESSION_RANGE_BLOCK_TOKENS if is_closed_loop else _OPEN_LOOP_RANGE_BLOCK_TOKENS
        return _HASH_BLOCK_TOKENS
    for row in rows:
        if row.block_token_count not in (None, said.block_token_count):
            raise TraceError(
                path,
                row.line_number,
                f"block_tokens is {row.block_token_count}, but line {said.line_number} says "
                f"{said.block_token_count}; a trace has one size of blocks",
            )
    return said.block_token_count


def _request(
    number: int,
    row: TraceRow,
    block_hashes: tuple[int, ...],
    *,
    arrival_s: float = 0.0,
    after: str = "",
    think_s: float = 0.0,
) -> TraceRequest:
    return TraceRequest(
        request_id=_request_id(number),
        arrival_s=arrival_s,
        prompt_token_count=row.prompt_token_count,
        # An engine asked for nothing still makes one token.
        output_token_count=max(1, row.output_token_count),
        block_hashes=block_hashes,
        tenant_id=row.tenant_id,
        user_id=row.user_id,
        session_id=row.session_id,
        model=row.model,
        priority=row.priority,
        deadline_ms=row.deadline_ms,
        ttft_slo_ms=row.ttft_slo_ms,
        tpot_slo_ms=row.tpot_slo_ms,
        max_tokens=row.max_tokens,
        cost_budget_usd=row.cost_budget_usd,
        after=after,
        think_s=think_s,
    )


def _request_id(number: int) -> str:
    return f"r{number:06d}"


def _session_requests(path: Path, rows: list[TraceRow], blocks: BlockReader) -> Iterable[TraceRequest]:
    """Yield the requests of sessions, family by family, each after the one that it waits for."""
    families: dict[str, dict[str, list[TraceRow]]] = {}
    for row in rows:
        family = row.session_id.partition(".")[0]
        families.setdefault(family, {}).setdefault(row.session_id, []).append(row)
    first_number = 0
    for family, sessions in families.items():
        order: list[tuple[float, int, int, TraceRow]] = []
        for session_index, turns in enumerate(sessions.values()):
            _check_turns(path, turns)
            order += [(row.t_s, session_index, turn, row) for turn, row in enumerate(turns)]
        order.sort(key=lambda entry: entry[:3])
        numbers = {row.line_number: first_number + index for index, (*_, row) in enumerate(order)}
        for _, _, turn, row in order:
            number, think_s, before = numbers[row.line_number], row.think_s, None
            if turn:
                before = sessions[row.session_id][turn - 1]
            elif row.parent in sessions:
                before, think_s = _spawning_turn(row, sessions[row.parent], numbers)
            after = _request_id(numbers[before.line_number]) if before else ""
            # The first turn of a session waits for nobody, so that nobody thinks before it.
            yield _request(
                number, row, blocks.read(row, family), after=after, think_s=think_s if before else 0.0
            )
        first_number += len(order)


def _check_turns(path: Path, turns: list[TraceRow]) -> None:
    """Sort the turns of a session, and refuse turns that contradict each other."""
    turns.sort(key=lambda row: row.turn or 0)
    for before, row in itertools.pairwise(turns):
        if row.turn == before.turn:
            problem = f"is turn {row.turn} of session {row.session_id}, as is line {before.line_number}"
            raise TraceError(path, row.line_number, f"{problem}; number the turns of a session apart")
        if row.t_s < before.t_s:
            problem = (
                f"turn {row.turn} of session {row.session_id} is at {row.t_s:g} s, before turn {before.turn}"
            )
            raise TraceError(path, row.line_number, f"{problem} at {before.t_s:g} s; order turns by time")


def _spawning_turn(
    child: TraceRow, parent_turns: list[TraceRow], numbers: dict[int, int]
) -> tuple[TraceRow | None, float]:
    """Return the parent's last turn that had ended when a sub-agent started, and how long it then took.

    A turn ended when the next one's thinking began; of the last turn no end is
    known, so its start stands for it.
    """
    found: TraceRow | None = None
    think_s = 0.0
    for index, turn in enumerate(parent_turns):
        end_s = turn.t_s
        if index + 1 < len(parent_turns):
            following = parent_turns[index + 1]
            end_s = max(end_s, following.t_s - following.think_s)
        if end_s > child.t_s or numbers[turn.line_number] >= numbers[child.line_number]:
            break
        found, think_s = turn, child.t_s - end_s
    return found, think_s


def transform(
    trace: Trace,
    *,
    scale: float = 1.0,
    start_s: float = 0.0,
    duration_s: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    jitter: float = 0.0,
    sessions_per_s: float | None = None,
    longest_think_s: float | None = None,
) -> Trace:
    """Return a part of a trace, faster or slower, and varied by a seed.

    Open loop: ``seed`` rotates the whole trace in time, so that other seeds see
    other windows of the same load; then the window is cut, then compressed.
    Closed loop: sessions start as a Poisson process, and ``seed`` draws the
    starts and, unless it is 0, shuffles the sessions.

    Args:
        trace: As read.
        scale: Arrivals (session starts) per unit of time, relative to the trace; 2 is twice the rate.
        start_s: Where the window begins, in trace time before scaling.
        duration_s: Length of the window, in trace time before scaling; it ends with the trace at the latest.
        limit: Most requests to keep, the first ones.
        seed: 0 leaves an open-loop trace unchanged.
        jitter: Open loop: each arrival moves by up to this many mean gaps, either way.
        sessions_per_s: Closed loop: session starts per second before scaling; by default
            :data:`DEFAULT_SESSIONS_PER_S`.
        longest_think_s: Closed loop: longer pauses are cut to this; recorded ones last up to days.

    Raises:
        ValueError: An argument is out of range, or nothing is left.
    """
    for name, value, is_good in (
        ("scale", scale, 0 < scale < math.inf),
        ("start_s", start_s, 0 <= start_s < math.inf),
        ("duration_s", duration_s, duration_s is None or duration_s > 0),
        ("limit", limit, limit is None or limit > 0),
        ("sessions_per_s", sessions_per_s, sessions_per_s is None or 0 < sessions_per_s < math.inf),
    ):
        if not is_good:
            raise ValueError(f"{name} must be a finite number above 0 (start_s: or 0), not {value}")
    for name, value in (("seed", seed), ("jitter", jitter), ("longest_think_s", longest_think_s)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0, not {value}")
    if not trace.is_closed_loop and (sessions_per_s is not None or longest_think_s is not None):
        raise ValueError(
            f"trace {trace.name} has arrivals, not sessions: set scale, not sessions_per_s or longest_think_s"
        )
    if trace.is_closed_loop:
        arrivals, covered_s = _session_starts(trace, seed, sessions_per_s or DEFAULT_SESSIONS_PER_S)
    else:
        arrivals, covered_s = _varied_arrivals(trace, seed, jitter)
    end_s = covered_s if duration_s is None else min(covered_s, start_s + duration_s)
    # A trace in which everything arrives at once covers no time, and still has arrivals.
    kept = [
        pair for pair in arrivals if start_s <= pair[0] and (pair[0] < end_s or pair[0] == end_s == covered_s)
    ]
    if not kept:
        raise ValueError(
            f"trace {trace.name} lasts {covered_s:g} s and has nothing "
            + (
                f"after {start_s:g} s"
                if duration_s is None
                else f"in the {duration_s:g} s after {start_s:g} s"
            )
        )
    duration_s = (end_s - start_s) / scale
    requests = [replace(request, arrival_s=(arrival_s - start_s) / scale) for arrival_s, request in kept]
    if trace.is_closed_loop:
        requests = _with_later_turns(trace, requests, longest_think_s)
    if limit is not None:
        dropped_arrivals_s = [request.arrival_s for request in requests[limit:] if not request.after]
        # So that the rate of what is left is the rate of the trace.
        duration_s = min([duration_s, *dropped_arrivals_s])
        requests = requests[:limit]
    return replace(trace, requests=tuple(requests), duration_s=duration_s)


def _varied_arrivals(
    trace: Trace, seed: int, jitter: float
) -> tuple[list[tuple[float, TraceRequest]], float]:
    period_s = trace.duration_s
    arrivals = [(request.arrival_s, request) for request in trace.requests]
    if period_s <= 0:
        return arrivals, period_s
    # Multiples of the golden ratio spread any number of seeds evenly over the trace.
    offset_s = seed * _GOLDEN_RATIO % 1.0 * period_s
    if seed:
        arrivals = [((arrival_s - offset_s) % period_s, request) for arrival_s, request in arrivals]
    if jitter:
        generator = random.Random(seed)
        reach_s = jitter * period_s / len(arrivals)
        arrivals = [
            ((arrival_s + generator.uniform(-reach_s, reach_s)) % period_s, request)
            for arrival_s, request in arrivals
        ]
    arrivals.sort(key=lambda pair: pair[0])
    return arrivals, period_s


def _session_starts(
    trace: Trace, seed: int, sessions_per_s: float
) -> tuple[list[tuple[float, TraceRequest]], float]:
    generator = random.Random(seed)
    first_turns = [request for request in trace.requests if not request.after]
    if seed:
        generator.shuffle(first_turns)
    gaps = [generator.expovariate(sessions_per_s) for _ in first_turns]
    starts = list(itertools.accumulate(gaps))
    return list(zip(starts, first_turns, strict=True)), starts[-1] + 1 / sessions_per_s


def _with_later_turns(
    trace: Trace, starting: list[TraceRequest], longest_think_s: float | None
) -> list[TraceRequest]:
    """Return each starting request with those that follow from it, directly or not."""
    position = {request.request_id: index for index, request in enumerate(starting)}
    members: list[list[TraceRequest]] = [[request] for request in starting]
    # A request is later in the trace than the one that it waits for.
    for request in trace.requests:
        index = position.get(request.after) if request.after else None
        if index is None:
            continue
        position[request.request_id] = index
        if longest_think_s is not None and request.think_s > longest_think_s:
            members[index].append(replace(request, think_s=longest_think_s))
        else:
            members[index].append(request)
    return list(itertools.chain.from_iterable(members))
