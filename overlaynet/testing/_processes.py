"""Processes that are known from their first moment, whatever interrupts whoever starts them."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from typing import Any


class ProcessStart:
    """The start of one process, in a thread of its own.

    What the handler of a signal raises meets the main thread only. So it never comes between the moment when the process
    begins and the one when it is known here, as it would within :class:`subprocess.Popen`: nobody would end it then.

    :param start: makes the process.
    """

    def __init__(self, start: Callable[[], subprocess.Popen[Any]]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._given_up = False
        self._process: subprocess.Popen[Any] | None = None
        self._error: BaseException | None = None

    def wait(self) -> subprocess.Popen[Any]:
        """Start it; once only. Raises what ``start`` raises."""
        thread = threading.Thread(target=self._work, name="start of a process", daemon=True)
        thread.start()
        thread.join()
        if self._process is not None:
            return self._process
        try:
            raise self._error or RuntimeError("a process was started that had been given up")
        finally:
            self._error = None  # or the error's traceback and this object keep each other alive

    def give_up(self) -> subprocess.Popen[Any] | None:
        """The process, if it has begun, which is waited for; if not, it never will. Idempotent."""
        with self._lock:
            self._given_up = True
            return self._process

    def _work(self) -> None:
        with self._lock:
            if self._given_up:
                return
            try:
                self._process = self._start()
            except BaseException as error:
                self._error = error
