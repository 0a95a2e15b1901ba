"""The sqlite store keeps overlaynet's laws for stores, and its table those for tables."""

import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TypeAlias

import pytest

from overlaynet.testing.stores import AddForeign, MakeStore, StoreConformance
from overlaynet.testing.tables import MakeTable, TableConformance
from overlaynet_sqlite import SqliteOptions, SqliteStore, SqliteTable

Execute: TypeAlias = Callable[..., None]


@pytest.fixture
def options(path: Path, request: pytest.FixtureRequest) -> SqliteOptions:
    """Those of all stores in a test: quick to notice, and quick to give up where that is what is waited for."""
    patience = 0.2 if "outage" in request.fixturenames else 10.0
    return SqliteOptions(path=str(path), poll_interval=0.02, lock_timeout=patience)


class TestSqliteTable(TableConformance):
    """The laws of tables."""

    @pytest.fixture
    def make_table(self, options: SqliteOptions) -> MakeTable:
        return lambda: SqliteTable(options)


class TestSqliteStore(StoreConformance):
    """The laws of stores; it lacks nothing."""

    @pytest.fixture
    def make_store(self, options: SqliteOptions) -> MakeStore:
        return lambda: SqliteStore(options)

    @pytest.fixture
    def damage(self, execute: Execute) -> Callable[[], Awaitable[None]]:
        async def damage() -> None:
            execute("INSERT INTO records (key, value) VALUES ('subnets/10.244.99.0-24', 'no lease')")

        return damage

    @pytest.fixture
    def add_foreign(self, execute: Execute, make_store: MakeStore) -> AddForeign:
        async def add(subnet: IPv4Network, address: IPv4Address) -> None:
            async with contextlib.aclosing(make_store()) as store:
                await store.leases()  # makes the database, if it is not there yet
            key = f"subnets/{subnet.network_address}-{subnet.prefixlen}"
            execute(f"INSERT INTO records (key, value) VALUES ('{key}', '{{\"PublicIP\": \"{address}\"}}')")

        return add

    @pytest.fixture
    def outage(self, path: Path) -> Iterator[Callable[[], None]]:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:

            def lock() -> None:
                other.execute("BEGIN EXCLUSIVE")

            yield lock
