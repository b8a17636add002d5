"""A decoder shaped like Llama 3 8B that runs one iteration of an engine: decodes and prefill chunks together.

Weights are random, arithmetic is bfloat16. Linear layers and the embedding are
plain PyTorch; what an engine has fused is in `bench.gpu_kernels`. Prefill
chunks attend through a fused kernel of PyTorch's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch  # type: ignore[import-not-found]

from bench.gpu_kernels import (
    DecodePlan,
    DecodeTuning,
    add_and_normalise,
    decode_attention,
    merge,
    plan_decodes,
    rotate_and_store,
    silu_and_multiply,
)

_PAGE_TOKENS = 16
_LONGEST_SEQUENCE = 40_960
_ROTARY_BASE = 500_000.0
_WEIGHT_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a decoder; the defaults are Llama 3 8B's."""

    layer_count: int = 32
    hidden_size: int = 4096
    head_count: int = 32
    kv_head_count: int = 8
    head_size: int = 128
    mlp_size: int = 14_336
    vocabulary_size: int = 128_256

    @property
    def key_value_bytes(self) -> int:
        """Bytes of cache per token of context, over all layers."""
        return 2 * 2 * self.layer_count * self.kv_head_count * self.head_size


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` prompt tokens, the first of which is the sequence's token number `start`."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one iteration runs: decodes, by the tokens each attends to, and prefill chunks."""

    decode_contexts: tuple[int, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @property
    def token_count(self) -> int:
        """Scheduled tokens."""
        return len(self.decode_contexts) + sum(chunk.length for chunk in self.chunks)

    @property
    def decode_context_tokens(self) -> int:
        """Sum of the decodes' contexts."""
        return sum(self.decode_contexts)

    @property
    def token_pairs(self) -> float:
        """Sum of c * (p + c/2) over the chunks."""
        return sum(chunk.length * (chunk.start + chunk.length / 2) for chunk in self.chunks)

    @property
    def cache_tokens(self) -> int:
        """Tokens of cache that it takes, whole pages."""
        contexts = itertools.chain(self.decode_contexts, (c.start + c.length for c in self.chunks))
        return sum(-(-context // _PAGE_TOKENS) * _PAGE_TOKENS for context in contexts)


class ChunkAttention(Protocol):
    """Causal attention of chunks at the end of their sequences."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write to `out`; it and `query` are (S, c, H, D), `key` and `value` (S, p + c, G, D)."""


def flash_chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> None:
    """FlashAttention-2 as PyTorch ships it, whose causal mask is aligned to the bottom right."""
    result = torch.ops.aten._scaled_dot_product_flash_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
    )[0]
    out.copy_(result.transpose(1, 2))


def cudnn_chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> None:
    """cuDNN's attention, made for Hopper: once over the past, once within the chunk, then merged.

    Two calls, because the causal mask that PyTorch gives it is aligned to the top left.
    """
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    start = key.shape[1] - query.shape[1]
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    own, own_sum = attend(q, k[:, :, start:], v[:, :, start:], None, True, 0.0, True)[:2]
    own = own.transpose(1, 2)
    if start == 0:
        out.copy_(own)
        return
    past, past_sum = attend(q, k[:, :, :start], v[:, :, :start], None, True, 0.0, False)[:2]
    past = past.transpose(1, 2)
    merge(past.contiguous(), past_sum.contiguous(), own.contiguous(), own_sum.contiguous(), out)


CHUNK_ATTENTIONS: dict[str, ChunkAttention] = {
    "flash": flash_chunk_attention,
    "cudnn": cudnn_chunk_attention,
}


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class _ChunkGroup:
    """Equal chunks side by side, which one call attends."""

    first_row: int
    first_slot: int
    count: int
    chunk: Chunk

    @property
    def row_count(self) -> int:
        return self.count * self.chunk.length


@dataclass(frozen=True, slots=True)
class Placement:
    """A batch laid out in the cache, with its inputs; what it computes can be repeated."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    last_rows: torch.Tensor
    decodes: DecodePlan | None
    groups: tuple[_ChunkGroup, ...]


class Decoder:
    """The model with its cache, on one device.

    Args:
        shape: Sizes.
        cache_tokens: Tokens of context that the cache holds.
        device: Where it lives.
        dtype: bfloat16, but for a check on a machine without it.
        attend_chunks: Attention of prefill chunks.
        decode_tuning: Of decode attention.
        seed: Of the weights, the cache's first content and the pages' order.
    """

    def __init__(
        self,
        shape: DecoderShape,
        cache_tokens: int,
        *,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        attend_chunks: ChunkAttention = flash_chunk_attention,
        decode_tuning: DecodeTuning | None = None,
        seed: int = 0,
    ) -> None:
        self.shape = shape
        self.attend_chunks = attend_chunks
        self.decode_tuning = decode_tuning or DecodeTuning()
        self.page_count = cache_tokens // _PAGE_TOKENS
        self._device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*size: int, deviation: float = _WEIGHT_DEVIATION) -> torch.Tensor:
            tensor = torch.empty(size, dtype=dtype, device=device)
            return tensor.normal_(0.0, deviation, generator=self._generator)

        self._embedding = normal(shape.vocabulary_size, shape.hidden_size, deviation=1.0)
        self._head = normal(shape.vocabulary_size, shape.hidden_size)
        self._last_norm = torch.ones(shape.hidden_size, dtype=dtype, device=device)
        self.layers = [self._make_layer(normal) for _ in range(shape.layer_count)]
        self._rotary = _rotary_tables(shape.head_size, device)

    def _make_layer(self, normal: Callable[..., torch.Tensor]) -> _Layer:
        shape = self.shape
        query_size = shape.head_count * shape.head_size
        cache = (self.page_count, _PAGE_TOKENS, shape.kv_head_count, shape.head_size)
        return _Layer(
            input_norm=torch.ones_like(self._last_norm),
            qkv=normal(query_size + 2 * shape.kv_head_count * shape.head_size, shape.hidden_size),
            output=normal(shape.hidden_size, query_size),
            mlp_norm=torch.ones_like(self._last_norm),
            gate_up=normal(2 * shape.mlp_size, shape.hidden_size),
            down=normal(shape.hidden_size, shape.mlp_size),
            keys=normal(*cache, deviation=1.0),
            values=normal(*cache, deviation=1.0),
        )

    def place(self, batch: Batch) -> Placement:
        """Give every sequence of the batch pages and every token an id.

        Chunks take consecutive pages, because PyTorch's kernels read no page
        table; the decodes take the others in random order.

        Raises:
            ValueError: The cache is too small, or a sequence too long.
        """
        if batch.cache_tokens > self.page_count * _PAGE_TOKENS:
            raise ValueError(f"{batch.cache_tokens} tokens of cache do not fit in {self.page_count} pages")
        groups: list[_ChunkGroup] = []
        positions: list[int] = [context - 1 for context in batch.decode_contexts]
        chunk_slots: list[int] = []
        last_rows = list(range(len(positions)))
        page = 0
        for chunk, equal in itertools.groupby(batch.chunks):
            count = len(list(equal))
            groups.append(_ChunkGroup(len(positions), page * _PAGE_TOKENS, count, chunk))
            for _ in range(count):
                first = page * _PAGE_TOKENS + chunk.start
                positions.extend(range(chunk.start, chunk.start + chunk.length))
                chunk_slots.extend(range(first, first + chunk.length))
                last_rows.append(len(positions) - 1)
                page += _page_count(chunk.start + chunk.length)
        if max(positions) >= _LONGEST_SEQUENCE:
            raise ValueError(f"a sequence is longer than {_LONGEST_SEQUENCE} tokens")
        pages, decode_slots = self._place_decodes(batch.decode_contexts, page)
        decodes = None
        if pages:
            page_table = self._integers(pages, torch.int32)
            decodes = plan_decodes(page_table, list(batch.decode_contexts), self.shape.kv_head_count)
        token_ids = torch.randint(
            self.shape.vocabulary_size, (len(positions),), device=self._device, generator=self._generator
        )
        return Placement(
            token_ids,
            self._integers(positions),
            self._integers(decode_slots + chunk_slots),
            self._integers(last_rows),
            decodes,
            tuple(groups),
        )

    def run(self, placement: Placement) -> torch.Tensor:
        """Run one iteration; return the logits of each sequence's last token, (sequences, vocabulary)."""
        hidden = self._embedding[placement.token_ids]
        residual = torch.zeros_like(hidden)
        for index, layer in enumerate(self.layers):
            normal = add_and_normalise(hidden, residual, layer.input_norm)
            query = rotate_and_store(
                normal @ layer.qkv.T,
                placement.positions,
                placement.slots,
                self._rotary,
                layer.keys,
                layer.values,
            )
            hidden = self._attend(placement, index, query) @ layer.output.T
            normal = add_and_normalise(hidden, residual, layer.mlp_norm)
            hidden = silu_and_multiply(normal @ layer.gate_up.T) @ layer.down.T
        normal = add_and_normalise(hidden, residual, self._last_norm)
        return normal[placement.last_rows] @ self._head.T

    def run_and_pick(self, placement: Placement) -> torch.Tensor:
        """Run one iteration and return each sequence's likeliest token, as an engine does greedily."""
        return self.run(placement).float().argmax(-1)

    def attend_decodes(
        self, placement: Placement, layer_index: int, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attend the decodes in one layer alone; `query` and `out` are (T, H, D), decodes first."""
        if placement.decodes is None:
            return
        layer = self.layers[layer_index]
        count = placement.decodes.contexts.shape[0]
        decode_attention(
            query[:count], layer.keys, layer.values, placement.decodes, self.decode_tuning, out[:count]
        )

    def context_of_group(self, group: _ChunkGroup, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a group's chunks attend to, (S, p + c, G, D) each."""
        layer = self.layers[layer_index]
        return _context_of(layer.keys, group), _context_of(layer.values, group)

    def _attend(self, placement: Placement, layer_index: int, query: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        self.attend_decodes(placement, layer_index, query, out)
        for group in placement.groups:
            rows = slice(group.first_row, group.first_row + group.row_count)
            split = (group.count, group.chunk.length, *query.shape[1:])
            keys, values = self.context_of_group(group, layer_index)
            self.attend_chunks(query[rows].view(split), keys, values, out[rows].view(split))
        return out.view(query.shape[0], -1)

    def _place_decodes(self, contexts: tuple[int, ...], first_page: int) -> tuple[list[list[int]], list[int]]:
        free = torch.randperm(self.page_count - first_page, device=self._device, generator=self._generator)
        shuffled = iter((free + first_page).tolist())
        widest = max(map(_page_count, contexts), default=0)
        pages: list[list[int]] = []
        slots: list[int] = []
        for context in contexts:
            own = list(itertools.islice(shuffled, _page_count(context)))
            slots.append(own[-1] * _PAGE_TOKENS + (context - 1) % _PAGE_TOKENS)
            pages.append(own + [0] * (widest - len(own)))
        return pages, slots

    def _integers(
        self, values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _context_of(cache: torch.Tensor, group: _ChunkGroup) -> torch.Tensor:
    end = group.chunk.start + group.chunk.length
    padded = _page_count(end) * _PAGE_TOKENS
    tokens = cache.view(-1, *cache.shape[2:])[group.first_slot : group.first_slot + group.count * padded]
    return tokens.view(group.count, padded, *cache.shape[2:])[:, :end]


def _page_count(token_count: int) -> int:
    return -(-token_count // _PAGE_TOKENS)


def _rotary_tables(head_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    frequencies = 1.0 / _ROTARY_BASE**half
    angles = torch.arange(_LONGEST_SEQUENCE, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos().contiguous(), angles.sin().contiguous()
