"""The memory store; the laws that it shares with the others are in tests/conformance."""

import asyncio
from contextlib import aclosing

import pytest

from overlaynet.drivers import NoOptions
from overlaynet.errors import StoreUnavailable
from overlaynet.model import LeaseRequest
from overlaynet.network import parse
from overlaynet.plugins import Plugins
from overlaynet.stores.memory import MemoryStore, MemoryTable

pytestmark = pytest.mark.anyio

NETWORK = parse('{"Network": "10.244.0.0/16", "LeaseTTL": 60}')


def test_it_is_found_by_its_name() -> None:
    assert Plugins().driver("store", "memory") is MemoryStore


def test_it_says_where_it_is() -> None:
    assert str(MemoryStore(NoOptions())) == "memory of this process"


async def test_stores_share_the_table_they_are_given() -> None:
    table = MemoryTable()
    first, second = MemoryStore(table=table), MemoryStore(table=table)
    lease = await first.acquire(NETWORK, LeaseRequest("a", "1"))
    assert (await second.leases()).leases == (lease,)


async def test_a_store_without_a_table_has_its_own() -> None:
    first, second = MemoryStore(), MemoryStore()
    assert await first.create_network("{}")
    assert await second.read_network() is None


async def test_closing_a_store_leaves_the_table_open_for_the_others() -> None:
    table = MemoryTable()
    first, second = MemoryStore(table=table), MemoryStore(table=table)
    async with (
        aclosing(first.watch()) as ending,
        aclosing(second.watch()) as going_on,
        aclosing(table.watch("")) as own,
    ):
        for watch in (ending, going_on, own):
            await anext(watch)
        await first.aclose()
        with pytest.raises(StoreUnavailable, match="the watch of memory of this process ended"):
            await anext(ending)
        lease = await second.acquire(NETWORK, LeaseRequest("a", "1"))
        assert (await anext(going_on)).leases == (lease,)
        assert len(await anext(own)) == 1


async def test_leases_expire_by_the_clock_of_the_loop() -> None:
    store = MemoryStore()
    lease = await store.acquire(NETWORK, LeaseRequest("a", "1"))
    loop = asyncio.get_running_loop()
    async with aclosing(store.watch()) as snapshots:
        assert (await anext(snapshots)).leases == (lease,)
        granted = loop.time()
        assert (await anext(snapshots)).leases == ()
        assert loop.time() - granted == pytest.approx(60)


async def test_expired_records_take_no_memory() -> None:
    table = MemoryTable()
    for number in range(1000):
        await table.create(f"subnets/{number}", b"", 1)
        await asyncio.sleep(1)
        await table.list("")
    assert len(table._content.entries) <= 1


async def test_watches_that_ended_are_forgotten() -> None:
    table = MemoryTable()
    for _ in range(10):
        async with aclosing(table.watch("")) as listings:
            await anext(listings)
    assert not table._content.watchers
