"""Row 3 and the promise itself: a process that ends at any step loses nothing that was acknowledged."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sagecp.runtime import failpoints
from sagecp.runtime.store.records import OutputProduced, RequestAccepted
from sagecp.runtime.store.sqlite.checking import inspect_journal
from tests.support.journals import open_journal
from tests.support.processes import ROOT

CYCLE_COUNT = 20


@dataclass
class Ledger:
    """What was acknowledged, by kind."""

    accepted: set[str] = field(default_factory=set)
    output: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)

    def take(self, line: str) -> None:
        what, _, request_id = line.strip().partition(" ")
        if what != "open":
            getattr(self, what).add(request_id)

    @property
    def next_number(self) -> int:
        """Far enough that no id is used twice, one that was written and not acknowledged included."""
        return 1000 + max((int(name.partition("-")[2]) for name in self.accepted), default=0)

    async def check(self, path: Path) -> None:
        """Open the journal and hold it against what was acknowledged."""
        async with open_journal(path) as (store, live):
            accepted = {each.request_id for each in live if isinstance(each, RequestAccepted)}
            with_output = {each.request_id for each in live if isinstance(each, OutputProduced)}
            for request_id in self.ended:
                found = await store.find_ended("tenant", request_id)
                assert found is not None, request_id
                assert found.pieces[0].text == f"answer to {request_id}"
                assert request_id not in accepted
            # The end may have been written and not acknowledged.
            for request_id in self.accepted - self.ended - accepted:
                assert await store.find_ended("tenant", request_id) is not None, request_id
            for request_id in (self.output - self.ended) & accepted:
                assert request_id in with_output


def run(path: Path, ledger: Ledger, *, lines: int, environment: Mapping[str, str] | None = None) -> int:
    """Run the program until it has printed so many lines, kill it, and return its status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.journal_program", str(path), str(ledger.next_number)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    try:
        for number, line in enumerate(process.stdout):
            ledger.take(line)
            if number == lines:
                process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()
    return process.returncode


async def test_nothing_acknowledged_is_lost_when_the_process_is_killed_again_and_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.db"
    ledger, choose = Ledger(), random.Random(7)
    for _cycle in range(CYCLE_COUNT):
        assert run(path, ledger, lines=choose.randrange(1, 800)) == -signal.SIGKILL
        await ledger.check(path)
    assert len(ledger.ended) > 100
    report = inspect_journal(path, thoroughly=True)
    # Old rows were let go of on the way.
    assert report.first_record > 1


@pytest.mark.parametrize("name", failpoints.NAMES)
@pytest.mark.parametrize("passes", [1, 7])
async def test_a_crash_at_each_step_of_a_write_loses_nothing(tmp_path: Path, name: str, passes: int) -> None:
    path = tmp_path / "journal.db"
    ledger = Ledger()
    environment = {failpoints.VARIABLE: f"{name}:{passes}"}
    assert run(path, ledger, lines=1_000_000, environment=environment) == failpoints.EXIT_STATUS
    await ledger.check(path)
    # And it goes on from there.
    assert run(path, ledger, lines=100) == -signal.SIGKILL
    await ledger.check(path)


def test_a_failpoint_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"journal\.before_commit"):
        failpoints.make_failpoint({failpoints.VARIABLE: "journal.typo"})
    with pytest.raises(ValueError, match="NAME:COUNT"):
        failpoints.make_failpoint({failpoints.VARIABLE: "journal.before_ack:0"})


def test_without_the_variable_a_failpoint_does_nothing() -> None:
    failpoints.make_failpoint({})("journal.before_commit")
