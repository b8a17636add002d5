"""`InferenceService`: for those who want tokens."""

from __future__ import annotations

from typing import Any

import grpc

from sagecp.core.errors import FieldViolation, InvalidRequestError, NotImplementedYetError
from sagecp.core.types import RequestMetadata, RequestState
from sagecp.rpc.convert.common import check_enum
from sagecp.rpc.convert.request import request_from_proto, request_to_proto
from sagecp.rpc.convert.scheduling import decision_to_proto
from sagecp.rpc.reader_watch import ReaderWatch
from sagecp.rpc.servicers.paging import not_our_token, page_size, page_token, position_of
from sagecp.rpc.servicers.relay import relay_output
from sagecp.runtime.manager import SUBMIT_POSITION_QUEUE_LIMIT, ControlPlaneManager, new_request_id
from sagecp.runtime.requests import RequestHandle
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import inference_service_pb2_grpc, request_pb2

# Until credentials exist, every caller belongs to one tenant.
DEFAULT_TENANT = "default"

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Answers `InferenceService` from a manager.

    Streaming methods write to the context instead of yielding: a coroutine can
    be wrapped without a price per message.
    """

    def __init__(self, manager: ControlPlaneManager, watch: ReaderWatch) -> None:
        self._manager = manager
        self._watch = watch

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        """Accept a request."""
        metadata, fresh = _asked(request.spec)
        handle, created = await self._manager.accept(metadata, durable=True, checked=True, fresh_id=fresh)
        status = self._manager.status_of(handle, SUBMIT_POSITION_QUEUE_LIMIT, with_cost=False)
        return pb.SubmitResponse(request=request_to_proto(status), created=created)

    async def Stream(self, request: pb.StreamRequest, context: Context) -> None:  # type: ignore[override]
        """Send the output of a request from an index on."""
        handle = await self._handle(request.request_id)
        ended = False
        try:
            await relay_output(
                self._manager, handle, self._watch, request.from_token_index, context, pb.StreamResponse
            )
            ended = True
        finally:
            if request.cancel_on_disconnect and not ended:
                await self._leave(handle)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Accept a request and send its output."""
        metadata, fresh = _asked(request.spec)
        detached = request.detach_on_disconnect
        handle, created = await self._manager.accept(metadata, durable=False, checked=True, fresh_id=fresh)
        # Prompts may be large, and streams are many and long: the request's record has what it needs.
        del request, metadata
        ended = False
        try:
            await relay_output(self._manager, handle, self._watch, 0, context, pb.GenerateResponse)
            ended = True
        finally:
            # Only the call that started a request may end it by leaving.
            if created and not detached and not ended:
                await self._leave(handle)

    async def _leave(self, handle: RequestHandle) -> None:
        if not handle.state.is_terminal:
            await self._manager.cancel_request(handle.request_id, "the caller left the stream")

    async def GetRequest(self, request: pb.GetRequestRequest, context: Context) -> pb.GetRequestResponse:
        """Return what is known of a request."""
        handle = await self._handle(request.request_id)
        return pb.GetRequestResponse(request=request_to_proto(self._manager.status_of(handle)))

    async def ListRequests(
        self, request: pb.ListRequestsRequest, context: Context
    ) -> pb.ListRequestsResponse:
        """Return a page of requests, newest first."""
        violations: list[FieldViolation] = []
        states = {
            RequestState(number)
            for number in request.states
            if check_enum("states", number, request_pb2.RequestState.DESCRIPTOR, violations)
        }
        size = page_size(request.page_size, violations)
        before = _sequence_of(request.page_token, violations)
        if violations:
            raise InvalidRequestError(violations)
        response = pb.ListRequestsResponse()
        last = 0
        for handle in self._manager.requests.newest_first():
            record = handle.record
            if (
                (before and handle.sequence >= before)
                or (states and handle.state not in states)
                or (request.model and record.model != request.model)
                or (request.instance_id and record.instance_id != request.instance_id)
                or (request.user_id and record.metadata.user_id != request.user_id)
                or (request.session_id and record.metadata.session_id != request.session_id)
            ):
                continue
            if len(response.requests) == size:
                response.next_page_token = page_token("request", str(last))
                break
            # Without the position in the queue, which costs a walk over it each.
            response.requests.append(request_to_proto(self._manager.status_of(handle, 0)))
            last = handle.sequence
        return response

    async def CancelRequest(
        self, request: pb.CancelRequestRequest, context: Context
    ) -> pb.CancelRequestResponse:
        """Stop a request."""
        handle = await self._handle(request.request_id)
        status, cancelled = await self._manager.cancel_request(handle.request_id, request.cause[:256])
        return pb.CancelRequestResponse(request=request_to_proto(status), cancelled=cancelled)

    async def ExplainRequest(
        self, request: pb.ExplainRequestRequest, context: Context
    ) -> pb.ExplainRequestResponse:
        """Return the receipts of a request's dispatches."""
        handle = await self._handle(request.request_id)
        manager = self._manager
        return pb.ExplainRequestResponse(
            request=request_to_proto(manager.status_of(handle)),
            decisions=[
                decision_to_proto(decision, manager.wall_time(decision.decision_time_s))
                for decision in manager.decisions_of(handle)
            ],
        )

    async def Session(self, request_iterator: object, context: Context) -> None:  # type: ignore[override]
        """Carry many requests over one stream. Not in this version."""
        raise NotImplementedYetError(
            "Session is not implemented by this version; use Submit, Stream and Generate"
        )

    async def _handle(self, request_id: str) -> RequestHandle:
        if not request_id:
            raise InvalidRequestError([FieldViolation("request_id", "is empty; name the request")])
        return await self._manager.find_request(DEFAULT_TENANT, request_id)


def _asked(spec: request_pb2.RequestSpec) -> tuple[RequestMetadata, bool]:
    """Return what a user asks for, validated and with an id; and whether that was made here."""
    if spec.request_id:
        return request_from_proto(spec, DEFAULT_TENANT), False
    return request_from_proto(spec, DEFAULT_TENANT, new_request_id()), True


def _sequence_of(token: str, violations: list[FieldViolation]) -> int:
    """Return the order of creation that a page token names; 0 for no token."""
    position = position_of("request", token, violations)
    try:
        return int(position or 0)
    except ValueError:
        violations.append(not_our_token())
        return 0
