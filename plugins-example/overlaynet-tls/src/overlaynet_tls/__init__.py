"""The tls backend for overlaynet: IP packets in TLS over TCP, for networks that block UDP."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from typing import ClassVar

import attrs

from overlaynet.api import (
    JSON,
    Backend,
    BackendError,
    Background,
    Delivery,
    Device,
    Dropped,
    IPAddress,
    Lease,
    LeaseData,
    Network,
    PacketDevice,
    Peer,
    Route,
    Subnets,
    Underlay,
    between,
    check_name,
    fields,
    fitting_mtu,
    option,
    peer_address,
)
from overlaynet_tls.link import Link
from overlaynet_tls.stream import Deframer, Identity, answer, call

log = logging.getLogger(__name__)

OVERHEAD = {4: 76, 6: 96}
"""Bytes around a packet that has a TCP segment to itself, by IP version of the underlay: IP (20 or 40), TCP with timestamps
(32), a TLS record (22), the length (2). A larger packet would go, too, but in two segments, and wait for both."""
MOST_CALLERS = 16
"""Connections from one address: its node's, older ones not yet known to be dead, and those of other nodes behind NAT."""


@attrs.frozen
class TlsOptions:
    """The members of ``Backend`` in the network document, ``{"Type": "tls", "Port": 443}``."""

    port: int = option(8443, "TCP port on which every node is called", check=between(1, 65535))
    name: str = option("overlay0", "Name of the TUN device", check=check_name)
    certificate: str = option(
        "/etc/overlaynet/tls.crt", "PEM file of the node's certificate, which names its public address", node=True
    )
    key: str = option("/etc/overlaynet/tls.key", "PEM file of the certificate's key, not encrypted", node=True)
    authority: str = option(
        "/etc/overlaynet/ca.crt", "PEM file of the authority that has signed the nodes' certificates", node=True
    )


