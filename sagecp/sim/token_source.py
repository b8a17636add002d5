"""Which token comes next: deterministic, cheap, and dependent on every token before it.

The whole context is folded into one 64-bit number, so that a continuation from
prompt plus emitted tokens goes on exactly where the first request left off, on
any engine with the same seed. Greedy answers never end by themselves; sampled
ones end after about :data:`MEAN_SAMPLED_TOKENS` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sagecp.sim.tokenizer import EOS_ID, GENERATED_IDS

MEAN_SAMPLED_TOKENS = 128

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_BASE = 0x9E37_79B9_7F4A_7C15
_MIX = 0xD6E8_FEB8_6659_FD93
_SHORT = 128
_END_THRESHOLD = (1 << 32) // MEAN_SAMPLED_TOKENS
_GENERATED_COUNT = len(GENERATED_IDS)


def fold_context(seed: int, token_ids: Sequence[int]) -> int:
    """Fold tokens into a number: a polynomial in a fixed base, modulo 2**64."""
    state = (seed * _MIX + _BASE) & _MASK
    if len(token_ids) <= _SHORT:
        for token_id in token_ids:
            state = (state * _BASE + token_id + 1) & _MASK
        return state
    count = len(token_ids)
    powers = _powers(count + 1)
    terms = (np.asarray(token_ids, dtype=np.uint64) + np.uint64(1)) * powers[count - 1 :: -1]
    return (state * int(powers[count]) + int(terms.sum(dtype=np.uint64))) & _MASK


_cached_powers = np.ones(1, dtype=np.uint64)


def _powers(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return at least so many powers of the base, computed once for the longest context seen."""
    global _cached_powers  # noqa: PLW0603 - a cache of constants
    if len(_cached_powers) < count:
        factors = np.full(max(count, 2 * len(_cached_powers)), _BASE, dtype=np.uint64)
        factors[0] = 1
        _cached_powers = np.multiply.accumulate(factors)
    return _cached_powers


class TokenSource:
    """The next tokens of one answer.

    Args:
        seed: The model's seed: another one is another model.
        prompt_token_ids: The context so far.
        sampling_seed: ``None`` for greedy decoding; else the answer also
            depends on this number, and ends by itself.
        endless: Never choose the end token.
    """

    __slots__ = ("_can_end", "_salt", "_state")

    def __init__(
        self,
        seed: int,
        prompt_token_ids: Sequence[int],
        sampling_seed: int | None = None,
        *,
        endless: bool = False,
    ) -> None:
        self._state = fold_context(seed, prompt_token_ids)
        self._can_end = sampling_seed is not None and not endless
        self._salt = 0 if sampling_seed is None else ((sampling_seed + 1) * _MIX) & _MASK

    def next_token(self, may_end: bool) -> int:
        """Choose the next token and make it part of the context.

        Args:
            may_end: Whether the end token may be chosen.
        """
        mixed = self._state ^ self._salt
        mixed = ((mixed ^ (mixed >> 31)) * _MIX) & _MASK
        mixed = ((mixed ^ (mixed >> 29)) * _BASE) & _MASK
        if self._can_end and may_end and (mixed & 0xFFFF_FFFF) < _END_THRESHOLD:
            token_id = EOS_ID
        else:
            token_id = GENERATED_IDS[(mixed >> 32) % _GENERATED_COUNT]
        self._state = (self._state * _BASE + token_id + 1) & _MASK
        return token_id
