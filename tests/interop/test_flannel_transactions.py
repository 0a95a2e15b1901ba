"""flannel's transactions, played byte for byte on a real etcd beside our store: each reads, claims and renews what the
other wrote, and nothing that we write makes a flannel node forget its peers.

No flannel runs here. :class:`Flannel` does what flannel 0.28 does: the same requests, in the same order, and the same
strictness when it reads.
"""

import asyncio
import base64
import functools
import ipaddress
import itertools
import json
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import attrs
import pytest

from overlaynet.cli import main
from overlaynet.errors import LeaseLost
from overlaynet.model import Lease, LeaseData, LeaseRequest, Reservation, Snapshot, Subnets
from overlaynet.network import Network, parse
from overlaynet.reconcile import desired_peers
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.testing.etcd import EtcdServer

pytestmark = pytest.mark.anyio

DAY = 86400
DOCUMENT = '{"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}'
NETWORK = parse(DOCUMENT)
RESERVED = Subnets(IPv4Network("10.244.7.0/24"))
_numbers = itertools.count()


class Poison(AssertionError):
    """What flannel cannot read: it takes such an event for an empty list, and removes all its peers."""


class SubnetTaken(Exception):
    """flanneld ends: "failed to acquire lease: subnet already exists"."""


@attrs.frozen
class Seen:
    """A lease as flannel reads it."""

    ipv4: IPv4Network
    ipv6: IPv6Network | None
    public_ip: str
    ttl: int
    value: bytes


def read_key(key: str) -> tuple[IPv4Network, IPv6Network | None]:
    """The subnets of a key, by flannel's expression. :raises Poison: if it has none."""
    match = re.search(r"(\d+\.\d+.\d+.\d+)-(\d+)(?:&([a-f\d:]+)-(\d+))?$", key)
    if match is None:
        raise Poison(f"no key of a subnet: {key}")
    ipv4, length, ipv6, length6 = match.groups()
    if int(length) > 31 or (length6 is not None and int(length6) > 127):
        raise Poison(f"no length that flannel reads: {key}")
    return (
        IPv4Network(f"{ipv4}/{length}"),
        None if ipv6 is None else IPv6Network(f"{ipv6}/{length6}"),
    )


def read_value(value: bytes) -> str:
    """The PublicIP of a value, as Go's encoding/json reads it. :raises Poison: if it refuses."""

    def refuse(text: str) -> None:
        raise Poison(f"no JSON: {text}")

    try:
        content = json.loads(value.decode(), parse_constant=refuse)
    except ValueError as error:
        raise Poison(f"no JSON: {value!r}") from error
    if not isinstance(content, dict):
        raise Poison(f"no object: {value!r}")
    fields = {name.lower(): member for name, member in content.items()}
    public_ip, public_ipv6 = fields.get("publicip", "0.0.0.0"), fields.get("publicipv6")
    if not isinstance(public_ip, str) or not (public_ipv6 is None or isinstance(public_ipv6, str)):
        raise Poison(f"an address that is none: {value!r}")
    ipaddress.IPv4Address(public_ip)
    if public_ipv6 is not None:
        ipaddress.IPv6Address(public_ipv6)
    if not isinstance(fields.get("backendtype", ""), str):
        raise Poison(f"a BackendType that is none: {value!r}")
    return public_ip


def read(key: str, value: bytes) -> None:
    """:raises Poison: if flannel cannot read the record."""
    read_key(key)
    read_value(value)


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def unb64(text: str) -> bytes:
    return base64.b64decode(text)


def range_end(prefix: str) -> str:
    return b64(prefix[:-1] + chr(ord(prefix[-1]) + 1))


