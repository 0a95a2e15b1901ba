"""The laws of stores, on a real etcd."""

import itertools
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from overlaynet.model import Lease, Subnets
from overlaynet.records import encode_lease, lease_key
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.stores import AddForeign, MakeStore, StoreConformance

_numbers = itertools.count()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


class TestEtcdStore(StoreConformance):
    @pytest.fixture
    def lifetime(self) -> float:
        return 2.0  # etcd's own shortest

    @pytest.fixture
    def make_store(self, etcd: EtcdServer) -> MakeStore:
        options = EtcdOptions(endpoints=(etcd.endpoint,), prefix=f"/test{next(_numbers)}", password=None)
        return lambda: EtcdStore(options)

    @pytest.fixture
    async def damage(self, make: MakeStore) -> Callable[[], Awaitable[None]]:
        store = make()
        assert isinstance(store, EtcdStore)

        async def damage() -> None:
            assert await store.table.create("subnets/10.244.99.0-24", b"no lease") is not None

        return damage

    @pytest.fixture
    async def add_foreign(self, make: MakeStore) -> AddForeign:
        store = make()
        assert isinstance(store, EtcdStore)

        async def add(subnet: IPv4Network, address: IPv4Address) -> None:
            lease = Lease(Subnets(subnet), address)
            assert await store.table.create(lease_key(lease.subnets), encode_lease(lease)) is not None

        return add

    @pytest.fixture
    def outage(self, etcd: EtcdServer) -> Iterator[Callable[[], None]]:
        yield etcd.stop
        etcd.start()
