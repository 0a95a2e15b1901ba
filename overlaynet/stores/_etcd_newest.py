"""From a thread to the event loop: only the newest value counts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Newest(Generic[T]):
    """Hands values from any thread to one reader in the event loop.

    A reader that is slow gets the newest value only; nothing piles up, neither values nor callbacks. Made in the event
    loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._closed = False
        self._waking = False
        self._changed = asyncio.Event()

    def put(self, value: T) -> None:
        """Take a value, from any thread; one that has not been read yet is dropped."""
        with self._lock:
            self._value = [value]
            self._wake()

    def close(self, error: BaseException | None = None) -> None:
        """Say, from any thread, that no more values come, and why."""
        with self._lock:
            self._closed, self._error = True, error
            self._wake()

    async def get(self) -> T | None:
        """Wait for a value that has not been read yet; ``None`` when there will be none, or the error of :meth:`close`."""
        while True:
            with self._lock:
                if self._value:
                    return self._value.pop()
                if self._closed:
                    if self._error is not None:
                        raise self._error
                    return None
                self._changed.clear()
            await self._changed.wait()

    async def wait_closed(self) -> None:
        """Wait until :meth:`close` has been called."""
        while True:
            with self._lock:
                if self._closed:
                    return
                self._changed.clear()
            await self._changed.wait()

    def _wake(self) -> None:
        if not self._waking:
            self._waking = True
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                self._loop.call_soon_threadsafe(self._awake)

    def _awake(self) -> None:
        with self._lock:
            self._waking = False
        self._changed.set()
