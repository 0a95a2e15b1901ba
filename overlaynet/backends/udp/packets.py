"""IPv4 packets (RFC 791): strict reading, and the ICMP error for those that cannot be delivered (RFC 792, 1122, 1812)."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

from overlaynet.backends.udp.engine import Drop

MINIMUM_HEADER = 20
_FIELDS = struct.Struct("!BxH8xII").unpack_from
_HEADER = struct.Struct("!BBHHHBBH4s4s").pack

_ICMP = 1
_ICMP_QUERIES = frozenset((0, 8, 9, 10, 13, 14, 15, 16, 17, 18, 42, 43))
"""The ICMP types that ask or answer; any other reports an error, or may do so one day (RFC 1122 section 3.2.2)."""
_LARGEST_ERROR = 576
"""Bytes in the largest ICMP error (RFC 1812 section 4.3.2.3)."""
_INTERNETWORK_CONTROL = 0xC0
"""Type of service of ICMP errors (RFC 1812 section 4.3.2.5)."""
_MULTICAST = int(IPv4Address("224.0.0.0"))
_LOOPBACK_BYTE = 127


class Refused(Exception):
    """The bytes are not a packet that can be carried."""

    def __init__(self, reason: Drop) -> None:
        super().__init__(reason.name)
        self.reason = reason


def addresses(packet: bytes | bytearray | memoryview, size: int) -> tuple[int, int]:
    """The source and the destination of the IPv4 packet that the first ``size`` bytes of ``packet`` are, as integers.

    The header's checksum is left to the kernel, which verifies it when it is handed the packet.

    :raises Refused: unless the bytes are one whole IPv4 packet, no less and no more.
    """
    if size < MINIMUM_HEADER:
        raise Refused(Drop.MALFORMED)
    first, total, source, destination = _FIELDS(packet)
    if first != 0x45:
        if first >> 4 == 6:
            raise Refused(Drop.UNSUPPORTED)
        if first >> 4 != 4 or not MINIMUM_HEADER <= (first & 0xF) * 4 <= total:
            raise Refused(Drop.MALFORMED)
    if total != size:
        raise Refused(Drop.MALFORMED)
    return source, destination


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071); zero over data that carries a right one."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def unreachable(packet: bytes, source: IPv4Address) -> bytes | None:
    """The ICMP error "network unreachable" (type 3, code 0) that answers ``packet``, as a whole IPv4 packet.

    It quotes as much of the packet as fits into 576 bytes, as RFC 1812 asks of routers, so it is at most 28 bytes longer
    than what it answers. There is no answer (``None``) where RFC 1122 section 3.2.2 and RFC 1812 section 4.3.2.7 forbid
    one: to an ICMP error, to a fragment other than the first, to or from an address that is not one host's, or to a
    packet whose header is damaged.

    :param packet: a packet that :func:`addresses` accepts.
    :param source: the address that the error comes from.
    """
    header_length = (packet[0] & 0xF) * 4
    sender, destination = packet[12:16], packet[16:20]
    first_fragment = int.from_bytes(packet[6:8], "big") & 0x1FFF == 0
    if not first_fragment or not _is_host(sender) or int.from_bytes(destination, "big") >= _MULTICAST:
        return None
    if packet[9] == _ICMP and (len(packet) == header_length or packet[header_length] not in _ICMP_QUERIES):
        return None
    if checksum(packet[:header_length]) != 0:
        return None
    quote = packet[: _LARGEST_ERROR - MINIMUM_HEADER - 8]
    message = struct.pack("!BBHI", 3, 0, 0, 0) + quote
    message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
    total = MINIMUM_HEADER + len(message)
    fields = (0x45, _INTERNETWORK_CONTROL, total, 0, 0, 64, _ICMP)
    header_checksum = checksum(_HEADER(*fields, 0, source.packed, sender))
    return _HEADER(*fields, header_checksum, source.packed, sender) + message


def _is_host(address: bytes) -> bool:
    """True if the address can be a single host's: not 0/8, loopback, multicast, reserved or broadcast."""
    return address[0] not in (0, _LOOPBACK_BYTE) and int.from_bytes(address, "big") < _MULTICAST
