"""A world for nodes to share a network in: one store, a clock, and messages that go and come one by one.

Everything a node asks of the store is a :class:`Call`. It does nothing by itself: the one who explores lets it arrive,
lets its answer return, loses either, or lets the caller give up first and the call arrive later all the same. Time is
virtual, and passes when the explorer says so.
"""

from __future__ import annotations

import abc
import asyncio
import math
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs

from overlaynet.errors import StoreUnavailable
from overlaynet.stores import _etcd_replies as replies
from overlaynet.stores import _file_format as form
from overlaynet.stores._etcd_client import EtcdClient
from overlaynet.stores._etcd_table import EtcdRecord, EtcdTable
from overlaynet.stores._file_directory import Directory
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.stores.file import FileTable
from overlaynet.stores.memory import MemoryTable
from overlaynet.table import Record, Table
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.etcd import EtcdServer

T = TypeVar("T")

Ask = Callable[[Table], Awaitable[Any]]

_TURNS = 12
"""Turns of the event loop in which whatever can go on without a message or time has gone on."""


@attrs.define(eq=False)
class Call:
    """One call of a table, on its way there or back."""

    caller: str
    name: str
    """Which operation, and of what: ``create subnets/10.0.0.0-26``."""
    ask: Ask
    waiting: asyncio.Future[Any]
    """What the caller waits for; done if it has given up, or is dead."""
    arrived: bool = False
    answer: Any = None

    @property
    def is_watch(self) -> bool:
        """True for a watcher's wait for the next listing."""
        return self.name.startswith("watch ")

    @property
    def is_write(self) -> bool:
        """True if it may change the table."""
        return self.name.startswith(("create ", "replace ", "delete "))


@attrs.frozen
class Write:
    """A write that took effect."""

    caller: str
    operation: str
    key: str
    record: Record | None
    """What was written; ``None`` for a deletion."""


