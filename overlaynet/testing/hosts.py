"""Backends with real devices, in namespaces: the suite of :mod:`overlaynet.testing.backends` on a real kernel.

    class TestMyBackend(KernelBackendConformance):
        @pytest.fixture
        def make_backend(self):
            return lambda: MyBackend(MyBackend.Options())

Needs root; without it, the tests are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import attrs

from overlaynet.drivers import Backend
from overlaynet.model import IPAddress, Lease, Peer, Route, Underlay
from overlaynet.network import Network
from overlaynet.testing import namespaces
from overlaynet.testing._requirements import pytest
from overlaynet.testing.backends import BackendConformance, CountWrites, MakeBackend, Observe
from overlaynet.testing.conformance import PATIENCE
from overlaynet.testing.far_hosts import FarHost, host_at, peer_at, subnet_of, subnets_of, underlay_at
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.testing.packets import UDP, parse_ip

T = TypeVar("T")

PORT = 9000
"""UDP port on which the far container receives."""
_PROTOCOL = "82"
_SYSTEM_LINKS = frozenset(("lo", "eth0", "cni0"))
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_DO = 10, 23, 2
_EVERY_PROTOCOL = 3  # ETH_P_ALL
_INCOMING = 0  # PACKET_HOST: not what this host has sent (packet(7))
# RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE (rtnetlink(7))
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400


class Host:
    """A namespace that is a host: ``eth0`` towards the others, and ``cni0`` with the address of its only container.

    :param number: what :mod:`overlaynet.testing.far_hosts` makes its addresses and its subnet of.
    :param version: the IP version of underlay and overlay.
    """

    def __init__(self, number: int, version: int = 4) -> None:
        self.namespace = NetworkNamespace(label=f"host-{number}")
        self.version = version
        self.address = host_at(number, version)
        self.subnets = subnets_of(number, version)
        self.container = subnet_of(number, version)[1]
        self._container_interface = f"{self.container}/{subnet_of(number, version).prefixlen}"
        self._routes: set[Route] = set()

    @property
    def underlay(self) -> Underlay:
        """How it is attached to the other one."""
        return underlay_at(self.address, "eth0")

    def configure(self) -> None:
        """Give its interfaces their addresses, and let it forward; ``eth0`` has to be there."""
        namespace = self.namespace
        # No link-local addresses: they would come by themselves in the middle of a test.
        namespace.set_sysctl("net.ipv6.conf.default.addr_gen_mode", 1)
        namespace.ip(
            "link set lo up",
            f"address add {self._on_link(self.address)} dev eth0 {self._at_once}",
            "link set eth0 up",
            "link add cni0 type bridge",
            f"address add {self._container_interface} dev cni0 {self._at_once}",
            "link set cni0 up",
        )
        namespace.set_sysctl("net.ipv4.ip_forward", 1)
        namespace.set_sysctl("net.ipv6.conf.all.forwarding", 1)

    def move(self, number: int) -> None:
        """Give it another address in the place of its own."""
        before, self.address = self.address, host_at(number, self.version)
        self.namespace.ip(
            # In this order: with the first address of a network, the kernel takes the others away.
            f"address delete {self._on_link(before)} dev eth0",
            f"address add {self._on_link(self.address)} dev eth0 {self._at_once}",
        )
        self._routes.clear()  # those by eth0 have gone with the address; the others are replaced by themselves

    def _on_link(self, address: IPAddress) -> str:
        return f"{address}/{24 if self.version == 4 else 64}"

    @property
    def _at_once(self) -> str:
        """What keeps the kernel from looking first whether another host has the address."""
        return "nodad" if self.version == 6 else ""

    def apply(self, routes: Sequence[Route]) -> None:
        """Make these the routes of the overlay, as a router would."""
        wanted = set(routes)
        gone, new = self._routes - wanted, wanted - self._routes
        self.namespace.ip(
            *(f"route delete {_arguments(route)} proto {_PROTOCOL}" for route in gone),
            *(f"route replace {_arguments(route)} proto {_PROTOCOL}" for route in new),
        )
        self._routes = wanted

    def observe(self) -> object:
        """Devices, addresses, and permanent neighbours and forwarding entries: all but what this class has made."""
        links, neighbours = [], []
        for link in self.namespace.ip_json("address", "show"):
            if link["ifname"] not in _SYSTEM_LINKS:
                addresses = sorted(f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if "local" in a)
                kind = link.get("linkinfo", {}).get("info_kind")
                links.append((link["ifname"], kind, link["mtu"], "UP" in link["flags"], link.get("ifalias"), addresses))
        for family in ("inet", "inet6"):
            for entry in self.namespace.ip_json("-family", family, "neighbour", "show", "nud", "permanent"):
                neighbours.append((entry["dst"], entry["dev"], entry.get("lladdr")))
        for entry in self.namespace.ip_json("-family", "bridge", "neighbour", "show"):
            if entry.get("dst") is not None:
                neighbours.append((entry["dst"], entry.get("dev"), entry.get("lladdr")))
        return sorted(links), sorted(neighbours)

    def own_links(self) -> list[str]:
        """The names of the devices that were not there from the beginning."""
        names = [link["ifname"] for link in self.namespace.ip_json("link", "show")]
        return sorted(set(names) - _SYSTEM_LINKS)

    def close(self) -> None:
        """Delete the namespace."""
        self.namespace.close()


class WriteCounter:
    """Hears of every change of a link, address, neighbour or route in a namespace."""

    def __init__(self, namespace: NetworkNamespace) -> None:
        self._socket = namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, _GROUPS))
        self._socket.setblocking(False)

    def __call__(self) -> int:
        """How many there were since the last call."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                message = self._socket.recv(1 << 16)
                while len(message) >= 16:
                    (length,) = struct.unpack_from("=I", message)
                    message = message[length + 3 & ~3 :]
                    count += 1
        return count

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()


