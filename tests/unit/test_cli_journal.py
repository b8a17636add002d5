"""`sagecp journal`: status, verify and salvage of a journal that no server uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.main import main
from tests.support.journals import open_journal, write
from tests.support.store_records import accepted, ended, piece


async def make_journal(path: Path) -> None:
    async with open_journal(path) as (store, _):
        for number in range(12):
            await write(store, accepted(f"request-{number}", metadata=b"m" * 1500))
        await write(store, ended("request-0", pieces=(piece("answer", [1]),)))


def call(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command; return its exit code, output and errors."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended_with:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended_with.value.code or 0), out, err


def call_json(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = call([*arguments, "-o", "json"], capsys)
    assert code == ExitCode.OK, err
    found: dict[str, Any] = json.loads(out)
    return found


async def test_status_counts_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.db"
    await make_journal(path)
    before = path.read_bytes()
    report = call_json(["journal", "status", str(path)], capsys)
    assert report["live_request_count"] == 11
    assert report["ended_count"] == 1
    assert report["record_count"] == report["promised_record"] == 13
    code, out, _err = call(["journal", "status", str(path)], capsys)
    assert code == ExitCode.OK
    assert "live requests   11" in out
    assert path.read_bytes() == before


async def test_verify_says_that_all_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.db"
    await make_journal(path)
    code, out, _err = call(["journal", "verify", str(path)], capsys)
    assert code == ExitCode.OK
    assert "all of it is what was written" in out


async def test_damage_is_named_and_salvaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.db"
    await make_journal(path)
    whole = path.read_bytes()
    place = whole.index(b"request-5")
    path.write_bytes(whole[:place] + b"r3quest-5" + whole[place + 9 :])
    code, _out, err = call(["journal", "verify", str(path)], capsys)
    assert code == ExitCode.UNEXPECTED
    assert "record 6 is not what was written" in err
    assert f"sagecp journal salvage {path}" in err
    report = call_json(["journal", "salvage", str(path)], capsys)
    assert report["lost_records"] == [[6, 6]]
    assert report["live_request_count"] == 10
    assert report["request_ids"] == ["r3quest-5"]
    damaged = path.with_name(Path(report["damaged_path"]).name)
    assert damaged.read_bytes()[place : place + 9] == b"r3quest-5"
    code, out, _err = call(["journal", "verify", str(path)], capsys)
    assert code == ExitCode.OK
    assert "live requests   10" in out
    # Once more, in words.
    code, out, _err = call(["journal", "salvage", str(path)], capsys)
    assert code == ExitCode.OK
    assert "records lost    0" in out


async def test_an_ended_request_that_is_damaged_is_found_by_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal.db"
    await make_journal(path)
    path.write_bytes(path.read_bytes().replace(b"answer", b"answes"))
    assert call(["journal", "status", str(path)], capsys)[0] == ExitCode.OK
    code, _out, err = call(["journal", "verify", str(path)], capsys)
    assert code == ExitCode.UNEXPECTED
    assert "the output of the ended request 'request-0'" in err


@pytest.mark.parametrize("command", ["status", "verify", "salvage"])
async def test_a_journal_in_use_or_missing_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal.db"
    code, _out, err = call(["journal", command, str(path)], capsys)
    assert code == ExitCode.NOT_FOUND_OR_CONFLICT
    assert "there is no journal" in err
    assert "Traceback" not in err
    async with open_journal(path) as (store, _):
        await write(store, accepted("one"))
        code, _out, err = call(["journal", command, str(path)], capsys)
        assert code == ExitCode.NOT_FOUND_OR_CONFLICT
        assert "is in use by process" in err


def test_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("shopping list\n" * 100)
    code, _out, err = call(["journal", "verify", str(path)], capsys)
    assert code == ExitCode.UNEXPECTED
    assert "not that of a SQLite file" in err
