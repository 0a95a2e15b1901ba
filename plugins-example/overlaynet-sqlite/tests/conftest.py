"""What the tests of the sqlite store share."""

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from overlaynet_sqlite import SqliteOptions, SqliteStore, SqliteTable

Execute = Callable[..., None]
MakeTable = Callable[..., SqliteTable]
MakeStore = Callable[..., SqliteStore]


def options_of(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Those of a table that is quick to notice, unless they are given."""
    return {"path": str(path), "poll_interval": 0.02} | given


@pytest.fixture
def anyio_backend() -> object:
    """Threads and files want the real clock."""
    return "asyncio"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the database is."""
    return tmp_path / "leases.sqlite"


@pytest.fixture
def execute(path: Path) -> Execute:
    """Does to the database what an operator does with the program sqlite3."""

    def execute(*statements: str) -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)

    return execute


@pytest.fixture
async def make_table(path: Path) -> AsyncIterator[MakeTable]:
    """Makes tables on the database, which are closed after the test."""
    made: list[SqliteTable] = []

    def make(**options: Any) -> SqliteTable:
        made.append(SqliteTable(SqliteOptions(**options_of(path, options))))
        return made[-1]

    yield make
    for table in made:
        await table.aclose()


@pytest.fixture
async def make_store(path: Path) -> AsyncIterator[MakeStore]:
    """Makes stores on the database, which are closed after the test."""
    made: list[SqliteStore] = []

    def make(**options: Any) -> SqliteStore:
        made.append(SqliteStore(SqliteOptions(**options_of(path, options))))
        return made[-1]

    yield make
    for store in made:
        await store.aclose()
