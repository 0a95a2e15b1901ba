"""The udp backend with real devices, sockets and packets: two hosts and a container in namespaces."""

import asyncio
import contextlib
import errno
import functools
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from overlaynet.backends.udp import UdpBackend, UdpOptions, wire
from overlaynet.backends.udp.engine import Drop, Engine, EnginePeer, PeerTable
from overlaynet.backends.udp.native_engine import NativeEngine
from overlaynet.backends.udp.python_engine import PythonEngine
from overlaynet.errors import BackendError
from overlaynet.model import Device, Lease, LeaseData, Peer, Route, Subnets, Underlay
from overlaynet.network import parse
from overlaynet.testing.namespaces import NetworkNamespace

T = TypeVar("T")

NETWORK = parse('{"Network": "10.244.0.0/16"}')
A_SUBNET, B_SUBNET = IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24")
A_ADDRESS, B_ADDRESS = IPv4Address("172.16.130.140"), IPv4Address("172.16.130.164")
PEER_A = Peer(Subnets(A_SUBNET), A_ADDRESS)
PEER_B = Peer(Subnets(B_SUBNET), B_ADDRESS)
PATIENCE = 20.0


class Host:
    """A namespace with a thread and an event loop inside of it, for backends to live in."""

    def __init__(
        self, namespace: NetworkNamespace, address: IPv4Address, subnet: IPv4Network, engine: str, threads: int
    ) -> None:
        self.engine = engine
        self.threads = threads
        self.engine_class: type[Engine] = NativeEngine if engine == "native" else PythonEngine
        self.namespace = namespace
        self.underlay = Underlay("eth0", 1500, ipv4=address, public_ipv4=address)
        self.lease = Lease(Subnets(subnet), public_ipv4=address)
        self.backends: list[UdpBackend] = []
        started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            started.set()
            await self._stop.wait()

        self._thread = threading.Thread(target=namespace.run, args=(asyncio.run, serve()))
        self._thread.start()
        assert started.wait(PATIENCE)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in this host's loop, and wait for it."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def make(self, options: UdpOptions | None = None) -> UdpBackend:
        async def make() -> UdpBackend:
            chosen = UdpOptions() if options is None else options
            return UdpBackend(chosen, engine=self.engine, threads=str(self.threads))

        backend = self.wait(make())
        self.backends.append(backend)
        return backend

    def start(self, *peers: Peer, options: UdpOptions | None = None) -> UdpBackend:
        """A backend that carries packets to ``peers``, with the overlay's route."""
        backend = self.make(options)

        async def start() -> Device:
            await backend.open(NETWORK, self.underlay)
            device = await backend.start(self.lease)
            await backend.set_peers(peers)
            return device

        device = self.wait(start())
        self.namespace.ip(f"route replace {NETWORK} dev {device.name}")
        return backend

    def close(self) -> None:
        for backend in self.backends:
            self.wait(backend.aclose())
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        self.namespace.close()


ALSO_WITH_TWO_THREADS = pytest.mark.parametrize(
    "hosts", [("python", 1), ("native", 1), ("native", 2)], indirect=True, ids="{0[0]}-{0[1]}".format
)


