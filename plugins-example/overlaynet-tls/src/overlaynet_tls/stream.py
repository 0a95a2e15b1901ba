"""Packets in a TLS stream: where each begins and ends, and who is at the other end.

A stream begins with one byte from the host that was called: :data:`VERSION`, which says that it takes packets from the
caller. All else goes from the caller to it: each packet behind its length, two bytes in network byte order.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from ipaddress import ip_address

import attrs

from overlaynet.api import BackendError, IPAddress

VERSION = b"\x01"
"""Of what goes through a stream."""
PATIENCE = 10.0
"""Seconds that a host may take to connect, to shake hands, or to acknowledge what it was sent."""


def frame(packet: bytes) -> bytes:
    """A packet as it goes through a stream."""
    return len(packet).to_bytes(2, "big") + packet


class Deframer:
    """Cuts a stream into packets again. It keeps less than one packet, whatever comes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The packets that are complete now; they may be empty, or no packets at all."""
        stream, at, packets = self._rest + data, 0, []
        while (begin := at + 2) <= len(stream):
            end = begin + int.from_bytes(stream[at:begin], "big")
            if end > len(stream):
                break
            packets.append(stream[begin:end])
            at = end
        self._rest = stream[at:]
        return packets


@attrs.frozen
class Identity:
    """What makes this host a member: PEM files of its certificate, its key, and the authority of all members."""

    certificate: str
    key: str
    authority: str

    def context(self, purpose: int) -> ssl.SSLContext:
        """For one connection: the files are read each time, so that new ones count from the next connection on.

        :param purpose: ``ssl.PROTOCOL_TLS_SERVER`` or ``ssl.PROTOCOL_TLS_CLIENT``.
        :raises BackendError: naming the files that cannot be used.
        """
        context = ssl.SSLContext(purpose)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # check_host() does that, for both sides
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            # A key that is encrypted is an error: nobody is there who could be asked for its password.
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:
            raise BackendError(
                f"the certificate {self.certificate} and its key {self.key} cannot be used: {error}; name others with "
                f"--backend-option Certificate=FILE and Key=FILE"
            ) from error
        try:
            context.load_verify_locations(self.authority)
        except OSError as error:
            raise BackendError(
                f"the authority's certificate {self.authority} cannot be used: {error}; name another with "
                f"--backend-option Authority=FILE"
            ) from error
        return context


def check_host(transport: asyncio.BaseTransport, address: IPAddress) -> None:
    """Make sure that the certificate at the other end is that of the host with this address, and of no other member.

    :raises ssl.CertificateError: if it does not name the address (``subjectAltName``, ``IP``).
    """
    names = (transport.get_extra_info("peercert") or {}).get("subjectAltName", ())
    if address not in [ip_address(value) for kind, value in names if kind == "IP Address"]:
        raise ssl.CertificateError(f"its certificate does not name the address {address}")


def limit_patience(connection: socket.socket) -> None:
    """Have the kernel end a connection whose other end is silent, though it was sent something, or is asked now and then."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PATIENCE * 1000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(PATIENCE))


async def call(identity: Identity, address: IPAddress, port: int, own: IPAddress) -> asyncio.StreamWriter:
    """Connect to the host at ``address``, from this host's address ``own``; return when it takes packets.

    :raises OSError: if it cannot be reached, does not answer in time, or either side does not accept the other.
    :raises EOFError: if it ends the connection instead: it may not know this node yet.
    :raises BackendError: if this host's own files cannot be used.
    """
    context = identity.context(ssl.PROTOCOL_TLS_CLIENT)
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(str(address), port, ssl=context, local_addr=(str(own), 0))
        try:
            check_host(writer.transport, address)
            limit_patience(writer.get_extra_info("socket"))
            version = await reader.readexactly(1)
            if version != VERSION:
                raise ConnectionError(f"it speaks version {version[0]}, and this node {VERSION[0]}")
        except BaseException:
            writer.transport.abort()
            raise
    return writer


async def answer(
    identity: Identity, connection: socket.socket, address: IPAddress
) -> tuple[asyncio.StreamReader, asyncio.WriteTransport]:
    """Shake hands with the host at ``address``, which has connected, and tell it that it may send.

    :raises OSError: if it does not do so in time, or either side does not accept the other.
    :raises BackendError: if this host's own files cannot be used.
    """
    context = identity.context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # nobody would read them
    limit_patience(connection)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
        lambda: asyncio.StreamReaderProtocol(reader), connection, ssl=context, ssl_handshake_timeout=PATIENCE
    )
    try:
        check_host(transport, address)
    except BaseException:
        transport.abort()
        raise
    transport.write(VERSION)
    return reader, transport
