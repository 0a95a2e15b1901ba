"""The example store: leases in an SQLite database, for nodes that share its file, on one machine.

It supplies a table of records that are written by compare-and-swap; choosing, renewing and expiring of leases, overlaynet
does over that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import secrets
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import attrs

from overlaynet.api import Record, StoreError, StoreUnavailable, Table, TableStore, call_in_thread, option

T = TypeVar("T")

POLL = 0.2
"""Seconds between two looks of a watch."""
PATIENCE = 5.0
"""Seconds that a call waits for another process's transaction."""
_TABLE = """
CREATE TABLE IF NOT EXISTS records (
    key TEXT PRIMARY KEY, value BLOB, version TEXT, lifetime REAL, boot TEXT, expires REAL
)
"""


@attrs.frozen
class ExampleOptions:
    """What is given with ``--store-option``."""

    path: str = option("/var/lib/overlaynet/example.db", "File of the database, which all nodes share")


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
    """Records in a database. SQLite blocks, so each call is one transaction in a thread, on a connection of its own.

    A call that is cancelled may be carried out to its end in its thread, as a request to a server may.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._closed = asyncio.Event()

    async def get(self, key: str) -> Record | None:
        return await self._call("BEGIN", lambda database: _find(database, key))

    async def list(self, prefix: str) -> Mapping[str, Record]:
        def read(database: sqlite3.Connection) -> Mapping[str, Record]:
            question = "SELECT * FROM records WHERE substr(key, 1, ?) = ? ORDER BY key"
            found = map(_record, database.execute(question, (len(prefix), prefix)))
            return {record.key: record for record in found if record is not None}

        return await self._call("BEGIN", read)

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        def write(database: sqlite3.Connection) -> Record | None:
            return None if _find(database, key) is not None else _write(database, key, value, ttl)

        return await self._call("BEGIN IMMEDIATE", write)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        def write(database: sqlite3.Connection) -> Record | None:
            return _write(database, record.key, value, ttl) if _stands(database, record) else None

        return await self._call("BEGIN IMMEDIATE", write)

    async def delete(self, record: Record) -> bool:
        def write(database: sqlite3.Connection) -> bool:
            stands = _stands(database, record)
            if stands:
                database.execute("DELETE FROM records WHERE key = ?", (record.key,))
            return stands

        return await self._call("BEGIN IMMEDIATE", write)

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

    async def _call(self, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        return await call_in_thread(self._transact, begin, work)

    def _transact(self, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """All of ``work`` or nothing of it; the errors that a store may raise."""
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)) as database:
                database.execute(_TABLE)
                database.execute(begin)
                result = work(database)
                database.execute("COMMIT")
                return result  # to close the connection undoes what was not committed, whatever the reason
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"the database {self._path} does not answer: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(f"the database {self._path} cannot be used: {error}") from error


def _find(database: sqlite3.Connection, key: str) -> Record | None:
    row = database.execute("SELECT * FROM records WHERE key = ?", (key,)).fetchone()
    return None if row is None else _record(row)


def _stands(database: sqlite3.Connection, record: Record) -> bool:
    found = _find(database, record.key)
    return found is not None and found.version == record.version


def _write(database: sqlite3.Connection, key: str, value: bytes, ttl: float) -> Record:
    row = (key, value, secrets.token_hex(8), ttl, _boot(), _now() + ttl)
    database.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?)", row)
    return Record(key, value, row[2], ttl)


def _record(row: tuple[str, bytes, str, float, str, float]) -> Record | None:
    """The record of a row; ``None`` if it has expired."""
    key, value, version, lifetime, boot, expires = row
    # What was written before the machine was started has its whole lifetime from then on: that is never too short.
    left = (expires if boot == _boot() else lifetime) - _now()
    return Record(key, value, version, left) if left > 0 else None


def _now() -> float:
    """Seconds since the machine was started. Nobody sets this clock, and it is that of all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@functools.cache
def _boot() -> str:
    """What tells this start of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()
