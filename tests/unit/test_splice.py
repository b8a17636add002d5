"""A continuation's text, joined to what was delivered before it: stop strings and cut characters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.types import RequestMetadata, SamplingParameters
from sagecp.runtime.engines.base import (
    EngineCall,
    EngineDelta,
    EngineError,
    EngineHealth,
    EngineOutcome,
    EngineRejectedError,
    EngineSink,
    EngineSpliceError,
    EngineStreamBrokenError,
    EngineTimeoutError,
    EngineTimeouts,
)
from sagecp.runtime.engines.continuation import Continuation
from sagecp.runtime.engines.splice import (
    KnownText,
    SpliceSink,
    continue_generation,
    held_back,
    read_known_text,
)


class Recorder:
    def __init__(self) -> None:
        self.deltas: list[EngineDelta] = []
        self.prompts: list[Sequence[int]] = []

    def on_prompt(self, token_ids: Sequence[int]) -> None:
        self.prompts.append(token_ids)

    def on_deltas(self, deltas: Sequence[EngineDelta]) -> None:
        assert deltas
        self.deltas.extend(deltas)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids or ()]


def piece(text: str, finish_reason: str = "", *, ids: Sequence[int] = (7,)) -> EngineDelta:
    return EngineDelta(0, text, ids, len(ids), finish_reason)


class Unbroken:
    """vLLM's rules for stop strings, on one token after the other."""

    def __init__(self, sampling: SamplingParameters) -> None:
        self._stop = sampling.stop
        self._include = bool(sampling.include_stop_str_in_output)
        self._min_tokens = sampling.min_tokens or 0
        self._hold = 0 if self._include else max((len(s) for s in self._stop), default=1) - 1
        self._shown = 0
        self.text = ""
        self.token_count = 0
        self.stop_reason = ""

    def push(self, token: str) -> str:
        """Take a token; return what is shown of the text."""
        self.text += token
        self.token_count += 1
        if token and self.token_count > self._min_tokens:
            ends = [
                (start + len(stop), stop)
                for stop in self._stop
                if (start := self.text.find(stop, max(0, len(self.text) - len(token) - len(stop) + 1))) >= 0
            ]
            if ends:
                # The first of those that are complete first.
                end, self.stop_reason = min(ends, key=lambda pair: pair[0])
                self.text = self.text[: end if self._include else end - len(self.stop_reason)]
                return self._show(len(self.text))
        return self._show(len(self.text) - self._hold)

    def finish(self) -> str:
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self.text[start : self._shown]


TOKENS = st.lists(st.text("ab", max_size=3), min_size=2, max_size=14)


@given(
    tokens=TOKENS,
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3, unique=True),
    include=st.booleans(),
    min_tokens=st.integers(0, 8),
    cut=st.integers(1, 13),
)
def test_any_cut_gives_what_the_unbroken_run_gives(
    tokens: list[str], stop: list[str], include: bool, min_tokens: int, cut: int
) -> None:
    sampling = SamplingParameters(stop=tuple(stop), include_stop_str_in_output=include, min_tokens=min_tokens)
    whole = Unbroken(sampling)
    shown: list[str] = []
    for token in tokens:
        shown.append(whole.push(token))
        if whole.stop_reason:
            break
    if not whole.stop_reason:
        shown[-1] += whole.finish()
    if cut >= len(shown):
        return
    delivered = "".join(shown[:cut])
    recorder, ends = Recorder(), []
    sink = SpliceSink(
        recorder,
        KnownText("".join(tokens[:cut])),
        delivered,
        sampling,
        min_tokens - cut,
        lambda: ends.append(1),
    )
    last = len(tokens) - 1
    for index in range(cut, len(tokens)):
        sink.on_deltas([piece(tokens[index], "length" if index == last else "", ids=(index,))])
    assert delivered + recorder.text == "".join(shown)
    assert recorder.token_ids == list(range(cut, len(shown)))
    end = recorder.deltas[-1]
    if whole.stop_reason:
        assert (end.finish_reason, end.stop_reason) == ("stop", whole.stop_reason)
        assert sink.stopped
        assert ends == [1]
    else:
        assert (end.finish_reason, end.stop_reason) == ("length", "")
        assert not sink.stopped
        assert not ends


