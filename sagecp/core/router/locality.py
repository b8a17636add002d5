"""Requests go where the start of their prompt is cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from sagecp.core.parameters import Parameter
from sagecp.core.placement import CandidateRow, RequestRow
from sagecp.core.request import RequestRecord
from sagecp.core.router.base import InstanceView, LoadBalancer, RoutingStrategy, Scorer, ScorerContext
from sagecp.core.router.packed_extra import pack, squeeze, unpack


class LocalityStrategy(RoutingStrategy):
    """Takes the instance that has the longest start of the prompt in its prefix cache.

    Only a start that is worth it counts, ``locality.min_match_share`` of the
    prompt, and only on an instance whose load is in proportion: at most
    ``locality.load_ratio`` times what the least loaded candidate has in flight,
    or ``locality.load_slack`` requests more, whichever is more. All else is left
    to the balancer, which also decides between equally long starts. In the
    spirit of SGLang's cache-aware router: a cache hit saves one prefill, a
    queue costs several.

    The ``extra`` is ``m + x / (1 + x)``, with the fewest requests in flight among
    the candidates, m, and the balancer's own extra, x.
    """

    name: ClassVar[str] = "locality"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            "locality.min_match_share",
            0.1,
            0.0,
            1.0,
            "Share of the prompt that must be cached for an instance to be preferred.",
        ),
        Parameter(
            "locality.load_ratio",
            1.5,
            1.0,
            1000.0,
            "Most requests on a preferred instance, as a multiple of the fewest on any candidate.",
        ),
        Parameter(
            "locality.load_slack",
            8.0,
            0.0,
            1_000_000.0,
            "Requests that a preferred instance may always have more than the fewest on any candidate.",
        ),
    )

    def __init__(self, context: ScorerContext, balancer: LoadBalancer) -> None:
        super().__init__(context, balancer)
        self._balancer_has_extras = type(balancer).extras is not Scorer.extras

    def extras(self, request: RequestRecord, instances: Sequence[InstanceView]) -> Sequence[float] | None:
        """Return the fewest requests in flight, with the balancer's extras."""
        fewest = min(instance.in_flight_count for instance in instances)
        extras = self.balancer.extras(request, instances) if self._balancer_has_extras else None
        if extras is None:
            return [float(fewest)] * len(instances)
        return [pack(fewest, extra) for extra in extras]

    def score(self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> float:
        """Return minus the cached tokens of a preferred instance, else the balancer's score.

        Between two that have equally much cached the balancer's score, squeezed
        into less than one token, decides. Balancers' scores are not negative, so
        that preferred instances come first.
        """
        balanced = self.balancer.score(request, self._balancers_row(candidate), parameters)
        if _is_preferred(request, candidate, parameters):
            return squeeze(balanced) - candidate.cached_token_count
        return balanced

    def terms(
        self, request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]
    ) -> dict[str, float]:
        """Return what was compared, and the balancer's terms."""
        return {
            **self.balancer.terms(request, self._balancers_row(candidate), parameters),
            "cached_tokens": float(candidate.cached_token_count),
            "fewest_in_flight": float(unpack(candidate.extra)[0]),
            "preferred": float(_is_preferred(request, candidate, parameters)),
        }

    def reason(self, request: RequestRow, best: CandidateRow, score: float) -> str:
        """Return why ``best`` won."""
        if score < 0.0:
            cached, prompt = best.cached_token_count, request.prompt_token_count
            return f"locality: {cached} of {prompt} prompt tokens cached, {best.in_flight_count} in flight"
        return self.balancer.reason(request, self._balancers_row(best), score)

    def note_dispatch(self, request: RequestRecord, instance_id: str) -> None:
        """Tell the balancer, which counts what it did not choose as well."""
        self.balancer.note_dispatch(request, instance_id)

    def note_fleet(self, instance_ids: Sequence[str]) -> None:
        """Tell the balancer."""
        self.balancer.note_fleet(instance_ids)

    def _balancers_row(self, candidate: CandidateRow) -> CandidateRow:
        """Return the row with the balancer's extra; unchanged for balancers that have none."""
        if not self._balancer_has_extras:
            return candidate
        return candidate._replace(extra=unpack(candidate.extra)[1])


def _is_preferred(request: RequestRow, candidate: CandidateRow, parameters: Mapping[str, float]) -> bool:
    cached = candidate.cached_token_count
    if cached <= 0 or cached < parameters["locality.min_match_share"] * request.prompt_token_count:
        return False
    fewest = unpack(candidate.extra)[0]
    most = max(parameters["locality.load_ratio"] * fewest, fewest + parameters["locality.load_slack"])
    return candidate.in_flight_count <= most
