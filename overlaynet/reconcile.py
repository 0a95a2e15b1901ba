"""The desired state, worked out from the leases: pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from overlaynet.model import Lease, Malformed, Peer, Route, Snapshot
from overlaynet.network import Network
from overlaynet.records import lease_key


@attrs.frozen
class Desired:
    """Which peers this node should have, and which leases cannot be peers, and why."""

    peers: tuple[Peer, ...] = ()
    rejected: tuple[Malformed, ...] = ()


@attrs.frozen
class Difference:
    """What changes between two peer tables."""

    added: tuple[Peer, ...]
    changed: tuple[tuple[Peer, Peer], ...]
    removed: tuple[Peer, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


def desired_peers(network: Network, own: Lease, snapshot: Snapshot, backend_type: str) -> Desired:
    """The peers of a node that holds ``own``: every other node's lease, but for those that cannot be right.

    The store is not to be trusted blindly: a record that claims addresses outside the overlay, this node's own, or an
    address that no host can have, would turn traffic astray, so it is rejected with a reason.
    """
    peers, rejected = [], list(snapshot.malformed)
    for lease in snapshot.leases:
        if lease.subnets == own.subnets or (lease.node and lease.node == own.node):
            continue
        reason = _unfit(network, own, lease, backend_type)
        if reason is None:
            peers.append(Peer(lease.subnets, lease.public_ipv4, lease.public_ipv6, lease.node, lease.data))
        else:
            rejected.append(Malformed(lease_key(lease.subnets), reason))
    return Desired(tuple(peers), tuple(rejected))


def _unfit(network: Network, own: Lease, lease: Lease, backend_type: str) -> str | None:
    """Why a lease cannot be a peer's; ``None`` if it can."""
    if not network.contains(lease.subnets):
        return f"it claims {lease.subnets}, outside the network {network}"
    if lease.subnets.overlaps(own.subnets):
        return f"it claims {lease.subnets}, which overlaps this node's own {own.subnets}"
    if lease.data.backend_type not in ("", backend_type):
        return f"its node runs the backend {lease.data.backend_type!r}, this one {backend_type!r}"
    addresses = [address for address in (lease.public_ipv4, lease.public_ipv6) if address is not None]
    if not addresses:
        return "it has no public address"
    for address in addresses:
        if address in (own.public_ipv4, own.public_ipv6):
            return f"its public address {address} is this node's own"
        of_one_link = address.version == 6 and address.is_link_local
        if of_one_link or address.is_multicast or address.is_loopback or address.is_unspecified or address.is_reserved:
            return f"its public address {address} is not one that a host can be reached at"
        if any(address in overlay for overlay in network if overlay.version == address.version):
            return f"its public address {address} lies inside the overlay itself"
    return None


def difference(before: Sequence[Peer], after: Sequence[Peer]) -> Difference:
    """What has to change to get from one peer table to another; peers are the same if their subnets are."""
    old = {peer.subnets: peer for peer in before}
    new = {peer.subnets: peer for peer in after}
    return Difference(
        added=tuple(peer for subnets, peer in new.items() if subnets not in old),
        changed=tuple((old[s], peer) for s, peer in new.items() if s in old and old[s] != peer),
        removed=tuple(peer for subnets, peer in old.items() if subnets not in new),
    )


def backstops(network: Network) -> Iterator[Route]:
    """The routes that answer for the overlay when nothing else does.

    Without them, packets for the overlay would follow the default route while the daemon is down.
    """
    for overlay in network:
        yield Route(overlay, kind="unreachable")
