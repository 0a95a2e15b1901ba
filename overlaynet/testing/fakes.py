"""Drivers that touch neither the kernel nor the wire, for tests of whole daemons without root."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from ipaddress import IPv4Address, ip_address
from typing import Any

import attrs

from overlaynet.delivery import Delivery, Dropped
from overlaynet.drivers import Backend, Driver, NoOptions, Store
from overlaynet.errors import BackendError, StoreUnavailable
from overlaynet.hookspecs import hookimpl
from overlaynet.model import (
    JSON,
    Device,
    IPAddress,
    IPNetwork,
    Lease,
    LeaseData,
    LeaseRequest,
    Malformed,
    Peer,
    Reservation,
    Reserved,
    Route,
    Snapshot,
    Subnets,
    Underlay,
)
from overlaynet.network import Network
from overlaynet.options import between, option
from overlaynet.routers.memory import MemoryRouter


@attrs.frozen
class FakeBackendOptions:
    """The options of the backend it stands for, ``udp``."""

    port: int = option(8285, "UDP port of every node", check=between(1, 65535))
    name: str = option("overlay0", "name of the device")


class FakeBackend(Backend):
    """A backend that remembers what it was told, and decides about packets as ``udp`` does, but sends none.

    :class:`overlaynet.testing.Network` carries packets between several.
    """

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
        self.mtu = 0
        """Bytes in the largest packet that fits into the device; 0 before it is started."""
        self.drops: dict[str, int] = {}
        self._delivery: Delivery | None = None
        self._overlays: tuple[IPNetwork, ...] = ()
        self._failure: asyncio.Future[None] | None = None

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        self.underlay = underlay
        self._overlays = tuple(network)
        return LeaseData()

    async def start(self, lease: Lease) -> Device:
        assert self.underlay is not None, "started before it was opened"
        self.lease = lease
        self.mtu = _fitting_mtu(self.underlay)
        return Device(self.options.name, self.mtu)

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        self.peers = tuple(peers)
        self.tables += 1
        self._delivery = None
        if self.lost is not None:
            raise BackendError(self.lost)

    async def set_underlay(self, underlay: Underlay) -> Device:
        self.underlay = underlay
        self.mtu = _fitting_mtu(underlay)
        return Device(self.options.name, self.mtu)

    def encapsulate(self, destination: IPAddress, size: int) -> Peer:
        """The peer that a packet of ``size`` bytes out of the device is sent to. :raises Dropped: if it is not sent."""
        with self._counted():
            if size > self.mtu:
                raise Dropped("too_big", f"{size} bytes do not fit into the MTU of {self.mtu}")
            return self._find_delivery().peer_with(destination.packed)

    def decapsulate(self, outer_source: IPAddress, source: IPAddress, destination: IPAddress) -> None:
        """Look at a packet off the wire. :raises Dropped: unless a peer sent it, from its own subnet to this node's."""
        with self._counted():
            self._find_delivery().check(outer_source, source.packed, destination.packed)

    def _find_delivery(self) -> Delivery:
        if self._delivery is None:  # made only when packets flow: whole networks of nodes never ask
            assert self.lease is not None, "asked about a packet before it was started"
            self._delivery = Delivery(self.lease.subnets, self.peers)
        return self._delivery

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except Dropped as dropped:
            self.drops[dropped.reason] = self.drops.get(dropped.reason, 0) + 1
            raise

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
        return {"engine": "fake", "drops": dict(self.drops)}

    async def aclose(self) -> None:
        self.closed = True


def _fitting_mtu(underlay: Underlay) -> int:
    """What the headers of UDP and of either IP version leave."""
    return underlay.mtu - (28 if underlay.ipv6 is None else 48)


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
    """An underlay with one address, of either IP version, which is also the public one."""
    one = ip_address(address)
    if isinstance(one, IPv4Address):
        return Underlay(interface, mtu, ipv4=one, public_ipv4=one)
    return Underlay(interface, mtu, ipv6=one, public_ipv6=one)


class UnreliableStore(Store):
    """Another store, which can be put out of reach: every call then raises, and every watch ends.

    It closes the other store when it is closed.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(NoOptions())
        self._store = store
        self._down = False
        self._reading: set[asyncio.Task[Snapshot]] = set()

    def __str__(self) -> str:
        return str(self._store)

    def fail(self) -> None:
        """Go out of reach, at once. Idempotent."""
        self._down = True
        for reading in self._reading:
            reading.cancel()

    def recover(self) -> None:
        """Come back. Idempotent."""
        self._down = False

    async def read_network(self) -> str | None:
        return await self._reached().read_network()

    async def create_network(self, document: str) -> bool:
        return await self._reached().create_network(document)

    async def replace_network(self, document: str) -> None:
        await self._reached().replace_network(document)

    async def acquire(self, network: Network, request: LeaseRequest) -> Lease:
        return await self._reached().acquire(network, request)

    async def renew(self, network: Network, lease: Lease) -> Lease:
        return await self._reached().renew(network, lease)

    async def release(self, lease: Lease) -> None:
        await self._reached().release(lease)

    async def remove(self, claim: Lease | Malformed) -> bool:
        return await self._reached().remove(claim)

    async def reserve(self, reservation: Reservation) -> None:
        await self._reached().reserve(reservation)

    async def unreserve(self, subnets: Subnets) -> None:
        await self._reached().unreserve(subnets)

    async def reservations(self) -> Reserved:
        return await self._reached().reservations()

    async def leases(self) -> Snapshot:
        return await self._reached().leases()

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        async with aclosing(self._reached().watch()) as snapshots:
            while True:
                self._reached()
                reading = asyncio.create_task(_next(snapshots))
                self._reading.add(reading)
                try:
                    await asyncio.wait({reading})
                finally:
                    self._reading.discard(reading)
                    reading.cancel()
                    await asyncio.wait({reading})  # it must have ended before its generator can be closed
                if reading.cancelled():
                    self._reached()
                yield reading.result()

    async def aclose(self) -> None:
        await self._store.aclose()

    def _reached(self) -> Store:
        if self._down:
            raise StoreUnavailable(f"{self} was put out of reach by the test")
        return self._store


async def _next(snapshots: AsyncGenerator[Snapshot, None]) -> Snapshot:
    return await anext(snapshots)
