"""Which parts of a model its quantization leaves in 16 bits, by the names and patterns that it lists."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence

from sagecp.core.parallelism.model_description import ModelDescription

_MODULES: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "dense": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "experts": ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.0.down_proj"),
    "shared": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"),
}
_LATENT_MODULES = (
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
)
# What other architectures call the same.
_OTHER_NAMES = (
    ("mlp.shared_experts", "mlp.shared_expert"),
    ("mlp.shared_experts", "feed_forward.shared_expert"),
    ("mlp.experts", "feed_forward.experts"),
    ("mlp.experts", "block_sparse_moe.experts"),
    ("mlp.gate_proj", "feed_forward.gate_proj"),
    ("mlp.up_proj", "feed_forward.up_proj"),
    ("mlp.down_proj", "feed_forward.down_proj"),
)
_PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers")
# Enough layers to tell a rule from an exception, such as the first and the last.
_SAMPLED_LAYER_COUNT = 5
# Each takes up to 30 ms if it almost matches everything; checkpoints have fewer than ten.
_MAX_PATTERN_COUNT = 12
_MAX_PATTERN_LENGTH = 200
_MAX_QUANTIFIER_COUNT = 3
# Expressions without repeated groups, which cannot take long on short names.
_HARMLESS_EXPRESSION = re.compile(r"[\w.\\^$()|\[\]\-:?*+]*")
_ANYTHING_AT_END = re.compile(r"(?<!\\)\.\*$")
_CLASS_NAME = re.compile(r"[A-Z]\w*")


def unquantized_parts(
    model: ModelDescription, ignored: Sequence[str], targets: Sequence[str] = ()
) -> frozenset[str]:
    """Return the parts most of whose modules are ignored, or are none of the targets.

    Args:
        model: The model.
        ignored: Modules, by name (whole, or some of its dotted components), glob, or ``re:`` expression.
        targets: What is quantized, likewise; names of classes, and none at all, mean everything.
    """
    ignores = _Patterns(ignored)
    chosen = [target for target in targets if not _CLASS_NAME.fullmatch(target)]
    quantizes = _Patterns(chosen) if chosen and len(chosen) == len(targets) else None
    layers = range(0, model.layer_count, -(-model.layer_count // _SAMPLED_LAYER_COUNT))
    found = set()
    for part, usual_modules in _MODULES.items():
        is_latent = part == "attention" and model.latent_attention is not None
        modules = _LATENT_MODULES if is_latent else usual_modules
        left = total = 0
        for layer in layers:
            for module in modules:
                names = _names_of(layer, module)
                total += 1
                left += ignores.match(names) or (quantizes is not None and not quantizes.match(names))
        if 2 * left > total:
            found.add(part)
    return frozenset(found)


def _names_of(layer: int, module: str) -> list[str]:
    modules = [module, *(module.replace(ours, theirs) for ours, theirs in _OTHER_NAMES if ours in module)]
    return [f"{prefix}.{layer}.{each}" for prefix in _PREFIXES for each in modules]


class _Patterns:
    """Names and patterns of modules; those that could take long to match are left out."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._expressions: list[re.Pattern[str]] = []
        for pattern in patterns:
            if len(pattern) > _MAX_PATTERN_LENGTH:
                continue
            expression = _expression_of(pattern)
            if expression is None:
                # A glob that ends in anything means the module, and what is below it.
                self._names.add(pattern.rstrip("*").rstrip("."))
            elif len(self._expressions) < _MAX_PATTERN_COUNT and _is_harmless(expression):
                with contextlib.suppress(re.error):
                    self._expressions.append(re.compile(expression))

    def match(self, names: Sequence[str]) -> bool:
        """Return whether one of the names of a module is meant."""
        return any(self._match_name(name) for name in names)

    def _match_name(self, name: str) -> bool:
        pieces = name.split(".")
        if self._names and any(
            ".".join(pieces[start:end]) in self._names
            for start in range(len(pieces))
            for end in range(start + 1, len(pieces) + 1)
        ):
            return True
        return any(expression.match(name) for expression in self._expressions)


def _expression_of(pattern: str) -> str | None:
    """Return a pattern as a regular expression; ``None``: it is a plain name."""
    if pattern.startswith("re:"):
        # Matches need not reach the end.
        return _ANYTHING_AT_END.sub("", pattern.removeprefix("re:"))
    if "*" not in pattern.rstrip("*"):
        return None
    glob = ".*".join(re.escape(piece) for piece in pattern.rstrip("*").split("*"))
    return glob if pattern.endswith("*") else rf"{glob}(\.|$)"


def _is_harmless(expression: str) -> bool:
    quantifier_count = sum(expression.count(each) for each in "*+?")
    repeats_group = re.search(r"\)[*+?]", expression) is not None
    return (
        quantifier_count <= _MAX_QUANTIFIER_COUNT
        and not repeats_group
        and _HARMLESS_EXPRESSION.fullmatch(expression) is not None
    )
