"""The database: records that are written in transactions. Every call blocks; none needs asyncio.

The journal is SQLite's rollback journal, not a write-ahead log: that one needs memory that all processes share, and so
would tie the file to one machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

from overlaynet.api import OverlaynetError, Record, StoreError, StoreUnavailable
from overlaynet_sqlite._moment import FOR_EVER, Moment, now

T = TypeVar("T")
Cursor: TypeAlias = tuple[int, int]
"""Where a reader is: which of its connections it was, and SQLite's ``data_version`` on that."""

APPLICATION = 0x6F766C79
"""What tells our files from those of others (``PRAGMA application_id``)."""
LAYOUT = 1
"""Which tables there are, and how they look (``PRAGMA user_version``)."""
_TABLE = """
CREATE TABLE records (
    key TEXT PRIMARY KEY NOT NULL CHECK (typeof(key) = 'text'),
    value BLOB NOT NULL CHECK (typeof(value) IN ('blob', 'text')),
    -- random, so that no two writes of a record are equal
    written TEXT NOT NULL DEFAULT (hex(randomblob(8))),
    -- when it expires: seconds since 1970, and within the same boot, seconds since that; NULL if never
    expires REAL CHECK (expires IS NULL OR typeof(expires) = 'real'),
    boot TEXT,
    boottime REAL
)
"""
_COLUMNS = "key, value, written, expires, boot, boottime"
_PAUSE = 0.05
"""Seconds between two looks whether a call that waits for a lock has been given up."""


class Abandoned(Exception):
    """Nobody waits for this call any more; it has written nothing."""


