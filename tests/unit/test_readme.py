"""What the pages say is so: their links lead somewhere, and what they name exists."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from sagecp.cli.exit_codes import MEANINGS
from sagecp.config import EngineConfig, RuntimeConfig, ServerConfig, TlsConfig, load_config
from sagecp.core.config import SchedulerConfig
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.prices import GpuPrices
from sagecp.core.router.registry import LOAD_BALANCERS, ROUTING_STRATEGIES
from sagecp.version import __version__
from tests.support.documents import blocks_of
from tests.support.processes import ROOT

PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("clients/*/*.md"),
                 *ROOT.glob("tests/**/*.md"), *ROOT.glob("bench/**/*.md")]
    if "node_modules" not in page.parts
)  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")


def pages() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages()
def test_local_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [
        target for target in targets if target[0] != "#" and not (page.parent / target.split("#")[0]).exists()
    ]
    assert not missing, f"{page.name} links to what is not there: {missing}"


@pages()
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", makefile, re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    code = [block.text for block in blocks_of(page)] + re.findall(r"`([^`\n]+)`", text)
    named = {name for piece in code for name in re.findall(r"\bmake ([a-z0-9-]+)", piece)}
    assert named <= targets, f"{page.name} names make targets that do not exist: {sorted(named - targets)}"


@pages()
def test_commands_exist(page: Path) -> None:
    from sagecp.cli.main import main  # imports the whole command line

    text = page.read_text(encoding="utf-8")
    code = [block.text for block in blocks_of(page) if block.language in {"", "sh"}]
    code += re.findall(r"`([^`\n]+)`", text)
    named = {name for piece in code for name in re.findall(r"(?:^|\s|\(|/bin/)sagecp ([a-z][a-z-]*)", piece)}
    import click

    known = set(main.list_commands(click.Context(main)))
    assert named <= known, f"{page.name} names commands that do not exist: {sorted(named - known)}"


def test_the_readme_names_every_policy() -> None:
    """When a policy, a strategy or a balancer is added, the README says so."""
    for registry in (SCHEDULING_POLICIES, ROUTING_STRATEGIES, LOAD_BALANCERS):
        for name in registry.names:
            assert f"`{name}`" in README, f"the README does not say that {name} exists"


def test_the_exit_codes_are_the_real_ones() -> None:
    for code, meaning in MEANINGS.items():
        assert f"| {code.value} | {meaning} |" in README


def test_the_readme_runs_something() -> None:
    tested = [block for block in blocks_of(ROOT / "README.md") if block.tested]
    assert {block.language for block in tested} == {"sh", "python"}
    assert len(tested) >= 4


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_configuration_page_lists_every_setting_with_its_default(tmp_path: Path) -> None:
    """The page's TOML is a valid configuration, equal to the defaults, and leaves no setting out."""
    (block,) = [block for block in blocks_of(ROOT / "docs" / "operations.md") if block.language == "toml"]
    file = tmp_path / "sagecp.toml"
    file.write_text(block.text, encoding="utf-8")
    assert load_config(file) == ServerConfig()
    tables = tomllib.loads(block.text)
    for section, kind in (("", ServerConfig), ("tls", TlsConfig), ("scheduler", SchedulerConfig),
                          ("runtime", RuntimeConfig), ("engine", EngineConfig),
                          ("prices", GpuPrices)):  # fmt: skip
        listed = set(tables[section] if section else tables)
        # The core's prices are those of the table that is called so.
        own = {"prices"} if kind is SchedulerConfig else set()
        assert listed == {field.name for field in dataclasses.fields(kind)} - own, f"[{section}]"
