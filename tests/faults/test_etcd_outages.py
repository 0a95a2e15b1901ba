"""etcd dies, hangs, forgets and comes back: what the store does meanwhile, and that it recovers."""

import asyncio
import base64
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network

import attrs
import pytest

from overlaynet import network
from overlaynet.errors import LeaseLost, StoreUnavailable, SubnetsExhausted
from overlaynet.model import LeaseRequest, Subnets
from overlaynet.stores._etcd_settings import Timeouts
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.table import Record, Table
from overlaynet.testing.etcd import EtcdCluster, EtcdServer
from overlaynet.testing.relay import Relay
from overlaynet.testing.tables import until

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
NETWORK = network.parse('{"Network": "10.244.0.0/16"}')
DEAD = "http://127.0.0.1:9"

Listing = Mapping[str, Record]
OpenStore = Callable[..., EtcdStore]
OpenTable = Callable[..., Table]

_numbers = itertools.count()


class HastyStore(EtcdStore):
    """Gives up sooner, so that the tests do."""

    timeouts = Timeouts(connect=1.0, answer=1.0, silence=1.0, patience=10.0)


class ImpatientStore(EtcdStore):
    timeouts = Timeouts(connect=1.0, answer=1.0, silence=1.0, patience=1.0, stay=2.0)


class AttentiveStore(EtcdStore):
    timeouts = Timeouts(connect=1.0, answer=1.0, silence=0.3, patience=1.0, stay=600.0)


class StrictStore(EtcdStore):
    timeouts = Timeouts(connect=1.0, answer=1.0, whole=2.0, silence=1.0, patience=10.0)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
async def open_store() -> AsyncIterator[OpenStore]:
    opened: list[EtcdStore] = []
    prefix = f"/test{next(_numbers)}"

    def open_store(*endpoints: str, store: type[EtcdStore] = HastyStore) -> EtcdStore:
        opened.append(store(EtcdOptions(endpoints=endpoints, prefix=prefix)))
        return opened[-1]

    yield open_store
    for store in opened:
        await store.aclose()


@pytest.fixture
def open_table(open_store: OpenStore) -> OpenTable:
    return lambda *endpoints, **named: open_store(*endpoints, **named).table


def prefix(store: EtcdStore) -> str:
    prefix: str = store.options.prefix
    return prefix


def request(node: str) -> LeaseRequest:
    return LeaseRequest(node=node, run="1", public_ipv4=IPv4Address("192.0.2.1"))


