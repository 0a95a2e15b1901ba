"""The file store's lock: held by one writer, or shared by those who list, across threads and processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator

from overlaynet.errors import StoreUnavailable
from overlaynet.stores._file_system import make_directory

TIMEOUT = 10.0
"""Seconds that a caller waits for the lock; a write takes milliseconds."""

_turns: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()


class Abandoned(Exception):
    """Nobody waits for this call any more; it has written nothing."""


class DirectoryLock:
    """The ``flock`` on the file ``.lock`` of a directory. The kernel releases it when its holder dies."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._path = os.path.join(directory, ".lock")
        # The threads of a process take turns, so that few at a time ask for the lock.
        self._turn = _turns.setdefault(directory, threading.Lock())

    @contextlib.contextmanager
    def alone(self, abandoned: threading.Event) -> Iterator[None]:
        """Hold the directory alone. :raises Abandoned: as soon as ``abandoned`` is set, but no more once it is held."""
        with self._held(fcntl.LOCK_EX, abandoned):
            yield

    @contextlib.contextmanager
    def shared(self, abandoned: threading.Event) -> Iterator[None]:
        """Hold the directory together with others who share it. :raises Abandoned: as :meth:`alone` does."""
        with self._held(fcntl.LOCK_SH, abandoned):
            yield

    @contextlib.contextmanager
    def _held(self, kind: int, abandoned: threading.Event) -> Iterator[None]:
        pauses = self._pauses(abandoned)
        while not self._turn.acquire(timeout=0.1):
            next(pauses)
        try:
            while (lock := self._try_lock(kind)) is None:
                abandoned.wait(next(pauses))
            try:
                if abandoned.is_set():
                    raise Abandoned
                yield
            finally:
                _unlock(lock)
        finally:
            self._turn.release()

    def _pauses(self, abandoned: threading.Event) -> Iterator[float]:
        """The seconds to wait before each further try to get the lock; waiting in the kernel could not be given up."""
        give_up = time.monotonic() + TIMEOUT
        pause = 0.001
        while not abandoned.is_set():
            if time.monotonic() > give_up:
                raise StoreUnavailable(
                    f"the file store {self._directory} has been locked for {TIMEOUT:g} s; "
                    f"find the process that holds it with: fuser -v {self._path}"
                )
            yield pause * random.uniform(0.5, 1)
            pause = min(2 * pause, 0.02)
        raise Abandoned

    def _try_lock(self, kind: int) -> int | None:
        make_directory(self._directory)
        lock = os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            # If the directory was removed and made anew, the others' lock is another file by now.
            if os.path.samestat(os.fstat(lock), os.stat(self._path)):
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(lock)
            raise
        _unlock(lock)
        return None


def _unlock(lock: int) -> None:
    # A process forked meanwhile shares the lock, and would keep it if it were only closed here.
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)
