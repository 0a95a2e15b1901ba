"""Keeping a lease: when it is renewed, and what is done about what goes wrong."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address
from typing import Any, cast

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlaynet import boot_clock
from overlaynet.errors import IdentityTaken, LeaseLost, StoreUnavailable
from overlaynet.health import REMINDER, Health
from overlaynet.lease_keeping import RELEASE_TIMEOUT, LeaseKeeper, release, renewal_margin
from overlaynet.model import Lease, LeaseData, LeaseRequest, Reservation, Snapshot
from overlaynet.network import DEFAULT_LEASE_TTL, MINIMUM_LEASE_TTL, Network, parse
from overlaynet.plugins import Plugins
from overlaynet.records import as_read, encode_lease, lease_key
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.table import Record
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.fakes import fake_underlay

pytestmark = pytest.mark.anyio

HOUR = 3600.0
REQUEST = LeaseRequest("a", "1", IPv4Address("192.0.2.1"))


def network(ttl: float) -> Network:
    return attrs.evolve(parse('{"Network": "10.244.0.0/16"}'), lease_ttl=ttl)


@pytest.mark.parametrize(
    ("ttl", "minutes", "margin"),
    [
        (24 * HOUR, 60, 1 * HOUR),
        (24 * HOUR, 1439, 16 * HOUR),
        (1.5 * HOUR, 60, 1 * HOUR),
        (61 * 60, 60, 2440),
        (1 * HOUR, 60, 2400),
        (60, 60, 40),
        (5, 1, 5 * 2 / 3),
        (365 * 86400, 1, 60),
    ],
)
def test_the_margin_follows_the_lifetime(ttl: float, minutes: int, margin: float) -> None:
    assert renewal_margin(ttl, minutes) == pytest.approx(margin)


@given(st.floats(MINIMUM_LEASE_TTL, 10 * 365 * 86400), st.integers(1, 1439))
def test_a_lease_is_never_renewed_all_the_time_and_never_at_its_very_end(ttl: float, minutes: int) -> None:
    margin = renewal_margin(ttl, minutes)
    assert min(60.0, ttl / 2) <= margin
    assert ttl - margin >= ttl / 3 - 1e-6


async def keeper(
    store: MemoryStore, lease: Lease, ttl: float, minutes: int = 60, changed: Callable[[], None] = lambda: None
) -> LeaseKeeper:
    plugins = Plugins()
    return LeaseKeeper(
        store,
        network(ttl),
        lease,
        deadline=boot_clock.now() + ttl,
        margin=renewal_margin(ttl, minutes),
        health=Health(plugins),
        plugins=plugins,
        changed=changed,
    )


@pytest.mark.parametrize("ttl", [DEFAULT_LEASE_TTL, 61 * 60, 90, MINIMUM_LEASE_TTL])
async def test_renewals_are_as_many_as_the_lifetime_asks_for(ttl: float) -> None:
    store = MemoryStore()
    lease = await store.acquire(network(ttl), REQUEST)
    keeping = await keeper(store, lease, ttl)
    task = asyncio.create_task(keeping.run())
    await asyncio.sleep(30.5 * (ttl - renewal_margin(ttl, 60)))
    assert not task.done()
    assert (await store.leases()).leases[0].version == str(int(lease.version) + 30)
    task.cancel()
    await asyncio.wait({task})


async def test_changed_addresses_are_published_at_once_and_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = MemoryStore()
    lease = await store.acquire(network(60), REQUEST)
    keeping = await keeper(store, lease, 60)
    task = asyncio.create_task(keeping.run())
    moved = attrs.evolve(fake_underlay("192.0.2.77"), public_ipv6=IPv6Address("2001:db8::77"))
    for _ in range(3):
        keeping.publish(moved)
        await asyncio.sleep(1)
    (found,) = (await store.leases()).leases
    assert (found.public_ipv4, found.public_ipv6) == (IPv4Address("192.0.2.77"), IPv6Address("2001:db8::77"))
    assert found.subnets == lease.subnets
    assert [record.message for record in caplog.records] == ["address published"]
    keeping.publish(fake_underlay("192.0.2.78"))
    keeping.publish(fake_underlay("192.0.2.79"))
    await asyncio.sleep(HOUR)
    (found,) = (await store.leases()).leases
    assert (found.public_ipv4, found.public_ipv6) == (IPv4Address("192.0.2.79"), None)
    task.cancel()
    await asyncio.wait({task})


async def test_a_reservation_that_comes_or_goes_is_no_reason_to_renew_again_and_again() -> None:
    store = MemoryStore()
    lease = await store.acquire(network(60), REQUEST)
    keeping = await keeper(store, lease, 60)
    task = asyncio.create_task(keeping.run())
    await store.reserve(Reservation(lease.subnets, node="a"))
    begun = int((await store.leases()).leases[0].version)
    await asyncio.sleep(10 * 20 + 5)
    (found,) = (await store.leases()).leases
    assert found.reserved
    assert int(found.version) - begun <= 10 + 1
    task.cancel()
    await asyncio.wait({task})


async def test_a_lost_lease_ends_the_keeping() -> None:
    store = MemoryStore()
    lease = await store.acquire(network(60), REQUEST)
    keeping = await keeper(store, lease, 60)
    await store.remove((await store.leases()).leases[0])
    await store.acquire(network(60), LeaseRequest("b", "1", IPv4Address("192.0.2.2"), previous=lease.subnets))
    keeping.look(await store.leases())
    with pytest.raises(LeaseLost, match="was taken by node b at 192.0.2.2") as caught:
        await keeping.run()
    assert not isinstance(caught.value, IdentityTaken)


async def test_a_look_that_finds_the_lease_in_place_renews_nothing() -> None:
    store = MemoryStore()
    lease = await store.acquire(network(60), REQUEST)
    keeping = await keeper(store, lease, 60)
    task = asyncio.create_task(keeping.run())
    keeping.look(await store.leases())
    await asyncio.sleep(1)
    assert (await store.leases()).leases[0].version == lease.version
    task.cancel()
    await asyncio.wait({task})


class Failing(MemoryStore):
    """Renews nothing as long as it is out of reach."""

    def __init__(self) -> None:
        super().__init__()
        self.reachable = True
        self.tries: list[float] = []

    async def renew(self, network: Network, lease: Lease) -> Lease:
        self.tries.append(asyncio.get_running_loop().time())
        if not self.reachable:
            raise StoreUnavailable("no answer")
        return await super().renew(network, lease)

    async def patient(self) -> None:
        """Wait until the pauses between tries are as long as they get, and one has just begun."""
        while len(self.tries) < 3 or self.tries[-1] - self.tries[-2] < 45:
            await asyncio.sleep(0.1)


@asynccontextmanager
async def kept_in_vain(ttl: float = 24 * HOUR) -> AsyncGenerator[tuple[Failing, LeaseKeeper], None]:
    """A lease whose renewals have failed for long, and the next try is far away."""
    store = Failing()
    keeping = await keeper(store, await store.acquire(network(ttl), REQUEST), ttl)
    store.reachable = False
    task = asyncio.create_task(keeping.run())
    keeping.look(Snapshot())
    try:
        await store.patient()
        yield store, keeping
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_an_address_that_changes_between_two_tries_is_published_at_once() -> None:
    async with kept_in_vain() as (store, keeping):
        store.reachable = True
        keeping.publish(fake_underlay("192.0.2.77"))
        await asyncio.sleep(1.1)
        (found,) = (await store.leases()).leases
        assert found.public_ipv4 == IPv4Address("192.0.2.77")


async def test_a_store_that_is_back_is_asked_at_once() -> None:
    async with kept_in_vain() as (store, keeping):
        begun = asyncio.get_running_loop().time()
        store.reachable = True
        keeping.try_again()
        await asyncio.sleep(1.1)
        assert keeping.deadline == pytest.approx(begun + 24 * HOUR, abs=1.1)
        tries = len(store.tries)
        keeping.try_again()
        await asyncio.sleep(60)
        assert len(store.tries) == tries, "there is nothing to try again"


async def test_whatever_asks_for_renewals_there_is_one_a_second_at_most() -> None:
    async with kept_in_vain() as (store, keeping):
        for reachable in (False, True):
            store.reachable = reachable
            tries = len(store.tries)
            for number in range(1000):
                keeping.look(Snapshot())
                keeping.try_again()
                keeping.publish(fake_underlay(f"192.0.2.{number % 200 + 1}"))
                await asyncio.sleep(0.01)
            assert 9 <= len(store.tries) - tries <= 11


async def test_the_end_of_a_lease_is_told_once_whatever_fails_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    async with kept_in_vain() as (_, keeping):
        assert keeping._health.problems == {"lease": "it cannot be renewed: no answer"}
        await asyncio.sleep(keeping.deadline - asyncio.get_running_loop().time() - 100)
        caplog.clear()
        await asyncio.sleep(1000)
        reason = "it has expired, and no packets are carried; it cannot be renewed: no answer"
        assert keeping._health.problems == {"lease": reason}
        told = [record.fields["reason"] for record in cast("list[Any]", caplog.records)]
        assert told.count(reason) <= 1000 / REMINDER + 1
        assert told == sorted(told), "first the one reason, then the other, and never the first again"


# A record that somebody else has edited


DATA = LeaseData("vxlan", {"VNI": 1, "VtepMAC": "02:00:00:00:00:01", "many": ("as", "tuples")})


async def edit(store: MemoryStore, lease: Lease, lifetime: float = 24 * HOUR, **changes: Any) -> Lease:
    """Change a lease's record by hand, whatever it is now."""
    record = await store.table.get(lease_key(lease.subnets))
    assert record is not None
    edited = attrs.evolve(lease, **changes)
    assert await store.table.replace(record, encode_lease(edited), lifetime) is not None
    return edited


