"""A virtual clock: an asyncio event loop in which waiting costs no time."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while something runs, and jumps to the next timer when all wait.

    ``loop.time()``, ``asyncio.sleep``, ``asyncio.timeout`` and all that builds on them follow it, so a day of renewals
    passes in milliseconds, in the same order every time. What waits for a thread or another process has
    no timer, and must not be used with it: the clock would jump past it.
    """

    def __init__(self) -> None:
        self._virtual_time = 0.0
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
