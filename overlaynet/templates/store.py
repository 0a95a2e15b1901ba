"""The example store: leases in an SQLite database, for nodes that share its file.

It supplies a table of records that are written by compare-and-swap; choosing, renewing and expiring of leases, overlaynet
does over that.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import sqlite3
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import ClassVar

import attrs

from overlaynet.api import Record, StoreError, StoreUnavailable, Table, TableStore, option

POLL = 0.2
"""Seconds between two looks of a watch."""
PATIENCE = 1.0
"""Seconds that a call waits for another process's transaction."""


@attrs.frozen
class ExampleOptions:
    """What is given with ``--store-option``."""

    path: str = option("/var/lib/overlaynet/example.db", "File of the database")


class ExampleStore(TableStore):
    """Leases in an SQLite database."""

    api: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[ExampleOptions]] = ExampleOptions
    options: ExampleOptions

    def __str__(self) -> str:
        """Where it is, for messages; never with a password."""
        return f"example at {self.options.path}"

    def make_table(self) -> Table:
        """The table of this node; overlaynet closes it."""
        return ExampleTable(self.options.path)


class ExampleTable(Table):
    """Records in a database. The calls are short, so they are made in the event loop; so none is ever cancelled half-way."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._closed = asyncio.Event()

    async def get(self, key: str) -> Record | None:
        with self._transaction() as database:
            rows = database.execute("SELECT * FROM records WHERE key = ? AND expires > ?", (key, time.time()))
            return next(map(_record, rows), None)

    async def list(self, prefix: str) -> Mapping[str, Record]:
        with self._transaction() as database:
            rows = database.execute(
                "SELECT * FROM records WHERE substr(key, 1, ?) = ? AND expires > ? ORDER BY key",
                (len(prefix), prefix, time.time()),
            )
            return {record.key: record for record in map(_record, rows)}

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        version = secrets.token_hex(8)
        with self._transaction() as database:
            database.execute("DELETE FROM records WHERE key = ? AND expires <= ?", (key, time.time()))
            written = database.execute(
                "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?)", (key, value, version, time.time() + ttl)
            )
            return Record(key, value, version, ttl) if written.rowcount == 1 else None

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        version = secrets.token_hex(8)
        with self._transaction() as database:
            now = time.time()
            written = database.execute(
                "UPDATE records SET value = ?, version = ?, expires = ? WHERE key = ? AND version = ? AND expires > ?",
                (value, version, now + ttl, record.key, record.version, now),
            )
            return Record(record.key, value, version, ttl) if written.rowcount == 1 else None

    async def delete(self, record: Record) -> bool:
        with self._transaction() as database:
            deleted = database.execute(
                "DELETE FROM records WHERE key = ? AND version = ? AND expires > ?",
                (record.key, record.version, time.time()),
            )
            return deleted.rowcount == 1

    async def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        seen = None
        while not self._closed.is_set():
            found = await self.list(prefix)
            versions = {key: record.version for key, record in found.items()}
            if versions != seen:
                seen = versions
                yield found
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL):
                    await self._closed.wait()

    async def aclose(self) -> None:
        self._closed.set()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing of what is done within; the errors that a store may raise."""
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value BLOB, version TEXT, expires REAL)"
                )
                yield self._connection
            except BaseException:
                self._connection.rollback()
                raise
            self._connection.commit()
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"the database {self._path} does not answer: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(f"the database {self._path} cannot be used: {error}") from error


def _record(row: tuple[str, bytes, str, float]) -> Record:
    key, value, version, expires = row
    return Record(key, value, version, expires - time.time())