class HostPair(FarHost):
    """Two hosts on one underlay. The tests run on the near one; the far one's backend lives in a thread there."""

    def __init__(self, make_backend: MakeBackend, ip_version: int = 4) -> None:
        family = socket.AF_INET if ip_version == 4 else socket.AF_INET6
        self._make_backend = make_backend
        self._stack = contextlib.ExitStack()
        self._backend: Backend | None = None
        self._inside: _Inside | None = None
        with contextlib.ExitStack() as undo:
            self.near, self.far = Host(1, ip_version), Host(100, ip_version)
            """The two hosts."""
            undo.callback(self.near.close)
            undo.callback(self.far.close)
            self.near.namespace.ip(f"link add eth0 type veth peer name eth0 netns {self.far.namespace.name}")
            self.near.configure()
            self.far.configure()
            self._sender = undo.enter_context(self.near.namespace.socket(family, socket.SOCK_DGRAM))
            if ip_version == 4:
                self._sender.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DO)
            else:
                self._sender.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DO)
            self._receiver = undo.enter_context(self.far.namespace.socket(family, socket.SOCK_DGRAM))
            self._receiver.setblocking(False)
            self._liar = undo.enter_context(self.far.namespace.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW))
            every = socket.htons(_EVERY_PROTOCOL)
            self._tap = undo.enter_context(self.near.namespace.socket(socket.AF_PACKET, socket.SOCK_DGRAM, every))
            self._tap.setblocking(False)
            self._sender.bind((str(self.near.container), 0))
            self._receiver.bind((str(self.far.container), PORT))
            self._stack = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def join(self, network: Network, near: Peer) -> Peer:
        self._inside = _Inside(self.far.namespace)
        self._stack.callback(self._inside.close)
        return self._inside.wait(self._join(network, near))

    async def _join(self, network: Network, near: Peer) -> Peer:
        far = self.far
        self._backend = backend = self._make_backend()
        data = await backend.open(network, far.underlay)
        peer = attrs.evolve(peer_at(far.subnets, far.underlay, node="far"), data=data)
        own = Lease(far.subnets, peer.public_ipv4, peer.public_ipv6, data, node="far", run="fedcba9876543210")
        await backend.start(own)
        await self._meet(backend, near)
        return peer

    async def _meet(self, backend: Backend, near: Peer) -> None:
        await backend.set_peers([near])
        self.far.apply(backend.routes([near]))

    async def meet(self, near: Peer) -> None:
        assert self._inside is not None, "met before it had joined"
        assert self._backend is not None, "met before it had joined"
        self._inside.wait(self._meet(self._backend, near))

    async def use(self, backend: Backend, peers: Sequence[Peer]) -> None:
        self.near.apply(backend.routes(peers))

    async def send(self, payload: bytes) -> None:
        with contextlib.suppress(OSError):  # no route, as for a peer that was removed
            self._sender.sendto(payload, (str(self.far.container), PORT))

    async def receive(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._receiver, 1 << 16)

    def move(self) -> Underlay:
        self.near.move(2)
        return self.near.underlay

    async def inject(self, packet: bytes) -> None:
        destination = parse_ip(packet).header.destination
        with contextlib.suppress(OSError):  # no route
            self._liar.sendto(packet, (str(destination), 0))

    async def delivered(self) -> bytes:
        own = self.near.own_links()
        while True:
            data, (interface, _, kind, *_) = await asyncio.get_running_loop().sock_recvfrom(self._tap, 1 << 16)
            if interface in own and kind == _INCOMING:
                packet = parse_ip(data)
                assert isinstance(packet.transport, UDP), f"not what was sent: {packet}"
                return packet.payload

    def close(self) -> None:
        """Close the far backend, and take both hosts away. Idempotent."""
        try:
            if self._backend is not None and self._inside is not None:
                backend, self._backend = self._backend, None
                self._inside.wait(backend.aclose())
        finally:
            self._stack.close()


