"""Finds the shape of a widely used public model by its name; nothing is guessed."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from sagecp.core.parallelism.known_model_configs import KNOWN_MODELS, SHORT_NAMES
from sagecp.core.parallelism.known_model_families import KnownModel
from sagecp.core.parallelism.model_config import parse_model_config
from sagecp.core.parallelism.model_description import ModelDescription

__all__ = ["KNOWN_MODELS", "find_model"]

_MAX_NAME_LENGTH = 256
_CACHED_MODELS = 128
# How names tell that a checkpoint is stored in fewer bits, and how that is usually done.
_QUANTIZED_NAME = re.compile(
    r"(?P<rest>.+?)[-.](?P<kind>"
    r"fp8(?:[-_](?:dynamic|kv|block))?|awq(?:[-_]int4)?|gptq(?:[-_]int[48])?|int[48]|w4a16|w8a16|w8a8"
    r"|bnb[-_][48]bit|[48]bit|nvfp4|fp4)"
)
_GROUPED_INTEGERS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
_WHOLE_CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel"}
# Parts of names that tell of training, not of shape.
_VARIANTS = frozenset({"chat", "instruct", "it"})
_WITHOUT_MEANING = _VARIANTS | {"base", "hf", "meta", "quantized"}


def find_model(name: str) -> ModelDescription | None:
    """Return a public model by its name, with or without its organisation, in any case.

    What names say of the stored weights is understood (``-FP8``, ``-AWQ``, ``-GPTQ-Int4``,
    ``-quantized.w4a16``, ``-bnb-4bit``, ``-NVFP4``), as are common short names. The model is called
    as on the hub, or, where that is not known of such a variant, as it was asked for.

    ``None``: no such model is known.
    """
    if not 0 < len(name) <= _MAX_NAME_LENGTH:
        return None
    return _find(name)


@functools.lru_cache(maxsize=_CACHED_MODELS)
def _find(name: str) -> ModelDescription | None:
    organisation, _, wanted = name.strip().rpartition("/")
    key = _key_of(wanted)
    if key is not None:
        known = KNOWN_MODELS[key]
        called = name.strip() if organisation else f"{known.organisation}/{_canonical(key, wanted)}"
        return parse_model_config(known.config, name=called)
    quantized = _QUANTIZED_NAME.fullmatch(wanted.lower())
    key = _key_of(quantized["rest"]) if quantized else None
    if quantized is None or key is None:
        return None
    config = _quantized(KNOWN_MODELS[key], quantized["kind"].replace("_", "-"), organisation)
    return None if config is None else parse_model_config(config, name=name.strip())


def _canonical(key: str, wanted: str) -> str:
    """Return the name on the hub: the model's own, or that of the variant that was asked for."""
    if _squeezed(wanted) == _squeezed(f"{key}-Instruct"):
        return f"{key}-Instruct"
    asked_for_variant = not _VARIANTS.isdisjoint(_words_of(wanted)) and _squeezed(wanted) != _squeezed(key)
    return wanted.strip() if asked_for_variant else key


def _key_of(name: str) -> str | None:
    """Return the key of a model by any of its names."""
    exact, loose = _names()
    squeezed = _squeezed(name)
    return exact.get(squeezed) or loose.get(_without_variant(name))


@functools.cache
def _names() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the keys by squeezed names, and by names without what tells of training."""
    exact = {_squeezed(key): key for key in KNOWN_MODELS}
    for short, key in SHORT_NAMES.items():
        exact.setdefault(_squeezed(short), key)
    loose: dict[str, str] = {}
    for key in KNOWN_MODELS:
        loose.setdefault(_without_variant(key), key)
    for short, key in SHORT_NAMES.items():
        loose.setdefault(_without_variant(short), key)
    return exact, loose


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def _without_variant(name: str) -> str:
    return _squeezed("".join(word for word in _words_of(name) if word not in _WITHOUT_MEANING))


def _words_of(name: str) -> list[str]:
    return re.split(r"[-_: ]+", name.lower())


def _quantized(known: KnownModel, kind: str, organisation: str) -> Mapping[str, Any] | None:
    """Return a model's configuration with fewer bits; ``None``: what is published has few bits already."""
    if "quantization_config" in known.config:
        return None
    is_own = organisation.lower() in ("", known.organisation.lower())
    changes: dict[str, Any] = {"quantization_config": _quantization(kind, is_own and known.fp8_blocks)}
    if is_own and kind.startswith(("awq", "gptq")):
        changes.update(known.four_bit_fields)
    return {**known.config, **changes}


def _quantization(kind: str, fp8_blocks: bool) -> Mapping[str, Any]:
    if kind.startswith("fp8"):
        in_blocks = kind == "fp8-block" or (kind == "fp8" and fp8_blocks)
        return {"quant_method": "fp8", **({"weight_block_size": [128, 128]} if in_blocks else {})}
    if kind.startswith("awq"):
        return {"quant_method": "awq", "bits": 4, "group_size": 128}
    if kind.startswith("gptq"):
        return {"quant_method": "gptq", "bits": 8 if kind.endswith("8") else 4, "group_size": 128}
    if kind.endswith("bit"):
        return {"quant_method": "bitsandbytes", "load_in_4bit": "4" in kind}
    if kind in ("nvfp4", "fp4"):
        return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    weights = _GROUPED_INTEGERS if kind in ("int4", "w4a16") else _WHOLE_CHANNELS
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
