"""The small kernels of a decoder layer that an engine has fused, and paged decode attention, in Triton.

Shapes use T scheduled tokens, H query heads, G key-value heads, D elements per
head. A key or value cache is (pages, page size, G, D), as vLLM lays it out; a
slot is a token's place in it, page * page size + offset. Needs torch and
Triton; `bench.gpu_step_time` is the program.
"""
# Triton's kernels take pointers, which have no Python type, and name compile-time constants in capitals.
# ruff: noqa: ANN001, N803

from __future__ import annotations

from dataclasses import dataclass

import torch  # type: ignore[import-not-found]
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

_LEAST_DOT_ROWS = 16
_SPLIT_SIZES = (1024, 512, 256, 128)
# Enough programs for several on each of an H100's 132 multiprocessors.
_WANTED_PROGRAM_COUNT = 528
_NORM_EPSILON = 1e-5


@triton.jit
def _add_and_normalise_kernel(hidden, residual, weight, out, SIZE: tl.constexpr, EPSILON: tl.constexpr):  # noqa: ANN202
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, SIZE)
    total = tl.load(hidden + row + columns).to(tl.float32) + tl.load(residual + row + columns).to(tl.float32)
    tl.store(residual + row + columns, total)
    scale = tl.rsqrt(tl.sum(total * total) / SIZE + EPSILON)
    tl.store(out + row + columns, total * scale * tl.load(weight + columns).to(tl.float32))