class _Inside:
    """A thread with an event loop inside of a namespace."""

    def __init__(self, namespace: NetworkNamespace) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=namespace.run, args=(self._loop.run_forever,), name=f"host {namespace.name}", daemon=True
        )
        self._thread.start()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it there, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def close(self) -> None:
        """End the loop and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


class KernelBackendConformance(BackendConformance):
    """The suite in namespaces: the tests run on one of two hosts. A subclass overrides :meth:`make_backend`.

    It overrides :meth:`observe` too if the backend keeps its peers out of the kernel, and :meth:`make_peer` if peers publish
    data.
    """

    @pytest.fixture
    def hosts(self, make_backend: MakeBackend, ip_version: int) -> Iterator[HostPair]:
        """The two hosts; the test runs on ``hosts.near``."""
        if missing := namespaces.requirements():
            pytest.skip(f"not on this machine: {'; '.join(missing)}")
        with HostPair(make_backend, ip_version) as hosts, hosts.near.namespace.entered():
            yield hosts

    @pytest.fixture
    def make_driver(self, make_backend: MakeBackend, hosts: HostPair) -> MakeBackend:
        return make_backend

    @pytest.fixture
    def underlay(self, hosts: HostPair) -> Underlay:
        return hosts.near.underlay

    @pytest.fixture
    def observe(self, hosts: HostPair) -> Observe:
        return hosts.near.observe

    @pytest.fixture
    def count_writes(self, hosts: HostPair) -> Iterator[CountWrites]:
        with contextlib.closing(WriteCounter(hosts.near.namespace)) as counter:
            yield counter

    @pytest.fixture(params=["addresses and MTU", "devices"])
    def disturb(self, request: pytest.FixtureRequest, hosts: HostPair) -> Callable[[], None]:
        """Takes the addresses and the MTU of the backend's devices away; or, in a second round, deletes the devices."""

        def disturb() -> None:
            for name in hosts.near.own_links():
                if request.param == "devices":
                    hosts.near.namespace.ip(f"link delete {name}")
                else:
                    hosts.near.namespace.ip(f"address flush dev {name}", f"link set {name} mtu 1000")

        return disturb

    @pytest.fixture
    def take_device(self, hosts: HostPair) -> Callable[[], None]:
        """Deletes the backend's devices, and gives their names to bridges."""

        def take_device() -> None:
            for name in hosts.near.own_links():
                hosts.near.namespace.ip(f"link delete {name}", f"link add {name} type bridge")

        return take_device

    @pytest.fixture
    def far_host(self, hosts: HostPair) -> FarHost:
        return hosts


def _arguments(route: Route) -> str:
    words = [str(route.destination)]
    if route.gateway is not None:
        words += ["via", str(route.gateway)]
    words += ["dev", str(route.device)]
    return " ".join([*words, "onlink"] if route.onlink else words)