async def create(table: Table, key: str, value: bytes = b"") -> Record:
    """Write as the daemon does: with a lifetime, and again, as long as etcd is not there."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                record = await table.create(key, value, 600.0) or await table.get(key)
            except StoreUnavailable:
                await asyncio.sleep(0.1)
                continue
            assert record is not None
            return record


def requests(relay: Relay, path: str) -> int:
    return relay.received.count(b"POST /v3/%s " % path.encode())


def listings_asked_for(relay: Relay) -> int:
    """Not counted is the look at one key which tells whether a watch can go on."""
    return relay.received.count(b'"range_end"') - requests(relay, "watch")


def url(relay: Relay) -> str:
    return f"http://127.0.0.1:{relay.port}"


async def test_a_watch_resumes_after_etcd_was_killed_and_restarted(open_table: OpenTable) -> None:
    with EtcdServer() as etcd:
        async with Relay("127.0.0.1", etcd.port) as relay:
            writer, reader = open_table(etcd.endpoint), open_table(url(relay))
            async with aclosing(reader.watch("subnets/")) as listings:
                await until(listings, lambda listing: not listing)
                await create(writer, "subnets/before")
                await until(listings, lambda listing: "subnets/before" in listing)
                await asyncio.to_thread(etcd.kill)
                await asyncio.to_thread(etcd.start)
                await create(writer, "subnets/after")
                assert set(await until(listings, lambda listing: "subnets/after" in listing)) == {
                    "subnets/before",
                    "subnets/after",
                }
            assert listings_asked_for(relay) == 1, "it listed again instead of resuming"
            assert requests(relay, "watch") >= 2


async def test_a_watch_whose_gap_was_compacted_lists_anew(
    etcd: EtcdServer, open_table: OpenTable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Relay("127.0.0.1", etcd.port) as relay:
        writer, reader = open_table(etcd.endpoint), open_table(url(relay))
        gone = await create(writer, "subnets/gone")
        async with aclosing(reader.watch("subnets/")) as listings:
            await until(listings, bool)
            changed = await create(writer, "subnets/changed", b"old")
            await until(listings, lambda listing: len(listing) == 2)
            await relay.refuse()
            assert await writer.delete(gone)
            assert await writer.replace(changed, b"new") is not None
            last = await create(writer, "subnets/new")
            etcd.post("/v3/kv/compaction", {"revision": last.version.partition("/")[0], "physical": True})
            await relay.accept()
            listing = await until(listings, lambda listing: "subnets/new" in listing)
            assert {key: record.value for key, record in listing.items()} == {
                "subnets/changed": b"new",
                "subnets/new": b"",
            }
            assert listings_asked_for(relay) == 2
            assert "listing anew" in caplog.messages
            await create(writer, "subnets/later")
            await until(listings, lambda listing: "subnets/later" in listing)


async def test_a_watch_catches_up_over_more_events_than_one_answer_holds(
    etcd: EtcdServer, open_table: OpenTable
) -> None:
    async with Relay("127.0.0.1", etcd.port, piece=997) as relay:
        writer, reader = open_table(etcd.endpoint), open_table(url(relay))
        async with aclosing(reader.watch("subnets/")) as listings:
            await until(listings, lambda listing: not listing)
            await create(writer, "subnets/first")
            await until(listings, bool)
            await relay.refuse()
            for batch in range(11):
                await asyncio.gather(*(create(writer, f"subnets/{batch * 100 + step}") for step in range(100)))
            await relay.accept()
            await until(listings, lambda listing: len(listing) >= 1000)
            await relay.cut()
            await until(listings, lambda listing: len(listing) == 1101)
        assert listings_asked_for(relay) == 1


async def test_an_etcd_that_lost_its_data_is_listed_anew(open_table: OpenTable) -> None:
    with EtcdServer() as etcd:
        table = open_table(etcd.endpoint)
        for step in range(5):
            await create(table, f"subnets/{step}")
        async with aclosing(table.watch("subnets/")) as listings:
            await until(listings, lambda listing: len(listing) == 5)
            etcd.close()
            with EtcdServer(port=etcd.port):
                await until(listings, lambda listing: not listing)
                await create(table, "subnets/new")
                assert set(await until(listings, bool)) == {"subnets/new"}


async def test_an_etcd_that_stays_away_ends_the_watch_and_a_new_one_works(open_table: OpenTable) -> None:
    with EtcdServer() as etcd:
        table = open_table(etcd.endpoint, store=ImpatientStore)
        async with aclosing(table.watch("subnets/")) as listings:
            await until(listings, lambda listing: not listing)
            await asyncio.to_thread(etcd.stop)
            with pytest.raises(StoreUnavailable) as caught:
                await until(listings, lambda listing: False)
        assert str(caught.value) == f"etcd at {etcd.endpoint} does not answer (connection refused)"
        with pytest.raises(StoreUnavailable, match="connection refused"):
            await anext(table.watch("subnets/"))
        with pytest.raises(StoreUnavailable, match="connection refused"):
            await table.create("subnets/a", b"")
        await asyncio.to_thread(etcd.start)
        await create(table, "subnets/a")
        async with aclosing(table.watch("subnets/")) as listings:
            assert set(await until(listings, bool)) == {"subnets/a"}


async def test_a_dead_first_endpoint_is_passed_over(etcd: EtcdServer, open_table: OpenTable) -> None:
    table = open_table(DEAD, etcd.endpoint)
    record = await table.create("subnets/a", b"", 60.0)
    assert record is not None
    assert await table.get("subnets/a") == record
    assert await table.ttl(record) > 0
    fresh = open_table(DEAD, etcd.endpoint)
    async with aclosing(fresh.watch("subnets/")) as listings:
        assert await until(listings, bool) == {"subnets/a": record}
        assert await table.delete(record)
        await until(listings, lambda listing: not listing)


async def test_every_endpoint_is_named_when_none_answers(etcd: EtcdServer, open_table: OpenTable) -> None:
    async with Relay("127.0.0.1", etcd.port) as relay:
        relay.hang()
        table = open_table(DEAD, url(relay))
        with pytest.raises(StoreUnavailable) as caught:
            await table.get("config")
        assert str(caught.value) == (
            f"etcd at {DEAD}, {url(relay)} does not answer ({DEAD}: connection refused; {url(relay)}: no answer in time)"
        )


async def test_a_hung_member_is_passed_over(open_table: OpenTable) -> None:
    with EtcdCluster() as cluster:
        hung, *others = sorted(cluster.members, key=lambda member: member is cluster.leader)
        table = open_table(hung.endpoint, *(member.endpoint for member in others))
        async with aclosing(table.watch("subnets/")) as listings:
            first = await create(table, "subnets/first")
            await until(listings, bool)
            assert await table.delete(first)
            await until(listings, lambda listing: not listing)  # so the watch stands, and nothing but silence follows
            hung.pause()
            # Whether it was written, nobody knows: it is not written elsewhere behind the caller's back.
            with pytest.raises(StoreUnavailable, match="no answer in time"):
                await table.create("subnets/a", b"")
            assert await table.get("subnets/a") is None
            assert await table.create("subnets/a", b"") is not None
            await until(listings, lambda listing: set(listing) == {"subnets/a"})

            # With a lifetime, the first request is one that may be repeated, and finds the members that answer.
            fresh = open_table(hung.endpoint, *(member.endpoint for member in others))
            assert await fresh.create("subnets/b", b"", 60.0) is not None
            await until(listings, lambda listing: set(listing) == {"subnets/a", "subnets/b"})


async def test_a_hung_etcd_is_watched_on_where_no_other_answers(
    etcd: EtcdServer, open_table: OpenTable, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nowhere to go: so nothing is opened or listed anew, and nothing said."""
    caplog.set_level(logging.DEBUG, "overlaynet.stores")
    async with Relay("127.0.0.1", etcd.port) as relay, Relay("127.0.0.1", etcd.port) as hung:
        hung.hang()
        writer = open_table(etcd.endpoint)
        table = open_table(url(relay), DEAD, url(hung), store=AttentiveStore)
        async with aclosing(table.watch("subnets/")) as listings:
            gone = await create(writer, "subnets/gone")
            await until(listings, bool)
            assert await writer.delete(gone)
            await until(listings, lambda listing: not listing)
            relay.hang()
            await create(writer, "subnets/new")
            async with asyncio.timeout(PATIENCE):
                while caplog.messages.count("watch stays where it is") < 2:
                    await asyncio.sleep(0.05)
            relay.flow()
            await until(listings, lambda listing: set(listing) == {"subnets/new"})
            # And is asked for a sign of life as before.
            answered = requests(relay, "kv/range")
            async with asyncio.timeout(PATIENCE):
                while requests(relay, "kv/range") < answered + 3:
                    await asyncio.sleep(0.05)
            assert (requests(relay, "watch"), listings_asked_for(relay)) == (1, 1)
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


