"""``overlaynet release``: end the lease of a node that is gone."""

from __future__ import annotations

import argparse
import math

from overlaynet.cli._store import add_store_flags, covers, duration, read_subnet, with_store
from overlaynet.commands import Command
from overlaynet.drivers import Store
from overlaynet.errors import ConfigError, LeaseInUse, RecordError
from overlaynet.model import Lease, Malformed, Snapshot
from overlaynet.records import parse_lease_key

_PATIENCE = 0.25
"""The part of its margin that a node is given for a renewal: the store may be slow, or have been away."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.epilog = (
        "A lease says how long before its end its node renews it. One that is overdue by a quarter of that belongs to a node "
        "that is gone, and is released; any other, such as one of flannel's, which do not say, may belong to a node that "
        "lives, and is released with --force only. A node that lives takes its lease back, unless another node was quicker. "
        "Reserved subnets stay reserved."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("subnet", nargs="?", metavar="SUBNET", help="such as 10.244.7.0/24; of a pair, one is enough")
    which.add_argument("--node", dest="of_node", metavar="NAME", help="all leases of the node with this identity")
    parser.add_argument(
        "--force", action="store_true", help="even if the node may be alive, or the record is not readable"
    )
    add_store_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Release."""

    async def release(store: Store) -> list[Lease | Malformed]:
        claims = _find(arguments, await store.leases(), store)
        if not arguments.force:
            for claim in claims:
                _check_overdue(claim)
        for claim in claims:
            if not await store.remove(claim):
                raise LeaseInUse(f"{_described(claim)} was written at this very moment, so its node is alive")
        return claims

    for claim in with_store(arguments, release):
        print(f"released: {_described(claim)}")
    return 0


def _find(arguments: argparse.Namespace, snapshot: Snapshot, store: Store) -> list[Lease | Malformed]:
    """What the operator named. :raises ConfigError: if there is no such lease."""
    if arguments.of_node is not None:
        of_node = [lease for lease in snapshot.leases if lease.node == arguments.of_node]
        if not of_node:
            raise ConfigError(f"no lease in {store} is of a node {arguments.of_node!r}; `overlaynet leases` lists them")
        return [*of_node]
    given = read_subnet(arguments.subnet)
    found: list[Lease | Malformed] = [lease for lease in snapshot.leases if covers(lease.subnets, [given])]
    for malformed in snapshot.malformed:
        try:
            subnets = parse_lease_key(malformed.key)
        except RecordError:
            continue  # it claims no subnet
        if covers(subnets, [given]):
            found.append(malformed)
    if not found:
        raise ConfigError(f"{store} has no lease on {given}; `overlaynet leases` lists them")
    return found


def _check_overdue(claim: Lease | Malformed) -> None:
    """:raises LeaseInUse: unless the lease would long have been renewed if its node were alive."""
    if isinstance(claim, Malformed):
        raise LeaseInUse(f"{_described(claim)}; --force removes it")
    unknown = "so nobody can tell whether its node is alive; if it is not, use --force"
    if claim.ttl is None or math.isinf(claim.ttl):
        raise LeaseInUse(f"{_described(claim)} never expires, {unknown}")
    if claim.renewal_margin is None:
        raise LeaseInUse(f"{_described(claim)} does not say when it is to be renewed, {unknown}")
    # What the operator or the network document says now need not be what that node was started with.
    until_renewal = claim.ttl - claim.renewal_margin
    if until_renewal > -claim.renewal_margin * _PATIENCE:
        due = (
            f"is to be renewed only in {duration(until_renewal)}" if until_renewal > 0 else "is being renewed about now"
        )
        raise LeaseInUse(
            f"{_described(claim)} {due}: its node may be alive; stop it, or make sure that it is gone, and use --force"
        )


def _described(claim: Lease | Malformed) -> str:
    if isinstance(claim, Malformed):
        return f"the record {claim.key}, which cannot be read ({claim.reason})"
    address = claim.public_ipv4 if claim.public_ipv4 is not None else claim.public_ipv6
    return f"the lease on {claim.subnets} of {f'node {claim.node}' if claim.node else 'a node'} at {address}"


COMMAND = Command("release", "end the lease of a node that is gone", configure, run)
