"""What a request must satisfy before the core sees it. One place, for the library and for every edge."""

from __future__ import annotations

import ipaddress
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping

from sagecp.core.engine_address import why_no_engine
from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.types import ExecutionInstance, RequestMetadata, SamplingParameters

ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
ID_HINT = "use 1 to 128 characters of A-Z a-z 0-9 . _ : -"
# A name, an IPv4 or an IPv6 address (with a zone); internationalised names in their ASCII form.
_HOST_PATTERN = re.compile(r"[A-Za-z0-9_.:%-]{1,253}")
_API_KEY_PATTERN = re.compile(r"[!-~]{0,4096}")
MAX_TOKENS_LIMIT = 10_000_000
MAX_DURATION_MS = 7 * 24 * 3600 * 1000.0
_STRUCTURED_KINDS = ("json_schema", "json_object", "regex", "grammar", "choice")

# Field, lowest, highest, whether the lowest itself is allowed.
_FLOAT_RANGES = (
    ("temperature", 0.0, 2.0, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("presence_penalty", -2.0, 2.0, True),
    ("frequency_penalty", -2.0, 2.0, True),
    ("repetition_penalty", 0.0, 100.0, False),
)
_INTEGER_RANGES = (
    ("min_tokens", 0, MAX_TOKENS_LIMIT),
    ("top_k", -1, 2**31 - 1),
    ("n", 1, 128),
    ("logprobs", 0, 100),
    ("prompt_logprobs", 0, 100),
    ("truncate_prompt_tokens", 1, MAX_TOKENS_LIMIT),
)
_floats_of = operator.attrgetter(*(name for name, *_ in _FLOAT_RANGES))
_integers_of = operator.attrgetter(*(name for name, *_ in _INTEGER_RANGES))


def check_request(metadata: RequestMetadata, further: Iterable[FieldViolation] = ()) -> None:
    """Make sure that a request can be handed to the core.

    Args:
        metadata: The request.
        further: What the caller found wrong with it besides.

    Raises:
        InvalidRequestError: Names every bad field at once.
    """
    violations = [*request_violations(metadata), *further]
    if violations:
        raise InvalidRequestError(violations)


def request_violations(metadata: RequestMetadata) -> Iterator[FieldViolation]:
    """Yield every bad field of a request, by the contract's field names."""
    if metadata.request_id and not ID_PATTERN.fullmatch(metadata.request_id):
        yield FieldViolation("request_id", f"{_shown(metadata.request_id)} is not an id; {ID_HINT}")
    kinds = [
        name
        for name, given in (
            ("text", metadata.prompt is not None),
            ("chat", bool(metadata.messages)),
            ("token_ids", bool(metadata.prompt_token_ids)),
            ("openai", bool(metadata.openai_body)),
        )
        if given
    ]
    if len(kinds) > 1:
        yield FieldViolation("prompt", f"gives {' and '.join(kinds)}; choose one")
    if metadata.openai_body and metadata.openai_api is None:
        yield FieldViolation("prompt.openai.api", "is not set; say which endpoint the body is for")
    if metadata.max_tokens is not None and not 1 <= metadata.max_tokens <= MAX_TOKENS_LIMIT:
        yield FieldViolation(
            "sampling.max_tokens", f"is {metadata.max_tokens}; must be 1 to {MAX_TOKENS_LIMIT}"
        )
    yield from _sampling_violations(metadata.sampling)
    if (
        metadata.max_tokens is not None
        and metadata.sampling.min_tokens is not None
        and metadata.sampling.min_tokens > metadata.max_tokens
    ):
        yield FieldViolation(
            "sampling.min_tokens",
            f"is {metadata.sampling.min_tokens}, above max_tokens {metadata.max_tokens}",
        )
    for name, value in (
        ("objectives.end_to_end_deadline", metadata.slo_deadline_ms),
        ("objectives.time_to_first_token", metadata.ttft_slo_ms),
        ("objectives.time_per_output_token", metadata.tpot_slo_ms),
    ):
        if value is not None and not 0 < value <= MAX_DURATION_MS:
            yield FieldViolation(name, f"is {value:g} ms; must be above 0 and at most 7 days")
    budget = metadata.cost_budget
    if budget is not None and not (budget > 0 and math.isfinite(budget)):
        yield FieldViolation("cost_budget_usd", f"is {budget:g}; must be above 0")
    for name, text in (("user_id", metadata.user_id), ("session_id", metadata.session_id)):
        if len(text) > 256:
            yield FieldViolation(name, f"has {len(text)} characters; at most 256 are allowed")
    yield from label_violations(metadata.labels)


def _sampling_violations(sampling: SamplingParameters) -> Iterator[FieldViolation]:
    for (name, low, high, inclusive), value in zip(_FLOAT_RANGES, _floats_of(sampling), strict=True):
        if value is not None and not ((low <= value if inclusive else low < value) and value <= high):
            edge = f"{low:g} to {high:g}" if inclusive else f"above {low:g} and at most {high:g}"
            yield FieldViolation(f"sampling.{name}", f"is {value:g}; must be {edge}")
    for (name, lowest, highest), count in zip(_INTEGER_RANGES, _integers_of(sampling), strict=True):
        if count is not None and not lowest <= count <= highest:
            yield FieldViolation(f"sampling.{name}", f"is {count}; must be {lowest} to {highest}")
    if len(sampling.stop) > 64:
        yield FieldViolation("sampling.stop", f"has {len(sampling.stop)} strings; at most 64 are allowed")
    for index, stop in enumerate(sampling.stop):
        if not 1 <= len(stop) <= 1024:
            yield FieldViolation(
                f"sampling.stop[{index}]", f"has {len(stop)} characters; must have 1 to 1024"
            )
    for token_id, bias in sampling.logit_bias.items():
        if not -100 <= bias <= 100:
            yield FieldViolation(f"sampling.logit_bias[{token_id}]", f"is {bias:g}; must be -100 to 100")
    if sampling.structured_output:
        given = sorted(sampling.structured_output)
        if len(given) != 1 or given[0] not in _STRUCTURED_KINDS:
            yield FieldViolation(
                "sampling.structured_output",
                f"gives {', '.join(given)}; must give exactly one of {', '.join(_STRUCTURED_KINDS)}",
            )


def label_violations(labels: Mapping[str, str]) -> Iterator[FieldViolation]:
    """Yield what is wrong with a mapping of labels."""
    if len(labels) > 16:
        yield FieldViolation("labels", f"has {len(labels)} entries; at most 16 are allowed")
    for key, value in labels.items():
        if not 1 <= len(key) <= 63 or len(value) > 63:
            yield FieldViolation(
                f"labels[{_shown(key)}]", "keys must have 1 to 63 characters, values at most 63"
            )


def check_instance(instance: ExecutionInstance) -> None:
    """Make sure that an instance can join the fleet.

    Raises:
        InvalidRequestError: Names every bad field at once.
    """
    violations = list(instance_violations(instance))
    if violations:
        raise InvalidRequestError(violations)


def instance_violations(instance: ExecutionInstance) -> Iterator[FieldViolation]:
    """Yield every bad field of an instance, by the contract's field names."""
    if not ID_PATTERN.fullmatch(instance.instance_id):
        yield FieldViolation("instance_id", f"{_shown(instance.instance_id)} is not an id; {ID_HINT}")
    if (
        not _is_host(instance.host)
        or not 1 <= instance.port <= 65535
        or instance.scheme not in {"http", "https"}
    ):
        yield FieldViolation(
            "engine_url",
            f"{_shown(instance.engine_url)} is not http or https with a host and a port of 1 to 65535",
        )
    elif why := why_no_engine(instance.host):
        yield FieldViolation("engine_url", f"{_shown(instance.host)} {why}")
    if not _API_KEY_PATTERN.fullmatch(instance.api_key):
        # Without its value: it is a secret.
        yield FieldViolation(
            "engine_api_key", "must be printable ASCII without spaces, at most 4096 characters"
        )
    if not instance.model_name or len(instance.model_name) > 512:
        yield FieldViolation("model_name", "must have 1 to 512 characters")
    if len(instance.model_aliases) > 1000:
        yield FieldViolation("model_aliases", f"has {len(instance.model_aliases)} names; at most 1000")
    for name in ("tensor", "pipeline", "data", "expert"):
        size = getattr(instance, f"{name}_parallel_size")
        if not 1 <= size <= 4096:
            yield FieldViolation(f"parallel_sizes.{name}_parallel_size", f"is {size}; must be 1 to 4096")
    if not 0 <= instance.gpu_count <= 4096:
        yield FieldViolation("gpu_count", f"is {instance.gpu_count}; must be 0 to 4096")
    for name, number in (
        ("gpu_memory_gib", instance.gpu_memory_gb),
        ("usd_per_gpu_hour", instance.usd_per_gpu_hour),
    ):
        if number is not None and not (number >= 0 and math.isfinite(number)):
            yield FieldViolation(name, f"is {number:g}; must be 0 or more")
    for name in (
        "max_context_token_count",
        "key_value_token_capacity",
        "max_concurrent_request_count",
    ):
        count = getattr(instance, name)
        if count is not None and count < 1:
            yield FieldViolation(name, f"is {count}; must be at least 1, or absent")
    yield from label_violations(instance.labels)


def _is_host(host: str) -> bool:
    if not _HOST_PATTERN.fullmatch(host):
        return False
    if ":" not in host:
        return True
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    """Return the text as a message may show it: quoted and short."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