async def test_an_etcd_that_hangs_for_long_ends_the_watch(etcd: EtcdServer, open_table: OpenTable) -> None:
    async with Relay("127.0.0.1", etcd.port) as relay:
        watch = open_table(url(relay), store=ImpatientStore).watch("subnets/")
        async with aclosing(watch) as listings:
            await until(listings, lambda listing: not listing)
            await create(open_table(etcd.endpoint), "subnets/a")
            await until(listings, bool)  # so the watch stands
            relay.hang()
            with pytest.raises(StoreUnavailable, match=r"does not answer \(no answer in time\)"):
                await until(listings, lambda listing: False)
            relay.flow()


async def test_a_slow_member_keeps_the_watch(etcd: EtcdServer, open_table: OpenTable) -> None:
    async with Relay("127.0.0.1", etcd.port, delay=0.5) as slow, Relay("127.0.0.1", etcd.port) as other:
        writer = open_table(etcd.endpoint)
        async with aclosing(open_table(url(slow), url(other), store=AttentiveStore).watch("subnets/")) as listings:
            await until(listings, lambda listing: not listing)
            async with asyncio.timeout(PATIENCE):
                while requests(slow, "kv/range") < 4:
                    await asyncio.sleep(0.05)
            await create(writer, "subnets/a")
            await until(listings, bool)
            assert (requests(slow, "watch"), listings_asked_for(slow)) == (1, 1)
        assert other.received == b""


