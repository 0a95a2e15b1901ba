"""Pools of connections that use none again whose address this host has lost: no answer would find its way back."""

from __future__ import annotations

import errno
import socket

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


def has_its_address(connection: socket.socket) -> bool:
    """True unless the address that a connection was made from is no longer one of this host."""
    address, _, *scope = connection.getsockname()
    with socket.socket(connection.family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0, *scope))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


class _Connection(HTTPConnection):
    @property
    def is_connected(self) -> bool:
        return super().is_connected and self.sock is not None and has_its_address(self.sock)


class _TLSConnection(HTTPSConnection):
    @property
    def is_connected(self) -> bool:
        return super().is_connected and self.sock is not None and has_its_address(self.sock)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


POOLS = {"http": _Pool, "https": _TLSPool}
"""The classes for urllib3's pool managers, by scheme."""
