"""What the etcd store takes and gives back: etcd leases, threads, sockets, time; and what it must not heed."""

import asyncio
import base64
import http.client
import ipaddress
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from ipaddress import IPv4Address
from pathlib import Path

import attrs
import pytest

from overlaynet import network
from overlaynet.errors import StoreError, StoreUnavailable
from overlaynet.model import LeaseRequest
from overlaynet.stores._etcd_settings import Timeouts
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.testing.etcd import EtcdServer, make_certificates
from overlaynet.testing.relay import Relay

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
NETWORK = network.parse('{"Network": "10.244.0.0/16"}')

MakeStore = Callable[..., EtcdStore]

_numbers = itertools.count()


class SlowStore(EtcdStore):
    """Waits for an answer much longer than any test should."""

    timeouts = Timeouts(connect=100.0, answer=100.0, whole=100.0, silence=100.0, patience=100.0)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
async def make_store(etcd: EtcdServer) -> AsyncIterator[MakeStore]:
    made: list[EtcdStore] = []
    prefix = f"/test{next(_numbers)}"

    def make_store(endpoint: str = etcd.endpoint, store: type[EtcdStore] = EtcdStore) -> EtcdStore:
        made.append(store(EtcdOptions(endpoints=(endpoint,), prefix=prefix)))
        return made[-1]

    yield make_store
    for store in made:
        await store.aclose()


def request(number: int) -> LeaseRequest:
    return LeaseRequest(node=f"node{number}", run="1", public_ipv4=IPv4Address("192.168.0.0") + number)


def etcd_leases(server: EtcdServer) -> int:
    return len(server.post("/v3/lease/leases", {}).get("leases", []))


def open_sockets() -> set[str]:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return {os.readlink(link) for link in links if os.path.islink(link) and os.readlink(link).startswith("socket:")}


def store_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("watch etcd", "call "))]


async def comes_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


# Leases


async def test_sixty_nodes_at_once_get_distinct_subnets(make_store: MakeStore, etcd: EtcdServer) -> None:
    before = etcd_leases(etcd)
    stores = [make_store() for _ in range(6)]
    leases = await asyncio.gather(*(stores[n % 6].acquire(NETWORK, request(n)) for n in range(60)))
    subnets = [lease.subnets.ipv4 for lease in leases]
    assert len(set(subnets)) == 60
    for one, other in itertools.combinations(subnets, 2):
        assert isinstance(one, ipaddress.IPv4Network)
        assert isinstance(other, ipaddress.IPv4Network)
        assert not one.overlaps(other)
    found = await stores[0].leases()
    assert {lease.node: lease.subnets for lease in found.leases} == {lease.node: lease.subnets for lease in leases}
    assert all(lease.ttl is not None and 86_000 < lease.ttl <= 86_400 for lease in found.leases)
    # A lost race leaves no etcd lease behind.
    assert etcd_leases(etcd) == before + 60


async def test_no_etcd_lease_outlives_what_it_was_for(make_store: MakeStore, etcd: EtcdServer) -> None:
    store = make_store()
    before = etcd_leases(etcd)
    lease = await store.acquire(NETWORK, request(1))
    assert etcd_leases(etcd) == before + 1
    for _ in range(5):
        lease = await store.renew(NETWORK, lease)
    assert etcd_leases(etcd) == before + 1
    lease = await store.acquire(NETWORK, attrs.evolve(request(1), run="2"))
    assert etcd_leases(etcd) == before + 1
    await store.release(lease)
    assert etcd_leases(etcd) == before
    assert (await store.leases()).leases == ()


