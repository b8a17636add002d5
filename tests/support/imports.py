"""Imports of the project's modules, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "sagecp"


@dataclass(frozen=True)
class Import:
    """One import statement.

    Attributes:
        source: The module that imports.
        target: The module that is imported.
        for_types_only: Under ``if TYPE_CHECKING``.
        optional: In a ``try`` that expects it to fail.
    """

    source: str
    line: int
    target: str
    for_types_only: bool
    optional: bool

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
    optional: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(
            handler.type is not None and ast.unparse(handler.type) in {"ImportError", "ModuleNotFoundError"}
            for handler in node.handlers
        ):
            optional.update(child for statement in node.body for child in ast.walk(statement))
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
            yield Import(name, node.lineno, target, node in typing_only, node in optional)


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
