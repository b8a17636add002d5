"""What requests cost: predicted when they are placed, charged when they leave an engine, told when asked."""

from __future__ import annotations

from typing import NamedTuple

from sagecp.core.fleet import Fleet
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.placement import CandidateRow
from sagecp.core.placement_rows import candidate_row, request_row
from sagecp.core.prediction.book import PredictionBook
from sagecp.core.prediction.cost import (
    CostBasis,
    CostQuantiles,
    EngineTimeCurve,
    cost_quantiles_usd,
    engine_time,
)
from sagecp.core.prediction.output_length import LengthEstimate
from sagecp.core.prediction.placement import Prediction
from sagecp.core.request import RequestRecord
from sagecp.core.request_cost import RequestCost
from sagecp.core.types import InstanceState

_HOUR_S = 3600.0
# A list shows a thousand waiting requests at once: what they could run on is looked up once for all.
_OFFERS_KEPT_S = 1.0
_OFFERS_MODEL_LIMIT = 1000
# Instances that are looked at, and different kinds and prices that are kept of them.
_LOOKED_AT_LIMIT = 32
_OFFER_LIMIT = 8
# By what an instance is compared with others of its kind and price: all of them are cheap, or none.
_REFERENCE_OUTPUT_TOKENS = 256.0

# Of an instance where requests end more often than this, not each is compared with its prediction.
_OBSERVE_INTERVAL_S = 0.5


class _Offer(NamedTuple):
    """An instance on which a request could run."""

    row: CandidateRow
    factor: float
    sigma: float


class CostBook:
    """Keeps what requests cost in their records.

    Args:
        fleet: The instances.
        book: How long answers get; told how right predictions were.
    """

    def __init__(self, fleet: Fleet, book: PredictionBook) -> None:
        self._fleet = fleet
        self._book = book
        # By model, with the time that they were looked up.
        self._offers: dict[str, tuple[float, list[_Offer]]] = {}

    # -- what happens ------------------------------------------------------------

    def note_dispatch(
        self,
        record: RequestRecord,
        instance: InstanceRecord,
        row: CandidateRow,
        predicted: Prediction,
        now: float,
    ) -> None:
        """A request was sent to an instance: what it was placed by, and what was predicted from that."""
        metadata = record.metadata
        meter = instance.meter
        meter.begin(
            record.request_id,
            record.prompt_token_count,
            row.cached_token_count,
            record.expected_output_token_count / metadata.choice_count,
            metadata.choice_count,
            predicted.work_s,
            row.step_time,
            now,
        )
        record.cost_basis = None
        if meter.usd_per_hour > 0.0:
            # The quantiles are found when somebody asks for them, which few do before the end.
            residual = instance.cost_residual
            record.cost_basis = CostBasis(
                self._lengths(record), record.spent_usd or 0.0, residual.factor(now), residual.sigma
            )

    def note_attempt_end(
        self, record: RequestRecord, instance: InstanceRecord, now: float, output_token_count: int | None
    ) -> None:
        """A request left an instance. ``output_token_count``: what it produced, if it ran to its end."""
        seconds = instance.meter.end(record.request_id, now)
        usd_per_hour = instance.meter.usd_per_hour
        if usd_per_hour > 0.0:
            record.spent_usd = (record.spent_usd or 0.0) + seconds * usd_per_hour / _HOUR_S
        basis = record.cost_basis
        if basis is None or output_token_count is None or now < instance.cost_observe_s:
            return
        instance.cost_observe_s = now + _OBSERVE_INTERVAL_S
        curve, usd_per_hour = _curve_of(record)
        instance.cost_residual.observe(curve.seconds(output_token_count / curve.choice_count), seconds, now)
        predicted = _quantiles(record, curve, usd_per_hour, basis)
        if record.spent_usd is not None:
            self._book.accuracy.record("cost", predicted.p50_usd, record.spent_usd, predicted.p90_usd)

    # -- reading ---------------------------------------------------------------

    def cost_of(self, record: RequestRecord, now: float) -> RequestCost | None:
        """Return what a request that has not ended costs; ``None``: no price is known."""
        spent_usd = record.spent_usd
        if record.queued:
            return cost_of(self._predicted_while_waiting(record, now), spent_usd)
        instance = self._fleet.holder(record.instance_id)
        if instance is not None and record.cost_basis is not None:
            running_s = instance.meter.spent_s(record.request_id, now)
            spent_usd = (spent_usd or 0.0) + running_s * instance.meter.usd_per_hour / _HOUR_S
        return cost_of(_predicted_at_dispatch(record), spent_usd)

    # -- inside --------------------------------------------------------------------

    def _lengths(self, record: RequestRecord) -> LengthEstimate:
        metadata = record.metadata
        return self._book.output_lengths.distribution(
            metadata.tenant_id, metadata.max_tokens, record.prompt_token_count - record.output_token_count
        )

    def _predicted_while_waiting(self, record: RequestRecord, now: float) -> CostQuantiles | None:
        offers = self._offers_of(record, now)
        if not offers:
            return None
        request, choices = request_row(record, now), record.metadata.choice_count
        _, number, curve = min(
            (
                offer.row.usd_per_hour * offer.factor * curve.seconds(request.output_token_count),
                number,
                curve,
            )
            for number, offer in enumerate(offers)
            for curve in (engine_time(request, offer.row, choices),)
        )
        cheapest = offers[number]
        basis = CostBasis(self._lengths(record), record.spent_usd or 0.0, cheapest.factor, cheapest.sigma)
        return _quantiles(record, curve, cheapest.row.usd_per_hour, basis)

    def _offers_of(self, record: RequestRecord, now: float) -> list[_Offer]:
        known = self._offers.get(record.model)
        if known is not None and 0.0 <= now - known[0] <= _OFFERS_KEPT_S:
            return known[1]
        if len(self._offers) >= _OFFERS_MODEL_LIMIT:
            self._offers.clear()
        offers = self._look_up_offers(record, now)
        self._offers[record.model] = (now, offers)
        return offers

    def _look_up_offers(self, record: RequestRecord, now: float) -> list[_Offer]:
        request = request_row(record, now)
        instances = self._fleet.with_room_for(record, _LOOKED_AT_LIMIT)
        instances += self._fleet.closed_gates(record.model, _LOOKED_AT_LIMIT)
        if not instances:
            instances = self._fleet.serving(record.model)[:_LOOKED_AT_LIMIT]
        best: dict[tuple[int, float], tuple[float, str, _Offer]] = {}
        for instance in instances:
            if instance.state is not InstanceState.READY or not instance.usd_per_hour > 0.0:
                continue
            row = candidate_row(instance, 0, 0.0, now)
            offer = _Offer(row, instance.cost_residual.factor(now), instance.cost_residual.sigma)
            reference_s = engine_time(request, row).seconds(_REFERENCE_OUTPUT_TOKENS)
            usd = reference_s * offer.factor * row.usd_per_hour
            key = (id(instance.load.kind), instance.usd_per_hour)
            entry = (usd, instance.instance_id, offer)
            if key not in best or entry[:2] < best[key][:2]:
                best[key] = entry
        return [offer for _, _, offer in sorted(best.values(), key=lambda entry: entry[:2])[:_OFFER_LIMIT]]


