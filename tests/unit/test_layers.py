"""Who may import whom, read from the source: a layer that reaches outwards fails here."""

from __future__ import annotations

import ast

import pytest

from tests.support.imports import (
    PACKAGE,
    Import,
    all_imports,
    imports_of,
    layer_of,
    module_name,
    modules,
    parse,
)

# What a layer may import of the project: other layers, or single modules of them.
# A layer that is not named here may import itself only.
SHARED_VALUES = {
    "core.types", "core.errors", "core.duration_quantiles", "core.engine_state", "core.fleet_event",
    "core.gpu", "version", "log",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "log": set(),
    "v1": set(),
    "core": {"version"},
    "wire": {"v1"} | SHARED_VALUES,
    "config": {"core", "version"},
    "runtime": {"core", "config", "log", "version"},
    "console": {"core", "runtime", "config", "log", "version"},
    "rpc": {"console", "core", "runtime", "v1", "wire", "config", "log", "version"},
    "gateway": {"core", "runtime", "config", "log", "version"},
    "sim": {"core", "log", "version"},
    "agent": {"v1", "wire", "core.prompt_digest"} | SHARED_VALUES,
    "client": {"v1", "wire", "core.placement", "core.prediction.step_time"} | SHARED_VALUES,
    "__main__": {"cli"},
    "cli": {
        "core",
        "runtime",
        "rpc",
        "gateway",
        "sim",
        "agent",
        "client",
        "v1",
        "wire",
        "config",
        "log",
        "version",
    },
}
# The package's own names are lazy: importing `sagecp` imports nothing but these.
EAGER_IN_PACKAGE = {"version"}

# What core is made of. Everything here computes; nothing here waits, reads or writes.
CORE_LIBRARY = {
    "__future__", "abc", "array", "bisect", "collections", "contextlib", "copy", "dataclasses", "difflib",
    "enum", "functools", "hashlib", "heapq", "ipaddress", "itertools", "json", "math", "numbers", "numpy",
    "operator", "random", "re", "shlex", "statistics", "string", "types", "typing",
}  # fmt: skip
# Calls that make a pure module depend on something outside its arguments.
IMPURE_CALLS = {
    "open": "reads or writes a file",
    "print": "writes to the terminal",
    "input": "reads the terminal",
    "random.random": "draws from the process-wide generator; take a random.Random as an argument",
    "random.choice": "draws from the process-wide generator; take a random.Random as an argument",
    "random.randint": "draws from the process-wide generator; take a random.Random as an argument",
    "random.uniform": "draws from the process-wide generator; take a random.Random as an argument",
    "random.shuffle": "draws from the process-wide generator; take a random.Random as an argument",
    "random.sample": "draws from the process-wide generator; take a random.Random as an argument",
    "random.SystemRandom": "draws from the operating system",
}


def permitted(found: Import) -> bool:
    layer, target = layer_of(found.source), found.target.removeprefix("sagecp").lstrip(".")
    if layer == "":
        return found.for_types_only or layer_of(found.target) in EAGER_IN_PACKAGE
    allowed = ALLOWED[layer] | {layer}
    return any(target == name or target.startswith(name + ".") for name in allowed)


def test_every_layer_is_known() -> None:
    layers = {layer_of(module_name(path)) for path in modules()} - {""}
    unknown = sorted(layers - ALLOWED.keys())
    assert not unknown, f"new parts of sagecp/ need a line in ALLOWED of this test: {unknown}"


def test_layers_only_import_inwards() -> None:
    wrong = [
        found
        for found in all_imports()
        if (found.target == "sagecp" or found.target.startswith("sagecp.")) and not permitted(found)
    ]
    lines = [
        f"{found}; {layer_of(found.source) or 'sagecp/__init__'} may import "
        f"{', '.join(sorted(ALLOWED.get(layer_of(found.source), EAGER_IN_PACKAGE))) or 'nothing'}"
        for found in wrong
    ]
    assert not wrong, "imports against the direction of the layers:\n  " + "\n  ".join(lines)


def test_core_imports_only_what_computes() -> None:
    wrong = [
        found
        for found in all_imports()
        if layer_of(found.source) == "core"
        and not found.target.startswith("sagecp")
        and found.target.split(".")[0] not in CORE_LIBRARY
    ]
    assert not wrong, (
        "core is pure (no I/O, asyncio, grpc, logging or clocks); pass what it needs as an argument:\n  "
        + "\n  ".join(map(str, wrong))
    )


def test_core_calls_nothing_that_depends_on_the_outside() -> None:
    wrong = []
    for path in modules():
        if layer_of(module_name(path)) != "core":
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in IMPURE_CALLS:
                    wrong.append(
                        f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {called}() {IMPURE_CALLS[called]}"
                    )
            elif isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)):
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno} is asynchronous")
    assert not wrong, "core is pure:\n  " + "\n  ".join(wrong)


@pytest.mark.parametrize(
    ("source", "statement", "allowed"),
    [
        ("sagecp.core.scheduler", "from sagecp.core import fleet", True),
        ("sagecp.core.scheduler", "from sagecp.runtime import manager", False),
        ("sagecp.core.scheduler", "import sagecp.rpc.server", False),
        ("sagecp.core.router.base", "from ..fleet import Fleet", True),
        ("sagecp.core.router.base", "from ... import runtime", False),
        ("sagecp.agent.daemon", "from sagecp.core.types import EngineGauges", True),
        ("sagecp.agent.daemon", "from sagecp.core import types", True),
        ("sagecp.agent.daemon", "from sagecp.core import scheduler", False),
        ("sagecp.client.client", "from sagecp.v1 import request_pb2", True),
        ("sagecp.client.client", "from sagecp.runtime.manager import ControlPlaneManager", False),
        ("sagecp.sim.engine", "from sagecp.runtime.engines import base", False),
        ("sagecp.rpc.server", "from sagecp.cli import main", False),
        ("sagecp.runtime.manager", "from sagecp.v1 import request_pb2", False),
    ],
)
def test_the_rules_themselves(source: str, statement: str, allowed: bool) -> None:
    found = list(imports_of(source, ast.parse(statement), is_package=False))
    assert len(found) == 1
    assert permitted(found[0]) is allowed
