"""The instances that a request could go to, or wait for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sagecp.core.fleet import Fleet
from sagecp.core.instance_record import InstanceRecord
from sagecp.core.request import RequestRecord
from sagecp.core.types import InstanceState

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


class CandidateFinder:
    """Finds a request's candidates, and knows who waits for a better one.

    Args:
        fleet: The instances.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        # By model and awaited instance; those whose wait is over are left out when it is read.
        self._waiters: dict[str, dict[str, RequestRecord]] = {}

    # -- who could take it now -------------------------------------------------------

    def add_sought(
        self,
        record: RequestRecord,
        found: list[InstanceRecord],
        wanted: Sequence[str],
        matches: Mapping[str, int],
        kept_from: float,
    ) -> None:
        """Add open instances that a sample of a large fleet may lack: wanted ones, holders of the prompt.

        Args:
            record: The request.
            found: What there is already.
            wanted: Ids that the routing strategy asks for.
            matches: Holders of the prompt's start, longest first.
            kept_from: Instances with this token limit or more are kept for another request.
        """
        known = {instance.instance_id for instance in found}
        least = self._fleet.least_token_limit(record)
        for instance_id in [*wanted, *list(matches)[:HOLDER_CANDIDATE_LIMIT]]:
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

    def prefer_untried(self, record: RequestRecord, candidates: list[InstanceRecord]) -> list[InstanceRecord]:
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

    # -- who could take it soon ------------------------------------------------------

    def closed(self, record: RequestRecord, matches: Mapping[str, int], now: float) -> list[InstanceRecord]:
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

    def note_wait(self, record: RequestRecord, instance_id: str, until_s: float) -> None:
        """A request waits for a busy instance, until a time on the core's clock at most."""
        record.waits_for = instance_id
        record.wait_until_s = until_s
        if len(self._fleet) > WHOLE_FLEET_LIMIT:
            self._waiters.setdefault(record.model, {})[instance_id] = record

    def is_waiting(self, record: RequestRecord, now: float) -> bool:
        """Return whether a request waits for a busy instance, which still is."""
        if record.wait_until_s <= now:
            return False
        awaited = self._fleet.find(record.waits_for)
        return awaited is not None and awaited.gate_closed and awaited.state is InstanceState.READY

    def _awaited(self, model: str, now: float) -> dict[str, RequestRecord]:
        """Return which instances of a large fleet requests of a model wait for, with the requests."""
        waiters = self._waiters.get(model, {})
        for instance_id, record in list(waiters.items()):
            if not (record.queued and record.waits_for == instance_id and self.is_waiting(record, now)):
                del waiters[instance_id]
        if not waiters:
            self._waiters.pop(model, None)
        return waiters
