"""Which instances a simulated fleet has: a TOML file, a short text, or the name of a built-in fleet."""

from __future__ import annotations

import importlib.resources
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagecp.core.types import ExecutionInstance
from sagecp.sim.engine_types import EngineLimits
from sagecp.sim.profiles import FIXED_PROFILE, INSTANT_PROFILE, PROFILES, StepProfile

DEFAULT_MODEL = "sim"
DEFAULT_USD_PER_GPU_HOUR: Mapping[str, float] = {"h100": 6.88, "a100": 3.43, "l4": 0.80}
"""Price of one GPU by kind, US dollars per hour. List prices vary by several times; set your own."""

_FIRST_PORT = 8000
_LARGEST_FLEET = 20_000
_TIMELESS_PROFILES = (FIXED_PROFILE, INSTANT_PROFILE)
_SHORT_TERM = re.compile(r"(?:(?P<count>\d+)x)?(?P<profile>[a-z0-9][a-z0-9.-]*)", re.IGNORECASE)


class FleetFileError(ValueError):
    """A fleet cannot be made of what was given; says what is wrong, where, and what to do."""


@dataclass(frozen=True, slots=True)
class _GpuKind:
    """A kind of GPU: its name as NVML gives it, and its memory in GiB."""

    nvml_name: str
    memory_gb: float


_GPU_KINDS = {
    "h100": _GpuKind("NVIDIA H100 80GB HBM3", 80.0),
    "a100": _GpuKind("NVIDIA A100-SXM4-80GB", 80.0),
    "l4": _GpuKind("NVIDIA L4", 24.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimInstance:
    """One simulated engine with its hardware and price.

    Attributes:
        instance_id: Unique in the fleet.
        port: Unique in the fleet; nothing listens there.
        profile: How long its steps take.
        kv_token_capacity: Tokens that fit in its KV cache.
        max_running_requests: Requests in one batch.
        max_batch_tokens: Token budget of one step.
        prefix_caching: Whether prompts share blocks.
        slowness: Factor on the duration of its steps; 1 is as profiled.
        model: Served model name.
        model_aliases: Further served names.
        gpu_name: As NVML names it.
        gpu_memory_gb: Of one GPU, GiB; ``None``: unknown.
        usd_per_gpu_hour: Price of one GPU.
    """

    instance_id: str
    port: int
    profile: StepProfile
    kv_token_capacity: int
    max_running_requests: int = 256
    max_batch_tokens: int = 2048
    prefix_caching: bool = True
    slowness: float = 1.0
    model: str = DEFAULT_MODEL
    model_aliases: tuple[str, ...] = ()
    gpu_name: str
    gpu_count: int
    gpu_memory_gb: float | None = None
    usd_per_gpu_hour: float

    @property
    def usd_per_hour(self) -> float:
        """Price of the whole instance."""
        return self.gpu_count * self.usd_per_gpu_hour

    def engine_limits(self, block_token_count: int) -> EngineLimits:
        """Return what its engine can hold, in blocks of the trace's size."""
        return EngineLimits(
            self.kv_token_capacity,
            self.max_running_requests,
            self.max_batch_tokens,
            block_token_count,
            self.prefix_caching,
        )

    def execution_instance(self) -> ExecutionInstance:
        """Return the instance as the control plane would be told of it."""
        return ExecutionInstance(
            instance_id=self.instance_id,
            host="127.0.0.1",
            port=self.port,
            model_name=self.model,
            model_aliases=self.model_aliases,
            tensor_parallel_size=self.profile.tensor_parallel_size,
            gpu_count=self.gpu_count,
            gpu_memory_gb=self.gpu_memory_gb,
            gpu_name=self.gpu_name,
            key_value_token_capacity=self.kv_token_capacity,
            max_concurrent_request_count=self.max_running_requests,
            usd_per_gpu_hour=self.usd_per_gpu_hour,
        )


def built_in_fleets() -> tuple[str, ...]:
    """Return the names that :func:`read_fleet` knows."""
    folder = importlib.resources.files("sagecp.sim.fleet") / "fleets"
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".toml")))


