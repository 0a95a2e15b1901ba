"""Backends with a TUN device, without root: the suite of :mod:`overlaynet.testing.backends` with pretended devices::

    class TestMyBackend(TunBackendConformance):
        @pytest.fixture
        def make_backend(self):
            return lambda: MyBackend(MyBackend.Options())

The backend has its device by :class:`overlaynet.api.PacketDevice`, and need not know. Its sockets are real: the near
host is 127.0.0.1, and 127.0.0.3 after it has moved, and the far one 127.0.0.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from typing import ClassVar

import attrs

from overlaynet.drivers import Backend
from overlaynet.model import Lease, Peer, Route, Underlay
from overlaynet.network import Network
from overlaynet.testing._requirements import pytest
from overlaynet.testing.backends import Alive, BackendConformance, MakeBackend, MakePeer, Observe
from overlaynet.testing.far_hosts import FarHost, host_at, peer_at, subnet_of, subnets_of, underlay_at
from overlaynet.testing.packets import UDP, parse_ip
from overlaynet.testing.pretended import PretendedHosts, datagram

NEAR, FAR, MOVED = IPv4Address("127.0.0.1"), IPv4Address("127.0.0.2"), IPv4Address("127.0.0.3")
"""The addresses of the hosts, and of the near one after it has moved."""
_FAR_NUMBER = 100


class PretendedPair(FarHost):
    """The near host, and a far one on which the same backend runs, in the same event loop."""

    def __init__(self, hosts: PretendedHosts, make_backend: MakeBackend, ip_version: int = 4) -> None:
        self._hosts = hosts
        self._make_backend = make_backend
        self._version = ip_version
        self._routes: Sequence[Route] = ()
        self._far: Backend | None = None

    async def join(self, network: Network, near: Peer) -> Peer:
        self._far = far = self._make_backend()
        underlay = underlay_at(FAR)
        lease = Lease(subnets_of(_FAR_NUMBER, self._version), FAR, node="far", run="fedcba9876543210")
        with self._hosts.on("far"):
            data = await far.open(network, underlay)
            await far.start(lease)
        await self.meet(near)
        return attrs.evolve(peer_at(lease.subnets, underlay, node="far"), data=data)

    async def meet(self, near: Peer) -> None:
        assert self._far is not None, "met before it had joined"
        with self._hosts.on("far"):
            await self._far.set_peers([near])

    async def use(self, backend: Backend, peers: Sequence[Peer]) -> None:
        self._routes = tuple(backend.routes(peers))

    async def send(self, payload: bytes) -> None:
        near, far = (subnet_of(number, self._version)[1] for number in (1, _FAR_NUMBER))
        ways = {route.device for route in self._routes if far in route.destination}
        packet = datagram(near, far, payload)
        for name, device in self._hosts.devices().items():
            if name in ways and len(packet) <= device.mtu:
                device.kernel.send(packet)

    async def receive(self) -> bytes:
        return await self._received("far")

    def move(self) -> Underlay:
        return underlay_at(MOVED)

    async def inject(self, packet: bytes) -> None:
        (device,) = self._hosts.devices("far").values()
        device.kernel.send(packet)

    async def delivered(self) -> bytes:
        return await self._received("near")

    async def _received(self, host: str) -> bytes:
        (device,) = self._hosts.devices(host).values()
        packet = parse_ip(await asyncio.get_running_loop().sock_recv(device.kernel, 1 << 16))
        assert isinstance(packet.transport, UDP), f"not what was sent: {packet}"
        return packet.payload

    async def aclose(self) -> None:
        """Close the far backend. Idempotent."""
        far, self._far = self._far, None
        if far is not None:
            await far.aclose()


class TunBackendConformance(BackendConformance):
    """The suite for backends with a TUN device, without root. A subclass overrides :meth:`make_backend`.

    The backend shows its peers under ``peers`` in its status, as those of overlaynet's do; one that shows them elsewhere
    overrides :meth:`observe`.
    """

    lacks: ClassVar[Mapping[str, str]] = {
        "earlier runs": "the kernel takes a TUN device away when its process ends",
        "write counts": "nobody counts what is done to a pretended device",
        "changes": "nobody tells of what is done to a pretended device",
        "failure": "a device that is deleted is made again",
    }

    @pytest.fixture(autouse=True)
    def pretended_hosts(self) -> Iterator[PretendedHosts]:
        """The hosts; the backend under test runs on ``near``."""
        with PretendedHosts() as hosts:
            yield hosts

    @pytest.fixture
    def underlay(self) -> Underlay:
        """Always of IPv4: there is no more than one IPv6 address of loopback, and it takes root to add another."""
        return underlay_at(NEAR)

    @pytest.fixture
    def make_peer(self, ip_version: int) -> MakePeer:
        """The peer with a number between 2 and 99. Override it if the backend publishes data that its peers need."""
        return lambda number: peer_at(subnets_of(number, ip_version), underlay_at(host_at(number, 4)), f"peer-{number}")

    @pytest.fixture
    def observe(self, pretended_hosts: PretendedHosts, brought: list[Alive]) -> Observe:
        """Tells of the devices, and of the peers of the backends that have not ended."""

        def observe() -> object:
            devices = [(name, device.mtu, device.addresses) for name, device in pretended_hosts.devices().items()]
            tables = [alive.backend.status().get("peers") for alive in brought if not alive.ended]
            return sorted(devices), [table for table in tables if table]

        return observe

    @pytest.fixture(params=["addresses and MTU", "devices"])
    def disturb(self, request: pytest.FixtureRequest, pretended_hosts: PretendedHosts) -> Callable[[], None]:
        """Takes the addresses and the MTU of the backend's devices away; or, in a second round, deletes the devices."""

        def disturb() -> None:
            for device in pretended_hosts.devices().values():
                device.mtu, device.addresses = 1000, ()
                if request.param == "devices":
                    device.delete()

        return disturb

    @pytest.fixture
    def take_device(self, pretended_hosts: PretendedHosts) -> Callable[[], None]:
        """Deletes the backend's devices, and has others of their names."""

        def take_device() -> None:
            for device in pretended_hosts.devices().values():
                device.delete()
                pretended_hosts.occupy(device.name)

        return take_device

    @pytest.fixture
    async def far_host(
        self, pretended_hosts: PretendedHosts, make_backend: MakeBackend, ip_version: int
    ) -> AsyncIterator[PretendedPair]:
        pair = PretendedPair(pretended_hosts, make_backend, ip_version)
        yield pair
        await pair.aclose()
