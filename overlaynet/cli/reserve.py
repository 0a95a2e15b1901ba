"""``overlaynet reserve``: keep a subnet for one node."""

from __future__ import annotations

import argparse
import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from overlaynet import network as documents
from overlaynet.cli._store import add_store_flags, read_document, read_subnet, with_store
from overlaynet.commands import Command
from overlaynet.drivers import Store
from overlaynet.errors import ConfigError
from overlaynet.model import Reservation, Subnets
from overlaynet.network import Network


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.epilog = (
        "The node takes the subnet when it is next started, before any other; nobody else is ever given it. The "
        "reservation stays, whatever becomes of leases and nodes, until `overlaynet unreserve`. flannel nodes, too, leave "
        "the subnet alone; one whose address it is reserved for takes it."
    )
    parser.add_argument(
        "subnets",
        nargs="+",
        metavar="SUBNET",
        help="such as 10.244.7.0/24; in a network of IPv4 and IPv6, one of each",
    )
    holder = parser.add_mutually_exclusive_group(required=True)
    holder.add_argument(
        "--node", dest="for_node", metavar="NAME", help="identity of the node, as its --node or `overlaynet leases` say"
    )
    holder.add_argument("--public-ip", dest="for_address", metavar="ADDRESS", help="address that its peers reach it by")
    add_store_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Reserve. Idempotent."""
    reservation = _reservation(arguments)

    async def reserve(store: Store) -> None:
        _check(documents.parse(await read_document(store)), reservation.subnets)
        await store.reserve(reservation)

    with_store(arguments, reserve)
    print(f"{reservation.subnets} is reserved for {reservation.holder}")
    return 0


def _reservation(arguments: argparse.Namespace) -> Reservation:
    given = [read_subnet(text) for text in arguments.subnets]
    ipv4 = [subnet for subnet in given if isinstance(subnet, IPv4Network)]
    ipv6 = [subnet for subnet in given if isinstance(subnet, IPv6Network)]
    if len(ipv4) > 1 or len(ipv6) > 1:
        raise ConfigError(
            "name one subnet, or one of IPv4 and one of IPv6; what is reserved together is leased together"
        )
    subnets = Subnets(next(iter(ipv4), None), next(iter(ipv6), None))
    if arguments.for_node is not None:
        if not arguments.for_node or not arguments.for_node.isprintable() or len(arguments.for_node) > 253:
            raise ConfigError("--node must be a printable name")
        return Reservation(subnets, node=arguments.for_node)
    try:
        address = ipaddress.ip_address(arguments.for_address)
    except ValueError as error:
        raise ConfigError(f"--public-ip is {arguments.for_address!r}, which is not an address") from error
    if isinstance(address, IPv4Address):
        return Reservation(subnets, public_ipv4=address)
    return Reservation(subnets, public_ipv6=address)


def _check(network: Network, subnets: Subnets) -> None:
    """:raises ConfigError: if the network document would never grant these subnets."""
    families = ((subnets.ipv4, network.ipv4, "IPv4"), (subnets.ipv6, network.ipv6, "IPv6"))
    for subnet, family, kind in families:
        if subnet is not None and family is None:
            raise ConfigError(f"the network document has no {kind} network, so {subnet} cannot be reserved")
        if subnet is not None and family is not None and subnet not in family:
            raise ConfigError(
                f"{subnet} is not one that the network document grants; those are the /{family.prefix_length} subnets "
                f"from {family.first} to {family.last}"
            )
    for subnet, family, kind in families:
        if subnet is None and family is not None:
            raise ConfigError(f"the network {network} has both families; name a subnet of its {kind} network, too")


COMMAND = Command("reserve", "keep a subnet for one node, whether or not it runs", configure, run)
