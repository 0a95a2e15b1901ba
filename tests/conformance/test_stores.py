"""The laws of stores, for those that need no server."""

from collections.abc import Awaitable, Callable, Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import ClassVar

import pytest

from overlaynet.model import Lease, Subnets
from overlaynet.records import encode_lease, lease_key
from overlaynet.stores.file import FileStore
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.table import Table
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.stores import AddForeign, MakeStore, StoreConformance


class OnATable(StoreConformance):
    """What can be done to a store whose table is at hand."""

    @pytest.fixture
    def table(self) -> Table:
        raise NotImplementedError

    @pytest.fixture
    def damage(self, table: Table) -> Callable[[], Awaitable[None]]:
        async def damage() -> None:
            assert await table.create("subnets/10.244.99.0-24", b"no lease") is not None

        return damage

    @pytest.fixture
    def add_foreign(self, table: Table) -> AddForeign:
        async def add(subnet: IPv4Network, address: IPv4Address) -> None:
            lease = Lease(Subnets(subnet), address)
            assert await table.create(lease_key(lease.subnets), encode_lease(lease)) is not None

        return add


class TestMemoryStore(OnATable):
    lacks: ClassVar[Mapping[str, str]] = {"outages": "the memory of this process is always in reach"}

    @pytest.fixture
    def anyio_backend(self) -> object:
        return ("asyncio", {"loop_factory": VirtualClockLoop})

    @pytest.fixture
    def table(self) -> MemoryTable:
        return MemoryTable()

    @pytest.fixture
    def make_store(self, table: MemoryTable) -> MakeStore:
        return lambda: MemoryStore(table=table)


class TestFileStore(OnATable):
    lacks: ClassVar[Mapping[str, str]] = {"outages": "its disk is always in reach; how it fails is tested elsewhere"}

    @pytest.fixture
    async def table(self, make_store: MakeStore) -> Table:
        store = make_store()
        assert isinstance(store, FileStore)
        return store.table

    @pytest.fixture
    def make_store(self, tmp_path: Path) -> MakeStore:
        return lambda: FileStore(FileStore.Options(path=str(tmp_path / "store")))
