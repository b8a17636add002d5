"""The client against a real control plane with simulated engines, over a network that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from sagecp import client
from sagecp.client import RetryPolicy, SageClient
from sagecp.core.errors import ErrorReason
from sagecp.core.types import ExecutionInstance, InstanceState, RequestPriority, RequestState
from tests.support.cutting_proxy import CuttingProxy, cutting_proxy
from tests.support.dev import dev_server
from tests.support.waiting import until

pytestmark = [pytest.mark.xdist_group("dev"), pytest.mark.timeout(120)]

MODEL = "sim-8b"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with dev_server(
        "--quiet", "--engines", "2", "--engine-options", "--inter-token-ms 5 --ttft-ms 10"
    ) as address:
        yield address


@pytest.fixture
def patient_address() -> Iterator[str]:
    """A server that accepts what it takes to be hopeless."""
    with dev_server(
        "--quiet", "--engines", "1", "--serve-options", "--set admission.refuse_infeasible=0"
    ) as address:
        yield address


@pytest.fixture
async def sage(address: str) -> AsyncIterator[SageClient]:
    async with SageClient(address) as connected:
        yield connected


@pytest.fixture
async def proxy(address: str) -> AsyncIterator[CuttingProxy]:
    async with cutting_proxy(address) as proxy:
        yield proxy


async def test_generate(sage: SageClient) -> None:
    stream = sage.generate("Tell me a story", max_tokens=20, ignore_eos=True)
    assert stream.end is None
    chunks = [chunk async for chunk in stream]
    assert sum(chunk.token_count for chunk in chunks) == 20
    assert [len(chunk.token_ids) for chunk in chunks] == [chunk.token_count for chunk in chunks]
    assert chunks[-1].finish_reason == "length"
    end = stream.end
    assert end is not None
    assert (end.token_count, end.finish_reason, end.usage.completion_token_count) == (20, "length", 20)
    assert end.status.state is RequestState.SUCCEEDED
    assert end.status.first_token_time_s is not None
    assert end.status.end_time_s is not None
    assert end.status.create_time_s <= end.status.first_token_time_s <= end.status.end_time_s


async def test_complete_text_chat_ids_and_openai(sage: SageClient) -> None:
    greedy = await sage.complete("Tell me a story", max_tokens=8, temperature=0)
    again = await sage.complete("Tell me a story", max_tokens=8, temperature=0)
    assert greedy.text == again.text
    assert greedy.request_id != again.request_id
    chat = await sage.complete(messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0)
    assert chat.usage.completion_token_count == 5
    ids = await sage.complete(token_ids=[17, 18, 19], max_tokens=4, temperature=0)
    assert ids.usage.prompt_token_count == 3
    assert len(ids.choices[0].token_ids) == 4
    two = await sage.complete("hello", max_tokens=4, n=2, seed=1, ignore_eos=True)
    assert [len(choice.text.split()) for choice in two.choices] == [4, 4]
    opaque = await sage.complete(
        openai=("completions", {"prompt": "hello", "max_tokens": 3, "temperature": 0})
    )
    assert opaque.usage.completion_token_count == 3
    assert opaque.openai_events


async def test_a_repeated_submit_is_the_same_request(sage: SageClient) -> None:
    first = await sage.submit("hello", max_tokens=3, request_id="twice")
    second = await sage.submit("hello", max_tokens=3, request_id="twice")
    assert (first.created, second.created) == (True, False)
    with pytest.raises(client.ConflictError) as caught:
        await sage.submit("something else", request_id="twice")
    assert caught.value.reason is ErrorReason.REQUEST_ID_CONFLICT


async def test_submit_then_stream_more_than_once(sage: SageClient) -> None:
    submitted = await sage.submit("hello", max_tokens=12, ignore_eos=True, priority="high", user_id="u-1")
    whole = [chunk async for chunk in sage.stream(submitted.request_id)]
    rest = [chunk async for chunk in sage.stream(submitted.request_id, from_token_index=7)]
    ids = [token_id for chunk in whole for token_id in chunk.token_ids]
    assert [token_id for chunk in rest for token_id in chunk.token_ids] == ids[7:]
    status = await sage.get_request(submitted.request_id)
    assert (status.state, status.priority) == (RequestState.SUCCEEDED, RequestPriority.HIGH)
    assert status.user_id == "u-1"
    explained = await sage.explain(submitted.request_id)
    assert explained.decisions[0].instance_id == status.instance_id
    assert explained.decisions[0].reason


async def test_lists_page_after_page(sage: SageClient) -> None:
    ids = [(await sage.submit("hello", max_tokens=1, session_id="pages")).request_id for _ in range(5)]
    found = [status.request_id async for status in sage.list_requests(session_id="pages", page_size=2)]
    assert found == ids[::-1]
    instances = [each async for each in sage.list_instances(page_size=1)]
    assert [each.instance_id for each in instances] == ["engine-1", "engine-2"]
    assert {each.state for each in instances} == {InstanceState.READY}
    assert {each.spec.model_name for each in instances} == {MODEL}


async def test_cancel(sage: SageClient) -> None:
    stream = sage.generate("hello", max_tokens=2000, ignore_eos=True)
    async with stream:
        await anext(stream)
        outcome = await sage.cancel(stream.request_id, "not needed")
        assert outcome.cancelled
        with pytest.raises(client.RequestFailedError) as caught:
            async for _ in stream:
                pass
    assert caught.value.state is RequestState.CANCELLED
    assert caught.value.reason is ErrorReason.REQUEST_CANCELLED
    assert not (await sage.cancel(stream.request_id)).cancelled


async def ended_as(sage: SageClient, request_id: str) -> RequestState:
    """Return how a request ended; wait for it."""
    deadline = asyncio.get_running_loop().time() + 10
    while not (state := (await sage.get_request(request_id)).state).is_terminal:
        assert asyncio.get_running_loop().time() < deadline, state
        await asyncio.sleep(0.02)
    return state


async def test_leaving_a_generate_cancels_the_request(sage: SageClient) -> None:
    async with sage.generate("hello", max_tokens=2000, ignore_eos=True) as stream:
        await anext(stream)
    assert await ended_as(sage, stream.request_id) is RequestState.CANCELLED
    task = asyncio.create_task(sage.complete("hello", max_tokens=2000, ignore_eos=True, request_id="task"))
    running = [status async for status in sage.list_requests(states=[RequestState.RUNNING])]
    while "task" not in {status.request_id for status in running}:
        await asyncio.sleep(0.01)
        running = [status async for status in sage.list_requests(states=[RequestState.RUNNING])]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ended_as(sage, "task") is RequestState.CANCELLED


async def test_a_deadline_ends_the_request(patient_address: str) -> None:
    async with SageClient(patient_address) as sage:
        with pytest.raises(client.RequestFailedError) as caught:
            await sage.complete("hello", max_tokens=2000, ignore_eos=True, deadline_s=0.2)
    assert caught.value.state is RequestState.EXPIRED
    assert caught.value.reason is ErrorReason.DEADLINE_EXCEEDED


async def test_errors_say_what_is_wrong(sage: SageClient) -> None:
    with pytest.raises(client.NotFoundError) as missing:
        await sage.submit("hello", model="nope")
    assert missing.value.metadata["available_models"] == MODEL
    with pytest.raises(client.InvalidArgumentError) as bad:
        await sage.submit("", temperature=9, top_p=3, max_tokens=0)
    fields = {each.field.removeprefix("spec.") for each in bad.value.violations}
    assert fields == {"prompt.text", "sampling.temperature", "sampling.top_p", "sampling.max_tokens"}
    with pytest.raises(client.RequestFailedError, match="8192") as long:
        await sage.complete("word " * 20_000, max_tokens=1, timeout_s=30)
    assert long.value.reason is ErrorReason.ENGINE_REJECTED
    assert long.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert bad.value.rpc_id


async def test_metrics_and_status(sage: SageClient) -> None:
    await sage.complete("hello", max_tokens=4, ignore_eos=True)
    metrics = await sage.get_metrics(window_s=60, group_by="instance")
    assert metrics.overall.completed_requests >= 1
    assert metrics.overall.ttft.sample_count >= 1
    assert metrics.window_s == 60
    assert set(metrics.groups) <= {"engine-1", "engine-2"}
    status = await sage.get_status()
    assert status.accepting
    assert status.models == (MODEL,)
    assert status.instance_count_by_state["READY"] == 2
    with pytest.raises(client.InvalidArgumentError, match="group_by"):
        await sage.get_metrics(group_by="colour")


async def test_register_and_deregister(sage: SageClient) -> None:
    instance = ExecutionInstance(
        instance_id="mine", host="127.0.0.1", port=1, model_name="other", gpu_count=2, labels={"a": "b"}
    )
    registered = await sage.register_instance(instance)
    assert registered.instance.spec.labels == {"a": "b"}
    assert registered.lease_duration_s > registered.heartbeat_interval_s > 0
    found = await sage.get_instance("mine")
    assert (found.spec.gpu_count, found.spec.host, found.spec.port) == (2, "127.0.0.1", 1)
    assert found.heartbeat_time_s is None
    assert await sage.deregister_instance("mine", cause="test") == 0
    with pytest.raises(client.NotFoundError):
        await sage.get_instance("mine")


async def test_a_cut_network_leaves_no_gap_and_no_repetition(sage: SageClient, proxy: CuttingProxy) -> None:
    submitted = await sage.submit("hello", max_tokens=200, ignore_eos=True)
    retry = RetryPolicy(max_attempt_count=20, base_s=0.02)
    received: list[int] = []
    async with SageClient(proxy.address, retry=retry) as unlucky:
        async for chunk in unlucky.stream(submitted.request_id):
            assert chunk.first_token_index == len(received)
            before = len(received)
            received += chunk.token_ids
            if before // 50 != len(received) // 50:
                proxy.cut()
    assert proxy.connection_count >= 4
    expected = [token_id async for chunk in sage.stream(submitted.request_id) for token_id in chunk.token_ids]
    assert len(expected) == 200
    assert received == expected


async def test_a_detached_generate_survives_a_cut(sage: SageClient, proxy: CuttingProxy) -> None:
    retry = RetryPolicy(max_attempt_count=20, base_s=0.02)
    async with SageClient(proxy.address, retry=retry) as unlucky:
        stream = unlucky.generate("hello", max_tokens=60, ignore_eos=True, detach=True)
        count = (await anext(stream)).token_count
        proxy.cut()
        count += sum([chunk.token_count async for chunk in stream])
    assert count == 60
    assert stream.end is not None
    assert await ended_as(sage, stream.request_id) is RequestState.SUCCEEDED


async def test_a_generate_that_lost_its_connection_is_cancelled(
    sage: SageClient, proxy: CuttingProxy
) -> None:
    async with SageClient(proxy.address) as unlucky:
        stream = unlucky.generate("hello", max_tokens=2000, ignore_eos=True)
        await anext(stream)
        proxy.refuse()
        with pytest.raises(client.StreamLostError) as caught:
            async for _ in stream:
                pass
    assert caught.value.next_token_index == stream.next_token_index > 0
    assert await ended_as(sage, stream.request_id) is RequestState.CANCELLED


async def test_many_streams_over_one_connection(sage: SageClient) -> None:
    completions = await asyncio.gather(
        *(sage.complete(f"story {number}", max_tokens=10, ignore_eos=True) for number in range(40))
    )
    assert {completion.usage.completion_token_count for completion in completions} == {10}
    assert {completion.instance_id for completion in completions} == {"engine-1", "engine-2"}


async def test_nothing_is_left_behind(address: str) -> None:
    before = asyncio.all_tasks()
    async with SageClient(address) as sage:
        await sage.complete("hello", max_tokens=2)
        async for _ in sage.generate("hello", max_tokens=50, ignore_eos=True):
            break
    await until(lambda: asyncio.all_tasks() <= before, "every task has ended")