async def test_an_etcd_lease_that_still_holds_another_key_is_left_alone(
    make_store: MakeStore, etcd: EtcdServer
) -> None:
    """What others made is never touched: someone has attached a key of theirs to the same etcd lease as ours."""
    table = make_store().table
    record = await table.create("subnets/a", b"", 60.0)
    (held,) = etcd.post("/v3/kv/range", {"key": "AA==", "range_end": "AA=="})["kvs"][-1:]
    theirs = {"key": "dGhlaXJz", "value": "", "lease": held["lease"]}
    etcd.post("/v3/kv/put", theirs)
    assert record is not None
    replaced = await table.replace(record, b"", 1000.0)
    assert replaced is not None
    assert await table.ttl(record) > 60, "the time left is the record's, not that of its former etcd lease"
    assert await table.delete(replaced)
    assert etcd.post("/v3/kv/range", {"key": "dGhlaXJz"})["kvs"][0]["lease"] == held["lease"]


async def test_the_time_left_follows_the_record_to_its_new_etcd_lease(make_store: MakeStore) -> None:
    table = make_store().table
    first = await table.create("subnets/a", b"", 1000.0)
    assert first is not None
    second = await table.replace(first, b"", 50.0)
    assert second is not None
    assert await table.ttl(first) <= 50
    third = await table.replace(second, b"")
    assert third is not None
    assert await table.ttl(second) == float("inf")
    assert await table.delete(third)
    assert await table.ttl(first) == await table.ttl(third) == 0.0


@pytest.mark.parametrize("version", ["", "0", "00", "-1", "x", "²", "1 "])
async def test_a_version_that_etcd_never_gave_matches_nothing(make_store: MakeStore, version: str) -> None:
    table = make_store().table
    record = await table.create("subnets/a", b"")
    assert record is not None
    for key in ("subnets/a", "subnets/none"):
        odd = attrs.evolve(record, key=key, version=version)
        assert await table.replace(odd, b"mine") is None
        assert not await table.delete(odd)
    assert await table.list("") == {"subnets/a": record}


async def test_keys_that_are_no_text_are_shown_and_harm_nobody(make_store: MakeStore, etcd: EtcdServer) -> None:
    store = make_store()
    lease = await store.acquire(NETWORK, request(1))
    (found,) = (await store.table.list("subnets/")).values()
    assert found.lease  # type: ignore[attr-defined]
    prefix = str(store).rpartition(" ")[2]
    etcd.post("/v3/kv/put", {"key": base64.b64encode(f"{prefix}/subnets/".encode() + b"\xff\x00").decode()})
    snapshot = await store.leases()
    assert [known.subnets for known in snapshot.leases] == [lease.subnets]
    assert [malformed.key for malformed in snapshot.malformed] == ["subnets/\\xff\\x00"]


# Threads, sockets, time


async def test_nothing_is_left_after_closing(etcd: EtcdServer) -> None:
    sockets = open_sockets()
    store = EtcdStore(EtcdOptions(endpoints=(etcd.endpoint,), prefix="/closing"))
    watches = [store.watch() for _ in range(3)]
    for watch in watches:
        await anext(watch)
    await asyncio.gather(*(store.read_network() for _ in range(40)))
    with pytest.raises(StoreError, match="too large lease TTL") as kept:  # an error knows where it came from
        await store.table.create("config", b"", 1e12)
    assert len(open_sockets()) > len(sockets)
    await store.aclose()
    await store.aclose()
    for watch in watches:
        with pytest.raises(StoreUnavailable, match="the watch of etcd at .* ended"):
            await anext(watch)
    await comes_true(lambda: not store_threads())
    await comes_true(lambda: open_sockets() == sockets)
    del kept
    with pytest.raises(StoreUnavailable, match="is closed"):
        await store.read_network()


async def test_a_closed_watch_leaves_nothing(etcd: EtcdServer, make_store: MakeStore) -> None:
    table = make_store().table
    assert await table.get("config") is None
    await comes_true(lambda: not store_threads())
    sockets = open_sockets()
    for _ in range(10):
        async with aclosing(table.watch("")) as listings:
            await anext(listings)
    assert store_threads() == []
    assert open_sockets() == sockets
    await comes_true(lambda: "etcd_debugging_mvcc_watcher_total 0\n" in metrics(etcd))


