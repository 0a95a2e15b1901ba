"""The journal observer: writes down what happens to this node, in a file of bounded size, and a command that shows it."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import logging.handlers
import re
import sys
from pathlib import Path
from typing import ClassVar

import attrs

from overlaynet.api import (
    Command,
    Commands,
    ConfigError,
    Lease,
    Observer,
    Peer,
    between,
    fields,
    hookimpl,
    option,
)
from overlaynet_journal._entries import Entry, read

log = logging.getLogger(__name__)

_DURATION = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@attrs.frozen
class JournalOptions:
    """What is given with ``--plugin-option journal.KEY=VALUE``."""

    path: str = option(
        "/var/lib/overlaynet/journal",
        "File of the journal; older ones lie beside it, as journal.1 and so on",
        check=lambda path: None if path and "\0" not in path else "must be the path of a file",
    )
    max_bytes: int = option(1_000_000, "Bytes after which a new file is begun", check=between(10_000, 1_000_000_000))
    files: int = option(3, "Number of older files that are kept", check=between(1, 100))


class Journal(Observer):
    """Writes down when this node got, renewed and lost its lease, when peers came, moved and went, and what went wrong."""

    api: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[JournalOptions]] = JournalOptions
    options: JournalOptions

    def __init__(self, options: JournalOptions) -> None:
        super().__init__(options)
        self._handler: logging.Handler | None = None

    @hookimpl
    def overlaynet_lease_acquired(self, lease: Lease) -> None:
        self._note("acquired", lease)

    @hookimpl
    def overlaynet_lease_renewed(self, lease: Lease) -> None:
        self._note("renewed", lease)

    @hookimpl
    def overlaynet_lease_lost(self, lease: Lease, reason: str) -> None:
        self._note("lost", lease, reason)

    @hookimpl
    def overlaynet_peer_added(self, peer: Peer) -> None:
        self._note("peer-added", peer)

    @hookimpl
    def overlaynet_peer_changed(self, new: Peer) -> None:
        self._note("peer-changed", new)

    @hookimpl
    def overlaynet_peer_removed(self, peer: Peer) -> None:
        self._note("peer-removed", peer)

    @hookimpl
    def overlaynet_ready(self, lease: Lease) -> None:
        self._note("ready", lease)

    @hookimpl
    def overlaynet_degraded(self, reason: str) -> None:
        self._note("degraded", reason=reason)

    @hookimpl
    def overlaynet_recovered(self) -> None:
        self._note("recovered")

    @hookimpl
    def overlaynet_stopping(self) -> None:
        self._note("stopping")

    @hookimpl
    def overlaynet_cli(self, commands: Commands) -> None:
        commands.add(Command("history", "show what has happened to this node", self._configure, self._show))

    def _note(self, event: str, whose: Lease | Peer | None = None, reason: str = "") -> None:
        """Write an entry. A disk that is full is no reason to end the journal, let alone the node."""
        entry = Entry(datetime.datetime.now().astimezone(), event, reason=_printable(reason))
        if whose is not None:
            address = whose.public_ipv4 if whose.public_ipv4 is not None else whose.public_ipv6
            entry = attrs.evolve(entry, subnets=tuple(whose.subnets), address=address, node=_printable(whose.node))
        try:
            if self._handler is None:
                path = Path(self.options.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._handler = _Rotating(path, self.options)
            self._handler.emit(logging.makeLogRecord({"msg": entry.line()}))
        except OSError as error:
            log.warning("journal not written", extra=fields(path=self.options.path, reason=error.strerror))

    def _configure(self, parser: argparse.ArgumentParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  overlaynet history --since 2h                 the last two hours\n"
            "  overlaynet history --since 2026-03-01         since midnight of that day\n"
            "  overlaynet history --peer 10.244.7.9          the node that has this address in its subnet\n"
            "  overlaynet history --json | jq .event         one JSON object a line\n\n"
            f"The daemon writes {self.options.path}; say otherwise, to both, with\n"
            "OVERLAYNET_PLUGIN_OPTION=journal.Path=FILE, or plugin-option in the configuration file.\n"
            "Lines that are no entries are named on standard error, and make the exit status 1."
        )
        parser.add_argument(
            "--since",
            type=_since,
            metavar="WHEN",
            help="nothing older: 90s, 15m, 2h, 3d, or a date and time (ISO 8601)",
        )
        parser.add_argument(
            "--peer", metavar="NODE", help="only what is about this node: its identity, address or subnet"
        )
        parser.add_argument("--json", action="store_true", help="one JSON object a line, as the journal has it")

    def _show(self, arguments: argparse.Namespace) -> int:
        """Print the entries that are asked for."""
        status = 0
        try:
            for found in read(Path(self.options.path), self.options.files):
                if not isinstance(found, Entry):
                    file, number, problem = found
                    print(f"{file}, line {number}, is no entry: {problem}", file=sys.stderr)
                    status = 1
                elif (arguments.since is None or found.time >= arguments.since) and (
                    arguments.peer is None or found.is_of(arguments.peer)
                ):
                    print(json.dumps(found.as_json()) if arguments.json else _text(found))
        except OSError as error:
            raise ConfigError(
                f"the journal {error.filename} cannot be read: {error.strerror}; has a daemon run here with the plugin journal?"
            ) from error
        return status


class _Rotating(logging.handlers.RotatingFileHandler):
    """A log file of bounded size, whose errors are its caller's."""

    def __init__(self, path: Path, options: JournalOptions) -> None:
        super().__init__(path, maxBytes=options.max_bytes, backupCount=options.files, encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        raise  # noqa: PLE0704 - it is called while the exception is handled


def _since(text: str) -> datetime.datetime:
    """A moment, from the command line."""
    now = datetime.datetime.now().astimezone()
    try:
        if match := _DURATION.fullmatch(text):
            return now - datetime.timedelta(seconds=int(match[1]) * _SECONDS[match[2]])
        moment = datetime.datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a duration such as 90s, 15m, 2h or 3d, nor a date and time such as 2026-03-01T12:00"
        ) from None
    return moment if moment.tzinfo is not None else moment.astimezone()


def _text(entry: Entry) -> str:
    parts = [
        f"{entry.time.astimezone():%Y-%m-%d %H:%M:%S}",
        f"{entry.event:<12}",
        " ".join(map(str, entry.subnets)),
        f"via {entry.address}" if entry.address is not None else "",
        entry.node,
        entry.reason,
    ]
    return "  ".join(part for part in parts if part).rstrip()


def _printable(text: str) -> str:
    """The text on one line: what comes out of a store is anyone's."""
    return "".join(character if character.isprintable() else "�" for character in text[:1000])
