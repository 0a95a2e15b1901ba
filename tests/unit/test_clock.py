"""The virtual clock: waiting takes no time, in the right order, and real events still come first."""

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaynet.testing.clock import VirtualClockLoop

pytestmark = pytest.mark.anyio


def loop() -> VirtualClockLoop:
    running = asyncio.get_running_loop()
    assert isinstance(running, VirtualClockLoop)
    return running


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())


async def test_years_pass_at_once() -> None:
    began = time.monotonic()
    before = loop().time()
    for _ in range(1000):
        await asyncio.sleep(86400)
    assert loop().time() - before == 1000 * 86400
    assert time.monotonic() - began < 60


async def test_time_stands_still_while_something_runs() -> None:
    before = loop().time()
    time.sleep(0.01)  # noqa: ASYNC251 - the point
    for _ in range(10):
        await asyncio.sleep(0)
    assert loop().time() == before


async def test_what_is_due_first_runs_first() -> None:
    order: list[float] = []

    async def wake(delay: float) -> None:
        await asyncio.sleep(delay)
        order.append(delay)

    delays = [5, 0.5, 86400, 1, 3600, 0.25]
    await asyncio.gather(*map(wake, delays))
    assert order == sorted(delays)


async def test_timeouts_follow_it() -> None:
    before = loop().time()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await asyncio.Event().wait()
    assert loop().time() - before == 3600


async def test_what_happens_in_time_prevents_the_timeout() -> None:
    happened = asyncio.Event()
    loop().call_later(3599, happened.set)
    async with asyncio.timeout(3600):
        await happened.wait()


async def test_time_can_be_advanced_by_hand() -> None:
    before = loop().time()
    fired = asyncio.Event()
    loop().call_later(10, fired.set)
    loop().advance(10)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert fired.is_set()
    assert loop().time() == before + 10


async def test_real_events_come_before_the_clock_jumps() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.send(b"x")
        before = loop().time()
        async with asyncio.timeout(1):
            assert await loop().sock_recv(near, 1) == b"x"
        assert loop().time() == before


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1e5), min_size=1, max_size=20))
def test_sleeping_until_a_deadline_reaches_it(delays: list[float]) -> None:
    async def main() -> None:
        for delay in delays:
            deadline = loop().time() + delay
            turns = 0
            while loop().time() < deadline:
                await asyncio.sleep(deadline - loop().time())
                turns += 1
                assert turns < 10, "the clock does not move"

    run(main)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=20))
def test_every_run_is_the_same(delays: list[int]) -> None:
    def story() -> list[tuple[int, float]]:
        told: list[tuple[int, float]] = []

        async def wake(number: int, delay: int) -> None:
            await asyncio.sleep(delay)
            told.append((number, loop().time()))

        async def main() -> None:
            await asyncio.gather(*(wake(*item) for item in enumerate(delays)))

        run(main)
        return told

    assert story() == story()
