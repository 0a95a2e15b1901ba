"""The way to one peer: packets wait in a queue until there is a connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from overlaynet.api import JSON, BackendError, Backoff, Dropped, IPAddress, Peer, fields
from overlaynet_tls.stream import frame

log = logging.getLogger(__name__)

LONGEST_QUEUE = 256
"""Packets that wait for one peer. When there are so many, new ones are dropped, as network cards do it: order stays."""

Call = Callable[[IPAddress], Awaitable[asyncio.StreamWriter]]


class Link:
    """A peer, its counters, and the connection on which it is sent packets. Made inside the event loop.

    There is no connection before the first packet. When one fails, or cannot be had, the next packet after a pause makes
    another; the pauses grow. Meanwhile packets are dropped, for they would come too late. No link waits for another.
    """

    def __init__(self, peer: Peer, address: IPAddress, call: Call) -> None:
        self.peer = peer
        self.address = address
        self._call = call
        self._state = "idle"
        self._queue: list[bytes] = []
        self._filled = asyncio.Event()
        self._sent_packets = self._sent_bytes = self._received_packets = self._received_bytes = 0

    def status(self) -> dict[str, JSON]:
        """What an operator wants to know of the peer."""
        return {
            "address": str(self.address),
            "state": self._state,
            "sent_packets": self._sent_packets,
            "sent_bytes": self._sent_bytes,
            "received_packets": self._received_packets,
            "received_bytes": self._received_bytes,
        }

    def count_received(self, packet: bytes) -> None:
        """Count a packet that was delivered; it came on another connection, by which the peer has called."""
        self._received_packets += 1
        self._received_bytes += len(packet)

    def send(self, packet: bytes) -> None:
        """Have a packet sent. :raises Dropped: ``not_connected`` or ``queue_full``."""
        if self._state == "failed":
            raise Dropped("not_connected", f"there is no connection to {self.address}")
        if len(self._queue) >= LONGEST_QUEUE:
            raise Dropped("queue_full", f"too many packets wait for {self.address}")
        self._queue.append(packet)
        self._filled.set()

    async def run(self) -> None:
        """Send what is queued, for ever."""
        pause = Backoff()
        told = ""
        while True:
            await self._filled.wait()
            try:
                writer = await self._call(self.address)
                self._state, told = "connected", ""
                pause.reset()
                log.info("connected", extra=fields(subnet=self.peer.subnets, address=self.address))
                try:
                    await self._carry(writer)
                finally:
                    writer.transport.abort()
            except (OSError, EOFError, BackendError) as error:
                self._state = "failed"
                if str(error) != told:
                    told = str(error)
                    log.warning(
                        "not connected", extra=fields(subnet=self.peer.subnets, address=self.address, reason=told)
                    )
            self._queue.clear()
            self._filled.clear()
            await asyncio.sleep(pause.next())
            self._state = "idle"

    async def _carry(self, writer: asyncio.StreamWriter) -> None:
        """Send until the connection ends. :raises OSError: which is how it ends."""
        while True:
            await self._filled.wait()
            if writer.is_closing():
                raise ConnectionResetError("the peer has ended the connection")
            packets, self._queue = self._queue, []
            self._filled.clear()
            writer.write(b"".join(map(frame, packets)))
            await writer.drain()
            self._sent_packets += len(packets)
            self._sent_bytes += sum(map(len, packets))
