"""How a checkpoint stores its weights, told by the quantization part of its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sagecp.core.parallelism.model_config_fields import ConfigFields, shown
from sagecp.core.parallelism.model_description import ModelDescription, WeightFormat
from sagecp.core.parallelism.quantized_modules import unquantized_parts

_MAX_GROUP_SIZE = 1_000_000
_MAX_LISTED_MODULES = 200_000
_MAX_GROUP_COUNT = 16
_BLOCK_SIZE = 128
_HINT = (
    "known are fp8, fbgemm_fp8, compressed-tensors, awq, gptq, bitsandbytes, mxfp4 and modelopt; "
    "for another, say how the weights are stored (weight_format)"
)
_KNOWN_METHODS = frozenset(
    {
        "fp8",
        "fbgemm_fp8",
        "compressed-tensors",
        "awq",
        "awq_marlin",
        "auto_awq",
        "gptq",
        "gptq_marlin",
        "auto_gptq",
        "bitsandbytes",
        "mxfp4",
        "gpt_oss_mxfp4",
        "modelopt",
        "modelopt_fp4",
    }
)
_FLOATING_TYPES = {
    "float32": WeightFormat.BFLOAT16,
    "float": WeightFormat.BFLOAT16,
    "float16": WeightFormat.FLOAT16,
    "half": WeightFormat.FLOAT16,
    "bfloat16": WeightFormat.BFLOAT16,
    "auto": WeightFormat.BFLOAT16,
    "": WeightFormat.BFLOAT16,
}
"""By the type in the configuration; 32-bit checkpoints are served in 16 bits by default."""
_MODELOPT_FORMATS = {
    "FP8": WeightFormat.FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": WeightFormat.FP8,
    "FP8_PB_WO": WeightFormat.FP8,
    "NVFP4": WeightFormat.NVFP4,
}
_IGNORE_NAMES = (
    "ignore",
    "modules_to_not_convert",
    "exclude_modules",
    "ignored_layers",
    "llm_int8_skip_modules",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFormat:
    """How the weights are stored.

    Attributes:
        weight_format: Of the linear layers.
        group_size: Weights that share a scale, as in `ModelDescription`.
        unquantized_names: Parts that stay in 16 bits, as there.
    """

    weight_format: WeightFormat
    group_size: int | None = None
    unquantized_names: frozenset[str] = frozenset()


def refuse_unknown_quantization(whole: ConfigFields, fields: ConfigFields) -> None:
    """Note a quantization whose weights cannot be sized."""
    found = _quantization(whole, fields)
    if found is not None and _method(found) not in _KNOWN_METHODS:
        name = "quant_method"
        method = found.text(name)
        found.reject(name, f"is {shown(method)}; {_HINT}" if method else f"is missing; {_HINT}")


def stored_format(whole: ConfigFields, fields: ConfigFields, model: ModelDescription) -> StoredFormat:
    """Return how the weights are stored; what cannot be understood is noted."""
    found = _quantization(whole, fields)
    method = _method(found) if found is not None else ""
    if found is None or method not in _KNOWN_METHODS:
        return StoredFormat(weight_format=_floating_format(whole, fields))
    targets: tuple[str, ...] = ()
    group_size: int | None
    if method in ("fp8", "fbgemm_fp8"):
        weight_format, group_size = WeightFormat.FP8, _block_size(found)
    elif method in ("mxfp4", "gpt_oss_mxfp4"):
        # Only experts have kernels for it.
        weight_format, group_size = WeightFormat.MXFP4, 32
    elif method in ("modelopt", "modelopt_fp4"):
        weight_format, group_size = _modelopt_format(found)
    elif method == "bitsandbytes":
        is_four_bit = found.flag("load_in_4bit", False) or found.flag("_load_in_4bit", False)
        weight_format, group_size = (WeightFormat.INT4 if is_four_bit else WeightFormat.INT8), 0
    elif method == "compressed-tensors":
        weight_format, group_size, targets = _compressed_format(found)
    else:
        weight_format, group_size = _grouped_integers(found)
    left_out = unquantized_parts(model, _ignored(found), targets)
    if weight_format is WeightFormat.MXFP4:
        left_out |= {"attention", "dense", "shared"}
    return StoredFormat(weight_format=weight_format, group_size=group_size, unquantized_names=left_out)


def _quantization(whole: ConfigFields, fields: ConfigFields) -> ConfigFields | None:
    for each in (whole, fields):
        for name in ("quantization_config", "compression_config"):
            found = each.child(name) if each.present(name) else None
            if found is not None and found.config:
                return found
    return None


def _method(found: ConfigFields) -> str:
    value = found.value("quant_method")
    method = (
        value.lower().replace("compressed_tensors", "compressed-tensors") if isinstance(value, str) else ""
    )
    producer = found.value("producer")
    if isinstance(producer, dict) and producer.get("name") == "modelopt":
        return "modelopt"
    return method


def _floating_format(whole: ConfigFields, fields: ConfigFields) -> WeightFormat:
    for each in (fields, whole):
        name = each.present("dtype", "torch_dtype")
        if name is None:
            continue
        found = _FLOATING_TYPES.get(each.text(name).removeprefix("torch."))
        if found is None:
            each.reject(name, f"is {shown(each.value(name))}; must be float16, bfloat16 or float32")
        return found or WeightFormat.BFLOAT16
    return WeightFormat.BFLOAT16


def _block_size(found: ConfigFields) -> int:
    """Return the size of fp8's blocks; 0: a scale for each whole channel or tensor."""
    blocks = found.whole_numbers("weight_block_size", 2)
    if not blocks:
        return 0
    if not all(0 < each <= _MAX_GROUP_SIZE for each in blocks):
        found.reject("weight_block_size", f"is {shown(blocks[0])}; must be two sizes, such as [128, 128]")
        return _BLOCK_SIZE
    return blocks[-1]


