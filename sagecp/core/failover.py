"""What becomes of a request that lost an attempt: it goes on elsewhere, or it fails and says why."""

from __future__ import annotations

from sagecp.core.errors import ErrorReason, Failure
from sagecp.core.events import RestoredRequest
from sagecp.core.request import RequestRecord
from sagecp.core.types import FailoverMode

ENGINE_KILL_LIMIT = 2
"""A request that was at hand when so many engines died is taken for the cause."""


def ending_of(
    record: RequestRecord,
    failure: Failure,
    *,
    retryable: bool,
    cannot_continue: str,
    max_attempt_count: int,
) -> Failure | None:
    """Return why a request ends with the attempt it lost, or ``None``: it goes on.

    A request that has delivered output goes on after it: another engine is given
    the prompt and that output. Where this would not give what one engine would have
    given, the request starts again only if nothing was delivered: what a reader has
    seen never changes.

    Args:
        record: The request, with the loss counted.
        failure: Why the attempt was lost.
        retryable: Another attempt could succeed.
        cannot_continue: Why it could not go on after the output there is; ``""``: it could.
        max_attempt_count: Attempts that a request may lose.
    """
    mode = record.metadata.failover_mode
    if not retryable:
        return failure
    if record.engine_kill_count >= ENGINE_KILL_LIMIT:
        return Failure(
            ErrorReason.POISON_REQUEST,
            f"{record.engine_kill_count} engines died of the request and it is not tried again: "
            f"{failure.message}",
        )
    if mode is FailoverMode.FAIL:
        return failure
    if record.lost_attempt_count >= max_attempt_count:
        return Failure(
            failure.reason, f"{failure.message} (attempt {record.lost_attempt_count} of {max_attempt_count})"
        )
    if not record.has_output:
        return None
    why = "its failover mode is RESTART" if mode is FailoverMode.RESTART else cannot_continue
    if not why:
        return None
    return Failure(
        failure.reason,
        f"{failure.message}; output was delivered already, and the request cannot go on after it elsewhere: "
        f"{why}",
    )


def restored_record(restored: RestoredRequest, sequence: int) -> RequestRecord:
    """Return the record of a request that was accepted before a restart."""
    record = RequestRecord(
        restored.metadata, restored.model, sequence, restored.arrival_s, restored.size_bytes
    )
    record.epoch = restored.epoch
    record.excluded_instance_ids |= frozenset(restored.lost_instance_ids)
    record.lost_attempt_count = restored.lost_attempt_count
    record.engine_kill_count = restored.engine_kill_count
    record.has_output = restored.has_output
    return record


def ending_after_restart(
    record: RequestRecord, restored: RestoredRequest, max_attempt_count: int
) -> Failure | None:
    """Return why a restored request ends with the control plane that ran it, or ``None``: it goes on."""
    if restored.epoch == 0:
        return None
    return ending_of(
        record,
        Failure(ErrorReason.SHUTTING_DOWN, "the control plane was restarted while the request ran"),
        retryable=True,
        cannot_continue=restored.cannot_continue,
        # A restart is not the request's loss.
        max_attempt_count=max_attempt_count + 1,
    )
