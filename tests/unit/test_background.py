"""The background tasks of a driver."""

import asyncio
import socket

import pytest

from overlaynet.background import Background
from overlaynet.errors import BackendError

pytestmark = pytest.mark.anyio


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


async def fail(error: Exception) -> None:
    raise error


async def test_the_first_failure_is_raised_and_every_one_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    background = Background()
    waiting = asyncio.create_task(background.failure())
    await asyncio.sleep(1)
    assert not waiting.done()
    background.start(fail(ValueError("first")))
    background.start(fail(ValueError("second")))
    with pytest.raises(BackendError, match=r"^it failed: ValueError\('first'\); this is a defect, please report it$"):
        await waiting
    await background.aclose()
    assert [record.message for record in caplog.records] == ["background task failed"] * 2


async def test_a_task_that_ends_or_is_cancelled_is_no_failure() -> None:
    background = Background()
    background.start(asyncio.sleep(1))
    background.start(wait_for_ever()).cancel()
    waiting = asyncio.create_task(background.failure())
    await asyncio.sleep(10)
    assert not waiting.done()
    waiting.cancel()
    await background.aclose()


@pytest.mark.parametrize("turns", [0, 1])
async def test_what_a_task_owns_is_closed_even_if_it_never_began(turns: int) -> None:
    background = Background()
    owned = socket.socket()
    background.start(wait_for_ever(), owned)
    for _ in range(turns):
        await asyncio.sleep(0)
    assert owned.fileno() != -1
    await background.aclose()
    assert owned.fileno() == -1


async def test_closing_waits_for_the_end_and_may_be_done_again() -> None:
    ended = []

    async def work() -> None:
        try:
            await wait_for_ever()
        finally:
            await asyncio.sleep(5)
            ended.append(True)

    background = Background()
    background.start(work())
    await asyncio.sleep(0)
    closing = asyncio.create_task(background.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})
    assert ended == []
    closing = asyncio.create_task(background.aclose())
    await asyncio.wait({closing})
    assert ended == [True]
