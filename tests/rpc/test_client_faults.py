"""The client against a server that does exactly what a test says: lost streams, refusals, overlaps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from sagecp import client
from sagecp.client import NO_RETRY, RetryPolicy, SageClient
from sagecp.client.retry import RetryBudget
from sagecp.core.errors import ErrorReason
from sagecp.core.types import RequestState
from sagecp.v1 import fleet_service_pb2, fleet_service_pb2_grpc, inference_service_pb2_grpc, request_pb2
from sagecp.v1 import inference_service_pb2 as pb

FAST = RetryPolicy(base_s=0.001, max_s=0.01)
QUEUED = request_pb2.REQUEST_STATE_QUEUED
Step = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


class Scripted(
    inference_service_pb2_grpc.InferenceServiceServicer, fleet_service_pb2_grpc.FleetServiceServicer
):
    """Follows one step per call, and keeps what it was asked."""

    def __init__(self, *steps: Step) -> None:
        self._steps = list(steps)
        self.asked: list[Any] = []
        self.metadata: list[dict[str, Any]] = []

    async def _answer(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        return await self._steps.pop(0)(request, context)

    async def Submit(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer(request, context)

    async def Stream(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await self._answer(request, context)

    async def Generate(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await self._answer(request, context)

    async def DeregisterInstance(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer(request, context)


@contextlib.asynccontextmanager
async def scripted(
    *steps: Step, retry: RetryPolicy = FAST, **options: Any
) -> AsyncIterator[tuple[SageClient, Scripted]]:
    servicer = Scripted(*steps)  # type: ignore[abstract]  # the rest answers UNIMPLEMENTED
    server = grpc.aio.server()
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with SageClient(f"127.0.0.1:{port}", retry=retry, **options) as connected:
            yield connected, servicer
    finally:
        await server.stop(None)


def fails(
    code: grpc.StatusCode, reason: str = "", retry_after_s: float | None = None, message: str = "as scripted"
) -> Step:
    """Return a step that refuses."""

    async def step(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        status = status_pb2.Status(code=code.value[0], message=message)
        if reason:
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="sagecp"))
        if retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(round(retry_after_s * 1e9))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        full = rpc_status.to_status(status)
        await context.abort(full.code, full.details, full.trailing_metadata)

    return step


def chunk(first: int, text: str, count: int = 1, **fields: Any) -> dict[str, Any]:
    return {"chunk": pb.TokenChunk(first_token_index=first, token_count=count, text=text, epoch=1, **fields)}


def terminal(count: int, state: str = "SUCCEEDED", **fields: Any) -> dict[str, Any]:
    number = request_pb2.RequestState.Value(f"REQUEST_STATE_{state}")
    request = request_pb2.Request(request_id="r", state=number)
    return {
        "terminal": pb.StreamTerminal(
            state=number, token_count=count, finish_reason="stop", request=request, **fields
        )
    }


def sends(*events: dict[str, Any], then: Step | None = None) -> Step:
    """Return a step that opens a stream, sends events, and ends as ``then`` says, or well."""

    async def step(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        kind = pb.GenerateResponse if isinstance(request, pb.GenerateRequest) else pb.StreamResponse
        await context.write(kind(opened=pb.StreamOpened(request_id="r")))
        for event in events:
            await context.write(kind(**event))
        if then is not None:
            await then(request, context)

    return step


async def accepts(request: pb.SubmitRequest, _context: Any) -> pb.SubmitResponse:
    return pb.SubmitResponse(
        created=True, request=request_pb2.Request(request_id=request.spec.request_id, state=QUEUED)
    )


LOST = fails(grpc.StatusCode.UNAVAILABLE)


async def read(stream: client.TokenStream) -> str:
    return "".join([piece.text async for piece in stream])


async def test_a_submit_is_repeated_under_the_same_id() -> None:
    async with scripted(LOST, LOST, accepts) as (connected, servicer):
        submitted = await connected.submit("hello")
    assert [request.spec.request_id for request in servicer.asked] == [submitted.request_id] * 3
    assert submitted.created
    assert submitted.status.state is RequestState.QUEUED


async def test_attempts_are_bounded() -> None:
    async with scripted(*[LOST] * 9) as (connected, servicer):
        with pytest.raises(client.UnavailableError, match="as scripted"):
            await connected.submit("hello")
    assert len(servicer.asked) == FAST.max_attempt_count


async def test_a_refusal_with_a_time_is_waited_for() -> None:
    full = fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.05)
    async with scripted(full, accepts) as (connected, servicer):
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        await connected.submit("hello")
        assert loop.time() - start_s >= 0.05
    assert len(servicer.asked) == 2


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", client.InvalidArgumentError),
        (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", client.NotFoundError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", client.OverloadedError),
        (grpc.StatusCode.INTERNAL, "INTERNAL", client.ServerError),
        (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", client.AccessError),
    ],
)
async def test_what_is_wrong_stays_wrong_and_is_not_repeated(
    code: grpc.StatusCode, reason: str, kind: type[client.ClientError]
) -> None:
    async with scripted(fails(code, reason), accepts) as (connected, servicer):
        with pytest.raises(kind) as caught:
            await connected.submit("hello", request_id="mine")
        assert (caught.value.code, caught.value.reason) == (code, ErrorReason[reason])
        assert caught.value.request_id == "mine"
    assert len(servicer.asked) == 1


async def test_what_may_run_once_only_is_not_repeated() -> None:
    async with scripted(LOST, LOST) as (connected, servicer):
        with pytest.raises(client.UnavailableError):
            await connected.deregister_instance("i")
    assert len(servicer.asked) == 1
    assert isinstance(servicer.asked[0], fleet_service_pb2.DeregisterInstanceRequest)


async def test_an_outage_uses_up_the_budget() -> None:
    async with scripted(*[LOST] * 99) as (connected, servicer):
        connected.connection._budget = RetryBudget(capacity=4)
        for _ in range(5):
            with pytest.raises(client.UnavailableError):
                await connected.submit("hello")
    assert len(servicer.asked) == 5 + 4


async def test_an_overloaded_server_is_left_alone() -> None:
    full = fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 60.0)
    async with scripted(*[full] * 300) as (connected, servicer):
        for _ in range(300):
            with pytest.raises(client.OverloadedError):
                await connected.submit("hello")
    assert 10 < len(servicer.asked) < 100


async def test_a_stream_goes_on_where_it_was_lost() -> None:
    steps = (
        sends(chunk(0, "a"), chunk(1, "bc", 2), then=LOST),
        LOST,
        sends(chunk(3, "d"), then=LOST),
        sends(chunk(4, "e", finish_reason="stop"), terminal(5)),
    )
    async with scripted(*steps) as (connected, servicer):
        stream = connected.stream("r")
        assert await read(stream) == "abcde"
        assert stream.end is not None
        assert stream.end.token_count == stream.next_token_index == 5
    assert [request.from_token_index for request in servicer.asked] == [0, 3, 3, 4]


async def test_progress_renews_the_attempts() -> None:
    steps = [sends(chunk(index, "x"), then=LOST) for index in range(8)]
    async with scripted(*steps, sends(terminal(8))) as (connected, servicer):
        assert await read(connected.stream("r")) == "x" * 8
    assert len(servicer.asked) == 9


async def test_without_progress_the_stream_is_given_up_with_its_position() -> None:
    steps = (sends(chunk(0, "ab", 2), then=LOST), *[LOST] * 2000)
    async with scripted(*steps, retry=RetryPolicy(base_s=0.001, max_s=0.01, resume_s=0.3)) as (
        connected,
        servicer,
    ):
        stream = connected.stream("r")
        with pytest.raises(client.StreamLostError) as caught:
            await read(stream)
    assert caught.value.next_token_index == 2
    assert caught.value.request_id == "r"
    assert len(servicer.asked) > FAST.max_attempt_count
    assert {request.from_token_index for request in servicer.asked[1:]} == {2}


async def test_streams_that_an_outage_breaks_are_all_resumed_whatever_the_budget() -> None:
    count = 30
    steps = [sends(chunk(0, "a"), then=LOST)] * count
    steps += [LOST] * count
    steps += [sends(chunk(1, "b"), terminal(2))] * count
    async with scripted(*steps) as (connected, _):
        connected.connection._budget = RetryBudget(capacity=0)
        streams = [connected.stream("r") for _ in range(count)]
        opened = [await anext(stream) for stream in streams]
        texts = await asyncio.gather(*(read(stream) for stream in streams))
    assert [chunk.text for chunk in opened] == ["a"] * count
    assert texts == ["b"] * count


async def test_without_retries_a_lost_stream_is_not_resumed() -> None:
    async with scripted(sends(chunk(0, "a"), then=LOST), retry=NO_RETRY) as (connected, servicer):
        with pytest.raises(client.StreamLostError):
            await read(connected.stream("r"))
    assert len(servicer.asked) == 1


async def test_a_request_that_runs_long_counts_as_accepted_from_its_start() -> None:
    full = fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 60.0)
    async with scripted(*[sends(chunk(0, "a"), chunk(1, "b"))] * 40, *[full] * 40) as (connected, servicer):
        streams = [connected.generate("hello") for _ in range(40)]
        for stream in streams:
            await anext(stream)
        for _ in range(40):
            with pytest.raises(client.OverloadedError, match="as scripted"):
                await connected.submit("hello")
    assert len(servicer.asked) == 80, "half gets through: nothing is kept back"


async def test_what_only_this_request_cannot_have_is_no_overload() -> None:
    hopeless = fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "INFEASIBLE")
    async with scripted(*[hopeless] * 100) as (connected, servicer):
        for _ in range(100):
            with pytest.raises(client.OverloadedError, match="as scripted"):
                await connected.submit("hello")
    assert len(servicer.asked) == 100


async def test_a_stream_that_just_ends_is_lost() -> None:
    async with scripted(sends(chunk(0, "ab", 2))) as (connected, _):
        with pytest.raises(client.StreamLostError, match="without saying") as caught:
            await read(connected.stream("r"))
    assert caught.value.next_token_index == 2


async def test_a_server_that_forgot_the_request_means_that_the_stream_is_lost() -> None:
    forgotten = fails(grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
    async with scripted(sends(chunk(0, "a"), then=LOST), forgotten) as (connected, _):
        with pytest.raises(client.StreamLostError, match="does not know the request any more"):
            await read(connected.stream("r"))
    async with scripted(forgotten) as (connected, _):
        with pytest.raises(client.NotFoundError):
            await read(connected.stream("r"))


async def test_an_overlap_is_cut_and_a_repetition_dropped() -> None:
    steps = (
        sends(chunk(0, "ab", 2, token_ids=[1, 2]), chunk(2, "c", token_ids=[3]), then=LOST),
        sends(
            chunk(0, "ab", 2, token_ids=[1, 2]),
            chunk(2, "cde", 3, token_ids=[3, 4, 5]),
            chunk(5, "f", token_ids=[6]),
            terminal(6),
        ),
    )
    async with scripted(*steps) as (connected, _):
        pieces = [piece async for piece in connected.stream("r")]
    assert "".join(piece.text for piece in pieces) == "abcdef"
    assert [token_id for piece in pieces for token_id in piece.token_ids] == [1, 2, 3, 4, 5, 6]
    assert [piece.first_token_index for piece in pieces] == [0, 2, 3, 5]


@pytest.mark.parametrize("resumed", [chunk(3, "d"), chunk(1, "xyz", 3), chunk(0, "aXcd", 4)])
async def test_a_gap_or_another_text_is_never_passed_on(resumed: dict[str, Any]) -> None:
    steps = (sends(chunk(0, "ab", 2), then=LOST), sends(resumed, terminal(4)))
    async with scripted(*steps) as (connected, _):
        stream = connected.stream("r")
        assert (await anext(stream)).text == "ab"
        with pytest.raises(client.StreamLostError, match="cannot be resumed"):
            await anext(stream)


async def test_a_chunk_that_holds_the_index_asked_for_comes_whole() -> None:
    async with scripted(sends(chunk(4, "efg", 3), chunk(7, "h"), terminal(8))) as (connected, _):
        assert await read(connected.stream("r", from_token_index=5)) == "efgh"


async def test_generate_is_repeated_only_before_it_opened() -> None:
    steps = (LOST, sends(chunk(0, "a"), then=LOST), sends(terminal(1)))
    async with scripted(*steps) as (connected, servicer):
        with pytest.raises(client.StreamLostError):
            await read(connected.generate("hello"))
    assert [type(request) for request in servicer.asked] == [pb.GenerateRequest] * 2
    assert servicer.asked[0].spec == servicer.asked[1].spec
    assert not servicer.asked[0].detach_on_disconnect


async def test_a_detached_generate_goes_on_with_stream() -> None:
    steps = (sends(chunk(0, "a"), then=LOST), sends(chunk(1, "b"), terminal(2)))
    async with scripted(*steps) as (connected, servicer):
        assert await read(connected.generate("hello", detach=True)) == "ab"
    assert servicer.asked[0].detach_on_disconnect
    assert (servicer.asked[1].request_id, servicer.asked[1].from_token_index) == ("r", 1)


async def test_a_request_that_failed_is_not_tried_again() -> None:
    failure = request_pb2.Failure(
        reason=ErrorReason.ENGINE_FAILED.value,  # type: ignore[arg-type]  # the numbers are equal
        message="the engine died",
        code=code_pb2.UNAVAILABLE,
    )
    ended = sends(chunk(0, "a"), terminal(1, "FAILED", failure=failure), then=LOST)
    async with scripted(ended, accepts) as (connected, servicer):
        stream = connected.generate("hello", detach=True)
        with pytest.raises(client.RequestFailedError, match="the engine died") as caught:
            await read(stream)
    assert caught.value.state is RequestState.FAILED
    assert caught.value.reason is ErrorReason.ENGINE_FAILED
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert len(servicer.asked) == 1


async def test_the_token_travels_with_every_call() -> None:
    async with scripted(accepts, sends(terminal(0)), token="secret") as (connected, servicer):
        await connected.submit("hello")
        await read(connected.stream("r"))
    assert [each["authorization"] for each in servicer.metadata] == ["Bearer secret"] * 2


@pytest.mark.parametrize("target", ["10.0.0.1:50051", "cp.example.com:50051"])
def test_a_token_never_crosses_a_network_in_plaintext(target: str) -> None:
    with pytest.raises(ValueError, match="plaintext"):
        SageClient(target, token="secret")


def test_a_url_is_no_address() -> None:
    with pytest.raises(ValueError, match="give host and port"):
        SageClient("http://127.0.0.1:50051")


async def test_nobody_there() -> None:
    async with SageClient("127.0.0.1:1", retry=NO_RETRY) as connected:
        with pytest.raises(client.UnavailableError) as caught:
            await connected.get_status()
    assert caught.value.reason is None


async def test_a_timeout_bounds_all_tries_together() -> None:
    async def hangs(_request: Any, _context: Any) -> None:
        await asyncio.Event().wait()

    patient = RetryPolicy(max_attempt_count=50, base_s=0.05)
    async with scripted(LOST, hangs, retry=patient, timeout_s=0.4) as (connected, _):
        with pytest.raises(client.DeadlineError):
            await connected.submit("hello")
