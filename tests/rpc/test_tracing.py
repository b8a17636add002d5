"""Traces of requests, as a collector receives them over OTLP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from sagecp.config import ConfigError, JournalConfig, ServerConfig, TracingConfig
from sagecp.rpc.server import ControlPlaneServer
from sagecp.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    instance_pb2,
    request_pb2,
)
from sagecp.v1 import inference_service_pb2_grpc as inference_grpc
from tests.support.rpc_rig import MODEL, WAIT_S, request_spec
from tests.support.scripted_engine import DONE, Request, scripted_engine, sse
from tests.support.waiting import until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
CANARY = "zanzibar-canary-prompt"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span that it is sent."""

    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []
        self.resources: list[dict[str, Any]] = []
        self.endpoint = ""

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource_spans in request.resource_spans:
            self.resources.append(attributes(resource_spans.resource.attributes))
            for scope_spans in resource_spans.scope_spans:
                self.spans.extend(scope_spans.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[trace_pb2.Span]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> trace_pb2.Span:
        (span,) = self.named(name)
        return span


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(None)


def attributes(pairs: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(each) for each in value.array_value.values]
        return getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in pairs}


def answers(*texts: str) -> Any:
    """Return a script of an engine that produces these pieces, and is well whenever it is asked."""

    async def script(request: Request) -> None:
        if request.method == "GET":
            await request.answer("200 OK", b"{}")
            return
        events = [sse({"choices": [{"index": 0, "text": text, "token_ids": [1]}]}) for text in texts]
        events.append(sse({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}))
        events.append(sse({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(texts)}}))
        await request.stream(*events, DONE)

    return script


def is_ready(server: ControlPlaneServer, instance_id: str) -> bool:
    return server.manager.instance(instance_id).state.name == "READY"


@contextlib.asynccontextmanager
async def control_plane(tracing: TracingConfig, *urls: str) -> AsyncIterator[grpc.aio.Channel]:
    """Run a server whose fleet is these engines; yield a channel to it."""
    config = ServerConfig(listen="127.0.0.1:0", tracing=tracing, journal=JournalConfig(enabled=False))
    server = ControlPlaneServer(config.validate())
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            fleet: Any = fleet_service_pb2_grpc.FleetServiceStub(channel)
            for number, url in enumerate(urls):
                spec = instance_pb2.InstanceSpec(instance_id=f"e{number}", engine_url=url, model_name=MODEL)
                await fleet.RegisterInstance(
                    fleet_service_pb2.RegisterInstanceRequest(spec=spec), timeout=WAIT_S
                )
                await until(functools.partial(is_ready, server, f"e{number}"), "ready")
            yield channel
    finally:
        await server.stop(0.0)


async def generate(channel: grpc.aio.Channel, request_id: str, metadata: Any = ()) -> None:
    stub: Any = inference_grpc.InferenceServiceStub(channel)
    call = stub.Generate(
        inference_service_pb2.GenerateRequest(
            spec=request_spec(
                request_id, CANARY, session_id="s-1", sampling=request_pb2.SamplingParameters(max_tokens=5)
            )
        ),
        metadata=metadata,
        timeout=WAIT_S,
    )
    async for _ in call:
        pass


async def test_a_request_is_one_trace_from_its_caller_to_its_engine() -> None:
    async with (
        collecting() as collector,
        scripted_engine(answers("a", "b", "c")) as engine,
        control_plane(TracingConfig(otlp_endpoint=collector.endpoint), engine.url) as channel,
    ):
        await generate(channel, "r-1", (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),))
        await until(lambda: bool(collector.named("request")), "the trace")
        assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
        root = collector.one("request")
        work = collector.one(f"text_completion {MODEL}")
        parents = {span.name: span.parent_span_id.hex() for span in collector.spans}
        assert parents == {
            "request": PARENT_ID,
            "queue": root.span_id.hex(),
            "decision": root.span_id.hex(),
            work.name: root.span_id.hex(),
            "prefill": work.span_id.hex(),
            "decode": work.span_id.hex(),
        }
        assert (root.kind, work.kind) == (trace_pb2.Span.SPAN_KIND_SERVER, trace_pb2.Span.SPAN_KIND_CLIENT)
        said = attributes(root.attributes)
        assert said["gen_ai.request.model"] == MODEL
        assert said["gen_ai.conversation.id"] == "s-1"
        assert said["gen_ai.request.max_tokens"] == 5
        assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (7, 3)
        assert said["gen_ai.response.finish_reasons"] == ["length"]
        assert (said["sagecp.request.id"], said["sagecp.state"]) == ("r-1", "SUCCEEDED")
        of_engine = attributes(work.attributes)
        assert of_engine["server.port"] == engine.port
        assert of_engine["sagecp.instance.id"] == "e0"
        decided = attributes(collector.one("decision").attributes)
        assert decided["sagecp.candidate.ids"] == ["e0"]
        assert decided["sagecp.reason"]
        # The engine's own spans belong to the attempt.
        (call,) = [each for each in engine.requests if each.method == "POST" and b"zanzibar" in each.body]
        assert call.headers["traceparent"] == f"00-{TRACE_ID}-{work.span_id.hex()}-01"
        assert collector.resources[0]["service.name"] == "sagecp"
        # Its parts follow each other within it.
        prefill, decode = collector.one("prefill"), collector.one("decode")
        queue = collector.one("queue")
        times = [
            root.start_time_unix_nano,
            queue.start_time_unix_nano,
            queue.end_time_unix_nano,
            prefill.start_time_unix_nano,
            prefill.end_time_unix_nano,
            decode.end_time_unix_nano,
            root.end_time_unix_nano,
        ]
        assert times == sorted(times)
    assert CANARY not in str(collector.spans)