async def test_a_slow_member_is_waited_for_and_one_that_is_too_slow_is_not(
    etcd: EtcdServer, open_table: OpenTable
) -> None:
    async with (
        Relay("127.0.0.1", etcd.port, delay=0.2) as slow,
        Relay("127.0.0.1", etcd.port, delay=5.0) as too_slow,
    ):
        table = open_table(url(slow), etcd.endpoint)
        record = await table.create("subnets/a", b"", 60.0)
        assert record is not None
        assert requests(slow, "kv/txn") == 1
        table = open_table(url(too_slow), etcd.endpoint)
        assert await table.get("subnets/a") == record
        assert requests(too_slow, "kv/range") == 1
        replaced = await table.replace(record, b"", 60.0)
        assert replaced is not None
        assert requests(too_slow, "kv/txn") == 0
        watch = open_table(url(too_slow), etcd.endpoint).watch("subnets/")
        async with aclosing(watch) as listings:
            assert await until(listings, bool) == {"subnets/a": replaced}


async def test_a_member_that_answers_byte_by_byte_is_given_up(etcd: EtcdServer, open_table: OpenTable) -> None:
    """No limit of the time between two bytes would ever end this."""
    async with Relay("127.0.0.1", etcd.port, piece=1, delay=0.1) as trickling:
        table = open_table(url(trickling), etcd.endpoint, store=StrictStore)
        async with aclosing(table.watch("subnets/")) as listings:
            with pytest.raises(StoreUnavailable) as caught:
                await table.create("subnets/a", b"", 60.0)
            assert str(caught.value) == (
                f"etcd at {url(trickling)}, {etcd.endpoint} is too slow: no whole answer within 2 s"
            )
            record = await table.create("subnets/b", b"", 60.0)
            assert record is not None
            assert await until(listings, lambda listing: "subnets/b" in listing) == {"subnets/b": record}


async def test_a_partition_that_heals_leaves_one_owner(etcd: EtcdServer, open_store: OpenStore) -> None:
    """Nothing is passed on in either direction, and no connection breaks: as when a switch loses its packets."""
    async with Relay("127.0.0.1", etcd.port) as relay:
        other, cut_off, unlucky = open_store(etcd.endpoint), open_store(url(relay)), open_store(url(relay))
        short = attrs.evolve(NETWORK, lease_ttl=2)
        kept = await cut_off.acquire(NETWORK, request("kept"))
        lost = await unlucky.acquire(short, request("lost"))
        async with aclosing(cut_off.watch()) as behind, aclosing(other.watch()) as ahead:
            assert len((await anext(behind)).leases) == 2
            relay.hang()
            with pytest.raises(StoreUnavailable, match="no answer in time"):
                await cut_off.renew(NETWORK, kept)
            async with asyncio.timeout(PATIENCE):
                while len((await anext(ahead)).leases) == 2:
                    pass
                heir = await other.acquire(NETWORK, attrs.evolve(request("heir"), previous=lost.subnets))
                assert heir.subnets == lost.subnets
                relay.flow()
                while {lease.node for lease in (await anext(behind)).leases} != {"kept", "heir"}:
                    pass
        assert (await cut_off.renew(NETWORK, kept)).subnets == kept.subnets
        with pytest.raises(LeaseLost, match="was taken by node heir"):
            await unlucky.renew(short, lost)
        assert {lease.node for lease in (await other.leases()).leases} == {"kept", "heir"}


async def test_a_cluster_that_loses_its_leader_goes_on(open_table: OpenTable) -> None:
    with EtcdCluster() as cluster:
        leader = cluster.leader
        table = open_table(leader.endpoint, *(m.endpoint for m in cluster.members if m is not leader))
        await create(table, "subnets/before")
        async with aclosing(table.watch("subnets/")) as listings:
            await until(listings, bool)
            leader.kill()
            await create(table, "subnets/after")
            assert set(await until(listings, lambda listing: "subnets/after" in listing)) == {
                "subnets/before",
                "subnets/after",
            }


