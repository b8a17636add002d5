"""Random records and restarts against a plain model of what must be kept, over every store."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sagecp.config import JournalConfig
from sagecp.runtime.store.base import Store, StoreError
from sagecp.runtime.store.memory import MemoryStore
from sagecp.runtime.store.records import InstanceDropped, InstanceKept, Record, RequestEnded
from sagecp.runtime.store.sqlite import journal_file
from sagecp.runtime.store.sqlite.store import SqliteStore
from tests.support.store_records import Wall, accepted, dispatched, ended, lost, output, piece, prompt, values

REQUEST_IDS = st.sampled_from([f"request-{number}" for number in range(5)])
INSTANCE_IDS = st.sampled_from(["engine-0", "engine-1"])
MAX_ENDED_COUNT = 3
CONFIG = JournalConfig(max_ended_count=MAX_ENDED_COUNT, ballast_bytes=0)


@dataclass
class Model:
    """What a store keeps, in the plainest way."""

    live: list[tuple[str, Record]] = field(default_factory=list)
    ended: dict[str, RequestEnded] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        subject = getattr(record, "request_id", "") or getattr(record, "instance_id", "")
        is_known = any(name == subject for name, _record in self.live)
        kind = type(record).__name__
        if kind in {"RequestAccepted", "RequestEnded", "InstanceKept", "InstanceDropped"}:
            self.live = [each for each in self.live if each[0] != subject]
        if kind in {"RequestAccepted", "InstanceKept"} or (
            is_known and kind not in {"RequestEnded", "InstanceDropped"}
        ):
            self.live.append((subject, record))
        if isinstance(record, RequestEnded):
            self.ended.pop(subject, None)
            self.ended[subject] = record
            while len(self.ended) > MAX_ENDED_COUNT:
                del self.ended[next(iter(self.ended))]


class StoreMachine(RuleBasedStateMachine):
    """One store on one event loop; ``make_store`` gives it, the first time and after each close."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.model = Model()
        self.sequence = 0
        self.answers: list[StoreError | None] = []
        self.given_count = 0
        self.store: Store | None = None

    def make_store(self) -> Store:
        raise NotImplementedError

    @property
    def now(self) -> Store:
        assert self.store is not None
        return self.store

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    @initialize()
    def open(self) -> None:
        self.store = self.make_store()
        assert list(self.run(self.store.open())) == []

    def give(self, record: Record, sync: bool) -> None:
        async def append() -> None:
            self.now.append(record, sync=sync, then=self.answers.append)

        self.given_count += 1
        self.run(append())
        self.model.add(record)

    @rule(request_id=REQUEST_IDS, size=st.sampled_from([0, 10, 3000]), sync=st.booleans())
    def accept(self, request_id: str, size: int, sync: bool) -> None:
        self.sequence += 1
        self.give(accepted(request_id, sequence=self.sequence, metadata=b"m" * size), sync)

    @rule(request_id=REQUEST_IDS, number=st.integers(0, 3), sync=st.booleans())
    def go_on(self, request_id: str, number: int, sync: bool) -> None:
        record = (
            dispatched(request_id, 1),
            prompt(request_id),
            output(request_id, self.sequence, 2),
            lost(request_id, 1),
        )
        self.give(record[number], sync)

    @rule(request_id=REQUEST_IDS, has_output=st.booleans(), sync=st.booleans())
    def end(self, request_id: str, has_output: bool, sync: bool) -> None:
        pieces = (piece(f"text {self.sequence}", [self.sequence]),) if has_output else ()
        self.give(ended(request_id, pieces=pieces), sync)

    @rule(instance_id=INSTANCE_IDS, incarnation=st.integers(1, 9))
    def register(self, instance_id: str, incarnation: int) -> None:
        self.give(InstanceKept(instance_id, incarnation, False, b"specification"), True)

    @rule(instance_id=INSTANCE_IDS)
    def drop(self, instance_id: str) -> None:
        self.give(InstanceDropped(instance_id), True)

    @rule()
    def flush(self) -> None:
        self.run(self.now.flush())
        assert self.answers == [None] * self.given_count

    @rule(request_id=REQUEST_IDS)
    def find(self, request_id: str) -> None:
        """What must be kept is found; what is over the bound may be found for a little longer."""
        expected = self.model.ended.get(request_id)
        if expected is not None:
            assert self.now.may_have_ended("tenant", request_id)
            assert values([self.run(self.now.find_ended("tenant", request_id))]) == values([expected])
        assert self.run(self.now.find_ended("stranger", request_id)) is None

    @precondition(lambda self: self.given_count > 0)
    @rule()
    def restart(self) -> None:
        self.run(self.now.close())
        self.store = self.make_store()
        found = self.run(self.store.open())
        assert values(found) == values([record for _subject, record in self.model.live])

    @invariant()
    def takes_requests(self) -> None:
        if self.store is not None:
            assert self.store.status().trouble == ""

    def teardown(self) -> None:
        if self.store is not None:
            self.run(self.store.close())
        self.runner.close()
        self.folder.cleanup()


class MemoryMachine(StoreMachine):
    def make_store(self) -> Store:
        return self.store or MemoryStore(CONFIG, wall_clock=Wall())


class SqliteMachine(StoreMachine):
    def make_store(self) -> Store:
        return SqliteStore(Path(self.folder.name) / "journal.db", CONFIG, wall_clock=Wall())


@pytest.mark.parametrize("machine", [MemoryMachine, SqliteMachine])
def test_what_is_kept_is_what_the_model_keeps(
    machine: type[StoreMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a few records are enough to have old rows moved and let go of.
    monkeypatch.setattr(journal_file, "_CLEANING_FROM_BYTES", 1000)
    monkeypatch.setattr(journal_file, "_CLEANED_ROW_COUNT", 3)
    monkeypatch.setattr(journal_file, "_CLEANED_ROW_COUNT_MOST", 3)
    monkeypatch.setattr(journal_file, "_CHECKPOINT_PAGE_COUNT", 20)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
