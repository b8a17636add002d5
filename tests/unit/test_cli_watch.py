"""Watching by asking again: what is told, what is looked after, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest

from sagecp.cli import watch as watching
from sagecp.cli.watch import Source, watch
from sagecp.client import NotFoundError, SageClient, UnavailableError


@dataclass(frozen=True)
class Thing:
    name: str
    state: str


class Script:
    """Answers of a server, one look after the other; the last one ends the test."""

    def __init__(self, *looks: Any, others: dict[str, Thing] | None = None) -> None:
        self._looks = list(looks)
        self._others = others or {}
        self.told: list[list[str]] = []
        self.looked_up: list[str] = []

    async def fetch(self, _client: SageClient) -> Sequence[Thing]:
        if not self._looks:
            raise EndOfScriptError
        look = self._looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return [Thing(*each.split(":")) for each in look.split()]

    async def fetch_one(self, _client: SageClient, name: str) -> Thing:
        self.looked_up.append(name)
        if name not in self._others:
            raise NotFoundError("no", code=grpc.StatusCode.NOT_FOUND)
        return self._others[name]

    def show(self, things: Sequence[Thing]) -> None:
        self.told.append([f"{thing.name}:{thing.state}" for thing in things])

    async def run(self, *, ends: bool = False) -> None:
        source = Source(
            fetch=self.fetch,
            fetch_one=self.fetch_one,
            identify=lambda thing: thing.name,
            news=lambda thing: thing.state,
            is_over=lambda thing: thing.state == "over",
            gone=lambda thing: dataclasses.replace(thing, state="gone"),
            ends=ends,
        )
        await watch(cast("SageClient", None), source, 0.0, self.show)


class EndOfScriptError(Exception):
    """Nothing more was written."""


def unavailable() -> UnavailableError:
    return UnavailableError("away", code=grpc.StatusCode.UNAVAILABLE)


async def told(script: Script) -> list[list[str]]:
    with pytest.raises(EndOfScriptError):
        await script.run()
    return script.told


async def test_everything_once_and_then_what_changes() -> None:
    script = Script("a:1 b:1", "a:1 b:1", "a:1 b:2 c:1", "a:1 b:2 c:1")
    assert await told(script) == [["a:1", "b:1"], ["b:2", "c:1"]]
    assert script.looked_up == []


async def test_nothing_at_first() -> None:
    assert await told(Script("", "a:1")) == [[], ["a:1"]]


async def test_what_is_not_found_any_more_is_looked_after() -> None:
    """It may have ended, be gone, or match no more; each is told once."""
    script = Script("a:1 b:1 c:1", "c:1", "c:1", others={"a": Thing("a", "over")})
    assert await told(script) == [["a:1", "b:1", "c:1"], ["a:over", "b:gone"]]
    assert script.looked_up == ["a", "b"], "what is over or gone is forgotten"


async def test_what_was_over_when_it_vanished_is_no_news() -> None:
    script = Script("a:over b:1", "b:1", "b:1")
    assert await told(script) == [["a:over", "b:1"]]
    assert script.looked_up == []


async def test_looking_after_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_MOST_LOOKED_UP", 2)
    script = Script("a:1 b:1 c:1", "", "")
    assert await told(script) == [["a:1", "b:1", "c:1"], ["a:gone", "b:gone"], ["c:gone"]]


async def test_one_that_is_over_ends_the_watch() -> None:
    script = Script("a:1", "a:2", "a:over")
    await script.run(ends=True)
    assert script.told == [["a:1"], ["a:2"], ["a:over"]]


async def test_one_that_is_gone_ends_the_watch() -> None:
    script = Script("a:1", NotFoundError("no", code=grpc.StatusCode.NOT_FOUND))
    await script.run(ends=True)
    assert script.told == [["a:1"], ["a:gone"]]


async def test_one_that_never_was_is_an_error() -> None:
    with pytest.raises(NotFoundError):
        await Script(NotFoundError("no", code=grpc.StatusCode.NOT_FOUND)).run(ends=True)


async def test_a_server_that_is_away_for_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script("a:1", unavailable(), unavailable(), "a:2", unavailable(), "a:2")
    assert await told(script) == [["a:1"], ["a:2"]]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["the control plane does not answer; trying again"] * 2, "said once each time"


async def test_a_server_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LONGEST_SILENCE_S", -1.0)
    with pytest.raises(UnavailableError):
        await Script("a:1", unavailable(), unavailable()).run()


async def test_a_server_that_is_not_there_at_first() -> None:
    with pytest.raises(UnavailableError):
        await Script(unavailable()).run()
