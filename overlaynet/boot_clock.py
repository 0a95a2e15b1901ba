"""The clock that leases are counted by: the kernel's boot clock, which is never set, and goes on while the host sleeps.

The event loop's clock stands still in a suspend, and so do its timers; the store counts on, and may give a subnet to
another node meanwhile. So what a store has promised is compared with this clock, and waited for with its alarms, which
ring as soon as the host is awake again.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from overlaynet.logs import fields

log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_ABSOLUTE = 1
"""``TFD_TIMER_ABSTIME``."""


class Alarm(Protocol):
    """What is to be called at a time of the boot clock."""

    def cancel(self) -> None:
        """Do not call it any more. Idempotent."""


@runtime_checkable
class OwnBootClock(Protocol):
    """An event loop that has a boot clock of its own, such as a virtual one."""

    def boottime(self) -> float:
        """As :func:`now`."""

    def call_at_boottime(self, when: float, callback: Callable[[], object]) -> Alarm:
        """As :func:`call_at`."""


def now() -> float:
    """Seconds of the boot clock. Called in an event loop."""
    loop = asyncio.get_running_loop()
    return loop.boottime() if isinstance(loop, OwnBootClock) else time.clock_gettime(time.CLOCK_BOOTTIME)


def call_at(when: float, callback: Callable[[], object]) -> Alarm:
    """Have the running event loop call ``callback`` once, at that time of the boot clock, or soon if it is over."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, OwnBootClock):
        return loop.call_at_boottime(when, callback)
    try:
        return _KernelAlarm(loop, when, callback)
    except OSError as error:
        # Such as for want of descriptors. The loop's own timer does, unless the host sleeps.
        log.warning("no timer of the kernel's to be had", extra=fields(clock="boot clock", reason=error.strerror))
        return loop.call_later(when - now(), callback)


async def wait(event: asyncio.Event, until: float) -> bool:
    """Wait for the event, but no longer than until that time of the boot clock; ``True`` if it is set."""
    try:
        async with asyncio.timeout(None) as limit:
            alarm = call_at(until, lambda: limit.reschedule(0))
            try:
                await event.wait()
            finally:
                alarm.cancel()
    except TimeoutError:
        return event.is_set()
    return True


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSetting(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


class _KernelAlarm:
    """A timerfd: Python has it from 3.13 on only. :raises OSError: if the kernel gives none."""

    def __init__(self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], object]) -> None:
        self._loop = loop
        self._callback = callback
        self._descriptor = _checked(_libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC))
        nanoseconds = max(1, round(when * 1e9))  # zero would mean never
        setting = _TimerSetting(value=_Time(*divmod(nanoseconds, 10**9)))
        try:
            _checked(_libc.timerfd_settime(self._descriptor, _ABSOLUTE, ctypes.byref(setting), None))
        except OSError:
            os.close(self._descriptor)
            raise
        loop.add_reader(self._descriptor, self._ring)

    def _ring(self) -> None:
        self.cancel()
        self._callback()

    def cancel(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