async def test_a_member_that_lost_the_others_is_not_waited_for(open_table: OpenTable) -> None:
    with EtcdCluster() as cluster:
        alone, *others = cluster.members
        table = open_table(alone.endpoint, store=ImpatientStore)
        await create(table, "subnets/before")
        async with aclosing(table.watch("subnets/")) as listings:
            await until(listings, bool)
            for member in others:
                member.kill()
            with pytest.raises(StoreUnavailable, match="no leader|no answer in time"):
                await until(listings, lambda listing: False)
        with pytest.raises(StoreUnavailable, match="no leader"):
            await table.create("subnets/now", b"")
        with pytest.raises(StoreUnavailable, match="no leader"):
            await table.get("subnets/before")
        others[0].start()
        await create(table, "subnets/after")
        assert set(await table.list("subnets/")) == {"subnets/before", "subnets/after"}


async def test_an_etcd_that_is_full_says_so(open_table: OpenTable) -> None:
    with EtcdServer(arguments=["--quota-backend-bytes", "200000"]) as etcd:
        table = open_table(etcd.endpoint)
        with pytest.raises(StoreUnavailable, match=r"is out of space \(NOSPACE alarm\): compact and defragment it"):
            await asyncio.gather(*(table.create(f"filler/{step}", b"x" * 10_000) for step in range(100)))
        assert await table.get("filler/0") is not None
        with pytest.raises(StoreUnavailable, match="NOSPACE"):
            await table.create("subnets/a", b"", 60.0)


async def alarm(etcd: EtcdServer, action: str) -> None:
    """What a quota that is used up does; nobody has to fill it."""
    status = await asyncio.to_thread(etcd.post, "/v3/maintenance/status", {})
    body = {"action": action, "memberID": status["header"]["member_id"], "alarm": "NOSPACE"}
    await asyncio.to_thread(etcd.post, "/v3/maintenance/alarm", body)


async def test_a_full_etcd_keeps_leases_alive_that_are_renewed_unchanged(open_store: OpenStore) -> None:
    with EtcdServer() as etcd:
        store, other = open_store(etcd.endpoint), open_store(etcd.endpoint)
        short = attrs.evolve(NETWORK, lease_ttl=3)
        lease = await store.acquire(short, request("a"))
        dead = await store.acquire(short, request("dead"))
        await alarm(etcd, "ACTIVATE")
        for _ in range(4):
            await asyncio.sleep(1.5)
            kept = await store.renew(short, lease)
            assert (kept, kept.version) == (lease, lease.version)
            (found,) = [found for found in (await other.leases()).leases if found.node == "a"]
            assert found.version == lease.version
            assert found.ttl is not None
            assert 1 <= found.ttl <= 3
        with pytest.raises(StoreUnavailable, match="NOSPACE"):  # the record would have to be another
            await store.renew(short, attrs.evolve(lease, public_ipv4=IPv4Address("192.0.2.9")))
        with pytest.raises(StoreUnavailable, match="NOSPACE"):  # a longer life than it was granted
            await store.renew(NETWORK, lease)
        assert {found.node for found in (await other.leases()).leases} == {"a"}
        with pytest.raises(StoreUnavailable, match="NOSPACE"):
            await store.renew(short, dead)
        # A deletion goes through, and is seen.
        assert await other.remove(attrs.evolve(lease, version=kept.version))
        with pytest.raises(StoreUnavailable, match="NOSPACE"):
            await store.renew(short, lease)
        await alarm(etcd, "DEACTIVATE")
        again = await store.renew(short, lease)
        assert again.version != lease.version


