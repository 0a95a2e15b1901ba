"""A packet engine at work, in the thread that is its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from overlaynet._threads import start_thread
from overlaynet.backends.udp.engine import Engine
from overlaynet.errors import BackendError, NoThread


class EngineThread:
    """Runs an engine from now on until it is stopped, or fails; and closes it then.

    :param engine: a new one.
    :param device: the name of the device, for the thread's name.
    :param ended: called in the event loop once the engine has ended, whatever made it end.
    :raises BackendError: if the kernel gives no thread; the engine is closed then.
    """

    def __init__(self, engine: Engine, device: str, ended: Callable[[EngineThread], None]) -> None:
        self.engine = engine
        self.running = True
        """False once the engine has ended: it touches neither device nor sockets any more."""
        self.failure: Exception | None = None
        """What ended it, unless that was :meth:`stop`."""
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"{engine.name} engine of {device}", daemon=True)
        try:
            start_thread(self._thread)
        except NoThread as error:
            engine.close()
            raise BackendError(f"the packet engine cannot run: {error}") from error

    async def stop(self) -> None:
        """Return when the engine has ended. Idempotent; if it is cancelled, the engine ends all the same."""
        self.engine.stop()
        await self._over.wait()
        self._thread.join()  # to say so is the last thing that it does

    def _run(self) -> None:
        try:
            self.engine.run()
        except Exception as error:
            self.failure = error
        self.engine.close()
        self.running = False
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:  # the loop is closed: nobody else is left to do it
            self._ended(self)

    def _end(self) -> None:
        self._over.set()
        self._ended(self)
