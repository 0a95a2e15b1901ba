"""Keeping a lease: when it is renewed, and what is done about what goes wrong."""

import asyncio
import logging
from ipaddress import IPv4Address, IPv6Address

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlaynet.errors import IdentityTaken, LeaseLost
from overlaynet.health import Health
from overlaynet.lease_keeping import LeaseKeeper, release, renewal_margin
from overlaynet.model import Lease, LeaseRequest, Reservation
from overlaynet.network import DEFAULT_LEASE_TTL, MINIMUM_LEASE_TTL, Network, parse
from overlaynet.plugins import Plugins
from overlaynet.stores.memory import MemoryStore
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


async def keeper(store: MemoryStore, lease: Lease, ttl: float, minutes: int = 60) -> LeaseKeeper:
    plugins = Plugins()
    return LeaseKeeper(
        store,
        network(ttl),
        lease,
        deadline=asyncio.get_running_loop().time() + ttl,
        margin=renewal_margin(ttl, minutes),
        health=Health(plugins),
        plugins=plugins,
        changed=lambda: None,
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


async def test_a_store_that_hangs_does_not_keep_a_node_from_stopping(caplog: pytest.LogCaptureFixture) -> None:
    class Hanging(MemoryStore):
        async def release(self, lease: Lease) -> None:
            await asyncio.Event().wait()

    store = Hanging()
    lease = await store.acquire(network(60), REQUEST)
    async with asyncio.timeout(6):
        await release(store, lease)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message == "lease not released"
