"""What the shell offers for half a word: ids, models and policies, from the control plane.

Called while somebody types, so it is quick or silent: no server, no answer within a second,
or any failure means that nothing is offered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from sagecp.client import SageClient

    Names = Callable[[SageClient], Awaitable[Iterable[tuple[str, str]]]]

_TIMEOUT_S = 1.0
_MOST = 500


def complete_instances(ctx: click.Context, _parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Offer ids of instances, with their states."""

    async def names(client: SageClient) -> list[tuple[str, str]]:
        from sagecp.v1 import fleet_service_pb2 as pb
        from sagecp.v1 import instance_pb2

        query = pb.ListInstancesRequest(page_size=1000)
        page = await client.connection.unary(client.connection.fleet.ListInstances, query)
        prefix = "INSTANCE_STATE_"
        return [
            (each.spec.instance_id, instance_pb2.InstanceState.Name(each.state).removeprefix(prefix))
            for each in page.instances
        ]

    return _offer(ctx, start, names)


def complete_requests(ctx: click.Context, _parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Offer ids of the newest requests, with their states."""

    async def names(client: SageClient) -> list[tuple[str, str]]:
        from sagecp.v1 import inference_service_pb2 as pb
        from sagecp.v1 import request_pb2

        query = pb.ListRequestsRequest(page_size=_MOST)
        page = await client.connection.unary(client.connection.inference.ListRequests, query)
        prefix = "REQUEST_STATE_"
        return [
            (each.request_id, request_pb2.RequestState.Name(each.state).removeprefix(prefix))
            for each in page.requests
        ]

    return _offer(ctx, start, names)


def complete_models(ctx: click.Context, _parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Offer the models that are served."""

    async def names(client: SageClient) -> list[tuple[str, str]]:
        from sagecp.v1 import admin_service_pb2 as pb

        status = await client.connection.unary(client.connection.admin.GetStatus, pb.GetStatusRequest())
        return [(model, "") for model in status.models]

    return _offer(ctx, start, names)


def complete_policies(ctx: click.Context, _parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Offer the scheduling policies of the server."""
    return _offer_from_config(ctx, start, "available_scheduling_policies")


def complete_routing(ctx: click.Context, _parameter: click.Parameter, start: str) -> list[CompletionItem]:
    """Offer the routing strategies of the server."""
    return _offer_from_config(ctx, start, "available_routing_strategies")


def complete_load_balancers(
    ctx: click.Context, _parameter: click.Parameter, start: str
) -> list[CompletionItem]:
    """Offer the load balancers of the server."""
    return _offer_from_config(ctx, start, "available_load_balancers")


def _offer_from_config(ctx: click.Context, start: str, field: str) -> list[CompletionItem]:
    async def names(client: SageClient) -> list[tuple[str, str]]:
        from sagecp.v1 import admin_service_pb2 as pb

        query = pb.GetSchedulingConfigRequest()
        answer = await client.connection.unary(client.connection.admin.GetSchedulingConfig, query)
        return [(name, "") for name in getattr(answer, field)]

    return _offer(ctx, start, names)


def _offer(ctx: click.Context, start: str, names: Names) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    try:
        found = _ask(ctx, names)
    except Exception:  # noqa: BLE001 - somebody is typing: no time for complaints
        return []
    chosen = [CompletionItem(name, help=text or None) for name, text in found if name.startswith(start)]
    return chosen[:_MOST]


def _ask(ctx: click.Context, names: Names) -> Iterable[tuple[str, str]]:
    from sagecp.cli.connect import talk
    from sagecp.cli.options import ServerOptions

    given = ctx.params
    options = ServerOptions(
        server=given["server"],
        tls=bool(given["tls"]),
        ca_file=given["ca_cert"] or "",
        certificate_file=given["cert"] or "",
        private_key_file=given["key"] or "",
        server_name=given["server_name"] or "",
        token=given["token"] or "",
        timeout_s=_TIMEOUT_S,
    )
    return talk(options, names)
