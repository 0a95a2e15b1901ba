"""Packets as they are seen on an interface, read strictly: enough to show and to compare their headers.

RFC 791 (IPv4), RFC 8200 (IPv6), RFC 768 (UDP), RFC 9293 (TCP), RFC 792 and RFC 4443 (ICMP). Transport checksums are
told, not verified: on a virtual interface the kernel leaves them to hardware that is not there.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

import attrs

OVERLAY_PORT = 8285
"""UDP port of the documented design; a datagram to it carries one whole inner packet."""

ETHERNET = 1
LOOPBACK = 772
"""Types of interface (ARPHRD_…) whose packets begin with an Ethernet header."""
NO_LINK_HEADER = 65534
"""Type of interface (ARPHRD_NONE) whose packets begin with the IP header, as those of TUN devices do."""

_IPV4, _IPV6 = 0x0800, 0x86DD
_ICMP, _TCP, _UDP, _ICMPV6 = 1, 6, 17, 58
_FRAGMENT = 44
_EXTENSIONS = (0, 43, 60)  # hop-by-hop options, routing, destination options


@attrs.frozen
class Ethernet:
    """An Ethernet header."""

    destination: str
    source: str
    protocol: int
    """What follows (the EtherType): 0x0800 is IPv4."""


@attrs.frozen
class IPv4:
    """An IPv4 header. Lengths are in bytes, ``fragment_offset`` too."""

    source: IPv4Address
    destination: IPv4Address
    protocol: int
    ttl: int
    identification: int
    dont_fragment: bool
    more_fragments: bool
    fragment_offset: int
    type_of_service: int
    header_length: int
    total_length: int
    checksum: int


@attrs.frozen
class IPv6:
    """An IPv6 header with its extension headers. Lengths are in bytes.

    ``protocol``, ``ttl`` and ``total_length`` are what IPv4 calls so: the last next header, the hop limit, and
    everything from the first byte of the header on.
    """

    source: IPv6Address
    destination: IPv6Address
    protocol: int
    ttl: int
    more_fragments: bool
    fragment_offset: int
    traffic_class: int
    flow_label: int
    header_length: int
    total_length: int


@attrs.frozen
class UDP:
    """A UDP header; ``length`` counts it too."""

    source_port: int
    destination_port: int
    length: int
    checksum: int


@attrs.frozen
class TCP:
    """A TCP header; ``flags`` are letters as tcpdump's relatives write them (``SA``: SYN and ACK)."""

    source_port: int
    destination_port: int
    sequence: int
    acknowledgement: int
    flags: str
    window: int
    header_length: int
    checksum: int


@attrs.frozen
class ICMP:
    """An ICMP or ICMPv6 header, whose last four bytes mean something else for each type."""

    type: int
    code: int
    checksum: int
    rest: int

    @property
    def identifier(self) -> int:
        """Of an echo request or reply: which ping sent it."""
        return self.rest >> 16

    @property
    def sequence(self) -> int:
        """Of an echo request or reply: its number."""
        return self.rest & 0xFFFF


Transport: TypeAlias = UDP | TCP | ICMP


@attrs.frozen
class IPPacket:
    """An IP packet: its header, its transport header if it has one that is known here, and what follows them."""

    header: IPv4 | IPv6
    transport: Transport | None
    """``None`` for other protocols, and in all fragments but the first."""
    payload: bytes
    data: bytes = attrs.field(repr=False)
    """The whole packet, headers included."""

    @property
    def inner(self) -> IPPacket | None:
        """The packet inside of a UDP datagram to :data:`OVERLAY_PORT`; ``None`` if this is no such datagram.

        :raises ValueError: if what the datagram carries is no IP packet.
        """
        if isinstance(self.transport, UDP) and self.transport.destination_port == OVERLAY_PORT:
            return parse_ip(self.payload)
        return None


def parse_frame(data: bytes, hardware: int) -> tuple[Ethernet | None, IPPacket | None]:
    """Read what an interface of a certain type carried.

    :param hardware: the interface's type: :data:`ETHERNET`, :data:`LOOPBACK` or :data:`NO_LINK_HEADER`.
    :return: the link header if there is one, and the IP packet if the frame carries one.
    :raises ValueError: if it is damaged, or the interface is of another type.
    """
    if hardware == NO_LINK_HEADER:
        return None, parse_ip(data)
    if hardware not in (ETHERNET, LOOPBACK):
        raise ValueError(f"the link headers of interfaces of type {hardware} are not known")
    _need(data, 14, "an Ethernet header")
    link = Ethernet(data[0:6].hex(":"), data[6:12].hex(":"), int.from_bytes(data[12:14]))
    return link, parse_ip(data[14:]) if link.protocol in (_IPV4, _IPV6) else None


