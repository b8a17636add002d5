"""Which model a plan is for: its configuration, its shape, or its name."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from typing import Any, NoReturn

from sagecp.core.errors import FieldViolation, InvalidRequestError
from sagecp.core.parallelism.known_models import KNOWN_MODELS, find_model
from sagecp.core.parallelism.model_config import MAX_CONFIG_BYTES, parse_model_config
from sagecp.core.parallelism.model_config_fields import ROOT
from sagecp.core.parallelism.model_description import ExpertShape, ModelDescription, WeightFormat
from sagecp.rpc.convert.field_checks import FieldChecks
from sagecp.v1 import admin_service_pb2, parallelism_pb2

_MAX_NAME_LENGTH = 256
_MAX_SIZE = 10_000_000
# Of a shape that does not tell: Llama's.
_USUAL_HEAD_SIZE = 128
_USUAL_VOCABULARY_SIZE = 128_256
_USUAL_CONTEXT_TOKEN_COUNT = 131_072
_SUGGESTED_NAMES = 3
_PLAIN_FORMATS = {WeightFormat.BFLOAT16, WeightFormat.FLOAT16, WeightFormat.FLOAT32}
_FORMAT_OF_BYTES = {
    4.0: WeightFormat.FLOAT32,
    2.0: WeightFormat.BFLOAT16,
    1.0: WeightFormat.FP8,
    0.5: WeightFormat.INT4,
}


def model_from_proto(
    request: admin_service_pb2.PlanParallelismRequest, checks: FieldChecks
) -> ModelDescription | None:
    """Return the model of a request; ``None``: it has none that can be used, which is noted."""
    weight_format = _weight_format(request.weight_format, checks)
    if not checks.length("model_name", len(request.model_name), _MAX_NAME_LENGTH, "characters"):
        return None
    if request.model_config_json:
        return _from_config(request, weight_format, checks)
    if request.HasField("model_shape"):
        return _from_shape(request.model_shape, request.model_name, weight_format, checks)
    if not request.model_name:
        checks.note(
            "model_name",
            "no model is given; give model_config_json (the config.json of a checkpoint), model_shape, or "
            "the name of a model that is known",
        )
        return None
    model = find_model(request.model_name)
    if model is None:
        checks.note("model_name", unknown_model(request.model_name))
    elif weight_format is not None and weight_format is not model.weight_format:
        return _stored_as(model, weight_format, checks)
    return model


def _stored_as(
    model: ModelDescription, weight_format: WeightFormat, checks: FieldChecks
) -> ModelDescription | None:
    """Return a model that is published in 16 bits as it would be, stored otherwise."""
    if model.weight_format in _PLAIN_FORMATS:
        return dataclasses.replace(model, weight_format=weight_format)
    checks.note(
        "weight_format",
        f"is {weight_format.value}, but {model.name} is published in {model.weight_format.value}; give "
        "model_config_json for a checkpoint that is stored otherwise",
    )
    return None


def unknown_model(name: str) -> str:
    """Return what to say of a name that is not known."""
    names = sorted(KNOWN_MODELS)
    by_lower_case = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=_SUGGESTED_NAMES, cutoff=0.5)
    hint = f"; did you mean {' or '.join(by_lower_case[each] for each in close)}?" if close else "."
    return (
        f"no model {name!r} is known{hint} Give the model's config.json (model_config_json), its shape "
        f"(model_shape), or one of the {len(names)} names that are known, such as {', '.join(names[:3])}"
    )


def _weight_format(text: str, checks: FieldChecks) -> WeightFormat | None:
    if not text:
        return None
    try:
        return WeightFormat(text)
    except ValueError:
        names = ", ".join(each.value for each in WeightFormat)
        checks.note("weight_format", f"is {text[:64]!r}; choose one of {names}")
        return None


def _from_config(
    request: admin_service_pb2.PlanParallelismRequest,
    weight_format: WeightFormat | None,
    checks: FieldChecks,
) -> ModelDescription | None:
    field, text = "model_config_json", request.model_config_json
    if not checks.length(field, len(text.encode(errors="replace")), MAX_CONFIG_BYTES, "bytes"):
        return None
    try:
        config: Any = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        checks.note(field, "is nested too deeply for a model's configuration")
        return None
    except ValueError as error:
        checks.note(field, f"is not valid JSON: {error}")
        return None
    if not isinstance(config, dict):
        checks.note(field, f"is a JSON {_kind(config)}; a model's config.json is an object")
        return None
    try:
        return parse_model_config(config, name=request.model_name, weight_format=weight_format)
    except InvalidRequestError as error:
        checks.violations += [
            FieldViolation(each.field.replace(ROOT, field, 1), each.description) for each in error.violations
        ]
        return None


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _kind(value: object) -> str:
    kinds: dict[type, str] = {
        list: "list",
        str: "string",
        int: "number",
        float: "number",
        bool: "truth value",
    }
    return kinds.get(type(value), "null")


def _from_shape(
    shape: parallelism_pb2.ModelShape,
    name: str,
    weight_format: WeightFormat | None,
    checks: FieldChecks,
) -> ModelDescription | None:
    """Return the model with the shape; widths follow from the numbers of parameters."""
    before = len(checks.violations)
    field = "model_shape"
    checks.count(f"{field}.parameter_count", shape.parameter_count, 1, 10**14)
    for count_name in ("layer_count", "hidden_size", "attention_head_count"):
        checks.count(f"{field}.{count_name}", getattr(shape, count_name), 1, _MAX_SIZE)
    for count_name in ("key_value_head_count", "head_size", "vocabulary_size", "expert_count"):
        checks.count(f"{field}.{count_name}", getattr(shape, count_name), 0, _MAX_SIZE)
    if shape.expert_count:
        checks.count(f"{field}.active_expert_count", shape.active_expert_count, 1, shape.expert_count)
        checks.count(
            f"{field}.expert_parameter_count", shape.expert_parameter_count, 1, shape.parameter_count
        )
    stored = weight_format or _FORMAT_OF_BYTES.get(shape.bytes_per_weight or 2.0)
    if stored is None:
        checks.note(
            f"{field}.bytes_per_weight",
            f"is {shape.bytes_per_weight:g}; give 4, 2, 1 or 0.5, or name the format in weight_format",
        )
    if len(checks.violations) > before or stored is None:
        return None
    return _described(shape, name, stored, checks)


def _described(
    shape: parallelism_pb2.ModelShape, name: str, stored: WeightFormat, checks: FieldChecks
) -> ModelDescription | None:
    heads, hidden, layers = shape.attention_head_count, shape.hidden_size, shape.layer_count
    key_value_heads = shape.key_value_head_count or heads
    head_size = shape.head_size or (hidden // heads) or _USUAL_HEAD_SIZE
    vocabulary = shape.vocabulary_size or _USUAL_VOCABULARY_SIZE
    attention = 2 * hidden * head_size * (heads + key_value_heads)
    rest = shape.parameter_count - shape.expert_parameter_count - 2 * vocabulary * hidden - layers * attention
    # What is left over is what every token visits: the dense layers, or the shared experts.
    width = max(0, round(rest / (3 * hidden * layers)))
    if not shape.expert_count and width < 1:
        checks.note(
            "model_shape.parameter_count",
            f"is {shape.parameter_count:,}, but the embeddings and the attention of this shape have "
            f"{shape.parameter_count - rest:,} already; check vocabulary_size, layer_count and hidden_size",
        )
        return None
    experts = None
    if shape.expert_count:
        experts = ExpertShape(
            expert_count=shape.expert_count,
            active_expert_count=shape.active_expert_count,
            intermediate_size=max(
                1, math.ceil(shape.expert_parameter_count / (3 * hidden * layers * shape.expert_count))
            ),
            shared_intermediate_size=width,
            layer_count=layers,
        )
    return ModelDescription(
        name=name or "model",
        layer_count=layers,
        hidden_size=hidden,
        intermediate_size=0 if experts else width,
        attention_head_count=heads,
        key_value_head_count=key_value_heads,
        head_size=head_size,
        value_head_size=head_size,
        experts=experts,
        vocabulary_size=vocabulary,
        max_context_token_count=_USUAL_CONTEXT_TOKEN_COUNT,
        weight_format=stored,
        parameter_count=shape.parameter_count,
    )
