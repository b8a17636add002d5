"""Output of one real engine, continued by another: token ids and text of an unbroken run."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from sagecp.core.types import ExecutionInstance, RequestMetadata, SamplingParameters, SchedulingDecision
from sagecp.runtime.engines.base import EngineDelta, EngineOutcome, EngineSpliceError
from sagecp.runtime.engines.continuation import Continuation, usage_after
from sagecp.runtime.executor import ExecutionCoordinator
from tests.e2e.conftest import MODEL, Engine

TOKEN_COUNT = 40
TEXT = RequestMetadata(request_id="text", prompt="The quick brown fox", max_tokens=TOKEN_COUNT)
CHAT = RequestMetadata(
    request_id="chat",
    messages=(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello, é☃?"}]},
    ),
    max_tokens=TOKEN_COUNT,
)
TOKENS = RequestMetadata(request_id="tokens", prompt_token_ids=(43, 72, 79, 325, 224), max_tokens=TOKEN_COUNT)
PROMPTS = {request.request_id: request for request in (TEXT, CHAT, TOKENS)}
# Where the first engine is lost; after the last of them one token is missing.
CUTS = (1, 2, 3, 7, 16, 31, TOKEN_COUNT - 1)


Pair = tuple[Engine, Engine]


@pytest.fixture
def pair(engines: dict[str, Engine]) -> Pair:
    """The engine that is lost, and the one that goes on."""
    first, second = engines.values()
    return first, second


class Recorder:
    """Keeps what an engine produced."""

    def __init__(self) -> None:
        self.deltas: list[EngineDelta] = []
        self.prompt_token_ids: tuple[int, ...] = ()
        self.outcome: EngineOutcome | None = None

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        assert not self.deltas
        self.prompt_token_ids = tuple(token_ids)

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        self.deltas.extend(deltas)


def ids_of(deltas: Sequence[EngineDelta]) -> tuple[int, ...]:
    return tuple(token_id for delta in deltas for token_id in delta.token_ids or ())


def text_of(deltas: Sequence[EngineDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def text_end(engine: Engine, whole: Recorder, token_count: int) -> int:
    """Return how many characters so many tokens have. A busy engine's pieces hold several tokens each."""
    ids = list(ids_of(whole.deltas)[:token_count])
    text: str = engine.post("/detokenize", {"model": MODEL, "tokens": ids})["prompt"]
    assert text_of(whole.deltas).startswith(text)
    return len(text)


def with_sampling(request: RequestMetadata, **sampling: Any) -> RequestMetadata:
    return dataclasses.replace(
        request, sampling=SamplingParameters(**{"temperature": 0.0, "ignore_eos": True, **sampling})
    )


async def run(engine: Engine, request: RequestMetadata, continuation: Continuation | None = None) -> Recorder:
    coordinator = ExecutionCoordinator()
    recorder = Recorder()
    instance = ExecutionInstance(
        instance_id=engine.instance_id, host="127.0.0.1", port=engine.port, model_name=MODEL
    )
    epoch = 1 if continuation is None else 2
    try:
        result = await coordinator.execute_request(
            request,
            instance,
            SchedulingDecision(request_id=request.request_id, epoch=epoch, instance_id=engine.instance_id),
            sink=recorder,
            continuation=continuation,
        )
    finally:
        await coordinator.close()
    recorder.outcome = usage_after(result.outcome, continuation)
    return recorder


