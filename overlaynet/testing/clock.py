"""A virtual clock: an asyncio event loop in which waiting costs no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while something runs, and jumps to the next timer when all wait.

    ``loop.time()``, ``asyncio.sleep``, ``asyncio.timeout`` and all that builds on them follow it, so a day of renewals
    passes in milliseconds, in the same order every time. What waits for a thread or another process has
    no timer, and must not be used with it: the clock would jump past it.
    """

    def __init__(self) -> None:
        self._virtual_time = 0.0
        self._slept = 0.0
        self._alarms: set[_Alarm] = set()
        self._idle_selector = _IdleSelector(self)
        super().__init__(self._idle_selector)
        # The loop's own, a nanosecond, is lost in a float after some months: a timer would never be due.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._virtual_time

    def advance(self, seconds: float) -> None:
        """Let time pass at once, as if all had waited."""
        self._virtual_time += seconds

    # The boot clock, as :mod:`overlaynet.boot_clock` asks for it.

    def boottime(self) -> float:
        """Seconds of virtual time since the loop was made, with those that the host has slept."""
        return self._virtual_time + self._slept

    def call_at_boottime(self, when: float, callback: Callable[[], object]) -> _Alarm:
        """Call ``callback`` at that time of the boot clock."""
        return _Alarm(self, self._alarms, when, callback)

    def suspend(self, seconds: float) -> None:
        """Let the host sleep: the boot clock goes on, and the loop's own clock and timers stand still."""
        self._slept += seconds
        for alarm in self._alarms:
            alarm.set()


class _Alarm:
    """One call at a time of the boot clock."""

    def __init__(
        self, loop: VirtualClockLoop, alarms: set[_Alarm], when: float, callback: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._alarms = alarms
        self._when = when
        self._callback = callback
        self._timer: asyncio.TimerHandle | None = None
        alarms.add(self)
        self.set()

    def set(self) -> None:
        """Reckon anew when it is due by the loop's clock."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._loop.time() + self._when - self._loop.boottime(), self._ring)

    def _ring(self) -> None:
        self.cancel()
        self._callback()

    def cancel(self) -> None:
        """Do not call any more. Idempotent."""
        self._alarms.discard(self)
        if self._timer is not None:
            self._timer.cancel()


VIRTUAL_CLOCK = ("asyncio", {"loop_factory": VirtualClockLoop})
"""What a fixture ``anyio_backend`` returns to run async tests with a virtual clock."""


class _IdleSelector(selectors.DefaultSelector):
    """Waits for nothing but real events; when there is none, the time that would have been waited has passed."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            ready: list[Any] = super().select(timeout)
            return ready
        ready = super().select(0)
        if not ready:
            self._loop.advance(timeout)
        return ready
