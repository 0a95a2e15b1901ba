"""The life of a node, whole daemons on the memory store, with fake devices and a virtual clock."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import attrs
import pytest

from overlaynet.daemon import Daemon
from overlaynet.drivers import Driver
from overlaynet.errors import (
    BackendError,
    ConfigError,
    IdentityTaken,
    LeaseLost,
    PluginError,
    RouterError,
    StoreError,
    StoreUnavailable,
    UnderlayError,
)
from overlaynet.health import REMINDER
from overlaynet.hookspecs import hookimpl
from overlaynet.lease_keeping import RELEASE_TIMEOUT
from overlaynet.model import (
    Device,
    Lease,
    LeaseData,
    LeaseRequest,
    Peer,
    Reservation,
    Route,
    Snapshot,
    Subnets,
    Underlay,
)
from overlaynet.network import Network
from overlaynet.node import AUDIT_INTERVAL
from overlaynet.plugins import Plugins
from overlaynet.records import encode_lease, lease_key
from overlaynet.settings import Settings
from overlaynet.stores.memory import MemoryStore, MemoryTable
from overlaynet.table import Record
from overlaynet.testing.clock import VirtualClockLoop
from overlaynet.testing.fakes import FakeBackend, FakeDrivers, fake_underlay

pytestmark = pytest.mark.anyio

DOCUMENT = '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}'
DAY = 86400.0
OVERLAY = IPv4Network("10.244.0.0/16")
FULL_ROUTES = {Route(OVERLAY, kind="unreachable"), Route(OVERLAY, device="overlay0")}


class Observer:
    """A plugin that notes every event."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @hookimpl
    def overlaynet_lease_acquired(self, lease: Lease) -> None:
        self.events.append(f"acquired {lease.subnets}")

    @hookimpl
    def overlaynet_lease_renewed(self) -> None:
        self.events.append("renewed")

    @hookimpl
    def overlaynet_lease_lost(self, reason: str) -> None:
        self.events.append(f"lost: {reason}")

    @hookimpl
    def overlaynet_peer_added(self, peer: Peer) -> None:
        self.events.append(f"added {peer}")

    @hookimpl
    def overlaynet_peer_changed(self, old: Peer, new: Peer) -> None:
        self.events.append(f"changed {old} to {new}")

    @hookimpl
    def overlaynet_peer_removed(self, peer: Peer) -> None:
        self.events.append(f"removed {peer}")

    @hookimpl
    def overlaynet_ready(self) -> None:
        self.events.append("ready")

    @hookimpl
    def overlaynet_degraded(self, reason: str) -> None:
        self.events.append(f"degraded {reason}")

    @hookimpl
    def overlaynet_recovered(self) -> None:
        self.events.append("recovered")

    @hookimpl
    def overlaynet_stopping(self) -> None:
        self.events.append("stopping")


class UnreliableTable(MemoryTable):
    """A memory table that can be made to fail, as a store whose server is gone; its watches end, too."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._broken = asyncio.Event()

    def fail(self, error: Exception | None) -> None:
        self.error = error
        if error is not None:
            self._broken.set()
            self._broken = asyncio.Event()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    async def get(self, key: str) -> Record | None:
        self._check()
        return await super().get(key)

    async def list(self, prefix: str) -> Mapping[str, Record]:
        self._check()
        return await super().list(prefix)

    async def create(self, key: str, value: bytes, ttl: float = float("inf")) -> Record | None:
        self._check()
        return await super().create(key, value, ttl)

    async def replace(self, record: Record, value: bytes, ttl: float = float("inf")) -> Record | None:
        self._check()
        return await super().replace(record, value, ttl)

    async def watch(self, prefix: str) -> AsyncGenerator[Mapping[str, Record], None]:
        self._check()
        broken = self._broken
        inner = super().watch(prefix)
        try:
            while True:
                following = asyncio.ensure_future(anext(inner))
                failing = asyncio.ensure_future(broken.wait())
                try:
                    await asyncio.wait({following, failing}, return_when=asyncio.FIRST_COMPLETED)
                    if broken.is_set():
                        raise StoreUnavailable("the connection broke")
                    yield following.result()
                finally:
                    failing.cancel()
                    following.cancel()
                    await asyncio.wait({following, failing})
        finally:
            await inner.aclose()


class UnreliableStore(MemoryStore):
    """A memory store on an :class:`UnreliableTable` of its own handle."""

    def __init__(self, table: UnreliableTable) -> None:
        super().__init__()
        self._unreliable = table

    def make_table(self) -> UnreliableTable:
        return self._unreliable


class FakeHost:
    """A host that is attached to the network of the hosts in a way that tests may change."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.underlay = fake_underlay(address)
        self.error: Exception | None = None
        self._changed = asyncio.Event()

    async def find_underlay(self, network: Network) -> tuple[Underlay, str]:
        if self.error is not None:
            raise self.error
        return self.underlay, self.name

    async def changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def change(self, *, error: Exception | None = None, **changes: Any) -> None:
        """Change what is found, and tell the daemon so."""
        self.error = error
        self.underlay = attrs.evolve(self.underlay, **changes)
        self._changed.set()

    def move(self, address: str) -> None:
        """Get another address, as from a DHCP server."""
        self.change(ipv4=IPv4Address(address), public_ipv4=IPv4Address(address))


@attrs.define
class Node:
    """A daemon under test, and what it was made of."""

    daemon: Daemon
    host: FakeHost
    drivers: FakeDrivers
    observer: Observer
    subnet_file: Path
    task: "asyncio.Task[None]"

    @property
    def backend(self) -> FakeBackend:
        return self.drivers.backends[-1]

    @property
    def routes(self) -> set[Route]:
        return set(self.drivers.routers[-1].applied)

    @property
    def lease(self) -> Lease:
        assert self.backend.lease is not None
        return self.backend.lease

    async def ready(self) -> None:
        await until(lambda: "ready" in self.observer.events or self.task.done())
        if self.task.done():
            self.task.result()

    async def stop(self) -> None:
        self.daemon.stop()
        await self.task

    async def crash(self) -> None:
        """End without any clean-up being counted on: the daemon's task is cancelled, not asked."""
        self.task.cancel()
        await asyncio.wait({self.task})


