"""The nouns of the project: plain, immutable values that every part speaks in.

Nothing here does I/O. Two values are equal when they mean the same; bookkeeping such as versions and remaining
lifetimes takes no part in equality.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, TypeAlias

import attrs

IPAddress: TypeAlias = IPv4Address | IPv6Address
"""An address of either version, of the standard library's ``ipaddress``."""
IPNetwork: TypeAlias = IPv4Network | IPv6Network
"""A network of either version, of the standard library's ``ipaddress``."""
JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None
"""What JSON can say: the type of what backends publish, and of what they report."""


@attrs.frozen(cache_hash=True)
class Subnets:
    """What one lease covers: an IPv4 subnet, an IPv6 subnet, or one of each. At least one is set."""

    ipv4: IPv4Network | None = None
    """The IPv4 subnet, if there is one."""
    ipv6: IPv6Network | None = None
    """The IPv6 subnet, if there is one."""

    def __attrs_post_init__(self) -> None:
        if self.ipv4 is None and self.ipv6 is None:
            raise ValueError("a lease covers at least one subnet")

    def __iter__(self) -> Iterator[IPNetwork]:
        return iter([subnet for subnet in (self.ipv4, self.ipv6) if subnet is not None])

    def __str__(self) -> str:
        return " and ".join(str(subnet) for subnet in self)

    def overlaps(self, other: Subnets) -> bool:
        """True if any address lies in both."""
        if self.ipv4 is not None and other.ipv4 is not None and self.ipv4.overlaps(other.ipv4):
            return True
        return self.ipv6 is not None and other.ipv6 is not None and self.ipv6.overlaps(other.ipv6)


@attrs.frozen
class LeaseData:
    """What a backend publishes with its node's lease, for the same backend on the other nodes.

    A lease that takes more than 64 KiB in the store with it is not written.
    """

    backend_type: str = ""
    """flannel's ``BackendType``; empty if it is not stated, as flannel's udp does."""
    ipv4: JSON = None
    """A value of the backend's own, for its packets by IPv4 (flannel's ``BackendData``)."""
    ipv6: JSON = None
    """A value of the backend's own, for its packets by IPv6 (flannel's ``BackendV6Data``)."""


@attrs.frozen
class Lease:
    """One node's claim to its subnets, as the store holds it."""

    subnets: Subnets
    """What the node holds."""
    public_ipv4: IPv4Address | None = None
    """Where peers with IPv4 reach the node; ``None`` if they cannot."""
    public_ipv6: IPv6Address | None = None
    """Where peers with IPv6 reach the node; ``None`` if they cannot."""
    data: LeaseData = LeaseData()
    """What the node's backend publishes."""
    node: str = ""
    """Identity of the node; empty in leases that flannel wrote."""
    run: str = ""
    """Identity of the process that wrote the lease; a restart of the same node has another."""
    renewal_margin: float | None = attrs.field(default=None, eq=False)
    """Seconds before its end at which its node renews it; ``None`` if the record does not say, as flannel's do not."""
    reserved: bool = False
    """The subnets were found to be reserved (for whom, only the reservation says) when the record was written."""
    version: str = attrs.field(default="", eq=False)
    """The store's token for exactly this state of the record, for compare-and-swap."""
    ttl: float | None = attrs.field(default=None, eq=False)
    """Seconds left when the store was asked; ``math.inf`` if it never expires, ``None`` if not known."""


@attrs.frozen
class LeaseRequest:
    """What a node asks a store for."""

    node: str
    """Identity of the node, which a restart does not change."""
    run: str
    """Identity of the process that asks."""
    public_ipv4: IPv4Address | None = None
    """Where peers with IPv4 reach the node; ``None`` if they cannot."""
    public_ipv6: IPv6Address | None = None
    """Where peers with IPv6 reach the node; ``None`` if they cannot."""
    data: LeaseData = LeaseData()
    """What the node's backend publishes."""
    previous: Subnets | None = None
    """Subnets that the node held in an earlier life; preferred when they are free."""
    renewal_margin: float | None = None
    """Seconds before its end at which the node is going to renew the lease."""


@attrs.frozen
class Reservation:
    """Subnets that one node is given, and it before any other, whether or not it holds them now.

    The node is named by its identity or by a public address. With none of them, as when its record cannot be
    read, the subnets are kept from everybody.
    """

    subnets: Subnets
    """What is reserved."""
    node: str = ""
    """Identity of the node that it is for; empty if that is named by an address, or nobody's."""
    public_ipv4: IPv4Address | None = None
    """Address of the node that it is for, if it is named by that."""
    public_ipv6: IPv6Address | None = None
    """Likewise."""

    def is_for(self, holder: Lease | LeaseRequest) -> bool:
        """True if that node is the one that the subnets are reserved for."""
        if self.node:
            return holder.node == self.node
        if self.public_ipv4 is not None:
            return holder.public_ipv4 == self.public_ipv4
        return self.public_ipv6 is not None and holder.public_ipv6 == self.public_ipv6

    @property
    def holder(self) -> str:
        """Whom it is for, in words."""
        if self.node:
            return f"node {self.node}"
        address = self.public_ipv4 if self.public_ipv4 is not None else self.public_ipv6
        return "nobody" if address is None else f"the node at {address}"


