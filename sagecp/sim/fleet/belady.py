"""How much of each prompt a cache could have had: unlimited, offline-optimal, and least-recently-used.

Caches hold blocks and see the prompts of an open-loop trace one after the
other, in order of arrival; time and outputs play no role. A hit is a leading
part of a prompt, up to the first block that is absent, and leaves at least one
token to compute, as in the engines.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from sagecp.sim.fleet.outcomes import Integers
from sagecp.sim.fleet.traces import Trace, TraceRequest


def unlimited_cached_token_counts(trace: Trace) -> Integers:
    """Return for each request how many of its prompt tokens an earlier prompt had, too.

    Raises:
        ValueError: The trace is closed-loop: its order of arrival depends on the fleet.
    """
    known: set[int] = set()
    counts: list[int] = []
    for request, blocks in _prompts(trace):
        counts.append(_leading_count(request, blocks, known, trace.block_token_count))
        known.update(blocks)
    return _tokens(counts, trace)


def lru_cached_token_counts(trace: Trace, block_count: int) -> Integers:
    """Return the same for a cache of so many blocks that drops the least recently used.

    Of one prompt, the last block goes first, as in vLLM.

    Raises:
        ValueError: The trace is closed-loop: its order of arrival depends on the fleet.
    """
    kept: OrderedDict[int, None] = OrderedDict()
    counts: list[int] = []
    for request, blocks in _prompts(trace):
        counts.append(_leading_count(request, blocks, kept, trace.block_token_count))
        for block in reversed(blocks):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > block_count:
            kept.popitem(last=False)
    return _tokens(counts, trace)


def belady_cached_token_counts(trace: Trace, block_count: int) -> Integers:
    """Return the same for a cache of so many blocks that knows the future.

    It drops what is needed latest (Belady, "A study of replacement algorithms
    for a virtual-storage computer", 1966), and never keeps what is not needed
    again. No prompt needs a block without those before it, so that dropping the
    deepest of those needed at the same time leaves beginnings, never holes: the
    largest number of hits is that of blocks.

    Raises:
        ValueError: The trace is closed-loop: its order of arrival depends on the fleet.
    """
    prompts = list(_prompts(trace))
    next_uses = _next_uses([blocks for _, blocks in prompts])
    kept: dict[int, int] = {}  # Block: number of the prompt that needs it next.
    # Latest needed first, then deepest; an entry counts only while it agrees with what is kept.
    order: list[tuple[int, int, int]] = []
    counts: list[int] = []
    for number, (request, blocks) in enumerate(prompts):
        counts.append(_leading_count(request, blocks, kept, trace.block_token_count))
        for depth, (block, next_use) in enumerate(zip(blocks, next_uses[number], strict=True)):
            if next_use < 0:
                kept.pop(block, None)
            else:
                kept[block] = next_use
                heapq.heappush(order, (-next_use, -depth, block))
        while len(kept) > block_count:
            negative_use, _, block = heapq.heappop(order)
            if kept.get(block) == -negative_use:
                del kept[block]
    return _tokens(counts, trace)


def _prompts(trace: Trace) -> Iterator[tuple[TraceRequest, tuple[int, ...]]]:
    """Yield the requests with the blocks that an engine makes known: full ones, up to a repetition."""
    if trace.is_closed_loop:
        raise ValueError(f"trace {trace.name} is closed-loop: its order of arrival depends on the fleet")
    for request in trace.requests:
        blocks = request.block_hashes[: request.prompt_token_count // trace.block_token_count]
        if len(set(blocks)) < len(blocks):
            first: dict[int, int] = {}
            repeated = next(
                index for index, block in enumerate(blocks) if first.setdefault(block, index) != index
            )
            blocks = blocks[:repeated]
        yield request, blocks


def _next_uses(prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Return for each block of each prompt the number of the next prompt with it; -1: there is none."""
    upcoming: dict[int, int] = {}
    found: list[list[int]] = []
    for number in range(len(prompts) - 1, -1, -1):
        blocks = prompts[number]
        found.append([upcoming.get(block, -1) for block in blocks])
        upcoming.update(dict.fromkeys(blocks, number))
    found.reverse()
    return found


def _leading_count(
    request: TraceRequest,
    blocks: tuple[int, ...],
    known: set[int] | dict[int, int] | OrderedDict[int, None],
    block_token_count: int,
) -> int:
    limit = (request.prompt_token_count - 1) // block_token_count
    for index, block in enumerate(blocks[:limit]):
        if block not in known:
            return index
    return min(limit, len(blocks))


def _tokens(block_counts: list[int], trace: Trace) -> Integers:
    return np.array(block_counts, dtype=np.int64) * trace.block_token_count