@pytest.mark.parametrize(
    ("known", "delivered", "hold_count", "held"),
    [
        ("abc", "abc", 0, ""),
        ("abcdef", "abcd", 2, "ef"),
        ("ab", "", 5, "ab"),
        ("ab", "", 2, "ab"),
        ("", "", 3, ""),
        ("x" * 100 + "abc", "x" * 100 + "ab", 1, "c"),
        # Text that the engine's tokenizer writes otherwise, long before the splice.
        ("<think>hm</think>" + "y" * 40, "y" * 40, 0, ""),
        (" " + "y" * 40, "y" * 40, 0, ""),
        # Less was delivered than the engine tells, as after a reasoning parser; all that was is there.
        ("<think>hm</think>yes", "yes", 0, ""),
    ],
)
def test_text_that_was_held_back(known: str, delivered: str, hold_count: int, held: str) -> None:
    assert held_back(known, delivered, hold_count) == held


@pytest.mark.parametrize(
    ("known", "delivered", "hold_count"),
    [
        ("abc", "abd", 0),
        ("abc", "ab", 0),
        ("abc", "", 0),
        ("", "abc", 0),
        ("abc", "abc", 1),
        ("ab", "a", 2),
        ("<think>hm", "", 3),
        ("abcdef", "abc", 2),
    ],
)
def test_text_that_is_not_that_of_the_tokens(known: str, delivered: str, hold_count: int) -> None:
    with pytest.raises(EngineSpliceError, match="not the text of its tokens"):
        held_back(known, delivered, hold_count)


def test_without_stop_strings_output_passes_as_it_is() -> None:
    recorder = Recorder()
    sink = SpliceSink(recorder, KnownText("ab"), "ab", SamplingParameters(), 0, lambda: None)
    deltas = [piece("c"), piece("", "length")]
    sink.on_prompt([1, 2])
    sink.on_deltas(deltas)
    assert [delta is given_ for delta, given_ in zip(recorder.deltas, deltas, strict=True)] == [True, True]
    assert recorder.prompts == []


@pytest.mark.parametrize(
    ("repeated", "texts", "shown"),
    [
        # The engine repeats what is before the character that was cut.
        ("Say: a", ["", "Say: aé", "b"], "éb"),
        # It leaves out special tokens, which the whole text names.
        ("<|start|>say what I say: a", ["say what I say: a☃"], "☃"),
        ("", ["é"], "é"),
    ],
)
def test_an_engine_that_repeats_itself_after_half_a_character(
    repeated: str, texts: list[str], shown: str
) -> None:
    recorder = Recorder()
    sink = SpliceSink(recorder, KnownText("a", repeated), "a", SamplingParameters(), 0, lambda: None)
    sink.on_deltas([piece(text) for text in texts])
    assert recorder.text == shown
    sink.on_deltas([piece("Say: a")])
    assert recorder.text == shown + "Say: a"


def test_a_stop_string_in_what_is_repeated_does_not_count() -> None:
    recorder = Recorder()
    sampling = SamplingParameters(stop=("Say",))
    sink = SpliceSink(recorder, KnownText("a", "Say: a"), "", sampling, 0, lambda: None)
    sink.on_deltas([piece("Say: aé"), piece("Sa"), piece("y"), piece("late")])
    assert recorder.text == "aé"
    assert recorder.deltas[-1].stop_reason == "Say"
    assert len(recorder.deltas) == 3


def test_text_that_does_not_go_on_inside_the_character_is_not_delivered() -> None:
    recorder, ends = Recorder(), []
    sink = SpliceSink(
        recorder, KnownText("abc", "Say: abc"), "abc", SamplingParameters(), 0, lambda: ends.append(1)
    )
    sink.on_deltas([piece(""), piece("é"), piece("more")])
    assert recorder.text == ""
    assert sink.error is not None
    assert ends == [1]


