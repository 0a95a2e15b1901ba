"""Threads: blocking calls from asyncio, without tying the end of the process to them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from overlaynet.errors import NoThread

T = TypeVar("T")

MORE_THREADS = "raise the limit of tasks: TasksMax= of the systemd unit, pids.max of a container, or ulimit -u"
"""What to do where the kernel gives no thread."""


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. :raises NoThread: if the kernel gives none."""
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThread(f"the kernel gives no thread ({error}); {MORE_THREADS}") from error


async def call_in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a blocking function in a daemon thread of its own and return its result.

    Unlike ``asyncio.to_thread``, a call that hangs keeps neither the event loop from closing nor the process from
    ending: on cancellation the thread is left to itself, and its result is dropped.

    :raises OverlaynetError: if the kernel gives no thread; the function was not called.
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

    name = f"call {getattr(function, '__name__', function)}"
    start_thread(threading.Thread(target=work, name=name, daemon=True))
    return await future
