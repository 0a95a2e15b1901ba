"""The sqlite store: leases in one SQLite file, for nodes that share a file system whose locks work.

It supplies a table of records that are written by compare-and-swap, each in one transaction; choosing, renewing and
expiring of leases, and reservations, overlaynet does over that.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, ClassVar, TypeVar

import attrs

from overlaynet.api import Record, Table, TableStore, between, call_in_thread, option
from overlaynet_sqlite._database import Cursor, Database

T = TypeVar("T")

_LONGEST_SLEEP = 60.0
"""Seconds after which a watch looks at lifetimes again: they pass while the machine sleeps, and its clock may be set."""


def _check_path(path: str) -> str | None:
    """A path, without NUL."""
    return None if path and "\0" not in path else "must be the path of a file"


@attrs.frozen
class SqliteOptions:
    """What is given with ``--store-option``."""

    path: str = option(
        "/var/lib/overlaynet/leases.sqlite",
        "File of the database, the same for all nodes; it is made if it is missing",
        check=_check_path,
    )
    poll_interval: float = option(
        0.25, "Seconds between two looks for what other nodes have written", check=between(0.01, 60)
    )
    lock_timeout: float = option(
        10.0, "Seconds that a call waits while others have the database locked", check=between(0.1, 300)
    )


class SqliteStore(TableStore):
    """Leases in an SQLite database."""

    api: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[SqliteOptions]] = SqliteOptions
    options: SqliteOptions

    def __str__(self) -> str:
        return f"SQLite database {self.options.path}"

    def make_table(self) -> Table:
        return SqliteTable(self.options)


class SqliteTable(Table):
    """The records of one node's store.

    No call blocks the event loop: each is made in a thread. One that is cancelled while it waits for a lock writes nothing;
    one that is cancelled later is carried out to its end in its thread.
    """

    def __init__(self, options: SqliteOptions) -> None:
        self._options = options
        self._database = self._open()
        self._closed = asyncio.Event()

    async def get(self, key: str) -> Record | None:
        return await _call(self._database.get, key)

    async def list(self, prefix: str) -> Mapping[str, Record]:
        return await _call(self._database.list, prefix)

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await _call(self._database.create, key, value, ttl)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        return await _call(self._database.replace, record, value, ttl)

    async def delete(self, record: Record) -> bool:
        return await _call(self._database.delete, record)

    async def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        """Ask SQLite again and again whether anything was written: a number that it keeps, so a look costs little.

        The cursor makes nothing go missing while the reader is busy; a watch that begins anew has none, and so begins
        with all that there is.
        """
        loop = asyncio.get_running_loop()
        database = self._open()  # a connection is not told of its own writes, so this one makes none
        cursor: Cursor | None = None
        previous: Mapping[str, str] | None = None
        due = loop.time()
        try:
            while not self._closed.is_set():
                cursor, listing = await _call(database.poll, prefix, None if loop.time() >= due else cursor)
                if listing is not None:
                    due = loop.time() + min([_LONGEST_SLEEP, *(record.ttl or 0.0 for record in listing.values())])
                    versions = {key: record.version for key, record in listing.items()}
                    if versions != previous:
                        previous = versions
                        yield listing
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(due, loop.time() + self._options.poll_interval)):
                        await self._closed.wait()
        finally:
            await call_in_thread(database.close)

    async def aclose(self) -> None:
        self._closed.set()
        await call_in_thread(self._database.close)

    def _open(self) -> Database:
        return Database(self._options.path, self._options.lock_timeout)


async def _call(function: Callable[..., T], *arguments: Any) -> T:
    abandoned = threading.Event()
    try:
        return await call_in_thread(function, abandoned, *arguments)
    finally:
        abandoned.set()
