"""Around a packet: which outer header reaches a peer, and how much room the outer headers leave.

The IP versions of the overlay and of the underlay have nothing to do with each other: either carries both.
"""

from __future__ import annotations

from collections.abc import Collection

from overlaynet.errors import BackendError
from overlaynet.model import IPAddress, Peer, Underlay
from overlaynet.network import Network

OVERHEAD = {4: 28, 6: 48}
"""Bytes that the tunnel adds to each packet, by IP version of the underlay: an IP header without options, a UDP header."""
LARGEST_PAYLOAD = 65507
"""Bytes in the payload of the largest UDP datagram over IPv4; a little less than over IPv6."""

_SMALLEST_MTU = {4: 68, 6: 1280}
"""The least that IP asks of a link (RFC 791, RFC 8200), by IP version of the overlay."""


def peer_address(peer: Peer, versions: Collection[int]) -> IPAddress | None:
    """Where a peer is reached: at its IPv4 address if this node has one, too; else at its IPv6 address, likewise.

    Both ends come to the same version, as each publishes the addresses that it has. IPv4 comes first because it leaves
    more room, and because a peer that runs flannel has no other.

    :param versions: the IP versions of this node's sockets.
    :return: ``None`` if the peer and this node have no version in common.
    """
    for address in (peer.public_ipv4, peer.public_ipv6):
        if address is not None and address.version in versions:
            return address
    return None


def largest_mtu(network: Network, underlay: Underlay) -> int:
    """Bytes in the largest packet that fits into each outer header that may be needed.

    :raises BackendError: if that is less than the overlay's IP versions need.
    """
    overhead = _overhead(underlay)
    most = min(underlay.mtu - overhead, LARGEST_PAYLOAD)
    least = _least(network)
    carried = " that carries IPv6" if least == _SMALLEST_MTU[6] else ""
    if most < least:
        raise BackendError(
            f"the interface {underlay.interface} has an MTU of {underlay.mtu}, too small for a tunnel{carried}; raise it "
            f"to {least + overhead} or more, or choose another interface with --iface"
        )
    return most


def fitting_mtu(wanted: int | None, network: Network, underlay: Underlay) -> int:
    """Bytes in the largest packet that the device takes: what the network document asks for, or :func:`largest_mtu`.

    :param wanted: what the network document asks for, if anything.
    :raises BackendError: if that, or what the overlay's IP versions need, does not fit.
    """
    most, least = largest_mtu(network, underlay), _least(network)
    if wanted is not None and wanted < least:
        raise BackendError(
            f"the network document's Backend asks for MTU {wanted}, but IPv6 needs {least} or more (RFC 8200); "
            f"raise it, or set EnableIPv6 to false"
        )
    if wanted is not None and wanted > most:
        raise BackendError(
            f"the network document's Backend asks for MTU {wanted}, but at most {most} fits into the MTU "
            f"{underlay.mtu} of {underlay.interface} ({_overhead(underlay)} bytes are for the tunnel's headers); lower "
            f"the one or raise the other"
        )
    return most if wanted is None else wanted


def _overhead(underlay: Underlay) -> int:
    return OVERHEAD[6 if underlay.ipv6 is not None else 4]


def _least(network: Network) -> int:
    return max(_SMALLEST_MTU[overlay.version] for overlay in network)
