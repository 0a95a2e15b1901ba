"""The desired state, worked out from the leases: pure functions, no I/O."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network

import attrs

from overlaynet.model import IPAddress, Lease, Malformed, Peer, Route, Snapshot
from overlaynet.network import Network
from overlaynet.records import lease_key

_THIS_NETWORK = IPv4Network("0.0.0.0/8")
"""RFC 1122, section 3.2.1.3: never a destination."""


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


def desired_peers(
    network: Network, own: Lease, snapshot: Snapshot, backend_type: str, local: Collection[IPAddress] = ()
) -> Desired:
    """The peers of a node that holds ``own``: every other node's lease, but for those that cannot be right.

    The store is not to be trusted blindly: a record that claims addresses outside the overlay, this node's own or
    another peer's, or an address that no host can have, would turn traffic astray, so it is rejected with a reason.
    Of leases that overlap, the one is a peer that the network document would grant; if it grants both or none, the
    first in the order of keys: so all nodes choose alike.

    Another lease of this very node is neither peer nor trouble: it is removed by the watch, or when the node next acquires
    a lease.

    :param local: the addresses of this node beside those in its lease.
    """
    local = {*local, *(address for address in (own.public_ipv4, own.public_ipv6) if address is not None)}
    fit, rejected = [], list(snapshot.malformed)
    for lease in snapshot.leases:
        if lease.subnets == own.subnets or (lease.node and lease.node == own.node):
            continue
        reason = _unfit(network, own, lease, backend_type, local)
        if reason is None:
            fit.append(lease)
        else:
            rejected.append(Malformed(lease_key(lease.subnets), reason))
    claimed = _Claimed()
    chosen = set()
    for index in sorted(range(len(fit)), key=lambda index: not network.grants(fit[index].subnets)):
        other = claimed.add(fit[index])
        if other is None:
            chosen.add(index)
        else:
            subnets = fit[index].subnets
            reason = f"it claims {subnets}, which overlaps {other.subnets} of another lease"
            rejected.append(Malformed(lease_key(subnets), reason))
    peers = [
        Peer(lease.subnets, lease.public_ipv4, lease.public_ipv6, lease.node, lease.data)
        for index, lease in enumerate(fit)
        if index in chosen
    ]
    return Desired(tuple(peers), tuple(rejected))


class _Claimed:
    """Leases that do not overlap; finds those that would in time that grows with the logarithm of their number."""

    def __init__(self) -> None:
        self._ends: dict[int, list[int]] = {4: [], 6: []}
        self._leases: dict[int, list[tuple[int, Lease]]] = {4: [], 6: []}

    def add(self, lease: Lease) -> Lease | None:
        """Add a lease, unless it overlaps one that is there already: then return that."""
        places = []
        for subnet in lease.subnets:
            ends, leases = self._ends[subnet.version], self._leases[subnet.version]
            place = bisect.bisect_left(ends, int(subnet.network_address))
            if place < len(leases) and leases[place][0] <= int(subnet.broadcast_address):
                return leases[place][1]
            places.append(place)
        for subnet, place in zip(lease.subnets, places, strict=True):
            self._ends[subnet.version].insert(place, int(subnet.broadcast_address))
            self._leases[subnet.version].insert(place, (int(subnet.network_address), lease))
        return None


def _unfit(network: Network, own: Lease, lease: Lease, backend_type: str, local: Collection[IPAddress]) -> str | None:
    """Why a lease cannot be a peer's; ``None`` if it can."""
    if not network.contains(lease.subnets):
        return f"it claims {lease.subnets}, outside the network {network}"
    if lease.subnets.overlaps(own.subnets):
        return f"it claims {lease.subnets}, which overlaps this node's own {own.subnets}"
    for subnet in lease.subnets:
        overlay = next(overlay for overlay in network if overlay.version == subnet.version)
        if subnet.prefixlen < overlay.prefixlen + 2:  # the largest subnet that a network document can ask for
            return f"it claims {subnet}, too much of the network {overlay} for one node"
    if lease.data.backend_type not in ("", backend_type):
        return f"its node runs the backend {lease.data.backend_type!r}, this one {backend_type!r}"
    addresses = [address for address in (lease.public_ipv4, lease.public_ipv6) if address is not None]
    if not addresses:
        return "it has no public address"
    for address in addresses:
        if address in local:
            return f"its public address {address} is this node's own"
        if not _reachable(address):
            return f"its public address {address} is not one that a host can be reached at"
        if any(address in overlay for overlay in network if overlay.version == address.version):
            return f"its public address {address} lies inside the overlay itself"
    return None


def _reachable(address: IPAddress) -> bool:
    """True if it could be the address of one host, seen from another."""
    if address.is_multicast or address.is_loopback or address.is_unspecified or address.is_reserved:
        return False
    if isinstance(address, IPv4Address):
        return address not in _THIS_NETWORK
    return not address.is_link_local


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
