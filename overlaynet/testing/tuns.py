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
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, ip_address
from types import TracebackType
from typing import Any, ClassVar, Self
from unittest import mock

from overlaynet.drivers import Backend
from overlaynet.errors import BackendError
from overlaynet.model import IPAddress, Lease, Peer, Route, Subnets, Underlay
from overlaynet.network import Network
from overlaynet.testing._requirements import pytest
from overlaynet.testing.backends import Alive, BackendConformance, FarHost, MakeBackend, Observe
from overlaynet.testing.packets import UDP, checksum, parse_ip
from overlaynet.tun_device import TunDevice

NEAR, FAR = IPv4Address("127.0.0.1"), IPv4Address("127.0.0.2")
"""The addresses of the hosts."""
_NEAR_CONTAINER, _FAR_CONTAINER = IPv4Address("10.244.1.1"), IPv4Address("10.244.100.1")
_FAR_SUBNET = IPv4Network("10.244.100.0/24")
_PORT = 9000


class PretendedTun(TunDevice):
    """A device whose other end, which is the kernel's, is in the hands of a test: :attr:`kernel`."""

    def __init__(self, name: str, index: int, forget: Callable[[PretendedTun], None]) -> None:
        near, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        self.kernel.setblocking(False)
        super().__init__(name, [near.detach()], index)
        self.mtu = 0
        self.addresses: tuple[IPAddress, ...] = ()
        self._forget = forget

    async def configure(self, mtu: int, own: Subnets) -> None:
        """See :meth:`overlaynet.tun_device.TunDevice.configure`."""
        await asyncio.sleep(0)
        if self.kernel.fileno() == -1:
            raise self._gone()
        self.mtu = mtu
        self.addresses = tuple(subnet.network_address for subnet in own)

    def delete(self) -> None:
        """Do what ``ip link delete`` does. Idempotent."""
        self._forget(self)
        self.kernel.close()

    def close(self) -> None:
        """See :meth:`overlaynet.tun_device.TunDevice.close`."""
        self.delete()
        super().close()


class PretendedHosts:
    """Hosts whose TUN devices are pretended. Within its ``with`` block, ``TunDevice.make`` makes them.

    They are made on the host ``near``, but in the ``with`` block of :meth:`on`.
    """

    def __init__(self) -> None:
        self._devices: dict[tuple[str, str], PretendedTun] = {}
        self._here = "near"
        self._made = 0
        self._patch = mock.patch.object(TunDevice, "make", self._make)

    def __enter__(self) -> Self:
        self._patch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.stop()

    @contextlib.contextmanager
    def on(self, host: str) -> Iterator[None]:
        """Make devices on this host meanwhile."""
        before, self._here = self._here, host
        try:
            yield
        finally:
            self._here = before

    def devices(self, host: str = "near") -> Mapping[str, PretendedTun]:
        """The devices of a host, by name."""
        return {name: device for (where, name), device in self._devices.items() if where == host}

    async def _make(self, name: str, *how_many: int, **how: object) -> PretendedTun:
        await asyncio.sleep(0)
        key = (self._here, name)
        if key in self._devices:
            raise BackendError(f"the device {name} belongs to another overlaynet that is running")
        self._made += 1
        device = self._devices[key] = PretendedTun(name, self._made, self._remove)
        return device

    def _remove(self, device: PretendedTun) -> None:
        self._devices = {key: other for key, other in self._devices.items() if other is not device}


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


def datagram(source: IPAddress | str, destination: IPAddress | str, payload: bytes = b"") -> bytes:
    """A whole IP packet, of either version, with a UDP datagram (RFC 768) in it; its UDP checksum is left out."""
    addresses: tuple[Any, Any] = ip_address(source), ip_address(destination)
    packed = b"".join(address.packed for address in addresses)
    content = struct.pack("!HHHH", _PORT, _PORT, 8 + len(payload), 0) + payload
    if addresses[0].version == 6:
        return struct.pack("!IHBB", 6 << 28, len(content), 17, 64) + packed + content
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(content), 0, 0, 64, 17, 0) + packed
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + content