class Engine:
    """Knows the text of tokens, and answers a call with given pieces."""

    def __init__(self, texts: dict[int, bytes], answer: Sequence[Any] = ()) -> None:
        self.texts = texts
        self.answer = answer
        self.calls: list[EngineCall] = []
        self.asked: list[tuple[int, ...]] = []
        self.refuses = False
        self.cancelled = False
        self.timeouts = EngineTimeouts()

    @property
    def last_output_s(self) -> float:
        return 0.0

    async def detokenize(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
        assert model == "m"
        assert timeout_s > 0
        self.asked.append(tuple(token_ids))
        if self.refuses:
            raise EngineRejectedError("not found", 404)
        return b"".join(self.texts[token_id] for token_id in token_ids).decode("utf-8", "replace")

    async def context_token_count(self, model: str, timeout_s: float) -> int:
        assert (model, timeout_s > 0) == ("m", True)
        return 50

    async def generate(self, call: EngineCall, sink: EngineSink, timeouts: EngineTimeouts) -> EngineOutcome:
        self.calls.append(call)
        self.timeouts = timeouts
        sink.on_prompt([1])
        for step in self.answer:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, EngineOutcome):
                return step
            sink.on_deltas(step)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        raise AssertionError

    async def health(self, timeout_s: float) -> EngineHealth:
        return EngineHealth(True, timeout_s)

    async def probe(self, model: str, timeout_s: float) -> EngineHealth:
        return EngineHealth(bool(model), timeout_s)

    async def close(self) -> None:
        pass


LETTERS = {number: bytes([number]) for number in range(256)}
REQUEST = RequestMetadata(request_id="r", prompt="P", max_tokens=20)


def with_stop(*stop: str, **sampling: Any) -> RequestMetadata:
    return RequestMetadata(
        request_id="r", prompt="P", max_tokens=20, sampling=SamplingParameters(stop=stop, **sampling)
    )


def after(text: bytes, delivered: str, prompt: bytes = b"P:") -> Continuation:
    return Continuation(tuple(prompt), tuple(text), delivered)


@pytest.mark.parametrize(
    ("prompt", "output", "known"),
    [
        (b"P:", b"abc", KnownText("abc")),
        (b"P:" * 50, b"abc", KnownText("abc")),
        (b"P:", "aé".encode()[:-1], KnownText("a", "P:a")),
        (b"P:", "é".encode()[:-1], KnownText("", "P:")),
        ("P☃".encode()[:-1], "☃".encode()[-1:] + b"a", KnownText("☃a")),
    ],
)
async def test_the_text_of_what_there_is(prompt: bytes, output: bytes, known: KnownText) -> None:
    engine = Engine(LETTERS)
    assert await read_known_text(engine, "m", after(output, "", prompt), 1.0) == known
    # The prompt is asked for as a whole only where a character was cut.
    assert (tuple(prompt + output) in engine.asked) is (len(prompt) <= 16 or bool(known.repeated))


async def test_an_engine_that_tells_no_text() -> None:
    engine = Engine(LETTERS)
    engine.refuses = True
    with pytest.raises(EngineSpliceError, match="/detokenize"):
        await read_known_text(engine, "m", after(b"a", "a"), 1.0)
    assert not EngineSpliceError.retryable
    assert not EngineSpliceError.counts_against_engine


async def test_a_continuation_ends_as_the_engine_says() -> None:
    outcome = EngineOutcome(("length",), 5, 2, 4)
    engine, recorder = Engine(LETTERS, [[piece("d")], [piece("e", "length")], outcome]), Recorder()
    timeouts = EngineTimeouts(total_s=60)
    given_outcome = await continue_generation(
        engine, REQUEST, "m", after(b"abc", "abc"), recorder, timeouts, request_id="r.2"
    )
    assert given_outcome is outcome
    assert recorder.text == "de"
    assert recorder.prompts == []
    assert engine.calls[0].request_id == "r.2"
    # Asking for the text took its share.
    assert 0 < engine.timeouts.total_s < 60


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_across_the_splice_ends_the_engines_work(include: bool) -> None:
    request = with_stop("bcde", include_stop_str_in_output=include)
    engine, recorder = Engine(LETTERS, [[piece("d")], [piece("e"), piece("f")], [piece("g")]]), Recorder()
    delivered = "abc" if include else ""
    outcome = await continue_generation(
        engine, request, "m", after(b"abc", delivered), recorder, EngineTimeouts()
    )
    assert engine.cancelled
    assert delivered + recorder.text == ("abcde" if include else "a")
    assert (recorder.deltas[-1].finish_reason, recorder.deltas[-1].stop_reason) == ("stop", "bcde")
    assert outcome == EngineOutcome(("stop",), 5, 2)


