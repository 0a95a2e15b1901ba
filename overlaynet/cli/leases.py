"""``overlaynet leases``: who holds which subnet."""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING

from overlaynet.cli._store import add_store_flags, duration, with_store
from overlaynet.commands import Command
from overlaynet.drivers import Store
from overlaynet.model import JSON, Lease, Reservation, Reserved, Snapshot

if TYPE_CHECKING:
    from rich.table import Table


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON object instead of a table; with --watch, one a line"
    )
    parser.add_argument("--watch", action="store_true", help="print again after each change, until interrupted")
    add_store_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the leases."""

    async def show(store: Store) -> None:
        if not arguments.watch:
            await _show(store, as_json=arguments.json)
            return
        async with aclosing(store.watch()) as snapshots:
            async for _ in snapshots:
                # The watch says that something changed; asked for, the store also knows how long each lease has left.
                await _show(store, as_json=arguments.json)

    with_store(arguments, show)
    return 0


async def _show(store: Store, *, as_json: bool) -> None:
    snapshot, reserved = await store.leases(), await store.reservations()
    malformed = [*snapshot.malformed, *reserved.malformed]
    if as_json:
        content = {
            "leases": [_as_json(lease) for lease in snapshot.leases],
            "reservations": [_reservation_as_json(reservation, snapshot) for reservation in reserved.reservations],
            "malformed": [{"key": problem.key, "reason": problem.reason} for problem in malformed],
        }
        print(json.dumps(content), flush=True)
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)  # for a pipe, nothing is cut
    console.print(_table(snapshot) if snapshot.leases else "no leases")
    if reserved.reservations:
        console.print(_reservations_table(reserved, snapshot))
    for problem in malformed:
        print(f"cannot be read: {problem.key}: {problem.reason}", file=sys.stderr)


def _table(snapshot: Snapshot) -> Table:
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - slow to import
    from rich.table import Table  # noqa: PLC0415

    table = Table("SUBNET", "PUBLIC ADDRESS", "NODE", "BACKEND", "EXPIRES IN", box=SIMPLE_HEAD, pad_edge=False)
    for lease in snapshot.leases:
        addresses = [str(address) for address in (lease.public_ipv4, lease.public_ipv6) if address is not None]
        table.add_row(
            "\n".join(map(str, lease.subnets)),
            "\n".join(addresses) or "-",
            lease.node or "-",
            lease.data.backend_type or "-",
            duration(lease.ttl),
        )
    return table


def _reservations_table(reserved: Reserved, snapshot: Snapshot) -> Table:
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - slow to import
    from rich.table import Table  # noqa: PLC0415

    table = Table("RESERVED", "FOR", "HELD", box=SIMPLE_HEAD, pad_edge=False)
    for reservation in reserved.reservations:
        table.add_row(
            "\n".join(map(str, reservation.subnets)),
            reservation.holder,
            "yes" if _held(reservation, snapshot) else "no",
        )
    return table


def _held(reservation: Reservation, snapshot: Snapshot) -> bool:
    return any(lease.subnets == reservation.subnets for lease in snapshot.leases)


def _reservation_as_json(reservation: Reservation, snapshot: Snapshot) -> dict[str, JSON]:
    return {
        "subnets": [str(subnet) for subnet in reservation.subnets],
        "node": reservation.node or None,
        "public_ipv4": None if reservation.public_ipv4 is None else str(reservation.public_ipv4),
        "public_ipv6": None if reservation.public_ipv6 is None else str(reservation.public_ipv6),
        "held": _held(reservation, snapshot),
    }


def _as_json(lease: Lease) -> dict[str, JSON]:
    return {
        "subnets": [str(subnet) for subnet in lease.subnets],
        "public_ipv4": None if lease.public_ipv4 is None else str(lease.public_ipv4),
        "public_ipv6": None if lease.public_ipv6 is None else str(lease.public_ipv6),
        "node": lease.node or None,
        "backend": lease.data.backend_type or None,
        "expires_in_seconds": None if lease.ttl is None or math.isinf(lease.ttl) else round(lease.ttl),
    }


COMMAND = Command("leases", "list who holds which subnet", configure, run)
