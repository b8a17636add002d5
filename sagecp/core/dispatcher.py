"""Which waiting request goes where, now."""

from __future__ import annotations

import enum
import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence

from sagecp.core.choice import Choice, choose
from sagecp.core.fleet import Fleet
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.placement import CandidateRow, PlacementInputs, RequestRow
from sagecp.core.plan_preference import plan_mismatches
from sagecp.core.policies.base import PolicyContext, PolicyVerdict, SchedulingPolicy
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.prediction.placement import BATCH_TOKEN_COUNT, miss_probability, predict
from sagecp.core.prediction.residual import LARGEST_SIGMA
from sagecp.core.prefix_index import PrefixIndex
from sagecp.core.receipts import kept_inputs, kept_scores
from sagecp.core.request import RequestRecord
from sagecp.core.request_queue import RequestQueue
from sagecp.core.router.registry import make_strategy
from sagecp.core.service_books import ServiceBooks
from sagecp.core.settings import SchedulingSettings
from sagecp.core.types import InstanceState, RequestPriority, SchedulingDecision
from sagecp.core.waiting_line import WaitingLine

# Most requests of a model that others pass in one dispatch because they wait for a better
# instance: the bound on what a fleet with a failing engine costs each event.
STEP_OVER_LIMIT = 32
# Most requests that one dispatch demotes; later heads go out as they are. After a standstill
# the whole queue may be hopeless, and to find that at once would stop everything else.
DEMOTION_LIMIT = 64
# Candidates that are looked at: those with the least to do, those that hold the prompt's
# start, and those that will soon be open. More would cost time and find nothing better.
OPEN_CANDIDATE_LIMIT = 32
HOLDER_CANDIDATE_LIMIT = 16
CLOSED_CANDIDATE_LIMIT = 8
# A fleet up to this size is looked at as a whole.
WHOLE_FLEET_LIMIT = 16
# Most requests of a model that wait for better instances of a larger fleet, one for each: an
# instance that opens takes about one. Below the bound on passing, or those that wait for the
# few that open next would keep everybody from the many that are open.
WAITER_LIMIT = 16
_PACING_TIME_S = 5.0

Start = Callable[[RequestRecord, InstanceRecord, SchedulingDecision, float], None]


class _Verdict(enum.Enum):
    """What became of a head."""

    STARTED = "started"
    PASSED = "passed"
    BLOCKED = "blocked"
    DEMOTED = "demoted"


