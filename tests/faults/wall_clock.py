"""The wall clock of a host, which a test sets while programs run by it."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_suffix(".c")


class WallClock:
    """A wall clock that is right at first. No other clock changes with it, and neither does that of any other program.

    :param directory: where its files lie.
    """

    def __init__(self, directory: Path) -> None:
        self._step = directory / "wall_clock"
        library = directory / "wall_clock.so"
        self.set(0)
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True)
        self.environment: Mapping[str, str] = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(self._step)}
        """What a program is given that is to go by it."""

    def set(self, seconds: float) -> None:
        """Set it, for programs that run, too: so many seconds ahead of the right time, or behind it if negative."""
        # In its place: who has mapped the file sees it.
        descriptor = os.open(self._step, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(descriptor, struct.pack("=q", int(seconds)), 0)
        os.close(descriptor)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """What this process starts meanwhile goes by it, with all that it starts."""
        with pytest.MonkeyPatch.context() as environment:
            for name, value in self.environment.items():
                environment.setenv(name, value)
            yield
