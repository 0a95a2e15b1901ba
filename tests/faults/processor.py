"""What a daemon takes of the processor."""

from __future__ import annotations

import os
import time

from overlaynet.testing.daemons import DaemonProcess


def cpu_seconds(daemon: DaemonProcess) -> float:
    """What the process has used so far, in all its threads."""
    with open(f"/proc/{daemon.pid}/stat", encoding="ascii") as file:
        values = file.read().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def does_not_spin(daemon: DaemonProcess) -> bool:
    """True if the process uses less than half a core while nothing is asked of it; a busy loop takes a whole one."""
    before, began = cpu_seconds(daemon), time.monotonic()
    time.sleep(2)
    return cpu_seconds(daemon) - before < (time.monotonic() - began) / 2