class Dispatcher:
    """Takes requests from the queue's lines and finds each an instance.

    Args:
        fleet: The instances.
        queue: What waits.
        index: Who holds the start of which prompt.
        books: What each tenant was served.
        generator: Where chance comes from.
        start: Carries a decision out.
    """

    def __init__(
        self,
        fleet: Fleet,
        queue: RequestQueue,
        index: PrefixIndex,
        books: ServiceBooks,
        generator: random.Random,
        start: Start,
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._index = index
        self._books = books
        self._random = generator
        self._start = start
        self._membership_version = -1
        # By model, for one dispatch: instances with this token limit or more are kept for a
        # request too long for the others, or what is passed would never have its turn.
        self._kept_from: dict[str, float] = {}
        # By model and awaited instance; those whose wait is over are left out when it is read.
        self._waiters: dict[str, dict[str, RequestRecord]] = {}
        self.settings: SchedulingSettings
        self.policy: SchedulingPolicy
        self.parameters: Mapping[str, float] = {}

    def configure(self, settings: SchedulingSettings, verdict: PolicyVerdict) -> None:
        """Take settings into use, and the policy that evidence speaks for where they leave it open.

        The queue keeps its order until it is reordered.
        """
        before = getattr(self, "settings", None)
        self.settings = settings
        self.parameters = settings.values
        self.policy = SCHEDULING_POLICIES.get(settings.scheduling_policy)(
            PolicyContext(settings.values, self._books, verdict)
        )
        # Strategies remember: only another name, or another parameter, makes a new one.
        if before is None or (before.routing_strategy, before.load_balancer) != (
            settings.routing_strategy,
            settings.load_balancer,
        ):
            self.strategy = make_strategy(settings.routing_strategy, settings.load_balancer, self._random)
            self._membership_version = -1

    # -- the loop ------------------------------------------------------------------

    def dispatch(self, now: float) -> None:
        """Send out every request that an instance has room for, the most urgent first.

        The order holds over all models, because one instance may serve several.
        Within a model nobody overtakes a request that is only too big for the
        room there is, or it would never have its turn; except on instances that
        could not hold it if they were empty.
        """
        fleet, queue = self._fleet, self._queue
        for instance in fleet.pop_openings(now):
            self.settle_gate(instance, now)
        heads = [
            (line.rank(now), model, line)
            for model, line in queue.lines()
            if fleet.is_open(model) and len(line)
        ]
        if not heads:
            return
        if self._membership_version != fleet.membership_version:
            self._membership_version = fleet.membership_version
            self.strategy.note_fleet(sorted(instance.instance_id for instance in fleet))
        heapq.heapify(heads)
        self._kept_from.clear()
        passed: dict[str, int] = {}
        stepped: dict[str, WaitingLine] = {}
        demoted_count = 0
        while heads:
            _, model, line = heapq.heappop(heads)
            record = line.head(now)
            if record is None or not fleet.is_open(model):
                continue
            verdict = self._consider(record, line, now, may_demote=demoted_count < DEMOTION_LIMIT)
            if verdict is _Verdict.BLOCKED:
                continue
            if verdict is _Verdict.DEMOTED:
                demoted_count += 1
            if verdict is _Verdict.PASSED:
                passed[model] = passed.get(model, 0) + 1
                if passed[model] > STEP_OVER_LIMIT:
                    continue
                line.step_over()
                stepped[model] = line
            if len(line) and line.head(now) is not None:
                heapq.heappush(heads, (line.rank(now), model, line))
        for line in stepped.values():
            line.step_back()

    def _consider(
        self, record: RequestRecord, line: WaitingLine, now: float, *, may_demote: bool
    ) -> _Verdict:
        if self._is_waiting(record, now):
            return _Verdict.PASSED
        kept_from = self._kept_from.get(record.model, math.inf)
        open_instances = self._fleet.with_room_for(record, OPEN_CANDIDATE_LIMIT, kept_from)
        if not open_instances:
            return self._leave_waiting(record)
        policy = self.policy
        may_demote = (
            may_demote
            and policy.demotes
            and not record.demoted
            and record.metadata.priority is not RequestPriority.CRITICAL
        )
        usable = self._prefer_untried(record, open_instances)
        # Before anything is looked up: after a standstill the whole queue is overdue.
        if may_demote and usable and self._is_overdue(record, None, now):
            line.demote(record)
            return _Verdict.DEMOTED
        matches = self._index.match(record.digest.block_hashes) if record.digest.block_hashes else {}
        if len(open_instances) == OPEN_CANDIDATE_LIMIT:
            self._add_sought(record, open_instances, matches, kept_from)
            usable = self._prefer_untried(record, open_instances)
        if not usable:
            return _Verdict.PASSED
        # How long the answer gets is a guess: a preference, and nothing to wait for.
        expected = record.expected_token_count
        usable = [instance for instance in usable if instance.token_limit >= expected] or usable
        instances = list(usable)
        if policy.is_patient and self.strategy.is_loss:
            instances += self._closed_candidates(record, matches, now)
        if may_demote and self._is_overdue(record, instances, now):
            line.demote(record)
            return _Verdict.DEMOTED
        inputs = self._observe(record, instances, len(usable), matches, now)
        if may_demote and self._is_hopeless(inputs):
            line.demote(record)
            return _Verdict.DEMOTED
        choice = choose(self.strategy, policy, inputs)
        if choice.chosen is None:
            record.waits_for = choice.best.instance_id
            record.wait_until_s = now + choice.best.opens_in_s
            if len(self._fleet) > WHOLE_FLEET_LIMIT:
                self._waiters.setdefault(record.model, {})[record.waits_for] = record
            return _Verdict.PASSED
        instance = self._fleet.get(choice.chosen.instance_id)
        self._start(record, instance, self._receipt(record, inputs, choice, len(usable), now), now)
        return _Verdict.STARTED

    def _is_waiting(self, record: RequestRecord, now: float) -> bool:
        """Return whether a request waits for a busy instance, which still is."""
        if record.wait_until_s <= now:
            return False
        awaited = self._fleet.find(record.waits_for)
        return awaited is not None and awaited.gate_closed and awaited.state is InstanceState.READY

    def _awaited(self, model: str, now: float) -> dict[str, RequestRecord]:
        """Return which instances of a large fleet requests of a model wait for, with the requests."""
        waiters = self._waiters.get(model, {})
        for instance_id, record in list(waiters.items()):
            if not (record.queued and record.waits_for == instance_id and self._is_waiting(record, now)):
                del waiters[instance_id]
        if not waiters:
            self._waiters.pop(model, None)
        return waiters

    def _leave_waiting(self, record: RequestRecord) -> _Verdict:
        """Let others pass a request without room, but only to instances that could never hold it."""
        model, least = record.model, self._fleet.least_token_limit(record)
        kept_from = min(least, self._kept_from.get(model, math.inf))
        if not self._fleet.has_open_below(model, kept_from):
            return _Verdict.BLOCKED
        self._kept_from[model] = kept_from
        return _Verdict.PASSED

    # -- candidates ----------------------------------------------------------------

    def _add_sought(
        self, record: RequestRecord, found: list[InstanceRecord], matches: Mapping[str, int], kept_from: float
    ) -> None:
        """Add open instances that a sample of a large fleet may lack: wanted ones, holders of the prompt."""
        known = {instance.instance_id for instance in found}
        least = self._fleet.least_token_limit(record)
        for instance_id in [*self.strategy.wants(record), *list(matches)[:HOLDER_CANDIDATE_LIMIT]]:
            instance = self._fleet.find(instance_id)
            if (
                instance is not None
                and instance_id not in known
                and instance.is_open
                and record.model in instance.spec.served_models
                and instance.fits(record)
                and instance.token_limit >= least
                and (instance.token_limit < kept_from or kept_from == math.inf)
            ):
                known.add(instance_id)
                found.append(instance)

    def _closed_candidates(
        self, record: RequestRecord, matches: Mapping[str, int], now: float
    ) -> list[InstanceRecord]:
        """Return instances that only wait for prefill to be done, and could be worth waiting for."""
        limit, awaited = WHOLE_FLEET_LIMIT, {}
        if len(self._fleet) > WHOLE_FLEET_LIMIT:
            limit, awaited = CLOSED_CANDIDATE_LIMIT, self._awaited(record.model, now)
            if len(awaited) >= WAITER_LIMIT:
                return []
        found = self._fleet.closed_gates(record.model, limit)
        known = {instance.instance_id for instance in found}
        for instance_id in list(matches)[:HOLDER_CANDIDATE_LIMIT]:
            instance = self._fleet.find(instance_id)
            if (
                instance is not None
                and instance_id not in known
                and instance.gate_closed
                and instance.state is InstanceState.READY
                and record.model in instance.spec.served_models
            ):
                found.append(instance)
        least = self._fleet.least_token_limit(record)
        return [
            instance
            for instance in found
            if instance.token_limit >= least
            and instance.instance_id not in awaited
            and instance.instance_id not in record.excluded_instance_ids
            and instance.in_flight_count < instance.concurrency_limit
            and instance.fits(record)
        ]

    def _prefer_untried(
        self, record: RequestRecord, candidates: list[InstanceRecord]
    ) -> list[InstanceRecord]:
        """Return the candidates that lost no attempt of the request, or all if there is nothing better.

        None at all means that better instances are only busy: the request
        waits for one rather than go back, and others may pass it.
        """
        excluded = record.excluded_instance_ids
        if not excluded:
            return candidates
        untried = [i for i in candidates if i.instance_id not in excluded]
        least = self._fleet.least_token_limit(record)
        if not untried and not any(
            i.state is InstanceState.READY and i.instance_id not in excluded and i.token_limit >= least
            for i in self._fleet.serving(record.model)
        ):
            return candidates
        return untried

    # -- rows ------------------------------------------------------------------------

    def request_row(self, record: RequestRecord, now: float) -> RequestRow:
        """Return a request as placements see it."""
        metadata = record.metadata
        deadline_ms, budget = metadata.slo_deadline_ms, metadata.cost_budget
        return RequestRow(
            record.prompt_token_count,
            record.expected_output_token_count / metadata.choice_count,
            now - record.arrival_s,
            record.ttft_objective_s,
            record.tpot_objective_s,
            math.inf if deadline_ms is None else deadline_ms / 1000.0,
            int(metadata.priority),
            math.inf if budget is None else budget,
        )

    def candidate_row(
        self,
        instance: InstanceRecord,
        cached_token_count: int,
        extra: float,
        now: float,
        *,
        is_open: bool = True,
        plan_mismatch: int = 0,
    ) -> CandidateRow:
        """Return an instance as placements see it."""
        load = instance.load
        capacity = instance.spec.key_value_token_capacity
        backlog_s, decodes, context, share, ttft_factor, tpot_factor, sigma = load.view(now)
        latency_s, ttft_s, tpot_s = (
            instance.latency_estimate_s,
            instance.ttft_estimate_s,
            instance.tpot_estimate_s,
        )
        return CandidateRow(
            instance.instance_id,
            instance.last_dispatch_sequence,
            1 if is_open else 0,
            0.0 if is_open else max(0.0, instance.gate_opens_s - now),
            instance.in_flight_count,
            instance.concurrency_limit,
            instance.reserved_token_count,
            math.inf if capacity is None else float(capacity),
            cached_token_count,
            backlog_s,
            decodes,
            context,
            share,
            ttft_factor,
            tpot_factor,
            sigma,
            math.inf if latency_s is None else latency_s,
            math.inf if ttft_s is None else ttft_s,
            math.inf if tpot_s is None else tpot_s,
            instance.usd_per_hour,
            extra,
            load.kind.model.parameters,
            plan_mismatch,
        )

    def _observe(
        self,
        record: RequestRecord,
        instances: list[InstanceRecord],
        open_count: int,
        matches: Mapping[str, int],
        now: float,
    ) -> PlacementInputs:
        extras = self.strategy.extras(record, instances)
        mismatches = plan_mismatches(record, instances, self.parameters)
        block_tokens = record.digest.block_token_count
        # At least one token is always computed.
        most_cached = record.prompt_token_count - 1
        rows = tuple(
            self.candidate_row(
                instance,
                min(most_cached, matches.get(instance.instance_id, 0) * block_tokens) if matches else 0,
                0.0 if extras is None else extras[number],
                now,
                is_open=number < open_count,
                plan_mismatch=0 if mismatches is None else mismatches[number],
            )
            for number, instance in enumerate(instances)
        )
        return PlacementInputs(self.request_row(record, now), rows, self.parameters)

    def _is_overdue(
        self, record: RequestRecord, instances: Sequence[InstanceRecord] | None, now: float
    ) -> bool:
        """Return whether a request has waited so long that it is hopeless however fast an instance were.

        What :meth:`_is_hopeless` would find for zero seconds to the first token and the widest
        spread among the instances, or that any could have where they are not known yet:
        thousands of requests may be overdue, and each would cost rows.
        """
        waited_s, objective_s = now - record.arrival_s, record.ttft_objective_s
        if waited_s < objective_s:
            return False
        threshold = max(0.5, self.parameters["slo_aware.demote_probability"])
        sigma = LARGEST_SIGMA if instances is None else max(each.load.ttft.sigma for each in instances)
        sigma = max(sigma, self.parameters["predicted_latency.ttft_sigma"])
        return miss_probability(waited_s, objective_s, sigma) > threshold

    def _is_hopeless(self, inputs: PlacementInputs) -> bool:
        """Return whether the request would probably miss its objective wherever it went."""
        request = inputs.request
        threshold = self.parameters["slo_aware.demote_probability"]
        least_sigma = self.parameters["predicted_latency.ttft_sigma"]
        return all(
            miss_probability(
                predict(request, row).ttft_s + request.waited_s,
                request.ttft_objective_s,
                max(least_sigma, row.sigma),
            )
            > threshold
            for row in inputs.candidates
        )

    def _receipt(
        self, record: RequestRecord, inputs: PlacementInputs, choice: Choice, open_count: int, now: float
    ) -> SchedulingDecision:
        chosen = choice.chosen
        assert chosen is not None  # noqa: S101 - only choices are receipted
        settings, policy = self.settings, self.policy
        return SchedulingDecision(
            request_id=record.request_id,
            epoch=record.epoch + 1,
            instance_id=chosen.instance_id,
            decision_time_s=now,
            queue_wait_s=now - record.arrival_s,
            scheduling_policy=settings.scheduling_policy,
            routing_strategy=settings.routing_strategy,
            load_balancer=settings.load_balancer,
            config_version=settings.version,
            reason=f"{policy.explain(record)}; {self.strategy.reason(inputs.request, chosen, choice.score)}",
            candidates=kept_scores(choice),
            candidate_count=open_count,
            policy_in_force=policy.in_force,
            inputs=kept_inputs(inputs, choice),
        )

    # -- gates -----------------------------------------------------------------------

    def settle_gate(self, instance: InstanceRecord, now: float) -> None:
        """Open an instance's gate, or close it until it has room for more prefill work.

        Work waits here while the engine has more than the window before it,
        and, under a pacing policy, while prefill has had so large a share of
        the engine's time that its decodes would miss their objective. With
        ``phi`` the share, their time per token is
        ``1 / (phi / t_prefill_step + (1 - phi) / t_decode_step)``; the bound on
        ``phi`` solves that for the objective.
        """
        load = instance.load
        if not load.kind.trusted or instance.in_flight_count == 0:
            self._fleet.open_gate(instance)
            return
        wait_s = load.backlog_s(now) - self.parameters["dispatch.prefill_window_s"]
        if self.policy.is_paced and load.decode_count:
            wait_s = max(wait_s, self._pacing_wait_s(instance, now))
        opens_s = now + wait_s
        # A wait too short for the clock to tell would have no end: its time is the present.
        if wait_s > 1e-9 and opens_s > now:
            self._fleet.close_gate(instance, opens_s)
        else:
            self._fleet.open_gate(instance)

    def _pacing_wait_s(self, instance: InstanceRecord, now: float) -> float:
        load = instance.load
        share = load.prefill_share(now)
        if share <= 0.05:
            return 0.0
        step = load.kind.model.parameters
        context = load.context_token_count(now)
        factor = load.tpot.factor(now)
        decode_s = step.decode_step_s(load.decode_count, context) * factor
        prefill_s = step.step_s(BATCH_TOKEN_COUNT, context) * factor
        objective_s = min(self.parameters["objectives.tpot_s"], instance.least_tpot_objective_s)
        # A share of what an engine has to spare: a slow one has less, and would else never be fed.
        spare_s = max(0.0, objective_s - decode_s)
        goal_s = decode_s + self.parameters["slo_aware.pacing_margin"] * spare_s
        if prefill_s <= goal_s or prefill_s <= decode_s:
            return 0.0
        bound = max(0.05, (1.0 / decode_s - 1.0 / goal_s) / (1.0 / decode_s - 1.0 / prefill_s))
        # Without prefill the share falls exponentially.
        return _PACING_TIME_S * math.log(share / bound) if share > bound else 0.0
