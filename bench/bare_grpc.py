"""A gRPC server that does nothing but answer: the floor under every figure of the control plane.

    python -m bench.bare_grpc PORT [PACE_MS]

It answers `Generate` with as many messages as the control plane sends for the
same request, as fast as it can or one per PACE_MS, and `Submit` with an id. It
does nothing else.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import grpc

from sagecp.runtime.event_loop import run
from sagecp.v1 import inference_service_pb2 as pb
from sagecp.v1 import inference_service_pb2_grpc, request_pb2


class _Servicer(inference_service_pb2_grpc.InferenceServiceServicer):
    def __init__(self, pace_s: float) -> None:
        self._pace_s = pace_s

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitResponse:  # noqa: ANN401, N802
        return pb.SubmitResponse(request=request_pb2.Request(request_id="r"), created=True)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # noqa: ANN401, N802
        await context.write(pb.GenerateResponse(opened=pb.StreamOpened(request_id="r")))
        for index in range(request.spec.sampling.max_tokens):
            if self._pace_s:
                await asyncio.sleep(self._pace_s)
            await context.write(
                pb.GenerateResponse(
                    chunk=pb.TokenChunk(
                        first_token_index=index, token_count=1, text=" word", token_ids=[1234]
                    )
                )
            )
        await context.write(
            pb.GenerateResponse(terminal=pb.StreamTerminal(state=request_pb2.REQUEST_STATE_SUCCEEDED))
        )


async def _serve(port: int, pace_s: float) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(_Servicer(pace_s), server)  # type: ignore[abstract]
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(0.5)


if __name__ == "__main__":
    run(_serve(int(sys.argv[1]), float(sys.argv[2]) / 1000 if len(sys.argv) > 2 else 0.0))