async def test_a_lost_attempt_is_a_failed_part_of_the_same_trace() -> None:
    async def breaks(request: Request) -> None:
        if request.method == "GET":
            await request.answer("200 OK", b"{}")
        else:
            request.reset()

    async with (
        collecting() as collector,
        scripted_engine(breaks) as bad,
        scripted_engine(answers("a")) as good,
        control_plane(TracingConfig(otlp_endpoint=collector.endpoint), bad.url, good.url) as channel,
    ):
        # Where the first one goes is the balancer's choice: with several at once, some meet the bad one.
        await asyncio.gather(*(generate(channel, f"r-{number}") for number in range(8)))
        await until(lambda: len(collector.named("request")) == 8, "the traces")
        failed = [
            span
            for span in collector.named(f"text_completion {MODEL}")
            if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
        ]
        assert failed
        for span in failed:
            assert attributes(span.attributes)["error.type"] in {"ENGINE_UNREACHABLE", "ENGINE_FAILED"}
            of_trace = [each for each in collector.spans if each.trace_id == span.trace_id]
            assert sum(each.name == "queue" for each in of_trace) == 2
            (root,) = [each for each in of_trace if each.name == "request"]
            assert attributes(root.attributes)["sagecp.state"] == "SUCCEEDED"


async def test_a_refused_request_leaves_a_trace_with_the_reason() -> None:
    async with (
        collecting() as collector,
        control_plane(TracingConfig(otlp_endpoint=collector.endpoint)) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await generate(channel, "r-1")
        await until(lambda: bool(collector.named("request")), "the trace")
        root = collector.one("request")
        assert root.status.code == trace_pb2.Status.STATUS_CODE_ERROR
        assert attributes(root.attributes)["error.type"] == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(("flag", "count"), [("01", 1), ("00", 0)])
async def test_the_callers_decision_to_sample_counts(flag: str, count: int) -> None:
    async with (
        collecting() as collector,
        scripted_engine(answers("a")) as engine,
        control_plane(
            TracingConfig(otlp_endpoint=collector.endpoint, sample_ratio=0.0), engine.url
        ) as channel,
    ):
        await generate(channel, "asked", (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-{flag}"),))
        await generate(channel, "not-asked")
        calls = [each for each in engine.requests if each.method == "POST" and b"zanzibar" in each.body]
        # The engine is told what was decided, so that it does the same.
        sampled = [int(each.headers["traceparent"][-2:], 16) & 1 for each in calls]
        assert sampled == [int(flag), 0]
        assert calls[0].headers["traceparent"].split("-")[1] == TRACE_ID
    # The server has stopped: everything was sent.
    assert len(collector.named("request")) == count


async def test_a_collector_that_is_not_there_costs_nothing_but_the_traces() -> None:
    config = TracingConfig(otlp_endpoint="http://127.0.0.1:9", export_timeout_s=0.2)
    async with scripted_engine(answers("a")) as engine, control_plane(config, engine.url) as channel:
        await generate(channel, "r-1")


def test_bad_settings_are_named() -> None:
    tracing = TracingConfig(otlp_endpoint="collector:4317", sample_ratio=1.5, service_name="")
    with pytest.raises(ConfigError) as caught:
        ServerConfig(tracing=tracing).validate()
    assert {each.field for each in caught.value.violations} == {
        "tracing.otlp_endpoint",
        "tracing.sample_ratio",
        "tracing.service_name",
    }