def read_fleet(
    text_or_path: str | Path, *, usd_per_gpu_hour: Mapping[str, float] | None = None
) -> tuple[SimInstance, ...]:
    """Return the instances of a fleet.

    Args:
        text_or_path: A path; or a text that is TOML, a short form such as
            ``2x8b-h100+6x8b-l4``, a built-in name, or the path of a TOML file.
        usd_per_gpu_hour: Prices by kind of GPU, over the defaults and under what a file says.

    Raises:
        FleetFileError: Says what is wrong, where, and what to do.
    """
    prices = {**DEFAULT_USD_PER_GPU_HOUR, **(usd_per_gpu_hour or {})}
    if isinstance(text_or_path, Path):
        return _from_file(text_or_path, prices)
    text = text_or_path.strip()
    if "\n" in text_or_path:
        return _from_toml("fleet", text_or_path, prices)
    if text in built_in_fleets():
        file = importlib.resources.files("sagecp.sim.fleet") / "fleets" / f"{text}.toml"
        return _from_toml(text, file.read_text(encoding="utf-8"), prices)
    if text.endswith(".toml"):
        return _from_file(Path(text), prices)
    return _from_short_form(text, prices)


def _from_file(path: Path, prices: Mapping[str, float]) -> tuple[SimInstance, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FleetFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FleetFileError(f"{path}: is not UTF-8 text: {error}") from error
    return _from_toml(str(path), text, prices)


def _from_short_form(text: str, prices: Mapping[str, float]) -> tuple[SimInstance, ...]:
    tables: list[dict[str, Any]] = []
    for term in text.split("+"):
        match = _SHORT_TERM.fullmatch(term.strip())
        if match is None or match["profile"] not in PROFILES:
            raise FleetFileError(
                f"fleet {text!r}: {term.strip()!r} is not COUNTxPROFILE; write for example 8x70b-h100-tp4 or "
                f"2x8b-h100+6x8b-l4 with the profiles {', '.join(_profile_names())}, name a built-in fleet "
                f"({', '.join(built_in_fleets())}), or give a .toml file"
            )
        tables.append({"profile": match["profile"], "count": int(match["count"] or 1)})
    return _instances(f"fleet {text!r}", tables, prices)


def _from_toml(where: str, text: str, prices: Mapping[str, float]) -> tuple[SimInstance, ...]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FleetFileError(f"{where}: is not TOML: {error}") from error
    unknown = sorted(document.keys() - {"instance", "usd_per_gpu_hour"})
    if unknown:
        raise FleetFileError(
            f"{where}: unknown setting {unknown[0]!r}; a fleet has [[instance]] and [usd_per_gpu_hour] tables"
        )
    own_prices = document.get("usd_per_gpu_hour", {})
    if not isinstance(own_prices, dict):
        raise FleetFileError(f"{where}: usd_per_gpu_hour must be a table of prices by kind of GPU")
    for kind, price in own_prices.items():
        if kind not in _GPU_KINDS:
            raise FleetFileError(
                f"{where}: usd_per_gpu_hour: unknown kind {kind!r}; known are {', '.join(_GPU_KINDS)}"
            )
        _check(f"{where}: usd_per_gpu_hour.{kind}", price, _PRICE)
    tables = document.get("instance", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise FleetFileError(
            f"{where}: instance must be a list of tables; write [[instance]], not [instance]"
        )
    return _instances(where, tables, {**prices, **own_prices})


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a setting may be: a check, and its words."""

    is_good: Callable[[Any], bool]
    allowed: str


_COUNT = _Setting(_is_whole, "a whole number of at least 1")
_PRICE = _Setting(lambda value: _is_number(value) and value >= 0, "a number of at least 0")
_FACTOR = _Setting(lambda value: _is_number(value) and value > 0, "a number above 0")
_SWITCH = _Setting(lambda value: isinstance(value, bool), "true or false")
_TEXT = _Setting(lambda value: isinstance(value, str) and value != "", "a text that is not empty")
_SETTINGS = {
    "profile": _TEXT,
    "name": _TEXT,
    "count": _COUNT,
    "model": _TEXT,
    "gpu_name": _TEXT,
    "gpu_count": _COUNT,
    "gpu_memory_gb": _FACTOR,
    "usd_per_gpu_hour": _PRICE,
    "max_running": _COUNT,
    "max_batch_tokens": _COUNT,
    "kv_token_capacity": _COUNT,
    "prefix_caching": _SWITCH,
    "slowness": _FACTOR,
}


def _check(where: str, value: object, setting: _Setting) -> None:
    if not setting.is_good(value):
        raise FleetFileError(f"{where} must be {setting.allowed}, not {value!r:.80}")


def _instances(
    where: str, tables: list[dict[str, Any]], prices: Mapping[str, float]
) -> tuple[SimInstance, ...]:
    if not tables:
        raise FleetFileError(f"{where}: has no instances; add an [[instance]] table with a profile")
    instances: list[SimInstance] = []
    used_names: Counter[str] = Counter()
    for number, table in enumerate(tables, start=1):
        place = f"{where}: instance {number}"
        for key, value in table.items():
            if key not in _SETTINGS:
                raise FleetFileError(f"{place}: unknown setting {key!r}; known are {', '.join(_SETTINGS)}")
            _check(f"{place}: {key}", value, _SETTINGS[key])
        count = table.get("count", 1)
        if len(instances) + count > _LARGEST_FLEET:
            raise FleetFileError(f"{place}: count: a fleet has at most {_LARGEST_FLEET} instances, not more")
        values = _values(place, table, prices)
        name = table.get("name", table["profile"])
        for _ in range(count):
            instances.append(
                SimInstance(
                    instance_id=f"{name}-{used_names[name]}", port=_FIRST_PORT + len(instances), **values
                )
            )
            used_names[name] += 1
    return tuple(instances)


def _values(place: str, table: dict[str, Any], prices: Mapping[str, float]) -> dict[str, Any]:
    """Return the arguments that all instances of a table share."""
    profile_name = table.get("profile", "")
    if profile_name not in _profile_names():
        problem = f"unknown profile {profile_name!r}" if profile_name else "has no profile"
        if profile_name in _TIMELESS_PROFILES:
            problem = f"profile {profile_name!r} has no step times to simulate"
        raise FleetFileError(f"{place}: {problem}; choose one of: {', '.join(_profile_names())}")
    profile = PROFILES[profile_name]
    kind = _gpu_kind(table.get("gpu_name", profile_name))
    known = _GPU_KINDS.get(kind)
    price = table.get("usd_per_gpu_hour", prices.get(kind))
    if price is None:
        raise FleetFileError(
            f"{place}: no price is known for the GPU {table.get('gpu_name')!r}; set usd_per_gpu_hour"
        )
    limits = {
        attribute: table[key]
        for key, attribute in (
            ("max_running", "max_running_requests"),
            ("max_batch_tokens", "max_batch_tokens"),
            ("prefix_caching", "prefix_caching"),
            ("model", "model"),
        )
        if key in table
    }
    return {
        "profile": profile,
        "kv_token_capacity": table.get("kv_token_capacity", profile.kv_token_capacity),
        "slowness": float(table.get("slowness", 1.0)),
        "gpu_name": table.get("gpu_name", known.nvml_name if known else ""),
        "gpu_count": table.get("gpu_count", profile.tensor_parallel_size),
        "gpu_memory_gb": table.get("gpu_memory_gb", known.memory_gb if known else None),
        "usd_per_gpu_hour": float(price),
        **limits,
    }


def _gpu_kind(name: str) -> str:
    """Return the kind that the name of a GPU or of a profile says, or an empty text."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((kind for kind in _GPU_KINDS if kind in words), "")


def _profile_names() -> tuple[str, ...]:
    return tuple(name for name in PROFILES if name not in _TIMELESS_PROFILES)