class Flannel:
    """A flannel node's dealings with etcd (backend udp, or another's attributes)."""

    def __init__(self, server: EtcdServer, prefix: str, public_ip: str, more: str = "") -> None:
        self.server = server
        self.prefix = prefix
        self.public_ip = public_ip
        self.value = f'{{"PublicIP":"{public_ip}","PublicIPv6":null{more}}}'

    def listing(self, revision: int = 0) -> dict[str, Any]:
        """All keys with the prefix that flannel lists and watches: it does not end in a slash."""
        subnets = f"{self.prefix}/subnets"
        body = {"key": b64(subnets), "range_end": range_end(subnets), "revision": str(revision)}
        answer: dict[str, Any] = self.server.post("/v3/kv/range", body)
        return answer

    def leases(self) -> dict[str, Seen]:
        """What flannel knows after a list: one more question for the lifetime of each lease."""
        seen = {}
        for found in self.listing().get("kvs", []):
            key, value = unb64(found["key"]).decode(), unb64(found["value"])
            living = self.server.post("/v3/lease/timetolive", {"ID": found.get("lease", "0")})
            seen[key] = Seen(*read_key(key), read_value(value), int(living.get("TTL", 0)), value)
        return seen

    def key(self, subnet: str) -> str:
        return f"{self.prefix}/subnets/{subnet.replace('/', '-')}"

    def grant(self, ttl: int = DAY) -> str:
        return str(self.server.post("/v3/lease/grant", {"TTL": str(ttl)})["ID"])

    def create(self, key: str) -> None:
        """:raises SubnetTaken: if the key exists. flannel revokes its etcd lease then, and ends."""
        lease = self.grant()
        answer = self.server.post(
            "/v3/kv/txn",
            {
                "compare": [{"target": "VERSION", "key": b64(key), "result": "EQUAL", "version": "0"}],
                "success": [{"requestPut": {"key": b64(key), "value": b64(self.value), "lease": lease}}],
            },
        )
        if not answer.get("succeeded"):
            self.server.post("/v3/lease/revoke", {"ID": lease})
            raise SubnetTaken(key)

    def put(self, key: str, ttl: int = DAY) -> None:
        """Renew, or take over: without any condition. The old etcd lease is left to its end."""
        self.server.post("/v3/kv/put", {"key": b64(key), "value": b64(self.value), "lease": self.grant(ttl)})

    def acquire(self, network: Network = NETWORK, ttl: int = DAY) -> str:
        """One try of ``AcquireLease`` without a subnet file; returns the key."""
        leases = self.leases()
        for key, seen in leases.items():
            if seen.public_ip == self.public_ip:
                if network.grants(Subnets(seen.ipv4, seen.ipv6)):
                    self.put(key, ttl)
                    return key
                self.server.post("/v3/kv/deleterange", {"key": b64(key)})
        assert network.ipv4 is not None
        free = []
        for number in range(network.ipv4.size):
            candidate = network.ipv4[number]
            if not any(candidate.overlaps(seen.ipv4) for seen in leases.values()):
                free.append(str(candidate))
            if len(free) == 100:
                break
        key = self.key(random.choice(free))
        self.create(key)
        return key


def history(flannel: Flannel, since: int) -> Iterator[tuple[int, str, bytes | None]]:
    """Every event below flannel's prefix after a revision: the key, and its value or ``None`` for a deletion."""
    latest = int(flannel.listing()["header"]["revision"])
    before: dict[str, tuple[str, bytes]] = {}
    for revision in range(since, latest + 1):
        now = {
            unb64(found["key"]).decode(): (found["mod_revision"], unb64(found["value"]))
            for found in flannel.listing(revision).get("kvs", [])
        }
        if revision > since:
            for key in now.keys() | before.keys():
                if now.get(key) != before.get(key):
                    yield revision, key, now[key][1] if key in now else None
        before = now


def check_no_poison(flannel: Flannel, since: int) -> int:
    """Read every event since a revision as flannel does; how many there were. :raises Poison: at one that it cannot read."""
    events = 0
    for _, key, value in history(flannel, since):
        events += 1
        assert key.startswith(f"{flannel.prefix}/subnets/"), "flannel would take it for a lease, or for none"
        read_key(key)
        if value is not None:
            read_value(value)
    flannel.leases()  # and the lifetime of each can be asked for
    return events


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
def prefix() -> str:
    return f"/coreos.com/network{next(_numbers)}"


MakeStore = Callable[[], EtcdStore]
MakeFlannel = Callable[..., Flannel]


