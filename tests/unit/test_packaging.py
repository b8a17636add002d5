"""What is imported is declared: a bare install, and each extra, has what its part of the code needs."""

from __future__ import annotations

import re
import sys
import tomllib

from tests.support.imports import Import, all_imports, layer_of
from tests.support.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Import names that differ from the distribution's.
DISTRIBUTION_OF = {
    "yaml": "pyyaml",
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "grpc": "grpcio",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry": "opentelemetry-sdk",
    "grpc_channelz": "grpcio-channelz",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "prometheus_client": "prometheus-client",
    "pynvml": "nvidia-ml-py",
    "zmq": "pyzmq",
}
# Extras that a layer may count on beside the bare package. The command line
# imports its commands when they are called, each with an extra of its own.
EXTRAS_OF = {
    "runtime": {"server"},
    "console": {"server"},
    "rpc": {"server"},
    "gateway": {"server"},
    "log": {"server", "agent", "sim"},
    "agent": {"agent"},
    "sim": {"sim"},
    "cli": {"server", "agent", "sim", "tui", "cli", "all"},
}
# Modules that are imported only where their extra was asked for, on top of their layer's.
FURTHER_EXTRA_OF = {"sagecp.runtime.tracing.otel": "otel"}


def names(requirements: list[str]) -> set[str]:
    found = set()
    for requirement in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)", requirement)
        assert match
        found.add(match[1].lower())
    return found


BASE = names(PROJECT["dependencies"])
EXTRAS = {extra: names(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}


def distribution_of(target: str) -> str:
    for prefix, distribution in DISTRIBUTION_OF.items():
        if target == prefix or target.startswith(prefix + "."):
            return distribution
    return target.split(".", maxsplit=1)[0].lower()


def third_party() -> list[Import]:
    return [
        found
        for found in all_imports()
        if not found.for_types_only
        and found.target.split(".")[0] not in sys.stdlib_module_names | {"sagecp", "__future__"}
    ]


def test_every_import_is_declared_where_it_is_needed() -> None:
    wrong = []
    for found in third_party():
        if found.optional:
            continue
        layer, distribution = layer_of(found.source), distribution_of(found.target)
        extras = EXTRAS_OF.get(layer, set())
        # An extra shared by several parts must be enough for each of them alone.
        offered = [BASE | EXTRAS[extra] for extra in extras] or [BASE]
        further = FURTHER_EXTRA_OF.get(found.source)
        if further is not None:
            offered = [offer | EXTRAS[further] for offer in offered]
        enough = any if layer == "cli" else all
        if not enough(distribution in offer for offer in offered):
            where = f"extra {' and '.join(sorted(extras))}" if extras else "dependencies"
            wrong.append(f"{found}, from {distribution}, which [{where}] does not bring")
    assert not wrong, "\n  ".join(["undeclared:", *wrong])


def test_nothing_is_declared_in_vain() -> None:
    used = {distribution_of(found.target) for found in third_party()}
    declared = BASE.union(*(EXTRAS[extra] for extra in ("server", "agent", "sim", "otel")))
    # grpcio-tools' runtime companions are imported by generated code, which is not read here.
    assert declared - used == set(), "declared, and imported nowhere"
