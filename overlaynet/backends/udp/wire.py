"""The UDP socket that faces the other hosts."""

from __future__ import annotations

import errno
import socket

from overlaynet.errors import BackendError
from overlaynet.model import IPAddress

_BUFFER = 4 * 1024 * 1024
"""Bytes of packets that may wait in the kernel while the engine is busy: about a tenth of a second at 300 Mbit/s."""
# Missing from the socket module. As root, they are not bounded by net.core.rmem_max and wmem_max.
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33


def open_socket(address: IPAddress, port: int) -> socket.socket:
    """A non-blocking UDP socket bound to ``address`` and ``port``, with large buffers; the caller closes it.

    :raises BackendError: naming what is in the way.
    """
    wire = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    try:
        wire.setblocking(False)
        if address.version == 6:
            wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for forced, option in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                wire.setsockopt(socket.SOL_SOCKET, forced, _BUFFER)
            except OSError:
                wire.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        wire.bind((str(address), port))
    except OSError as error:
        wire.close()
        raise BackendError(_explain(error, address, port)) from error
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
