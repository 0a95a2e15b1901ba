"""The UDP sockets that face the other hosts."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
import weakref
from collections.abc import Iterable

from overlaynet.errors import BackendError
from overlaynet.logs import fields
from overlaynet.model import IPAddress

log = logging.getLogger(__name__)

_BUFFER = 4 * 1024 * 1024
"""Bytes of packets that may wait in the kernel while the engine is busy: about a tenth of a second at 300 Mbit/s."""
# Missing from the socket module. As root, they are not bounded by net.core.rmem_max and wmem_max.
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
# Linux 4.12 (linux/sock_diag.h): nine counts, of which the last is that of datagrams that were dropped.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=9I")


def open_sockets(addresses: Iterable[IPAddress], port: int, count: int) -> dict[IPAddress, list[socket.socket]]:
    """For each address ``count`` non-blocking UDP sockets bound to it and ``port``, with large buffers; the caller closes them.

    Of several sockets with one address, the kernel chooses by the datagram's addresses and ports, so that what comes from one
    socket elsewhere comes to one socket here (``SO_REUSEPORT``, socket(7)). If it does not let them share the address, there
    are fewer (but one at least), and that is logged.

    :raises BackendError: naming what is in the way; there are no sockets then.
    """
    with contextlib.ExitStack() as undo:
        opened: dict[IPAddress, list[socket.socket]] = {}
        for address in addresses:
            sockets = opened[address] = [undo.enter_context(_open_first_socket(address, port))]
            while len(sockets) < count:
                try:
                    sockets.append(undo.enter_context(_open_next_socket(address, port, sockets[0])))
                except OSError as error:
                    log.warning(
                        "fewer sockets than asked for",
                        extra=fields(address=address, sockets=len(sockets), wanted=count, reason=error.strerror),
                    )
                    break
        undo.pop_all()
    return opened


class Losses:
    """Counts the datagrams that the kernel drops at sockets before anybody has read them.

    Their buffer was full, or a checksum was wrong. Each socket has a count of its own in the kernel, of 32 bits, which a flood
    fills in half a day: look more often than that, and before a socket is closed.
    """

    def __init__(self) -> None:
        self._total = 0
        self._seen: weakref.WeakKeyDictionary[socket.socket, int] = weakref.WeakKeyDictionary()

    def look(self, wires: Iterable[socket.socket]) -> int:
        """How many there have been at all sockets that were ever looked at, those included."""
        for wire in wires:
            dropped = _dropped_at(wire)
            self._total += (dropped - self._seen.get(wire, 0)) % 2**32
            self._seen[wire] = dropped
        return self._total


def _dropped_at(wire: socket.socket) -> int:
    try:
        counts = wire.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return 0  # an older kernel does not tell
    return int(_MEMINFO.unpack(counts)[-1])


def _open_first_socket(address: IPAddress, port: int) -> socket.socket:
    # It is bound as one that shares with nobody, so that another program's socket is an error, as ever.
    try:
        return _bound_socket(address, port, shared=False)
    except OSError as error:
        raise BackendError(_explain(error, address, port)) from error


def _open_next_socket(address: IPAddress, port: int, first: socket.socket) -> socket.socket:
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return _bound_socket(address, port, shared=True)


def _bound_socket(address: IPAddress, port: int, *, shared: bool) -> socket.socket:
    wire = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    try:
        wire.setblocking(False)
        if shared:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address.version == 6:
            wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for forced, option in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                wire.setsockopt(socket.SOL_SOCKET, forced, _BUFFER)
            except OSError:
                wire.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        wire.bind((str(address), port))
    except OSError:
        wire.close()
        raise
    return wire


def _explain(error: OSError, address: IPAddress, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"UDP port {port} on {address} is in use by another program (flanneld, or another overlaynet?); "
            f"stop it, or choose another Port in the network document's Backend"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address} is not an address of this host; name the interface towards the other hosts with --iface"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"UDP port {port} on {address} needs root, or the capability CAP_NET_BIND_SERVICE; run overlaynet with it, "
            f"or choose a Port above 1023 in the network document's Backend"
        )
    return f"UDP port {port} on {address} cannot be opened: {error.strerror}"
