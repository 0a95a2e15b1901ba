"""The walk of one ping packet from container to container: what was captured at every hop, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address

import attrs

from overlaynet.testing.capture import Packet
from overlaynet.testing.lab import ENCAPSULATION
from overlaynet.testing.packets import ICMP, OVERLAY_PORT, UDP, IPPacket

DEVICE = "overlay0"
ECHO_REQUEST, ECHO_REPLY = 8, 0


@attrs.frozen
class Station:
    """An interface that the packet passes; on an encapsulating one, it is inside of a datagram."""

    place: str
    interface: str
    note: str = ""
    """What happens there to a packet on its way there; the way back is the other way round."""
    encapsulated: bool = False

    def __str__(self) -> str:
        return f"{self.place} {self.interface}"

    @property
    def in_tunnel(self) -> bool:
        """Whether it lies between the overlay's devices, or is one of them."""
        return self.encapsulated or self.interface == DEVICE


@attrs.frozen
class Hop:
    """The packet at one station."""

    station: Station
    packet: Packet
    carried: IPPacket
    """The packet of the container."""

    @property
    def outer(self) -> IPPacket | None:
        """The datagram that carries it; ``None`` where it travels by itself."""
        return self.packet.ip if self.station.encapsulated else None


@attrs.frozen
class Walk:
    """The way of one packet, and what is wrong with it."""

    hops: tuple[Hop, ...]
    problems: tuple[str, ...]


def carried(packet: Packet, *, encapsulated: bool) -> IPPacket | None:
    """The container's packet in what was captured; ``None`` if there is none."""
    if packet.ip is None or not encapsulated:
        return packet.ip
    try:
        return packet.ip.inner
    except ValueError:
        return None


def is_echo(packet: IPPacket | None, kind: int, identifier: int | None = None, sequence: int | None = None) -> bool:
    """Whether that is an ICMP echo request or reply, and the one that was asked for."""
    if packet is None or not isinstance(packet.transport, ICMP) or packet.header.protocol != 1:
        return False
    icmp = packet.transport
    return (
        (icmp.type, icmp.code) == (kind, 0)
        and (identifier is None or icmp.identifier == identifier)
        and (sequence is None or icmp.sequence == sequence)
    )


def follow(
    packets: Sequence[Packet],
    stations: Sequence[Station],
    wanted: Callable[[IPPacket | None], bool],
    name: str,
    *,
    inner: tuple[IPv4Address, IPv4Address],
    outer: tuple[IPv4Address, IPv4Address],
) -> Walk:
    """Find one packet at all stations of its way, and compare its headers with the documented design.

    :param wanted: tells the packet from others.
    :param name: what to call it in the problems.
    :param inner: its source and destination; on its way nothing may change but its TTL.
    :param outer: source and destination of the datagram that carries it.
    """
    hops, problems, missing = [], [], []
    for station in stations:
        seen = [
            Hop(station, packet, content)
            for packet in packets
            if packet.tap == str(station)
            and (content := carried(packet, encapsulated=station.encapsulated)) is not None
            and wanted(content)
        ]
        hops += seen[:1]
        if len(seen) > 1:
            problems.append(f"the {name} was seen {len(seen)} times on {station}")
        elif not seen:
            missing.append(station)
    problems += _lost(name, stations, missing)
    for hop in hops:
        problems += [f"the {name} on {hop.station} {problem}" for problem in _wrong(hop, hops, inner, outer)]
    return Walk(tuple(hops), tuple(problems))


def _lost(name: str, stations: Sequence[Station], missing: Sequence[Station]) -> Iterator[str]:
    """Where it was not seen; in one sentence if it was not seen from there on."""
    reached = len(stations)
    while reached and stations[reached - 1] in missing:
        reached -= 1
    for station in stations[:reached]:
        if station in missing:
            yield f"the {name} was not seen on {station}"
    if reached == 0:
        yield f"the {name} was not seen at all"
    elif reached < len(stations):
        yield f"the {name} reached {stations[reached - 1]}, but not {stations[reached]}"


def _wrong(
    hop: Hop, hops: Sequence[Hop], inner: tuple[IPv4Address, IPv4Address], outer: tuple[IPv4Address, IPv4Address]
) -> Iterator[str]:
    header = hop.carried.header
    if (header.source, header.destination) != inner:
        yield f"goes from {header.source} to {header.destination}, not from {inner[0]} to {inner[1]}"
    if _constant(hop.carried) != _constant(hops[0].carried):
        yield f"is not the packet that was seen on {hops[0].station}"
    earlier = hops[: hops.index(hop)]
    if earlier and header.ttl > earlier[-1].carried.header.ttl:
        yield f"has a TTL of {header.ttl}, more than before ({earlier[-1].carried.header.ttl})"
    if hop.outer is not None:
        yield from _wrong_outside(hop.outer, hop.carried, outer)
    # From one overlay device to the other nothing at all may change.
    if hop.station.in_tunnel and any(
        other.station.in_tunnel and other.carried.data != hop.carried.data for other in earlier[-1:]
    ):
        yield "has other bytes than before"


def _wrong_outside(datagram: IPPacket, content: IPPacket, addresses: tuple[IPv4Address, IPv4Address]) -> Iterator[str]:
    header, udp = datagram.header, datagram.transport
    if (header.source, header.destination) != addresses:
        yield f"is sent from {header.source} to {header.destination}, not from {addresses[0]} to {addresses[1]}"
    ports = (udp.source_port, udp.destination_port) if isinstance(udp, UDP) else None
    if ports != (OVERLAY_PORT, OVERLAY_PORT):
        yield f"has the ports {ports}, not {(OVERLAY_PORT, OVERLAY_PORT)}"
    more = header.total_length - content.header.total_length
    if more != ENCAPSULATION:
        yield f"is {more} bytes longer, not {ENCAPSULATION}"


def _constant(packet: IPPacket) -> bytes:
    """A packet without what routers change: the TTL and the header's checksum."""
    return packet.data[:8] + packet.data[9:10] + packet.data[12:]
