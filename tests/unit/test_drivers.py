"""What the contracts do for drivers that do not override them."""

from collections.abc import AsyncGenerator
from ipaddress import IPv4Network

import pytest

from overlaynet.drivers import NoOptions, Store
from overlaynet.errors import StoreError
from overlaynet.model import Lease, LeaseRequest, Reservation, Reserved, Snapshot, Subnets
from overlaynet.network import Network

pytestmark = pytest.mark.anyio

SUBNETS = Subnets(IPv4Network("10.244.7.0/24"))


class Plain(Store):
    """A store that does what it has to, and no more."""

    def __str__(self) -> str:
        return "the plain store"

    async def read_network(self) -> str | None:
        return None

    async def create_network(self, document: str) -> bool:
        return False

    async def replace_network(self, document: str) -> None:
        pass

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        raise NotImplementedError

    async def renew(self, network: Network, lease: Lease) -> Lease:
        raise NotImplementedError

    async def release(self, lease: Lease) -> None:
        pass

    async def leases(self) -> Snapshot:
        return Snapshot()

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        yield Snapshot()


async def test_a_store_that_keeps_no_reservations_says_so() -> None:
    store = Plain(NoOptions())
    assert await store.reservations() == Reserved()
    with pytest.raises(StoreError, match="^the plain store keeps no reservations$"):
        await store.reserve(Reservation(SUBNETS, node="b"))
    with pytest.raises(StoreError, match="^the plain store keeps no reservations$"):
        await store.unreserve(SUBNETS)


async def test_a_store_that_cannot_give_back_the_leases_of_others_says_so() -> None:
    with pytest.raises(StoreError, match="^the plain store cannot give back the leases of other nodes$"):
        await Plain(NoOptions()).remove(Lease(SUBNETS))
