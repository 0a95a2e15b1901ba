"""The lease logic that all stores share: who gets what, when it is lost, and that no two nodes ever hold the same."""

import asyncio
import collections
import itertools
import json
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaynet.choosing import choose_free, free_runs
from overlaynet.drivers import NoOptions
from overlaynet.errors import LeaseLost, ReservationError, StoreError, StoreUnavailable, SubnetsExhausted
from overlaynet.leases import TableStore
from overlaynet.listings import read_snapshot
from overlaynet.model import Lease, LeaseData, LeaseRequest, Malformed, Reservation, Snapshot, Subnets
from overlaynet.network import Network, parse
from overlaynet.records import decode_lease, encode_lease, lease_key
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.table import Record, Table
from overlaynet.testing.clock import VirtualClockLoop

pytestmark = pytest.mark.anyio

TTL = 60.0


def network(text: str = "10.244.0.0/16", **members: Any) -> Network:
    return parse(json.dumps({"Network": text, "LeaseTTL": TTL, **members}))


def subnets(ipv4: str, ipv6: str | None = None) -> Subnets:
    return Subnets(IPv4Network(ipv4), None if ipv6 is None else IPv6Network(ipv6))


def request(node: str, run: str = "1", address: str = "192.0.2.1", previous: str | None = None) -> LeaseRequest:
    return LeaseRequest(node, run, IPv4Address(address), previous=None if previous is None else subnets(previous))


class TableOf(TableStore):
    """A store on a table of the test's own."""

    def __init__(self, table: Table) -> None:
        super().__init__(NoOptions())
        self._given = table

    def __str__(self) -> str:
        return "the table of the test"

    def make_table(self) -> Table:
        return self._given