class Database:
    """The records in one file, on a connection of its own.

    ``abandoned`` is set by another thread when nobody waits for a call any more: one that still waits for a lock then
    ends with :exc:`Abandoned`. Every call raises :exc:`StoreUnavailable` if the file is locked for longer than
    ``patience`` seconds, or once this was closed.
    """

    def __init__(self, path: str, patience: float) -> None:
        self._path = os.path.abspath(path)
        self._patience = patience
        self._turn = threading.Lock()  # of the threads of this process
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._connections = 0
        self._closed = False

    def get(self, abandoned: threading.Event, key: str) -> Record | None:
        """The record, or ``None`` if there is none or it has expired."""
        return self._transaction("BEGIN", abandoned, lambda connection: _find(connection, key, now()))

    def list(self, abandoned: threading.Event, prefix: str) -> Mapping[str, Record]:
        """All live records whose key starts with ``prefix``, in the order of their keys."""
        return self._transaction("BEGIN", abandoned, lambda connection: _live(connection, prefix, now()))

    def poll(
        self, abandoned: threading.Event, prefix: str, seen: Cursor | None
    ) -> tuple[Cursor, Mapping[str, Record] | None]:
        """What :meth:`list` returns, if anything may have been written since ``seen``; and where the reader is now.

        Writes on this very connection do not show: SQLite tells of those of others only.
        """

        def look(connection: sqlite3.Connection) -> tuple[Cursor, Mapping[str, Record] | None]:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
            cursor = (self._connections, version)
            return cursor, None if cursor == seen else _live(connection, prefix, now())

        return self._transaction("BEGIN", abandoned, look)

    def create(self, abandoned: threading.Event, key: str, value: bytes, ttl: float) -> Record | None:
        """Write a record that does not exist yet; ``None`` if it does. Clears expired records away."""

        def write(connection: sqlite3.Connection) -> Record | None:
            moment = now()
            if _find(connection, key, moment) is not None:
                return None
            for row in connection.execute(f"SELECT {_COLUMNS} FROM records").fetchall():  # noqa: S608 - our own words
                if _left(row, moment) <= 0:
                    connection.execute("DELETE FROM records WHERE key = ?", (_text(row[0]),))
            return _write(connection, key, value, ttl, moment)

        return self._transaction("BEGIN IMMEDIATE", abandoned, write)

    def replace(self, abandoned: threading.Event, record: Record, value: bytes, ttl: float) -> Record | None:
        """Write over exactly this version; ``None`` if the record has changed or gone."""

        def write(connection: sqlite3.Connection) -> Record | None:
            moment = now()
            return _write(connection, record.key, value, ttl, moment) if _stands(connection, record, moment) else None

        return self._transaction("BEGIN IMMEDIATE", abandoned, write)

    def delete(self, abandoned: threading.Event, record: Record) -> bool:
        """Delete exactly this version; ``False`` if the record has changed or gone."""

        def write(connection: sqlite3.Connection) -> bool:
            if not _stands(connection, record, now()):
                return False
            connection.execute("DELETE FROM records WHERE key = ?", (record.key,))
            return True

        return self._transaction("BEGIN IMMEDIATE", abandoned, write)

    def close(self) -> None:
        """Close the connection, once the call that is under way is done; calls that wait end. Idempotent."""
        self._closed = True
        with self._turn:
            self._disconnect()

    def _transaction(self, begin: str, abandoned: threading.Event, work: Callable[[sqlite3.Connection], T]) -> T:
        """All of ``work`` or nothing of it, tried again while others have the file locked."""
        give_up = time.monotonic() + self._patience

        def go_on() -> None:
            if self._closed:
                raise StoreUnavailable(f"the database {self._path} was closed")
            if abandoned.is_set():
                raise Abandoned
            if time.monotonic() > give_up:
                raise StoreUnavailable(
                    f"the database {self._path} has been locked for {self._patience:g} s; find the process that holds it "
                    f"with: fuser -v {self._path}"
                )

        go_on()
        while not self._turn.acquire(timeout=_PAUSE):
            go_on()
        try:
            while True:
                go_on()
                try:
                    connection = self._connect()
                    with _rolled_back(connection):
                        connection.execute(begin)  # which may have waited for a lock
                        go_on()
                        if self._identity() == self._file:
                            found = work(connection)
                            connection.execute("COMMIT")
                            return found
                    # The file was moved away: what is written to it now, nobody would ever see.
                    self._disconnect()
                except sqlite3.OperationalError as error:
                    if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                        self._disconnect()
                        raise self._explain(error) from error
                except sqlite3.Error as error:
                    self._disconnect()
                    raise self._explain(error) from error
                except OSError as error:
                    raise StoreError(
                        f"the directory of the database {self._path} cannot be made: {error.filename}: "
                        f"{error.strerror}; give the store another path"
                    ) from error
        finally:
            self._turn.release()

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        while True:
            before = self._identity()
            connection = sqlite3.connect(self._path, timeout=_PAUSE, isolation_level=None, check_same_thread=False)
            # Equal: the connection is to the file that is there. (One that was not there, it has just made.)
            if before is not None and before == self._identity():
                break
            connection.close()
        try:
            connection.text_factory = bytes  # what is no UTF-8 must not make all the rest unreadable
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = EXTRA")  # a lease that was granted outlives a loss of power
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._file = connection, before
        self._connections += 1
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _identity(self) -> tuple[int, int] | None:
        """What tells the file that is at the path from any other. Only SQLite ever opens it: closing it would end its locks."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the table in a new file. :raises StoreError: if the file is somebody else's, or of another layout."""
        with _rolled_back(connection):
            connection.execute("BEGIN")
            if self._is_ready(connection):
                return
        with _rolled_back(connection):
            connection.execute("BEGIN IMMEDIATE")
            if not self._is_ready(connection):
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {LAYOUT}")
                connection.execute("COMMIT")

    def _is_ready(self, connection: sqlite3.Connection) -> bool:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (layout,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application == APPLICATION and layout != LAYOUT:
            raise StoreError(
                f"the database {self._path} has layout {layout}, and this overlaynet-sqlite knows {LAYOUT}; "
                f"upgrade overlaynet-sqlite"
            )
        if application != APPLICATION and (application or tables):
            raise StoreError(
                f"the database {self._path} is not one of overlaynet's, and is left alone; give the store another path"
            )
        return bool(application == APPLICATION)

    def _explain(self, error: sqlite3.Error) -> OverlaynetError:
        """What the operator is told: what will not mend itself ends the daemon, all else it tries again."""
        what = f"the database {self._path}"
        match _code(error):
            case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                return StoreError(
                    f"{what} is damaged, or is none: {error}; move it away, and the nodes that run take their leases again"
                )
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
                return StoreError(
                    f"{what} cannot be written: {error}; give the store a path to a file, in a directory where this user "
                    f"may make files (SQLite's journal lies beside it)"
                )
        return StoreUnavailable(f"{what} does not answer: {error}")


@contextlib.contextmanager
def _rolled_back(connection: sqlite3.Connection) -> Iterator[None]:
    """Whatever is not committed within is undone."""
    try:
        yield
    finally:
        connection.rollback()  # nothing, if there is no transaction


def _find(connection: sqlite3.Connection, key: str, moment: Moment) -> Record | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM records WHERE key = ?", (key,)).fetchone()  # noqa: S608
    return None if row is None else _live_record(row, moment)


def _live(connection: sqlite3.Connection, prefix: str, moment: Moment) -> Mapping[str, Record]:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM records WHERE substr(key, 1, ?) = ? ORDER BY key",  # noqa: S608 - our own words
        (len(prefix), prefix),
    )
    found = (_live_record(row, moment) for row in rows)
    return {record.key: record for record in found if record is not None}


