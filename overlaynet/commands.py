"""Subcommands: what one is, and the registry that the ``overlaynet_cli`` hook is handed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

import attrs


@attrs.frozen
class Command:
    """One subcommand of ``overlaynet``."""

    name: str
    """What follows ``overlaynet`` on the command line."""
    summary: str
    """What it does, in a line that begins with a small letter and ends without a full stop."""
    configure: Callable[[argparse.ArgumentParser], None]
    """Adds the command's arguments to its parser."""
    run: Callable[[argparse.Namespace], int]
    """Does the work; returns the exit status. An :exc:`~overlaynet.errors.OverlaynetError` becomes one line and exit 1."""


class Commands:
    """The subcommands of plugins, by name."""

    def __init__(self, reserved: Collection[str] = ()) -> None:
        """Begin with none; the names in ``reserved`` are those of overlaynet itself."""
        self._commands: dict[str, Command] = {}
        self._reserved = frozenset(reserved)

    def add(self, command: Command) -> None:
        """Add a subcommand. :raises ValueError: if the name is taken, naming by what."""
        if command.name in self._reserved:
            raise ValueError(f"overlaynet has a command {command.name!r} of its own; choose another name")
        other = self._commands.get(command.name)
        if other is not None:
            raise ValueError(f"{_origin(other)} has added a command {command.name!r} already; choose another name")
        self._commands[command.name] = command

    def get(self, name: str) -> Command | None:
        """The command of that name, or ``None``."""
        return self._commands.get(name)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._commands)


def _origin(command: Command) -> str:
    """The distribution that a command is from, as far as its function's module tells."""
    import importlib.metadata  # noqa: PLC0415 - slow to import, and this is the only use

    module = getattr(command.run, "__module__", None) or "unknown"
    names = sorted(set(importlib.metadata.packages_distributions().get(module.partition(".")[0], ())))
    known = " or ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{known} ({module})" if known else f"the module {module}"
