"""Which waiting request goes where, now."""

from __future__ import annotations

import enum
import heapq
import math
import random
from collections.abc import Callable, Mapping

from sagecp.core.candidates import OPEN_CANDIDATE_LIMIT, CandidateFinder
from sagecp.core.choice import Choice, choose
from sagecp.core.fleet import Fleet
from sagecp.core.hopelessness import is_hopeless, is_overdue
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.placement import PlacementInputs
from sagecp.core.placement_rows import candidate_row, request_row
from sagecp.core.plan_preference import plan_mismatches
from sagecp.core.policies.base import PolicyContext, PolicyVerdict, SchedulingPolicy
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.prefill_gates import PrefillGates
from sagecp.core.prefix_index import PrefixIndex
from sagecp.core.receipts import kept_inputs, kept_scores
from sagecp.core.request import RequestRecord
from sagecp.core.request_queue import RequestQueue
from sagecp.core.router.registry import make_strategy
from sagecp.core.service_books import ServiceBooks
from sagecp.core.settings import SchedulingSettings
from sagecp.core.types import RequestPriority, SchedulingDecision
from sagecp.core.waiting_line import WaitingLine

# Most requests of a model that others pass in one dispatch because they wait for a better
# instance: the bound on what a fleet with a failing engine costs each event.
STEP_OVER_LIMIT = 32
# Most requests that one dispatch demotes; later heads go out as they are. After a standstill
# the whole queue may be hopeless, and to find that at once would stop everything else.
DEMOTION_LIMIT = 64

# Rank of a head that is compared with none.
_ONLY = (0.0, 0)

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
        gates: Which of them get more work.
        queue: What waits.
        index: Who holds the start of which prompt.
        books: What each tenant was served.
        generator: Where chance comes from.
        start: Carries a decision out.
    """

    def __init__(
        self,
        fleet: Fleet,
        gates: PrefillGates,
        queue: RequestQueue,
        index: PrefixIndex,
        books: ServiceBooks,
        generator: random.Random,
        start: Start,
    ) -> None:
        self._fleet = fleet
        self._gates = gates
        self._queue = queue
        self._index = index
        self._books = books
        self._random = generator
        self._start = start
        self._membership_version = -1
        # By model, for one dispatch: instances with this token limit or more are kept for a
        # request too long for the others, or what is passed would never have its turn.
        self._kept_from: dict[str, float] = {}
        self._candidates = CandidateFinder(fleet)
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
        self._gates.configure(settings.values, is_paced=self.policy.is_paced)
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
            self._gates.settle(instance, now)
        waiting = [(model, line) for model, line in queue.lines() if fleet.is_open(model) and len(line)]
        if not waiting:
            return
        if self._membership_version != fleet.membership_version:
            self._membership_version = fleet.membership_version
            self.strategy.note_fleet(sorted(instance.instance_id for instance in fleet))
        self._kept_from.clear()
        # With one line there is nothing to compare: ranks cost as much as heads.
        is_one = len(waiting) == 1
        heads = [(_ONLY if is_one else line.rank(now), model, line) for model, line in waiting]
        heapq.heapify(heads)
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
            if len(line) and fleet.is_open(model):
                heapq.heappush(heads, (_ONLY if is_one else line.rank(now), model, line))
        for line in stepped.values():
            line.step_back()

    def _consider(
        self, record: RequestRecord, line: WaitingLine, now: float, *, may_demote: bool
    ) -> _Verdict:
        if self._candidates.is_waiting(record, now):
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
        usable = self._candidates.prefer_untried(record, open_instances)
        # Before anything is looked up: after a standstill the whole queue is overdue.
        if may_demote and usable and is_overdue(record, self.parameters, now):
            line.demote(record)
            return _Verdict.DEMOTED
        matches = self._index.match(record.digest.block_hashes) if record.digest.block_hashes else {}
        if len(open_instances) == OPEN_CANDIDATE_LIMIT:
            wanted = self.strategy.wants(record)
            self._candidates.add_sought(record, open_instances, wanted, matches, kept_from)
            usable = self._candidates.prefer_untried(record, open_instances)
        if not usable:
            return _Verdict.PASSED
        # How long the answer gets is a guess: a preference, and nothing to wait for.
        expected = record.expected_token_count
        usable = [instance for instance in usable if instance.token_limit >= expected] or usable
        instances = list(usable)
        if policy.is_patient and self.strategy.is_loss:
            instances += self._candidates.closed(record, matches, now)
        inputs = self._observe(record, instances, len(usable), matches, now)
        if may_demote and is_hopeless(inputs):
            line.demote(record)
            return _Verdict.DEMOTED
        choice = choose(self.strategy, policy, inputs)
        if choice.chosen is None:
            best = choice.best
            self._candidates.note_wait(record, best.instance_id, now + best.opens_in_s)
            return _Verdict.PASSED
        instance = self._fleet.get(choice.chosen.instance_id)
        self._start(record, instance, self._receipt(record, inputs, choice, len(usable), now), now)
        return _Verdict.STARTED

    def _leave_waiting(self, record: RequestRecord) -> _Verdict:
        """Let others pass a request without room, but only to instances that could never hold it."""
        model, least = record.model, self._fleet.least_token_limit(record)
        kept_from = min(least, self._kept_from.get(model, math.inf))
        if not self._fleet.has_open_below(model, kept_from):
            return _Verdict.BLOCKED
        self._kept_from[model] = kept_from
        return _Verdict.PASSED

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
            candidate_row(
                instance,
                min(most_cached, matches.get(instance.instance_id, 0) * block_tokens) if matches else 0,
                0.0 if extras is None else extras[number],
                now,
                is_open=number < open_count,
                plan_mismatch=0 if mismatches is None else mismatches[number],
            )
            for number, instance in enumerate(instances)
        )
        return PlacementInputs(request_row(record, now), rows, self.parameters)

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
