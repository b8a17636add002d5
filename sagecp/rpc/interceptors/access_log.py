"""One line per call."""

from __future__ import annotations

import logging

import grpc

from sagecp.rpc.interceptors.call import CallInfo

logger = logging.getLogger("sagecp.access")

_SERVER_FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}


class AccessLog:
    """Logs every call when it ends: calls at INFO, our own defects at ERROR. Never any content."""

    def started(self, call: CallInfo) -> None:
        """Nothing: the end says everything."""

    def finished(self, call: CallInfo) -> None:
        """Write the line."""
        level = logging.ERROR if call.code in _SERVER_FAULTS else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(
                level,
                "call",
                extra={
                    "method": call.method,
                    "code": call.code.name,
                    "reason": call.reason,
                    "duration_ms": round(call.duration_s * 1000, 3),
                    "peer": call.peer,
                    "rpc_id": call.rpc_id,
                },
            )