class TlsBackend(Backend):
    """Carries packets in TLS streams. A node calls each peer that it has packets for, and sends on that connection only.

    Who calls must come from a peer's address, with a certificate of the network's authority that names this address. What
    it sends is delivered if its source lies in the subnet of a peer at that address, and its destination in this node's.
    """

    api: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[TlsOptions]] = TlsOptions
    options: TlsOptions

    def __init__(self, options: TlsOptions) -> None:
        super().__init__(options)
        self._identity = Identity(options.certificate, options.key, options.authority)
        self._device = PacketDevice(options.name, "tls", self._send)
        self._background = Background()
        self._network: Network | None = None
        self._own: Subnets | None = None
        self._delivery: Delivery | None = None
        self._hosts: dict[int, IPAddress] = {}
        """The addresses of this host, by IP version."""
        self._mtu = 0
        self._listeners: dict[IPAddress, asyncio.Task[None]] = {}
        self._callers: dict[asyncio.Task[None], IPAddress] = {}
        self._links: dict[Subnets, Link] = {}
        self._senders: dict[Subnets, asyncio.Task[None]] = {}

    # Its life

    async def open(self, network: Network, underlay: Underlay) -> LeaseData:
        """Read the certificates, listen, and make the device. Peers need to know no more than the backend's type."""
        self._network = network
        self._identity.context(ssl.PROTOCOL_TLS_SERVER)
        await self._device.open()
        try:
            self._attach(underlay)
        except BaseException:
            self._device.close()
            raise
        return LeaseData("tls")

    async def start(self, lease: Lease) -> Device:
        """Set the device up."""
        self._own = lease.subnets
        await self.set_peers([])
        return Device(self.options.name, self._mtu)

    async def set_underlay(self, underlay: Underlay) -> Device:
        """Listen at the new addresses, call from them, and give the device the MTU that fits."""
        hosts = self._hosts
        self._attach(underlay)
        if self._hosts != hosts:
            self._keep_links({})  # the core sets the peers anew, as this node is somewhere else now
        if self._own is not None:
            await self._device.mend(self._mtu, self._own)
        return Device(self.options.name, self._mtu)

    async def run(self) -> None:
        """Wait for a defect: all else is tried again."""
        await self._background.failure()

    async def changed(self) -> None:
        """Return when the device may have been disturbed."""
        await self._device.changed()

    async def aclose(self) -> None:
        """End all connections, and take the device away; if it is cancelled, they end all the same, a moment later."""
        self._device.close()
        await self._background.aclose()

    # Its peers

    async def set_peers(self, peers: Sequence[Peer]) -> None:
        """Keep the links to peers that are the same, end the others and calls from them; mend the device."""
        if self._own is None:
            raise BackendError("the tls backend was not started; this is a defect of its caller")
        self._delivery = Delivery(self._own, peers)
        self._keep_links(
            {peer.subnets: (peer, host) for peer in peers if (host := peer_address(peer, self._hosts)) is not None}
        )
        for task, address in self._callers.items():
            if address not in self._delivery.hosts:
                task.cancel()
        await self._device.mend(self._mtu, self._own)

    def routes(self, peers: Sequence[Peer]) -> Sequence[Route]:
        """A route into the device for each subnet of each peer; for all else in the overlay, the kernel answers."""
        reached = [peer for peer in peers if self._device.exists and peer_address(peer, self._hosts) is not None]
        return [Route(subnet, device=self.options.name) for peer in reached for subnet in peer.subnets]

    def status(self) -> Mapping[str, JSON]:
        """Device, MTU and port; peers with their counters; drops by reason."""
        return {
            "device": self.options.name,
            "mtu": self._mtu,
            "port": self.options.port,
            "peers": {str(subnets): link.status() for subnets, link in self._links.items()},
            "drops": dict(self._device.drops),
        }

    def _keep_links(self, wanted: Mapping[Subnets, tuple[Peer, IPAddress]]) -> None:
        """Have exactly these links; those that are there already stay, with their connections."""
        for subnets, link in list(self._links.items()):
            if wanted.get(subnets) != (link.peer, link.address):
                del self._links[subnets]
                self._senders.pop(subnets).cancel()
        for subnets, (peer, address) in wanted.items():
            if subnets not in self._links:
                link = self._links[subnets] = Link(peer, address, self._call)
                self._senders[subnets] = self._background.start(link.run())

    # Packets

    def _send(self, packet: bytes) -> None:
        """Hand a packet out of the device to the link of the peer that it goes to."""
        if self._delivery is None:
            raise Dropped("no_route", "there are no peers yet")
        link = self._links.get(self._delivery.receiver(packet).subnets)
        if link is None:
            raise Dropped("no_route", "the peer has no address of this host's IP versions")
        link.send(packet)

    def _deliver(self, packet: bytes, host: IPAddress) -> None:
        """Write a packet that came from a host into the device, if it may come from there."""
        try:
            if self._delivery is None:
                raise Dropped("unknown_peer", "there are no peers yet")
            sender = self._delivery.sender(packet, host)
            self._device.write(packet)
        except Dropped as dropped:
            self._device.drops[dropped.reason] += 1
        else:
            if (link := self._links.get(sender.subnets)) is not None:
                link.count_received(packet)

    # Calls

    async def _call(self, address: IPAddress) -> asyncio.StreamWriter:
        return await call(self._identity, address, self.options.port, self._hosts[address.version])

    def _attach(self, underlay: Underlay) -> None:
        """Listen at this host's addresses, and no others. :raises BackendError: with nothing changed."""
        if self._network is None:
            raise BackendError("the tls backend was not opened; this is a defect of its caller")
        mtu = fitting_mtu(self._network, underlay, OVERHEAD[4 if underlay.ipv6 is None else 6])
        addresses: list[IPAddress | None] = [underlay.ipv4, underlay.ipv6]
        hosts: dict[int, IPAddress] = {address.version: address for address in addresses if address is not None}
        with ExitStack() as undo:
            new = {a: undo.enter_context(self._listen(a)) for a in hosts.values() if a not in self._listeners}
            undo.pop_all()
        for address, listener in new.items():
            self._listeners[address] = self._background.start(self._accept(listener), listener)
        for address in self._listeners.keys() - set(hosts.values()):
            self._listeners.pop(address).cancel()
        self._mtu, self._hosts = mtu, hosts

    def _listen(self, address: IPAddress) -> socket.socket:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            listener = socket.create_server((str(address), self.options.port), family=family)
        except OSError as error:
            raise BackendError(
                f"TCP port {self.options.port} of {address} cannot be listened on: {error.strerror}; stop what has it, or "
                f"choose another Port in the network document's Backend"
            ) from error
        listener.setblocking(False)
        return listener

    async def _accept(self, listener: socket.socket) -> None:
        """Let peers in, and turn strangers away before they cost anything."""
        while True:
            try:
                connection, (host, *_) = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:  # it ended before it was accepted, or there are too many descriptors
                log.warning("call not accepted", extra=fields(reason=error.strerror))
                await asyncio.sleep(1.0)
                continue
            address = ip_address(host)
            if self._delivery is None or address not in self._delivery.hosts:
                self._device.drops["unknown_caller"] += 1
                connection.close()
            elif list(self._callers.values()).count(address) >= MOST_CALLERS:
                self._device.drops["too_many_callers"] += 1
                connection.close()
            else:
                task = self._background.start(self._serve(connection, address), connection)
                self._callers[task] = address
                task.add_done_callback(self._callers.pop)

    async def _serve(self, connection: socket.socket, address: IPAddress) -> None:
        """Deliver what a caller sends, until it ends the connection."""
        try:
            reader, transport = await answer(self._identity, connection, address)
        except (OSError, BackendError) as error:
            self._device.drops["refused_caller"] += 1
            log.warning("caller refused", extra=fields(address=address, reason=error))
            return
        deframer = Deframer()
        try:
            while data := await reader.read(1 << 16):
                for packet in deframer.feed(data):
                    self._deliver(packet, address)
        except OSError as error:
            log.info("caller lost", extra=fields(address=address, reason=error))
        finally:
            transport.abort()
