"""Blocking calls from asyncio, without tying the end of the process to them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def call_in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a blocking function in a daemon thread of its own and return its result.

    Unlike ``asyncio.to_thread``, a call that hangs keeps neither the event loop from closing nor the process from
    ending: on cancellation the thread is left to itself, and its result is dropped.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name=f"call {getattr(function, '__name__', function)}", daemon=True).start()
    return await future
