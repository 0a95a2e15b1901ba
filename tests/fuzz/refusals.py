"""A kernel that refuses, for processes that are started with it: refusals.c preloaded, and a file that says what fails."""

from __future__ import annotations

import enum
import mmap
import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

_SOURCE = Path(__file__).with_name("refusals.c")
_REFUSAL = struct.Struct("=iiii")
"""``struct refusal``: the error number, how often, how many calls pass before, how many have failed."""


class Call(enum.IntEnum):
    """What can fail, in the order of ``enum refusable`` in refusals.h, which tells more."""

    DEVICE_UDP = 0
    DEVICE_OFFLOADS = 1
    DEVICE_HEADER = 2
    SOCKET_SEGMENT = 3
    SOCKET_GRO = 4
    SEND_SEGMENTED = 5
    SEND = 6
    RECEIVE = 7
    WRITE_RUN = 8
    WRITE = 9
    READ = 10
    THREAD = 11
    DEVICE_GRO = 12
    GRO_TIMEOUT = 13


class Refusals:
    """Says what fails in all processes that have :attr:`environment`, from now on; at first nothing does.

    :param directory: where the library and the file are made.
    """

    def __init__(self, directory: Path) -> None:
        library, path = directory / "refusals.so", directory / "refusals"
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*command, _SOURCE, "-o", library, "-ldl", "-pthread"], check=True, capture_output=True)
        path.write_bytes(bytes(_REFUSAL.size * len(Call)))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self.environment: Mapping[str, str] = {"LD_PRELOAD": str(library), "OVERLAYNET_REFUSALS": str(path)}

    def refuse(self, call: Call, error: int, *, times: int = 0, skip: int = 0) -> None:
        """Let this call fail with an error number: ``times`` times, or with 0 for ever; after ``skip`` that pass."""
        # The error last: with it, the others count.
        _REFUSAL.pack_into(self._memory, call * _REFUSAL.size, 0, times, skip, 0)
        _REFUSAL.pack_into(self._memory, call * _REFUSAL.size, error, times, skip, 0)

    def refused(self, call: Call) -> int:
        """How often the call has failed since it was last said how it is to fail."""
        return int(_REFUSAL.unpack_from(self._memory, call * _REFUSAL.size)[3])

    def clear(self) -> None:
        """Refuse nothing any more."""
        for call in Call:
            self.refuse(call, 0)

    def close(self) -> None:
        """Let go of the file."""
        self._memory.close()