@pytest.fixture(params=[("python", 1), ("native", 1)], ids="{0[0]}-{0[1]}".format)
def hosts(request: pytest.FixtureRequest) -> Iterator[tuple[Host, Host]]:
    """Two hosts on one underlay."""
    with contextlib.ExitStack() as stack:
        a, b = NetworkNamespace(label="udp-a"), NetworkNamespace(label="udp-b")
        stack.callback(b.close)
        stack.callback(a.close)
        a.ip("link set lo up", f"link add eth0 type veth peer name eth0 netns {b.name}")
        for namespace, address in ((a, A_ADDRESS), (b, B_ADDRESS)):
            namespace.ip(f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up")
            namespace.set_sysctl("net.ipv4.ip_forward", 1)
        host_a = Host(a, A_ADDRESS, A_SUBNET, *request.param)
        stack.callback(host_a.close)
        host_b = Host(b, B_ADDRESS, B_SUBNET, *request.param)
        stack.callback(host_b.close)
        yield host_a, host_b


@pytest.fixture
def container(hosts: tuple[Host, Host]) -> Iterator[NetworkNamespace]:
    """A container on the first host, behind a bridge: 10.244.1.96."""
    host = hosts[0].namespace
    with NetworkNamespace(label="udp-container") as made:
        host.ip(
            "link add cni0 type bridge",
            "address add 10.244.1.1/24 dev cni0",
            "link set cni0 up",
            f"link add veth0 type veth peer name eth0 netns {made.name}",
            "link set veth0 master cni0 up",
        )
        made.ip(
            "link set lo up",
            "address add 10.244.1.96/24 dev eth0",
            "link set eth0 up",
            "route add default via 10.244.1.1",
        )
        yield made


def drops(backend: UdpBackend) -> dict[str, int]:
    """The reasons for which something was dropped."""
    counts: Any = backend.status()["drops"]
    return {reason: count for reason, count in counts.items() if count}


def peer_counters(backend: UdpBackend, subnet: IPv4Network) -> Any:
    peers: Any = backend.status()["peers"]
    return peers[str(subnet)]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def ping(namespace: NetworkNamespace, target: str, *options: str) -> subprocess.CompletedProcess[str]:
    return namespace.execute(["ping", "-n", "-c", "1", "-W", "10", *options, target], check=False)


def connect(namespace: NetworkNamespace, target: str) -> int:
    """The error number with which a TCP connection to ``target`` fails; it has half a minute to fail."""
    with namespace.socket() as client:
        client.settimeout(30)
        return client.connect_ex((target, 80))


def link(namespace: NetworkNamespace, name: str = "overlay0") -> dict[str, Any]:
    (found,) = namespace.ip_json("link", "show", name)
    return found


def link_names(namespace: NetworkNamespace) -> set[str]:
    return {entry["ifname"] for entry in namespace.ip_json("link", "show")}


@ALSO_WITH_TWO_THREADS
def test_packets_go_both_ways(hosts: tuple[Host, Host], container: NetworkNamespace) -> None:
    a, b = hosts
    backend_a, backend_b = a.start(PEER_B), b.start(PEER_A)
    assert ping(a.namespace, "10.244.2.0").returncode == 0
    assert ping(b.namespace, "10.244.1.96").returncode == 0
    from_container = ping(container, "10.244.2.0")
    assert from_container.returncode == 0
    # The engine leaves the TTL alone: one hop is the host of the container.
    assert "ttl=63" in from_container.stdout
    counts = {"sent_packets": 3, "sent_bytes": 3 * 84, "received_packets": 3, "received_bytes": 3 * 84}
    eventually(lambda: peer_counters(backend_a, B_SUBNET) == {"address": str(B_ADDRESS), **counts})
    eventually(lambda: peer_counters(backend_b, A_SUBNET) == {"address": str(A_ADDRESS), **counts})
    assert drops(backend_a) == drops(backend_b) == {}


@ALSO_WITH_TWO_THREADS
def test_the_device_is_as_documented(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    backend = a.make()
    assert a.wait(backend.open(NETWORK, a.underlay)) == LeaseData()
    assert link(a.namespace)["ifalias"] == "overlaynet udp"
    assert "UP" not in link(a.namespace)["flags"]
    assert a.wait(backend.start(a.lease)) == Device("overlay0", 1472)
    assert backend.routes([PEER_B]) == [Route(IPv4Network("10.244.0.0/16"), device="overlay0")]
    device = link(a.namespace)
    assert device["linkinfo"]["info_kind"] == "tun"
    assert (
        device["linkinfo"]["info_data"] | {"type": "tun", "pi": False, "persist": False}
        == device["linkinfo"]["info_data"]
    )
    assert {"POINTOPOINT", "UP"} <= set(device["flags"])
    assert device["mtu"] == 1472
    assert device["txqlen"] >= 1000
    (addresses,) = a.namespace.ip_json("address", "show", "overlay0")
    assert [(entry["local"], entry["prefixlen"]) for entry in addresses["addr_info"]] == [("10.244.1.0", 32)]
    status = json.loads(json.dumps(backend.status()))
    assert (status["engine"], status["device"], status["mtu"], status["port"]) == (a.engine, "overlay0", 1472, 8285)
    assert (status["threads"], status["threads_refused"]) == (a.threads, 0)


def test_options_name_the_device_the_port_and_the_mtu(hosts: tuple[Host, Host]) -> None:
    options = UdpOptions(name="tunnel", port=18285, mtu=1280)
    for host, peer in zip(hosts, (PEER_B, PEER_A), strict=True):
        host.start(peer, options=options)
        assert link(host.namespace, "tunnel")["mtu"] == 1280
        listening = host.namespace.execute(["ss", "-Hlun", "sport = :18285"]).stdout
        assert f"{host.underlay.ipv4}:18285" in listening
    assert ping(hosts[0].namespace, "10.244.2.0", "-M", "do", "-s", str(1280 - 28)).returncode == 0


@ALSO_WITH_TWO_THREADS
def test_a_packet_of_the_mtu_passes_and_a_larger_one_is_refused(
    hosts: tuple[Host, Host], container: NetworkNamespace
) -> None:
    a, b = hosts
    a.start(PEER_B)
    b.start(PEER_A)
    for sender in (a.namespace, container):
        assert ping(sender, "10.244.2.0", "-M", "do", "-s", str(1472 - 28)).returncode == 0
    from_container = ping(container, "10.244.2.0", "-M", "do", "-s", str(1473 - 28))
    assert from_container.returncode != 0
    assert re.search(r"Frag needed.*mtu = 1472", from_container.stdout)
    from_host = ping(a.namespace, "10.244.2.0", "-M", "do", "-s", str(1473 - 28))
    assert from_host.returncode != 0
    assert "message too long, mtu=1472" in from_host.stderr
    # Without DF the kernel cuts it up, and the other one puts it together.
    assert ping(container, "10.244.2.0", "-M", "dont", "-s", "4000").returncode == 0


@pytest.mark.parametrize("reverse_path_filter", [0, 1, 2])
def test_the_sender_is_told_that_there_is_no_way(
    hosts: tuple[Host, Host], container: NetworkNamespace, reverse_path_filter: int
) -> None:
    a, _ = hosts
    a.namespace.set_sysctl("net.ipv4.conf.all.rp_filter", reverse_path_filter)
    backend = a.start()
    for sender in (a.namespace, container):
        assert connect(sender, "10.244.2.194") == errno.ENETUNREACH
        told = ping(sender, "10.244.2.194")
        assert "From 10.244.1.0 icmp_seq=1 Destination Net Unreachable" in told.stdout
    eventually(lambda: drops(backend) == {"no_route": backend.status()["unreachables_sent"]})


def test_the_sender_is_told_when_a_peer_leaves(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    backend = a.start(PEER_B)
    b.start(PEER_A)
    assert ping(a.namespace, "10.244.2.0").returncode == 0
    a.wait(backend.set_peers([]))
    assert connect(a.namespace, "10.244.2.0") == errno.ENETUNREACH
    a.wait(backend.set_peers([PEER_B]))
    assert connect(a.namespace, "10.244.2.0") == errno.ECONNREFUSED


def test_an_address_of_our_own_that_nobody_has_is_unreachable(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    backend = a.start(PEER_B)
    b.start(PEER_A)
    # Neither host has a bridge, so the packet comes back out of the device.
    assert connect(a.namespace, "10.244.1.77") == errno.ENETUNREACH
    assert connect(b.namespace, "10.244.1.77") == errno.ENETUNREACH
    assert set(drops(backend)) == {"no_route"}


def test_the_payload_of_a_datagram_is_the_packet_and_nothing_else(
    hosts: tuple[Host, Host], container: NetworkNamespace
) -> None:
    a, b = hosts
    a.start(PEER_B)
    with b.namespace.socket(type=socket.SOCK_DGRAM) as peer, container.socket(type=socket.SOCK_DGRAM) as client:
        peer.settimeout(PATIENCE)
        peer.bind((str(B_ADDRESS), 8285))
        client.bind(("10.244.1.96", 4444))
        client.settimeout(PATIENCE)
        client.sendto(b"to the other side", ("10.244.2.194", 5555))
        payload, sender = peer.recvfrom(65535)
        assert sender == (str(A_ADDRESS), 8285)
        packet = IP(payload)
        assert len(payload) == packet.len == 20 + 8 + 17
        assert (packet.src, packet.dst, packet.ttl) == ("10.244.1.96", "10.244.2.194", 63)
        assert bytes(packet[UDP].payload) == b"to the other side"
        answer = bytes(IP(src="10.244.2.194", dst="10.244.1.96") / UDP(sport=5555, dport=4444) / b"and back")
        # A NAT between the hosts may give the peer another port.
        with b.namespace.socket(type=socket.SOCK_DGRAM) as other:
            other.sendto(answer, (str(A_ADDRESS), 8285))
        assert client.recvfrom(65535) == (b"and back", ("10.244.2.194", 5555))


def inner(source: str = "10.244.2.194", destination: str = "10.244.1.0", payload: bytes = b"wrong") -> bytes:
    return bytes(IP(src=source, dst=destination) / UDP(sport=5555, dport=4444) / Raw(payload))


@ALSO_WITH_TWO_THREADS
def test_only_what_a_peer_may_send_is_delivered(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    b.namespace.ip("address add 172.16.130.200/24 dev eth0")
    backend = a.start(PEER_B)
    bad_checksum = bytearray(inner())
    bad_checksum[10] ^= 0xFF
    part = bytes(IP(src="10.244.2.194", dst="10.244.1.0", flags="MF", proto=17) / Raw(bytes(376)))  # never completed
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(a.namespace.socket(type=socket.SOCK_DGRAM))
        listener.bind(("0.0.0.0", 4444))
        listener.settimeout(PATIENCE)
        peer, stranger = (stack.enter_context(b.namespace.socket(type=socket.SOCK_DGRAM)) for _ in range(2))
        peer.bind((str(B_ADDRESS), 0))
        stranger.bind(("172.16.130.200", 8285))
        target = (str(A_ADDRESS), 8285)
        stranger.sendto(inner(), target)
        for packet in (
            b"",
            b"\x45",
            inner()[:-1],
            inner() + b"\0",
            b"\x45" + bytes(65506),
            inner(source="10.244.3.1"),  # another peer's
            inner(source="10.244.1.5"),  # our own
            inner(source="8.8.8.8"),
            inner(destination="10.244.2.1"),
            inner(destination="224.0.0.1"),
            inner(destination="172.16.130.140"),
            bytes(bad_checksum),  # the kernel's to drop
            bytes.fromhex("6000000000003b40") + bytes(32),
            part,
        ):
            peer.sendto(packet, target)
        largest = bytes(65507 - 28)
        peer.sendto(inner(payload=largest), target)
        peer.sendto(inner(payload=b"right"), target)
        assert listener.recv(65535) == largest
        assert listener.recv(65535) == b"right"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(65535)
    eventually(lambda: peer_counters(backend, B_SUBNET)["received_packets"] == 4)
    assert peer_counters(backend, B_SUBNET)["received_bytes"] == len(bad_checksum) + len(part) + 65507 + (28 + 5)
    assert drops(backend) == {
        "unknown_peer": 1,
        "malformed": 5,
        "spoofed_source": 3,
        "foreign_destination": 3,
        "unsupported": 1,
    }


def test_peers_behind_one_address_are_told_apart_by_their_subnets(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    third = IPv4Network("10.244.3.0/24")
    backend = a.start(PEER_B, Peer(Subnets(third), B_ADDRESS))
    with (
        a.namespace.socket(type=socket.SOCK_DGRAM) as listener,
        b.namespace.socket(type=socket.SOCK_DGRAM) as peer,
    ):
        listener.bind(("0.0.0.0", 4444))
        listener.settimeout(PATIENCE)
        for source in ("10.244.2.1", "10.244.3.1", "10.244.3.2"):
            peer.sendto(inner(source=source), (str(A_ADDRESS), 8285))
            assert listener.recvfrom(65535) == (b"wrong", (source, 5555))
    eventually(lambda: peer_counters(backend, third)["received_packets"] == 2)
    assert peer_counters(backend, B_SUBNET)["received_packets"] == 1


def test_a_peer_that_the_underlay_cannot_reach_is_counted(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    backend = a.start(Peer(Subnets(B_SUBNET), IPv4Address("192.0.2.1")))
    assert ping(a.namespace, "10.244.2.0", "-W", "0.1").returncode != 0
    eventually(lambda: drops(backend) == {"send_unreachable": 1})


def test_a_datagram_that_a_firewall_refuses_is_counted(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    a.namespace.ip("rule add from all to 172.16.130.164 ipproto udp prohibit", "route flush cache")
    backend = a.start(PEER_B)
    assert ping(a.namespace, "10.244.2.0", "-W", "0.1").returncode != 0
    eventually(lambda: drops(backend) == {"send_refused": 1})


def test_an_underlay_with_a_smaller_mtu_fragments(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.start(PEER_B)
    b.start(PEER_A)
    for host in hosts:
        host.namespace.ip("link set eth0 mtu 1400")
    assert ping(a.namespace, "10.244.2.0", "-M", "do", "-s", str(1472 - 28)).returncode == 0


@ALSO_WITH_TWO_THREADS
def test_set_peers_repairs_the_device(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    backend = a.start(PEER_B)
    b.start(PEER_A)
    a.namespace.ip(
        "link set overlay0 down",
        "link set overlay0 mtu 1000",
        "address flush dev overlay0",
        "address add 10.9.9.9/32 dev overlay0",
    )
    a.namespace.set_sysctl("net.ipv4.conf.overlay0.accept_local", 0)
    a.wait(backend.set_peers([PEER_B]))
    a.namespace.ip(f"route replace {NETWORK} dev overlay0")
    assert link(a.namespace)["mtu"] == 1472
    assert ping(a.namespace, "10.244.2.0").returncode == 0
    assert connect(a.namespace, "10.244.7.7") == errno.ENETUNREACH
    (addresses,) = a.namespace.ip_json("address", "show", "overlay0")
    assert [entry["local"] for entry in addresses["addr_info"]] == ["10.244.1.0"]


@ALSO_WITH_TWO_THREADS
def test_packets_for_a_device_that_is_down_are_counted(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    backend = a.start(PEER_B)
    a.namespace.ip("link set overlay0 down")
    with b.namespace.socket(type=socket.SOCK_DGRAM) as peer:
        peer.sendto(inner(), (str(A_ADDRESS), 8285))
        eventually(lambda: drops(backend) == {"device_failed": 1})
    a.namespace.ip("link set overlay0 up")
    assert not a.wait(has_ended(backend))


async def has_ended(backend: UdpBackend) -> bool:
    """True if the backend says within a moment that it cannot carry packets."""
    ended = asyncio.create_task(backend.run())
    done, _ = await asyncio.wait([ended], timeout=0.3)
    ended.cancel()
    await asyncio.wait([ended])
    return bool(done)


@ALSO_WITH_TWO_THREADS
@pytest.mark.parametrize(
    "commands",
    [["link delete overlay0"], ["link set overlay0 down", "link set overlay0 name foreign"]],
    ids=["deleted", "renamed"],
)
def test_a_device_that_is_gone_is_made_again(hosts: tuple[Host, Host], commands: list[str]) -> None:
    a, b = hosts
    backend = a.start(PEER_B)
    b.start(PEER_A)
    assert ping(a.namespace, "10.244.2.0").returncode == 0
    before = descriptors()
    a.namespace.ip(*commands)
    a.wait(backend.changed())
    a.wait(backend.set_peers([PEER_B]))
    assert "foreign" not in link_names(a.namespace)
    assert link(a.namespace)["mtu"] == 1472
    a.namespace.ip(f"route replace {NETWORK} dev overlay0")
    assert ping(a.namespace, "10.244.2.0").returncode == 0
    assert peer_counters(backend, B_SUBNET)["sent_packets"] == 2, "they go on"
    assert descriptors() == before
    assert len([thread for thread in threading.enumerate() if "engine" in thread.name]) == 2
    assert not a.wait(has_ended(backend))


@ALSO_WITH_TWO_THREADS
def test_another_interface_that_took_the_name_of_a_deleted_device_is_left_alone(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    backend = a.start(PEER_B)
    b.start(PEER_A)
    a.namespace.ip("link delete overlay0", "link add overlay0 type bridge", "address add 10.9.9.9/32 dev overlay0")
    for _ in range(2):
        with pytest.raises(BackendError, match=r"name overlay0 is taken by another interface \(bridge\)"):
            a.wait(backend.set_peers([PEER_B]))
    assert backend.routes([PEER_B]) == []
    (addresses,) = a.namespace.ip_json("address", "show", "overlay0")
    assert [entry["local"] for entry in addresses["addr_info"]] == ["10.9.9.9"]
    # Nothing is left that could spin, and the name is taken back as soon as it is free.
    assert len([thread for thread in threading.enumerate() if "engine" in thread.name]) == 1
    a.namespace.ip("link delete overlay0")
    a.wait(backend.set_peers([PEER_B]))
    a.namespace.ip(f"route replace {NETWORK} dev overlay0")
    assert ping(a.namespace, "10.244.2.0").returncode == 0


@ALSO_WITH_TWO_THREADS
def test_the_socket_follows_another_address_of_the_underlay(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    backend_a, backend_b = a.start(PEER_B), b.start(PEER_A)
    a.namespace.ip("address flush dev eth0", "address add 172.16.130.99/24 dev eth0")
    moved = IPv4Address("172.16.130.99")
    assert a.wait(backend_a.set_underlay(Underlay("eth0", 1500, ipv4=moved, public_ipv4=moved)))
    b.wait(backend_b.set_peers([attrs.evolve(PEER_A, public_ipv4=moved)]))
    assert ping(a.namespace, "10.244.2.0").returncode == 0
    assert ping(b.namespace, "10.244.1.0").returncode == 0
    listening = a.namespace.execute(["ss", "-Hlun", "sport = :8285"]).stdout
    assert "172.16.130.99:8285" in listening
    assert "172.16.130.140:8285" not in listening


@pytest.mark.parametrize("hosts", [("native", 2)], indirect=True)
def test_a_new_address_with_fewer_sockets_leaves_fewer_threads(
    hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> socket.socket:
        raise OSError(errno.ENOPROTOOPT, "not available")

    a, b = hosts
    backend_a, backend_b = a.start(PEER_B), b.start(PEER_A)
    assert link(a.namespace)["linkinfo"]["info_data"]["numqueues"] == 2
    monkeypatch.setattr(wire, "_open_next_socket", refuse)
    a.namespace.ip("address flush dev eth0", "address add 172.16.130.99/24 dev eth0")
    moved = IPv4Address("172.16.130.99")
    assert a.wait(backend_a.set_underlay(Underlay("eth0", 1500, ipv4=moved, public_ipv4=moved)))
    b.wait(backend_b.set_peers([attrs.evolve(PEER_A, public_ipv4=moved)]))
    assert (backend_a.status()["threads"], backend_a.status()["threads_refused"]) == (1, 1)
    assert link(a.namespace)["linkinfo"]["info_data"]["numqueues"] == 1
    a.namespace.ip(f"route replace {NETWORK} dev overlay0")
    # Flows of many kinds would be spread over queues that nobody reads, and over sockets likewise.
    for port in range(9000, 9016):
        with (
            b.namespace.socket(type=socket.SOCK_DGRAM) as listener,
            a.namespace.socket(type=socket.SOCK_DGRAM) as client,
        ):
            listener.bind(("10.244.2.0", port))
            listener.settimeout(PATIENCE)
            client.sendto(b"there", ("10.244.2.0", port))
            data, sender = listener.recvfrom(100)
            client.settimeout(PATIENCE)
            listener.sendto(data, sender)
            assert client.recv(100) == b"there"


@ALSO_WITH_TWO_THREADS
@pytest.mark.parametrize("address", [A_ADDRESS, IPv4Address("172.16.130.99")])
def test_the_device_follows_the_mtu_and_the_address_under_load(hosts: tuple[Host, Host], address: IPv4Address) -> None:
    a, b = hosts
    backend_a, backend_b = a.start(PEER_B), b.start(PEER_A)
    over = threading.Event()

    def flood() -> None:
        with a.namespace.socket(type=socket.SOCK_DGRAM) as client:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    client.sendto(bytes(1000), ("10.244.2.0", 9))
                time.sleep(0.0001)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        a.namespace.ip(f"address replace {address}/24 dev eth0")
        b.wait(backend_b.set_peers([attrs.evolve(PEER_A, public_ipv4=address)]))
        for mtu in (1300, 1400, 1500):
            for host in hosts:
                host.namespace.ip(f"link set eth0 mtu {mtu}")
            underlay = Underlay("eth0", mtu, ipv4=address, public_ipv4=address)
            for _ in range(2):
                assert a.wait(backend_a.set_underlay(underlay)) == Device("overlay0", mtu - 28)
            assert link(a.namespace)["mtu"] == mtu - 28
            reached = peer_counters(backend_a, B_SUBNET)["sent_packets"]
            eventually(lambda reached=reached: peer_counters(backend_a, B_SUBNET)["sent_packets"] > reached)  # type: ignore[misc]
    finally:
        over.set()
        thread.join()
    assert ping(a.namespace, "10.244.2.0", "-M", "do", "-s", str(1472 - 28)).returncode == 0


def refusal(host: Host, options: UdpOptions | None = None, underlay: Underlay | None = None) -> str:
    """What ``open`` says; and it has changed nothing."""
    before = link_names(host.namespace)
    with pytest.raises(BackendError) as caught:
        host.wait(host.make(options).open(NETWORK, host.underlay if underlay is None else underlay))
    assert link_names(host.namespace) == before
    return str(caught.value)


@ALSO_WITH_TWO_THREADS
def test_a_port_in_use_is_refused(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    with a.namespace.socket(type=socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 8285))
        assert refusal(a) == (
            "UDP port 8285 on 172.16.130.140 is in use by another program (flanneld, or another overlaynet?); "
            "stop it, or choose another Port in the network document's Backend"
        )
    a.start()


@ALSO_WITH_TWO_THREADS
@pytest.mark.parametrize(
    ("commands", "kind"),
    [
        (["link add overlay0 type bridge"], "(bridge)"),
        (["tuntap add overlay0 mode tun"], "(tun)"),
        (["tuntap add overlay0 mode tun multi_queue"], "(tun)"),
        (["tuntap add overlay0 mode tap"], "(tun)"),
        (["link set lo name overlay0"], ""),
    ],
)
def test_a_device_name_that_is_taken_is_refused(hosts: tuple[Host, Host], commands: list[str], kind: str) -> None:
    a, _ = hosts
    a.namespace.ip(*commands)
    message = refusal(a)
    assert "device name overlay0 is taken by another interface" in message
    assert kind in message
    assert "choose another Name" in message
    # What was bound before has been freed.
    a.start(options=UdpOptions(name="overlay1"))


@ALSO_WITH_TWO_THREADS
def test_the_device_of_another_overlaynet_is_refused(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    a.start()
    assert "another overlaynet that is running" in refusal(a, UdpOptions(port=18285))
    assert not a.wait(has_ended(a.backends[0]))


def test_an_address_that_is_not_this_hosts_is_refused(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    message = refusal(a, underlay=Underlay("eth0", 1500, ipv4=IPv4Address("192.0.2.7")))
    assert message.startswith("192.0.2.7 is not an address of this host")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@ALSO_WITH_TWO_THREADS
def test_nothing_is_left_after_close(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    a.wait(a.start(PEER_B).aclose())  # what is imported and cached on the way stays
    links, before = link_names(a.namespace), descriptors()
    for _ in range(3):
        backend = a.start(PEER_B)
        a.wait(backend.aclose())
        a.wait(backend.aclose())
        opened = a.make()
        a.wait(opened.open(NETWORK, a.underlay))
        a.wait(opened.aclose())
        a.wait(a.make().aclose())
    assert link_names(a.namespace) == links
    assert descriptors() == before


@ALSO_WITH_TWO_THREADS
def test_a_busy_backend_takes_peers_and_stops(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    backend_a, backend_b = a.start(PEER_B), b.start(PEER_A)
    over = threading.Event()

    def flood(namespace: NetworkNamespace, target: str) -> None:
        with namespace.socket(type=socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            while not over.is_set():
                with contextlib.suppress(OSError):
                    client.sendto(bytes(100), (target, 9))

    floods = [
        threading.Thread(target=flood, args=(a.namespace, "10.244.2.0")),
        threading.Thread(target=flood, args=(b.namespace, "10.244.1.0")),
    ]
    for each in floods:
        each.start()
    try:
        eventually(lambda: peer_counters(backend_a, B_SUBNET)["received_packets"] > 1000)
        for number in range(20):
            others = [Peer(Subnets(IPv4Network(f"10.244.{100 + number}.0/24")), IPv4Address("172.16.130.99"))]
            a.wait(backend_a.set_peers([PEER_B, *others]))
        reached = peer_counters(backend_a, B_SUBNET)["received_packets"]
        assert reached > 1000
        eventually(lambda: peer_counters(backend_a, B_SUBNET)["received_packets"] > reached)
        for host, backend in ((a, backend_a), (b, backend_b)):
            host.wait(backend.aclose())
            assert "overlay0" not in link_names(host.namespace)
    finally:
        over.set()
        for each in floods:
            each.join()


@ALSO_WITH_TWO_THREADS
def test_a_scan_gets_no_more_errors_than_allowed(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    backend = a.start()
    begin = time.monotonic()
    with a.namespace.socket(type=socket.SOCK_DGRAM) as scanner:
        for number in range(1, 3001):
            scanner.sendto(b"", (f"10.244.{2 + number // 250}.{number % 250}", 9))
            if number % 300 == 0:  # no more than the device's queue holds
                eventually(functools.partial(lambda count: drops(backend).get("no_route") == count, number))
    sent: Any = backend.status()["unreachables_sent"]
    # The engine looks at a clock that moves in steps of up to 10 ms.
    assert 0 < sent <= 100 + 1000 * (time.monotonic() - begin + 0.01)
    assert sent < 3000


class PretendedDevice:
    """An engine of its own in a host's namespace; a socket pair stands for its device."""

    def __init__(self, host: Host, address: str, peer: EnginePeer, send_buffer: int | None = None) -> None:
        with contextlib.ExitStack() as stack:
            tun, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(tun).setblocking(False)
            stack.enter_context(self.kernel).settimeout(PATIENCE)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self.wire = stack.enter_context(host.namespace.socket(family, socket.SOCK_DGRAM))
            self.wire.setblocking(False)
            if send_buffer is not None:
                self.wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            self.wire.bind((address, 8285))
            table = PeerTable(Subnets(A_SUBNET), (peer,))
            self.engine = host.engine_class(tun.fileno(), [self.wire.fileno()], 1472, table)
            stack.callback(self.engine.close)
            thread = threading.Thread(target=self.engine.run)
            thread.start()
            stack.callback(thread.join, PATIENCE)
            stack.callback(self.engine.stop)
            self._stack = stack.pop_all()

    def __enter__(self) -> "PretendedDevice":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def test_the_engine_is_ready_for_an_ipv6_underlay(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.namespace.ip("address add fd00::140/64 dev eth0 nodad")
    b.namespace.ip("address add fd00::164/64 dev eth0 nodad")
    subnets = Subnets(B_SUBNET, IPv6Network("fd00:2::/64"))
    with (
        b.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as peer,
        PretendedDevice(a, "fd00::140", EnginePeer(subnets, IPv6Address("fd00::164"), 8285)) as device,
    ):
        peer.bind(("fd00::164", 8285))
        peer.settimeout(PATIENCE)
        device.kernel.send(inner("10.244.1.96", "10.244.2.194"))
        assert peer.recvfrom(65535)[0] == inner("10.244.1.96", "10.244.2.194")
        peer.sendto(inner(), ("fd00::140", 8285))
        assert device.kernel.recv(65535) == inner()


def test_a_datagram_that_finds_no_room_is_counted(hosts: tuple[Host, Host]) -> None:
    a, _ = hosts
    # Nobody has this address, so datagrams wait for its link-layer address, and fill the socket's buffer.
    nobody = EnginePeer(Subnets(B_SUBNET), IPv4Address("172.16.130.99"), 8285)
    with PretendedDevice(a, str(A_ADDRESS), nobody, send_buffer=4608) as device:

        def congested() -> bool:
            device.kernel.send(inner("10.244.1.96", "10.244.2.194", bytes(1400)))
            return device.engine.counters().drops[Drop.SEND_CONGESTED] > 0

        eventually(congested)
        assert {reason for reason, count in device.engine.counters().drops.items() if count} == {Drop.SEND_CONGESTED}
