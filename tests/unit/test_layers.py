"""Who may import whom, read from the source: a layer that reaches outwards fails here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sagecp"

# What a layer may import of the project: other layers, or single modules of them.
# A layer that is not named here may import itself only.
SHARED_VALUES = {"core.types", "core.errors", "version", "log"}
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "log": set(),
    "v1": set(),
    "core": {"version"},
    "config": {"core", "version"},
    "runtime": {"core", "config", "log", "version"},
    "rpc": {"core", "runtime", "v1", "config", "log", "version"},
    "gateway": {"core", "runtime", "config", "log", "version"},
    "sim": {"core", "log", "version"},
    "agent": {"v1"} | SHARED_VALUES,
    "client": {"v1"} | SHARED_VALUES,
    "cli": {"core", "runtime", "rpc", "gateway", "sim", "agent", "client", "v1", "config", "log", "version"},
}
# The package's own names are lazy: importing `sagecp` imports nothing but these.
EAGER_IN_PACKAGE = {"version"}

# What core is made of. Everything here computes; nothing here waits, reads or writes.
CORE_LIBRARY = {
    "__future__", "abc", "array", "bisect", "collections", "contextlib", "copy", "dataclasses", "enum",
    "functools", "hashlib", "heapq", "itertools", "json", "math", "numbers", "numpy", "operator", "random",
    "re", "statistics", "string", "types", "typing",
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


@dataclass(frozen=True)
class Import:
    """One import statement: who, at which line, imports what, and whether only for types."""

    source: str
    line: int
    target: str
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.source.replace('.', '/')}.py:{self.line} imports {self.target}"


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_of(name: str, tree: ast.Module, *, is_package: bool) -> Iterator[Import]:
    typing_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            typing_only.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                anchor = ".".join(package[: len(package) - node.level + 1])
                base = f"{anchor}.{base}" if base else anchor
            # `from package import module` reaches the module; `from module import name` the module.
            targets = [
                f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names
            ]
        else:
            continue
        for target in dict.fromkeys(targets):
            yield Import(name, node.lineno, target, node in typing_only)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def all_imports() -> list[Import]:
    return [
        found
        for path in modules()
        for found in imports_of(module_name(path), parse(path), is_package=path.name == "__init__.py")
    ]


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


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
