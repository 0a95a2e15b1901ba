"""The example observer: keeps a journal of what happens to this node, and a command that prints it."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

from overlaynet.api import Command, Commands, ConfigError, Lease, Peer, hookimpl

JOURNAL = Path(os.environ.get("EXAMPLE_JOURNAL", "/run/overlaynet/example.journal"))


@hookimpl
def overlaynet_ready(lease: Lease) -> None:
    """Traffic flows."""
    _note(f"ready with {lease.subnets}")


@hookimpl
def overlaynet_peer_added(peer: Peer) -> None:
    """There is a new peer."""
    _note(f"peer added: {peer}")


@hookimpl
def overlaynet_peer_removed(peer: Peer) -> None:
    """A peer has gone."""
    _note(f"peer removed: {peer}")


@hookimpl
def overlaynet_cli(commands: Commands) -> None:
    """Add ``overlaynet example``."""
    commands.add(Command("example", "print the journal of this node", _configure, _run))


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--last", type=int, default=20, metavar="N", help="how many lines to print (default: 20)")


def _run(arguments: argparse.Namespace) -> int:
    try:
        lines = JOURNAL.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"the journal {JOURNAL} cannot be read: {error.strerror}; has a daemon run here?") from error
    print(*lines[-arguments.last :], sep="\n")
    return 0


def _note(what: str) -> None:
    """Hooks are called in the daemon's event loop, so they return quickly."""
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    with JOURNAL.open("a") as journal:
        journal.write(f"{datetime.datetime.now().astimezone().isoformat(timespec='seconds')} {what}\n")
