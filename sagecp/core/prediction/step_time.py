"""How long an engine step takes: the formula, and a model that learns its constants.

One step runs the decodes of all running requests and a chunk of prefill. With
``T`` scheduled tokens, ``KV`` the sum of the decodes' contexts, and prefill
chunks of ``c`` tokens starting at position ``p``:

    step = o + max(a0 + a1*T, b0 + b1*T) + g*KV + d*sum(c*(p + c/2))

The first arm of the maximum is the time to read the weights, the second the
time to compute with them: a roofline (Williams, Waterman, Patterson, CACM
2009) with linear layers and attention apart, as Vidur (MLSys'24) profiles them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from sagecp.core.prediction.least_squares import RecursiveLeastSquares

DEFAULT_BATCH_TOKENS = 2048
"""Tokens that an engine schedules in one step at most, unless it says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeParameters:
    """The constants of one model on one kind of GPU, in seconds.

    Attributes:
        overhead_s: ``o``, per step: scheduling, sampling, launching.
        memory_base_s: ``a0``, reading the weights once.
        memory_per_token_s: ``a1``, per scheduled token while memory-bound.
        compute_base_s: ``b0``.
        compute_per_token_s: ``b1``, per scheduled token while compute-bound.
        context_per_token_s: ``g``, per token of decode context read.
        attention_per_token_pair_s: ``d``, per pair of prefill token and token before it.
    """

    overhead_s: float
    memory_base_s: float
    memory_per_token_s: float
    compute_base_s: float
    compute_per_token_s: float
    context_per_token_s: float
    attention_per_token_pair_s: float

    def __post_init__(self) -> None:
        for name in _FIELD_NAMES:
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be finite and at least 0")

    def step_s(
        self, token_count: float, decode_context_tokens: float = 0.0, token_pairs: float = 0.0
    ) -> float:
        """Return the duration of one step, in seconds.

        Args:
            token_count: Scheduled tokens, decodes and prefill chunks together.
            decode_context_tokens: Sum of the contexts of the decodes.
            token_pairs: ``sum(c * (p + c/2))`` over the prefill chunks.
        """
        return (
            self.overhead_s
            + self._linear_s(token_count)
            + self.context_per_token_s * decode_context_tokens
            + self.attention_per_token_pair_s * token_pairs
        )

    def decode_step_s(self, decode_count: float, context_tokens: float) -> float:
        """Return the duration of a step without prefill: the time between two tokens, in seconds."""
        return self.overhead_s + self._linear_s(decode_count) + self.context_per_token_s * context_tokens

    def prefill_s(
        self,
        uncached_token_count: float,
        prompt_token_count: float,
        decode_count: float = 0.0,
        context_tokens: float = 0.0,
        batch_tokens: float = DEFAULT_BATCH_TOKENS,
    ) -> float:
        """Return how long a prompt takes from its first chunk to its first token, in seconds.

        Of ``u`` uncached tokens each step takes what ``n`` decodes leave of the
        batch ``B``. While every step is compute-bound that is ``steps * (o + b0 +
        b1*n + g*KV) + b1*u + d*u*(L - u/2)`` with ``steps = ceil(u / (B - n))``;
        a short last chunk costs at least the reading of the weights.

        Args:
            uncached_token_count: Tokens to compute, ``u``.
            prompt_token_count: The whole prompt, ``L``.
            decode_count: Decodes that run beside it, ``n``.
            context_tokens: Sum of their contexts.
            batch_tokens: Tokens of one step at most, ``B``.
        """
        if uncached_token_count <= 0:
            return 0.0
        room = max(1.0, batch_tokens - decode_count)
        full_step_count = math.ceil(uncached_token_count / room) - 1
        last_token_count = decode_count + uncached_token_count - full_step_count * room
        linear_s = self._linear_s(last_token_count)
        if full_step_count:
            linear_s += full_step_count * self._linear_s(decode_count + room)
        per_step_s = self.overhead_s + self.context_per_token_s * context_tokens
        pairs = uncached_token_count * max(0.0, prompt_token_count - 0.5 * uncached_token_count)
        return (full_step_count + 1) * per_step_s + linear_s + self.attention_per_token_pair_s * pairs

    def work_s(
        self,
        uncached_token_count: float,
        prompt_token_count: float,
        batch_tokens: float = DEFAULT_BATCH_TOKENS,
    ) -> float:
        """Return the engine time that a prompt uses up: its share of full batches, in seconds.

        ``((o + b0)/B + b1)*u + d*u*(L - u/2)``: what it adds to the backlog of
        an engine, where ``prefill_s`` is what it waits for.
        """
        per_token_s = self.full_step_token_s(batch_tokens)
        pair_count = max(0.0, prompt_token_count - 0.5 * uncached_token_count)
        return uncached_token_count * (per_token_s + self.attention_per_token_pair_s * pair_count)

    def full_step_token_s(self, batch_tokens: float = DEFAULT_BATCH_TOKENS) -> float:
        """Return the share of one token in a full step, attention aside: ``(o + b0)/B + b1``, in seconds."""
        return (self.overhead_s + self.compute_base_s) / batch_tokens + self.compute_per_token_s

    def _linear_s(self, token_count: float) -> float:
        memory_s = self.memory_base_s + self.memory_per_token_s * token_count
        compute_s = self.compute_base_s + self.compute_per_token_s * token_count
        return max(compute_s, memory_s)