@pytest.fixture
async def make_store(etcd: EtcdServer, prefix: str) -> AsyncIterator[MakeStore]:
    made: list[EtcdStore] = []

    def make() -> EtcdStore:
        made.append(EtcdStore(EtcdOptions(endpoints=(etcd.endpoint,), prefix=prefix)))
        return made[-1]

    yield make
    for store in made:
        await store.aclose()


@pytest.fixture
def store(make_store: MakeStore) -> EtcdStore:
    return make_store()


@pytest.fixture
def make_flannel(etcd: EtcdServer, prefix: str) -> MakeFlannel:
    return functools.partial(Flannel, etcd, prefix)


@pytest.fixture
def flannel(make_flannel: MakeFlannel) -> Flannel:
    return make_flannel("192.168.64.3")


def request(node: str, address: str, run: str = "1", previous: Subnets | None = None) -> LeaseRequest:
    return LeaseRequest(node, run, IPv4Address(address), previous=previous)


def subnet(number: int) -> Subnets:
    """A subnet for a node to ask for, where a random one could be that of another part of the test."""
    return Subnets(IPv4Network(f"10.244.{number}.0/24"))


def revision(flannel: Flannel) -> int:
    return int(flannel.listing()["header"]["revision"])


# The reader is as strict as flannel


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("/p/subnets/notes", b'{"PublicIP":"192.0.2.1"}'),
        ("/p/subnets-meta", b"{}"),
        ("/p/subnets/10.5.1.7-32", b'{"PublicIP":"192.0.2.1"}'),
        ("/p/subnets/10.5.1.0-24", b'{"PublicIP":null}'),
        ("/p/subnets/10.5.1.0-24", b"{"),
        ("/p/subnets/10.5.1.0-24", b'{"BackendData":NaN}'),
    ],
)
def test_what_flannel_cannot_read_is_found(key: str, value: bytes) -> None:
    with pytest.raises(Poison):
        read(key, value)


async def test_poison_is_found_in_the_history_also_when_it_is_gone_again(store: EtcdStore, flannel: Flannel) -> None:
    since = revision(flannel)
    record = await store.table.create("subnets/notes", b"{}")
    assert record is not None
    assert await store.table.delete(record)
    with pytest.raises(Poison):
        check_no_poison(flannel, since)


# What flannel wrote


async def test_a_lease_that_flannel_claims_is_a_peers(store: EtcdStore, flannel: Flannel) -> None:
    own = await store.acquire(NETWORK, request("a", "192.168.64.9"))
    async with aclosing(store.watch()) as snapshots:
        assert (await anext(snapshots)).leases == (own,)
        key = flannel.acquire()
        snapshot = await anext(snapshots)
        desired = desired_peers(NETWORK, own, snapshot, "udp")
        (peer,) = desired.peers
        assert key.endswith(f"/subnets/{str(peer.subnets).replace('/', '-')}")
        assert peer.public_ipv4 == IPv4Address("192.168.64.3")
        assert desired.rejected == ()
        (found,) = [lease for lease in (await store.leases()).leases if not lease.node]
        assert found.ttl is not None
        assert DAY - 60 < found.ttl <= DAY
        flannel.put(key)  # its renewal is no change
        other = await store.acquire(NETWORK, request("b", "192.168.64.10"))
        peers = desired_peers(NETWORK, own, await anext(snapshots), "udp").peers
        assert {found.subnets for found in peers} == {peer.subnets, other.subnets}


async def test_what_flannel_holds_is_never_given_to_a_node_of_ours(store: EtcdStore, make_flannel: MakeFlannel) -> None:
    few = parse('{"Network": "10.244.0.0/16", "SubnetMin": "10.244.1.0", "SubnetMax": "10.244.20.0"}')
    held = [make_flannel(f"192.168.64.{number}").acquire(few) for number in range(10, 20)]
    leases = [await store.acquire(few, request(f"node-{n}", f"192.168.65.{n}")) for n in range(10)]
    keys = {f"/subnets/{str(lease.subnets).replace('/', '-')}" for lease in leases}
    assert len(keys) == 10
    assert not any(key.endswith(tuple(keys)) for key in held)