def metrics(server: EtcdServer) -> str:
    connection = http.client.HTTPConnection(server.address, server.port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


async def test_a_call_is_cancelled_at_once_while_etcd_hangs() -> None:
    with EtcdServer() as etcd:
        store = SlowStore(EtcdOptions(endpoints=(etcd.endpoint,)))
        assert await store.read_network() is None
        etcd.pause()
        for call in (store.read_network(), store.create_network("{}"), store.acquire(NETWORK, request(1))):
            calling = asyncio.ensure_future(call)
            await asyncio.sleep(0.1)
            calling.cancel()
            async with asyncio.timeout(PATIENCE):
                await asyncio.wait([calling])
            assert calling.cancelled()
        await store.aclose()


@pytest.mark.parametrize("moment", ["watching", "opening"])
async def test_a_watch_is_closed_at_once_while_etcd_hangs(moment: str) -> None:
    with EtcdServer() as etcd:
        store = SlowStore(EtcdOptions(endpoints=(etcd.endpoint,)))
        watch = store.watch()
        if moment == "watching":
            await anext(watch)
        etcd.pause()
        reading = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.1)
        reading.cancel()
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait([reading])
            await watch.aclose()
            await store.aclose()
        assert reading.cancelled()
        await comes_true(lambda: not store_threads())


async def test_a_watch_over_tls_is_closed_at_once_while_etcd_hangs(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    with EtcdServer(certificates=certificates) as etcd:
        store = SlowStore(EtcdOptions(endpoints=(etcd.endpoint,), cafile=str(certificates.cafile)))
        watch, early = store.watch(), store.watch()
        await anext(watch)
        etcd.pause()
        reading = [asyncio.ensure_future(anext(watch)), asyncio.ensure_future(anext(early))]  # one in the handshake
        await asyncio.sleep(0.2)
        for each in reading:
            each.cancel()
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait(reading)
            await store.aclose()
        await comes_true(lambda: not store_threads())


async def test_a_hung_watch_does_not_keep_the_process_from_ending() -> None:
    with EtcdServer() as etcd:
        program = f"""
import asyncio, os, signal
from overlaynet.stores._etcd_settings import Timeouts
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
EtcdStore.timeouts = Timeouts(100.0, 100.0, 100.0, 100.0, 100.0)
async def main():
    store = EtcdStore(EtcdOptions(endpoints=("{etcd.endpoint}",)))
    watch = store.watch()
    await anext(watch)
    os.kill({etcd.pid}, signal.SIGSTOP)
    reading = asyncio.ensure_future(store.read_network())
    await asyncio.sleep(0.2)
    raise SystemExit(7)
asyncio.run(main())
"""
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", program], timeout=PATIENCE, capture_output=True, check=False
        )
        assert done.returncode == 7, done.stderr.decode()


# What must not matter


async def test_the_environment_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etcd: EtcdServer) -> None:
    certificates = make_certificates(tmp_path / "right")
    foreign = make_certificates(tmp_path / "wrong")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1\nlogin nobody\npassword nothing\n")
    netrc.chmod(0o600)
    nowhere = "http://127.0.0.1:9"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(foreign.cafile))
    monkeypatch.setenv("ETCD3GW_API_PATH", "/v2/")
    async with Relay("127.0.0.1", etcd.port) as relay:
        plain = EtcdStore(EtcdOptions(endpoints=(f"http://127.0.0.1:{relay.port}",), prefix="/environment"))
        with EtcdServer(certificates=certificates) as secured:
            cafile = str(certificates.cafile)
            tls = EtcdStore(EtcdOptions(endpoints=(secured.endpoint,), cafile=cafile))
            for store in (plain, tls):
                assert await store.create_network("{}")
                async with aclosing(store.watch()) as snapshots:
                    assert (await anext(snapshots)).leases == ()
                await store.aclose()
        assert b"authorization" not in bytes(relay.received).lower()
