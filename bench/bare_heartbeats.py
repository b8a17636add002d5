"""A gRPC server that acknowledges heartbeats and does nothing else: what is gRPC's own of each.

python -m bench.bare_heartbeats PORT
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import grpc

from sagecp.rpc.grpc_server import make_grpc_server
from sagecp.runtime.event_loop import run
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import fleet_service_pb2_grpc


class _Servicer(fleet_service_pb2_grpc.FleetServiceServicer):
    async def RegisterInstance(  # noqa: N802
        self,
        request: pb.RegisterInstanceRequest,
        context: Any,  # noqa: ANN401
    ) -> pb.RegisterInstanceResponse:
        return pb.RegisterInstanceResponse(lease_token=b"sixteen bytes of")

    async def Heartbeat(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]  # noqa: ANN401, N802
        while (beat := await context.read()) is not grpc.aio.EOF:
            await context.write(
                pb.HeartbeatResponse(
                    instance_id=beat.instance_id,
                    acknowledged_sequence=beat.sequence,
                    desired_state=pb.DESIRED_STATE_SERVING,
                )
            )


async def _serve(port: int) -> None:
    server = make_grpc_server((), [("grpc.so_reuseport", 0)], 100_000)
    fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(_Servicer(), server)  # type: ignore[abstract]
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(0.5)


if __name__ == "__main__":
    run(_serve(int(sys.argv[1])))
