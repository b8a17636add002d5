"""Events of the core as JSON and back, field by field, from the types that their classes declare.

Everything comes back equal, with these exceptions, because a log is read by
people and kept for long:

* The text of prompts. A request's digest is logged instead, which is all that
  the core reads of a prompt, and the size of the text, which counts in the
  queue's bound: it comes back as a body of that many zero bytes.
* ``sampling.engine_extras``: they may hold text and salts. The core reads nothing
  of them but what the digest has already.
* Keys of engines.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from sagecp.core import events as ev
from sagecp.core.placement import PlacementInputs
from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.prompt_digest import digest_prompt
from sagecp.core.prompt_size import payload_size_bytes
from sagecp.core.types import RequestMetadata

EVENT_TYPES: Mapping[str, type] = {kind.__name__: kind for kind in typing.get_args(ev.Event)}
"""Every event of the core, by the name of its class."""

_TEXT_SIZE = "prompt_size_bytes"
# Names that the core's annotations use and its modules import for type checkers only.
_LATE_NAMES = {"StepTimeParameters": StepTimeParameters, "PlacementInputs": PlacementInputs}
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encode_event(event: ev.Event) -> dict[str, Any]:
    """Return an event's fields as JSON holds them; fields that have their default are left out."""
    if isinstance(event, ev.RequestArrived):
        return _encode_arrival(event.metadata)
    if isinstance(event, (ev.InstanceRegistered, ev.InstanceRestored)):
        event = dataclasses.replace(event, instance=dataclasses.replace(event.instance, api_key=""))
    if isinstance(event, ev.RequestsRestored):
        event = ev.RequestsRestored(
            tuple(dataclasses.replace(each, metadata=without_text(each.metadata)) for each in event.requests)
        )
    return encode_fields(event)


def decode_event(name: str, fields: Mapping[str, Any]) -> ev.Event:
    """Return the event that :func:`encode_event` was given.

    Raises:
        ValueError: There is no such event, or it has no such field.
    """
    kind = EVENT_TYPES.get(name)
    if kind is None:
        raise ValueError(f"unknown event {name!r}; known are {', '.join(EVENT_TYPES)}")
    size = 0
    if kind is ev.RequestArrived:
        size = int(fields.get(_TEXT_SIZE, 0))
        fields = {key: value for key, value in fields.items() if key != _TEXT_SIZE}
    event: ev.Event = decode_fields(kind, fields)
    if size and isinstance(event, ev.RequestArrived):
        event = ev.RequestArrived(dataclasses.replace(event.metadata, openai_body=bytes(size)))
    return event


def without_text(metadata: RequestMetadata) -> RequestMetadata:
    """Return a request with the digest of its prompt instead of the prompt, and without engine extras."""
    return dataclasses.replace(
        metadata,
        prompt=None,
        messages=(),
        tools=(),
        tool_choice=None,
        prompt_token_ids=(),
        openai_body=b"",
        sampling=dataclasses.replace(metadata.sampling, engine_extras={})
        if metadata.sampling.engine_extras
        else metadata.sampling,
        prompt_digest=digest_prompt(metadata),
    )


def _encode_arrival(metadata: RequestMetadata) -> dict[str, Any]:
    size = payload_size_bytes(metadata)
    fields = {"metadata": encode_fields(without_text(metadata))}
    return {**fields, _TEXT_SIZE: size} if size else fields


# -- values ----------------------------------------------------------------------


def encode_all_fields(value: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Return all of a dataclass's fields as JSON holds them, for what outlives a change of defaults."""
    return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}


def encode_fields(value: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Return a dataclass's fields that differ from their defaults, as JSON holds them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if content is field.default:
            continue
        default = (
            field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        )
        # 1 and 1.0 and True are equal, and not the same in JSON.
        if type(content) is not type(default) or content != default:
            found[field.name] = _encode(content)
    return found


def decode_fields(kind: type, fields: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an instance of kind
    """Return a dataclass made from what :func:`encode_fields` returned.

    Raises:
        ValueError: It has no such field, or lacks one that has no default.
    """
    decoders = _decoders(kind)
    unknown = sorted(fields.keys() - decoders.keys())
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; it has {', '.join(decoders)}")
    try:
        return kind(**{name: decoders[name](value) for name, value in fields.items()})
    except TypeError as error:
        raise ValueError(
            f"{kind.__name__} cannot be made of {', '.join(fields) or 'nothing'}: {error}"
        ) from error


def _encode(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has no such numbers; Python writes the others so that they come back bit for bit.
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, frozenset):
        return [_encode(item) for item in sorted(value)]
    return encode_fields(value)


@functools.cache
def _decoders(kind: type) -> Mapping[str, Callable[[Any], Any]]:
    hints = typing.get_type_hints(kind, localns=_LATE_NAMES)
    return {field.name: _decoder(hints[field.name]) for field in dataclasses.fields(kind)}


def _decoder(hint: Any) -> Callable[[Any], Any]:  # noqa: ANN401 - an annotation
    """Return what turns JSON into a value of the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {types.UnionType, typing.Union}:
        inner = _decoder(next(each for each in arguments if each is not type(None)))
        return lambda value: None if value is None else inner(value)
    if origin in {tuple, frozenset}:
        item = _decoder(arguments[0])
        return lambda value: origin(item(each) for each in value)
    if origin is not None and issubclass(origin, Mapping):
        key, content = _decoder(arguments[0]), _decoder(arguments[1])
        return lambda value: {key(name): content(each) for name, each in value.items()}
    return _plain_decoder(hint)


def _plain_decoder(hint: Any) -> Callable[[Any], Any]:  # noqa: ANN401 - an annotation
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return lambda value: decode_fields(hint, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return lambda value: hint[value]
    if hint is float:
        return lambda value: _NOT_FINITE[value] if isinstance(value, str) else value
    if hint is int:
        return int
    if hint is bytes:
        return base64.b64decode
    return lambda value: value
