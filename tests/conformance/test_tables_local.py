"""The laws of a table, on the two that need no server."""

from pathlib import Path

import pytest

from overlaynet.stores._file_directory import Directory
from overlaynet.stores.file import FileTable
from overlaynet.stores.memory import MemoryTable
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.tables import MakeTable, TableConformance


class TestMemoryTable(TableConformance):
    @pytest.fixture
    def anyio_backend(self) -> object:
        return ("asyncio", {"loop_factory": VirtualClockLoop})

    @pytest.fixture
    def lifetime(self) -> float:
        return 10.0

    @pytest.fixture
    def make_table(self) -> MakeTable:
        return MemoryTable().another


class TestMemoryTableOnTheRealClock(TestMemoryTable):
    @pytest.fixture
    def anyio_backend(self) -> object:
        return "asyncio"

    @pytest.fixture
    def lifetime(self) -> float:
        return 0.2


class TestFileTable(TableConformance):
    @pytest.fixture
    def make_table(self, tmp_path: Path) -> MakeTable:
        return lambda: FileTable(Directory(str(tmp_path / "store")))
