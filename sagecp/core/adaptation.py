"""Evidence for the adaptive policy: the last arrivals, and which policy would have served them best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sagecp.core.fleet import Fleet
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.policies.adaptive import class_weight_name
from sagecp.core.policies.base import PolicyVerdict
from sagecp.core.policies.cost_optimized import CostOptimizedPolicy
from sagecp.core.policies.priority import PriorityPolicy
from sagecp.core.policies.slo_aware import SloAwarePolicy
from sagecp.core.policy_replay import PolicyReplay, PolicyScore, ReplayInstance
from sagecp.core.recent_arrivals import RecentArrivals, WindowFigures
from sagecp.core.request import RequestRecord
from sagecp.core.settings import SchedulingSettings
from sagecp.core.types import InstanceState, RequestPriority

WINDOW_S = 60.0
"""Arrivals that are judged."""
# Arrivals before them are replayed, too, or every replay would begin with an idle fleet.
_WARM_UP_S = 30.0
# A larger fleet is replayed in part, with the same part of the arrivals.
INSTANCE_LIMIT = 16
FEWEST_ARRIVALS = 50
"""With fewer a difference between policies is chance."""
# Where nearly nobody waits or misses, the order does not matter.
_WORTHWHILE_SHARE = 0.01
# An answer that took longer is about another time than the present.
_EVALUATION_TIMEOUT_S = 60.0
# Attainments that differ by less count as equal where money is looked at.
_EQUAL_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class _Asked:
    """A replay whose scores have not come, and the window that it was asked for."""

    evaluation_id: int
    asked_s: float
    judged_s: float
    figures: WindowFigures


class AdaptationBook:
    """Remembers the last arrivals, asks for replays of them, and judges by their scores.

    A policy takes over when it meets more objectives than the one in force, by
    ``adaptive.gain`` in ``adaptive.confirmations`` replays in a row.
    ``cost_optimized`` also takes over, or makes way, where as many objectives
    are met for less money. The book outlives changes of the settings.

    Attributes:
        verdict: The policy that the evidence speaks for.
        arrivals: What is replayed.
        switch_count: Verdicts that were overturned.
        evaluation_count: Replays that were judged.
    """

    def __init__(self) -> None:
        self.verdict = PolicyVerdict()
        self.switch_count = 0
        self.evaluation_count = 0
        self._parameters: Mapping[str, float] = {}
        self.arrivals = RecentArrivals(WINDOW_S + _WARM_UP_S)
        self._due_s = math.inf
        self._last_id = 0
        self._asked: _Asked | None = None
        # The challenger of the last replays, and how many in a row it won.
        self._streak = ("", 0)

    def configure(self, parameters: Mapping[str, float], now: float) -> None:
        """Take parameters into use. Replays that were made with others do not count any more."""
        self._parameters = parameters
        self._asked = None
        self._streak = ("", 0)
        if self._due_s < math.inf:
            self._due_s = min(self._due_s, now + self._interval_s)

    @property
    def _interval_s(self) -> float:
        return self._parameters["adaptive.interval_s"]

    def note_arrival(self, record: RequestRecord, now: float) -> None:
        """A request arrived, with its objectives and its expected output."""
        self.arrivals.note_arrival(record, now)
        if len(self.arrivals) == 1:
            self._due_s = now + self._interval_s

    # -- asking ----------------------------------------------------------------------

    def next_timer_s(self) -> float | None:
        """Return when :meth:`ask` is next worth calling, or ``None``."""
        return self._due_s if len(self.arrivals) >= FEWEST_ARRIVALS else None

    def ask(self, settings: SchedulingSettings, fleet: Fleet, now: float) -> PolicyReplay | None:
        """Return what to replay, if that is due and could teach something."""
        arrivals = self.arrivals
        if now < self._due_s or len(arrivals) < FEWEST_ARRIVALS:
            return None
        self._due_s = now + self._interval_s
        arrivals.forget_old(now)
        ready = [each for each in fleet if each.state is InstanceState.READY]
        stride = _stride(len(ready))
        if stride != arrivals.stride:
            arrivals.sample(stride)
        if self._asked is not None and now - self._asked.asked_s < _EVALUATION_TIMEOUT_S:
            return None
        self._asked = None
        instances = _sample(ready, stride)
        if not len(arrivals) or not instances or not all(each.load.kind.trusted for each in instances):
            return None
        duration_s = now - arrivals.begin_s
        judged_s = duration_s * WINDOW_S / (WINDOW_S + _WARM_UP_S)
        figures = arrivals.figures(now - judged_s, now)
        candidates = self._candidates(instances, now)
        if not _is_worthwhile(figures, candidates, instances):
            # What was found before is about another load than the next replay will be.
            self._streak = ("", 0)
            return None
        self._last_id += 1
        self._asked = _Asked(self._last_id, now, judged_s, figures)
        return PolicyReplay(
            evaluation_id=self._last_id,
            candidates=candidates,
            arrivals=arrivals.for_replay(),
            duration_s=duration_s,
            judged_from_s=duration_s - judged_s,
            block_token_count=arrivals.block_token_count,
            instances=_replay_instances(instances, now),
            routing_strategy=settings.routing_strategy,
            load_balancer=settings.load_balancer,
            parameters=dict(settings.parameters),
            class_weights={
                priority: self._parameters[class_weight_name(priority)] for priority in RequestPriority
            },
        )

    def _candidates(self, instances: Sequence[InstanceRecord], now: float) -> tuple[str, ...]:
        """Return the policies that could be right; fifo is priority without classes and tenants."""
        found = [PriorityPolicy.name, SloAwarePolicy.name]
        busy_share = sum(each.load.prefill_share(now) for each in instances) / len(instances)
        is_priced = all(each.usd_per_hour > 0.0 for each in instances)
        if is_priced and busy_share < self._parameters["adaptive.cheap_below_share"]:
            found.append(CostOptimizedPolicy.name)
        if self.verdict.policy not in found:
            found.append(self.verdict.policy)
        return tuple(found)

    # -- judging ---------------------------------------------------------------------

    def judge(
        self, evaluation_id: int, scores: Sequence[PolicyScore], now: float
    ) -> tuple[PolicyVerdict, PolicyVerdict] | None:
        """Take the scores of a replay in; return the verdict before and after if it was overturned.

        Scores of another replay than the last that was asked for are ignored,
        and so is the lack of scores: it is news of the one that replays.
        """
        asked = self._asked
        if asked is None or asked.evaluation_id != evaluation_id:
            return None
        self._asked = None
        ruling = next((score for score in scores if score.policy == self.verdict.policy), None)
        if ruling is None:
            return None
        self.evaluation_count += 1
        better = self._better(ruling, scores)
        if better is None:
            self._streak = ("", 0)
            return None
        name, count = self._streak
        count = count + 1 if name == better.policy else 1
        self._streak = (better.policy, count)
        if count < self._parameters["adaptive.confirmations"]:
            return None
        before = self.verdict
        self.verdict = PolicyVerdict(better.policy, _why(asked, better, ruling, count), now)
        self.switch_count += 1
        self._streak = ("", 0)
        return before, self.verdict

    def _better(self, ruling: PolicyScore, scores: Sequence[PolicyScore]) -> PolicyScore | None:
        """Return the policy that should rule instead, by one replay; ``None``: there is none."""
        gain = self._parameters["adaptive.gain"]
        others = [score for score in scores if score.policy != ruling.policy]
        best = max((score.attainment for score in others), default=0.0)
        if best - ruling.attainment > gain:
            return min(
                (score for score in others if best - score.attainment <= _EQUAL_SHARE), key=_price_then_name
            )
        cheaper = [
            score
            for score in others
            # Prices differ by instance: only this policy places by them.
            if CostOptimizedPolicy.name in {score.policy, ruling.policy}
            and ruling.attainment - score.attainment <= _EQUAL_SHARE
            and score.usd_per_good is not None
            and ruling.usd_per_good is not None
            and score.usd_per_good < (1.0 - gain) * ruling.usd_per_good
        ]
        return min(cheaper, key=_price_then_name, default=None)


def _price_then_name(score: PolicyScore) -> tuple[float, str]:
    return (math.inf if score.usd_per_good is None else score.usd_per_good, score.policy)


def _why(asked: _Asked, better: PolicyScore, ruling: PolicyScore, count: int) -> str:
    times = {1: "once", 2: "twice in a row"}.get(count, f"{count} times in a row")
    figures = asked.figures
    weighted = ", weighted by class" if figures.has_classes else ""
    shares = (
        f"{better.attainment:.1%} would have met their objectives against {ruling.attainment:.1%} "
        f"under {ruling.policy}{weighted}"
    )
    if better.attainment <= ruling.attainment + _EQUAL_SHARE and better.usd_per_good and ruling.usd_per_good:
        shares += f", for {1.0 - better.usd_per_good / ruling.usd_per_good:.1%} less money"
    return (
        f"replaying the last {asked.judged_s:.0f} s ({figures.request_count} requests, "
        f"{figures.waited_share:.0%} waited, {figures.missed_share:.0%} missed), {shares}, {times}"
    )


def _stride(instance_count: int) -> int:
    """Return one in how many instances is replayed, and so of the arrivals: a power of two."""
    stride = 1
    while instance_count > stride * INSTANCE_LIMIT:
        stride *= 2
    return stride


def _is_worthwhile(
    figures: WindowFigures, candidates: Sequence[str], instances: Sequence[InstanceRecord]
) -> bool:
    """Return whether a replay could teach something."""
    if figures.request_count < FEWEST_ARRIVALS:
        return False
    if max(figures.waited_share, figures.missed_share) >= _WORTHWHILE_SHARE:
        return True
    # Then the order does not matter, but the place may where prices differ.
    return CostOptimizedPolicy.name in candidates and len({each.usd_per_hour for each in instances}) > 1


def _sample(ready: Sequence[InstanceRecord], stride: int) -> list[InstanceRecord]:
    """Return one in so many instances of each kind, but at least one, spread over the fleet."""
    groups: dict[tuple[object, ...], list[InstanceRecord]] = {}
    for each in ready:
        groups.setdefault((each.load.kind, each.spec.served_models), []).append(each)
    found = []
    for group in groups.values():
        count = max(1, round(len(group) / stride))
        found += [group[number * len(group) // count] for number in range(count)]
    return found


def _replay_instances(instances: Sequence[InstanceRecord], now: float) -> tuple[ReplayInstance, ...]:
    kinds: dict[object, int] = {}
    return tuple(
        ReplayInstance(
            instance_id=each.instance_id,
            kind=kinds.setdefault(each.load.kind, len(kinds)),
            model=each.spec.model_name,
            model_aliases=each.spec.model_aliases,
            gpu_name=each.spec.gpu_name,
            gpu_count=max(1, each.spec.gpu_count),
            tensor_parallel_size=max(1, each.spec.tensor_parallel_size),
            step_time=each.load.kind.model.parameters,
            slowness=math.sqrt(each.load.ttft.factor(now) * each.load.tpot.factor(now)),
            key_value_token_capacity=each.spec.key_value_token_capacity,
            max_request_count=each.concurrency_limit,
            usd_per_hour=each.usd_per_hour,
        )
        for each in instances
    )
