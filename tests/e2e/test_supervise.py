"""An agent that owns a real vLLM: what it tells of it, what it has it do, and that it comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import instance_pb2
from tests.e2e.conftest import CONTEXT_TOKEN_COUNT, ENGINE_START_S, MODEL, RECIPE
from tests.rpc.agent.peers import ControlPlane
from tests.support.processes import SAGECP, Program, free_ports

RUNNING = instance_pb2.ENGINE_PROCESS_STATE_RUNNING


@pytest.fixture
async def control_plane() -> AsyncIterator[ControlPlane]:
    control_plane = ControlPlane()  # type: ignore[abstract]  # agents call nothing else
    control_plane.timeout_s = ENGINE_START_S
    await control_plane.start()
    yield control_plane
    await control_plane.stop()


def is_ready(beat: pb.HeartbeatRequest) -> bool:
    return beat.engine_process.state == RUNNING and beat.engine_condition == pb.ENGINE_CONDITION_HEALTHY


def write_adapter(folder: Path) -> None:
    """Write a LoRA adapter for the tiny model that changes nothing: it is all zeros."""
    venv = subprocess.run([RECIPE / "install.sh"], check=True, stdout=subprocess.PIPE, text=True).stdout
    model = json.loads((Path(venv.strip()) / "model" / "config.json").read_text())
    rank, width = 8, model["hidden_size"]
    header: dict[str, Any] = {}
    size = 0
    for layer in range(model["num_hidden_layers"]):
        for part in ("q_proj", "v_proj"):
            for name, shape in (("lora_A", [rank, width]), ("lora_B", [width, rank])):
                key = f"base_model.model.model.layers.{layer}.self_attn.{part}.{name}.weight"
                end = size + 4 * rank * width
                header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}
                size = end
    folder.mkdir()
    text = json.dumps(header).encode()
    # The format safetensors: the length of the header, the header, the numbers.
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": MODEL,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def exists(process_id: int) -> bool:
    return Path(f"/proc/{process_id}").exists()


@pytest.mark.timeout(2 * ENGINE_START_S + 120)
async def test_a_real_engine_is_owned_told_and_brought_back(
    control_plane: ControlPlane, logs: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    await asyncio.to_thread(write_adapter, adapter)
    (port,) = free_ports(1)
    agent = Program(
        "agent with a vLLM of its own",
        [
            SAGECP, "agent", "--control-plane", control_plane.address, "--instance-id", "engine-1",
            "--engine", f"http://127.0.0.1:{port}", "--engine-log", logs / "owned-vllm.log",
            "--supervise", "--", RECIPE / "serve.sh", str(port), "--max-num-seqs", "16", "--enable-lora",
        ],
        environment={"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        log_file=logs / "agent-owned.log",
    )  # fmt: skip
    try:
        first = await control_plane.until_beat(is_ready)
        spec = control_plane.registrations[0].spec
        assert spec.max_context_token_count == CONTEXT_TOKEN_COUNT
        assert set(spec.engine_capabilities) == {
            instance_pb2.ENGINE_CAPABILITY_SLEEP,
            instance_pb2.ENGINE_CAPABILITY_LORA,
            instance_pb2.ENGINE_CAPABILITY_ABORT,
            instance_pb2.ENGINE_CAPABILITY_SUPERVISED,
        }
        configuration = dict(spec.engine_configuration)
        assert configuration["dtype"] == "torch.float32"
        assert configuration["max_num_batched_tokens"] == "8192"
        assert int(configuration["block_size"]) > 0
        assert len(configuration) <= 30

        control_plane.adapters = instance_pb2.LoraAdapters(
            adapters=[
                instance_pb2.LoraAdapter(name="red", path=str(adapter)),
                instance_pb2.LoraAdapter(name="lost", path=str(tmp_path / "nowhere")),
            ]
        )
        beat = await control_plane.until_beat(
            lambda beat: list(beat.engine.loaded_lora_adapters) == ["red"] and beat.order_trouble
        )
        assert "cannot load the LoRA adapter 'lost'" in beat.order_trouble
        await control_plane.until(lambda: "red" in control_plane.registrations[-1].spec.model_aliases)
        control_plane.adapters = instance_pb2.LoraAdapters()
        await control_plane.until_beat(lambda beat: not beat.engine.loaded_lora_adapters)

        control_plane.desired_state, control_plane.sleep_level = pb.DESIRED_STATE_ASLEEP, 1
        await control_plane.until_beat(lambda beat: beat.engine.sleeping)
        control_plane.desired_state = pb.DESIRED_STATE_SERVING
        beat = await control_plane.until_beat(
            lambda beat: beat.engine.HasField("sleeping") and not beat.engine.sleeping
        )
        assert not beat.order_trouble

        os.kill(first.engine_process.process_id, signal.SIGKILL)
        beat = await control_plane.until_beat(
            lambda beat: is_ready(beat) and beat.engine_process.restart_count
        )
        assert beat.engine_process.last_exit_code == -signal.SIGKILL
        assert beat.engine_process.last_log_lines
        ended = beat.engine_process.process_id
    finally:
        status = await asyncio.to_thread(agent.stop, 60)
    assert status == 0
    assert not exists(ended)
    assert "Traceback" not in agent.output
    assert control_plane.deregistrations
