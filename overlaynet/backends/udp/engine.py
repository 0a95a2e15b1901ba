"""What a packet engine is: it is handed file descriptors and whole peer tables, and asked for counters.

An engine carries packets between a TUN device and UDP sockets in a thread of its own. The event loop never sees a packet.

Out of the device, a packet becomes the payload of one UDP datagram to the peer whose subnet holds its destination; the
longest prefix wins. For a destination that no peer has, the sender is told by ICMP (see
:func:`overlaynet.backends.udp.packets.unreachable`). Off the wire, a datagram reaches the device only if its sender is a
peer's address (with any port: there may be NAT between), its payload is one whole IP packet, that packet's source lies in
a subnet of a peer with this address, and its destination in this node's own subnet. All else is dropped and counted.
Packets are passed on as they are; their TTL is the business of the kernels that route them.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

import attrs

from overlaynet.model import IPAddress, Subnets

Queue: TypeAlias = tuple[int, Sequence[int]]
"""What one thread of an engine serves: the descriptors of a queue of the device, and of sockets."""


class Drop(enum.IntEnum):
    """Why a packet was not carried. The numbers are indices into an engine's array of counters."""

    MALFORMED = 0
    """Not one whole IP packet."""
    UNSUPPORTED = 1
    """An IP packet of a version that the engine does not carry; or a run of a kind that the device cannot hand out."""
    NO_ROUTE = 2
    """Out of the device, for an address that no peer has."""
    TOO_BIG = 3
    """Out of the device, larger than the device's MTU; or the kernel found the datagram too large for the underlay."""
    SEND_CONGESTED = 4
    """The kernel had no room for the datagram."""
    SEND_REFUSED = 5
    """The kernel was told not to send the datagram: a firewall rule."""
    SEND_UNREACHABLE = 6
    """The kernel has no way to the peer's address."""
    SEND_FAILED = 7
    """The datagram could not be sent for another reason."""
    UNKNOWN_PEER = 8
    """Off the wire, from an address that is no peer's."""
    SPOOFED_SOURCE = 9
    """Off the wire, from a peer, but with a source address that is not in its subnet."""
    FOREIGN_DESTINATION = 10
    """Off the wire, for an address that is not in this node's subnet."""
    RECEIVE_FAILED = 11
    """The socket reported an error instead of a datagram."""
    DEVICE_FAILED = 12
    """The device did not take the packet, as when it is down."""
    CONGESTION = 13
    """Off the wire, marked on its way as having met congestion, which its sender would not understand (RFC 6040)."""


@attrs.frozen
class EnginePeer:
    """A peer as engines see it: its subnets, and the UDP address and port that reach it."""

    subnets: Subnets
    address: IPAddress
    port: int


@attrs.frozen
class PeerTable:
    """All that an engine knows of the overlay: this node's own subnets, and the peers. Subnets identify a peer."""

    own: Subnets
    peers: tuple[EnginePeer, ...] = ()


@attrs.define
class PeerCounters:
    """Whole inner packets and their bytes, without what the tunnel adds."""

    sent_packets: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    received_bytes: int = 0

    def after(self, earlier: PeerCounters) -> PeerCounters:
        """The sum of both."""
        return PeerCounters(*(a + b for a, b in zip(attrs.astuple(self), attrs.astuple(earlier), strict=True)))


NOTHING = PeerCounters()


@attrs.frozen
class Counters:
    """What an engine has done since it was made."""

    peers: Mapping[Subnets, PeerCounters]
    """One entry for each peer in the table; a peer that stays through a change of the table keeps its counts."""
    drops: Mapping[Drop, int]
    """One entry for every reason."""
    unreachables_sent: int
    """ICMP errors written back into the device; part of the packets dropped as ``NO_ROUTE`` get none."""
    offloads: Mapping[str, str] = attrs.field(factory=dict)
    """What the engine makes use of to cross into the kernel less often: for each by name ``on``, ``off`` or ``failing``,
    with the reason (see :class:`.Offload`). Empty for an engine without any."""

    def after(self, earlier: Counters) -> Counters:
        """These counts on top of those of an engine that this one took over from; peers and offloads are this one's."""
        return Counters(
            peers={subnets: count.after(earlier.peers.get(subnets, NOTHING)) for subnets, count in self.peers.items()},
            drops={reason: count + earlier.drops[reason] for reason, count in self.drops.items()},
            unreachables_sent=self.unreachables_sent + earlier.unreachables_sent,
            offloads=self.offloads,
        )


class HeaderRefused(Exception):
    """The kernel has granted the header of ``IFF_VNET_HDR``, but its device takes no packet with it."""


class Engine(abc.ABC):
    """Carries packets between the device and the sockets it was made with.

    :param tun: a TUN device's descriptor, without packet information, non-blocking. It stays the caller's to close.
    :param sockets: descriptors of bound, non-blocking UDP sockets, at most one for each IP version of the underlay. They
        stay the caller's to close.
    :param mtu: bytes in the largest packet that is taken out of the device.
    :param table: the first peer table.
    """

    name: ClassVar[str]
    threads: int = 1
    """How many threads carry packets; the kernel may give fewer than were asked for, which is known once it runs."""

    @abc.abstractmethod
    def __init__(self, tun: int, sockets: Sequence[int], mtu: int, table: PeerTable) -> None: ...

    @abc.abstractmethod
    def run(self) -> None:
        """Carry packets until :meth:`stop`; for a thread of its own, and called once.

        What befalls one packet is counted, never raised.

        :raises DeviceGone: if the device was deleted.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Make :meth:`run` return within a fraction of a second, however busy it is.

        Idempotent; callable from any thread, before :meth:`run` (which then returns at once) and after :meth:`close`.
        """

    @abc.abstractmethod
    def set_table(self, table: PeerTable) -> None:
        """Replace the peer table in one step while packets flow: each packet meets the old one or the new one.

        Callable from any thread, one call at a time. Of two peers with a subnet in common, the first has it. A peer
        whose address is of an IP version that no socket serves counts as absent. Without effect after :meth:`close`.
        """

    @abc.abstractmethod
    def counters(self) -> Counters:
        """The counts now. Callable from any thread; cheap, and without a lock that the packet path would wait for."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free what the engine itself has opened. Idempotent; not while :meth:`run` runs."""
