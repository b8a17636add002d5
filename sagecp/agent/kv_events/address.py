"""Where an engine publishes its KV-cache events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

OFF, AUTO = "off", "auto"

_DEFAULT_ENDPOINT = "tcp://*:5557"
_HINT = "give off, auto, or where the engine publishes, such as tcp://127.0.0.1:5557"


@dataclass(frozen=True, slots=True)
class KvEventsAddress:
    """ZeroMQ endpoints of a publisher.

    Attributes:
        endpoint: Of its PUB socket.
        replay_endpoint: Of the ROUTER socket that tells past batches again; ``""``: there is none.
    """

    endpoint: str
    replay_endpoint: str = ""

    def at(self, host: str) -> KvEventsAddress:
        """Return the address as seen by a peer: with a host where the publisher listens on every one."""
        host = f"[{host}]" if ":" in host else host
        return replace(
            self,
            endpoint=_with_host(self.endpoint, host),
            replay_endpoint=_with_host(self.replay_endpoint, host),
        )


def parse_address(text: str) -> KvEventsAddress:
    """Read ``ENDPOINT`` or ``ENDPOINT,REPLAY_ENDPOINT``.

    Raises:
        ValueError: It is something else; says what is wrong with it.
    """
    endpoint, comma, replay = text.partition(",")
    for each in (endpoint, replay) if comma else (endpoint,):
        if each.startswith("ipc://") and len(each) > len("ipc://"):
            continue
        host, _, port = each.removeprefix("tcp://").rpartition(":")
        is_port = port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
        if not (each.startswith("tcp://") and host and is_port) or "/" in host:
            raise ValueError(f"is {text!r}: {each!r} is no ZeroMQ endpoint; {_HINT}")
        if host == "*":
            raise ValueError(f"is {text!r}: * is where an engine listens; name a host to connect to")
    return KvEventsAddress(endpoint, replay)


def address_of_engine(config: Mapping[str, Any] | str | None) -> KvEventsAddress | None:
    """Return where an engine publishes by its ``--kv-events-config``; ``None``: nowhere that can be read.

    vLLM listens on endpoints with a wildcard and on ``ipc://`` ones. Otherwise it
    connects, to a peer that is not this agent.

    Args:
        config: As vLLM takes it: JSON, or what that says.
    """
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except (ValueError, RecursionError):
            return None
    if not isinstance(config, Mapping) or config.get("enable_kv_cache_events") is not True:
        return None
    endpoint = config.get("endpoint") or _DEFAULT_ENDPOINT
    replay = config.get("replay_endpoint") or ""
    if config.get("publisher") not in {None, "zmq"} or not isinstance(endpoint, str):
        return None
    if not ("*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://")):
        return None
    return KvEventsAddress(endpoint, replay if isinstance(replay, str) else "")


def _with_host(endpoint: str, host: str) -> str:
    for every_address in ("tcp://*:", "tcp://[::]:", "tcp://0.0.0.0:"):
        if endpoint.startswith(every_address):
            return f"tcp://{host}:{endpoint.removeprefix(every_address)}"
    return endpoint
