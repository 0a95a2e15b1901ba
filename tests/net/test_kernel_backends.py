"""The vxlan and host-gw backends with real devices, routes and packets: hosts on two links, in namespaces."""

import contextlib
import errno
import json
import logging
import socket
import subprocess
from collections.abc import Callable, Coroutine, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, TypeVar

import attrs
import pytest

from overlaynet import devices
from overlaynet.backends.host_gw import HostGwBackend, HostGwOptions
from overlaynet.backends.vxlan import VxlanBackend, VxlanOptions
from overlaynet.drivers import Backend
from overlaynet.errors import BackendError
from overlaynet.model import Device, Lease, LeaseData, Peer, Route, Subnets, Underlay
from overlaynet.netlink import Netlink
from overlaynet.network import Network, parse
from overlaynet.reconcile import backstops
from overlaynet.routers.netlink import Ownership, synchronise
from overlaynet.testing.capture import Capture, Packet
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.testing.packets import UDP

T = TypeVar("T")

BOTH = parse('{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
IPV4 = parse('{"Network": "10.244.0.0/16"}')
IPV6 = parse('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}')
ROUTER_PROTOCOL = 82


class Host:
    """A host with one backend at a time, and what a daemon does for it."""

    def __init__(self, namespace: NetworkNamespace, middle: NetworkNamespace, link: int, number: int) -> None:
        self.namespace = namespace
        self.middle = middle
        self.link_number = link
        self.number = number
        self.ipv4, self.ipv6 = IPv4Address(f"172.16.{link}.{number}"), IPv6Address(f"fd00:{link}::{number}")
        self.subnets = Subnets(IPv4Network(f"10.244.{number}.0/24"), IPv6Network(f"fd00:10:244:{number}::/64"))
        self.container, self.container6 = f"10.244.{number}.1", f"fd00:10:244:{number}::1"
        self.network = IPV4
        self.made: list[Backend] = []
        self.data = LeaseData()
        self.device = Device("", 0)
        namespace.ip(
            "link set lo up",
            f"address add {self.container}/32 dev lo",
            f"address add {self.container6}/128 dev lo",
        )
        namespace.set_sysctl("net.ipv4.ip_forward", 1)
        namespace.set_sysctl("net.ipv6.conf.all.forwarding", 1)

        self.plug_in()

    def plug_in(self) -> None:
        """Give it an ``eth0`` on its link."""
        link, number = self.link_number, self.number
        self.middle.ip(
            f"link add port{number} type veth peer name eth0 netns {self.namespace.name}",
            f"link set port{number} master link{link} up",
        )
        self.namespace.ip(
            "link set eth0 up",
            f"address add {self.ipv4}/24 dev eth0",
            f"address add {self.ipv6}/64 dev eth0 nodad",
            f"route add default via 172.16.{link}.254",
            f"route add default via fd00:{link}::fe",
        )

    @property
    def underlay(self) -> Underlay:
        return Underlay("eth0", 1500, self.ipv4, self.ipv6, self.ipv4, self.ipv6)

    @property
    def backend(self) -> Backend:
        return self.made[-1]

    @property
    def peer(self) -> Peer:
        """How the others see it."""
        subnets = Subnets(
            self.subnets.ipv4 if self.network.ipv4 is not None else None,
            self.subnets.ipv6 if self.network.ipv6 is not None else None,
        )
        return Peer(subnets, self.ipv4, self.ipv6, data=self.data)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        async def wait() -> T:
            return await coroutine

        return self.namespace.run_async(wait)

    def ask(self, function: Callable[[Netlink], T]) -> T:
        def call() -> T:
            with Netlink() as kernel:
                return function(kernel)

        return self.namespace.run(call)

    def open(self, backend: Backend, network: Network = IPV4) -> None:
        self.network = network
        self.made.append(backend)
        self.data = self.wait(backend.open(network, self.underlay))

    def start(self, backend: Backend, network: Network = IPV4) -> None:
        self.open(backend, network)
        self.device = self.wait(backend.start(Lease(self.peer.subnets, self.ipv4, self.ipv6, self.data)))
        self.apply([])

    def meet(self, *hosts: "Host") -> None:
        """Get to know the hosts, and no others."""
        self.meet_peers([host.peer for host in hosts])

    def meet_peers(self, peers: Sequence[Peer]) -> None:
        self.wait(self.backend.set_peers(peers))
        self.apply(self.backend.routes(peers))

    def apply(self, routes: Sequence[Route]) -> None:
        """What the router does."""
        ownership = Ownership(self.device.instance, ROUTER_PROTOCOL)
        wanted = {ownership.kernel_route(route) for route in [*backstops(self.network), *routes]}
        self.ask(lambda kernel: synchronise(kernel, ownership, wanted))

    def stop(self) -> None:
        self.wait(self.backend.aclose())

    def ping(self, other: "Host", version: int = 4, *arguments: str) -> subprocess.CompletedProcess[str]:
        source, destination = (self.container, other.container) if version == 4 else (self.container6, other.container6)
        command = ["ping", f"-{version}", "-n", "-c", "1", "-W", "2", "-I", source, *arguments, destination]
        return self.namespace.execute(command, check=False)

    def reaches(self, other: "Host", version: int = 4, *arguments: str) -> bool:
        return self.ping(other, version, *arguments).returncode == 0

    def routes(self) -> list[str]:
        """The routes that are ours, as ``ip route`` shows them, but for the backstops."""
        shown = [
            self.namespace.execute(["ip", version, "route", "show", "proto", str(ROUTER_PROTOCOL)]).stdout
            for version in ("-4", "-6")
        ]
        return [" ".join(line.split()) for line in "".join(shown).splitlines() if "unreachable" not in line]

    def link(self, name: str) -> Any:
        """What ``ip`` says of an interface; ``None`` if there is none of that name."""
        found = [link for link in self.namespace.ip_json("link", "show") if link["ifname"] == name]
        return found[0] if found else None

    def entries(self, name: str = "overlay0") -> tuple[set[str], set[str]]:
        """The permanent neighbours and forwarding entries of a device, as ``ip`` and ``bridge`` show them."""
        neighbours = self.namespace.execute(["ip", "neighbour", "show", "dev", name, "nud", "permanent"]).stdout
        neighbours += self.namespace.execute(["ip", "-6", "neighbour", "show", "dev", name, "nud", "permanent"]).stdout
        forwarding = self.namespace.execute(["bridge", "fdb", "show", "dev", name]).stdout
        return (
            {" ".join(line.split()) for line in neighbours.splitlines()},
            {" ".join(line.split()) for line in forwarding.splitlines() if "permanent" in line},
        )

    def close(self) -> None:
        for backend in self.made:
            self.wait(backend.aclose())


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host, Host]]:
    """Hosts 1 and 2 on one link, and host 3 on another, behind a router."""
    with contextlib.ExitStack() as stack:
        middle = stack.enter_context(NetworkNamespace(label="middle"))
        middle.set_sysctl("net.ipv6.conf.default.accept_dad", 0)  # link-local addresses are usable at once
        middle.ip("link set lo up", *[f"link add link{n} type bridge mcast_snooping 0" for n in (130, 131)])
        for link in (130, 131):
            middle.ip(
                f"link set link{link} up",
                f"address add 172.16.{link}.254/24 dev link{link}",
                f"address add fd00:{link}::fe/64 dev link{link} nodad",
            )
        middle.set_sysctl("net.ipv4.ip_forward", 1)
        middle.set_sysctl("net.ipv6.conf.all.forwarding", 1)
        made = []
        for number, link in ((1, 130), (2, 130), (3, 131)):
            namespace = stack.enter_context(NetworkNamespace(label=f"host-{number}"))
            namespace.set_sysctl("net.ipv6.conf.default.accept_dad", 0)
            host = Host(namespace, middle, link, number)
            stack.callback(host.close)
            made.append(host)
        a, b, c = made
        yield a, b, c


