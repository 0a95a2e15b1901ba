"""etcd whose history is not what it was: wiped, restored from an older copy, compacted at every moment."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from overlaynet import network
from overlaynet.errors import LeaseLost, OverlaynetError
from overlaynet.model import LeaseRequest, Subnets
from overlaynet.stores._etcd_settings import Timeouts
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.relay import Relay
from overlaynet.testing.tables import until

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
NETWORK = network.parse('{"Network": "10.244.0.0/16"}')
SUBNET = Subnets(ipv4=IPv4Network("10.244.7.0/24"))

MakeStore = Callable[[str], EtcdStore]

_numbers = itertools.count()


class HastyStore(EtcdStore):
    timeouts = Timeouts(connect=1.0, answer=2.0, silence=1.0, patience=10.0)


@pytest.fixture(scope="module")
def shared() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    """An etcd of the test's own: its first write always has the same revision."""
    with EtcdServer() as server:
        yield server


@pytest.fixture
async def make_store() -> AsyncIterator[MakeStore]:
    made: list[EtcdStore] = []
    prefix = f"/test{next(_numbers)}"

    def make_store(endpoint: str) -> EtcdStore:
        made.append(HastyStore(EtcdOptions(endpoints=(endpoint,), prefix=prefix)))
        return made[-1]

    yield make_store
    for store in made:
        await store.aclose()


def request(node: str, previous: Subnets | None = None) -> LeaseRequest:
    return LeaseRequest(node=node, run="1", public_ipv4=IPv4Address("192.0.2.1"), previous=previous)


def overtake(etcd: EtcdServer, revision: int) -> None:
    """Let others write until etcd is far beyond a revision."""
    while int(etcd.post("/v3/kv/put", {"key": "b3RoZXJz", "value": ""})["header"]["revision"]) < revision + 20:
        pass


def revision(etcd: EtcdServer) -> int:
    return int(etcd.post("/v3/kv/range", {"key": "AA=="})["header"]["revision"])


# Wiped and restored


async def test_a_renewal_never_writes_over_a_lease_that_was_claimed_in_a_wiped_etcd(
    etcd: EtcdServer, make_store: MakeStore
) -> None:
    """In an etcd that begins anew, another node's record can have the very revision that ours had in the old one."""
    former, later = make_store(etcd.endpoint), make_store(etcd.endpoint)
    lost = await former.acquire(NETWORK, request("former", SUBNET))
    before = revision(etcd)
    etcd.kill()
    etcd.wipe()
    etcd.start()
    held = await later.acquire(NETWORK, request("later", SUBNET))
    assert revision(etcd) == before
    assert held.subnets == lost.subnets
    with pytest.raises(LeaseLost, match="was taken by node later"):
        await former.renew(NETWORK, lost)
    await former.release(lost)
    assert [lease.node for lease in (await later.leases()).leases] == ["later"]
    await later.renew(NETWORK, held)


async def test_a_node_takes_its_subnet_back_in_a_wiped_etcd(etcd: EtcdServer, make_store: MakeStore) -> None:
    store = make_store(etcd.endpoint)
    lease = await store.acquire(NETWORK, request("a"))
    etcd.kill()
    etcd.wipe()
    etcd.start()
    renewed = await store.renew(NETWORK, lease)
    assert renewed.subnets == lease.subnets
    assert [found.node for found in (await store.leases()).leases] == ["a"]


@pytest.mark.parametrize("fate", ["wiped", "wiped and overtaken", "restored", "restored and overtaken"])
@pytest.mark.parametrize("seen", ["a listing", "a record", "an eternal record", "a deletion"])
async def test_a_watch_sees_that_etcd_has_another_history(
    etcd: EtcdServer, make_store: MakeStore, tmp_path: Path, seen: str, fate: str
) -> None:
    """Whatever it has seen last, and even if the revision is beyond the one that it has seen."""
    overtaken = "overtaken" in fate
    async with Relay("127.0.0.1", etcd.port) as relay:
        writer, reader = make_store(etcd.endpoint).table, make_store(f"http://127.0.0.1:{relay.port}").table
        former = await writer.create("subnets/former", b"", 600.0)
        assert former is not None
        assert await writer.create("subnets/second", b"", 600.0) is not None
        etcd.stop()
        etcd.back_up(tmp_path / "backup")
        etcd.start()
        assert await writer.delete(former)
        third = await writer.create("subnets/third", b"", 600.0)
        assert third is not None
        expected = {"subnets/second", "subnets/third"}
        async with aclosing(reader.watch("subnets/")) as listings:
            await until(listings, lambda listing: set(listing) == expected)
            if seen == "a record":
                await writer.create("subnets/fourth", b"", 600.0)
                await until(listings, lambda listing: "subnets/fourth" in listing)
            elif seen == "an eternal record":
                await writer.create("subnets/fourth", b"")
                await until(listings, lambda listing: "subnets/fourth" in listing)
            elif seen == "a deletion":
                await writer.delete(third)
                await until(listings, lambda listing: "subnets/third" not in listing)
            before = revision(etcd)
            await relay.refuse()
            etcd.kill()
            if "restored" in fate:
                etcd.restore(tmp_path / "backup")
            else:
                etcd.wipe()
            etcd.start()
            if overtaken:
                overtake(etcd, before)
            assert (revision(etcd) > before) == overtaken
            await relay.accept()
            now = {"subnets/former", "subnets/second"} if "restored" in fate else set()
            await until(listings, lambda listing: set(listing) == now)
            await writer.create("subnets/later", b"", 600.0)
            await until(listings, lambda listing: set(listing) == {*now, "subnets/later"})