async def test_a_host_that_moves_from_flannel_keeps_its_subnet(store: EtcdStore, flannel: Flannel) -> None:
    key = flannel.acquire()
    lease = await store.acquire(NETWORK, request("a", "192.168.64.3"))
    assert key.endswith(f"/subnets/{str(lease.subnets).replace('/', '-')}")
    seen = flannel.leases()[key]
    assert seen.public_ip == "192.168.64.3"
    assert seen.value == b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"Overlaynet":{"Node":"a","Run":"1"}}'


async def test_a_flannel_node_that_renews_what_was_taken_over_ends_up_alone(store: EtcdStore, flannel: Flannel) -> None:
    # Both run on the host, by mistake: flannel puts without asking, so ours has to be the one that goes.
    key = flannel.acquire()
    lease = await store.acquire(NETWORK, request("a", "192.168.64.3"))
    async with aclosing(store.watch()) as snapshots:
        assert [found.node for found in (await anext(snapshots)).leases] == ["a"]
        flannel.put(key)
        assert [found.node for found in (await anext(snapshots)).leases] == [""], "noticed at once"
    with pytest.raises(LeaseLost, match=r"was taken by node \(unnamed\) at 192\.168\.64\.3"):
        await store.renew(NETWORK, lease)
    assert flannel.leases()[key].value == b'{"PublicIP":"192.168.64.3","PublicIPv6":null}'


async def test_flannels_lease_that_ends_is_gone(store: EtcdStore, flannel: Flannel) -> None:
    async with aclosing(store.watch()) as snapshots:
        assert await anext(snapshots) == Snapshot()
        flannel.put(flannel.key("10.244.9.0/24"), ttl=1)
        assert len((await anext(snapshots)).leases) == 1
        assert (await anext(snapshots)).leases == ()


@pytest.mark.parametrize(
    "more",
    [
        ',"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}',
        ',"BackendType":"extension","BackendData":"some output"',
        ',"BackendType":"host-gw"',
    ],
)
async def test_leases_of_flannels_other_backends_are_read_and_stay_taken(
    store: EtcdStore, make_flannel: MakeFlannel, more: str
) -> None:
    key = make_flannel("192.168.64.3", more).acquire()
    (found,) = (await store.leases()).leases
    assert key.endswith(str(found.subnets).replace("/", "-"))
    own = await store.acquire(NETWORK, request("a", "192.168.64.9", previous=found.subnets))
    assert own.subnets != found.subnets
    (rejected,) = desired_peers(NETWORK, own, await store.leases(), "udp").rejected
    assert rejected.reason.startswith("its node runs the backend ")


async def test_pairs_of_both_families_are_read(store: EtcdStore, flannel: Flannel) -> None:
    flannel.create(f"{flannel.prefix}/subnets/10.244.7.0-24&fd00:10:244:3::-64")
    (found,) = (await store.leases()).leases
    assert found.subnets == Subnets(IPv4Network("10.244.7.0/24"), IPv6Network("fd00:10:244:3::/64"))


# What we wrote


async def test_flannel_reads_our_leases_and_leaves_them(store: EtcdStore, flannel: Flannel) -> None:
    few = parse('{"Network": "10.244.0.0/16", "SubnetMin": "10.244.1.0", "SubnetMax": "10.244.4.0"}')
    ours = [await store.acquire(few, request(f"node-{n}", f"192.168.65.{n}")) for n in range(1, 4)]
    seen = {str(lease.ipv4): lease for lease in flannel.leases().values()}
    for number, lease in enumerate(ours, 1):
        assert seen[str(lease.subnets)].public_ip == f"192.168.65.{number}"
        assert DAY - 60 < seen[str(lease.subnets)].ttl <= DAY
    key = flannel.acquire(few)
    assert not any(key.endswith(str(lease.subnets).replace("/", "-")) for lease in ours)
    for lease in ours:
        await store.renew(few, lease)


async def test_our_lease_ends_for_flannel_when_it_ends_for_us(store: EtcdStore, flannel: Flannel) -> None:
    await store.acquire(attrs.evolve(NETWORK, lease_ttl=1), request("a", "192.168.64.9"))
    assert len(flannel.leases()) == 1
    async with asyncio.timeout(20):
        while flannel.leases():
            await asyncio.sleep(0.1)


