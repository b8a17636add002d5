"""Which instance has how much of a prompt in its cache: as it is, or as the dispatches tell."""

from __future__ import annotations

from typing import Protocol

from sagecp.core.prefix_index import PrefixIndex
from sagecp.sim.fleet.block_cache import BlockCache
from sagecp.sim.fleet.controller import World
from sagecp.sim.fleet.engine import FleetEngine
from sagecp.sim.fleet.traces import TraceRequest

PREFIX_SOURCES = ("engine", "dispatches")
"""The engines' caches themselves; or a model of them, kept from the dispatches as gateways do."""


class PrefixView(Protocol):
    """Tells what instances have cached, by index."""

    def cached_token_count(self, index: int, request: TraceRequest) -> int:
        """Return how many leading tokens of a prompt an instance has; one token at least is always left."""

    def dispatched(self, index: int, request: TraceRequest) -> None:
        """Take notice that a request was given to an instance."""

    def finished(self, index: int, request: TraceRequest) -> None:
        """Take notice of its end."""


def prefix_view(source: str, world: World) -> PrefixView:
    """Return the view of a source, one of :data:`PREFIX_SOURCES`."""
    return EnginePrefixes(world) if source == "engine" else DispatchedPrefixes(world)


def _cache_of(engine: FleetEngine) -> BlockCache:
    return engine._batch.cache  # noqa: SLF001 - an engine tells nobody what it has cached; this asks what it would find


def _shareable(engine: FleetEngine, request: TraceRequest) -> tuple[int, ...]:
    """Return the blocks of a prompt that an engine could find: at least one token has to be computed."""
    if not engine.limits.prefix_caching:
        return ()
    return request.block_hashes[: (request.prompt_token_count - 1) // engine.limits.block_size]


class EnginePrefixes:
    """Looks into the engines: exact, and blind for what is queued and not yet computed."""

    def __init__(self, world: World) -> None:
        self._engines = world.engines

    def cached_token_count(self, index: int, request: TraceRequest) -> int:
        """Return what the engine would find if it admitted the request now."""
        engine = self._engines[index]
        contents = _shareable(engine, request)
        return len(_cache_of(engine).match(contents, len(contents))) * engine.limits.block_size

    def dispatched(self, index: int, request: TraceRequest) -> None:
        """Do nothing: the engine knows."""

    def finished(self, index: int, request: TraceRequest) -> None:
        """Do nothing: the engine knows."""


class DispatchedPrefixes:
    """Keeps a least-recently-used list per instance, as long as its cache: right away, and approximate."""

    def __init__(self, world: World) -> None:
        self._engines = world.engines
        self._instance_ids = [instance.instance_id for instance in world.instances]
        self._index = PrefixIndex()
        # What the index took of each live request, to be released.
        self._taken: dict[str, tuple[int, ...]] = {}
        for instance_id, engine in zip(self._instance_ids, self._engines, strict=True):
            self._index.add_instance(instance_id, engine.kv_token_capacity // engine.limits.block_size)

    def cached_token_count(self, index: int, request: TraceRequest) -> int:
        """Return what was sent there before and should still be there."""
        engine = self._engines[index]
        block_count = self._index.match_one(self._instance_ids[index], _shareable(engine, request))
        return block_count * engine.limits.block_size

    def dispatched(self, index: int, request: TraceRequest) -> None:
        """Make its blocks the most recent, until it ends."""
        contents = request.block_hashes
        taken_count = self._index.insert(self._instance_ids[index], contents, pinned=True)
        self._taken[request.request_id] = contents[:taken_count]

    def finished(self, index: int, request: TraceRequest) -> None:
        """Let its blocks be evicted."""
        self._index.release(self._instance_ids[index], self._taken.pop(request.request_id))
