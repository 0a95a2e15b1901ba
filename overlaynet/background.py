"""What a driver does beside its caller: tasks that end with it, and whose failure is not lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, NoReturn, Protocol

from overlaynet.errors import BackendError
from overlaynet.logs import fields

log = logging.getLogger(__name__)


class Closable(Protocol):
    """A socket, a file, and the like."""

    def close(self) -> object:
        """Free it. Idempotent."""


class Background:
    """The background tasks of a backend. Made anywhere, and used inside one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = asyncio.Event()
        self._failure: BaseException | None = None

    def start(self, work: Coroutine[Any, Any, None], *owned: Closable) -> asyncio.Task[None]:
        """Begin a task, which may be cancelled. However it ends, and be it before it began, what it owns is closed then.

        An error that it raises is a defect: it is logged, and :meth:`failure` raises it.
        """

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            for each in owned:
                each.close()
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("background task failed", extra=fields(task=task.get_name()), exc_info=error)
                self._failure = self._failure or error
                self._failed.set()

        task = asyncio.create_task(work, name=getattr(work, "__qualname__", None))
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    async def failure(self) -> NoReturn:
        """Wait until a task has failed: what :meth:`.Backend.run` is to do. :raises BackendError: naming the error."""
        await self._failed.wait()
        raise BackendError(f"it failed: {self._failure!r}; this is a defect, please report it") from self._failure

    async def aclose(self) -> None:
        """Cancel all tasks, and wait for their end. Idempotent; cancelled, it has cancelled them all the same."""
        for task in self._tasks:
            if not task.cancelling():  # one that cleans up is left to it
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
