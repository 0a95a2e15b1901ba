"""Whose packet is it? Which peer a packet goes to, and which packets may come from one: the law of what comes off the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import TypeAlias, TypeVar

from overlaynet.model import IPAddress, IPNetwork, Peer, Subnets

T = TypeVar("T")

IPV4_HEADER, IPV6_HEADER = 20, 40
"""Bytes in an IP header without options (RFC 791, RFC 8200)."""

Prefixes: TypeAlias = Mapping[int, tuple[tuple[int, Mapping[int, T]], ...]]
"""For each size of address (4 or 16 bytes) and prefix length, longest first: how far to shift an address to the right, and
who has the prefix that is left."""


def prefixes_of(subnets: Iterable[tuple[IPNetwork, T]]) -> Prefixes[T]:
    """Tables for :func:`longest_match`. Of two entries for the same subnet the first counts."""
    found: dict[int, dict[int, dict[int, T]]] = {}
    for subnet, holder in subnets:
        shift = subnet.max_prefixlen - subnet.prefixlen
        lengths = found.setdefault(subnet.max_prefixlen // 8, {})
        lengths.setdefault(shift, {}).setdefault(int(subnet.network_address) >> shift, holder)
    return {size: tuple(sorted(lengths.items())) for size, lengths in found.items()}


def longest_match(prefixes: Prefixes[T], address: bytes) -> T | None:
    """Who has the longest prefix of ``address``; ``None`` if nobody has one."""
    number = int.from_bytes(address, "big")
    for shift, holders in prefixes.get(len(address), ()):
        holder = holders.get(number >> shift)
        if holder is not None:
            return holder
    return None


def addresses(packet: bytes) -> bytes:
    """The source and the destination, one behind the other: 8 bytes of an IPv4 packet, 32 of an IPv6 packet.

    Empty unless the bytes are one whole IP packet, no less and no more. The header's checksum is left to the kernel, which
    verifies it when it is handed the packet.
    """
    size = len(packet)
    if size >= IPV4_HEADER:
        first = packet[0]
        if first == 0x45 or (first >> 4 == 4 and IPV4_HEADER <= (first & 0xF) * 4 <= size):
            if packet[2] << 8 | packet[3] == size:
                return packet[12:20]
        elif first >> 4 == 6 and size >= IPV6_HEADER and (packet[4] << 8 | packet[5]) + IPV6_HEADER == size:
            return packet[8:40]
    return b""


class Dropped(Exception):
    """A packet is not carried; ``reason`` is what the status of a backend counts it under, such as ``no_route``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        """What it is counted under."""
        self.detail = detail
        """What is wrong with this packet, in words."""


class Delivery:
    """Where packets go, and what may come in, by the subnets of this node and its peers. Immutable; cheap for each packet.

    For backends that carry packets themselves. What comes off the wire is untrusted: it is delivered only if it comes from
    a known peer, its source lies in that peer's subnet, and its destination in this node's.
    """

    def __init__(self, own: Subnets, peers: Iterable[Peer]) -> None:
        peers = tuple(peers)
        self._own = prefixes_of((subnet, True) for subnet in own)
        self._peers = prefixes_of((subnet, peer) for peer in peers for subnet in peer.subnets)
        self.hosts = frozenset(
            host for peer in peers for host in (peer.public_ipv4, peer.public_ipv6) if host is not None
        )
        """The addresses that peers are reached at."""

    def receiver(self, packet: bytes) -> Peer:
        """The peer that a packet goes to. :raises Dropped: ``malformed``, or ``no_route`` if it is nobody's."""
        _, destination = self._read(packet)
        return self.peer_with(destination)

    def sender(self, packet: bytes, host: IPAddress) -> Peer:
        """The peer that a packet comes from, which may be delivered, as it came from ``host``.

        :raises Dropped: if it must not be: ``malformed``, ``unknown_peer``, ``spoofed_source``, ``foreign_destination``.
        """
        return self.check(host, *self._read(packet))

    def peer_with(self, address: bytes) -> Peer:
        """The peer in whose subnet a packed address lies. :raises Dropped: ``no_route``, if it is nobody's."""
        peer = longest_match(self._peers, address)
        if peer is None:
            raise Dropped("no_route", f"no peer has {ip_address(address)}")
        return peer

    def check(self, host: IPAddress, source: bytes, destination: bytes) -> Peer:
        """Like :meth:`sender`, for packed addresses."""
        if host not in self.hosts:
            raise Dropped("unknown_peer", f"no peer is at {host}")
        peer = longest_match(self._peers, source)
        if peer is None or host not in (peer.public_ipv4, peer.public_ipv6):
            raise Dropped("spoofed_source", f"{ip_address(source)} is not in the subnet of the peer at {host}")
        if longest_match(self._own, destination) is None:
            raise Dropped("foreign_destination", f"{ip_address(destination)} is not in this node's subnet")
        return peer

    def _read(self, packet: bytes) -> tuple[bytes, bytes]:
        pair = addresses(packet)
        if not pair:
            raise Dropped("malformed", "it is not one whole IP packet")
        return pair[: len(pair) // 2], pair[len(pair) // 2 :]
