"""The laws of a table, on the two that need no server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from overlaynet.stores._file_directory import Directory
from overlaynet.stores.file import FileTable
from overlaynet.stores.memory import MemoryTable
from overlaynet.table import Table
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.tables import TableConformance


class TestMemoryTable(TableConformance):
    @pytest.fixture
    def anyio_backend(self) -> object:
        return ("asyncio", {"loop_factory": VirtualClockLoop})

    @pytest.fixture
    def lifetime(self) -> float:
        return 10.0

    @pytest.fixture
    async def table(self) -> AsyncIterator[Table]:
        table = MemoryTable()
        yield table
        await table.aclose()

    @pytest.fixture
    async def another_table(self, table: Table) -> AsyncIterator[Table]:
        assert isinstance(table, MemoryTable)
        another = table.another()
        yield another
        await another.aclose()


class TestMemoryTableOnTheRealClock(TestMemoryTable):
    @pytest.fixture
    def anyio_backend(self) -> object:
        return "asyncio"

    @pytest.fixture
    def lifetime(self) -> float:
        return 0.2


class TestFileTable(TableConformance):
    @pytest.fixture
    async def table(self, tmp_path: Path) -> AsyncIterator[Table]:
        table = FileTable(Directory(str(tmp_path / "store")))
        yield table
        await table.aclose()

    @pytest.fixture
    async def another_table(self, tmp_path: Path) -> AsyncIterator[Table]:
        table = FileTable(Directory(str(tmp_path / "store")))
        yield table
        await table.aclose()
