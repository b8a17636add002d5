"""Stopping a request stops the engine's work for it, at once and by every way of leaving."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from sagecp.v1 import inference_service_pb2, inference_service_pb2_grpc, request_pb2
from tests.e2e.conftest import MODEL, Engine
from tests.e2e.reading import Output, read, read_rest, refusal
from tests.support.processes import eventually

Inference = inference_service_pb2_grpc.InferenceServiceStub


def long_spec() -> request_pb2.RequestSpec:
    """Would run for about ten seconds or more if left alone."""
    return request_pb2.RequestSpec(
        model=MODEL,
        prompt=request_pb2.Prompt(text="Tell me everything"),
        sampling=request_pb2.SamplingParameters(max_tokens=8000, temperature=0, ignore_eos=True),
    )


def running(engines: dict[str, Engine]) -> int:
    return sum(engine.running_count for engine in engines.values())


def read_until_it_flows(call: Any) -> str:
    """Read until a few chunks have come; return the request's id."""
    request_id, chunk_count = "", 0
    for event in call:
        if event.HasField("opened"):
            request_id = event.opened.request_id
        chunk_count += event.HasField("chunk")
        if chunk_count >= 3:
            return request_id
    raise AssertionError("the stream ended early")


def assert_engines_fall_idle(engines: dict[str, Engine], stop: Callable[[], Any]) -> None:
    eventually(lambda: running(engines), lambda count: count == 1, timeout_s=5)
    stop()
    eventually(lambda: running(engines), lambda count: count == 0, timeout_s=1.0, interval_s=0.02)
    generated = sum(engine.metric("vllm:generation_tokens_total") for engine in engines.values())
    # Idle must mean idle: no token is made any more.
    time.sleep(0.3)
    assert sum(engine.metric("vllm:generation_tokens_total") for engine in engines.values()) == generated


def test_cancel_request(inference: Inference, engines: dict[str, Engine]) -> None:
    call = inference.Generate(inference_service_pb2.GenerateRequest(spec=long_spec()), timeout=60)
    request_id = read_until_it_flows(call)
    cancelled = []

    def stop() -> None:
        cancelled.append(
            inference.CancelRequest(
                inference_service_pb2.CancelRequestRequest(request_id=request_id, cause="enough"), timeout=5
            )
        )

    assert_engines_fall_idle(engines, stop)
    assert cancelled[0].cancelled
    assert cancelled[0].request.state == request_pb2.REQUEST_STATE_CANCELLED

    rest = Output()
    with pytest.raises(grpc.RpcError) as caught:
        read_rest(call, rest)
    assert refusal(caught.value).code is grpc.StatusCode.CANCELLED
    assert refusal(caught.value).reason == "REQUEST_CANCELLED"
    assert rest.end.state == request_pb2.REQUEST_STATE_CANCELLED
    assert 3 <= rest.end.token_count < 8000

    again = inference.CancelRequest(
        inference_service_pb2.CancelRequestRequest(request_id=request_id), timeout=5
    )
    assert not again.cancelled
    assert again.request.state == request_pb2.REQUEST_STATE_CANCELLED


def test_client_leaves(inference: Inference, engines: dict[str, Engine]) -> None:
    call = inference.Generate(inference_service_pb2.GenerateRequest(spec=long_spec()), timeout=60)
    request_id = read_until_it_flows(call)
    assert_engines_fall_idle(engines, call.cancel)
    request = inference.GetRequest(
        inference_service_pb2.GetRequestRequest(request_id=request_id), timeout=5
    ).request
    assert request.state == request_pb2.REQUEST_STATE_CANCELLED


def test_client_connection_is_lost(inference: Inference, engines: dict[str, Engine], address: str) -> None:
    # A channel of its own, so that closing it closes the connection.
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_service_pb2.GenerateRequest(spec=long_spec()), timeout=60)
        read_until_it_flows(call)
        assert_engines_fall_idle(engines, channel.close)


def test_deadline_of_the_request(inference: Inference, engines: dict[str, Engine]) -> None:
    spec = long_spec()
    spec.objectives.end_to_end_deadline.FromMilliseconds(700)
    call = inference.Generate(inference_service_pb2.GenerateRequest(spec=spec), timeout=60)
    output = Output()
    with pytest.raises(grpc.RpcError) as caught:
        read(call, output=output)
    assert refusal(caught.value).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert refusal(caught.value).reason == "DEADLINE_EXCEEDED"
    assert output.end.state == request_pb2.REQUEST_STATE_EXPIRED
    eventually(lambda: running(engines), lambda count: count == 0, timeout_s=1.0)


def test_a_detached_request_goes_on(inference: Inference, engines: dict[str, Engine]) -> None:
    spec = long_spec()
    spec.sampling.max_tokens = 300
    call = inference.Generate(
        inference_service_pb2.GenerateRequest(spec=spec, detach_on_disconnect=True), timeout=60
    )
    request_id = read_until_it_flows(call)
    call.cancel()
    output = read(inference.Stream(inference_service_pb2.StreamRequest(request_id=request_id), timeout=60))
    assert output.end.state == request_pb2.REQUEST_STATE_SUCCEEDED
    assert output.token_count == 300
