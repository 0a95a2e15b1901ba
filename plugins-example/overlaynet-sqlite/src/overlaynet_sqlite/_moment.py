"""When a record expires: comparable among the processes of one machine, and as well as it can be among machines."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import attrs

FOR_EVER = 100 * 365 * 86400.0
"""Seconds; a record with a lifetime this long has no end."""


@attrs.frozen
class Moment:
    """A point in time, on both clocks of the machine.

    The boot clock (``CLOCK_BOOTTIME``) is never set, and counts on while the machine sleeps, but begins anew with each
    boot, and each machine has its own. So it decides within one boot, and the wall clock decides between two.
    """

    boot: str
    """The kernel's identity of this boot."""
    boottime: float
    """Seconds since the machine was booted, in every time namespace alike."""
    time: float
    """Seconds since 1970, UTC."""

    def after(self, seconds: float) -> Moment:
        """The moment that many seconds later."""
        return attrs.evolve(self, boottime=self.boottime + seconds, time=self.time + seconds)

    def until(self, other: Moment) -> float:
        """Seconds from this moment to the other; negative if it has passed."""
        return other.boottime - self.boottime if self.boot == other.boot else other.time - self.time


def now() -> Moment:
    """This moment."""
    return Moment(_boot(), time.clock_gettime(time.CLOCK_BOOTTIME) - _offset(), time.time())


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@functools.cache
def _offset() -> float:
    """What this process's time namespace adds to the boot clock (time_namespaces(7)), in seconds."""
    try:
        lines = Path("/proc/self/timens_offsets").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return 0.0  # a kernel without time namespaces
    offsets = {
        clock: float(seconds) + float(nanoseconds) / 1e9 for clock, seconds, nanoseconds in map(str.split, lines)
    }
    return offsets["boottime"]
