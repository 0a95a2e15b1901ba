"""The example router: writes the routes into a file, for a program that brings them into force.

Each line is what ``ip route add`` takes, such as ``unicast 10.244.0.0/16 dev overlay0``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import attrs

from overlaynet.api import Route, Router, RouterError, check_name, option


@attrs.frozen
class ExampleOptions:
    """What is given with ``--router-option``."""

    directory: str = option("/run/overlaynet/example", "Directory of the files; each overlay of the host has its own")


class ExampleRouter(Router):
    """Keeps the routes in a file that is replaced in one step."""

    api: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[ExampleOptions]] = ExampleOptions
    options: ExampleOptions

    def __init__(self, options: ExampleOptions) -> None:
        super().__init__(options)
        self._path: Path | None = None

    async def open(self, instance: str) -> None:
        """Begin for one overlay. What an earlier run left in its file counts as ours."""
        # The name comes from the network document, and must not lead out of the directory.
        if (problem := check_name(instance)) is not None:
            raise RouterError(f"the overlay's name cannot be that of a file: it {problem}")
        self._path = Path(self.options.directory, instance)

    async def apply(self, routes: Sequence[Route]) -> None:
        """Make these all the routes there are."""
        self._write({_line(route) for route in routes})

    async def aclose(self) -> None:
        """Remove the routes, but those that answer for the overlay while no daemon runs; more than once is no error."""
        if self._path is not None:
            self._write(line for line in self._read().splitlines() if line.startswith("unreachable "))
            self._path = None

    def _read(self) -> str:
        assert self._path is not None, "open() comes first"
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise RouterError(f"{self._path} cannot be read: {error.strerror}") from error

    def _write(self, lines: Iterable[str]) -> None:
        """Idempotent: a file that is right already is left alone."""
        text = "".join(f"{line}\n" for line in sorted(lines))
        if self._read() == text:
            return
        assert self._path is not None, "open() comes first"
        temporary = self._path.with_name(f".{self._path.name}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            os.replace(temporary, self._path)
        except OSError as error:
            raise RouterError(f"{self._path} cannot be written: {error.strerror}") from error


def _line(route: Route) -> str:
    words = [route.kind, str(route.destination)]
    if route.gateway is not None:
        words += ["via", str(route.gateway)]
    if route.device is not None:
        words += ["dev", route.device]
    if route.onlink:
        words.append("onlink")
    return " ".join(words)
