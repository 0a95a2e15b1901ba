"""Reservations, and the leases of others, in the sqlite store: overlaynet's own logic, on this table."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network

import pytest

from overlaynet.api import LeaseRequest, Network, Reservation, ReservationError, Subnets, parse_network
from overlaynet_sqlite import SqliteStore

pytestmark = pytest.mark.anyio

MakeStore = Callable[..., SqliteStore]
RESERVED = Subnets(IPv4Network("10.244.7.0/24"))


@pytest.fixture
def network() -> Network:
    return parse_network('{"Network": "10.244.0.0/16"}')


def request(node: str, previous: Subnets | None = None) -> LeaseRequest:
    return LeaseRequest(node, "1", IPv4Address("192.0.2.1"), previous=previous)


async def test_reserved_subnets_are_given_to_their_node_and_to_nobody_else(
    make_store: MakeStore, network: Network
) -> None:
    store, another = make_store(), make_store()
    await store.reserve(Reservation(RESERVED, node="b"))
    await store.reserve(Reservation(RESERVED, node="b"))
    assert (await another.reservations()).of(RESERVED) == Reservation(RESERVED, node="b")
    assert (await another.acquire(network, request("a", previous=RESERVED))).subnets != RESERVED
    lease = await another.acquire(network, request("b"))
    assert lease.subnets == RESERVED
    await another.release(lease)
    assert (await store.acquire(network, request("c", previous=RESERVED))).subnets != RESERVED
    with pytest.raises(ReservationError):
        await store.reserve(Reservation(RESERVED, node="c"))
    await store.unreserve(RESERVED)
    assert (await another.acquire(network, request("d", previous=RESERVED))).subnets == RESERVED


async def test_the_lease_of_a_node_that_is_gone_can_be_removed(make_store: MakeStore, network: Network) -> None:
    store = make_store()
    await store.acquire(network, request("a"))
    (claim,) = (await store.leases()).leases
    assert await store.remove(claim)
    assert not await store.remove(claim)
    assert (await store.leases()).leases == ()
