"""Checks that the GPU benchmark's kernels and decoder compute what they should, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch  # type: ignore[import-not-found]

from bench.gpu_decoder import CHUNK_ATTENTIONS, Batch, Chunk, ChunkAttention, Decoder, DecoderShape, Placement
from bench.gpu_kernels import DECODE_TUNINGS, DecodeTuning

# Of bfloat16 operands with float32 sums; a wrong mask or page is off by far more.
_TOLERANCE = 0.02
_STEP_TOLERANCE = 0.05
_SMALL_SHAPE = DecoderShape(
    layer_count=2, hidden_size=512, head_count=8, kv_head_count=2, mlp_size=1024, vocabulary_size=512
)
_CACHE_TOKENS = 4096
_BF16 = torch.bfloat16


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return |result - reference| / |reference|; not a number if either holds one."""
    difference = torch.linalg.vector_norm(result.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))


def reference_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal chunk attention in float32, written out: what the fused kernels are held against."""
    group = query.shape[2] // key.shape[2]
    key, value = (part.float().repeat_interleave(group, dim=2) for part in (key, value))
    scores = torch.einsum("sqhd,skhd->shqk", query.float(), key) * query.shape[3] ** -0.5
    start = key.shape[1] - query.shape[1]
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).triu(start + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out.copy_(torch.einsum("shqk,skhd->sqhd", weights, value))


def check_kernels(device: str = "cuda", dtype: torch.dtype = _BF16) -> dict[str, float]:
    """Check decode attention in all its tunings.

    Returns:
        The largest relative errors.

    Raises:
        AssertionError: It is too large.
    """
    decoder = Decoder(_SMALL_SHAPE, _CACHE_TOKENS, device=device, dtype=dtype)
    # The short ones are one part each, the long ones many.
    return {
        f"decode attention to {max(contexts)} tokens": _check_decodes(decoder, contexts)
        for contexts in ((1, 16, 17, 100), (1, 16, 17, 300, 2300))
    }


def _check_decodes(decoder: Decoder, contexts: tuple[int, ...]) -> float:
    placement = decoder.place(Batch(decode_contexts=contexts))
    page_table = _page_table(placement)
    layer = decoder.layers[0]
    shape = (len(contexts), decoder.shape.head_count, decoder.shape.head_size)
    query = torch.randn(shape, dtype=layer.keys.dtype, device=layer.keys.device)
    expected = torch.empty_like(query)
    for row, context in enumerate(contexts):
        pages = page_table[row].long()
        keys, values = (cache[pages].flatten(0, 1)[None, :context] for cache in (layer.keys, layer.values))
        reference_attention(query[row][None, None], keys, values, expected[row][None, None])
    worst = 0.0
    for tuning in DECODE_TUNINGS:
        decoder.decode_tuning = tuning
        out = torch.full_like(query, float("nan"))
        decoder.attend_decodes(placement, 0, query, out)
        worst = max(worst, _checked(f"decode attention, {tuning}", relative_error(out, expected)))
    return worst


def usable_chunk_attentions(candidates: Mapping[str, ChunkAttention], device: str = "cuda") -> list[str]:
    """Return the names of those that run here; one that runs and is wrong is an error.

    Raises:
        AssertionError: One computes something else.
        RuntimeError: None runs.
    """
    usable = []
    for name, attend in candidates.items():
        try:
            for count, start, length in ((1, 0, 192), (1, 320, 128), (1, 333, 77), (3, 0, 64)):
                query = torch.randn(count, length, 32, 128, dtype=_BF16, device=device)
                keys, values = torch.randn(2, count, start + length, 8, 128, dtype=_BF16, device=device)
                out = torch.full_like(query, float("nan"))
                expected = torch.empty_like(query)
                attend(query, keys, values, out)
                reference_attention(query, keys, values, expected)
                _checked(f"{name}, {length} at {start}", relative_error(out, expected))
        except RuntimeError as error:
            print(f"{name} attention does not run here: {error}")
        else:
            usable.append(name)
    if not usable:
        raise RuntimeError("no attention kernel of PyTorch runs here")
    return usable


def check_decoder(names: Iterable[str], device: str = "cuda", dtype: torch.dtype = _BF16) -> dict[str, float]:
    """Check that a prompt in one chunk ends in the same logits as the same prompt in chunks and a decode.

    Returns:
        The relative error of each chunk attention.

    Raises:
        AssertionError: One is too large.
    """
    errors = {}
    for name in names:
        decoder = Decoder(
            _SMALL_SHAPE,
            _CACHE_TOKENS,
            device=device,
            dtype=dtype,
            attend_chunks=CHUNK_ATTENTIONS[name],
            decode_tuning=DecodeTuning(),
        )
        length = 150
        whole = decoder.place(Batch(chunks=(Chunk(0, length),)))
        expected = decoder.run(whole)
        for layer in decoder.layers:
            layer.keys.zero_()
            layer.values.zero_()
        for start, end in ((0, 64), (64, length - 1)):
            part = decoder.place(Batch(chunks=(Chunk(start, end - start),)))
            part.token_ids.copy_(whole.token_ids[start:end])
            decoder.run(part)
        last = decoder.place(Batch(decode_contexts=(length,)))
        # The chunks lie on the first pages; the decode reads what they wrote.
        page_table = _page_table(last)
        page_table.copy_(torch.arange(page_table.shape[1])[None])
        last.slots.fill_(length - 1)
        last.token_ids.copy_(whole.token_ids[-1:])
        error = relative_error(decoder.run(last), expected)
        errors[name] = _checked(f"steps with {name}", error, _STEP_TOLERANCE)
    return errors


def _page_table(placement: Placement) -> torch.Tensor:
    if placement.decodes is None:
        raise ValueError("a batch without decodes has no page table")
    return placement.decodes.pages


def _checked(what: str, error: float, tolerance: float = _TOLERANCE) -> float:
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative error {error}, more than {tolerance}")
    return error