def _stands(connection: sqlite3.Connection, record: Record, moment: Moment) -> bool:
    found = _find(connection, record.key, moment)
    return found is not None and found.version == record.version


def _write(connection: sqlite3.Connection, key: str, value: bytes, ttl: float, moment: Moment) -> Record:
    written = secrets.token_hex(8)
    expires = moment.after(ttl) if ttl < FOR_EVER else None
    ends = (None, None, None) if expires is None else (expires.time, expires.boot, expires.boottime)
    connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?)", (key, value, written, *ends))
    row = connection.execute(f"SELECT {_COLUMNS} FROM records WHERE key = ?", (key,)).fetchone()  # noqa: S608
    return Record(key, value, _version(row), ttl)


def _live_record(row: tuple[Any, ...], moment: Moment) -> Record | None:
    """The record of a row, ``None`` if it has expired.

    A row may have been written by hand. Its key is taken in any case, and what makes no sense becomes a value that can
    be read as nothing else, so that overlaynet reports it.
    """
    left = _left(row, moment)
    if left <= 0:
        return None
    value, expires, boot, boottime = row[1], row[3], row[4], row[5]
    if not isinstance(value, bytes):
        value = f"damaged row: value is {value!r}".encode()
    if expires is not None and not (isinstance(expires, float) and isinstance(boot, bytes | None)):
        value = f"damaged row: expires is {expires!r}, boot {boot!r}, boottime {boottime!r}".encode()
    return Record(_text(row[0]), value, _version(row), left)


def _left(row: tuple[Any, ...], moment: Moment) -> float:
    """Seconds until the row expires; ``math.inf`` if it never does, or it makes no sense."""
    expires, boot, boottime = row[3:]
    if not isinstance(expires, float):
        return float("inf")
    if isinstance(boot, bytes) and isinstance(boottime, float):
        return moment.until(Moment(boot.decode(errors="replace"), boottime, expires))
    return expires - moment.time


def _text(key: Any) -> str:
    return key.decode(errors="backslashreplace") if isinstance(key, bytes) else repr(key)


def _version(row: tuple[Any, ...]) -> str:
    """Changes with every write, also one by hand that leaves ``written`` as it was."""
    return hashlib.blake2b(repr(row).encode(), digest_size=16).hexdigest()


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
