"""What lies between the nodes of an in-process network: how a packet gets from one to another, and what goes wrong."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, TypeAlias

import attrs

from overlaynet.delivery import Dropped
from overlaynet.model import IPAddress, Peer, Route, Underlay
from overlaynet.testing.fakes import FakeBackend
from overlaynet.testing.flow import Kind, Packet, Step

if TYPE_CHECKING:
    from overlaynet.testing.network import Node

EVER = float("inf")
_LOST = "drop: lost on the link"
_FIRST_IPV4, _FIRST_IPV6 = IPv4Address("172.16.0.1"), IPv6Address("fd00:16::1")

Life: TypeAlias = AsyncGenerator[tuple[float, Step], None]
"""What happens to a packet: seconds until the next step, and the step; the last is its delivery, or that it is dropped."""


@attrs.define
class Link:
    """What is wrong with the link from one node to another."""

    to_drop: float = 0
    delay: float = 0.0


class Links(abc.ABC):
    """Every link between the nodes, in either direction."""

    patience: float
    """Seconds that the nodes are given to come to know each other, by default."""

    def __init__(self, nodes: Callable[[], Iterable[Node]]) -> None:
        self.nodes = nodes
        self._links: dict[tuple[str, str], Link] = {}
        self._side: dict[str, int] = {}

    @abc.abstractmethod
    def underlay(self, number: int) -> Underlay:
        """How the node with a number, from 0 on, is attached."""

    @abc.abstractmethod
    def life(self, packet: Packet, sender: Node) -> Life:
        """Let a container of ``sender`` send the packet."""

    def begin(self, stack: ExitStack) -> None:  # noqa: B027 - nothing is a fair default
        """The nodes are about to start, in this event loop; ``stack`` ends what this begins."""

    def start_on(self, node: Node, start: Callable[[], asyncio.Task[None]]) -> asyncio.Task[None]:
        """Start the daemon of a node."""
        return start()

    def crash(self, node: Node) -> None:  # noqa: B027 - nothing is a fair default
        """Take away what the kernel takes away of a process that is killed."""

    def link(self, sender: Node, receiver: Node) -> Link:
        """The link from one node to another, to be changed; then :meth:`changed`."""
        return self._links.setdefault((sender.name, receiver.name), Link())

    def divide(self, sides: dict[str, int]) -> None:
        """Put nodes on sides, by their names; those that are not named are on side 0."""
        self._side = sides
        self.changed()

    def heal(self) -> None:
        """Make everything right."""
        self._links.clear()
        self._side.clear()
        self.changed()

    def changed(self) -> None:  # noqa: B027 - nothing is a fair default
        """Faults have begun or ended."""

    def cut(self, sender: Node, receiver: Node) -> str | None:
        """Why nothing at all gets from one to another; ``None`` if something does."""
        if self._side.get(sender.name, 0) != self._side.get(receiver.name, 0):
            return "partition: they are on two sides"
        return _LOST if self.link(sender, receiver).to_drop == EVER else None

    def loss(self, sender: Node, receiver: Node) -> str | None:
        """Why the next packet on this link is lost, which is counted; ``None`` if it is not."""
        if (why := self.cut(sender, receiver)) is not None:
            return why
        link = self.link(sender, receiver)
        if link.to_drop > 0:
            link.to_drop -= 1
            return _LOST
        return None

    def node_at(self, address: IPAddress | None) -> Node | None:
        """The node with a public address."""
        return next((node for node in self.nodes() if address is not None and address in node.underlay.addresses), None)


class FakeLinks(Links):
    """Links between fake backends: nothing is sent, and all is decided as real ones do.

    :param versions: IP versions of the nodes' addresses.
    """

    patience = 3600.0

    def __init__(self, nodes: Callable[[], Iterable[Node]], versions: Iterable[int] = (4,)) -> None:
        super().__init__(nodes)
        self._versions = frozenset(versions)
        if not self._versions or not self._versions <= {4, 6}:
            raise ValueError(
                f"underlay={tuple(versions)!r}: name the IP versions of the nodes' addresses, such as (4, 6)"
            )
        self._by_address: dict[IPAddress, Node] = {}

    def begin(self, stack: ExitStack) -> None:
        self._by_address = {address: node for node in self.nodes() for address in node.underlay.addresses}

    def underlay(self, number: int) -> Underlay:
        ipv4 = _FIRST_IPV4 + number if 4 in self._versions else None
        ipv6 = _FIRST_IPV6 + number if 6 in self._versions else None
        return Underlay("eth0", 1500, ipv4, ipv6, public_ipv4=ipv4, public_ipv6=ipv6)

    def node_at(self, address: IPAddress | None) -> Node | None:
        return None if address is None else self._by_address.get(address)

    async def life(self, packet: Packet, sender: Node) -> Life:
        at = sender
        inner = f"{packet.source} > {packet.destination}"
        try:
            route = chosen_route(sender, packet.destination)
            yield step(packet, Kind.ROUTED, sender, f"{inner} by {route.destination}")
            peer = _fake(sender).encapsulate(packet.destination, packet.size)
            outer, far = _outer(sender.underlay, peer)
            yield step(packet, Kind.ENCAPSULATED, sender, f"[{outer} > {far} [{inner}]]")
            receiver = self.node_at(far)
            if receiver is None:
                raise Dropped("no_host", f"no host has the address {far}")
            if (why := self.loss(sender, receiver)) is not None:
                yield step(packet, Kind.DROPPED, sender, why, to=receiver)
                return
            link = self.link(sender, receiver)
            yield step(packet, Kind.ON_THE_LINK, sender, f"{outer} > {far}", to=receiver, delay=link.delay)
            at = receiver
            if not receiver.running:
                raise Dropped("no_daemon", f"nobody listens on {receiver.name}")
            _fake(receiver).decapsulate(outer, packet.source, packet.destination)
            yield delivered(packet, receiver)
        except Dropped as dropped:
            yield step(packet, Kind.DROPPED, at, dropped)


def step(
    packet: Packet, kind: Kind, node: Node, detail: object, *, to: Node | None = None, delay: float = 0.0
) -> tuple[float, Step]:
    """Something that happens to a packet now, and the seconds until the next thing does."""
    now = asyncio.get_running_loop().time()
    return delay, Step(now, node.name, str(detail), kind, packet.number, None if to is None else to.name)


def delivered(packet: Packet, node: Node) -> tuple[float, Step]:
    """The container has it."""
    return step(packet, Kind.DELIVERED, node, f"{packet.destination}, {len(packet.payload)} bytes")


def chosen_route(node: Node, destination: IPAddress) -> Route:
    """The route that the node's kernel would choose. :raises Dropped: if it does not lead into the overlay."""
    matching = [
        route
        for route in node.routes
        if destination.version == route.destination.version and destination in route.destination
    ]
    if not matching:
        raise Dropped("leaked", f"{node.name} has no route for {destination}: it would follow the default route")
    # Of two for the same network, the backstop has the higher metric.
    route = max(matching, key=lambda route: (route.destination.prefixlen, route.kind == "unicast"))
    if route.kind == "unreachable":
        raise Dropped("unreachable", f"{node.name} answers for {destination} with an ICMP error")
    return route


def _fake(node: Node) -> FakeBackend:
    backend = node.backend
    assert isinstance(backend, FakeBackend), f"{node.name} has a real backend"
    return backend


def _outer(underlay: Underlay, peer: Peer) -> tuple[IPAddress, IPAddress]:
    """The addresses that a datagram to the peer has: of IPv4 if both have it. :raises Dropped: without a common version."""
    pairs: list[tuple[IPAddress | None, IPAddress | None]] = [
        (underlay.public_ipv4, peer.public_ipv4),
        (underlay.public_ipv6, peer.public_ipv6),
    ]
    for own, far in pairs:
        if own is not None and far is not None:
            return own, far
    raise Dropped("no_route", f"{peer} has no address of this host's IP versions")
