"""Baselines that predict latency from the state of each instance and the formula of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.sim.fleet.baselines.base import Arrival, Baseline, BaselineParameters
from sagecp.sim.fleet.baselines.ledger import token_pairs
from sagecp.sim.fleet.baselines.views import InstanceState
from sagecp.sim.fleet.scheduler_controller import step_time_prior

HEADROOM_STRATEGIES = ("most", "least")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a request would see on an instance, in seconds.

    Attributes:
        ttft_s: From now to the first token.
        tpot_s: Between the tokens after it.
        cached_token_count: Prompt tokens that the instance has cached.
    """

    ttft_s: float
    tpot_s: float
    cached_token_count: int


def predict_ttft_s(
    step_time: StepTimeParameters,
    state: InstanceState,
    uncached_token_count: int,
    prompt_token_count: int,
    batch_tokens: int,
) -> float:
    """Return the time until a prompt would be prefilled behind the backlog, in seconds.

    ``ceil((q + u)/(B - n))`` steps that carry the backlog of ``q`` tokens, the ``u``
    uncached tokens and the ``n`` decodes, by the formula of a step. Of the step in
    progress half is taken to be over: of the first of those steps if it prefills, and
    else of one of decodes before them. Decodes are taken to go on all the while.
    """
    decode_count, context = state.decode_count, state.decode_context_token_count
    room = max(1, batch_tokens - decode_count)
    total = state.backlog.token_count + max(1, uncached_token_count)
    full_step_count = math.ceil(total / room) - 1
    full_step_s = step_time.step_s(decode_count + room, context)
    duration_s = full_step_count * full_step_s
    duration_s += step_time.step_s(decode_count + total - full_step_count * room, context)
    pairs = state.backlog.token_pairs + token_pairs(uncached_token_count, prompt_token_count)
    duration_s += step_time.attention_per_token_pair_s * pairs
    if state.is_prefilling:
        duration_s -= 0.5 * min(duration_s, full_step_s)
    elif decode_count:
        duration_s += 0.5 * step_time.decode_step_s(decode_count, context)
    return state.slowness * duration_s


def predict_tpot_s(
    step_time: StepTimeParameters,
    state: InstanceState,
    prompt_token_count: int,
    batch_tokens: int,
    prefill_duty: float,
) -> float:
    """Return the time between two tokens of a request that joins the decodes, in seconds.

    ``1/(phi/t_p + (1 - phi)/t_d)``: for a share ``phi`` of the time steps are as long as
    one full of prefill, and else as one of decodes alone.
    """
    decode_count = state.decode_count + 1
    context = state.decode_context_token_count + prompt_token_count
    prefill_step_s = step_time.step_s(max(batch_tokens, decode_count), context)
    decode_step_s = step_time.decode_step_s(decode_count, context)
    if not decode_step_s:
        return 0.0
    return state.slowness / (prefill_duty / prefill_step_s + (1.0 - prefill_duty) / decode_step_s)