def _grouped_integers(found: ConfigFields) -> tuple[WeightFormat, int]:
    """AWQ and GPTQ."""
    bits = found.integer("bits", "w_bit", "num_bits", most=64) or 4
    group = found.integer("group_size", "q_group_size", most=_MAX_GROUP_SIZE, least=-1)
    if bits not in (4, 8):
        found.reject("bits", f"is {bits}; weights of 4 and 8 bits can be sized")
    group = 128 if group is None else max(0, group)
    return (WeightFormat.INT8 if bits == 8 else WeightFormat.INT4), group


def _modelopt_format(found: ConfigFields) -> tuple[WeightFormat, int]:
    inner = found.child("quantization") if found.present("quantization") else None
    where = inner or found
    name = where.text("quant_algo").upper()
    weight_format = _MODELOPT_FORMATS.get(name)
    if weight_format is None:
        where.reject(
            "quant_algo",
            f"is {shown(where.value('quant_algo'))}; known are {', '.join(_MODELOPT_FORMATS)}; for another, "
            "say how the weights are stored (weight_format)",
        )
    if weight_format is WeightFormat.NVFP4:
        return WeightFormat.NVFP4, where.integer("group_size", most=_MAX_GROUP_SIZE, least=0) or 16
    return WeightFormat.FP8, _BLOCK_SIZE if name == "FP8_PB_WO" else 0


def _compressed_format(found: ConfigFields) -> tuple[WeightFormat, int | None, tuple[str, ...]]:
    """Return the format, the group size and the targets of compressed-tensors' groups."""
    groups = found.child("config_groups")
    if groups is None or not 0 < len(groups.config) <= _MAX_GROUP_COUNT:
        if groups is None and found.present("config_groups"):
            return WeightFormat.BFLOAT16, None, ()
        found.reject("config_groups", f"must be an object of 1 to {_MAX_GROUP_COUNT} groups")
        return WeightFormat.BFLOAT16, None, ()
    formats: set[WeightFormat] = set()
    sizes: list[int | None] = []
    targets: list[str] = []
    for name in groups.config:
        group = groups.child(str(name)[:64]) if isinstance(name, str) and len(name) <= 64 else None
        weights = group.child("weights") if group is not None else None
        if group is None or weights is None:
            continue
        weight_format = _group_format(weights)
        if weight_format is None:
            continue
        formats.add(weight_format)
        sizes.append(_group_size(weights, weight_format))
        targets += group.texts("targets", _MAX_LISTED_MODULES) or ()
    if len(formats) > 1:
        names = " and ".join(sorted(each.value for each in formats))
        found.reject(
            "config_groups",
            f"mixes {names}; the planner knows one format beside 16 bits: say which (weight_format)",
        )
    if not formats and not found.violations:
        found.reject("config_groups", "has no group with weights")
    return (
        min(formats, key=lambda each: each.value, default=WeightFormat.BFLOAT16),
        min((size for size in sizes if size is not None), default=None),
        tuple(targets),
    )


def _group_format(weights: ConfigFields) -> WeightFormat | None:
    bits = weights.integer("num_bits", most=64)
    kind = weights.text("type") or "int"
    if kind == "float" and bits == 8:
        return WeightFormat.FP8
    if kind == "float" and bits == 4:
        return WeightFormat.MXFP4 if weights.value("group_size") == 32 else WeightFormat.NVFP4
    if kind == "int" and bits in (4, 8):
        return WeightFormat.INT8 if bits == 8 else WeightFormat.INT4
    weights.reject(
        "num_bits", f"is {shown(bits)} of type {shown(kind)}; int and float of 4 and 8 bits can be sized"
    )
    return None


def _group_size(weights: ConfigFields, weight_format: WeightFormat) -> int | None:
    blocks = weights.whole_numbers("block_structure", 2)
    if blocks and all(0 < each <= _MAX_GROUP_SIZE for each in blocks):
        return blocks[-1]
    size = weights.integer("group_size", most=_MAX_GROUP_SIZE, least=-1)
    if size is None or size <= 0:
        return 16 if weight_format is WeightFormat.NVFP4 else 0
    return size


def _ignored(found: ConfigFields) -> tuple[str, ...]:
    """Return the modules that are left in 16 bits, as names or patterns."""
    inner = found.child("quantization") if found.present("quantization") else None
    for where in (found, inner):
        name = where.present(*_IGNORE_NAMES) if where is not None else None
        if where is None or name is None:
            continue
        listed: Sequence[str] | None = where.texts(name, _MAX_LISTED_MODULES)
        return tuple(listed or ())
    return ()
