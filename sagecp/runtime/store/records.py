"""What is written down, one record for each thing that happened to a durable request or an instance.

A request's records say everything that a restart needs, in whatever order they
are read: the accepted request, its dispatches and losses, its prompt as token
ids, its output by token index, and its end.
"""

from __future__ import annotations

import msgspec

from sagecp.runtime.engines.base import EngineDelta


class Moment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A point in time that another process can place on its own clock.

    Attributes:
        clock_s: Monotonic seconds; comparable while the machine is not restarted.
        wall_s: Unix seconds, for after that.
        boot_id: Names the machine's run, or ``""`` where it is not known.
    """

    clock_s: float
    wall_s: float
    boot_id: str = ""


class RequestAccepted(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A durable request was accepted.

    Attributes:
        request_id: Its id.
        tenant_id: Whose it is.
        sequence: Order of creation, unique.
        fingerprint: Hash of what was asked.
        model: Served name that it waits for.
        moment: When it arrived.
        metadata: What was asked; see :mod:`sagecp.runtime.store.codec`.
    """

    request_id: str
    tenant_id: str
    sequence: int
    fingerprint: bytes
    model: str
    moment: Moment
    metadata: bytes


class AttemptDispatched(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """An attempt is about to be made. ``incarnation`` is the instance's."""

    request_id: str
    epoch: int
    instance_id: str
    incarnation: int
    moment: Moment


class PromptTokenized(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """An engine said which token ids the prompt has: little-endian, four bytes each."""

    request_id: str
    token_ids: bytes


class OutputProduced(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Pieces of output, in order.

    Attributes:
        request_id: Of which request.
        epoch: By which attempt.
        first_index: Index of the first token among all of the request's.
        pieces: As the engine gave them.
    """

    request_id: str
    epoch: int
    first_index: int
    pieces: tuple[EngineDelta, ...]


class AttemptLost(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """An attempt ended and the request goes on.

    Attributes:
        request_id: Of which request.
        epoch: The attempt.
        moment: When.
        reason: Name of the cause (an ``ErrorReason``).
        message: The sentence for a person.
        lost_attempt_count: Attempts lost by now, but for those that were moved on purpose.
        engine_kill_count: Engines that died of the request by now, as far as can be told.
    """

    request_id: str
    epoch: int
    moment: Moment
    reason: str
    message: str
    lost_attempt_count: int = 0
    engine_kill_count: int = 0


class RequestEnded(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A durable request reached its terminal state. Its other records are not needed any more.

    Attributes:
        request_id: Its id.
        tenant_id: Whose it is.
        sequence: As accepted.
        fingerprint: As accepted.
        end_wall_s: When, in Unix seconds.
        status: Everything that is told of it, usage included; see the codec.
        pieces: Its whole output.
    """

    request_id: str
    tenant_id: str
    sequence: int
    fingerprint: bytes
    end_wall_s: float
    status: bytes
    pieces: tuple[EngineDelta, ...]


class InstanceKept(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """An instance is registered, or changed.

    Attributes:
        instance_id: Its id.
        incarnation: Of its agent.
        draining: There is an order to drain it.
        specification: What it is; see the codec.
        sleep_level: Its engine is to sleep once it is drained; 0: it is not.
        lora_adapters: What it was told to have loaded, name and path; ``None``: nothing.
    """

    instance_id: str
    incarnation: int
    draining: bool
    specification: bytes
    sleep_level: int = 0
    lora_adapters: tuple[tuple[str, str], ...] | None = None


class InstanceDropped(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """An instance is registered no more."""

    instance_id: str


RequestRecordKind = RequestAccepted | AttemptDispatched | PromptTokenized | OutputProduced | AttemptLost
Record = RequestRecordKind | RequestEnded | InstanceKept | InstanceDropped