def vxlan(**options: Any) -> VxlanBackend:
    return VxlanBackend(VxlanOptions(**options))


def host_gw(**options: Any) -> HostGwBackend:
    return HostGwBackend(HostGwOptions(**options))


def acquaint(*hosts: Host) -> None:
    for host in hosts:
        host.meet(*(other for other in hosts if other is not host))


def is_vxlan(packet: Packet) -> bool:
    return (
        packet.ip is not None and isinstance(packet.ip.transport, UDP) and packet.ip.transport.destination_port == 8472
    )


# vxlan


def test_vxlan_carries_packets_on_one_link_and_across_a_router(hosts: tuple[Host, Host, Host]) -> None:
    for host in hosts:
        host.start(vxlan())
    acquaint(*hosts)
    a, b, c = hosts
    with Capture({"eth0": (a.namespace, "eth0")}, keep=is_vxlan) as capture:
        assert a.reaches(b)
        datagram = capture.wait_for(lambda packet: packet.outgoing)
        capture.wait_for(lambda packet: not packet.outgoing)
    assert datagram.ip is not None
    assert (datagram.ip.header.source, datagram.ip.header.destination) == (a.ipv4, b.ipv4)
    assert datagram.ip.header.total_length == 84 + 50, "the headers that the MTU leaves room for"
    assert a.reaches(c)
    assert c.reaches(b)
    assert a.reaches(b, 4, "-M", "do", "-s", str(1450 - 28)), "a packet of the MTU passes"
    assert "mtu" in a.ping(b, 4, "-M", "do", "-s", str(1451 - 28)).stderr