class World(abc.ABC):
    """The store, the clock, and the calls that are under way."""

    def __init__(self) -> None:
        self.loop = VirtualClockLoop()
        self.calls: list[Call] = []
        self.writes: list[Write] = []
        """The writes that took effect, in their order."""

    @abc.abstractmethod
    def apply(self, ask: Ask) -> Any:
        """Ask the store itself, now."""

    @abc.abstractmethod
    def wipe(self) -> None:
        """Remove all that the store holds, at once and behind its back."""

    def close(self) -> None:
        """Free everything."""
        self.loop.close()

    @property
    def now(self) -> float:
        """The time of every clock in this world, in seconds."""
        return self.loop.time()

    def settle(self) -> None:
        """Let everybody go on until all wait for a message or for time."""

        async def turns() -> None:
            for _ in range(_TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def advance(self, seconds: float) -> None:
        """Let time pass. Calls stay where they are."""
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.settle()

    # What can become of a call

    def arrive(self, call: Call) -> None:
        """Let a call take effect; its answer is on its way then, unless nobody waits for it."""
        call.answer = self.apply(call.ask)
        call.arrived = True
        if call.waiting.done():
            self.calls.remove(call)

    def answer(self, call: Call) -> None:
        """Let a call's answer reach its caller."""
        self.calls.remove(call)
        if not call.waiting.done():
            call.waiting.set_result(call.answer)

    def lose(self, call: Call, *, late: bool = False) -> None:
        """Let the caller give up.

        :param late: a call that has not arrived yet is still under way, and can arrive at any time.
        """
        if not call.waiting.done():
            call.waiting.set_exception(StoreUnavailable(f"no answer to {call.name}"))
        if call.arrived or not late:
            self.calls.remove(call)

    def table(self, caller: str) -> Table:
        """The store's table as one caller reaches it."""
        return _Distant(self, caller)


class _Distant(Table):
    """A table at the end of a line."""

    def __init__(self, world: World, caller: str) -> None:
        self._world = world
        self._caller = caller

    async def _call(self, name: str, ask: Ask) -> Any:
        call = Call(self._caller, name, ask, self._world.loop.create_future())
        self._world.calls.append(call)
        return await call.waiting

    async def _write(self, operation: str, key: str, ask: Ask) -> Any:
        async def written(table: Table) -> Any:
            answer = await ask(table)
            if answer:
                record = answer if isinstance(answer, Record) else None
                self._world.writes.append(Write(self._caller, operation, key, record))
            return answer

        return await self._call(f"{operation} {key}", written)

    async def get(self, key: str) -> Record | None:
        found: Record | None = await self._call(f"get {key}", lambda table: table.get(key))
        return found

    async def list(self, prefix: str) -> Mapping[str, Record]:
        listing: Mapping[str, Record] = await self._call(f"list {prefix}", lambda table: table.list(prefix))
        return listing

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        created: Record | None = await self._write("create", key, lambda table: table.create(key, value, ttl))
        return created

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        written: Record | None = await self._write(
            "replace", record.key, lambda table: table.replace(record, value, ttl)
        )
        return written

    async def delete(self, record: Record) -> bool:
        deleted: bool = await self._write("delete", record.key, lambda table: table.delete(record))
        return deleted

    async def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        while True:
            yield await self._call(f"watch {prefix}", lambda table: table.list(prefix))


class MemoryWorld(World):
    """Around the memory store, which shares the world's clock."""

    def __init__(self) -> None:
        super().__init__()
        self._table = MemoryTable()

    def apply(self, ask: Ask) -> Any:
        return self.loop.run_until_complete(_awaited(ask(self._table)))

    def wipe(self) -> None:
        self._table._content.entries.clear()


class _Outside(World):
    """Around a store that needs threads, which go on outside of the world's time."""

    def __init__(self) -> None:
        super().__init__()
        self._outside = asyncio.new_event_loop()
        self._inner = self._make_table()

    @abc.abstractmethod
    def _make_table(self) -> Table: ...

    def apply(self, ask: Ask) -> Any:
        return self._outside.run_until_complete(_awaited(ask(self._inner)))

    def close(self) -> None:
        self._outside.run_until_complete(self._inner.aclose())
        self._outside.close()
        super().close()


class FileWorld(_Outside):
    """Around the file store, whose directory is shown the world's clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__()

    def _make_table(self) -> Table:
        return FileTable(Directory(str(self._path), lambda: form.Moment("this boot", self.now, self.now)))

    def wipe(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)  # it may never have been written to


class EtcdWorld(_Outside):
    """Around a real etcd, whose clock nobody can set: the world revokes etcd's lease when a lifetime has passed."""

    def __init__(self, server: EtcdServer, prefix: str) -> None:
        self._server = server
        self._prefix = prefix
        self._expiries: dict[str, tuple[float, int]] = {}
        super().__init__()

    def _make_table(self) -> Table:
        options = EtcdOptions(endpoints=(self._server.endpoint,), prefix=self._prefix)
        made = EtcdStore(options).make_table()
        assert isinstance(made, EtcdTable)
        return _Timed(made._client, made._root, self)

    def apply(self, ask: Ask) -> Any:
        for key, (expires, lease) in list(self._expiries.items()):
            if expires <= self.now:
                del self._expiries[key]
                # Gone already, if its record was written over since.
                if self._server.post("/v3/lease/timetolive", {"ID": str(lease)}).get("TTL", "0") != "-1":
                    self._server.post("/v3/lease/revoke", {"ID": str(lease)})
        return super().apply(ask)

    def wipe(self) -> None:
        # Without what etcd forgets beside the keys: tests/faults/test_etcd_history.py wipes it for real.
        self._server.post("/v3/kv/deleterange", replies.prefix_range(f"{self._prefix}/".encode()))
        self._expiries.clear()

    def remember(self, record: Record | None, ttl: float) -> Record | None:
        """Note when a record expires in the world's time."""
        if record is not None:
            self._expiries.pop(record.key, None)
            assert isinstance(record, EtcdRecord)
            if ttl != math.inf:
                self._expiries[record.key] = (self.now + ttl, record.lease)
            record = attrs.evolve(record, ttl=ttl)
        return record


class _Timed(EtcdTable):
    """An etcd table whose lifetimes pass in the world's time; etcd is told of longer ones."""

    LONG = 86400.0

    def __init__(self, client: EtcdClient, root: str, world: EtcdWorld) -> None:
        super().__init__(client, root)
        self._world = world

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return self._world.remember(await super().create(key, value, max(ttl, self.LONG)), ttl)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        return self._world.remember(await super().replace(record, value, max(ttl, self.LONG)), ttl)


async def _awaited(answer: Awaitable[T]) -> T:
    return await answer
