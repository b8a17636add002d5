"""What this host knows of an engine process: its command line and the GPUs it was given.

vLLM says nothing about its parallel sizes over HTTP unless it runs in developer
mode. Where the agent may look at the process that listens on the engine's port,
the command line does. Everything here is best effort: another user's process,
another PID namespace or another operating system is simply not seen.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sagecp.agent.kv_events.address import KvEventsAddress, address_of_engine

_LISTEN = "0A"
_INTEGER_FLAGS = {
    "tensor-parallel-size": "tensor_parallel_size",
    "tp": "tensor_parallel_size",
    "pipeline-parallel-size": "pipeline_parallel_size",
    "pp": "pipeline_parallel_size",
    "data-parallel-size": "data_parallel_size",
    "dp": "data_parallel_size",
    "max-num-seqs": "max_sequence_count",
}
_EXPERT_FLAGS = {"enable-expert-parallel", "ep"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArguments:
    """What a command line says; ``None``: it does not say.

    Sizes that a vLLM command line leaves out are 1, unless a configuration file
    was given, which may say otherwise.
    """

    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    max_sequence_count: int | None = None
    expert_parallel: bool | None = None
    kv_events: KvEventsAddress | None = None


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """A vLLM process on this host.

    Attributes:
        process_id: Of the process that was started.
        arguments: From its command line.
        visible_devices: Its ``CUDA_VISIBLE_DEVICES``; ``None``: not set, or not ours to read.
    """

    process_id: int
    arguments: EngineArguments
    visible_devices: str | None


def is_local_host(host: str) -> bool:
    """Return whether a host name or address is this machine's. May ask a name server."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # Only an own address can be bound.
                probe.bind(address)
        except OSError:
            continue
        return True
    return False


def find_local_engine(port: int, proc: Path = Path("/proc")) -> LocalEngine | None:
    """Return the vLLM process that listens on a port, if this host shows one."""
    inodes = set(_listening_inodes(port, proc))
    if not inodes:
        return None
    for process_id in _processes_with(inodes, proc):
        folder = proc / str(process_id)
        arguments = parse_command_line(_read_list(folder / "cmdline"))
        if arguments is None:
            continue  # A child that renamed itself, or a proxy in front of the engine.
        prefix = "CUDA_VISIBLE_DEVICES="
        visible = [entry for entry in _read_list(folder / "environ") if entry.startswith(prefix)]
        return LocalEngine(process_id, arguments, visible[0].removeprefix(prefix) if visible else None)
    return None


def parse_command_line(words: list[str]) -> EngineArguments | None:
    """Return what a vLLM command line says; ``None``: it is not one."""
    # `vllm serve MODEL` or `python -m vllm.entrypoints.openai.api_server`, behind any interpreter.
    start = next((i for i, word in enumerate(words[:8]) if _starts_vllm(word)), None)
    if start is None:
        return None
    values: dict[str, int] = {}
    expert_parallel = False
    has_config_file = False
    kv_events = None
    rest = iter(words[start + 1 :])
    for word in rest:
        if not word.startswith("-"):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        if name in _INTEGER_FLAGS:
            value = value if equals else next(rest, "")
            if value.isascii() and value.isdigit() and len(value) < 10:
                values[_INTEGER_FLAGS[name]] = int(value)  # The last one wins.
        elif name in _EXPERT_FLAGS:
            expert_parallel = True
        elif name == "no-enable-expert-parallel":
            expert_parallel = False
        elif name == "kv-events-config":
            kv_events = address_of_engine(value if equals else next(rest, ""))
        elif name == "config":
            has_config_file = True
    default = None if has_config_file else 1
    return EngineArguments(
        tensor_parallel_size=values.get("tensor_parallel_size", default),
        pipeline_parallel_size=values.get("pipeline_parallel_size", default),
        data_parallel_size=values.get("data_parallel_size", default),
        max_sequence_count=values.get("max_sequence_count"),
        expert_parallel=expert_parallel or (None if has_config_file else False),
        kv_events=kv_events,
    )


def _starts_vllm(word: str) -> bool:
    return word == "vllm" or word.endswith("/vllm") or word.startswith("vllm.entrypoints.")


def _listening_inodes(port: int, proc: Path) -> Iterator[str]:
    wanted = f":{port:04X}"
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[1].endswith(wanted) and fields[3] == _LISTEN:
                yield fields[9]


def _processes_with(inodes: set[str], proc: Path) -> Iterator[int]:
    """Processes that hold one of the sockets, oldest id first: a parent before its workers."""
    links = {f"socket:[{inode}]" for inode in inodes}
    try:
        ids = sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdigit())
    except OSError:
        return
    for process_id in ids:
        try:
            descriptors = list((proc / str(process_id) / "fd").iterdir())
        except OSError:
            continue  # Gone, or another user's.
        for descriptor in descriptors:
            try:
                if os.readlink(descriptor) in links:  # noqa: PTH115 - Path.readlink costs three times as much
                    yield process_id
                    break
            except OSError:
                continue


def _read_list(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError:
        return []
    return [part.decode("utf-8", "replace") for part in data.split(b"\0") if part]
