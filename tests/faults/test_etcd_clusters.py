"""Three etcd members: lost and returned in every order, hung, cut off, and with another leader at any moment."""

import asyncio
import contextlib
import functools
import itertools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from ipaddress import IPv4Address
from typing import Any, TypeVar

import attrs
import pytest

from overlaynet import network
from overlaynet.errors import OverlaynetError, StoreUnavailable
from overlaynet.lease_keeping import release
from overlaynet.model import Lease, LeaseRequest
from overlaynet.stores._etcd_settings import Timeouts
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.table import Record, Table
from overlaynet.testing.etcd import EtcdCluster, EtcdServer
from overlaynet.testing.tables import until

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
NETWORK = network.parse('{"Network": "10.244.0.0/16"}')

T = TypeVar("T")
MakeStore = Callable[[Sequence[EtcdServer]], EtcdStore]

_numbers = itertools.count()


class HastyStore(EtcdStore):
    timeouts = Timeouts(connect=1.0, answer=1.0, silence=1.0, patience=20.0)


@pytest.fixture(scope="module")
def cluster_of_all() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(cluster_of_all: EtcdCluster) -> Iterator[EtcdCluster]:
    """A cluster that is whole again after the test."""
    yield cluster_of_all
    for member in cluster_of_all.members:
        if member.pid is None:
            member.start()
        member.resume()


@pytest.fixture
async def make_store() -> AsyncIterator[MakeStore]:
    made: list[EtcdStore] = []
    prefix = f"/test{next(_numbers)}"

    def make_store(members: Sequence[EtcdServer]) -> EtcdStore:
        endpoints = tuple(member.endpoint for member in members)
        made.append(HastyStore(EtcdOptions(endpoints=endpoints, prefix=prefix)))
        return made[-1]

    yield make_store
    for store in made:
        await store.aclose()


