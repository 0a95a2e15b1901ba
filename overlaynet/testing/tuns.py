"""Backends with a TUN device, without root: the suite of :mod:`overlaynet.testing.backends` with pretended devices::

    class TestMyBackend(TunBackendConformance):
        @pytest.fixture
        def make_backend(self):
            return lambda: MyBackend(MyBackend.Options())

The backend has its device by :class:`overlaynet.api.PacketDevice`, and need not know. Its sockets are real: the near
host is 127.0.0.1, and the far one 127.0.0.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import ClassVar

from overlaynet.drivers import Backend
from overlaynet.model import Lease, Peer, Route, Subnets, Underlay
from overlaynet.network import Network
from overlaynet.testing._requirements import pytest
from overlaynet.testing.backends import Alive, BackendConformance, FarHost, MakeBackend, Observe
from overlaynet.testing.packets import UDP, parse_ip
from overlaynet.testing.pretended import PretendedHosts, datagram

NEAR, FAR = IPv4Address("127.0.0.1"), IPv4Address("127.0.0.2")
"""The addresses of the hosts."""
_NEAR_CONTAINER, _FAR_CONTAINER = IPv4Address("10.244.1.1"), IPv4Address("10.244.100.1")
_FAR_SUBNET = IPv4Network("10.244.100.0/24")


class PretendedPair(FarHost):
    """The near host, and a far one on which the same backend runs, in the same event loop."""

    def __init__(self, hosts: PretendedHosts, make_backend: MakeBackend) -> None:
        self._hosts = hosts
        self._make_backend = make_backend
        self._routes: Sequence[Route] = ()
        self._far: Backend | None = None

    async def join(self, network: Network, near: Peer) -> Peer:
        self._far = far = self._make_backend()
        lease = Lease(Subnets(_FAR_SUBNET), FAR, node="far", run="fedcba9876543210")
        with self._hosts.on("far"):
            data = await far.open(network, Underlay("lo", 1500, ipv4=FAR, public_ipv4=FAR))
            await far.start(lease)
            await far.set_peers([near])
        return Peer(lease.subnets, FAR, node="far", data=data)

    async def use(self, backend: Backend, peers: Sequence[Peer]) -> None:
        self._routes = tuple(backend.routes(peers))

    async def send(self, payload: bytes) -> None:
        ways = {route.device for route in self._routes if _FAR_CONTAINER in route.destination}
        for name, device in self._hosts.devices().items():
            if name in ways:
                device.kernel.send(datagram(_NEAR_CONTAINER, _FAR_CONTAINER, payload))

    async def receive(self) -> bytes:
        (device,) = self._hosts.devices("far").values()
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
    async def far_host(
        self, pretended_hosts: PretendedHosts, make_backend: MakeBackend
    ) -> AsyncIterator[PretendedPair]:
        pair = PretendedPair(pretended_hosts, make_backend)
        yield pair
        await pair.aclose()