async def test_a_host_that_moves_to_flannel_keeps_its_subnet(store: EtcdStore, flannel: Flannel) -> None:
    lease = await store.acquire(NETWORK, request("a", "192.168.64.3"))
    key = flannel.acquire()
    assert key.endswith(f"/subnets/{str(lease.subnets).replace('/', '-')}")
    with pytest.raises(LeaseLost):
        await store.renew(NETWORK, lease)


async def test_of_two_claims_of_one_subnet_at_once_one_succeeds(
    make_store: MakeStore, make_flannel: MakeFlannel
) -> None:
    for number in range(10):
        store, flannel = make_store(), make_flannel(f"192.168.64.{number + 10}")
        wanted = Subnets(IPv4Network(f"10.244.{number + 30}.0/24"))
        key = flannel.key(str(wanted))
        claim = asyncio.create_task(
            store.acquire(NETWORK, request(f"node-{number}", f"192.168.65.{number}", previous=wanted))
        )
        await asyncio.sleep(number * 0.002)
        flannels = True
        try:
            await asyncio.to_thread(flannel.create, key)
        except SubnetTaken:
            flannels = False
        lease = await claim
        ours = lease.subnets == wanted
        assert ours != flannels
        assert flannel.leases()[key].public_ip.startswith("192.168.65." if ours else "192.168.64.")
        await store.release(lease)