def add_and_normalise(hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add `hidden` to `residual` in place, return the sum's RMSNorm; both (T, size), size a power of two."""
    out = torch.empty_like(hidden)
    _add_and_normalise_kernel[(hidden.shape[0],)](
        hidden, residual, weight, out, SIZE=hidden.shape[1], EPSILON=_NORM_EPSILON, num_warps=8
    )
    return out


@triton.jit
def _silu_and_multiply_kernel(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN202
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * WIDTH + columns).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + columns).to(tl.float32)
    tl.store(out + row * WIDTH + columns, gate / (1.0 + tl.exp(-gate)) * up)


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's activation: (T, 2 * width) of gates, then ups, to (T, width), a multiple of 1024 or less."""
    token_count, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(token_count, width)
    block = min(1024, width)
    _silu_and_multiply_kernel[(token_count, width // block)](gate_up, out, WIDTH=width, BLOCK=block)
    return out


@triton.jit
def _rotate_and_store_kernel(  # noqa: ANN202
    qkv,
    positions,
    slots,
    cosines,
    sines,
    query,
    key_cache,
    value_cache,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # GROUP parts of queries, then the keys, then the values
    tile = tl.arange(0, KV_HEADS)[:, None] * 2 * HALF + tl.arange(0, HALF)[None, :]
    part_size = KV_HEADS * 2 * HALF
    source = qkv + (token * (GROUP + 2) + part) * part_size
    low, high = tl.load(source + tile), tl.load(source + HALF + tile)
    slot = tl.load(slots + token)
    if part == GROUP + 1:
        tl.store(value_cache + slot * part_size + tile, low)
        tl.store(value_cache + slot * part_size + HALF + tile, high)
    else:
        angle = tl.load(positions + token) * HALF + tl.arange(0, HALF)
        cosine, sine = tl.load(cosines + angle)[None, :], tl.load(sines + angle)[None, :]
        low_32, high_32 = low.to(tl.float32), high.to(tl.float32)
        rotated_low = low_32 * cosine - high_32 * sine
        rotated_high = high_32 * cosine + low_32 * sine
        if part == GROUP:
            tl.store(key_cache + slot * part_size + tile, rotated_low)
            tl.store(key_cache + slot * part_size + HALF + tile, rotated_high)
        else:
            target = query + (token * GROUP + part) * part_size
            tl.store(target + tile, rotated_low)
            tl.store(target + HALF + tile, rotated_high)


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """Apply rotary position embedding, write keys and values to the cache and return the queries.

    Args:
        qkv: (T, (H + 2G) * D).
        positions: (T,), int64.
        slots: (T,), int64; where each token's key and value go.
        rotary: Cosines and sines, float32, (positions, D / 2) each.
        key_cache: Written to.
        value_cache: Written to.

    Returns:
        (T, H, D).
    """
    kv_head_count, head_size = key_cache.shape[2:]
    group = qkv.shape[1] // (kv_head_count * head_size) - 2
    query = qkv.new_empty(qkv.shape[0], group * kv_head_count, head_size)
    _rotate_and_store_kernel[(qkv.shape[0], group + 2)](
        qkv,
        positions,
        slots,
        *rotary,
        query,
        key_cache,
        value_cache,
        KV_HEADS=kv_head_count,
        GROUP=group,
        HALF=head_size // 2,
        num_warps=2,
    )
    return query


@triton.jit
def _decode_split_kernel(  # noqa: ANN202
    query,
    key_cache,
    value_cache,
    pages,
    contexts,
    partial,
    partial_log_sum,
    scale,
    split_size,
    page_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + sequence)
    start = split * split_size
    if start < context:
        end = tl.minimum(start + split_size, context)
        rows, columns = tl.arange(0, ROWS), tl.arange(0, HEAD)
        head = kv_head * GROUP + rows
        tile = (sequence * KV_HEADS * GROUP + head)[:, None] * HEAD + columns[None, :]
        q = tl.load(query + tile, mask=(rows < GROUP)[:, None], other=0.0)
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, HEAD), tl.float32)
        for position in range(start, end, BLOCK):
            offsets = position + tl.arange(0, BLOCK)
            valid = offsets < end
            page = tl.load(pages + sequence * page_stride + offsets // PAGE, mask=valid, other=0).to(tl.int64)
            token = (page * PAGE + offsets % PAGE) * KV_HEADS + kv_head
            k = tl.load(key_cache + token[:, None] * HEAD + columns[None, :], mask=valid[:, None], other=0.0)
            v = tl.load(
                value_cache + token[:, None] * HEAD + columns[None, :], mask=valid[:, None], other=0.0
            )
            scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(valid[None, :], scores, float("-inf"))
            peak = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp(scores - peak[:, None])
            fade = tl.exp(highest - peak)
            total = total * fade + tl.sum(weights, 1)
            mixed = mixed * fade[:, None] + tl.dot(weights.to(v.dtype), v)
            highest = peak
        place = (split * tl.num_programs(0) + sequence) * KV_HEADS * GROUP + head
        tl.store(
            partial + place[:, None] * HEAD + columns[None, :],
            mixed / total[:, None],
            mask=(rows < GROUP)[:, None],
        )
        tl.store(partial_log_sum + place, highest + tl.log(total), mask=rows < GROUP)


@triton.jit
def _decode_combine_kernel(  # noqa: ANN202
    partial, partial_log_sum, contexts, out, split_size, HEAD: tl.constexpr, TILE: tl.constexpr
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    columns, splits = tl.arange(0, HEAD), tl.arange(0, TILE)
    row = sequence * tl.num_programs(1) + head
    row_count = tl.num_programs(0) * tl.num_programs(1)
    split_count = tl.cdiv(tl.load(contexts + sequence), split_size)
    highest = float("-inf")
    total = 0.0
    mixed = tl.zeros((HEAD,), tl.float32)
    for first in range(0, split_count, TILE):
        valid = first + splits < split_count
        place = (first + splits) * row_count + row
        log_sums = tl.load(partial_log_sum + place, mask=valid, other=float("-inf"))
        parts = tl.load(partial + place[:, None] * HEAD + columns[None, :], mask=valid[:, None], other=0.0)
        peak = tl.maximum(highest, tl.max(log_sums, 0))
        fade = tl.exp(highest - peak)
        weights = tl.exp(log_sums - peak)
        total = total * fade + tl.sum(weights, 0)
        mixed = mixed * fade + tl.sum(weights[:, None] * parts, 0)
        highest = peak
    tl.store(out + row * HEAD + columns, mixed / total)


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """Compile-time choices of decode attention: tokens per block, warps per program, pipeline stages."""

    block_tokens: int = 64
    warp_count: int = 4
    stage_count: int = 3


DECODE_TUNINGS = tuple(
    DecodeTuning(block, warps, stages)
    for block, warps, stages in (
        (32, 2, 3),
        (32, 4, 4),
        (64, 2, 3),
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 4),
        (128, 4, 2),
        (128, 4, 3),
        (128, 8, 3),
    )
)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Where the decodes' contexts lie, and how they are split.

    Attributes:
        pages: (n, most pages of one), int32: each sequence's pages in order.
        contexts: (n,), int32: tokens attended to, the new one included.
        split_size: Tokens of one program.
        split_count: Programs for the longest context.
    """

    pages: torch.Tensor
    contexts: torch.Tensor
    split_size: int
    split_count: int


def plan_decodes(pages: torch.Tensor, contexts: list[int], kv_head_count: int) -> DecodePlan:
    """Choose the largest split that still fills the GPU: flash decoding's second dimension of parallelism."""
    split_size = _SPLIT_SIZES[-1]
    for candidate in _SPLIT_SIZES:
        if kv_head_count * sum(-(-context // candidate) for context in contexts) >= _WANTED_PROGRAM_COUNT:
            split_size = candidate
            break
    return DecodePlan(
        pages,
        torch.tensor(contexts, dtype=torch.int32, device=pages.device),
        split_size,
        -(-max(contexts) // split_size),
    )


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DecodePlan,
    tuning: DecodeTuning,
    out: torch.Tensor,
) -> None:
    """Attend from one new token per sequence to its paged context; `query` and `out` are (n, H, D)."""
    sequence_count, head_count, head_size = query.shape
    page_size, kv_head_count = key_cache.shape[1:3]
    group = head_count // kv_head_count
    is_split = plan.split_count > 1
    # A single part of a context is the result itself.
    partial = out
    if is_split:
        partial = query.new_empty(plan.split_count, *query.shape, dtype=torch.float32)
    log_sum = query.new_empty(plan.split_count, sequence_count, head_count, dtype=torch.float32)
    _decode_split_kernel[(sequence_count, kv_head_count, plan.split_count)](
        query,
        key_cache,
        value_cache,
        plan.pages,
        plan.contexts,
        partial,
        log_sum,
        head_size**-0.5,
        plan.split_size,
        plan.pages.stride(0),
        KV_HEADS=kv_head_count,
        GROUP=group,
        HEAD=head_size,
        PAGE=page_size,
        ROWS=max(_LEAST_DOT_ROWS, triton.next_power_of_2(group)),
        BLOCK=tuning.block_tokens,
        num_warps=tuning.warp_count,
        num_stages=tuning.stage_count,
    )
    if is_split:
        _decode_combine_kernel[(sequence_count, head_count)](
            partial,
            log_sum,
            plan.contexts,
            out,
            plan.split_size,
            HEAD=head_size,
            TILE=min(16, triton.next_power_of_2(plan.split_count)),
            num_warps=2,
        )


@triton.jit
def _merge_kernel(first, first_log_sum, second, second_log_sum, out, HEADS: tl.constexpr, HEAD: tl.constexpr):  # noqa: ANN202
    sequence, token, token_count = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    heads = tl.arange(0, HEADS)
    # Outputs are (sequences, tokens, heads, size), the sums (sequences, heads, tokens).
    sums = (sequence * HEADS + heads) * token_count + token
    one, two = tl.load(first_log_sum + sums), tl.load(second_log_sum + sums)
    share = 1.0 / (1.0 + tl.exp(two - one))
    tile = (sequence * token_count + token).to(tl.int64) * HEADS * HEAD
    tile += heads[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    a, b = tl.load(first + tile).to(tl.float32), tl.load(second + tile).to(tl.float32)
    tl.store(out + tile, b + share[:, None] * (a - b))


def merge(
    first: torch.Tensor,
    first_log_sum: torch.Tensor,
    second: torch.Tensor,
    second_log_sum: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Combine attention over two disjoint parts of a context by their log-sum-exponentials.

    Outputs are (sequences, tokens, H, D), contiguous; the sums (sequences, H, tokens), float32.
    """
    sequence_count, token_count, head_count, head_size = first.shape
    _merge_kernel[(token_count, sequence_count)](
        first, first_log_sum, second, second_log_sum, out, HEADS=head_count, HEAD=head_size
    )