@pytest.mark.parametrize(
    ("ids", "kept"), [(b"de", b"de"), (b"def", b"de"), (b"defgh", b"de"), ("de☃".encode(), b"de")]
)
async def test_tokens_after_a_stop_string_are_dropped_from_its_piece(ids: bytes, kept: bytes) -> None:
    engine, recorder = Engine(LETTERS, [[piece(ids.decode(), ids=tuple(ids))]]), Recorder()
    outcome = await continue_generation(
        engine, with_stop("bcde"), "m", after(b"abc", ""), recorder, EngineTimeouts()
    )
    assert recorder.text == "a"
    assert recorder.token_ids == list(kept)
    assert recorder.deltas[-1].token_count == outcome.completion_token_count == len(kept)


async def test_an_engine_that_dies_right_after_a_stop_string_loses_nothing() -> None:
    class Dying(Engine):
        async def detokenize(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
            if self.calls:
                raise EngineStreamBrokenError("gone")
            return await super().detokenize(model, token_ids, timeout_s)

    engine, recorder = Dying(LETTERS, [[piece("def", ids=tuple(b"def"))]]), Recorder()
    outcome = await continue_generation(
        engine, with_stop("bcde"), "m", after(b"abc", ""), recorder, EngineTimeouts()
    )
    assert (recorder.text, recorder.token_ids) == ("a", list(b"def"))
    assert outcome.finish_reasons == ("stop",)


async def test_a_lost_continuation_is_an_error_like_any_other() -> None:
    broken = EngineStreamBrokenError("cut")
    engine, recorder = Engine(LETTERS, [[piece("d")], broken]), Recorder()
    with pytest.raises(EngineError) as caught:
        await continue_generation(
            engine, with_stop("xyz"), "m", after(b"abc", "a"), recorder, EngineTimeouts()
        )
    assert caught.value is broken
    # What is held back for the stop string is the same as ever: another one can go on.
    assert "a" + recorder.text == "ab"


async def test_output_that_cannot_be_joined_ends_the_attempt() -> None:
    engine = Engine(LETTERS, [[piece("something else")]])
    cut = "abé".encode()[:-1]
    with pytest.raises(EngineSpliceError, match="inside the character"):
        await continue_generation(engine, REQUEST, "m", after(cut, "ab"), Recorder(), EngineTimeouts())
    assert engine.cancelled


async def test_cancelling_stops_the_engine() -> None:
    engine, recorder = Engine(LETTERS, [[piece("d")]]), Recorder()
    task = asyncio.create_task(
        continue_generation(engine, REQUEST, "m", after(b"abc", "abc"), recorder, EngineTimeouts())
    )
    async with asyncio.timeout(5):
        while not recorder.deltas:  # noqa: ASYNC110 - the recorder tells nobody
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.cancelled


async def test_a_chat_without_a_bound_asks_for_the_context() -> None:
    engine = Engine(LETTERS, [EngineOutcome(("length",))])
    request = RequestMetadata(request_id="r", messages=({"role": "user", "content": "x"},))
    await continue_generation(engine, request, "m", after(b"abc", "abc"), Recorder(), EngineTimeouts())
    assert b'"max_tokens":45' in engine.calls[0].body


@pytest.mark.parametrize(("total_s", "phase"), [(3.0, "total"), (60.0, "first_token")])
async def test_whose_time_is_up_while_the_engine_is_asked(total_s: float, phase: str) -> None:
    class Silent(Engine):
        async def detokenize(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
            raise EngineTimeoutError(f"no answer within {timeout_s:g} s", "first_token")

    with pytest.raises(EngineTimeoutError) as caught:
        await continue_generation(
            Silent(LETTERS), REQUEST, "m", after(b"a", "a"), Recorder(), EngineTimeouts(total_s=total_s)
        )
    assert caught.value.phase == phase
    assert caught.value.counts_against_engine is (phase != "total")


async def test_a_piece_without_token_ids_stays_whole() -> None:
    unknown = EngineDelta(0, "def", None, 3)
    engine, recorder = Engine(LETTERS, [[unknown]]), Recorder()
    outcome = await continue_generation(
        engine, with_stop("bcde"), "m", after(b"abc", ""), recorder, EngineTimeouts()
    )
    assert (recorder.text, recorder.deltas[-1].token_count) == ("a", 3)
    assert outcome.completion_token_count == 3