async def served(request: Callable[[], Awaitable[T]]) -> T:
    """Ask as the daemon does: again, as long as etcd does not serve."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(StoreUnavailable):
                return await request()
            await asyncio.sleep(0.05)


async def create(table: Table, key: str) -> Record:
    async def request() -> Record:
        record = await table.create(key, b"", 600.0) or await table.get(key)
        assert record is not None
        return record

    return await served(request)


@pytest.mark.parametrize("returned", ["the first lost returns first", "the last lost returns first"])
@pytest.mark.parametrize("lost", list(itertools.permutations(range(3), 2)), ids=str)
async def test_members_are_lost_and_return_in_any_order(
    cluster: EtcdCluster, make_store: MakeStore, lost: tuple[int, int], returned: str
) -> None:
    """Two of three serve, one does not; nothing that was written is lost, and the watch goes on."""
    first, second = (cluster.members[number] for number in lost)
    (third,) = (member for member in cluster.members if member not in (first, second))
    table = make_store([first, second, third]).table
    keys = {"subnets/before"}
    async with aclosing(table.watch("subnets/")) as listings:
        await create(table, "subnets/before")
        await until(listings, lambda listing: set(listing) == keys)

        async def check_serves(when: str) -> None:
            await create(table, f"subnets/{when}")
            keys.add(f"subnets/{when}")
            assert set(await until(listings, lambda listing: f"subnets/{when}" in listing)) == keys

        first.kill()
        await check_serves("one lost")
        second.kill()
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await table.create("subnets/nobody", b"", 600.0)
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await table.get("subnets/before")
        back, last = (first, second) if returned.startswith("the first") else (second, first)
        await asyncio.to_thread(back.start)
        await check_serves("one back")
        await asyncio.to_thread(last.start)
        third.kill()
        await check_serves("another lost")
        await asyncio.to_thread(third.start)
        await check_serves("all back")
        assert set(await table.list("subnets/")) == keys


async def test_a_hung_leader_is_passed_over(cluster: EtcdCluster, make_store: MakeStore) -> None:
    leader = cluster.leader
    followers = [member for member in cluster.members if member is not leader]
    store = make_store([leader, *followers])
    async with aclosing(store.table.watch("subnets/")) as listings:
        before = await create(store.table, "subnets/before")
        await until(listings, bool)
        leader.pause()
        await create(store.table, "subnets/after")
        await until(listings, lambda listing: "subnets/after" in listing)
        # It takes itself for the leader still, and holds what it knew then; soon it knows better, and for a moment of none.
        leader.resume()
        former = make_store([leader]).table
        found = await served(lambda: former.list("subnets/"))
        assert set(found) == {"subnets/before", "subnets/after"}
        assert await former.get("subnets/before") == before


async def test_a_hung_member_that_holds_the_watch_is_left_soon_enough_with_the_time_limits_of_the_daemon(
    cluster: EtcdCluster, make_store: MakeStore
) -> None:
    """It keeps the connection, and says nothing, as on a quiet network."""
    limits = EtcdStore.timeouts
    assert limits.silence + limits.answer <= 15.0
    leader = await asyncio.to_thread(lambda: cluster.leader)
    hung, *others = sorted(cluster.members, key=lambda member: member is leader)
    writer = make_store(others).table
    endpoints = tuple(member.endpoint for member in (hung, *others))
    store = EtcdStore(EtcdOptions(endpoints=endpoints, prefix=make_store(others).options.prefix))
    try:
        async with aclosing(store.table.watch("subnets/")) as listings:
            await until(listings, lambda listing: not listing)
            await create(writer, "subnets/before")
            await until(listings, bool)  # so the watch stands
            hung.pause()
            await create(writer, "subnets/after")
            await until(listings, lambda listing: "subnets/after" in listing)
            # What is asked next does not have to find out once more.
            assert await store.table.get("subnets/after") is not None
    finally:
        await store.aclose()


async def test_a_stop_gives_the_lease_back_although_the_first_member_hangs(
    cluster: EtcdCluster,
) -> None:
    """With the time limits that the daemon has, not those of these tests."""
    hung, *others = cluster.members
    options = EtcdOptions(endpoints=tuple(member.endpoint for member in cluster.members), prefix="/stop")
    store = EtcdStore(options)
    try:
        claim = asyncio.ensure_future(store.acquire(NETWORK, LeaseRequest("a", "1", IPv4Address("192.0.2.1"))))
        await claim
        hung.pause()
        await release(store, claim)
        found = EtcdStore(attrs.evolve(options, endpoints=tuple(member.endpoint for member in others)))
        try:
            assert (await served(found.leases)).leases == ()
        finally:
            await found.aclose()
    finally:
        await store.aclose()


async def change_leader(cluster: EtcdCluster, how: str) -> None:
    leader = await asyncio.to_thread(lambda: cluster.leader)
    if how == "kill":
        leader.kill()
        assert await asyncio.to_thread(lambda: cluster.leader) is not leader
        await asyncio.to_thread(leader.start)
    elif how == "hang":
        leader.pause()
        await asyncio.sleep(1.0)  # an election takes half of it
        leader.resume()
    else:
        target = random.choice([member for member in cluster.members if member is not leader])
        status = await asyncio.to_thread(target.post, "/v3/maintenance/status", {})
        with contextlib.suppress(OverlaynetError):  # there may be another leader by now
            await asyncio.to_thread(
                leader.post, "/v3/maintenance/transfer-leadership", {"targetID": status["header"]["member_id"]}
            )


async def test_the_leader_changes_in_the_middle_of_claims_renewals_and_watches(
    cluster: EtcdCluster, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    """What is refused meanwhile is tried again, as the daemon does; no lease is lost, moved or held twice."""
    caplog.set_level(logging.DEBUG, "overlaynet.stores")
    ended = asyncio.Event()
    renewals = 0

    async def again(call: Callable[[], Any]) -> Lease:
        while True:
            with contextlib.suppress(StoreUnavailable):
                lease: Lease = await call()
                return lease
            await asyncio.sleep(0.02)

    async def live(number: int) -> Lease:
        nonlocal renewals
        members = cluster.members[number % 3 :] + cluster.members[: number % 3]
        store = make_store(members)
        request = LeaseRequest(f"node{number}", "1", IPv4Address("192.0.2.0") + number)
        await asyncio.sleep(number * 0.4)  # there is a claim at each moment
        lease = await again(lambda: store.acquire(NETWORK, request))
        first = lease
        while not ended.is_set():
            lease = await again(functools.partial(store.renew, NETWORK, lease))
            renewals += 1
            assert lease.subnets == first.subnets
        return lease

    watcher = make_store(cluster.members)
    async with aclosing(watcher.watch()) as snapshots, asyncio.timeout(4 * PATIENCE):
        async with asyncio.TaskGroup() as tasks:
            nodes = [tasks.create_task(live(number)) for number in range(12)]
            for how in ("move", "kill", "move", "hang", "move", "kill", "move"):
                await change_leader(cluster, how)
                await asyncio.sleep(0.2)
            ended.set()
        leases = [node.result() for node in nodes]
        truth = {lease.node: lease.version for lease in leases}
        async for snapshot in snapshots:
            if {lease.node: lease.version for lease in snapshot.leases} == truth:
                break
    for one, other in itertools.combinations(leases, 2):
        assert not one.subnets.overlaps(other.subnets)
    assert caplog.messages.count("endpoint passed over") > 3, "no request was under way when the leader changed"
    assert caplog.messages.count("watch broke") > 0
    assert renewals > 100


async def test_a_change_of_leader_never_ends_a_lease_early(cluster: EtcdCluster, make_store: MakeStore) -> None:
    """etcd's new leader counts every lifetime from its beginning: the record may live longer, never shorter."""
    table, ttl = make_store(cluster.members).table, 4.0
    loop = asyncio.get_running_loop()
    async with aclosing(table.watch("subnets/")) as listings:
        asked = loop.time()
        assert await table.create("subnets/a", b"", ttl) is not None
        await until(listings, bool)
        await change_leader(cluster, "kill")
        await until(listings, lambda listing: not listing)
        assert loop.time() >= asked + ttl
