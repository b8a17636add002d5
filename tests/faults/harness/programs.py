"""The programs that faults happen to: control planes, engines and agents, killed and started at will."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.faults.harness.waiting import WAIT_S, becomes
from tests.support.processes import SAGECP, Program, free_ports

MODEL = "sim"
Settings = Mapping[str, Mapping[str, Any]]

# A server that comes back is noticed at once, and no address is remembered as a bad one.
CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_receive_message_length", 16 << 20),
]


class Part:
    """A program that can be killed, frozen and started again, under the same address.

    Attributes:
        port: The port of its own.
        program: The running one, or the last that ran; ``None`` before the first start.
        stack_traces: Those that earlier ones printed.
    """

    def __init__(self, name: str, port: int | None = None) -> None:
        self.name = name
        self.port = port or free_ports(1)[0]
        self.program: Program | None = None
        self.start_s = 0.0
        self.stack_traces: list[str] = []
        self._frozen = False

    def command(self) -> list[str | Path]:
        """Return what to run."""
        raise NotImplementedError

    def spawn(self, environment: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()) -> None:
        """Start it, without waiting for anything."""
        assert not self.running, f"{self.name} runs already"
        self.note_stack_trace()
        self.start_s = time.monotonic()
        self._frozen = False
        self.program = Program(self.name, [*prefix, *self.command()], environment=environment)

    def note_stack_trace(self) -> None:
        """Remember what the present program printed that no user should see."""
        printed, found, trace = self.output.partition("Traceback")
        if found:
            self.stack_traces.append(f"{self.name}: {printed[-500:]}{found}{trace[:3000]}")

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self.program is not None and self.program.process.poll() is None

    @property
    def process_id(self) -> int:
        """The id of the process."""
        assert self.program is not None
        return self.program.process.pid

    def kill(self) -> None:
        """End it, and what it started, as a crash or the kernel would."""
        assert self.program is not None
        self.program.signal_group(signal.SIGKILL)
        self.program.wait(10)

    def freeze(self) -> None:
        """Stop its clock: SIGSTOP."""
        assert self.program is not None
        self.program.signal_group(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        """Let it go on."""
        assert self.program is not None
        self.program.signal_group(signal.SIGCONT)
        self._frozen = False

    def terminate(self) -> None:
        """Ask it to end."""
        assert self.program is not None
        self.program.process.terminate()

    async def ended(self, timeout_s: float = WAIT_S) -> int:
        """Wait for its end and return the exit status."""
        assert self.program is not None
        return await asyncio.to_thread(self.program.wait, timeout_s)

    async def line(self, pattern: str, timeout_s: float = WAIT_S) -> re.Match[str]:
        """Wait until it has printed something."""
        assert self.program is not None
        return await asyncio.to_thread(self.program.wait_for_line, pattern, timeout_s)

    @property
    def output(self) -> str:
        """What the present program has printed."""
        return "" if self.program is None else self.program.output

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the entries of its log of one kind."""
        entries = [json.loads(line) for line in self.output.splitlines() if line.startswith("{")]
        return [entry for entry in entries if entry.get("event") == name]

    def stop(self) -> None:
        """End it for certain."""
        if self.program is not None:
            if self._frozen:
                self.thaw()
            self.program.stop()


class ControlPlane(Part):
    """`sagecp serve` on a fixed port, with its journal in a file.

    Args:
        folder: Where its configuration and journal are.
        settings: Tables of its configuration.
        port: The port; default: a free one.
    """

    def __init__(
        self, folder: Path, settings: Settings, port: int | None = None, name: str = "control plane"
    ) -> None:
        super().__init__(name, port)
        self.journal = folder / "journal.db"
        self._config = folder / f"{name.replace(' ', '-')}.toml"
        self._config.write_text(to_toml(settings))

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def command(self) -> list[str | Path]:
        """Return what to run."""
        return [SAGECP, "serve", "--config", self._config, "--listen", self.address,
                "--journal", self.journal, "--log-format", "json"]  # fmt: skip

    async def serving(self, timeout_s: float = WAIT_S) -> float:
        """Wait until it says that it serves; return how long that took from its start, in seconds."""

        async def probe() -> bool:
            assert self.running, f"the control plane ended:\n{self.output[-3000:]}"
            return await self.health() == health_pb2.HealthCheckResponse.SERVING

        await becomes(probe, bool, "the control plane serves", timeout_s=timeout_s)
        return time.monotonic() - self.start_s

    async def health(self) -> int:
        """Return its health as it says itself."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
            return int(answer.status)

    def resident_bytes(self) -> int:
        """Return how much memory the process has."""
        pages = int(Path(f"/proc/{self.process_id}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


class SimEngine(Part):
    """`sagecp engine-sim` on a fixed port.

    Args:
        instance_id: Its name in the fleet.
        inter_token_ms: Between two tokens of a request.
        options: More of its command line.
    """

    def __init__(
        self, instance_id: str, *, inter_token_ms: float = 5.0, options: tuple[str, ...] = ()
    ) -> None:
        super().__init__(f"engine {instance_id}")
        self.instance_id = instance_id
        self._options = ("--ttft-ms", "5", "--inter-token-ms", f"{inter_token_ms:g}", *options)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str | Path]:
        """Return what to run."""
        return [SAGECP, "engine-sim", "--port", str(self.port), "--model", MODEL, "--endless-answers",
                "--max-num-seqs", "2048", *self._options]  # fmt: skip

    async def ready(self) -> None:
        """Wait until it listens."""
        await self.line(r"http://127\.0\.0\.1")

    async def misbehave(self, **switches: Any) -> None:
        """Set faults; ``None`` turns one off."""
        await asyncio.to_thread(_post, f"{self.url}/sim/misbehave", switches)

    async def gauge(self, name: str) -> float:
        """Return the sum of a metric of its own."""
        page = await asyncio.to_thread(_get, f"{self.url}/metrics")
        lines = [line for line in page.splitlines() if re.match(rf"{re.escape(name)}[ {{]", line)]
        assert lines, f"no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def work_count(self) -> int:
        """Return how many requests it has, running or waiting."""
        running = await self.gauge("vllm:num_requests_running")
        return int(running + await self.gauge("vllm:num_requests_waiting"))


class Agent(Part):
    """`sagecp agent` beside an engine.

    Args:
        engine: The engine.
        control_plane: Address of the control plane, or of a proxy before it.
        interval: Between heartbeats.
        advertise: Where the control plane is told to reach the engine.
    """

    def __init__(
        self,
        engine: SimEngine,
        control_plane: str,
        *,
        interval: str = "200ms",
        advertise: str = "",
        name: str = "",
    ) -> None:
        super().__init__(name or f"agent of {engine.instance_id}", port=1)
        self.engine = engine
        self.control_plane = control_plane
        self._options = ("--interval", interval, *(("--advertise", advertise) if advertise else ()))

    def command(self) -> list[str | Path]:
        """Return what to run."""
        return [SAGECP, "agent", "--engine", self.engine.url, "--control-plane", self.control_plane,
                "--instance-id", self.engine.instance_id, "--log-format", "json", *self._options]  # fmt: skip

    async def registered(self) -> None:
        """Wait until it has registered."""
        await self.line('"event":"registered')


def to_toml(settings: Settings) -> str:
    """Return tables as TOML; values are numbers, truth values and strings. The table "" is the top."""
    lines = []
    for section, values in sorted(settings.items()):
        if section:
            lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _get(url: str) -> str:
    with urlopen(url, timeout=10) as answer:  # loopback only
        return str(answer.read().decode())


def _post(url: str, body: Mapping[str, Any]) -> str:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())