def printable(text: str, most: int = 300) -> str:
    """The text on one line, at most so many characters of it: what comes out of a store is anyone's."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:most]
    )
    return f"{shown[:most]}…" if len(text) > most or len(shown) > most else shown


@attrs.frozen
class Malformed:
    """A record that cannot be used: where it lies, and why it cannot be used. Both are short and printable."""

    key: str = attrs.field(converter=printable)
    """Where the record lies in the store."""
    reason: str = attrs.field(converter=printable)
    """Why it cannot be used."""
    version: str = attrs.field(default="", eq=False)
    """The store's token for exactly this state of the record, for compare-and-swap."""


@attrs.frozen
class Reserved:
    """All reservations at one moment, in the order of their keys."""

    reservations: tuple[Reservation, ...] = ()
    """One for each record that names subnets."""
    malformed: tuple[Malformed, ...] = ()
    """Those whose record cannot be read; if their key can be, they are among the reservations, for nobody."""

    def of(self, subnets: Subnets) -> Reservation | None:
        """The reservation of exactly these subnets."""
        return next((found for found in self.reservations if found.subnets == subnets), None)

    def kept_for(self, request: LeaseRequest) -> list[Subnets]:
        """What is reserved for this node."""
        return [found.subnets for found in self.reservations if found.is_for(request)]

    def in_the_way(self, subnets: Subnets, holder: Lease | LeaseRequest) -> Reservation | None:
        """A reservation for somebody else that overlaps these subnets."""
        return next((r for r in self.reservations if r.subnets.overlaps(subnets) and not r.is_for(holder)), None)


@attrs.frozen
class Snapshot:
    """All leases of the network at one moment, in the order of their keys."""

    leases: tuple[Lease, ...] = ()
    """Those that can be read."""
    malformed: tuple[Malformed, ...] = ()
    """Records that cannot be read as leases."""


@attrs.frozen
class Underlay:
    """How this node is attached to the network of the hosts: by an IPv4 address, an IPv6 address, or one of each."""

    interface: str
    """Name of the interface, such as ``eth0``."""
    mtu: int
    """Bytes in the largest IP packet that the interface sends unfragmented."""
    ipv4: IPv4Address | None = None
    """The interface's own address: what sockets bind to."""
    ipv6: IPv6Address | None = None
    """Likewise."""
    public_ipv4: IPv4Address | None = None
    """Where the peers reach this node: the interface's address, unless the operator says otherwise (NAT)."""
    public_ipv6: IPv6Address | None = None
    """Likewise."""

    @property
    def addresses(self) -> frozenset[IPAddress]:
        """All addresses of this node: the interface's own, and those that the peers reach it by."""
        every = (self.ipv4, self.ipv6, self.public_ipv4, self.public_ipv6)
        return frozenset(address for address in every if address is not None)


@attrs.frozen
class Device:
    """The overlay's network device on this host."""

    name: str
    """Name of the interface, such as ``overlay0``."""
    mtu: int
    """Bytes in the largest IP packet that containers can send through it."""
    instance: str = attrs.field()
    """What tells this overlay from another on this host, the same after a restart; the device's name by default.

    A backend whose device is shared with others, such as the underlay's interface, has to name something else.
    """

    @instance.default
    def _instance(self) -> str:
        return self.name


@attrs.frozen
class Peer:
    """Another node, as the packet path needs it: its subnets and where to send what is meant for them."""

    subnets: Subnets
    """What lies behind it."""
    public_ipv4: IPv4Address | None = None
    """Its address by IPv4; ``None`` if it has none."""
    public_ipv6: IPv6Address | None = None
    """Its address by IPv6; ``None`` if it has none."""
    node: str = ""
    """Its identity; empty if flannel wrote its lease."""
    data: LeaseData = LeaseData()
    """What its backend has published."""

    def __str__(self) -> str:
        address = self.public_ipv4 if self.public_ipv4 is not None else self.public_ipv6
        return f"{self.subnets} via {address}"


@attrs.frozen(order=False)
class Route:
    """One route that the kernel is to have.

    ``unreachable`` routes have neither device nor gateway: the kernel answers the sender with an ICMP error.
    """

    destination: IPNetwork
    """Where packets that it is for go to."""
    kind: Literal["unicast", "unreachable"] = "unicast"
    """Whether they are sent on, or their sender is told that nobody can be reached."""
    device: str | None = None
    """Name of the interface that they leave by."""
    gateway: IPAddress | None = None
    """Whom they are handed to; ``None`` if their destination itself."""
    onlink: bool = False
    """The gateway is reachable on the device although no connected route says so."""
