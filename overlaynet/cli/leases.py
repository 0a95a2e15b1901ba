"""``overlaynet leases``: who holds which subnet."""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING

from overlaynet.cli._store import add_store_flags, with_store
from overlaynet.cli.commands import Command
from overlaynet.drivers import Store
from overlaynet.model import JSON, Lease, Snapshot

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
            _print(await store.leases(), as_json=arguments.json)
            return
        async with aclosing(store.watch()) as snapshots:
            async for _ in snapshots:
                # The watch says that something changed; asked for, the store also knows how long each lease has left.
                _print(await store.leases(), as_json=arguments.json)

    with_store(arguments, show)
    return 0


def _print(snapshot: Snapshot, *, as_json: bool) -> None:
    if as_json:
        content = {
            "leases": [_as_json(lease) for lease in snapshot.leases],
            "malformed": [{"key": problem.key, "reason": problem.reason} for problem in snapshot.malformed],
        }
        print(json.dumps(content), flush=True)
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)  # for a pipe, nothing is cut
    console.print(_table(snapshot) if snapshot.leases else "no leases")
    for problem in snapshot.malformed:
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
            _duration(lease.ttl),
        )
    return table


def _as_json(lease: Lease) -> dict[str, JSON]:
    return {
        "subnets": [str(subnet) for subnet in lease.subnets],
        "public_ipv4": None if lease.public_ipv4 is None else str(lease.public_ipv4),
        "public_ipv6": None if lease.public_ipv6 is None else str(lease.public_ipv6),
        "node": lease.node or None,
        "backend": lease.data.backend_type or None,
        "expires_in_seconds": None if lease.ttl is None or math.isinf(lease.ttl) else round(lease.ttl),
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if math.isinf(seconds):
        return "never"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02} min"
    return f"{minute} min {second:02} s" if minute else f"{second} s"


COMMAND = Command("leases", "list who holds which subnet", configure, run)
