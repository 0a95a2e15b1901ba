"""The example store keeps overlaynet's laws for stores, and its table those for tables."""

import contextlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from overlaynet_example import ExampleOptions, ExampleStore, ExampleTable

from overlaynet.api import StoreUnavailable, Table
from overlaynet.testing.stores import MakeStore, StoreConformance
from overlaynet.testing.tables import MakeTable, TableConformance


class TestExampleTable(TableConformance):
    """The laws of tables."""

    @pytest.fixture
    def make_table(self, tmp_path: Path) -> MakeTable:
        return lambda: ExampleTable(str(tmp_path / "records.db"))

    async def test_a_write_that_meets_a_reader_is_told_and_leaves_nothing_locked(
        self, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("overlaynet_example.PATIENCE", 0.05)
        await table.create("first", b"")
        with contextlib.closing(sqlite3.connect(tmp_path / "records.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM records").fetchall()
            with pytest.raises(StoreUnavailable, match="database is locked"):
                await table.create("second", b"")
            assert await table.get("first") is not None, "readers are in nobody's way"
        assert await table.create("second", b"") is not None

    async def test_what_was_written_before_the_machine_was_started_has_its_whole_lifetime_again(
        self, table: Table, tmp_path: Path
    ) -> None:
        await table.create("long", b"", 1e9)
        await table.create("short", b"", 1e9)
        with contextlib.closing(sqlite3.connect(tmp_path / "records.db", isolation_level=None)) as database:
            database.execute("UPDATE records SET boot = 'an earlier one', expires = 1")
            database.execute("UPDATE records SET lifetime = 0.001 WHERE key = 'short'")
        assert (await table.list("")).keys() == {"long"}


class TestExampleStore(StoreConformance):
    """The laws of stores. Each capability that is named here keeps some of them from being tested, and says why."""

    lacks: ClassVar[Mapping[str, str]] = {
        "malformed records": "the suite for tables looks at them",
        "foreign leases": "flannel does not write into it",
        "outages": "its file is always in reach",
    }

    @pytest.fixture
    def make_store(self, tmp_path: Path) -> MakeStore:
        return lambda: ExampleStore(ExampleOptions(path=str(tmp_path / "leases.db")))
