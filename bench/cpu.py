"""What the processors did: the kernel's own accounts (proc(5)). All times are in seconds."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import attrs

_TICKS = os.sysconf("SC_CLK_TCK")
# The columns of the line "cpu" of /proc/stat that are work: user, nice, system, irq, softirq. Guests are part of user;
# idle, iowait and steal (another machine's turn) are no work of this machine.
_WORK = (0, 1, 2, 5, 6)


@attrs.frozen
class Machine:
    """The machine, as far as it explains figures."""

    kernel: str
    processor: str
    cores: int
    python: str

    def __str__(self) -> str:
        return f"Linux {self.kernel}, {self.cores} cores of {self.processor}, Python {self.python}"


def machine() -> Machine:
    """This one."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    python = ".".join(map(str, sys.version_info[:3]))
    return Machine(platform.release(), models[0] if models else platform.machine(), os.cpu_count() or 1, python)


def parse_busy(stat: str) -> float:
    """All processors' work since the machine started, out of the text of ``/proc/stat``."""
    columns = stat.splitlines()[0].split()[1:]
    return sum(int(columns[place]) for place in _WORK) / _TICKS


def busy() -> float:
    """All processors' work since the machine started, whoever caused it."""
    return parse_busy(Path("/proc/stat").read_text(encoding="ascii"))


def parse_process(stat: str) -> float:
    """A process's work, with that of all its threads, out of the text of ``/proc/PID/stat``."""
    # The name, in brackets, may hold anything; user and system time are the 14th and 15th column.
    columns = stat.rpartition(")")[2].split()
    return (int(columns[11]) + int(columns[12])) / _TICKS


def processes(identifiers: Iterable[int]) -> float:
    """What these processes have worked since they started. :raises FileNotFoundError: if one has ended."""
    return sum(parse_process(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")) for pid in identifiers)
