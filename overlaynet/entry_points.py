"""What installed distributions offer: the entry points of our groups. Reads metadata; imports nothing but on request."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Collection
from importlib.metadata import EntryPoint
from typing import Any

from overlaynet.errors import PluginError, did_you_mean

OBSERVERS = "overlaynet.plugins"
GROUPS: dict[str, str] = {
    "store": "overlaynet.stores",
    "backend": "overlaynet.backends",
    "router": "overlaynet.routers",
}
"""The entry-point group of each axis."""
FAILURES: tuple[type[BaseException], ...] = (Exception, SystemExit, asyncio.CancelledError)
"""What code of a third party's may raise, and has failed then. All but what ends this process by its operator's wish."""


def entries(group: str) -> list[EntryPoint]:
    """The group's entry points, by name, then by target."""
    unique = {(entry.name, entry.value, origin(entry)): entry for entry in importlib.metadata.entry_points(group=group)}
    return [unique[key] for key in sorted(unique)]


def load(entry: EntryPoint) -> Any:
    """What the entry point names. :raises PluginError: if it cannot be imported, whatever its module raises."""
    try:
        return entry.load()
    except FAILURES as error:
        raise PluginError(
            f"{identify(entry)} failed to import: {error!r}; repair or uninstall {origin(entry)[0]}"
        ) from error


def identify(entry: EntryPoint) -> str:
    """Group, name, target, distribution and version: ``overlaynet.stores: consul = acme.consul:Store (acme 1.2)``."""
    distribution, version = origin(entry)
    return f"{entry.group}: {entry.name} = {entry.value} ({' '.join((distribution, version)).strip()})"


def origin(entry: EntryPoint) -> tuple[str, str]:
    """The distribution, and its version."""
    if entry.dist is None:
        return "unknown distribution", ""
    return entry.dist.name, entry.dist.version


def refuse_twins(entry: EntryPoint, group: Collection[EntryPoint]) -> None:
    """:raises PluginError: if another entry point of its group has the same name; it names all their distributions."""
    twins = [other for other in group if other.name == entry.name]
    if len(twins) > 1:
        claimants = " and ".join(" ".join(origin(twin)).strip() for twin in twins)
        raise PluginError(f"{entry.group}: {entry.name!r} is claimed by {claimants}; uninstall all but one")


def strays() -> list[tuple[EntryPoint, str]]:
    """Entry points of groups that look like ours and are not, each with what is wrong."""
    groups = [*GROUPS.values(), OBSERVERS]
    found = []
    for group in sorted(importlib.metadata.entry_points().groups):
        if group.split(".")[0] == "overlaynet" and group not in groups:
            hint = did_you_mean(group, groups, lambda text: text.partition(".")[2])
            found += [
                (
                    entry,
                    f"{identify(entry)} is in a group that overlaynet does not look at{hint} "
                    f"(it looks at {', '.join(groups)})",
                )
                for entry in entries(group)
            ]
    return found
