"""Clients that leave the simulated engine at the worst moment."""

from __future__ import annotations

import json
import socket
import struct
import urllib.request

from tests.support.dev import simulated_engine


def test_a_client_that_leaves_before_its_answer_is_no_error() -> None:
    body = json.dumps({"model": "m", "prompt": "Hello", "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    # The context checks, at its end, that no stack trace was printed.
    with simulated_engine("m") as port:
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                # Closed by a reset: the engine learns it while it reads the request.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(head.encode() + body)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert answer.status == 200