class PredictingBaseline(Baseline):
    """A baseline that knows the constants of every instance exactly."""

    def __init__(self, parameters: BaselineParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self.step_times: list[StepTimeParameters] = []

    def prepare(self) -> None:
        """Take the constants of the instances."""
        self.step_times = [step_time_prior(each.profile, 0.0, 0) for each in self.world.instances]

    def predict(self, arrival: Arrival, index: int) -> Prediction:
        """Return what the request would see on an instance."""
        prompt = arrival.request.prompt_token_count
        step_time, batch_tokens = self.step_times[index], self.world.instances[index].max_batch_tokens
        state = self.view.state(index, arrival.now)
        cached = self.prefixes.cached_token_count(index, arrival.request)
        duty = self.ledgers[index].prefill_duty(arrival.now)
        return Prediction(
            predict_ttft_s(step_time, state, prompt - cached, prompt, batch_tokens),
            predict_tpot_s(step_time, state, prompt, batch_tokens, duty),
            cached,
        )


class MinTtft(PredictingBaseline):
    """The least predicted time to first token, as Mooncake's Conductor places prefills (FAST'25)."""

    registry_name = "min_ttft"

    def choose(self, arrival: Arrival) -> int:
        """Return the fastest candidate."""
        return self.least(arrival.candidates, lambda index: self.predict(arrival, index).ttft_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinTtftRejectParameters(BaselineParameters):
    """Parameters of :class:`MinTtftReject`.

    Attributes:
        ttft_margin: Reject when the prediction exceeds the objective times this.
        tpot_margin: The same for the time per token, before choosing; 0: not looked at.
    """

    ttft_margin: float = 1.0
    tpot_margin: float = 0.0


class MinTtftReject(PredictingBaseline):
    """Like :class:`MinTtft`, and rejects at once what is predicted to miss, as Mooncake does in overload."""

    registry_name = "min_ttft_reject"

    def __init__(self, parameters: MinTtftRejectParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._ttft_margin = parameters.ttft_margin
        self._tpot_margin = parameters.tpot_margin

    def choose(self, arrival: Arrival) -> int | None:
        """Return the fastest candidate that is fast enough."""
        objectives = arrival.objectives
        predictions = {index: self.predict(arrival, index) for index in arrival.candidates}
        fitting = [
            index
            for index, prediction in predictions.items()
            if prediction.ttft_s <= self._ttft_margin * objectives.ttft_s
            and (not self._tpot_margin or prediction.tpot_s <= self._tpot_margin * objectives.tpot_s)
        ]
        return self.least(fitting, lambda index: predictions[index].ttft_s) if fitting else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmdPredictedLatencyParameters(BaselineParameters):
    """Parameters of :class:`LlmdPredictedLatency`.

    Attributes:
        headroom: Whether to take the instance with the ``most`` or the ``least`` headroom.
        affinity_gates: Shares of the prompt cached from which on only such instances are
            considered, the strictest first; empty: all are.
        affinity_penalty_s: They are not if their best TTFT is so much later than the best of all.
        ttft_weight: Of the headroom in TTFT; that in TPOT has the rest to 1.
    """

    headroom: str = "most"
    affinity_gates: tuple[float, ...] = (0.99, 0.80)
    affinity_penalty_s: float = 5.0
    ttft_weight: float = 0.8

    def __post_init__(self) -> None:
        # Named, because a dataclass with slots is another class than the one that this was written in.
        BaselineParameters.__post_init__(self)
        if self.headroom not in HEADROOM_STRATEGIES:
            raise ValueError(
                f"headroom must be one of {', '.join(HEADROOM_STRATEGIES)}, not {self.headroom!r}"
            )
        if not 0.0 <= self.ttft_weight <= 1.0:
            raise ValueError(f"ttft_weight must be from 0 to 1, not {self.ttft_weight}")


class LlmdPredictedLatency(PredictingBaseline):
    """Headroom to the objectives, after a gate for cached prefixes, as in llm-d's latency scheduling.

    Where any instance meets both objectives, only such are considered. Headrooms, the
    objective minus the prediction, are scaled to 0 to 1 over those considered, and blended.
    Where none meets them, the one that misses by least. What differs from the product: an
    exact model instead of a learned one, its mean instead of its 90th percentile, and no chance.
    """

    registry_name = "llmd_predicted_latency"

    def __init__(self, parameters: LlmdPredictedLatencyParameters, seed: int = 0) -> None:
        super().__init__(parameters, seed)
        self._settings = parameters

    def choose(self, arrival: Arrival) -> int:
        """Return a candidate by gate, tier and headroom."""
        predictions = {index: self.predict(arrival, index) for index in arrival.candidates}
        considered = self._gated(arrival, predictions)
        objectives = arrival.objectives
        headrooms = {
            index: (
                objectives.ttft_s - predictions[index].ttft_s,
                objectives.tpot_s - predictions[index].tpot_s,
            )
            for index in considered
        }
        meeting = [index for index, headroom in headrooms.items() if min(headroom) >= 0.0]
        blend = self._blend({index: headrooms[index] for index in meeting} if meeting else headrooms)
        sign = 1.0 if meeting and self._settings.headroom == "least" else -1.0
        return self.least(blend, lambda index: sign * blend[index])

    def _gated(self, arrival: Arrival, predictions: dict[int, Prediction]) -> list[int]:
        """Return the candidates that have most of the prompt, unless that costs too much time."""
        prompt = arrival.request.prompt_token_count
        best_s = min(prediction.ttft_s for prediction in predictions.values())
        for share in self._settings.affinity_gates:
            holders = [
                index
                for index, prediction in predictions.items()
                if prediction.cached_token_count >= share * prompt
            ]
            if holders:
                holders_best_s = min(predictions[index].ttft_s for index in holders)
                if holders_best_s - best_s <= self._settings.affinity_penalty_s:
                    return holders
        return list(predictions)

    def _blend(self, headrooms: dict[int, tuple[float, float]]) -> dict[int, float]:
        weights = (self._settings.ttft_weight, 1.0 - self._settings.ttft_weight)
        blend = dict.fromkeys(headrooms, 0.0)
        for part, weight in enumerate(weights):
            least = min(headroom[part] for headroom in headrooms.values())
            span = max(headroom[part] for headroom in headrooms.values()) - least
            for index, headroom in headrooms.items():
                blend[index] += weight * ((headroom[part] - least) / span if span > 0.0 else 0.0)
        return blend
