"""SIGTERM and SIGINT as a wish: the daemon is told, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

_STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Have the event loop call ``stop`` whenever SIGTERM or SIGINT comes; after the ``with`` block, both are ignored for good.

    So a process whose work is done ends with its own exit status, however often it is told to. asyncio's signal handlers
    are of no use for that: it closes what they write to before it takes them away, and then lets the signals kill.

    For the main thread, inside of the event loop.
    """
    loop = asyncio.get_running_loop()
    read_end, write_end = socket.socketpair()

    def told() -> None:
        with contextlib.suppress(BlockingIOError):
            read_end.recv(4096)
        stop()

    with read_end, write_end:
        read_end.setblocking(False)
        write_end.setblocking(False)
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        loop.add_reader(read_end, told)
        for number in _STOPPING:
            signal.signal(number, _do_nothing)
        try:
            yield
        finally:
            for number in _STOPPING:
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)
            loop.remove_reader(read_end)


def _do_nothing(number: int, frame: object) -> None:
    """A signal is only written to the wake-up descriptor if it has a handler."""