@attrs.define
class Lab:
    """Daemons that share one table."""

    directory: Path
    table: MemoryTable = attrs.field(factory=MemoryTable)
    nodes: list[Node] = attrs.field(factory=list)

    def start(
        self,
        name: str = "a",
        address: str = "172.16.130.140",
        *,
        store: MemoryStore | None = None,
        drivers: FakeDrivers | None = None,
        **settings: Any,
    ) -> Node:
        drivers = FakeDrivers() if drivers is None else drivers
        observer = Observer()
        plugins = Plugins()
        plugins.register(drivers, name="fakes")
        plugins.register(observer, name="observer")
        subnet_file = self.directory / name / "subnet.env"

        host = FakeHost(name, address)
        daemon = Daemon(
            Settings(**({"subnet_file": str(subnet_file)} | settings)),
            MemoryStore(table=self.table) if store is None else store,
            plugins,
            host.find_underlay,
            host.changed,
        )
        node = Node(daemon, host, drivers, observer, subnet_file, asyncio.create_task(daemon.run()))
        self.nodes.append(node)
        return node

    async def write_document(self, document: str = DOCUMENT) -> None:
        await MemoryStore(table=self.table).replace_network(document)


async def until(condition: Callable[[], bool], seconds: float = 3 * DAY) -> None:
    """Wait in virtual time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def _lab(directory: Path) -> AsyncGenerator[Lab, None]:
    lab = Lab(directory)
    await lab.write_document()
    try:
        yield lab
    finally:
        for node in lab.nodes:
            node.task.cancel()
        if lab.nodes:
            await asyncio.wait([node.task for node in lab.nodes])


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncGenerator[Lab, None]:
    async with _lab(tmp_path) as lab:
        yield lab


async def test_a_node_leases_configures_routes_and_tells_the_runtime(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    assert node.lease.subnets.ipv4 is not None
    assert node.lease.subnets.ipv4.subnet_of(OVERLAY)
    assert node.lease.public_ipv4 == IPv4Address("172.16.130.140")
    assert node.routes == FULL_ROUTES
    bridge = node.lease.subnets.ipv4.network_address + 1
    assert node.subnet_file.read_text() == (
        f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={bridge}/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    assert node.observer.events == [f"acquired {node.lease.subnets}", "ready"]


async def test_two_nodes_become_each_others_peers(lab: Lab) -> None:
    a, b = lab.start("a", "172.16.130.140"), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1 and len(b.backend.peers) == 1)
    assert a.backend.peers == (Peer(b.lease.subnets, IPv4Address("172.16.130.164"), node="b"),)
    assert b.backend.peers == (Peer(a.lease.subnets, IPv4Address("172.16.130.140"), node="a"),)
    assert f"added {b.lease.subnets} via 172.16.130.164" in a.observer.events


async def test_sixty_nodes_that_start_at_once_get_distinct_subnets_and_know_each_other(lab: Lab) -> None:
    nodes = [lab.start(f"node-{number}", f"172.16.131.{number}") for number in range(1, 61)]
    for node in nodes:
        await node.ready()
    await until(lambda: all(len(node.backend.peers) == 59 for node in nodes))
    assert len({node.lease.subnets for node in nodes}) == 60


async def test_a_clean_stop_takes_everything_down_but_the_backstop_and_the_lease(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    await node.stop()
    assert node.backend.closed
    assert node.routes == {Route(OVERLAY, kind="unreachable")}
    assert node.observer.events[-1] == "stopping"
    assert [lease.node for lease in (await MemoryStore(table=lab.table).leases()).leases] == ["a"]


async def test_a_backend_whose_packets_others_carry_has_no_backstop(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "backstop", False)
    node = lab.start()
    await node.ready()
    assert node.routes == {Route(OVERLAY, device="overlay0")}


async def test_release_on_stop_gives_the_lease_back(lab: Lab) -> None:
    node = lab.start(release_on_stop=True)
    await node.ready()
    await node.stop()
    assert (await MemoryStore(table=lab.table).leases()).leases == ()


class SlowClaims(MemoryStore):
    """A store whose claims take effect, and are answered, some time after they were asked for, whoever waits for them."""

    def __init__(self, lab: Lab, seconds: float, failures: int = 0) -> None:
        super().__init__(table=lab.table)
        self._seconds = seconds
        self._failures = failures
        self._claims: set[asyncio.Task[Lease]] = set()
        self.asked = False

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        self.asked = True
        claim = asyncio.create_task(self._acquire(network, request))
        self._claims.add(claim)
        lease = await asyncio.shield(claim)
        if self._failures:
            self._failures -= 1
            raise StoreUnavailable("the answer was lost")
        return lease

    async def _acquire(self, network: Network, request: LeaseRequest) -> Lease:
        await asyncio.sleep(self._seconds)
        return await super().acquire(network, request)


@pytest.mark.parametrize("failures", [0, 1], ids=["answered", "answer lost"])
async def test_a_stop_in_the_middle_of_a_claim_gives_the_lease_back(lab: Lab, failures: int) -> None:
    store = SlowClaims(lab, 5, failures)
    node = lab.start(store=store, release_on_stop=True)
    await until(lambda: store.asked)
    await asyncio.sleep(1)
    await node.stop()
    assert not node.drivers.routers, "nothing begins any more"
    await asyncio.sleep(60)
    assert (await MemoryStore(table=lab.table).leases()).leases == ()


async def test_a_stop_in_the_middle_of_a_claim_waits_for_nothing_if_the_lease_is_to_be_kept(lab: Lab) -> None:
    store = SlowClaims(lab, 5)
    node = lab.start(store=store)
    await until(lambda: store.asked)
    async with asyncio.timeout(1):
        await node.stop()


async def test_a_stop_in_the_middle_of_a_claim_does_not_wait_for_ever(lab: Lab) -> None:
    store = SlowClaims(lab, DAY)
    node = lab.start(store=store, release_on_stop=True)
    await until(lambda: store.asked)
    async with asyncio.timeout(RELEASE_TIMEOUT + 1):
        await node.stop()


async def test_a_crash_never_releases_the_lease(lab: Lab) -> None:
    node = lab.start(release_on_stop=True)
    await node.ready()
    await node.crash()
    assert len((await MemoryStore(table=lab.table).leases()).leases) == 1


async def test_a_restart_keeps_the_subnet_even_with_another_address(lab: Lab) -> None:
    first = lab.start("a", "172.16.130.140")
    await first.ready()
    await first.crash()
    first.subnet_file.unlink()
    second = lab.start("a", "172.16.130.199")
    await second.ready()
    assert second.lease.subnets == first.lease.subnets
    (lease,) = (await MemoryStore(table=lab.table).leases()).leases
    assert lease.public_ipv4 == IPv4Address("172.16.130.199")


async def test_peers_follow_a_changed_address_and_a_release(lab: Lab) -> None:
    a, b = lab.start("a"), lab.start("b", "172.16.130.164", release_on_stop=True)
    await a.ready()
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1)
    await b.crash()
    b = lab.start("b", "172.16.130.165", release_on_stop=True)
    await b.ready()
    await until(lambda: a.backend.peers[0].public_ipv4 == IPv4Address("172.16.130.165"))
    changed = f"changed {b.lease.subnets} via 172.16.130.164 to {b.lease.subnets} via 172.16.130.165"
    await until(lambda: changed in a.observer.events)
    await b.stop()
    await until(lambda: a.backend.peers == ())
    assert a.observer.events[-1] == f"removed {b.lease.subnets} via 172.16.130.165"


async def test_the_lease_is_renewed_before_it_ends_for_days(lab: Lab) -> None:
    node = lab.start(subnet_lease_renew_margin=60)
    await node.ready()
    await asyncio.sleep(10 * DAY)
    (lease,) = (await MemoryStore(table=lab.table).leases()).leases
    assert lease.ttl is not None
    assert lease.ttl >= 3590
    assert node.observer.events.count("renewed") == 10
    assert not node.task.done()


async def test_a_dead_nodes_lease_expires_and_its_peers_forget_it(lab: Lab) -> None:
    a, b = lab.start("a"), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1)
    await b.crash()
    await asyncio.sleep(DAY - 60)
    assert len(a.backend.peers) == 1
    await asyncio.sleep(120)
    assert not a.backend.peers


async def test_a_lifetime_shorter_than_the_margin_is_renewed_in_time(lab: Lab) -> None:
    await lab.write_document('{"Network": "10.244.0.0/16", "LeaseTTL": 60}')
    node = lab.start()
    await node.ready()
    await asyncio.sleep(3600)
    assert len((await MemoryStore(table=lab.table).leases()).leases) == 1
    assert not node.task.done()


async def test_a_lease_that_vanished_is_taken_back(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    key = lease_key(node.lease.subnets)
    record = await lab.table.get(key)
    assert record is not None
    assert await lab.table.delete(record)
    await until(lambda: "renewed" in node.observer.events)
    assert await lab.table.get(key) is not None
    assert not node.task.done()


async def test_a_lease_taken_by_another_node_ends_the_daemon_with_its_name(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    record = await lab.table.get(lease_key(node.lease.subnets))
    assert record is not None
    thief = attrs.evolve(node.lease, node="thief", public_ipv4=IPv4Address("172.16.130.9"))
    assert await lab.table.replace(record, encode_lease(thief)) is not None
    message = f"the lease on {node.lease.subnets} was taken by node thief at 172.16.130.9"
    with pytest.raises(LeaseLost, match=message):
        await node.task
    assert node.backend.closed
    assert node.observer.events[-1] == f"lost: {message}"


async def test_two_processes_with_one_identity_never_both_live(lab: Lab) -> None:
    first = lab.start("a", "172.16.130.140")
    await first.ready()
    second = lab.start("a", "172.16.130.141")
    await second.ready()
    with pytest.raises(LeaseLost, match="another process with the same node identity 'a' at 172.16.130.141; give each"):
        await first.task
    await asyncio.sleep(60)
    assert not second.task.done()


async def test_it_waits_for_the_document_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lab = Lab(tmp_path)
    node = lab.start()
    await asyncio.sleep(150)
    assert [record.message for record in caplog.records].count("waiting for the network document") in (2, 3)
    await lab.write_document()
    await node.ready()
    await node.stop()


async def test_a_flag_creates_the_document_and_many_first_nodes_agree(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    networks = ["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16"]
    nodes = [lab.start(f"node-{n}", f"172.16.131.{n}", network=networks[n % 3], backend="udp") for n in range(1, 10)]
    for node in nodes:
        await node.ready()
    document = await MemoryStore(table=lab.table).read_network()
    assert document in [f'{{"Network": "{network}", "Backend": {{"Type": "udp"}}}}' for network in networks]
    (the_network,) = {route.destination for node in nodes for route in node.routes}
    assert str(the_network) in document
    for node in nodes:
        await node.stop()


async def test_another_backend_in_the_document_is_an_error_that_names_both(lab: Lab) -> None:
    await lab.write_document('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}')
    node = lab.start(backend="udp")
    with pytest.raises(ConfigError) as caught:
        await node.task
    assert str(caught.value) == (
        "the network document of memory of this process names the backend 'vxlan', but this node expects 'udp'; "
        "change --backend, or the document with `overlaynet network set`"
    )
    assert (await MemoryStore(table=lab.table).leases()).leases == ()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "the network document is not JSON"),
        ('{"Network": "10.244.0.0/29"}', "too small"),
        ('{"Network": "10.244.0.0/16", "SubnetMin": "10.250.0.0"}', "SubnetMin 10.250.0.0 lies outside 10.244.0.0/16"),
        (
            '{"Network": "10.244.0.0/16", "SubnetMin": "10.244.9.0", "SubnetMax": "10.244.2.0"}',
            "SubnetMin 10.244.9.0 is above SubnetMax 10.244.2.0",
        ),
        (
            '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "Prot": 1}}',
            "no option 'Prot'; did you mean 'Port'",
        ),
        (
            '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp", "Port": "1"}}',
            "option Port must be a whole number, not '1'",
        ),
    ],
)
async def test_a_bad_document_ends_it_before_anything_is_changed(lab: Lab, document: str, message: str) -> None:
    await lab.write_document(document)
    node = lab.start()
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        await node.task
    assert (await MemoryStore(table=lab.table).leases()).leases == ()
    assert not node.subnet_file.exists()
    assert not node.drivers.routers


async def test_unknown_drivers_are_named_with_the_nearest(tmp_path: Path) -> None:
    plugins = Plugins()
    with pytest.raises(PluginError) as caught:
        plugins.driver("router", "netlnik")
    assert str(caught.value) == "there is no router 'netlnik'; did you mean 'netlink'? (installed: memory, netlink)"


async def test_a_subnet_file_that_cannot_be_written_ends_it_before_a_lease_is_claimed(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    node = lab.start(subnet_file=str(tmp_path / "taken"))
    with pytest.raises(
        ConfigError, match="taken cannot be written: it is a directory; choose another with --subnet-file"
    ):
        await node.task
    assert (await MemoryStore(table=lab.table).leases()).leases == ()


class RefusingBackend(FakeBackend):
    """A backend whose port is taken."""

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        raise BackendError("UDP port 8285 is in use")


class RefusingDrivers(FakeDrivers):
    """Answers with a backend that refuses to open."""

    @hookimpl
    def overlaynet_driver(self, axis: str, name: str) -> type[Driver] | None:
        return RefusingBackend if axis == "backend" else super().overlaynet_driver(axis, name)


async def test_a_backend_that_refuses_ends_it_before_a_lease_is_claimed(lab: Lab) -> None:
    node = lab.start(drivers=RefusingDrivers())
    with pytest.raises(BackendError, match="UDP port 8285 is in use"):
        await node.task
    assert (await MemoryStore(table=lab.table).leases()).leases == ()
    assert not node.subnet_file.exists()


async def test_the_document_is_not_created_by_a_node_that_cannot_start(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    node = lab.start(network="10.244.0.0/16", drivers=RefusingDrivers())
    with pytest.raises(BackendError, match="UDP port 8285 is in use"):
        await node.task
    assert await MemoryStore(table=lab.table).read_network() is None


async def test_a_backend_that_fails_later_ends_the_daemon_and_takes_the_rest_down(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    node.backend.fail("the device overlay0 was deleted")
    with pytest.raises(BackendError, match="the device overlay0 was deleted"):
        await node.task
    assert node.backend.closed
    assert node.routes == {Route(OVERLAY, kind="unreachable")}


async def test_a_device_that_is_lost_is_reported_and_tried_again_until_it_is_back(lab: Lab) -> None:
    a, b = lab.start("a"), lab.start("b", "172.16.130.164")
    await a.ready()
    await until(lambda: len(a.backend.peers) == 1)
    reason = "the device name overlay0 is taken by another interface"
    a.backend.lose(reason)
    await until(lambda: a.daemon.status()["problems"] == {"backend": reason}, seconds=1)
    assert a.observer.events[-1] == f"degraded backend: {reason}"
    assert a.routes == {Route(OVERLAY, kind="unreachable")}, "the backstop stays; no route leads to a device of others"
    # Again and again, but not all the time.
    tables = a.backend.tables
    await asyncio.sleep(3600)
    assert 3600 / AUDIT_INTERVAL / 1.3 <= a.backend.tables - tables <= 200
    # Peers that come and go meanwhile are not forgotten.
    c = lab.start("c", "172.16.130.166")
    await c.ready()
    await b.stop()
    a.backend.lose(None)
    await until(lambda: a.daemon.status()["problems"] == {}, seconds=2)
    assert a.observer.events[-1] == "recovered"
    assert a.routes == FULL_ROUTES
    assert {peer.node for peer in a.backend.peers} == {"b", "c"}
    assert not a.task.done()


async def test_peers_come_and_go_also_while_a_part_of_the_backend_cannot_be_mended(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a device for each IP version, of which one is lost."""

    def routes(self: FakeBackend, peers: Sequence[Peer]) -> list[Route]:
        return [Route(subnet, device="overlay0") for peer in peers for subnet in peer.subnets]

    monkeypatch.setattr(FakeBackend, "routes", routes)
    a, b = lab.start("a"), lab.start("b", "172.16.130.164", release_on_stop=True)
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1)
    a.backend.lose("the device overlay0-v6 is gone")
    await until(lambda: a.daemon.status()["problems"] != {})
    c = lab.start("c", "172.16.130.166")
    await c.ready()
    await b.stop()
    expected = {Route(subnet, device="overlay0") for subnet in c.lease.subnets}
    await until(lambda: a.routes == {Route(OVERLAY, kind="unreachable")} | expected, seconds=60)
    assert a.daemon.status()["problems"] == {"backend": "the device overlay0-v6 is gone"}
    added, removed = f"added {c.lease.subnets} via 172.16.130.166", f"removed {b.lease.subnets} via 172.16.130.164"
    await asyncio.sleep(3600)
    assert (a.observer.events.count(added), a.observer.events.count(removed)) == (1, 1)


