"""``overlaynet unreserve``: let a reserved subnet be given to anybody."""

from __future__ import annotations

import argparse

from overlaynet.cli._store import add_store_flags, covers, read_subnet, with_store
from overlaynet.commands import Command
from overlaynet.drivers import Store
from overlaynet.errors import ReservationError
from overlaynet.model import Subnets


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.epilog = "Whoever holds the subnet keeps it, as an ordinary lease."
    parser.add_argument(
        "subnet", metavar="SUBNET", help="such as 10.244.7.0/24; of a pair that is reserved, one is enough"
    )
    add_store_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Remove the reservation."""
    given = read_subnet(arguments.subnet)

    async def unreserve(store: Store) -> Subnets:
        reserved = (await store.reservations()).reservations
        subnets = next((found.subnets for found in reserved if covers(found.subnets, [given])), None)
        if subnets is None:
            raise ReservationError(f"{given} is not reserved; `overlaynet leases` lists what is")
        await store.unreserve(subnets)
        return subnets

    print(f"{with_store(arguments, unreserve)} is not reserved any more")
    return 0


COMMAND = Command("unreserve", "let a reserved subnet be given to anybody", configure, run)