_FIELD_NAMES = tuple(field.name for field in fields(StepTimeParameters))

# Relative noise of one observation that the gain assumes. Only its ratio to the
# prior's spread counts.
_NOISE = 0.1
# An observation this many times off its prediction counts less, by the square.
_PLAUSIBLE_RATIO = 3.0
# Learned constants stay within these multiples of the prior.
_LEAST_COEFFICIENT, _LARGEST_COEFFICIENT = 0.01, 1000.0


class StepTimeModel:
    """Learns the constants of one type of instance: model, GPU and parallel sizes.

    All instances of the type share it; what sets one instance apart is in its
    ``Residual``. One recursive least squares estimates six coefficients,
    relative to the prior: ``o + a0``, ``a1``, ``o + b0``, ``b1``, ``g``, ``d``.
    An observation teaches the arm of the maximum that predicts it, as in
    max-affine fitting (Magnani and Boyd, "Convex piecewise-linear fitting",
    2009): a decode batch large enough to be compute-bound teaches ``b1``, and a
    short prefill ``a0``. ``g`` is one coefficient, shared by prefills and
    decodes. ``o`` is not identifiable beside ``a0`` and ``b0``: it stays at the
    prior unless their sum falls below it, and the bases absorb the rest.

    Errors count relative to the prediction, so that long prefills do not
    outweigh short steps. A constant whose prior is zero stays zero.

    Args:
        prior: Where the estimate starts.
        prior_spread: Relative standard deviation of each of its constants.
        forgetting: Weight left to old observations by each new one; 0.995 is a
            memory of about 200.
    """

    __slots__ = ("_estimator", "_overhead_s", "_parameters", "_prior", "_scales", "observation_count")

    def __init__(
        self, prior: StepTimeParameters, *, prior_spread: float = 0.3, forgetting: float = 0.995
    ) -> None:
        self._prior = prior
        self._parameters: StepTimeParameters | None = prior
        self._scales = (
            prior.overhead_s + prior.memory_base_s,
            prior.memory_per_token_s,
            prior.overhead_s + prior.compute_base_s,
            prior.compute_per_token_s,
            prior.context_per_token_s,
            prior.attention_per_token_pair_s,
        )
        self._estimator = RecursiveLeastSquares(
            [1.0] * len(self._scales),
            initial_variance=(prior_spread / _NOISE) ** 2,
            forgetting=forgetting,
            lower=_LEAST_COEFFICIENT,
            upper=_LARGEST_COEFFICIENT,
        )
        self.observation_count = 0
        """Observations taken in; those that made no sense are not counted."""

    @property
    def parameters(self) -> StepTimeParameters:
        """The current estimate; the same object until an observation changes it."""
        if self._parameters is None:
            self._parameters = self._rebuilt()
        return self._parameters

    def observe_prefill(
        self,
        duration_s: float,
        step_count: float,
        token_count: float,
        context_token_steps: float,
        token_pairs: float,
    ) -> None:
        """Learn from a prefill.

        Args:
            duration_s: From the start of its first step to the end of its last.
            step_count: Steps it took.
            token_count: Tokens of all those steps, the decodes beside it included: ``u + n*steps``.
            context_token_steps: Sum over the steps of the decodes' contexts: ``KV*steps``.
            token_pairs: ``u*(L - u/2)``.
        """
        self._observe(duration_s, step_count, token_count, context_token_steps, token_pairs)

    def observe_decode(self, step_s: float, decode_count: float, context_tokens: float) -> None:
        """Learn from a step without prefill, or from the mean of some alike."""
        self._observe(step_s, 1.0, decode_count, context_tokens, 0.0)

    def _observe(self, duration_s: float, steps: float, tokens: float, context: float, pairs: float) -> None:
        base_a, token_a, base_b, token_b, context_scale, pair_scale = self._scales
        c_base_a, c_token_a, c_base_b, c_token_b, c_context, c_pair = self._estimator.coefficients
        base_a, token_a = base_a * steps, token_a * tokens
        base_b, token_b = base_b * steps, token_b * tokens
        context, pairs = context * context_scale, pairs * pair_scale
        memory_s = c_base_a * base_a + c_token_a * token_a
        compute_s = c_base_b * base_b + c_token_b * token_b
        predicted_s = max(memory_s, compute_s) + c_context * context + c_pair * pairs
        # Written so that not-a-number fails, too.
        if not (0.0 < duration_s < math.inf and 0.0 < predicted_s < math.inf):
            return
        if not (steps > 0.0 and tokens >= 0.0 and context >= 0.0 and pairs >= 0.0):
            return
        ratio = duration_s / predicted_s
        weight = 1.0
        if not 1.0 / _PLAUSIBLE_RATIO <= ratio <= _PLAUSIBLE_RATIO:
            # A pause of the engine says nothing of its constants: one such
            # observation moves little, many in a row prevail.
            believed = _PLAUSIBLE_RATIO if ratio > 1.0 else 1.0 / _PLAUSIBLE_RATIO
            weight = (believed / ratio if ratio > 1.0 else ratio / believed) ** 2
            if weight == 0.0:
                return
            ratio = believed
        scale = 1.0 / predicted_s
        if memory_s > compute_s:
            features = (base_a * scale, token_a * scale, 0.0, 0.0, context * scale, pairs * scale)
        else:
            features = (0.0, 0.0, base_b * scale, token_b * scale, context * scale, pairs * scale)
        if not math.isfinite(sum(features)):
            return
        self._estimator.update(features, ratio - 1.0, weight)
        self.observation_count += 1
        self._parameters = None

    def _rebuilt(self) -> StepTimeParameters:
        base_a_s, token_a_s, base_b_s, token_b_s, context_s, pair_s = (
            coefficient * scale
            for coefficient, scale in zip(self._estimator.coefficients, self._scales, strict=True)
        )
        overhead_s = min(self._prior.overhead_s, base_a_s, base_b_s)
        return StepTimeParameters(
            overhead_s=overhead_s,
            memory_base_s=base_a_s - overhead_s,
            memory_per_token_s=token_a_s,
            compute_base_s=base_b_s - overhead_s,
            compute_per_token_s=token_b_s,
            context_per_token_s=context_s,
            attention_per_token_pair_s=pair_s,
        )
