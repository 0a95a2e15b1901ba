"""``overlaynet plugins``: what is installed, from where, and what is broken."""

from __future__ import annotations

import argparse
import json

import attrs

from overlaynet.cli.commands import Command
from overlaynet.plugins import catalogue


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the catalogue; exit status 1 if anything in it is broken."""
    found = catalogue()
    broken = [entry for entry in found if entry.problem is not None]
    if arguments.json:
        print(json.dumps([attrs.asdict(entry) for entry in found], indent=2))
        return 1 if broken else 0
    headings = ("GROUP", "NAME", "DISTRIBUTION", "STATE")
    rows = [
        (entry.group, entry.name, f"{entry.distribution} {entry.version}", "ok" if entry.problem is None else "BROKEN")
        for entry in found
    ]
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    for row in (headings, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for entry in broken:
        print(f"\n{entry.group}: {entry.name}: {entry.problem}")
    return 1 if broken else 0


COMMAND = Command("plugins", "list the drivers and plugins that are installed, and what is broken", configure, run)