async def test_a_watch_is_not_deceived_by_a_record_that_was_written_again_at_its_revision(
    etcd: EtcdServer, make_store: MakeStore
) -> None:
    """A script that prepares an etcd writes the same into a wiped one, at the same revisions."""
    async with Relay("127.0.0.1", etcd.port) as relay:
        writer, reader = make_store(etcd.endpoint).table, make_store(f"http://127.0.0.1:{relay.port}").table
        async with aclosing(reader.watch("subnets/")) as listings:
            await until(listings, lambda listing: not listing)
            await writer.create("subnets/former", b"", 600.0)
            prepared = await writer.create("subnets/prepared", b"")
            assert prepared is not None
            await until(listings, lambda listing: len(listing) == 2)
            await relay.refuse()
            etcd.kill()
            etcd.wipe()
            etcd.start()
            await writer.create("subnets/later", b"", 600.0)
            again = await writer.create("subnets/prepared", b"")
            assert again is not None
            assert again.version == prepared.version
            await relay.accept()
            assert set(await until(listings, lambda listing: "subnets/later" in listing)) == {
                "subnets/later",
                "subnets/prepared",
            }


# Compacted


def compact(etcd: EtcdServer) -> None:
    """Drop all history up to now, of all keys."""
    with contextlib.suppress(OverlaynetError):  # nothing was written since the last time
        etcd.post("/v3/kv/compaction", {"revision": revision(etcd), "physical": True})


async def test_a_lease_is_renewed_and_released_although_its_revision_is_compacted(
    shared: EtcdServer, make_store: MakeStore
) -> None:
    store = make_store(shared.endpoint)
    lease = await store.acquire(NETWORK, request("a"))
    for _ in range(3):
        overtake(shared, revision(shared))
        compact(shared)
        (found,) = (await store.leases()).leases
        assert (found.version, found.subnets) == (lease.version, lease.subnets)
        lease = await store.renew(NETWORK, lease)
    compact(shared)
    await store.release(lease)
    assert (await store.leases()).leases == ()


async def test_compaction_at_every_moment_loses_neither_a_lease_nor_a_change(
    shared: EtcdServer, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a pause, while nodes claim and renew, and while their watches break and are resumed."""
    caplog.set_level(logging.INFO, "overlaynet.stores")
    ended = asyncio.Event()

    async def compact_always() -> None:
        while not ended.is_set():
            await asyncio.to_thread(compact, shared)

    async def live(number: int, endpoint: str) -> str:
        store = make_store(endpoint)
        lease = first = await store.acquire(NETWORK, request(f"node{number}"))
        while not ended.is_set():
            lease = await store.renew(NETWORK, lease)
            assert lease.subnets == first.subnets
        return lease.version

    async with Relay("127.0.0.1", shared.port) as relay:
        watcher = make_store(f"http://127.0.0.1:{relay.port}")
        async with aclosing(watcher.table.watch("subnets/")) as listings, asyncio.timeout(PATIENCE):
            async with asyncio.TaskGroup() as tasks:
                nodes = [tasks.create_task(live(number, shared.endpoint)) for number in range(8)]
                tasks.create_task(compact_always())
                while caplog.messages.count("listing anew") < 3:
                    await anext(listings)
                    await asyncio.sleep(0.2)  # so that it has come to stand, and has something to go on from
                    await relay.cut()
                ended.set()
            versions = {node.result() for node in nodes}
            assert len(versions) == 8
            await until(listings, lambda listing: {record.version for record in listing.values()} == versions)