@asynccontextmanager
async def kept(store: MemoryStore, rest: float = 0.0) -> AsyncGenerator[tuple[Lease, LeaseKeeper], None]:
    """A lease that is kept as a daemon does it, with a lifetime of a day, and its keeper.

    :param rest: seconds in which the watch is not looked at, after each time that it was.
    """
    lease = await store.acquire(network(24 * HOUR), attrs.evolve(REQUEST, data=DATA))
    keeping = await keeper(store, lease, 24 * HOUR)

    async def watch() -> None:
        async for snapshot in store.watch():
            keeping.look(snapshot)
            await asyncio.sleep(rest)

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(watch()), tasks.create_task(keeping.run())]
        await asyncio.sleep(0.1)
        yield lease, keeping
        for task in running:
            assert not task.done()
            task.cancel()


@pytest.mark.parametrize(
    "changes",
    [
        {"public_ipv4": IPv4Address("192.0.2.66")},
        {"public_ipv4": None, "public_ipv6": IPv6Address("2001:db8::66")},
        {"data": attrs.evolve(DATA, ipv4={"VNI": 1, "VtepMAC": "02:00:00:00:00:66"})},
        {"data": LeaseData("udp")},
        {"reserved": True},
    ],
    ids="+".join,
)
async def test_a_record_that_was_edited_and_can_be_read_is_written_again_at_once(
    caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    store = MemoryStore()
    async with kept(store) as (lease, keeping):
        edited = await edit(store, lease, **changes)
        await asyncio.sleep(0.1)
        (found,) = (await store.leases()).leases
        assert found == as_read(lease) != edited
        assert found.ttl == pytest.approx(24 * HOUR, abs=1)
        assert found.version == keeping.lease.version
        await asyncio.sleep(HOUR)
        assert (await store.leases()).leases[0].version == found.version, "once is enough"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message == "lease record altered"
    assert cast("Any", record).fields["altered"] == list(changes)


async def test_so_is_one_that_lost_its_lifetime(caplog: pytest.LogCaptureFixture) -> None:
    """As `etcdctl put` does it with what `etcdctl get` has told: it would stay for ever if the node died."""
    store = MemoryStore()
    async with kept(store) as (lease, keeping):
        for _ in range(2):
            await edit(store, lease, lifetime=math.inf)
            await asyncio.sleep(1.1)
            (found,) = (await store.leases()).leases
            assert found.ttl == pytest.approx(24 * HOUR, abs=2)
        await asyncio.sleep(HOUR)
        assert (await store.leases()).leases[0].version == found.version == keeping.lease.version
    told = [cast("Any", record).fields["altered"] for record in caplog.records]
    assert told == [["ttl"], ["ttl"]]


class Endless(MemoryTable):
    """A table that has no lifetimes."""

    async def create(self, key: str, value: bytes, ttl: float = math.inf) -> Record | None:
        return await super().create(key, value)

    async def replace(self, record: Record, value: bytes, ttl: float = math.inf) -> Record | None:
        written = await super().replace(record, value)
        await asyncio.sleep(0.1)  # the watch is quicker than the answer
        return written


class EndlessStore(MemoryStore):
    def make_table(self) -> MemoryTable:
        return Endless()


async def test_where_there_are_no_lifetimes_none_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    store = EndlessStore()
    async with kept(store) as (lease, keeping):
        assert (await store.leases()).leases[0].ttl == math.inf
        keeping.publish(fake_underlay("192.0.2.77"))
        await asyncio.sleep(HOUR)
        assert int((await store.leases()).leases[0].version) == int(lease.version) + 1
    assert caplog.records == []


async def test_so_is_one_that_could_not_be_written_as_it_was_edited() -> None:
    """Numbers are longer when they are written again; all that one record may hold would be too much then."""
    store = MemoryStore()
    async with kept(store) as (lease, _):
        record = await store.table.get(lease_key(lease.subnets))
        assert record is not None
        own = b'"Overlaynet":{"Node":"a","Run":"1"}'
        edited = b'{"PublicIP":"192.0.2.66","BackendData":[' + b",".join([b"1e15"] * 12_000) + b"]," + own + b"}"
        assert await store.table.replace(record, edited) is not None
        assert (await store.leases()).malformed == ()
        await asyncio.sleep(0.1)
        assert (await store.leases()).leases == (as_read(lease),)


async def test_who_edits_the_record_all_the_time_is_answered_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    async with kept(store) as (lease, keeping):
        before = int(keeping.lease.version)
        for number in range(1000):
            await edit(store, lease, public_ipv4=IPv4Address(f"192.0.2.{66 + number % 2}"))
            await asyncio.sleep(0.01)
        await asyncio.sleep(2)
        assert 9 <= int(keeping.lease.version) - before - 1000 <= 13
        assert (await store.leases()).leases == (as_read(lease),)
    told = [record for record in caplog.records if record.message == "lease record altered"]
    assert 9 <= len(told) <= 12


async def test_the_same_edit_once_more_is_seen_although_nobody_saw_the_record_put_right_in_between() -> None:
    store = MemoryStore()
    async with kept(store, rest=0.5) as (lease, _):
        await asyncio.sleep(1)
        for _ in range(2):
            edited = await edit(store, lease, public_ipv4=IPv4Address("192.0.2.66"))
            await asyncio.sleep(0.2)
        assert (await store.leases()).leases == (as_read(edited),)
        await asyncio.sleep(2)
        assert (await store.leases()).leases == (as_read(lease),)


async def test_what_is_edited_while_the_store_writes_nothing_is_written_again_later() -> None:
    store = Failing()
    async with kept(store) as (lease, _):
        store.reachable = False
        await edit(store, lease, public_ipv4=IPv4Address("192.0.2.66"))
        await asyncio.sleep(600)
        assert 5 < len(store.tries) < 25, "with growing pauses"
        store.reachable = True
        await asyncio.sleep(73)  # the longest pause, 60 s and a fifth, and a moment
        assert (await store.leases()).leases == (as_read(lease),)


class SlowAnswers(Failing):
    """Renews at once, and says so ten seconds later."""

    async def renew(self, network: Network, lease: Lease) -> Lease:
        renewed = await super().renew(network, lease)
        await asyncio.sleep(10)
        return renewed


async def test_a_write_of_its_own_is_not_taken_for_an_edit(caplog: pytest.LogCaptureFixture) -> None:
    """Not while the answer is under way, not when an older snapshot comes after it, nor if the store says it is reserved."""
    store = SlowAnswers()
    async with kept(store) as (lease, keeping):
        before = await store.leases()
        await store.reserve(Reservation(lease.subnets, node="a"))
        keeping.publish(fake_underlay("192.0.2.77"))
        await asyncio.sleep(5)
        (found,) = (await store.leases()).leases
        assert (found.public_ipv4, found.reserved) == (IPv4Address("192.0.2.77"), True)
        assert keeping.lease == lease, "no answer yet"
        await asyncio.sleep(10)
        keeping.look(before)
        await asyncio.sleep(HOUR)
        assert len(store.tries) == 1
        assert (await store.leases()).leases == (as_read(keeping.lease),) != before.leases
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_an_edit_while_the_answer_to_a_write_is_under_way_is_mended_after_it() -> None:
    store = SlowAnswers()
    async with kept(store) as (lease, keeping):
        keeping.publish(fake_underlay("192.0.2.77"))
        await asyncio.sleep(5)
        await edit(store, lease, public_ipv4=IPv4Address("192.0.2.66"))
        await asyncio.sleep(30)
        assert (await store.leases()).leases[0].public_ipv4 == IPv4Address("192.0.2.77")
        assert len(store.tries) == 2


async def test_an_edit_that_names_another_process_of_this_node_is_not_fought() -> None:
    store = MemoryStore()
    lease = await store.acquire(network(60), REQUEST)
    keeping = await keeper(store, lease, 60)
    edited = await edit(store, lease, run="2", public_ipv4=IPv4Address("192.0.2.66"))
    keeping.look(await store.leases())
    with pytest.raises(IdentityTaken):
        await keeping.run()
    assert (await store.leases()).leases == (edited,)


# A host that sleeps


def loop() -> VirtualClockLoop:
    running = asyncio.get_running_loop()
    assert isinstance(running, VirtualClockLoop)
    return running


async def test_a_lease_that_ended_while_the_host_slept_is_known_to_have_and_renewed_on_waking() -> None:
    store, changes = MemoryStore(), []
    lease = await store.acquire(network(HOUR), REQUEST)
    keeping = await keeper(store, lease, HOUR, changed=lambda: changes.append(keeping.expired))
    task = asyncio.create_task(keeping.run())
    await asyncio.sleep(1)
    loop().suspend(2 * HOUR)
    assert keeping.expired
    await asyncio.sleep(0.01)
    assert changes == [True, False], "it is told that it is over, and that it was renewed"
    assert keeping.deadline == pytest.approx(boot_clock.now() + HOUR, abs=1)
    task.cancel()
    await asyncio.wait({task})


async def test_a_renewal_that_was_due_while_the_host_slept_is_made_on_waking() -> None:
    store = MemoryStore()
    lease = await store.acquire(network(24 * HOUR), REQUEST)
    keeping = await keeper(store, lease, 24 * HOUR)
    task = asyncio.create_task(keeping.run())
    await asyncio.sleep(1)
    loop().suspend(23.5 * HOUR)
    assert not keeping.expired
    await asyncio.sleep(0.01)
    assert (await store.leases()).leases[0].version != lease.version
    task.cancel()
    await asyncio.wait({task})


def claimed(lease: Lease) -> "asyncio.Future[Lease]":
    claim = asyncio.get_running_loop().create_future()
    claim.set_result(lease)
    return claim


async def test_a_store_that_hangs_does_not_keep_a_node_from_stopping(caplog: pytest.LogCaptureFixture) -> None:
    class Hanging(MemoryStore):
        async def release(self, lease: Lease) -> None:
            await asyncio.Event().wait()

    store = Hanging()
    lease = await store.acquire(network(60), REQUEST)
    async with asyncio.timeout(RELEASE_TIMEOUT + 1):
        await release(store, claimed(lease))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message == "lease not released"


async def test_a_release_is_tried_again_while_there_is_time(caplog: pytest.LogCaptureFixture) -> None:
    class Late(MemoryStore):
        async def release(self, lease: Lease) -> None:
            if asyncio.get_running_loop().time() < begun + back_after:
                raise StoreUnavailable("no leader")
            await super().release(lease)

    store = Late()
    lease = await store.acquire(network(60), REQUEST)
    begun, back_after = asyncio.get_running_loop().time(), 100
    await release(store, claimed(lease))
    assert [record.getMessage() for record in caplog.records] == ["lease not released"]
    assert cast("Any", caplog.records[0]).fields["reason"] == "no leader"
    begun, back_after = asyncio.get_running_loop().time(), 5
    await release(store, claimed(lease))
    assert (await store.leases()).leases == ()
