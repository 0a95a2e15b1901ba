"""The boot clock: the kernel's own alarms on it, and those of a virtual one."""

import asyncio
import ctypes
import errno
import logging
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from overlaynet import boot_clock
from overlaynet.testing.clock import VirtualClockLoop

PATIENCE = 30.0


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On asyncio's own loop, with the kernel's clocks."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await main()

    asyncio.run(bounded())


def run_virtually(main: Callable[[VirtualClockLoop], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualClockLoop)
        runner.run(main(loop))


def timers() -> list[str]:
    """What each timerfd of this process is set to."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[timerfd]":
                with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as information:
                    found.append(information.read())
        except FileNotFoundError:
            continue  # that of the listing itself
    return found


def test_an_alarm_is_the_kernels_on_the_boot_clock_and_rings_once_and_not_before() -> None:
    async def main() -> None:
        rung: list[float] = []
        done = asyncio.Event()

        def ring() -> None:
            rung.append(boot_clock.now())
            done.set()

        due = boot_clock.now() + 0.05
        boot_clock.call_at(due, ring)
        (timer,) = timers()
        assert f"clockid: {time.CLOCK_BOOTTIME}\n" in timer
        await done.wait()
        await asyncio.sleep(0.02)
        assert len(rung) == 1
        assert rung[0] >= due - 0.001
        assert timers() == []

    run(main)


@pytest.mark.parametrize("when", [0.0, -5.0, 1.0])
def test_an_alarm_for_a_time_that_is_over_rings_soon(when: float) -> None:
    async def main() -> None:
        rung = asyncio.Event()
        boot_clock.call_at(when, rung.set)
        assert not rung.is_set()
        await rung.wait()

    run(main)


def test_an_alarm_that_is_cancelled_does_not_ring_and_leaves_nothing() -> None:
    async def main() -> None:
        rung = asyncio.Event()
        alarm = boot_clock.call_at(0.0, rung.set)
        alarm.cancel()
        alarm.cancel()
        await asyncio.sleep(0.05)
        assert not rung.is_set()
        assert timers() == []

    run(main)


def test_an_event_is_waited_for_until_a_time() -> None:
    async def main() -> None:
        event = asyncio.Event()
        assert not await boot_clock.wait(event, boot_clock.now() + 0.01)
        asyncio.get_running_loop().call_soon(event.set)
        assert await boot_clock.wait(event, boot_clock.now() + PATIENCE)
        waiting = asyncio.create_task(boot_clock.wait(asyncio.Event(), boot_clock.now() + PATIENCE))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert timers() == []

    run(main)


def test_without_a_timer_of_the_kernels_the_loops_own_does_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        def timerfd_create(self, clock: int, flags: int) -> int:
            ctypes.set_errno(errno.EMFILE)
            return -1

    monkeypatch.setattr(boot_clock, "_libc", Refusing())

    async def main() -> None:
        assert not await boot_clock.wait(asyncio.Event(), boot_clock.now() + 0.01)

    run(main)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message == "no timer of the kernel's to be had"


def test_a_virtual_host_that_sleeps_has_its_alarms_ring_on_waking_and_its_timers_late() -> None:
    async def main(loop: VirtualClockLoop) -> None:
        told: list[str] = []
        boot_clock.call_at(100, lambda: told.append("alarm"))
        boot_clock.call_at(5000, lambda: told.append("later alarm"))
        boot_clock.call_at(50, lambda: told.append("cancelled")).cancel()
        loop.call_at(90, told.append, "timer")
        await asyncio.sleep(10)
        loop.suspend(4000)
        assert (loop.time(), boot_clock.now()) == (10, 4010)
        assert told == []
        await asyncio.sleep(1)
        assert told == ["alarm"]
        await asyncio.sleep(100)
        assert told == ["alarm", "timer"]
        await asyncio.sleep(5000 - 4111)
        assert told == ["alarm", "timer", "later alarm"]

    run_virtually(main)