async def check_every_cut(
    first: Engine, second: Engine, request: RequestMetadata, cuts: Sequence[int] | None = None
) -> Recorder:
    """Continue an unbroken run's output on the second engine; the sum must be the unbroken run."""
    whole = await run(first, request)
    assert whole.outcome is not None
    for count in cuts or range(1, len(whole.deltas)):
        if count >= len(whole.deltas):
            break
        before = whole.deltas[:count]
        continuation = Continuation(whole.prompt_token_ids, ids_of(before), text_of(before))
        after = await run(second, request, continuation)
        where = f"continued after {count} of {len(whole.deltas)} pieces"
        assert ids_of(before) + ids_of(after.deltas) == ids_of(whole.deltas), where
        assert text_of(before) + text_of(after.deltas) == text_of(whole.deltas), where
        end, expected = after.deltas[-1], whole.deltas[-1]
        assert (end.finish_reason, end.stop_reason) == (expected.finish_reason, expected.stop_reason), where
        assert after.outcome is not None
        assert after.outcome.finish_reasons == whole.outcome.finish_reasons
        assert after.outcome.prompt_token_count == whole.outcome.prompt_token_count
        assert after.outcome.completion_token_count == whole.outcome.completion_token_count
        assert not after.prompt_token_ids
    return whole


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_continuation_equals_the_unbroken_run(pair: Pair, prompt: str) -> None:
    request = with_sampling(PROMPTS[prompt])
    whole = asyncio.run(check_every_cut(*pair, request, CUTS))
    assert len(ids_of(whole.deltas)) == TOKEN_COUNT
    if prompt == "tokens":
        assert whole.prompt_token_ids == TOKENS.prompt_token_ids
    else:
        assert len(whole.prompt_token_ids) > 3


