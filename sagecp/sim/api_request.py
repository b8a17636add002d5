"""What a client asked for: completion and chat bodies, checked as vLLM checks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sagecp.sim import tokenizer
from sagecp.sim.api_checks import (
    check_chat_logprobs,
    check_logprob_count,
    check_sampling,
    check_stream_options,
    read_sampling,
)
from sagecp.sim.api_fields import INT64_MAX, INT64_MIN, ApiError, FieldReader, parse_object, refuse

_DEFAULT_COMPLETION_TOKENS = 16
_STREAM_OPTIONS = "stream_options"


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """A checked request for text.

    Attributes:
        is_chat: Whether it came over the chat endpoint.
        model: The name to answer with.
        prompts: Token ids of each prompt (chat has one).
        prompt_texts: The prompts as text, for ``echo``.
        choice_count: Answers per prompt.
        max_tokens: Output bound of each prompt's answers, cut to the context.
        asked_max_tokens: The bound as the client gave it, before it was cut.
        min_tokens: Tokens before which an answer may not end by itself.
        temperature: 0 is greedy.
        seed: Makes sampled answers repeatable, or ``None``.
        stop: Texts that end an answer.
        include_stop: Whether the stop text is part of the answer.
        stop_token_ids: Tokens that end an answer.
        ignore_eos: Never end before the bound.
        logprobs: Alternatives per token, or ``None`` for no probabilities.
        echo: Put the prompt before the answer.
        echo_only: Show the prompt and no answer (``max_tokens`` 0).
        stream: Answer token by token.
        include_usage: End a stream with the token counts.
        continuous_usage: Repeat the counts in every event.
        return_token_ids: Give token ids beside the text.
        body_request_id: The id the body asks for, or ``None``.
    """

    is_chat: bool
    model: str
    prompts: tuple[list[int], ...]
    prompt_texts: tuple[str, ...]
    choice_count: int
    max_tokens: tuple[int, ...]
    asked_max_tokens: int | None
    min_tokens: int
    temperature: float
    seed: int | None
    stop: tuple[str, ...]
    include_stop: bool
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    logprobs: int | None
    echo: bool
    echo_only: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    body_request_id: str | None


def parse_completion(body: bytes, models: Sequence[str], max_model_len: int) -> GenerationCall:
    """Check the body of ``/v1/completions``.

    Raises:
        ApiError: Something in it is wrong.
    """
    data = parse_object(body)
    check_logprob_count(data, "logprobs")
    check_stream_options(data)
    if data.get("prompt") in (None, ""):
        raise refuse("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    reader = FieldReader(data)
    model = reader.optional_string("model")
    prompts = _read_prompts(reader, data["prompt"])
    max_tokens = reader.optional_integer("max_tokens")
    asked = _DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens
    logprobs = reader.optional_integer("logprobs")
    return _finish(
        reader,
        model,
        models,
        max_model_len,
        prompts,
        asked,
        logprobs,
        is_chat=False,
        echo=reader.boolean("echo"),
    )


def parse_chat(body: bytes, models: Sequence[str], max_model_len: int) -> GenerationCall:
    """Check the body of ``/v1/chat/completions``.

    Raises:
        ApiError: Something in it is wrong.
    """
    data = parse_object(body)
    check_chat_logprobs(data)
    check_stream_options(data)
    reader = FieldReader(data)
    messages = read_messages(reader)
    model = reader.optional_string("model")
    asked = reader.optional_integer("max_completion_tokens")
    if asked is None:
        asked = reader.optional_integer("max_tokens")
    top_logprobs = reader.optional_integer("top_logprobs")
    logprobs = (top_logprobs or 0) if reader.boolean("logprobs") else None
    reader.raise_failures()
    check_model(model, models)
    if data.get("tools") and data.get("tool_choice", "auto") != "none":
        raise refuse('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
    if not messages:
        raise refuse("Cannot apply chat template to an empty conversation. Provide at least one message.")
    prompts = [tokenizer.encode_chat(messages)]
    return _finish(reader, model, models, max_model_len, prompts, asked, logprobs, is_chat=True, echo=False)


def check_model(model: str | None, models: Sequence[str]) -> str:
    """Return the name to answer with; an absent name means the first.

    Raises:
        ApiError: The model is not served.
    """
    if model is None or model == "":
        return models[0]
    if model not in models:
        raise ApiError(
            f"The model `{model}` does not exist. Valid aliases: {', '.join(models)}.",
            status=404,
            type_="NotFoundError",
            param="model",
        )
    return model


def check_token_ids(token_ids: Sequence[int]) -> None:
    """Check that every id is in the vocabulary.

    Raises:
        ApiError: One is not.
    """
    if token_ids and max(token_ids) >= tokenizer.VOCABULARY_SIZE:
        raise refuse(f"Token id {max(token_ids)} is out of vocabulary")


def read_messages(reader: FieldReader) -> list[tuple[str, str]]:
    """Read chat messages as (role, text) pairs.

    Raises:
        ApiError: A message holds something other than text.
    """
    if "messages" not in reader.data:
        reader.fail("messages", "missing", "Field required", reader.data)
        return []
    return reader.items("messages", reader.data["messages"], lambda where, raw: _message(reader, where, raw))


def _message(reader: FieldReader, where: str, raw: object) -> tuple[str, str]:
    if not isinstance(raw, dict):
        reader.fail(where, "dict_type", "Input should be a valid dictionary", raw)
        return "", ""
    role = raw.get("role")
    if not isinstance(role, str):
        kind = (
            ("missing", "Field required")
            if role is None
            else ("string_type", "Input should be a valid string")
        )
        reader.fail(f"{where}.role", *kind, raw if role is None else role)
        return "", ""
    content = raw.get("content")
    if isinstance(content, str):
        return role, content
    if content is None and role not in ("user", "system", "developer"):
        return role, ""
    if not isinstance(content, list):
        reader.fail(f"{where}.content", "string_type", "Input should be a valid string", content)
        return role, ""
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            raise refuse("This model is not a multimodal model")
        else:
            reader.fail(f"{where}.content.{index}.text", "missing", "Field required", part)
    return role, "".join(texts)


def _read_prompts(reader: FieldReader, raw: object) -> list[str | list[int]]:
    """Return every prompt as text or token ids, recording what is neither."""
    if isinstance(raw, str):
        return [raw]
    if not isinstance(raw, list):
        reader.fail("prompt", "list_type", "Input should be a valid list", raw)
        reader.fail("prompt", "string_type", "Input should be a valid string", raw)
        return []
    if raw and all(isinstance(item, int) and not isinstance(item, bool) for item in raw):
        _check_not_negative(reader, "prompt", raw)
        return [raw]
    for index, item in enumerate(raw):
        if isinstance(item, list):
            _check_not_negative(reader, f"prompt.{index}", item)
        elif not isinstance(item, str):
            reader.fail(f"prompt.{index}", "string_type", "Input should be a valid string", item)
    return raw


def _check_not_negative(reader: FieldReader, where: str, token_ids: list[Any]) -> None:
    for index, token_id in enumerate(token_ids):
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            reader.fail(f"{where}.{index}", "int_type", "Input should be a valid integer", token_id)
        elif token_id < 0:
            message = "Input should be greater than or equal to 0"
            reader.fail(f"{where}.{index}", "greater_than_equal", message, token_id, {"ge": 0})


def _finish(
    reader: FieldReader,
    model: str | None,
    models: Sequence[str],
    max_model_len: int,
    raw_prompts: list[str | list[int]] | list[list[int]],
    asked: int | None,
    logprobs: int | None,
    *,
    is_chat: bool,
    echo: bool,
) -> GenerationCall:
    """Read what both endpoints share, and check it in the order that vLLM does."""
    stream = reader.boolean("stream")
    options = reader.data.get(_STREAM_OPTIONS)
    option_reader = FieldReader(options if isinstance(options, dict) else {}, "body." + _STREAM_OPTIONS)
    if options is not None and not isinstance(options, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        reader.fail(_STREAM_OPTIONS, "model_attributes_type", message, options)
    include_usage = option_reader.boolean("include_usage")
    continuous_usage = include_usage and option_reader.boolean("continuous_usage_stats")
    choice_count = reader.integer("n", 1)
    min_tokens = reader.integer("min_tokens", 0)
    seed = reader.optional_integer("seed", minimum=INT64_MIN, maximum=INT64_MAX)
    stop = reader.strings("stop")
    stop_token_ids = reader.integers("stop_token_ids")
    include_stop = reader.boolean("include_stop_str_in_output")
    ignore_eos = reader.boolean("ignore_eos")
    return_token_ids = reader.boolean("return_token_ids")
    body_request_id = reader.optional_string("request_id")
    sampling = read_sampling(reader)
    reader.raise_failures()
    option_reader.raise_failures()

    name = check_model(model, models)
    if not raw_prompts:
        raise refuse("You must pass at least one prompt")
    if asked is not None and asked > max_model_len:
        raise refuse(
            f"max_tokens={asked} cannot be greater than max_model_len={max_model_len}. "
            "Please request fewer output tokens.",
            "max_tokens",
            asked,
        )
    prompts = tuple(_encode_prompt(prompt, max_model_len, rendered=is_chat) for prompt in raw_prompts)
    echo_only = echo and asked == 0
    bounds = tuple(
        min(max_model_len - len(prompt), max_model_len if asked is None else asked) for prompt in prompts
    )
    if echo_only:
        bounds = tuple(1 for _ in prompts)
    check_sampling(choice_count, sampling, min(bounds), min_tokens, logprobs, stop, reader.data)
    texts: tuple[str, ...] = ()
    if echo:
        texts = tuple(p if isinstance(p, str) else tokenizer.decode(p) for p in raw_prompts)
    return GenerationCall(
        is_chat=is_chat,
        model=name,
        prompts=prompts,
        prompt_texts=texts,
        choice_count=choice_count,
        max_tokens=bounds,
        asked_max_tokens=asked,
        min_tokens=min_tokens,
        temperature=sampling["temperature"],
        seed=seed,
        stop=stop,
        include_stop=include_stop,
        stop_token_ids=frozenset(stop_token_ids),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        echo=echo,
        echo_only=echo_only,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=return_token_ids,
        body_request_id=body_request_id,
    )


def _encode_prompt(prompt: str | list[int], max_model_len: int, *, rendered: bool) -> list[int]:
    token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if len(token_ids) > max_model_len:
        if rendered or isinstance(prompt, str):
            # As the real tokenizer, which stops one token after the limit.
            raise _too_long(f"at least {max_model_len + 1}", max_model_len + 1, max_model_len)
        raise _too_long(str(len(token_ids)), len(token_ids), max_model_len)
    check_token_ids(token_ids)
    if not token_ids:
        raise refuse("The decoder prompt cannot be empty")
    return token_ids


def _too_long(how_many: str, count: int, max_model_len: int) -> ApiError:
    return refuse(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
        f"{how_many} input tokens, which exceeds this limit even without any output tokens. "
        "Please reduce the length of the input prompt.",
        "input_tokens",
        count,
    )
