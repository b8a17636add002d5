"""What the keys order of the control plane: each one call, and a sentence that says what came of it."""

from __future__ import annotations

import getpass
import socket

from sagecp.cli import render
from sagecp.client import SageClient, convert
from sagecp.v1 import admin_service_pb2 as admin_pb
from sagecp.v1 import fleet_service_pb2 as fleet_pb
from sagecp.v1 import inference_service_pb2 as inference_pb
from sagecp.v1 import instance_pb2, request_pb2, scheduling_pb2
from sagecp.wire.times import duration

REQUEST_COUNT = 200


def author() -> str:
    """Return who acts, for the record."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # No such user is known, as in some containers.
        name = "somebody"
    return f"{name}@{socket.gethostname()}, in sagecp top"[:256]


async def drain(
    client: SageClient, instance_id: str, *, grace_s: float | None = None, force: bool = False
) -> instance_pb2.Instance:
    """Order that an instance takes no new work.

    Args:
        client: To the control plane.
        instance_id: The instance.
        grace_s: After this time what still runs there is moved; ``None``: never.
        force: Even if the rest of the fleet could not carry the load.

    Raises:
        ClientError: It was refused, or could not be asked.
    """
    query = fleet_pb.DrainInstanceRequest(instance_id=instance_id, force=force, cause=author())
    if grace_s is not None:
        query.grace_period.CopyFrom(duration(grace_s))
    return (await client.connection.unary(client.connection.fleet.DrainInstance, query)).instance


async def resume(client: SageClient, instance_id: str) -> instance_pb2.Instance:
    """Order that an instance takes work again."""
    query = fleet_pb.DrainInstanceRequest(instance_id=instance_id, undo=True, cause=author())
    return (await client.connection.unary(client.connection.fleet.DrainInstance, query)).instance


async def sleep(
    client: SageClient, instance_id: str, *, level: int = 1, force: bool = False
) -> instance_pb2.Instance:
    """Order that an engine sleeps once nothing runs there.

    Args:
        client: To the control plane.
        instance_id: The instance.
        level: 1: weights go to the host's memory. 2: weights are dropped.
        force: Even if the rest of the fleet could not carry the load.
    """
    query = fleet_pb.SleepInstanceRequest(instance_id=instance_id, level=level, force=force, cause=author())
    return (await client.connection.unary(client.connection.fleet.SleepInstance, query)).instance


async def wake(client: SageClient, instance_id: str) -> instance_pb2.Instance:
    """Order that an engine wakes up and takes work again."""
    query = fleet_pb.SleepInstanceRequest(instance_id=instance_id, wake=True, cause=author())
    return (await client.connection.unary(client.connection.fleet.SleepInstance, query)).instance


async def get_instance(client: SageClient, instance_id: str) -> instance_pb2.Instance:
    """Return an instance with all that is known of it."""
    query = fleet_pb.GetInstanceRequest(instance_id=instance_id)
    return (await client.connection.unary(client.connection.fleet.GetInstance, query)).instance


async def get_scheduling(client: SageClient) -> admin_pb.GetSchedulingConfigResponse:
    """Return how requests are ordered and placed, and how they could be."""
    return await client.connection.unary(
        client.connection.admin.GetSchedulingConfig, admin_pb.GetSchedulingConfigRequest()
    )


async def set_scheduling(
    client: SageClient, config: scheduling_pb2.SchedulingConfig, expected_version: int
) -> scheduling_pb2.SchedulingConfig:
    """Change how requests are ordered and placed, unless somebody else did since it was looked at."""
    config.comment = author()
    query = admin_pb.UpdateSchedulingConfigRequest(config=config, expected_version=expected_version)
    # A second execution would make another version.
    response = await client.connection.unary(
        client.connection.admin.UpdateSchedulingConfig, query, repeatable=False
    )
    return response.config


async def recent_requests(client: SageClient, instance_id: str) -> list[request_pb2.Request]:
    """Return the newest requests; with an instance, those that ran there."""
    query = inference_pb.ListRequestsRequest(page_size=REQUEST_COUNT, instance_id=instance_id)
    response = await client.connection.unary(client.connection.inference.ListRequests, query)
    return list(response.requests)


async def explain(client: SageClient, request_id: str) -> inference_pb.ExplainRequestResponse:
    """Return why a request went where it went."""
    return await client.connection.unary(
        client.connection.inference.ExplainRequest,
        inference_pb.ExplainRequestRequest(request_id=request_id),
        request_id=request_id,
    )


def request_text(message: request_pb2.Request) -> str:
    """Return a request in a line of a list."""
    status = convert.request_status(message)
    ttft = render.span(status.create_time_s, status.first_token_time_s)
    return (
        f"{render.clock_time(status.create_time_s)[11:19]} {status.request_id:<20} {status.state.name:<10} "
        f"{status.instance_id or render.NONE:<12} TTFT {ttft:>7} "
        f"{status.usage.completion_token_count:>5} tokens  {status.priority.name}"
    )