def parse_ip(data: bytes) -> IPPacket:
    """Read an IP packet, of either version. What follows its last byte (Ethernet's padding) is left away.

    :raises ValueError: saying what is wrong with it.
    """
    _need(data, 1, "an IP header")
    version = data[0] >> 4
    if version not in (4, 6):
        raise ValueError(f"an IP packet of version {version}")
    header = _parse_ipv4(data) if version == 4 else _parse_ipv6(data)
    data = data[: header.total_length]
    transport, payload = None, data[header.header_length :]
    if header.fragment_offset == 0:
        transport, payload = _parse_transport(header.protocol, payload, fragment=header.more_fragments)
    return IPPacket(header, transport, payload, data)


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071) of some bytes; 0 if they contain their own and it is right."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total >> 16) + (total & 0xFFFF)
    return ~total & 0xFFFF


def _parse_ipv4(data: bytes) -> IPv4:
    _need(data, 20, "an IPv4 header")
    first, service, total, identification, fragment, ttl, protocol, check, source, destination = struct.unpack(
        "!BBHHHBBH4s4s", data[:20]
    )
    length = (first & 15) * 4
    if length < 20:
        raise ValueError(f"an IPv4 header of {length} bytes")
    if total < length:
        raise ValueError(f"an IPv4 packet of {total} bytes with a header of {length}")
    _need(data, total, "an IPv4 packet")
    if checksum(data[:length]) != 0:
        raise ValueError("an IPv4 header whose checksum is wrong")
    return IPv4(
        source=IPv4Address(source),
        destination=IPv4Address(destination),
        protocol=protocol,
        ttl=ttl,
        identification=identification,
        dont_fragment=bool(fragment & 0x4000),
        more_fragments=bool(fragment & 0x2000),
        fragment_offset=(fragment & 0x1FFF) * 8,
        type_of_service=service,
        header_length=length,
        total_length=total,
        checksum=check,
    )


def _parse_ipv6(data: bytes) -> IPv6:
    _need(data, 40, "an IPv6 header")
    first, payload, protocol, ttl, source, destination = struct.unpack("!IHBB16s16s", data[:40])
    total, length, offset, more = 40 + payload, 40, 0, False
    _need(data, total, "an IPv6 packet")
    while (protocol in _EXTENSIONS or protocol == _FRAGMENT) and offset == 0:
        _need(data[:total], length + 8, "an IPv6 extension header")
        following, size = data[length], 8
        if protocol == _FRAGMENT:
            field = int.from_bytes(data[length + 2 : length + 4])
            offset, more = field & 0xFFF8, bool(field & 1)
        else:
            size += data[length + 1] * 8
            _need(data[:total], length + size, "an IPv6 extension header")
        length, protocol = length + size, following
    return IPv6(
        source=IPv6Address(source),
        destination=IPv6Address(destination),
        protocol=protocol,
        ttl=ttl,
        more_fragments=more,
        fragment_offset=offset,
        traffic_class=first >> 20 & 0xFF,
        flow_label=first & 0xFFFFF,
        header_length=length,
        total_length=total,
    )


def _parse_transport(protocol: int, data: bytes, *, fragment: bool) -> tuple[Transport | None, bytes]:
    if protocol == _UDP:
        _need(data, 8, "a UDP header")
        udp = UDP(*struct.unpack("!HHHH", data[:8]))
        if udp.length < 8:
            raise ValueError(f"a UDP datagram of {udp.length} bytes")
        if not fragment:
            _need(data, udp.length, "a UDP datagram")
        return udp, data[8 : udp.length]
    if protocol == _TCP:
        _need(data, 20, "a TCP header")
        source, destination, sequence, acknowledgement, bits, window, check = struct.unpack("!HHIIHHH", data[:18])
        length = (bits >> 12) * 4
        if length < 20:
            raise ValueError(f"a TCP header of {length} bytes")
        _need(data, length, "a TCP header")
        flags = "".join(letter for place, letter in enumerate("FSRPAUEC") if bits >> place & 1)
        return TCP(source, destination, sequence, acknowledgement, flags, window, length, check), data[length:]
    if protocol in (_ICMP, _ICMPV6):
        _need(data, 8, "an ICMP header")
        return ICMP(*struct.unpack("!BBHI", data[:8])), data[8:]
    return None, data


def _need(data: bytes, length: int, what: str) -> None:
    if len(data) < length:
        raise ValueError(f"{what} that needs {length} bytes and has {len(data)}")
