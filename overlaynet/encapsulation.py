"""Around a packet: at which address a peer is reached, and how much room the headers leave that a tunnel adds.

For backends whose outer headers can be of either IP version: the versions of the overlay and of the underlay have nothing
to do with each other then, and either carries both.
"""

from __future__ import annotations

from collections.abc import Collection

from overlaynet.errors import BackendError
from overlaynet.model import IPAddress, Peer, Underlay
from overlaynet.network import Network

LARGEST_PACKET = 65535
"""Bytes in the largest IP packet; there are interfaces that would take larger ones."""
SMALLEST_MTU = {4: 68, 6: 1280}
"""The least that IP asks of a link, in bytes (RFC 791, RFC 8200), by IP version."""


def peer_address(peer: Peer, versions: Collection[int]) -> IPAddress | None:
    """Where a peer is reached: at its IPv4 address if this node has one, too; else at its IPv6 address, likewise.

    Both ends come to the same version, as each publishes the addresses that it has. IPv4 comes first because it leaves
    more room, and because a peer that runs flannel has no other.

    :param versions: the IP versions that this node can send to.
    :return: ``None`` if the peer and this node have no version in common.
    """
    for address in (peer.public_ipv4, peer.public_ipv6):
        if address is not None and address.version in versions:
            return address
    return None


def largest_mtu(network: Network, underlay: Underlay, overhead: int = 0) -> int:
    """Bytes in the largest packet of the overlay that fits into one of the underlay's.

    :param overhead: bytes that the backend adds to each packet.
    :raises BackendError: if that is less than the overlay's IP versions need.
    """
    most = min(underlay.mtu, LARGEST_PACKET) - overhead
    least = _least(network)
    carried = " that carries IPv6" if least == SMALLEST_MTU[6] else ""
    if most < least:
        raise BackendError(
            f"the interface {underlay.interface} has an MTU of {underlay.mtu}, too small for an overlay{carried}; raise it "
            f"to {least + overhead} or more, or choose another interface with --iface"
        )
    return most


def fitting_mtu(network: Network, underlay: Underlay, overhead: int = 0, wanted: int | None = None) -> int:
    """Bytes in the largest packet that containers can send: what the network document asks for, or :func:`largest_mtu`.

    :param overhead: bytes that the backend adds to each packet.
    :param wanted: what the network document asks for, if anything.
    :raises BackendError: if that, or what the overlay's IP versions need, does not fit.
    """
    most, least = largest_mtu(network, underlay, overhead), _least(network)
    if wanted is not None and wanted < least:
        raise BackendError(
            f"the network document's Backend asks for MTU {wanted}, but IPv6 needs {least} or more (RFC 8200); "
            f"raise it, or set EnableIPv6 to false"
        )
    if wanted is not None and wanted > most:
        headers = f" ({overhead} bytes are for the tunnel's headers)" if overhead else ""
        raise BackendError(
            f"the network document's Backend asks for MTU {wanted}, but at most {most} fits into the MTU "
            f"{underlay.mtu} of {underlay.interface}{headers}; lower the one or raise the other"
        )
    return most if wanted is None else wanted


def _least(network: Network) -> int:
    return max((SMALLEST_MTU[overlay.version] for overlay in network), default=SMALLEST_MTU[4])