class Interrupted(MemoryTable):
    """A table in which something happens just before, or just after, the next call of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        self.after: dict[str, Callable[[], Awaitable[object]]] = {}

    async def _interrupted(self, operation: str, call: Callable[[], Awaitable[Any]]) -> Any:
        if (interruption := self.before.pop(operation, None)) is not None:
            await interruption()
        answer = await call()
        if (interruption := self.after.pop(operation, None)) is not None:
            await interruption()
        return answer

    async def list(self, prefix: str) -> Mapping[str, Record]:
        listing: Mapping[str, Record] = await self._interrupted("list", lambda: MemoryTable.list(self, prefix))
        return listing

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        record: Record | None = await self._interrupted("create", lambda: MemoryTable.create(self, key, value, ttl))
        return record

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        written: Record | None = await self._interrupted(
            "replace", lambda: MemoryTable.replace(self, record, value, ttl)
        )
        return written


async def put(table: Table, key: str, value: bytes, ttl: float = math.inf) -> Record:
    """Write a record whatever is there, as flannel does, or a hand."""
    found = await table.get(key)
    written = await (table.create(key, value, ttl) if found is None else table.replace(found, value, ttl))
    assert written is not None
    return written


async def put_flannel(table: Table, subnet: str, address: str) -> Subnets:
    """A lease as flannel writes it: it names no node."""
    covered = subnets(subnet)
    await put(table, lease_key(covered), encode_lease(Lease(covered, IPv4Address(address))), TTL)
    return covered


async def lose_the_answer() -> None:
    raise StoreUnavailable("the answer was lost")


@pytest.fixture
def table() -> Interrupted:
    return Interrupted()


@pytest.fixture
def store(table: Interrupted) -> TableOf:
    return TableOf(table)


# The network document


async def test_the_network_document_is_kept_as_it_is(store: TableOf) -> None:
    assert await store.read_network() is None
    assert await store.create_network('{"Network": "größer"}')
    assert await store.read_network() == '{"Network": "größer"}'
    assert not await store.create_network("another")
    assert await store.read_network() == '{"Network": "größer"}'
    await store.replace_network("{}")
    assert await store.read_network() == "{}"


async def test_replacing_the_network_document_creates_it(store: TableOf) -> None:
    await store.replace_network("{}")
    assert await store.read_network() == "{}"


async def test_replacing_the_network_document_wins_races(store: TableOf, table: Interrupted) -> None:
    table.before["create"] = lambda: put(table, "config", b"created meanwhile")
    table.before["replace"] = lambda: put(table, "config", b"replaced meanwhile")
    await store.replace_network("mine")
    assert await store.read_network() == "mine"
    assert not table.before


async def test_many_first_nodes_agree_on_the_network_document(table: Interrupted) -> None:
    stores = [TableOf(table) for _ in range(20)]
    created = await asyncio.gather(*(store.create_network(str(number)) for number, store in enumerate(stores)))
    assert sum(created) == 1
    assert await stores[0].read_network() == str(created.index(True))


async def test_a_network_document_that_is_no_text_is_reported(store: TableOf, table: Interrupted) -> None:
    await put(table, "config", b"\xff")
    with pytest.raises(StoreError, match="^the network document in the table of the test is not UTF-8 text: "):
        await store.read_network()


# Acquiring


async def test_a_lease_says_what_was_asked_for(store: TableOf, table: Interrupted) -> None:
    data = LeaseData("vxlan", {"VNI": 1})
    asked = LeaseRequest("host-a", "5f0c", IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1"), data)
    lease = await store.acquire(network(), asked)
    assert lease == Lease(lease.subnets, asked.public_ipv4, asked.public_ipv6, data, "host-a", "5f0c")
    assert network().grants(lease.subnets)
    record = await table.get(lease_key(lease.subnets))
    assert record is not None
    assert decode_lease(record.key, record.value) == lease
    assert record.version == lease.version
    assert lease.ttl == TTL
    assert record.ttl == pytest.approx(TTL)


async def test_many_nodes_at_once_get_distinct_subnets() -> None:
    shared = MemoryTable()
    stores = [MemoryStore(table=shared) for _ in range(60)]
    leases = await asyncio.gather(
        *(store.acquire(network("10.244.0.0/20", SubnetLen=26), request(f"node-{i}")) for i, store in enumerate(stores))
    )
    assert len({lease.subnets for lease in leases}) == 60
    assert not any(a.subnets.overlaps(b.subnets) for a, b in itertools.combinations(leases, 2))
    assert {lease.node for lease in (await stores[0].leases()).leases} == {f"node-{i}" for i in range(60)}


async def test_the_very_last_subnets_are_found_in_a_rush(store: TableOf) -> None:
    small = network("10.244.0.0/24", SubnetLen=28)
    leases = await asyncio.gather(*(store.acquire(small, request(f"node-{i}")) for i in range(15)))
    assert len({lease.subnets for lease in leases}) == 15
    with pytest.raises(SubnetsExhausted) as caught:
        await store.acquire(small, request("one too many"))
    assert str(caught.value) == (
        "all 15 subnets of 10.244.0.0/24 are leased; widen SubnetMin to SubnetMax or Network in the network document, "
        "or release leases of nodes that are gone"
    )


async def test_an_exhausted_network_has_room_again_after_an_expiry(store: TableOf) -> None:
    single = network(SubnetMin="10.244.7.0", SubnetMax="10.244.7.0")
    await store.acquire(single, request("a"))
    with pytest.raises(SubnetsExhausted):
        await store.acquire(single, request("b"))
    await asyncio.sleep(TTL + 1)
    assert (await store.acquire(single, request("b"))).subnets == subnets("10.244.7.0/24")


async def test_both_families_are_leased_together(store: TableOf) -> None:
    both = network(EnableIPv6=True, IPv6Network="fd00:10:244::/48")
    first, second = [await store.acquire(both, request(node)) for node in "ab"]
    for lease in (first, second):
        assert both.grants(lease.subnets)
        assert len(list(lease.subnets)) == 2
    assert not first.subnets.overlaps(second.subnets)


async def test_ipv6_alone(store: TableOf, table: Interrupted) -> None:
    only6 = network(EnableIPv4=False, EnableIPv6=True, IPv6Network="fd00:10:244::/48")
    first, second = [await store.acquire(only6, request(node)) for node in "ab"]
    assert first.subnets.ipv4 is None
    assert not first.subnets.overlaps(second.subnets)
    assert all(key.startswith("subnets/0.0.0.0-0&fd00:10:244:") for key in await table.list("subnets/"))


async def test_an_ipv6_network_too_large_to_count_in_a_machine_word(store: TableOf) -> None:
    large = network(EnableIPv4=False, EnableIPv6=True, IPv6Network="fd00::/8", IPv6SubnetLen=126)
    assert large.grants((await store.acquire(large, request("a"))).subnets)


async def test_ipv4_nodes_and_nodes_of_both_families_can_share_a_network(store: TableOf) -> None:
    members = {"SubnetMin": "10.244.1.0", "SubnetMax": "10.244.2.0"}
    only4 = await store.acquire(network(**members), request("a"))
    both = network(**members, EnableIPv6=True, IPv6Network="fd00:10:244::/48")
    assert not (await store.acquire(both, request("b"))).subnets.overlaps(only4.subnets)
    with pytest.raises(SubnetsExhausted):
        await store.acquire(both, request("c"))


# Re-claiming


async def test_a_restart_keeps_the_subnet_by_the_nodes_identity(store: TableOf) -> None:
    first = await store.acquire(network(), request("a", run="1", address="192.0.2.1"))
    await asyncio.sleep(TTL / 2)
    again = await store.acquire(network(), request("a", run="2", address="198.51.100.9"))
    assert again.subnets == first.subnets
    assert (again.run, again.public_ipv4) == ("2", IPv4Address("198.51.100.9"))
    (listed,) = (await store.leases()).leases
    assert listed == again
    assert listed.ttl == pytest.approx(TTL)


async def test_an_address_that_another_node_had_claims_nothing(store: TableOf) -> None:
    first = await store.acquire(network(), request("a", address="192.0.2.1"))
    second = await store.acquire(network(), request("b", address="192.0.2.1"))
    assert second.subnets != first.subnets
    assert (await store.leases()).leases == tuple(sorted([first, second], key=lambda lease: lease_key(lease.subnets)))


async def test_flannels_lease_for_our_address_is_adopted(store: TableOf, table: Interrupted) -> None:
    await put_flannel(table, "10.244.3.0/24", "192.0.2.9")
    held = await put_flannel(table, "10.244.7.0/24", "192.0.2.1")
    lease = await store.acquire(network(), request("a", address="192.0.2.1"))
    assert lease.subnets == held
    found = next(lease for lease in (await store.leases()).leases if lease.subnets == held)
    assert found.node == "a"


async def test_our_own_lease_comes_before_flannels_for_our_address(store: TableOf, table: Interrupted) -> None:
    own = await store.acquire(network(), request("a", previous="10.244.9.0/24"))
    await put_flannel(table, "10.244.3.0/24", "192.0.2.1")
    assert (await store.acquire(network(), request("a", run="2"))).subnets == own.subnets


async def test_flannels_lease_without_an_address_is_nobodys(store: TableOf, table: Interrupted) -> None:
    await put(table, "subnets/10.244.7.0-24", b'{"PublicIP":"0.0.0.0","PublicIPv6":null}')
    lease = await store.acquire(network(), LeaseRequest("a", "1"))
    assert lease.subnets != subnets("10.244.7.0/24")


async def test_flannels_ipv6_lease_is_adopted_by_its_ipv6_address(store: TableOf, table: Interrupted) -> None:
    only6 = network(EnableIPv4=False, EnableIPv6=True, IPv6Network="fd00:10:244::/48")
    held = Subnets(ipv6=IPv6Network("fd00:10:244:7::/64"))
    await put(table, lease_key(held), encode_lease(Lease(held, None, IPv6Address("2001:db8::1"))))
    mine = LeaseRequest("a", "1", public_ipv6=IPv6Address("2001:db8::1"))
    assert (await store.acquire(only6, mine)).subnets == held
    others = LeaseRequest("b", "1", public_ipv6=IPv6Address("2001:db8::1"))
    assert (await store.acquire(only6, others)).subnets != held


async def test_the_previous_subnet_is_preferred(store: TableOf) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.77.0/24"))
    assert lease.subnets == subnets("10.244.77.0/24")


@pytest.mark.parametrize("previous", ["10.244.0.0/24", "10.245.1.0/24", "10.244.1.0/25", "10.244.0.0/20"])
async def test_a_previous_subnet_that_the_network_does_not_grant_is_not_taken(store: TableOf, previous: str) -> None:
    lease = await store.acquire(network(), request("a", previous=previous))
    assert network().grants(lease.subnets)


async def test_a_previous_subnet_that_is_taken_is_left_to_its_holder(store: TableOf) -> None:
    holder = await store.acquire(network(), request("a", previous="10.244.77.0/24"))
    other = await store.acquire(network(), request("b", previous="10.244.77.0/24"))
    assert not other.subnets.overlaps(holder.subnets)
    assert holder in (await store.leases()).leases


async def test_the_own_lease_comes_before_the_previous_subnet(store: TableOf) -> None:
    own = await store.acquire(network(), request("a", previous="10.244.9.0/24"))
    again = await store.acquire(network(), request("a", run="2", previous="10.244.77.0/24"))
    assert again.subnets == own.subnets


async def test_a_changed_network_gives_a_new_subnet_and_frees_the_old(store: TableOf) -> None:
    await store.acquire(network(), request("a"))
    moved = await store.acquire(network("10.99.0.0/16"), request("a", run="2"))
    assert moved.subnets.ipv4 is not None
    assert moved.subnets.ipv4.subnet_of(IPv4Network("10.99.0.0/16"))
    assert (await store.leases()).leases == (moved,)


async def test_another_subnet_length_gives_a_new_subnet(store: TableOf) -> None:
    await store.acquire(network(), request("a"))
    moved = await store.acquire(network(SubnetLen=26), request("a", run="2"))
    assert network(SubnetLen=26).grants(moved.subnets)
    assert (await store.leases()).leases == (moved,)


async def test_a_record_under_an_odd_key_is_moved_to_its_proper_one(store: TableOf, table: Interrupted) -> None:
    value = encode_lease(Lease(subnets("10.244.7.0/24"), node="a"))
    await put(table, "subnets/10.244.7.0-024", value)
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    assert lease.subnets == subnets("10.244.7.0/24")
    assert list(await table.list("subnets/")) == ["subnets/10.244.7.0-24"]
    await store.renew(network(), lease)


# Races


async def test_a_lost_race_for_a_subnet_is_retried(store: TableOf, table: Interrupted) -> None:
    two = network(SubnetMin="10.244.1.0", SubnetMax="10.244.2.0")
    table.before["create"] = lambda: put_flannel(table, "10.244.1.0/24", "192.0.2.9")
    lease = await store.acquire(two, request("a", previous="10.244.1.0/24"))
    assert lease.subnets == subnets("10.244.2.0/24")


async def test_a_lost_race_for_the_own_record_is_retried(store: TableOf, table: Interrupted) -> None:
    first = await store.acquire(network(), request("a", run="1"))
    table.before["replace"] = lambda: store.renew(network(), first)
    again = await store.acquire(network(), request("a", run="2"))
    assert again.subnets == first.subnets
    assert (await store.leases()).leases == (again,)


async def test_an_own_record_that_vanishes_meanwhile_is_made_again(store: TableOf, table: Interrupted) -> None:
    first = await store.acquire(network(), request("a", run="1"))
    table.before["replace"] = lambda: store.release(first)
    again = await store.acquire(network(), request("a", run="2", previous=str(first.subnets)))
    assert again.subnets == first.subnets


async def test_an_overlapping_subnet_taken_at_the_same_moment_is_given_back(store: TableOf, table: Interrupted) -> None:
    # Another node goes by a network document with shorter prefixes: its key differs, so only looking again helps.
    table.before["create"] = lambda: put_flannel(table, "10.244.0.0/20", "192.0.2.9")
    lease = await store.acquire(network(), request("a", previous="10.244.5.0/24"))
    assert lease.subnets.ipv4 is not None
    assert not lease.subnets.ipv4.overlaps(IPv4Network("10.244.0.0/20"))
    assert [lease.node for lease in (await store.leases()).leases] in (["", "a"], ["a", ""])


async def test_a_subnet_that_vanished_before_it_was_confirmed_is_not_granted(
    store: TableOf, table: Interrupted
) -> None:
    async def vanish() -> None:
        (record,) = (await MemoryTable.list(table, "subnets/")).values()
        assert await table.delete(record)

    table.after["create"] = vanish
    lease = await store.acquire(network(), request("a"))
    assert (await store.leases()).leases == (lease,)


async def test_after_a_lost_answer_the_same_subnet_is_found_again(store: TableOf, table: Interrupted) -> None:
    table.after["create"] = lose_the_answer
    with pytest.raises(StoreUnavailable):
        await store.acquire(network(), request("a"))
    (written,) = (await store.leases()).leases
    assert (await store.acquire(network(), request("a"))).subnets == written.subnets
    assert len((await store.leases()).leases) == 1


# Subnets of different lengths


@pytest.mark.parametrize("held", ["10.244.0.0/18", "10.244.0.0/16", "10.0.0.0/8", "10.244.3.64/26", "10.244.3.7/32"])
async def test_leases_of_every_length_count_as_taken(store: TableOf, table: Interrupted, held: str) -> None:
    await put_flannel(table, held, "192.0.2.9")
    few = network(SubnetMin="10.244.1.0", SubnetMax="10.244.100.0")
    free = [few.ipv4[i] for i in range(few.ipv4.size)] if few.ipv4 is not None else []
    free = [subnet for subnet in free if not subnet.overlaps(IPv4Network(held))]
    leased = [await store.acquire(few, request(f"node-{i}")) for i in range(len(free))]
    assert {lease.subnets.ipv4 for lease in leased} == set(free)
    with pytest.raises(SubnetsExhausted):
        await store.acquire(few, request("one too many"))


# Records that cannot be read


MALFORMED = [b"", b"{", b"null", b'{"PublicIP":null}', b"\xff\xff"]


@pytest.mark.parametrize("value", MALFORMED)
async def test_a_record_that_cannot_be_read_is_reported_and_stays_taken(
    store: TableOf, table: Interrupted, value: bytes
) -> None:
    two = network(SubnetMin="10.244.1.0", SubnetMax="10.244.2.0")
    await put(table, "subnets/10.244.1.0-24", value)
    lease = await store.acquire(two, request("a", previous="10.244.1.0/24"))
    assert lease.subnets == subnets("10.244.2.0/24")
    snapshot = await store.leases()
    assert snapshot.leases == (lease,)
    (malformed,) = snapshot.malformed
    assert malformed.key == "subnets/10.244.1.0-24"
    assert malformed.reason
    with pytest.raises(SubnetsExhausted):
        await store.acquire(two, request("b"))


async def test_a_key_that_names_no_subnet_is_reported_and_takes_nothing(store: TableOf, table: Interrupted) -> None:
    single = network(SubnetMin="10.244.1.0", SubnetMax="10.244.1.0")
    for key in ("subnets/notes", "subnets/0.0.0.0-0", "subnets/0.0.0.0-0&::-0", "subnets/10.244.1.7-24"):
        await put(table, key, b"{}")
    lease = await store.acquire(single, request("a"))
    snapshot = await store.leases()
    assert snapshot.leases == (lease,)
    assert [malformed.key for malformed in snapshot.malformed] == [
        "subnets/0.0.0.0-0",
        "subnets/0.0.0.0-0&::-0",
        "subnets/10.244.1.7-24",
        "subnets/notes",
    ]


async def test_other_keys_are_not_leases(store: TableOf, table: Interrupted) -> None:
    for key in ("config", "subnets-notes/10.244.1.0-24", "overlaynet/a"):
        await put(table, key, b"{}")
    assert await store.leases() == Snapshot()


def test_a_snapshot_keeps_versions_and_lifetimes() -> None:
    listing = {
        "subnets/10.244.2.0-24": Record("subnets/10.244.2.0-24", b'{"PublicIP":"192.0.2.2"}', "v2", 7.0),
        "subnets/10.244.1.0-24": Record("subnets/10.244.1.0-24", b"{", "v1", 9.0),
    }
    snapshot = read_snapshot(listing)
    (lease,) = snapshot.leases
    assert (lease.version, lease.ttl) == ("v2", 7.0)
    (malformed,) = snapshot.malformed
    assert malformed == Malformed("subnets/10.244.1.0-24", malformed.reason)


# Renewing


async def test_renewing_gives_the_whole_lifetime_again(store: TableOf) -> None:
    lease = await store.acquire(network(), request("a"))
    for _ in range(5):
        await asyncio.sleep(TTL - 1)
        renewed = await store.renew(network(), lease)
        assert renewed == lease
        assert renewed.ttl == TTL
        assert renewed.version != lease.version
        lease = renewed
    await asyncio.sleep(TTL + 1)
    assert (await store.leases()).leases == ()


async def test_renewing_publishes_what_has_changed(store: TableOf) -> None:
    lease = await store.acquire(network(), request("a"))
    moved = attrs.evolve(lease, public_ipv4=IPv4Address("198.51.100.9"), data=LeaseData("vxlan", {"VNI": 2}))
    assert await store.renew(network(), moved) == moved
    assert (await store.leases()).leases == (moved,)


async def test_a_renewal_whose_answer_was_lost_can_be_repeated(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a"))
    table.after["replace"] = lose_the_answer
    with pytest.raises(StoreUnavailable):
        await store.renew(network(), lease)
    renewed = await store.renew(network(), lease)
    assert renewed == lease
    assert (await store.leases()).leases == (renewed,)


async def test_a_vanished_record_is_made_again(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a"))
    (record,) = (await table.list("subnets/")).values()
    assert await table.delete(record)
    renewed = await store.renew(network(), lease)
    assert renewed == lease
    (listed,) = (await store.leases()).leases
    assert listed == lease
    assert listed.version == renewed.version


async def test_an_expired_lease_that_nobody_took_can_be_renewed(store: TableOf) -> None:
    lease = await store.acquire(network(), request("a"))
    await asyncio.sleep(2 * TTL)
    assert await store.renew(network(), lease) == lease


async def test_a_lease_that_another_node_took_is_lost(store: TableOf) -> None:
    lease = await store.acquire(network(), request("a"))
    await asyncio.sleep(2 * TTL)
    taken = await store.acquire(network(), request("b", address="192.0.2.2", previous=str(lease.subnets)))
    assert taken.subnets == lease.subnets
    with pytest.raises(LeaseLost) as caught:
        await store.renew(network(), lease)
    assert str(caught.value) == f"the lease on {lease.subnets} was taken by node b at 192.0.2.2"
    assert (await store.leases()).leases == (taken,)


async def test_a_lease_that_is_taken_while_it_is_made_again_is_lost(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await asyncio.sleep(2 * TTL)
    table.before["create"] = lambda: put_flannel(table, "10.244.7.0/24", "192.0.2.2")
    with pytest.raises(LeaseLost) as caught:
        await store.renew(network(), lease)
    assert str(caught.value) == "the lease on 10.244.7.0/24 was taken by node (unnamed) at 192.0.2.2"


async def test_a_lease_that_flannel_wrote_over_is_lost(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await put_flannel(table, "10.244.7.0/24", "192.0.2.1")
    with pytest.raises(LeaseLost) as caught:
        await store.renew(network(), lease)
    assert str(caught.value) == "the lease on 10.244.7.0/24 was taken by node (unnamed) at 192.0.2.1"


async def test_a_lease_of_two_processes_with_one_identity_is_lost_to_the_first(store: TableOf) -> None:
    lease = await store.acquire(network(), request("a", run="1", previous="10.244.7.0/24"))
    second = await store.acquire(network(), request("a", run="2", address="192.0.2.2"))
    with pytest.raises(LeaseLost) as caught:
        await store.renew(network(), lease)
    assert str(caught.value) == (
        "the lease on 10.244.7.0/24 was taken by another process with the same node identity 'a' at 192.0.2.2; "
        "give each node an identity of its own with --node"
    )
    assert await store.renew(network(), second) == second


DAMAGED = [b"", b"[]", b'{"PublicIP":"192.0', b'{"PublicIP":"a banana","Overlaynet":{"Node":"a","Run":"1"}}', b"\xff"]


@pytest.mark.parametrize("value", DAMAGED)
@pytest.mark.parametrize("ttl", [TTL, math.inf])
async def test_a_damaged_record_is_written_over_by_its_own_node(
    store: TableOf, table: Interrupted, caplog: pytest.LogCaptureFixture, value: bytes, ttl: float
) -> None:
    """Before, the lease was lost, and the node ended, although the record names no other owner, and none can have come."""
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    for _ in range(2):
        await asyncio.sleep(TTL - 1)
        await put(table, "subnets/10.244.7.0-24", value, ttl)
        lease = await store.renew(network(), lease)
    (listed,) = (await store.leases()).leases
    assert (listed, listed.ttl) == (lease, TTL)
    assert [record.getMessage() for record in caplog.records] == ["damaged record of the lease is written over"] * 2


@pytest.mark.parametrize("value", DAMAGED)
async def test_beyond_its_end_a_damaged_record_may_be_another_nodes_so_the_lease_is_lost(
    store: TableOf, table: Interrupted, value: bytes
) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await asyncio.sleep(TTL)
    await TableOf(table).acquire(network(), request("b", address="192.0.2.2", previous="10.244.7.0/24"))
    await put(table, "subnets/10.244.7.0-24", value, TTL)
    with pytest.raises(LeaseLost, match=r"^the record of the lease on 10\.244\.7\.0/24 was overwritten: "):
        await store.renew(network(), lease)
    assert (await table.list("subnets/"))["subnets/10.244.7.0-24"].value == value


async def test_the_end_counts_that_was_promised_when_the_damaged_record_was_read(
    store: TableOf, table: Interrupted
) -> None:
    """The answer is slow, and when it comes the promise is over; a claim may have come and been damaged meanwhile."""
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await asyncio.sleep(TTL - 5)
    await put(table, "subnets/10.244.7.0-24", b"damaged", TTL)
    table.before["replace"] = lambda: asyncio.sleep(10)
    with pytest.raises(LeaseLost):
        await store.renew(network(), lease)


async def test_a_claim_between_the_look_at_a_damaged_record_and_the_write_wins(
    store: TableOf, table: Interrupted
) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await asyncio.sleep(TTL - 5)
    await put(table, "subnets/10.244.7.0-24", b"damaged", 6)

    async def claim_then() -> None:
        async def claim() -> None:
            await asyncio.sleep(10)
            await put_flannel(table, "10.244.7.0/24", "192.0.2.2")

        table.before["replace"] = claim

    table.after["replace"] = claim_then  # the first one fails: the version is another
    with pytest.raises(LeaseLost, match="was taken by node"):
        await store.renew(network(), lease)


async def test_a_process_that_was_not_granted_the_lease_writes_over_nothing_that_it_cannot_read(
    store: TableOf, table: Interrupted
) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await put(table, "subnets/10.244.7.0-24", b"[]", TTL)
    for stranger in (lease, attrs.evolve(lease, run="2"), attrs.evolve(lease, node="b")):
        with pytest.raises(LeaseLost):
            await TableOf(table).renew(network(), stranger)
    with pytest.raises(LeaseLost):
        await store.renew(network(), attrs.evolve(lease, run="2"))


async def test_a_vanished_lease_is_lost_if_an_overlapping_one_stands(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await asyncio.sleep(2 * TTL)
    await put_flannel(table, "10.244.0.0/20", "192.0.2.9")
    with pytest.raises(LeaseLost) as caught:
        await store.renew(network(), lease)
    assert str(caught.value) == ("the lease on 10.244.7.0/24 vanished, and an overlapping subnet is now leased")
    assert list(await table.list("subnets/")) == ["subnets/10.244.0.0-20"]


async def test_a_lease_made_again_without_an_answer_is_checked_at_the_next_renewal(
    store: TableOf, table: Interrupted
) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await asyncio.sleep(2 * TTL)
    await put_flannel(table, "10.244.0.0/20", "192.0.2.9")
    table.after["create"] = lose_the_answer
    with pytest.raises(StoreUnavailable):
        await store.renew(network(), lease)
    assert len(await table.list("subnets/")) == 2
    with pytest.raises(LeaseLost):
        await store.renew(network(), lease)
    assert list(await table.list("subnets/")) == ["subnets/10.244.0.0-20"]


async def test_a_record_that_is_edited_again_while_it_is_written_over_is_written_over_again(
    store: TableOf, table: Interrupted
) -> None:
    """Before, the node was told that an overlapping subnet is leased, and ended."""
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    edited = encode_lease(attrs.evolve(lease, public_ipv4=IPv4Address("192.0.2.99")))
    await put(table, "subnets/10.244.7.0-24", edited)
    table.before["list"] = lambda: put(table, "subnets/10.244.7.0-24", edited)
    renewed = await store.renew(network(), lease)
    (listed,) = (await store.leases()).leases
    assert renewed == lease == listed
    assert (listed.version, listed.ttl) == (renewed.version, TTL)


# Releasing


async def test_a_released_subnet_is_free(store: TableOf) -> None:
    lease = await store.acquire(network(), request("a"))
    await store.release(lease)
    assert await store.leases() == Snapshot()
    await store.release(lease)
    again = await store.acquire(network(), request("b", previous=str(lease.subnets)))
    assert again.subnets == lease.subnets


async def test_a_renewed_lease_is_released_by_whoever_holds_it(store: TableOf) -> None:
    lease = await store.acquire(network(), request("a"))
    await store.renew(network(), lease)
    await store.release(lease)
    assert await store.leases() == Snapshot()


async def test_what_another_holds_is_not_released(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a", run="1", previous="10.244.7.0/24"))
    second = await store.acquire(network(), request("a", run="2"))
    await store.release(lease)
    assert (await store.leases()).leases == (second,)
    await put(table, "subnets/10.244.7.0-24", b"damaged")
    await store.release(second)
    assert set(await table.list("subnets/")) == {"subnets/10.244.7.0-24"}


# Reservations at the moments that matter (what else they promise, tests/conformance asks of all stores)


RESERVATION = Reservation(subnets("10.244.7.0/24"), node="b")


async def test_a_claim_that_comes_before_a_reservation_is_written_wins(store: TableOf, table: Interrupted) -> None:
    other = TableOf(MemoryTable.another(table))
    table.before["create"] = lambda: other.acquire(network(), request("a", previous="10.244.7.0/24"))
    with pytest.raises(ReservationError, match="is held by node a at"):
        await store.reserve(RESERVATION)
    assert (await store.reservations()).reservations == ()
    assert [lease.node for lease in (await store.leases()).leases] == ["a"]


async def test_a_claim_that_comes_after_a_reservation_is_written_loses_or_undoes_it(
    store: TableOf, table: Interrupted
) -> None:
    other = TableOf(MemoryTable.another(table))
    table.after["create"] = lambda: other.acquire(network(), request("a", previous="10.244.7.0/24"))
    await store.reserve(RESERVATION)
    (lease,) = (await store.leases()).leases
    assert lease.subnets != RESERVATION.subnets


async def test_a_reservation_that_is_made_just_before_a_claim_is_written_wins(
    store: TableOf, table: Interrupted
) -> None:
    other = TableOf(MemoryTable.another(table))
    table.before["create"] = lambda: other.reserve(RESERVATION)
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    assert lease.subnets != RESERVATION.subnets
    assert (await store.reservations()).reservations == (RESERVATION,)


async def test_a_reservation_of_overlapping_subnets_wins_if_it_is_made_just_before(
    store: TableOf, table: Interrupted
) -> None:
    wide = network(SubnetLen=20, SubnetMin="10.244.0.0")
    other = TableOf(MemoryTable.another(table))
    table.before["create"] = lambda: other.reserve(RESERVATION)
    lease = await store.acquire(wide, request("a", previous="10.244.0.0/20"))
    assert not lease.subnets.overlaps(RESERVATION.subnets)


async def test_a_placeholder_is_not_left_where_the_reservation_has_just_gone(
    store: TableOf, table: Interrupted
) -> None:
    await store.reserve(RESERVATION)
    (record,) = (await MemoryTable.list(table, "subnets/")).values()
    assert await table.delete(record)
    other = TableOf(MemoryTable.another(table))
    table.before["create"] = lambda: other.unreserve(RESERVATION.subnets)
    await store.reserved.restore(RESERVATION.subnets)
    assert await table.list("") == {}


async def test_a_reservation_whose_answer_was_lost_can_be_repeated(store: TableOf, table: Interrupted) -> None:
    table.after["create"] = lose_the_answer
    with pytest.raises(StoreUnavailable):
        await store.reserve(RESERVATION)
    await store.reserve(RESERVATION)
    assert len(await table.list("")) == 2


# Nodes behind one address


async def test_where_an_address_is_shared_flannels_lease_is_left_to_flannel(store: TableOf, table: Interrupted) -> None:
    first = await store.acquire(network(), request("a", address="192.0.2.1", previous="10.244.77.0/24"))
    flannels = await put_flannel(table, "10.244.3.0/24", "192.0.2.1")
    second = await store.acquire(network(), request("b", address="192.0.2.1"))
    assert len({first.subnets, second.subnets, flannels}) == 3
    assert [lease.node for lease in (await store.leases()).leases].count("") == 1


async def test_where_an_address_is_shared_a_node_takes_over_the_flannel_lease_it_had(
    store: TableOf, table: Interrupted
) -> None:
    await store.acquire(network(), request("a", address="192.0.2.1", previous="10.244.77.0/24"))
    await put_flannel(table, "10.244.3.0/24", "192.0.2.1")
    await put_flannel(table, "10.244.9.0/24", "192.0.2.1")
    lease = await store.acquire(network(), request("b", address="192.0.2.1", previous="10.244.9.0/24"))
    assert lease.subnets == subnets("10.244.9.0/24")
    assert {found.node for found in (await store.leases()).leases} == {"", "a", "b"}


async def test_of_flannels_leases_for_the_address_the_one_held_before_is_taken_over(
    store: TableOf, table: Interrupted
) -> None:
    await put_flannel(table, "10.244.3.0/24", "192.0.2.1")
    await put_flannel(table, "10.244.9.0/24", "192.0.2.1")
    lease = await store.acquire(network(), request("b", address="192.0.2.1", previous="10.244.9.0/24"))
    assert lease.subnets == subnets("10.244.9.0/24")


async def test_many_nodes_behind_one_address_keep_what_is_theirs(store: TableOf) -> None:
    nodes = [f"node-{number}" for number in range(20)]
    first = list(await asyncio.gather(*(store.acquire(network(), request(node)) for node in nodes[:10])))
    for node in nodes[10:]:  # who comes later finds them there
        first.append(await store.acquire(network(), request(node)))
    assert len({lease.subnets for lease in first}) == 20
    again = await asyncio.gather(*(store.acquire(network(), request(node, run="2")) for node in nodes))
    assert [lease.subnets for lease in again] == [lease.subnets for lease in first]
    for lease in again:
        await store.renew(network(), lease)


# Listing and watching


async def test_lifetimes_are_asked_for_when_a_listing_does_not_tell(table: Interrupted) -> None:
    class Silent(MemoryTable):
        """A table whose lists do not tell lifetimes, as etcd's do not."""

        asked = most_at_once = 0

        async def list(self, prefix: str) -> Mapping[str, Record]:
            listing = await MemoryTable.list(self, prefix)
            return {key: attrs.evolve(record, ttl=None) for key, record in listing.items()}

        async def ttl(self, record: Record) -> float:
            self.asked += 1
            self.most_at_once = max(self.most_at_once, self.asked)
            await asyncio.sleep(1)
            self.asked -= 1
            return await MemoryTable.ttl(self, record)

    silent = Silent()
    store = TableOf(silent)
    for number in range(40):
        await store.acquire(network(), request(f"node-{number}"))
    lifetimes = [lease.ttl for lease in (await store.leases()).leases]
    assert len(lifetimes) == 40
    assert all(ttl is not None and 0 < ttl <= TTL for ttl in lifetimes)
    assert 1 < silent.most_at_once <= 16


