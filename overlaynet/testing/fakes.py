"""Drivers that touch neither the kernel nor the wire, for tests of whole daemons without root."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from typing import Any

import attrs

from overlaynet.drivers import Backend, Driver
from overlaynet.errors import BackendError
from overlaynet.hookspecs import hookimpl
from overlaynet.model import JSON, Device, IPNetwork, Lease, LeaseData, Peer, Route, Underlay
from overlaynet.network import Network
from overlaynet.options import between, option
from overlaynet.routers.memory import MemoryRouter


@attrs.frozen
class FakeBackendOptions:
    """The options of the backend it stands for, ``udp``."""

    port: int = option(8285, "UDP port of every node", check=between(1, 65535))
    name: str = option("overlay0", "name of the device")


class FakeBackend(Backend):
    """A backend that remembers what it was told."""

    Options = FakeBackendOptions

    def __init__(self, options: FakeBackendOptions) -> None:
        super().__init__(options)
        self.underlay: Underlay | None = None
        self.lease: Lease | None = None
        self.peers: tuple[Peer, ...] = ()
        self.tables = 0
        """How many peer tables it was given."""
        self.closed = False
        self.lost: str | None = None
        """Why there is no device; ``None`` if there is one."""
        self._changed = asyncio.Event()
        self._overlays: tuple[IPNetwork, ...] = ()
        self._failure: asyncio.Future[None] | None = None

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        self.underlay = underlay
        self._overlays = tuple(network)
        return LeaseData()

    async def start(self, lease: Lease) -> Device:
        assert self.underlay is not None, "started before it was opened"
        self.lease = lease
        return Device(self.options.name, self.underlay.mtu - 28)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        self.peers = tuple(peers)
        self.tables += 1
        if self.lost is not None:
            raise BackendError(self.lost)

    async def set_underlay(self, underlay: Underlay) -> Device:
        self.underlay = underlay
        return Device(self.options.name, underlay.mtu - 28)

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        if self.lost is not None:
            return []
        return [Route(overlay, device=self.options.name) for overlay in self._overlays]

    async def run(self) -> None:
        self._failure = asyncio.get_running_loop().create_future()
        await self._failure

    async def changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def lose(self, reason: str | None) -> None:
        """Take the device away, so that :meth:`set_peers` raises; with ``None``, let it be made again. Either is told."""
        self.lost = reason
        self._changed.set()

    def fail(self, reason: str) -> None:
        """Make :meth:`run` raise, as after a defect."""
        assert self._failure is not None, "failed before it ran"
        self._failure.set_exception(BackendError(reason))

    def status(self) -> Mapping[str, JSON]:
        return {"engine": "fake"}

    async def aclose(self) -> None:
        self.closed = True


class FakeDrivers:
    """A plugin that answers for every backend with a fake, and for every router with one that only records.

    What is made for a daemon is found in ``backends`` and ``routers``, the newest last.
    """

    def __init__(self) -> None:
        self.backends: list[FakeBackend] = []
        self.routers: list[MemoryRouter] = []

    @hookimpl
    def overlaynet_driver(self, axis: str, name: str) -> type[Driver] | None:
        """Answer for backends and routers; leave stores to others."""
        made: list[Any]
        base: type[Driver]
        if axis == "backend":
            made, base = self.backends, FakeBackend
        elif axis == "router":
            made, base = self.routers, MemoryRouter
        else:
            return None

        class Remembered(base):  # type: ignore[misc,valid-type]
            def __init__(self, options: Any) -> None:
                super().__init__(options)
                made.append(self)

        return Remembered


def fake_underlay(address: str, interface: str = "eth0", mtu: int = 1500) -> Underlay:
    """An underlay with one IPv4 address, which is also the public one."""
    return Underlay(interface, mtu, ipv4=IPv4Address(address), public_ipv4=IPv4Address(address))
