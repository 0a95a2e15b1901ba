"""Changes of the kernel's links, addresses, routes and forwarding, as they happen (rtnetlink(7))."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import math
import socket
from collections.abc import Iterable

from overlaynet.netlink import NetlinkError


class Group(enum.IntEnum):
    """What can be followed: the multicast groups of ``linux/rtnetlink.h``, by their numbers there."""

    LINKS = 1
    IPV4_ADDRESSES = 5
    IPV4_ROUTES = 7
    IPV6_ADDRESSES = 9
    IPV6_ROUTES = 11
    IPV4_PARAMETERS = 24
    """``forwarding`` and ``rp_filter`` among others; of most parameters below ``net`` the kernel says nothing."""
    IPV6_PARAMETERS = 25


class ChangeSignal:
    """Tells that something has changed in the kernel's network configuration. Made and used inside one event loop.

    What changed it does not say: whoever waits looks at everything again.

    :param groups: which changes; see rtnetlink(7).
    :raises overlaynet.netlink.NetlinkError: if the kernel does not tell this process.
    """

    _GATHER = 0.05
    """Seconds to wait for more changes after the first one."""
    _INTERVAL = 1.0
    """Least seconds between two returns, so that a host whose routes never rest does not keep its daemon busy."""

    def __init__(self, groups: Iterable[Group] = tuple(Group)) -> None:
        self._loop = asyncio.get_running_loop()
        self._noticed = asyncio.Event()
        self._last_return = -math.inf
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        with contextlib.ExitStack() as undo:
            try:
                self._socket = undo.enter_context(socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE))
                self._socket.bind((0, sum(1 << (group - 1) for group in groups)))
            except OSError as error:
                raise NetlinkError("tell of its changes", error.errno or errno.EIO) from error
            undo.pop_all()
        self._loop.add_reader(self._socket, self._notice)

    def _notice(self) -> None:
        # Read nothing until somebody waits: one message says as much as a thousand, and so does a full buffer.
        self._loop.remove_reader(self._socket)
        self._noticed.set()

    async def wait(self) -> None:
        """Return when something has changed since the last call returned. Cancelled, it loses nothing."""
        await self._noticed.wait()
        await asyncio.sleep(max(self._GATHER, self._last_return + self._INTERVAL - self._loop.time()))
        if self._socket.fileno() == -1:
            await asyncio.Event().wait()
        self._drain()
        self._noticed.clear()
        self._last_return = self._loop.time()
        self._loop.add_reader(self._socket, self._notice)

    def _drain(self) -> None:
        while True:
            try:
                self._socket.recv(1)  # takes a whole message
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # messages were lost: there was a change
                    raise

    def close(self) -> None:
        """Stop listening; a :meth:`wait` in progress never returns. Idempotent."""
        if self._socket.fileno() != -1:
            self._loop.remove_reader(self._socket)
            self._socket.close()