async def test_a_watch_yields_leases_and_not_renewals(store: TableOf) -> None:
    async with aclosing(store.watch()) as snapshots:
        assert await anext(snapshots) == Snapshot()
        lease = await store.acquire(network(), request("a"))
        assert (await anext(snapshots)).leases == (lease,)
        following = asyncio.create_task(anext(snapshots))
        await store.renew(network(), lease)
        await asyncio.sleep(1)
        assert not following.done()
        other = await store.acquire(network(), request("b"))
        assert set((await following).leases) == {lease, other}
        await store.release(lease)
        assert (await anext(snapshots)).leases == (other,)
        assert await anext(snapshots) == Snapshot()  # expired


async def test_a_malformed_record_never_empties_a_watch(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a"))
    async with aclosing(store.watch()) as snapshots:
        await anext(snapshots)
        await put(table, "subnets/10.244.1.0-24&", b"\xff")
        snapshot = await anext(snapshots)
        assert snapshot.leases == (lease,)
        assert [malformed.key for malformed in snapshot.malformed] == ["subnets/10.244.1.0-24&"]


async def test_a_watch_never_goes_silent() -> None:
    class Ending(MemoryTable):
        async def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
            yield {}

    async with aclosing(TableOf(Ending()).watch()) as snapshots:
        assert await anext(snapshots) == Snapshot()
        with pytest.raises(StoreUnavailable, match="^the watch of the table of the test ended$"):
            await anext(snapshots)


async def test_closing_a_store_that_was_never_used_is_nothing(store: TableOf) -> None:
    await store.aclose()
    await store.aclose()


# Choosing


def test_each_free_subnet_is_as_likely_as_any_other() -> None:
    few = network(SubnetMin="10.244.1.0", SubnetMax="10.244.12.0")
    taken = [subnets("10.244.3.0/24"), subnets("10.244.8.0/23"), subnets("10.244.12.128/25"), subnets("10.9.0.0/16")]
    free = {1, 2, 4, 5, 6, 7, 10, 11}
    draws = 8000
    counted = collections.Counter(str(choose_free(few, taken)) for _ in range(draws))
    assert set(counted) == {f"10.244.{i}.0/24" for i in free}
    # Binomial, p = 1/8: five standard deviations are 148; out of bounds once in 200 000 runs.
    assert all(abs(count - draws / len(free)) < 160 for count in counted.values())


def ranges_and_leases() -> st.SearchStrategy[tuple[Network, list[IPv4Network]]]:
    taken = st.lists(
        st.builds(
            lambda address, length: IPv4Network((0x0AF40000 + address, length), strict=False),
            st.integers(-300, 4096),
            st.integers(16, 32),
        ),
        max_size=8,
    )
    bounds = st.tuples(st.integers(0, 15), st.integers(0, 15)).map(sorted)
    return st.tuples(bounds, taken).map(
        lambda drawn: (
            network(
                "10.244.0.0/20",
                SubnetLen=24,
                SubnetMin=f"10.244.{drawn[0][0]}.0",
                SubnetMax=f"10.244.{drawn[0][1]}.0",
            ),
            drawn[1],
        )
    )


@settings(deadline=None, max_examples=300)
@given(ranges_and_leases())
def test_the_free_runs_are_exactly_the_subnets_that_overlap_nothing(drawn: tuple[Network, list[IPv4Network]]) -> None:
    few, taken = drawn
    assert few.ipv4 is not None
    runs = list(free_runs(few.ipv4, taken))
    found = [index for start, end in runs for index in range(start, end)]
    expected = [index for index in range(few.ipv4.size) if not any(few.ipv4[index].overlaps(other) for other in taken)]
    assert found == expected
    assert all(start < end for start, end in runs)


# Law 1: a simulation. Nodes acquire, renew, crash, restart and stop on a slow table that loses answers, by network
# documents with different subnet lengths; no two of them may ever believe that they hold overlapping subnets.


class Slow(MemoryTable):
    """A table whose calls take time before and after they take effect, and sometimes never answer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    async def _slowly(self, call: Awaitable[Any]) -> Any:
        await asyncio.sleep(self._random.uniform(0, 2))
        answer = await call
        await asyncio.sleep(self._random.uniform(0, 2))
        if self._random.random() < 0.05:
            raise StoreUnavailable("the answer was lost")
        return answer

    async def get(self, key: str) -> Record | None:
        found: Record | None = await self._slowly(MemoryTable.get(self, key))
        return found

    async def list(self, prefix: str) -> Mapping[str, Record]:
        listing: Mapping[str, Record] = await self._slowly(MemoryTable.list(self, prefix))
        return listing

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        record: Record | None = await self._slowly(MemoryTable.create(self, key, value, ttl))
        return record

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        written: Record | None = await self._slowly(MemoryTable.replace(self, record, value, ttl))
        return written

    async def delete(self, record: Record) -> bool:
        deleted: bool = await self._slowly(MemoryTable.delete(self, record))
        return deleted


@attrs.define
class Belief:
    """A node was told that it holds these subnets; it may act on it from ``start`` to ``end``."""

    node: str
    subnets: Subnets
    start: float
    end: float


class Simulation:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.table = Slow(seed)
        self.beliefs: list[Belief] = []
        self.documents = [network("10.244.0.0/24", SubnetLen=length, SubnetMin="10.244.0.0") for length in (26, 27, 28)]

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def live(self, node: str) -> None:
        """One life of a daemon: acquire, renew for a while, then stop cleanly, lose the lease, or crash."""
        store = TableOf(self.table)
        document = self.random.choice(self.documents)
        for belief in self.beliefs:
            if belief.node == node:  # until its node runs again, a crashed daemon's subnet is nobody else's
                belief.end = min(belief.end, self.now())
        asked = self.now()
        lease = await store.acquire(document, LeaseRequest(node, str(self.random.random())))
        belief = self.believe(node, lease, asked)
        while self.random.random() < 0.8:
            await asyncio.sleep(self.random.uniform(0, TTL * self.random.choice([0.6, 0.6, 2.0])))  # often in time
            asked = self.now()
            try:
                lease = await store.renew(document, lease)
            except LeaseLost:
                belief.end = min(belief.end, self.now())
                return
            except StoreUnavailable:
                continue
            if asked > belief.end:  # too late: it held nothing for a while
                belief = self.believe(node, lease, asked)
            belief.end = asked + TTL
        if self.random.random() < 0.5:
            belief.end = min(belief.end, self.now())
            await store.release(lease)

    def believe(self, node: str, lease: Lease, asked: float) -> Belief:
        self.beliefs.append(Belief(node, lease.subnets, self.now(), asked + TTL))
        return self.beliefs[-1]

    async def node(self, name: str) -> None:
        for _ in range(8):
            await asyncio.sleep(self.random.uniform(0, 5))
            try:
                await self.live(name)
            except (StoreUnavailable, SubnetsExhausted):
                await asyncio.sleep(self.random.uniform(0, 30))

    async def run(self) -> None:
        await asyncio.gather(*(self.node(f"node-{i}") for i in range(6)))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_no_two_nodes_ever_hold_overlapping_subnets(seed: int) -> None:
    simulation = Simulation(seed)
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(simulation.run())
    assert len(simulation.beliefs) > 10
    for one, other in itertools.combinations(simulation.beliefs, 2):
        if one.node != other.node and one.subnets.overlaps(other.subnets):
            assert min(one.end, other.end) <= max(one.start, other.start), (one, other)


# What a watch costs


async def test_a_watch_parses_only_what_has_changed(
    store: TableOf, table: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [await store.acquire(network(), request(f"node-{number}")) for number in range(20)]
    parsed: list[str] = []

    def counted(key: str, value: bytes) -> Lease:
        parsed.append(key)
        return decode_lease(key, value)

    async with aclosing(store.watch()) as snapshots:
        await anext(snapshots)
        monkeypatch.setattr("overlaynet.records.decode_lease", counted)
        changed = attrs.evolve(leases[3], public_ipv4=IPv4Address("198.51.100.9"))
        await store.renew(network(), changed)
        snapshot = await anext(snapshots)
    assert changed in snapshot.leases
    assert len(snapshot.leases) == 20
    assert parsed == [lease_key(changed.subnets)]


async def test_a_restart_keeps_the_subnet_of_its_file_where_a_remnant_stands_too(
    store: TableOf, table: Interrupted
) -> None:
    held = await store.acquire(network(), request("a", previous="10.244.9.0/24"))
    remnant = attrs.evolve(held, subnets=subnets("10.244.3.0/24"))
    await put(table, lease_key(remnant.subnets), encode_lease(remnant), TTL)
    again = await store.acquire(network(), request("a", "2", previous="10.244.9.0/24"))
    assert again.subnets == held.subnets
    assert list(await table.list("subnets/")) == [lease_key(held.subnets)]


# Claims that come too late


async def first_listing(store: TableOf) -> Snapshot:
    async with aclosing(store.watch()) as snapshots:
        return await anext(snapshots)


async def test_a_claim_that_comes_too_late_is_given_back_by_the_watch_of_the_node(
    store: TableOf, table: Interrupted, caplog: pytest.LogCaptureFixture
) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    others = [
        attrs.evolve(lease, subnets=subnets("10.244.4.0/24"), node="b"),
        attrs.evolve(lease, subnets=subnets("10.244.5.0/24"), run="of another process"),
        attrs.evolve(lease, subnets=subnets("10.244.6.0/24"), node=""),
    ]
    for other in others:
        await put(table, lease_key(other.subnets), encode_lease(other), TTL)
    late = attrs.evolve(lease, subnets=subnets("10.244.3.0/24"))
    async with aclosing(store.watch()) as snapshots:
        assert await anext(snapshots) == Snapshot((*others, lease))
        await put(table, lease_key(late.subnets), encode_lease(late), TTL)
        while (snapshot := await anext(snapshots)).leases != (*others, lease):
            assert snapshot.leases == (late, *others, lease)
    assert [record.getMessage() for record in caplog.records] == ["late claim given back"]
    assert await store.renew(network(), lease) == lease


async def test_a_late_claim_of_reserved_subnets_leaves_them_reserved(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    await store.reserve(Reservation(subnets("10.244.3.0/24"), "b"))
    late = attrs.evolve(lease, subnets=subnets("10.244.3.0/24"))
    await put(table, lease_key(late.subnets), encode_lease(late), TTL)
    await first_listing(store)
    assert (await first_listing(store)).leases == (lease,)
    assert (await table.list("subnets/"))["subnets/10.244.3.0-24"].ttl == math.inf


async def test_a_late_claim_that_is_another_nodes_by_now_is_left_alone(store: TableOf, table: Interrupted) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    late = attrs.evolve(lease, subnets=subnets("10.244.3.0/24"))
    await put(table, lease_key(late.subnets), encode_lease(late), TTL)
    other = attrs.evolve(late, node="b")
    watch = table.watch

    async def old_listing(prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        async with aclosing(watch(prefix)) as listings:
            found = dict(await anext(listings))
            await put(table, lease_key(late.subnets), encode_lease(other), TTL)
            yield found

    table.watch = old_listing  # type: ignore[method-assign]
    await first_listing(store)
    assert (await store.leases()).leases == (other, lease)


@pytest.mark.parametrize("ending", ["released", "acquired anew"])
async def test_nothing_is_given_back_for_a_node_that_holds_no_lease_now(
    store: TableOf, table: Interrupted, ending: str
) -> None:
    lease = await store.acquire(network(), request("a", previous="10.244.7.0/24"))
    if ending == "released":
        await store.release(lease)
    else:
        table.before["list"] = lose_the_answer
        with pytest.raises(StoreUnavailable):
            await store.acquire(network(), request("a"))
    late = attrs.evolve(lease, subnets=subnets("10.244.3.0/24"))
    await put(table, lease_key(late.subnets), encode_lease(late), TTL)
    assert late in (await first_listing(store)).leases
    assert late in (await store.leases()).leases