def test_the_vxlan_device_is_as_documented(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    a.start(vxlan(identifier=7, port=8473, group_policy=True, mtu=1400), BOTH)
    b.start(vxlan(), BOTH)
    assert (a.device, b.device) == (Device("overlay0", 1330), Device("overlay0", 1430)), "room for IPv6's headers"
    for name, local, mtu in (
        ("overlay0", {"local": "172.16.130.1"}, 1350),
        ("overlay0-v6", {"local6": "fd00:130::1"}, 1330),
    ):
        link = a.link(name)
        assert link["linkinfo"]["info_kind"] == "vxlan"
        assert local.items() | {"id": 7, "port": 8473, "link": "eth0", "learning": False}.items() <= (
            link["linkinfo"]["info_data"].items()
        )
        assert link["linkinfo"]["info_data"]["gbp"] is True
        assert (link["mtu"], link["ifalias"]) == (mtu, "overlaynet vxlan")
        assert "UP" in link["flags"]
    assert b.link("overlay0")["linkinfo"]["info_data"]["port"] == 8472
    assert "gbp" not in b.link("overlay0")["linkinfo"]["info_data"]
    for name, addresses in (("overlay0", ["10.244.1.0/32"]), ("overlay0-v6", ["fd00:10:244:1::/128"])):
        (found,) = a.namespace.ip_json("address", "show", "dev", name)
        assert [f"{one['local']}/{one['prefixlen']}" for one in found["addr_info"]] == addresses


def test_what_vxlan_publishes_is_flannels_to_the_byte(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    a.start(vxlan())
    address = a.link("overlay0")["address"]
    value = json.dumps(attrs.asdict(a.data)["ipv4"], separators=(",", ":"))
    assert (a.data.backend_type, value, a.data.ipv6) == ("vxlan", f'{{"VNI":1,"VtepMAC":"{address}"}}', None)
    b.start(vxlan(), BOTH)
    assert b.data.ipv4 == {"VNI": 1, "VtepMAC": b.link("overlay0")["address"]}
    assert b.data.ipv6 == {"VNI": 1, "VtepMAC": b.link("overlay0-v6")["address"]}
    assert b.data.ipv4 != b.data.ipv6


def test_each_peer_has_a_neighbour_a_forwarding_entry_and_a_route(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    a.start(vxlan())
    b.start(vxlan())
    acquaint(a, b)
    address = b.link("overlay0")["address"]
    assert a.entries() == ({f"10.244.2.0 lladdr {address} PERMANENT"}, {f"{address} dst 172.16.130.2 self permanent"})
    assert a.routes() == ["10.244.2.0/24 via 10.244.2.0 dev overlay0 onlink"]
    assert a.backend.status() == {
        "devices": {"overlay0": {"mtu": 1450, "hardware_address": a.link("overlay0")["address"]}},
        "vni": 1,
        "port": 8472,
        "peers": {"10.244.2.0/24": {"address": "172.16.130.2", "hardware_address": address, "path": "tunnel"}},
        "skipped": {},
    }
    a.meet()
    assert a.entries() == (set(), set())
    assert a.routes() == []
    with (
        a.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        pytest.raises(OSError, match="No route to host") as refused,
    ):
        sender.connect((b.container, 9))
    assert refused.value.errno == errno.EHOSTUNREACH


@pytest.mark.parametrize("network", [BOTH, IPV6], ids=["dual-stack", "IPv6 only"])
def test_vxlan_carries_ipv6_over_ipv6(hosts: tuple[Host, Host, Host], network: Network) -> None:
    for host in hosts:
        host.start(vxlan(), network)
    acquaint(*hosts)
    a, b, c = hosts
    assert a.reaches(b, 6)
    assert c.reaches(a, 6)
    assert a.reaches(b, 6, "-M", "do", "-s", str(1430 - 48))
    assert a.device.mtu == 1430
    assert a.reaches(b) == (network is BOTH)
    address = b.link("overlay0-v6")["address"]
    neighbours, forwarding = a.entries("overlay0-v6")
    assert f"fd00:10:244:2:: lladdr {address} PERMANENT" in neighbours
    assert f"{address} dst fd00:130::2 self permanent" in forwarding
    assert "fd00:10:244:2::/64 via fd00:10:244:2:: dev overlay0-v6" in a.routes()[-2]
    assert (a.link("overlay0") is not None) == (network is BOTH)


def test_with_direct_routing_only_what_crosses_a_router_is_tunnelled(hosts: tuple[Host, Host, Host]) -> None:
    for host in hosts:
        host.start(vxlan(direct_routing=True), BOTH)
    acquaint(*hosts)
    a, b, c = hosts
    paths = {subnet: peer["path"] for subnet, peer in a.backend.status()["peers"].items()}  # type: ignore[union-attr, call-overload, index]
    assert paths == {
        "10.244.2.0/24": "direct",
        "fd00:10:244:2::/64": "direct",
        "10.244.3.0/24": "tunnel",
        "fd00:10:244:3::/64": "tunnel",
    }
    with Capture({"eth0": (a.namespace, "eth0")}, keep=is_vxlan) as capture:
        assert a.reaches(b)
        assert a.reaches(b, 6)
        assert capture.packets == []
        assert a.reaches(c)
        assert a.reaches(c, 6)
        assert c.reaches(a)
        assert len(capture.packets) == 6
    # The topology changes: b is no longer on the link.
    b_address = b.link("overlay0")["address"]
    assert not any(b_address in entry for entry in a.entries()[1])
    a.namespace.ip("route add 172.16.130.2/32 via 172.16.130.254")
    acquaint(a, b, c)
    assert any(b_address in entry for entry in a.entries()[1])
    assert "10.244.2.0/24 via 10.244.2.0 dev overlay0 onlink" in a.routes()
    a.namespace.ip("route del 172.16.130.2/32")
    acquaint(a, b, c)
    assert not any(b_address in entry for entry in a.entries()[1])
    assert a.reaches(b)


def test_what_is_deleted_by_hand_is_restored_and_what_is_foreign_removed(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan(), BOTH)
    acquaint(a, b)
    wanted = a.entries(), a.entries("overlay0-v6")
    address, address6 = b.link("overlay0")["address"], b.link("overlay0-v6")["address"]
    a.namespace.execute(["bridge", "fdb", "del", address, "dev", "overlay0", "dst", "172.16.130.2", "self"])
    a.namespace.ip(
        "neighbour del fd00:10:244:2:: dev overlay0-v6",
        "neighbour replace 10.244.2.0 dev overlay0 lladdr 02:00:00:00:00:99 nud permanent",
        "neighbour add 10.244.9.0 dev overlay0 lladdr 02:00:00:00:00:09 nud permanent",
        "neighbour add 172.16.130.99 dev eth0 lladdr 02:00:00:00:00:99 nud permanent",
    )
    for mac, destination, device in (
        ("02:00:00:00:00:09", "172.16.130.9", "overlay0"),
        (address6, "fd00:130::9", "overlay0-v6"),
    ):
        a.namespace.execute(["bridge", "fdb", "replace", mac, "dev", device, "dst", destination, "self", "permanent"])
    assert not a.reaches(b)
    assert not a.reaches(b, 6)
    a.meet(b)
    assert (a.entries(), a.entries("overlay0-v6")) == wanted
    assert a.reaches(b)
    assert a.reaches(b, 6)
    assert a.entries("eth0")[0] == {"172.16.130.99 lladdr 02:00:00:00:00:99 PERMANENT"}, "not ours"


@pytest.mark.parametrize("other", ["port 9999", "vni 7", "via lo"])
def test_a_forwarding_entry_that_differs_in_more_than_its_host_is_put_right(
    hosts: tuple[Host, Host, Host], other: str
) -> None:
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan())
    acquaint(a, b)
    wanted = a.entries()
    address = b.link("overlay0")["address"]
    entry = [address, "dev", "overlay0", "dst", "172.16.130.2", *other.split(), "self", "permanent"]
    a.namespace.execute(["bridge", "fdb", "replace", *entry])
    assert a.entries() != wanted
    assert not a.reaches(b)
    a.meet(b)
    assert a.entries() == wanted
    assert a.reaches(b)


def test_every_forwarding_entry_that_is_not_a_peers_is_removed_at_once(hosts: tuple[Host, Host, Host]) -> None:
    """Where frames of no known address go, the kernel keeps several entries for one address."""
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan())
    acquaint(a, b)
    wanted = a.entries()
    for other in ("dst 172.16.130.7", "dst 172.16.130.8", "dst 172.16.130.8 port 9999 vni 7 via eth0"):
        entry = ["00:00:00:00:00:00", "dev", "overlay0", *other.split(), "self", "permanent"]
        a.namespace.execute(["bridge", "fdb", "append", *entry])
    assert len(a.entries()[1]) == 4
    a.meet(b)
    assert a.entries() == wanted
    assert a.reaches(b)


def test_the_same_peers_again_are_not_written_again(
    hosts: tuple[Host, Host, Host], caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c = hosts
    for host in hosts:
        host.start(vxlan(direct_routing=True), BOTH)
    acquaint(*hosts)
    with a.namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as monitor:
        monitor.setblocking(False)
        monitor.bind((0, 0b111_1111_1111))  # links, neighbours, addresses, routes of both versions
        with caplog.at_level(logging.INFO):
            a.meet(b, c)
        with pytest.raises(BlockingIOError):
            monitor.recv(65536)
        # Of forwarding entries that are written as they were, the kernel says nothing.
        assert caplog.records == []
        a.meet(b)
        assert monitor.recv(65536), "a change is seen"


def test_a_deleted_device_is_made_again_with_its_address_and_all_peers(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan(), BOTH)
    acquaint(a, b)
    before = a.link("overlay0"), a.link("overlay0-v6"), a.entries(), a.entries("overlay0-v6"), a.routes()
    a.namespace.ip("link delete overlay0", "link delete overlay0-v6")
    assert not a.reaches(b)
    a.meet(b)
    after = a.link("overlay0"), a.link("overlay0-v6"), a.entries(), a.entries("overlay0-v6"), a.routes()
    assert before[2:] == after[2:]
    for old, new in zip(before[:2], after[:2], strict=True):
        assert old["address"] == new["address"]
        assert old["ifindex"] != new["ifindex"]
    assert b.reaches(a)
    assert a.reaches(b, 6)


def test_a_device_that_was_changed_by_hand_is_repaired(
    hosts: tuple[Host, Host, Host], caplog: pytest.LogCaptureFixture
) -> None:
    """And what was changed is logged, once."""
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan(), BOTH)
    acquaint(a, b)
    wanted = a.link("overlay0"), a.entries(), a.entries("overlay0-v6")
    a.namespace.ip(
        "link set overlay0 down",
        "link set overlay0-v6 down",
        "link set overlay0 address 02:00:00:00:00:01 mtu 1300 alias other",
        "link set overlay0 alias 'overlaynet vxlan'",
        "address flush dev overlay0",
        "link set overlay0-v6 up",
    )
    assert not a.reaches(b)
    for _ in range(2):
        a.meet(b)
    told = [record.__dict__["fields"] for record in caplog.records if record.message == "device mended"]
    assert told == [
        {"device": "overlay0", "mended": "hardware address, MTU, it was down, addresses"},
        {"device": "overlay0-v6", "mended": "addresses"},
    ]
    assert (a.link("overlay0"), a.entries(), a.entries("overlay0-v6")) == wanted
    (found,) = a.namespace.ip_json("address", "show", "dev", "overlay0")
    assert [one["local"] for one in found["addr_info"]] == ["10.244.1.0"]
    assert a.reaches(b)
    assert a.reaches(b, 6)


def test_the_device_comes_back_with_its_underlay(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan())
    acquaint(a, b)
    a.namespace.ip("link delete eth0")
    assert a.link("overlay0") is None, "the kernel takes the device away with its underlay"
    for _ in range(2):
        with pytest.raises(BackendError, match="the kernel refused to find the interface eth0: No such device"):
            a.meet(b)
        assert a.backend.routes([b.peer]) == []
    a.plug_in()
    a.meet(b)
    assert a.reaches(b)
    assert b.reaches(a)


def test_trouble_with_one_device_leaves_the_other_alone(
    hosts: tuple[Host, Host, Host], caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c = hosts
    for host in hosts:
        host.start(vxlan(), BOTH)
    acquaint(a, b)
    b.meet(a, c)
    c.meet(a, b)
    a.namespace.ip("link delete overlay0-v6", "link add overlay0-v6 type bridge")
    a.namespace.ip("link delete overlay0")  # the other device is mended and gets new peers meanwhile
    for _ in range(2):
        with pytest.raises(
            BackendError, match=r"^the device name overlay0-v6 is taken by another interface \(bridge\)"
        ):
            a.meet(b, c)
        a.apply(a.backend.routes([b.peer, c.peer]))
        assert a.reaches(b)
        assert a.reaches(c)
    assert len(a.routes()) == 2
    assert a.link("overlay0-v6")["linkinfo"]["info_kind"] == "bridge"
    # The underlay changes; only what the bridge is in the way of has to wait.
    a.namespace.ip("address add 172.16.130.77/24 dev eth0")
    a.ipv4 = IPv4Address("172.16.130.77")
    assert a.wait(a.backend.set_underlay(a.underlay)) == Device("overlay0", 1430)
    assert a.link("overlay0")["linkinfo"]["info_data"]["local"] == "172.16.130.77"
    assert caplog.messages.count("device was gone") == 1, "it was deleted once; then it was replaced"
    b.meet(a, c)
    with pytest.raises(BackendError, match="overlay0-v6 is taken"):
        a.meet(b, c)
    a.apply(a.backend.routes([b.peer, c.peer]))
    assert a.reaches(b)
    a.namespace.ip("link delete overlay0-v6")
    a.meet(b, c)
    assert len(a.routes()) == 4
    assert a.reaches(b)
    assert a.reaches(b, 6)


def test_a_tunnel_that_the_kernel_refuses_has_no_route(
    hosts: tuple[Host, Host, Host], caplog: pytest.LogCaptureFixture
) -> None:
    """As where the device of an earlier run takes no more entries."""
    a, b, c = hosts
    for host in (b, c):
        host.start(vxlan())
    a.namespace.ip(
        "link add overlay0 type vxlan id 1 dstport 8472 local 172.16.130.1 dev eth0 nolearning maxaddress 1",
        "link set overlay0 alias 'overlaynet vxlan'",
    )
    a.start(vxlan())
    for _ in range(2):
        a.meet(b, c)
        assert a.routes() == ["10.244.2.0/24 via 10.244.2.0 dev overlay0 onlink"]
    status: Any = a.backend.status()
    assert status["peers"].keys() == {"10.244.2.0/24"}
    assert status["skipped"].keys() == {"10.244.3.0/24"}
    assert "No space left on device" in status["skipped"]["10.244.3.0/24"]
    assert [record.message for record in caplog.records].count("peer not reachable") == 1
    b.meet(a)
    assert a.reaches(b)


def test_a_crashed_runs_device_is_adopted_and_carries_packets_meanwhile(hosts: tuple[Host, Host, Host]) -> None:
    a, b, c = hosts
    for host in hosts:
        host.start(vxlan(), BOTH)
    acquaint(*hosts)
    before, data = a.link("overlay0"), a.data
    crash(a)
    assert b.reaches(a), "the kernel goes on"
    a.start(vxlan(), BOTH)
    assert a.link("overlay0") == before
    assert a.data == data
    a.meet(b)
    assert a.reaches(b)
    assert a.reaches(b, 6)
    gone = c.link("overlay0")["address"]
    assert not any(gone in entry for entry in a.entries()[1]), "what the crashed run knew of c is removed"
    assert a.routes()[0].startswith("10.244.2.0/24")


def crash(host: Host) -> None:
    """What the end of a process does to its backend: only its descriptors are closed."""
    backend = host.made.pop()
    assert isinstance(backend, VxlanBackend)
    assert backend._claim is not None
    backend._claim.close()
    backend._close_signal()


def test_a_crashed_runs_device_that_does_not_fit_is_replaced(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    a.start(vxlan(identifier=5))
    old = a.link("overlay0")
    crash(a)
    a.start(vxlan())
    b.start(vxlan())
    assert a.link("overlay0")["linkinfo"]["info_data"]["id"] == 1
    assert a.link("overlay0")["ifindex"] != old["ifindex"]
    acquaint(a, b)
    assert a.reaches(b)


def test_a_clean_restart_keeps_the_hardware_addresses(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan(), BOTH)
    acquaint(a, b)
    data = a.data
    a.stop()
    assert a.link("overlay0") is None
    assert a.link("overlay0-v6") is None
    assert not b.reaches(a)
    a.start(vxlan(), BOTH)
    assert a.data == data
    a.meet(b)
    assert b.reaches(a), "which b was not told anything of"
    assert b.reaches(a, 6)


def test_while_it_is_stopped_packets_never_leave_by_the_default_route(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan())
    acquaint(a, b)
    a.stop()
    with Capture({"eth0": (a.namespace, "eth0")}) as capture:
        assert not a.reaches(b)
        leaked = [p for p in capture.packets if p.ip is not None and str(p.ip.header.destination) == b.container]
    assert leaked == []


@pytest.mark.parametrize("kind", ["bridge", "vxlan"])
def test_a_device_of_someone_else_is_refused_and_left_alone(hosts: tuple[Host, Host, Host], kind: str) -> None:
    a = hosts[0]
    details = "id 1 dstport 8472 local 172.16.130.1 dev eth0" if kind == "vxlan" else ""
    a.namespace.ip(f"link add overlay0 type {kind} {details}", "link set overlay0 alias mine")
    before = a.namespace.ip_json("link", "show")
    message = rf"the device name overlay0 is taken by another interface \({kind}\); delete that with `ip link delete overlay0`"
    with pytest.raises(BackendError, match=message):
        a.open(vxlan())
    a.close()
    assert a.namespace.ip_json("link", "show") == before


@pytest.mark.parametrize("up", [True, False])
def test_a_vni_that_is_taken_is_refused_naming_by_what(hosts: tuple[Host, Host, Host], up: bool) -> None:
    a = hosts[0]
    a.namespace.ip("link add flannel.1 type vxlan id 1 dstport 8472 local 172.16.130.1 dev eth0 nolearning")
    if up:
        a.namespace.ip("link set flannel.1 up")
    before = a.namespace.ip_json("link", "show")
    with pytest.raises(BackendError, match="VNI 1 on UDP port 8472 is taken by the VXLAN device flannel.1"):
        a.open(vxlan())
    assert a.namespace.ip_json("link", "show") == before
    a.start(vxlan(identifier=2))


def test_a_port_that_is_taken_is_refused_and_nothing_is_left(hosts: tuple[Host, Host, Host]) -> None:
    a = hosts[0]
    with a.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::", 8472))
        before = a.namespace.ip_json("link", "show")
        with pytest.raises(
            BackendError, match="UDP port 8472 is in use by another program; stop it, or choose another Port"
        ):
            a.open(vxlan(), BOTH)
        assert a.namespace.ip_json("link", "show") == before, "nor the device for IPv4, which was not refused"
    a.start(vxlan(), BOTH)


def test_a_second_overlay_of_one_name_is_refused(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for host in (a, b):
        host.start(vxlan())
    acquaint(a, b)
    with pytest.raises(
        BackendError, match="overlay0 belongs to another overlaynet that is running; stop it, or choose"
    ):
        a.open(vxlan(identifier=2))
    a.made.pop()
    assert a.reaches(b)
    assert a.namespace.run(devices.is_claimed, "overlay0")
    a.stop()
    assert not a.namespace.run(devices.is_claimed, "overlay0")


def test_two_overlays_live_beside_each_other(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    other = parse('{"Network": "10.245.0.0/16"}')
    for host in (a, b):
        host.start(vxlan())
    acquaint(a, b)
    before = a.routes()
    first = a.backend
    a.start(vxlan(identifier=2, name="overlay1"), other)
    assert a.routes() == before
    a.stop()
    a.made.remove(a.backend)
    assert a.backend is first
    assert a.reaches(b)


@pytest.mark.parametrize(
    ("options", "underlay", "network", "message"),
    [
        (
            {"mtu": 9000},
            {},
            IPV4,
            "says that the underlay has MTU 9000, but eth0 has 1500; lower the one or raise the other",
        ),
        ({}, {"mtu": 100}, IPV4, "the MTU of eth0 is 100, too small for a tunnel that carries IPv4; raise it to 118"),
        (
            {"mtu": 1349},
            {},
            BOTH,
            "the MTU in the network document's Backend is 1349, .* IPv6; raise it to 1350 or more",
        ),
        ({}, {"ipv4": None}, IPV4, "eth0 has no IPv4 address, over which the vxlan backend carries IPv4; give it one"),
        ({}, {"ipv6": None}, BOTH, "eth0 has no IPv6 address, over which the vxlan backend carries IPv6; give it one"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    hosts: tuple[Host, Host, Host], options: Any, underlay: Any, network: Network, message: str
) -> None:
    a = hosts[0]
    before = a.namespace.ip_json("link", "show")
    with pytest.raises(BackendError, match=message):
        a.wait(vxlan(**options).open(network, attrs.evolve(a.underlay, **underlay)))
    assert a.namespace.ip_json("link", "show") == before
    assert not a.namespace.run(devices.is_claimed, "overlay0")


def test_a_peer_that_cannot_be_reached_is_reported_and_keeps_no_other_from_it(
    hosts: tuple[Host, Host, Host], caplog: pytest.LogCaptureFixture
) -> None:
    a, b, _ = hosts
    a.start(vxlan())
    b.start(vxlan())
    strange = Peer(
        Subnets(IPv4Network("10.244.7.0/24")), IPv4Address("172.16.130.7"), data=LeaseData("vxlan", {"VtepMAC": "x"})
    )
    for _ in range(2):
        a.meet_peers([strange, b.peer])
    b.meet(a)
    assert a.reaches(b)
    assert a.backend.status()["skipped"] == {
        "10.244.7.0/24": "its VtepMAC is 'x', not a hardware address such as c6:d2:32:6f:8f:44"
    }
    assert [record.message for record in caplog.records].count("peer not reachable") == 1
    assert len(a.routes()) == 1


def test_a_tcp_stream_passes_whole(hosts: tuple[Host, Host, Host]) -> None:
    a, _, c = hosts
    for host in (a, c):
        host.start(vxlan(), BOTH)
    acquaint(a, c)
    payload = bytes(range(256)) * 8000
    for family, address in ((socket.AF_INET, c.container), (socket.AF_INET6, c.container6)):
        with c.namespace.socket(family) as listener, a.namespace.socket(family) as client:
            listener.bind((address, 5001))
            listener.listen()
            client.settimeout(20)
            client.connect((address, 5001))
            server, _ = listener.accept()
            with server:
                received = bytearray()
                client.setblocking(False)
                server.settimeout(20)
                sent = 0
                while len(received) < len(payload):
                    with contextlib.suppress(BlockingIOError):
                        sent += client.send(payload[sent : sent + 65536])
                    received += server.recv(1 << 20)
                assert bytes(received) == payload


# host-gw


def test_host_gw_routes_packets_unchanged_to_hosts_on_the_link_and_skips_others(
    hosts: tuple[Host, Host, Host], caplog: pytest.LogCaptureFixture
) -> None:
    for host in hosts:
        host.start(host_gw(), BOTH)
    acquaint(*hosts)
    acquaint(*hosts)
    a, b, c = hosts
    assert a.device == Device("eth0", 1500, "host-gw")
    assert a.data == LeaseData("host-gw")
    with Capture({"eth0": (b.namespace, "eth0")}) as capture:
        assert a.reaches(b, 4, "-M", "do", "-s", str(1500 - 28))
        packet = capture.wait_for(lambda p: p.ip is not None and str(p.ip.header.destination) == b.container)
    assert packet.ip is not None
    assert str(packet.ip.header.source) == a.container
    assert a.reaches(b, 6, "-M", "do", "-s", str(1500 - 48))
    assert not a.reaches(c)
    assert [route.split(" metric")[0] for route in a.routes()] == [
        "10.244.2.0/24 via 172.16.130.2 dev eth0",
        "fd00:10:244:2::/64 via fd00:130::2 dev eth0",
    ]
    status: Any = a.backend.status()
    assert status["peers"] == {
        "10.244.2.0/24": {"address": "172.16.130.2"},
        "fd00:10:244:2::/64": {"address": "fd00:130::2"},
    }
    assert status["skipped"] == {
        "10.244.3.0/24": "its host 172.16.131.3 is not on the same link as eth0",
        "fd00:10:244:3::/64": "its host fd00:131::3 is not on the same link as eth0",
    }
    reported = [record for record in caplog.records if record.message == "peer not reachable"]
    assert len(reported) == 3 * 4 - 2 * 2, "each once"


def test_host_gw_follows_the_topology(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    for host in (a, b):
        host.start(host_gw())
    acquaint(a, b)
    assert a.reaches(b)
    a.namespace.ip("route add 172.16.130.2/32 via 172.16.130.254")
    a.meet(b)
    assert a.routes() == []
    a.namespace.ip("route del 172.16.130.2/32")
    a.meet(b)
    assert a.reaches(b)
    a.meet()
    assert a.routes() == []


def test_host_gw_and_vxlan_do_not_touch_each_others_routes(hosts: tuple[Host, Host, Host]) -> None:
    """Both route through the underlay's interface."""
    a, b, _ = hosts
    other = parse('{"Network": "10.245.0.0/16"}')
    a.start(vxlan(direct_routing=True))
    b.start(vxlan(direct_routing=True))
    acquaint(a, b)
    before = a.routes()
    first = a.made.pop()
    a.start(host_gw(), other)
    peer = Peer(Subnets(IPv4Network("10.245.2.0/24")), b.ipv4, data=LeaseData("host-gw"))
    a.meet_peers([peer])
    assert {route.split(" metric")[0] for route in a.routes()} == {
        "10.244.2.0/24 via 172.16.130.2 dev eth0",
        "10.245.2.0/24 via 172.16.130.2 dev eth0",
    }
    a.meet_peers([])
    assert a.routes() == before
    a.made.append(first)


def test_what_host_gw_cannot_do_is_refused(hosts: tuple[Host, Host, Host]) -> None:
    a = hosts[0]
    behind_nat = attrs.evolve(a.underlay, public_ipv4=IPv4Address("192.0.2.1"))
    with pytest.raises(BackendError, match=r"the public address 192.0.2.1 is not that of eth0, which is 172.16.130.1"):
        a.wait(host_gw().open(IPV4, behind_nat))
    with pytest.raises(
        BackendError, match="eth0 has no IPv6 address, which the host-gw backend needs for fd00:10:244::/48"
    ):
        a.wait(host_gw().open(BOTH, attrs.evolve(a.underlay, ipv6=None)))
    with pytest.raises(BackendError, match="there is a network interface eth0, whose routes could not be told"):
        a.wait(host_gw(name="eth0").open(IPV4, a.underlay))
    a.start(host_gw())
    with pytest.raises(BackendError, match="host-gw belongs to another overlaynet that is running"):
        a.wait(host_gw().open(IPV4, a.underlay))
    a.start(host_gw(name="second"))