async def test_a_device_that_is_lost_before_the_store_answers_is_mended_too(tmp_path: Path) -> None:
    table = UnreliableTable()
    async with _lab(tmp_path) as lab:
        await UnreliableStore(table).replace_network(DOCUMENT)
        node = lab.start(store=UnreliableStore(table))
        await until(lambda: bool(node.drivers.backends) and node.backend.lease is not None)
        table.fail(StoreUnavailable("the server is gone"))
        tables = node.backend.tables
        node.backend.lose(None)
        await until(lambda: node.backend.tables > tables, seconds=2)


async def test_a_source_of_changes_that_never_rests_does_not_keep_the_daemon_busy(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(backend: FakeBackend) -> None:
        return

    monkeypatch.setattr(FakeBackend, "changed", at_once)
    node = lab.start()
    await node.ready()
    tables = node.backend.tables
    await asyncio.sleep(100)
    assert 99 <= node.backend.tables - tables <= 101


async def test_another_address_at_run_time_is_published_with_the_same_subnet(lab: Lab) -> None:
    a, b = lab.start("a"), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await until(lambda: len(b.backend.peers) == 1)
    a.host.move("172.16.130.141")
    await until(lambda: b.backend.peers[0].public_ipv4 == IPv4Address("172.16.130.141"), seconds=3)
    assert a.backend.underlay == a.host.underlay
    assert b.backend.peers[0].subnets == a.lease.subnets
    assert a.daemon.status()["public_ipv4"] == "172.16.130.141"
    assert not a.daemon.status()["problems"]
    # And the next renewal, at its time, does not bring the old one back.
    await asyncio.sleep(2 * DAY)
    assert b.backend.peers[0].public_ipv4 == IPv4Address("172.16.130.141")


async def test_the_store_is_watched_anew_from_another_address(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, begun = MemoryStore.watch, []

    async def slow_to_end(store: MemoryStore) -> AsyncGenerator[Snapshot, None]:
        begun.append(store)
        async with aclosing(watch(store)) as snapshots:
            try:
                async for snapshot in snapshots:
                    yield snapshot
            finally:
                await asyncio.sleep(5)

    monkeypatch.setattr(MemoryStore, "watch", slow_to_end)
    node = lab.start("a")
    await node.ready()
    await asyncio.sleep(100)
    assert len(begun) == 1
    node.host.move("172.16.130.141")
    await asyncio.sleep(3)
    node.host.move("172.16.130.142")  # while the watch is being ended
    await asyncio.sleep(100)
    assert len(begun) == 2
    await lab.start("b", "172.16.130.164").ready()
    await until(lambda: len(node.backend.peers) == 1)
    assert not node.daemon.status()["problems"]


async def test_another_address_is_published_as_soon_as_the_store_is_back(tmp_path: Path) -> None:
    table = UnreliableTable()
    async with _lab(tmp_path) as lab:
        await UnreliableStore(table).replace_network(DOCUMENT)
        node = lab.start(store=UnreliableStore(table))
        await node.ready()
        table.fail(StoreUnavailable("the server is gone"))
        node.host.move("172.16.130.141")
        await until(lambda: "lease" in str(node.daemon.status()["problems"]), seconds=5)
        node.host.move("172.16.130.142")
        await asyncio.sleep(30)
        table.fail(None)
        await until(lambda: not node.daemon.status()["problems"], seconds=120)
        (lease,) = (await UnreliableStore(table).leases()).leases
        assert lease.public_ipv4 == IPv4Address("172.16.130.142")
        assert lease.subnets == node.lease.subnets


@pytest.mark.parametrize("last", ["172.16.130.142", "172.16.130.140"], ids=["another", "back"])
async def test_an_address_that_changes_while_it_is_published_is_published_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    node = lab.start()
    await node.ready()
    renew = MemoryStore.renew

    async def slow(store: MemoryStore, network: Network, lease: Lease) -> Lease:
        await asyncio.sleep(10)
        return await renew(store, network, lease)

    monkeypatch.setattr(MemoryStore, "renew", slow)
    node.host.move("172.16.130.141")
    await asyncio.sleep(5)
    node.host.move(last)
    await asyncio.sleep(30)
    (lease,) = (await MemoryStore(table=lab.table).leases()).leases
    assert lease.public_ipv4 == IPv4Address(last)


async def test_a_backend_that_could_not_follow_the_underlay_is_told_of_the_way_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = lab.start()
    await node.ready()
    told = []
    follow = FakeBackend.set_underlay

    async def refuse(backend: FakeBackend, underlay: Underlay) -> Device:
        told.append(underlay.mtu)
        device = await follow(backend, underlay)  # it does come so far
        if underlay.mtu == 1300:
            raise BackendError("the device cannot be changed")
        return device

    monkeypatch.setattr(FakeBackend, "set_underlay", refuse)
    node.host.change(mtu=1300)
    await until(lambda: node.daemon.status()["problems"] == {"underlay": "the device cannot be changed"}, seconds=2)
    node.host.change(mtu=1500)
    await until(lambda: not node.daemon.status()["problems"], seconds=60)
    assert told[-1] == 1500
    assert node.backend.mtu == node.daemon.status()["mtu"] == 1472
    told.clear()
    await asyncio.sleep(600)
    assert told == []


async def test_another_mtu_at_run_time_reaches_the_subnet_file(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    before = node.subnet_file.read_text()
    node.host.change(mtu=1300)
    await until(lambda: node.daemon.status()["mtu"] == 1272, seconds=2)
    assert node.subnet_file.read_text() == before.replace("FLANNEL_MTU=1472", "FLANNEL_MTU=1272")


async def test_a_subnet_file_that_cannot_be_written_at_run_time_is_tried_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = lab.start()
    await node.ready()

    def refuse(path: Path, text: str) -> None:
        raise ConfigError("the subnet file cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("overlaynet.subnet_file.write", refuse)
        node.host.change(mtu=1300)
        await until(lambda: "subnet file" in str(node.daemon.status()["problems"]), seconds=2)
    await until(lambda: "FLANNEL_MTU=1272" in node.subnet_file.read_text(), seconds=60)
    assert not node.daemon.status()["problems"]


async def test_an_underlay_that_is_away_for_a_while_changes_nothing(lab: Lab) -> None:
    a, b = lab.start("a"), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1)
    a.host.change(error=UnderlayError("the interface eth0 is down"))
    await until(lambda: a.daemon.status()["problems"] == {"underlay": "the interface eth0 is down"}, seconds=2)
    await asyncio.sleep(3600)
    assert a.routes == FULL_ROUTES
    assert len(a.backend.peers) == len(b.backend.peers) == 1
    events = list(a.observer.events)
    a.host.change()
    await until(lambda: a.daemon.status()["problems"] == {}, seconds=2)
    assert a.observer.events[len(events) :] == ["recovered"]
    assert b.backend.peers[0].public_ipv4 == IPv4Address("172.16.130.140")


async def test_what_nobody_tells_the_audit_finds(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    node.host.underlay = fake_underlay("172.16.130.141", mtu=1400)
    await until(lambda: node.daemon.status()["public_ipv4"] == "172.16.130.141", seconds=AUDIT_INTERVAL + 1)
    assert node.daemon.status()["mtu"] == 1372


async def test_a_store_that_is_down_at_the_start_is_waited_for(lab: Lab) -> None:
    table = UnreliableTable()
    table._content = lab.table._content
    table.fail(StoreUnavailable("etcd does not answer"))
    node = lab.start(store=UnreliableStore(table))
    await asyncio.sleep(600)
    assert not node.task.done()
    assert node.observer.events == ["degraded store: etcd does not answer"]
    table.fail(None)
    await node.ready()
    assert "recovered" in node.observer.events


async def test_a_store_that_refuses_at_the_start_ends_it(lab: Lab) -> None:
    table = UnreliableTable()
    table.fail(StoreError("etcd refused user 'x'"))
    node = lab.start(store=UnreliableStore(table))
    with pytest.raises(StoreError, match="etcd refused user 'x'"):
        await node.task


async def test_a_store_that_goes_down_changes_nothing_for_traffic_and_all_recovers(lab: Lab) -> None:
    table = UnreliableTable()
    table._content = lab.table._content
    a, b = lab.start("a", store=UnreliableStore(table)), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1)
    table.fail(StoreUnavailable("etcd does not answer"))
    await asyncio.sleep(3600)
    assert len(a.backend.peers) == 1
    assert a.routes == FULL_ROUTES
    assert a.daemon.status()["problems"] == {"store": "etcd does not answer"}
    table.fail(None)
    c = lab.start("c", "172.16.130.165")
    await c.ready()
    await until(lambda: len(a.backend.peers) == 2)
    assert a.daemon.status()["problems"] == {}
    assert a.observer.events.count("recovered") == 1


async def test_a_node_cut_off_beyond_its_lease_carries_nothing_and_takes_its_subnet_back(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    table = UnreliableTable()
    table._content = lab.table._content
    a, b = lab.start("a", store=UnreliableStore(table)), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1)
    table.fail(StoreUnavailable("etcd does not answer"))
    await asyncio.sleep(DAY - 120)
    assert len(a.backend.peers) == 1
    await asyncio.sleep(121)
    assert not a.backend.peers
    caplog.clear()
    await asyncio.sleep(3600)
    told: list[Any] = [record for record in caplog.records if getattr(record, "fields", {}).get("part") == "lease"]
    assert {record.fields["reason"] for record in told} == {
        "it has expired, and no packets are carried; it cannot be renewed: etcd does not answer"
    }
    assert len(told) <= 3600 / REMINDER + 1
    table.fail(None)
    await until(lambda: len(a.backend.peers) == 1)
    await until(lambda: a.daemon.status()["problems"] == {}, seconds=WATCH_AGAIN + 2)
    assert {lease.node for lease in (await MemoryStore(table=lab.table).leases()).leases} == {"a", "b"}


async def test_a_node_cut_off_beyond_its_lease_yields_to_the_one_that_holds_it_now(lab: Lab) -> None:
    table = UnreliableTable()
    table._content = lab.table._content
    a = lab.start("a", store=UnreliableStore(table))
    await a.ready()
    table.fail(StoreUnavailable("etcd does not answer"))
    await asyncio.sleep(DAY + 1)
    heir = attrs.evolve(a.lease, node="heir", public_ipv4=IPv4Address("172.16.130.9"))
    assert await lab.table.create(lease_key(heir.subnets), encode_lease(heir), DAY) is not None
    table.fail(None)
    with pytest.raises(LeaseLost, match="was taken by node heir"):
        await a.task


class NotedStore(UnreliableStore):
    """An unreliable store on a lab's records that knows when each renewal was tried."""

    def __init__(self, lab: Lab) -> None:
        table = UnreliableTable()
        table._content = lab.table._content
        super().__init__(table)
        self.fail = table.fail
        self.tries: list[float] = []

    async def renew(self, network: Network, lease: Lease) -> Lease:
        self.tries.append(asyncio.get_running_loop().time())
        return await super().renew(network, lease)

    async def until_the_next_try_is_far(self) -> None:
        self.tries.clear()
        await until(lambda: len(self.tries) > 2 and self.tries[-1] - self.tries[-2] > 45, seconds=1000)


WATCH_AGAIN = 15 * 1.2
"""Seconds within which a watch that has ended is begun anew."""


async def test_a_subnet_that_another_node_got_in_an_outage_is_given_up_as_soon_as_the_store_is_watched(
    lab: Lab,
) -> None:
    """The store was restored from an old copy, say; this node's own lease would last for a day yet."""
    store = NotedStore(lab)
    a = lab.start("a", store=store)
    await a.ready()
    store.fail(StoreUnavailable("etcd does not answer"))
    a.host.move("172.16.130.141")
    await store.until_the_next_try_is_far()
    await take(lab, a, "heir")
    store.fail(None)
    await asyncio.wait({a.task}, timeout=WATCH_AGAIN + 2)
    with pytest.raises(LeaseLost, match="was taken by node heir"):
        a.task.result()


async def test_after_its_lease_has_expired_a_node_carries_again_as_soon_as_the_store_is_watched(lab: Lab) -> None:
    store = NotedStore(lab)
    a, b = lab.start("a", store=store), lab.start("b", "172.16.130.164")
    await a.ready()
    await until(lambda: len(a.backend.peers) == 1)
    store.fail(StoreUnavailable("etcd does not answer"))
    await asyncio.sleep(DAY + 1)
    assert not a.backend.peers
    await store.until_the_next_try_is_far()
    store.fail(None)
    await until(lambda: len(a.backend.peers) == 1, seconds=WATCH_AGAIN + 2)
    assert not b.task.done()


async def test_a_node_that_slept_beyond_its_lease_carries_nothing_until_it_has_it_back(lab: Lab) -> None:
    table = UnreliableTable()
    table._content = lab.table._content
    a, b = lab.start("a", store=UnreliableStore(table)), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1)
    table.error = StoreUnavailable("etcd does not answer")  # the watch, as after a sleep, does not know yet
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    loop.suspend(DAY - 10)
    await asyncio.sleep(1)
    assert len(a.backend.peers) == 1
    loop.suspend(10)
    await asyncio.sleep(0.001)
    assert not a.backend.peers
    assert a.daemon.status()["lease_seconds_left"] == 0
    table.error = None
    await until(lambda: len(a.backend.peers) == 1, seconds=WATCH_AGAIN + 2)
    assert a.daemon.status()["problems"] == {}


async def test_a_node_that_slept_while_another_one_took_its_subnet_gives_it_up_on_waking(lab: Lab) -> None:
    a, b = lab.start("a"), lab.start("b", "172.16.130.164")
    await a.ready()
    await until(lambda: len(a.backend.peers) == 1)
    record = await lab.table.get(lease_key(a.lease.subnets))
    assert record is not None
    heir = attrs.evolve(a.lease, node="heir", run="9", public_ipv4=IPv4Address("172.16.130.9"))
    lab.table._content.entries[record.key] = attrs.evolve(
        lab.table._content.entries[record.key], value=encode_lease(heir), version="99"
    )  # no watch tells of it: its connection died meanwhile
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    loop.suspend(2 * DAY)
    await asyncio.sleep(1)
    assert a.backend.closed
    with pytest.raises(LeaseLost, match="was taken by node heir"):
        await a.task
    assert not b.task.done()


async def test_records_that_cannot_be_peers_are_reported_once_and_skipped(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    await lab.write_document('{"Network": "10.244.0.0/16", "SubnetMax": "10.244.70.0", "Backend": {"Type": "udp"}}')
    a, b = lab.start("a"), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await lab.table.create("subnets/10.244.77.0-24", b"{")
    await lab.table.create("subnets/10.99.1.0-24", b'{"PublicIP":"172.16.130.7","PublicIPv6":null}')
    await lab.table.create("subnets/10.244.78.0-24", b'{"PublicIP":"127.0.0.1","PublicIPv6":null}')
    await lab.table.create("subnets/10.244.79.0-24", b'{"PublicIP":"172.16.130.140","PublicIPv6":null}')
    await lab.table.create(
        "subnets/10.244.80.0-24", b'{"PublicIP":"172.16.130.8","PublicIPv6":null,"BackendType":"vxlan"}'
    )
    await asyncio.sleep(5 * AUDIT_INTERVAL)
    assert [peer.node for peer in a.backend.peers] == ["b"]
    skipped: list[Any] = [r for r in caplog.records if r.message == "lease record skipped"]
    reported = {r.fields["key"]: r.fields["reason"] for r in skipped}
    assert len(skipped) == 2 * len(reported) - 1, "each of the two nodes reports each once; b has another own address"
    assert reported["subnets/10.244.77.0-24"].startswith("its value is not JSON")
    assert reported["subnets/10.99.1.0-24"] == "it claims 10.99.1.0/24, outside the network 10.244.0.0/16"
    assert reported["subnets/10.244.78.0-24"] == "its public address 127.0.0.1 is not one that a host can be reached at"
    assert reported["subnets/10.244.79.0-24"] == "its public address 172.16.130.140 is this node's own"
    assert reported["subnets/10.244.80.0-24"] == "its node runs the backend 'vxlan', this one 'udp'"


async def test_routes_deleted_by_hand_are_repaired_at_once(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    router = node.drivers.routers[-1]
    router.disturb()
    assert set(router.applied) != FULL_ROUTES
    await until(lambda: set(router.applied) == FULL_ROUTES, seconds=1)


async def test_a_route_that_is_refused_is_tried_again_and_reported(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    router = node.drivers.routers[-1]
    router.refuse = RouterError("the kernel refused the route")
    router.disturb()
    await until(lambda: bool(node.daemon.status()["problems"]), seconds=60)
    assert node.daemon.status()["problems"] == {"routes": "the kernel refused the route"}
    router.refuse = None
    await until(lambda: set(router.applied) == FULL_ROUTES, seconds=60)
    await until(lambda: not node.daemon.status()["problems"], seconds=1)


async def test_what_changes_in_the_middle_of_a_round_is_no_trouble(
    lab: Lab, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the device is set down between its own turn and that of the routes through it."""
    node = lab.start()
    await node.ready()
    router = node.drivers.routers[-1]
    apply = router.apply
    refused = 0

    async def refuse_once(routes: Sequence[Route]) -> None:
        nonlocal refused
        refused += 1
        if refused == 1:
            raise RouterError("the device is down")
        await apply(routes)

    monkeypatch.setattr(router, "apply", refuse_once)
    router.disturb()
    await until(lambda: set(router.applied) == FULL_ROUTES, seconds=1)
    await asyncio.sleep(10)
    assert refused >= 2
    assert not {"degraded", "recovered"} & set(caplog.messages)
    assert not any(event.startswith("degraded") for event in node.observer.events)


async def test_a_plugin_that_raises_is_disabled_and_the_node_goes_on(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        @hookimpl
        def overlaynet_lease_acquired(self) -> None:
            self.calls += 1
            raise RuntimeError("boom")

        @hookimpl
        def overlaynet_ready(self) -> None:
            self.calls += 1

    broken = Broken()
    node = lab.start()
    node.daemon._plugins.register(broken, name="broken")
    await node.ready()
    assert broken.calls == 1
    assert "plugin disabled" in [record.message for record in caplog.records]


async def test_stop_works_at_any_moment_of_the_start(lab: Lab) -> None:
    for steps in range(0, 60, 3):
        node = lab.start()
        for _ in range(steps):
            await asyncio.sleep(0)
        node.daemon.stop()
        await node.task
        assert all(backend.closed for backend in node.drivers.backends)


async def test_a_subnet_held_before_is_preferred(lab: Lab) -> None:
    (lab.directory / "a").mkdir()
    (lab.directory / "a" / "subnet.env").write_text(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    node = lab.start()
    await node.ready()
    assert node.lease.subnets == Subnets(IPv4Network("10.244.1.0/24"))


# A lease that another node has taken


async def take(lab: Lab, node: Node, thief: str = "thief") -> Lease:
    """Write over a node's lease, as no node of ours would."""
    record = await lab.table.get(lease_key(node.lease.subnets))
    assert record is not None
    stolen = attrs.evolve(node.lease, node=thief, run="9", public_ipv4=IPv4Address("172.16.130.9"))
    assert await lab.table.replace(record, encode_lease(stolen), DAY) is not None
    return stolen


async def test_a_lease_taken_by_another_node_is_followed_by_a_new_one_if_so_configured(lab: Lab) -> None:
    a, b = lab.start("a", on_lease_lost="reacquire"), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    await until(lambda: len(a.backend.peers) == 1)
    before, first = a.lease, a.backend
    stolen = await take(lab, a)
    await until(lambda: a.observer.events.count("ready") == 2, seconds=5)
    assert first.closed
    assert a.lease.subnets != before.subnets
    assert not a.lease.subnets.overlaps(stolen.subnets)
    assert a.routes == FULL_ROUTES
    assert a.lease.subnets.ipv4 is not None
    assert f"FLANNEL_SUBNET={a.lease.subnets.ipv4.network_address + 1}/24\n" in a.subnet_file.read_text()
    await until(lambda: len(a.backend.peers) == 2 and len(b.backend.peers) == 2)
    assert {peer.node for peer in a.backend.peers} == {"thief", "b"}
    assert {peer.subnets: peer.node for peer in b.backend.peers} == {a.lease.subnets: "a", stolen.subnets: "thief"}
    lost = f"lost: the lease on {before.subnets} was taken by node thief at 172.16.130.9"
    told = a.observer.events[a.observer.events.index(lost) :]
    assert told[:5] == [
        f"lost: the lease on {before.subnets} was taken by node thief at 172.16.130.9",
        f"degraded lease: the lease on {before.subnets} was taken by node thief at 172.16.130.9",
        f"removed {b.lease.subnets} via 172.16.130.164",
        "recovered",
        f"acquired {a.lease.subnets}",
    ]
    assert a.daemon.status()["problems"] == {}
    await a.stop()
    assert not a.task.exception()


async def test_while_no_other_lease_is_to_be_had_the_node_is_not_ready_and_carries_nothing(lab: Lab) -> None:
    table = UnreliableTable()
    table._content = lab.table._content
    a = lab.start("a", store=UnreliableStore(table), on_lease_lost="reacquire")
    await a.ready()
    backend, lease = a.backend, a.lease
    table.fail(StoreUnavailable("etcd does not answer"))
    await asyncio.sleep(DAY + 1)
    heir = attrs.evolve(lease, node="heir", public_ipv4=IPv4Address("172.16.130.9"))
    assert await lab.table.create(lease_key(heir.subnets), encode_lease(heir), 7 * DAY) is not None
    real = table.list

    async def listing(prefix: str) -> Mapping[str, Record]:
        raise StoreUnavailable("etcd lists nothing")

    table.list = listing  # type: ignore[method-assign]
    table.fail(None)
    await until(lambda: backend.closed)
    await asyncio.sleep(60)
    assert set(a.drivers.routers[-1].applied) == {Route(OVERLAY, kind="unreachable")}, "nothing leaks meanwhile"
    status = a.daemon.status()
    assert status["ready"] is False
    assert status["problems"] == {
        "lease": f"the lease on {heir.subnets} was taken by node heir at 172.16.130.9",
        "store": "etcd lists nothing",
    }
    table.list = real  # type: ignore[method-assign]
    await until(lambda: a.observer.events.count("ready") == 2)
    assert a.lease.subnets != heir.subnets
    assert a.daemon.status()["problems"] == {}


async def test_a_node_from_whom_every_lease_is_taken_neither_spins_nor_shares(lab: Lab) -> None:
    node = lab.start("a", on_lease_lost="reacquire")
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for number in range(8):
        await until(lambda: node.observer.events.count("ready") == number + 1)  # noqa: B023 - awaited at once
        await take(lab, node, f"thief-{number}")
    await until(lambda: node.observer.events.count("ready") == 9)
    assert loop.time() - begun > 5, "each time it waits longer"
    leases = (await MemoryStore(table=lab.table).leases()).leases
    assert len({lease.subnets for lease in leases}) == len(leases) == 9


async def test_a_second_process_with_the_same_identity_ends_the_first_whatever_is_configured(lab: Lab) -> None:
    first = lab.start("a", "172.16.130.140", on_lease_lost="reacquire")
    await first.ready()
    second = lab.start("a", "172.16.130.141", on_lease_lost="reacquire")
    await second.ready()
    with pytest.raises(IdentityTaken, match="give each node an identity of its own with --node"):
        await first.task
    await asyncio.sleep(DAY)
    assert not second.task.done()


async def test_a_node_can_be_stopped_while_it_looks_for_another_lease(lab: Lab) -> None:
    for steps in range(0, 60, 3):
        node = lab.start("a", on_lease_lost="reacquire", release_on_stop=True)
        await node.ready()
        await take(lab, node, f"thief-{steps}")
        for _ in range(steps):
            await asyncio.sleep(0)
        node.daemon.stop()
        with contextlib.suppress(LeaseLost):  # it was lost at the very moment of the stop
            async with asyncio.timeout(10):
                await node.task
        assert all(backend.closed for backend in node.drivers.backends)
    names = [lease.node for lease in (await MemoryStore(table=lab.table).leases()).leases]
    assert all(name.startswith("thief") for name in names), "what it holds when it stops is given back"


async def test_a_backend_that_fails_ends_the_daemon_whatever_becomes_of_leases(lab: Lab) -> None:
    node = lab.start(on_lease_lost="reacquire")
    await node.ready()
    node.backend.fail("the device overlay0 was deleted")
    with pytest.raises(BackendError, match="the device overlay0 was deleted"):
        await node.task


# Reservations


async def test_a_reserved_subnet_given_back_on_a_stop_stays_reserved(lab: Lab) -> None:
    store = MemoryStore(table=lab.table)
    reservation = Reservation(Subnets(IPv4Network("10.244.7.0/24")), node="a")
    await store.reserve(reservation)
    a, b = lab.start(release_on_stop=True), lab.start("b", "172.16.130.164")
    await a.ready()
    await b.ready()
    assert a.lease.subnets == reservation.subnets
    await until(lambda: len(b.backend.peers) == 1)
    await a.stop()
    await until(lambda: b.backend.peers == ())
    assert b.daemon.status()["skipped_records"] == [], "what keeps the subnet free is no trouble"
    assert (await store.reservations()).reservations == (reservation,)


async def test_a_live_node_takes_back_a_lease_that_an_operator_released(lab: Lab) -> None:
    store = MemoryStore(table=lab.table)
    node = lab.start()
    await node.ready()
    assert await store.remove((await store.leases()).leases[0])
    await until(lambda: "renewed" in node.observer.events, seconds=5)
    assert (await store.leases()).leases[0].subnets == node.lease.subnets


# Absurd records


async def test_absurd_records_are_told_in_the_status_as_long_as_they_are_there(lab: Lab) -> None:
    node = lab.start()
    await node.ready()
    key, value = "subnets/10.99.1.0-24", b'{"PublicIP":"172.16.130.7","PublicIPv6":null}'
    record = await lab.table.create(key, value)
    assert record is not None
    await until(lambda: node.daemon.status()["skipped_records"] != [], seconds=5)
    assert node.daemon.status()["skipped_records"] == [
        f"{key}: it claims 10.99.1.0/24, outside the network 10.244.0.0/16"
    ]
    assert await lab.table.delete(record)
    await until(lambda: node.daemon.status()["skipped_records"] == [], seconds=5)


async def test_a_peer_that_claims_an_address_of_this_node_is_none_behind_a_nat_either(lab: Lab) -> None:
    await lab.write_document('{"Network": "10.244.0.0/16", "SubnetMin": "10.244.10.0", "Backend": {"Type": "udp"}}')
    node = lab.start()
    await node.ready()
    for number, address in enumerate(["192.168.7.7", "172.16.130.140", "172.16.130.141"]):
        value = f'{{"PublicIP":"{address}","PublicIPv6":null}}'.encode()
        await lab.table.create(f"subnets/10.244.{number}.0-26", value)
    await until(lambda: len(node.backend.peers) == 2, seconds=5)
    await asyncio.sleep(1)
    node.host.change(ipv4=IPv4Address("192.168.7.7"))
    await until(lambda: len(node.backend.peers) == 1, seconds=5)
    assert node.backend.peers[0].public_ipv4 == IPv4Address("172.16.130.141")
    status = node.daemon.status()["skipped_records"]
    assert isinstance(status, list)
    assert sorted(status) == [
        "subnets/10.244.0.0-26: its public address 192.168.7.7 is this node's own",
        "subnets/10.244.1.0-26: its public address 172.16.130.140 is this node's own",
    ]


async def test_the_status_stays_short_whatever_the_store_holds(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(300):
        await lab.table.create(f"subnets/{'k' * 5000}{number}", b"\x1b[31m" * 1000)
    node = lab.start()
    await node.ready()
    assert len(json.dumps(node.daemon.status())) < 100_000
    skipped: list[Any] = [record for record in caplog.records if record.message == "lease record skipped"]
    assert len(skipped) == 300
    assert all(len(record.fields["key"]) < 310 and record.fields["reason"].isprintable() for record in skipped)


@pytest.mark.parametrize(("lifetime", "minutes", "margin"), [(DAY, 60, 3600), (DAY, 90, 5400), (60, 60, 40)])
async def test_a_node_says_in_its_record_when_it_will_renew_it(
    lab: Lab, lifetime: float, minutes: int, margin: float
) -> None:
    await lab.write_document(json.dumps(json.loads(DOCUMENT) | {"LeaseTTL": lifetime}))
    node = lab.start(subnet_lease_renew_margin=minutes)
    await node.ready()
    for _ in range(2):
        (lease,) = (await MemoryStore(table=lab.table).leases()).leases
        assert lease.renewal_margin == margin
        await asyncio.sleep(lifetime - margin + 1)
    await lab.write_document(DOCUMENT)
    await asyncio.sleep(lifetime)
    (lease,) = (await MemoryStore(table=lab.table).leases()).leases
    assert lease.renewal_margin == margin, "it goes on as it began, whatever the document says by now"
