"""Reading a stream of output as the contract describes it, with every promise checked on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from sagecp.v1 import inference_service_pb2, inference_service_pb2_grpc, request_pb2

Event = inference_service_pb2.GenerateResponse | inference_service_pb2.StreamResponse


@dataclass
class Output:
    """What a stream said."""

    request_id: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    stop_reason: str = ""
    notices: list[inference_service_pb2.StreamNotice] = field(default_factory=list)
    openai_events: list[dict[str, Any]] = field(default_factory=list)
    chunk_count: int = 0
    token_count: int = 0
    terminal: inference_service_pb2.StreamTerminal | None = None

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    @property
    def end(self) -> inference_service_pb2.StreamTerminal:
        assert self.terminal is not None, "the stream ended without its terminal message"
        return self.terminal


def read(events: Iterable[Event], *, from_token_index: int = 0, output: Output | None = None) -> Output:
    """Read a stream to its end; whatever breaks a promise of the contract fails here.

    ``output`` keeps what was read when the call ends with an error.
    """
    output = output or Output()
    next_index: int | None = None
    for event in events:
        assert output.terminal is None, "something followed the terminal message"
        kind = event.WhichOneof("event")
        if kind == "opened":
            assert output.chunk_count == 0
            output.request_id = event.opened.request_id
        elif kind == "chunk":
            chunk = event.chunk
            assert output.request_id, "the first message of a stream says which request it is"
            if next_index is None:
                # A chunk holding the index asked for may begin before it.
                assert chunk.first_token_index <= from_token_index
            else:
                assert chunk.first_token_index == next_index, "token indices have a gap or overlap"
            next_index = chunk.first_token_index + chunk.token_count
            if chunk.token_ids:
                assert len(chunk.token_ids) == chunk.token_count
            index = chunk.choice_index
            # What the engine says at the very end, such as the usage, belongs to no choice.
            assert index not in output.finish_reasons or not (chunk.text or chunk.token_count), (
                "a choice went on after its finish reason"
            )
            output.chunk_count += 1
            output.token_count = next_index
            output.texts[index] = output.texts.get(index, "") + chunk.text
            output.token_ids.setdefault(index, []).extend(chunk.token_ids)
            output.openai_events += [json.loads(each) for each in chunk.openai_events]
            if chunk.finish_reason:
                output.finish_reasons[index] = chunk.finish_reason
                output.stop_reason = chunk.stop_reason
        elif kind == "notice":
            output.notices.append(event.notice)
        elif kind == "terminal":
            output.terminal = event.terminal
            assert event.terminal.token_count == (next_index or 0) or from_token_index
    assert output.terminal is not None, "a stream must end with a terminal message"
    return output


def read_rest(events: Iterable[Event], output: Output) -> None:
    """Read what follows in a stream of which a part was read already; keep its terminal message."""
    for event in events:
        assert output.terminal is None, "something followed the terminal message"
        if event.HasField("terminal"):
            output.terminal = event.terminal


def generate(stub: inference_service_pb2_grpc.InferenceServiceStub, spec: request_pb2.RequestSpec) -> Output:
    """Run a request that is to succeed."""
    output = read(stub.Generate(inference_service_pb2.GenerateRequest(spec=spec), timeout=60))
    assert output.end.state == request_pb2.REQUEST_STATE_SUCCEEDED
    assert not output.end.HasField("failure")
    assert output.end.finish_reason == output.finish_reasons[0]
    return output


@dataclass
class Refusal:
    """An RPC's error with its details."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


def refusal(error: grpc.RpcError) -> Refusal:
    """Read an error as a client would: the status and its google.rpc details."""
    assert isinstance(error, grpc.Call)
    found = Refusal(error.code(), error.details() or "")
    for entry in error.trailing_metadata() or ():
        if entry.key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(entry.value)
        assert status.code == found.code.value[0]
        for detail in status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                assert info.domain == "sagecp"
                found.reason = info.reason
                found.metadata = dict(info.metadata)
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest.FromString(detail.value)
                found.fields = {each.field: each.description for each in bad.field_violations}
    return found
