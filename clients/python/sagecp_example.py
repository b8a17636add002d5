"""A small program that talks to sagecp with nothing but generated stubs.

    python sagecp_example.py instances
    python sagecp_example.py generate "Tell me a story" --max-tokens 64
    python sagecp_example.py submit "Tell me a story"
    python sagecp_example.py stream REQUEST_ID

README.md beside this file says how to generate the stubs. Copy what you need.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import grpc
from google.rpc import error_details_pb2, status_pb2

from sagecp.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    instance_pb2,
    request_pb2,
)

DETAILS_KEY = "grpc-status-details-bin"


def connect(address: str, ca_file: str | None) -> grpc.Channel:
    """Open a channel; with a CA file the connection is TLS."""
    # Pings keep proxies from closing a stream that is waiting for its first token.
    options = [("grpc.keepalive_time_ms", 30_000)]
    if ca_file is None:
        return grpc.insecure_channel(address, options)
    credentials = grpc.ssl_channel_credentials(Path(ca_file).read_bytes())
    return grpc.secure_channel(address, credentials, options)


def request_spec(arguments: argparse.Namespace) -> request_pb2.RequestSpec:
    """Describe the request that the command line asks for."""
    spec = request_pb2.RequestSpec(model=arguments.model, request_id=arguments.request_id)
    if arguments.chat:
        spec.prompt.chat.messages.add(role="user", text=arguments.prompt)
    else:
        spec.prompt.text = arguments.prompt
    if arguments.max_tokens is not None:
        spec.sampling.max_tokens = arguments.max_tokens
    if arguments.temperature is not None:
        spec.sampling.temperature = arguments.temperature
    return spec


def print_output(
    events: Iterable[inference_service_pb2.GenerateResponse | inference_service_pb2.StreamResponse],
) -> None:
    """Print text as it arrives, and what it took at the end.

    A stream that just stops is a failure: only a terminal message says that
    the output is complete. (A request that failed also ends the call with an
    error, which `main` reports.)
    """
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "opened":
            print(f"request {event.opened.request_id}", file=sys.stderr)
        elif kind == "chunk":
            print(event.chunk.text, end="", flush=True)
        elif kind == "terminal":
            end = event.terminal
            print()
            state = request_pb2.RequestState.Name(end.state).removeprefix("REQUEST_STATE_")
            print(
                f"{state} on {end.instance_id or 'no instance'}: "
                f"{end.usage.prompt_token_count} tokens in, {end.usage.completion_token_count} out, "
                f"finish reason {end.finish_reason or 'none'}",
                file=sys.stderr,
            )
            if end.state == request_pb2.REQUEST_STATE_SUCCEEDED:
                return
    raise SystemExit("the stream was lost before its end; call stream with the request id to go on")


def list_instances(channel: grpc.Channel, arguments: argparse.Namespace) -> None:
    """Print one line per instance, however many pages they take."""
    stub = fleet_service_pb2_grpc.FleetServiceStub(channel)
    page_token = ""
    while True:
        page = stub.ListInstances(
            fleet_service_pb2.ListInstancesRequest(page_size=100, page_token=page_token), timeout=10
        )
        for instance in page.instances:
            state = instance_pb2.InstanceState.Name(instance.state).removeprefix("INSTANCE_STATE_")
            print(f"{instance.spec.instance_id}\t{instance.spec.model_name}\t{state}")
        page_token = page.next_page_token
        if not page_token:
            return


def submit(channel: grpc.Channel, arguments: argparse.Namespace) -> None:
    """Hand in a request, and print its id: it runs whether or not anybody listens."""
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    response = stub.Submit(
        inference_service_pb2.SubmitRequest(spec=request_spec(arguments)), timeout=arguments.timeout
    )
    print(response.request.request_id)


def stream(channel: grpc.Channel, arguments: argparse.Namespace) -> None:
    """Print the output of a request handed in before."""
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    print_output(
        stub.Stream(
            inference_service_pb2.StreamRequest(
                request_id=arguments.request_id, from_token_index=arguments.from_token_index
            ),
            timeout=arguments.timeout,
        )
    )


def generate(channel: grpc.Channel, arguments: argparse.Namespace) -> None:
    """Hand in a request and print its output; leaving early cancels it."""
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    print_output(
        stub.Generate(
            inference_service_pb2.GenerateRequest(spec=request_spec(arguments)), timeout=arguments.timeout
        )
    )


def explain(error: grpc.RpcError) -> str:
    """Turn an RPC error and its google.rpc details into lines for a person."""
    lines = [f"{error.code().name}: {error.details()}"]
    for entry in error.trailing_metadata() or ():
        if entry.key != DETAILS_KEY:
            continue
        for detail in status_pb2.Status.FromString(entry.value).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                lines.append(f"  reason {info.reason} {json.dumps(dict(info.metadata), sort_keys=True)}")
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest.FromString(detail.value)
                lines += [f"  {each.field}: {each.description}" for each in bad.field_violations]
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo.FromString(detail.value)
                lines.append(f"  try again in {retry.retry_delay.ToMilliseconds() / 1000:.1f} s")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Talk to sagecp through generated stubs.")
    parser.add_argument("--address", default=os.environ.get("SAGECP_SERVER", "127.0.0.1:50051"))
    parser.add_argument("--ca-file", help="certificate of the server's authority; turns TLS on")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a call may take")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("instances", help="list the fleet").set_defaults(run=list_instances)
    for name, run in (("generate", generate), ("submit", submit)):
        command = commands.add_parser(name)
        command.add_argument("prompt")
        command.add_argument("--model", default="", help="may be left out when one model is served")
        command.add_argument("--chat", action="store_true", help="send the prompt as a chat message")
        command.add_argument("--max-tokens", type=int)
        command.add_argument("--temperature", type=float)
        command.add_argument("--request-id", default="", help="makes a repetition recognisable")
        command.set_defaults(run=run)
    command = commands.add_parser("stream", help="read the output of a request")
    command.add_argument("request_id")
    command.add_argument("--from-token-index", type=int, default=0)
    command.set_defaults(run=stream)
    return parser.parse_args()


def main() -> int:
    """Run one command; 0 on success, 1 when the server said no."""
    arguments = parse_arguments()
    with connect(arguments.address, arguments.ca_file) as channel:
        try:
            arguments.run(channel, arguments)
        except grpc.RpcError as error:
            print(explain(error), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