def final_cost(record: RequestRecord) -> RequestCost | None:
    """Return what a request that has ended cost; ``None``: no price was known.

    What was predicted of it is kept in the record from then on, instead of what it is predicted
    from: distributions are large, and ended requests many.
    """
    if record.cost_basis is not None:
        record.predicted_cost = _predicted_at_dispatch(record)
        record.cost_basis = None
    return cost_of(record.predicted_cost, record.spent_usd)


def cost_of(predicted: CostQuantiles | None, spent_usd: float | None) -> RequestCost | None:
    """Return what is told of a cost; ``None``: nothing is known."""
    if predicted is None and spent_usd is None:
        return None
    low, median, high = predicted or (0.0, 0.0, 0.0)
    return RequestCost(
        predicted_p10_usd=low, predicted_p50_usd=median, predicted_p90_usd=high, actual_usd=spent_usd
    )


def _predicted_at_dispatch(record: RequestRecord) -> CostQuantiles | None:
    if record.cost_basis is None:
        return None
    return _quantiles(record, *_curve_of(record), record.cost_basis)


def _curve_of(record: RequestRecord) -> tuple[EngineTimeCurve, float]:
    """Return what the present or last attempt was predicted to take, and the price of its instance."""
    inputs = record.decisions[-1].inputs
    assert inputs is not None  # noqa: S101 - the dispatcher always gives them
    row = next(row for row in inputs.candidates if row.instance_id == record.instance_id)
    return engine_time(inputs.request, row, record.metadata.choice_count), row.usd_per_hour


def _quantiles(
    record: RequestRecord, curve: EngineTimeCurve, usd_per_hour: float, basis: CostBasis
) -> CostQuantiles:
    return cost_quantiles_usd(
        curve,
        usd_per_hour,
        basis,
        max_tokens=record.metadata.max_tokens,
        produced_token_count=record.output_token_count,
    )
