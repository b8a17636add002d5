"""Traces of real requests, and prompts made up from them."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError

_BLOCK_TOKENS = 512
# Short, frequent words: about one token each in any tokenizer.
_TEXT = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by
word but not what all were we when your can said there use an each which she do how their if will up
other about out many then them these so some her would make like him into time has look two more write go
see number no way could people my than first water been call who oil its now find long down day did get
come made may part
"""
_WORDS = tuple(_TEXT.split())
_NAMES = {
    "azure": ("azure_conversation.csv", "the Azure conversation trace (2023)"),
    "mooncake": ("mooncake_conversation.jsonl", "the Mooncake conversation trace (2024)"),
}
NAMES = tuple(_NAMES)


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace.

    Attributes:
        arrival_s: Since the first request.
        block_ids: Content of the prompt's blocks of 512 tokens, where the trace
            says: equal ids are equal content.
    """

    arrival_s: float
    prompt_token_count: int
    output_token_count: int
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace with its name for people."""

    title: str
    rows: tuple[TraceRow, ...]


def load_trace(name: str, row_count: int) -> Trace:
    """Read the first rows of a trace.

    Args:
        name: A name of :data:`NAMES`, or a file with the columns of ``bench/traces``.
        row_count: How many rows to take; fewer if the trace has fewer.

    Raises:
        CliError: There is no such trace, or it cannot be read.
    """
    title = f"the trace {Path(name).name}"
    path = Path(name)
    if name in _NAMES:
        file_name, title = _NAMES[name]
        path = _find(file_name)
    try:
        with _open(path) as source:
            rows = [row for row, _ in zip(_rows(path, source), range(row_count), strict=False)]
    except OSError as error:
        raise CliError(
            f"cannot read the trace {path}: {error.strerror}",
            hint=f"choose one of {', '.join(NAMES)}, or give a file",
            exit_code=ExitCode.INVALID,
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(
            f"{path} is no trace: {type(error).__name__}: {error}",
            hint="a CSV needs the columns t_s, prompt_tokens, output_tokens; or one JSON object per line",
            exit_code=ExitCode.INVALID,
        ) from error
    if not rows:
        raise CliError(f"{path} has no rows", exit_code=ExitCode.INVALID)
    first_s = rows[0].arrival_s
    return Trace(
        title,
        tuple(
            TraceRow(row.arrival_s - first_s, row.prompt_token_count, row.output_token_count, row.block_ids)
            for row in rows
        ),
    )


def _find(file_name: str) -> Path:
    """Return where a slice lies: beside the package in a checkout, or in it when it was packaged along."""
    here = Path(__file__).resolve()
    places = (here.parents[3] / "bench" / "traces" / file_name, here.parent / "traces" / file_name)
    for place in places:
        if place.is_file():
            return place
    raise CliError(
        f"the trace {file_name} is not installed",
        hint="run this in a checkout of the project, or give another trace with --trace FILE",
        exit_code=ExitCode.INVALID,
    )


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _rows(path: Path, source: TextIO) -> Iterator[TraceRow]:
    if ".jsonl" in path.suffixes:
        for line in source:
            yield _row(json.loads(line))
    else:
        for entry in csv.DictReader(source):
            yield _row(entry)


def _row(entry: dict[str, Any]) -> TraceRow:
    ranges = entry.get("hash_ranges") or []
    block_ids = tuple(
        block_id
        for start, count in zip(ranges[::2], ranges[1::2], strict=True)
        for block_id in range(start, start + count)
    )
    return TraceRow(
        float(entry["t_s"]), int(entry["prompt_tokens"]), max(1, int(entry["output_tokens"])), block_ids
    )


def make_prompt(row: TraceRow, number: int) -> str:
    """Return a prompt of about as many tokens as the trace says.

    The same row gives the same prompt in every run, and prompts share a prefix
    where the trace says that theirs did.

    Args:
        row: The row.
        number: Of the row, for the words that no other prompt has.
    """
    words: list[str] = []
    for block_id in row.block_ids:
        words += random.Random(f"block {block_id}").choices(_WORDS, k=_BLOCK_TOKENS)
    missing = row.prompt_token_count - len(words)
    if missing > 0:
        words += random.Random(f"row {number}").choices(_WORDS, k=missing)
    return " ".join(words[: max(1, row.prompt_token_count)])
