"""What following KV-cache events costs: an agent per engine block, a control plane per heartbeat.

    python -m bench.kv_events [--blocks 200000] [--rounds 5]

The agent's part is everything from a batch as it comes off the socket to the
changes that wait for a beat; prompts of 4,096 tokens are stored and, once the
cache is full, those of longest ago removed, in blocks of 16 tokens. The control
plane's part is one beat with 100 blocks stored and 100 removed, from the message
to the prefix index, against a beat without. All in time of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from array import array
from collections import deque

import msgspec

from bench.processes import machine
from sagecp.agent.kv_events.follower import EventFollower
from sagecp.core.config import SchedulerConfig
from sagecp.core.events import InstanceRegistered
from sagecp.core.prompt_digest import token_block_hashes
from sagecp.core.scheduler import Scheduler
from sagecp.core.types import EngineCondition, ExecutionInstance
from sagecp.rpc.convert.heartbeat import heartbeat_from_proto
from sagecp.v1 import fleet_service_pb2 as pb
from sagecp.v1 import instance_pb2

BLOCK_SIZE, PROMPT_BLOCK_COUNT, CACHE_BLOCK_COUNT = 16, 256, 32_768
CHANGE_COUNT = 100


def batches(engine_block_count: int) -> list[bytes]:
    """Return what an engine publishes while it computes so many blocks, a prompt a batch."""
    cached: deque[list[int]] = deque()
    payloads = []
    for number in range(engine_block_count // PROMPT_BLOCK_COUNT):
        keys = [number * PROMPT_BLOCK_COUNT + each for each in range(PROMPT_BLOCK_COUNT)]
        events: list[dict[str, object]] = []
        if len(cached) * PROMPT_BLOCK_COUNT >= CACHE_BLOCK_COUNT:
            # One event per block, the last of a prompt first, as vLLM evicts.
            events = [
                {"type": "BlockRemoved", "block_hashes": [key], "medium": "GPU", "group_idx": 0}
                for key in reversed(cached.popleft())
            ]
        token_ids = [(number * 7919 + each) % 128_000 for each in range(PROMPT_BLOCK_COUNT * BLOCK_SIZE)]
        events.append(
            {
                "type": "BlockStored", "block_hashes": keys, "parent_block_hash": None,
                "token_ids": token_ids, "block_size": BLOCK_SIZE,
                "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0,
            }
        )  # fmt: skip
        cached.append(keys)
        payloads.append(msgspec.msgpack.encode([float(number), events, 0]))
    return payloads


def agent_cost_us(payloads: list[bytes]) -> float:
    """Return microseconds per engine block stored, its removal included."""
    follower = EventFollower("model")
    started_s = time.process_time()
    for sequence, payload in enumerate(payloads):
        follower.take(sequence, payload)
        while follower.take_update() is not None:
            pass
    return (time.process_time() - started_s) / (len(payloads) * PROMPT_BLOCK_COUNT) * 1e6


def agent_bytes_per_block(payloads: list[bytes]) -> float:
    """Return bytes that the agent holds per engine block of a full cache."""
    tracemalloc.start()
    try:
        follower = EventFollower("model")
        before = tracemalloc.get_traced_memory()[0]
        for sequence, payload in enumerate(payloads[: CACHE_BLOCK_COUNT // PROMPT_BLOCK_COUNT]):
            follower.take(sequence, payload)
            follower.take_update()
        return (tracemalloc.get_traced_memory()[0] - before) / CACHE_BLOCK_COUNT
    finally:
        tracemalloc.stop()


def beat_cost_us(change_count: int, beat_count: int = 2_000) -> float:
    """Return microseconds per beat in the control plane, from bytes to the index, without the transport."""
    scheduler = Scheduler(SchedulerConfig())
    instance = ExecutionInstance(instance_id="a", host="127.0.0.1", port=1, model_name="m")
    scheduler.handle(InstanceRegistered(instance, 1, EngineCondition.HEALTHY), 0.0)
    messages = []
    for number in range(beat_count):
        beat = pb.HeartbeatRequest(
            instance_id="a",
            incarnation=1,
            sequence=number + 1,
            engine_condition=pb.ENGINE_CONDITION_HEALTHY,
            engine=instance_pb2.EngineGauges(running_request_count=3, key_value_cache_usage=0.25),
        )
        if change_count:
            beat.kv_cache_update.sequence = number + 1
            beat.kv_cache_update.reset = number == 0
            first = (number + 1) << 32
            beat.kv_cache_update.stored_block_hashes.extend(range(first, first + change_count))
            if number:
                first = number << 32
                beat.kv_cache_update.removed_block_hashes.extend(range(first, first + change_count))
        messages.append(beat.SerializeToString())
    started_s = time.process_time()
    for number, message in enumerate(messages):
        scheduler.handle(heartbeat_from_proto(pb.HeartbeatRequest.FromString(message)), number * 0.001)
    return (time.process_time() - started_s) / beat_count * 1e6


def link_cost_us(rounds: int) -> float:
    """Return microseconds per block of 256 tokens to hash what a text became."""
    token_ids = array("I", range(64 * 256))
    started_s = time.process_time()
    for _ in range(rounds * 20):
        token_block_hashes(token_ids, "m")
    return (time.process_time() - started_s) / (rounds * 20 * 64) * 1e6


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=200_000, help="engine blocks that are computed")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is shown")
    arguments = parser.parse_args()
    payloads = batches(arguments.blocks)
    median = statistics.median
    rounds = range(arguments.rounds)
    print(machine())
    print(f"agent, us per engine block:          {median(agent_cost_us(payloads) for _ in rounds):.2f}")
    print(f"agent, bytes per engine block:       {agent_bytes_per_block(payloads):.0f}")
    print(f"control plane, us per plain beat:    {median(beat_cost_us(0) for _ in rounds):.1f}")
    print(f"control plane, us per beat with 200: {median(beat_cost_us(CHANGE_COUNT) for _ in rounds):.1f}")
    print(f"control plane, us per block linked:  {link_cost_us(arguments.rounds):.2f}")


if __name__ == "__main__":
    main()
