"""The memory store: leases of nodes that live in one process, for tests and demonstrations.

Its lifetimes follow the event loop's clock, so a virtual clock makes them pass at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Mapping

import attrs

from overlaynet.drivers import NoOptions
from overlaynet.leases import TableStore
from overlaynet.table import Record, Table


class MemoryStore(TableStore):
    """A store in the memory of this process.

    Nodes that are to share one network are given the same table: ``MemoryStore(table=shared)``. Without one, the
    store has a table of its own. A table that was given is not closed with the store.
    """

    def __init__(self, options: NoOptions | None = None, table: MemoryTable | None = None) -> None:
        super().__init__(NoOptions() if options is None else options)
        self._shared = table

    def __str__(self) -> str:
        return "memory of this process"

    def make_table(self) -> Table:
        return MemoryTable() if self._shared is None else self._shared.another()


@attrs.frozen
class _Entry:
    value: bytes
    version: str
    expires: float
    """Time of the event loop's clock."""


@attrs.define
class _Content:
    """What the handles on one table share."""

    entries: dict[str, _Entry] = attrs.field(factory=dict)
    writes: int = 0
    watchers: set[asyncio.Event] = attrs.field(factory=set)

    def find(self, key: str, now: float) -> _Entry | None:
        """The entry, unless it has expired."""
        entry = self.entries.get(key)
        return None if entry is None or entry.expires <= now else entry

    def live(self, prefix: str, now: float) -> dict[str, _Entry]:
        """The entries that have not expired, in the order of their keys; forgets those that have."""
        for key in [key for key, entry in self.entries.items() if entry.expires <= now]:
            del self.entries[key]
        return {key: entry for key, entry in sorted(self.entries.items()) if key.startswith(prefix)}

    def write(self, key: str, value: bytes, expires: float) -> _Entry:
        self.writes += 1
        self.entries[key] = _Entry(value, str(self.writes), expires)
        self.wake()
        return self.entries[key]

    def delete(self, key: str) -> None:
        del self.entries[key]
        self.wake()

    def wake(self) -> None:
        for watcher in self.watchers:
            watcher.set()


class MemoryTable(Table):
    """A table in memory. Each handle on it (see :meth:`another`) is closed by itself; the records stay."""

    def __init__(self) -> None:
        self._content = _Content()
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    def another(self) -> MemoryTable:
        """Another handle on the same records, as another node would have it; closing one leaves the others open."""
        table = MemoryTable()
        table._content = self._content
        return table

    async def get(self, key: str) -> Record | None:
        now = await _turn()
        return self._find(key, now)

    async def list(self, prefix: str) -> Mapping[str, Record]:
        now = await _turn()
        return _records(self._content.live(prefix, now), now)

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        now = await _turn()
        if self._find(key, now) is not None:
            return None
        return _record(key, self._content.write(key, value, now + ttl), now)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        now = await _turn()
        if not self._stands(record, now):
            return None
        return _record(record.key, self._content.write(record.key, value, now + ttl), now)

    async def delete(self, record: Record) -> bool:
        now = await _turn()
        if not self._stands(record, now):
            return False
        self._content.delete(record.key)
        return True

    async def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        changed = asyncio.Event()
        self._content.watchers.add(changed)
        self._watchers.add(changed)
        previous: dict[str, str] | None = None
        try:
            while not self._closed:
                changed.clear()
                now = _now()
                live = self._content.live(prefix, now)
                versions = {key: entry.version for key, entry in live.items()}
                if versions != previous:
                    previous = versions
                    yield _records(live, now)
                expiries = [entry.expires for entry in live.values() if entry.expires != math.inf]
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(expiries, default=None)):
                        await changed.wait()
        finally:
            self._content.watchers.discard(changed)
            self._watchers.discard(changed)

    async def aclose(self) -> None:
        self._closed = True
        for watcher in self._watchers:
            watcher.set()

    def _find(self, key: str, now: float) -> Record | None:
        entry = self._content.find(key, now)
        return None if entry is None else _record(key, entry, now)

    def _stands(self, record: Record, now: float) -> bool:
        found = self._content.find(record.key, now)
        return found is not None and found.version == record.version


def _records(entries: Mapping[str, _Entry], now: float) -> Mapping[str, Record]:
    return {key: _record(key, entry, now) for key, entry in entries.items()}


def _record(key: str, entry: _Entry, now: float) -> Record:
    return Record(key, entry.value, entry.version, ttl=entry.expires - now)


async def _turn() -> float:
    """Let others run first, as every store outside the process does, so that races show; then the time."""
    await asyncio.sleep(0)
    return _now()


def _now() -> float:
    return asyncio.get_running_loop().time()
