"""The example store keeps overlaynet's laws for stores, and its table those for tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from overlaynet_example import ExampleOptions, ExampleStore, ExampleTable

from overlaynet.testing.stores import MakeStore, StoreConformance
from overlaynet.testing.tables import MakeTable, TableConformance


class TestExampleTable(TableConformance):
    """The laws of tables."""

    @pytest.fixture
    def make_table(self, tmp_path: Path) -> MakeTable:
        return lambda: ExampleTable(str(tmp_path / "records.db"))


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
