"""Which subnets a node is to have: pure functions of the network document, and of what was listed in the store."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import TypeVar

from overlaynet import records
from overlaynet.errors import SubnetsExhausted
from overlaynet.listings import overlapped
from overlaynet.model import Lease, LeaseRequest, Reserved, Subnets
from overlaynet.network import Network, SubnetRange
from overlaynet.table import Record

N = TypeVar("N", IPv4Network, IPv6Network)


def own_records(held: Mapping[str, Record], request: LeaseRequest) -> list[tuple[Record, Subnets]]:
    """The records that are this node's by its identity; failing that, those that flannel wrote for its address.

    flannel knows a node by its address only, and so are its leases taken over. But where another node has the same
    address, behind a NAT or on hosts made alike, a lease without a name is this node's only if the node held it before.
    """
    by_node, by_address = [], []
    shared = False
    for key, record in sorted(held.items()):
        lease = records.readable_lease(key, record.value)
        if lease is None or records.is_placeholder(lease):
            continue  # what cannot be read, the watch reports; its subnet counts as taken all the same
        if lease.node and lease.node == request.node:
            by_node.append((record, lease.subnets))
        elif _same_address(lease, request):
            if lease.node:
                shared = True
            else:
                by_address.append((record, lease.subnets))
    if shared:
        by_address = [(record, subnets) for record, subnets in by_address if subnets == request.previous]
    return sorted(by_node or by_address, key=lambda found: found[1] != request.previous)


def _same_address(lease: Lease, request: LeaseRequest) -> bool:
    if request.public_ipv4 is not None:
        return lease.public_ipv4 == request.public_ipv4
    return lease.public_ipv4 is None and request.public_ipv6 is not None and lease.public_ipv6 == request.public_ipv6


def reserved_for(
    network: Network,
    request: LeaseRequest,
    reserved: Reserved,
    held: Mapping[str, Record],
    own: Iterable[tuple[Record, Subnets]],
) -> Subnets | None:
    """Subnets that are reserved for this node and that it can have; those that it holds come first."""
    own_keys = {record.key for record, _ in own}

    def free(subnets: Subnets) -> bool:
        key = records.lease_key(subnets)
        lease = records.readable_lease(key, held[key].value) if key in held else None
        vacant = key not in held or key in own_keys or (lease is not None and records.is_placeholder(lease))
        return vacant and network.grants(subnets) and not overlapped(subnets, held, but=key)

    candidates = [subnets for subnets in reserved.kept_for(request) if free(subnets)]
    return min(candidates, key=lambda subnets: records.lease_key(subnets) not in own_keys, default=None)


def choose_free(network: Network, taken: list[Subnets]) -> Subnets:
    """Free subnets, picked at random among all that are free. :raises SubnetsExhausted: if none is."""
    return Subnets(
        ipv4=_choose_one(network.ipv4, [t.ipv4 for t in taken if t.ipv4 is not None]),
        ipv6=_choose_one(network.ipv6, [t.ipv6 for t in taken if t.ipv6 is not None]),
    )


def _choose_one(family: SubnetRange[N] | None, taken: list[N]) -> N | None:
    """One of the free subnets, each equally likely: spread out, so that nodes that start together seldom collide, and
    so that a subnet just given back is not the next to be given out."""
    if family is None:
        return None
    runs = list(free_runs(family, taken))
    free = sum(end - start for start, end in runs)
    if free == 0:
        raise SubnetsExhausted(
            f"all {family.size} subnets of {family.network} are leased; widen SubnetMin to SubnetMax or Network "
            f"in the network document, or release leases of nodes that are gone"
        )
    pick = random.randrange(free)
    for start, end in runs:
        if pick < end - start:
            return family[start + pick]
        pick -= end - start
    raise AssertionError("unreachable: pick is below the number of free subnets")


def free_runs(family: SubnetRange[N], taken: list[N]) -> Iterator[tuple[int, int]]:
    """The runs of free subnets, as half-open intervals of indices; cost grows with the leases, not with the network."""
    shift = family.network.max_prefixlen - family.prefix_length
    base = int(family.first.network_address)
    position = 0
    for subnet in sorted(taken, key=lambda subnet: int(subnet.network_address)):
        start = (int(subnet.network_address) - base) >> shift
        end = ((int(subnet.broadcast_address) - base) >> shift) + 1
        if end <= 0 or start >= family.size:
            continue
        if start > position:
            yield position, start
        position = max(position, end)
    if position < family.size:
        yield position, family.size
