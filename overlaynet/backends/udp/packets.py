"""IP packets (RFC 791, RFC 8200): congestion marks of tunnels (RFC 6040), and the ICMP errors for packets
that cannot be delivered (RFC 792, 1122, 1812 and 4443)."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from overlaynet.delivery import IPV4_HEADER as _IPV4_HEADER
from overlaynet.delivery import IPV6_HEADER as _IPV6_HEADER
from overlaynet.model import IPAddress

_HEADER = struct.Struct("!BBHHHBBH4s4s").pack
_HEADER6 = struct.Struct("!IHBB16s16s").pack
_PSEUDO_HEADER6 = struct.Struct("!16s16sII").pack

_ICMP, _ICMPV6 = 1, 58
_ICMP_QUERIES = frozenset((0, 8, 9, 10, 13, 14, 15, 16, 17, 18, 42, 43))
"""The ICMP types that ask or answer; any other reports an error, or may do so one day (RFC 1122 section 3.2.2)."""
_ICMPV6_FIRST_INFORMATION = 128
_ICMPV6_REDIRECT = 137
_FRAGMENT = 44
_AUTHENTICATION = 51
_EXTENSIONS = frozenset((0, 43, _FRAGMENT, _AUTHENTICATION, 60))
"""IPv6 extension headers that an ICMP error may hide behind: hop-by-hop options, routing, fragment, authentication (which
IPv4 has, too), destination options."""
_LARGEST_ERROR, _LARGEST_ERROR6 = 576, 1280
"""Bytes in the largest ICMP error (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4 (c))."""
_INTERNETWORK_CONTROL = 0xC0
"""Type of service of ICMP errors (RFC 1812 section 4.3.2.5)."""
_MULTICAST = int(IPv4Address("224.0.0.0"))
_LOOPBACK_BYTE = 127

NOT_CAPABLE, CAPABLE_1, CAPABLE_0, CONGESTION = range(4)
"""The values of the two ECN bits (RFC 3168): the sender does not understand marks, does so (two ways), or met congestion."""


def congestion_mark(packet: bytes) -> int:
    """The two ECN bits of a packet's header."""
    return packet[1] & 3 if packet[0] >> 4 == 4 else packet[1] >> 4 & 3


def decapsulate(packet: bytes, outer: int) -> bytes | None:
    """The packet as it leaves a tunnel whose outer header carried the ECN bits ``outer`` (RFC 6040 section 4.2).

    ``None`` if it is to be dropped: it met congestion, and its sender does not understand being told so.
    """
    inner = congestion_mark(packet)
    if outer == CONGESTION:
        if inner == NOT_CAPABLE:
            return None
        marked = CONGESTION
    elif outer == CAPABLE_1 and inner == CAPABLE_0:
        marked = CAPABLE_1
    else:
        marked = inner
    if marked == inner:
        return packet
    if packet[0] >> 4 == 6:
        return packet[:1] + bytes([packet[1] & 0xCF | marked << 4]) + packet[2:]
    service = packet[1] & 0xFC | marked
    # Update the header's checksum instead of making a new one (RFC 1624), so that a damaged header stays damaged.
    before, after = packet[0] << 8 | packet[1], packet[0] << 8 | service
    total = (~int.from_bytes(packet[10:12], "big") & 0xFFFF) + (~before & 0xFFFF) + after
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return packet[:1] + bytes([service]) + packet[2:10] + (~total & 0xFFFF).to_bytes(2, "big") + packet[12:]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071); zero over data that carries a right one."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def unreachable(packet: bytes, source: IPAddress) -> bytes | None:
    """The ICMP error that answers ``packet``, as a whole packet from ``source``, an address of the same IP version.

    It is "network unreachable" (ICMP type 3, code 0), or "no route to destination" (ICMPv6 type 1, code 0). It quotes as
    much of the packet as fits into 576 bytes, as RFC 1812 asks of routers, or into 1280, as RFC 4443 does. There is no
    answer (``None``) where RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7 and RFC 4443 section 2.4 (e) forbid one: to
    an ICMP error or redirect, to a fragment other than the first, to or from an address that is not one host's, or to a
    packet whose header is damaged.

    :param packet: a packet that :func:`overlaynet.delivery.addresses` accepts.
    """
    return _unreachable4(packet, source) if isinstance(source, IPv4Address) else _unreachable6(packet, source)


def _unreachable4(packet: bytes, source: IPv4Address) -> bytes | None:
    header_length = (packet[0] & 0xF) * 4
    sender, destination = packet[12:16], packet[16:20]
    first_fragment = int.from_bytes(packet[6:8], "big") & 0x1FFF == 0
    if not first_fragment or not _is_host4(sender) or int.from_bytes(destination, "big") >= _MULTICAST:
        return None
    following, at = packet[9], header_length
    while following == _AUTHENTICATION:
        if at + 8 > len(packet):
            return None
        following, at = packet[at], at + (packet[at + 1] + 2) * 4
    if following == _ICMP and (at >= len(packet) or packet[at] not in _ICMP_QUERIES):
        return None
    if checksum(packet[:header_length]) != 0:
        return None
    quote = packet[: _LARGEST_ERROR - _IPV4_HEADER - 8]
    message = struct.pack("!BBHI", 3, 0, 0, 0) + quote
    message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
    total = _IPV4_HEADER + len(message)
    fields = (0x45, _INTERNETWORK_CONTROL, total, 0, 0, 64, _ICMP)
    header_checksum = checksum(_HEADER(*fields, 0, source.packed, sender))
    return _HEADER(*fields, header_checksum, source.packed, sender) + message


def _unreachable6(packet: bytes, source: IPv6Address) -> bytes | None:
    sender, destination = packet[8:24], packet[24:40]
    if not _is_host6(sender) or destination[0] == 0xFF:
        return None
    following, at = packet[6], _IPV6_HEADER
    while following in _EXTENSIONS:
        if at + 8 > len(packet):
            return None
        if following == _FRAGMENT and int.from_bytes(packet[at + 2 : at + 4], "big") & 0xFFF8:
            return None
        if following == _FRAGMENT:
            length = 8
        elif following == _AUTHENTICATION:
            length = (packet[at + 1] + 2) * 4
        else:
            length = (packet[at + 1] + 1) * 8
        following, at = packet[at], at + length
    if following == _ICMPV6 and (
        at >= len(packet) or packet[at] < _ICMPV6_FIRST_INFORMATION or packet[at] == _ICMPV6_REDIRECT
    ):
        return None
    quote = packet[: _LARGEST_ERROR6 - _IPV6_HEADER - 8]
    message = struct.pack("!BBHI", 1, 0, 0, 0) + quote
    pseudo_header = _PSEUDO_HEADER6(source.packed, sender, len(message), _ICMPV6)
    message = message[:2] + checksum(pseudo_header + message).to_bytes(2, "big") + message[4:]
    return _HEADER6(6 << 28, len(message), _ICMPV6, 64, source.packed, sender) + message


def _is_host4(address: bytes) -> bool:
    """True if the address can be a single host's: not 0/8, loopback, multicast, reserved or broadcast."""
    return address[0] not in (0, _LOOPBACK_BYTE) and int.from_bytes(address, "big") < _MULTICAST


def _is_host6(address: bytes) -> bool:
    """The same for IPv6: not unspecified, loopback or multicast."""
    return address[0] != 0xFF and int.from_bytes(address, "big") > 1