async def test_a_full_etcd_is_read_on_and_leases_are_renewed_once_it_has_room(open_store: OpenStore) -> None:
    with EtcdServer(arguments=["--quota-backend-bytes", "200000"]) as etcd:
        store = open_store(etcd.endpoint)
        lease = await store.acquire(NETWORK, request("a"))
        async with aclosing(store.watch()) as snapshots:
            assert (await anext(snapshots)).leases == (lease,)
            with contextlib.suppress(StoreUnavailable):
                for step in range(100):
                    await store.table.create(f"filler/{step}", b"x" * 10_000)
            moved = attrs.evolve(lease, public_ipv4=IPv4Address("192.0.2.9"))
            for call in (store.renew(NETWORK, moved), store.acquire(NETWORK, request("b"))):
                with pytest.raises(
                    StoreUnavailable, match=r"out of space \(NOSPACE alarm\): compact and defragment it"
                ):
                    await call
            (found,) = (await store.leases()).leases
            assert (found.node, found.version) == ("a", lease.version)
            # What the message says, done by an operator.
            everything = {"key": base64.b64encode(f"{prefix(store)}/filler".encode()).decode()}
            beyond = base64.b64encode(f"{prefix(store)}/fillez".encode()).decode()
            header = etcd.post("/v3/kv/deleterange", everything | {"range_end": beyond})["header"]
            etcd.post("/v3/kv/compaction", {"revision": header["revision"], "physical": True})
            etcd.post("/v3/maintenance/defragment", {})
            for alarm in etcd.post("/v3/maintenance/alarm", {"action": "GET"})["alarms"]:
                etcd.post("/v3/maintenance/alarm", {"action": "DEACTIVATE", **alarm})
            assert (await store.renew(NETWORK, lease)).subnets == lease.subnets
            await store.acquire(NETWORK, request("b"))
            async with asyncio.timeout(PATIENCE):
                assert {lease.node for lease in (await anext(snapshots)).leases} == {"a", "b"}


async def test_an_etcd_that_found_itself_corrupt_is_told_from_one_that_is_away(open_table: OpenTable) -> None:
    with EtcdServer() as etcd:
        table = open_table(etcd.endpoint)
        record = await create(table, "subnets/a")
        member = etcd.post("/v3/kv/range", {"key": "AA=="})["header"]["member_id"]
        alarm = {"memberID": member, "alarm": "CORRUPT"}
        etcd.post("/v3/maintenance/alarm", {"action": "ACTIVATE", **alarm})
        for call in (table.replace(record, b"", 60.0), table.create("subnets/b", b""), table.delete(record)):
            with pytest.raises(StoreUnavailable) as caught:
                await call
            assert str(caught.value) == f"etcd at {etcd.endpoint} does not answer (corrupt cluster)"
        etcd.post("/v3/maintenance/alarm", {"action": "DEACTIVATE", **alarm})
        assert await table.get("subnets/a") == record


async def test_a_record_that_is_garbage_is_reported_and_its_subnet_given_to_nobody(
    etcd: EtcdServer, open_store: OpenStore
) -> None:
    store = open_store(etcd.endpoint)
    two = network.parse('{"Network": "10.244.0.0/16", "SubnetMin": "10.244.0.0", "SubnetMax": "10.244.1.0"}')
    async with aclosing(store.watch()) as snapshots:
        lease = await store.acquire(two, attrs.evolve(request("a"), previous=Subnets(IPv4Network("10.244.0.0/24"))))
        garbage = {"key": f"{prefix(store)}/subnets/10.244.1.0-24", "value": "\x00\xff{]"}
        etcd.post("/v3/kv/put", {name: base64.b64encode(text.encode()).decode() for name, text in garbage.items()})
        async with asyncio.timeout(PATIENCE):
            while not (snapshot := await anext(snapshots)).malformed:
                pass
        assert snapshot.leases == (lease,)
        assert [malformed.key for malformed in snapshot.malformed] == ["subnets/10.244.1.0-24"]
        with pytest.raises(SubnetsExhausted):
            await store.acquire(two, request("b"))
        assert (await store.renew(two, lease)).subnets == lease.subnets


async def test_a_slow_reader_gets_the_newest_listing(etcd: EtcdServer, open_table: OpenTable) -> None:
    table, writer = open_table(etcd.endpoint), open_table(etcd.endpoint)
    async with aclosing(table.watch("subnets/")) as listings:
        await until(listings, lambda listing: not listing)
        async with aclosing(writer.watch("subnets/")) as others:
            for step in range(50):
                await create(writer, f"subnets/{step}")
            await until(others, lambda listing: len(listing) == 50)
        seen: list[Listing] = []
        async with asyncio.timeout(PATIENCE):
            while not seen or len(seen[-1]) < 50:
                seen.append(await anext(listings))
        assert len(seen) < 10
