"""Changes of the kernel's links, addresses, routes and forwarding, as they happen (rtnetlink(7))."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import math
import socket
import struct
from collections.abc import Callable, Collection, Iterable

from overlaynet.netlink import NetlinkError

_LARGEST = 8192
"""Bytes of a message that matter."""


class Group(enum.IntEnum):
    """What can be followed: the multicast groups of ``linux/rtnetlink.h``, by their numbers there."""

    LINKS = 1
    NEIGHBOURS = 3
    """Also the forwarding entries of bridges and tunnels; with every address that is resolved, so only with a choice."""
    IPV4_ADDRESSES = 5
    IPV4_ROUTES = 7
    IPV6_ADDRESSES = 9
    IPV6_ROUTES = 11
    IPV4_PARAMETERS = 24
    """``forwarding`` and ``rp_filter`` among others; of most parameters below ``net`` the kernel says nothing."""
    IPV6_PARAMETERS = 25


ALL = tuple(group for group in Group if group is not Group.NEIGHBOURS)
"""What a host's routes may depend on."""

_NEIGHBOUR_MESSAGE = struct.Struct("=4xH10x 4xiH")
"""The type in ``struct nlmsghdr``, and of ``struct ndmsg`` the interface and the state."""
_DELETED = 29
"""``RTM_DELNEIGH``. It does not tell what state the entry was in before."""
_PERMANENT = 0x80
"""``NUD_PERMANENT``: an entry that somebody has set, and that no protocol has found out."""


def permanent_entry_of(devices: Callable[[], Collection[str]]) -> Callable[[bytes], bool]:
    """Whether a message of :attr:`Group.NEIGHBOURS` may be about a permanent entry of one of the devices, for a choice.

    What is deleted with its device is not, as that has no name any more; :attr:`Group.LINKS` tells of it.
    """

    def concerns(message: bytes) -> bool:
        if len(message) < _NEIGHBOUR_MESSAGE.size:
            return False
        kind, index, state = _NEIGHBOUR_MESSAGE.unpack_from(message)
        if kind != _DELETED and not state & _PERMANENT:
            return False  # an address that is looked for, found or not found
        try:
            return socket.if_indextoname(index) in devices()
        except OSError:
            return False  # the device has gone meanwhile

    return concerns


class ChangeSignal:
    """Tells that something has changed in the kernel's network configuration. Made and used inside one event loop.

    What changed it does not say: whoever waits looks at everything again.

    :param groups: which changes; see rtnetlink(7).
    :param choice: whether a message, given whole, is about what is waited for; without it, all are.
    :raises overlaynet.netlink.NetlinkError: if the kernel does not tell this process.
    """

    _GATHER = 0.05
    """Seconds to wait for more changes after the first one."""
    _INTERVAL = 1.0
    """Least seconds between two returns, so that a host whose routes never rest does not keep its daemon busy."""

    def __init__(self, groups: Iterable[Group] = ALL, choice: Callable[[bytes], bool] | None = None) -> None:
        self._choice = choice
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
        if self._choice is not None and not self._is_chosen(self._choice):
            return
        # Read nothing until somebody waits: one message says as much as a thousand, and so does a full buffer.
        self._loop.remove_reader(self._socket)
        self._noticed.set()

    def _is_chosen(self, choice: Callable[[bytes], bool]) -> bool:
        while True:
            try:
                if choice(self._socket.recv(_LARGEST)):
                    return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                return True  # messages were lost: it may have been among them

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