@pytest.mark.parametrize("include", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stop_string_is_found_wherever_the_splice_is(pair: Pair, prompt: str, include: bool) -> None:
    async def check(first: Engine, second: Engine) -> None:
        request = with_sampling(PROMPTS[prompt])
        whole = await run(first, request)
        # Begins and ends inside tokens, and spans several: every cut inside it is across the splice.
        start, end = (text_end(first, whole, count) - 1 for count in (20, 24))
        stop = text_of(whole.deltas)[start:end]
        assert len(stop) > 4
        request = with_sampling(
            request, stop=("never in the output", stop), include_stop_str_in_output=include
        )
        stopped = await check_every_cut(first, second, request)
        assert stopped.deltas[-1].stop_reason == stop
        assert text_of(stopped.deltas).endswith(stop) is include

    asyncio.run(check(*pair))


@pytest.mark.parametrize("include", [False, True], ids=["without", "with"])
def test_what_was_held_back_for_a_stop_string_that_never_comes(pair: Pair, include: bool) -> None:
    request = with_sampling(
        TEXT, stop=("a stop string that is longer than the first few tokens", "~~"),
        include_stop_str_in_output=include,
    )  # fmt: skip
    whole = asyncio.run(check_every_cut(*pair, request))
    assert whole.deltas[-1].finish_reason == "length"


def test_no_stop_string_counts_before_the_least_number_of_tokens(pair: Pair) -> None:
    async def check(first: Engine, second: Engine) -> None:
        whole = await run(first, with_sampling(TEXT))
        early, late = (
            text_of(whole.deltas)[text_end(first, whole, at) : text_end(first, whole, at + 2)]
            for at in (8, 28)
        )
        request = with_sampling(TEXT, stop=(early, late), min_tokens=20)
        stopped = await check_every_cut(first, second, request)
        assert stopped.deltas[-1].finish_reason == "stop"
        assert len(ids_of(stopped.deltas)) > 20

    asyncio.run(check(*pair))


def test_a_stop_token_ends_a_continuation(pair: Pair) -> None:
    async def check(first: Engine, second: Engine) -> None:
        whole = await run(first, with_sampling(TEXT))
        stop_token_id = ids_of(whole.deltas)[25]
        request = with_sampling(TEXT, stop=("never in the output",), stop_token_ids=(stop_token_id,))
        stopped = await check_every_cut(first, second, request)
        assert stopped.deltas[-1].stop_reason == str(stop_token_id)

    asyncio.run(check(*pair))


def test_a_repetition_penalty_and_a_bias_go_on_as_before(pair: Pair) -> None:
    request = with_sampling(TEXT, repetition_penalty=1.3, logit_bias={100: 2.0, 26: -5.0})
    asyncio.run(check_every_cut(*pair, request, CUTS))


@pytest.mark.parametrize("stop", [(), ("€€€",), ("never in the output",)], ids=["", "short", "long"])
def test_a_splice_inside_a_character(pair: Pair, stop: tuple[str, ...]) -> None:
    """Output is steered, byte by byte, to text whose characters are several tokens each."""

    async def check(first: Engine, second: Engine) -> None:
        written = "aé☃b模型é"
        answer = second.post("/tokenize", {"model": MODEL, "prompt": written, "add_special_tokens": False})
        ids: list[int] = answer["tokens"]
        assert len(ids) > len(written), "no character is several tokens"
        for prompt_ids in (TOKENS.prompt_token_ids, (297,)):
            # What an engine would have shown of it, had it been lost after so many tokens.
            for count in range(1, len(ids)):
                text = first.post("/detokenize", {"model": MODEL, "tokens": ids[:count]})["prompt"]
                shown = text.rstrip("\ufffd")
                lag = max((len(each) for each in stop), default=1) - 1
                continuation = Continuation(prompt_ids, tuple(ids[:count]), shown[: max(0, len(shown) - lag)])
                got = continuation.output_text
                for end in range(count, len(ids)):
                    request = with_sampling(
                        dataclasses.replace(TOKENS, prompt_token_ids=prompt_ids, max_tokens=end + 1),
                        stop=stop,
                        logit_bias={ids[end]: 100.0},
                    )
                    after = await run(second, request, continuation)
                    assert ids_of(after.deltas) == (ids[end],)
                    got += text_of(after.deltas)
                    # Each step is a continuation of its own; a finished one has shown everything.
                    continuation = Continuation(prompt_ids, tuple(ids[: end + 1]), got)
                    if stop:
                        break
                whole = second.post("/detokenize", {"model": MODEL, "tokens": ids[: end + 1]})["prompt"]
                assert got == whole.rstrip("\ufffd"), f"continued after {count} tokens"

    asyncio.run(check(*pair))


def test_broken_bytes_go_on_as_in_the_unbroken_run(pair: Pair) -> None:
    async def check(first: Engine, second: Engine) -> None:
        answer = first.post("/tokenize", {"model": MODEL, "prompt": "é☃模 a", "add_special_tokens": False})
        request = with_sampling(
            TEXT, allowed_token_ids=tuple(sorted(set(answer["tokens"]))), repetition_penalty=1.5
        )
        whole = await check_every_cut(first, second, request)
        assert len(ids_of(whole.deltas)) == TOKEN_COUNT

    asyncio.run(check(*pair))


def test_a_chat_without_a_bound_goes_on_without_one(pair: Pair) -> None:
    async def check(first: Engine, second: Engine) -> None:
        whole = await run(first, with_sampling(dataclasses.replace(CHAT, max_tokens=60)))
        stop = text_of(whole.deltas)[text_end(first, whole, 45) : text_end(first, whole, 48)]
        request = with_sampling(dataclasses.replace(CHAT, max_tokens=None), stop=(stop,))
        stopped = await check_every_cut(first, second, request, CUTS)
        assert len(ids_of(stopped.deltas)) > 20

    asyncio.run(check(*pair))


def test_text_that_is_not_that_of_its_tokens_is_not_continued(pair: Pair) -> None:
    async def check(first: Engine, second: Engine) -> None:
        request = with_sampling(TEXT)
        whole = await run(first, request)
        before = whole.deltas[:2]
        for text in ("", "something else"):
            with pytest.raises(EngineSpliceError, match="not the text of its tokens"):
                await run(second, request, Continuation(whole.prompt_token_ids, ids_of(before), text))

    asyncio.run(check(*pair))


def test_a_stop_string_across_the_splice_frees_the_engine(pair: Pair) -> None:
    async def check(first: Engine, second: Engine) -> None:
        request = with_sampling(dataclasses.replace(TEXT, max_tokens=4000))
        whole = await run(first, with_sampling(TEXT))
        start, cut, end = (text_end(first, whole, count) for count in (9, 10, 12))
        stop = text_of(whole.deltas)[start - 1 : end]
        request = with_sampling(request, stop=(stop,))
        shown = text_of(whole.deltas)[: max(0, cut - len(stop) + 1)]
        continuation = Continuation(whole.prompt_token_ids, ids_of(whole.deltas)[:10], shown)
        after = await run(second, request, continuation)
        assert after.deltas[-1].stop_reason == stop
        async with asyncio.timeout(5):
            while second.running_count:  # noqa: ASYNC110 - the engine tells nobody
                await asyncio.sleep(0.02)

    asyncio.run(check(*pair))