async def test_the_network_document_is_one_that_flannel_reads(
    etcd: EtcdServer, prefix: str, flannel: Flannel, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--etcd-endpoints", etcd.endpoint, "--etcd-prefix", prefix]
    await asyncio.to_thread(
        main, ["network", "set", "--network", "10.244.0.0/16", "--lease-ttl", "600", "--subnet-len", "25", *arguments]
    )
    capsys.readouterr()
    answer = etcd.post("/v3/kv/range", {"key": b64(f"{prefix}/config")})
    assert json.loads(unb64(answer["kvs"][0]["value"])) == {
        "Network": "10.244.0.0/16",
        "SubnetLen": 25,
        "LeaseTTL": 600.0,
        "Backend": {"Type": "udp"},
    }


# Nothing is poison


async def test_nothing_that_a_node_ever_writes_is_poison(make_store: MakeStore, flannel: Flannel) -> None:
    since = revision(flannel)
    store, other = make_store(), make_store()
    await store.replace_network(DOCUMENT)
    lease = await store.acquire(NETWORK, request("a", "192.168.64.9", previous=subnet(100)))
    lease = await store.renew(NETWORK, attrs.evolve(lease, data=LeaseData("vxlan", {"VNI": 1}, {"VNI": 1})))
    lease = await store.renew(NETWORK, attrs.evolve(lease, public_ipv4=None, data=LeaseData()))
    await other.acquire(NETWORK, LeaseRequest("größer 節点", "1", previous=subnet(101)))
    await store.reserve(Reservation(RESERVED, node="b"))
    await store.reserve(Reservation(Subnets(IPv4Network("10.244.8.0/24")), public_ipv4=IPv4Address("192.168.64.7")))
    pair = Subnets(IPv4Network("10.244.9.0/24"), IPv6Network("fd00:10:244:9::/64"))
    await store.reserve(Reservation(pair, node="c"))
    reserved = await other.acquire(NETWORK, request("b", "192.168.64.10"))
    assert reserved.subnets == RESERVED
    await other.renew(NETWORK, reserved)
    await other.release(reserved)
    await store.unreserve(RESERVED)
    await store.unreserve(pair)
    short = await other.acquire(attrs.evolve(NETWORK, lease_ttl=1), request("d", "192.168.64.11"))
    assert await store.remove((await store.leases()).leases[0])
    await store.renew(NETWORK, lease)
    async with asyncio.timeout(20):
        while any(found.subnets == short.subnets for found in (await store.leases()).leases):
            await asyncio.sleep(0.1)
    moved = parse('{"Network": "10.99.0.0/16", "SubnetLen": 26}')
    await store.release(await store.acquire(moved, request("a", "192.168.64.9", run="2")))
    assert check_no_poison(flannel, since) >= 15


async def test_a_lease_of_ipv6_alone_is_no_poison(store: EtcdStore, flannel: Flannel) -> None:
    since = revision(flannel)
    only6 = parse('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
    await store.acquire(only6, request("a", "192.168.64.9"))
    nowhere = LeaseRequest("b", "1", None, IPv6Address("2001:db8::9"))  # nor has the host an IPv4 address
    await store.acquire(only6, nowhere)
    assert check_no_poison(flannel, since) == 2
    for seen in flannel.leases().values():
        assert seen.ipv4 == IPv4Network("0.0.0.0/0")


async def test_what_a_store_refuses_to_write_is_not_there(store: EtcdStore, flannel: Flannel) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        await store.acquire(NETWORK, attrs.evolve(request("a", "192.168.64.9"), data=LeaseData("x", float("nan"))))
    assert flannel.leases() == {}


# Reservations


async def test_a_flannel_node_never_takes_what_is_reserved_for_another(
    store: EtcdStore, make_flannel: MakeFlannel
) -> None:
    few = parse('{"Network": "10.244.0.0/16", "SubnetMin": "10.244.7.0", "SubnetMax": "10.244.9.0"}')
    await store.reserve(Reservation(RESERVED, node="b"))
    taken = {make_flannel(f"192.168.64.{n}").acquire(few).rpartition("/")[2] for n in (1, 2)}
    assert taken == {"10.244.8.0-24", "10.244.9.0-24"}
    assert (await store.acquire(few, request("b", "192.168.64.9"))).subnets == RESERVED


async def test_a_flannel_node_whose_address_it_is_reserved_for_takes_it_and_again_after_its_end(
    make_store: MakeStore, store: EtcdStore, flannel: Flannel
) -> None:
    reservation = Reservation(RESERVED, public_ipv4=IPv4Address("192.168.64.3"))
    await store.reserve(reservation)
    # What flannel does with a key without an etcd lease: the question for its lifetime is answered with -1.
    assert [seen.ttl for seen in flannel.leases().values()] == [-1]
    watching = make_store()
    async with aclosing(watching.watch()) as snapshots:
        await anext(snapshots)
        assert flannel.acquire(ttl=1) == flannel.key("10.244.7.0/24")
        (lease,) = (await anext(snapshots)).leases
        assert lease == Lease(RESERVED, IPv4Address("192.168.64.3"))
        assert (await anext(snapshots)).leases == ()
    (seen,) = flannel.leases().values()
    assert seen.value == b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"Overlaynet":{"Reserved":true}}'
    assert (await store.reservations()).reservations == (reservation,)
    assert flannel.acquire() == flannel.key("10.244.7.0/24")


async def test_a_subnet_that_flannel_holds_cannot_be_reserved_for_another(store: EtcdStore, flannel: Flannel) -> None:
    key = flannel.acquire()
    held = Subnets(flannel.leases()[key].ipv4)
    with pytest.raises(Exception, match=r"is held by a node at 192\.168\.64\.3, not by node b"):
        await store.reserve(Reservation(held, node="b"))
    await store.reserve(Reservation(held, public_ipv4=IPv4Address("192.168.64.3")))


# Behind one address


async def test_nodes_behind_one_address_are_as_many_nodes_beside_flannels_records(
    make_store: MakeStore, flannel: Flannel
) -> None:
    stores = [make_store() for _ in range(4)]
    leases = [
        await store.acquire(NETWORK, request(f"node-{n}", "192.168.64.3", previous=subnet(n + 100)))
        for n, store in enumerate(stores)
    ]
    assert len({lease.subnets for lease in leases}) == 4
    flannel.create(flannel.key("10.244.250.0/24"))
    for store, lease in zip(stores, leases, strict=True):
        await store.renew(NETWORK, lease)
    late = await stores[0].acquire(NETWORK, request("late", "192.168.64.3"))
    assert late.subnets not in {lease.subnets for lease in leases} | {Subnets(IPv4Network("10.244.250.0/24"))}
    again = [await store.acquire(NETWORK, request(f"node-{n}", "192.168.64.3", "2")) for n, store in enumerate(stores)]
    assert [lease.subnets for lease in again] == [lease.subnets for lease in leases]
