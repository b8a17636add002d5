"""Ranges of sampling parameters, checked in vLLM's order and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sagecp.sim.api_fields import ApiError, FieldReader, describe, refuse

_MAX_CHOICES = 16_384
_MAX_LOGPROBS = 20
_STREAM_OPTIONS = "stream_options"


def read_sampling(reader: FieldReader) -> dict[str, float]:
    """Read the parameters that are numbers, with their defaults."""
    defaults = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "min_p": 0.0,
    }
    values: dict[str, float] = {}
    for name, default in defaults.items():
        given = reader.optional_number(name)
        values[name] = default if given is None else given
    values["top_k"] = reader.optional_integer("top_k") or 0
    return values


def check_sampling(
    choice_count: int,
    sampling: Mapping[str, float],
    max_tokens: int,
    min_tokens: int,
    logprobs: int | None,
    stop: Sequence[str],
    data: Mapping[str, Any],
) -> None:
    """Check that values are in range and go together.

    Args:
        choice_count: Answers per prompt.
        sampling: What :func:`read_sampling` returned.
        max_tokens: The smallest output bound of any prompt.
        min_tokens: Tokens before which an answer may not end.
        logprobs: Alternatives per token, or ``None``.
        stop: Texts that end an answer.
        data: The whole body.

    Raises:
        ApiError: Something does not.
    """
    if choice_count < 1:
        raise refuse(f"n must be at least 1, got {choice_count}.")
    if choice_count > _MAX_CHOICES:
        raise refuse(
            f"n must be at most {_MAX_CHOICES}, got {choice_count}. "
            "To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= sampling[name] <= 2:
            raise refuse(f"{name} must be in [-2, 2], got {sampling[name]}.")
    if not sampling["repetition_penalty"] > 0:
        raise refuse(f"repetition_penalty must be greater than zero, got {sampling['repetition_penalty']}.")
    temperature = sampling["temperature"]
    if not temperature >= 0:
        raise refuse(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
    if temperature > 2:
        raise refuse(f"temperature must be in [0, 2], got {temperature}.", "temperature", temperature)
    if not 0 < sampling["top_p"] <= 1:
        raise refuse(f"top_p must be in (0, 1], got {sampling['top_p']}.", "top_p", sampling["top_p"])
    if sampling["top_k"] < -1:
        raise refuse(f"top_k must be 0 (disable), or at least 1, got {sampling['top_k']}.")
    if not 0 <= sampling["min_p"] <= 1:
        raise refuse(f"min_p must be in [0, 1], got {sampling['min_p']}.")
    if max_tokens < 1:
        raise refuse(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)
    if min_tokens < 0:
        raise refuse(f"min_tokens must be greater than or equal to 0, got {min_tokens}.")
    if min_tokens > max_tokens:
        raise refuse(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.")
    if any(not text for text in stop):
        raise refuse("stop cannot contain an empty string.")
    if temperature == 0 and choice_count > 1:
        raise refuse(f"n must be 1 when using greedy sampling, got {choice_count}.")
    if logprobs is not None and logprobs > _MAX_LOGPROBS:
        raise refuse(
            f"Requested sample logprobs of {logprobs}, which is greater than max allowed: {_MAX_LOGPROBS}",
            "logprobs",
            logprobs,
        )
    bias = data.get("logit_bias")
    if isinstance(bias, dict):
        wrong = [key for key in bias if not str(key).lstrip("-").isdigit()]
        if wrong:
            raise ApiError(
                "logit_bias contains key(s) that cannot be converted to integer token IDs: "
                f"{wrong} (parameter=logit_bias, value={wrong})",
                param="logit_bias",
            )


def check_stream_options(data: Mapping[str, Any]) -> None:
    """Check that options of streams come with a stream.

    Raises:
        ApiError: They do not.
    """
    if data.get(_STREAM_OPTIONS) and not data.get("stream"):
        raise refuse("Stream options can only be defined when `stream=True`.", _STREAM_OPTIONS)


def check_chat_logprobs(data: Mapping[str, Any]) -> None:
    """Check chat's two fields for log probabilities.

    Raises:
        ApiError: They make no sense, or not together.
    """
    check_logprob_count(data, "top_logprobs")
    if data.get("top_logprobs") and not data.get("logprobs"):
        raise refuse("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")


def check_logprob_count(data: Mapping[str, Any], name: str) -> None:
    """Check a number of alternatives.

    Raises:
        ApiError: It is none.
    """
    value = data.get(name)
    if value is None:
        return
    if not isinstance(value, int | float):
        raise ApiError(
            f"`{name}` must be an integer. (parameter={name}, value={describe(value)})", param=name
        )
    if value < 0 and value != -1:
        raise refuse(f"`{name}` must be a positive value or -1.", name, value)
