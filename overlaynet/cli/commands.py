"""Subcommands: what one is, and the registry that a plugin's ``overlaynet_cli`` hook is handed."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import attrs


@attrs.frozen
class Command:
    """One subcommand of ``overlaynet``."""

    name: str
    summary: str
    """What it does, in a line that begins with a small letter and ends without a full stop."""
    configure: Callable[[argparse.ArgumentParser], None]
    """Adds the command's arguments to its parser."""
    run: Callable[[argparse.Namespace], int]
    """Does the work; returns the exit status. An :exc:`~overlaynet.errors.OverlaynetError` becomes one line and exit 1."""


class Commands:
    """The subcommands of plugins, by name."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}
        self._reserved: set[str] = set()

    def reserve(self, name: str) -> None:
        """Keep a name from being added."""
        self._reserved.add(name)

    def add(self, command: Command) -> None:
        """Add a subcommand. :raises ValueError: if the name is taken."""
        if command.name in self._reserved or command.name in self._commands:
            raise ValueError(f"there is a command {command.name!r} already")
        self._commands[command.name] = command

    def get(self, name: str) -> Command | None:
        """The command of that name, or ``None``."""
        return self._commands.get(name)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._commands)
