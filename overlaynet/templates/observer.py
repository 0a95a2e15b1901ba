"""The example observer: keeps a journal of what happens to this node, and a command that prints it."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import ClassVar

import attrs

from overlaynet.api import Command, Commands, ConfigError, Lease, Observer, Peer, hookimpl, option


@attrs.frozen
class ExampleOptions:
    """What is given with ``--plugin-option example.KEY=VALUE``; each has a default."""

    path: str = option("/run/overlaynet/example.journal", "File of the journal")


class ExampleObserver(Observer):
    """Keeps a journal. Hooks are called in the daemon's event loop, so they return quickly."""

    api: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[ExampleOptions]] = ExampleOptions
    options: ExampleOptions

    @hookimpl
    def overlaynet_ready(self, lease: Lease) -> None:
        """Traffic flows."""
        self._note(f"ready with {lease.subnets}")

    @hookimpl
    def overlaynet_peer_added(self, peer: Peer) -> None:
        """There is a new peer."""
        self._note(f"peer added: {peer}")

    @hookimpl
    def overlaynet_peer_removed(self, peer: Peer) -> None:
        """A peer has gone."""
        self._note(f"peer removed: {peer}")

    @hookimpl
    def overlaynet_cli(self, commands: Commands) -> None:
        """Add ``overlaynet example``."""
        commands.add(Command("example", "print the journal of this node", self._configure, self._run))

    def _configure(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--last", type=int, default=20, metavar="N", help="how many lines to print (default: 20)")

    def _run(self, arguments: argparse.Namespace) -> int:
        path = Path(self.options.path)
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"the journal {path} cannot be read: {error.strerror}; has a daemon run here?") from error
        print(*lines[-arguments.last :], sep="\n")
        return 0

    def _note(self, what: str) -> None:
        path = Path(self.options.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as journal:
            journal.write(f"{datetime.datetime.now().astimezone().isoformat(timespec='seconds')} {what}\n")
