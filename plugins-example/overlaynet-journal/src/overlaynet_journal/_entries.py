"""What stands in a journal: one JSON object a line, written and read by these rules alone."""

from __future__ import annotations

import datetime
import ipaddress
import json
from collections.abc import Iterator
from pathlib import Path

import attrs

from overlaynet.api import JSON, IPAddress, IPNetwork

EVENTS = (
    "acquired", "renewed", "lost", "peer-added", "peer-changed", "peer-removed", "ready", "degraded", "recovered", "stopping"
)  # fmt: skip
LARGEST = 8192
"""Characters in the longest line that is read as an entry."""


class NotAnEntry(ValueError):
    """A line of the journal that is none of ours; the message says why."""


@attrs.frozen
class Entry:
    """One thing that happened to this node."""

    time: datetime.datetime
    event: str
    """One of :data:`EVENTS`."""
    subnets: tuple[IPNetwork, ...] = ()
    """Those of the lease or the peer."""
    address: IPAddress | None = None
    """Where the node or the peer is reached."""
    node: str = ""
    reason: str = ""

    def as_json(self) -> dict[str, JSON]:
        """What its line says; members that say nothing are left out."""
        members: dict[str, JSON] = {
            "time": self.time.isoformat(timespec="milliseconds"),
            "event": self.event,
            "subnets": [str(subnet) for subnet in self.subnets],
            "address": None if self.address is None else str(self.address),
            "node": self.node,
            "reason": self.reason,
        }
        return {name: value for name, value in members.items() if value}

    def line(self) -> str:
        """Its line in the journal, without the end of the line."""
        return json.dumps(self.as_json())

    def is_of(self, peer: str) -> bool:
        """True if it is about the node of this identity, address or subnet, or the one whose subnet has this address."""
        if peer == self.node or peer in map(str, self.subnets):
            return True
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        return address == self.address or any(
            address.version == subnet.version and address in subnet for subnet in self.subnets
        )


def parse(line: str) -> Entry:
    """Read a line. :raises NotAnEntry: if anything about it is not as :meth:`Entry.line` writes it."""
    if len(line) > LARGEST:
        raise NotAnEntry(f"it is longer than {LARGEST} characters")
    try:
        members = json.loads(line)
    except (ValueError, RecursionError):
        raise NotAnEntry("it is not JSON") from None
    if not isinstance(members, dict):
        raise NotAnEntry("it is not a JSON object")
    if unknown := sorted(members.keys() - {"time", "event", "subnets", "address", "node", "reason"}):
        raise NotAnEntry(f"it has an unknown member {unknown[0]!r}")
    for name in ("time", "event", "address", "node", "reason"):
        if not isinstance(members.get(name, ""), str) or not members.get(name, "").isprintable():
            raise NotAnEntry(f"its {name} is not a printable string")
    subnets = members.get("subnets", [])
    if not isinstance(subnets, list) or not all(isinstance(subnet, str) for subnet in subnets):
        raise NotAnEntry("its subnets are not a list of strings")
    if members.get("event") not in EVENTS:
        raise NotAnEntry(f"its event is not one of {', '.join(EVENTS)}")
    try:
        time = datetime.datetime.fromisoformat(members.get("time", ""))
        if time.tzinfo is None:
            raise NotAnEntry("its time has no time zone")
        return Entry(
            time,
            members["event"],
            tuple(ipaddress.ip_network(subnet) for subnet in subnets),
            ipaddress.ip_address(members["address"]) if "address" in members else None,
            members.get("node", ""),
            members.get("reason", ""),
        )
    except NotAnEntry:
        raise
    except ValueError as error:
        raise NotAnEntry(str(error)) from None


def read(path: Path, files: int) -> Iterator[Entry | tuple[Path, int, str]]:
    """All entries, the oldest first; of a line that is none, the file, its number, and why.

    :param files: how many older files there may be beside the newest: ``journal.1`` is younger than ``journal.2``.
    :raises OSError: if one cannot be read; :exc:`FileNotFoundError` if there is none at all.
    """
    older = [path.with_name(f"{path.name}.{number}") for number in range(files, 0, -1)]
    found = [file for file in (*older, path) if file.exists()]
    if not found:
        raise FileNotFoundError(2, "there is none", str(path))
    for file in found:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield parse(line.rstrip("\n"))
                except NotAnEntry as error:
                    yield file, number, str(error)
