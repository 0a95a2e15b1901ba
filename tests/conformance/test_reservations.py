"""Reservations on all stores: kept for one node through claims, restarts, expiry, races and crashes."""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import attrs
import pytest

from overlaynet.errors import LeaseLost, ReservationError, SubnetsExhausted
from overlaynet.leases import TableStore
from overlaynet.model import Lease, LeaseRequest, Reservation, Snapshot, Subnets
from overlaynet.network import Network, parse
from overlaynet.records import encode_lease, lease_key, placeholder, reservation_key
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.stores.file import FileStore
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.table import Table
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.etcd import EtcdServer

pytestmark = pytest.mark.anyio

MakeStore = Callable[[], TableStore]
RESERVED = Subnets(IPv4Network("10.244.7.0/24"))
FOR_B = Reservation(RESERVED, node="b")
PLACEHOLDER = b'{"PublicIP":"127.0.0.1","PublicIPv6":null,"Overlaynet":{"Reserved":true}}'
_numbers = itertools.count()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture(params=["memory", "file", "etcd"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anyio_backend(kind: str) -> object:
    return ("asyncio", {"loop_factory": VirtualClockLoop}) if kind == "memory" else "asyncio"


@pytest.fixture
async def make_store(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[MakeStore]:
    made: list[TableStore] = []
    shared = MemoryTable()
    prefix = f"/reservations{next(_numbers)}"

    def make() -> TableStore:
        if kind == "memory":
            made.append(MemoryStore(table=shared))
        elif kind == "file":
            made.append(FileStore(FileStore.Options(path=str(tmp_path / "store"))))
        else:
            server: EtcdServer = request.getfixturevalue("etcd")
            made.append(EtcdStore(EtcdOptions(endpoints=(server.endpoint,), prefix=prefix)))
        return made[-1]

    yield make
    for store in made:
        await store.aclose()


@pytest.fixture
def store(make_store: MakeStore) -> TableStore:
    return make_store()


def network(ttl: float = 60, **members: Any) -> Network:
    # Leases of a lifetime below what a network document may ask for, so that a test sees them expire.
    return attrs.evolve(parse(json.dumps({"Network": "10.244.0.0/16", **members})), lease_ttl=ttl)


def only(*numbers: int) -> Network:
    """A network that has these subnets and no others."""
    return network(SubnetMin=f"10.244.{min(numbers)}.0", SubnetMax=f"10.244.{max(numbers)}.0")


def request(node: str, address: str = "192.0.2.1", run: str = "1", previous: Subnets | None = None) -> LeaseRequest:
    return LeaseRequest(node, run, IPv4Address(address), previous=previous)


async def value(table: Table, key: str) -> bytes | None:
    record = await table.get(key)
    return None if record is None else record.value


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)


# Who gets it


async def test_a_reserved_subnet_is_given_to_its_node_and_to_it_first(store: TableStore) -> None:
    await store.reserve(FOR_B)
    assert (await store.acquire(network(), request("b", previous=Subnets(IPv4Network("10.244.9.0/24"))))).subnets == (
        RESERVED
    )


async def test_nobody_else_is_ever_given_it(store: TableStore) -> None:
    await store.reserve(FOR_B)
    assert (await store.acquire(only(7, 8), request("a", previous=RESERVED))).subnets != RESERVED
    with pytest.raises(SubnetsExhausted):
        await store.acquire(only(7, 8), request("c"))


async def test_a_subnet_reserved_for_an_address_is_given_to_the_node_there(store: TableStore) -> None:
    await store.reserve(Reservation(RESERVED, public_ipv4=IPv4Address("192.0.2.9")))
    assert (await store.acquire(network(), request("a", "192.0.2.1", previous=RESERVED))).subnets != RESERVED
    assert (await store.acquire(network(), request("b", "192.0.2.9"))).subnets == RESERVED


async def test_of_two_nodes_behind_the_address_one_is_given_it(store: TableStore) -> None:
    await store.reserve(Reservation(RESERVED, public_ipv4=IPv4Address("192.0.2.9")))
    first = await store.acquire(network(), request("a", "192.0.2.9"))
    second = await store.acquire(network(), request("b", "192.0.2.9"))
    assert first.subnets == RESERVED
    assert not second.subnets.overlaps(RESERVED)
    assert (await store.acquire(network(), request("b", "192.0.2.9", run="2"))).subnets == second.subnets
    assert (await store.acquire(network(), request("a", "192.0.2.9", run="2"))).subnets == RESERVED


async def test_a_subnet_reserved_for_an_ipv6_address_is_given_to_the_node_there(store: TableStore) -> None:
    await store.reserve(Reservation(RESERVED, public_ipv6=IPv6Address("2001:db8::9")))
    there = attrs.evolve(request("b"), public_ipv6=IPv6Address("2001:db8::9"))
    assert (await store.acquire(network(), request("a", previous=RESERVED))).subnets != RESERVED
    assert (await store.acquire(network(), there)).subnets == RESERVED


async def test_a_pair_of_both_families_is_reserved_together(store: TableStore) -> None:
    both = network(EnableIPv6=True, IPv6Network="fd00:10:244::/48")
    pair = Subnets(IPv4Network("10.244.7.0/24"), IPv6Network("fd00:10:244:7::/64"))
    await store.reserve(Reservation(pair, node="b"))
    assert await value(store.table, "subnets/10.244.7.0-24&fd00:10:244:7::-64") == PLACEHOLDER
    assert not (await store.acquire(both, request("a", previous=pair))).subnets.overlaps(pair)
    assert (await store.acquire(both, request("b"))).subnets == pair


async def test_its_node_moves_there_at_its_next_start_and_gives_the_old_subnet_back(store: TableStore) -> None:
    old = await store.acquire(network(), request("b", previous=Subnets(IPv4Network("10.244.9.0/24"))))
    await store.reserve(FOR_B)
    assert await store.renew(network(), old) == old, "a lease that is held is not taken away"
    new = await store.acquire(network(), request("b", run="2"))
    assert new.subnets == RESERVED
    assert (await store.leases()).leases == (new,)


async def test_of_two_reservations_the_one_that_is_held_is_kept(store: TableStore) -> None:
    other = Subnets(IPv4Network("10.244.3.0/24"))
    await store.reserve(FOR_B)
    await store.acquire(network(), request("b"))
    await store.reserve(Reservation(other, node="b"))
    assert (await store.acquire(network(), request("b", run="2"))).subnets == RESERVED
    assert (await store.acquire(network(), request("c", previous=other))).subnets != other


async def test_a_reservation_outside_the_network_is_of_no_use_and_no_harm(store: TableStore) -> None:
    await store.reserve(Reservation(Subnets(IPv4Network("10.99.7.0/24")), node="b"))
    assert network().grants((await store.acquire(network(), request("b"))).subnets)


# It stays


async def test_it_survives_claim_and_release(store: TableStore) -> None:
    await store.reserve(FOR_B)
    lease = await store.acquire(network(), request("b"))
    await store.release(lease)
    assert await store.leases() == Snapshot()
    assert (await store.reservations()).reservations == (FOR_B,)
    assert await value(store.table, lease_key(RESERVED)) == PLACEHOLDER
    assert (await store.acquire(network(), request("a", previous=RESERVED))).subnets != RESERVED


async def test_it_survives_expiry_and_flannel_finds_the_key_taken_again(
    make_store: MakeStore, store: TableStore
) -> None:
    watching = make_store()
    await store.reserve(FOR_B)
    await store.acquire(network(ttl=1), request("b"))
    snapshots: list[Snapshot] = []

    async def watch() -> None:
        async with aclosing(watching.watch()) as following:
            async for snapshot in following:
                snapshots.append(snapshot)

    task = asyncio.create_task(watch())

    async def vacant_again() -> bool:
        return await value(store.table, lease_key(RESERVED)) == PLACEHOLDER

    await until(vacant_again)
    task.cancel()
    await asyncio.wait({task})
    assert len(snapshots[0].leases) == 1
    assert (await store.acquire(network(), request("a", previous=RESERVED))).subnets != RESERVED
    assert (await store.acquire(network(), request("b", run="2"))).subnets == RESERVED


async def test_it_survives_expiry_that_nobody_saw(store: TableStore) -> None:
    await store.reserve(FOR_B)
    await store.acquire(network(ttl=1), request("b"))

    async def gone() -> bool:
        return await store.table.get(lease_key(RESERVED)) is None

    await until(gone)
    assert (await store.acquire(network(), request("a", previous=RESERVED))).subnets != RESERVED
    assert await value(store.table, lease_key(RESERVED)) == PLACEHOLDER
    assert (await store.acquire(network(), request("b", run="2"))).subnets == RESERVED


async def test_a_lease_says_whether_it_is_reserved_from_its_next_renewal_on(store: TableStore) -> None:
    lease = await store.acquire(network(), request("b", previous=RESERVED))
    assert not lease.reserved
    await store.reserve(FOR_B)
    lease = await store.renew(network(), lease)
    assert lease.reserved
    await store.unreserve(RESERVED)
    assert not (await store.renew(network(), lease)).reserved


async def test_a_placeholder_is_no_lease(store: TableStore) -> None:
    await store.reserve(FOR_B)
    assert await store.leases() == Snapshot()
    async with aclosing(store.watch()) as snapshots:
        assert await anext(snapshots) == Snapshot()


async def test_its_node_takes_it_back_when_its_lease_has_vanished(store: TableStore) -> None:
    await store.reserve(FOR_B)
    lease = await store.acquire(network(), request("b"))
    assert await store.remove((await store.leases()).leases[0])
    assert await value(store.table, lease_key(RESERVED)) == PLACEHOLDER
    assert await store.renew(network(), lease) == lease
    (listed,) = (await store.leases()).leases
    assert listed == lease


async def test_a_released_lease_of_another_node_stays_reserved(store: TableStore) -> None:
    await store.reserve(FOR_B)
    await store.acquire(network(), request("b"))
    (lease,) = (await store.leases()).leases
    assert await store.remove(lease)
    assert not await store.remove(lease), "it has changed since"
    assert await value(store.table, lease_key(RESERVED)) == PLACEHOLDER


# Removing


async def test_what_is_not_reserved_any_more_is_anybodys(store: TableStore) -> None:
    await store.reserve(FOR_B)
    await store.unreserve(RESERVED)
    assert (await store.reservations()).reservations == ()
    assert await store.table.get(lease_key(RESERVED)) is None
    assert (await store.acquire(network(), request("a", previous=RESERVED))).subnets == RESERVED


async def test_who_holds_it_keeps_it_without_the_reservation(store: TableStore) -> None:
    await store.reserve(FOR_B)
    lease = await store.acquire(network(), request("b"))
    await store.unreserve(RESERVED)
    (listed,) = (await store.leases()).leases
    assert listed == lease
    await store.release(lease)
    assert await store.table.get(lease_key(RESERVED)) is None


async def test_what_is_not_reserved_cannot_be_unreserved(store: TableStore) -> None:
    with pytest.raises(ReservationError) as caught:
        await store.unreserve(RESERVED)
    assert str(caught.value) == "10.244.7.0/24 is not reserved; `overlaynet leases` lists what is"


# Conflicts


async def test_reserving_twice_is_the_same_as_once(store: TableStore) -> None:
    await store.reserve(FOR_B)
    await store.reserve(FOR_B)
    await store.acquire(network(), request("b"))
    await store.reserve(FOR_B)
    assert (await store.reservations()).reservations == (FOR_B,)


@pytest.mark.parametrize("subnet", ["10.244.7.0/24", "10.244.0.0/20", "10.244.7.128/25"])
async def test_what_is_reserved_for_one_cannot_be_reserved_for_another(store: TableStore, subnet: str) -> None:
    await store.reserve(FOR_B)
    with pytest.raises(ReservationError) as caught:
        await store.reserve(Reservation(Subnets(IPv4Network(subnet)), node="c"))
    assert str(caught.value) == (
        "10.244.7.0/24 is reserved for node b already; `overlaynet unreserve` it first, or reserve another"
    )
    assert (await store.reservations()).reservations == (FOR_B,)


async def test_what_another_node_holds_cannot_be_reserved(store: TableStore) -> None:
    lease = await store.acquire(network(), request("a", previous=RESERVED))
    with pytest.raises(ReservationError) as caught:
        await store.reserve(FOR_B)
    assert str(caught.value) == (
        "10.244.7.0/24 is held by node a at 192.0.2.1, not by node b; reserve another subnet, or stop that node and "
        "`overlaynet release 10.244.7.0/24`"
    )
    assert (await store.reservations()).reservations == ()
    assert (await store.leases()).leases == (lease,)


async def test_what_a_record_takes_that_cannot_be_read_cannot_be_reserved(store: TableStore) -> None:
    await store.table.create(lease_key(RESERVED), b"{")
    with pytest.raises(ReservationError, match="is taken by a record that cannot be read"):
        await store.reserve(FOR_B)
    (malformed,) = (await store.leases()).malformed
    assert await store.remove(malformed)
    await store.reserve(FOR_B)


async def test_a_reservation_that_cannot_be_read_keeps_the_subnet_from_everybody(store: TableStore) -> None:
    await store.table.create(reservation_key(RESERVED), b"{}")
    await store.table.create("overlaynet/reservations/what", b"{}")
    for node in "ab":
        assert (await store.acquire(network(), request(node, previous=RESERVED))).subnets != RESERVED
    assert [problem.key for problem in (await store.reservations()).malformed] == [
        "overlaynet/reservations/10.244.7.0-24",
        "overlaynet/reservations/what",
    ]
    await store.unreserve(RESERVED)
    assert (await store.acquire(network(), request("c", previous=RESERVED))).subnets == RESERVED


# Races


async def test_a_claim_and_a_reservation_at_once_never_both_succeed(make_store: MakeStore) -> None:
    outcomes = set()
    for attempt in range(30):
        number = random.randrange(256) if attempt else 7
        subnets = Subnets(IPv4Network(f"10.244.{number}.0/24"))
        claiming, reserving = make_store(), make_store()
        claim = asyncio.create_task(claiming.acquire(network(SubnetMin="10.244.0.0"), request("a", previous=subnets)))
        for _ in range(attempt % 10):
            await asyncio.sleep(0)
        try:
            await reserving.reserve(Reservation(subnets, node="b"))
        except ReservationError:
            reserved = False
        else:
            reserved = True
        lease = await claim
        found = (await reserving.reservations()).reservations
        assert not (reserved and lease.subnets == subnets)
        assert found == ((Reservation(subnets, node="b"),) if reserved else ())
        outcomes.add(reserved)
        await claiming.release(lease)
        if reserved:
            await reserving.unreserve(subnets)
        assert await reserving.table.list("") == {}
        await claiming.aclose()
        await reserving.aclose()
    assert outcomes, "one of the two came first each time"


async def test_two_reservations_at_once_never_both_succeed(make_store: MakeStore) -> None:
    wide = Reservation(Subnets(IPv4Network("10.244.0.0/20")), node="c")
    for steps in range(10):
        one, other = make_store(), make_store()
        task = asyncio.create_task(one.reserve(FOR_B))
        for _ in range(steps):
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(task, other.reserve(wide), return_exceptions=True)
        found = (await one.reservations()).reservations
        assert len(found) == outcomes.count(None) <= 1
        for reservation in found:
            await one.unreserve(reservation.subnets)
        assert await one.table.list("") == {}


async def test_a_vanished_lease_is_lost_if_its_subnet_is_reserved_for_another(store: TableStore) -> None:
    lease = await store.acquire(network(), request("a", previous=RESERVED))
    assert await store.remove((await store.leases()).leases[0])
    await store.reserve(FOR_B)
    with pytest.raises(LeaseLost) as caught:
        await store.renew(network(), lease)
    assert str(caught.value) == "the lease on 10.244.7.0/24 vanished, and is now reserved for node b"
    assert await value(store.table, lease_key(RESERVED)) == PLACEHOLDER
    assert (await store.acquire(network(), request("b"))).subnets == RESERVED


async def test_what_a_killed_process_left_is_put_in_order_by_the_next_claim(store: TableStore) -> None:
    # Killed after the reservation was written, and after one was removed.
    await store.table.create(reservation_key(RESERVED), b'{"Node":"b"}')
    orphan = Reservation(Subnets(IPv4Network("10.244.8.0/24")), node="c")
    await store.table.create(lease_key(orphan.subnets), placeholder(orphan))
    lease = await store.acquire(only(7, 8), request("a"))
    assert lease.subnets == orphan.subnets
    assert await value(store.table, lease_key(RESERVED)) == PLACEHOLDER


async def test_a_node_that_holds_what_is_reserved_for_another_gives_it_up_when_it_starts(store: TableStore) -> None:
    lease = Lease(RESERVED, IPv4Address("192.0.2.1"), node="a", run="1")
    await store.table.create(lease_key(RESERVED), encode_lease(lease), 60)
    await store.table.create(reservation_key(RESERVED), b'{"Node":"b"}')
    assert (await store.acquire(network(), request("a", run="2"))).subnets != RESERVED
    assert (await store.acquire(network(), request("b"))).subnets == RESERVED


# Flannel


async def test_nothing_but_leases_is_written_where_flannel_looks(store: TableStore) -> None:
    await store.reserve(FOR_B)
    await store.reserve(Reservation(Subnets(IPv4Network("10.244.8.0/24")), public_ipv4=IPv4Address("192.0.2.9")))
    assert {key: record.value for key, record in (await store.table.list("subnets")).items()} == {
        "subnets/10.244.7.0-24": PLACEHOLDER,
        "subnets/10.244.8.0-24": b'{"PublicIP":"192.0.2.9","PublicIPv6":null,"Overlaynet":{"Reserved":true}}',
    }
    assert {key: record.value for key, record in (await store.table.list("overlaynet")).items()} == {
        "overlaynet/reservations/10.244.7.0-24": b'{"Node":"b"}',
        "overlaynet/reservations/10.244.8.0-24": b'{"PublicIP":"192.0.2.9"}',
    }


async def test_after_a_flannel_node_that_took_it_has_gone_it_is_kept_free_again(
    make_store: MakeStore, store: TableStore
) -> None:
    reservation = Reservation(RESERVED, public_ipv4=IPv4Address("192.0.2.9"))
    await store.reserve(reservation)
    watching = make_store()
    async with aclosing(watching.watch()) as snapshots:
        assert await anext(snapshots) == Snapshot()
        vacant = await store.table.get(lease_key(RESERVED))
        assert vacant is not None
        flannels = b'{"PublicIP":"192.0.2.9","PublicIPv6":null}'
        assert await store.table.replace(vacant, flannels, 1) is not None
        assert len((await anext(snapshots)).leases) == 1
        assert (await anext(snapshots)).leases == ()
    assert await value(store.table, lease_key(RESERVED)) == placeholder(reservation)


# Remnants


async def test_what_else_stands_under_the_nodes_name_is_removed(store: TableStore) -> None:
    old = Lease(Subnets(IPv4Network("10.244.9.0/24")), IPv4Address("192.0.2.1"), node="a", run="0")
    other = attrs.evolve(old, subnets=Subnets(IPv4Network("10.244.3.0/24")))
    for lease in (old, other):
        await store.table.create(lease_key(lease.subnets), encode_lease(lease), 60)
    held = await store.acquire(network(), request("a"))
    assert held.subnets == other.subnets
    assert (await store.leases()).leases == (held,)


async def test_a_record_that_has_changed_since_is_not_removed(store: TableStore) -> None:
    lease = await store.acquire(network(), request("a"))
    (listed,) = (await store.leases()).leases
    await store.renew(network(), lease)
    assert not await store.remove(listed)
    assert len((await store.leases()).leases) == 1
