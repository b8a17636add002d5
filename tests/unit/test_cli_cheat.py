"""`sagecp cheat`, and the examples of pages and helps: every command that is shown exists as shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from sagecp.cli.cheat import SHEET
from sagecp.cli.main import COMMANDS, main
from tests.support.documents import blocks_of
from tests.support.processes import ROOT

PAGE = ROOT / "docs" / "cli.md"
PAGES = (PAGE, ROOT / "docs" / "planning.md")


def parse(line: str) -> None:
    """Parse a command line as the shell and the command line would, without running it."""
    arguments = shlex.split(line, comments=True)
    assert arguments.pop(0) == "sagecp"
    context = main.make_context("sagecp", arguments)
    command: click.Command = main
    while isinstance(command, click.Group):
        name, below, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert below is not None
        context, command = below.make_context(name, rest, parent=context), below


@pytest.mark.parametrize("line", [line for lines in SHEET.values() for line, _ in lines])
def test_every_command_of_the_sheet_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", ["sagecp drain", "sagecp requests --frob", "sagecp policy set --set x"])
def test_what_does_not_parse_would_be_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


def test_it_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cheat"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80


def commands_of(page: Path) -> list[str]:
    code = [block.text for block in blocks_of(page) if block.language in {"", "sh", "text", "console"}]
    lines = [line.removeprefix("$ ") for text in code for line in text.replace("\\\n", "").splitlines()]
    return [line for line in lines if line.startswith("sagecp ") and not set(line) & set("$|>")]


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands_of(page)])
def test_every_command_of_a_page_parses(line: str) -> None:
    parse(line)


def test_the_page_names_every_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in COMMANDS if not re.search(rf"\bsagecp {name}\b", text)]


def examples() -> list[str]:
    found = []
    for name in ("drain", "lora", "check", "plan"):
        command = main.get_command(click.Context(main), name)
        assert command is not None
        found += re.findall(r"^  (sagecp .*?)(?:  .*)?$", command.epilog or "", re.MULTILINE)
    return found


@pytest.mark.parametrize("line", examples())
def test_every_example_of_a_help_parses(line: str) -> None:
    parse(line)
