"""Which parts of a model its quantization leaves in 16 bits, by the names and patterns that it lists."""

from __future__ import annotations

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
_SAMPLED_LAYER_COUNT = 16
_MAX_PATTERN_COUNT = 64
_MAX_PATTERN_LENGTH = 200
_MAX_QUANTIFIER_COUNT = 4
# Expressions without repeated groups, which cannot take long on short names.
_HARMLESS_EXPRESSION = re.compile(r"[\w.\\^$()|\[\]\-:?*+]*")
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
            if pattern.startswith("re:") or "*" in pattern:
                if len(self._expressions) < _MAX_PATTERN_COUNT:
                    self._add_expression(pattern)
            else:
                self._names.add(pattern)

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

    def _add_expression(self, pattern: str) -> None:
        if not pattern.startswith("re:"):
            # A glob may stop at a module: what is below it is meant, too.
            if pattern.count("*") <= _MAX_QUANTIFIER_COUNT:
                glob = ".*".join(re.escape(piece) for piece in pattern.split("*"))
                self._expressions.append(re.compile(rf"{glob}(\..*)?$"))
            return
        text = pattern.removeprefix("re:")
        quantifiers = sum(text.count(each) for each in "*+?")
        repeats_group = re.search(r"\)[*+?]", text) is not None
        if quantifiers > _MAX_QUANTIFIER_COUNT or repeats_group or not _HARMLESS_EXPRESSION.fullmatch(text):
            return
        try:
            self._expressions.append(re.compile(text))
        except re.error:
            return
